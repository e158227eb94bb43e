"""Rounding a tensor to 8-bit block floating point: large tensors, small ones, sizes and threads."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import swalp
from benchmarks import instructions, peers
from benchmarks.harness import Contender, Spread, contender, interleave, ratios
from benchmarks.plan import Plan
from benchmarks.records import Goal, Row, at_least, at_most, compared, timed

PER_ROW = swalp.BlockFloat(8, axes=(0,))
PER_TENSOR = swalp.BlockFloat(8)
SHORT = swalp.Stochastic(1, random_bits=16)
LONG = swalp.Stochastic(1, random_bits=32)
COPY = "copy_"

_FAST, _USUAL = "avx512", "avx2"  # instruction sets, as the kernels call them


def against_copy(plan: Plan) -> list[Row]:
    """Into a given buffer, against `copy_` into the same buffer."""
    x, out = _large(plan)
    cases = [
        ("per row, 16 random bits", PER_ROW, SHORT, _FAST, at_most(1.3)),
        ("per row, 16 random bits", PER_ROW, SHORT, _USUAL, at_most(1.7)),
        ("per tensor, 16 random bits", PER_TENSOR, SHORT, _FAST, at_most(1.9)),
        ("per tensor, 16 random bits", PER_TENSOR, SHORT, _USUAL, None),
        ("per row, 32 random bits", PER_ROW, LONG, _FAST, at_most(2.2)),
        ("per row, 32 random bits", PER_ROW, LONG, _USUAL, None),
        ("per tensor, 32 random bits", PER_TENSOR, LONG, _FAST, at_most(2.5)),
        ("per tensor, 32 random bits", PER_TENSOR, LONG, _USUAL, None),
    ]
    copy = Contender(COPY, lambda: out.copy_(x))
    with instructions.restored():
        entries = [
            contender(
                f"{what}, {isa}",
                functools.partial(_on, isa, _quantizing(x, fmt, rounding, out)),
                prepare=functools.partial(instructions.use, isa),
            )
            for what, fmt, rounding, isa, _ in cases
        ]
        times = interleave([copy, *entries], plan.rounds, seconds=plan.seconds)
    details = {"elements": plan.elements, "columns": plan.columns}
    rows = []
    for entry, (*_, goal) in zip(entries, cases, strict=True):
        row = compared("quantize", entry.name, times, entry, copy, "time ratio", goal, details)
        rows.append(replace(row, subject="swalp"))
    return rows


def against_peers(plan: Plan) -> list[Row]:
    """The work of the eager quantizer, QPyTorch, `torch.compile` and TorchAO, against ours."""
    x, out = _large(plan)
    ours = Contender("swalp", _quantizing(x, PER_TENSOR, SHORT, out))
    fresh = Contender("swalp, new tensor", lambda: swalp.quantize(x, PER_TENSOR, SHORT))
    rows_ours = Contender("swalp per row", _quantizing(x, PER_ROW, SHORT, out))
    rivals: dict[str, tuple[Callable[[], peers.Quantizer], Goal | None]] = {
        peers.QPYTORCH: (lambda: peers.qpytorch_quantize(optimized=False), at_least(130)),
        peers.QPYTORCH_O3: (lambda: peers.qpytorch_quantize(optimized=True), None),
        peers.EAGER: (lambda: peers.eager_quantize, at_least(28)),
        peers.COMPILED: (peers.compiled_quantize, at_least(20)),
    }
    others = {
        name: contender(name, functools.partial(_peer, load, x, False))
        for name, (load, _) in rivals.items()
    }
    torchao = contender(peers.TORCHAO, functools.partial(_peer, peers.torchao_quantize, x, True))
    times = interleave(
        [ours, fresh, rows_ours, *others.values(), torchao], plan.rounds, seconds=plan.seconds
    )
    compare = functools.partial(
        compared, "quantize-peers", times=times, measure="speedup",
        details={"elements": plan.elements},
    )  # fmt: skip
    rows = [
        compare("per tensor, into a given buffer", subject=ours, peer=others[name], goal=goal)
        for name, (_, goal) in rivals.items()
    ]
    rows += [
        compare("per tensor, allocating like the peer", subject=fresh, peer=entry)
        for entry in others.values()
    ]
    rows.append(compare("per row, into a given buffer", subject=rows_ours, peer=torchao))
    return [replace(row, subject="swalp") for row in rows]


def codes(plan: Plan) -> list[Row]:
    """To codes, and from codes to floats, against a clone: all allocate their results."""
    x, _ = _large(plan)
    packed = swalp.pack(x, PER_ROW)
    turned = packed.t()
    clone = Contender("clone", x.clone)
    entries = [
        Contender("pack, per row, 16 random bits", lambda: swalp.pack(x, PER_ROW, SHORT)),
        Contender("dequantize, per row", packed.dequantize),
        Contender("dequantize, of its transpose", turned.dequantize),
    ]
    times = interleave([clone, *entries], plan.rounds, seconds=plan.seconds)
    return [
        replace(
            compared("codes", entry.name, times, entry, clone, "time ratio", None,
                     {"elements": plan.elements, "columns": plan.columns}),
            subject="swalp",
        )
        for entry in entries
    ]  # fmt: skip


def floats(plan: Plan) -> list[Row]:
    """FP8 and microscaling: rounding against `copy_`, QPyTorch and PyTorch's own casts."""
    x, out = _large(plan)
    copy = Contender(COPY, lambda: out.copy_(x))
    entries = [
        Contender(f"{name}, 16 random bits", _quantizing(x, swalp.parse_format(name), SHORT, out))
        for name in ("e4m3fn", "e5m2", "mxint8", "mxfp8_e4m3", "mxfp4_e2m1")
    ]
    qpytorch = contender(peers.QPYTORCH, lambda: _rounding(peers.qpytorch_float(5, 2), x))
    e4m3, narrow = swalp.parse_format("e4m3fn"), x.to(torch.float8_e4m3fn)
    packed = swalp.pack(x, e4m3)
    casts = [
        (Contender("pack to e4m3fn, nearest", lambda: swalp.pack(x, e4m3)),
         Contender("x.to(torch.float8_e4m3fn)", lambda: x.to(torch.float8_e4m3fn))),
        (Contender("dequantize e4m3fn", packed.dequantize),
         Contender("float8_e4m3fn to float32", narrow.float)),
    ]  # fmt: skip
    everyone = [copy, *entries, qpytorch, *itertools.chain.from_iterable(casts)]
    times = interleave(everyone, plan.rounds, seconds=plan.seconds)
    details = {"elements": plan.elements, "columns": plan.columns}
    rows = [
        compared("floats", each.name, times, each, copy, "time ratio", None, details)
        for each in entries
    ]
    rows.append(
        compared("floats", entries[1].name, times, entries[1], qpytorch, "speedup", None, details)
    )
    rows += [
        compared("floats", ours.name, times, ours, theirs, "speedup", None, details)
        for ours, theirs in casts
    ]
    return [replace(row, subject="swalp") for row in rows]


