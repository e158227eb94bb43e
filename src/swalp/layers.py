"""Layers that quantize at sites: activations on the way forward, errors on the way back.

Each class is its PyTorch parent plus two attributes, `input_site` and `output_site`: parameters,
names, state and everything that asks `isinstance` stay as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swalp.formats import Format
from swalp.quantize import quantize
from swalp.recipes import fit
from swalp.rounding import Nearest, Rounding, Stochastic


@dataclass(slots=True)
class NoiseClock:
    """Where a converted model stands in its noise: the run's seed, and training passes so far.

    Every forward pass of the model in training mode is one tick, so that each has noise of its own.
    To resume a run bit for bit, save and restore `state_dict()` beside the model's.
    """

    seed: int
    step: int = 0

    def state_dict(self) -> dict[str, int]:
        """Seed and step."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it belongs to a run with another seed, whose streams are other streams.
        """
        if state["seed"] != self.seed:
            raise ValueError(
                f"the saved noise has seed {state['seed']}, this model was converted with seed "
                f"{self.seed}; convert it with seed={state['seed']}"
            )
        self.step = state["step"]


@dataclass(frozen=True, slots=True)
class Rule:
    """A role at one layer: a format, and a rounding rule that carries the layer's stream."""

    format: Format
    rounding: Rounding

    def at(self, ndim: int, step: int, call: int, training: bool) -> tuple[Format, Rounding]:
        """What applies to a tensor of `ndim` dimensions at that moment."""
        rounding = self.rounding
        if isinstance(rounding, Stochastic):
            rounding = rounding.at(step, call) if training else Nearest()
        return fit(self.format, ndim), rounding


@dataclass(slots=True)
class Site:
    """The quantizers at one place of a layer: Q_A on the way forward, Q_E on the way back."""

    name: str
    clock: NoiseClock
    activation: Rule | None
    error: Rule | None
    step: int = -1
    calls: int = 0

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """Quantize `x`, and later its gradient; nothing is stochastic unless `training`."""
        moment = (x.dim(), self.clock.step, self._call() if training else 0, training)
        result: Tensor = _Site.apply(  # type: ignore[no-untyped-call]  # PyTorch ships no type
            x,
            None if self.activation is None else self.activation.at(*moment),
            None if self.error is None else self.error.at(*moment),
        )
        return result

    def _call(self) -> int:
        """How many times the layer has run in this pass, so that each run has its own noise."""
        if torch._C._current_graph_task_id() != -1:
            # Inside a backward pass: activation checkpointing runs the layer again, and must see
            # the same noise. Which of several runs this one repeats, nobody says.
            if self.calls > 1:
                raise RuntimeError(
                    f"layer {self.name!r} ran {self.calls} times in one pass, so activation "
                    f"checkpointing cannot repeat its noise; leave it out of the checkpoint"
                )
            return 0
        if self.step != self.clock.step:
            self.step, self.calls = self.clock.step, 0
        self.calls += 1
        return self.calls - 1


class _Site(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activation: tuple[Format, Rounding] | None,
        error: tuple[Format, Rounding] | None,
    ) -> Tensor:
        ctx.error = error
        # An alias, but no view, which an in-place nonlinearity after the layer could not change.
        return x.detach() if activation is None else quantize(x, *activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad if ctx.error is None else quantize(grad, *ctx.error), None, None


class QuantizedLayer:
    """Mixin over a layer of PyTorch: sites quantize its input and its output; None: float."""

    input_site: Site | None
    output_site: Site | None
    training: bool

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """The parent's forward between the sites."""
        if self.input_site is not None:
            x = self.input_site(x, self.training)
        y: Tensor = super().forward(x, *args)  # type: ignore[misc]  # a mixin
        return y if self.output_site is None else self.output_site(y, self.training)


class Linear(QuantizedLayer, nn.Linear):
    """`torch.nn.Linear` between sites."""


class Conv1d(QuantizedLayer, nn.Conv1d):
    """`torch.nn.Conv1d` between sites."""


class Conv2d(QuantizedLayer, nn.Conv2d):
    """`torch.nn.Conv2d` between sites."""


class Conv3d(QuantizedLayer, nn.Conv3d):
    """`torch.nn.Conv3d` between sites."""


PRODUCTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
}
