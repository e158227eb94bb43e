"""The ablations of the average: `python run.py frequency|precision mnist|cifar10 DATA_DIR`."""

import json
import sys
import time
from pathlib import Path

import torch

from swalp.report import ablations as report
from swalp.training import ablations, data, environment


def main(what: str, name: str, data_dir: str) -> None:
    config, examples = ablations.SETTINGS[name]
    torch.set_num_threads(config.threads)
    images = data.load(name, Path(data_dir))
    run = {
        "frequency": ablations.averaging_frequency,
        "precision": ablations.averaging_precision,
    }[what]
    began = time.monotonic()

    def watch(done: int, steps: int) -> None:
        if done % 100 == 0:
            print(f"{done} of {steps} steps", file=sys.stderr)

    rows = run(config, images, examples=examples, watch=watch)
    folder = Path(__file__).parents[1] / f"averaging-{what}"
    record = {
        "settings": config.model_dump(),
        "training_examples": examples,
        "environment": environment.describe() | {"threads": config.threads},
        "seconds": round(time.monotonic() - began),
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}-rows.jsonl").write_text(lines)
    draw = report.frequency_png if what == "frequency" else report.precision_png
    title = f"{name}, {examples:,} training images, {config.model} of width {config.width}"
    (folder / f"{name}.png").write_bytes(draw(rows, title))
    print(report.table(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
