"""What kernels that work on addresses ask of a tensor first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from swalp.extension import WATCHERS


def is_watched() -> bool:
    """Whether PyTorch must see what is done, for its modes or for forward gradients."""
    return any(asked() for asked in WATCHERS) or forward_ad._current_level >= 0


def is_faked() -> bool:
    """Whether PyTorch makes tensors without memory now: it asks for shapes alone."""
    return torch._C._get_dispatch_mode(_FAKE) is not None


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


_FAKE = torch._C._TorchDispatchModeKey.FAKE
_NOT_HANDED = torch._C._disabled_torch_dispatch_impl


def partly_the_same(x: Tensor, out: Tensor) -> bool:
    """Whether two tensors of one dense layout share some memory, but not all of it."""
    return 0 < abs(x.data_ptr() - out.data_ptr()) < 4 * x.numel()
