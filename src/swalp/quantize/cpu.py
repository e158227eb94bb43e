"""The C++ kernels: float32 on the CPU, equal to `reference` and `codes` bit for bit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swalp import buffers
from swalp.formats import Binary, BlockFloat, FixedPoint, Format, Microscaling, Minifloat
from swalp.noise import fresh_seed
from swalp.quantize import codes as definition
from swalp.quantize.layouts import Layout, layout_of
from swalp.rounding import (
    Nearest,
    Rounding,
    Stochastic,
    TowardNegative,
    TowardPositive,
    TowardZero,
)

try:  # after torch, whose OpenMP runtime they share
    from swalp import _kernels
except ImportError:
    available = False
else:
    available = True
    if os.environ.get("SWALP_ISA"):
        _kernels.use(os.environ["SWALP_ISA"])

SERIAL = 1 << 16  # below this the kernels use one thread whatever they are given

RULES: dict[type, int] = {
    Nearest: 0,
    TowardZero: 1,
    TowardPositive: 2,
    TowardNegative: 3,
    Stochastic: 4,
}
_CACHED = 4096  # formats, and layouts of each


@dataclass(slots=True, eq=False)
class Plan:
    """What the kernels need to know of a format, kept from call to call.

    Attributes:
        fmt: the format.
        kernel: its numbers; None if the kernels do not have it.
        shapeless: whether contiguous tensors of any shape are one long row to it.
        checked: set by those who know that `fmt` and float32 fit together and with every rule.
        layouts: where elements lie, by shape and stride.
        rows: the same of contiguous tensors, by shape alone.
        table: values of its bit patterns, if codes are such: 256 or 65536, for any 1 or 2 bytes.
        integers: as `kernel`, of a format that has no code for NaN.
        exponents: how exponents of blocks are held; None without blocks.
    """

    fmt: Format
    kernel: _kernels.Format | None
    shapeless: bool
    exponents: torch.dtype | None
    checked: bool = False
    layouts: dict[tuple[torch.Size, tuple[int, ...]], tuple[Layout, _kernels.Layout] | None] = (
        field(default_factory=dict)
    )
    rows: dict[torch.Size, _kernels.Layout] = field(default_factory=dict)
    table: Tensor | None = None
    integers: _kernels.Format | None = None


# By identity, as hashing a dataclass costs more than quantizing a thousand numbers. A plan found by
# identity keeps that very object alive, so that no other takes the same id.
plans: dict[int, tuple[Plan, Format]] = {}
_equal_plans: dict[Format, Plan] = {}


def plan_of(fmt: Format) -> Plan:
    """The plan of `fmt`, made on first use; equal formats share one."""
    found = plans.get(id(fmt))
    if found is not None:
        return found[0]
    if len(plans) >= _CACHED:
        plans.clear()
    plan = _equal_plans.get(fmt)
    if plan is None:
        if len(_equal_plans) >= _CACHED:
            _equal_plans.clear()
        one_block = isinstance(fmt, BlockFloat) and fmt.axes is None and fmt.tile is None
        shapeless = one_block or isinstance(fmt, FixedPoint | Minifloat | Binary)
        kernel = _numbers(fmt) if _fits(fmt) else None
        exponents = None
        if isinstance(fmt, BlockFloat | Microscaling):
            exponents = definition.exponent_dtype(fmt)
        plan = _equal_plans[fmt] = Plan(fmt, kernel, shapeless, exponents)
    plans[id(fmt)] = plan, fmt
    return plan


def supports(fmt: Format, rounding: Rounding, dtype: torch.dtype) -> bool:
    """Whether the kernels quantize `dtype` to `fmt`, which `swalp.quantize` has checked.

    float32 alone; every rounding rule; every format, but `Microscaling` with elements so large or
    small that their values times the scales leave float32 by far: magnitudes beyond
    [2**-90, 2**100].
    """
    return dtype == torch.float32 and knows(fmt)


def knows(fmt: Format) -> bool:
    """Whether the kernels have that format."""
    return plan_of(fmt).kernel is not None


def quantize(x: Tensor, fmt: Format, rounding: Rounding, out: Tensor | None = None) -> Tensor:
    """`reference.quantize`, fast.

    Args:
        x: float32 on the CPU, any shape and memory layout. Dense layouts whose memory order is
            row-major, channels-last or that of a transposed matrix are read as they are, if the
            blocks are contiguous in them; others are copied first.
        fmt: a format that `supports` accepts.
        rounding: the rule.
        out: float32 of the shape of `x` to write to; may be `x`.

    Returns:
        `out`, or a new tensor in the memory layout of `x`.
    """
    plan = plan_of(fmt)
    if x.numel() == 0:
        return torch.empty_like(x) if out is None else out
    found = _layout(plan, x)
    if found is None or x.is_neg():
        result = quantize(x.resolve_neg().contiguous(), fmt, rounding)
        return torch.empty_like(x).copy_(result) if out is None else out.copy_(result)
    if out is None:
        out = torch.empty_like(x)
    elif out.stride() != x.stride() or out.is_neg() or partly_the_same(x, out):
        return out.copy_(quantize(x, fmt, rounding))
    assert plan.kernel is not None  # `supports`
    _kernels.quantize(
        plan.kernel, found[1], x.data_ptr(), out.data_ptr(), _kernels.FLOAT32, 0, 0,
        *rule_arguments(rounding), torch.get_num_threads(),
    )  # fmt: skip
    return out


def quantize_contiguous(
    plan: Plan, x: Tensor, rounding: Rounding, out: Tensor | None = None
) -> Tensor:
    """`quantize` with as little as possible around the kernel.

    Args:
        plan: `checked`.
        x: a plain float32 tensor on the CPU, contiguous, without a negative bit.
        rounding: the rule.
        out: like `x`, and `x` or apart from it; None: a new tensor.
    """
    assert plan.kernel is not None  # `checked`
    if out is None:
        out = torch.empty_like(x)
    count = x.numel()
    threads = 1 if count < SERIAL else torch.get_num_threads()
    if type(rounding) is Stochastic and (seed := rounding.seed) is not None:
        bits, step, call, rule = rounding.random_bits, rounding.step, rounding.call, 4
    else:
        rule, bits, seed, step, call = rule_arguments(rounding)
    if plan.shapeless:
        _kernels.quantize_flat(
            plan.kernel, count, x.data_ptr(), out.data_ptr(), rule, bits, seed, step, call, threads
        )
    else:
        _kernels.quantize(
            plan.kernel, _rows(plan, x), x.data_ptr(), out.data_ptr(), 0, 0, 0,
            rule, bits, seed, step, call, threads,
        )  # fmt: skip
    return out


def quantize_many(
    tensors: Sequence[Tensor],
    fmt: Format,
    rules: Sequence[tuple[int, int, int, int, int]],
    out: Sequence[Tensor],
) -> None:
    """`quantize` each of many tensors into its place, in one call.

    Args:
        tensors: of which `is_plain` holds.
        fmt: a format that `supports` accepts.
        rules: the `rule_arguments` of all or of each, of one kind and one number of random bits.
        out: likewise plain; tensors of `tensors` itself included.
    """
    plan = plan_of(fmt)
    rule, bits = rules[0][:2]
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert plan.kernel is not None  # `supports`
    _kernels.quantize_many(
        plan.kernel, [_rows(plan, tensor) for tensor in tensors],
        addresses, addresses if out is tensors else [target.data_ptr() for target in out],
        rule, bits, [each[2:] for each in rules], torch.get_num_threads(),
    )  # fmt: skip


def is_plain(x: Tensor) -> bool:
    """Whether memory holds just the tensor: float32 on the CPU, contiguous."""
    return x.dtype is torch.float32 and in_order(x)


def in_order(x: Tensor) -> bool:
    """Whether memory on the CPU holds the elements one after another, with their signs."""
    return has_memory(x) and x.is_contiguous() and not x.is_neg()


def has_memory(x: Tensor) -> bool:
    """Whether a tensor's elements, if it has any, are its own memory, on the CPU.

    They need not be in a class that is handed the operations on it: fake tensors have no memory, a
    packed one holds other tensors.
    """
    return x.is_cpu and type(x).__torch_dispatch__ is _NOT_HANDED


_NOT_HANDED = torch._C._disabled_torch_dispatch_impl


def pack(x: Tensor, fmt: Format, rounding: Rounding) -> tuple[Tensor, Tensor | None]:
    """`codes.pack`, fast; codes in the memory layout of `x`.

    Args:
        x: float32 on the CPU, any shape and memory layout.
        fmt: a format of at most 16 bits that `supports` accepts.
        rounding: the rule.

    Returns:
        Codes and shared exponents (None unless `fmt` has blocks), as `codes.pack`.

    Raises:
        ValueError: a NaN, for which `fmt` has no code.
    """
    plan = plan_of(fmt)
    if x.numel() == 0:
        return definition.pack(x, fmt, rounding)
    found = _layout(plan, x)
    if found is None or x.is_neg():
        codes, exponents = pack(x.resolve_neg().contiguous(), fmt, rounding)
        return torch.empty_like(x, dtype=codes.dtype).copy_(codes), exponents
    layout, kernel_layout = found
    codes = torch.empty_like(x, dtype=definition.code_dtype(fmt))
    exponents = _exponents(plan, layout)
    assert plan.kernel is not None  # `supports`
    lost = _kernels.quantize(
        plan.kernel, kernel_layout, x.data_ptr(), codes.data_ptr(), _code_type(fmt),
        *_address(exponents), *rule_arguments(rounding), torch.get_num_threads(),
    )  # fmt: skip
    if lost:
        raise definition.no_code_for_nan(fmt)
    return codes, exponents


def pack_integers(x: Tensor, fmt: Format, rounding: Rounding) -> tuple[Tensor, Tensor | None, bool]:
    """`pack` to a format of int8 integers times a power of two; and whether `x` has a NaN.

    A NaN gets the code 0, whether or not `fmt` has a code for it. The codes of a tensor whose
    channels are last in memory are so too; others are contiguous.

    Args:
        x: float32 on the CPU, any shape.
        fmt: `FixedPoint` or `BlockFloat` of at most 8 bits that `supports` accepts.
        rounding: the rule.
    """
    plan = plan_of(fmt)
    if x.numel() == 0:
        codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
        return codes, definition.pack(x, fmt, rounding)[1], False
    if x.is_neg():
        x = x.resolve_neg()
    contiguous = x.is_contiguous()
    found = _layout(plan, x)
    if found is None or not (contiguous or x.movedim(1, -1).is_contiguous()):
        x, contiguous = buffers.empty(*x.shape).copy_(x), True
        found = _layout(plan, x)
        assert found is not None  # a contiguous tensor has one
    codes = buffers.empty(*x.shape, channels_last=not contiguous, dtype=torch.int8)
    exponents = _exponents(plan, found[0])
    lost = _kernels.quantize(
        _integers(plan), found[1], x.data_ptr(), codes.data_ptr(), _kernels.CODE8,
        *_address(exponents), *rule_arguments(rounding), torch.get_num_threads(),
    )  # fmt: skip
    return codes, exponents, lost


def pack_part(
    x: Tensor, fmt: Format, rounding: Rounding, start: int, exponent: int
) -> tuple[Tensor, int, bool]:
    """A part of a tensor that is one block, as `pack_integers`, its exponent given.

    Args:
        x: float32 on the CPU, contiguous: neighbours of the whole.
        fmt: `FixedPoint`, or `BlockFloat` with one exponent, of at most 8 bits.
        rounding: the rule.
        start: index of the first element in the whole.
        exponent: of the whole.

    Returns:
        The codes; the exponent that the part would have alone, of all parts the largest being that
        of the whole; and whether `x` has a NaN.
    """
    plan = plan_of(fmt)
    codes = buffers.empty(*x.shape, dtype=torch.int8)
    lost, own = _kernels.quantize_part(
        _integers(plan), start, x.numel(), x.data_ptr(), codes.data_ptr(), exponent,
        *rule_arguments(rounding), torch.get_num_threads(),
    )  # fmt: skip
    return codes, own, lost


def unpack(
    codes: Tensor, exponents: Tensor | None, fmt: Format, out: Tensor | None = None
) -> Tensor:
    """`codes.unpack`, fast: float32 in the memory layout of `codes`.

    Args:
        codes: as `pack` gives them.
        exponents: as `pack` gives them.
        fmt: a format that `supports` accepts.
        out: float32 of the shape of `codes` to write to.
    """
    plan = plan_of(fmt)
    if codes.numel() == 0:
        values = definition.unpack(codes, exponents, fmt)
        return values if out is None else out.copy_(values)
    found = _layout(plan, codes)
    if found is None:
        values = unpack(codes.contiguous(), exponents, fmt)
        return values if out is None else out.copy_(values)
    if out is None:
        out = torch.empty_like(codes, dtype=torch.float32)
    elif out.stride() != codes.stride() or out.is_neg():
        return out.copy_(unpack(codes, exponents, fmt))
    assert plan.kernel is not None  # `knows`
    if exponents is not None and plan.exponents is not None:
        exponents = exponents.to(plan.exponents).contiguous()
    _kernels.unpack(
        plan.kernel, found[1], codes.data_ptr(), _code_type(fmt), *_address(exponents),
        _table(plan).data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def stored(
    codes: Tensor, exponents: Tensor | None, fmt: Format
) -> tuple[_kernels.Format, _kernels.Layout, int, Tensor | None, Tensor] | None:
    """Codes and exponents as the kernels read them; None if they cannot.

    Returns:
        Format, layout, type of the codes, exponents as int32, and the values of bit patterns.
    """
    plan = plan_of(fmt)
    found = _layout(plan, codes) if codes.numel() else None
    if plan.kernel is None or found is None:
        return None
    if exponents is not None:
        exponents = exponents.to(torch.int32).contiguous()
    return plan.kernel, found[1], _code_type(fmt), exponents, _table(plan)


def join(codes: Tensor) -> Tensor:
    """`codes.join`, fast."""
    codes = codes.contiguous()
    joined = torch.empty(-(-codes.numel() // 2), dtype=torch.uint8)
    _kernels.join(codes.data_ptr(), codes.numel(), joined.data_ptr(), torch.get_num_threads())
    return joined


def split(joined: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`codes.split`, fast."""
    joined = joined.contiguous()
    codes = torch.empty(tuple(shape), dtype=dtype)
    _kernels.split(
        joined.data_ptr(), codes.numel(), dtype == torch.int8, codes.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return codes


def rule_arguments(rounding: Rounding) -> tuple[int, int, int, int, int]:
    """Rule, random bits, seed, step, call: as the kernels take them."""
    if type(rounding) is Stochastic:
        seed = fresh_seed() if rounding.seed is None else rounding.seed
        return 4, rounding.random_bits, seed, rounding.step, rounding.call
    return RULES[type(rounding)], 16, 0, 0, 0


def _layout(plan: Plan, x: Tensor) -> tuple[Layout, _kernels.Layout] | None:
    key = (x.shape, x.stride())
    try:
        return plan.layouts[key]
    except KeyError:
        pass
    layout = layout_of(plan.fmt, *key)
    found = None
    if layout is not None:
        sizes, extents, positions, channels, _ = layout
        found = layout, _kernels.Layout(sizes, extents, positions, channels)
    if len(plan.layouts) >= _CACHED:
        plan.layouts.clear()
    plan.layouts[key] = found
    return found


def _rows(plan: Plan, x: Tensor) -> _kernels.Layout:
    """The layout of a contiguous tensor."""
    shape = x.shape
    layout = plan.rows.get(shape)
    if layout is None:
        if not x.numel():
            return _kernels.Layout((0,), (1,), 0, 0)
        found = _layout(plan, x)
        assert found is not None  # a contiguous tensor has one
        if len(plan.rows) >= _CACHED:
            plan.rows.clear()
        layout = plan.rows[shape] = found[1]
    return layout


def partly_the_same(x: Tensor, out: Tensor) -> bool:
    """Whether two tensors of one dense layout share some memory, but not all of it."""
    return 0 < abs(x.data_ptr() - out.data_ptr()) < 4 * x.numel()


def _code_type(fmt: Format) -> int:
    return _kernels.CODE8 if fmt.bits <= 8 else _kernels.CODE16


def _table(plan: Plan) -> Tensor:
    """Values of bit patterns; empty, and its address 0, if codes are none."""
    if plan.table is None:
        fmt = plan.fmt
        element = fmt.element if isinstance(fmt, Microscaling) else fmt
        table = torch.empty(0)
        if isinstance(element, Minifloat | Binary):
            values = definition.table(element)
            table = values.repeat((1 << (8 if fmt.bits <= 8 else 16)) // values.numel())
        plan.table = table  # whole: other threads may look
    return plan.table


def _integers(plan: Plan) -> _kernels.Format:
    if plan.integers is None:
        numbers = _numbers(plan.fmt)
        numbers.has_nan = 0
        plan.integers = numbers
    return plan.integers


def _exponents(plan: Plan, layout: Layout) -> Tensor | None:
    """Room for the exponents of a tensor's blocks."""
    if plan.exponents is None:
        return None
    return torch.empty(layout.grid, dtype=plan.exponents)


def _address(exponents: Tensor | None) -> tuple[int, int]:
    """Address, and bytes of each, as the kernels take them."""
    return (0, 0) if exponents is None else (exponents.data_ptr(), exponents.itemsize)


def _fits(fmt: Format) -> bool:
    if not available:
        return False
    if isinstance(fmt, Microscaling):
        return fmt.element.smallest >= 2.0**-90 and fmt.element.largest <= 2.0**100
    # What float32 cannot carry goes to the reference with a wider carrier.
    return fmt.significand_bits <= 24


def _numbers(fmt: Format) -> _kernels.Format:
    """The format as the kernels know it: `swalp_format` in csrc/kernels.h."""
    f = _kernels.Format()
    f.symmetric_from = 2**31 - 1
    f.has_nan = fmt.bits <= 16 and definition.holds_nan(fmt)
    f.nan_code = definition.nan_code(fmt) if f.has_nan else 0
    element: Format = fmt
    if isinstance(fmt, BlockFloat | Microscaling):
        f.blocked = 1
        f.min_exponent, f.max_exponent = fmt.min_exponent, fmt.max_exponent
    if isinstance(fmt, Microscaling):
        f.element_exponent = fmt.element_exponent
        element = fmt.element
    match element:
        case FixedPoint():
            f.kind, f.gap_offset = _kernels.GRID, -element.frac_bits
            f.min_integer, f.max_integer = element.min_integer, element.max_integer
            f.symmetric_from = 129 - element.word_length
        case BlockFloat():
            f.kind, f.gap_offset = _kernels.GRID, element.gap_exponent(0)
            f.min_integer, f.max_integer = element.min_integer, element.max_integer
            # From this gap on float32 cannot hold -2**(W-1) gaps.
            f.symmetric_from = 129 - element.word_length
        case Minifloat():
            _fill_minifloat(f, element)
        case Binary():
            f.kind, f.gap_offset, f.largest = _kernels.BINARY, -element.frac_bits, element.largest
        case _:
            raise AssertionError(element)
    return f


def _fill_minifloat(f: _kernels.Format, fmt: Minifloat) -> None:
    assert fmt.bias is not None  # resolved at birth
    f.kind = _kernels.MINIFLOAT
    f.mantissa_bits, f.min_normal, f.bias = fmt.mantissa_bits, fmt.min_exponent, fmt.bias
    f.lowest_gap = fmt.min_exponent - (fmt.mantissa_bits if fmt.subnormals else 0)
    f.has_zero, f.is_signed, f.saturating = fmt.has_zero, fmt.signed, fmt.saturating
    f.fnuz, f.overflow_is_nan = fmt.specials == "fnuz", fmt.specials != "ieee"
    f.largest, f.smallest = fmt.largest, fmt.smallest
    if fmt.bits > 16:
        return  # no codes
    ones = (1 << (fmt.exponent_bits + fmt.mantissa_bits)) - 1
    f.inf_code = ones - (1 << fmt.mantissa_bits) + 1
    f.largest_code = {"ieee": f.inf_code - 1, "fn": ones - 1}.get(fmt.specials, ones)
    f.sign_code = ones + 1 if fmt.signed else 0
