"""What a measurement leaves behind: rows, each with its goal, written as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import Contender, Spread, Times, ratios

Measure = Literal["time ratio", "speedup", "bytes ratio", "exponent", "us", "s", "ns/element"]
# How many seconds a unit of time is.
_UNITS = {"s": 1.0, "us": 1e-6, "ns/element": 1e-9}


@dataclass(frozen=True)
class Goal:
    """A bound on a row's median."""

    sense: Literal["≤", "≥"]
    bound: float

    def met(self, value: float) -> bool:
        """Whether `value` keeps the bound."""
        return value <= self.bound if self.sense == "≤" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:g}"


def at_most(bound: float) -> Goal:
    return Goal("≤", bound)


def at_least(bound: float) -> Goal:
    return Goal("≥", bound)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result.

    Args:
        benchmark: the name that ``--only`` takes.
        what: the work, in words.
        subject: whose figure it is.
        peer: with whom it is compared, if a ratio.
        measure: what `value` is: "time ratio", the subject's time over the peer's; "speedup", the
            inverse; "bytes ratio"; "exponent", a power; or a unit of time.
        value: median and quartiles; None if something is missing.
        goal: what the median should reach; None: for information.
        subject_seconds, peer_seconds: of a call, where times were taken.
        rounds: how many times each contender had its turn.
        missing: why there is no value.
        curve: name of the plotted curve the row is a point of; such rows are not listed in tables.
        details: sizes, threads and the like.
        quick: made with ``--quick``: small sizes, few rounds.
        environment: see `benchmarks.environment`.
    """

    benchmark: str
    what: str
    subject: str = "swalp"
    peer: str = ""
    measure: Measure
    value: Spread | None = None
    goal: Goal | None = None
    subject_seconds: Spread | None = None
    peer_seconds: Spread | None = None
    rounds: int = 0
    missing: str = ""
    curve: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    environment: dict[str, Any] = field(default_factory=dict)


def compared(
    benchmark: str,
    what: str,
    times: Times,
    subject: Contender,
    peer: Contender,
    measure: Literal["time ratio", "speedup"],
    goal: Goal | None = None,
    details: dict[str, Any] | None = None,
) -> Row:
    """The ratio of two contenders' times, or the record of which one is missing."""
    row = Row(
        benchmark=benchmark, what=what, subject=subject.name, peer=peer.name, measure=measure,
        goal=goal, details=details or {},
    )  # fmt: skip
    if subject.missing:
        return replace(row, missing=subject.missing)
    if peer.missing:
        return replace(row, missing=f"{peer.name}: {peer.missing}")
    order = (subject, peer) if measure == "time ratio" else (peer, subject)
    return replace(
        row,
        value=Spread.of(ratios(times, order[0].name, order[1].name)),
        subject_seconds=Spread.of(times[subject.name]),
        peer_seconds=Spread.of(times[peer.name]),
        rounds=min(len(times[subject.name]), len(times[peer.name])),
    )


def timed(
    benchmark: str,
    what: str,
    times: Times,
    subject: Contender,
    measure: Literal["us", "s", "ns/element"],
    *,
    per: int = 1,
    goal: Goal | None = None,
    curve: str = "",
    details: dict[str, Any] | None = None,
) -> Row:
    """The time of one contender, over `per` items, or the record that it is missing."""
    row = Row(
        benchmark=benchmark, what=what, subject=subject.name, measure=measure, goal=goal,
        curve=curve, details=details or {},
    )  # fmt: skip
    if subject.missing:
        return replace(row, missing=subject.missing)
    seconds = times[subject.name]
    return replace(
        row,
        value=Spread.of([value / per / _UNITS[measure] for value in seconds]),
        subject_seconds=Spread.of(seconds),
        rounds=len(seconds),
    )


def save(rows: Iterable[Row], path: Path) -> None:
    """Write one JSON object a line, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def load(path: Path) -> list[Row]:
    """The rows that `save` wrote; none if there is no file.

    Raises:
        ValueError: a line is none of those.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            fields = json.loads(line)
            for name in ("value", "subject_seconds", "peer_seconds"):
                fields[name] = fields[name] and Spread(**fields[name])
            fields["goal"] = fields["goal"] and Goal(**fields["goal"])
            rows.append(Row(**fields))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}: line {number} is no row of results; mend it, or choose another --out"
            ) from None
    return rows


def merged(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """`new`, and what `old` holds of other benchmarks, in the order of `old`."""
    measured = {row.benchmark for row in new}
    kept = [row for row in old if row.benchmark not in measured]
    return kept + list(new)
