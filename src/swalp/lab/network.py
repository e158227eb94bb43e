"""One small network trained by Algorithm 2 in any recipe, with any averages of its iterates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

import swalp
from swalp.lab.claim import Row
from swalp.optim import SGD
from swalp.recipes import Recipe
from swalp.training import averages, data, loop, models
from swalp.training.data import Dataset, epoch_order, evaluation_batches

FAILED = 90.0  # %, the error of guessing: what a run counts whose loss is no longer finite


@dataclass(frozen=True, slots=True)
class Training:
    """How a network is trained, in whatever precision.

    Attributes:
        model: a kind of `swalp.training.models`.
        width: of it.
        batch_size: examples in a step.
        epochs: passes over the training images.
        averaging_start: epochs before averaging starts.
        learning_rate, averaging_rate: as of the published schedule.
        momentum, weight_decay: of SGD.
    """

    model: str
    width: int
    batch_size: int
    epochs: int
    averaging_start: int
    learning_rate: float
    averaging_rate: float
    momentum: float
    weight_decay: float


def train(
    training: Training,
    images: Dataset,
    recipe: Recipe | None,
    seed: int,
    texts: Sequence[str],
    check: Callable[[], None],
) -> list[Row]:
    """Train from one seed; the errors of the iterate and of each average.

    Args:
        training: how.
        images: what on.
        recipe: the formats; None for float.
        seed: of the initial weights, the order of the data and the noise.
        texts: of the averages, for `swalp.training.averages.parse`.
        check: called at each step; raises to stop.

    Returns:
        A row for the iterate where averaging starts, whose "average" is None, and one for each
        average at the end, with "test_error" in %. A run whose loss stops being finite counts as
        guessing.
    """
    channels, _, size = images.train.shape
    model = models.build(
        training.model,
        channels=channels,
        size=size,
        width=training.width,
        classes=images.classes,
        seed=seed,
    )
    if recipe is not None:
        swalp.convert(model, recipe, seed=seed)
    optimizer = SGD(
        model.named_parameters(),
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        recipe=recipe,
        seed=seed,
    )
    count = len(images.train.labels)
    per_epoch = count // training.batch_size
    start = training.averaging_start
    kept = {
        text: averages.parse(text).begin(
            model, None, start=start, every=1, per_epoch=per_epoch, seed=seed
        )
        for text in texts
    }
    rate = swalp.schedules.Published(
        start=start * per_epoch,
        learning_rate=training.learning_rate,
        averaging_rate=training.averaging_rate,
    )
    rows: list[Row] = []
    finite = True
    for epoch in range(training.epochs):
        if finite:
            order = epoch_order(count, seed, epoch)[: per_epoch * training.batch_size]
            batches = images.train.batches(torch.split(order, training.batch_size))
            model.train()
            for step, (x, y) in enumerate(batches, epoch * per_epoch):
                check()
                for group in optimizer.param_groups:
                    group["lr"] = rate(step)
                loss = nn.functional.cross_entropy(model(x), y)
                if not math.isfinite(loss.item()):
                    finite = False
                    break
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # PyTorch ships no type
                optimizer.step()
                for average in kept.values():
                    average.update_parameters(model)
        done = epoch + 1
        if done == start:
            found = loop.error(model, images.test) if finite else FAILED
            rows.append({"average": None, "epoch": done, "test_error": found})
        if done == training.epochs:
            for text, average in kept.items():
                if average.count == 0 and finite:
                    continue  # its first iterate is still to come
                good = finite and all(
                    bool(value.isfinite().all()) for value in average.module.parameters()
                )
                found = _averaged_error(average, images) if good else FAILED
                rows.append({"average": text, "epoch": done, "test_error": found})
    return rows


def _averaged_error(average: swalp.WeightAverage, images: Dataset) -> float:
    """With batch-norm statistics recomputed on the training images."""
    swalp.recompute_batchnorm(average.module, evaluation_batches(images.train))
    return loop.error(average.module, images.test)


@lru_cache(maxsize=2)
def load(name: str, data_dir: Path | None) -> Dataset:
    """The data set, kept from job to job."""
    return data.load(name, data_dir)
