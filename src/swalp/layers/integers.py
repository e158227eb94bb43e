"""Which mixin computes a layer where products run on integers."""

from __future__ import annotations

from typing import Any

from torch import nn

from swalp.layers.base import Quantized
from swalp.layers.lean import LeanBatchNorm, LeanGELU, LeanMaxPool, LeanReLU
from swalp.layers.native import NativeLinear, is_linear
from swalp.layers.native_convolution import ChannelsLast, NativeConvolution, unable
from swalp.layers.sequence import NativeSequential
from swalp.layers.single import QuantizedLayer
from swalp.quantize import plans

Native = NativeLinear | NativeConvolution


def native_mixin(module: nn.Module) -> type[Native] | str:
    """What computes the products of this layer on integers; or why nothing does."""
    forward = type(module).forward
    if is_linear(type(module)):
        return NativeLinear
    if forward in (nn.Conv1d.forward, nn.Conv2d.forward):
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        return unable(module) or NativeConvolution
    return f"{type(module).__name__} has no integer products"


def simulated_mixin(module: nn.Module, mixin: type[QuantizedLayer]) -> type[QuantizedLayer]:
    """What computes the products of this layer in float, among layers that compute on integers."""
    return ChannelsLast if type(module).forward is nn.Conv2d.forward else mixin


_LEAN: dict[Any, type[Quantized]] = {
    nn.ReLU.forward: LeanReLU,
    nn.GELU.forward: LeanGELU,
    nn.MaxPool2d.forward: LeanMaxPool,
    nn.BatchNorm2d.forward: LeanBatchNorm,
}


def lean_mixin(module: nn.Module) -> type[Quantized] | None:
    """What computes a layer without products, keeping little; None: nothing does."""
    kind = type(module)
    if not plans.available:
        return None
    if issubclass(kind, nn.Sequential):
        plain = kind.forward is nn.Sequential.forward and kind.__iter__ is nn.Sequential.__iter__
        return NativeSequential if plain else None
    return _LEAN.get(kind.forward)
