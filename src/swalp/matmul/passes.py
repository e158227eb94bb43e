"""A linear layer's passes in one compiled call each, where nothing is out of the ordinary.

A small layer's kernels take no longer than what Python does between them, the more as they have
filled the caches. Where tensors are not in order, an operand has no integers, or a sum is too long
for an int32, these do nothing, and `linear` goes on step by step, to the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from swalp import buffers
from swalp.matmul import kernels
from swalp.matmul.operands import Operand, Quantization
from swalp.quantize.plans import available, plan_of, rule_arguments
from swalp.quantize.storage import has_memory
from swalp.rounding import Stochastic

if available:
    from swalp import _kernels
    from swalp.extension import TORCH


def forward(
    x: Tensor,
    weight: Operand | Tensor,
    bias: Operand | Tensor | None,
    activation: Quantization,
    transposed: bool,
    rectified: bool,
) -> tuple[Tensor, Operand, Tensor | None] | None:
    """The result of a linear layer, its input's codes, and the bits of what passed ReLU.

    Args:
        x: float32, (..., inputs).
        weight: (outputs, inputs).
        bias: (outputs,).
        activation: of `x`.
        transposed: whether `weight` is (inputs, outputs).
        rectified: whether ReLU follows.
    """
    how = _compiled(activation)
    if how is None or not isinstance(weight, Operand) or not kernels.in_one_pass(x.shape[-1]):
        return None
    found = _kernels.linear(TORCH, *how, x, weight, transposed, bias, rectified)
    if found is None:
        return None
    y, codes, exponent, passed = found
    return y, Operand(codes, exponent, how.gap), passed


def backward(
    grad: Tensor,
    mine: bool,
    passed: Tensor | None,
    error: Quantization,
    inputs: Operand | Tensor,
    weight: Operand | Tensor | None,
    transposed: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    """Gradients of a linear layer: of its input, if there is a `weight`, of its weight and bias.

    Args:
        grad: of the result, (..., outputs). If they are None, it is as it was.
        mine: whether nobody else refers to `grad`; then it has no elements any more.
        passed: what `forward` gave.
        error: of `grad`.
        inputs: what `forward` gave.
        weight: (outputs, inputs).
        transposed: whether it is (inputs, outputs).
        of_weight: whether its gradient is wanted.
        of_bias: likewise.
    """
    how, outputs = _compiled(error), grad.shape[-1]
    if how is None or not isinstance(inputs, Operand) or isinstance(weight, Tensor):
        return None
    if not has_memory(grad):
        return None
    if not kernels.in_one_pass(max(outputs, grad.numel() // max(outputs, 1))):
        return None
    return _kernels.linear_gradients(
        TORCH, *how, grad, mine, passed, inputs, weight, transposed, of_weight, of_bias
    )


def errors(grad: Tensor, passed: Tensor, error: Quantization) -> Operand | None:
    """`grad` where elements passed ReLU, else 0, in codes: never in floats.

    Args:
        grad: float32.
        passed: a bit for each of its elements.
        error: how it is rounded.
    """
    how = _compiled(error)
    if how is None or not has_memory(grad):
        return None
    found = _kernels.pack_block(TORCH, how.codes, how.format, grad, passed, *how.rule)
    if found is None or found[2]:  # a NaN
        return None
    return Operand(found[0], found[1], how.gap)


class _Compiled(NamedTuple):
    """How the kernels round a tensor, and where their results lie."""

    floats: _kernels.Buffers
    codes: _kernels.Buffers
    format: _kernels.Format
    gap: int
    rule: tuple[int, int, int, int, int]


def _compiled(quantization: Quantization) -> _Compiled | None:
    """None: the kernels cannot, or must not try."""
    fmt, rounding = quantization
    plan, floats, codes = plan_of(fmt), buffers.floats, buffers.codes
    if floats is None or codes is None or not plan.shapeless or plan.gap is None:
        return None
    if type(rounding) is Stochastic and rounding.seed is None:  # a seed of its own for each use
        return None
    return _Compiled(floats, codes, plan.without_nan(), plan.gap, rule_arguments(rounding))
