"""Tensor to tensor on a format's grid."""

from swalp.quantize.api import quantize, quantize_many

__all__ = ["quantize", "quantize_many"]
