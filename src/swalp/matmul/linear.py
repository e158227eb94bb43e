"""The linear layer on integers: y = x W^T + b, and both backward products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swalp import buffers
from swalp.formats import BlockFloat, Format
from swalp.matmul import passes, products, relu
from swalp.matmul.again import Again, carry
from swalp.matmul.handed import Handed, let_go, whole
from swalp.matmul.once import once
from swalp.matmul.operands import Operand, Quantization, of_packed, quantized
from swalp.matmul.owned import alone, references
from swalp.matmul.products import channel_sums, product
from swalp.packed import PackedTensor
from swalp.quantize import quantize
from swalp.quantize.dispatch import unpack
from swalp.rounding import Nearest


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_format: Format,
    activation: Quantization,
    error: Quantization,
    *,
    transposed: bool = False,
    rectified: bool = False,
) -> Tensor:
    """``x @ weight.T + bias`` with all three products on integers.

    `x` is rounded to `activation` and the gradient of the result to `error`, and those codes are
    what is multiplied. Autograd keeps them, one byte for each element of `x`, and `weight` itself.
    The values are those of float32 products of the quantized operands; see `products.native`. A NaN
    in an operand sends the products that it enters through float32.

    Args:
        x: float32, (..., in_features).
        weight: (out_features, in_features), packed, or float32. What is not on the grid of
            `weight_format` is multiplied in float32.
        bias: float32, (out_features,); it may be packed.
        weight_format: of `weight`.
        activation: of `x`: one exponent for the tensor.
        error: of the gradient, likewise.
        transposed: whether `weight` is (in_features, out_features).
        rectified: whether the result passes ReLU, of which a bit an element is kept.

    Returns:
        float32, (..., out_features).
    """
    handed = Handed(x, weight)
    call = _Call(weight_format, activation, error, transposed, rectified, handed)
    y: Tensor = _Linear.apply(handed.gradient_of(x), weight, bias, call)  # type: ignore[no-untyped-call]  # PyTorch ships no type
    return carry(y)


def operand(x: Tensor, quantization: Quantization) -> Operand | Tensor:
    """`x` rounded: to integers, or to float values if it has a NaN."""
    return quantized(x, *quantization) or quantize(x, *quantization)


def weight_operand(weight: Tensor, fmt: Format) -> Operand | Tensor:
    """The integers of a weight, if all its elements have one, else its float values.

    A packed tensor's codes are used where they lie; a float tensor on the grid of `fmt` is packed.
    """
    if isinstance(weight, PackedTensor):
        return of_packed(weight) or weight.dequantize()
    found = quantized(weight, fmt, Nearest())
    if found is not None and torch.equal(unpack(found.codes, found.exponents, fmt), weight):
        return found
    return weight


def bias_operand(bias: Tensor | None) -> Operand | Tensor | None:
    """What products of matrices add: the codes of a packed bias, if it has one exponent."""
    if isinstance(bias, PackedTensor) and isinstance(bias.format, BlockFloat):
        found = of_packed(bias)
        if found is not None and not found.each and found.codes.is_contiguous():
            return found
    return bias_values(bias)


def bias_values(bias: Tensor | None) -> Tensor | None:
    """What the kernels add: contiguous float32."""
    if isinstance(bias, PackedTensor):
        return bias.dequantize()
    return None if bias is None else bias.resolve_neg().contiguous()


def apart(operand: Operand | Tensor, weight: Tensor) -> Operand | Tensor:
    """A weight's operand that stays as it is when an optimizer changes `weight`."""
    if isinstance(operand, Operand):
        if isinstance(weight, PackedTensor):
            exponents = operand.exponents
            return operand._replace(
                codes=buffers.empty(*operand.codes.shape, dtype=torch.int8).copy_(operand.codes),
                exponents=None if exponents is None else exponents.clone(),
            )
        return operand
    return operand.clone() if operand is weight else operand


class _Call(NamedTuple):
    """What a call of a layer is beside its tensors."""

    weight_format: Format
    activation: Quantization
    error: Quantization
    transposed: bool
    rectified: bool
    handed: Handed


