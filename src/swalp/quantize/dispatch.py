"""Which kernel quantizes, packs and unpacks a tensor."""

from __future__ import annotations

from torch import Tensor

from swalp.formats import Format
from swalp.quantize import codes as definition
from swalp.quantize import reference
from swalp.rounding import Rounding


def run(x: Tensor, fmt: Format, rounding: Rounding, out: Tensor | None = None) -> Tensor:
    """Quantize `x`, already checked, into `out` or a new tensor, with the fastest exact kernel."""
    result = reference.quantize(x, fmt, rounding)
    return result if out is None else out.copy_(result)


def pack(x: Tensor, fmt: Format, rounding: Rounding) -> tuple[Tensor, Tensor | None]:
    """Codes and exponents of `x`, already checked: see `codes.pack`."""
    return definition.pack(x, fmt, rounding)


def unpack(codes: Tensor, exponents: Tensor | None, fmt: Format) -> Tensor:
    """The values of codes and exponents: see `codes.unpack`."""
    return definition.unpack(codes, exponents, fmt)
