"""The paper's ablations of the average, each from a single training run.

Which iterates are averaged, and in which precision, changes nothing about the iterates. So one run
keeps all the averages that are to be compared, and the comparison has no noise of training in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from swalp.training import averages, loop
from swalp.training.config import RunConfig
from swalp.training.data import Dataset

Row = dict[str, Any]
Question = Literal["frequency", "precision"]
QUESTIONS: tuple[Question, ...] = ("frequency", "precision")

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
        "arms": ("paper-small-block-8", "paper-small-block-5"),  # 4 bits learn little here
        "augment": True,
        "learning_rate": 0.05,
        "epochs": 20,
        "averaging_start": 15,
    }
)
# The training runs: settings, and training images (the first ones of the data set).
SETTINGS: dict[str, tuple[RunConfig, int]] = {
    "mnist": (_MNIST, 20_000),
    "cifar10": (_CIFAR, 25_000),
}


def averaging(
    config: RunConfig,
    data: Dataset,
    *,
    questions: Sequence[Question] = QUESTIONS,
    examples: int | None = None,
    watch: Callable[[int, int], None] = lambda done, steps: None,
) -> list[Row]:
    """How often must an iterate be taken, and how precise must the average be?

    Every arm and seed is trained once, for all frequencies and precisions.

    Args:
        config: settings of the run, such as ``SETTINGS["mnist"][0]``; `average_every` holds for
            all precisions.
        data: as `config` says.
        questions: those that are asked; others cost nothing.
        examples: train on the first so many images alone; default: on all.
        watch: called after each step with the steps done and those of the whole ablation.

    Returns:
        A row for each arm, seed, epoch after averaging started, and average, in that order:
        "arm", "seed", "epoch"; "average": one of `FREQUENCIES`; at the last epoch also
        ``precision=bfpW[0]`` for W in `PRECISIONS` and "precision=float32"; or "iterate" for the
        last iterate; "averaged": iterates taken (0 for the iterate); "test_error": %. Rows are
        plain records, a function of the arguments alone.
    """
    data = data if examples is None else replace(data, train=data.train.between(0, examples))
    per_epoch = loop.steps_per_epoch(config, data)
    texts = []
    if "frequency" in questions:
        texts += _fitting_frequencies(config, per_epoch)
    if "precision" in questions:
        texts += [f"precision=bfp{bits}[0]" for bits in PRECISIONS] + ["precision=float32"]
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    trajectories = [(arm, seed) for arm in config.arms for seed in seeds]
    total = len(trajectories) * config.epochs * per_epoch
    done, rows = 0, []
    for arm, seed in trajectories:
        trajectory = loop.begin(config, data, arm, seed)
        kept = {
            text: averages.parse(text).begin(
                trajectory.model,
                config.recipe(arm),
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
            last = record["epoch"] == config.epochs
            found = [("iterate", 0, record["test_error"])]
            for text, average in kept.items():
                if average.count and (last or not text.startswith("precision=")):
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


def answers(rows: Sequence[Row], question: Question, epochs: int) -> list[Row]:
    """Those rows of `averaging` over so many epochs that answer a question, with the iterates'."""
    if question == "frequency":
        return [row for row in rows if not row["average"].startswith("precision=")]
    return [
        row for row in rows if row["epoch"] == epochs and not row["average"].startswith("every=")
    ]


def _fitting_frequencies(config: RunConfig, per_epoch: int) -> list[str]:
    """Those that the epochs have room for."""
    total = config.epochs * per_epoch
    fitting = []
    for text in FREQUENCIES:
        setting = averages.parse(text)
        start, every = setting.when(config.averaging_start, 1, per_epoch)
        if start + every <= total and (setting.unit == "epoch" or every < per_epoch):
            fitting.append(text)
    return fitting
