"""A format as a picture: its values on a line, and the staircases of rounding to it."""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from swalp.durable import write_file
from swalp.formats import BlockFloat, Format, Microscaling, Minifloat
from swalp.quantize import quantize
from swalp.rounding import Nearest, TowardNegative, TowardPositive

_FEW = 64  # strokes that are drawn thick
_STAIRS = 40  # values whose staircase is drawn whole
_LONG_MANTISSA = 5  # bits from which on a staircase shows one end of a binade only
_NEAREST, _EXPECTED, _SUBNORMAL = "#4477aa", "#ee6677", "#ccbb44"


def plot_format(fmt: Format, path: str | Path) -> None:
    """Draw the number line of a format and the staircases of rounding to it, as a PNG.

    Block formats are drawn for a block whose largest magnitude lies in [1, 2).

    Raises:
        ValueError: `path` exists or cannot be written, or the format has too many values to list.
    """
    if os.path.lexists(path):
        raise ValueError(f"{path} exists and is not overwritten; name another file")
    picture = _picture(fmt)
    try:
        write_file(Path(path), picture)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name a file that can be written") from None


def _picture(fmt: Format) -> bytes:
    values = fmt.values()
    figure = Figure(figsize=(7, 5.4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = (1, 1, 7) if _spans_binades(fmt) else (1, 7)
    rows = figure.subplots(len(ratios), 1, gridspec_kw={"height_ratios": ratios})
    _number_line(rows[0], values)
    if _spans_binades(fmt):
        _binades(rows[1], fmt, values[values > 0])
    _staircase(rows[-1], fmt)
    count = f"{len(values)} values" + (
        " in a block of exponent 0" if isinstance(fmt, BlockFloat | Microscaling) else ""
    )
    figure.suptitle(
        f"{fmt}: {fmt.bits} bit{'s' * (fmt.bits > 1)}, {count}",
        fontsize="medium",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _element(fmt: Format) -> Format:
    return fmt.element if isinstance(fmt, Microscaling) else fmt


def _spans_binades(fmt: Format) -> bool:
    element = _element(fmt)
    return isinstance(element, Minifloat) and element.max_exponent - element.min_exponent > 1


def _number_line(axes: Axes, values: Tensor) -> None:
    _frame(axes, values, "values")
    _strokes(axes, values, values, _NEAREST)


def _binades(axes: Axes, fmt: Format, positive: Tensor) -> None:
    """The positive values on a scale of binades, the subnormal ones apart."""
    element = _element(fmt)
    assert isinstance(element, Minifloat)
    unit = 2.0 ** (element.max_exponent if isinstance(fmt, Microscaling) else 0)
    normal = positive * unit >= 2.0**element.min_exponent
    places = positive.log2()
    _frame(axes, places, "positive values, by binade")
    _strokes(axes, places[normal], places, _NEAREST)
    if not bool(normal.all()):
        _strokes(axes, places[~normal], places, _SUBNORMAL, "subnormal")
        axes.legend(fontsize="x-small", frameon=False, loc="lower right", bbox_to_anchor=(1, 1),
                    borderaxespad=0, handlelength=1)  # fmt: skip
    axes.xaxis.set_major_formatter(lambda place, _: f"$2^{{{place:g}}}$")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _frame(axes: Axes, places: Tensor, title: str) -> None:
    low, high = places[0].item(), places[-1].item()
    axes.set_xlim(low - 0.01 * (high - low), high + 0.01 * (high - low))
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.tick_params(labelsize="small")
    axes.set_title(title, loc="left", fontsize="small")


def _strokes(axes: Axes, places: Tensor, among: Tensor, colour: str, label: str = "") -> None:
    """A stroke at each place; of those that fall on one pixel, one."""
    pixel = (among[-1] - among[0]).item() / 4000
    shown = {round(place / pixel): place for place in places.tolist()}
    width = 0.5 if len(among) > _FEW else 1.2
    axes.vlines(list(shown.values()), 0, 1, color=colour, linewidth=width, label=label)


@dataclass(frozen=True, slots=True)
class Staircase:
    """What rounding makes of the numbers `x`: float64, ascending.

    Attributes:
        x: the numbers.
        nearest: rounded to nearest.
        below: the lower outcome of stochastic rounding; the number itself, if it is a value.
        above: the upper one.
        expected: the mean of the outcomes.
    """

    x: Tensor
    nearest: Tensor
    below: Tensor
    above: Tensor
    expected: Tensor


def staircase(fmt: Format, points: int) -> Staircase:
    """Rounding to a format where it is worth seeing: all of it, a binade, or its upper end.

    Of a block format: in a block whose largest magnitude lies in [1, 2).
    """
    low, high = _window(fmt, fmt.values())
    x = torch.linspace(low, high, points, dtype=torch.float64)
    with_block = torch.cat([x, torch.tensor([1.5], dtype=torch.float64)])  # exponent 0, if blocks
    flat = _one_block(fmt, len(with_block))
    nearest, below, above = (
        quantize(with_block, flat, rule)[:-1]
        for rule in (Nearest(), TowardNegative(), TowardPositive())
    )
    expected = torch.minimum(torch.maximum(x, below), above)  # all there is, between neighbours
    return Staircase(x, nearest, below, above, expected)


def _staircase(axes: Axes, fmt: Format) -> None:
    """What nearest and stochastic rounding make of a number."""
    found = staircase(fmt, 4001)
    x, nearest, expected = found.x, found.nearest, found.expected
    axes.plot(x.tolist(), x.tolist(), color="0.75", linewidth=0.8, linestyle=":", label="identity")
    axes.fill_between(
        x.tolist(), found.below.tolist(), found.above.tolist(), color=_EXPECTED, alpha=0.18,
        linewidth=0, label="stochastic: the two outcomes",
    )  # fmt: skip
    axes.plot(x.tolist(), expected.tolist(), color=_EXPECTED, linewidth=1.1,
              label="stochastic: the mean")  # fmt: skip
    axes.plot(x.tolist(), nearest.tolist(), color=_NEAREST, linewidth=1.3, label="nearest")
    axes.set_xlim(x[0].item(), x[-1].item())
    axes.set_xlabel("x")
    axes.set_ylabel("Q(x)")
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="lower right")


def _window(fmt: Format, values: Tensor) -> tuple[float, float]:
    """Where the staircase is worth drawing."""
    low, high = values[0].item(), values[-1].item()
    element = _element(fmt)
    in_block = isinstance(fmt, BlockFloat | Microscaling)
    end = math.nextafter(2.0, 0.0)  # a number of 2 or more would have another block exponent
    if len(values) <= _STAIRS:
        margin = 0.12 * (high - low)
        start = low - margin if low < 0 else 0.0
        return (max(start, -end), end) if in_block else (start, high + margin)
    if isinstance(element, Minifloat):
        exponent = -1 if in_block else min(max(0, element.min_exponent), element.max_exponent - 2)
        unit = 2.0**exponent
        if element.mantissa_bits >= _LONG_MANTISSA:
            return unit * (1 - 6 * fmt.gap), unit * (1 + 10 * fmt.gap)
        return 0.45 * unit, min(4.4 * unit, end if in_block else math.inf)
    # Integers: the upper end, where they saturate.
    return high - 16 * fmt.gap, end if in_block else high + 5 * fmt.gap


def _one_block(fmt: Format, size: int) -> Format:
    """The same numbers, with one block for a vector of that size."""
    if isinstance(fmt, Microscaling):
        return Microscaling(fmt.element, tile=size)
    if isinstance(fmt, BlockFloat):
        return BlockFloat(fmt.word_length, exponent_bits=fmt.exponent_bits, symmetric=fmt.symmetric)
    return fmt
