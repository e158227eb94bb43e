"""CIFAR-10 and CIFAR-100, from the official files in any of their layouts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swalp.training.datasets import pickled
from swalp.training.datasets.images import Dataset, MemoryImages
from swalp.training.datasets.published import (
    PublishedFile,
    cache_dir,
    contents,
    download,
    md5,
    members,
)
from swalp.training.mistakes import UserError

PIXELS = 3 * 32 * 32
# Of the published runs, in units of a pixel's 0..255; the deviations are a little smaller than
# those of all pixels (0.2470, 0.2435, 0.2616).
MEAN = (0.4914, 0.4822, 0.4465)
DEVIATION = (0.2023, 0.1994, 0.2010)
_SITE = "https://www.cs.toronto.edu/~kriz/"
_LIMIT = 2**28  # bytes; the largest file of all has 154 million


@dataclass(frozen=True, slots=True)
class Part:
    """A file of images, the same in the python and in the binary layout.

    Attributes:
        name: of the file in the python layout; in the binary layout ``.bin`` follows.
        md5: of the file in the python layout, as published.
        images: how many.
    """

    name: str
    md5: str
    images: int

    def file(self, binary: bool) -> str:
        """The name of the file in that layout."""
        return f"{self.name}.bin" if binary else self.name


@dataclass(frozen=True, slots=True)
class Cifar:
    """One of the two data sets.

    Attributes:
        title: as its authors write it, in lower case: also the folder it is looked for in.
        classes: how many.
        labels: the key of the labels in the python layout.
        label_bytes: before the pixels of each image in the binary layout; the last is the label.
        folders: of the python and the binary layout.
        archives: likewise.
        train: the training files.
        test: the test file.
    """

    title: str
    classes: int
    labels: str
    label_bytes: int
    folders: tuple[str, str]
    archives: tuple[PublishedFile, PublishedFile]
    train: tuple[Part, ...]
    test: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        """All files of images."""
        return *self.train, self.test


CIFAR = {
    "cifar10": Cifar(
        "cifar-10",
        10,
        "labels",
        1,
        ("cifar-10-batches-py", "cifar-10-batches-bin"),
        (
            PublishedFile(_SITE + "cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a"),
            PublishedFile(_SITE + "cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530"),
        ),
        tuple(
            Part(f"data_batch_{number}", checksum, 10_000)
            for number, checksum in enumerate(
                (
                    "c99cafc152244af753f735de768cd75f",
                    "d4bba439e000b95fd0a9bffe97cbabec",
                    "54ebc095f3ab1f0389bbae665268c751",
                    "634d18415352ddfa80567beed471001a",
                    "482c414d41f54cd18b22e5b47cb7c3cb",
                ),
                start=1,
            )
        ),
        Part("test_batch", "40351d587109b95175f43aff81a1287e", 10_000),
    ),
    "cifar100": Cifar(
        "cifar-100",
        100,
        "fine_labels",
        2,
        ("cifar-100-python", "cifar-100-binary"),
        (
            PublishedFile(
                _SITE + "cifar-100-python.tar.gz", "md5:eb9058c3a382ffc7106e4002c42a8d85"
            ),
            PublishedFile(
                _SITE + "cifar-100-binary.tar.gz", "md5:03b5dce01913d631647c71ecec9e9cb8"
            ),
        ),
        (Part("train", "16019d7e3df5f24257cddd939b257f8d", 50_000),),
        Part("test", "f0ef6b0ae62326f3e7ffdfab6717acfc", 10_000),
    ),
}


def load(name: str, data_dir: Path | None = None, *, fetch: bool = False) -> Dataset:
    """CIFAR-10 or CIFAR-100, all images in memory: 184 MB.

    The files are looked for in `data_dir`, in a folder ``cifar10`` or ``cifar-10`` in it, and there
    in the folder that the archive unpacks to: the python layout (``data_batch_1`` …, as they are or
    each as ``.xz`` or ``.gz``), the binary layout (likewise), or either archive, not unpacked.

    Args:
        name: "cifar10" or "cifar100".
        data_dir: default: `cache_dir`.
        fetch: whether to fetch the python archive if there is nothing.

    Raises:
        UserError: a file is missing, damaged or another one, or cannot be downloaded.
    """
    data = CIFAR[name]
    root = cache_dir() if data_dir is None else data_dir
    where = [root / name, root / data.title, root]
    for place in where:
        for binary in (False, True):
            for folder in (place / data.folders[binary], place):
                paths = [_existing(folder, part.file(binary)) for part in data.parts]
                if any(path is not None for path in paths):
                    return _from_folder(data, folder, paths, binary)
        for binary in (False, True):
            archive = place / data.archives[binary].name
            if archive.exists():
                return _from_archive(data, archive, binary)
    if fetch:
        return _from_archive(data, download(data.archives[False], root / name), False)
    option = "--data-dir DIR or " if data_dir is None else ""
    raise UserError(
        f"no {data.archives[0].name}, {data.archives[1].name} or folder {data.folders[0]} or "
        f"{data.folders[1]} in {root}, {root / name} or {root / data.title}; give {option}"
        f"--download to fetch it from {_SITE}"
    )


def _existing(folder: Path, name: str) -> Path | None:
    names = (name, f"{name}.xz", f"{name}.gz")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _from_folder(data: Cifar, folder: Path, paths: list[Path | None], binary: bool) -> Dataset:
    found = [path for path in paths if path is not None]
    if len(found) < len(paths):
        missing = ", ".join(
            part.file(binary) for part, path in zip(data.parts, paths, strict=True) if path is None
        )
        raise UserError(f"{folder}: {found[0].name} of {data.title} is there, but no {missing}")
    # Unpacking is most of the time, and leaves other threads free.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        read = list(
            pool.map(
                lambda path, part: _part(data, part, contents(path, _LIMIT), str(path), binary),
                found,
                data.parts,
            )
        )
    return _dataset(data, read, str(folder))


def _from_archive(data: Cifar, archive: Path, binary: bool) -> Dataset:
    names = [part.file(binary) for part in data.parts]
    files = members(archive, names, _LIMIT)
    read = [
        _part(data, part, files[name], f"{archive}: {name}", binary)
        for part, name in zip(data.parts, names, strict=True)
    ]
    return _dataset(data, read, str(archive))


def _dataset(data: Cifar, read: list[tuple[Tensor, Tensor]], origin: str) -> Dataset:
    mean, scale = 255 * torch.tensor(MEAN), 255 * torch.tensor(DEVIATION)
    pixels, labels = [pixels for pixels, _ in read], [labels for _, labels in read]
    return Dataset(
        train=MemoryImages(torch.cat(pixels[:-1]), torch.cat(labels[:-1]), mean, scale),
        test=MemoryImages(pixels[-1], labels[-1], mean, scale),
        classes=data.classes,
        origin=origin,
    )


def _part(
    data: Cifar, part: Part, content: bytes, where: str, binary: bool
) -> tuple[Tensor, Tensor]:
    """Pixels, uint8 (N, 32, 32, 3), and labels, int64 (N,), of a file."""
    rows, labels = (
        _binary(data, part, content, where) if binary else _python(data, part, content, where)
    )
    if int(labels.max()) >= data.classes:
        raise UserError(
            f"{where}: corrupt: it has the label {int(labels.max())} of 0..{data.classes - 1}"
        )
    planes = rows.reshape(-1, 3, 32, 32)
    return planes.permute(0, 2, 3, 1).contiguous(), labels


def _python(data: Cifar, part: Part, content: bytes, where: str) -> tuple[Tensor, Tensor]:
    digest = md5(content)
    if digest != part.md5:
        raise UserError(
            f"{where}: {_identity(digest)}, not {part.name} of {data.title} as published"
        )
    try:
        values = pickled.read(content)
        rows, labels = values["data"], values[data.labels]
        if rows.shape != (part.images, PIXELS) or len(labels) != part.images:
            raise pickled.PickleError(f"it does not hold {part.images} images")
        if not all(type(label) is int and label >= 0 for label in labels):
            raise pickled.PickleError("its labels are no numbers")
    except (pickled.PickleError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{where}: no file of {data.title}: {reason}") from None
    return rows, torch.tensor(labels)


def _binary(data: Cifar, part: Part, content: bytes, where: str) -> tuple[Tensor, Tensor]:
    record = data.label_bytes + PIXELS
    if len(content) != part.images * record:
        raise UserError(
            f"{where}: it has {len(content):,} bytes where {part.file(True)} of {data.title} has "
            f"{part.images * record:,}"
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(part.images, record)
    return records[:, data.label_bytes :], records[:, data.label_bytes - 1].long()


def _identity(digest: str) -> str:
    """What a file of the python layout with that checksum is."""
    for data in CIFAR.values():
        for part in data.parts:
            if part.md5 == digest:
                return f"this is {part.name} of {data.title}"
    return f"corrupt: unpacked, its MD5 is {digest}"
