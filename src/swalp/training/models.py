"""The networks that runs train."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from swalp.noise import stream_seed


def cnn(size: int, width: int, classes: int) -> nn.Sequential:
    """Two convolutions with batch norm, each followed by pooling, and a linear layer.

    Args:
        size: height and width of the images, which have one channel.
        width: channels of the first convolution; the second has twice as many.
        classes: outputs.
    """
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (size // 4) ** 2, classes),
    )


def strided_cnn(size: int, width: int, classes: int) -> nn.Sequential:
    """As `cnn`, with convolutions of stride 2 in place of pooling: a third of the time.

    Args:
        size: height and width of the images, which have one channel.
        width: channels of the first convolution; the second has twice as many.
        classes: outputs.
    """
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * (-(-size // 4)) ** 2, classes),
    )


def mlp(size: int, width: int, classes: int) -> nn.Sequential:
    """Three linear layers, batch norm after the first two.

    Args:
        size: height and width of the images, which have one channel.
        width: hidden units.
        classes: outputs.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(size**2, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


_KINDS: dict[str, Callable[[int, int, int], nn.Sequential]] = {
    "cnn": cnn,
    "strided-cnn": strided_cnn,
    "mlp": mlp,
}


def build(kind: str, *, size: int, width: int, classes: int, seed: int) -> nn.Sequential:
    """The network of a kind that `RunConfig.model` names, its weights drawn from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "initial weights", kind))
        return _KINDS[kind](size, width, classes)
