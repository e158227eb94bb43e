"""Attention whose products run on integers, one sample at a time, its probabilities not kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swalp import buffers
from swalp.matmul.linear import Quantization, operand, transpose
from swalp.matmul.once import once
from swalp.matmul.operands import Operand, gap_of
from swalp.matmul.products import product
from swalp.quantize import cpu


class Guesses:
    """The exponents that probabilities and their errors had last: likely the next ones, too.

    They save a pass and change no result.
    """

    def __init__(self) -> None:
        self.probabilities = 0
        self.errors = 0


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: tuple[Operand, Operand, Operand],
    probabilities: Quantization,
    errors: tuple[Quantization, Quantization],
    mask: Tensor | None,
    factor: float,
    guesses: Guesses,
) -> Tensor:
    """``softmax(factor * query @ key.T + mask) @ value`` with all products on integers.

    Autograd keeps the mask and the codes of queries, keys and values; scores and probabilities are
    computed again in the backward pass, with the same noise.

    Args:
        query: (batch, heads, L, E), for its gradient.
        key: (batch, heads, S, E), likewise.
        value: (batch, heads, S, Ev), likewise.
        operands: of query, key and the transpose of value: one exponent for each.
        probabilities: how they are rounded: one exponent for all.
        errors: how the gradients of the scores and of the result are.
        mask: up to (batch, heads, L, S), boolean (True takes part) or added; it has no gradient.
        factor: of the scores.
        guesses: kept from call to call.

    Raises:
        FloatingPointError: a probability is NaN, as of a mask, and has no integer.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.logical_not()  # True: hidden
    result: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]  # PyTorch ships no type
        query, key, value, operands, probabilities, errors, mask, factor, guesses
    )
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        operands: tuple[Operand, Operand, Operand],
        probabilities: Quantization,
        errors: tuple[Quantization, Quantization],
        mask: Tensor | None,
        factor: float,
        guesses: Guesses,
    ) -> Tensor:
        q, k, v = operands
        ctx.gaps = [x.gap for x in operands]
        ctx.save_for_backward(mask, *(part for x in operands for part in (x.codes, x.exponents)))
        ctx.settings = probabilities, errors, factor, guesses
        out = buffers.empty(*query.shape[:-1], value.shape[-1])

        def run(guess: int) -> int:
            most = -(1 << 15)
            for i in range(len(out)):
                p = _softmax(q, k, mask, factor, i)
                codes, exponent = _block(p, probabilities, i, guess)
                most = max(most, exponent)
                out[i] = product(codes, _sample(v, i).transpose())
            return most

        guesses.probabilities = ctx.exponent = _settle(run, guesses.probabilities)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = _kept(ctx)
        probabilities, (score_error, error), factor, guesses = ctx.settings
        codes, exponents, has_nan = cpu.pack_integers(grad, *error)
        if has_nan:
            return (*_in_float(ctx, grad), *[None] * 6)
        dq, dk = buffers.empty(*q.codes.shape), buffers.empty(*k.codes.shape)
        dv = buffers.empty(*v.codes.shape[:2], v.codes.shape[3], v.codes.shape[2])
        gap = gap_of(error[0])
        assert gap is not None
        e = Operand(codes, exponents, gap)

        def run(guess: int) -> int:
            most = -(1 << 15)
            for i in range(len(dq)):
                p = _softmax(q, k, mask, factor, i)
                p_codes, _ = _block(p, probabilities, i, ctx.exponent)
                dv[i] = product(p_codes.transpose(), _sample(e, i))
                dp = product(_sample(e, i), _sample(v, i))
                torch.ops.aten._softmax_backward_data.out(dp, p, -1, torch.float32, grad_input=dp)
                s_codes, exponent = _block(dp.mul_(factor), score_error, i, guess)
                most = max(most, exponent)
                dq[i] = product(s_codes, _sample(k, i))
                dk[i] = product(s_codes.transpose(), _sample(q, i))
            return most

        try:
            guesses.errors = _settle(run, guesses.errors)
        except FloatingPointError:  # errors of the scores are NaN
            return (*_in_float(ctx, grad), *[None] * 6)
        return dq, dk, dv, *[None] * 6


def _kept(ctx: Any) -> tuple[Operand, Operand, Operand, Tensor | None]:
    mask, *saved = ctx.saved_tensors
    q, k, v = (Operand(saved[2 * i], saved[2 * i + 1], gap) for i, gap in enumerate(ctx.gaps))
    return q, k, v, mask


def _in_float(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients where one of the errors has a NaN: its products in float, all samples."""
    q, k, v, mask = _kept(ctx)
    probabilities, (score_error, error), factor, _ = ctx.settings
    p = torch.stack([_softmax(q, k, mask, factor, i) for i in range(len(grad))])
    e = operand(grad, error)
    dv = product(transpose(operand(p, probabilities)), e)
    dp = torch.ops.aten._softmax_backward_data(product(e, v), p, -1, torch.float32)
    s = operand(dp.mul_(factor), score_error)
    return product(s, k), product(transpose(s), q), dv


def _settle(run: Callable[[int], int], guess: int) -> int:
    """Run with a guessed exponent, and again with the true one if that is another."""
    found = run(guess)
    if found != guess:
        run(found)
    return found


def _sample(x: Operand, i: int) -> Operand:
    return x._replace(codes=x.codes[i])


def _softmax(q: Operand, k: Operand, mask: Tensor | None, factor: float, i: int) -> Tensor:
    p = product(_sample(q, i), _sample(k, i).transpose()).mul_(factor)
    if mask is not None:
        part = mask if mask.dim() < 4 else mask[i if mask.size(0) > 1 else 0]
        p = p.masked_fill_(part, -math.inf) if part.dtype == torch.bool else p.add_(part)
    hidden = p.amax(-1, keepdim=True) == -math.inf  # rows of which nothing takes part: zeros
    torch.ops.aten._softmax.out(p, -1, False, out=p)
    return p.masked_fill_(hidden, 0.0) if bool(hidden.any()) else p


def _block(x: Tensor, quantization: Quantization, i: int, guess: int) -> tuple[Operand, int]:
    """Part `i` of a tensor of such parts, rounded with the exponent `guess`; and its own."""
    fmt, rounding = quantization
    codes, exponent, has_nan = cpu.pack_part(x, fmt, rounding, i * x.numel(), guess)
    if has_nan:
        raise FloatingPointError
    gap = gap_of(fmt)
    assert gap is not None
    return Operand(codes, torch.tensor([guess], dtype=torch.int8, device="cpu"), gap), exponent
