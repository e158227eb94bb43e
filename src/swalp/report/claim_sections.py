"""The sections of a claim: verdict, curves from its rows, table, picture, settings, machine."""

from __future__ import annotations

from collections import Counter

from swalp.report import charts
from swalp.report.blocks import (
    Block,
    Cell,
    Facts,
    Figure,
    Folded,
    Grid,
    Page,
    Picture,
    Section,
    Text,
)
from swalp.report.charts import Chart, guess, is_number, words
from swalp.report.records import Claim, Row, Table
from swalp.report.run_sections import duration, setting

# What may lie along the axis of a claim's rows, first what is most telling.
_ALONG = (
    "step",
    "epoch",
    "word_length",
    "frac_bits",
    "bits",
    "every",
    "cycle_length",
    "average_every",
    "gap",
    "averaged",
)
_FEW = 12  # rows that are shown at once
_LISTED = 200  # rows that are shown whole


def sections(claim: Claim, prefix: str = "") -> list[Section]:
    """All there is to say of a claim; `prefix` keeps the ids of several apart."""
    found = [
        Section(
            f"{prefix}verdict", "Verdict" if "verdict" in claim.record else "About", _verdict(claim)
        ),
        Section(f"{prefix}curves", "Curves", _curves(claim, prefix)),
        Section(f"{prefix}results", "Results", _results(claim)),
        Section(f"{prefix}rows", "Rows", _rows(claim.rows)),
        Section(f"{prefix}settings", "What was run", _what_was_run(claim.record)),
    ]
    return [section for section in found if section.blocks]


def _verdict(claim: Claim) -> list[Block]:
    record = claim.record
    if "verdict" not in record:
        return [Page(claim.page)] if claim.page else []
    verdict = record["verdict"]
    blocks: list[Block] = [
        Text(
            str(verdict["sentence"]),
            "verdict" if verdict["holds"] else "failed",
            "Holds:" if verdict["holds"] else "Does not hold:",
        )
    ]
    if "statement" in record:
        blocks.append(Text(str(record["statement"]), lead="What is claimed."))
    return blocks


def _results(claim: Claim) -> list[Block]:
    """The record's own tables and picture, which has what only the claim knows, such as bounds."""
    blocks: list[Block] = [_table(claim, table) for table in claim.tables]
    if claim.picture is not None:
        text = f"The record's picture: {claim.title}. The page's curves and rows have its numbers."
        blocks.append(Picture(claim.picture, text))
    return blocks


def _curves(claim: Claim, prefix: str) -> list[Block]:
    rows = [charts.flat(row) for row in claim.rows]
    panels = guess(rows, _ALONG)
    alike = Counter(frozenset(row) for row in rows)
    # Constants of the problem: no other row has their quantities.
    facts = [row for row in rows if len(rows) > 1 and alike[frozenset(row)] == 1]
    blocks: list[Block] = []
    if panels:
        chart = Chart(f"{prefix}claim", claim.title, panels)
        blocks.append(Figure(chart))
    for row in facts:
        told = [(words(key), _shown(value)) for key, value in row.items() if is_number(value)]
        if told:
            blocks.append(Facts([(value, name) for name, value in told]))
    return blocks


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _table(claim: Claim, table: Table) -> Grid:
    numeric = frozenset(place for place, right in enumerate(table.numeric) if right)
    body = [[Cell(text) for text in row] for row in table.rows]
    title = "Table" if table.title in ("", claim.title) else table.title
    return Grid(title, table.header, body, numeric)


def _rows(rows: list[Row]) -> list[Block]:
    if not rows:
        return []
    rows = [charts.flat(row) for row in rows]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    body = [[Cell(_cell(row.get(key))) for key in keys] for row in rows[:_LISTED]]
    note = "" if len(rows) <= _LISTED else f"The first {_LISTED} of {len(rows):,} rows."
    numeric = frozenset(
        place for place, key in enumerate(keys) if any(is_number(row.get(key)) for row in rows)
    )
    grid = Grid("All rows", [words(key) for key in keys], body, numeric, note)
    return [grid] if len(rows) <= _FEW else [Folded(f"{len(rows):,} rows", [grid])]


def _cell(value: object) -> str:
    if isinstance(value, int | float) and is_number(value):
        return _shown(value)
    return "" if value is None else setting(value)


def _what_was_run(record: Row) -> list[Block]:
    blocks: list[Block] = []
    about = [
        [Cell(name), Cell(text)]
        for name, text in (
            ("command", str(record.get("command", ""))),
            ("time", duration(record["seconds"]) if is_number(record.get("seconds")) else ""),
        )
        if text
    ]
    if about:
        blocks.append(Grid("Command and time", ("", ""), about))
    for title, key in (("Settings", "settings"), ("Versions and machine", "environment")):
        if record.get(key):
            pairs = charts.flat(record[key])
            body = [[Cell(name), Cell(setting(value))] for name, value in pairs.items()]
            blocks.append(Grid(title, ("name", "value"), body))
    return blocks
