"""Sites: where a layer quantizes activations on the way forward and errors on the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swalp.formats import Format
from swalp.matmul.attention import Guesses
from swalp.quantize import quantize, quantize_at
from swalp.recipes import fit
from swalp.rounding import Nearest, Rounding, Stochastic


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.int64, device="cpu")


@dataclass(slots=True)
class NoiseClock:
    """Where a converted model stands in its noise: the run's seed, and training passes so far.

    Every forward pass of the model in training mode is one tick, so that each has noise of its own.
    To resume a run bit for bit, save and restore `state_dict()` beside the model's.

    Attributes:
        seed: of the run.
        counter: training passes so far, int64; a tensor, for a compiled graph to count on.
        uses: how many times each site was used in this pass.
        hints: what native attention remembers to be faster; it changes no number.
    """

    seed: int
    counter: Tensor = field(default_factory=_zero)
    uses: dict[str, int] = field(default_factory=dict)
    hints: dict[str, Guesses] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Training passes so far."""
        return int(self.counter)

    def tick(self) -> None:
        """A training pass begins."""
        self.counter = self.counter + 1  # a new tensor: what awaits its backward keeps the old one
        self.uses = {}

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
        self.counter = torch.full_like(self.counter, state["step"])


@dataclass(frozen=True, slots=True)
class Rule:
    """A role at one layer: a format, and a rounding rule that carries the layer's stream."""

    format: Format
    rounding: Rounding

    def __call__(self, x: Tensor, step: int | Tensor | None, call: int) -> Tensor:
        """`x`, quantized at that moment of a run; `step` None: in evaluation, to nearest."""
        if isinstance(step, Tensor):
            if isinstance(self.rounding, Stochastic):
                return quantize_at(x, fit(self.format, x.shape), self.rounding, step, call)
            step = None
        return quantize(x, *self.at(x.shape, step, call))

    def at(self, shape: Sequence[int], step: int | None, call: int) -> tuple[Format, Rounding]:
        """What applies to a tensor of that shape at that moment; `step` None: in evaluation."""
        rounding = self.rounding
        if isinstance(rounding, Stochastic):
            rounding = Nearest() if step is None else rounding.at(step, call)
        return fit(self.format, shape), rounding


@dataclass(slots=True)
class Site:
    """The quantizers at one place of a layer: Q_A on the way forward, Q_E on the way back.

    Attributes:
        name: of the layer.
        clock: of the model.
        activation: Q_A; None: float.
        error: Q_E.
        place: "input" or "output".
    """

    name: str
    clock: NoiseClock
    activation: Rule | None
    error: Rule | None
    place: str = "input"

    def __call__(self, x: Tensor, training: bool, call: int | None = None) -> Tensor:
        """Quantize `x`, and later its gradient; nothing is stochastic unless `training`.

        Args:
            x: a floating-point tensor.
            training: the mode of the layer.
            call: which use of the site in this pass it is; None: the next.
        """
        step: int | Tensor | None = None
        if not training:
            call = 0
        else:
            if call is None:
                call = self.begin()
            step = self.clock.counter if torch.compiler.is_compiling() else self.clock.step
        result: Tensor = _Site.apply(x, self.activation, self.error, step, call)  # type: ignore[no-untyped-call]  # PyTorch ships no type
        return result

    def begin(self) -> int:
        """How many times the layer has run in this pass, so that each run has its own noise."""
        uses, key = self.clock.uses, f"{self.place} of {self.name}"
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            # Inside a backward pass: activation checkpointing runs the layer again, and must see
            # the same noise. Which of several runs this one repeats, nobody says.
            if uses.get(key, 0) > 1:
                raise RuntimeError(
                    f"layer {self.name!r} ran {uses[key]} times in one pass, so activation "
                    f"checkpointing cannot repeat its noise; leave it out of the checkpoint"
                )
            return 0
        run = uses.get(key, 0)
        uses[key] = run + 1
        return run


class _Site(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activation: Rule | None,
        error: Rule | None,
        step: int | Tensor | None,
        call: int,
    ) -> Tensor:
        ctx.error, ctx.call = error, call
        if isinstance(step, Tensor):
            ctx.save_for_backward(step)
            ctx.step = None
        else:
            ctx.step = step
        # An alias, but no view, which an in-place nonlinearity after the layer could not change.
        return x.detach() if activation is None else activation(x, step, call)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.error is not None:
            saved = ctx.saved_tensors
            grad = ctx.error(grad, saved[0] if saved else ctx.step, ctx.call)
        return grad, None, None, None, None
