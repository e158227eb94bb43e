"""Formats as tables and facts: what ``swalp formats`` prints."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from swalp.format_text import parse_format
from swalp.formats import (
    NAMED,
    Binary,
    BlockFloat,
    FixedPoint,
    Format,
    Microscaling,
    Minifloat,
)

SHOWN: tuple[Format, ...] = (
    FixedPoint(8, 6),
    BlockFloat(8),
    BlockFloat(8, axes=(0,)),
    BlockFloat(8, tile=32),
    *NAMED.values(),
)

KIND: dict[type, str] = {
    FixedPoint: "fixed",
    BlockFloat: "block",
    Minifloat: "minifloat",
    Microscaling: "MX",
    Binary: "binary",
}
FEW = 64  # values that are listed one by one


def format_table(formats: Iterable[Format]) -> Table:
    """One row for each format: name, kind, bits, codes, smallest, largest, gap, note."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("format", "kind"):
        table.add_column(column, no_wrap=True)
    for column in ("bits", "codes", "smallest", "largest", "gap"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("note", min_width=14)
    for fmt in formats:
        table.add_row(
            Text(str(fmt)),
            KIND[type(fmt)],
            str(fmt.bits),
            str(fmt.num_codes),
            short(fmt.smallest),
            short(fmt.largest),
            short(fmt.gap),
            Text(note(fmt)),
        )
    return table


def facts(fmt: Format) -> list[tuple[str, str]]:
    """What there is to know of one format, as pairs of a name and a text."""
    rows = [
        ("kind", KIND[type(fmt)]),
        ("note", note(fmt)),
        ("bits of an element", str(fmt.bits)),
        ("codes", str(fmt.num_codes)),
        ("smallest magnitude", short(fmt.smallest)),
        ("largest magnitude", short(fmt.largest)),
        ("gap between 1 and 2", short(fmt.gap)),
        ("significant bits", str(fmt.significand_bits)),
        ("in Python", repr(fmt)),
    ]
    if fmt.num_codes <= FEW:
        block = isinstance(fmt, BlockFloat | Microscaling)
        where = " of a block whose largest lies in [1, 2)" if block else ""
        rows.append((f"values{where}", " ".join(f"{value:g}" for value in fmt.values().tolist())))
    return rows


def note(fmt: Format) -> str:
    """What the numbers of a format do not tell: blocks, special codes, overflow."""
    match fmt:
        case FixedPoint():
            return "symmetric" if fmt.symmetric else "two's complement"
        case BlockFloat():
            clamp = "" if fmt.symmetric else ", two's complement"
            return f"{fmt.exponent_bits}-bit exponent for {_blocks(fmt)}{clamp}"
        case Microscaling():
            along = "" if fmt.axis == -1 else f" along axis {fmt.axis}"
            share = fmt.bits + 8 / fmt.tile
            return f"{fmt.element}, a scale for {fmt.tile}{along}: {share:g} bits"
        case Minifloat():
            return ", ".join(_remarks(fmt))
        case Binary():
            return "no zero"


def short(value: float) -> str:
    """A magnitude in few characters: exact where it is a short number or a power of two."""
    if value == 0 or math.isinf(value):
        return "beyond float64"
    fraction, exponent = math.frexp(value)
    if fraction == 0.5 and not -3 <= exponent <= 11:
        return f"2^{exponent - 1}"
    return f"{value:.5g}" if 1e-4 <= value < 1e5 else f"{value:.3g}"


def show_formats(name: str | None, path: Path | None, *, plot: bool) -> None:
    """Print a table of formats; or one's facts; or draw it.

    Args:
        name: of the format; None: the table.
        path: of the picture; None: named after the format.
        plot: draw it.

    Raises:
        ValueError: there is no such format, or the arguments do not go together.
    """
    console = Console()
    if name is None:
        if plot:
            raise ValueError("--plot needs a format to draw: swalp formats bfp8 --plot")
        console.print(format_table(SHOWN))
        console.print(
            "Others: any width, block and bias; see swalp.parse_format and docs/numerics.md.",
            highlight=False,
        )
        return
    fmt = parse_format(name)
    if path is not None and not plot:
        raise ValueError(f"{path} is for a picture: swalp formats {name} --plot {path}")
    if plot:
        from swalp.report.number_line import plot_format  # with matplotlib, which takes its time

        target = path or Path(re.sub(r"[^\w.-]+", "-", str(fmt)).strip("-") + ".png")
        plot_format(fmt, target)
        console.print(f"drawn: {target}", markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(box=None, show_header=False, pad_edge=False, title=Text(str(fmt)))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, text in facts(fmt):
        table.add_row(Text(key), Text(text))
    console.print(table)


def _blocks(fmt: BlockFloat) -> str:
    if isinstance(fmt.tile, tuple):
        tile = " x ".join(map(str, fmt.tile)) + (" neighbours" if len(fmt.tile) == 1 else "")
        return tile if fmt.axes is None else f"{tile} along {_named(fmt.axes)}"
    return "the tensor" if fmt.axes is None else f"each index of {_named(fmt.axes)}"


def _named(axes: tuple[int, ...]) -> str:
    return f"{'axis' if len(axes) == 1 else 'axes'} {', '.join(map(str, axes))}"


def _remarks(fmt: Minifloat) -> list[str]:
    specials = {
        "ieee": "inf, NaN",
        "fn": "NaN, no inf",
        "fnuz": "NaN, no inf, no -0",
        "finite": "no inf, no NaN",
    }
    remarks = [specials[fmt.specials]]
    if not fmt.signed:
        remarks.append("unsigned")
    if not fmt.has_zero:
        remarks.append("no zero")
    elif not fmt.subnormals:
        remarks.append("no subnormals")
    if not fmt.saturating:
        remarks.append("overflows")
    return remarks


# The picture.