def _again(
    gap: int,
    weight_format: Format,
    transposed: bool,
    shape: Sequence[int],
    codes: Tensor,
    exponents: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    part: slice = slice(None),
) -> Tensor:
    weights = weight_operand(weight, weight_format)
    inputs = rows(Operand(codes.view(*shape[:-1], -1)[part], exponents, gap))
    y = product(inputs, weights if transposed else transpose(weights), bias_operand(bias))
    return y.view(-1, *shape[1:])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
        weights = weight_operand(weight, call.weight_format)
        added = bias_operand(bias)
        y, inputs, passed = passes.forward(
            x, weights, added, call.activation, call.transposed, call.rectified
        ) or _forward(x, weights, added, call)
        ctx.shape, ctx.call = x.shape, call
        keep(ctx, inputs, weight, passed)
        if isinstance(inputs, Operand) and not call.rectified:
            compute = partial(_again, inputs.gap, call.weight_format, call.transposed, y.shape)
            ctx.again = Again((inputs.codes, inputs.exponents, weight, bias), compute)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mine = references(grad) == alone()
        inputs, (weight, passed) = kept(ctx)
        call: _Call = ctx.call
        of_input, of_weight, of_bias, _ = ctx.needs_input_grad
        if call.handed.at_once:
            weights = weight_operand(weight, call.weight_format) if of_input else None
            gradients = passes.backward(
                grad, mine, passed, call.error, inputs, weights, call.transposed, of_weight, of_bias
            )
            if gradients is not None:
                return *gradients, None
        found = None if passed is None else passes.errors(grad, passed, call.error)
        if passed is not None and found is None:
            gradient = relu.gradient(grad, passed, mine)
            if gradient is not grad:
                let_go(grad, mine)
            grad, mine = gradient, True
        errors = rows(found or operand(grad, call.error))
        let_go(grad, mine)
        dx = dw = db = None
        if of_input:  # not before `grad` is let go: of a float weight this takes memory
            weights = weight_operand(weight, call.weight_format)
            if not call.handed.at_once:
                weights = apart(weights, weight)
            right = transpose(weights) if call.transposed else weights
            dx = call.handed.later(ctx.shape, partial(_input_gradient, errors, right, ctx.shape))
        if of_weight:
            inputs = rows(inputs)
            left, right = (inputs, errors) if call.transposed else (errors, inputs)
            dw = product(transpose(left), right)
        if of_bias:
            db = column_sums(errors)
        return dx, dw, db, None


def _forward(
    x: Tensor, weights: Operand | Tensor, bias: Operand | Tensor | None, call: _Call
) -> tuple[Tensor, Operand | Tensor, Tensor | None]:
    """The result, the input's operand, and the bits that passed ReLU: `passes.forward`, if anything
    is out of the ordinary.
    """
    inputs = rows(operand(x, call.activation))
    right = weights if call.transposed else transpose(weights)
    passed = None
    if call.rectified:
        y, passed = products.rectified(inputs, right, bias)
    else:
        y = product(inputs, right, bias)
    return whole(y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])), inputs, passed


def _input_gradient(
    errors: Operand | Tensor, weights: Operand | Tensor, shape: Sequence[int]
) -> Tensor:
    dx = product(errors, weights)
    return dx if len(shape) == 2 else dx.view(shape)


def rows(x: Operand | Tensor) -> Operand | Tensor:
    """As a matrix: all but the last dimension joined."""
    return x.flatten() if isinstance(x, Operand) else x.reshape(-1, x.shape[-1])


def transpose(x: Operand | Tensor) -> Operand | Tensor:
    """The last two dimensions exchanged."""
    return x.transpose() if isinstance(x, Operand) else x.transpose(-1, -2)


def column_sums(x: Operand | Tensor) -> Tensor:
    """The sum of the rows of a matrix: float32."""
    return channel_sums(x) if isinstance(x, Operand) else x.sum(0)


def keep(ctx: Any, x: Operand | Tensor, *others: Tensor | None) -> None:
    """Save an operand, and other tensors, for the backward pass."""
    ctx.gap = x.gap if isinstance(x, Operand) else None
    parts = (x.codes, x.exponents) if isinstance(x, Operand) else (x, None)
    ctx.save_for_backward(*parts, *others)


def kept(ctx: Any) -> tuple[Operand | Tensor, tuple[Any, ...]]:
    """What `keep` saved."""
    codes, exponents, *others = ctx.saved_tensors
    return codes if ctx.gap is None else Operand(codes, exponents, ctx.gap), tuple(others)
