"""The ablations of the average: `python run.py mnist|cifar10 DATA_DIR [PROCESSES]`.

Both are answered from the same training runs, and written to this folder and to
`averaging-precision`.
"""

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from swalp.report import ablations as report
from swalp.training import ablations, data, environment

PICTURES = {"frequency": report.frequency_png, "precision": report.precision_png}


def train(name: str, arm: str, seed: int, data_dir: str) -> list[ablations.Row]:
    """The rows of one training run."""
    config, examples = ablations.SETTINGS[name]
    config = config.model_copy(update={"arms": (arm,), "first_seed": seed, "seeds": 1})
    torch.set_num_threads(config.threads)

    def watch(done: int, steps: int) -> None:
        if done % 500 == 0:
            print(f"{arm}, seed {seed}: {done} of {steps} steps", file=sys.stderr, flush=True)

    images = data.load(name, Path(data_dir))
    return ablations.averaging(config, images, examples=examples, watch=watch)


def main(name: str, data_dir: str, processes: int) -> None:
    config, examples = ablations.SETTINGS[name]
    described = environment.describe() | {"threads": config.threads}  # of the code that runs now
    began = time.monotonic()
    with ProcessPoolExecutor(processes) as pool:
        runs = [
            pool.submit(train, name, arm, seed, data_dir)
            for arm in config.arms
            for seed in range(config.first_seed, config.first_seed + config.seeds)
        ]
        rows = [row for run in runs for row in run.result()]
    record = {
        "settings": config.model_dump(),
        "training_examples": examples,
        "environment": described,
        "processes": processes,
        "seconds": round(time.monotonic() - began),
    }
    title = f"{name}, {examples:,} training images, {config.model} of width {config.width}"
    for question in ablations.QUESTIONS:
        folder = Path(__file__).parents[1] / f"averaging-{question}"
        answers = ablations.answers(rows, question, config.epochs)
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        lines = "".join(json.dumps(row) + "\n" for row in answers)
        (folder / f"{name}-rows.jsonl").write_text(lines)
        (folder / f"{name}.png").write_bytes(PICTURES[question](answers, title))
        print(report.table(answers))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1)
