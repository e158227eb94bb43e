"""Small networks, for a minute or an hour on a processor."""

from __future__ import annotations

from torch import nn


def cnn(channels: int, size: int, width: int, classes: int) -> nn.Sequential:
    """Two convolutions with batch norm, each followed by pooling, and a linear layer.

    Args:
        channels: of the images.
        size: height and width of the images.
        width: channels of the first convolution; the second has twice as many.
        classes: outputs.
    """
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
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


def strided_cnn(channels: int, size: int, width: int, classes: int) -> nn.Sequential:
    """As `cnn`, with convolutions of stride 2 in place of pooling: a third of the time.

    Args:
        channels: of the images.
        size: height and width of the images.
        width: channels of the first convolution; the second has twice as many.
        classes: outputs.
    """
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * (-(-size // 4)) ** 2, classes),
    )


def mlp(channels: int, size: int, width: int, classes: int) -> nn.Sequential:
    """Three linear layers, batch norm after the first two.

    Args:
        channels: of the images.
        size: height and width of the images.
        width: hidden units.
        classes: outputs.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * size**2, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def small_vgg(channels: int, size: int, width: int, classes: int) -> nn.Sequential:
    """Three convolutions with batch norm in the manner of VGG, and a linear layer.

    Channels double from each to the next. The first has stride 2, pooling follows the others. 2.5
    million multiply-adds an image of 32 x 32 colour pixels at width 16.

    Args:
        channels: of the images.
        size: height and width of the images.
        width: channels of the first convolution.
        classes: outputs.
    """

    def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *convolution(channels, width, stride=2),
        *convolution(width, 2 * width),
        nn.MaxPool2d(2),
        *convolution(2 * width, 4 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width * (-(-size // 2) // 4) ** 2, classes),
    )
