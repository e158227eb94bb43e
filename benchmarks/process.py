"""Processes of their own, for what a process does only once, and the memory that this one holds."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.environment import ROOT


def command(module: str, call: str) -> list[str]:
    """Python that prints what a call of a benchmark returns; a plan may be an argument."""
    program = f"import {module}; from benchmarks.plan import Plan; print({module}.{call})"
    return [sys.executable, "-c", program]


def result(module: str, call: str, environment: Mapping[str, str] | None = None) -> float:
    """The number that a fresh process prints, with these variables in its environment."""
    run = subprocess.run(
        command(module, call), capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    return float(run.stdout)


def resident_bytes() -> int:
    """Memory of this process that is in use, once free memory is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
