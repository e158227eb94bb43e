"""The average of the iterates: the product of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from swalp._validation import require_int
from swalp.convert import to_float
from swalp.formats import FixedPoint
from swalp.packed import PackedTensor
from swalp.quantize import quantize
from swalp.recipes import Quantizer, fit
from swalp.rounding import Stochastic


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
    """The mean of the last `length` iterates taken, which are all kept."""

    length: int

    def __post_init__(self) -> None:
        require_int("Window", "length", self.length, 1, 2**31, "it counts iterates")


Kind = Equal | Exponential | Window


@dataclass(frozen=True, slots=True)
class ExactSum:
    """Integer sums of fixed-point weights: the average is the rational mean, rounded once.

    int64 holds 2**63 / 2**word_length iterates.
    """

    format: FixedPoint

    def __post_init__(self) -> None:
        if not isinstance(self.format, FixedPoint):
            raise TypeError(
                f"ExactSum: format must be the FixedPoint of the weights, not {self.format!r}; "
                f"for other formats use torch.float64"
            )


Accumulator = torch.dtype | ExactSum | Quantizer


class WeightAverage:
    """An average of a model's parameters over its training.

    Call `update_parameters` once a step (or once an epoch: `start` and `every` count the calls).
    With t counting the calls, the parameters are taken when t > `start` and (t - start) is a
    multiple of `every`. Several averages of one run are several `WeightAverage`s.

    Args:
        model: the network to be averaged: converted or float, packed or not.
        start: S, calls before averaging starts.
        every: c, calls from one iterate taken to the next.
        kind: `Equal()`, `Exponential(decay)` or `Window(length)`.
        accumulator: what the average is kept in.

            * torch.float64: running mean;
            * torch.float32: running mean with a second float32 that collects what rounding loses,
              so that 10**6 iterates are averaged to within 2 units in the last place;
            * ``ExactSum(format)``: for fixed-point weights, integer sums;
            * ``Quantizer(format, rounding)``: the paper's Q_SWA: each update is rounded to a
              low-precision format. A stochastic rule gets streams of its own from `seed`.
        device: where the average lives; default: with the parameters.
        seed: the run's seed, for a stochastic `accumulator`.

    Source: Yang et al. 2019 (arXiv:1904.11943), Algorithms 1 and 2.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        start: int = 0,
        every: int = 1,
        kind: Kind = Equal(),
        accumulator: Accumulator = torch.float32,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        require_int("WeightAverage", "start", start, 0, 2**62, "it counts calls")
        require_int("WeightAverage", "every", every, 1, 2**62, "it counts calls")
        _check(kind, accumulator)
        self.start = start
        self.every = every
        self.kind = kind
        self.accumulator = accumulator
        self.steps = 0
        self.count = 0
        self._seed = seed
        self._module = to_float(model).requires_grad_(False)
        if device is not None:
            self._module.to(device)
        self._state = {
            name: self._empty(parameter) for name, parameter in self._module.named_parameters()
        }
        self._stale = True

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Count a call, and take `model`'s parameters into the average if it is time."""
        self.steps += 1
        elapsed = self.steps - self.start
        if elapsed <= 0 or elapsed % self.every:
            return
        for name, parameter in model.named_parameters():
            self._take(name, parameter.detach())
        for own, buffer in zip(self._module.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)
        self.count += 1
        self._stale = True

    @property
    def module(self) -> nn.Module:
        """A float network with the averaged parameters and the latest buffers.

        It is one and the same network, brought up to date at each access. Batch-norm statistics are
        those of the last iterate: run `recompute_batchnorm` on it before using it; they stay until
        the next iterate is taken.

        Raises:
            RuntimeError: nothing has been averaged yet.
        """
        if self.count == 0:
            raise RuntimeError(
                f"WeightAverage: no average after {self.steps} steps; it starts after step "
                f"{self.start} and takes every {self.every}th"
            )
        if self._stale:
            with torch.no_grad():
                for name, parameter in self._module.named_parameters():
                    parameter.copy_(self.value(name))
            self._stale = False
        return self._module

    def value(self, name: str) -> Tensor:
        """The average of one parameter: float64, or float32 where that is what is kept."""
        state = self._state[name]
        if isinstance(self.kind, Window):
            kept = [state[str(slot)] for slot in range(min(self.count, self.kind.length))]
            return torch.stack([value.to(torch.float64) for value in kept]).mean(0)
        if isinstance(self.accumulator, ExactSum):
            return state["sum"].to(torch.float64) / self.count * self.accumulator.format.gap
        return state["average"].clone()

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """`model` with the averaged parameters, inside a ``with`` block; afterwards its own again.

        The averages stand there as floats, whatever the parameters are; a converted model goes on
        quantizing its activations. Buffers changed inside, such as recomputed batch-norm
        statistics, are put back too.
        """
        averaged = dict(self.module.named_parameters())
        slots = [
            (module._parameters, key, parameter, averaged[f"{prefix}.{key}".lstrip(".")])
            for prefix, module in model.named_modules()
            for key, parameter in module._parameters.items()
            if parameter is not None and f"{prefix}.{key}".lstrip(".") in averaged
        ]
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            for parameters, key, own, average in slots:
                value = average.to(own.device, own.dtype, copy=True)
                parameters[key] = nn.Parameter(value, requires_grad=False)
            yield
        finally:
            for parameters, key, own, _ in slots:
                parameters[key] = own
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    @property
    def nbytes(self) -> int:
        """Bytes that the average keeps beside the network, of which it has one copy."""
        return sum(value.nbytes for state in self._state.values() for value in state.values())

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: counts, what is kept of each parameter, the buffers."""
        return {
            "steps": self.steps,
            "count": self.count,
            "average": {
                name: {key: value.clone() for key, value in state.items()}
                for name, state in self._state.items()
            },
            "buffers": {name: value.clone() for name, value in self._module.named_buffers()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it belongs to another network, or to another kind of average.
        """
        mine, theirs = _shapes(self._state), _shapes(state["average"])
        if mine != theirs:
            different = sorted(
                name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)
            )
            raise ValueError(
                f"WeightAverage: the saved average is of another network or kind; what differs: "
                f"{', '.join(different[:5])}"
            )
        self.steps, self.count = state["steps"], state["count"]
        for name, kept in self._state.items():
            for key, value in kept.items():
                value.copy_(state["average"][name][key])
        for name, buffer in self._module.named_buffers():
            buffer.copy_(state["buffers"][name])
        self._stale = True

    def _empty(self, parameter: Tensor) -> dict[str, Tensor]:
        """What is kept of a parameter, before anything is taken."""
        match self.kind, self.accumulator:
            case Window(length), _:
                return {str(slot): torch.zeros_like(parameter) for slot in range(length)}
            case _, ExactSum():
                return {"sum": torch.zeros_like(parameter, dtype=torch.int64)}
            case _, torch.float32:
                zeros = torch.zeros_like(parameter, dtype=torch.float32)
                return {"average": zeros, "residual": zeros.clone()}
            case _, torch.float64:
                return {"average": torch.zeros_like(parameter, dtype=torch.float64)}
            case _:
                return {"average": torch.zeros_like(parameter, dtype=torch.float32)}

    def _take(self, name: str, parameter: Tensor) -> None:
        """Take one parameter of the current iterate."""
        state = self._state[name]
        if isinstance(self.kind, Window):
            state[str(self.count % self.kind.length)].copy_(parameter)
            return
        if isinstance(parameter, PackedTensor):
            parameter = parameter.dequantize()
        match self.accumulator:
            case ExactSum(fmt):
                state["sum"] += _integers(parameter, fmt, name).to(state["sum"].device)
            case Quantizer(fmt, rounding):
                moved = moving_mean(state["average"], parameter, self._weight())
                if isinstance(rounding, Stochastic):
                    rounding = rounding.seeded(self._seed).stream("average", name).at(self.count)
                quantize(moved, fit(fmt, moved.shape), rounding, out=state["average"])
            case torch.float64:
                state["average"].copy_(
                    moving_mean(state["average"], parameter.to(state["average"]), self._weight())
                )
            case _:
                compensated_mean(
                    state["average"],
                    state["residual"],
                    parameter.to(state["average"]),
                    self._weight(),
                )

    def _weight(self) -> float:
        """The weight of the next iterate."""
        if isinstance(self.kind, Exponential) and self.count > 0:
            return 1 - self.kind.decay
        return 1 / (self.count + 1)


