"""ReLU that keeps a bit an element for its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from swalp import buffers
from swalp.quantize import plans

if plans.available:
    from swalp import _kernels


def forward(x: Tensor, out: Tensor) -> Tensor:
    """ReLU of `x` into `out`, which may be `x`; returns which elements passed, a bit each.

    Args:
        x: float32, dense.
        out: of the same shape and strides.
    """
    passed = bits(x)
    _kernels.relu(
        x.numel(), x.data_ptr(), out.data_ptr(), passed.data_ptr(), torch.get_num_threads()
    )
    return passed


def bits(x: Tensor) -> Tensor:
    """Room for a bit for each element of `x`."""
    return buffers.empty((x.numel() + 7) // 8, dtype=torch.uint8)


def gradient(grad: Tensor, passed: Tensor, mine: bool, channels_last: bool = False) -> Tensor:
    """`grad` where the elements `passed`, else 0; in its place, if it is `mine` and in order."""
    grad = grad.resolve_neg()
    laid = (grad.movedim(1, -1) if channels_last else grad).contiguous()
    result = place(grad, mine, channels_last)
    _kernels.relu_gradient(
        grad.numel(), laid.data_ptr(), passed.data_ptr(), result.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return result


def place(grad: Tensor, mine: bool, channels_last: bool = False) -> Tensor:
    """Where a gradient of the shape of `grad` goes: there, if it is in order and nobody else's."""
    laid = grad.movedim(1, -1) if channels_last else grad
    if mine and buffers.holds(grad) and laid.is_contiguous():
        return grad
    return buffers.empty(*grad.shape, channels_last=channels_last)
