"""Backward passes on memory: they have no gradient, and take one gradient at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Backward = Callable[[Any, Tensor], Any]


def once(backward: Backward) -> Backward:
    """`once_differentiable`, which refuses several gradients at once as well."""
    refuses: Backward = once_differentiable(backward)  # a second derivative

    @wraps(backward)
    def checked(ctx: Any, grad: Tensor) -> Any:
        if not torch._C._has_storage(grad):
            raise RuntimeError(
                "native layers take back one gradient at a time; leave is_grads_batched and "
                'vectorize False, or convert with a recipe of product="simulated"'
            )
        # Nobody records what happens here, most times, and then there is nothing to refuse.
        return refuses(ctx, grad) if torch.is_grad_enabled() else backward(ctx, grad)

    return checked
