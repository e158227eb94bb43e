"""What a run runs on: versions, processor, threads, kernel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import swalp
from swalp import buffers, extension
from swalp.matmul import kernels
from swalp.quantize import plans

_LINUX = sys.platform == "linux"  # where a process may be bound to some processors

# On these the bits of a result may depend.
DECISIVE = ("swalp", "torch", "vector instructions")
PACKAGES = ("swalp", "torch", "numpy", "safetensors", "scikit-learn", "matplotlib", "pydantic")


def describe() -> dict[str, str | int]:
    """Versions of the packages, and the machine, by name."""
    versions = {name: version(name) for name in PACKAGES}
    return {
        **versions,
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": "cpu",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if _LINUX else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "quantizer": kernel(),
        "integer products": kernels.describe(),
    }


def commit() -> str:
    """The commit of the source tree that swalp runs from, with a + if the tree differs from it."""
    source = Path(swalp.__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(source), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # or it is somebody else's repository
        changed = git("status", "--porcelain", "--", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def kernel() -> str:
    """Which kernel quantizes on the CPU."""
    if not plans.available:
        return f"reference (slow): {extension.missing}"
    from swalp import _kernels

    used = _kernels.used()
    instructions = "avx512" if used == "amx" else used  # AMX multiplies codes, and no more
    asked = ", as SWALP_ISA says" if os.environ.get("SWALP_ISA") else ""
    return f"C++ {instructions}{asked}{'' if _kernels.has_threads() else ', without threads'}"


def remedy() -> str:
    """How to get the kernels; empty if they are there."""
    if plans.available:
        return ""
    compiler = "" if extension.stale else "install g++ or clang++, then "
    return (
        f"{compiler}install swalp again as at first, with pip's --force-reinstall "
        f"--no-cache-dir; in a clone, `make install`"
    )


def memory() -> str:
    """Where large tensors lie on the CPU once a network is native; in this process from now on."""
    if buffers.share_with_torch():
        return "PyTorch's and swalp's share memory, once a network is native"
    if not buffers.may_share():
        return "PyTorch's apart from swalp's: SWALP_SHARE_MEMORY is 0"
    if not plans.available:
        return "PyTorch's: swalp's kernels are missing"
    return "PyTorch's apart from swalp's: this system or PyTorch does not let them share memory"


def version(name: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
