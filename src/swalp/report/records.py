"""Records on disk, read as plain values: a run's directory, a claim's directory."""

from __future__ import annotations

import csv
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from swalp.recipes import Recipe
from swalp.training import kept_recipes, reading
from swalp.training.mistakes import UserError
from swalp.training.run_directory import require_settings

Row = dict[str, Any]

# Where a claim that is given by its name is looked for, first where experiments are kept.
CLAIM_FOLDERS = ("experiments", "reproduced")
_ROWS = "*rows.jsonl"  # rows.jsonl, or several, such as mnist-rows.jsonl


@dataclass(frozen=True, slots=True)
class Run:
    """A training run.

    Attributes:
        name: of its directory.
        path: as it was given.
        settings: names and values, in order.
        recipes: of files, by arm, as the run keeps them.
        meanings: what settings are, by name, from the comments of the settings file.
        metrics: one for each arm, seed and epoch, in order.
        sessions: beginnings and ends of the processes that worked on it.
        summary: the rows of the table; None: the run is not finished.
        diagnostics: of arms at their ends; empty: none were recorded.
        picture: the PNG of its curves, if there is one.
    """

    name: str
    path: Path
    settings: Row
    recipes: dict[str, Recipe]
    meanings: dict[str, str]
    metrics: list[Row]
    sessions: list[Row]
    summary: Row | None
    diagnostics: list[Row]
    picture: bytes | None


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts; `numeric` says of each column whether it is aligned to the right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim's record, or another experiment's page with its rows.

    Attributes:
        name: of its directory.
        path: as it was given.
        record: title, statement, settings, verdict, environment …; empty for other experiments.
        rows: what was measured.
        page: README.md as HTML, without its tables and pictures; only for other experiments.
        tables: those of README.md.
        picture: the PNG, if there is one.
    """

    name: str
    path: Path
    record: Row
    rows: list[Row]
    page: str
    tables: list[Table]
    picture: bytes | None

    @property
    def title(self) -> str:
        """The record's, or the name."""
        return str(self.record.get("title", self.name))


def load(word: str) -> Run | Claim:
    """The run or claim that a path, or a claim's name, stands for.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = _find(word)
    if (path / "config.toml").is_file() and (path / "metrics.jsonl").is_file():
        return _run(path)
    pages = (path / "record.json", path / "README.md")
    if any(page.is_file() for page in pages) or any(path.glob(_ROWS)):
        return _claim(path)
    raise UserError(
        f"{word}: neither a run (it has no config.toml and metrics.jsonl) nor a claim's record (no "
        f"record.json and rows.jsonl)"
    )


def _find(word: str) -> Path:
    path = Path(word)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{word}: not a directory; name a run's directory, or a claim")
    if path.name == word:
        for folder in CLAIM_FOLDERS:
            if (Path(folder) / word).is_dir():
                return Path(folder) / word
        known = [
            entry.name
            for folder in CLAIM_FOLDERS
            if Path(folder).is_dir()
            for entry in Path(folder).iterdir()
            if entry.is_dir()
        ]
        here = f"; claims here: {', '.join(sorted(set(known)))}" if known else ""
        raise UserError(
            f"{word}: no such directory, and no claim of that name in experiments/ or "
            f"reproduced/{here}"
        )
    raise UserError(f"{word}: no such directory")


def _run(path: Path) -> Run:
    text = reading.text(path / "config.toml").removeprefix("\ufeff")
    try:
        settings = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path / 'config.toml'}: damaged: {error}") from None
    if (path / "run.json").exists():
        require_settings(path, settings)
    summary_file = path / "summary.json"
    run = Run(
        name=path.resolve().name,
        path=path,
        settings=settings,
        recipes=kept_recipes.load(path),
        meanings=_comments(text),
        metrics=reading.records(path / "metrics.jsonl"),
        sessions=reading.optional_records(path / "sessions.jsonl"),
        summary=reading.record(summary_file) if summary_file.exists() else None,
        diagnostics=reading.optional_records(path / "diagnostics.jsonl"),
        picture=_picture(path / "curves.png"),
    )
    _require(path / "metrics.jsonl", run.metrics, ("arm", "seed", "epoch"))
    _require(path / "diagnostics.jsonl", run.diagnostics, ("arm", "errors", "histograms"))
    if run.summary is not None:
        rows = run.summary.get("rows")
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{summary_file}: damaged: it has no rows")
        _require(summary_file, rows, ("arm", "model", "test_error"))
    return run


def _claim(path: Path) -> Claim:
    file = path / "record.json"
    record = reading.record(file) if file.exists() else {}
    verdict = record.get("verdict")
    judged = isinstance(verdict, dict) and {"holds", "sentence"} <= set(verdict)
    if not judged and (record.keys() & {"claim", "verdict"} or (file.exists() and not record)):
        raise UserError(f"{file}: damaged: it has no verdict")
    page, tables = "", list[Table]()
    if (path / "README.md").exists():
        page, tables = _markdown(reading.text(path / "README.md"))
    rows = []
    for file in sorted(path.glob(_ROWS)):
        which = file.name.removesuffix("rows.jsonl").rstrip("-")
        rows += [({"rows": which} if which else {}) | row for row in reading.records(file)]
    for sheet in [] if rows else sorted(path.glob("*.csv")):
        rows += _sheet(sheet)
    pictures = [path / "plot.png", *sorted(path.glob("*.png"))]
    return Claim(
        name=path.resolve().name,
        path=path,
        record=record,
        rows=rows,
        page="" if judged else page,
        tables=tables,
        picture=next(filter(None, map(_picture, pictures)), None),
    )


def _markdown(text: str) -> tuple[str, list[Table]]:
    """A page as HTML without raw HTML, pictures and tables; and its tables, as texts."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = reader.parse(text)
    kept: list[Token] = []
    tables: list[Table] = []
    title = ""
    inside: list[list[str]] | None = None
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            title = _plain(tokens[place + 1].content)
        if token.type == "table_open":
            inside, aligned = [], []
        if inside is None:
            if token.type == "inline" and token.children:
                token.children = [child for child in token.children if child.type != "image"]
            kept.append(token)
        elif token.type == "tr_open":
            inside.append([])
        elif token.type in ("th_open", "td_open"):
            inside[-1].append(_plain(tokens[place + 1].content))
            if token.type == "th_open":
                aligned.append("right" in str(token.attrs.get("style", "")))
        elif token.type == "table_close":
            header, *body = map(tuple, inside)
            tables.append(Table(title, header, tuple(body), tuple(aligned)))
            inside = None
    return reader.renderer.render(kept, reader.options, {}), tables


def _plain(markup: str) -> str:
    return markup.replace("**", "").replace("`", "")


def _sheet(path: Path) -> list[Row]:
    """The rows of a CSV file, numbers as numbers."""
    reader = csv.DictReader(reading.text(path).splitlines())
    return [{str(key): _number(value) for key, value in row.items()} for row in reader]


def _number(text: Any) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return text


def _comments(toml: str) -> dict[str, str]:
    """The comment above each key."""
    lines = toml.splitlines()
    return {
        line.split("=")[0].strip(): above.removeprefix("#").strip()
        for above, line in pairwise(lines)
        if above.startswith("#") and "=" in line and not line.startswith("#")
    }


def _require(path: Path, rows: list[Row], keys: tuple[str, ...]) -> None:
    for number, row in enumerate(rows, 1):
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise UserError(f"{path}: damaged: record {number} has no {missing[0]!r}")


def _picture(path: Path) -> bytes | None:
    return reading.content(path) if path.exists() else None
