"""Which mixin computes the products of a layer on integers."""

from __future__ import annotations

from torch import nn

from swalp.layers.native import NativeLinear, is_linear
from swalp.layers.native_convolution import ChannelsLast, NativeConvolution, unable
from swalp.layers.single import QuantizedLayer

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
