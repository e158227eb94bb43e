"""Several records side by side: what they found, where their settings differ, their curves."""

from __future__ import annotations

from collections.abc import Sequence

from swalp.report import tables
from swalp.report.blocks import Block, Cell, Figure, Grid, Section
from swalp.report.charts import Chart, Series
from swalp.report.records import Claim, Run
from swalp.report.run_sections import (
    arms_of,
    averaging_mark,
    error_panel,
    error_series,
    setting,
)


def sections(records: Sequence[Run | Claim], names: Sequence[str]) -> list[Section]:
    """What can be said of them together; `names` tell them apart."""
    runs = [(name, one) for name, one in zip(names, records, strict=True) if isinstance(one, Run)]
    claims = [
        (name, one) for name, one in zip(names, records, strict=True) if isinstance(one, Claim)
    ]
    found = []
    if claims:
        found.append(Section("verdicts", "Verdicts", [_verdicts(claims)]))
    if len(runs) > 1:
        found.append(Section("compared", "Side by side", _compared(runs)))
    return found


def _verdicts(claims: Sequence[tuple[str, Claim]]) -> Grid:
    body = []
    for name, claim in claims:
        verdict = claim.record.get("verdict")
        outcome = "" if verdict is None else "holds" if verdict["holds"] else "does not hold"
        sentence = "" if verdict is None else str(verdict["sentence"])
        body.append([Cell(name), Cell(outcome), Cell(sentence or claim.title)])
    return Grid("Claims", ("claim", "verdict", "from its rows"), body)


def _compared(runs: Sequence[tuple[str, Run]]) -> list[Block]:
    found = {
        name: {tables.label(row): row for row in run.summary["rows"]} if run.summary else {}
        for name, run in runs
    }
    labels = list(dict.fromkeys(label for rows in found.values() for label in rows))
    blocks: list[Block] = []
    header = ("model", *found)
    numeric = frozenset(range(1, len(header)))
    if labels:
        body = [
            [
                Cell(label),
                *(
                    Cell(tables.spread(rows[label]["test_error"]) if label in rows else "")
                    for rows in found.values()
                ),
            ]
            for label in labels
        ]
        unfinished = [name for name, run in runs if run.summary is None]
        note = "Mean ± standard deviation over each run's seeds."
        note += f" Not finished: {', '.join(unfinished)}." if unfinished else ""
        blocks.append(Grid("Test error, %", header, body, numeric, note))
        size = [
            [
                Cell(label),
                *(
                    Cell(f"{rows[label]['training_bytes']:,}" if label in rows else "")
                    for rows in found.values()
                ),
            ]
            for label in labels
            if all("training_bytes" in row for rows in found.values() for row in rows.values())
        ]
        if size:
            blocks.append(Grid("Bytes of weights and momentum", header, size, numeric))
    blocks.append(_differences(runs))
    arms = list(dict.fromkeys(arm for _, run in runs for arm in arms_of(run)))
    series: list[Series] = []
    for place, (name, run) in enumerate(runs):
        keys = ("test_error", "average_error")
        series += error_series(run, keys, f"{name}: ", arms, dash=place)
    if series:
        marks = [mark for _, run in runs for mark in averaging_mark(run)]
        same = marks[:1] if len(set(marks)) == 1 else []
        note = "A colour for each arm, a line pattern for each run; thick: averages. Bands: from "
        note += "the lowest to the highest seed."
        panel = error_panel("iterate and average", series, same, note)
        blocks.append(Figure(Chart("compared-errors", "Test error of all runs", [panel])))
    return blocks


def _differences(runs: Sequence[tuple[str, Run]]) -> Grid:
    keys = list(dict.fromkeys(key for _, run in runs for key in run.settings))
    body = []
    for key in keys:
        values = [setting(run.settings[key]) if key in run.settings else "" for _, run in runs]
        if len(set(values)) > 1:
            body.append([Cell(key), *map(Cell, values)])
    note = "" if body else "All settings are equal."
    return Grid("Settings that differ", ("setting", *(name for name, _ in runs)), body, note=note)
