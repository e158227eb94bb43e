"""A layer's backward pass in three steps, so that its large float tensors are not alive at once.

A function of autograd holds the gradient that came in until it returns, and returns all results
together: the gradients of output, weight and input, each as large as float32 is. As three functions
one after the other, the first makes codes of the gradient of the output, and lets it go; the second
gives the gradient of the weight, which an optimizer may use at once and free; the third makes that
of the input. Between them go codes, by hand, and through autograd a zero that stands for a
gradient. Small layers do without: there two functions of autograd take longer than their memory is
worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swalp.matmul.once import once
from swalp.matmul.operands import Operand

SMALL = 1 << 18  # floats of an input and an output that may as well be alive at once


class Handed:
    """What the steps of one call of a layer hand on to each other.

    Args:
        input_shape: of the layer.
        output_shape: likewise.

    Attributes:
        at_once: whether there is but one step, as input and output are `SMALL`.
        round: makes codes of the gradient of the output, or float values if it has a NaN.
    """

    round: Callable[[Tensor], Operand | Tensor]

    def __init__(self, input_shape: Sequence[int], output_shape: Sequence[int]) -> None:
        self.at_once = max(math.prod(input_shape), math.prod(output_shape)) <= SMALL
        self._errors: Operand | Tensor | None = None
        self._compute: Callable[[], Tensor] | None = None

    def gradient_of(self, x: Tensor) -> Tensor:
        """`x`, whose gradient is computed in the third step."""
        if self.at_once or not (x.requires_grad and torch.is_grad_enabled()):
            return x
        alias: Tensor = _Gradient.apply(x, self)  # type: ignore[no-untyped-call]  # PyTorch ships no type
        return alias

    def errors_of(self, y: Tensor) -> Tensor:
        """`y`, whose gradient is rounded in the first step."""
        if self.at_once or not y.requires_grad:
            return y
        alias: Tensor = _Errors.apply(y, self)  # type: ignore[no-untyped-call]  # PyTorch ships no type
        return alias

    def take_errors(self, grad: Tensor) -> Operand | Tensor:
        """The rounded gradient of the output, in the second step, whose argument is `grad`."""
        if self.at_once:
            return self.round(grad)
        errors, self._errors = self._errors, None
        assert errors is not None  # the first step ran
        return errors

    def later(self, shape: Sequence[int], compute: Callable[[], Tensor]) -> Tensor:
        """What the second step returns, for `compute` to give the gradient in the third.

        By then the weight may be another: unless `at_once`, `compute` needs a copy of its own.
        """
        if self.at_once:
            return compute().detach()  # no view: nothing else refers to its memory
        self._compute = compute
        return _stand_in(shape)


class _Errors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, handed: Handed) -> Tensor:
        ctx.handed = handed
        return y.detach()  # an alias, but no view

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.handed._errors = ctx.handed.round(grad)
        return _stand_in(grad.shape), None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, handed: Handed) -> Tensor:
        ctx.handed = handed
        return x.detach()

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        compute, ctx.handed._compute = ctx.handed._compute, None
        return compute().detach(), None  # no view


def _stand_in(shape: Sequence[int]) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device="cpu").expand(tuple(shape))
