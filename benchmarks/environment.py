"""The machine, the versions and the commit that a figure was measured with."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def describe(threads: int) -> dict[str, Any]:
    """Device, versions, commit, settings, and how busy the machine was before."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cpu_flags": _cpu_flags(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("swalp", "torch", "qtorch", "torchao")},
        "settings": {name: os.environ[name] for name in sorted(os.environ) if _matters(name)},
    }


def _commit() -> str:
    """The commit checked out, with a + if the library or the suite differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _matters(name: str) -> bool:
    """Whether an environment variable changes threads, allocation, instruction set or paging."""
    return name.startswith(
        ("OMP_", "KMP_", "MKL_", "MALLOC_", "THP_", "ONEDNN_", "SWALP_", "ATEN_")
    )


def _cpu_info(field_name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith(field_name)), ""
    )


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> str:
    wanted = ("fma", "avx", "amx", "sve")
    flags = [flag for flag in _cpu_info("flags").split() if flag.startswith(wanted)]
    return f"{' '.join(sorted(flags))} (torch uses {torch.backends.cpu.get_cpu_capability()})"
