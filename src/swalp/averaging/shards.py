"""This rank's part of a sharded parameter (DTensor, FSDP), and back."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

# Importing DTensor takes half as long as importing torch; where nobody has, nothing is sharded.
_MODULE = "torch.distributed.tensor"
_FSDP = "torch.distributed.fsdp"


def is_sharded(value: Tensor) -> bool:
    """Whether `value` is a DTensor."""
    return _MODULE in sys.modules and isinstance(value, sys.modules[_MODULE].DTensor)


def reshard(model: nn.Module) -> None:
    """Have FSDP forget what it gathered, so that parameters are shards, and values those of these.

    After a forward pass without a backward pass it keeps the whole of some.
    """
    if _FSDP not in sys.modules:
        return
    for module in model.modules():
        if isinstance(module, sys.modules[_FSDP].FSDPModule):
            module.reshard()


def local(value: Any) -> Tensor:
    """This rank's shard of a sharded tensor; any other tensor itself."""
    return value.to_local() if is_sharded(value) else value  # type: ignore[no-any-return]  # a tensor


def whole(value: Any) -> Tensor:
    """All of a sharded tensor, on every rank, which must all ask; any other tensor itself."""
    return value.full_tensor() if is_sharded(value) else value  # type: ignore[no-any-return]  # a tensor


def sharded_like(like: Any, shard: Tensor) -> Tensor:
    """`shard` as this rank's part of a tensor, if `like` is sharded; else itself."""
    if not is_sharded(like):
        return shard
    result: Tensor = sys.modules[_MODULE].DTensor.from_local(
        shard,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return result
