"""Matrix products of quantized operands, in their two ways."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from swalp import buffers
from swalp.matmul import kernels, relu
from swalp.matmul.operands import Operand, floats, require_one, values


def product(
    left: Operand | Tensor, right: Operand | Tensor, bias: Operand | Tensor | None = None
) -> Tensor:
    """``left @ right + bias``: on integers if both operands have them, else in float32.

    Args:
        left: (..., m, k): integers, or float32 values.
        right: (..., k, n).
        bias: (n,): float32, or integers with an exponent.
    """
    if isinstance(left, Operand) and isinstance(right, Operand):
        return native(left, right, bias)
    result = floats(left) @ floats(right)
    return result if bias is None else result.add_(floats(bias))


def native(left: Operand, right: Operand, bias: Operand | Tensor | None = None) -> Tensor:
    """``left @ right + bias``: int32 sums, which are exact, to the nearest float32, then scaled.

    Where a sum has 24 bits or fewer, as it has for k <= 1024, this is the product of the values,
    not rounded at all. In general the result is within 2**-24 of it, relatively; then comes the
    rounding of adding `bias`, if there is one. Beyond k = 2**17, where int32 could overflow (from
    there on, if codes are -128), the results of as many terms at a time are added in float32.

    Args:
        left: codes (..., m, k). An exponent for each index of the first dimension is allowed where
            there are three or more.
        right: codes (..., k, n), with the same leading dimensions.
        bias: (n,): float32, or integers with an exponent.

    Returns:
        float32, (..., m, n).

    Raises:
        ValueError: shapes do not fit, or an exponent changes along the sum.
    """
    if _at_once(left):
        return _compiled(left, right, bias)
    _check(left, right)
    multiply = kernels.kernel().multiply
    assert multiply is not None  # the caller asked
    compiled = multiply is kernels.multiply_codes
    run = _compiled if compiled else partial(_portable, multiply)
    bias = None if bias is None else floats(bias)
    shape = (*left.codes.shape[:-1], right.codes.shape[-1])
    a, b = _stacked(left), _stacked(right)
    depth = a.codes.shape[2]
    if depth >= kernels.DEEPEST:
        depth = kernels.deepest(a.codes)
    result = run(*_part(a, b, 0, depth), bias)
    for first in range(depth, a.codes.shape[2], max(depth, 1)):
        result += run(*_part(a, b, first, depth), None)
    return result.view(shape)


def product_into(out: Tensor, left: Operand, right: Operand) -> None:
    """``out = left @ right``, of three dimensions; `out` may lie in a larger tensor, by rows."""
    if out.stride(-1) == 1 and kernels.in_one_pass(left.codes.shape[-1]):
        _check(left, right)
        _run(out, left, right)
    else:
        out.copy_(native(left, right))


def rectified(
    left: Operand | Tensor, right: Operand | Tensor, bias: Operand | Tensor | None
) -> tuple[Tensor, Tensor]:
    """ReLU of the `product` of two matrices, and a bit an element, whether it passed."""
    if isinstance(left, Operand) and isinstance(right, Operand) and _at_once(left):
        rows, columns = left.codes.shape[0], right.codes.shape[1]
        if left.codes.shape[1] > 0 and columns % 16 == 0:
            passed = relu.bits(rows * columns)
            return _compiled(left, right, bias, passed), passed
    out = product(left, right, bias)
    return out, relu.forward(out, out)


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


def channel_sums(x: Operand) -> Tensor:
    """The sums over all dimensions but the second: exact, then rounded once to float32.

    Args:
        x: codes (batch, channels, ...), with one exponent.

    Raises:
        ValueError: there is more than one.
    """
    require_one(x)
    return kernels.channel_sums(x.codes, x.exponents, x.gap)


def _at_once(left: Operand) -> bool:
    """Whether one call of the compiled kernel is the whole product: of matrices, not too deep."""
    return left.codes.dim() == 2 and kernels.in_one_pass(left.codes.shape[-1])


def _compiled(
    left: Operand,
    right: Operand,
    bias: Operand | Tensor | None,
    passed: Tensor | None = None,
) -> Tensor:
    found = kernels.product(left, right, bias, passed)
    if found is not None:
        return found
    _check(left, right)
    out = buffers.empty(*left.codes.shape[:-1], right.codes.shape[-1])
    _run(out, left, right, bias, passed)
    return out


def _run(
    out: Tensor,
    left: Operand,
    right: Operand,
    bias: Operand | Tensor | None = None,
    passed: Tensor | None = None,
) -> None:
    gap = left.gap + right.gap
    kernels.run_codes(
        left.codes, right.codes, out, gap, left.exponents, right.exponents, bias, passed
    )


def _portable(
    multiply: kernels.Multiply, left: Operand, right: Operand, bias: Tensor | None
) -> Tensor:
    exponent = (left.exponent() + right.exponent()).reshape(-1, 1, 1).clamp(-252, 252)
    out = multiply(left.codes, right.codes).float()
    half = exponent.div(2, rounding_mode="trunc")
    ordinary = bool((exponent.abs() <= 126).all())  # one factor is a normal float32
    for power in (exponent,) if ordinary else (half, exponent - half):
        out.mul_(
            torch.ldexp(torch.ones(power.shape, dtype=torch.float32, device=power.device), power)
        )
    return out if bias is None else out.add_(bias)


def _part(left: Operand, right: Operand, first: int, depth: int) -> tuple[Operand, Operand]:
    """The `depth` terms from `first` on."""
    if left.codes.shape[2] <= depth:
        return left, right
    terms = slice(first, first + depth)
    return (
        left._replace(codes=left.codes[:, :, terms]),
        right._replace(codes=right.codes[:, terms]),
    )


def _check(left: Operand, right: Operand) -> None:
    a, b = left.codes.shape, right.codes.shape
    if len(a) < 2 or len(a) != len(b) or a[:-2] != b[:-2] or a[-1] != b[-2]:
        raise ValueError(
            f"product of codes of shapes {tuple(a)} and {tuple(b)}: they must be (..., m, k) and "
            f"(..., k, n)"
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
