"""Data sets as tensors in memory: scikit-learn's digits, MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from swalp.noise import stream_seed
from swalp.training.mistakes import UserError

CLASSES = 10
DIGITS_TRAIN = 1000  # of 1797, in the file's order; the other 797 are the test set


@dataclass(frozen=True, slots=True)
class Dataset:
    """Images and labels, on the CPU.

    Attributes:
        train_x: float32 (N, 1, height, width), of mean 0 and variance 1 over the training images.
        train_y: int64 (N,), 0..9.
        test_x: as `train_x`, with the same shift and scale.
        test_y: as `train_y`.
        origin: where the files were found.
        validation_x: as `train_x`, of examples held out from training by `hold_out`.
        validation_y: as `train_y`.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    origin: str
    validation_x: Tensor | None = None
    validation_y: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _File:
    """A published file: its SHA-256 as published (compressed), and unpacked."""

    name: str
    compressed: str
    unpacked: str


@dataclass(frozen=True, slots=True)
class _Published:
    """The files of a data set (training and test images and labels), and where they come from."""

    url: str
    train_x: _File
    train_y: _File
    test_x: _File
    test_y: _File

    @property
    def files(self) -> tuple[_File, ...]:
        return self.train_x, self.train_y, self.test_x, self.test_y


PUBLISHED = {
    "mnist": _Published(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        _File(
            "train-images-idx3-ubyte.gz",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        _File(
            "train-labels-idx1-ubyte.gz",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        _File(
            "t10k-images-idx3-ubyte.gz",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        _File(
            "t10k-labels-idx1-ubyte.gz",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "fashion-mnist": _Published(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        _File(
            "train-images-idx3-ubyte.gz",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        _File(
            "train-labels-idx1-ubyte.gz",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        _File(
            "t10k-images-idx3-ubyte.gz",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        _File(
            "t10k-labels-idx1-ubyte.gz",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
}


def load(name: str, data_dir: Path | None = None, *, download: bool = False) -> Dataset:
    """The data set of that name.

    Args:
        name: "digits", "mnist" or "fashion-mnist".
        data_dir: where its files are, in a folder of that name or directly; default: `cache_dir`.
            The digits come with scikit-learn.
        download: whether to fetch missing files from their public mirror, checked by SHA-256, into
            a folder of that name in `data_dir`.

    Raises:
        UserError: a file is missing, truncated or not the published one, or cannot be downloaded.
    """
    if name == "digits":
        return _digits()
    published = PUBLISHED[name]
    paths = {file: _find(name, file, data_dir, download) for file in published.files}
    return _scaled(
        *(
            _read_idx(name, file, paths[file], images=file.name.endswith("idx3-ubyte.gz"))
            for file in published.files
        ),
        origin=str(paths[published.train_x].parent),
    )


def hold_out(data: Dataset, examples: int) -> Dataset:
    """`data` with its last training examples set aside for validation; 0: as it is.

    Raises:
        UserError: no example would be left to train on.
    """
    if examples == 0:
        return data
    left = len(data.train_x) - examples
    if left < 1:
        raise UserError(
            f"validation_examples = {examples} leaves none of the {len(data.train_x)} training "
            f"examples to train on"
        )
    return replace(
        data,
        train_x=data.train_x[:left],
        train_y=data.train_y[:left],
        validation_x=data.train_x[left:],
        validation_y=data.train_y[left:],
    )


def cache_dir() -> Path:
    """Where files are looked for and downloaded to if nothing else is said."""
    import pooch

    return Path(pooch.os_cache("swalp"))


def epoch_order(examples: int, seed: int, epoch: int) -> Tensor:
    """The order of the training examples in one epoch: a permutation, int64 (examples,).

    A function of its arguments alone, so that a sampler's position is just a number of steps.
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, "order", str(epoch)))
    return torch.randperm(examples, generator=generator)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.images), torch.tensor(digits.target)
    n = DIGITS_TRAIN
    return _scaled(x[:n], y[:n], x[n:], y[n:], origin="scikit-learn")


def _scaled(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, origin: str
) -> Dataset:
    """Images (N, height, width) to float32 (N, 1, height, width), shifted and scaled."""
    train_x, test_x = train_x.unsqueeze(1).float(), test_x.unsqueeze(1).float()
    scale, mean = torch.std_mean(train_x.double(), correction=0)  # exact enough in any order
    scale, mean = scale.float(), mean.float()
    return Dataset(
        (train_x - mean) / scale,
        train_y.long(),
        (test_x - mean) / scale,
        test_y.long(),
        origin,
    )


def _find(name: str, file: _File, data_dir: Path | None, download: bool) -> Path:
    root = cache_dir() if data_dir is None else data_dir
    for path in (root / name / file.name, root / file.name):
        if path.exists():
            return path
    if download:
        return _download(name, file, root / name)
    option = "--data-dir DIR or " if data_dir is None else ""
    raise UserError(
        f"no {file.name} of {name} in {root / name} or {root}; give {option}--download to fetch it "
        f"from {PUBLISHED[name].url}"
    )


def _download(name: str, file: _File, target: Path) -> Path:
    import pooch

    url = PUBLISHED[name].url + file.name
    pooch.get_logger().setLevel("WARNING")
    try:
        found = pooch.retrieve(url, f"sha256:{file.compressed}", fname=file.name, path=target)
    except (OSError, ValueError) as error:  # no network, full disk; another checksum
        reason = " ".join(str(error).split())
        raise UserError(f"{url}: cannot download to {target}: {reason}") from None
    return Path(found)


def _read_idx(name: str, file: _File, path: Path, *, images: bool) -> Tensor:
    """The numbers of an IDX file: uint8, (N, height, width) of images or (N,) of labels."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: truncated or no gzip file: {error}; fetch it anew") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.unpacked:
        raise UserError(f"{path}: {_identity(digest)}, not {file.name} of {name} as published")
    axes = 3 if images else 1
    shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
    return torch.frombuffer(bytearray(content[4 + 4 * axes :]), dtype=torch.uint8).reshape(shape)


def _identity(digest: str) -> str:
    """What a file with that unpacked checksum is."""
    for name, published in PUBLISHED.items():
        for file in published.files:
            if file.unpacked == digest:
                return f"this is {file.name} of {name}"
    return f"corrupt: unpacked, its SHA-256 is {digest}"
