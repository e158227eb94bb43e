"""Tensor to tensor on a format's grid."""

from swalp.quantize.api import quantize

__all__ = ["quantize"]
