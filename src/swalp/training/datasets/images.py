"""Labelled images in memory, and the batches that a run takes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from swalp.noise import stream_seed
from swalp.training.augmentation import Draws, crop_flip

EVALUATION_BATCH = 1000  # images, at most, at once
EVALUATION_PIXELS = 2**22  # likewise: 83 images of 224 x 224


class Images(Protocol):
    """Labelled images, of which batches are taken."""

    @property
    def labels(self) -> Tensor:
        """int64 (N,), on the CPU."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image in a batch."""

    def batches(
        self, rows: Iterable[Tensor], draws: Draws | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of one batch after another.

        Args:
            rows: the examples of each batch, int64 (n,).
            draws: if given, the images are augmented at random, as training images are.

        Yields:
            float32 (n, channels, height, width), shifted and scaled, and int64 (n,).
        """

    def between(self, first: int, last: int) -> Images:
        """The images from `first` to before `last`, which shares their memory."""


@dataclass(frozen=True, slots=True, eq=False)
class MemoryImages:
    """`Images` kept as bytes, which become floats a batch at a time.

    Attributes:
        pixels: uint8 (N, height, width, channels).
        labels: int64 (N,).
        mean: float32 (channels,), in units of `pixels`; subtracted from them.
        scale: float32 (channels,); the difference is divided by it.
    """

    pixels: Tensor
    labels: Tensor
    mean: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """As of `Images`."""
        _, height, width, channels = self.pixels.shape
        return channels, height, width

    def batches(
        self, rows: Iterable[Tensor], draws: Draws | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As of `Images`; `crop_flip` augments. Batches of colour images are channels-last."""
        for examples in rows:
            pixels = self.pixels[examples]
            if draws is not None:
                pixels = crop_flip(pixels, draws.words(examples))
            yield as_batch(pixels, self.mean, self.scale), self.labels[examples]

    def between(self, first: int, last: int) -> MemoryImages:
        """As of `Images`."""
        part = slice(first, last)
        return replace(self, pixels=self.pixels[part], labels=self.labels[part])


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """A training and a test set.

    Attributes:
        train: the training images.
        test: the test images, shifted and scaled likewise.
        classes: how many; labels are smaller.
        origin: where the files were found.
        validation: of the training images, those held out from training.
    """

    train: Images
    test: Images
    classes: int
    origin: str
    validation: Images | None = None


def as_batch(pixels: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Bytes (n, height, width, channels) to floats (n, channels, height, width)."""
    x = pixels.float().sub_(mean).div_(scale)
    n, height, width, channels = x.shape
    # A view either way. With one channel both layouts are in order, but the strides of the second
    # would have PyTorch's convolutions go channels-last, which does not pay there.
    return x.view(n, 1, height, width) if channels == 1 else x.permute(0, 3, 1, 2)


def evaluation_batches(
    images: Images, draws: Draws | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order, as they are or, given `draws`, augmented.

    The size of a batch is a function of that of an image alone, so that an evaluation gives the
    same bits again.
    """
    _, height, width = images.shape
    size = max(1, min(EVALUATION_BATCH, EVALUATION_PIXELS // (height * width)))
    return images.batches(torch.split(torch.arange(len(images.labels)), size), draws)


def epoch_order(examples: int, seed: int, epoch: int) -> Tensor:
    """The order of the training examples in one epoch: a permutation, int64 (examples,).

    A function of its arguments alone, so that a sampler's position is just a number of steps.
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, "order", str(epoch)))
    return torch.randperm(examples, generator=generator)
