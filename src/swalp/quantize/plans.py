"""What the kernels need to know of formats, layouts and rules, kept from call to call."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from swalp.extension import available as available
from swalp.formats import Binary, BlockFloat, FixedPoint, Format, Microscaling, Minifloat
from swalp.noise import fresh_seed
from swalp.quantize import codes as definition
from swalp.quantize.blocks import block_extents
from swalp.quantize.layouts import MAX_AXES, Layout, layout_of, rows_apart
from swalp.rounding import (
    Nearest,
    Rounding,
    Stochastic,
    TowardNegative,
    TowardPositive,
    TowardZero,
)

if available:
    from swalp import _kernels

    if os.environ.get("SWALP_ISA"):
        try:
            _kernels.use(os.environ["SWALP_ISA"])
        except ValueError as error:
            raise ValueError(
                f"SWALP_ISA={os.environ['SWALP_ISA']}: {error}; of amx, avx512, avx2 and scalar, "
                f"choose one that it has, or unset it for the fastest"
            ) from None

RULES: dict[type, int] = {
    Nearest: 0,
    TowardZero: 1,
    TowardPositive: 2,
    TowardNegative: 3,
    Stochastic: 4,
}
_CACHED = 4096  # formats, and layouts of each

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(slots=True, eq=False)
class Plan:
    """What the kernels need to know of a format, kept from call to call.

    Attributes:
        fmt: the format.
        kernel: its numbers; None if the kernels do not have it.
        shapeless: whether contiguous tensors of any shape are one long row to it.
        checked: `kernel`, set by those who know that `fmt` and float32 fit together and with every
            rule.
        exponents: how exponents of blocks are held; None without blocks.
        gap: of integers of 8 bits times a power of two, log2 of the gap at exponent 0; None:
            of other formats, of exponents of more than a byte, and of tiles.
        layouts, rows, apart, table, integers: what the methods have found.
    """

    fmt: Format
    kernel: _kernels.Format | None
    shapeless: bool
    exponents: torch.dtype | None
    gap: int | None
    checked: _kernels.Format | None = None
    layouts: dict[tuple[torch.Size, tuple[int, ...]], tuple[Layout, _kernels.Layout] | None] = (
        field(default_factory=dict)
    )
    apart: dict[tuple[torch.Size, tuple[int, ...]], tuple[Layout, _kernels.Layout] | None] = field(
        default_factory=dict
    )
    rows: dict[torch.Size, _kernels.Layout] = field(default_factory=dict)
    table: Tensor | None = None
    integers: _kernels.Format | None = None

    def layout_of(self, x: Tensor) -> tuple[Layout, _kernels.Layout] | None:
        """Where the elements of `x` lie; None if the kernels cannot read them as they are."""
        key = (x.shape, x.stride())
        try:
            return self.layouts[key]
        except KeyError:
            pass
        layout = layout_of(self.fmt, *key)
        found = None
        if layout is not None:
            sizes, extents, positions, channels, _ = layout
            found = layout, _kernels.Layout(sizes, extents, positions, channels)
        return _keep(self.layouts, key, found)

    def apart_of(self, x: Tensor) -> tuple[Layout, _kernels.Layout] | None:
        """Where rows of `x` lie, whose elements do, if all are one block or there are none.

        None for others, and if rows are short.
        """
        key = (x.shape, x.stride())
        try:
            return self.apart[key]
        except KeyError:
            pass
        dense = self.layout_of(torch.empty(x.shape, device="meta"))
        rows = rows_apart(*key)
        found = None
        if dense is not None and rows is not None and dense[0].sizes == dense[0].extents:
            found = dense[0], _kernels.Layout.rows_apart(x.numel(), *rows)
        return _keep(self.apart, key, found)

    def rows_of(self, shape: torch.Size) -> _kernels.Layout:
        """The layout of a contiguous tensor of that shape."""
        layout = self.rows.get(shape)
        if layout is None:
            if not shape.numel():
                if isinstance(self.fmt, BlockFloat | Microscaling):
                    block_extents(self.fmt, shape)  # raises
                return _kernels.Layout((0,), (1,), 0, 0)
            found = self.layout_of(torch.empty(shape, device="meta"))
            assert found is not None  # a contiguous tensor has one
            layout = _keep(self.rows, shape, found[1])
        return layout

    def value_table(self) -> Tensor:
        """Values of bit patterns: 256 or 65536, for any 1 or 2 bytes.

        Empty, and its address 0, if codes are no bit patterns.
        """
        if self.table is None:
            fmt = self.fmt
            element = fmt.element if isinstance(fmt, Microscaling) else fmt
            table = torch.empty(0, device="cpu")
            if isinstance(element, Minifloat | Binary):
                values = definition.table(element)
                table = values.repeat((1 << (8 if fmt.bits <= 8 else 16)) // values.numel())
            self.table = table  # whole: other threads may look
        return self.table

    def without_nan(self) -> _kernels.Format:
        """`kernel`, of a format that has no code for NaN."""
        if self.integers is None:
            numbers = _numbers(self.fmt)
            numbers.has_nan = 0
            self.integers = numbers
        return self.integers

    def room_for_exponents(self, layout: Layout) -> Tensor | None:
        """Room for the exponents of a tensor's blocks."""
        if self.exponents is None:
            return None
        return torch.empty(layout.grid, dtype=self.exponents, device="cpu")


