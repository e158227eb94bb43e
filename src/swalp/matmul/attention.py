"""Attention whose products run on integers, some samples at a time, its probabilities not kept.

Of large samples, one at a time, `BAND` rows of scores are worked on, which stay in a cache; small
ones are taken together, as far as their scores do, too. If the mask is causal, what it hides of the
columns after a band is left out: there all probabilities are zero, and so are their codes, whatever
the noise, and sums of integers do not change by them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import multimode
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swalp import buffers
from swalp.matmul import heads
from swalp.matmul.handed import whole
from swalp.matmul.heads import matrices, multiplication
from swalp.matmul.linear import operand, transpose
from swalp.matmul.once import once
from swalp.matmul.operands import Operand, Quantization, exponent_of, gap_of
from swalp.matmul.products import product
from swalp.matmul.shares import Places, never, places, runs_everything
from swalp.quantize import cpu, plans

if plans.available:
    from swalp import _kernels

BAND = 128  # a multiple of the longest vectors, so that PyTorch adds a row in the same order
_TOGETHER = 1 << 19  # scores that are worked on at a time, if they are of several samples
_LARGE = 100  # log2 of numbers that are far from infinite


class Guess:
    """The exponent that a tensor had most often of late: likely the next one, too.

    It saves a pass and changes no result.
    """

    def __init__(self) -> None:
        self._last: deque[int] = deque([0], maxlen=8)

    def next(self) -> int:
        """The likely one; of several the lowest: that it was too low is seen sooner."""
        return min(multimode(self._last))

    def found(self, exponent: int) -> None:
        """Take note of what it was."""
        self._last.append(exponent)


class Guesses:
    """The exponents of the probabilities and of their errors."""

    def __init__(self) -> None:
        self.probabilities = Guess()
        self.errors = Guess()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: tuple[Operand, Operand, Operand],
    probabilities: Quantization,
    errors: tuple[Quantization, Quantization],
    mask: Tensor | None,
    causal: bool,
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
        causal: whether row l sees columns up to l; then there is no `mask`.
        factor: of the scores.
        guesses: kept from call to call.

    Raises:
        FloatingPointError: a probability is NaN, as of a mask, and has no integer.
    """
    finite = not _may_be_large(operands[0], operands[1], factor)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.logical_not()  # True: hidden
    if causal and not finite:  # infinities need the care that masks get
        mask, causal = _later(query.size(-2), key.size(-2)), False
    room = places(query, key, value) if torch.is_grad_enabled() else None
    result: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]  # PyTorch ships no type
        query, key, value, operands, probabilities, errors,
        _Scores(*operands[:2], mask, causal, factor, finite), guesses, room,
        None if room is None else never(),
    )  # fmt: skip
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
        scores: _Scores,
        guesses: Guesses,
        room: Places | None,
        never: Tensor | None,
    ) -> Tensor:
        q, k, v = operands
        ctx.gaps = [x.gap for x in operands]
        parts = [part for x in operands for part in (x.codes, x.exponents)]
        ctx.save_for_backward(scores.mask, *parts)
        ctx.settings, ctx.room = (probabilities, errors, scores[3:], guesses), room
        # Heads of a position side by side, as PyTorch has them: who joins them has nothing to copy.
        samples, count, length = query.shape[:-1]
        out = whole(buffers.empty(samples, length, count, value.shape[-1]).transpose(1, 2))
        codes, floats, bands = _codes_of_some(q, k), _room_for_scores(q, k), _bands(q)
        values, result, multiply = matrices(v).transposed(), matrices(out), multiplication(q, k, v)
        softmax = _Softmax(scores, multiply)

        def run(some: slice, guess: int) -> int:
            block = _Block(probabilities, codes, some, guess)
            own = []
            for rows in bands:
                columns = _seen(rows, k, scores.causal)
                p = softmax.of(some, rows, columns, floats)
                own.append(block.round(p, rows, columns))
                multiply(
                    block.part(rows, columns), values.part(some, columns), result.part(some, rows)
                )
            return max(own)

        ctx.exponent = _settle(run, _together(q, k), guesses.probabilities)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, v = _kept(ctx)
        q, k = scores.q, scores.k
        probabilities, (score_error, error), _, guesses = ctx.settings
        codes, exponents, has_nan = cpu.pack_integers(grad, *error)
        if has_nan:
            return (*_in_float(ctx, scores, v, grad), *[None] * 7)
        gradients = _places_of_gradients(ctx, q, k, v)
        gap = gap_of(error[0])
        assert gap is not None
        e = Operand(codes, exponents, gap)
        narrow = scores.causal and not _may_be_large(e, v, 1.0)  # 0 * infinity is NaN
        p_codes, s_codes = _codes_of_some(q, k), _codes_of_some(q, k)
        p_room, s_room = _room_for_scores(q, k), _room_for_scores(q, k)
        count, length = q.codes.shape[1:3]
        row_bands, column_bands, multiply = _bands(q), _bands(k), multiplication(q, k, v)
        softmax = _Softmax(scores, multiply)
        queries, keys, values, errors = (matrices(x) for x in (q, k, v, e))
        to_q, to_k, to_v = (matrices(x) for x in gradients)

        def run(some: slice, guess: int) -> int:
            p_block = _Block(probabilities, p_codes, some, ctx.exponent)
            s_block = _Block(score_error, s_codes, some, guess)
            own = []
            for rows in row_bands:
                columns = _seen(rows, k, narrow)
                p = softmax.of(some, rows, columns, p_room)
                p_block.round(p, rows, columns)
                dp, to = s_room.of(some, count, rows, columns)
                multiply(errors.part(some, rows), values.part(some, None, columns), to)
                torch.ops.aten._softmax_backward_data.out(dp, p, -1, torch.float32, grad_input=dp)
                own.append(s_block.round(dp.mul_(scores.factor), rows, columns))
                multiply(
                    s_block.part(rows, columns), keys.part(some, columns), to_q.part(some, rows)
                )
            for columns in column_bands:
                rows = slice(columns.start if narrow else 0, length)
                left = p_block.part(rows, columns).transposed()
                multiply(left, errors.part(some, rows), to_v.part(some, columns))
                left = s_block.part(rows, columns).transposed()
                multiply(left, queries.part(some, rows), to_k.part(some, columns))
            return max(own)

        try:
            _settle(run, _together(q, k), guesses.errors)
        except FloatingPointError:  # errors of the scores are NaN
            return (*_in_float(ctx, scores, v, grad), *[None] * 7)
        if ctx.room is not None:
            gradients = ctx.room.handed_out(gradients, runs_everything(ctx))
        return (*gradients, *[None] * 7)


