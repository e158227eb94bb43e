"""Recipes of files as a run keeps them, whatever becomes of the files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from swalp import recipes
from swalp.durable import write_file
from swalp.recipes import Recipe
from swalp.training import reading
from swalp.training.mistakes import UserError

_KEY = "recipes"  # of run.json


def file_name(arm: str) -> str:
    """An arm, which may be the path of a recipe, as the name of one file or folder."""
    return re.sub(r"[/\\:]+", "-", arm)


def save(run: Path, found: Mapping[str, Recipe]) -> dict[str, dict[str, str]]:
    """Write recipes into the directory of a run; return what its run.json says of them.

    Args:
        run: the directory.
        found: each recipe, by the arm that has it.
    """
    if found:
        (run / "recipes").mkdir()
    digests = {}
    for arm, recipe in found.items():
        text = recipes.to_toml(recipe).encode()
        write_file(_path(run, arm), text)
        digests[arm] = hashlib.sha256(text).hexdigest()
    return {_KEY: digests}


def load(run: Path) -> dict[str, Recipe]:
    """The recipes that a run keeps, by arm; none if it began before runs kept them.

    Raises:
        UserError: one is missing, or not what was written.
    """
    file = run / "run.json"
    digests = reading.table(file, _KEY) if file.is_file() else {}
    return {arm: _load(_path(run, arm), digest, file) for arm, digest in digests.items()}


def _load(path: Path, digest: str, file: Path) -> Recipe:
    if hashlib.sha256(reading.content(path)).hexdigest() != digest:
        raise UserError(
            f"{path}: not the recipe that the run began with: it does not match the SHA-256 in "
            f"{file}; put it back"
        )
    return recipes.load(path)


def _path(run: Path, arm: str) -> Path:
    return run / "recipes" / file_name(arm)
