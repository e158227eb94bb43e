"""The sections of a run: verdict, table, curves, bytes, weights, errors, settings, machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from shlex import quote
from typing import Any

from swalp.report import tables
from swalp.report.blocks import Block, Cell, Facts, Figure, Grid, Section, Text
from swalp.report.charts import Chart, Mark, Panel, Series, flat, is_number, over_seeds, words
from swalp.report.inside_sections import diagnostics, number_formats
from swalp.report.records import Row, Run

# In a record of metrics these say where it stands; all other numbers are measured.
_PLACE = ("arm", "seed", "epoch", "step")


def sections(run: Run, prefix: str = "") -> list[Section]:
    """All there is to say of a run; `prefix` keeps the ids of several runs apart."""
    found = [
        Section(f"{prefix}verdict", "Verdict", _verdict(run)),
        Section(f"{prefix}results", "Results", _results(run)),
        Section(f"{prefix}curves", "Curves", _curves(run, prefix)),
        Section(f"{prefix}bytes", "Bytes and time", _bytes_and_time(run)),
        Section(f"{prefix}formats", "Number formats", number_formats(run, prefix)),
        *diagnostics(run, prefix),
        Section(f"{prefix}settings", "What was run", _what_was_run(run)),
    ]
    return [section for section in found if section.blocks]


def _verdict(run: Run) -> list[Block]:
    if run.summary is None:
        return [_unfinished(run)]
    rows = run.summary["rows"]
    *sentences, note = tables.findings(rows) or [""]
    # A sentence is about one arm, which it names first.
    blocks: list[Block] = [_headline(rows)] if len({row["arm"] for row in rows}) > 1 else []
    for sentence in sentences:
        lead, colon, rest = sentence.partition(":")
        blocks.append(Text(rest.strip() if colon else sentence, "verdict", lead + colon))
    if note:
        blocks.append(Text(note.strip("()"), "note"))
    return blocks


def _headline(rows: Sequence[Row]) -> Facts:
    """The error of every arm's average, and the bytes of training against float."""
    facts = []
    sizes = {row["arm"]: row.get("training_bytes") for row in rows}
    for row in rows:
        if row["model"] == "average":
            facts.append((f"{tables.spread(row['test_error'])} %", tables.label(row)))
    base = sizes.get("float")
    for arm, size in sizes.items():
        if arm != "float" and base and size:
            facts.append((f"{base / size:.1f}\u00d7 smaller", f"{arm} weights and momentum"))
    return Facts(facts)


def _unfinished(run: Run) -> Text:
    arms, seeds = run.settings.get("arms"), run.settings.get("seeds")
    epochs = run.settings.get("epochs")
    ended = sum(row["epoch"] == epochs for row in run.metrics)
    planned = len(arms) * seeds if isinstance(arms, list) and isinstance(seeds, int) else "?"
    where = "It has no records yet."
    if run.metrics:
        last = run.metrics[-1]
        where = (
            f"Its last record is of {last['arm']}, seed {last['seed']}, epoch {last['epoch']} of "
            f"{epochs}; {ended} of {planned} trainings have ended."
        )
    return Text(
        f"{where} What follows is what there is; there is no verdict. Go on with it: swalp resume "
        f"{quote(str(run.path))}",
        "warning",
        "This run is not finished.",
    )


def _results(run: Run) -> list[Block]:
    if run.summary is None:
        return []
    rows = run.summary["rows"]
    lists = _columns(rows, lambda value: isinstance(value, list) and all(map(is_number, value)))
    low, high = _extent(value for row in rows for value in row["test_error"])
    body: list[list[Cell]] = []
    for place, row in enumerate(rows):
        if place and row["arm"] != rows[place - 1]["arm"]:
            body.append([Cell("")])
        cells = [Cell(tables.label(row))]
        for key in lists:
            values = row.get(key) or []
            dots = [(value - low) / (high - low) for value in values] if key == "test_error" else []
            cells.append(Cell(tables.spread(values) if values else "", dots=dots))
        cells += [Cell(f"{row['model_bytes']:,}")] if "model_bytes" in row else []
        body.append(cells)
    seeds = len(rows[0]["test_error"])
    sized = "model_bytes" in rows[0]
    header = ["model", *map(words, lists), *(["model, bytes"] if sized else [])]
    data = {
        key: value for key, value in run.summary.items() if key != "rows" and value not in (0, None)
    }
    told = ", ".join(
        f"{value:,} {words(key)}" if is_number(value) else str(value) for key, value in data.items()
    )
    note = f"{told}; mean ± standard deviation of {tables.count(seeds)}"
    if seeds > 1:
        note += f"; each dot is a seed, on a scale from {low:.2f} to {high:.2f} %"
    return [
        Grid(
            "Each model of the run",
            header,
            body,
            frozenset(range(1, len(header))),
            f"{note}. SGD: the iterate where averaging starts, after the whole decay of the rate. "
            f"Last iterate: at the end of the averaging phase. SWA, SWALP: the mean of that "
            f"phase's iterates.",
        )
    ]


