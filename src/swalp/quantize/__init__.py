"""Tensor to tensor on a format's grid."""

from swalp.quantize.api import check, quantize, quantize_at, quantize_many

__all__ = ["check", "quantize", "quantize_at", "quantize_many"]
