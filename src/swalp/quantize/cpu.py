"""The C++ kernels: float32 on the CPU, equal to `reference` and `codes` bit for bit.

They write to addresses. What is written to that somebody else may know, PyTorch is told of, as its
own operations tell it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Size, Tensor
from torch.autograd.graph import increment_version

from swalp import buffers
from swalp.formats import Format
from swalp.quantize import codes as definition
from swalp.quantize.blocks import permuted
from swalp.quantize.plans import available, plan_of, rule_arguments
from swalp.quantize.storage import partly_the_same
from swalp.rounding import Rounding

if available:
    from swalp import _kernels
    from swalp.extension import TORCH


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
    found = plan.layout_of(x)
    if found is None or x.is_neg():
        result = quantize(x.resolve_neg().contiguous(), fmt, rounding)
        return torch.empty_like(x).copy_(result) if out is None else out.copy_(result)
    if out is None:
        out = torch.empty_like(x)
    elif out.stride() != x.stride() or out.is_neg() or partly_the_same(x, out):
        return out.copy_(quantize(x, fmt, rounding))
    else:
        increment_version(out)
    assert plan.kernel is not None  # `supports`
    _kernels.quantize(
        plan.kernel, found[1], x.data_ptr(), out.data_ptr(), _kernels.FLOAT32, 0, 0,
        *rule_arguments(rounding), torch.get_num_threads(),
    )  # fmt: skip
    return out


def addresses(tensors: Sequence[Tensor]) -> list[int] | None:
    """Where the memory of tensors lies, if all are float32, in order, on the CPU."""
    return TORCH.addresses(tensors)


def quantize_many(
    memory: Sequence[int],
    shapes: Sequence[Size],
    fmt: Format,
    rules: Sequence[tuple[int, int, int, int, int]],
    out: Sequence[Tensor],
    to: Sequence[int],
) -> None:
    """`quantize` each of many tensors into its place, in one call.

    Args:
        memory: their `addresses`.
        shapes: theirs.
        fmt: a format that `supports` accepts.
        rules: the `rule_arguments` of all or of each, of one kind and one number of random bits.
        out: of their shapes; the tensors themselves included.
        to: the `addresses` of those.
    """
    plan = plan_of(fmt)
    increment_version(out)
    rule, bits = rules[0][:2]
    if shapes.count(shapes[0]) == len(shapes):  # hashes of shapes take longer
        rows = [plan.rows_of(shapes[0])] * len(shapes)
    else:
        found = {shape: plan.rows_of(shape) for shape in set(shapes)}
        rows = [found[shape] for shape in shapes]
    assert plan.kernel is not None  # `supports`
    _kernels.quantize_many(
        plan.kernel, rows, memory, to,
        rule, bits, [each[2:] for each in rules], torch.get_num_threads(),
    )  # fmt: skip


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
    found = plan.layout_of(x)
    if found is None or x.is_neg():
        codes, exponents = pack(x.resolve_neg().contiguous(), fmt, rounding)
        return torch.empty_like(x, dtype=codes.dtype).copy_(codes), exponents
    layout, kernel_layout = found
    codes = torch.empty_like(x, dtype=definition.code_dtype(fmt))
    exponents = plan.room_for_exponents(layout)
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

    A NaN gets a code that means nothing, whether or not `fmt` has one for it. The codes of a tensor
    whose channels are last in memory are so too; others are contiguous.

    Args:
        x: float32 on the CPU, any shape.
        fmt: `FixedPoint` or `BlockFloat` of at most 8 bits that `supports` accepts.
        rounding: the rule.
    """
    plan = plan_of(fmt)
    if x.numel() == 0:
        codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
        return codes, definition.pack(x, fmt, rounding)[1], False
    rule = rule_arguments(rounding)
    if plan.shapeless and plan.gap is not None and buffers.codes is not None:
        at_once = _kernels.pack_block(TORCH, buffers.codes, plan.without_nan(), x, None, *rule)
        if at_once is not None:
            return at_once
    if x.is_neg():
        x = x.resolve_neg()
    contiguous = x.is_contiguous()
    found = plan.layout_of(x)
    if found is None or not (contiguous or x.movedim(1, -1).is_contiguous()):
        contiguous, found = True, plan.apart_of(x)
        if found is None:
            x = buffers.empty(*x.shape).copy_(x)
            found = plan.layout_of(x)
            assert found is not None  # a contiguous tensor has one
    codes = buffers.empty(*x.shape, channels_last=not contiguous, dtype=torch.int8)
    exponents = plan.room_for_exponents(found[0])
    lost = _kernels.quantize(
        plan.without_nan(), found[1], x.data_ptr(), codes.data_ptr(), _kernels.CODE8,
        *_address(exponents), *rule, torch.get_num_threads(),
    )  # fmt: skip
    return codes, exponents, lost


