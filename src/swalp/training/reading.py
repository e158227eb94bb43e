"""Files of a run, read: what is wrong with one is said in a line."""

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


def record(path: Path) -> Record:
    """The JSON object in a file.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        found = json.loads(content(path))
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged: not a JSON object")
    return found


def records(path: Path, lines: bytes) -> list[Record]:
    """The JSON objects in the lines of a file.

    Raises:
        UserError: a line is something else.
    """
    found = []
    for number, line in enumerate(lines.splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}: line {number}: damaged: {error}") from None
        if not isinstance(found[-1], dict):
            raise UserError(f"{path}: line {number}: damaged: not a JSON object")
    return found
