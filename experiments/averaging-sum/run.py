"""A million iterates, averaged in each of the ways: `python experiments/averaging-sum/run.py`."""

import json

import torch
from torch import nn

import swalp
from swalp import FixedPoint, WeightAverage
from swalp.averaging import ExactSum, moving_mean

ITERATES, WEIGHTS, SEED = 1_000_000, 256, 0
FORMAT = FixedPoint(8, 6)


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    # Weights of very different sizes that wander by a hundredth of themselves.
    centre = torch.randn(1, WEIGHTS, generator=generator)
    noise = torch.randn(1000, WEIGHTS, generator=generator) * 1e-2 * centre
    iterates = centre + noise
    fixed = swalp.quantize(iterates, FORMAT, swalp.Stochastic(SEED))
    model, grid = nn.Linear(WEIGHTS, 1, bias=False), nn.Linear(WEIGHTS, 1, bias=False)
    compensated = WeightAverage(model)
    double = WeightAverage(model, accumulator=torch.float64)
    exact = WeightAverage(grid, accumulator=ExactSum(FORMAT))
    packed = [swalp.pack(row[None], FORMAT) for row in fixed]
    grid.weight = nn.Parameter(packed[0].clone(), requires_grad=False)
    naive = torch.zeros(1, WEIGHTS)
    half = torch.zeros(1, WEIGHTS, dtype=torch.bfloat16)
    with torch.no_grad():
        for step in range(ITERATES):
            row = step % 1000
            model.weight.copy_(iterates[row])
            grid.weight.copy_(packed[row])
            compensated.update_parameters(model)
            double.update_parameters(model)
            exact.update_parameters(grid)
            naive = moving_mean(naive, iterates[row], 1 / (step + 1))
            half = moving_mean(half, iterates[row], 1 / (step + 1))
    truth = iterates.double().mean(0, keepdim=True)
    ulp = 2.0 ** (truth.abs().log2().floor() - 23)
    rational = fixed.double().mean(0, keepdim=True)  # sums of 8-bit integers: exact in float64

    def worst(value: torch.Tensor) -> float:
        return round(((value.double() - truth).abs() / ulp).max().item(), 3)

    record = {
        "iterates": ITERATES,
        "weights": WEIGHTS,
        "seed": SEED,
        "torch": torch.__version__,
        "largest error, units in the last place of float32": {
            "float64": worst(double.value("weight")),
            "float32, compensated": worst(compensated.value("weight")),
            "float32, naive": worst(naive),
            "bfloat16": worst(half),
        },
        "exact sum equals the rational mean": torch.equal(exact.value("weight"), rational),
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
