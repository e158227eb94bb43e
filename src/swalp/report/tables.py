"""The table of a finished run, and what it says, in words computed from its rows."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from swalp.training.significance import differs_from_zero

Row = dict[str, Any]


def render(summary: dict[str, Any]) -> str:
    """The rows of a summary as a table, and the findings below it."""
    rows = summary["rows"]
    seeds = len(rows[0]["test_error"])
    header = ("model", "test error, %", "model, bytes", "weights + momentum", "average")
    body: list[tuple[str, ...] | None] = []
    for number, row in enumerate(rows):
        if number and row["arm"] != rows[number - 1]["arm"]:
            body.append(None)
        averaging = f"{row['averaging_bytes']:,}" if row["averaging_bytes"] else ""
        body.append(
            (
                label(row),
                spread(row["test_error"]),
                f"{row['model_bytes']:,}",
                f"{row['training_bytes']:,}",
                averaging,
            )
        )
    note = (
        f"{summary['data']}: {summary['train_examples']:,} training and "
        f"{summary['test_examples']:,} test images; mean ± standard deviation of {count(seeds)}.\n"
        f"SGD: the iterate where averaging starts, after the whole decay of the rate.\n"
        f"Last iterate: at the end of the averaging phase, so for the same budget as the average.\n"
        f"SWA, SWALP: the mean of that phase's iterates, kept in float"
    )
    models = {row["model"] for row in rows}
    note += "; below it, rounded to nearest as it\nis shipped." if "quantized" in models else "."
    if "best" in models:
        note += (
            f"\nBest epoch: chosen by {summary['validation_examples']:,} held-out training images."
        )
    sentences = [textwrap.fill(sentence, 100) for sentence in findings(rows)]
    return "\n".join([aligned(header, body), note, "", *sentences])


def label(row: Row) -> str:
    """What a row is called."""
    average = "SWA" if row["arm"] == "float" else "SWALP"
    names = {
        "sgd": "SGD",
        "last": "SGD, last iterate",
        "average": average,
        "best": f"{average}, best epoch",
        "quantized": f"{average}, {row.get('weight')} weights",
        "quantized-activations": f"{average}, and {row.get('activation')} activations",
    }
    name = names.get(row["model"], f"{average}, {row.get('average')}")
    return f"{row['arm']} {name}"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation of some errors; one value stands alone."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def count(seeds: int) -> str:
    """A number of seeds, in words that fit it."""
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def aligned(header: Sequence[str], body: Sequence[Sequence[str] | None]) -> str:
    """Text in columns, the first to the left, the others to the right; None is a rule."""
    cells = [header, *(row for row in body if row is not None)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    rule = "  ".join("-" * width for width in widths)
    lines = [
        rule
        if row is None
        else "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, None, *body, None]
    ]
    return "\n".join(line.rstrip() for line in lines)


def findings(rows: Sequence[Row]) -> list[str]:
    """One sentence per low-precision arm: what the precision costs, and what averaging brings back.

    Differences are taken seed by seed, as both sides share initial weights and order of the data.
    """
    errors = {(row["arm"], row["model"]): row["test_error"] for row in rows}
    arms = dict.fromkeys(row["arm"] for row in rows)
    if "float" not in arms:
        return []
    sentences = []
    for arm in arms:
        if arm == "float":
            continue
        cost = _differences(errors[arm, "sgd"], errors["float", "sgd"])
        brought = _differences(errors[arm, "sgd"], errors[arm, "average"])
        left = _differences(errors[arm, "average"], errors["float", "sgd"])
        averages = _differences(errors[arm, "average"], errors["float", "average"])
        sentences.append(
            f"{arm}: low precision costs SGD {difference(cost)} points of test error; averaging "
            f"brings back {difference(brought)}, which leaves SWALP {difference(left)} from float "
            f"SGD and {difference(averages)} from float SWA."
        )
    if sentences and len(rows[0]["test_error"]) > 1:
        sentences.append(
            "(Differences are paired by seed; ± is their standard deviation, and * marks a mean "
            "that differs from 0 at the 5 % level of Student's t.)"
        )
    elif sentences:
        sentences.append("(One seed: the differences may be chance.)")
    return sentences


def _differences(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


def difference(values: Sequence[float]) -> str:
    """Mean ± standard deviation, with a star where Student's t tells the mean from 0."""
    shown = f"{round(mean(values), 2) + 0.0:+.2f}"  # + 0.0: there is no -0.00
    if len(values) == 1:
        return shown
    return f"{shown} ± {stdev(values):.2f}{'*' if differs_from_zero(values) else ''}"


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each row whose errors are not the same in both summaries."""
    return [
        f"{label(old)}, seed {number + 1} of {len(old['test_error'])}: {was} % became {now} %"
        for old, new in zip(before["rows"], after["rows"], strict=True)
        for number, (was, now) in enumerate(zip(old["test_error"], new["test_error"], strict=True))
        if was != now
    ]


def pairs(values: Mapping[str, object]) -> str:
    """Names and values, one pair to a line."""
    width = max(map(len, values))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in values.items())
