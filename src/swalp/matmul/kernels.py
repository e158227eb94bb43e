"""Exact int32 products of int8 matrices: the kernels there are, and whether one can be trusted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from swalp.quantize import cpu

if cpu.available:
    from swalp import _kernels

DEEPEST = 1 << 17  # 127 * 127 times this many products fit an int32; 128 * 128 times one fewer do

Multiply = Callable[[Tensor, Tensor], Tensor]


class NativeProductsWarning(RuntimeWarning):
    """Integer products do not work here; the simulation, with the same results, replaces them."""


class Kernel(NamedTuple):
    """How integer products are computed on this machine.

    Attributes:
        name: what reports call it.
        multiply: int8 (batch, m, k) and (batch, k, n) to int32 (batch, m, n); None: none that is
            right, and products are simulated.
        reason: why there is none.
    """

    name: str
    multiply: Multiply | None
    reason: str = ""


def kernel() -> Kernel:
    """The kernel for tensors on the CPU, checked against exact sums at its first use.

    Warns:
        NativeProductsWarning: once, if the check fails.
    """
    found = _checked(cpu.available and _kernels.has_matmul())
    if found.multiply is None:
        _warn_once(found.reason)
    return found


def describe() -> str:
    """One line for `swalp doctor`: the kernel, or why products are simulated."""
    found = _checked(cpu.available and _kernels.has_matmul())
    if found.multiply is None:
        return f"simulated: {found.reason}"
    return f"{found.name}, checked against exact sums"


def exact(multiply: Multiply) -> bool:
    """Whether a kernel's sums are right for operands that use the whole range of int8.

    Processors without 8-bit dot products add pairs of products in 16 bits and saturate; operands
    that are all alike do not show it on every one of them, random ones do.
    """
    generator = torch.Generator().manual_seed(8)
    for m, k, n in ((64, 256, 96), (33, 64, 17), (1, 2052, 130)):
        left = torch.randint(-128, 128, (1, m, k), generator=generator, dtype=torch.int8)
        right = torch.randint(-128, 128, (1, k, n), generator=generator, dtype=torch.int8)
        left[:, 0], right[:, :, 0] = 127, 127
        expected = left.double() @ right.double()
        as_columns = right.transpose(1, 2).contiguous().transpose(1, 2)
        as_rows = left.transpose(1, 2).contiguous().transpose(1, 2)
        for a, b in ((left, right), (left, as_columns), (as_rows, right)):
            if not torch.equal(multiply(a, b).double(), expected):
                return False
    return True


@cache
def _checked(vnni: bool) -> Kernel:
    if vnni:
        name, multiply = "AVX-512 VNNI", multiply_vnni
    else:
        name, multiply = "torch._int_mm", multiply_int_mm
    if exact(multiply):
        return Kernel(name, multiply)
    return Kernel(
        name,
        None,
        f"this processor's {name} gives wrong sums of 8-bit products (it has no VNNI, or is told "
        f"not to use it)",
    )


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"native products are simulated: {reason}. Results are the same; speed and memory are not",
        NativeProductsWarning,
        stacklevel=3,
    )


def multiply_vnni(left: Tensor, right: Tensor) -> Tensor:
    """Sums by the kernel in csrc/matmul_vnni.cpp."""
    out = torch.empty(left.shape[0], left.shape[1], right.shape[2], dtype=torch.int32)
    run_vnni(left, right, out, 0, None, None, None)
    return out


def run_vnni(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    exponent: int,
    left_exponents: Tensor | None,
    right_exponents: Tensor | None,
    bias: Tensor | None,
) -> None:
    """``2**exponents * left @ right + bias`` in one pass.

    Args:
        left: int8, (batch, m, k).
        right: int8, (batch, k, n).
        out: (batch, m, n), contiguous: float32, or int32 for the sums alone.
        exponent: added to those of the operands.
        left_exponents: int8, one or one for each matrix, or None.
        right_exponents: likewise.
        bias: float32, (n,), or None.
    """
    left, right = _along_or_across(left), _along_or_across(right)
    batch, m, k = left.shape
    n = right.shape[2]
    if k == 0:
        out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        return
    strides = right.stride()
    _kernels.matmul(
        (batch, m, n, k),
        left.data_ptr(), left.stride(), right.data_ptr(), (strides[0], strides[2], strides[1]),
        exponent,
        0 if left_exponents is None else left_exponents.data_ptr(),
        left_exponents is not None and left_exponents.numel() > 1,
        0 if right_exponents is None else right_exponents.data_ptr(),
        right_exponents is not None and right_exponents.numel() > 1,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(), out.dtype == torch.int32, torch.get_num_threads(),
    )  # fmt: skip


def multiply_int_mm(left: Tensor, right: Tensor) -> Tensor:
    """Sums by PyTorch's own kernel, one matrix at a time."""
    out = torch.empty(left.shape[0], left.shape[1], right.shape[2], dtype=torch.int32)
    if left.shape[2] == 0:
        return out.zero_()
    for a, b, to in zip(left, right, out, strict=True):
        torch._int_mm(_plain_strides(a), _plain_strides(b), out=to)
    return out


def _plain_strides(x: Tensor) -> Tensor:
    """`x`, its strides those of its shape where an extent is 1: others mislead `torch._int_mm`."""
    return x.clone(memory_format=torch.contiguous_format) if 1 in x.shape else x


def _along_or_across(x: Tensor) -> Tensor:
    """`x` with one of its last two strides 1, as the kernel reads it."""
    return x if 1 in x.stride()[1:] else x.contiguous()
