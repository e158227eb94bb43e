"""Random crops and flips, keyed: what happens to an image is a function of seed, epoch and place.

Nothing depends on the batch that an image is in, the order of batches or the number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from swalp.noise import philox, stream_seed

PADDING = 4  # pixels around an image of which `crop_flip` takes a part
ATTEMPTS = 10  # of `resized_crop` before it takes the middle
_WORD = 2.0**32


@dataclass(frozen=True, slots=True)
class Draws:
    """The random numbers for the training images in one epoch of a run."""

    seed: int
    epoch: int

    def words(self, examples: Tensor, attempt: int = 0) -> Tensor:
        """Four words of 32 bits for each example.

        From Philox4x32-10, with the run's stream "augmentation" as the key and (example, 0, epoch,
        attempt) as the counter.

        Args:
            examples: int64 (n,).
            attempt: gives other words for the same example.

        Returns:
            int64 (4, n).
        """
        zero = torch.zeros_like(examples)
        counter = (examples, zero, zero + self.epoch, zero + attempt)
        return torch.stack(philox(counter, stream_seed(self.seed, "augmentation", "")))


def crop_flip(pixels: Tensor, words: Tensor) -> Tensor:
    """A part of each image, framed in `PADDING` black pixels, and its mirror image half the time.

    Args:
        pixels: (n, height, width, channels).
        words: int64 (4, n), as of `Draws`. The first chooses among the 2 PADDING + 1 vertical
            offsets, the second among the horizontal ones, the third flips.

    Returns:
        Of the same shape and dtype.
    """
    n, height, width, channels = pixels.shape
    down, right, flip = _offset(words[0]), _offset(words[1]), words[2] >> 31 == 1
    framed = F.pad(pixels, (0, 0, PADDING, PADDING, PADDING, PADDING))
    across = torch.arange(width).expand(n, width)
    across = torch.where(flip[:, None], width - 1 - across, across) + right[:, None]
    rows = torch.arange(height) + down[:, None] + framed.shape[1] * torch.arange(n)[:, None]
    places = rows[:, :, None] * framed.shape[2] + across[:, None, :]
    return framed.view(-1, channels)[places.view(-1)].view(pixels.shape)


def resized_crop(height: int, width: int, words: Tensor) -> tuple[int, int, int, int] | None:
    """Where to cut an image of that size before it is resized to a square, or None: try again.

    The cut has 8 to 100 % of the image's area and 3/4 to 4/3 of its height as width, both
    distributed as published (the second on a logarithmic scale).

    Args:
        height: of the image, pixels.
        width: likewise.
        words: int64 (4,), one column of what `Draws` returns: area, shape, top, left.

    Returns:
        Left, top, right and bottom, as Pillow counts them; None if the cut would not fit.

    Source: Szegedy et al. 2015, "Going deeper with convolutions".
    """
    area, shape, top, left = (word / _WORD for word in words.tolist())
    cut = height * width * (0.08 + 0.92 * area)
    ratio = math.exp((2 * shape - 1) * math.log(4 / 3))
    wide, high = round(math.sqrt(cut * ratio)), round(math.sqrt(cut / ratio))
    if not (0 < wide <= width and 0 < high <= height):
        return None
    x, y = int(left * (width - wide + 1)), int(top * (height - high + 1))
    return x, y, x + wide, y + high


def _offset(word: Tensor) -> Tensor:
    return word * (2 * PADDING + 1) >> 32
