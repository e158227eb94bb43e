"""What a claim is: settings, a function to rows, and what is made of rows: table, plot, verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the rows show what is claimed, and the sentence that says so with their numbers."""

    holds: bool
    sentence: str

    @property
    def text(self) -> str:
        """The sentence with its outcome in front."""
        return f"{'Holds' if self.holds else 'Does not hold'}: {self.sentence}"


class Stopped(Exception):  # noqa: N818  (not an error)
    """The user asked to stop."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a claim's function is given beside its settings.

    Attributes:
        data_dir: where data files are looked for; None: the cache directory.
        download: whether missing files may be fetched.
        progress: called with the parts of the work that are done, and all of them.
        stopped: asked between parts of the work.
        workers: how many trajectories are computed at once; no result depends on it.
    """

    data_dir: Path | None
    download: bool
    progress: Callable[[int, int], None]
    stopped: Callable[[], bool]
    workers: int


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim.

    Attributes:
        name: on the command line, and of its directory in ``experiments/``.
        title: a line for lists and headings.
        statement: what is claimed, by whom, and what is measured for it.
        full: the settings, a frozen dataclass with ``seeds``, how many there are.
        quick: the same, for a minute or two on two cores.
        run: settings and context to rows, which are a function of the settings alone.
        table: rows to a Markdown table.
        plot: settings and rows to a picture.
        verdict: settings and rows to the verdict.
    """

    name: str
    title: str
    statement: str
    full: Any
    quick: Any
    run: Callable[[Any, Context], list[Row]]
    table: Callable[[Any, Sequence[Row]], str]
    plot: Callable[[Any, Sequence[Row]], Figure]
    verdict: Callable[[Any, Sequence[Row]], Verdict]


def figures(value: float) -> float:
    """A number to nine significant digits: what is below may differ from machine to machine."""
    return float(f"{value:.9g}")


def pick(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """The rows that have all those values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up; all but the first are aligned to the right."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]

    def joined(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([joined(header), joined(rule), *map(joined, lines)])
