"""Batch-norm statistics for averaged weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swalp.layers import Quantized

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
    by its size; of a layer that is used several times in a pass, or not in each, of what passed it.
    A layer that is never used keeps its own. Everything but batch norm runs as in `eval()`, so that
    the statistics fit the network as it will be used: dropout off, a converted network's
    activations rounded to nearest. If anything goes wrong, the old statistics stay. A model without
    batch norm is left alone.

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
        ValueError: there is no batch, the size of one cannot be told, or `model` is an
            `nn.DataParallel` that runs copies of its layers.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not layers:
        return
    run = forward or (lambda model, batch: _run(model, _inputs(batch), device))
    with (
        _statistics_replaced(model, layers),
        _weighed(layers) as seen,
        _shown(progress, batches) as show,
    ):
        for batch in batches:
            seen.batch = _size(batch) if size is None else size(batch)
            if seen.batch == 0:
                continue
            seen.examples += seen.batch
            run(model, batch)
            show(seen.batch)
        if group is not None:
            _reduce(seen, group)
        if seen.examples == 0:
            raise ValueError("recompute_batchnorm: there is no batch to compute statistics from")


@dataclass(slots=True)
class _Seen:
    """How many examples there were, and how many each layer has seen: one once for each use.

    It is called before each use of a layer.

    Attributes:
        examples: in all batches, that which runs included.
        batch: examples in the batch that runs.
        by_layer: how many each layer has seen.
    """

    examples: int
    batch: int
    by_layer: dict[Any, int]

    def __call__(self, layer: Any, args: object) -> None:
        """Have `layer` weigh its next statistics as one of all batches that it has seen."""
        if layer not in self.by_layer:
            raise ValueError(
                "recompute_batchnorm: nn.DataParallel runs copies of its layers, each on a part of "
                "the batch; pass its module, on one device"
            )
        self.by_layer[layer] += self.batch
        layer.momentum = self.batch / self.by_layer[layer]


@contextmanager
def _weighed(layers: Sequence[nn.Module]) -> Iterator[_Seen]:
    seen = _Seen(0, 0, dict.fromkeys(layers, 0))
    hooks = [layer.register_forward_pre_hook(seen) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


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


def _reduce(seen: _Seen, group: dist.ProcessGroup) -> None:
    """Statistics of all processes, weighted by the examples that each layer has seen there."""
    layers = list(seen.by_layer)
    counts = [float(count) for count in (seen.examples, *seen.by_layer.values())]
    totals = torch.tensor(counts, dtype=torch.float64, device=layers[0].running_mean.device)
    dist.all_reduce(totals, group=group)
    seen.examples, *all_seen = map(int, totals.tolist())
    for layer, total in zip(layers, all_seen, strict=True):
        if total == 0:
            continue  # in no process: its old statistics stay
        for statistic in (layer.running_mean, layer.running_var):
            # A process without batches has statistics of nobody, and the weight 0.
            share = statistic.to(torch.float64) * (seen.by_layer[layer] / total)
            dist.all_reduce(share, group=group)
            statistic.copy_(share)
        if layer.num_batches_tracked is not None:
            dist.all_reduce(layer.num_batches_tracked, group=group)


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
    """Only `layers` in training mode, nothing counted; on an error, their old statistics back.

    Their own sites are as in evaluation.
    """
    modes = [(module, module.training) for module in model.modules()]
    lowered = [(layer, layer._swalp_layer) for layer in layers if isinstance(layer, Quantized)]
    saved = [
        (layer.momentum, copy.deepcopy(dict(layer.named_buffers(recurse=False))))
        for layer in layers
    ]
    try:
        model.eval()
        for layer in layers:
            layer.train()
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.zero_()
        for layer, own in lowered:
            layer._swalp_layer = own.in_evaluation()
        yield
    except BaseException:
        for layer, (_, buffers) in zip(layers, saved, strict=True):
            for name, value in buffers.items():
                getattr(layer, name).copy_(value)
        raise
    finally:
        for layer, (momentum, _) in zip(layers, saved, strict=True):
            layer.momentum = momentum
        for layer, own in lowered:
            layer._swalp_layer = own
        for module, training in modes:
            module.training = training


def _to(value: Any, device: torch.device | str | None) -> Any:
    return value.to(device) if device is not None and isinstance(value, Tensor) else value
