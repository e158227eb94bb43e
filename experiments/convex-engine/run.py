"""How fast the convex engine is, and that it equals its definition: one row for each kernel.

`python run.py > results.csv`; each instruction set in a process of its own, by SWALP_ISA.
"""

import csv
import os
import subprocess
import sys
import time

import torch

import swalp
from swalp.lab import engine, problems
from swalp.lab.engine import Method
from swalp.training.environment import commit

STEPS = 1_000_000
SEED = 0


def rows(isa: str) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    make = torch.Generator().manual_seed(SEED)
    x = torch.randn(4096, 256, generator=make)
    problem = problems.LeastSquares(x, x.sum(1) / 16 + torch.randn(4096, generator=make))
    drawn = torch.randint(0, 4096, (STEPS,), generator=make)
    found = []
    methods = {
        "SGD and SWA": Method(1e-3),
        "SGD-LP and SWALP": Method(1e-3, swalp.FixedPoint(8, 6), swalp.Stochastic(SEED)),
    }
    for name, method in methods.items():
        seconds = []
        for _ in range(3):
            state = engine.begin(torch.zeros(256))
            began = time.perf_counter()
            engine.descend(problem, method, state, drawn, STEPS)
            seconds.append(time.perf_counter() - began)
        short, slow = engine.begin(torch.zeros(256)), engine.begin(torch.zeros(256))
        engine.descend(problem, method, short, drawn[:200], 200)
        engine._slow(problem, method, slow, drawn[:200], 200)
        equal = torch.equal(short.weight, slow.weight) and torch.equal(short.sum, slow.sum)
        found.append(
            {
                "kernels": isa, "methods": name, "steps": STEPS, "coefficients": 256, "threads": 1,
                "seconds (median of 3)": round(sorted(seconds)[1], 3),
                "equals the definition": equal, "seed": SEED, "commit": commit(),
                "torch": torch.__version__,
            }
        )  # fmt: skip
    return found


def main() -> None:
    if len(sys.argv) > 1:
        found = rows(sys.argv[1])
        writer = csv.DictWriter(sys.stdout, found[0], lineterminator="\n")
        if sys.argv[1] == "avx512":
            writer.writeheader()
        writer.writerows(found)
        return
    for isa in ("avx512", "avx2", "scalar"):
        environment = os.environ | {"SWALP_ISA": isa}
        subprocess.run([sys.executable, __file__, isa], env=environment, check=True)


if __name__ == "__main__":
    main()
