"""Exact int32 products of int8 matrices: the kernels there are, and whether one can be trusted."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from swalp import buffers
from swalp.matmul.operands import Operand, floats
from swalp.quantize import plans

if plans.available:
    from swalp import _kernels
    from swalp.extension import TORCH

DEEPEST = 1 << 17  # products that fit an int32, unless each of them is -128 * -128: see `deepest`
EXACT = 1 << 10  # terms whose sums, in any order, are integers up to 2**24: float32 has them all

Multiply = Callable[[Tensor, Tensor], Tensor]


class NativeProductsWarning(RuntimeWarning):
    """Native products gain no speed here: float32 computes them, with the same results."""


class Kernel(NamedTuple):
    """How integer products are computed on this machine.

    Attributes:
        name: what reports call it.
        multiply: int8 (batch, m, k) and (batch, k, n) to exact sums (batch, m, n), int32, or
            float32 where that has them; None: none that is right, and products are simulated.
        reason: why it is no kernel for 8-bit products; empty: it is.
    """

    name: str
    multiply: Multiply | None
    reason: str = ""


def kernel() -> Kernel:
    """The kernel for tensors on the CPU, checked against exact sums at its first use.

    Warns:
        NativeProductsWarning: once, if there is none for 8-bit products.
    """
    found = _checked(_instructions())
    if found.reason:
        _warn_once(found.reason)
    return found


def describe() -> str:
    """One line for `swalp doctor`: the kernel, or why there is no fast one."""
    found = _checked(_instructions())
    if found.multiply is None:
        return f"simulated: {found.reason}"
    return f"{found.name}, checked against exact sums" + (found.reason and f" ({found.reason})")


def exact(multiply: Multiply) -> bool:
    """Whether a kernel's sums are right for operands that use the whole range of int8.

    Processors without 8-bit dot products add pairs of products in 16 bits and saturate; operands
    that are all alike do not show it on every one of them, random ones do.
    """
    generator = torch.Generator().manual_seed(8)
    for m, k, n in ((64, 256, 96), (33, 64, 17), (1, 2052, 130)):
        left = torch.randint(
            -128, 128, (1, m, k), generator=generator, dtype=torch.int8, device="cpu"
        )
        right = torch.randint(
            -128, 128, (1, k, n), generator=generator, dtype=torch.int8, device="cpu"
        )
        left[:, 0], right[:, :, 0] = 127, 127
        expected = left.double() @ right.double()
        as_columns = right.transpose(1, 2).contiguous().transpose(1, 2)
        as_rows = left.transpose(1, 2).contiguous().transpose(1, 2)
        for a, b in ((left, right), (left, as_columns), (as_rows, right)):
            if not torch.equal(multiply(a, b).double(), expected):
                return False
    return True


def _instructions() -> str:
    """What the kernels in csrc/product.h use here; empty: there are none."""
    return _kernels.matmul_used() if plans.available else ""


@cache
def _checked(instructions: str) -> Kernel:
    with _disable_current_modes():  # for good: with real numbers, whatever is going on
        return _check(instructions)


def _check(instructions: str) -> Kernel:
    if instructions and exact(multiply_codes):
        return Kernel(instructions, multiply_codes)
    if not exact(multiply_int_mm):
        fault = "wrong"
    elif _seconds(multiply_int_mm) < _seconds(multiply_float):
        return Kernel("torch._int_mm", multiply_int_mm)
    else:
        fault = "slower than float32's"
    reason = f"swalp has no integer kernel for this machine or build; torch._int_mm is {fault}"
    return Kernel("float32", multiply_float if exact(multiply_float) else None, reason)


def _seconds(multiply: Multiply) -> float:
    """The least time of some products: without 8-bit instructions, `torch._int_mm` takes 20 times
    as long as float32.
    """
    left = torch.ones(1, 64, 256, dtype=torch.int8, device="cpu")
    right = torch.ones(1, 256, 256, dtype=torch.int8, device="cpu")
    multiply(left, right)
    times = []
    for _ in range(10):  # one of them undisturbed, on a busy machine, too
        begin = time.perf_counter()
        multiply(left, right)
        times.append(time.perf_counter() - begin)
    return min(times)


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"native products run in float32: {reason}. Results are the same; speed is float32's",
        NativeProductsWarning,
        stacklevel=3,
    )


def multiply_codes(left: Tensor, right: Tensor) -> Tensor:
    """Sums by the kernels in csrc/product.h."""
    out = torch.empty(left.shape[0], left.shape[1], right.shape[2], dtype=torch.int32, device="cpu")
    run_codes(left, right, out, 0, None, None, None)
    return out


def run_codes(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    exponent: int,
    left_exponents: Tensor | None,
    right_exponents: Tensor | None,
    bias: Tensor | Operand | None,
    passed: Tensor | None = None,
) -> None:
    """``2**exponents * left @ right + bias`` in one pass.

    Args:
        left: int8, (batch, m, k), or like the others without a batch.
        right: int8, (batch, k, n).
        out: (batch, m, n), its rows contiguous: float32, or int32 for the sums alone.
        exponent: added to those of the operands.
        left_exponents: int8, one or one for each matrix, or None.
        right_exponents: likewise.
        bias: (n,), or None: float32, or codes with an exponent.
        passed: uint8, one for each eight elements of `out`, or None: ReLU follows, and these are
            the bits of what passed it. Then `out` is float32, (m, n), contiguous, and n a multiple
            of 16.
    """
    values, codes = _added(bias)
    arguments = (
        out, exponent, left_exponents, right_exponents, values, *codes, passed,
        torch.get_num_threads(),
    )  # fmt: skip
    if _kernels.matmul(TORCH, left, right, *arguments):
        return
    if left.shape[-1]:
        done = _kernels.matmul(TORCH, _along_or_across(left), _along_or_across(right), *arguments)
        assert done
    elif bias is None:
        out.zero_()
    else:
        out.copy_(floats(bias).expand_as(out))


def product(
    left: Operand, right: Operand, bias: Tensor | Operand | None, passed: Tensor | None = None
) -> Tensor | None:
    """What `run_codes` finds, in a new tensor; None: shapes do not fit, or one call is not all.

    Args:
        left: codes (m, k) or (batch, m, k).
        right: codes (k, n) or (batch, k, n).
        bias: as there.
        passed: as there.
    """
    if buffers.floats is None:
        return None
    values, (codes, exponents, gap) = _added(bias)
    return _kernels.product(
        TORCH, buffers.floats, left.codes, right.codes, left.gap + right.gap, left.exponents,
        right.exponents, values, codes, exponents, gap, passed,
    )  # fmt: skip


_Codes = tuple[Tensor | None, Tensor | None, int]


def _added(bias: Tensor | Operand | None) -> tuple[Tensor | None, _Codes]:
    """A bias as values and as codes, their exponent and gap: one of the two, or neither."""
    return (None, bias) if isinstance(bias, Operand) else (bias, (None, None, 0))


def channel_sums(codes: Tensor, exponents: Tensor | None, gap: int) -> Tensor:
    """Sums of int8 codes (batch, channels, ...) over all dimensions but the second.

    Times 2 to the power of the exponent, int8, and `gap`: exact, then rounded once to float32.
    """
    if codes.dim() > 2:
        codes = codes.movedim(1, -1)
    codes = codes.contiguous()
    channels = codes.shape[-1]
    if not plans.available:
        exponent = gap if exponents is None else gap + int(exponents)
        sums = codes.reshape(-1, channels).sum(0).to(torch.float64)
        return sums.mul_(math.ldexp(1.0, exponent)).float()
    scaled = torch.empty(channels, dtype=torch.float32, device="cpu")
    _kernels.channel_sums(
        codes.data_ptr(), codes.numel() // max(channels, 1), channels,
        0 if exponents is None else exponents.data_ptr(), gap, scaled.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return scaled


def in_one_pass(depth: int) -> bool:
    """Whether the compiled kernel multiplies, and sums of so many products need not be parted."""
    return depth < DEEPEST and kernel().multiply is multiply_codes


def deepest(codes: Tensor) -> int:
    """How many products a part of a sum may have, if they are `DEEPEST` or more.

    Args:
        codes: (batch, m, k): one of the operands.
    """
    first = codes[:, :, ::DEEPEST]  # of each part: a sum overflows only where all of it is -128
    return DEEPEST - 64 if bool((first == -128).any()) else DEEPEST


def multiply_int_mm(left: Tensor, right: Tensor) -> Tensor:
    """Sums by PyTorch's own kernel, one matrix at a time."""
    out = torch.empty(left.shape[0], left.shape[1], right.shape[2], dtype=torch.int32, device="cpu")
    if left.shape[2] == 0:
        return out.zero_()
    for a, b, to in zip(left, right, out, strict=True):
        torch._int_mm(_plain_strides(a), _plain_strides(b), out=to)
    return out


def multiply_float(left: Tensor, right: Tensor) -> Tensor:
    """Sums in float32, of as many terms at a time as it has exactly: those of any other kernel."""
    with torch.autocast("cpu", enabled=False):
        parts = (
            left[:, :, first : first + EXACT].float() @ right[:, first : first + EXACT].float()
            for first in range(0, max(left.shape[2], 1), EXACT)
        )
        sums = next(parts)
        if left.shape[2] > EXACT:
            sums = sums.to(torch.int32)
        for part in parts:
            sums += part.to(torch.int32)
    return sums


def _plain_strides(x: Tensor) -> Tensor:
    """`x`, its strides those of its shape where an extent is 1: others mislead `torch._int_mm`."""
    return x.clone(memory_format=torch.contiguous_format) if 1 in x.shape else x


def _along_or_across(x: Tensor) -> Tensor:
    """`x` with one of its last two strides 1, as the kernel reads it."""
    return x if 1 in x.stride()[-2:] else x.contiguous()
