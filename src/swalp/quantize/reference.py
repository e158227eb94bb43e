"""The definition: what quantizing means, in exact integer arithmetic. Slow, and the specification.

|x| is taken apart as m * 2**e with an integer m < 2**53. On a grid with gap 2**g, |x| / gap is
m / 2**k with k = g - e: floor and remainder are a shift and a mask, and every rule compares
integers. Nothing here rounds twice, overflows, or depends on the machine.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor

from swalp.formats import Binary, BlockFloat, FixedPoint, Format, Microscaling, Minifloat
from swalp.noise import fresh_seed, random_bits
from swalp.quantize.blocks import block_extents, block_max, spread
from swalp.rounding import (
    Nearest,
    Rounding,
    Stochastic,
    TowardNegative,
    TowardPositive,
    TowardZero,
)

_SIGNIFICAND = 53  # of float64
_LONGEST_SHIFT = 62  # of a non-negative int64
_NO_EXPONENT = -(1 << 20)  # stands for floor(log2(0)): below every exponent field


def quantize(x: Tensor, fmt: Format, rounding: Rounding) -> Tensor:
    """Round each element of `x` to a value of `fmt`; `swalp.quantize` checks the arguments.

    Args:
        x: float64, float32, bfloat16 or float16, any shape and memory layout.
        fmt: the format; its values must fit the dtype of `x`.
        rounding: the rule.

    Returns:
        A new tensor of the same shape, dtype and (if `x` is dense) strides.
    """
    if x.numel() == 0:
        return x.clone()
    wide = x.to(torch.float64)
    noise = _noise(x, rounding)
    match fmt:
        case FixedPoint():
            gap = torch.full(x.shape, -fmt.frac_bits, device=x.device)
            result = _fixed(wide, gap, _limits(wide, fmt), rounding, noise)
        case BlockFloat():
            shared = spread(shared_exponents(x, fmt), block_extents(fmt, x.shape))
            gap = shared - fmt.word_length + 2
            limits = _block_limits(wide, fmt, gap, x.dtype)
            result = _fixed(wide, gap, limits, rounding, noise)
        case Microscaling(element=element):
            shared = spread(shared_exponents(x, fmt), block_extents(fmt, x.shape))
            if isinstance(element, FixedPoint):
                gap = shared - element.frac_bits
                limits = _block_limits(wide, element, gap, x.dtype)
                result = _fixed(wide, gap, limits, rounding, noise)
            else:
                result = _minifloat(wide, element, shared, rounding, noise)
        case Minifloat():
            result = _minifloat(wide, fmt, torch.zeros_like(noise), rounding, noise)
        case Binary():
            result = _binary(wide, fmt, rounding, noise)
        case _:
            assert_never(fmt)
    result = torch.empty_like(x).copy_(torch.where(wide.isnan(), wide, result))
    # Too small for the dtype of `x` is 0, and integers have but one.
    return result.add_(0.0) if may_vanish(fmt, x.dtype) else result


def may_vanish(fmt: Format, dtype: torch.dtype) -> bool:
    """Whether integers times a gap may be too small for `dtype`: infinities in a block of zeros."""
    if not isinstance(fmt, BlockFloat | Microscaling):
        return False
    if isinstance(fmt, Microscaling) and not isinstance(fmt.element, FixedPoint):
        return False
    info = torch.finfo(dtype)
    return bool(2.0**fmt.min_exponent < info.smallest_normal * info.eps)


def shared_exponents(x: Tensor, fmt: BlockFloat | Microscaling) -> Tensor:
    """The exponent of each block, int64: of its elements' gap (`BlockFloat`) or of its scale.

    floor(log2(largest finite magnitude)), for `Microscaling` less the element's own exponent,
    clipped to the field; the lowest exponent for a block without a finite nonzero element.
    """
    magnitude, exponent = _integers(x.to(torch.float64))
    floor_log2 = exponent + (_SIGNIFICAND - 1)
    floor_log2 = torch.where(magnitude == 0, _NO_EXPONENT, floor_log2)
    largest = block_max(floor_log2, block_extents(fmt, x.shape))
    if isinstance(fmt, Microscaling):
        largest = largest - fmt.element_exponent
    return largest.clamp(fmt.min_exponent, fmt.max_exponent)


def in_range(x: Tensor, fmt: Format) -> Tensor:
    """Whether each element lies within the range of its own grid: bool, the shape of `x`."""
    if x.numel() == 0:
        return torch.ones_like(x, dtype=torch.bool)
    wide = x.to(torch.float64)
    match fmt:
        case FixedPoint():
            limit = _limits(wide, fmt).to(torch.float64) * fmt.gap
        case BlockFloat():
            shared = spread(shared_exponents(x, fmt), block_extents(fmt, x.shape))
            gap = shared - fmt.word_length + 2
            limit = scaled(_block_limits(wide, fmt, gap, x.dtype), gap)
        case Microscaling(element=element):
            shared = spread(shared_exponents(x, fmt), block_extents(fmt, x.shape))
            if isinstance(element, FixedPoint):
                gap = shared - element.frac_bits
                limit = scaled(_block_limits(wide, element, gap, x.dtype), gap)
            else:
                limit = _power_of_two(shared) * element.largest
        case Minifloat() | Binary():
            limit = torch.full_like(wide, fmt.largest)
            if isinstance(fmt, Minifloat) and not fmt.signed:
                limit = torch.where(wide < 0, -torch.inf, limit)
        case _:
            assert_never(fmt)
    return wide.abs() <= limit


def _integers(wide: Tensor) -> tuple[Tensor, Tensor]:
    """(m, e), int64, with |x| = m * 2**e and m in [2**52, 2**53); m = 0 if x is 0 or not finite."""
    fraction, exponent = torch.frexp(torch.where(wide.isfinite(), wide, 0.0).abs())
    magnitude = (fraction * 2.0**_SIGNIFICAND).to(torch.int64)
    return magnitude, exponent.to(torch.int64) - _SIGNIFICAND


def _noise(x: Tensor, rounding: Rounding) -> Tensor:
    """U of each element, int64; zeros if the rule needs none."""
    if not isinstance(rounding, Stochastic):
        return torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    seed = fresh_seed() if rounding.seed is None else rounding.seed
    noise = random_bits(
        x.numel(), rounding.random_bits, seed, rounding.step, rounding.call, x.device
    )
    return noise.reshape(x.shape)


def _steps(
    magnitude: Tensor,
    shift: Tensor,
    odd: Tensor | None,
    negative: Tensor,
    rounding: Rounding,
    noise: Tensor,
) -> Tensor:
    """M / 2**shift rounded to an integer; saturates at 2**62, above every limit.

    Args:
        magnitude: m, 0 or in [2**52, 2**53).
        shift: k, any integer.
        odd: whether the lower neighbour has an odd code; default: whether it is an odd integer.
        negative: whether the number has a minus sign, for the directed rules.
        rounding: the rule.
        noise: U, if the rule is stochastic.
    """
    # A shift of more than 62 only ever leaves a remainder, and is compared with integers: rounding
    # the remainder up to a multiple of what is shifted out changes no comparison.
    excess = (shift - _LONGEST_SHIFT).clamp(0, _LONGEST_SHIFT)
    magnitude = (magnitude + (1 << excess) - 1) >> excess
    right = shift.clamp(0, _LONGEST_SHIFT)
    left = (-shift).clamp(0, _LONGEST_SHIFT - _SIGNIFICAND)
    whole = (magnitude >> right) << left
    remainder = magnitude & ((1 << right) - 1)
    match rounding:
        case Nearest():
            odd = whole & 1 == 1 if odd is None else odd
            half = (1 << right) >> 1
            up = (remainder > half) | ((remainder == half) & odd)
        case TowardZero():
            up = torch.zeros_like(negative)
        case TowardPositive():
            up = ~negative
        case TowardNegative():
            up = negative
        case Stochastic(random_bits=bits):
            # U + 1/2 < 2**bits * remainder / 2**right, both sides times 2**(right + 1) or 2.
            scale = right - bits - 1
            threshold = torch.where(
                scale >= 0,
                (2 * noise + 1) << scale.clamp(min=0),
                2 * noise + 1,
            )
            up = threshold < remainder << (-scale).clamp(min=0)
        case _:
            assert_never(rounding)
    return whole + (up & (remainder > 0)).to(torch.int64)


def _limits(wide: Tensor, fmt: FixedPoint | BlockFloat) -> Tensor:
    """The largest magnitude of each element's sign, as an integer."""
    return torch.where(wide < 0, -fmt.min_integer, fmt.max_integer)


