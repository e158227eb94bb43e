"""What integer products multiply: int8 codes, and power-of-two scales that are applied outside."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swalp.formats import Format
from swalp.packed import PackedTensor
from swalp.quantize import dispatch
from swalp.quantize.plans import plan_of
from swalp.rounding import Rounding

Quantization = tuple[Format, Rounding]  # how a tensor is rounded


class Operand(NamedTuple):
    """Integers and their scale: value = code * 2**(exponent + gap).

    Attributes:
        codes: int8, two or more dimensions.
        exponents: int8: one element, or one for each index of the first dimension, as `pack` gives
            them; None: 0.
        gap: the part of the exponent that the format fixes.
    """

    codes: Tensor
    exponents: Tensor | None
    gap: int

    @property
    def each(self) -> bool:
        """Whether each index of the first dimension has an exponent of its own."""
        return self.exponents is not None and self.exponents.numel() > 1

    def flatten(self) -> Operand:
        """As a matrix: all but the last dimension joined."""
        codes, exponents, gap = self
        return self if codes.dim() == 2 else Operand(codes.flatten(0, -2), exponents, gap)

    def transpose(self) -> Operand:
        """The last two dimensions exchanged: a view."""
        codes, exponents, gap = self
        return Operand(codes.transpose(-1, -2), exponents, gap)

    def exponent(self) -> Tensor:
        """What 2 is raised to: int32, one, or one for each index of the first dimension."""
        if self.exponents is None:
            return torch.tensor([self.gap], dtype=torch.int32, device="cpu")
        return (self.exponents.to(torch.int32) + self.gap).reshape(-1)


def gap_of(fmt: Format) -> int | None:
    """log2 of the gap at exponent 0 of a format whose values are int8 times a power of two.

    None for other formats, for exponents of more than a byte, and for tiles, whose exponents change
    along every product.
    """
    return plan_of(fmt).gap


def quantized(x: Tensor, fmt: Format, rounding: Rounding) -> Operand | None:
    """`x` rounded to codes; None if a NaN among its elements has no integer.

    Args:
        x: float32, two or more dimensions.
        fmt: a format that has a `gap_of`.
        rounding: the rule, with the same result as in `swalp.quantize`.
    """
    gap = gap_of(fmt)
    assert gap is not None  # the caller chose a format that has one
    codes, exponents, has_nan = dispatch.pack_integers(x, fmt, rounding)
    return None if has_nan else Operand(codes, exponents, gap)


def of_packed(x: PackedTensor) -> Operand | None:
    """The codes that a packed tensor holds, not copied; None if they are no integers, or a NaN."""
    gap = gap_of(x.format)
    if gap is None or x.codes.dtype != torch.int8:
        return None
    return None if x.has_nan() else Operand(x.codes, x.exponents, gap)


def exponent_of(x: Operand) -> int:
    """What 2 is raised to, for all codes.

    Raises:
        ValueError: as `require_one`.
    """
    require_one(x)
    return x.gap if x.exponents is None else int(x.exponents) + x.gap


def require_one(x: Operand) -> None:
    """Raise ValueError if there is more than one exponent: none can be taken out of sums, then."""
    if x.each:
        assert x.exponents is not None
        raise ValueError(
            f"sum over codes with {x.exponents.numel()} exponents: an operand must have one"
        )


def floats(x: Operand | Tensor) -> Tensor:
    """The values in float32."""
    if isinstance(x, Operand):
        return values(x).float()
    return x.dequantize() if isinstance(x, PackedTensor) else x


def values(x: Operand) -> Tensor:
    """The numbers: float64, of the shape of the codes."""
    scale = torch.exp2(x.exponent().to(torch.float64))
    return x.codes.to(torch.float64) * scale.reshape(-1, *[1] * (x.codes.dim() - 1))
