"""What quantizing means, written a second time: exact fractions, Python integers, no vectors.

It shares nothing with the library but the fields of the formats and rules. A minifloat is the list
of its codes, found by bisection; an exponent is found by comparing with powers of two; Philox is
Python integers. Slow, and meant for a few dozen numbers at a time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from fractions import Fraction
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from swalp import (
    Binary,
    BlockFloat,
    FixedPoint,
    Microscaling,
    Minifloat,
    Nearest,
    Stochastic,
    TowardNegative,
    TowardPositive,
    TowardZero,
)

HALF = Fraction(1, 2)


def quantize(x: Tensor, fmt, rounding) -> Tensor:
    """`swalp.quantize(x, fmt, rounding)`, element by element."""
    numbers = x.to(torch.float64).reshape(-1).tolist()
    draws = [uniform(rounding, index) for index in range(len(numbers))]
    if isinstance(fmt, FixedPoint):
        results = [
            on_integers(v, power(-fmt.frac_bits), fmt.word_length, fmt.symmetric, rounding, u)
            for v, u in zip(numbers, draws, strict=True)
        ]
    elif isinstance(fmt, Minifloat):
        results = [on_codes(v, fmt, rounding, u) for v, u in zip(numbers, draws, strict=True)]
    elif isinstance(fmt, Binary):
        results = [on_signs(v, fmt, rounding, u) for v, u in zip(numbers, draws, strict=True)]
    else:
        results = [0.0] * len(numbers)
        for members in blocks(x.shape, fmt):
            one = in_block(fmt, [numbers[i] for i in members], [draws[i] for i in members],
                           rounding, x.dtype)  # fmt: skip
            for index, result in zip(members, one, strict=True):
                results[index] = result
    return torch.tensor(results, dtype=torch.float64).reshape(x.shape).to(x.dtype)


def in_block(fmt, numbers, draws, rounding, carrier):
    """The elements of one block."""
    largest = max((abs(Fraction(v)) for v in numbers if math.isfinite(v)), default=Fraction(0))
    if isinstance(fmt, BlockFloat):
        half_field = 2 ** (fmt.exponent_bits - 1)
        shared = -half_field
        if largest:
            shared = min(max(floor_log2(largest), -half_field), half_field - 1)
        gap, word, symmetric = power(shared - (fmt.word_length - 2)), fmt.word_length, fmt.symmetric
    else:
        element = fmt.element
        scale = -127
        if largest:
            top = floor_log2(Fraction(largest_element(element)))
            scale = min(max(floor_log2(largest) - top, -127), 127)
        if isinstance(element, Minifloat):
            unit = power(scale)
            return [
                on_codes(v, element, rounding, u, unit) for v, u in zip(numbers, draws, strict=True)
            ]
        gap = power(scale) * power(-element.frac_bits)
        word, symmetric = element.word_length, element.symmetric
    # Where the carrier cannot hold the lowest two's-complement number, the clamp is symmetric.
    symmetric = symmetric or gap * 2 ** (word - 1) > Fraction(torch.finfo(carrier).max)
    return [
        on_integers(v, gap, word, symmetric, rounding, u)
        for v, u in zip(numbers, draws, strict=True)
    ]


def on_integers(v: float, gap: Fraction, word: int, symmetric: bool, rounding, u) -> float:
    """`v` on the `word`-bit integers times `gap`."""
    if math.isnan(v):
        return v
    top = 2 ** (word - 1) - 1
    bottom = -top if symmetric else -top - 1
    if math.isinf(v):
        return float((top if v > 0 else bottom) * gap)
    exact = Fraction(v) / gap
    below = abs(exact).numerator // abs(exact).denominator
    up = chooses_upper(abs(exact) - below, v < 0, below % 2 == 1, rounding, u)
    magnitude = below + up
    integer = -magnitude if v < 0 else magnitude
    return float(min(max(integer, bottom), top) * gap)


def on_codes(v: float, fmt: Minifloat, rounding, u, unit: Fraction = Fraction(1)) -> float:
    """`v` on the values of `fmt` times `unit`."""
    if math.isnan(v) or (v < 0 and not fmt.signed):
        return math.nan
    negative = math.copysign(1.0, v) < 0 and fmt.signed
    sign = -1.0 if negative else 1.0
    magnitudes = finite_magnitudes(fmt)
    overflow = math.inf if fmt.specials == "ieee" else math.nan
    if math.isinf(v):
        return sign * (float(magnitudes[-1][0] * unit) if fmt.saturating else overflow)
    magnitude = abs(Fraction(v)) / unit
    values, codes = magnitudes_and_the_next(fmt)
    if magnitude >= values[-1]:
        index, share = len(values) - 1, Fraction(0)
        inward = TowardPositive if negative else TowardNegative
        if isinstance(rounding, TowardZero | inward):
            index -= 1
    elif magnitude < values[0]:  # no zero to fall to
        index, share = 0, Fraction(0)
    else:
        index = bisect_right(values, magnitude) - 1
        share = (magnitude - values[index]) / (values[index + 1] - values[index])
    index += chooses_upper(share, negative, codes[index] % 2 == 1, rounding, u)
    if index == len(values) - 1:
        if not fmt.saturating:
            return sign * overflow
        index -= 1
    result = float(values[index] * unit)
    return 0.0 if result == 0 and fmt.specials == "fnuz" else sign * result


def on_signs(v: float, fmt: Binary, rounding, u) -> float:
    """`v` on plus and minus 2**-frac_bits."""
    scale = 2.0**-fmt.frac_bits
    if math.isnan(v):
        return v
    if abs(v) >= scale:
        return math.copysign(scale, v)
    position = abs(Fraction(v)) / Fraction(scale)
    if isinstance(rounding, Stochastic):
        away = v < 0
        draws = 2**rounding.random_bits
        crosses = u + HALF < draws * (1 - position) / 2
        return -scale if away != crosses else scale
    if isinstance(rounding, TowardPositive):
        return scale
    if isinstance(rounding, TowardNegative):
        return -scale
    return -scale if v < 0 else scale


def chooses_upper(share: Fraction, negative: bool, lower_is_odd: bool, rounding, u) -> bool:
    """Whether a magnitude that lies `share` of the way between two neighbours goes to the upper."""
    if share == 0:
        return False
    if isinstance(rounding, Nearest):
        return share > HALF or (share == HALF and lower_is_odd)
    if isinstance(rounding, TowardZero):
        return False
    if isinstance(rounding, TowardPositive):
        return not negative
    if isinstance(rounding, TowardNegative):
        return negative
    return u + HALF < share * 2**rounding.random_bits


# Minifloats as lists of codes.


def decode(fmt: Minifloat, code: int) -> Fraction:
    """The magnitude that a code without its sign bit would have if it were a number."""
    field, stored = divmod(code, 2**fmt.mantissa_bits)
    fraction = Fraction(stored, 2**fmt.mantissa_bits)
    if field > 0 or (fmt.mantissa_bits == 0 and not fmt.subnormals):
        return (1 + fraction) * power(field - fmt.bias)
    return fraction * power(1 - fmt.bias)


def is_number(fmt: Minifloat, code: int) -> bool:
    """Whether a code without its sign bit is a finite value of the format."""
    field, stored = divmod(code, 2**fmt.mantissa_bits)
    if fmt.specials == "ieee" and field == 2**fmt.exponent_bits - 1:
        return False
    if fmt.specials == "fn" and code == 2 ** (fmt.exponent_bits + fmt.mantissa_bits) - 1:
        return False
    return fmt.subnormals or fmt.mantissa_bits == 0 or field > 0 or stored == 0


@lru_cache(maxsize=64)
def finite_magnitudes(fmt: Minifloat) -> list[tuple[Fraction, int]]:
    """Finite magnitudes, ascending, each with its code."""
    codes = range(2 ** (fmt.exponent_bits + fmt.mantissa_bits))
    return [(decode(fmt, code), code) for code in codes if is_number(fmt, code)]


@lru_cache(maxsize=64)
def magnitudes_and_the_next(fmt: Minifloat) -> tuple[list[Fraction], list[int]]:
    """Magnitudes and codes, and those that would follow the largest: they decide the overflow."""
    values, codes = map(list, zip(*finite_magnitudes(fmt), strict=True))
    return [*values, decode(fmt, codes[-1] + 1)], [*codes, codes[-1] + 1]


def largest_element(element: FixedPoint | Minifloat) -> Fraction:
    """The largest positive element."""
    if isinstance(element, FixedPoint):
        return (2 ** (element.word_length - 1) - 1) * power(-element.frac_bits)
    return finite_magnitudes(element)[-1][0]


# Exponents and blocks.


def power(exponent: int) -> Fraction:
    """2**exponent."""
    return Fraction(2) ** exponent


def floor_log2(value: Fraction) -> int:
    """The integer e with 2**e <= value < 2**(e + 1)."""
    exponent = len(f"{value.numerator:b}") - len(f"{value.denominator:b}")
    while power(exponent) > value:
        exponent -= 1
    while power(exponent + 1) <= value:
        exponent += 1
    return exponent


def blocks(shape, fmt: BlockFloat | Microscaling) -> list[list[int]]:
    """Row-major indices of the elements of each block."""
    tiles = {}  # axis -> the extent of a tile along it; an axis that all share is absent
    if isinstance(fmt, Microscaling):
        tiles[fmt.axis % len(shape)] = fmt.tile
        shared = []
    elif fmt.tile is not None:
        axes = range(len(shape) - len(fmt.tile), len(shape)) if fmt.axes is None else fmt.axes
        tiles = {axis % len(shape): tile for axis, tile in zip(axes, fmt.tile, strict=True)}
        shared = []
    else:
        named = [axis % len(shape) for axis in fmt.axes or ()]
        shared = [axis for axis in range(len(shape)) if axis not in named]
    members: dict[tuple[int, ...], list[int]] = {}
    for index, position in enumerate(product(*map(range, shape))):
        key = tuple(
            0 if axis in shared else place // tiles.get(axis, 1)
            for axis, place in enumerate(position)
        )
        members.setdefault(key, []).append(index)
    return list(members.values())


# The random bits.


@lru_cache(maxsize=1 << 12)
def uniform(rounding, index: int) -> int:
    """U of the element with that row-major index, if the rule is stochastic."""
    if not isinstance(rounding, Stochastic):
        return 0
    bits = rounding.random_bits
    seed = [rounding.seed % 2**32, rounding.seed // 2**32]
    block, place = divmod(index, 8)
    whole = 0
    for added in (0, 2**31):
        counter = [block % 2**32, block // 2**32 + added, rounding.step, rounding.call]
        word = philox(counter, seed)[place // 2]
        whole = 2**16 * whole + (word // 2**16 if place % 2 else word % 2**16)
    return whole // 2 ** (32 - bits)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 of four and two 32-bit words (Salmon et al. 2011, section 3.3)."""
    a, b, c, d = counter
    left, right = key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (
            (second >> 32) ^ b ^ left,
            second % 2**32,
            (first >> 32) ^ d ^ right,
            first % 2**32,
        )
        left, right = (left + 0x9E3779B9) % 2**32, (right + 0xBB67AE85) % 2**32
    return [a, b, c, d]
