"""What an update a step adds to VGG16: `python experiments/averaging-cost/run.py [ROUNDS]`."""

import json
import statistics
import sys
import time

import torch
from torch import nn

import swalp
from swalp.training import environment, models


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(rounds: int) -> None:
    torch.set_num_threads(2)
    recipe = swalp.recipes.get("paper-small-block-8")
    network = models.build("vgg16", channels=3, size=32, width=64, classes=10, seed=0)
    model = swalp.convert(network, recipe, packed=True)
    optimizer = swalp.optim.SGD(model.named_parameters(), lr=0.01, momentum=0.9, recipe=recipe)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 3, 32, 32, generator=generator)
    y = torch.randint(10, (128,), generator=generator)
    float_model = swalp.to_float(model)
    averages = {
        "packed weights, float32": (swalp.WeightAverage(model), model),
        "packed weights, float64": (
            swalp.WeightAverage(model, accumulator=torch.float64), model,
        ),
        "packed weights, bfp8[0]": (
            swalp.WeightAverage(
                model,
                accumulator=swalp.recipes.Quantizer(
                    swalp.BlockFloat(8, axes=(0,)), swalp.Stochastic()
                ),
            ),
            model,
        ),
        "float32 weights, float32": (swalp.WeightAverage(float_model), float_model),
        "swa_utils, float32 weights": (
            torch.optim.swa_utils.AveragedModel(float_model), float_model,
        ),
    }  # fmt: skip

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    for average, of in averages.values():
        average.update_parameters(of)
    steps: list[float] = []
    shares: dict[str, list[float]] = {name: [] for name in averages}
    updates: dict[str, list[float]] = {name: [] for name in averages}
    for _ in range(rounds):
        steps.append(seconds(step))
        for name, (average, of) in averages.items():
            # Cold caches, as after a step: every average has memory of its own.
            taken = seconds(lambda average=average, of=of: average.update_parameters(of))
            updates[name].append(taken)
            shares[name].append(100 * taken / steps[-1])
    record = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch": 128,
        "rounds": rounds,
        "step, ms": round(1e3 * statistics.median(steps), 1),
        "update, ms": {n: round(1e3 * statistics.median(u), 2) for n, u in updates.items()},
        "update, % of the step": {n: round(statistics.median(s), 3) for n, s in shares.items()},
        "bytes a weight": {
            name: round(average.nbytes / sum(p.numel() for p in of.parameters()), 3)
            for name, (average, of) in averages.items()
            if isinstance(average, swalp.WeightAverage)
        },
        "environment": environment.describe(),
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
