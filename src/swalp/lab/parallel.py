"""Many trajectories at once, on all cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.synchronize import Event

import torch

from swalp.lab.claim import Context, Row, Stopped
from swalp.training.mistakes import UserError


def in_threads(
    context: Context, jobs: Sequence[Callable[[Callable[[], None]], list[Row]]]
) -> list[Row]:
    """The rows of all jobs, in the order of the jobs.

    Args:
        context: who watches, and who may stop it.
        jobs: each is given a function to call now and then, which raises `Stopped` if it is time.
            They spend their time in kernels that leave the interpreter's lock free.

    Raises:
        Stopped: somebody asked for it; nothing goes on afterwards.
    """
    failed = False

    def check() -> None:
        if failed or context.stopped():
            raise Stopped

    with ThreadPoolExecutor(context.workers) as pool:
        futures = [pool.submit(job, check) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                context.progress(done, len(jobs))
        except BaseException:
            failed = True  # the others end at their next check
            pool.shutdown(cancel_futures=True)
            raise
    return [row for future in futures for row in future.result()]


def in_processes(
    context: Context, jobs: Sequence[Callable[[Callable[[], None]], list[Row]]]
) -> list[Row]:
    """As `in_threads`, for jobs that hold the interpreter's lock: in processes of their own.

    Each computes with one thread of PyTorch, so that no result depends on the number of cores.

    Args:
        context: who watches, and who may stop it.
        jobs: as of `in_threads`; they must pickle.

    Raises:
        Stopped: somebody asked for it; nothing goes on afterwards.
    """
    if context.workers == 1:
        return in_threads(context, jobs)
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit PyTorch's threads
    stop = spawn.Event()
    with ProcessPoolExecutor(context.workers, spawn, _begin, (stop,)) as pool:
        try:
            with _deaf():
                futures = [pool.submit(_work, job) for job in jobs]
            waiting = set(futures)
            while waiting:
                if context.stopped():
                    raise Stopped
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                if done:
                    context.progress(len(jobs) - len(waiting), len(jobs))
        except BrokenProcessPool:
            if context.stopped():
                raise Stopped from None
            raise UserError(
                "a process that trained was killed, perhaps for want of memory; close other "
                "programs and start again"
            ) from None
        except BaseException:
            stop.set()  # the others end at their next check
            pool.shutdown(cancel_futures=True)
            raise
    return [row for future in futures for row in future.result()]


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that begin here are born deaf to Ctrl-C: the parent hears it, and tells them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_stop: Event | None = None  # of a worker process


def _begin(stop: Event) -> None:
    global _stop
    _stop = stop
    torch.set_num_threads(1)
    for name in ("SIGTERM", "SIGHUP"):  # a whole group may get it: the parent tells
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave when the parent has: one that was killed tells nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(job: Callable[[Callable[[], None]], list[Row]]) -> list[Row]:
    return job(_check)


def _check() -> None:
    if _stop is not None and _stop.is_set():
        raise Stopped
