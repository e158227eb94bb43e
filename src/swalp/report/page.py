"""One HTML page for runs and claims: self-contained, written once, never over a stranger's file."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from swalp.durable import write_file
from swalp.report import claim_sections, comparison, run_sections
from swalp.report.blocks import Section
from swalp.report.records import Claim, Run, load
from swalp.training.mistakes import UserError

# By this a page is known again, which a later one may replace.
_MADE_BY = '<meta name="generator" content="swalp report'
_HEAD = 2000  # bytes in which it stands


@dataclass(frozen=True, slots=True)
class Chapter:
    """What is said of one record; a page of one record has one, without a heading of its own."""

    id: str
    title: str
    about: str
    sections: list[Section]


def render(records: Sequence[Run | Claim]) -> str:
    """The page.

    Args:
        records: at least one; several are compared first.
    """
    names = _names(records)
    alone = len(records) == 1
    chapters = []
    for number, (name, record) in enumerate(zip(names, records, strict=True), 1):
        prefix = "" if alone else f"r{number}-"
        with _whole(str(record.path)):
            made = (
                run_sections.sections(record, prefix)
                if isinstance(record, Run)
                else claim_sections.sections(record, prefix)
            )
        title = record.title if isinstance(record, Claim) else name
        chapters.append(Chapter(f"r{number}", title, _about(record), made))
    title = chapters[0].title if alone else f"{len(records)} records: {', '.join(names)}"
    together = []
    if not alone:
        with _whole(", ".join(names)):
            together = comparison.sections(records, names)
    return _template().render(
        title=title,
        chapters=chapters,
        together=together,
        level=2 if alone else 3,
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=version("swalp"),
        style=Markup(_asset("style.css")),
        script=Markup(_asset("charts.js")),
    )


@contextmanager
def _whole(where: str) -> Iterator[None]:
    """A value of a record that is missing, or of another kind than it was written, as a line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{where}: damaged: a value is missing or is not what it was written as "
            f"({type(error).__name__}: {error})"
        ) from error


def write(words: Sequence[str], out: Path | None) -> Path:
    """Write the page for runs and claims.

    Args:
        words: paths of runs or claims, or names of claims.
        out: the file; default: ``report-NAME.html`` here, ``report.html`` for several.

    Returns:
        The file.

    Raises:
        UserError: a word stands for no record, a record is damaged, or the file cannot be
            written, or is something else than a page of this command.
    """
    if not words:
        raise UserError(
            "name what to report: the directory of a run, such as runs/digits-…, or a claim's "
            "name; several are compared"
        )
    records = [load(word) for word in words]
    name = f"report-{records[0].name}.html" if len(records) == 1 else "report.html"
    target = Path(name) if out is None else out
    content = render(records).encode()
    try:
        if target.is_dir():
            raise UserError(f"{target}: a directory; name a file, such as --out {target / name}")
        if target.exists() and not _is_report(target):
            raise UserError(
                f"{target} exists, is no report, and is not overwritten; name another file with "
                f"--out"
            )
        write_file(target, content)  # a full disk leaves the older page
    except OSError as error:
        raise UserError(
            f"{target}: cannot write: {error.strerror}; name another file with --out"
        ) from None
    return target


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False  # devices and pipes may never end
    with path.open("rb") as file:
        return _MADE_BY.encode() in file.read(_HEAD)


def _about(record: Run | Claim) -> str:
    """One line: what was run."""
    if isinstance(record, Claim):
        return f"{'Claim' if 'verdict' in record.record else 'Experiment'} {record.name}"
    settings = record.settings
    seeds = settings.get("seeds")
    told = [
        str(settings[key]) if key == "data" else f"{key} {settings[key]}"
        for key in ("data", "model", "width", "epochs")
        if key in settings
    ]
    told += [f"{seeds} seed{'' if seeds == 1 else 's'}"] if seeds else []
    return f"Training run: {', '.join(told)}"


def _names(records: Sequence[Run | Claim]) -> list[str]:
    """A name for each: its directory's; where two are alike, with as much of the path as needed."""
    paths = [record.path.resolve() for record in records]
    names = []
    for place, path in enumerate(paths):
        others = [other for number, other in enumerate(paths) if number != place]
        parts = 1
        while parts < len(path.parts) and any(
            other.parts[-parts:] == path.parts[-parts:] for other in others
        ):
            parts += 1
        names.append("/".join(path.parts[-parts:]))
    # The same record twice: numbered.
    return [
        name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"
        for place, name in enumerate(names)
    ]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["script_json"] = _script_json
    environment.filters["data_uri"] = _data_uri
    return environment.from_string(_asset("page.html"))


def _script_json(value: Any) -> Markup:
    """JSON that may stand in a script element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028"))


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _asset(name: str) -> str:
    return (files("swalp.report") / "assets" / name).read_text(encoding="utf-8")
