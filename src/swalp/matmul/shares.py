"""Gradients of views that together are all of a tensor, written to their places in its gradient.

Queries, keys and values often are views of one result. Autograd joins their gradients in fresh
memory, and copies that once more into the order of the result. Here each lies where it belongs from
the start, and says so to the function that joins them: then there is nothing to copy. Nobody else
gets to see it: where a view is watched, its gradient is a tensor like others.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from swalp import buffers


class Share(Tensor):
    """A gradient that lies in its place in a larger one, on its way to who joins them.

    Joined in order, in a backward pass, shares are the memory that they lie in; any other operation
    is that of the same tensor without its place.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as PyTorch's own subclasses have it

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # likewise
        """Run an operation, on memory alone."""
        if any(kind is not Share for kind in types):
            return NotImplemented  # the other knows more
        with torch._C._DisableTorchDispatch():
            if func in _JOINS and not kwargs and torch._C._current_graph_task_id() != -1:
                joined = _joined(_JOINS[func], *args)
                if joined is not None:
                    return joined
            return func(*args, **(kwargs or {}))


def share(x: Tensor) -> Tensor:
    """`x` as a share of the memory that it lies in."""
    made: Tensor = torch.Tensor._make_subclass(Share, x)
    return made


class Places:
    """Where the gradients of views go.

    Args:
        whole: what they are views of.
        views: all of it, each element once.
    """

    def __init__(self, whole: Tensor, views: Sequence[Tensor]) -> None:
        self._shape, self._first = whole.shape, whole.storage_offset()
        self._views = [(x.shape, x.stride(), x.storage_offset()) for x in views]
        self._alive = [weakref.ref(x) for x in views]
        self._hooks = [_hooks_of(x) for x in views]

    def gradients(self) -> list[Tensor]:
        """Room for the gradients, in order."""
        whole = buffers.empty(*self._shape)
        return [
            whole.as_strided(shape, stride, offset - self._first)
            for shape, stride, offset in self._views
        ]

    def handed_out(self, gradients: Sequence[Tensor], everything: bool) -> list[Tensor]:
        """The same, written, for autograd: to be joined, unless somebody else would see them.

        Args:
            gradients: as `gradients` gave them.
            everything: whether the backward pass runs all of the graph, and hands out nothing.
        """
        views = [one() for one in self._alive]
        kept = any(x is not None and x.retains_grad for x in views)
        if kept or any(self._hooks) or not everything:
            return [x.clone(memory_format=torch.contiguous_format) for x in gradients]
        return [share(x) for x in gradients]


def places(*views: Tensor) -> Places | None:
    """Where the gradients of these go.

    None unless one function of autograd's made them all, of a tensor whose memory they are, side by
    side and each with its last dimension in order.
    """
    first = views[0]
    whole, function = first._base, first.grad_fn
    if whole is None or not whole.is_contiguous() or type(function).__name__ not in _CUTS:
        return None
    if any(x._base is not whole or x.grad_fn is not function for x in views):
        return None
    if any(x.shape != first.shape or x.stride() != first.stride() for x in views):
        return None
    if first.stride(-1) != 1:
        return None
    step = _step(views)
    axes = sorted([*zip(first.stride(), first.shape, strict=True), (step, len(views))])
    expected = 1
    for stride, size in axes:
        if size != 1 and stride != expected:
            return None
        expected *= size
    return Places(whole, views) if expected == whole.numel() else None


# What makes several views of a tensor, and joins their gradients.
_CUTS = ("UnbindBackward0", "SplitBackward0", "SplitWithSizesBackward0")


@cache
def never() -> Tensor:
    """An input for functions of autograd that ask `runs_everything`, the last: it gets nothing."""
    with torch.inference_mode(False):  # it outlives a mode that happens to be on
        return torch.zeros(0, dtype=torch.float32, device="cpu", requires_grad=True)


def runs_everything(ctx: Any) -> bool:
    """Whether the backward pass runs the whole graph, not what leads to some gradients alone.

    Args:
        ctx: of a function whose last input is `never`: nobody asks for the gradient of that.
    """
    whole: bool = torch._C._will_engine_execute_node(ctx.next_functions[-1][0])
    return whole


def _hooks_of(x: Tensor) -> dict[int, Any]:
    """The hooks of a tensor: those of now, and any to come, when the tensor may be gone."""
    if x._backward_hooks is None:  # as `register_hook` begins
        x._backward_hooks = OrderedDict()
        assert x.grad_fn is not None  # a view
        x.grad_fn._register_hook_dict(x)
    return x._backward_hooks


def _step(parts: Sequence[Tensor]) -> int:
    """Elements from one part to the next; 0 if these differ, or parts do not follow each other."""
    offsets = [int(x.storage_offset()) for x in parts]
    step = offsets[1] - offsets[0] if len(parts) > 1 else 0
    return step if offsets == [offsets[0] + i * step for i in range(len(parts))] else 0


def _stacked(parts: Sequence[Tensor], step: int, dim: int) -> Tensor | None:
    first = parts[0]
    size, stride = list(first.shape), list(first.stride())
    at = dim % (len(size) + 1)
    size.insert(at, len(parts))
    stride.insert(at, step)
    return first.as_strided(size, stride, first.storage_offset())


def _side_by_side(parts: Sequence[Tensor], step: int, dim: int) -> Tensor | None:
    first = parts[0]
    if step != first.size(dim) * first.stride(dim):
        return None
    size = list(first.shape)
    size[dim] *= len(parts)
    return first.as_strided(size, first.stride(), first.storage_offset())


# Each joins parts that lie so many elements apart along that dimension.
Join = Callable[[Sequence[Tensor], int, int], Tensor | None]
_JOINS: dict[Any, Join] = {
    torch.ops.aten.stack.default: _stacked,
    torch.ops.aten.cat.default: _side_by_side,
}


def _joined(join: Join, parts: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    """The parts joined, as a view of the memory that they lie in; None if they lie otherwise."""
    first = parts[0]
    memory = first.untyped_storage()._cdata
    if any(
        type(x) is not Share
        or x.untyped_storage()._cdata != memory
        or x.shape != first.shape
        or x.stride() != first.stride()
        for x in parts
    ):
        return None
    step = _step(parts)
    return join(parts, step, dim) if step > 0 else None
