"""What rounding does to a tensor: its error, relative and in gaps, saturation and underflow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from swalp.formats import Binary, BlockFloat, FixedPoint, Format, Microscaling, Minifloat
from swalp.quantize import reference
from swalp.quantize.blocks import block_extents, spread


@dataclass(frozen=True, slots=True)
class RoundingError:
    """How far the elements of a tensor moved when they were rounded; shares lie in [0, 1].

    Attributes:
        elements: that are finite; all else is of these.
        relative: root of the sum of squared errors, over that of the squared numbers; 0 for zeros.
        in_gaps: root mean square of the error over the gap of the element's own grid. Numbers
            spread evenly between two neighbours have 1/sqrt(12) = 0.29 to nearest and 1/sqrt(6) =
            0.41 stochastically; more tells of saturation.
        saturated: share beyond the range of its own grid.
        underflowed: share of the numbers other than 0 that became 0.
        smallest_gap: of the grids of numbers other than 0; 0 if there are none.
        largest_gap: likewise.
    """

    elements: int
    relative: float
    in_gaps: float
    saturated: float
    underflowed: float
    smallest_gap: float
    largest_gap: float


def rounding_error(x: Tensor, rounded: Tensor, fmt: Format) -> RoundingError:
    """Compare `x` with what it was rounded to.

    Args:
        x: what was rounded: floats, any shape.
        rounded: ``quantize(x, fmt, rule)``, by whatever rule.
        fmt: the format; block formats find their exponents in `x`.
    """
    x = x.detach()
    exact, values = x.to(torch.float64), rounded.detach().to(torch.float64)
    finite = exact.isfinite() & values.isfinite()
    gap = gaps(x, fmt)[finite]
    within = reference.in_range(x, fmt)[finite]
    exact, values = exact[finite], values[finite]
    # Powers of two, so that no square leaves float64: they change no other digit.
    largest = exact.abs().amax().item() if exact.numel() else 0.0
    unit = torch.tensor(-math.frexp(largest)[1], dtype=torch.int64, device="cpu")
    error = values - exact
    norm = reference.scaled(exact, unit).norm().item()
    nonzero = exact != 0
    seen = gap[nonzero]
    return RoundingError(
        elements=exact.numel(),
        relative=reference.scaled(error, unit).norm().item() / norm if norm else 0.0,
        in_gaps=_root_mean_square(error / gap),
        saturated=_share((~within).to(torch.float64)),
        underflowed=_share((values[nonzero] == 0).to(torch.float64)),
        smallest_gap=seen.min().item() if seen.numel() else 0.0,
        largest_gap=seen.max().item() if seen.numel() else 0.0,
    )


def gaps(x: Tensor, fmt: Format) -> Tensor:
    """The distance between the two values of `fmt` around each element: float64, like `x`.

    Beyond the largest magnitude it is that of the grid as it would go on.
    """
    if x.numel() == 0:
        return torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    match fmt:
        case FixedPoint():
            return torch.full(x.shape, fmt.gap, dtype=torch.float64, device=x.device)
        case BlockFloat():
            return _power(_shared(x, fmt) - fmt.word_length + 2)
        case Microscaling(element=element):
            shared = _shared(x, fmt)
            if isinstance(element, FixedPoint):
                return _power(shared - element.frac_bits)
            return _power(_minifloat_gap(x, element, shared))
        case Minifloat():
            return _power(
                _minifloat_gap(x, fmt, torch.zeros(x.shape, dtype=torch.int64, device=x.device))
            )
        case Binary():
            return torch.full(x.shape, 2 * fmt.largest, dtype=torch.float64, device=x.device)
        case _:
            assert_never(fmt)


def _shared(x: Tensor, fmt: BlockFloat | Microscaling) -> Tensor:
    return spread(reference.shared_exponents(x, fmt), block_extents(fmt, x.shape))


def _minifloat_gap(x: Tensor, fmt: Minifloat, shared: Tensor) -> Tensor:
    magnitude = x.to(torch.float64).abs()
    exponent = torch.frexp(torch.where(magnitude.isfinite(), magnitude, 0.0))[1] - 1 - shared
    lowest = fmt.min_exponent - (fmt.mantissa_bits if fmt.subnormals else 0)
    normal = exponent.clamp(max=fmt.max_exponent) - fmt.mantissa_bits
    return torch.where(exponent >= fmt.min_exponent, normal, lowest) + shared


def _power(exponent: Tensor) -> Tensor:
    return reference.scaled(torch.ones_like(exponent), exponent)


def _root_mean_square(values: Tensor) -> float:
    largest = values.abs().amax().item() if values.numel() else 0.0
    if not 0.0 < largest < math.inf:
        return largest
    exponent = math.frexp(largest)[1]
    unit = torch.tensor(-exponent, dtype=torch.int64, device="cpu")
    return math.ldexp(_share(reference.scaled(values, unit).square()) ** 0.5, exponent)


def _share(values: Tensor) -> float:
    return values.mean().item() if values.numel() else 0.0
