"""The average of the iterates: the product of a run."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swalp._validation import require_int
from swalp.convert import to_float

_BatchNorm = nn.modules.batchnorm._BatchNorm


class WeightAverage:
    """The equal-weight average of a model's parameters (SWA), kept in high precision.

    Call `update_parameters` after each optimizer step. With t counting the calls, the parameters
    enter the average when t > `start` and (t - start) is a multiple of `every`:
    average += (parameter - average) / (count + 1).

    Args:
        model: the network that will be averaged, converted or float.
        start: S, steps before averaging starts.
        every: c, steps between two iterates that are averaged.
        dtype: of the average: torch.float32 or torch.float64, whatever the model's is.

    Source: Yang et al. 2019 (arXiv:1904.11943), Algorithms 1 and 2.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        start: int = 0,
        every: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        require_int("WeightAverage", "start", start, 0, 2**62, "it counts optimizer steps")
        require_int("WeightAverage", "every", every, 1, 2**62, "it counts optimizer steps")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"WeightAverage: dtype={dtype} must be torch.float32 or torch.float64; a shorter "
                f"accumulator stops moving after a few hundred iterates"
            )
        self.start = start
        self.every = every
        self.steps = 0
        self.count = 0
        self._dtype = dtype
        self._module = to_float(model).requires_grad_(False)
        self._average = {
            name: torch.zeros_like(parameter, dtype=dtype)
            for name, parameter in model.named_parameters()
        }

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Count a step, and take `model`'s parameters into the average if it is time."""
        self.steps += 1
        elapsed = self.steps - self.start
        if elapsed <= 0 or elapsed % self.every:
            return
        for name, parameter in model.named_parameters():
            average = self._average[name]
            average += (parameter.detach().to(average) - average) / (self.count + 1)
        for own, buffer in zip(self._module.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)
        self.count += 1

    @property
    def module(self) -> nn.Module:
        """A float network with the averaged parameters and the latest buffers.

        It is one and the same network, refreshed at each access. Batch-norm statistics are those of
        the iterate: run `recompute_batchnorm` before using it.

        Raises:
            RuntimeError: nothing has been averaged yet.
        """
        if self.count == 0:
            raise RuntimeError(
                f"WeightAverage: no average after {self.steps} steps; it starts after step "
                f"{self.start} and takes every {self.every}th"
            )
        with torch.no_grad():
            for name, parameter in self._module.named_parameters():
                parameter.copy_(self._average[name])
        return self._module

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: counts, the average, the latest buffers."""
        return {
            "steps": self.steps,
            "count": self.count,
            "average": {name: value.clone() for name, value in self._average.items()},
            "buffers": {name: value.clone() for name, value in self._module.named_buffers()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it belongs to a network with other parameters.
        """
        average = state["average"]
        mine = {name: value.shape for name, value in self._average.items()}
        theirs = {name: value.shape for name, value in average.items()}
        if mine != theirs:
            different = sorted(
                name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)
            )
            raise ValueError(
                f"WeightAverage: the saved average is of another network; names or shapes differ: "
                f"{', '.join(different[:5])}"
            )
        self.steps, self.count = state["steps"], state["count"]
        for name, value in self._average.items():
            value.copy_(average[name])
        for name, buffer in self._module.named_buffers():
            buffer.copy_(state["buffers"][name])


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
