"""Convolution layers whose products run on integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swalp.layers.native import moments
from swalp.layers.products import runs
from swalp.layers.single import QuantizedLayer
from swalp.matmul import convolution
from swalp.matmul.convolution import Window
from swalp.matmul.convolve import convolve


class NativeConvolution(QuantizedLayer):
    """Mixin over `torch.nn.Conv1d` and `Conv2d`: their three products multiply int8 codes.

    The numbers are those of `QuantizedLayer`, up to the rounding of sums that float32 cannot hold;
    `swalp.matmul.convolution` has the bounds. Results have their channels last in memory. What the
    integers cannot do, this simulates, as `NativeLinear` does; and images so large that their
    gradients' sums could leave 32 bits.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward between the sites."""
        window = window_of(self)
        if (
            not runs(x, self.weight, self.bias, self.weight.shape[0])
            or x.dim() != self.weight.dim()
            or x.shape[1] != self.weight.shape[1] * self.groups
            or convolution.unsupported(x.shape[0], x.shape[2:], self.weight.shape, window)
        ):
            return super().forward(x, *args, **kwargs)
        fmt = self._swalp_layer.weight_format
        assert fmt is not None  # `convert` chose a layer that has one
        settings = moments(self, x)
        return convolve(x, self.weight, self.bias, window, fmt, *settings)


class ChannelsLast(QuantizedLayer):
    """Mixin over a `torch.nn.Conv2d` that float products compute between native ones.

    It takes and gives images with their channels last in memory, as its neighbours do; the numbers
    are those of `QuantizedLayer`, up to the order of sums.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The parent's forward between the sites."""
        if x.dim() == 4:
            last = _meets_columns(self, x.shape[3])
            x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        return super().forward(x, *args, **kwargs)


def _meets_columns(layer: Any, width: int) -> bool:
    """Whether the window meets any column of an image.

    Where it meets padding alone, PyTorch's convolution of images with their channels last crashes.
    """
    window, taps = window_of(layer), layer.kernel_size[1]
    stride, padding, dilation = window.stride[1], window.padding[1], window.dilation[1]
    if not padding:
        return True
    starts = range(-padding, width + padding - dilation * (taps - 1), stride)
    return any(0 <= start + tap * dilation < width for start in starts for tap in range(taps))


def window_of(layer: Any) -> Window:
    """How the window of a convolution layer moves."""
    padding = layer.padding
    if isinstance(padding, str):  # "valid", or "same" with as much on both sides: see `unable`
        same = padding == "same"
        padding = tuple(
            dilation * (taps - 1) // 2 if same else 0
            for taps, dilation in zip(layer.kernel_size, layer.dilation, strict=True)
        )
    return Window(tuple(layer.stride), tuple(padding), tuple(layer.dilation), layer.groups)


def unable(layer: nn.Conv1d | nn.Conv2d) -> str:
    """Why the products of a convolution layer of that kind are simulated; empty: they are not."""
    if reason := convolution.obstacle():
        return reason
    if layer.padding_mode != "zeros":
        return f"it pads with {layer.padding_mode!r}, not with zeros"
    uneven = any(
        dilation * (taps - 1) % 2
        for taps, dilation in zip(layer.kernel_size, layer.dilation, strict=True)
    )
    if layer.padding == "same" and uneven:
        return "it pads one side more than the other"
    shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    window = window_of(layer)
    pairs = zip(layer.kernel_size, window.dilation, strict=True)
    size = [dilation * (taps - 1) + 1 for taps, dilation in pairs]  # the window's; others may come
    return convolution.unsupported(1, size, shape, window)