def small_calls(plan: Plan) -> list[Row]:
    """One call on a small tensor, allocation included, and many small tensors in one call."""
    count = 320
    x = torch.randn(1000)
    tensors = list(torch.randn(count, 1000).unbind())
    single = Contender("swalp", lambda: swalp.quantize(x, PER_TENSOR, SHORT))
    add = Contender("torch.add", lambda: torch.add(x, 1.0))
    many = Contender(
        "swalp, many", lambda: swalp.quantize_many(tensors, PER_TENSOR, SHORT, out=tensors)
    )
    times = interleave([single, many, add], plan.rounds, seconds=plan.seconds)
    return [
        timed("calls", "one call on 1,000 elements, allocating", times, single, "us",
              goal=at_most(2.5)),
        replace(
            timed("calls", f"{count} x 1,000 elements in one call, per tensor", times,
                  many, "us", per=count, goal=at_most(1.0)),
            subject="swalp",
        ),
        timed("calls", "for scale, x + 1 on 1,000 elements", times, add, "us"),
    ]  # fmt: skip


def scaling(plan: Plan) -> list[Row]:
    """Time against size and threads, beside the copy's; then how straight and how parallel."""
    works = {"swalp": _quantize_rows, COPY: _copy}
    times: dict[tuple[str, int, int], list[float]] = {}
    rows = []
    for size in plan.curve_sizes:
        x = torch.randn(max(1, round(size / plan.columns)), plan.columns)
        out = torch.zeros_like(x)
        entries = {
            (name, threads): Contender(
                f"{name}, {threads}",
                functools.partial(work, x, out),
                prepare=functools.partial(torch.set_num_threads, threads),
            )
            for (name, work), threads in itertools.product(works.items(), (1, 2))
        }
        measured = interleave(list(entries.values()), plan.rounds, seconds=plan.seconds)
        for (name, threads), entry in entries.items():
            times[name, threads, size] = measured[entry.name]
            details = {"elements": x.numel(), "threads": threads}
            row = timed("scaling", "per row, 16 random bits", measured, entry, "ns/element",
                        per=x.numel(), curve="throughput", details=details)  # fmt: skip
            rows.append(replace(row, subject=name))
    torch.set_num_threads(plan.threads)
    return [*rows, *_growth(times, plan), *_second_thread(times, plan)]


