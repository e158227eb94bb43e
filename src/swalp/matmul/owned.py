"""Whether a gradient that comes in belongs to nobody else, so that a result may take its place.

A gradient on its way through autograd is held by the function that it goes to. Others may hold it
too: a hook that kept it, another function that it also goes to, a view. Each is one more reference:
to the tensor, to its storage, or to the Python object of either. How many there are with nobody
else depends on PyTorch, on Python, and on how Python calls functions now, and is found by trial.

    @staticmethod
    @once
    def backward(ctx, grad):
        mine = references(grad) == alone()
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swalp import buffers
from swalp.matmul.once import once


class References(NamedTuple):
    """References to a tensor, to its storage, and to the Python objects of both."""

    tensor: int
    storage: int
    tensor_object: int
    storage_object: int


_COUNTS = hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")
_UNKNOWN = References(-1, -1, -1, -1)


def references(gradient: Tensor) -> References:
    """Those of an argument of a backward function, `once`, which calls this."""
    if not _COUNTS:
        return _UNKNOWN
    storage: Any = gradient.untyped_storage()
    return References(
        gradient._use_count(),  # type: ignore[attr-defined]  # not in PyTorch's stub
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(gradient),
        sys.getrefcount(storage),
    )


def alone() -> References:
    """What `references` finds for a gradient that only its function holds; never, if it cannot."""
    return _alone(_in_call(object()))


def place(grad: Tensor, mine: bool, channels_last: bool = False) -> Tensor:
    """Where a gradient of the shape of `grad` goes: there, if it is in order and nobody else's."""
    laid = grad.movedim(1, -1) if channels_last else grad
    if mine and buffers.holds(grad) and laid.is_contiguous():
        return grad
    return buffers.empty(*grad.shape, channels_last=channels_last)


def _in_call(thing: object) -> int:
    """References to an argument: more where TorchDynamo looks at frames, as after its errors."""
    return sys.getrefcount(thing)


@cache
def _alone(in_call: int) -> References:
    """`alone`, where `_in_call` finds so many."""
    if not _COUNTS:
        return References(0, 0, 0, 0)
    found: list[References] = []
    for _ in range(3):  # a debugger may hold more for a while, but never less
        x = torch.zeros(2, requires_grad=True, device="cpu")
        with torch.enable_grad():
            y: Tensor = _Makes.apply(_Counts.apply(x, found))  # type: ignore[no-untyped-call]  # PyTorch ships no type
        torch.autograd.grad(y, x, torch.ones(2, device="cpu"))
    return References(*map(min, *found))


class _Makes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


class _Counts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[References]) -> Tensor:
        ctx.found = found
        return x.clone()

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.found.append(references(grad))
        return grad.clone(), None
