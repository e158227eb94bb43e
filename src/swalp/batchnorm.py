"""Batch-norm statistics for averaged weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_BatchNorm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def recompute_batchnorm(
    model: nn.Module, batches: Iterable[Any], *, device: torch.device | str | None = None
) -> None:
    """Recompute the batch-norm statistics of `model` from `batches`.

    Running means and variances become the averages of the batches' statistics, each batch weighted
    by its size. Everything but batch norm runs as in `eval()`, so that the statistics fit the
    network as it will be used: dropout off, a converted network's activations rounded to nearest.
    If anything goes wrong, the old statistics stay. A model without batch norm is left alone.

    Args:
        model: the network.
        batches: each a tensor of inputs (N, …); a tuple or list whose first item is one; or a dict
            of keyword arguments for `model`, the size being that of its first tensor.
        device: where to move the inputs; default: they stay.

    Raises:
        ValueError: there is no batch.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not layers:
        return
    with _statistics_replaced(model, layers):
        seen = 0
        for batch in batches:
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            tensors = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
            size = next(len(value) for value in tensors if isinstance(value, Tensor))
            seen += size
            for layer in layers:
                layer.momentum = size / seen
            if isinstance(inputs, Mapping):
                model(**{key: _to(value, device) for key, value in inputs.items()})
            else:
                model(_to(inputs, device))
        if seen == 0:
            raise ValueError("recompute_batchnorm: there is no batch to compute statistics from")


@contextmanager
def _statistics_replaced(model: nn.Module, layers: Sequence[Any]) -> Iterator[None]:
    """Only `layers` in training mode; on an error, their old statistics back."""
    modes = [(module, module.training) for module in model.modules()]
    saved = [
        (layer.momentum, copy.deepcopy(dict(layer.named_buffers(recurse=False))))
        for layer in layers
    ]
    model.eval()
    for layer in layers:
        layer.train()
    try:
        yield
    except BaseException:
        for layer, (_, buffers) in zip(layers, saved, strict=True):
            for name, value in buffers.items():
                getattr(layer, name).copy_(value)
        raise
    finally:
        for layer, (momentum, _) in zip(layers, saved, strict=True):
            layer.momentum = momentum
        for module, training in modes:
            module.training = training


def _to(value: Any, device: torch.device | str | None) -> Any:
    return value.to(device) if device is not None and isinstance(value, Tensor) else value
