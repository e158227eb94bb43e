"""Train PyTorch networks in 8 bits or fewer, and average the iterates (SWALP)."""

from swalp import optim, recipes, schedules
from swalp.averaging import WeightAverage
from swalp.batchnorm import recompute_batchnorm
from swalp.convert import convert, noise_clock, to_float
from swalp.export import load_quantized, save_onnx, save_quantized
from swalp.format_text import parse_format
from swalp.formats import Binary, BlockFloat, FixedPoint, Microscaling, Minifloat
from swalp.packed import PackedTensor, pack
from swalp.quantize import quantize, quantize_many
from swalp.rounding import Nearest, Stochastic, TowardNegative, TowardPositive, TowardZero
from swalp.summary import summary

__all__ = [
    "Binary",
    "BlockFloat",
    "FixedPoint",
    "Microscaling",
    "Minifloat",
    "Nearest",
    "PackedTensor",
    "Stochastic",
    "TowardNegative",
    "TowardPositive",
    "TowardZero",
    "WeightAverage",
    "convert",
    "load_quantized",
    "noise_clock",
    "optim",
    "pack",
    "parse_format",
    "quantize",
    "quantize_many",
    "recipes",
    "recompute_batchnorm",
    "save_onnx",
    "save_quantized",
    "schedules",
    "summary",
    "to_float",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version  # of the installed package, looked up when asked for

        return version("swalp")
    raise AttributeError(f"module 'swalp' has no attribute {name!r}")
