"""The definition of a format's codes: integers that stand for its values, and back.

* `FixedPoint`, `BlockFloat`, `Microscaling` of fixed-point elements: the value is code * 2**gap
  exponent, the code signed. `Binary`: -1 or +1, times 2**-frac_bits.
* `Minifloat` and `Microscaling` of them: the bit pattern, sign | exponent | mantissa. NaN has the
  sign bit 0 and, with "ieee", the top mantissa bit alone.

Codes come in the narrowest of int8, int16, int32, int64 (bit patterns: uint8, int16, int32, int64)
that holds `fmt.bits` bits; shared exponents in int8, or int16 if their field has more than 8 bits.
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from swalp.formats import Binary, BlockFloat, FixedPoint, Format, Microscaling, Minifloat
from swalp.quantize import reference
from swalp.quantize.blocks import block_extents, spread
from swalp.rounding import Rounding


def code_dtype(fmt: Format) -> torch.dtype:
    """The dtype of the codes of `fmt`."""
    if fmt.bits <= 8:
        return torch.uint8 if minifloat_of(fmt) else torch.int8
    return torch.int16 if fmt.bits <= 16 else torch.int32 if fmt.bits <= 32 else torch.int64


def exponent_dtype(fmt: BlockFloat | Microscaling) -> torch.dtype:
    """The dtype of the shared exponents of `fmt`."""
    wide = isinstance(fmt, BlockFloat) and fmt.exponent_bits > 8
    return torch.int16 if wide else torch.int8


def minifloat_of(fmt: Format) -> Minifloat | None:
    """The minifloat whose bit patterns are the codes of `fmt`, if they are."""
    element = fmt.element if isinstance(fmt, Microscaling) else fmt
    return element if isinstance(element, Minifloat) else None


def pack(x: Tensor, fmt: Format, rounding: Rounding) -> tuple[Tensor, Tensor | None]:
    """Quantize `x` and give the codes instead of the values.

    Args:
        x: float32, float64, bfloat16 or float16, checked as for `quantize`.
        fmt: the format.
        rounding: the rule.

    Returns:
        The codes, in the shape of `x`, and for block formats the shared exponents, one for each
        block: shape ``x.shape[i] // block_extents[i]``, as in `reference.shared_exponents`.

    Raises:
        ValueError: a NaN, for which `fmt` has no code.
    """
    values = reference.quantize(x, fmt, rounding).to(torch.float64)
    exponents = None
    if isinstance(fmt, BlockFloat | Microscaling):
        if x.numel() == 0:
            grid = [n // b for n, b in zip(x.shape, block_extents(fmt, x.shape), strict=True)]
            exponents = torch.empty(grid, dtype=exponent_dtype(fmt), device=x.device)
        else:
            exponents = reference.shared_exponents(x, fmt).to(exponent_dtype(fmt))
    element = minifloat_of(fmt)
    if element is not None:
        if isinstance(fmt, Microscaling) and exponents is not None:
            values = reference.scaled(
                values, -spread(exponents.long(), block_extents(fmt, x.shape))
            )
        codes = _bit_patterns(values, element)
    else:
        if bool(values.isnan().any()):
            raise lost_nan(fmt)
        codes = reference.scaled(values, -_gap(fmt, exponents, x.shape, x.device))
    return codes.to(code_dtype(fmt)), exponents


def unpack(codes: Tensor, exponents: Tensor | None, fmt: Format) -> Tensor:
    """The values of codes: float32, or float64 where `fmt` needs it; inverse of `pack`."""
    dtype = torch.float32 if fmt.significand_bits <= 24 else torch.float64
    element = minifloat_of(fmt)
    if element is not None:
        values = decode(codes, element)
        if isinstance(fmt, Microscaling) and exponents is not None:
            gap = spread(exponents.long(), block_extents(fmt, codes.shape))
            values = reference.scaled(values, gap)
    else:
        values = reference.scaled(codes, _gap(fmt, exponents, codes.shape, codes.device))
    return values.to(dtype)


def decode(codes: Tensor, fmt: Minifloat) -> Tensor:
    """The values of bit patterns of `fmt`: float64, the shape of `codes`."""
    ones = (1 << (fmt.exponent_bits + fmt.mantissa_bits)) - 1
    magnitude = codes.to(torch.int64) & ones
    field, mantissa = magnitude >> fmt.mantissa_bits, magnitude & ((1 << fmt.mantissa_bits) - 1)
    normal = field > 0 if fmt.has_zero else torch.ones_like(field, dtype=torch.bool)
    exponent = (field - int(fmt.has_zero)).clamp(min=0) + fmt.min_exponent
    hidden = 1 << fmt.mantissa_bits
    integer = torch.where(normal, mantissa + hidden, mantissa if fmt.subnormals else 0)
    values = reference.scaled(integer, exponent - fmt.mantissa_bits)
    values = torch.where(values > fmt.largest, torch.nan, values)
    if fmt.specials == "ieee":
        infinite = magnitude == (1 << fmt.exponent_bits) - 1 << fmt.mantissa_bits
        values = torch.where(infinite, torch.inf, values)
    if not fmt.signed:
        return values
    negative = (codes.to(torch.int64) >> (fmt.bits - 1)) & 1 == 1
    negated = -values if fmt.specials != "fnuz" else torch.where(values == 0, torch.nan, -values)
    return torch.where(negative, negated, values)


def nan_code(fmt: Minifloat) -> int | None:
    """The bit pattern that `pack` gives NaN; None if the format has none."""
    ones = (1 << (fmt.exponent_bits + fmt.mantissa_bits)) - 1
    match fmt.specials:
        case "ieee":
            half = (1 << fmt.mantissa_bits) >> 1
            return ones - (1 << fmt.mantissa_bits) + 1 + half if half else None
        case "fn":
            return ones
        case "fnuz":
            return 1 << (fmt.bits - 1)
        case "finite":
            return None
        case _:
            assert_never(fmt.specials)


def lost_nan(fmt: Format) -> ValueError:
    """The error for a NaN without a code."""
    return ValueError(
        f"pack: x has NaN, which {fmt} has no code for; look for its cause, or use swalp.quantize, "
        f"which keeps it"
    )


def _gap(fmt: Format, exponents: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """log2 of the gap of each element: int64."""
    match fmt:
        case FixedPoint() | Binary():
            return torch.full(shape, -fmt.frac_bits, dtype=torch.int64, device=device)
        case BlockFloat():
            offset = 2 - fmt.word_length
        case Microscaling(element=FixedPoint(frac_bits=frac_bits)):
            offset = -frac_bits
        case _:
            raise AssertionError(fmt)
    assert exponents is not None
    return spread(exponents.long(), block_extents(fmt, shape)) + offset


def _bit_patterns(values: Tensor, fmt: Minifloat) -> Tensor:
    """The code of each value of `fmt`: int64."""
    size = torch.where(values.isfinite(), values.abs(), 0.0)
    exponent = torch.frexp(size)[1].to(torch.int64) - 1
    exponent = torch.where(size == 0, fmt.min_exponent, exponent).clamp(min=fmt.min_exponent)
    steps = reference.scaled(size, fmt.mantissa_bits - exponent).to(torch.int64)
    first = 0 if fmt.has_zero else -1  # field of the lowest exponent, less one for the hidden bit
    codes = (exponent - fmt.min_exponent + first << fmt.mantissa_bits) + steps
    if fmt.specials == "ieee":
        codes = torch.where(
            values.isinf(), (1 << fmt.exponent_bits) - 1 << fmt.mantissa_bits, codes
        )
    if fmt.signed:
        codes = codes | (values.signbit().to(torch.int64) << (fmt.bits - 1))
    nan = values.isnan()
    code = nan_code(fmt)
    if code is None:
        if bool(nan.any()):
            raise lost_nan(fmt)
        return codes
    return torch.where(nan, code, codes)
