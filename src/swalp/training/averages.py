"""Further averages of one training run, each described by a short string."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from swalp import Stochastic, WeightAverage, parse_format
from swalp.averaging import Accumulator, Equal, ExactSum, Exponential, Kind, Window
from swalp.formats import FixedPoint, Format
from swalp.recipes import Quantizer, Recipe

FORM = (
    "words such as every=20, every=epoch, start=10, decay=0.99, window=5, precision=float64, "
    "precision=exact or precision=bfp8"
)


@dataclass(frozen=True, slots=True)
class AverageSetting:
    """What one average of a run takes, when, and in which precision.

    Attributes:
        text: the words that `parse` read, in a fixed order.
        start: epochs before it starts; None: as the run's own average.
        every: from one iterate taken to the next: steps if `unit` is "step", else epochs; None: as
            the run's own average.
        unit: "step" or "epoch".
        kind: equal weights, exponential or the last ones.
        precision: of the accumulator; "exact": integer sums in the arm's own fixed-point format.
    """

    text: str
    start: int | None
    every: int | None
    unit: str
    kind: Kind
    precision: torch.dtype | Format | str

    def check(self, arms: Mapping[str, Recipe | None], epochs: int) -> None:
        """Raise ValueError if it does not fit the run's arms, with their recipes, and epochs."""
        if self.start is not None and self.start >= epochs:
            raise ValueError(f"{self.text!r}: start must be less than epochs = {epochs}")
        if self.precision != "exact":
            return
        for arm, recipe in arms.items():
            if not isinstance(_weight_format(recipe), FixedPoint):
                raise ValueError(
                    f"{self.text!r}: precision=exact needs weights in fixed point, and the arm "
                    f"{arm!r} has none; precision=float64 takes any"
                )

    def when(self, start: int, every: int, per_epoch: int) -> tuple[int, int]:
        """(steps before it starts, steps from one iterate to the next).

        Args:
            start: epochs before the run's own average starts.
            every: steps between iterates of the run's own average.
            per_epoch: steps in an epoch.
        """
        if self.every is not None:
            every = self.every * (per_epoch if self.unit == "epoch" else 1)
        return (start if self.start is None else self.start) * per_epoch, every

    def begin(
        self,
        model: nn.Module,
        recipe: Recipe | None,
        *,
        start: int,
        every: int,
        per_epoch: int,
        seed: int,
    ) -> WeightAverage:
        """The average, empty, of `model` with that recipe; the other arguments as of `when`."""
        start, every = self.when(start, every, per_epoch)
        return WeightAverage(
            model,
            start=start,
            every=every,
            kind=self.kind,
            accumulator=self._accumulator(recipe),
            seed=seed,
        )

    def _accumulator(self, recipe: Recipe | None) -> Accumulator:
        if self.precision == "exact":
            fmt = _weight_format(recipe)
            assert isinstance(fmt, FixedPoint)  # `check`
            return ExactSum(fmt)
        if isinstance(self.precision, torch.dtype):
            return self.precision
        assert isinstance(self.precision, Format)
        return Quantizer(self.precision, Stochastic())


def parse(text: str) -> AverageSetting:
    """The setting in a text of words ``key=value``.

    * ``every=20`` steps, or ``every=epoch``, ``every=2epochs``, from one iterate to the next;
    * ``start=10`` epochs before it starts;
    * ``decay=0.99``: exponential; ``window=5``: the mean of the last 5; else all weigh the same;
    * ``precision=float32`` (compensated), ``float64``, ``exact``, or a format such as ``bfp8``,
      in which the average itself is kept, rounded stochastically (the paper's Q_SWA).

    Raises:
        ValueError: it has another form; the text says which are allowed.
    """
    words: dict[str, str] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if not (equals and value) or key in words or key not in _KEYS:
            raise ValueError(f"average {text!r}: {word!r} is not one of {FORM}, each once")
        words[key] = value
    if not words:
        raise ValueError(f"an average is described by {FORM}")
    every, unit = None, "step"
    if "every" in words:
        match = re.fullmatch(r"(?:(\d+)|(\d*)epochs?)", words["every"])
        if match is None or int(match[1] or match[2] or 1) < 1:
            raise ValueError(f"average {text!r}: every is a number of steps, epoch or 2epochs")
        every, unit = int(match[1] or match[2] or 1), "step" if match[1] else "epoch"
    if "decay" in words and "window" in words:
        raise ValueError(f"average {text!r}: it has a decay or a window, not both")
    kind: Kind = Equal()
    if "decay" in words:
        kind = Exponential(_number(text, words, "decay", float))
    if "window" in words:
        kind = Window(int(_number(text, words, "window", int)))
        if "precision" in words:
            raise ValueError(f"average {text!r}: a window keeps iterates and has no precision")
    precision = _precision(text, words.get("precision", "float32"))
    if precision == "exact" and "decay" in words:
        raise ValueError(f"average {text!r}: an exponential average has no exact integer sum")
    canonical = " ".join(f"{key}={words[key]}" for key in _KEYS if key in words)
    start = int(_number(text, words, "start", int)) if "start" in words else None
    if start is not None and start < 0:
        raise ValueError(f"average {text!r}: start must be 0 or more epochs")
    return AverageSetting(canonical, start, every, unit, kind, precision)


_KEYS = ("start", "every", "decay", "window", "precision")


def _number(text: str, words: dict[str, str], key: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(words[key])
    except ValueError:
        raise ValueError(f"average {text!r}: {key}={words[key]} is no number") from None


def _precision(text: str, name: str) -> torch.dtype | Format | str:
    if name == "exact":
        return name
    if name in ("float32", "float64"):
        return torch.float32 if name == "float32" else torch.float64
    try:
        return parse_format(name)
    except ValueError as error:
        raise ValueError(
            f"average {text!r}: precision is float32, float64, exact or a format: {error}"
        ) from None


def _weight_format(recipe: Recipe | None) -> Format | None:
    return None if recipe is None or recipe.weight is None else recipe.weight.format


def held(average: WeightAverage) -> int:
    """How many iterates the average is made of: of a window no more than its length."""
    kind = average.kind
    return min(average.count, kind.length) if isinstance(kind, Window) else average.count
