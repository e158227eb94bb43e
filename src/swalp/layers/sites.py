"""Sites: where a layer quantizes activations on the way forward and errors on the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._C import _current_graph_task_id
from torch.compiler import is_compiling

from swalp.formats import Format
from swalp.matmul.attention import Guesses
from swalp.quantize import quantize, quantize_at
from swalp.recipes import fit
from swalp.rounding import Nearest, Rounding, Stochastic


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.int64, device="cpu")


def _unwrapped(x: Tensor) -> Tensor:
    """What is left of a tensor when the transforms of `torch.func` around it have ended."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


@dataclass(slots=True)
class NoiseClock:
    """Where a converted model stands in its noise: the run's seed, and training passes so far.

    Every forward pass of the model in training mode is one tick, so that each has noise of its own.
    To resume a run bit for bit, save and restore `state_dict()` beside the model's.

    Attributes:
        seed: of the run.
        uses: how many times each site was used in this pass.
        repeats: how many times each site was used again since, by activation checkpointing.
        passes: in eager mode, since the last one of which a backward pass repeated something.
        hints: what native attention remembers to be faster; it changes no number.
    """

    seed: int
    uses: dict[str, int] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    passes: int = 0
    hints: dict[str, Guesses] = field(default_factory=dict)
    _counter: Tensor = field(default_factory=_zero, init=False)
    _since: int = field(default=0, init=False)  # passes that the tensor has not counted,
    # as it does only once there is a compiled graph, which would be made anew for each number.
    _counts: bool = field(default=False, init=False)
    _read: tuple[Tensor, int] = field(init=False)  # a tensor, and the number in it

    def __post_init__(self) -> None:
        self._read = self._counter, 0

    @property
    def step(self) -> int:
        """Training passes so far."""
        if self._read[0] is not self._counter:
            self._read = self._counter, int(self._counter)
        return self._read[1] + self._since

    @property
    def counter(self) -> Tensor:
        """The same, int64: a tensor, for a compiled graph to count on."""
        self._count()
        return self._counter

    def _count(self) -> None:
        if self._since:
            # A new one: what awaits its backward keeps the old one.
            counter = self._counter + self._since
            self._counter = counter if is_compiling() else _unwrapped(counter)
            self._since = 0

    def tick(self) -> None:
        """A training pass begins."""
        if is_compiling():
            self._counter = self.counter + 1
            self._counts = True
        else:
            if in_backward():
                return  # activation checkpointing runs the model again: with the same noise
            self.passes = 1 if self.repeats else self.passes + 1
            self.repeats = {}
            self._since += 1
            if self._counts:
                self._count()
        self.uses = {}

    def state_dict(self) -> dict[str, Any]:
        """Seed, step, and what was used in the pass, which goes on if only layers are called."""
        return {"seed": self.seed, "step": self.step, "uses": dict(self.uses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it belongs to a run with another seed, whose streams are other streams.
        """
        if state["seed"] != self.seed:
            raise ValueError(
                f"the saved noise has seed {state['seed']}, this model was converted with seed "
                f"{self.seed}; convert it with seed={state['seed']}"
            )
        self._counter = torch.full_like(self._counter, state["step"])
        self._read = self._counter, state["step"]
        self._since = 0
        self.uses = dict(state.get("uses", {}))


def in_backward() -> bool:
    """Whether this runs inside a backward pass: activation checkpointing runs layers again."""
    return _current_graph_task_id() != -1


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

    def in_evaluation(self) -> Rule:
        """The same rule, to nearest at any step."""
        return replace(self, rounding=Nearest()) if isinstance(self.rounding, Stochastic) else self


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
            step = self.clock.counter if is_compiling() else self.clock.step
        transformed = torch._C._are_functorch_transforms_active()
        function: Any = _TransformableSite if transformed else _Site
        result: Tensor = function.apply(x, self.activation, self.error, step, call)
        return result

    def in_evaluation(self) -> Site:
        """A site of the same formats, to nearest in either mode, which leaves the clock alone."""
        activation, error = (
            None if rule is None else rule.in_evaluation() for rule in (self.activation, self.error)
        )
        clock = NoiseClock(self.clock.seed)
        return replace(self, clock=clock, activation=activation, error=error)

    def begin(self) -> int:
        """How many times the layer has run in this pass, so that each run has its own noise."""
        uses, key = self.clock.uses, f"{self.place} of {self.name}"
        if not is_compiling() and in_backward():
            self._repeat(key)
            return 0
        run = uses.get(key, 0)
        uses[key] = run + 1
        return run

    def _repeat(self, key: str) -> None:
        """Activation checkpointing runs the layer again, and must see the same noise.

        Raises:
            RuntimeError: of several runs, nobody says which one this repeats.
        """
        clock = self.clock
        clock.repeats[key] = clock.repeats.get(key, 0) + 1
        runs = clock.uses.get(key, 0)
        if runs > 1:
            raise RuntimeError(
                f"layer {self.name!r} ran {runs} times in one pass, so activation checkpointing "
                f"cannot repeat its noise; leave it out of the checkpoint"
            )
        if clock.repeats[key] > 1 and clock.passes > 1:
            raise RuntimeError(
                f"the model ran {clock.passes} times before layer {self.name!r} was repeated by "
                f"activation checkpointing, which can repeat the noise of the last pass alone; "
                f"call backward() after each pass"
            )


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


class _TransformableSite(torch.autograd.Function):
    """`_Site` for `torch.func`: it takes longer to apply, and Dynamo does not know it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        activation: Rule | None,
        error: Rule | None,
        step: int | None,
        call: int,
    ) -> Tensor:
        return x.clone() if activation is None else activation(x, step, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.error, ctx.step, ctx.call = inputs

    backward = staticmethod(_Site.backward)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.clone()  # straight through
