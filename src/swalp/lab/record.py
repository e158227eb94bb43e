"""What a reproduced claim leaves on disk: one directory that explains itself."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swalp.durable import write_directory
from swalp.lab import plots
from swalp.lab.claim import Claim, Row, Verdict
from swalp.training import environment
from swalp.training.mistakes import UserError

VERSION = 1
FILES = ("record.json", "rows.jsonl", "plot.png", "README.md")
_ROOM = 2**23  # bytes, of which a record takes fewer


def require_free(path: Path, claim: Claim, settings: Any) -> None:
    """Raise unless a record of those settings may be written to `path`.

    It may where nothing is, or an empty directory, or a record of the same claim and settings.

    Raises:
        UserError: something else is there.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path}: not a directory; choose another with --out")
    found = sorted(entry.name for entry in path.iterdir())
    if not found:
        return
    strangers = [name for name in found if name not in FILES]
    if strangers or "record.json" not in found:
        raise UserError(
            f"{path}: holds {', '.join((strangers or found)[:3])}, and not only a record of a "
            f"claim; choose another directory with --out"
        )
    record = read(path)
    mine = {"claim": claim.name, "settings": _plain(settings)}
    theirs = {"claim": record.get("claim"), "settings": record.get("settings")}
    if mine != theirs:
        raise UserError(
            f"{path}: holds a record of {_difference(theirs, mine)}; choose another directory with "
            f"--out, or remove that one"
        )


def require_writable(path: Path) -> None:
    """Raise unless there is room for a record at `path`; nothing is left there.

    Raises:
        UserError: one cannot be written.
    """
    with _writing(path):
        place = path.resolve()
        if place.is_mount():
            raise UserError(
                f"{path}: a mount point, which cannot be replaced; choose a directory in it "
                f"with --out"
            )
        above = next(each for each in place.parents if each.exists())
        with tempfile.TemporaryFile(dir=above) as file:
            file.write(bytes(_ROOM))


def read(path: Path) -> dict[str, Any]:
    """The record in a directory, without its rows.

    Raises:
        UserError: there is none, it is damaged, or of another version.
    """
    file = path / "record.json"
    try:
        record = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged: {error}") from None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise UserError(f"{file}: not a record of version {VERSION}, which this swalp reads")
    return record


def read_rows(path: Path) -> list[Row]:
    """The rows in a directory.

    Raises:
        UserError: they cannot be read.
    """
    file = path / "rows.jsonl"
    try:
        return [json.loads(line) for line in file.read_bytes().splitlines()]
    except OSError as error:
        raise UserError(f"{file}: cannot read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged: {error}") from None


def write(
    path: Path,
    claim: Claim,
    settings: Any,
    rows: Sequence[Row],
    verdict: Verdict,
    *,
    command: str,
    seconds: float,
) -> None:
    """Write a record, whole or not at all, in place of one of the same settings.

    Raises:
        UserError: something else came to be there meanwhile, or it cannot be written.
    """
    require_free(path, claim, settings)
    record = {
        "version": VERSION,
        "claim": claim.name,
        "title": claim.title,
        "statement": claim.statement,
        "settings": _plain(settings),
        "verdict": dataclasses.asdict(verdict),
        "command": command,
        "seconds": round(seconds, 1),
        "environment": environment.describe(),
    }
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files = {
        "record.json": json.dumps(record, indent=1, ensure_ascii=False) + "\n",
        "rows.jsonl": lines,
        "README.md": readme(record, claim.table(settings, rows)),
    }
    contents = {name: text.encode() for name, text in files.items()}
    contents["plot.png"] = plots.png(claim.plot(settings, rows))
    with _writing(path):
        write_directory(path.resolve(), contents)  # what a link names is replaced, not the link


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A failure of the machine, as the user's line about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the record: {error.strerror or error}; choose another place "
            f"with --out"
        ) from None


def readme(record: dict[str, Any], table: str) -> str:
    """The page that GitHub shows for the directory."""
    verdict = Verdict(**record["verdict"])
    made = record["environment"]
    settings = ", ".join(f"{key} = {value}" for key, value in record["settings"].items())
    sentence = verdict.sentence[:1].upper() + verdict.sentence[1:]
    return f"""# {record["title"]}

**Claim.** {_wrapped(record["statement"])}

**{"Holds" if verdict.holds else "Does not hold"}.** {_wrapped(sentence)}

![{record["title"]}](plot.png)

{table}

**Command.** `{record["command"]}`: {record["seconds"]:g} seconds, {made["cores"]} cores.
The page, the table and the picture are made from `rows.jsonl`; `record.json` has settings, versions
and machine. Made at commit {made["commit"]} with torch {made["torch"]}, Python {made["python"]},
{made["vector instructions"]}.

**Settings.** {_wrapped(settings)}.
"""


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _plain(settings: Any) -> dict[str, Any]:
    """The settings as JSON reads them back."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return plain


def _difference(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    if theirs["claim"] != mine["claim"]:
        return f"{theirs['claim']}, not {mine['claim']}"
    old, new = theirs["settings"], mine["settings"]
    keys = [key for key in new if not isinstance(old, dict) or old.get(key) != new[key]]
    shown = keys[0] if keys else next(iter(old))
    return f"other settings ({shown} = {old.get(shown)}, not {new.get(shown)})"
