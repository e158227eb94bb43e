"""Residual networks: the small one for CIFAR, and ResNet-18 for large images."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from swalp.training.networks.initial import draw_convolutions
from swalp.training.networks.layout import for_shortcut


class Padded(nn.Module):
    """A shortcut without parameters: every second pixel, between as many channels of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, 2 C, H / 2, W / 2), rounded up."""
        channels = x.shape[1]
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, channels // 2, channels - channels // 2))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, whose output is added to the shortcut's.

    Args:
        inputs: channels.
        outputs: channels.
        stride: of the first convolution.
        shortcut: from input to output.

    Source: He et al. 2016 (arXiv:1512.03385).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride), rounded up."""
        y = self.relu1(self.bn1(self.conv1(x)))
        result: Tensor = self.relu2(self.bn2(self.conv2(y)) + self.shortcut(for_shortcut(x)))
        return result


def resnet20(channels: int, size: int, width: int, classes: int) -> nn.Sequential:
    """Nine blocks for CIFAR, shortcuts without parameters: 0.27 million at width 16.

    Args:
        channels: of the images.
        size: height and width of the images; any.
        width: channels of the first convolution; 16 in the paper.
        classes: outputs.

    Source: He et al. 2016 (arXiv:1512.03385), section 4.2, shortcuts of kind A.
    """
    model = nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *_stages((3, 3, 3), width, lambda inputs: Padded()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )
    draw_convolutions(model)
    return model


def resnet18(channels: int, size: int, width: int, classes: int) -> nn.Sequential:
    """Eight blocks for ImageNet, shortcuts with convolutions: 11.7 million at width 64.

    Args:
        channels: of the images.
        size: height and width of the images; any.
        width: channels of the first convolution; 64 in the paper.
        classes: outputs.

    Source: He et al. 2016 (arXiv:1512.03385), table 1, shortcuts of kind B.
    """

    def shortcut(inputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, 2 * inputs, 1, stride=2, bias=False), nn.BatchNorm2d(2 * inputs)
        )

    model = nn.Sequential(
        nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        *_stages((2, 2, 2, 2), width, shortcut),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )
    draw_convolutions(model)
    return model


def _stages(
    blocks: tuple[int, ...], width: int, shortcut: Callable[[int], nn.Module]
) -> list[BasicBlock]:
    """Blocks in stages: each but the first stage halves the image and doubles the channels.

    `shortcut` makes the one that does so, given the channels before.
    """
    found = []
    for stage, count in enumerate(blocks):
        outputs = width << stage
        for place in range(count):
            halves = stage > 0 and place == 0
            inputs = outputs // 2 if halves else outputs
            way = shortcut(inputs) if halves else nn.Identity()
            found.append(BasicBlock(inputs, outputs, 2 if halves else 1, way))
    return found
