"""The compiled pass: an iterate into an average, equal to the definition bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from swalp.averaging.kinds import Accumulator, ExactSum
from swalp.packed import PackedTensor
from swalp.quantize import cpu

if cpu.available:
    from swalp import _kernels


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
    if not cpu.available or not parameter.is_cpu:
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
    elif exact or parameter.dtype not in (torch.float32, torch.bfloat16):
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
    return True


def _alike(kept: Tensor, memory: Tensor) -> bool:
    """Whether both hold their elements in one order, `kept` being dense."""
    return (
        kept.is_cpu
        and kept.shape == memory.shape
        and kept.stride() == memory.stride()
        and not memory.is_neg()
    )
