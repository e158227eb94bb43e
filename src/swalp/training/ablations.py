"""The paper's ablations of the average, each from a single training run.

Which iterates are averaged, and in which precision, changes nothing about the iterates. So one run
keeps all the averages that are to be compared, and the comparison has no noise of training in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from swalp.training import averages, loop
from swalp.training.config import RunConfig
from swalp.training.data import Dataset

Row = dict[str, Any]

# From every step to every second epoch; of which those are left out that an epoch has no room for.
FREQUENCIES = (
    "every=1",
    "every=4",
    "every=16",
    "every=64",
    "every=256",
    "every=epoch",
    "every=2epochs",
)
# Bits of the block floating point in which the average is kept, rounded stochastically (Q_SWA).
PRECISIONS = (4, 5, 6, 7, 8, 9, 10, 12, 14, 16)

_MNIST = RunConfig(
    data="mnist",
    model="strided-cnn",
    width=16,
    arms=("paper-small-block-8", "paper-small-block-4"),
    seeds=3,
    first_seed=0,
    batch_size=128,
    epochs=8,
    averaging_start=4,
    average_every=1,
    learning_rate=0.02,
    averaging_rate=0.01,
    momentum=0.9,
    weight_decay=5e-4,
    threads=1,
    checkpoint_seconds=60.0,
)
_CIFAR = _MNIST.model_copy(
    update={
        "data": "cifar10",
        "model": "small-vgg",
        "augment": True,
        "learning_rate": 0.05,
        "averaging_rate": 0.02,
        "epochs": 10,
        "averaging_start": 6,
        "seeds": 2,
    }
)
# The training runs: settings, and training images (the first ones of the data set).
SETTINGS: dict[str, tuple[RunConfig, int]] = {
    "mnist": (_MNIST, 10_000),
    "cifar10": (_CIFAR, 5_000),
}


def averaging_frequency(
    config: RunConfig,
    data: Dataset,
    *,
    examples: int | None = None,
    watch: Callable[[int, int], None] = lambda done, steps: None,
) -> list[Row]:
    """How often must an iterate be taken? Every arm and seed is trained once, for all frequencies.

    Args:
        config: settings of the run, such as ``SETTINGS["mnist"][0]``.
        data: as `config` says.
        examples: train on the first so many images alone; default: on all.
        watch: called after each step with the steps done and those of the whole ablation.

    Returns:
        A row for each arm, seed, epoch after averaging started, and average, in that order:
        "arm", "seed", "epoch"; "average": one of `FREQUENCIES`, or "iterate" for the last iterate;
        "averaged": iterates taken (0 for the iterate); "test_error": %. Rows are plain records, a
        function of the arguments alone.
    """
    data = _first(data, examples)
    per_epoch = loop.steps_per_epoch(config, data)
    total = config.epochs * per_epoch
    fitting = []
    for text in FREQUENCIES:
        setting = averages.parse(text)
        start, every = setting.when(config.averaging_start, 1, per_epoch)
        if start + every <= total and (setting.unit == "epoch" or every < per_epoch):
            fitting.append(text)
    return _rows(config, data, fitting, watch)


def averaging_precision(
    config: RunConfig,
    data: Dataset,
    *,
    examples: int | None = None,
    watch: Callable[[int, int], None] = lambda done, steps: None,
) -> list[Row]:
    """How precise must the average be? Every arm and seed is trained once, for all precisions.

    Args:
        config: settings of the run; `average_every` holds for all.
        data: as `config` says.
        examples: train on the first so many images alone; default: on all.
        watch: called after each step with the steps done and those of the whole ablation.

    Returns:
        As `averaging_frequency`, at the last epoch alone, with "average" one of
        ``precision=bfpW[0]`` for W in `PRECISIONS`, "precision=float32", or "iterate".
    """
    texts = [f"precision=bfp{bits}[0]" for bits in PRECISIONS] + ["precision=float32"]
    return _rows(config, _first(data, examples), texts, watch, last_only=True)


def _rows(
    config: RunConfig,
    data: Dataset,
    texts: Sequence[str],
    watch: Callable[[int, int], None],
    *,
    last_only: bool = False,
) -> list[Row]:
    per_epoch = loop.steps_per_epoch(config, data)
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    trajectories = [(arm, seed) for arm in config.arms for seed in seeds]
    total = len(trajectories) * config.epochs * per_epoch
    done, rows = 0, []
    for arm, seed in trajectories:
        trajectory = loop.begin(config, data, arm, seed)
        kept = {
            text: averages.parse(text).begin(
                trajectory.model,
                arm,
                start=config.averaging_start,
                every=config.average_steps(per_epoch),
                per_epoch=per_epoch,
                seed=seed,
            )
            for text in texts
        }
        for step in loop.train(trajectory, data, config):
            for average in kept.values():
                average.update_parameters(trajectory.model)
            done += 1
            watch(done, total)
            record = step.record
            if record is None or record["epoch"] <= config.averaging_start:
                continue
            if last_only and record["epoch"] < config.epochs:
                continue
            found = [("iterate", 0, record["test_error"])]
            for text, average in kept.items():
                if average.count:
                    model = loop.averaged_model(average, config, data, seed)
                    found.append((text, average.count, loop.error(model, data.test)))
            rows += [
                {
                    "arm": arm,
                    "seed": seed,
                    "epoch": record["epoch"],
                    "average": text,
                    "averaged": count,
                    "test_error": error,
                }
                for text, count, error in found
            ]
    return rows


def _first(data: Dataset, examples: int | None) -> Dataset:
    return data if examples is None else replace(data, train=data.train.between(0, examples))
