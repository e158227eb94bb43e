"""The definition of codes: the integers that stand for values of a format.

* `FixedPoint`, `BlockFloat`, `Microscaling` of fixed point: value = code * 2**gap, in two's
  complement. NaN is the lowest code, -2**(W-1), which a symmetric format leaves unused.
* `Minifloat`, `Microscaling` of one: the bits sign, exponent field, mantissa, from the top.
* `Binary`: 1 for the positive value, 0 for the negative one.

Exponents are those of `reference.shared_exponents`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from swalp.formats import Binary, BlockFloat, FixedPoint, Format, Microscaling, Minifloat
from swalp.quantize import reference
from swalp.quantize.blocks import block_extents, spread
from swalp.rounding import Rounding


def code_dtype(fmt: Format) -> torch.dtype:
    """Of an element's code: int8, uint8 or int16."""
    if fmt.bits > 8:
        return torch.int16
    bit_pattern = isinstance(_element(fmt), Minifloat | Binary)
    return torch.uint8 if bit_pattern else torch.int8


def exponent_dtype(fmt: BlockFloat | Microscaling) -> torch.dtype:
    """Of a block's exponent: int8 where the field has 8 bits or fewer, else int16."""
    return torch.int8 if fmt.min_exponent >= -128 and fmt.max_exponent <= 127 else torch.int16


def holds_nan(fmt: Format) -> bool:
    """Whether a code of `fmt` stands for NaN."""
    element = _element(fmt)
    if isinstance(element, Minifloat):
        # IEEE's NaN has mantissa bits; without any, all ones is infinity.
        return element.specials != "finite" and (
            element.specials != "ieee" or element.mantissa_bits > 0
        )
    return not isinstance(element, Binary) and element.symmetric


def join(codes: Tensor) -> Tensor:
    """Codes of up to 4 bits, two to a byte: the even element, in row-major order, in the low half.

    Args:
        codes: int8 or uint8, any shape.

    Returns:
        uint8, one dimension; the last byte of an odd number of codes has an empty high half.
    """
    flat = codes.reshape(-1).view(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[0::2] & 15) | (flat[1::2] << 4)


