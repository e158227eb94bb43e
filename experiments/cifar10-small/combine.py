"""Runs of one seed each, or of some of the arms, become one run directory with one table.

python experiments/cifar10-small/combine.py [--again] DATA OUT RUN...

DATA holds CIFAR-10. The runs must have the same settings but for arms and seeds. With --again, each
average gets its batch-norm statistics anew and is evaluated again, as `swalp train` does at the end
of a run. Where that differs from what the run recorded, its earlier averages, whose weights are
gone, count as not measured.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import safetensors.torch
import torch

from swalp import to_float
from swalp.report import curves, tables
from swalp.training import data, deployment, loop, run_directory, summary
from swalp.training.config import RunConfig

ORDER = ("float", "paper-small-block-8", "paper-small-block-5", "paper-small-block-4")


def main(data_dir: Path, out: Path, paths: list[Path], *, again: bool) -> None:
    runs = [run_directory.open_run(path) for path in paths]
    config = combined([run.config() for run in runs])
    torch.set_num_threads(config.threads)
    examples = data.load(config.data, data_dir)
    target = run_directory.create(out, config)
    lines = {}
    for run in runs:
        for model in run.path.glob("models/*/*/*.safetensors"):
            place = target.path / model.relative_to(run.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model, place)
        for (arm, seed), records in summary.records(run).items():
            if again:
                records = evaluated(target, config, examples, arm, seed, records)
            lines[arm, seed] = records
        for session in run.sessions():
            target.append_session(session)
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        for arm in config.arms:
            for record in lines[arm, seed]:
                target.append_metrics(record)
    title = f"{config.data}, {config.model} of width {config.width}"
    target.save_curves(
        curves.png(target.metrics(), averaging_start=config.averaging_start, title=title)
    )
    target.finish(summary.build(target, config, examples))
    print(tables.render(target.summary()))


def combined(configs: list[RunConfig]) -> RunConfig:
    """The settings of all runs together."""
    arms = {arm for config in configs for arm in config.arms}
    seeds = {config.first_seed + n for config in configs for n in range(config.seeds)}
    chosen = {
        "arms": tuple(arm for arm in ORDER if arm in arms),
        "first_seed": min(seeds),
        "seeds": max(seeds) + 1 - min(seeds),
    }
    found = {RunConfig(**config.model_dump() | chosen) for config in configs}
    if len(found) > 1:
        raise SystemExit("the runs differ in more than arms and seeds")
    return found.pop()


def evaluated(target, config, examples, arm, seed, records):
    """The records of one training run, its last average measured again."""
    path = target.model_path(arm, seed, "average")
    average = to_float(loop.network(config, examples, arm, seed))
    average.load_state_dict(safetensors.torch.load_file(path))
    deployment.recompute_batchnorm(average, config, examples, seed)
    target.save_model(path, average.state_dict())
    error = loop.error(average, examples.test)
    last = records[-1]
    if error != last["average_error"]:
        records = [record | {"average_error": None} for record in records]
    again = {"average_error": error}
    for name in deployment.MODELS:
        model = deployment.deployed(average, config, arm, examples, name, seed)
        again[f"{name}_error"] = loop.error(model, examples.test)
    return [*records[:-1], last | again]


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--again"]
    data_dir, out, *paths = map(Path, words)
    main(data_dir, out, paths, again="--again" in sys.argv)
