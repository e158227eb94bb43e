"""Which kernel quantizes, packs and unpacks a tensor."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from swalp.formats import Format
from swalp.quantize import codes as definition
from swalp.quantize import cpu, plans, reference, storage
from swalp.rounding import Rounding, Stochastic


class SlowQuantizationWarning(RuntimeWarning):
    """The fast kernels are missing; results are the same, but take far longer."""


def run(x: Tensor, fmt: Format, rounding: Rounding, out: Tensor | None = None) -> Tensor:
    """Quantize `x`, already checked, into `out` or a new tensor, with the fastest exact kernel."""
    if storage.has_memory(x) and _has_kernels():
        if plans.supports(fmt, rounding, x.dtype):
            return cpu.quantize(x, fmt, rounding, out)
        if plans.widens(fmt, x.dtype):
            result = cpu.quantize(x.float(), fmt, rounding)
            if out is None:
                narrow = torch.empty_like(x).copy_(result)
            else:  # PyTorch loses the sign where it narrows into a float16 view of negatives
                narrow = out.copy_(result.to(x.dtype) if out.is_neg() else result)
            # What is too small for `narrow` has become 0, with its sign.
            return narrow.add_(0.0) if reference.may_vanish(fmt, x.dtype) else narrow
    result = reference.quantize(x, fmt, rounding)
    return result if out is None else out.copy_(result)


def run_many(
    tensors: Sequence[Tensor],
    shapes: Sequence[torch.Size],
    fmt: Format,
    rules: Sequence[Rounding],
    out: Sequence[Tensor] | None,
) -> Sequence[Tensor]:
    """Quantize tensors, already checked, into `out` or new ones: in one call where all are plain.

    `shapes`: theirs. `rules`: one for all, or one for each.
    """
    if len(rules) == 1 and isinstance(rules[0], Stochastic) and rules[0].seed is None:
        rules = list(rules) * len(tensors)  # a fresh seed for each
    given = out is not None and out is not tensors
    if out is None:
        out = [torch.empty_like(x) for x in tensors]
    # By the rules, not their arguments: a key that is drawn and not used would change later ones.
    alike = len({(type(rule), getattr(rule, "random_bits", 0)) for rule in rules}) == 1
    if tensors and alike and _has_kernels() and plans.supports(fmt, rules[0], tensors[0].dtype):
        memory = cpu.addresses(tensors)
        to = memory if out is tensors else cpu.addresses(out)
        if (
            memory is not None
            and to is not None
            and not (given and any(map(storage.partly_the_same, tensors, out)))
        ):
            arguments = [plans.rule_arguments(rule) for rule in rules]
            cpu.quantize_many(memory, shapes, fmt, arguments, out, to)
            return out
    each = rules if len(rules) == len(tensors) else list(rules) * len(tensors)
    for tensor, rule, target in zip(tensors, each, out, strict=True):
        run(tensor, fmt, rule, target)
    return out


def pack(x: Tensor, fmt: Format, rounding: Rounding) -> tuple[Tensor, Tensor | None]:
    """Codes and exponents of `x`, already checked: see `codes.pack`."""
    if storage.has_memory(x) and _has_kernels() and plans.supports(fmt, rounding, x.dtype):
        return cpu.pack(x, fmt, rounding)
    return definition.pack(x, fmt, rounding)


def pack_integers(x: Tensor, fmt: Format, rounding: Rounding) -> tuple[Tensor, Tensor | None, bool]:
    """int8 codes and exponents of `x`, float32, and whether it has a NaN: see `cpu`."""
    if storage.has_memory(x) and _has_kernels() and plans.supports(fmt, rounding, x.dtype):
        return cpu.pack_integers(x, fmt, rounding)
    missing = x.isnan()
    codes, exponents = definition.pack(x.masked_fill(missing, 0.0).contiguous(), fmt, rounding)
    return codes, exponents, bool(missing.any())


def unpack(codes: Tensor, exponents: Tensor | None, fmt: Format) -> Tensor:
    """The values of codes and exponents: see `codes.unpack`."""
    if storage.has_memory(codes) and _has_kernels() and plans.knows(fmt):
        return cpu.unpack(codes, exponents, fmt)
    return definition.unpack(codes, exponents, fmt)


def join(codes: Tensor) -> Tensor:
    """Codes of up to 4 bits, two to a byte: see `codes.join`."""
    if storage.has_memory(codes) and _has_kernels():
        return cpu.join(codes)
    return definition.join(codes)


def split(joined: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The inverse of `join`: see `codes.split`."""
    if storage.has_memory(joined) and _has_kernels():
        return cpu.split(joined, shape, dtype)
    return definition.split(joined, shape, dtype)


def _has_kernels() -> bool:
    """Whether there are kernels, and memory for their results."""
    if not plans.available:
        warn_once()
    return plans.available and not storage.is_faked()


@cache
def warn_once() -> None:
    """Say that the kernels are missing."""
    warnings.warn(
        "swalp works without its C++ kernels: quantizing is exact, but up to a thousand "
        "times slower. `swalp doctor` says why, and how to get them.",
        SlowQuantizationWarning,
        stacklevel=2,
    )
