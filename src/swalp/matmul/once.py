"""Backward passes on memory: they have no gradient, and take one gradient at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Backward = Callable[..., Any]


def once(backward: Backward) -> Backward:
    """`once_differentiable`, which refuses several gradients at once of a result as well."""
    refuses: Backward = once_differentiable(backward)  # a second derivative

    @wraps(backward)
    def checked(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> Any:
        for one in (grad, *others) if others else (grad,):
            if one is not None and not torch._C._has_storage(one):
                raise RuntimeError(
                    "native layers take back one gradient at a time; leave is_grads_batched and "
                    'vectorize False, or convert with a recipe of product="simulated"'
                )
        # Nobody records what happens here, most times, and then there is nothing to refuse.
        if torch.is_grad_enabled():
            return refuses(ctx, grad, *others)
        return backward(ctx, grad, *others)

    return checked
