"""Processes of their own, for what one does only once or for good, and the memory of this one."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from benchmarks.environment import ROOT
from benchmarks.harness import Contender, MissingError

_AGAIN = 0.3  # by then a step of the smaller MLP takes no longer than others, in float32, too


def result(module: str, call: str, environment: Mapping[str, str] | None = None) -> float:
    """The number that a fresh process prints, with these variables in its environment."""
    run = subprocess.run(
        _python(module, f"print({module}.{call})"), capture_output=True, text=True, check=True,
        cwd=ROOT, env={**os.environ, **(environment or {})},
    )  # fmt: skip
    return float(run.stdout)


def _python(module: str, statement: str) -> list[str]:
    """Python that does this; the module is there, and plans may be arguments."""
    imports = f"import {module}; from benchmarks import process; from benchmarks.plan import Plan"
    return [sys.executable, "-c", f"{imports}; {statement}"]


@contextmanager
def contenders(module: str, calls: Mapping[str, str], threads: int) -> Iterator[list[Contender]]:
    """Contenders by name, each with a process of its own, which waits while others have their turn.

    Args:
        module: of the calls, by its full name.
        calls: what returns the function to time, by the names of contenders.
        threads: of PyTorch and of the kernels.
    """
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(_Worker(module, call, threads))
            for name, call in calls.items()
        }
        yield [worker.contender(name) for name, worker in workers.items()]


def serve(make: Callable[[], Callable[[], object]], threads: int) -> None:
    """What such a process does: for each number in a line of its input, the time of so many calls.

    Those of the first `_AGAIN` seconds of a turn, but for that of all, are not counted: caches are
    full of others' work, and the system may have had memory that lay still for seconds.
    """
    torch.set_num_threads(threads)
    try:
        run = make()
    except MissingError as reason:
        print(reason)
        return
    print(flush=True)
    for number, line in enumerate(sys.stdin):
        began = time.perf_counter()
        while number and time.perf_counter() - began < _AGAIN:
            run()
        print(Contender("", run).seconds(int(line), time.perf_counter), flush=True)


class _Worker:
    """A process that `serve`s."""

    def __init__(self, module: str, call: str, threads: int) -> None:
        self._process = subprocess.Popen(
            _python(module, f"process.serve(lambda: {module}.{call}, {threads})"), text=True,
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the one that waits
        )  # fmt: skip

    def contender(self, name: str) -> Contender:
        """Its contender."""
        missing = self._line().strip()
        if missing:
            return Contender(name, None, missing=missing)
        return _Apart(name, lambda: self.seconds(1), worker=self)

    def seconds(self, calls: int) -> float:
        """A call's, of so many."""
        assert self._process.stdin is not None
        print(calls, file=self._process.stdin, flush=True)
        return float(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:  # what it has said to stderr, the user has seen
            raise subprocess.CalledProcessError(self._process.wait(), self._process.args)
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()  # it reads the end of its input


@dataclass(frozen=True, kw_only=True)
class _Apart(Contender):
    """A contender with a process of its own."""

    worker: _Worker

    def seconds(self, calls: int, clock: Callable[[], float]) -> float:
        """As that process's clock has it."""
        return self.worker.seconds(calls)


def resident_bytes() -> int:
    """Memory of this process that is in use, once free memory is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
