"""Memory of large results, used again.

A fresh block of 32 MB costs several times what filling it does, as the system hands it out page by
page. Results from here lie side by side in regions of address space: what the last tensor on a
place leaves free, whatever its size, joins its free neighbours, the next result takes the lowest
place that it fits in, and where that has no memory yet, pages that are free elsewhere move there.
So the pages in use are those of the most that ever was alive at once, not those of each size, and
with `share_with_torch` PyTorch's own tensors are among these. Without the kernels, and on systems
that have no `mmap`, results are PyTorch's own.
"""

from __future__ import annotations

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
SMALLEST_OF_TORCH = 1 << 21  # bytes: what is smaller would hold a page of that
REGION = 1 << 30  # bytes of address space; memory only where it has been written
WINDOW = 1 << 12  # results after which memory that was free all the time goes back to the system
# Kind, by DLPack's numbers, and bytes.
_TYPES = {torch.float32: (2, 4), torch.int8: (0, 1), torch.uint8: (1, 1)}

# Where floats lie, for who makes a result in a compiled call of its own; None: PyTorch makes all.
floats = None if not available else _kernels.Buffers(SMALLEST, REGION, WINDOW)
# Apart: codes outlive floats, and would lie between them.
codes = None if not available else _kernels.Buffers(SMALLEST, REGION, WINDOW)
# PyTorch's own tensors, once they lie here.
_torch: _kernels.Buffers | None = None


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
    """Whether a tensor is a result from here: nobody else has made its memory."""
    return any(each is not None and each.holds(x.data_ptr()) for each in (floats, codes))


def free_bytes() -> int:
    """Bytes of memory that no tensor uses now."""
    return sum(each.free_bytes() for each in _all())


def release() -> None:
    """Give memory that no tensor uses back to the system."""
    for each in _all():
        each.release()


def share_with_torch() -> bool:
    """Let PyTorch's large tensors on the CPU lie here, too, from now on.

    They and results from here then use the same free memory: a process needs what is alive at once,
    of both, and asks the system for nothing in a step that another step left free. What a tensor
    leaves stays with the process, as on a GPU, until 4,096 further ones have not needed it, or
    `release` is called. `swalp.convert` calls this for recipes with native products, unless
    ``SWALP_SHARE_MEMORY=0`` is in the environment. It cannot be undone. Numbers do not change, nor
    does where older tensors lie.

    PyTorch's tensors of 2 MB and more are meant, on Linux; its library ``libc10.so`` is told to ask
    for their memory here. Memory comes in pages of 2 MB: tensors that are written only here and
    there take more of it than from the C library.

    Returns:
        Whether they lie here; `swalp doctor` says it, too.

    Raises:
        ValueError: `SWALP_SHARE_MEMORY` is neither 0 nor 1.
    """
    global _torch
    if not may_share() or not available:
        return _torch is not None
    torch.empty(1, device="cpu")  # afterwards the linker knows what takes and frees memory
    _torch = _kernels.Buffers.of_torch(SMALLEST_OF_TORCH, REGION, WINDOW)
    return _torch is not None


def may_share() -> bool:
    """Whether the environment lets PyTorch's tensors lie here.

    Raises:
        ValueError: `SWALP_SHARE_MEMORY` is neither 0 nor 1.
    """
    asked = os.environ.get("SWALP_SHARE_MEMORY") or "1"
    if asked not in ("0", "1"):
        raise ValueError(f"SWALP_SHARE_MEMORY={asked}: it may be 0 or 1, or unset, which is 1")
    return asked == "1"


def _all() -> list[_kernels.Buffers]:
    return [each for each in (floats, codes, _torch) if each is not None]


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a tensor whose dimension 1 is the last in memory."""
    strides, step = [0] * len(shape), 1
    for axis in reversed([0, *range(2, len(shape)), 1]):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)
