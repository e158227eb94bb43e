"""Layers whose products run on integers, between the same sites as their simulation."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from swalp.layers.functions import paused
from swalp.layers.products import runs
from swalp.layers.single import QuantizedLayer
from swalp.layers.sites import Site
from swalp.matmul import kernels
from swalp.matmul.linear import linear
from swalp.matmul.operands import Quantization

_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_CONV1D = "transformers.pytorch_utils.Conv1D.forward"  # a linear layer, its weight transposed


class NativeLinear(QuantizedLayer):
    """Mixin over a linear layer: its three products multiply int8 codes.

    The numbers are those of `QuantizedLayer`, up to the rounding of sums that float32 cannot hold;
    `swalp.matmul.products` has the bounds. What the integers cannot do, this simulates: other
    devices and types, autocast, compiled graphs and transforms of `torch.func`.
    """

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward between the sites."""
        y = on_integers(self, x)
        return super().forward(x, *args, **kwargs) if y is None else y


def on_integers(layer: NativeLinear, x: Tensor, rectified: bool = False) -> Tensor | None:
    """What a linear layer makes of `x`, or ReLU of it; None if its products are simulated now."""
    with paused() if torch._C._len_torch_function_stack() else _NOTHING:
        weight, bias = parameter_of(layer, "weight"), parameter_of(layer, "bias")
        fmt = layer._swalp_layer.weight_format
        assert fmt is not None  # `convert` chose a layer that has one
        transposed = _is_conv1d(layer._swalp_kind)
        if not runs(x, weight, bias, weight.shape[1 if transposed else 0]):
            return None
        activation, error = moments(layer, x)
        return linear(
            x, weight, bias, fmt, activation, error, transposed=transposed, rectified=rectified
        )


def parameter_of(layer: Any, name: str) -> Any:
    """What a module has by that name: of its parameters sooner than `getattr` finds it."""
    parameters = layer._parameters
    return parameters[name] if name in parameters else getattr(layer, name)


def is_linear(kind: type[nn.Module]) -> bool:
    """Whether `NativeLinear` computes layers of this class."""
    return kind.forward is nn.Linear.forward or _is_conv1d(kind)


def obstacle(before: Site | None, after: Site | None) -> str:
    """Why the products of a layer with those sites are simulated; empty: they are not.

    That each format has integers of 8 bits and one scale, the recipe has checked.
    """
    found = kernels.kernel()
    if found.multiply is None:
        return found.reason
    activation = None if before is None else before.activation
    error = None if after is None else after.error
    if activation is None:
        return "its input is float"
    return "its error is float" if error is None else ""


def moments(layer: QuantizedLayer, x: Tensor) -> tuple[Quantization, Quantization]:
    """How this pass rounds the input, and the gradient of the output."""
    before, after = layer._swalp_layer.input_site, layer._swalp_layer.output_site
    assert before is not None
    assert after is not None
    assert before.activation is not None
    assert after.error is not None
    step = before.clock.step if layer.training else None
    call = before.begin() if layer.training else 0
    result = after.begin() if layer.training else 0
    return before.activation.at(x.shape, step, call), after.error.at(x.shape, step, result)


def _is_conv1d(kind: Any) -> bool:
    return f"{kind.forward.__module__}.{kind.forward.__qualname__}" == _CONV1D
