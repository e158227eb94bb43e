"""ReLU that keeps a bit an element for its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from swalp import buffers
from swalp.matmul.operands import floats
from swalp.matmul.owned import place
from swalp.quantize import plans

if plans.available:
    from swalp import _kernels


def forward(x: Tensor, out: Tensor) -> Tensor:
    """ReLU of `x` into `out`, which may be `x`; returns which elements passed, a bit each.

    Args:
        x: float32, dense.
        out: of the same shape and strides.
    """
    passed = bits(x.numel())
    _kernels.relu(
        x.numel(), x.data_ptr(), out.data_ptr(), passed.data_ptr(), torch.get_num_threads()
    )
    return passed


def bits(count: int) -> Tensor:
    """Room for so many bits."""
    return buffers.empty((count + 7) // 8, dtype=torch.uint8)


def gradient(grad: Tensor, passed: Tensor, mine: bool, channels_last: bool = False) -> Tensor:
    """`grad` where the elements `passed`, else 0; in its place, if it is `mine` and in order."""
    grad, passed = floats(grad).resolve_neg(), passed.contiguous()
    laid = (grad.movedim(1, -1) if channels_last else grad).contiguous()
    result = place(grad, mine, channels_last)
    _kernels.relu_gradient(
        grad.numel(), laid.data_ptr(), passed.data_ptr(), result.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return result
