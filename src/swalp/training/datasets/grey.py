"""Grey images: scikit-learn's digits, MNIST and Fashion-MNIST."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swalp.training.datasets.images import Dataset, MemoryImages
from swalp.training.datasets.published import PublishedFile, cache_dir, contents, download
from swalp.training.mistakes import UserError

CLASSES = 10
DIGITS_TRAIN = 1000  # of 1797, in the file's order; the other 797 are the test set
_LIMIT = 2**28  # bytes; the largest file unpacks to 47 million


@dataclass(frozen=True, slots=True)
class File:
    """A published file: its SHA-256 as published (compressed), and unpacked."""

    name: str
    compressed: str
    unpacked: str


@dataclass(frozen=True, slots=True)
class Published:
    """The files of a data set (training and test images and labels), and where they come from."""

    url: str
    train_x: File
    train_y: File
    test_x: File
    test_y: File

    @property
    def files(self) -> tuple[File, ...]:
        """All of them."""
        return self.train_x, self.train_y, self.test_x, self.test_y


PUBLISHED = {
    "mnist": Published(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        File(
            "train-images-idx3-ubyte.gz",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        File(
            "train-labels-idx1-ubyte.gz",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        File(
            "t10k-images-idx3-ubyte.gz",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        File(
            "t10k-labels-idx1-ubyte.gz",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "fashion-mnist": Published(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        File(
            "train-images-idx3-ubyte.gz",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        File(
            "train-labels-idx1-ubyte.gz",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        File(
            "t10k-images-idx3-ubyte.gz",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        File(
            "t10k-labels-idx1-ubyte.gz",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
}


def load_digits() -> Dataset:
    """The 1,797 scanned digits of 8 x 8 pixels that come with scikit-learn."""
    from sklearn import datasets

    digits = datasets.load_digits()
    x, y = torch.tensor(digits.images).byte(), torch.tensor(digits.target)
    n = DIGITS_TRAIN
    return _dataset(x[:n], y[:n], x[n:], y[n:], origin="scikit-learn")


def load(name: str, data_dir: Path | None = None, *, fetch: bool = False) -> Dataset:
    """MNIST or Fashion-MNIST, from the four original files.

    Args:
        name: "mnist" or "fashion-mnist".
        data_dir: where the files are, in a folder of that name or directly; default: `cache_dir`.
        fetch: whether to fetch missing files, into a folder of that name.

    Raises:
        UserError: a file is missing, truncated or not the published one, or cannot be downloaded.
    """
    published = PUBLISHED[name]
    paths = {file: _find(name, file, data_dir, fetch) for file in published.files}
    return _dataset(
        *(
            _read(name, file, paths[file], images=file.name.endswith("idx3-ubyte.gz"))
            for file in published.files
        ),
        origin=str(paths[published.train_x].parent),
    )


def _dataset(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, origin: str
) -> Dataset:
    """Bytes (N, height, width), scaled to mean 0 and variance 1 over the training images."""
    scale, mean = torch.std_mean(train_x.double(), correction=0)  # exact enough in any order
    scale, mean = scale.float().view(1), mean.float().view(1)
    return Dataset(
        train=MemoryImages(train_x.unsqueeze(-1), train_y.long(), mean, scale),
        test=MemoryImages(test_x.unsqueeze(-1), test_y.long(), mean, scale),
        classes=CLASSES,
        origin=origin,
    )


def _find(name: str, file: File, data_dir: Path | None, fetch: bool) -> Path:
    root = cache_dir() if data_dir is None else data_dir
    for path in (root / name / file.name, root / file.name):
        if path.exists():
            return path
    published = PublishedFile(PUBLISHED[name].url + file.name, f"sha256:{file.compressed}")
    if fetch:
        return download(published, root / name)
    option = "--data-dir DIR or " if data_dir is None else ""
    raise UserError(
        f"no {file.name} of {name} in {root / name} or {root}; give {option}--download to fetch it "
        f"from {PUBLISHED[name].url}"
    )


def _read(name: str, file: File, path: Path, *, images: bool) -> Tensor:
    """The numbers of an IDX file: uint8, (N, height, width) of images or (N,) of labels."""
    content = contents(path, _LIMIT)
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
