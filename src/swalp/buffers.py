"""Memory of large results, used again.

A fresh block of 32 MB costs several times what filling it does, as the system hands it out page by
page. Results from here lie side by side in regions of address space: what the last tensor on a
place leaves free, whatever its size, joins its free neighbours, the next result takes the lowest
place that it fits in, and where that has no memory yet, pages that are free elsewhere move there.
So the pages in use are those of the most that ever was alive at once, not those of each size.
`save_memory` gives them back sooner. Without the kernels, and on systems that have no `mmap`,
results are PyTorch's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from swalp.extension import available

if available:
    from swalp import _kernels
    from swalp.extension import TORCH

SMALLEST = 1 << 18  # bytes: below, the allocator of the C library is as good
REGION = 1 << 30  # bytes of address space; memory only where it has been written
WINDOW = 1 << 12  # results in which memory that none of them touched goes back to the system
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt
# Kind, by DLPack's numbers, and bytes.
_TYPES = {torch.float32: (2, 4), torch.int8: (0, 1), torch.uint8: (1, 1)}

# Where floats lie, for who makes a result in a compiled call of its own; None: PyTorch makes all.
floats = None if not available else _kernels.Buffers(SMALLEST, REGION, WINDOW)
# Apart: codes outlive floats, and would lie between them.
codes = None if not available else _kernels.Buffers(SMALLEST, REGION, WINDOW)


def empty(*shape: int, channels_last: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """Like `torch.empty` on the CPU, and no view.

    Args:
        shape: of the tensor.
        channels_last: whether dimension 1 is the last in memory; else the tensor is contiguous.
        dtype: of the tensor: float32, int8 or uint8.
    """
    kind, itemsize = _TYPES[dtype]
    strides = _strides(shape) if channels_last else ()
    buffers = floats if itemsize == 4 else codes
    if buffers is not None:
        found = buffers.empty(TORCH, shape, strides, kind, itemsize)
        if found is not None:
            return found if isinstance(found, Tensor) else from_dlpack(found)
    if channels_last:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
    return torch.empty(shape, dtype=dtype, device="cpu")


def holds(x: Tensor) -> bool:
    """Whether a tensor's memory is from here."""
    return any(each.holds(x.data_ptr()) for each in _all())


def free_bytes() -> int:
    """Bytes of memory that no tensor uses now; after `save_memory` it may be less."""
    return sum(each.free_bytes() for each in _all())


def release() -> None:
    """Give memory that no tensor uses back to the system."""
    for each in _all():
        each.release()


def save_memory() -> None:
    """Hold no more memory than the process needs, from now on.

    PyTorch and results from here cannot use what the other has left free, so a step holds the most
    of each, even if they come at different times. After this, memory that no tensor uses goes back
    to the system as far as the process would hold more than it needed at any one time of late. The
    step may take longer, as memory has to be asked for again: `docs/native.md` says how much.

    It takes least if this is called before the process has made a tensor: then large tensors of
    PyTorch's on the CPU lie on large pages, too (``THP_MEM_ALLOC_ENABLE`` in the environment, if it
    has no value there), which the system hands out in a fraction of the time. Those tensors go
    back at once where the C library has `mallopt` (glibc): from 1 MB on it gets each from the
    system, and of what is smaller it keeps 8 MB. That cannot be undone. To hold less still, let
    nonlinearities work in place: `inplace = True` on ReLU and on GELU right after a linear layer.

    What a process holds, Linux tells; elsewhere results from here leave 8 MB free.
    """
    # PyTorch looks at it when it makes its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if available:
        _kernels.save_memory()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        mallopt(_M_TRIM_THRESHOLD, 8 << 20)


def _all() -> list[_kernels.Buffers]:
    return [each for each in (floats, codes) if each is not None]


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a tensor whose dimension 1 is the last in memory."""
    strides, step = [0] * len(shape), 1
    for axis in reversed([0, *range(2, len(shape)), 1]):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)
