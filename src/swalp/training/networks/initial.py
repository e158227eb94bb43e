"""Initial weights of convolutions, as the published networks have them."""

from __future__ import annotations

import math

from torch import nn


def draw_convolutions(model: nn.Module) -> None:
    """Give the convolutions weights of variance 2 / (outputs x places of the kernel), no bias.

    Source: He et al. 2015 (arXiv:1502.01852), with the number of outputs instead of inputs.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan = layer.out_channels * math.prod(layer.kernel_size)
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
