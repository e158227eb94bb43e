"""What a run leaves on disk: one directory that explains itself."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import safetensors
import safetensors.torch
from torch import Tensor

from swalp.durable import naming, write_file
from swalp.packed import from_plain, to_plain
from swalp.training import config as settings
from swalp.training import kept_recipes, reading
from swalp.training.config import RunConfig
from swalp.training.mistakes import UserError
from swalp.training.reading import Record

VERSION = 1

_README = """\
This directory is one training run of swalp (https://arxiv.org/abs/1904.11943 has the method).

config.toml      the settings, complete: `swalp train config.toml` does the same run again
recipes/         what the recipe files among the arms said when the run began: it is read here ever
                 after, `swalp train config.toml` included
metrics.jsonl    one line per arm, seed and epoch: training loss, learning rate, test error (%) of
                 the iterate and of the average so far (and of the further averages, of held-out
                 examples, of the quantized average); a function of the settings, without times
summary.json     the rows of the final table; it is there when the run is finished
diagnostics.jsonl  one line per arm, for its first seed: how far each role of each layer is rounded,
                 saturates and underflows in one more step, and histograms of the weights
curves.png       test error against the epoch
models/ARM/seed-N/
    sgd.safetensors      the iterate where averaging starts
    last.safetensors     the last iterate
    average.safetensors  the average (SWA, or SWALP): float32, batch-norm statistics recomputed
    average-….safetensors  likewise, if config.toml asks for further averages
    best.safetensors     if examples are held out: the average of the epoch with the lowest error
sessions.jsonl   one line when a process began to work here, with versions and machine, and one when
                 it ended (none if it was killed), with seconds and outcome
checkpoints/     the last states, from which `swalp resume` goes on: each a directory of tensors,
                 JSON, and a manifest with their SHA-256
run.json         the version of this layout, the SHA-256 of each of the recipes, and the settings
                 that the run began with: `swalp resume` refuses a config.toml with others, but for
                 checkpoint_seconds and keep_checkpoints, on which no result depends

Low-precision models are stored as integer codes and shared exponents; swalp.packed.from_plain reads
them. `swalp evaluate` with this directory computes every error of the table again; `swalp export`
writes the average quantized, or for ONNX runtimes; `swalp report` makes one page of all.
"""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The files of one run, by name."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where `checkpoint.save` puts them."""
        return self.path / "checkpoints"

    def config(self) -> RunConfig:
        """The settings of the run."""
        path = self.path / "config.toml"
        found = settings.parse(reading.content(path), str(path))
        return settings.validated(found, str(path), kept_recipes.load(self.path))

    def require_settings(self, config: RunConfig) -> None:
        """Raise UserError if the run began with other settings on which its results depend.

        A run that began before they were noted may have any.
        """
        require_settings(self.path, settings.decisive(config))

    @property
    def finished(self) -> bool:
        """Whether the summary is written."""
        return self.summary_path.exists()

    def summary(self) -> Record:
        """The rows of the table.

        Raises:
            UserError: the run is not finished, or the file is damaged.
        """
        if not self.finished:
            raise UserError(
                f"{self.path}: the run is not finished; go on with: "
                f"swalp resume {quote(str(self.path))}"
            )
        return reading.record(self.summary_path)

    def finish(self, summary: Record) -> None:
        """Write the summary, which marks the run as finished."""
        write_file(self.summary_path, json.dumps(summary, indent=1).encode() + b"\n")

    def save_curves(self, png: bytes) -> None:
        """Save the picture."""
        write_file(self.path / "curves.png", png)

    def metrics(self) -> list[Record]:
        """All records so far, without one that was cut off as it was written."""
        return reading.records(self._metrics)

    def append_metrics(self, record: Record) -> None:
        """Add a record."""
        with naming(self._metrics), self._metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics_so_far(self) -> tuple[int, str]:
        """Bytes of all records so far, which are on the disk when this returns; their SHA-256."""
        with naming(self._metrics), self._metrics.open("rb+") as file:
            os.fsync(file.fileno())
            content = file.read()
        return len(content), hashlib.sha256(content).hexdigest()

    def truncate_metrics(self, size: int, sha256: str | None = None) -> None:
        """Forget the records beyond `size` bytes: those after a checkpoint.

        Raises:
            UserError: those before are not as they were; the file stays as it is.
        """
        content = reading.content(self._metrics)
        if len(content) < size:
            raise UserError(
                f"{self._metrics}: it has {len(content):,} bytes where the checkpoint counts "
                f"{size:,}: records are missing; put them back, or start the run anew"
            )
        if sha256 is not None and hashlib.sha256(content[:size]).hexdigest() != sha256:
            raise UserError(
                f"{self._metrics}: its first {size:,} bytes are not the records that the "
                f"checkpoint counts; put them back, or start the run anew"
            )
        with naming(self._metrics), self._metrics.open("rb+") as file:
            file.truncate(size)

    def sessions(self) -> list[Record]:
        """Beginnings and ends of the processes that worked here, in order."""
        return reading.optional_records(self._sessions)

    def append_session(self, record: Record) -> None:
        """Note that a process begins or ends."""
        # Whole even if the disk is full: no checkpoint says where to cut half a line off.
        lines = reading.content(self._sessions) if self._sessions.exists() else b""
        write_file(self._sessions, lines + json.dumps(record).encode() + b"\n")

    def diagnostics(self) -> list[Record]:
        """What was measured at the end of trajectories, in order."""
        return reading.optional_records(self._diagnostics)

    def append_diagnostics(self, record: Record) -> None:
        """Add what was measured for an arm and a seed, in place of an older record of them."""
        key = ("arm", "seed")
        mine = [record[name] for name in key]
        records = [old for old in self.diagnostics() if [old[name] for name in key] != mine]
        # Whole even if the disk is full: no checkpoint says where to cut half a line off.
        lines = [json.dumps(each, separators=(",", ":")) + "\n" for each in [*records, record]]
        write_file(self._diagnostics, "".join(lines).encode())

    def model_path(self, arm: str, seed: int, model: str) -> Path:
        """Where one model is saved: "sgd", "last", "average", "best" or "average TEXT"."""
        name = re.sub(r"[^\w.=,\[\]-]+", "-", model)
        folder = self.path / "models" / kept_recipes.file_name(arm)
        return folder / f"seed-{seed}" / f"{name}.safetensors"

    def save_model(self, path: Path, state: dict[str, Tensor]) -> None:
        """Save a state dict, packed tensors as codes and exponents."""
        plain, packed = to_plain(state)
        path.parent.mkdir(parents=True, exist_ok=True)
        # One entry: safetensors writes several in no fixed order.
        content = safetensors.torch.save(plain, {"packed": json.dumps(packed)})
        write_file(path, content)

    def load_model(self, path: Path, sha256: str) -> dict[str, Tensor]:
        """The state dict in a file.

        Raises:
            UserError: it is missing, or not the file that was saved.
        """
        content = reading.content(path)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(
                f"{path}: damaged: it does not match the SHA-256 in {self.summary_path}"
            )
        with safetensors.safe_open(path, framework="pt") as file:
            packed = json.loads(file.metadata()["packed"])
        plain = safetensors.torch.load(content)
        return from_plain({name: value.clone() for name, value in plain.items()}, packed)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside a ``with`` block no other process can work here.

        Raises:
            UserError: another one does.
        """
        with (self.path / "run.json").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another process is working on this run") from None
            yield

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def _diagnostics(self) -> Path:
        return self.path / "diagnostics.jsonl"

    @property
    def _sessions(self) -> Path:
        return self.path / "sessions.jsonl"

    @property
    def summary_path(self) -> Path:
        """Where the rows of the table are, when the run is finished."""
        return self.path / "summary.json"


def create(path: Path, config: RunConfig) -> RunDirectory:
    """A new run in `path`, which must not be there yet, or be empty.

    Raises:
        UserError: it cannot be written, and is as it was, something is there, or two arms cannot be
            told apart there.
    """
    _require_own_folders(config.arms)
    there = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            if any(path.iterdir()):
                raise FileExistsError
            (path / "checkpoints").mkdir()  # of two processes, one makes it
        except FileExistsError:
            raise UserError(
                f"{path}: the directory is not empty; choose another with --out, or go on with a "
                f"run that is there: swalp resume {quote(str(path))}"
            ) from None
        try:
            write_file(path / "README.txt", _README.encode())
            write_file(path / "config.toml", settings.to_toml(config).encode())
            write_file(path / "metrics.jsonl", b"")
            began = {
                "version": VERSION,
                **kept_recipes.save(path, config.file_recipes),
                "settings": settings.decisive(config),
            }
            write_file(path / "run.json", json.dumps(began).encode() + b"\n")
        except BaseException:
            _clear(path)
            if not there:
                path.rmdir()
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot make the run directory: {error.strerror}") from None
    return RunDirectory(path)


def _require_own_folders(arms: tuple[str, ...]) -> None:
    owners: dict[str, str] = {}
    for arm in arms:
        name = kept_recipes.file_name(arm)
        other = owners.setdefault(name, arm)
        if other != arm:
            raise UserError(
                f"arms: {other} and {arm} would share the folder models/{name}; rename one of them"
            )


def _clear(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def require_settings(path: Path, now: Record) -> None:
    """Raise UserError if the run in `path` began with other values of some of the settings `now`.

    A run that began before they were noted may have any.
    """
    began = reading.table(path / "run.json", "settings")
    differing = [key for key, was in began.items() if key in now and now[key] != was]
    if differing:
        file = path / "config.toml"
        changes = (
            f"{key} was {json.dumps(began[key])} when the run began and is "
            f"{json.dumps(now[key], default=str)} now"
            for key in differing
        )
        raise UserError(
            f"{file}: {', '.join(changes)}; put {'them' if differing[1:] else 'it'} back, or start "
            f"anew with: swalp train {quote(str(file))} --out DIR"
        )


def open_run(path: Path) -> RunDirectory:
    """The run in `path`.

    Raises:
        UserError: there is none, or of another version.
    """
    if not (path / "run.json").is_file():
        raise UserError(f"{path}: not a run directory (it has no run.json)")
    version = reading.record(path / "run.json").get("version")
    if type(version) is not int:
        raise UserError(f"{path / 'run.json'}: damaged: it has no version")
    if version != VERSION:
        raise UserError(
            f"{path}: a run directory of version {version}; this swalp reads version {VERSION}: "
            f"use the swalp that made it"
        )
    return RunDirectory(path)