Curves = Mapping[tuple[str, int, int], Sequence[float]]  # of (name, threads, size)


def _growth(times: Curves, plan: Plan) -> list[Row]:
    """The power of the size that one thread's time grows with, over the three largest sizes."""
    sizes = plan.curve_sizes[-3:]
    logs = [math.log(size) for size in sizes]
    rows = []
    for name, goal in (("swalp", at_most(1.1)), (COPY, None)):
        powers = [
            _slope(logs, [math.log(times[name, 1, size][number]) for size in sizes])
            for number in range(plan.rounds)
        ]
        rows.append(
            Row(
                benchmark="scaling",
                what=f"one thread's time as a power of size, {sizes[0]:,} to {sizes[-1]:,}",
                subject=name,
                measure="exponent",
                value=Spread.of(powers),
                goal=goal,
                rounds=plan.rounds,
            )
        )
    return rows


def _second_thread(times: Curves, plan: Plan) -> list[Row]:
    """What two threads gain over one; at the larger sizes memory bounds both, as the copy shows."""
    rows = []
    for size in (10**6, 10**7, 10**8):
        if size not in plan.curve_sizes:
            continue
        for name, goal in (("swalp", at_least(1.7)), (COPY, None)):
            gain = ratios({"one": times[name, 1, size], "two": times[name, 2, size]}, "one", "two")
            rows.append(
                Row(
                    benchmark="scaling",
                    what=f"two threads, {size:,} elements",
                    subject=name,
                    peer="one thread",
                    measure="speedup",
                    value=Spread.of(gain),
                    goal=goal,
                    rounds=plan.rounds,
                )
            )
    return rows


def _slope(x: list[float], y: list[float]) -> float:
    """Of the least-squares line."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def _large(plan: Plan) -> tuple[Tensor, Tensor]:
    """A matrix of the plan's size, and a buffer for it whose pages exist already."""
    x = torch.randn(plan.elements // plan.columns, plan.columns)
    return x, torch.zeros_like(x)


def _rounding(quantize: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    return lambda: quantize(x)


def _quantizing(
    x: Tensor, fmt: swalp.formats.Format, rounding: swalp.Stochastic, out: Tensor
) -> Callable[[], object]:
    return lambda: swalp.quantize(x, fmt, rounding, out=out)


def _quantize_rows(x: Tensor, out: Tensor) -> object:
    return swalp.quantize(x, PER_ROW, SHORT, out=out)


def _copy(x: Tensor, out: Tensor) -> object:
    return out.copy_(x)


def _peer(load: Callable[[], peers.Quantizer], x: Tensor, per_row: bool) -> Callable[[], object]:
    quantize = load()
    return lambda: quantize(x, per_row)


def _on(isa: str, run: Callable[[], object]) -> Callable[[], object]:
    """`run`, if the kernels have those instructions."""
    instructions.use(isa)
    return run