def _columns(rows: Sequence[Row], holds: Any) -> list[str]:
    """Keys whose values pass, in the order of the rows."""
    return list(
        dict.fromkeys(key for row in rows for key, value in row.items() if value and holds(value))
    )


def _extent(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    low, high = min(found), max(found)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def error_series(
    run: Run, keys: Sequence[str], prefix: str = "", arms: Sequence[str] = (), dash: int = 0
) -> list[Series]:
    """Curves of errors against epochs: a colour for each arm, the average thick, others dashed.

    Args:
        run: the run.
        keys: of metrics.
        prefix: before each label.
        arms: of all runs, so that an arm has the same colour in each; default: those of the run.
        dash: the line pattern of test and average error.
    """
    metrics = [flat(row) for row in run.metrics]
    found = []
    arms = arms or arms_of(run)
    for arm in arms_of(run):
        place = arms.index(arm)
        mine = [row for row in metrics if row["arm"] == arm]
        for number, key in enumerate(keys):
            at, middle, low, high = over_seeds(mine, "epoch", key)
            if not at:
                continue
            several = len(mine) > len({row["epoch"] for row in mine})
            found.append(
                Series(
                    f"{prefix}{arm} {_metric(arm, key)}",
                    at,
                    middle,
                    low if several else (),
                    high if several else (),
                    kind="line" if len(at) > 1 else "points",
                    colour=place,
                    dash=dash if key in ("test_error", "average_error") else number + 1,
                    strong=key == "average_error",
                )
            )
    return found


def arms_of(run: Run) -> list[str]:
    """The arms with metrics, in the order of their training."""
    return list(dict.fromkeys(row["arm"] for row in run.metrics))


def _metric(arm: str, key: str) -> str:
    average = "SWA" if arm == "float" else "SWALP"
    known = {"test_error": "SGD", "average_error": average}
    if key in known:
        return known[key]
    if key.startswith("averages "):
        return f"{average}, {key.removeprefix('averages ').removesuffix(' error')}"
    return words(key.removesuffix("_error")).replace("average", average)


def averaging_mark(run: Run) -> list[Mark]:
    """Where averaging starts, if the settings say it."""
    start = run.settings.get("averaging_start")
    return [Mark("x", start, "averaging starts")] if is_number(start) else []


def error_panel(
    label: str, series: Sequence[Series], marks: Sequence[Mark], note: str = ""
) -> Panel:
    """Errors against epochs, on a log scale where all are positive and far apart."""
    values = [value for one in series for value in one.y if value is not None]
    return Panel(
        label,
        "epoch",
        "error, %",
        series,
        marks,
        log_y=min(values) > 0 and max(values) > 4 * min(values),
        whole=True,
        note=note,
    )


def _curves(run: Run, prefix: str) -> list[Block]:
    if not run.metrics:
        return []
    keys = list(dict.fromkeys(key for row in run.metrics for key in flat(row)))
    main = [key for key in ("test_error", "average_error") if key in keys]
    further = [key for key in keys if key.endswith("error") and key not in main]
    panels = []
    seeds = len({row["seed"] for row in run.metrics})
    band = f" Bands: from the lowest to the highest of {seeds} seeds." if seeds > 1 else ""
    if series := error_series(run, main):
        note = f"{_last_values(series)}{band}"
        panels.append(error_panel("iterate and average", series, averaging_mark(run), note))
    if series := error_series(run, further):
        label = "further averages, held-out data, quantized"
        panels.append(error_panel(label, series, averaging_mark(run)))
    blocks: list[Block] = []
    if panels:
        chart = Chart(f"{prefix}errors", "Test error against the epoch", panels,
                      picture=run.picture)  # fmt: skip
        blocks.append(Figure(chart))
    others = [
        key
        for key in keys
        if key not in _PLACE
        and not key.endswith("error")
        and any(is_number(flat(row).get(key)) for row in run.metrics)
    ]
    others.sort(key=lambda key: "loss" not in key)  # what is looked for first
    if rest := [_metric_panel(run, key, band.strip()) for key in others]:
        blocks.append(Figure(Chart(f"{prefix}training", "Training, epoch by epoch", rest)))
    return blocks


def _last_values(series: Sequence[Series]) -> str:
    told = [f"{one.label} {one.y[-1]:.2f} %" for one in series if one.y and one.y[-1] is not None]
    return f"At the end: {', '.join(told)}."


def _metric_panel(run: Run, key: str, note: str) -> Panel:
    series = []
    for place, arm in enumerate(arms_of(run)):
        mine = [flat(row) for row in run.metrics if row["arm"] == arm]
        at, middle, low, high = over_seeds(mine, "epoch", key)
        if at:
            same = low == high
            series.append(
                Series(arm, at, middle, () if same else low, () if same else high, colour=place)
            )
    values = [value for one in series for value in one.y if value is not None]
    return Panel(
        words(key), "epoch", words(key), series, averaging_mark(run),
        log_y=min(values) > 0 and max(values) > 20 * min(values), whole=True, note=note,
    )  # fmt: skip


def _bytes_and_time(run: Run) -> list[Block]:
    blocks: list[Block] = []
    if run.summary is not None:
        rows = run.summary["rows"]
        keys = [key for key in _columns(rows, is_number) if key.endswith("bytes")]
        largest = {key: max(row.get(key) or 0 for row in rows) for key in keys}
        body = []
        for row in rows:
            cells = [Cell(tables.label(row))]
            for key in keys:
                value = row.get(key) or 0
                share = value / largest[key] if value else None
                cells.append(Cell(f"{value:,}" if value else "", bar=share))
            body.append(cells)
        names = {"training_bytes": "weights + momentum", "averaging_bytes": "kept for the average",
                 "model_bytes": "model"}  # fmt: skip
        header = ["model", *(names.get(key, words(key.removesuffix("_bytes"))) for key in keys)]
        blocks.append(
            Grid(
                "Bytes really held", header, body, frozenset(range(1, len(header))),
                "Of parameters and buffers as they are stored: codes and shared exponents in low "
                "precision, float32 otherwise.",
            )
        )  # fmt: skip
    return [*blocks, *_time(run)]


def _time(run: Run) -> list[Block]:
    ends = [session for session in run.sessions if "seconds" in session]
    begun = [session for session in run.sessions if "began" in session]
    if not begun:
        return []
    seconds = sum(session["seconds"] for session in ends)
    steps = sum(
        max(row["step"] for row in run.metrics if (row["arm"], row["seed"]) == key)
        for key in {(row["arm"], row["seed"]) for row in run.metrics}
        if all(is_number(row.get("step")) for row in run.metrics)
    )
    facts = [("began", str(begun[0]["began"]))]
    if ends:
        facts.append(("worked", f"{duration(seconds)} in {_count(len(ends), 'session')}"))
    if ends and steps:
        facts.append(("a step", f"{1000 * seconds / steps:.3g} ms, evaluation included"))
    outcomes = ", ".join(dict.fromkeys(str(session.get("outcome")) for session in ends))
    if outcomes:
        facts.append(("outcome", outcomes))
    return [Grid("Time", ("", ""), [[Cell(name), Cell(text)] for name, text in facts])]


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _what_was_run(run: Run) -> list[Block]:
    settings = [
        [Cell(key), Cell(setting(value)), Cell(run.meanings.get(key, ""))]
        for key, value in run.settings.items()
    ]
    blocks: list[Block] = [Grid("Settings", ("setting", "value", "meaning"), settings)]
    begun = [session for session in run.sessions if "began" in session]
    if begun:
        keys = [key for key in begun[0] if key != "began"]
        machine = [
            [Cell(key), Cell(", then ".join(dict.fromkeys(str(one.get(key)) for one in begun)))]
            for key in keys
        ]
        if "commit" not in keys:
            machine.append([Cell("commit"), Cell("not recorded")])
        blocks.append(Grid("Versions and machine", ("", ""), machine))
    else:
        blocks.append(Text("Versions and machine were not recorded.", "note"))
    return blocks


def setting(value: object) -> str:
    """A setting's value as text."""
    if isinstance(value, list):
        return ", ".join(map(setting, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)
