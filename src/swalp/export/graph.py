"""ONNX: weights as integers behind DequantizeLinear, activations through QuantizeLinear.

A shared exponent is a scale that is a power of two, so the graph's weights are exactly those of the
quantized network. PyTorch writes the graph; its weights are then replaced.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swalp.convert import to_float
from swalp.durable import write_file
from swalp.export.weights import packed_state, scale
from swalp.formats import Format
from swalp.packed import PackedTensor

OPSET = 21  # the first with 16-bit integers in DequantizeLinear
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class MissingPackageError(ImportError):
    """A package that only ONNX needs is not installed; the text says how to get it."""


def save_onnx(
    model: nn.Module,
    path: str | Path,
    fmt: Format,
    example: Tensor,
    *,
    calibration: Iterable[Tensor] | None = None,
) -> None:
    """Write a network with quantized weights as an ONNX graph that computes in float32.

    Parameters are rounded to nearest and stored as integers, with a scale for the tensor or for
    each index of one axis. With `calibration`, what enters each product is quantized to 8 bits as
    well, with a scale for the tensor: the least power of two with which nothing met in the
    calibration overflows. The first product takes the network's input as it is.

    Args:
        model: a float or converted network, in the state it should be shipped in; see
            `save_quantized` about batch norm.
        path: of the file, ``….onnx``.
        fmt: `FixedPoint` or `BlockFloat` of at most 16 bits with one exponent for a tensor or for
            each index of one axis.
        example: an input (N, …) of two or more; N is free in the graph.
        calibration: inputs as `model` will meet them.

    Raises:
        MissingPackageError: `onnx` and `onnxscript` are not installed.
        ValueError: the format has no scale, or several along more than one axis; or a parameter is
            complex.
    """
    content = to_bytes(model, fmt, example, calibration=calibration)
    write_file(Path(path).resolve(), content)  # whole, or what was there stays


def to_bytes(
    model: nn.Module,
    fmt: Format,
    example: Tensor,
    *,
    calibration: Iterable[Tensor] | None = None,
) -> bytes:
    """The content of the file that `save_onnx` writes."""
    onnx = _onnx()
    model = to_float(model).eval()
    state = packed_state(model, fmt)
    floats = {
        name: value.dequantize() if isinstance(value, PackedTensor) else value
        for name, value in state.items()
    }
    model.float().load_state_dict(model.state_dict() | floats)  # the former has extra state, too
    stored = {
        name: _integers(name, value)
        for name, value in state.items()
        if isinstance(value, PackedTensor)
    }
    ranges = {} if calibration is None else _ranges(model, map(_float32, calibration))
    graph = _exported(model, _float32(example))
    _quantize_weights(onnx, graph.graph, stored)
    if calibration is not None:
        _quantize_activations(onnx, graph.graph, ranges)
    onnx.checker.check_model(graph, full_check=True)
    content: bytes = graph.SerializeToString()
    return content


def _onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401  (PyTorch's exporter needs it)
    except ImportError as error:
        raise MissingPackageError(
            f"ONNX needs the package {error.name!r}, which is not installed: "
            f"pip install 'swalp[onnx]'"
        ) from None
    return onnx


def _float32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _exported(model: nn.Module, example: Tensor) -> Any:
    """PyTorch's graph of `model`, whose initializers have the parameters' names."""
    if len(example) < 2:
        raise ValueError(f"save_onnx: example has {len(example)} rows; give 2 or more")
    with _quietly():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's remarks about itself and about packages that are not needed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _quantize_weights(
    onnx: Any, graph: Any, stored: dict[str, tuple[Tensor, Tensor, int | None]]
) -> None:
    """Each parameter: integers, scales, and a node that makes the values of them.

    Between those of a matrix and its product stands a Reshape to the shape that it has: runtimes
    take DequantizeLinear right before MatMul as leave to quantize the other operand, too.
    """
    made_by = {output: node for node in graph.node for output in node.output}
    matrices = {
        _source(operand, made_by)
        for node in graph.node
        if node.op_type in ("Gemm", "MatMul")
        for operand in node.input[:2]
    }
    nodes = []
    for initializer in list(graph.initializer):
        name = initializer.name
        if name not in stored:
            continue
        codes, scales, axis = stored[name]
        graph.initializer.remove(initializer)
        parts = {f"{name}.codes": codes, f"{name}.scale": scales}
        parts[f"{name}.zero_point"] = torch.zeros(scales.shape, dtype=codes.dtype, device="cpu")
        for key, part in parts.items():
            graph.initializer.append(onnx.numpy_helper.from_array(part.numpy(), key))
        options = {} if axis is None else {"axis": axis}
        values = f"{name}.values" if name in matrices else name
        nodes.append(
            onnx.helper.make_node(
                "DequantizeLinear", list(parts), [values], name=f"{name}.dequantize", **options
            )
        )
        if name in matrices:
            shape = onnx.numpy_helper.from_array(
                torch.tensor(codes.shape, device="cpu").numpy(), f"{name}.shape"
            )
            graph.initializer.append(shape)
            nodes.append(
                onnx.helper.make_node(
                    "Reshape", [values, shape.name], [name], name=f"{name}.reshape"
                )
            )
    for node in reversed(nodes):
        graph.node.insert(0, node)


def _integers(name: str, value: PackedTensor) -> tuple[Tensor, Tensor, int | None]:
    """Codes, scales, and the axis along which there are several."""
    offset = scale(value.format)
    if offset is None:
        raise ValueError(
            f"save_onnx: {value.format} has no integers to store; use fixed or block floating "
            f"point, such as bfp8[0]"
        )
    exponents = value.exponents
    if exponents is None:
        exponents = torch.zeros(1, dtype=torch.int8, device="cpu")
    several = [axis for axis, size in enumerate(exponents.shape) if size > 1]
    if len(several) > 1 or exponents.numel() not in (1, *value.shape):
        raise ValueError(
            f"save_onnx: {name} in {value.format} has exponents of shape "
            f"{tuple(exponents.shape)}; ONNX has scales for the tensor or along one axis: use "
            f"bfp8 or bfp8[0]"
        )
    scales = torch.pow(2.0, exponents.to(torch.float64) + offset).to(torch.float32)
    codes = value._element_codes().contiguous()
    if not several:
        return codes, scales.reshape(()), None
    if exponents.shape[several[0]] != value.shape[several[0]]:
        raise ValueError(
            f"save_onnx: {name} in {value.format} has tiles; ONNX has scales for the tensor or for "
            f"each index of one axis: use bfp8 or bfp8[0]"
        )
    return codes, scales.reshape(-1), several[0]


@torch.no_grad()
def _ranges(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
    """Least and largest value that enters each layer with a weight, by its name."""
    found: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            low, high = (each.item() for each in torch.aminmax(inputs[0]))
            before = found.get(name, (low, high))
            found[name] = min(low, before[0]), max(high, before[1])

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() > 1
    ]
    try:
        for batch in batches:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError("save_onnx: the calibration has no batch, or the model no such layer")
    return found


def _quantize_activations(onnx: Any, graph: Any, ranges: dict[str, tuple[float, float]]) -> None:
    """QuantizeLinear and DequantizeLinear before each product but the first."""
    made_by = {output: node for node in graph.node for output in node.output}
    nodes, uses, first = [], Counter[str](), True
    for node in graph.node:
        layer = _layer(node, made_by) if node.op_type in _PRODUCTS else None
        if layer in ranges and not first:
            uses[layer] += 1
            key, source = f"{layer}.input", node.input[0]
            given = [f"{key}.scale", f"{key}.zero_point"]
            if uses[layer] == 1:
                values = _affine(*ranges[layer])
                for name, value in zip(given, values, strict=True):
                    graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))
            else:
                key += f".{uses[layer]}"
            for kind, inputs, output in (
                ("QuantizeLinear", [source, *given], f"{key}.codes"),
                ("DequantizeLinear", [f"{key}.codes", *given], key),
            ):
                nodes.append(onnx.helper.make_node(kind, inputs, [output], name=f"{output}.node"))
            node.input[0] = key
        first = first and layer not in ranges
        nodes.append(node)
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copied)


def _affine(low: float, high: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the finest grid of 8 bits that holds a range."""
    zero = 0 if low >= 0 else 128
    largest = max(high / (255 - zero), -low / zero if zero else 0.0)
    step = 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 1.0
    gap = torch.tensor(step, dtype=torch.float32, device="cpu")
    return gap, torch.tensor(zero, dtype=torch.uint8, device="cpu")


def _layer(node: Any, made_by: dict[str, Any]) -> str | None:
    """The layer whose weight a product takes: directly, transposed or dequantized."""
    name = _source(node.input[1], made_by)
    return name.removesuffix(".weight") if name.endswith(".weight") else None


def _source(name: str, made_by: dict[str, Any]) -> str:
    """What a value is, perhaps transposed."""
    while name in made_by and made_by[name].op_type in ("Transpose", "Identity"):
        name = made_by[name].input[0]
    return name
