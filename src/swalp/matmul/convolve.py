"""The convolution layer on integers: its product, and both backward products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swalp.formats import Format
from swalp.matmul import convolution
from swalp.matmul.again import Again, carry
from swalp.matmul.convolution import Weight, Window
from swalp.matmul.handed import Handed, let_go
from swalp.matmul.linear import (
    apart,
    bias_values,
    keep,
    kept,
    operand,
    weight_operand,
)
from swalp.matmul.once import once
from swalp.matmul.operands import Operand, Quantization, floats
from swalp.matmul.owned import alone, references
from swalp.matmul.products import channel_sums


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    weight_format: Format,
    activation: Quantization,
    error: Quantization,
) -> Tensor:
    """The convolution of `x` in one or two dimensions, with all three products on integers.

    `x` is rounded to `activation` and the gradient of the result to `error`, and those codes are
    what is multiplied. Autograd keeps them, one byte for each element of `x`, and `weight` itself.
    The values are those of float32 products of the quantized operands; see `convolution`. A NaN in
    an operand sends the products that it enters through float32.

    Args:
        x: float32, (batch, in, ...), best with the channels last in memory.
        weight: (out, in / groups, ...), packed, or float32. What is not on the grid of
            `weight_format` is multiplied in float32.
        bias: float32, (out,); it may be packed.
        window: how it moves; see `convolution.unsupported` for what should not come here.
        weight_format: of `weight`: one exponent for the tensor.
        activation: of `x`: likewise.
        error: of the gradient: likewise.

    Returns:
        float32, (batch, out, ...), channels last in memory.
    """
    handed = Handed(x, weight)
    y: Tensor = _Convolve.apply(  # type: ignore[no-untyped-call]  # PyTorch ships no type
        handed.gradient_of(x), weight, bias, window, weight_format, activation, error, handed
    )
    return carry(y)


def _again(
    gap: int,
    shape: Sequence[int],
    exponent: int,
    window: Window,
    codes: Tensor,
    exponents: Tensor | None,
    packed: Tensor,
    bias: Tensor | None,
    part: slice = slice(None),
) -> Tensor:
    weight = Weight.of_packed(packed, shape, exponent, window.groups)
    return convolution.forward(Operand(codes[part], exponents, gap), weight, bias, window)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        window: Window,
        weight_format: Format,
        activation: Quantization,
        error: Quantization,
        handed: Handed,
    ) -> Tensor:
        inputs = operand(x, activation)
        weights = weight_operand(weight, weight_format)
        added = bias_values(bias)
        ctx.handed, ctx.weight_format, ctx.window = handed, weight_format, window
        ctx.error, ctx.shape, ctx.has_bias = error, x.shape, bias is not None
        keep(ctx, inputs, weight)
        if isinstance(inputs, Operand) and isinstance(weights, Operand):
            packed = Weight(weights, window.groups)
            kept_anyway = inputs.codes, inputs.exponents, packed.packed(False), added
            compute = partial(_again, inputs.gap, packed.shape, packed.exponent, window)
            ctx.again = Again(kept_anyway, compute)
            return convolution.forward(inputs, packed, added, window)
        moves = (window.stride, window.padding, window.dilation)
        return torch.ops.aten.convolution(  # type: ignore[no-any-return]  # PyTorch ships no type
            floats(inputs), floats(weights), added, *moves, False, _zeros(window), window.groups
        )

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mine = references(grad) == alone()
        inputs, (weight,) = kept(ctx)
        window: Window = ctx.window
        errors = operand(grad, ctx.error)
        let_go(grad, mine)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            weights = weight_operand(weight, ctx.weight_format)
            if isinstance(errors, Operand) and isinstance(weights, Operand):
                packed = Weight(weights, window.groups)
                packed.packed(True)  # a copy, which an optimizer leaves alone
                compute = partial(convolution.input_gradient, errors, packed, ctx.shape[2:], window)
            else:
                compute = partial(_backward, errors, inputs, apart(weights, weight), window, 0)
            dx = ctx.handed.later(ctx.shape, compute)
        if ctx.needs_input_grad[1]:
            if isinstance(errors, Operand) and isinstance(inputs, Operand):
                last = not weight.is_contiguous()
                dw = convolution.weight_gradient(inputs, errors, weight.shape[2:], window, last)
            else:
                dw = _backward(errors, inputs, weight, window, 1)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            if isinstance(errors, Operand):
                db = channel_sums(errors)
            else:
                db = errors.sum([0, *range(2, errors.dim())])
        return dx, dw, db, None, None, None, None, None


def _backward(
    errors: Operand | Tensor,
    inputs: Operand | Tensor,
    weights: Operand | Tensor,
    window: Window,
    which: int,
) -> Tensor:
    """The input gradient (0) or the weight gradient (1) in float32."""
    settings = (window.stride, window.padding, window.dilation)
    results = torch.ops.aten.convolution_backward(
        floats(errors), floats(inputs), floats(weights), None, *settings, False, _zeros(window),
        window.groups, [which == 0, which == 1, False],
    )  # fmt: skip
    gradient: Tensor = results[which]
    return gradient


def _zeros(window: Window) -> list[int]:
    return [0] * len(window.stride)
