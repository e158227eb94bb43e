"""Quantized weights in one safetensors file, about a byte a weight at 8 bits.

Each parameter of floats is two tensors, ``NAME.codes`` (integers) and, if its format has blocks,
``NAME.exponents``; every other tensor, such as batch-norm statistics, is there as it is. The file's
metadata say of each what it means: for integer formats

    value = codes * 2.0 ** (exponents + scale)

with `scale` an integer there (exponents broadcast; without any they are 0).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from swalp.durable import write_file
from swalp.formats import BlockFloat, FixedPoint, Format
from swalp.packed import PackedTensor, from_plain, joined, pack, to_plain
from swalp.quantize import quantize
from swalp.recipe import fit
from swalp.rounding import Nearest

VERSION = 1
_KEY = "swalp"  # of the metadata: one entry, as safetensors writes several in no fixed order


@torch.no_grad()
def packed_state(model: nn.Module, fmt: Format) -> dict[str, Tensor]:
    """The tensors of `model`'s state dict, with every parameter of floats packed.

    Args:
        model: a network, such as `WeightAverage.module`, packed or not.
        fmt: of at most 16 bits; `fit` says what becomes of it for small tensors.

    Raises:
        ValueError: a parameter is complex.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def kept(name: str, value: Tensor) -> Tensor:
        value = value.detach()
        if name in parameters and value.is_complex():
            raise ValueError(
                f"parameter {name!r} is {value.dtype}, which has no codes; make "
                f"torch.view_as_real of it the parameter, which is of floats"
            )
        if name not in parameters or not value.is_floating_point():
            return value.clone(memory_format=torch.contiguous_format)
        grid = fit(fmt, value.shape)
        if value.dtype == torch.float64:
            value = quantize(value, grid)  # as float32, it would have been rounded before
        floats = value.dequantize() if isinstance(value, PackedTensor) else value.float()
        return pack(floats.contiguous(), grid, Nearest())

    state = model.state_dict()
    return {name: kept(name, value) for name, value in state.items() if isinstance(value, Tensor)}


def to_bytes(model: nn.Module, fmt: Format) -> bytes:
    """The content of the file that `save_quantized` writes."""
    state = packed_state(model, fmt)
    plain, _ = to_plain(state)
    described = {
        name: _description(value)
        for name, value in state.items()
        if isinstance(value, PackedTensor)
    }
    metadata = {"version": VERSION, "parameters": described}
    return safetensors.torch.save(plain, {_KEY: json.dumps(metadata)})


def save_quantized(model: nn.Module, path: str | Path, fmt: Format) -> None:
    """Write the weights of `model`, rounded to nearest, as integer codes and shared exponents.

    Buffers, and parameters of integers, go along as they are: recompute batch-norm statistics on
    the quantized network first where the format is short. Extra state, which is no tensor, is left
    out.

    Args:
        model: a float or packed network, such as `WeightAverage.module`.
        path: of the file, ``….safetensors``.
        fmt: such as ``BlockFloat(8, axes=(0,))``; at most 16 bits.

    Raises:
        ValueError: `fmt` has more than 16 bits, or a parameter is complex.
    """
    if not isinstance(fmt, Format):
        raise TypeError(
            f"save_quantized: fmt must be a format such as swalp.BlockFloat(8, axes=(0,)), not "
            f"{fmt!r}; swalp.parse_format reads short strings"
        )
    write_file(Path(path).resolve(), to_bytes(model, fmt))  # whole, or what was there stays


def load_quantized(path: str | Path, *, packed: bool = False) -> dict[str, Tensor]:
    """The weights that `save_quantized` or `swalp export` wrote.

    Args:
        path: of the file.
        packed: leave parameters as `PackedTensor`; else they are float32, for the plain network's
            ``load_state_dict`` (with ``strict=False`` if it has extra state).

    Raises:
        ValueError: the file is damaged, or another kind of file.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        tensors = safetensors.torch.load(content)
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if _KEY not in metadata:
            raise ValueError("save_quantized did not write it, as its metadata do not describe it")
        described = json.loads(metadata[_KEY])
        if described["version"] != VERSION:
            raise ValueError(f"version {described['version']} of the format; this reads {VERSION}")
        texts = {
            name: f"{each['format']} {','.join(map(str, each['shape']))}"
            for name, each in described["parameters"].items()
        }
        # Cloned, so that the tensors are aligned as those that PyTorch allocates.
        state = from_plain({name: each.clone() for name, each in tensors.items()}, texts)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a whole file of quantized weights: {' '.join(str(error).split())}"
        ) from None
    if packed:
        return state
    return {
        name: value.dequantize() if isinstance(value, PackedTensor) else value
        for name, value in state.items()
    }


def scale(fmt: Format) -> int | None:
    """Value = codes * 2**(exponents + scale); None if codes are bit patterns."""
    match fmt:
        case BlockFloat():
            return fmt.gap_exponent(0)
        case FixedPoint():
            return -fmt.frac_bits
        case _:
            return None


def _description(value: PackedTensor) -> dict[str, Any]:
    return {
        "format": str(value.format),
        "shape": list(value.shape),
        "scale": scale(value.format),
        "codes_per_byte": 2 if joined(value.format) else 1,
    }