def split(joined: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The inverse of `join`; the fourth bit of int8 codes is the sign."""
    low, high = joined & 15, joined >> 4
    flat = torch.stack([low, high], dim=1).reshape(-1)[: math.prod(shape)].reshape(tuple(shape))
    return flat if dtype == torch.uint8 else (flat ^ 8).view(torch.int8) - 8


def pack(x: Tensor, fmt: Format, rounding: Rounding) -> tuple[Tensor, Tensor | None]:
    """Codes and exponents of ``quantize(x, fmt, rounding)``.

    Args:
        x: float32, any shape.
        fmt: of at most 16 bits.
        rounding: the rule.

    Returns:
        Codes, `code_dtype(fmt)`, the shape of `x`; exponents, `exponent_dtype(fmt)`, one per block
        (see `block_extents`), or None for a format without blocks.

    Raises:
        ValueError: `x` has a NaN and `fmt` no code for it.
    """
    values = reference.quantize(x, fmt, rounding).to(torch.float64)
    exponents = None
    if isinstance(fmt, BlockFloat | Microscaling):
        exponents = _exponents(x, fmt)
        values = reference.scaled(values, -_power(exponents, fmt, x.shape))
    elif isinstance(fmt, FixedPoint):
        values = values / fmt.gap
    missing = values.isnan()
    if not (holds_nan(fmt) or x.is_meta) and bool(missing.any()):
        raise no_code_for_nan(fmt)
    element = _element(fmt)
    match element:
        case Binary():
            codes = (values > 0).to(torch.int64)
        case Minifloat():
            codes = _bits(values, element)
        case _:
            # float32 rounds the limit of a block of subnormals up, beyond the codes.
            within = values.nan_to_num().clamp(element.min_integer, element.max_integer)
            codes = torch.where(missing, nan_code(fmt), within).long()
    return codes.to(code_dtype(fmt)), exponents


def no_code_for_nan(fmt: Format) -> ValueError:
    """What `pack` raises."""
    return ValueError(f"pack: the tensor has a NaN, and {fmt} no code for it")


def nan_code(fmt: Format) -> int:
    """The code of NaN, for formats that `holds_nan`."""
    element = _element(fmt)
    if not isinstance(element, Minifloat):
        return -(1 << (element.bits - 1))
    if element.specials == "fnuz":
        return 1 << (element.bits - 1)
    return (1 << (element.exponent_bits + element.mantissa_bits)) - 1


def table(fmt: Minifloat | Binary) -> Tensor:
    """The value of each pattern of `fmt.bits` bits: float32, shape (num_codes,)."""
    return unpack(torch.arange(fmt.num_codes, dtype=torch.int32, device="cpu"), None, fmt)


def unpack(codes: Tensor, exponents: Tensor | None, fmt: Format) -> Tensor:
    """The float32 values of codes and exponents that `pack` made."""
    element = _element(fmt)
    match element:
        case Binary():
            values = torch.where(codes > 0, 1.0, -1.0).double() * element.largest
        case Minifloat():
            values = _from_bits(codes.to(torch.int64) & (element.num_codes - 1), element)
        case _:
            values = codes.to(torch.float64)
            if element.symmetric:
                values = torch.where(values < element.min_integer, torch.nan, values)
            if isinstance(fmt, FixedPoint):
                values = values * fmt.gap
    if exponents is not None:
        assert isinstance(fmt, BlockFloat | Microscaling)
        values = reference.scaled(values, _power(exponents, fmt, codes.shape))
    return values.to(torch.float32)


def _element(fmt: Format) -> FixedPoint | BlockFloat | Minifloat | Binary:
    return fmt.element if isinstance(fmt, Microscaling) else fmt


def _exponents(x: Tensor, fmt: BlockFloat | Microscaling) -> Tensor:
    if x.numel() == 0:
        extents = block_extents(fmt, x.shape)
        shape = [n // max(extent, 1) for n, extent in zip(x.shape, extents, strict=True)]
        return torch.empty(shape, dtype=exponent_dtype(fmt), device=x.device)
    return reference.shared_exponents(x, fmt).to(exponent_dtype(fmt))


def _power(exponents: Tensor, fmt: BlockFloat | Microscaling, shape: torch.Size) -> Tensor:
    """log2 of the gap of a `BlockFloat` block, of the scale of a minifloat one, at each element."""
    power = spread(exponents.to(torch.int64), block_extents(fmt, shape))
    if isinstance(fmt, BlockFloat):
        return power - fmt.word_length + 2
    if isinstance(fmt.element, FixedPoint):
        return power - fmt.element.frac_bits
    return power


def _bits(values: Tensor, fmt: Minifloat) -> Tensor:
    """The bit pattern of values of `fmt`; of NaN the one of all ones (fnuz: of -0)."""
    assert fmt.bias is not None  # resolved at birth
    magnitude = torch.where(values.isfinite(), values, 0.0).abs()
    floor_log2 = torch.frexp(magnitude)[1].to(torch.int64) - 1
    normal = magnitude >= 2.0**fmt.min_exponent
    exponent = torch.where(normal, floor_log2, fmt.min_exponent)
    steps = reference.scaled(magnitude, fmt.mantissa_bits - exponent).to(torch.int64)
    hidden = 1 << fmt.mantissa_bits
    field = torch.where(normal, exponent + fmt.bias, 0)
    codes = (field << fmt.mantissa_bits) + torch.where(normal, steps - hidden, steps)
    ones = (1 << (fmt.exponent_bits + fmt.mantissa_bits)) - 1
    codes = torch.where(values.isinf(), ones & -hidden, codes)
    codes = codes | (values.signbit().long() * fmt.signed << fmt.exponent_bits + fmt.mantissa_bits)
    return torch.where(values.isnan(), nan_code(fmt), codes)


def _from_bits(codes: Tensor, fmt: Minifloat) -> Tensor:
    assert fmt.bias is not None  # resolved at birth
    magnitude_bits = fmt.exponent_bits + fmt.mantissa_bits
    hidden = 1 << fmt.mantissa_bits
    field = (codes >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
    steps = codes & (hidden - 1)
    normal = (field > 0) | (not fmt.has_zero)
    exponent = torch.where(normal, field - fmt.bias, fmt.min_exponent) - fmt.mantissa_bits
    values = reference.scaled(steps + normal * hidden, exponent)
    ones = (1 << magnitude_bits) - 1
    magnitude = codes & ones
    if fmt.specials == "ieee":
        values = torch.where(magnitude == (ones & -hidden), torch.inf, values)
        values = torch.where(magnitude > (ones & -hidden), torch.nan, values)
    elif fmt.specials == "fn":
        values = torch.where(magnitude == ones, torch.nan, values)
    elif fmt.specials == "fnuz":
        values = torch.where(codes == 1 << magnitude_bits, torch.nan, values)
    return torch.where(codes > ones, -values, values)
