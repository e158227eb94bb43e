"""Tables and pictures of the ablations of the average: see `swalp.training.ablations`."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from swalp.report.tables import aligned, difference, spread

Row = dict[str, Any]

_REFERENCES = ("every=1", "precision=float32")  # what the others are compared with


def table(rows: Sequence[Row]) -> str:
    """Test error at the last epoch: for each arm a line for each average, seeds together.

    The last column is the difference to the reference (an iterate every step, or a float32
    average), taken seed by seed, with a star where Student's t tells its mean from 0.
    """
    last = max(row["epoch"] for row in rows)
    header = ("arm", "average", "iterates", "test error, %", "difference to the reference")
    body: list[tuple[str, ...] | None] = []
    for arm in _distinct(rows, "arm"):
        if body:
            body.append(None)
        of = [row for row in rows if row["arm"] == arm and row["epoch"] == last]
        reference = next(
            [row["test_error"] for row in of if row["average"] == name]
            for name in _REFERENCES
            if any(row["average"] == name for row in of)
        )
        for average in _distinct(of, "average"):
            chosen = [row for row in of if row["average"] == average]
            errors = [row["test_error"] for row in chosen]
            differences = [a - b for a, b in zip(errors, reference, strict=True)]
            body.append(
                (
                    arm,
                    _label(average),
                    f"{chosen[0]['averaged']:,}" if chosen[0]["averaged"] else "",
                    spread(errors),
                    "" if average in _REFERENCES else difference(differences),
                )
            )
    return aligned(header, body)


def frequency_png(rows: Sequence[Row], title: str) -> bytes:
    """Test error against the epoch, a curve for each frequency, a panel for each arm."""

    def draw(axes: Axes, of: Sequence[Row]) -> None:
        averages = _distinct(of, "average")
        colours = colormaps["viridis"].resampled(max(len(averages), 2))
        for number, average in enumerate(averages):
            own = [row for row in of if row["average"] == average]
            epochs = sorted({row["epoch"] for row in own})
            errors = [mean(r["test_error"] for r in own if r["epoch"] == e) for e in epochs]
            iterate = average == "iterate"
            axes.plot(
                epochs,
                errors,
                color="0.6" if iterate else colours(number - 1),
                linewidth=1 if iterate else 2,
                marker=".",
                label=_label(average),
            )
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _panels(rows, title, draw)


def precision_png(rows: Sequence[Row], title: str) -> bytes:
    """Test error at the last epoch against the bits of the average, a panel for each arm."""
    last = max(row["epoch"] for row in rows)

    def draw(axes: Axes, of: Sequence[Row]) -> None:
        points: dict[int, list[float]] = {}
        level: dict[str, list[float]] = {"iterate": [], "precision=float32": []}
        for row in of:
            if row["epoch"] != last:
                continue
            if row["average"] in level:
                level[row["average"]].append(row["test_error"])
            else:
                points.setdefault(_bits(row["average"]), []).append(row["test_error"])
        bits = sorted(points)
        axes.plot(bits, [mean(points[b]) for b in bits], color="#4477aa", marker=".", linewidth=2,
                  label="average in that many bits")  # fmt: skip
        for b in bits:
            axes.plot([b] * len(points[b]), points[b], "_", color="#4477aa", alpha=0.5)
        axes.axhline(mean(level["precision=float32"]), color="#228833", linestyle="--",
                     label="average in float32")  # fmt: skip
        axes.axhline(mean(level["iterate"]), color="0.6", linestyle=":", label="last iterate")
        axes.set_xlabel("bits of the average (block floating point, Q_SWA)")
        axes.set_xticks(bits)

    return _panels(rows, title, draw)


def _panels(rows: Sequence[Row], title: str, draw: Callable[[Axes, list[Row]], None]) -> bytes:
    arms = _distinct(rows, "arm")
    figure = Figure(figsize=(5.2 * len(arms), 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for number, arm in enumerate(arms):
        axes = figure.add_subplot(1, len(arms), number + 1)
        draw(axes, [row for row in rows if row["arm"] == arm])
        axes.set_title(arm, fontsize="medium")
        axes.set_ylabel("test error, %")
        axes.grid(alpha=0.3)
    # One for all panels, beside them: within one it would hide points.
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _label(average: str) -> str:
    """An average in words."""
    if average == "iterate":
        return "last iterate"
    if average.startswith("precision="):
        return average.removeprefix("precision=")
    word = average.removeprefix("every=")
    if word == "1":
        return "every step"
    if word.isdigit():
        return f"every {word} steps"
    return "every epoch" if word == "epoch" else f"every {word.removesuffix('epochs')} epochs"


def _bits(average: str) -> int:
    match = re.search(r"bfp(\d+)", average)
    assert match is not None
    return int(match[1])


def _distinct(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))
