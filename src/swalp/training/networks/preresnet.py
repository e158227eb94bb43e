"""Residual networks with batch norm before each convolution, for CIFAR."""

from __future__ import annotations

from torch import Tensor, nn

from swalp.training.networks.initial import draw_convolutions
from swalp.training.networks.layout import for_shortcut

EXPANSION = 4  # channels between blocks, as a multiple of those within


class Bottleneck(nn.Module):
    """Batch norm, ReLU and convolution three times (1 x 1, 3 x 3, 1 x 1), added to the shortcut.

    Args:
        inputs: channels.
        inner: channels of the middle convolution; the output has `EXPANSION` times as many.
        stride: of the middle convolution.

    Source: He et al. 2016 (arXiv:1603.05027), figure 1 b; the shortcut, where channels or size
    change, is a convolution of the block's input, as in the code published with Yang et al. 2019.
    """

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * inner
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(inner)
        self.relu3 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, EXPANSION inner, H / stride, W / stride), rounded up."""
        y = self.conv1(self.relu1(self.bn1(x)))
        y = self.conv2(self.relu2(self.bn2(y)))
        y = self.conv3(self.relu3(self.bn3(y)))
        result: Tensor = y + self.shortcut(for_shortcut(x))
        return result


def preresnet164(channels: int, size: int, width: int, classes: int) -> nn.Sequential:
    """Fifty-four bottleneck blocks in three stages: 1.7 million parameters at width 16.

    Args:
        channels: of the images.
        size: height and width of the images; any.
        width: channels of the first convolution and within the first stage; 16 in the papers.
        classes: outputs.

    Source: He et al. 2016 (arXiv:1603.05027).
    """
    blocks: list[nn.Module] = []
    inputs = width
    for stage in range(3):
        for place in range(18):
            stride = 2 if stage > 0 and place == 0 else 1
            blocks.append(Bottleneck(inputs, width << stage, stride))
            inputs = EXPANSION * (width << stage)
    model = nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        *blocks,
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inputs, classes),
    )
    draw_convolutions(model)
    return model