# By identity, as hashing a dataclass costs more than quantizing a thousand numbers. A plan found by
# identity keeps that very object alive, so that no other takes the same id.
known: dict[int, tuple[Plan, Format]] = {}
_equal_plans: dict[Format, Plan] = {}


def plan_of(fmt: Format) -> Plan:
    """The plan of `fmt`, made on first use; equal formats share one."""
    found = known.get(id(fmt))
    if found is not None:
        return found[0]
    plan = _equal_plans.get(fmt)
    if plan is None:
        one_block = isinstance(fmt, BlockFloat) and fmt.axes is None and fmt.tile is None
        shapeless = one_block or isinstance(fmt, FixedPoint | Minifloat | Binary)
        kernel = _numbers(fmt) if _fits(fmt) else None
        exponents = None
        if isinstance(fmt, BlockFloat | Microscaling):
            exponents = definition.exponent_dtype(fmt)
        plan = Plan(fmt, kernel, shapeless, exponents, _gap(fmt, exponents))
        _keep(_equal_plans, fmt, plan)
    return _keep(known, id(fmt), (plan, fmt))[0]


def _keep(cache: dict[Key, Value], key: Key, value: Value) -> Value:
    """Keep a value in a cache of bounded size."""
    if len(cache) >= _CACHED:
        cache.clear()
    cache[key] = value
    return value


def _gap(fmt: Format, exponents: torch.dtype | None) -> int | None:
    if isinstance(fmt, FixedPoint) and fmt.bits <= 8:
        return -fmt.frac_bits
    if isinstance(fmt, BlockFloat) and fmt.bits <= 8 and fmt.tile is None:
        return fmt.gap_exponent(0) if exponents == torch.int8 else None
    return None


def supports(fmt: Format, rounding: Rounding, dtype: torch.dtype) -> bool:
    """Whether the kernels quantize `dtype` to `fmt`, which `swalp.quantize` has checked.

    float32 alone; every rounding rule; every format, but `Microscaling` with elements so large or
    small that their values times the scales leave float32 by far: magnitudes beyond
    [2**-90, 2**100].
    """
    return dtype == torch.float32 and knows(fmt)


def widens(fmt: Format, dtype: torch.dtype) -> bool:
    """Whether float32 takes the place of `dtype` on the way to `fmt`, with the same result.

    It holds every number of bfloat16 and float16, and what leaves these at the end leaves them in
    the same way. But float16 ends below 2**16, where a block in two's complement has to know it.
    """
    if dtype == torch.bfloat16:
        return knows(fmt)
    integers: BlockFloat | FixedPoint | None = fmt if isinstance(fmt, BlockFloat) else None
    if isinstance(fmt, Microscaling) and isinstance(fmt.element, FixedPoint):
        integers = fmt.element
    if integers is not None and integers.min_integer < -integers.max_integer:
        return False
    return dtype == torch.float16 and knows(fmt)


def knows(fmt: Format) -> bool:
    """Whether the kernels have that format."""
    return plan_of(fmt).kernel is not None


def rule_arguments(rounding: Rounding) -> tuple[int, int, int, int, int]:
    """Rule, random bits, seed, step, call: as the kernels take them."""
    if type(rounding) is Stochastic:
        seed = fresh_seed() if rounding.seed is None else rounding.seed
        return 4, rounding.random_bits, seed, rounding.step, rounding.call
    return RULES[type(rounding)], 16, 0, 0, 0


def _fits(fmt: Format) -> bool:
    if not available:
        return False
    if isinstance(fmt, Microscaling):
        return fmt.element.smallest >= 2.0**-90 and fmt.element.largest <= 2.0**100
    if isinstance(fmt, BlockFloat):
        # Each axis named can begin one more of the axes that a kernel's layout has.
        named = fmt.tile if isinstance(fmt.tile, tuple) else fmt.axes
        if named is not None and len(named) >= MAX_AXES:
            return False
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
