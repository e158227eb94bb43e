"""Results that the layer after need not keep, as what their own layer keeps computes them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Again(NamedTuple):
    """What computes the output of a layer once more, bit for bit.

    Attributes:
        tensors: which the layer keeps anyway.
        compute: makes the output of them, or that part of its first dimension which the argument
            `part`, a slice, names.
    """

    tensors: tuple[Tensor | None, ...]
    compute: Callable[..., Tensor]


def carry(inner: Tensor, y: Tensor) -> Tensor:
    """`y`, with what the context of the function that made `inner` calls `again`."""
    node = inner.grad_fn
    if node is not None and (again := getattr(node, "again", None)) is not None:
        del node.again  # type: ignore[attr-defined]  # the context of a function is its node
        y._again = (again, y._version)  # type: ignore[attr-defined]  # seen by `again_of`
    return y


def again_of(y: Tensor) -> Again | None:
    """What computes `y` again, if it is the unchanged output of a layer that keeps so much."""
    found = getattr(y, "_again", None)
    if found is None or found[1] != y._version:
        return None
    again: Again = found[0]
    return again
