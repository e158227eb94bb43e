"""Low-precision stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from swalp._validation import require_bool, require_not_negative
from swalp.optim import fused
from swalp.optim.base import LowPrecisionOptimizer, Quantize
from swalp.recipes import Recipe


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

        g = Q_G(g) + weight_decay * w            or weight_decay * a
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
        decayed = weight if accumulator is None else accumulator
        direction = direction.add(decayed, alpha=weight_decay)
    if momentum != 0:
        if momentum_buffer is None:
            velocity = direction
        else:
            velocity = momentum_buffer.mul(momentum).add(direction)
        momentum_buffer = quantized("momentum", velocity)
        if momentum_buffer is gradient:  # nothing rounded it, and zero_grad may write to it
            momentum_buffer = gradient.clone()
        direction = direction.add(velocity, alpha=momentum) if nesterov else velocity
    if accumulator is None:
        weight = quantized("weight", weight.add(direction, alpha=-lr))
    else:
        accumulator = quantized("accumulator", accumulator.add(direction, alpha=-lr))
        weight = quantized("weight", accumulator)
    return weight, momentum_buffer, accumulator


_ROLES = {False: ("gradient", "weight"), True: ("gradient", "weight", "momentum")}


class SGD(LowPrecisionOptimizer):
    """SGD whose gradients, momentum and weights are quantized; `torch.optim.SGD` without a recipe.

    Args:
        params: as for any PyTorch optimizer, or a model for all its parameters. With names
            (``model.named_parameters()``, or the model) the noise of a tensor depends on its name;
            otherwise on its place among the parameters.
        lr: learning rate.
        momentum: 0 for none.
        weight_decay: L2 penalty, added to the quantized gradient.
        nesterov: Nesterov's form; needs momentum.
        recipe: the formats, or the name of a recipe; None: float.
        seed: the run's seed, as given to `convert`.

    Raises:
        TypeError: a hyperparameter that is no number, or `nesterov` no bool.
        ValueError: a hyperparameter out of range, or a converted model whose float weights would
            leave their grids.
    """

    def __init__(
        self,
        params: Iterable[Any] | nn.Module,
        lr: float,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        recipe: Recipe | str | None = None,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, recipe, seed)

    def _check_values(self, group: dict[str, Any]) -> None:
        require_not_negative(
            "SGD",
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
        )
        require_bool("SGD", "nesterov", group["nesterov"])
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("SGD: nesterov=True needs momentum > 0")

    def _state_of(self, parameter: Tensor, recipe: Recipe | None) -> dict[str, Any]:
        """The state of a parameter, without what another recipe kept: it may have been loaded."""
        state: dict[str, Any] = self.state[parameter]
        if recipe is None or recipe.accumulator is None:
            state.pop("accumulator", None)
        return state

    def _update(
        self, name: str, parameter: Tensor, gradient: Tensor, group: dict[str, Any]
    ) -> None:
        recipe = self.recipe_of(name)
        state = self._state_of(parameter, recipe)
        state.setdefault("step", 0)
        if recipe is not None and recipe.accumulator is not None and "accumulator" not in state:
            state["accumulator"] = parameter.detach().clone()
        weight, momentum_buffer, accumulator = sgd_step(
            parameter,
            gradient,
            state.get("momentum_buffer"),
            state.get("accumulator"),
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            quantized=self._quantizer(name, state["step"], parameter),
        )
        parameter.copy_(weight)
        state["step"] += 1
        if momentum_buffer is not None:
            state["momentum_buffer"] = momentum_buffer
        if accumulator is not None:
            state["accumulator"] = accumulator

    def _kernel(
        self, name: str, parameter: Tensor, gradient: Tensor, group: dict[str, Any]
    ) -> fused.Prepared | None:
        recipe = self.recipe_of(name)
        if recipe is None or recipe.accumulator is not None:
            return None
        state = self._state_of(parameter, recipe)
        roles, kept = _ROLES[bool(group["momentum"])], [parameter]
        if group["momentum"] and "momentum_buffer" in state:
            kept.append(state["momentum_buffer"])
        prepared = self._prepared("SgdParameter", roles, recipe, name, gradient, state, kept)
        if prepared is None:
            return None
        if len(kept) < len(roles) - 1:
            # momentum * 0 + g is g: the same numbers as without a buffer
            state["momentum_buffer"] = fused.empty_state(recipe, "momentum", parameter)
            kept.append(state["momentum_buffer"])
            prepared = self._prepared("SgdParameter", roles, recipe, name, gradient, state, kept)
            assert prepared is not None
        state.setdefault("step", 0)
        return prepared

    def _kept_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _run(self, batch: fused.Batch, group: dict[str, Any]) -> fused.Outcome:
        return fused.sgd(
            batch.kernels,
            group["lr"],
            group["momentum"],
            group["weight_decay"],
            group["nesterov"],
            *batch.kind,
        )
