"""Product layers that quantize what enters them, and the error that leaves them.

Each class is its PyTorch parent plus one attribute, `signal`: parameters, names, state and
everything that asks `isinstance` stay as they were.
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
class Signal:
    """The quantizers at a layer's input: Q_A on the way forward, Q_E on the way back."""

    name: str
    clock: NoiseClock
    activation: Rule | None
    error: Rule | None
    step: int = -1
    calls: int = 0

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """Quantize `x`, and later its gradient; nothing is stochastic unless `training`."""
        moment = (x.dim(), self.clock.step, self._call() if training else 0, training)
        result: Tensor = _Signal.apply(  # type: ignore[no-untyped-call]  # PyTorch ships no type
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


class _Signal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activation: tuple[Format, Rounding] | None,
        error: tuple[Format, Rounding] | None,
    ) -> Tensor:
        ctx.error = error
        return x.view_as(x) if activation is None else quantize(x, *activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad if ctx.error is None else quantize(grad, *ctx.error), None, None


class QuantizedInput:
    """Mixin over a product layer: `signal` quantizes its input."""

    signal: Signal
    training: bool

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """The parent's forward on the quantized input."""
        result: Tensor = super().forward(self.signal(x, self.training), *args)  # type: ignore[misc]  # a mixin
        return result


class Linear(QuantizedInput, nn.Linear):
    """`torch.nn.Linear` on a quantized input."""


class Conv1d(QuantizedInput, nn.Conv1d):
    """`torch.nn.Conv1d` on a quantized input."""


class Conv2d(QuantizedInput, nn.Conv2d):
    """`torch.nn.Conv2d` on a quantized input."""


class Conv3d(QuantizedInput, nn.Conv3d):
    """`torch.nn.Conv3d` on a quantized input."""


CONVERTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
}
