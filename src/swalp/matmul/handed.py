"""A layer's backward pass so that its large float tensors are not alive at once.

A function of autograd returns all its results together: the gradients of weight and input, and
holds the gradient that came in until then. Each is as large as float32 is. So what came in is let
go as soon as there are codes of it. And where both results are large, they are made by two
functions, one after the other: the first gives the gradient of the weight, which an optimizer may
use at once and free; the second that of the input. Between them goes, through autograd, a zero that
stands for a gradient. Small layers do without: there a function of autograd takes longer than its
memory is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swalp.matmul.once import once

SMALL = 1 << 19  # floats of a gradient that may as well be alive beside another


class Handed:
    """What the two steps of one call of a layer hand on to each other.

    Args:
        x: the input of the layer.
        weight: its weight.

    Attributes:
        at_once: whether there is but one step, as one of the gradients is `SMALL`.
    """

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.at_once = min(x.numel(), weight.numel()) <= SMALL
        # Of each backward pass that is between its steps: several may run at once.
        self._computes: dict[int, Callable[[], Tensor]] = {}

    def gradient_of(self, x: Tensor) -> Tensor:
        """`x`, whose gradient is computed in the second step."""
        if self.at_once or not (x.requires_grad and torch.is_grad_enabled()):
            return x
        alias: Tensor = _Gradient.apply(x, self)  # type: ignore[no-untyped-call]  # PyTorch ships no type
        return alias

    def later(self, shape: Sequence[int], compute: Callable[[], Tensor]) -> Tensor:
        """What the first step returns, for `compute` to give the gradient in the second.

        By then the weight may be another: unless `at_once`, `compute` needs a copy of its own.
        """
        if self.at_once:
            return whole(compute())
        stands = torch.zeros((), dtype=torch.float32, device="cpu").expand(tuple(shape))
        self._computes[stands.data_ptr()] = compute
        return stands

    def now(self, stands: Tensor) -> Tensor:
        """The gradient that `stands`, from `later`, stands for."""
        return whole(self._computes.pop(stands.data_ptr())())


def whole(x: Tensor) -> Tensor:
    """`x` as no view: nothing else refers to its memory, and who gets it may write there."""
    return x.detach() if x._is_view() else x


def let_go(grad: Tensor, mine: bool) -> None:
    """Free the memory of a gradient that came in, if it is nobody else's.

    From here on it has no elements. `mine`: as `owned` tells.
    """
    if mine:
        grad.set_()  # type: ignore[call-overload]  # PyTorch's stub wants a source


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, handed: Handed) -> Tensor:
        ctx.handed = handed
        return x.detach()  # an alias, but no view

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.handed.now(grad), None
