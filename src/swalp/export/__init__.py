"""The model to ship: quantized weights in safetensors, or an ONNX graph."""

from swalp.export.graph import MissingPackageError, save_onnx
from swalp.export.weights import load_quantized, save_quantized

__all__ = ["MissingPackageError", "load_quantized", "save_onnx", "save_quantized"]
