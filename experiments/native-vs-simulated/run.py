"""Native 8-bit training against its simulation, to the end of a run: test errors on real data.

    python experiments/native-vs-simulated/run.py train {mnist,cifar10} DATA_DIR   # adds rows
    python experiments/native-vs-simulated/run.py show                             # the table

Every arm of a seed has the same initial weights, the same batches and the same noise. The two ways
differ where float32 rounds a sum that the integers hold, which then flips a rounding here and
there; what comes of that at the end is the question.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

import swalp
from swalp.recipes import Recipe
from swalp.training import data
from swalp.training.datasets.images import Dataset, epoch_order, evaluation_batches

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)
BATCH = 128
EPOCHS = {"mnist": 5, "cifar10": 4}
RATE = {"mnist": 0.1, "cifar10": 0.05}

NATIVE = swalp.recipes.get("native-8")
ARMS: dict[str, Recipe | None] = {
    "native": NATIVE,
    "simulated": replace(NATIVE, product="simulated"),
    "float32": None,
}


def network(name: str) -> nn.Module:
    """784-256-256-10, or four convolutions with batch normalization and a linear layer."""
    if name == "mnist":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
            nn.Linear(256, 10),
        )  # fmt: skip
    layers: list[nn.Module] = []
    for before, width in ((3, 16), (16, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def rate(name: str, part: float) -> float:
    """Down to a hundredth by a cosine over the run."""
    return RATE[name] * (0.505 + 0.495 * math.cos(math.pi * part))


@torch.no_grad()
def test_error(model: nn.Module, examples: Dataset) -> tuple[float, float]:
    """Percent of the test set that is wrong, and the loss, in evaluation mode."""
    model.eval()
    wrong, loss = 0, 0.0
    for x, y in evaluation_batches(examples.test):
        scores = model(x)
        wrong += int((scores.argmax(1) != y).sum())
        loss += F.cross_entropy(scores, y, reduction="sum").item()
    model.train()
    return 100 * wrong / len(examples.test.labels), loss / len(examples.test.labels)


def train(name: str, arm: str, seed: int, examples: Dataset, about: dict[str, Any]) -> None:
    """One arm to the end; a row."""
    torch.manual_seed(seed)
    model, recipe = network(name), ARMS[arm]
    if recipe is not None:
        model = swalp.convert(model, recipe, seed=seed, packed=True)
    optimizer = swalp.optim.SGD(
        model.named_parameters(), lr=RATE[name], momentum=0.9, recipe=recipe, seed=seed
    )
    began, count = time.perf_counter(), len(examples.train.labels)
    steps, step = EPOCHS[name] * (count // BATCH), 0
    for epoch in range(EPOCHS[name]):
        order = epoch_order(count, seed, epoch)
        rows = order[: count // BATCH * BATCH].split(BATCH)
        for x, y in examples.train.batches(rows):
            for group in optimizer.param_groups:
                group["lr"] = rate(name, step / steps)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            step += 1
    error, loss = test_error(model, examples)
    integers = 0
    if recipe is not None:
        integers = sum("on integers" in row.note for row in swalp.summary(model).layers)
    row = {
        "data": name, "arm": arm, "seed": seed, "epochs": EPOCHS[name], "steps": steps,
        "test_error": error, "test_loss": loss, "layers_on_integers": integers,
        "seconds": round(time.perf_counter() - began, 1), **about,
    }  # fmt: skip
    with (HERE / "rows.jsonl").open("a") as out:
        out.write(json.dumps(row) + "\n")
    print(name, arm, seed, f"{error:.2f} % {loss:.4f}", f"{row['seconds']} s", flush=True)


def about() -> dict[str, Any]:
    """Where a row comes from."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, cwd=HERE, check=True,
    )  # fmt: skip
    return {
        "commit": commit.stdout.strip(),
        "versions": {name: importlib.metadata.version(name) for name in ("swalp", "torch")},
        "device": f"cpu, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Test errors, mean ± standard deviation over the seeds, and the two ways compared."""
    lines = []
    for name in EPOCHS:
        errors = {
            arm: [row["test_error"] for row in rows if (row["data"], row["arm"]) == (name, arm)]
            for arm in ARMS
        }
        if any(len(values) < 2 for values in errors.values()):
            continue
        for arm, values in errors.items():
            mean, spread = statistics.mean(values), statistics.stdev(values)
            lines.append(f"{name:8} {arm:10} {mean:6.2f} ± {spread:.2f} %")
        native, simulated = errors["native"], errors["simulated"]
        difference = [a - b for a, b in zip(native, simulated, strict=True)]
        same = native == simulated  # no spread to test against
        paired = 1.0 if same else stats.ttest_rel(native, simulated).pvalue
        welch = 1.0 if same else stats.ttest_ind(native, simulated, equal_var=False).pvalue
        lines.append(
            f"{name:8} native - simulated {statistics.mean(difference):+.2f} ± "
            f"{statistics.stdev(difference):.2f} points; two-sided p = {paired:.2f} paired, "
            f"{welch:.2f} not ({len(native)} seeds)"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["train", "show"])
    parser.add_argument("data", nargs="?", choices=sorted(EPOCHS))
    parser.add_argument("data_dir", nargs="?", type=Path)
    options = parser.parse_args()
    if options.what == "train":
        if options.data_dir is None:
            parser.error("train needs the data set and the folder with its files")
        examples = data.load(options.data, options.data_dir)
        where = about()
        for seed in SEEDS:
            for arm in ARMS:
                train(options.data, arm, seed, examples, where)
    rows = [json.loads(line) for line in (HERE / "rows.jsonl").read_text().splitlines()]
    print(table(rows))


if __name__ == "__main__":
    main()
