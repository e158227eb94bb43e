"""Several linear layers of one input on integers, as attention has them: it is rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swalp import buffers
from swalp.formats import Format
from swalp.matmul.handed import whole
from swalp.matmul.linear import (
    bias_operand,
    column_sums,
    keep,
    kept,
    operand,
    rows,
    transpose,
    weight_operand,
)
from swalp.matmul.once import once
from swalp.matmul.operands import Operand, Quantization
from swalp.matmul.products import product, product_into


def projections(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_format: Format,
    activation: Quantization,
    parts: Sequence[slice],
    errors: Sequence[Quantization],
) -> tuple[Tensor, ...]:
    """``x @ weight[part].T + bias[part]`` for each part, with all products on integers.

    As `linear` of each part, but that autograd keeps the codes of `x` once, and adds the gradients
    of `x` from the last part to the first.

    Args:
        x: float32, (..., in_features).
        weight: (out_features, in_features), packed, or float32. What is not on the grid of
            `weight_format` is multiplied in float32.
        bias: float32, (out_features,); it may be packed.
        weight_format: of `weight`: one exponent.
        activation: how `x` is rounded: one exponent.
        parts: rows of `weight`, none of them in two.
        errors: how the gradient of each result is, likewise.

    Returns:
        float32, each (..., rows of its part).
    """
    call = _Call(weight_format, activation, tuple(parts), tuple(errors))
    results: tuple[Tensor, ...] = _Projections.apply(x, weight, bias, call)  # type: ignore[no-untyped-call]  # PyTorch ships no type
    return results


class _Call(NamedTuple):
    """What a call is beside its tensors."""

    weight_format: Format
    activation: Quantization
    parts: tuple[slice, ...]
    errors: tuple[Quantization, ...]


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.shape = call, x.shape
        inputs = rows(operand(x, call.activation))
        weights, added = weight_operand(weight, call.weight_format), bias_operand(bias)
        keep(ctx, inputs, weight)
        results = []
        for part in call.parts:
            here = None if added is None else _part(added, part)
            y = product(inputs, transpose(_part(weights, part)), here)
            results.append(whole(y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])))
        return tuple(results)

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, (weight,) = kept(ctx)
        call: _Call = ctx.call
        of_input, of_weight, of_bias, _ = ctx.needs_input_grad
        errors = [
            (part, rows(operand(grad, error)))
            for part, grad, error in zip(call.parts, grads, call.errors, strict=True)
            if grad is not None
        ]
        dx = dw = db = None
        if of_input and errors:
            weights = weight_operand(weight, call.weight_format)
            for part, error in reversed(errors):
                one = product(error, _part(weights, part))
                dx = one if dx is None else dx.add_(one)
            assert dx is not None
            dx = whole(dx if len(ctx.shape) == 2 else dx.view(ctx.shape))
        if of_weight:
            dw = buffers.empty(*weight.shape)
            if sum(part.stop - part.start for part, _ in errors) < len(weight):
                dw.zero_()
            for part, error in errors:
                if isinstance(error, Operand) and isinstance(inputs, Operand):
                    product_into(dw[part], error.transpose(), inputs)
                else:
                    dw[part] = product(transpose(error), inputs)
        if of_bias:
            db = torch.zeros(len(weight), dtype=torch.float32, device="cpu")
            for part, error in errors:
                db[part] = column_sums(error)
        return dx, dw, db, None


def _part(x: Operand | Tensor, part: slice) -> Operand | Tensor:
    """Those of the first dimension."""
    return x._replace(codes=x.codes[part]) if isinstance(x, Operand) else x[part]
