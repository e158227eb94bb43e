"""The product of two activations on integers, as attention has them, with both gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swalp.matmul.linear import operand, transpose
from swalp.matmul.once import once
from swalp.matmul.operands import Operand, Quantization
from swalp.matmul.products import product


def multiplies(x: Tensor, y: Tensor) -> bool:
    """Whether `matmul` takes these operands: matrices, or equally many of them."""
    return (
        x.dim() >= 2
        and x.shape[:-2] == y.shape[:-2]
        and x.shape[-1] == y.shape[-2]
        and min(x.numel(), y.numel()) > 0
    )


def matmul(
    x: Tensor, y: Tensor, left: Quantization, right: Quantization, error: Quantization
) -> Tensor:
    """``x @ y`` of rounded operands, with all three products on integers.

    Autograd keeps the codes, one byte for each element. The values are those of float32 products of
    the quantized operands; see `products.native`.

    Args:
        x: float32, (..., m, k).
        y: float32, (..., k, n), with the same leading dimensions.
        left: how `x` is rounded: one exponent for the tensor.
        right: how the transpose of `y` is, in the order of its elements.
        error: how the gradient of the result is.

    Returns:
        float32, (..., m, n).
    """
    result: Tensor = _Matmul.apply(x, y, left, right, error)  # type: ignore[no-untyped-call]  # PyTorch ships no type
    return result


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        left: Quantization,
        right: Quantization,
        error: Quantization,
    ) -> Tensor:
        a, b = operand(x, left), operand(y.mT, right)
        ctx.error, ctx.gaps = error, [t.gap if isinstance(t, Operand) else None for t in (a, b)]
        parts = [(t.codes, t.exponents) if isinstance(t, Operand) else (t, None) for t in (a, b)]
        ctx.save_for_backward(*parts[0], *parts[1])
        return product(a, transpose(b))

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        a, b = (
            codes if gap is None else Operand(codes, exponents, gap)
            for codes, exponents, gap in zip(saved[::2], saved[1::2], ctx.gaps, strict=True)
        )
        e = operand(grad, ctx.error)
        dx = product(e, b) if ctx.needs_input_grad[0] else None
        dy = product(transpose(a), e) if ctx.needs_input_grad[1] else None
        return dx, dy, None, None, None
