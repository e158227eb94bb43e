"""Files that are either whole or absent, whenever the machine stops."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the system's errors that name no file, such as of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def write_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, flush it to the disk, and rename it into place."""
    beside = path.with_name(f".{path.name}.unfinished")
    try:
        with naming(path):
            _write_and_sync(beside, content)
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):  # what went wrong first is told
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(beside):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    sync_directory(path.parent)


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a directory of `files` beside `path`, flush it, and rename it into place.

    A directory that is there already is replaced; should the machine stop in between, neither may
    be there.
    """
    beside = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    try:
        beside.mkdir(parents=True)
        for name, content in files.items():
            with naming(path / name):
                _write_and_sync(beside / name, content)
        sync_directory(beside)
        if path.exists():
            shutil.rmtree(path)
        beside.rename(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_directory(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove the directories that processes which were killed left half written in `folder`."""
    for entry in folder.glob(".*.unfinished"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_and_sync(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
