"""VGG16 for small images, as the SWALP and SWA experiments have it."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from swalp.training.mistakes import UserError
from swalp.training.networks.initial import draw_convolutions

# Convolutions of each stage, and their channels as multiples of the first; pooling ends a stage.
_STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))


def vgg16(channels: int, size: int, width: int, classes: int) -> nn.Sequential:
    """Thirteen convolutions and three linear layers with dropout, without batch norm.

    15.2 million parameters at width 64 for images of 32 x 32 pixels: after five halvings one place
    is left, so the hidden layers have 8 `width` units instead of the 4096 for large images.

    Args:
        channels: of the images.
        size: height and width of the images, at least 32.
        width: channels of the first convolution; 64 in the papers.
        classes: outputs.

    Raises:
        UserError: the images are too small for five halvings.

    Source: Simonyan and Zisserman 2015 (arXiv:1409.1556), configuration D; the classifier as in the
    code published with Yang et al. 2019.
    """
    return _vgg16(channels, size, width, classes, batch_norm=False)


def vgg16_bn(channels: int, size: int, width: int, classes: int) -> nn.Sequential:
    """`vgg16` with batch norm after each convolution; arguments and errors as there."""
    return _vgg16(channels, size, width, classes, batch_norm=True)


def _vgg16(
    channels: int, size: int, width: int, classes: int, *, batch_norm: bool
) -> nn.Sequential:
    if size < 32:
        raise UserError(
            f"VGG16 halves its images five times, so that {size} x {size} pixels are too few; take "
            f"data with 32 x 32 or more, or another model"
        )
    features: list[nn.Module] = []
    for count, multiple in _STAGES:
        outputs = [multiple * width] * count
        for inputs, output in pairwise([channels, *outputs]):
            features.append(nn.Conv2d(inputs, output, 3, padding=1))
            if batch_norm:
                features.append(nn.BatchNorm2d(output))
            features.append(nn.ReLU())
        features.append(nn.MaxPool2d(2))
        channels = multiple * width
    hidden = 8 * width
    model = nn.Sequential(
        *features,
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(hidden * (size // 32) ** 2, hidden),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )
    draw_convolutions(model)
    return model
