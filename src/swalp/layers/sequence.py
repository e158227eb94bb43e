"""Layers one after another, where nobody sees what passes between two of them."""

from __future__ import annotations

from collections import deque
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from swalp.layers.base import Quantized
from swalp.layers.lean import LeanReLU
from swalp.layers.native import NativeLinear, on_integers, parameter_of


class NativeSequential(Quantized):
    """Mixin over `torch.nn.Sequential`: a linear layer and the ReLU after it are one.

    The numbers are the same; there is one result less, and one function of autograd.
    """

    def forward(self, input: Any) -> Any:
        """The parent's forward."""
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return super().forward(input)  # type: ignore[misc]  # a mixin
        layers: deque[nn.Module] = deque(self)  # type: ignore[call-overload]  # a mixin over one
        while layers:
            layer = layers.popleft()
            y = None
            if layers and _are_one(layer, layers[0], input):
                y = on_integers(layer, input, rectified=True)
            if y is None:
                input = layer(input)
            else:
                layers.popleft()
                input = y
        return input


def _are_one(layer: nn.Module, after: nn.Module, x: Any) -> TypeGuard[NativeLinear]:
    """Whether a layer's result goes to the ReLU `after` alone, and will have a gradient."""
    return (
        isinstance(layer, NativeLinear)
        and isinstance(after, LeanReLU)
        and isinstance(x, Tensor)
        and torch.is_grad_enabled()
        and (x.requires_grad or parameter_of(layer, "weight").requires_grad)
        and not (_is_watched(layer) or _is_watched(after) or _has_any_global_hook())  # type: ignore[no-untyped-call]  # PyTorch ships no type
    )


def _is_watched(module: nn.Module) -> bool:
    """Whether calling a module is more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in vars(module)
    )
