"""A picture of a run: test error against the epoch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_COLOURS = ("#4477aa", "#228833", "#ee6677", "#aa3377", "#ccbb44", "#66ccee")


def png(metrics: Sequence[dict[str, Any]], *, averaging_start: int, title: str) -> bytes:
    """Draw the mean over seeds of each arm's iterate (thin) and average (thick), seeds as bands.

    Args:
        metrics: records with "arm", "seed", "epoch", "test_error" and "average_error".
        averaging_start: the last epoch before averaging.
        title: of the picture.

    Returns:
        The PNG file.
    """
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    arms = list(dict.fromkeys(record["arm"] for record in metrics))
    for arm, colour in zip(arms, _cycle(len(arms)), strict=True):
        average = "SWA" if arm == "float" else "SWALP"
        for key, name, width in (("test_error", "SGD", 1.0), ("average_error", average, 2.5)):
            epochs, low, middle, high = _bands(metrics, arm, key)
            if not epochs:
                continue
            axes.plot(
                epochs,
                middle,
                color=colour,
                linewidth=width,
                label=f"{arm} {name}",
                marker="." if len(epochs) == 1 else "",
            )
            axes.fill_between(epochs, low, high, color=colour, alpha=0.1, linewidth=0)
    axes.axvline(averaging_start, color="0.5", linewidth=0.8, linestyle=":")
    axes.annotate(
        "averaging starts",
        (averaging_start, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        va="top",
        color="0.35",
        fontsize="small",
    )
    if all(record["test_error"] > 0 and record["average_error"] != 0 for record in metrics):
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("test error, %")
    seeds = len({record["seed"] for record in metrics})
    axes.set_title(f"{title}: mean and range of {seeds} seeds" if seeds > 1 else title)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        loc="outside lower center", ncols=max(len(arms), 2), frameon=False, fontsize="small"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _bands(
    metrics: Sequence[dict[str, Any]], arm: str, key: str
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Epochs with, over the seeds, the lowest, mean and highest value."""
    values: dict[int, list[float]] = {}
    for record in metrics:
        if record["arm"] == arm and record[key] is not None:
            values.setdefault(record["epoch"], []).append(record[key])
    found = sorted(values.items())
    return (
        [epoch for epoch, _ in found],
        [min(numbers) for _, numbers in found],
        [mean(numbers) for _, numbers in found],
        [max(numbers) for _, numbers in found],
    )
