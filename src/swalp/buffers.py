"""Memory of large results, used again.

A fresh block of 32 MB costs several times what filling it does, as the system hands it out page by
page. Blocks from here go back when the last tensor on them is gone, and the next result that
fits takes them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 22  # bytes: below, the allocator of the C library keeps blocks itself
MOST_FREE = 1 << 26  # bytes of blocks that wait for use, when another is made
_WASTE = 8  # a free block of up to so many times the size serves, else there is one of each size

_lock = threading.Lock()
_blocks: dict[int, list[torch.UntypedStorage]] = {}


def empty(*shape: int, channels_last: bool = False) -> Tensor:
    """Like `torch.empty`: float32 on the CPU, and no view.

    Args:
        shape: of the tensor.
        channels_last: whether dimension 1 is the last in memory; else the tensor is contiguous.
    """
    strides = _strides(shape, channels_last)
    size = 4 * math.prod(shape)
    if size < SMALLEST:
        return torch.empty_strided(shape, strides)
    with _lock:
        fitting = sorted(n for n in _blocks if size <= n <= _WASTE * size)
        free = (block for n in fitting for block in _blocks[n] if _is_free(block))
        found = next(free, None)
        if found is None:
            _trim(size)
            found = torch.UntypedStorage(size)  # type: ignore[no-untyped-call]  # PyTorch ships no type
            _blocks.setdefault(size, []).append(found)
        return torch.empty(0).set_(found, 0, shape, strides)


def free_bytes() -> int:
    """Bytes of blocks that no tensor uses now."""
    with _lock:
        return sum(len([b for b in blocks if _is_free(b)]) * n for n, blocks in _blocks.items())


def release() -> None:
    """Give blocks that no tensor uses back to the system."""
    with _lock:
        for size, blocks in list(_blocks.items()):
            blocks[:] = [block for block in blocks if not _is_free(block)]
            if not blocks:
                del _blocks[size]


def _is_free(block: torch.UntypedStorage) -> bool:
    # One reference: ours.
    return int(torch._C._storage_Use_Count(block._cdata)) == 1


def _trim(kept: int) -> None:
    """Drop free blocks of other sizes than `kept` while there are too many bytes of them."""
    free = [(n, b) for n, blocks in _blocks.items() if n != kept for b in blocks if _is_free(b)]
    total = sum(size for size, _ in free)
    for size, block in free:
        if total <= MOST_FREE:
            return
        _blocks[size].remove(block)
        total -= size


def _strides(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    order = [0, *range(2, len(shape)), 1] if channels_last else range(len(shape))
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)
