"""Many trajectories at once, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from swalp.lab.claim import Context, Row, Stopped


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
