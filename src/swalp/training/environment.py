"""What a run runs on: versions, processor, threads, kernel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

from swalp.matmul import kernels
from swalp.quantize import cpu

# On these the bits of a result may depend.
DECISIVE = ("swalp", "torch", "vector instructions")
PACKAGES = ("swalp", "torch", "numpy", "safetensors", "scikit-learn", "matplotlib", "pydantic")


def describe() -> dict[str, str | int]:
    """Versions of the packages, and the machine, by name."""
    versions = {name: version(name) for name in PACKAGES}
    return {
        **versions,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": "cpu",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "quantizer": kernel(),
        "integer products": kernels.describe(),
    }


def kernel() -> str:
    """Which kernel quantizes on the CPU."""
    if not cpu.available:
        return "reference (slow): swalp was installed without a C++ compiler"
    from swalp import _kernels

    return f"C++ {_kernels.used()}{'' if _kernels.has_threads() else ', without threads'}"


def version(name: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
