"""Memory of large results, used again.

A fresh block of 32 MB costs several times what filling it does, as the system hands it out page by
page. Results from here lie side by side in regions of address space: what the last tensor on a
place leaves free, whatever its size, joins its free neighbours, and the next result takes the
lowest place that it fits in. So the pages in use are those of the most that ever was alive at once,
not those of each size. `save_memory` gives them back sooner.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import threading
import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 18  # bytes: below, the allocator of the C library is as good
REGION = 1 << 30  # bytes of address space; memory only where it has been written
WINDOW = 1 << 12  # results in which memory that none of them touched goes back to the system
_PAGE = mmap.PAGESIZE


class _Place(weakref.ref[memoryview]):
    """A view of a stretch, and where that lies."""

    __slots__ = ("end", "start")
    start: int
    end: int


class _Region:
    """A stretch of address space: which parts are taken, and how much of it is memory.

    Attributes:
        size: bytes.
        address: of the first.
        taken: start and end of what is in use, by start.
        touched: end of what may be memory.
        recent: the highest end in use since the window began.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.memory = mmap.mmap(-1, size, **_PRIVATE)
        self.address = torch.frombuffer(self.memory, dtype=torch.uint8, count=1).data_ptr()
        if _kept is not None:
            self.in_large_pages()
        self.taken: list[tuple[int, int]] = []
        self.alive: dict[int, _Place] = {}
        self.left: deque[_Place] = deque()
        self.touched = self.recent = 0

    def take(self, size: int) -> memoryview | None:
        """The lowest free stretch of that size, until the view is gone; None: there is none."""
        self.sweep()
        start = 0
        for first, end in self.taken:
            if first - start >= size:
                break
            start = end
        if self.size - start < size:
            return None
        insort(self.taken, (start, start + size))
        self.recent = max(self.recent, start + size)
        self.touched = max(self.touched, self.recent)
        view = memoryview(self.memory)[start : start + size]
        # No lock here: a view can go in the midst of anything, in any thread. Nor bytecode, where
        # Ctrl-C would be lost, unless memory goes back.
        place = _Place(view, self.left.append if _kept is None else self.leave)
        place.start, place.end = start, start + size
        self.alive[start] = place
        return view

    def leave(self, place: _Place) -> None:
        """Give a free stretch back, and note it. Until `sweep`, nobody else takes it."""
        start, end = place.start, place.end
        if _kept is not None and _CAN_GIVE_BACK:
            low = max(start, _kept) if end - start <= _kept else start
            if end > low:
                self.memory.madvise(mmap.MADV_DONTNEED, low, end - low)
        self.left.append(place)

    def in_large_pages(self) -> None:
        """Ask for pages of 2 MB: memory comes back from the system in a fraction of the time."""
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)

    def sweep(self) -> None:
        """Take note of what has become free."""
        while self.left:
            start = self.left.popleft().start
            del self.alive[start]
            del self.taken[bisect_left(self.taken, (start,))]

    def give_back(self, keep: int) -> None:
        """Give free memory beyond the first `keep` bytes back to the system."""
        last = self.taken[-1][1] if self.taken else 0
        start = 0
        for first, end in [*self.taken, (max(last, self.touched), 0)]:
            low = max(start, keep)
            if first > low and _CAN_GIVE_BACK:
                self.memory.madvise(mmap.MADV_DONTNEED, low, first - low)
            start = end
        self.touched = max(last, min(keep, self.touched))
        self.recent = last

    def free(self) -> int:
        """Bytes of memory that nothing uses."""
        self.sweep()
        last = self.touched if _kept is None else min(self.touched, _kept)
        return last - sum(max(min(end, last) - start, 0) for start, end in self.taken)


# What a child of `os.fork` writes is its own.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_CAN_GIVE_BACK = hasattr(mmap, "MADV_DONTNEED")

_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # else a child might be born with the lock held for ever
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )
_regions: list[_Region] = []
_codes: list[_Region] = []  # apart: they outlive floats, and would lie between them
_results = 0
_kept: int | None = None  # bytes at the start of each region that stay; None: all
_M_MMAP_THRESHOLD = -3  # of mallopt


def empty(*shape: int, channels_last: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """Like `torch.empty` on the CPU, and no view.

    Args:
        shape: of the tensor.
        channels_last: whether dimension 1 is the last in memory; else the tensor is contiguous.
        dtype: of the tensor.
    """
    count = math.prod(shape)
    size = dtype.itemsize * count
    if size < SMALLEST:
        if channels_last:
            return torch.empty_strided(shape, _strides(shape), dtype=dtype, device="cpu")
        return torch.empty(shape, dtype=dtype, device="cpu")
    regions = _codes if dtype.itemsize == 1 else _regions
    memory = torch.frombuffer(_take(-(-size // _PAGE) * _PAGE, regions), dtype=dtype, count=count)
    return memory.as_strided_(shape, _strides(shape)) if channels_last else memory.resize_(shape)


def holds(x: Tensor) -> bool:
    """Whether a tensor's memory is from here."""
    with _lock:
        regions = [*_regions, *_codes]
    return any(0 <= x.data_ptr() - region.address < region.size for region in regions)


def free_bytes() -> int:
    """Bytes of memory that no tensor uses now; after `save_memory` it may be less."""
    with _lock:
        return sum(region.free() for region in [*_regions, *_codes])


def release() -> None:
    """Give memory that no tensor uses back to the system."""
    with _lock:
        for regions in (_regions, _codes):
            for region in regions:
                region.sweep()
                region.give_back(0)
            regions[:] = [region for region in regions if region.taken]


def save_memory(keep: int = 1 << 22) -> None:
    """Give memory back to the system as soon as nothing uses it, from now on, in this process.

    The peak of a step falls, by half where layers leave large results of PyTorch's between them.
    The step may take longer, as memory has to be asked for again: `docs/native.md` says how much.
    Large tensors of PyTorch's on the CPU go back, too, where the C library has `mallopt` (glibc):
    from 1 MB on it gets each from the system. That cannot be undone. To hold less still, let
    nonlinearities work in place: `inplace = True` on ReLU and on GELU right after a linear layer.

    Args:
        keep: bytes; results of up to that size go on to use that much memory again, of floats and
            of codes each.

    Raises:
        ValueError: `keep` is negative.
    """
    global _kept
    if keep < 0:
        raise ValueError(f"save_memory: keep={keep} must be a number of bytes, at least 0")
    with _lock:
        _kept = -(-keep // _PAGE) * _PAGE
        for region in [*_regions, *_codes]:
            region.in_large_pages()
            region.sweep()
            region.give_back(_kept)
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _take(size: int, regions: list[_Region]) -> memoryview:
    global _results
    with _lock:
        _results += 1
        if _results % WINDOW == 0:
            for region in [*_regions, *_codes]:
                region.sweep()
                region.give_back(region.recent)
        for region in regions:
            if (found := region.take(size)) is not None:
                return found
        region = _region(size)
        regions.append(region)
        found = region.take(size)
        assert found is not None
        return found


def _region(size: int) -> _Region:
    try:
        return _Region(max(size, REGION))
    except OSError:  # address space is limited, or counted as memory
        return _Region(size)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a tensor whose dimension 1 is the last in memory."""
    strides, step = [0] * len(shape), 1
    for axis in reversed([0, *range(2, len(shape)), 1]):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)