def moving_mean(average: Tensor, iterate: Tensor, weight: float) -> Tensor:
    """Return average + weight * (iterate - average), in the dtype of `average`."""
    return average + (iterate.to(average) - average) * weight


def compensated_mean(average: Tensor, residual: Tensor, iterate: Tensor, weight: float) -> None:
    """`moving_mean` in place, on the unevaluated sum `average` + `residual`.

    What the addition to `average` rounds away is kept in `residual` (Fast2Sum), so that increments
    far below a unit in the last place add up.

    Source: Kahan 1965, "Further remarks on reducing truncation errors"; Dekker 1971.
    """
    increment = (iterate - average - residual) * weight + residual
    total = average + increment
    # Exact where |average| >= |increment|; elsewhere, as at the first iterate, off by a rounding.
    residual.copy_(increment - (total - average))
    average.copy_(total)


def _integers(parameter: Tensor, fmt: FixedPoint, name: str) -> Tensor:
    """The integers of a parameter on the grid of `fmt`, int64."""
    scaled = parameter.to(torch.float64) / fmt.gap
    integers = scaled.to(torch.int64)
    if not torch.equal(integers.to(torch.float64), scaled):
        raise ValueError(
            f"WeightAverage: {name} is not on the grid of {fmt}, so its sum would not be exact; "
            f"give ExactSum the format of the weights, or average in torch.float64"
        )
    return integers


def _check(kind: Kind, accumulator: Accumulator) -> None:
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


def _shapes(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    return {
        name: {key: (value.shape, value.dtype) for key, value in kept.items()}
        for name, kept in state.items()
    }
