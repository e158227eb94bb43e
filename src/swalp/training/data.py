"""Data sets by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from swalp.training.datasets import cifar, grey, imagenet
from swalp.training.datasets.images import (
    Dataset,
    Images,
    MemoryImages,
    epoch_order,
    evaluation_batches,
)
from swalp.training.datasets.published import cache_dir
from swalp.training.mistakes import UserError

# Channels, height (and width) and classes of each data set.
SHAPES = {
    "digits": (1, 8, 10),
    "mnist": (1, 28, 10),
    "fashion-mnist": (1, 28, 10),
    "cifar10": (3, 32, 10),
    "cifar100": (3, 32, 100),
    "imagenet": (3, imagenet.SIZE, 1000),
}

__all__ = [
    "Dataset",
    "Images",
    "cache_dir",
    "epoch_order",
    "evaluation_batches",
    "hold_out",
    "load",
    "synthetic",
]


def load(name: str, data_dir: Path | None = None, *, download: bool = False) -> Dataset:
    """The data set of that name.

    Args:
        name: as `RunConfig.data`.
        data_dir: where its files are; default: `cache_dir`. The digits come with scikit-learn.
        download: whether to fetch missing files from where they are published, by checksum, into a
            folder of that name in `data_dir`.

    Raises:
        UserError: a file is missing, damaged or not the published one, or cannot be downloaded.
    """
    if name == "digits":
        return grey.load_digits()
    if name == "imagenet":
        return imagenet.load(data_dir, fetch=download)
    if data_dir is not None and not data_dir.is_dir() and (data_dir.exists() or not download):
        is_what = "is no folder" if data_dir.exists() else "does not exist"
        raise UserError(f"--data-dir {data_dir}: it {is_what}; name the folder with the data files")
    if name in grey.PUBLISHED:
        return grey.load(name, data_dir, fetch=download)
    return cifar.load(name, data_dir, fetch=download)


def synthetic(name: str, examples: int) -> Dataset:
    """Random images and labels of the shapes that the data set of that name has; no file is read.

    Args:
        name: as `RunConfig.data`.
        examples: in the training set, and in the test set.
    """
    channels, size, classes = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    shape = (examples, size, size, channels)
    images = MemoryImages(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        torch.randint(0, classes, (examples,), generator=generator),
        torch.full((channels,), 128.0),
        torch.full((channels,), 64.0),
    )
    return Dataset(images, images, classes, "random numbers")


def hold_out(data: Dataset, examples: int) -> Dataset:
    """`data` with its last training examples set aside for validation; 0: as it is.

    Raises:
        UserError: no example would be left to train on.
    """
    if examples == 0:
        return data
    have = len(data.train.labels)
    if examples >= have:
        raise UserError(
            f"validation_examples = {examples} leaves none of the {have} training examples to "
            f"train on"
        )
    left = have - examples
    return replace(
        data, train=data.train.between(0, left), validation=data.train.between(left, have)
    )
