"""The look of the claims' pictures."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Of every picture: colours that are told apart by those who see few (Paul Tol's bright scheme).
FLOAT, LOW, AVERAGED, FLOAT_AVERAGED = "#4477aa", "#ee6677", "#228833", "#66ccee"
OTHERS = ("#aa3377", "#ccbb44", "#4477aa", "#ee6677", "#228833", "#66ccee", "#bbbbbb")
REFERENCE = "0.35"


def figure(columns: int = 1, *, rows: int = 1, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, from left to right and down."""
    made = Figure(
        figsize=(7.5 if columns == 1 else 5.2 * columns, 4.8 * rows), dpi=130, layout="constrained"
    )
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, squeeze=False, sharey=sharey).flatten().tolist()
    for each in axes:
        each.grid(alpha=0.25, which="both", linewidth=0.5)
        each.spines[["top", "right"]].set_visible(False)
    return made, axes


def png(made: Figure) -> bytes:
    """The PNG file of a figure."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
