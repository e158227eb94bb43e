"""`swalp reproduce`: run a claim, show its table and verdict, keep the record."""

from __future__ import annotations

import dataclasses
import difflib
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from swalp.lab import record
from swalp.lab.claim import Claim, Context, Stopped, Verdict
from swalp.lab.claims import CLAIMS
from swalp.training.mistakes import UserError

__all__ = ["Stopped", "find", "listing", "reproduce", "settings_of"]


def listing() -> str:
    """A line for each claim."""
    width = max(map(len, CLAIMS))
    return "\n".join(f"{name.ljust(width)}  {claim.title}" for name, claim in CLAIMS.items())


def find(name: str) -> Claim:
    """The claim of that name.

    Raises:
        UserError: there is none.
    """
    if name not in CLAIMS:
        near = difflib.get_close_matches(name, CLAIMS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown claim {name!r}; {hint}claims: {', '.join(CLAIMS)}")
    return CLAIMS[name]


def settings_of(claim: Claim, *, quick: bool, seeds: int | None) -> Any:
    """The claim's settings.

    Raises:
        UserError: no seed at all.
    """
    settings = claim.quick if quick else claim.full
    if seeds is None:
        return settings
    if not 1 <= seeds <= 1000:
        raise UserError(f"--seeds {seeds}: give how many seeds to run, 1..1000")
    return dataclasses.replace(settings, seeds=seeds)


def reproduce(
    claim: Claim,
    settings: Any,
    out: Path,
    *,
    data_dir: Path | None,
    download: bool,
    command: list[str],
    progress: Callable[[int, int], None],
    stopped: Callable[[], bool],
    say: Callable[[str], None],
) -> Verdict:
    """Run a claim, write its record to `out`, and say what came out.

    Nothing is said before the record is written, as nobody may be there to hear it; if it cannot
    be written, what came out is said all the same.

    Args:
        claim: which.
        settings: `settings_of` it.
        out: new, empty, or with a record of the same settings, which is replaced.
        data_dir: where data files are looked for.
        download: whether missing ones may be fetched.
        command: the words that ask for this, for the record.
        progress: called with the parts that are done, and all of them.
        stopped: asked now and then; if true, `Stopped` is raised and nothing is written.
        say: called with what the user should read.

    Raises:
        UserError: `out` holds something else or cannot be written, or data is missing.
        Stopped: `stopped` said so.
    """
    record.require_free(out, claim, settings)
    record.require_writable(out)
    before = record.read_rows(out) if (out / "record.json").exists() else None
    context = Context(data_dir, download, progress, stopped, workers=os.cpu_count() or 1)
    began, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(1)  # the last bits of a sum may depend on them
    try:
        rows = claim.run(settings, context)
    finally:
        torch.set_num_threads(threads)
    seconds = time.monotonic() - began
    verdict = claim.verdict(settings, rows)
    words = shlex.join(command)
    try:
        record.write(out, claim, settings, rows, verdict, command=words, seconds=seconds)
    finally:
        say(f"{claim.table(settings, rows)}\n\n{verdict.text}\n")
    if before is not None:
        same = before == rows
        say(f"The rows {'equal' if same else 'differ from'} those of the record that was there.")
    say(f"Saved in {out}: README.md, plot.png, rows.jsonl, record.json.")
    return verdict
