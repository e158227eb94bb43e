"""The optimizers' steps in one compiled pass a parameter, equal to the pure functions bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swalp.formats import BlockFloat, FixedPoint, Format, Microscaling, Minifloat
from swalp.packed import PackedTensor
from swalp.quantize import cpu
from swalp.quantize.blocks import block_extents
from swalp.recipes import Quantizer, Recipe, fit
from swalp.rounding import Stochastic

if cpu.available:
    from swalp import _kernels


def available() -> bool:
    """Whether the compiled steps compute as PyTorch does on this machine.

    PyTorch's vector units fuse x + alpha * y into one rounding where the processor can, and the
    steps do the same; without such units its results are others.
    """
    return cpu.available and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def blocks(fmt: Format, shape: Sequence[int]) -> tuple[int, int] | None:
    """(number, length) of the blocks of a contiguous tensor, each a stretch of memory.

    (1, number of elements) for a format without blocks; None where blocks are no stretches.
    """
    elements = math.prod(shape)
    if not isinstance(fmt, BlockFloat | Microscaling):
        return 1, elements
    extents = block_extents(fmt, shape)
    leading = True
    for size, extent in zip(shape, extents, strict=True):
        if extent != size and (not leading or extent != 1):
            return None
        leading = leading and extent == 1
    length = math.prod(extents)
    return elements // length, length


def resident(tensor: Tensor) -> Tensor:
    """The memory a step works on: codes of a packed tensor, or the tensor itself."""
    return tensor.codes if isinstance(tensor, PackedTensor) else tensor


def prepare(
    kernel: Any, roles: Sequence[str], recipe: Recipe, parameter: Tensor, name: str, seed: int
) -> Any:
    """`kernel`, an `_kernels.SgdParameter` or `AdamParameter`, with the roles of one parameter."""
    for role in roles:
        quantizer = getattr(recipe, role)
        if quantizer is None:
            continue
        rounding = quantizer.rounding
        if isinstance(rounding, Stochastic):
            rounding = rounding.seeded(seed).stream(role, name)
        plan = cpu.plan_of(fit(quantizer.format, parameter.dim()))
        kernel.set_role(role, plan.kernel, *cpu.rule_arguments(rounding)[:3])
    return kernel


def fits(recipe: Recipe, roles: Sequence[str], parameter: Tensor) -> tuple[int, int] | None:
    """(number, length) of the blocks that all roles share, if the compiled step can do the job.

    It can where what is kept is rounded, to codes of at most 8 bits if the parameter is packed, and
    blocks are stretches of a contiguous float32 parameter on the CPU.
    """
    memory = resident(parameter)
    if not (available() and memory.is_cpu and memory.is_contiguous() and parameter.numel()):
        return None
    if parameter.dtype != torch.float32:
        return None
    found: tuple[int, int] | None = None
    for role in roles:
        quantizer: Quantizer | None = getattr(recipe, role)
        if quantizer is None:
            if role == "gradient":
                continue
            return None
        fmt = fit(quantizer.format, parameter.dim())
        if not cpu.supports(fmt, quantizer.rounding, torch.float32):
            return None
        kept = role != "gradient"
        if kept and isinstance(parameter, PackedTensor) and not _byte(fmt, role):
            return None
        if isinstance(fmt, BlockFloat | Microscaling):
            own = blocks(fmt, parameter.shape)
            if own is None or (found is not None and own != found):
                return None
            found = own
    return found or (1, parameter.numel())


def _byte(fmt: Format, role: str) -> bool:
    """Whether codes of `fmt` lie one to a byte, with exponents of one byte, as the step reads them."""
    if not 4 < fmt.bits <= 8:
        return False
    if role == "second_moment":
        return isinstance(fmt, Minifloat)
    return isinstance(fmt, FixedPoint) or (isinstance(fmt, BlockFloat) and fmt.exponent_bits <= 8)
