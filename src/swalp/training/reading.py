"""Records, read: what is wrong with a file is said in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swalp.training.mistakes import UserError

Record = dict[str, Any]


def content(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


def text(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    return _decoded(str(path), content(path))


def record(path: Path) -> Record:
    """The JSON object in a file.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    return _parsed(str(path), content(path))


def table(path: Path, key: str) -> Record:
    """An object in the JSON object in a file; empty if there is none of that name.

    Raises:
        UserError: the file cannot be read, or what has the name is something else.
    """
    found = record(path).get(key, {})
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged: {key} is not a JSON object")
    return found


def records(path: Path) -> list[Record]:
    """The JSON objects in the lines of a file, in order; half a line at its end is not yet one.

    Raises:
        UserError: it cannot be read, or a line is something else.
    """
    *whole, rest = content(path).split(b"\n")
    try:
        json.loads(rest)
    except (ValueError, RecursionError):
        pass  # nothing, or being written now
    else:
        whole.append(rest)
    return [_parsed(f"{path}: line {number}", line) for number, line in enumerate(whole, 1)]


def optional_records(path: Path) -> list[Record]:
    """`records`; none where there is no file."""
    return records(path) if path.exists() else []


def _decoded(where: str, found: bytes) -> str:
    try:
        return found.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: damaged: not UTF-8 text (byte {error.start})") from None


def _parsed(where: str, found: bytes) -> Record:
    try:
        value = json.loads(_decoded(where, found))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: damaged: not a JSON object")
    return value
