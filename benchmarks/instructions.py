"""The instruction set that the kernels run on, so that one process can compare two.

A user never chooses it, so this alone in the suite reaches behind the public names.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.harness import MissingError


def use(name: str) -> None:
    """Let the kernels run on "avx512", "avx2" or "scalar" instructions from now on.

    Raises:
        MissingError: there are no kernels, or this machine or build does not have those.
    """
    try:
        _kernels().use(name)
    except ValueError as error:
        raise MissingError(str(error)) from error


@contextmanager
def restored() -> Iterator[None]:
    """Afterwards the kernels run on what they ran on before."""
    try:
        best = _kernels().used()
    except MissingError:
        yield
        return
    try:
        yield
    finally:
        use(best)


def _kernels() -> Any:
    try:
        return importlib.import_module("swalp._kernels")
    except ImportError as error:
        raise MissingError("swalp is installed without its compiled kernels") from error
