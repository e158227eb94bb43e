"""Checkpoints: a state that is whole and verified, or is not there.

A checkpoint is a directory ``step-000000001234`` of three files: ``tensors.safetensors``,
``state.json`` (everything else, with a reference where a tensor stood), and ``manifest.json``
(format version, and the SHA-256 of the other two). Nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from swalp.durable import remove_unfinished, write_directory
from swalp.packed import PackedTensor, from_plain, to_plain
from swalp.training.mistakes import UserError

VERSION = 1

_NAME = re.compile(r"step-(\d{12})")
_TENSOR, _ITEMS = "$tensor", "$items"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load_newest` found."""

    path: Path
    state: dict[str, Any]
    damaged: tuple[str, ...]
    """One line for each newer checkpoint that was passed over."""


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Save `state` as the checkpoint of `step`, and keep some of those before it.

    Args:
        folder: where the checkpoints of a run lie.
        step: of the run; a later one has a higher number.
        state: dicts, lists, numbers, strings and tensors, packed or not.
        keep: how many checkpoints remain, this one included.

    Returns:
        The checkpoint's path.
    """
    tensors: dict[str, Tensor] = {}
    tree = _without_tensors(state, tensors)
    plain, packed = to_plain(tensors)
    parts = {
        "tensors.safetensors": safetensors.torch.save(plain),
        "state.json": json.dumps({"state": tree, "packed": packed}).encode(),
    }
    manifest = {
        "version": VERSION,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()},
    }
    path = folder / f"step-{step:012d}"
    remove_unfinished(folder)
    write_directory(path, parts | {"manifest.json": json.dumps(manifest, indent=1).encode()})
    older = [other for other in _newest_first(folder) if other.name < path.name]
    kept = {path, *older[: keep - 1]}
    for other in _newest_first(folder):
        if other not in kept:
            shutil.rmtree(other)
    return path


def load_newest(folder: Path) -> Loaded | None:
    """The newest checkpoint that is whole; None if there is no checkpoint at all.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    damaged: list[str] = []
    for path in _newest_first(folder):
        try:
            return Loaded(path, _load(path), tuple(damaged))
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            safetensors.SafetensorError,
        ) as error:
            damaged.append(f"{path}: damaged: {' '.join(str(error).split())}")
    if damaged:
        raise UserError(f"no checkpoint is whole: {'; '.join(damaged)}; start the run anew")
    return None


def newest(folder: Path) -> Path | None:
    """The newest checkpoint, whole or not."""
    return next(iter(_newest_first(folder)), None)


def _newest_first(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _load(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / "manifest.json").read_bytes())
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise ValueError(f"manifest.json is not that of a checkpoint of version {VERSION}")
    parts = {}
    for name in ("tensors.safetensors", "state.json"):
        parts[name] = (path / name).read_bytes()
        if hashlib.sha256(parts[name]).hexdigest() != manifest["sha256"][name]:
            raise ValueError(f"{name} does not match its SHA-256")
    content = json.loads(parts["state.json"])
    # Cloned, so that the tensors are aligned as those that PyTorch allocates.
    plain = safetensors.torch.load(parts["tensors.safetensors"])
    tensors = from_plain({name: value.clone() for name, value in plain.items()}, content["packed"])
    state = _with_tensors(content["state"], tensors)
    assert isinstance(state, dict)
    return state


def _without_tensors(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """`value` for JSON, its tensors moved to `tensors`, named by their place."""
    match value:
        case Tensor():
            tensors[name] = (
                value.detach() if isinstance(value, PackedTensor) else value.detach().contiguous()
            )
            return {_TENSOR: name}
        case dict():
            items = [
                (key, _without_tensors(item, tensors, f"{name}/{key}" if name else str(key)))
                for key, item in value.items()
            ]
            # JSON's keys are strings; an optimizer numbers its parameters.
            return dict(items) if all(isinstance(key, str) for key in value) else {_ITEMS: items}
        case list() | tuple():
            return [
                _without_tensors(item, tensors, f"{name}/{index}")
                for index, item in enumerate(value)
            ]
        case _:
            return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case {"$tensor": name}:
            return tensors[name]
        case {"$items": items}:
            return {key: _with_tensors(item, tensors) for key, item in items}
        case dict():
            return {key: _with_tensors(item, tensors) for key, item in value.items()}
        case list():
            return [_with_tensors(item, tensors) for item in value]
        case _:
            return value