def _block_limits(
    wide: Tensor, fmt: FixedPoint | BlockFloat, gap: Tensor, carrier: torch.dtype
) -> Tensor:
    """The limits in a block: symmetric where the carrier cannot hold -2**(W-1) gaps."""
    too_large = gap + fmt.word_length - 1 > _max_exponent(carrier)
    limits = _limits(wide, fmt)
    return limits.clamp(max=fmt.max_integer).where(too_large, limits)


def _fixed(wide: Tensor, gap: Tensor, limits: Tensor, rounding: Rounding, noise: Tensor) -> Tensor:
    """Onto integers times 2**gap, clamped to `limits`."""
    magnitude, exponent = _integers(wide)
    negative = wide < 0
    steps = _steps(magnitude, gap - exponent, None, negative, rounding, noise)
    steps = torch.where(wide.isinf(), limits, torch.minimum(steps, limits))
    return scaled(torch.where(negative, -steps, steps), gap)


def _minifloat(
    wide: Tensor, fmt: Minifloat, shared: Tensor, rounding: Rounding, noise: Tensor
) -> Tensor:
    """Onto the values of `fmt` times 2**shared."""
    negative = wide.signbit()
    magnitude, exponent = _integers(wide)
    floor_log2 = exponent + (_SIGNIFICAND - 1) - shared
    lowest = fmt.min_exponent - (fmt.mantissa_bits if fmt.subnormals else 0)
    gap = torch.where(floor_log2 >= fmt.min_exponent, floor_log2 - fmt.mantissa_bits, lowest)
    odd = None
    if fmt.mantissa_bits == 0:  # neighbours are exponent fields, not integers
        assert fmt.bias is not None  # resolved at birth
        odd = (floor_log2 >= fmt.min_exponent) & ((floor_log2 + fmt.bias) & 1 == 1)
    steps = _steps(magnitude, gap + shared - exponent, odd, negative, rounding, noise)

    too_large = scaled(steps, gap) > fmt.largest
    value = torch.where(too_large | wide.isinf(), fmt.largest, scaled(steps, gap))
    if not fmt.saturating:
        beyond = torch.inf if fmt.specials == "ieee" else torch.nan
        truncates = {
            TowardZero: torch.ones_like(negative),
            TowardPositive: negative,
            TowardNegative: ~negative,
        }.get(type(rounding), torch.zeros_like(negative))
        value = torch.where((too_large & ~truncates) | wide.isinf(), beyond, value)
    if not fmt.has_zero:
        value = value.clamp(min=fmt.smallest)
    if not fmt.signed:
        return torch.where(wide < 0, torch.nan, value)
    if fmt.specials == "fnuz":  # its -0 is NaN
        negative = negative & (value != 0)
    value = torch.where(negative, -value, value)
    return value * _power_of_two(shared)


