"""Train PyTorch networks in 8 bits or fewer, and average the iterates (SWALP)."""

from swalp.format_text import parse_format
from swalp.formats import Binary, BlockFloat, FixedPoint, Microscaling, Minifloat
from swalp.quantize import quantize
from swalp.rounding import Nearest, Stochastic, TowardNegative, TowardPositive, TowardZero

__all__ = [
    "Binary",
    "BlockFloat",
    "FixedPoint",
    "Microscaling",
    "Minifloat",
    "Nearest",
    "Stochastic",
    "TowardNegative",
    "TowardPositive",
    "TowardZero",
    "parse_format",
    "quantize",
]
