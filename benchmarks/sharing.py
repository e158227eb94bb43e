"""What it costs a thread to write where others have been: why kernels share work as they do."""

from __future__ import annotations

import torch

from benchmarks.harness import Contender, interleave
from benchmarks.plan import Plan
from benchmarks.records import Row, compared


def writes(plan: Plan) -> list[Row]:
    """To write 2 MB of which other threads have read parts last, against having written them.

    PyTorch gives each thread a stretch: of twice as much, the same memory is another thread's.
    """
    whole = torch.ones(1 << 20)
    mine = whole[: 1 << 19]

    def read() -> None:
        mine.fill_(1.0)
        whole.sum()

    def written() -> None:
        mine.fill_(1.0)
        whole.mul_(1.0)

    after_read = Contender("after reads", lambda: mine.fill_(2.0), read)
    after_written = Contender("after writes", lambda: mine.fill_(2.0), written)
    times = interleave([after_read, after_written], plan.rounds, seconds=plan.seconds, turn=0.0)
    what = "writing 2 MB of which other threads have had parts last"
    return [compared("sharing", what, times, after_read, after_written, "time ratio")]
