"""Native 8-bit training against its simulation, to the end of a run: test errors on real data.

    python experiments/native-vs-simulated/run.py train {mnist,cifar10,tinyshakespeare} DATA_DIR
    python experiments/native-vs-simulated/run.py show      # the table of the rows that train adds

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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import swalp
from swalp.recipes import Recipe
from swalp.training import data
from swalp.training.datasets.images import Dataset, epoch_order, evaluation_batches

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)
BATCH = 128
EPOCHS = {"mnist": 5, "cifar10": 4, "tinyshakespeare": 1}
RATE = {"mnist": 0.1, "cifar10": 0.05, "tinyshakespeare": 2e-3}
CONTEXT, SEQUENCES, STEPS = 64, 32, 800  # characters, of a batch, of the text's epoch
WIDTH, HEADS, BLOCKS = 128, 4, 3

NATIVE = swalp.recipes.get("native-8")
ARMS: dict[str, Recipe | None] = {
    "native": NATIVE,
    "simulated": replace(NATIVE, product="simulated"),
    "float32": None,
}


class Characters(nn.Module):
    """PyTorch's transformer encoder, each character seeing those before it, to the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(256, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)
        self.register_buffer("later", torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, CONTEXT) characters to (batch, CONTEXT, 256) scores."""
        x = self.characters(x) + self.places
        scores: Tensor = self.head(self.norm(self.encoder(x, self.later)))
        return scores


def network(name: str) -> nn.Module:
    """784-256-256-10, four convolutions with batch normalization and a linear layer, or a
    transformer.
    """
    if name == "tinyshakespeare":
        return Characters()
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


def load(name: str, place: Path) -> Dataset | Tensor:
    """Images, or the characters of `input.txt` as bytes."""
    if name != "tinyshakespeare":
        return data.load(name, place)
    return torch.tensor(list((place / "input.txt").read_bytes()))


def split(text: Tensor) -> tuple[Tensor, Tensor]:
    """The text that is trained on, and the last tenth."""
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def batches(name: str, examples: Dataset | Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and what is to be found, of the whole run."""
    if isinstance(examples, Tensor):
        generator, text = torch.Generator().manual_seed(seed), split(examples)[0]
        for _ in range(STEPS):
            first = torch.randint(len(text) - CONTEXT, (SEQUENCES, 1), generator=generator)
            places = first + torch.arange(CONTEXT)
            yield text[places], text[places + 1]
        return
    count = len(examples.train.labels)
    for epoch in range(EPOCHS[name]):
        order = epoch_order(count, seed, epoch)
        yield from examples.train.batches(order[: count // BATCH * BATCH].split(BATCH))


def steps_of(name: str, examples: Dataset | Tensor) -> int:
    """How many batches there are."""
    if isinstance(examples, Tensor):
        return STEPS
    return EPOCHS[name] * (len(examples.train.labels) // BATCH)


def tests(examples: Dataset | Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the test set; of the text, all of the last tenth in stretches."""
    if not isinstance(examples, Tensor):
        yield from evaluation_batches(examples.test)
        return
    text = split(examples)[1]
    count = (len(text) - 1) // CONTEXT
    x, y = (text[i : i + count * CONTEXT].view(count, CONTEXT) for i in (0, 1))
    yield from zip(x.split(BATCH), y.split(BATCH), strict=True)


@torch.no_grad()
def test_error(model: nn.Module, examples: Dataset | Tensor) -> tuple[float, float]:
    """Percent of the test set that is wrong, and the loss, in evaluation mode."""
    model.eval()
    wrong, loss, count = 0, 0.0, 0
    for x, y in tests(examples):
        scores = model(x)
        wrong += int((scores.argmax(-1) != y).sum())
        loss += loss_of(scores, y, reduction="sum").item()
        count += y.numel()
    model.train()
    return 100 * wrong / count, loss / count


def loss_of(scores: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Of images, or of each character."""
    return F.cross_entropy(scores.flatten(0, -2), y.flatten(), reduction=reduction)


def train(
    name: str, arm: str, seed: int, examples: Dataset | Tensor, about: dict[str, Any]
) -> None:
    """One arm to the end; a row."""
    torch.manual_seed(seed)
    model, recipe = network(name), ARMS[arm]
    if recipe is not None:
        model = swalp.convert(model, recipe, seed=seed, packed=True)
    parameters, lr = model.named_parameters(), RATE[name]
    optimizer: swalp.optim.SGD | swalp.optim.Adam
    if name == "tinyshakespeare":
        optimizer = swalp.optim.Adam(parameters, lr=lr, recipe=recipe, seed=seed)
    else:
        optimizer = swalp.optim.SGD(parameters, lr=lr, momentum=0.9, recipe=recipe, seed=seed)
    began, steps = time.perf_counter(), steps_of(name, examples)
    for step, (x, y) in enumerate(batches(name, examples, seed)):
        for group in optimizer.param_groups:
            group["lr"] = rate(name, step / steps)
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    seconds = round(time.perf_counter() - began, 1)
    error, loss = test_error(model, examples)
    integers = 0
    if recipe is not None:
        integers = sum("on integers" in row.note for row in swalp.summary(model).layers)
    row = {
        "data": name, "arm": arm, "seed": seed, "epochs": EPOCHS[name], "steps": steps,
        "test_error": error, "test_loss": loss, "layers_on_integers": integers,
        "seconds": seconds, **about,
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
            lines.append(f"{name:15} {arm:10} {mean:6.2f} ± {spread:.2f} %")
        native, simulated = errors["native"], errors["simulated"]
        difference = [a - b for a, b in zip(native, simulated, strict=True)]
        same = native == simulated  # no spread to test against
        paired = 1.0 if same else stats.ttest_rel(native, simulated).pvalue
        welch = 1.0 if same else stats.ttest_ind(native, simulated, equal_var=False).pvalue
        lines.append(
            f"{name:15} native - simulated {statistics.mean(difference):+.2f} ± "
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
        examples = load(options.data, options.data_dir)
        where = about()
        for seed in SEEDS:
            for arm in ARMS:
                train(options.data, arm, seed, examples, where)
    rows = [json.loads(line) for line in (HERE / "rows.jsonl").read_text().splitlines()]
    print(table(rows))


if __name__ == "__main__":
    main()