def _binary(wide: Tensor, fmt: Binary, rounding: Rounding, noise: Tensor) -> Tensor:
    """Onto ±2**-frac_bits."""
    magnitude, exponent = _integers(wide)
    negative = wide < 0
    beyond = wide.abs() >= fmt.largest
    match rounding:
        case Nearest():
            flip = torch.zeros_like(negative)
        case TowardPositive():
            flip = negative
        case TowardNegative():
            flip = ~negative
        case Stochastic(random_bits=bits):
            # With s = |x| / scale = m / 2**k the sign flips if U + 1/2 < 2**bits * (1 - s) / 2.
            # With V = 2**(bits - 1) - 1 - U, an integer: if m < (2 * V + 1) * 2**(k - bits). A
            # longer shift than int64 allows is taken off m instead: that changes no comparison.
            margin = (1 << bits) - 2 * noise - 1  # 2 * V + 1
            shift = -fmt.frac_bits - exponent - bits
            longest = _LONGEST_SHIFT - bits
            excess = (shift - longest).clamp(0, _LONGEST_SHIFT)
            flip = magnitude >> excess < margin << shift.clamp(0, longest)
        case TowardZero():
            raise ValueError(
                "binary has no zero to round toward; use Nearest() or Stochastic(seed)"
            )
        case _:
            assert_never(rounding)
    negative = negative ^ (flip & ~beyond)
    return torch.where(negative, -fmt.largest, torch.full_like(wide, fmt.largest))


def _max_exponent(dtype: torch.dtype) -> int:
    """Exponent of the largest number of a carrier."""
    return math.frexp(torch.finfo(dtype).max)[1] - 1


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent, float64, for exponents in [-1022, 1023], by its bits."""
    return ((exponent + 1023) << 52).view(torch.float64)


def scaled(steps: Tensor, gap: Tensor) -> Tensor:
    """Steps * 2**gap, float64. In two factors, as 2**gap alone may not be a float64."""
    first = gap.clamp(-1000, 1000)
    return steps.to(torch.float64) * _power_of_two(first) * _power_of_two(gap - first)
