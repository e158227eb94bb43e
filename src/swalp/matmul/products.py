"""Matrix products of quantized operands, in their two ways."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swalp.matmul import kernels
from swalp.matmul.operands import Operand, values


def native(left: Operand, right: Operand, bias: Tensor | None = None) -> Tensor:
    """``left @ right + bias``: int32 sums, which are exact, to the nearest float32, then scaled.

    Where a sum has 24 bits or fewer, as it has for k <= 1024, this is the product of the values,
    not rounded at all. In general the result is within 2**-24 of it, relatively; then comes the
    rounding of adding `bias`, if there is one.

    Args:
        left: codes (..., m, k). An exponent for each index of the first dimension is allowed where
            there are three or more.
        right: codes (..., k, n), with the same leading dimensions.
        bias: float32, (n,).

    Returns:
        float32, (..., m, n).

    Raises:
        ValueError: shapes do not fit, or k is beyond 2**17, where int32 could overflow.
    """
    shape = (*left.codes.shape[:-1], right.codes.shape[-1])
    _check(left, right)
    found = kernels.kernel()
    a, b = _stacked(left), _stacked(right)
    out = torch.empty(a.codes.shape[0], a.codes.shape[1], b.codes.shape[2])
    assert found.multiply is not None  # the caller asked
    if found.multiply is kernels.multiply_vnni:
        gap = a.gap + b.gap
        kernels.run_vnni(a.codes, b.codes, out, gap, a.exponents, b.exponents, bias)
        return out.view(shape)
    exponent = (a.exponent() + b.exponent()).reshape(-1, 1, 1).clamp(-252, 252)
    half = exponent.div(2, rounding_mode="trunc")
    out = torch.ldexp(torch.ldexp(found.multiply(a.codes, b.codes).float(), half), exponent - half)
    return (out if bias is None else out + bias).view(shape)


def simulated(left: Operand, right: Operand, bias: Tensor | None = None) -> Tensor:
    """The same product computed in float32 from the operands' values.

    Equal to `native` bit for bit where both are exact: where every partial sum of integers has 24
    bits or fewer, and nothing leaves the range of float32. In general each of the k additions may
    round, and the result is within (k - 1) * 2**-24 * sum |left| |right| of the exact sum, to first
    order.
    """
    _check(left, right)
    product = values(left).float() @ values(right).float()
    return product if bias is None else product + bias


def _check(left: Operand, right: Operand) -> None:
    a, b = left.codes.shape, right.codes.shape
    if len(a) < 2 or len(a) != len(b) or a[:-2] != b[:-2] or a[-1] != b[-2]:
        raise ValueError(
            f"product of codes of shapes {tuple(a)} and {tuple(b)}: they must be (..., m, k) and "
            f"(..., k, n)"
        )
    if a[-1] > kernels.DEEPEST:
        raise ValueError(
            f"product over {a[-1]} elements: int32 holds sums of at most {kernels.DEEPEST} "
            f"products of 8-bit codes; split it, or simulate"
        )
    if len(a) == 2 and (left.each or right.each):
        raise ValueError(
            "product of two matrices: an operand must have one exponent; the one contracted along "
            "must not change it"
        )


def _stacked(x: Operand) -> Operand:
    """As (batch, rows, columns), with one exponent or one for each matrix."""
    shape = x.codes.shape
    codes = x.codes if len(shape) == 3 else x.codes.reshape(math.prod(shape[:-2]), *shape[-2:])
    exponents = x.exponents
    if exponents is not None and x.each:
        exponents = exponents.reshape(-1).repeat_interleave(codes.shape[0] // shape[0])
    return Operand(codes, exponents, x.gap)
