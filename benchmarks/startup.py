"""What `import swalp` costs a program that has imported torch."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.harness import Spread
from benchmarks.plan import Plan
from benchmarks.records import Row, at_most

_PROGRAM = """
import time, torch
start = time.perf_counter()
import swalp
print(time.perf_counter() - start)
"""


def import_time(plan: Plan) -> list[Row]:
    """Seconds of `import swalp` in fresh processes, after `import torch`; compiled files warm."""
    seconds = [_once() for _ in range(plan.rounds + 1)][1:]
    return [
        Row(
            benchmark="import",
            what="import swalp, over import torch",
            measure="s",
            value=Spread.of(seconds),
            goal=at_most(0.3),
            rounds=plan.rounds,
        )
    ]


def _once() -> float:
    command = [sys.executable, "-c", _PROGRAM]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
