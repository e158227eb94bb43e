"""Charts as plain values: series over numbers or names, which the page draws and lists."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any, Literal, TypeGuard

Kind = Literal["line", "points", "steps", "bars", "strokes"]
Row = Mapping[str, Any]

_VALUES = 12  # that something that was set takes, at most
_CURVES = 24  # in one panel; more tell nothing
_COLOURS = 8  # that the page has
_DIGITS = 5  # significant ones: more cannot be seen, and make the page large


@dataclass(frozen=True, slots=True)
class Series:
    """A curve, or points, with what it is called.

    Attributes:
        label: in legend, table and readout; unique in its chart.
        x: ascending, finite.
        y: of the same length; None where there is nothing.
        low: the lowest of what `y` is the mean of, or empty.
        high: the highest, or empty.
        kind: "steps" and "bars" have their left edges at `x`, the last one as wide as the first.
        colour: which of the page's colours, from 0; series of one colour belong together.
        dash: which of the page's line patterns, from 0, solid.
        strong: whether it is drawn thick.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    kind: Kind = "line"
    colour: int = 0
    dash: int = 0
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A place on an axis with its name, drawn as a line across."""

    axis: Literal["x", "y"]
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Panel:
    """Series in one frame.

    Attributes:
        label: where one of several panels is chosen.
        group: of labels that belong together.
        x_label: what is along, with its unit.
        y_label: what is up, with its unit.
        series: at least one.
        marks: places to point at.
        log_x: whether the axis starts logarithmic; it can only where all numbers are positive.
        log_y: likewise.
        names: of x = 0, 1, …, if these are things and not numbers.
        whole: whether x is a count, so that the axis has whole numbers only.
        note: what to see, in words: the text alternative.
    """

    label: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    marks: Sequence[Mark] = ()
    group: str = ""
    log_x: bool = False
    log_y: bool = False
    names: Sequence[str] = ()
    whole: bool = False
    note: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON, numbers short."""
        value = asdict(self)
        for series in value["series"]:
            for key in ("x", "y", "low", "high"):
                series[key] = _short_list(series[key])
        return value


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure of one panel, or of several of which one is shown.

    Attributes:
        id: in the page.
        title: above it.
        panels: at least one.
        start: the panel that is shown first.
        picture: a PNG for where no script runs.
    """

    id: str
    title: str
    panels: Sequence[Panel]
    start: int = 0
    picture: bytes | None = field(default=None, repr=False)

    def plain(self) -> dict[str, Any]:
        """What the page's script draws."""
        panels = [panel.plain() for panel in self.panels]
        return {"title": self.title, "start": self.start, "panels": panels}


def _short_list(numbers: Sequence[float | None]) -> Any:
    """Numbers with few digits; evenly spaced ones as start, step and count."""
    if len(numbers) > 8 and None not in numbers:
        first, second = numbers[0], numbers[1]
        assert first is not None
        assert second is not None
        step = second - first
        tolerance = 1e-9 * (abs(step) + abs(first))
        if step and all(
            abs(first + place * step - number) <= tolerance * (place + 1)  # type: ignore[operator]  # no None here
            for place, number in enumerate(numbers)
        ):
            return {"from": first, "by": step, "count": len(numbers)}
    return [_short(number) for number in numbers]


def _short(number: float | None) -> float | None:
    if number is None or not math.isfinite(number):
        return None
    if float(number).is_integer() and abs(number) < 1e15:
        return int(number)
    return float(f"{number:.{_DIGITS}g}")


