"""Data sets by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from swalp.training.datasets import cifar, grey, imagenet
from swalp.training.datasets.images import (
    Dataset,
    Images,
    epoch_order,
    evaluation_batches,
)
from swalp.training.datasets.published import cache_dir
from swalp.training.mistakes import UserError

__all__ = [
    "Dataset",
    "Images",
    "cache_dir",
    "epoch_order",
    "evaluation_batches",
    "hold_out",
    "load",
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
    if name in grey.PUBLISHED:
        return grey.load(name, data_dir, fetch=download)
    if name == "imagenet":
        return imagenet.load(data_dir, fetch=download)
    return cifar.load(name, data_dir, fetch=download)


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
