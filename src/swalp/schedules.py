"""Learning rates as functions of the step, for averaging: they end in a constant or a cycle.

Each is a frozen value to call with the step (or epoch, or fraction of one: the unit is the caller's
throughout). `as_scheduler` makes a `torch.optim.lr_scheduler` of any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Schedule = Callable[[float], float]


def _require(owner: str, name: str, value: float, *, positive: bool = False) -> None:
    if not value >= 0 or (positive and value == 0):
        allowed = "positive" if positive else "0 or more"
        raise ValueError(f"{owner}: {name}={value} must be {allowed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The rate of the published CIFAR runs.

    With t = step / start: `learning_rate` until t = 0.5, linear down to `floor` times it at 0.9,
    flat until 1; from `start` on, where averaging starts, `averaging_rate` at once.

    Args:
        start: the step at which averaging starts; positive.
        learning_rate: the initial rate.
        averaging_rate: the rate while averaging.
        floor: the last rate before averaging, as a share of `learning_rate`.

    Example:
        >>> rate = Published(start=200, learning_rate=0.05, averaging_rate=0.01)
        >>> [rate(epoch) for epoch in (0, 199, 200)]
        [0.05, 0.0005, 0.01]

    Source: the code published with Yang et al. 2019.
    """

    start: float
    learning_rate: float
    averaging_rate: float
    floor: float = 0.01

    def __post_init__(self) -> None:
        _require("Published", "start", self.start, positive=True)
        for name in ("learning_rate", "averaging_rate", "floor"):
            _require("Published", name, getattr(self, name))

    def __call__(self, step: float) -> float:
        """The rate at `step`, counted from 0."""
        t = step / self.start
        if t >= 1:
            return self.averaging_rate
        progress = min(max((t - 0.5) / 0.4, 0.0), 1.0)
        return self.learning_rate * (1 - progress + self.floor * progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """From `learning_rate` straight down to `averaging_rate` at `start`, then constant.

    Args:
        start: the step at which averaging starts; positive.
        learning_rate: the initial rate.
        averaging_rate: the rate from `start` on.
    """

    start: float
    learning_rate: float
    averaging_rate: float

    def __post_init__(self) -> None:
        _require("Linear", "start", self.start, positive=True)
        for name in ("learning_rate", "averaging_rate"):
            _require("Linear", name, getattr(self, name))

    def __call__(self, step: float) -> float:
        """The rate at `step`, counted from 0."""
        left = max(1 - step / self.start, 0.0)
        return self.averaging_rate + (self.learning_rate - self.averaging_rate) * left


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosine:
    """Half a cosine from `learning_rate` to `averaging_rate` at `start`, then constant.

    Args:
        start: the step at which averaging starts; positive.
        learning_rate: the initial rate.
        averaging_rate: the rate from `start` on.
    """

    start: float
    learning_rate: float
    averaging_rate: float

    def __post_init__(self) -> None:
        _require("Cosine", "start", self.start, positive=True)
        for name in ("learning_rate", "averaging_rate"):
            _require("Cosine", name, getattr(self, name))

    def __call__(self, step: float) -> float:
        """The rate at `step`, counted from 0."""
        share = (1 + math.cos(math.pi * min(step / self.start, 1.0))) / 2
        return self.averaging_rate + (self.learning_rate - self.averaging_rate) * share


@dataclass(frozen=True, slots=True, kw_only=True)
class Cyclic:
    """`before` until `start`; then linear from `high` to `low` in every `cycle`, and up at once.

    Average at the end of each cycle, where the rate is low: every=cycle.

    Args:
        before: the schedule until `start`.
        start: the step at which averaging starts.
        cycle: steps of a cycle; positive.
        high: the rate at the beginning of a cycle.
        low: the rate at its last step.

    Source: Izmailov et al. 2018 (arXiv:1803.05407), equation for the cyclical rate.
    """

    before: Schedule
    start: float
    cycle: int
    high: float
    low: float

    def __post_init__(self) -> None:
        _require("Cyclic", "start", self.start)
        _require("Cyclic", "cycle", self.cycle, positive=True)
        for name in ("high", "low"):
            _require("Cyclic", name, getattr(self, name))

    def __call__(self, step: float) -> float:
        """The rate at `step`, counted from 0."""
        if step < self.start:
            return self.before(step)
        place = (step - self.start) % self.cycle + 1
        return self.high + (self.low - self.high) * (place - 1) / max(self.cycle - 1, 1)


def as_scheduler(
    optimizer: torch.optim.Optimizer, schedule: Schedule
) -> torch.optim.lr_scheduler.LRScheduler:
    """A PyTorch scheduler that sets the rate of all groups to ``schedule(number of its steps)``.

    The groups' own rates count as factors, relative to the first group's. An earlier scheduler, or
    the loaded state of an optimizer that had one, keeps those as "initial_lr": they count then.

    Args:
        optimizer: its groups' `lr` are replaced from now on.
        schedule: any function of the step.
    """
    first = optimizer.param_groups[0]
    base = float(first.get("initial_lr", first["lr"]))  # of which `LambdaLR` takes multiples
    if base == 0:
        raise ValueError(
            "as_scheduler: the first group has lr=0, to which nothing is relative; give it any "
            "positive rate"
        )
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step) / base)
