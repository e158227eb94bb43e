"""Convolutions of int8 codes: forward, input gradient, weight gradient; one or two dimensions.

Sums are exact int32, as in `products`; images have their channels last in memory, going in and
coming out. The kernels (csrc/correlation.h, csrc/weight_gradient.h) unfold nothing: beside the
result they need a copy of a part of the operands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from swalp import buffers
from swalp.matmul.kernels import DEEPEST
from swalp.matmul.operands import Operand, exponent_of
from swalp.quantize import plans

if plans.available:
    from swalp import _kernels


@dataclass(frozen=True, slots=True)
class Window:
    """How a convolution's window moves: one number for each of one or two dimensions.

    Padding is with zeros, on both sides.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def out_size(self, in_size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Positions of the output along each dimension."""
        return tuple(
            (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
            for size, taps, stride, padding, dilation in zip(
                in_size, kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )


class Weight:
    """A weight's codes as the kernels read them, packed when first used and kept.

    Args:
        operand: codes (out, in / groups, height, width) or (out, in / groups, length), with one
            exponent.
        groups: of the convolution.
    """

    def __init__(self, operand: Operand, groups: int) -> None:
        codes = operand.codes
        self.exponent = exponent_of(operand)
        self.shape = codes.shape
        self.groups = groups
        self.channels_last = _is_channels_last(codes)
        self._codes = codes if self.channels_last else codes.contiguous()
        self._packed: dict[bool, Tensor] = {}

    @classmethod
    def of_packed(cls, packed: Tensor, shape: Sequence[int], exponent: int, groups: int) -> Weight:
        """One that serves the forward product alone, from its `packed(False)`."""
        self = cls.__new__(cls)
        self.shape, self.exponent, self.groups = torch.Size(shape), exponent, groups
        self._packed = {False: packed}
        return self

    def packed(self, backward: bool) -> Tensor:
        """For the input gradient if `backward`, else for the forward product."""
        found = self._packed.get(backward)
        if found is None:
            sizes = _sizes(0, self.shape, None, (0, 0), (0, 0), self.groups)
            found = buffers.empty(_kernels.convolution_bytes(sizes, backward), dtype=torch.uint8)
            _kernels.convolution_pack(
                sizes, backward, self.channels_last, self._codes.data_ptr(), found.data_ptr(),
                torch.get_num_threads(),
            )  # fmt: skip
            self._packed[backward] = found
        return found


def obstacle() -> str:
    """Why convolutions should be simulated on this machine; empty: they should not."""
    if not plans.available:
        return "swalp was installed without its C++ kernels"
    if not _kernels.has_fast_convolution():
        return "this build, or the chosen instruction set, has no AVX2"
    return "" if _is_exact(_kernels.used()) else "this processor's 8-bit products are wrong"


def unsupported(batch: int, in_size: Sequence[int], weight: Sequence[int], window: Window) -> str:
    """Why a convolution of these sizes should be simulated; empty: it should not.

    Args:
        batch: images.
        in_size: their height and width, or length.
        weight: its shape.
        window: how it moves.
    """
    if len(in_size) not in (1, 2):
        return f"it has {len(in_size)} dimensions, not one or two"
    out, per_group = weight[0] // window.groups, weight[1]
    if min(out, per_group) < 4 and window.groups > 1:
        return (
            f"groups of {per_group} to {out} channels fill a part of each vector only: float is "
            f"faster"
        )
    taps = math.prod(weight[2:])
    if max(out, per_group) * taps >= DEEPEST:
        return f"int32 holds sums of fewer than {DEEPEST} products of 8-bit codes"
    out_size = window.out_size(in_size, weight[2:])
    if math.prod(out_size) > DEEPEST:
        return f"an image has more than {DEEPEST} positions: its weight gradient overflows int32"
    if batch * math.prod(in_size) * math.prod(weight) == 0:
        return "it is empty"
    if min(out_size) < 1:
        return "its window is larger than the padded image"
    return ""


def forward(x: Operand, weight: Weight, bias: Tensor | None, window: Window) -> Tensor:
    """The convolution of `x`.

    Args:
        x: codes (batch, in, height, width) or (batch, in, length), with one exponent.
        weight: packed codes.
        bias: float32, (out,), or None.
        window: how it moves.

    Returns:
        float32, (batch, out, ...), channels last in memory: the float32 nearest to each sum, times
        a power of two, plus the bias.
    """
    codes = _channels_last(x.codes)
    in_size = x.codes.shape[2:]
    out_size = window.out_size(in_size, weight.shape[2:])
    y = buffers.empty(x.codes.shape[0], weight.shape[0], *out_size, channels_last=True)
    _kernels.convolution_forward(
        _sizes(x.codes.shape[0], weight.shape, window, in_size, out_size, window.groups),
        codes.data_ptr(), weight.packed(False).data_ptr(), exponent_of(x) + weight.exponent,
        0 if bias is None else bias.data_ptr(), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def input_gradient(dy: Operand, weight: Weight, in_size: Sequence[int], window: Window) -> Tensor:
    """The gradient of `forward` for its input.

    Args:
        dy: codes (batch, out, ...) of the gradient of the output, with one exponent.
        weight: packed codes.
        in_size: height and width, or length, of the input.
        window: how it moves.

    Returns:
        float32, (batch, in, ...), channels last in memory; exact as `forward` is.
    """
    codes = _channels_last(dy.codes)
    channels = weight.shape[1] * window.groups
    dx = buffers.empty(dy.codes.shape[0], channels, *in_size, channels_last=True)
    _kernels.convolution_input_gradient(
        _sizes(
            dy.codes.shape[0], weight.shape, window, in_size, dy.codes.shape[2:], window.groups
        ),
        codes.data_ptr(), weight.packed(True).data_ptr(), exponent_of(dy) + weight.exponent,
        dx.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx


def weight_gradient(
    x: Operand,
    dy: Operand,
    kernel: Sequence[int],
    window: Window,
    channels_last: bool = False,
) -> Tensor:
    """The gradient of `forward` for its weight.

    Args:
        x: codes of the input, with one exponent.
        dy: codes of the gradient of the output, with one exponent.
        kernel: height and width, or length, of the weight.
        window: how it moves.
        channels_last: whether the result should have its channels last in memory.

    Returns:
        float32, (out, in / groups, ...): the float32 nearest to each sum, times a power of two. If
        there are more than 2**17 products in a sum, images are taken in parts of fewer, and the
        parts added in float32; so are two of 2**17, if codes are -128.
    """
    channels = x.codes.shape[1]
    positions = math.prod(dy.codes.shape[2:])
    shape = (dy.codes.shape[1], channels // window.groups, *kernel)
    x_codes, dy_codes = _channels_last(x.codes), _channels_last(dy.codes)
    exponent = exponent_of(x) + exponent_of(dy)
    images = DEEPEST // max(positions, 1)  # of a part: at least one, as `unsupported` has it
    images -= images % 4 if images > 4 else 0
    parts = []
    for first, errors in _summed(dy_codes, images):
        count = len(errors)
        dw = buffers.empty(*shape)
        if channels_last:
            dw = torch.empty(
                shape[0], *kernel, shape[1], dtype=torch.float32, device="cpu"
            ).movedim(-1, 1)
        sizes = _sizes(count, shape, window, x.codes.shape[2:], dy.codes.shape[2:], window.groups)
        _kernels.convolution_weight_gradient(
            sizes, x_codes[first:].data_ptr(), errors.data_ptr(), exponent,
            channels_last, dw.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        parts.append(dw)
    result = parts[0]
    for part in parts[1:]:
        result += part
    return result


def _summed(dy: Tensor, images: int) -> Iterator[tuple[int, Tensor]]:
    """Parts of `dy`, channels last, whose sums fit an int32; and the first image of each."""
    for first in range(0, len(dy), images):
        part = dy[first : first + images]
        start = (0,) * (part.dim() - 1)
        if part[..., 0].numel() == DEEPEST and bool((part[start] == -128).any()):
            alone = torch.zeros_like(part)
            alone[start] = part[start]
            yield first, alone
            part = part - alone
        yield first, part


def _sizes(
    batch: int,
    weight: Sequence[int],
    window: Window | None,
    in_size: Sequence[int],
    out_size: Sequence[int],
    groups: int,
) -> _kernels.Convolution:
    """What the kernels know of a convolution; one dimension is two with a height of 1."""

    def pair(numbers: Sequence[int], height: int) -> tuple[int, ...]:
        return tuple(numbers) if len(numbers) == 2 else (height, *numbers)

    stride, padding, dilation = (
        ((1, 1), (0, 0), (1, 1))
        if window is None
        else (pair(window.stride, 1), pair(window.padding, 0), pair(window.dilation, 1))
    )
    return _kernels.Convolution(
        (
            batch, groups, weight[1] * groups, weight[0], *pair(in_size, 1), *pair(out_size, 1),
            *pair(weight[2:], 1), *stride, *padding, *dilation,
        )
    )  # fmt: skip


def _channels_last(codes: Tensor) -> Tensor:
    """A tensor whose memory is (batch, height, width, channels): no copy if it was so."""
    return codes.movedim(1, -1).contiguous()


def _is_channels_last(codes: Tensor) -> bool:
    return codes.movedim(1, -1).is_contiguous() and not codes.is_contiguous()


@cache
def _is_exact(instructions: str) -> bool:
    """Whether the kernels are right for operands that use the whole range of int8."""
    generator = torch.Generator().manual_seed(8)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8, device="cpu")

    window = Window((1, 1), (1, 1), (1, 1))
    for batch, size in ((13, 5), (2, 25), (17, 5)):  # of each kind of tile
        x, w, dy = codes(batch, 36, size, size), codes(40, 36, 3, 3), codes(batch, 40, size, size)
        operands = [Operand(one, None, 0) for one in (x, w, dy)]
        weight = Weight(operands[1], 1)
        expected = torch.ops.aten.convolution(
            x.double(), w.double(), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        )
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy.double(), x.double(), w.double(), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
            [True, True, False],
        )  # fmt: skip
        found = (
            forward(operands[0], weight, None, window),
            input_gradient(operands[2], weight, (size, size), window),
            weight_gradient(operands[0], operands[2], (3, 3), window),
        )
        pairs = zip(found, (expected, dx, dw), strict=True)
        if not all(torch.equal(mine, true.float()) for mine, true in pairs):
            return False
    return True
