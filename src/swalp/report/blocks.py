"""What a page is made of: sections of paragraphs, facts, tables and charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from swalp.report.charts import Chart


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it says.
        bar: a share in [0, 1], drawn as a bar behind the text.
        dots: places in [0, 1], drawn as a strip of dots under it, one for each seed.
    """

    text: str
    bar: float | None = None
    dots: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: its caption, header, and rows of cells, the first of each being its name.

    Attributes:
        caption: what it shows; part of the table.
        header: of the columns.
        rows: cells; a row of one empty cell is a rule.
        numeric: columns that are aligned to the right, from 0.
        note: below it.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numeric: frozenset[int] = frozenset()
    note: str = ""
    kind: Literal["grid"] = "grid"


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; "verdict" and "warning" stand out."""

    text: str
    style: Literal["plain", "verdict", "failed", "warning", "note"] = "plain"
    lead: str = ""
    kind: Literal["text"] = "text"


@dataclass(frozen=True, slots=True)
class Facts:
    """A few large figures, each with what it is."""

    facts: Sequence[tuple[str, str]]
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart."""

    chart: Chart
    kind: Literal["figure"] = "figure"


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG with its text alternative."""

    png: bytes
    text: str
    kind: Literal["picture"] = "picture"


@dataclass(frozen=True, slots=True)
class Page:
    """HTML made by the Markdown renderer, which lets no markup of its source through."""

    html: str
    kind: Literal["page"] = "page"


@dataclass(frozen=True, slots=True)
class Folded:
    """Blocks that are shown when asked for."""

    title: str
    blocks: Sequence[Block]
    kind: Literal["folded"] = "folded"


Block = Grid | Text | Facts | Figure | Picture | Page | Folded


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with blocks below it."""

    id: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