def over_seeds(
    rows: Iterable[Row], x: str, y: str
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Places along `x` with the mean, lowest and highest `y` of the rows there."""
    values: dict[float, list[float]] = {}
    for row in rows:
        place, value = row.get(x), row.get(y)
        if is_number(place) and is_number(value):
            values.setdefault(place, []).append(value)
    found = sorted(values.items())
    return (
        [place for place, _ in found],
        [mean(each) for _, each in found],
        [min(each) for _, each in found],
        [max(each) for _, each in found],
    )


def flat(row: Row, prefix: str = "") -> dict[str, Any]:
    """A record whose values are no records: keys of inner ones are joined by a space."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{prefix} {key}".strip()
        found |= flat(value, name) if isinstance(value, Mapping) else {name: value}
    return found


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def guess(rows: Sequence[Row], x_first: Sequence[str]) -> list[Panel]:
    """Panels for rows that nobody described: a curve for each set of names, over a quantity.

    A row has names (texts), "seed", and quantities (numbers). The first quantity of `x_first` that
    takes several values is laid along, and every other one that varies gets a panel.

    Args:
        rows: flat records.
        x_first: quantities that may lie along, in order of preference.
    """
    quantities: dict[str, set[float]] = {}
    for row in rows:
        for key, value in row.items():
            if is_number(value) and key != "seed":
                quantities.setdefault(key, set()).add(value)
    along = next((key for key in x_first if len(quantities.get(key, ())) > 1), None)
    if along is None:
        return []
    named = _telling(rows)
    named += _varied(rows, named, along, quantities)
    panels = []
    for key, seen in quantities.items():
        if key in (along, *named, *x_first) or len(seen) < 2 or _follows(rows, key, along):
            continue
        groups: dict[str, list[Row]] = {}
        constant: dict[str, list[float]] = {}
        for row in rows:
            if not is_number(row.get(key)):
                continue
            label = ", ".join(_named(name, row[name]) for name in named if row.get(name))
            label = label or words(key)
            if is_number(row.get(along)):
                groups.setdefault(label, []).append(row)
            elif along in row:  # it stands for all of them, as float does for word lengths
                constant.setdefault(label, []).append(row[key])
        if not groups or len(groups) > _CURVES:
            continue
        series = []
        for place, (label, members) in enumerate(groups.items()):
            at, middle, low, high = over_seeds(members, along, key)
            several = len(members) > len(at)
            series.append(
                Series(
                    label, at, middle, low if several else (), high if several else (),
                    colour=place, dash=place // _COLOURS,
                    kind="line" if len(at) > 1 else "points", strong="SWA" in label,
                )
            )  # fmt: skip
        places = quantities[along]
        panels.append(
            Panel(
                words(key), words(along), words(key), series,
                [Mark("y", mean(values), label) for label, values in constant.items()],
                log_x=min(places) > 0 and max(places) >= 300 * min(places),
                log_y=min(seen) > 0 and max(seen) >= 30 * min(seen),
                whole=all(float(place).is_integer() for place in places),
                note=_ends(series),
            )
        )  # fmt: skip
    return panels


def _telling(rows: Sequence[Row]) -> list[str]:
    """The keys of names that tell rows apart, without those that say the same once more."""
    keys = list(
        dict.fromkeys(
            key for row in rows for key, value in row.items() if isinstance(value, str | bool)
        )
    )
    chosen: list[str] = []
    for key in keys:
        before = len({tuple(row.get(one) for one in chosen) for row in rows})
        after = len({tuple(row.get(one) for one in [*chosen, key]) for row in rows})
        if after > before:
            chosen.append(key)
    return chosen


def _varied(
    rows: Sequence[Row], named: Sequence[str], along: str, quantities: Mapping[str, set[float]]
) -> list[str]:
    """Quantities that were set, not measured: without them several rows of a seed are alike."""
    chosen: list[str] = []
    here = [row for row in rows if is_number(row.get(along))]

    def alike() -> int:
        keys = (*named, *chosen, along, "seed")
        return len(here) - len({tuple(row.get(key) for key in keys) for row in here})

    for key in sorted(quantities, key=lambda key: len(quantities[key])):
        if not alike():
            break
        if key != along and 1 < len(quantities[key]) <= _VALUES:
            before = alike()
            chosen.append(key)
            if alike() == before:
                chosen.remove(key)
    return chosen


def _follows(rows: Sequence[Row], key: str, along: str) -> bool:
    """Whether a quantity says no more than the place along the axis."""
    values: dict[Any, set[Any]] = {}
    count = 0
    for row in rows:
        if is_number(row.get(along)) and is_number(row.get(key)):
            values.setdefault(row[along], set()).add(row[key])
            count += 1
    return count > len(values) and all(len(found) == 1 for found in values.values())


def _named(name: str, value: Any) -> str:
    return f"{words(name)} {value:.4g}" if is_number(value) else str(value)


def _ends(series: Sequence[Series]) -> str:
    told = [f"{one.label} {one.y[-1]:.4g}" for one in series if one.y and one.y[-1] is not None]
    return f"At the right end: {', '.join(told)}." if told and len(told) <= 8 else ""


def words(key: str) -> str:
    """A key of a record as words: ``test_error`` is "test error, %"."""
    text = key.replace("_", " ")
    return f"{text}, %" if text.endswith("error") and "squared" not in text else text
