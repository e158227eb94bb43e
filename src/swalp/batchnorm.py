"""Batch-norm statistics for averaged weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BatchNorm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def recompute_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    size: Callable[[Any], int] | None = None,
    device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
    progress: bool | Callable[[int], object] = False,
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
        forward: how to run the model on a batch, for batches of any other form:
            ``forward(model, batch)``.
        size: examples in a batch, if its first tensor does not tell.
        device: where to move the inputs; default: they stay.
        group: processes that each have a share of the data, such as
            ``torch.distributed.group.WORLD``: all get the statistics of all batches. Without it,
            each process has its own.
        progress: true for a bar on stderr; or a function that is called with the number of
            examples after each batch.

    Raises:
        ValueError: there is no batch, or the size of one cannot be told.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not layers:
        return
    run = forward or (lambda model, batch: _run(model, _inputs(batch), device))
    with _statistics_replaced(model, layers), _shown(progress, batches) as show:
        seen = 0
        for batch in batches:
            examples = _size(batch) if size is None else size(batch)
            seen += examples
            for layer in layers:
                layer.momentum = examples / seen
            run(model, batch)
            show(examples)
        if group is not None:
            seen = _reduce(layers, seen, group)
        if seen == 0:
            raise ValueError("recompute_batchnorm: there is no batch to compute statistics from")


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch


def _run(model: nn.Module, inputs: Any, device: torch.device | str | None) -> None:
    if isinstance(inputs, Mapping):
        model(**{key: _to(value, device) for key, value in inputs.items()})
    else:
        model(_to(inputs, device))


def _size(batch: Any) -> int:
    inputs = _inputs(batch)
    values = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    for value in values:
        if isinstance(value, Tensor):
            return len(value)
    raise ValueError(
        f"recompute_batchnorm: a batch of type {type(batch).__name__} has no tensor to tell its "
        f"size; give size=, and forward= to run the model on it"
    )


def _reduce(layers: Sequence[Any], seen: int, group: dist.ProcessGroup) -> int:
    """Statistics of all processes, weighted by their examples; returns all examples."""
    device = layers[0].running_mean.device
    total = torch.tensor([float(seen)], dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    examples = int(total.item())
    for layer in layers:
        for statistic in (layer.running_mean, layer.running_var):
            # A process without batches has statistics of nobody, and the weight 0.
            share = statistic.to(torch.float64) * (seen / max(examples, 1))
            dist.all_reduce(share, group=group)
            statistic.copy_(share)
        count = layer.num_batches_tracked
        if count is not None:
            batches = (count if seen else torch.zeros_like(count)).clone()
            dist.all_reduce(batches, group=group)
            count.copy_(batches)
    return examples


@contextmanager
def _shown(
    progress: bool | Callable[[int], object], batches: Iterable[Any]
) -> Iterator[Callable[[int], object]]:
    """What to call after each batch."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda examples: None
        return
    from rich.console import Console
    from rich.progress import Progress

    total = len(batches) if isinstance(batches, Sized) else None
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("batch-norm statistics", total=total)
        yield lambda examples: bar.advance(task)


@contextmanager
def _statistics_replaced(model: nn.Module, layers: Sequence[Any]) -> Iterator[None]:
    """Only `layers` in training mode, nothing counted; on an error, their old statistics back."""
    modes = [(module, module.training) for module in model.modules()]
    saved = [
        (layer.momentum, copy.deepcopy(dict(layer.named_buffers(recurse=False))))
        for layer in layers
    ]
    model.eval()
    for layer in layers:
        layer.train()
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.zero_()
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
