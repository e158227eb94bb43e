"""Low-precision SGD: a pure step function, and the optimizer that keeps its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from swalp.packed import PackedTensor, pack
from swalp.quantize import quantize
from swalp.recipes import Recipe, fit
from swalp.rounding import Stochastic

Quantize = Callable[[str, Tensor], Tensor]


def sgd_step(
    weight: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor | None,
    accumulator: Tensor | None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    quantized: Quantize,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One step of low-precision SGD.

    With g the gradient, v the momentum, w the weight (a the accumulator, if there is one)::

        g = Q_G(g) + weight_decay * w
        v = momentum * v + g                     kept as Q_M(v)
        d = v, or g + momentum * v with Nesterov
        w = Q_W(w - lr * d)                      or a = Q_C(a - lr * d), w = Q_W(a)

    in the arithmetic of `torch.optim.SGD`, whose result it is with every role off. Algorithm 2 has
    Q_M where v is read, v <- momentum * Q_M(v) + g: the same numbers, and what is kept is small.

    Args:
        weight: float, any shape.
        gradient: of the same shape and dtype.
        momentum_buffer: what the last step returned; None at first.
        accumulator: likewise; None without that role.
        lr: as in `torch.optim.SGD`.
        momentum: likewise.
        weight_decay: likewise.
        nesterov: likewise.
        quantized: `quantized(role, tensor)` rounds for the role "gradient", "momentum", "weight" or
            "accumulator"; the identity for a role that is off.

    Returns:
        The new weight, momentum buffer and accumulator; no argument is changed.

    Source: Yang et al. 2019 (arXiv:1904.11943), Algorithm 2; weight decay after Q_G as in its code.
    """
    direction = quantized("gradient", gradient)
    if weight_decay != 0:
        direction = direction.add(weight, alpha=weight_decay)
    if momentum != 0:
        if momentum_buffer is None:
            velocity = direction
        else:
            velocity = momentum_buffer.mul(momentum).add(direction)
        momentum_buffer = quantized("momentum", velocity)
        direction = direction.add(velocity, alpha=momentum) if nesterov else velocity
    if accumulator is None:
        weight = quantized("weight", weight.add(direction, alpha=-lr))
    else:
        accumulator = quantized("accumulator", accumulator.add(direction, alpha=-lr))
        weight = quantized("weight", accumulator)
    return weight, momentum_buffer, accumulator


class SGD(torch.optim.Optimizer):
    """SGD whose gradients, momentum and weights are quantized; `torch.optim.SGD` without a recipe.

    Args:
        params: as for any PyTorch optimizer. Pass ``model.named_parameters()``: the noise of a
            tensor then depends on its name; otherwise on its place among the parameters.
        lr: learning rate.
        momentum: 0 for none.
        weight_decay: L2 penalty, added to the quantized gradient.
        nesterov: Nesterov's form; needs momentum.
        recipe: the formats; None: float.
        seed: the run's seed, as given to `convert`.

    Raises:
        ValueError: a hyperparameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        recipe: Recipe | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"SGD: {name}={value} must be 0 or more")
        if nesterov and momentum == 0:
            raise ValueError("SGD: nesterov=True needs momentum > 0")
        if recipe is not None and not isinstance(recipe, Recipe):
            raise TypeError(f"SGD: recipe must be a Recipe or None, not {recipe!r}")
        self.recipe = recipe
        self.seed = seed
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss, which `step` returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, parameter, group in self._named():
            if parameter.grad is not None:
                self._update(name, parameter, group)
        return loss

    def _update(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            if self.recipe is not None and self.recipe.accumulator is not None:
                state["accumulator"] = parameter.detach().clone()
        weight, momentum_buffer, accumulator = sgd_step(
            parameter,
            parameter.grad,
            state.get("momentum_buffer"),
            state.get("accumulator"),
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            quantized=self._quantizer(name, state["step"], isinstance(parameter, PackedTensor)),
        )
        parameter.copy_(weight)
        state["step"] += 1
        if momentum_buffer is not None:
            state["momentum_buffer"] = momentum_buffer
        if accumulator is not None:
            state["accumulator"] = accumulator

    def _quantizer(self, name: str, step: int, packed: bool) -> Quantize:
        """Q of each role for one parameter at one step; `packed`: what is kept is held as codes."""

        def quantized(role: str, tensor: Tensor) -> Tensor:
            quantizer = None if self.recipe is None else getattr(self.recipe, role)
            if quantizer is None:
                return tensor
            rounding = quantizer.rounding
            if isinstance(rounding, Stochastic):
                rounding = rounding.seeded(self.seed).stream(role, name).at(step)
            fmt = fit(quantizer.format, tensor.dim())
            kept = packed and role != "gradient" and fmt.bits <= 16
            return pack(tensor, fmt, rounding) if kept else quantize(tensor, fmt, rounding)

        return quantized

    def consume_gradients(self) -> list[RemovableHandle]:
        """Update each parameter as soon as its gradient is complete, and free the gradient.

        From then on `backward()` trains: gradients never all exist at once, and `step()` has
        nothing left to do. Not for accumulating gradients over several backward passes.

        Returns:
            The hooks' handles; `remove()` each to go back to `step()`.
        """

        def hook(parameter: Tensor, name: str, group: dict[str, Any]) -> None:
            with torch.no_grad():
                self._update(name, parameter, group)
            parameter.grad = None

        return [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda parameter, name=name, group=group: hook(parameter, name, group)
            )
            for name, parameter, group in self._named()
        ]

    def _named(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Every parameter with its name, or place, and its group."""
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [
                f"{number}.{index}" for index in range(len(group["params"]))
            ]
            for name, parameter in zip(names, group["params"], strict=True):
                yield name, parameter, group
