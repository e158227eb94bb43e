"""Taking an iterate in a thread of its own, while training goes on."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from swalp.packed import PackedTensor

Job = tuple[str, Tensor]


class Overlap:
    """One thread that works on a copy of the parameters, made when the work is handed over.

    The copy is made where the parameters are, so that training may change them at once. From a GPU
    it then travels to page-locked host memory on a stream of its own.
    """

    def __init__(self) -> None:
        _all.add(self)
        self._copies: list[Tensor] = []
        self._pinned: list[Tensor] = []
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def start(
        self,
        jobs: list[Job],
        work: Callable[[list[Job]], None],
        device: torch.device | None,
    ) -> None:
        """Begin `work` on copies of the jobs' tensors, on `device` if it is the host."""
        parts = [part for _, value in jobs for part in _parts(value)]
        fits = len(parts) == len(self._copies) and all(
            kept.shape == part.shape and kept.dtype == part.dtype and kept.device == part.device
            for kept, part in zip(self._copies, parts, strict=True)
        )
        if not fits:
            with torch.inference_mode(False):  # they serve again, in and out of it
                self._copies = [torch.empty_like(part) for part in parts]
            self._pinned = []
        torch._foreach_copy_(self._copies, parts)
        ready = self._to_host() if device is not None and device.type == "cpu" else None
        source = iter(self._copies if ready is None else self._pinned)
        copies = [(name, _rebuilt(value, source)) for name, value in jobs]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="swalp-average")
        self._running = self._pool.submit(_run, work, copies, ready)

    def wait(self) -> None:
        """Return when the work is done; what it raised, this raises."""
        if self._running is None:
            return
        error = self._running.exception()  # if Ctrl-C ends the wait, the work still runs
        self._running = None
        if error is not None:
            raise error

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(each.nbytes for each in (*self._copies, *self._pinned))

    def __getstate__(self) -> dict[str, Any]:
        return {"_copies": [], "_pinned": [], "_pool": None, "_running": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _all.add(self)

    def _to_host(self) -> torch.cuda.Event | None:
        """Send the copies from a GPU to page-locked memory; None if they are on the host."""
        if not any(copy.is_cuda for copy in self._copies):
            return None
        if not self._pinned:
            self._pinned = [
                torch.empty_like(copy, device="cpu", pin_memory=True) for copy in self._copies
            ]
            self._stream = torch.cuda.Stream(self._copies[0].device)  # type: ignore[no-untyped-call]  # PyTorch ships no type
        self._stream.wait_stream(torch.cuda.current_stream(self._copies[0].device))
        with torch.cuda.stream(self._stream):
            for pinned, copy in zip(self._pinned, self._copies, strict=True):
                pinned.copy_(copy, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # likewise
            event.record(self._stream)
        return event


# A process that is forked has no thread but the one that forked, and memory as it was then.
_all: weakref.WeakSet[Overlap] = weakref.WeakSet()


def _finish_all() -> None:
    running = [each._running for each in list(_all) if each._running is not None]
    futures.wait(running)


def _forget_threads() -> None:
    for each in list(_all):
        each._pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_finish_all, after_in_child=_forget_threads)


@torch.no_grad()
def _run(
    work: Callable[[list[Job]], None], copies: list[Job], ready: torch.cuda.Event | None
) -> None:
    if ready is not None:
        ready.synchronize()
    work(copies)


def _parts(value: Tensor) -> list[Tensor]:
    """The plain tensors that hold a parameter."""
    if not isinstance(value, PackedTensor):
        return [value]
    return [value.codes] if value.exponents is None else [value.codes, value.exponents]


def _rebuilt(value: Tensor, parts: Any) -> Tensor:
    """A parameter like `value` held in the next of `parts`."""
    if not isinstance(value, PackedTensor):
        return next(parts)  # type: ignore[no-any-return]  # an iterator of tensors
    codes = next(parts)
    return PackedTensor(
        codes, None if value.exponents is None else next(parts), value.format, value.shape
    )
