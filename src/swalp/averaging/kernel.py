"""The compiled pass: an iterate into an average, equal to the definition bit for bit."""

from __future__ import annotations

import math
from itertools import dropwhile

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from swalp.averaging.kinds import Accumulator, ExactSum
from swalp.formats import BlockFloat, FixedPoint
from swalp.packed import PackedTensor, joined
from swalp.quantize import cpu, plans, storage
from swalp.quantize.blocks import block_extents
from swalp.rounding import Rounding

if plans.available:
    from swalp import _kernels

_FLOATS = (torch.float32, torch.bfloat16)


def take(
    state: dict[str, Tensor],
    parameter: Tensor,
    accumulator: Accumulator,
    weight: float,
    threads: int,
) -> bool:
    """Take `parameter` into `state` in one pass over memory, if it can be done; whether it was.

    It can on the CPU, for float32, bfloat16 and packed parameters whose elements lie in the order
    of the average's; for an exact sum, if the parameter is packed in the format of the sum.
    """
    if not plans.available or not parameter.is_cpu:
        return False
    exact = isinstance(accumulator, ExactSum)
    kept = state["sum" if exact else "average"]
    fmt = layout = exponents = table = None
    if isinstance(parameter, PackedTensor):
        memory = parameter._element_codes()
        if isinstance(accumulator, ExactSum) and parameter.format != accumulator.format:
            return False
        found = cpu.stored(memory, parameter.exponents, parameter.format)
        if found is None:
            return False
        fmt, layout, dtype, exponents, table = found
    elif exact or not (parameter.dtype in _FLOATS and storage.has_memory(parameter)):
        return False
    else:
        memory = parameter
        dtype = _kernels.FLOAT32 if memory.dtype == torch.float32 else _kernels.BFLOAT16
    if not _alike(kept, memory):
        return False
    residual = state.get("residual")
    if exact:
        kind = _kernels.SUM
    elif residual is not None:
        kind = _kernels.COMPENSATED
    else:
        kind = _kernels.MOVING64 if kept.dtype == torch.float64 else _kernels.MOVING32
    _kernels.average(
        kind, weight, kept.data_ptr(), 0 if residual is None else residual.data_ptr(),
        memory.data_ptr(), dtype, memory.numel(), fmt, layout,
        0 if exponents is None else exponents.data_ptr(),
        0 if table is None else table.data_ptr(),
        threads,
    )  # fmt: skip
    increment_version(kept)
    if residual is not None:
        increment_version(residual)
    return True


def take_rounded(
    average: PackedTensor, parameter: Tensor, rounding: Rounding, weight: float, threads: int
) -> bool:
    """Take `parameter` into an average that is kept in codes, in one pass; whether it was done.

    It can be where blocks are stretches of memory, for an average of at most 8 bits with a code for
    NaN, and float32 parameters or such packed ones in the same blocks or in none.
    """
    if not plans.available or parameter.numel() == 0 or parameter.shape != average.shape:
        return False
    blocks = _stretches(average)
    kept = plans.plan_of(average.format).kernel
    if blocks is None or kept is None or not kept.has_nan:
        return False
    halved = joined(average.format)
    x, exponents, x_format, x_halved = parameter, 0, None, False
    if isinstance(parameter, PackedTensor):
        own = _stretches(parameter)
        if own is None or (parameter.exponents is not None and own != blocks):
            return False
        x, exponents = parameter.codes, _address(parameter.exponents)
        x_format, x_halved = plans.plan_of(parameter.format).kernel, joined(parameter.format)
        if x_format is None:
            return False
    elif not storage.is_plain(x):
        return False
    if (halved or x_halved) and blocks[0] > 1 and blocks[1] % 2:
        return False  # two codes share a byte, but no two blocks do
    _kernels.average_rounded(
        weight, blocks, x.data_ptr(), exponents, x_format, x_halved,
        average.codes.data_ptr(), _address(average.exponents), kept, halved,
        plans.rule_arguments(rounding), threads,
    )  # fmt: skip
    for written in (average, average.codes):
        increment_version(written)
    return True


def _address(exponents: Tensor | None) -> int:
    return 0 if exponents is None else exponents.data_ptr()


def _stretches(x: PackedTensor) -> tuple[int, int] | None:
    """(number, length) of blocks that are stretches of memory, codes and exponents bytes, or None.

    A tensor without exponents is one block.
    """
    fmt, exponents = x.format, x.exponents
    if not isinstance(fmt, FixedPoint | BlockFloat) or fmt.bits > 8:
        return None
    if not (x.codes.is_cpu and x.codes.is_contiguous()):
        return None
    if exponents is None:
        return 1, x.numel()
    if exponents.dtype != torch.int8 or not exponents.is_contiguous():
        return None
    assert isinstance(fmt, BlockFloat)  # it has exponents
    extents = block_extents(fmt, x.shape)
    length = math.prod(extents)
    # Behind the leading axes of single elements, one axis may be in parts, and the others whole.
    inner = list(dropwhile(lambda axis: axis[1] == 1, zip(x.shape, extents, strict=True)))
    if any(size != extent for size, extent in inner[1:]):
        return None
    blocks = exponents.numel()
    return (blocks, length) if blocks * length == x.numel() else None


def _alike(kept: Tensor, memory: Tensor) -> bool:
    """Whether both hold their elements in one order, `kept` being dense."""
    return (
        kept.is_cpu
        and kept.shape == memory.shape
        and kept.stride() == memory.stride()
        and not memory.is_neg()
    )
