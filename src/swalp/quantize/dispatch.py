"""Which kernel quantizes a tensor."""

from __future__ import annotations

import warnings
from functools import cache

from torch import Tensor

from swalp.formats import Format
from swalp.quantize import codes, cpu, reference
from swalp.rounding import Rounding


class SlowQuantizationWarning(RuntimeWarning):
    """The fast kernels are not there; results are the same, but take far longer."""


def run(x: Tensor, fmt: Format, rounding: Rounding, out: Tensor | None = None) -> Tensor:
    """Quantize `x`, already checked, into `out` or a new tensor, with the fastest exact kernel."""
    if _on_cpu(x, fmt, rounding):
        return cpu.quantize(x, fmt, rounding, out)
    result = reference.quantize(x, fmt, rounding)
    return result if out is None else out.copy_(result)


def pack(x: Tensor, fmt: Format, rounding: Rounding) -> tuple[Tensor, Tensor | None]:
    """`codes.pack` of `x`, already checked, with the fastest exact kernel."""
    if _on_cpu(x, fmt, rounding):
        return cpu.pack(x, fmt, rounding)
    return codes.pack(x, fmt, rounding)


def unpack(
    packed: Tensor, exponents: Tensor | None, fmt: Format, out: Tensor | None = None
) -> Tensor:
    """`codes.unpack` into `out` or a new tensor, with the fastest exact kernel."""
    if packed.is_cpu and cpu.available and cpu.plan_of(fmt).kernel is not None:
        return cpu.unpack(packed, exponents, fmt, out)
    result = codes.unpack(packed, exponents, fmt)
    return result if out is None else out.copy_(result)


def _on_cpu(x: Tensor, fmt: Format, rounding: Rounding) -> bool:
    if not x.is_cpu:
        return False
    if not cpu.available:
        _warn_once()
    return cpu.supports(fmt, rounding, x.dtype)


@cache
def _warn_once() -> None:
    warnings.warn(
        "swalp was installed without its C++ kernels: quantizing is exact, but up to a thousand "
        "times slower. Install a C++ compiler (g++ or clang++) and reinstall swalp with "
        "`pip install --force-reinstall --no-deps swalp`; `swalp doctor` tells what is missing.",
        SlowQuantizationWarning,
        stacklevel=2,
    )
