"""A linear layer's passes in one compiled call each, where nothing is out of the ordinary.

A small layer's kernels take no longer than what Python does between them, the more as they have
filled the caches. Where tensors are not in order, an operand has no integers, or a sum is too long
for an int32, these do nothing, and `linear` goes on step by step, to the same numbers.
"""

from __future__ import annotations

from torch import Tensor

from swalp import buffers
from swalp.formats import Format
from swalp.matmul import kernels
from swalp.matmul.operands import Operand
from swalp.quantize.plans import available, plan_of, rule_arguments
from swalp.rounding import Rounding, Stochastic

if available:
    from swalp import _kernels
    from swalp.extension import TORCH


def forward(
    x: Tensor,
    weight: Operand | Tensor,
    bias: Operand | Tensor | None,
    activation: tuple[Format, Rounding],
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
    if buffers.floats is None or buffers.codes is None or not isinstance(weight, Operand):
        return None
    plan, rule = plan_of(activation[0]), _fixed(activation[1])
    if not plan.shapeless or plan.gap is None or rule is None:
        return None
    if not kernels.in_one_pass(x.shape[-1]):
        return None
    found = _kernels.linear(
        TORCH, buffers.floats, buffers.codes, x, plan.without_nan(), plan.gap, rule, weight,
        transposed, bias, rectified,
    )  # fmt: skip
    if found is None:
        return None
    y, codes, exponent, passed = found
    return y, Operand(codes, exponent, plan.gap), passed


def backward(
    grad: Tensor,
    mine: bool,
    passed: Tensor | None,
    error: tuple[Format, Rounding],
    inputs: Operand | Tensor,
    weight: Operand | Tensor | None,
    transposed: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    """Gradients of a linear layer: of its input, if there is a `weight`, of its weight and bias.

    Args:
        grad: of the result, (..., outputs). If they are None, it is as it was, but perhaps 0 where
            nothing passed.
        mine: whether nobody else refers to `grad`; then it has no elements any more.
        passed: what `forward` gave.
        error: of `grad`.
        inputs: what `forward` gave.
        weight: (outputs, inputs).
        transposed: whether it is (inputs, outputs).
        of_weight: whether its gradient is wanted.
        of_bias: likewise.
    """
    if buffers.floats is None or buffers.codes is None or not isinstance(inputs, Operand):
        return None
    plan, rule = plan_of(error[0]), _fixed(error[1])
    if not plan.shapeless or plan.gap is None or rule is None or isinstance(weight, Tensor):
        return None
    outputs = grad.shape[-1]
    if not kernels.in_one_pass(max(outputs, grad.numel() // max(outputs, 1))):
        return None
    return _kernels.linear_gradients(
        TORCH, buffers.floats, buffers.codes, grad, mine, passed, plan.without_nan(), plan.gap,
        rule, inputs, weight, transposed, of_weight, of_bias,
    )  # fmt: skip


def _fixed(rounding: Rounding) -> tuple[int, int, int, int, int] | None:
    """As the kernels take it; None if each use has noise of its own."""
    if type(rounding) is Stochastic and rounding.seed is None:
        return None
    return rule_arguments(rounding)
