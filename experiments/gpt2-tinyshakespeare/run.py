"""A character-level GPT-2 of Hugging Face's on Tiny Shakespeare: float32, low precision, SWALP.

    python experiments/gpt2-tinyshakespeare/run.py train TEXT    # the record: rows.jsonl
    python experiments/gpt2-tinyshakespeare/run.py show          # the table; loss.png

The network is `transformers.GPT2LMHeadModel` as it is, from a configuration. Every arm of a seed
has the same initial weights and the same batches.
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

import swalp

HERE = Path(__file__).parent
ARMS = {
    "float32": None,
    "8 bits": "paper-small-block-8",
    "5 bits": "paper-small-block-5",
}
SEEDS = (1, 2)
CONTEXT, BATCH = 64, 16  # characters, sequences
STEPS, WARMUP, START = 1500, 100, 1000  # of the rate, of averaging
RATE, AVERAGING_RATE, EVERY = 2e-3, 1e-3, 5
EVALUATE = 100  # steps
VALIDATION = 64  # sequences, the same each time, from the last tenth of the text


def network(vocabulary: int, seed: int) -> nn.Module:
    """The untrained network, its weights drawn from `seed` alone."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=CONTEXT, n_embd=96, n_layer=3, n_head=4, use_cache=False,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def rate(step: int) -> float:
    """Up over the warm-up, then a cosine down to the averaging rate, which stays."""
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    part = min(1.0, (step - WARMUP) / (START - WARMUP))
    return AVERAGING_RATE + (RATE - AVERAGING_RATE) * (1 + math.cos(math.pi * part)) / 2


def sequences(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random stretches of the text, (count, CONTEXT)."""
    places = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    return text[places + torch.arange(CONTEXT)]


@torch.no_grad()
def loss_of(model: nn.Module, x: Tensor) -> float:
    """Nats per character, in evaluation mode."""
    was = model.training
    model.eval()
    loss = model(input_ids=x, labels=x).loss.item()
    model.train(was)
    return loss


def train(arm: str, seed: int, text: Tensor, vocabulary: int, about: dict[str, Any]) -> None:
    """One arm from the same start as the others; a row at every evaluation."""
    recipe = ARMS[arm]
    model = network(vocabulary, seed)
    if recipe is not None:
        model = swalp.convert(model, recipe, seed=seed, packed=True)
    optimizer = swalp.optim.Adam(model, lr=RATE, recipe=recipe, seed=seed)
    average = swalp.WeightAverage(model, start=START, every=EVERY)
    split = len(text) * 9 // 10
    validation = sequences(text[split:], VALIDATION, torch.Generator().manual_seed(0))
    batches = torch.Generator().manual_seed(seed)
    model.train()
    total, began = 0.0, time.perf_counter()
    with (HERE / "rows.jsonl").open("a") as rows:
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            x = sequences(text[:split], BATCH, batches)
            optimizer.zero_grad()
            loss = model(input_ids=x, labels=x).loss
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
            total += loss.item()
            if (step + 1) % EVALUATE == 0:
                row = {
                    "arm": arm, "recipe": recipe, "seed": seed, "step": step + 1,
                    "train_loss": total / EVALUATE, "loss": loss_of(model, validation),
                    "average_loss": loss_of(average.module, validation) if average.count else None,
                    "seconds": round(time.perf_counter() - began, 1), **about,
                }  # fmt: skip
                rows.write(json.dumps(row) + "\n")
                rows.flush()
                total = 0.0
                print(arm, seed, step + 1, round(row["loss"], 4), row["average_loss"], flush=True)


def about() -> dict[str, Any]:
    """Where a row comes from."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=HERE,
        check=True,
    )
    return {
        "commit": commit.stdout.strip(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("swalp", "torch", "transformers")
        },
        "device": f"cpu, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Losses at the end, mean ± standard deviation over the seeds."""

    def cell(arm: str, key: str) -> str:
        values = [row[key] for row in rows if row["arm"] == arm and row["step"] == STEPS]
        return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"

    lines = [("", "last iterate", "average")]
    lines += [(arm, cell(arm, "loss"), cell(arm, "average_loss")) for arm in ARMS]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    text = [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    seeds = len({row["seed"] for row in rows})
    return "\n".join([*text, f"Validation loss, nats a character; {STEPS} steps, {seeds} seeds."])


def draw(rows: list[dict[str, Any]]) -> None:
    """Loss against steps, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for number, arm in enumerate(ARMS):
        for seed in SEEDS:
            mine = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
            label = {} if seed != SEEDS[0] else {"label": arm}
            axes.plot(
                [row["step"] for row in mine], [row["loss"] for row in mine], f"C{number}-", lw=1.2,
                alpha=0.8, **label,
            )  # fmt: skip
            averaged = [row for row in mine if row["average_loss"] is not None]
            label = {} if seed != SEEDS[0] else {"label": f"{arm}, average"}
            axes.plot(
                [row["step"] for row in averaged], [row["average_loss"] for row in averaged],
                f"C{number}--", lw=1.8, **label,
            )  # fmt: skip
    axes.axvline(START, color="0.7", lw=0.8)
    axes.annotate(
        "averaging starts", (START, 1), (5, -6), xycoords=("data", "axes fraction"),
        textcoords="offset points", va="top", color="0.4", fontsize=9,
    )  # fmt: skip
    axes.set(xlabel="step", ylabel="validation loss, nats a character")
    axes.legend(frameon=False)
    figure.savefig(HERE / "loss.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train").add_argument("text", type=Path, help="tinyshakespeare's input.txt")
    commands.add_parser("show")
    arguments = parser.parse_args()
    if arguments.command == "train":
        logging.set_verbosity_error()
        torch.set_num_threads(1)
        characters = arguments.text.read_text()
        alphabet = sorted(set(characters))
        text = torch.tensor([alphabet.index(c) for c in characters])
        (HERE / "rows.jsonl").unlink(missing_ok=True)
        for seed in SEEDS:
            for arm in ARMS:
                train(arm, seed, text, len(alphabet), about())
    rows = [json.loads(line) for line in (HERE / "rows.jsonl").read_text().splitlines()]
    draw(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
