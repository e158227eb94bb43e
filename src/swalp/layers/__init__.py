"""Layers that quantize: what `swalp.convert` makes of each kind of layer."""

from swalp.layers.base import Lowered, Quantized, float_class, quantized_class
from swalp.layers.functions import QuantizedFunctions
from swalp.layers.integers import Native, lean_mixin, native_mixin, simulated_mixin
from swalp.layers.native import obstacle
from swalp.layers.registry import CONVERTIBLE, Family, Kind, check_convertible, kind_of
from swalp.layers.single import QuantizedLayer
from swalp.layers.sites import NoiseClock, Rule, Site

__all__ = [
    "CONVERTIBLE",
    "Family",
    "Kind",
    "Lowered",
    "Native",
    "NoiseClock",
    "Quantized",
    "QuantizedFunctions",
    "QuantizedLayer",
    "Rule",
    "Site",
    "check_convertible",
    "float_class",
    "kind_of",
    "lean_mixin",
    "native_mixin",
    "obstacle",
    "quantized_class",
    "simulated_mixin",
]