def _places_of_gradients(ctx: Any, q: Operand, k: Operand, v: Operand) -> list[Tensor]:
    """For the gradients of queries, keys and values."""
    if ctx.room is not None:
        found: list[Tensor] = ctx.room.gradients()
        return found
    samples, count, columns, length = v.codes.shape
    return [
        buffers.empty(*q.codes.shape),
        buffers.empty(*k.codes.shape),
        buffers.empty(samples, count, length, columns),
    ]


def _kept(ctx: Any) -> tuple[_Scores, Operand]:
    """What the scores are computed from, and the values."""
    mask, *saved = ctx.saved_tensors
    q, k, v = (Operand(saved[2 * i], saved[2 * i + 1], gap) for i, gap in enumerate(ctx.gaps))
    return _Scores(q, k, mask, *ctx.settings[2]), v


def _in_float(ctx: Any, scores: _Scores, v: Operand, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients where one of the errors has a NaN: its products in float, all samples."""
    q, k = scores.q, scores.k
    probabilities, (score_error, error), *_ = ctx.settings
    every = [slice(0, n) for n in (len(grad), q.codes.shape[2], k.codes.shape[2])]
    room = heads.Room(math.prod(q.codes.shape[:3]) * k.codes.shape[2])
    p = _Softmax(scores, multiplication(q, k)).of(every[0], every[1], every[2], room)
    p = p.view(*grad.shape[:2], *p.shape[1:])
    e = operand(grad, error)
    dv = product(transpose(operand(p, probabilities)), e)
    dp = torch.ops.aten._softmax_backward_data(product(e, v), p, -1, torch.float32)
    hidden = _later(*dp.shape[-2:]) if scores.causal else scores.mask
    if hidden is not None and hidden.dtype == torch.bool:
        dp.masked_fill_(hidden, 0.0)
    s = operand(dp.mul_(scores.factor), score_error)
    return product(s, k), product(transpose(s), q), dv


def _settle(run: Callable[[slice, int], int], samples: Sequence[slice], guess: Guess) -> int:
    """Run all samples with the exponent of the whole: the largest that some of them have.

    Those that were run with another are run again.

    Args:
        run: of some samples, with an exponent; returns theirs.
        samples: those to run together.
        guess: of the exponent.
    """
    exponent = guess.next()
    used: list[int | None] = [None] * len(samples)
    own = [exponent] * len(samples)
    while any(one != exponent for one in used):
        for i, some in enumerate(samples):
            if used[i] != exponent:
                own[i] = run(some, exponent)
                used[i] = exponent
                exponent = max(exponent, own[i])
        exponent = max(own)
    guess.found(exponent)
    return exponent


def _may_be_large(left: Operand, right: Operand, factor: float) -> bool:
    """Whether numbers of a product, times `factor`, might come near float32's infinity."""
    exponent = exponent_of(left) + exponent_of(right) + 14
    return exponent + math.log2(left.codes.shape[-1] * max(abs(factor), 1.0)) > _LARGE


def _later(rows: int, columns: int) -> Tensor:
    """What causal attention hides: the columns after the row."""
    return torch.ones(rows, columns, dtype=torch.bool, device="cpu").triu(1)


def _together(q: Operand, k: Operand) -> list[slice]:
    """The samples that are worked on at a time."""
    samples, heads, rows, _ = q.codes.shape
    count = max(1, _TOGETHER // max(heads * min(rows, BAND) * k.codes.shape[2], 1))
    return [slice(at, min(at + count, samples)) for at in range(0, samples, count)]


def _bands(x: Operand) -> list[slice]:
    """The rows of (batch, heads, rows, ...), `BAND` at a time."""
    count = x.codes.shape[2]
    return [slice(at, min(at + BAND, count)) for at in range(0, count, BAND)]


def _seen(rows: slice, k: Operand, causal: bool) -> slice:
    """The columns of scores that a band of rows may see."""
    count = k.codes.shape[2]
    return slice(0, min(rows.start + BAND, count) if causal else count)


class _Scores(NamedTuple):
    """The scores of attention: ``factor * q @ k.T + mask``.

    Attributes:
        q: codes of the queries.
        k: codes of the keys.
        mask: True or -infinity hides; None: nothing, or what `causal` says.
        causal: row l sees columns up to l, of numbers that are `finite`.
        factor: of the products.
        finite: whether all scores are, but for the mask.
    """

    q: Operand
    k: Operand
    mask: Tensor | None
    causal: bool
    factor: float
    finite: bool


class _Softmax:
    """Of scores, as probabilities."""

    def __init__(self, scores: _Scores, multiply: heads.Multiply) -> None:
        self._scores, self._multiply = scores, multiply
        self._queries = matrices(scores.q)
        self._keys = matrices(scores.k).transposed()
        self._heads = scores.q.codes.shape[1]

    def of(self, some: slice, rows: slice, columns: slice, room: heads.Room) -> Tensor:
        """Those of some samples, in `room`: (samples * heads, rows, columns)."""
        scores = self._scores
        p, to = room.of(some, self._heads, rows, columns)
        self._multiply(self._queries.part(some, rows), self._keys.part(some, None, columns), to)
        if scores.causal:
            planes, count, length = p.shape
            _kernels.causal(
                (planes, count, length), rows.start, scores.factor, p.data_ptr(),
                torch.get_num_threads(),
            )  # fmt: skip
        else:
            p.mul_(scores.factor)
        mask = scores.mask
        if mask is not None:
            part = mask[some] if mask.dim() == 4 and mask.size(0) > 1 else mask
            if part.dim() > 1 and part.size(-2) > 1:
                part = part[..., rows, :]
            each = p.view(-1, self._heads, *p.shape[1:])
            if part.dtype == torch.bool:
                each.masked_fill_(part, -math.inf)
            else:
                each.add_(part)
        # Of rows of which nothing takes part: zeros.
        none_hidden = mask is None and scores.finite
        hidden = None if none_hidden else p.amax(-1, keepdim=True) == -math.inf
        torch.ops.aten._softmax.out(p, -1, False, out=p)
        if hidden is not None and bool(hidden.any()):
            p.masked_fill_(hidden, 0.0)
        return p


def _codes_of_some(q: Operand, k: Operand) -> Tensor:
    """Room for the codes of the probabilities of samples that are run together: (samples, heads,
    rows, columns).
    """
    first, (count, rows) = _together(q, k)[0], q.codes.shape[1:3]
    return buffers.empty(first.stop, count, rows, k.codes.shape[2], dtype=torch.int8)


def _room_for_scores(q: Operand, k: Operand) -> heads.Room:
    """For a band of scores of samples that are run together."""
    first, (count, rows) = _together(q, k)[0], q.codes.shape[1:3]
    return heads.Room(first.stop * count * min(rows, BAND) * k.codes.shape[2])


class _Block:
    """Codes of probabilities, or of their errors, of some samples: rounded part by part.

    Args:
        quantization: how the whole, all samples, is rounded: one exponent.
        codes: where they go: (samples, heads, rows, columns).
        some: the samples.
        guess: the exponent to round with.
    """

    def __init__(self, quantization: Quantization, codes: Tensor, some: slice, guess: int) -> None:
        mine = codes[: some.stop - some.start]
        gap = gap_of(quantization[0])
        assert gap is not None
        start = some.start * codes[0].numel()
        self._parts = cpu.Parts(mine.flatten(0, 1), *quantization, start, guess)
        self._codes = matrices(Operand(mine, None, gap + guess))

    def round(self, x: Tensor, rows: slice, columns: slice) -> int:
        """Round these rows and columns; returns the exponent that they would have alone."""
        exponent, has_nan = self._parts.pack(x, rows.start, columns.start)
        if has_nan:
            raise FloatingPointError
        return exponent

    def part(self, rows: slice, columns: slice) -> _kernels.Heads:
        """Their codes."""
        return self._codes.part(None, rows, columns)
