"""Taking one parameter of an iterate into an average: what is kept of it, and how it moves."""

from __future__ import annotations

import torch
from torch import Tensor

from swalp.averaging import kernel
from swalp.averaging.kinds import Accumulator, ExactSum, Kind, Window
from swalp.formats import FixedPoint
from swalp.packed import PackedTensor, pack
from swalp.quantize import check as check_quantize
from swalp.quantize import quantize
from swalp.quantize.codes import holds_nan
from swalp.recipes import Quantizer, fit
from swalp.rounding import Stochastic

State = dict[str, Tensor]


class NotTakenError(ValueError):
    """An iterate cannot be taken, and nothing has been."""


_PART = 1 << 18  # numbers looked at at a time: they stay in the cache


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


def empty(
    parameter: Tensor, kind: Kind, accumulator: Accumulator, device: torch.device | None
) -> State:
    """What is kept of a parameter, before anything is taken."""

    def zeros(dtype: torch.dtype) -> Tensor:
        like = parameter._element_codes() if isinstance(parameter, PackedTensor) else parameter
        return torch.zeros_like(like, dtype=dtype, device=device or parameter.device)

    if isinstance(accumulator, Quantizer):  # what it cannot do is told now, not at `start`
        fmt = fit(accumulator.format, parameter.shape)
        check_quantize(zeros(torch.float32), fmt, accumulator.rounding)
    match kind, accumulator:
        case Window(length), _:
            if isinstance(parameter, PackedTensor):
                slot = parameter.to(device) if device is not None else parameter
                return {str(number): slot.clone() for number in range(length)}
            return {str(number): zeros(parameter.dtype) for number in range(length)}
        case _, ExactSum():
            return {"sum": zeros(torch.int64)}
        case _, Quantizer(fmt, _) if fmt.bits <= 16:
            return {"average": pack(zeros(torch.float32), fit(fmt, parameter.shape))}
        case _, torch.float32:
            return {"average": zeros(torch.float32), "residual": zeros(torch.float32)}
        case _, torch.float64:
            return {"average": zeros(torch.float64)}
        case _:
            return {"average": zeros(torch.float32)}


def check(parameter: Tensor, accumulator: Accumulator, name: str) -> None:
    """Raise where `take` could not take a parameter, so that nothing need have been taken.

    Raises:
        ValueError: an exact sum was asked for, and the parameter is not on the grid; or a format
            without a code for NaN, and it has one.
    """
    match accumulator:
        case ExactSum(fmt) if not _on_grid(parameter, fmt):
            raise NotTakenError(
                f"WeightAverage: {name} is not on the grid of {fmt}, or beyond its range, so its "
                f"sum would not be exact; give ExactSum the format of the weights, or average in "
                f"torch.float64"
            )
        case Quantizer(fmt, _) if fmt.bits <= 16 and not holds_nan(fmt) and _has_nan(parameter):
            raise NotTakenError(
                f"WeightAverage: {name} has a NaN, and {fmt} no code for it; average in "
                f"torch.float32, or in a format that has one"
            )


def take(
    state: State,
    parameter: Tensor,
    kind: Kind,
    accumulator: Accumulator,
    *,
    weight: float,
    count: int,
    seed: int,
    name: str,
    threads: int,
) -> None:
    """Take a parameter into what is kept of it.

    Args:
        state: as `empty` made it; changed in place.
        parameter: of the iterate, packed or not, on any device; such as `check` allows.
        kind: of the average.
        accumulator: what it is kept in.
        weight: of the iterate; not used by a window or a sum.
        count: iterates taken before.
        seed: of the run, for a stochastic accumulator.
        name: of the parameter.
        threads: of the compiled pass.
    """
    if isinstance(kind, Window):
        state[str(count % kind.length)].copy_(parameter)
        return
    if isinstance(accumulator, Quantizer):
        _take_rounded(state, parameter, accumulator, weight, count, seed, name, threads)
        return
    if kernel.take(state, parameter, accumulator, weight, threads):
        return
    if isinstance(accumulator, ExactSum):
        integers = (_floats(parameter).to(torch.float64) / accumulator.format.gap).to(torch.int64)
        state["sum"] += integers.to(state["sum"].device)
        return
    average = state["average"]
    values = _floats(parameter).to(average)
    if accumulator == torch.float64:
        average.copy_(moving_mean(average, values, weight))
    else:
        compensated_mean(average, state["residual"], values, weight)


def value(state: State, kind: Kind, accumulator: Accumulator, count: int) -> Tensor:
    """The average that is kept: float64, or float32 where that is what is kept."""
    if isinstance(kind, Window):
        kept = [state[str(slot)] for slot in range(min(count, kind.length))]
        return torch.stack([each.to(torch.float64) for each in kept]).mean(0)
    if isinstance(accumulator, ExactSum):
        return _quotient(state["sum"], count) * accumulator.format.gap
    return _floats(state["average"]).clone()


def _quotient(total: Tensor, count: int) -> Tensor:
    """Integers divided by a count: the nearest float64."""
    if bool((total.abs() <= 1 << 53).all()):  # float64 holds them
        return total.to(torch.float64) / count
    exact = [each / count for each in total.flatten().tolist()]
    return torch.tensor(exact, dtype=torch.float64, device=total.device).view(total.shape)


def _take_rounded(
    state: State,
    parameter: Tensor,
    accumulator: Quantizer,
    weight: float,
    count: int,
    seed: int,
    name: str,
    threads: int,
) -> None:
    """Q_SWA: the moved average, rounded to its format."""
    average = state["average"]
    rounding = accumulator.rounding
    if isinstance(rounding, Stochastic):
        rounding = rounding.seeded(seed).stream("average", name).at(count)
    if isinstance(average, PackedTensor) and kernel.take_rounded(
        average, parameter, rounding, weight, threads
    ):
        return
    moved = _floats(average)
    if not kernel.take({"average": moved}, parameter, torch.float32, weight, threads):
        moved.copy_(moving_mean(moved, _floats(parameter).to(moved), weight))
    fmt = fit(accumulator.format, moved.shape)
    if isinstance(average, PackedTensor):
        average.copy_(pack(moved, fmt, rounding))
    else:
        quantize(moved, fmt, rounding, out=average)


def _floats(x: Tensor) -> Tensor:
    return x.dequantize() if isinstance(x, PackedTensor) else x


def _has_nan(x: Tensor) -> bool:
    if isinstance(x, PackedTensor):
        return x.has_nan()
    return x.numel() > 0 and bool(x.min().isnan())  # the least of numbers with a NaN is NaN


def _on_grid(x: Tensor, fmt: FixedPoint) -> bool:
    """Whether all numbers are values of `fmt`."""
    if isinstance(x, PackedTensor) and x.format == fmt:
        return not x.has_nan()
    for part in torch.split(_floats(x).reshape(-1), _PART):
        scaled = part.to(torch.float64) / fmt.gap
        if not torch.equal(scaled.round().clamp(fmt.min_integer, fmt.max_integer), scaled):
            return False
    return True