class Parts:
    """A tensor that is one block, its exponent given, rounded as by `pack_integers`, part by part.

    Args:
        codes: int8, three dimensions: where the codes go; the last dimension is contiguous.
        fmt: `FixedPoint`, or `BlockFloat` with one exponent, of at most 8 bits.
        rounding: the rule.
        start: index of the first element of `codes` in the tensor.
        exponent: of the tensor.
    """

    def __init__(
        self, codes: Tensor, fmt: Format, rounding: Rounding, start: int, exponent: int
    ) -> None:
        self._codes, self._start = codes, start  # held, as their address is kept
        self._strides, self._address = codes.stride()[:2], codes.data_ptr()
        self._format = plan_of(fmt).without_nan()
        self._rule = (exponent, *rule_arguments(rounding), torch.get_num_threads())

    def pack(self, x: Tensor, row: int, column: int) -> tuple[int, bool]:
        """Round a part.

        Args:
            x: float32 on the CPU, three dimensions, contiguous; the first is all of the codes'.
            row: of the codes, where the part begins.
            column: likewise.

        Returns:
            The exponent that the part would have alone, of all parts the largest being that of the
            whole; and whether `x` has a NaN.
        """
        plane, step = self._strides
        at = row * step + column
        lost, own = _kernels.quantize_part(
            self._format, (self._start + at, *x.shape, plane, step), x.data_ptr(),
            self._address + at, *self._rule,
        )  # fmt: skip
        return own, lost


def unpack(codes: Tensor, exponents: Tensor | None, fmt: Format) -> Tensor:
    """`codes.unpack`, fast: float32 in the memory layout of `codes`.

    Args:
        codes: as `pack` gives them.
        exponents: as `pack` gives them.
        fmt: a format that `supports` accepts.
    """
    plan = plan_of(fmt)
    if codes.numel() == 0:
        return definition.unpack(codes, exponents, fmt)
    found = plan.layout_of(codes)
    if found is None:
        # No noise asks for the order of elements: of a dense tensor, that of memory will do.
        stride = codes.stride()
        order = tuple(sorted(range(codes.dim()), key=lambda axis: -stride[axis]))
        in_memory = codes.permute(order)
        if codes.is_contiguous() or not in_memory.is_contiguous():
            return unpack(codes.contiguous(), exponents, fmt)
        turned = None if exponents is None else exponents.permute(order)
        values = unpack(in_memory, turned, permuted(fmt, order))
        return values.permute([order.index(axis) for axis in range(codes.dim())]).detach()
    out = torch.empty_like(codes, dtype=torch.float32)
    assert plan.kernel is not None  # `knows`
    if exponents is not None and plan.exponents is not None:
        exponents = exponents.to(plan.exponents).contiguous()
    _kernels.unpack(
        plan.kernel, found[1], codes.data_ptr(), _code_type(fmt), *_address(exponents),
        plan.value_table().data_ptr(), out.data_ptr(), torch.get_num_threads(),
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
    found = plan.layout_of(codes) if codes.numel() else None
    if plan.kernel is None or found is None:
        return None
    if exponents is not None:
        exponents = exponents.to(torch.int32).contiguous()
    return plan.kernel, found[1], _code_type(fmt), exponents, plan.value_table()


def join(codes: Tensor) -> Tensor:
    """`codes.join`, fast."""
    codes = codes.contiguous()
    joined = torch.empty(-(-codes.numel() // 2), dtype=torch.uint8, device="cpu")
    _kernels.join(codes.data_ptr(), codes.numel(), joined.data_ptr(), torch.get_num_threads())
    return joined


def split(joined: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`codes.split`, fast."""
    joined = joined.contiguous()
    codes = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    _kernels.split(
        joined.data_ptr(), codes.numel(), dtype == torch.int8, codes.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return codes


def _code_type(fmt: Format) -> int:
    return _kernels.CODE8 if fmt.bits <= 8 else _kernels.CODE16


def _address(exponents: Tensor | None) -> tuple[int, int]:
    """Address, and bytes of each, as the kernels take them."""
    return (0, 0) if exponents is None else (exponents.data_ptr(), exponents.itemsize)
