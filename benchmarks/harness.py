"""Timing contenders against one another: interleaved, order reversed every round.

A shared machine drifts by tens of percent within a minute, so absolute times mean little and
times of different runs nothing. What is kept is the ratio of two contenders within one round,
where they ran next to each other; its median over the rounds is the result, its quartiles say how
far to trust it.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

Times = Mapping[str, Sequence[float]]


class MissingError(Exception):
    """A peer, or a part of the library, is not here; the text says what and how to get it."""


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Args:
        name: unique among those it is timed with.
        run: one call of it; None if it is missing.
        prepare: called, untimed, before each of its turns.
        missing: why `run` is None.
    """

    name: str
    run: Callable[[], object] | None
    prepare: Callable[[], object] | None = None
    missing: str = ""

    def seconds(self, calls: int, clock: Callable[[], float]) -> float:
        """Seconds a call over `calls` calls."""
        assert self.run is not None
        if self.prepare is not None:
            self.prepare()
        run = self.run
        repetitions = range(calls)
        start = clock()
        for _ in repetitions:
            run()
        return (clock() - start) / calls


def contender(
    name: str,
    load: Callable[[], Callable[[], object]],
    prepare: Callable[[], object] | None = None,
) -> Contender:
    """The contender that `load` returns, or the record that it is missing."""
    try:
        return Contender(name, load(), prepare)
    except MissingError as reason:
        return Contender(name, None, missing=str(reason))


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some values."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The quartiles of `values`, interpolated between them; of one value, that value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)


def interleave(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    seconds: float = 0.0,
    turn: float = 0.04,
    patience: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds a call of every contender that is not missing, one figure a round.

    Each turn repeats the call until about `turn` seconds have passed, at least once, the number
    of repetitions being fixed beforehand, after a first call that warms up. Whose first call takes
    longer than `patience` seconds has a turn in the first round only. There are `rounds`, and more
    until they have taken `seconds`.
    """
    present = [entry for entry in contenders if entry.run is not None]
    names = [entry.name for entry in present]
    if len(set(names)) != len(names):
        raise ValueError(f"contenders must have different names, not {names}")
    first = {entry.name: entry.seconds(1, clock) for entry in present}
    slow = {name for name, seconds in first.items() if seconds > patience}
    calls = {
        entry.name: 1 if entry.name in slow else _calls_in(entry, turn, clock) for entry in present
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        began = clock()
        for number in itertools.count():
            if number >= rounds and clock() - began >= seconds:
                break
            for entry in present if number % 2 == 0 else reversed(present):
                if number and entry.name in slow:
                    continue
                times[entry.name].append(entry.seconds(calls[entry.name], clock))
    return times


def ratios(times: Times, numerator: str, denominator: str) -> list[float]:
    """Time of one contender over that of another, in each round that both took part in."""
    pairs = zip(times[numerator], times[denominator], strict=False)
    return [above / below for above, below in pairs]


def _calls_in(entry: Contender, turn: float, clock: Callable[[], float]) -> int:
    # One call says little about a microsecond: grow until a tenth of the turn is filled.
    calls, spent = 1, entry.seconds(1, clock)
    while spent * calls < turn / 10:
        calls *= 8
        spent = entry.seconds(calls, clock)
    return max(1, math.ceil(turn / spent)) if spent < turn else 1


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """No turn pays for collecting another's garbage."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
