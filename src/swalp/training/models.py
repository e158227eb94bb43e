"""The networks that runs train."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from swalp.noise import stream_seed
from swalp.training.networks import preresnet, resnet, small, vgg

Builder = Callable[[int, int, int, int], nn.Module]

KINDS: dict[str, Builder] = {
    "cnn": small.cnn,
    "strided-cnn": small.strided_cnn,
    "mlp": small.mlp,
    "small-vgg": small.small_vgg,
    "vgg16": vgg.vgg16,
    "vgg16-bn": vgg.vgg16_bn,
    "preresnet164": preresnet.preresnet164,
    "resnet20": resnet.resnet20,
    "resnet18": resnet.resnet18,
}


def build(
    kind: str, *, channels: int = 1, size: int, width: int, classes: int, seed: int
) -> nn.Module:
    """The network of a kind that `RunConfig.model` names, its weights drawn from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "initial weights", kind))
        return KINDS[kind](channels, size, width, classes)
