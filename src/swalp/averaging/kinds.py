"""Which average of the iterates, kept in what: a small family of frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch

from swalp._validation import require_int
from swalp.formats import FixedPoint
from swalp.recipes import Quantizer


@dataclass(frozen=True, slots=True)
class Equal:
    """The mean of all iterates taken (SWA, SWALP)."""


@dataclass(frozen=True, slots=True)
class Exponential:
    """decay * average + (1 - decay) * iterate, starting from the first iterate taken."""

    decay: float

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"Exponential: decay={self.decay} must lie between 0 and 1")


@dataclass(frozen=True, slots=True)
class Window:
    """The mean of the last `length` iterates taken, which are all kept, as they are."""

    length: int

    def __post_init__(self) -> None:
        require_int("Window", "length", self.length, 1, 2**31, "it counts iterates")


Kind = Equal | Exponential | Window


@dataclass(frozen=True, slots=True)
class ExactSum:
    """Integer sums of fixed-point weights: the average is the rational mean, rounded once.

    int64 holds `most` iterates, 2**64 / 2**word_length.
    """

    format: FixedPoint

    def __post_init__(self) -> None:
        if not isinstance(self.format, FixedPoint):
            raise TypeError(
                f"ExactSum: format must be the FixedPoint of the weights, not {self.format!r}; "
                f"for other formats use torch.float64"
            )

    @property
    def most(self) -> int:
        """Iterates whose sums surely fit 64 bits."""
        return (2**63 - 1) // -self.format.min_integer


Accumulator = torch.dtype | ExactSum | Quantizer


def check(kind: Kind, accumulator: Accumulator) -> None:
    """Raise TypeError for what is no kind, ValueError for a combination that makes no sense."""
    if not isinstance(kind, Kind):
        raise TypeError(
            f"WeightAverage: kind={kind!r} must be Equal(), Exponential(decay) or Window(length)"
        )
    if accumulator not in (torch.float32, torch.float64) and not isinstance(
        accumulator, ExactSum | Quantizer
    ):
        raise ValueError(
            f"WeightAverage: accumulator={accumulator!r} must be torch.float32, torch.float64, "
            f"ExactSum(format) or Quantizer(format, rounding); a short float would stop moving"
        )
    match kind:
        case Equal():
            return
        case Exponential():
            if isinstance(accumulator, ExactSum):
                raise ValueError("WeightAverage: an Exponential average has no exact integer sum")
        case Window():
            if isinstance(accumulator, ExactSum | Quantizer):
                raise ValueError(
                    "WeightAverage: a Window keeps the iterates themselves and averages them in "
                    "float64; leave accumulator out"
                )
        case _:
            assert_never(kind)


def describe(kind: Kind, accumulator: Accumulator) -> str:
    """Both in words that stay the same from version to version, as a saved average has them."""
    match accumulator:
        case ExactSum(fmt):
            kept = f"ExactSum({fmt})"
        case Quantizer(fmt, rounding):
            kept = f"Quantizer({fmt}, {rounding})"
        case _:
            kept = str(accumulator)
    match kind:
        case Equal():
            return f"Equal() in {kept}"
        case Exponential(decay):
            return f"Exponential({float(decay)}) in {kept}"
        case Window(length):
            return f"Window({length})"
        case _:
            assert_never(kind)
