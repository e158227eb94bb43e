"""Low-precision Adam and AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from swalp._validation import require_bool, require_not_negative
from swalp.optim import fused
from swalp.optim.base import LowPrecisionOptimizer, Quantize
from swalp.packed import PackedTensor
from swalp.recipes import Quantizer, Recipe, named

_ROOT, _SQUARE = "root", "exp_avg_sq"  # keys of a state


def adam_step(
    weight: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    root: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    keep_root: bool,
    quantized: Quantize,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of low-precision Adam.

    With g the gradient, w the weight, m and v the moments::

        g = Q_G(g) + weight_decay * w            decoupled: w = w * (1 - lr * weight_decay) instead
        m = beta1 * m + (1 - beta1) * g          kept as Q_M(m)
        v = beta2 * v + (1 - beta2) * g**2       kept as its root, Q_S(sqrt(v))
        w = Q_W(w - lr / (1 - beta1**step) * m / (sqrt(v / (1 - beta2**step)) + eps))

    in the arithmetic of `torch.optim.Adam`, whose result it is with every role off. The root of v
    spans half the orders of magnitude that v does, so 8 bits hold it. The moments enter the update
    before they are rounded.

    Args:
        weight: float, any shape.
        gradient: of the same shape and dtype.
        first_moment: m, as the last step returned it; zeros at first.
        root: sqrt(v) if `keep_root`, else v; likewise.
        step: from 1.
        lr: as in `torch.optim.Adam`.
        betas: likewise.
        eps: likewise.
        weight_decay: likewise.
        decoupled: AdamW's weight decay.
        keep_root: whether sqrt(v) is kept; v itself where nothing is rounded.
        quantized: `quantized(role, tensor)` rounds for the role "gradient", "momentum",
            "second_moment" or "weight"; the identity for a role that is off.

    Returns:
        The new weight, first moment and root; no argument is changed.

    Source: Kingma & Ba 2015, Algorithm 1; Loshchilov & Hutter 2019.
    """
    gradient = quantized("gradient", gradient)
    if weight_decay != 0:
        if decoupled:
            weight = weight.mul(1 - lr * weight_decay)
        else:
            gradient = gradient.add(weight, alpha=weight_decay)
    moment = first_moment.lerp(gradient, 1 - betas[0])
    variance = root.square() if keep_root else root
    variance = variance.mul(betas[1]).addcmul(gradient, gradient, value=1 - betas[1])
    # Through float64 a root is the nearest float32, which PyTorch's own need not be.
    new_root = variance.double().sqrt().to(variance.dtype) if keep_root else variance.sqrt()
    kept = new_root if keep_root else variance
    denominator = (new_root / (1 - betas[1] ** step) ** 0.5).add(eps)
    weight = weight.addcdiv(moment, denominator, value=-lr / (1 - betas[0] ** step))
    return (
        quantized("weight", weight),
        quantized("momentum", moment),
        quantized("second_moment", kept),
    )


class Adam(LowPrecisionOptimizer):
    """Adam, or AdamW, whose gradients, moments and weights are quantized.

    Without a recipe it is `torch.optim.Adam` or, if `decoupled`, `torch.optim.AdamW`.

    Args:
        params: as for `SGD`: best ``model.named_parameters()``, or the model.
        lr: learning rate.
        betas: of the running averages of the gradient and its square.
        eps: added to the denominator.
        weight_decay: L2 penalty, or AdamW's decay if `decoupled`.
        decoupled: AdamW.
        recipe: the formats, momentum for the first moment, second_moment for the root of the
            second, or the name of a recipe; None: float.
        seed: the run's seed, as given to `convert`.

    Raises:
        TypeError: a hyperparameter that is no number, or `decoupled` no bool.
        ValueError: a hyperparameter out of range, a recipe with an accumulator, which Adam has no
            use for, or a converted model whose float weights would leave their grids.
    """

    kept_always = ("step", "exp_avg")  # and the second moment: see `_second`
    takes_sparse = False

    def __init__(
        self,
        params: Iterable[Any] | nn.Module,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        recipe: Recipe | str | None = None,
        seed: int = 0,
    ) -> None:
        if recipe is not None:
            recipe = named(recipe, "Adam")
            roles = [recipe.accumulator, *(override.accumulator for override in recipe.overrides)]
            if any(isinstance(role, Quantizer) for role in roles):
                raise ValueError(
                    f"Adam: recipe {recipe.name!r} has an accumulator, which only SGD keeps; "
                    f"drop it"
                )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
        }
        super().__init__(params, defaults, recipe, seed)

    def _check_values(self, group: dict[str, Any]) -> None:
        require_not_negative(
            "Adam", lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"]
        )
        require_bool("Adam", "decoupled", group["decoupled"])
        betas = group["betas"]
        if not (
            isinstance(betas, Sequence)
            and len(betas) == 2
            and all(isinstance(beta, Real) for beta in betas)
        ):
            raise ValueError(f"Adam: betas={betas!r} must be two numbers, such as (0.9, 0.999)")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Adam: betas={betas} must lie in [0, 1)")

    def _lacking(self, state: dict[str, Any]) -> set[str]:
        either = {_ROOT, _SQUARE} & state.keys()
        return super()._lacking(state) | (set() if either else {_ROOT})

    def _second(self, recipe: Recipe | None, state: dict[str, Any]) -> str:
        """The key of the second moment: of its root where that is rounded, or of itself.

        What the state of another recipe has becomes that.
        """
        rounds = recipe is not None and recipe.second_moment is not None
        key, other = (_ROOT, _SQUARE) if rounds else (_SQUARE, _ROOT)
        if other in state:
            held = state.pop(other)
            held = held.dequantize() if isinstance(held, PackedTensor) else held
            state[key] = held.sqrt() if rounds else held.square()
        return key

    def _update(
        self, name: str, parameter: Tensor, gradient: Tensor, group: dict[str, Any]
    ) -> None:
        recipe = self.recipe_of(name)
        state = self.state[parameter]
        second = self._second(recipe, state)
        if parameter.is_complex():  # two numbers, as in PyTorch
            parameter, gradient = torch.view_as_real(parameter), torch.view_as_real(gradient)
        if not state:
            state["step"] = 0
            state["exp_avg"] = gradient.new_zeros(gradient.shape)
            state[second] = gradient.new_zeros(gradient.shape)
        weight, state["exp_avg"], state[second] = adam_step(
            parameter,
            gradient,
            state["exp_avg"],
            state[second],
            state["step"] + 1,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled"],
            keep_root=second == _ROOT,
            quantized=self._quantizer(name, state["step"], parameter),
        )
        parameter.copy_(weight)
        state["step"] += 1

    def _kernel(
        self, name: str, parameter: Tensor, gradient: Tensor, group: dict[str, Any]
    ) -> fused.Prepared | None:
        recipe = self.recipe_of(name)
        if recipe is None or recipe.second_moment is None:
            return None
        state = self.state[parameter]
        roles = ("gradient", "weight", "momentum", "second_moment")
        moments = "exp_avg", self._second(recipe, state)
        kept = [parameter, *(state[key] for key in moments if key in state)]
        prepared = self._prepared("AdamParameter", roles, recipe, name, gradient, state, kept)
        if prepared is None:
            return None
        if len(kept) == 1:
            empty = [fused.empty_state(recipe, role, parameter) for role in roles[2:]]
            state.update(zip(moments, empty, strict=True))  # both, or none
            kept += empty
            prepared = self._prepared("AdamParameter", roles, recipe, name, gradient, state, kept)
            assert prepared is not None
        state.setdefault("step", 0)
        return prepared

    def _kept_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", _ROOT

    def _run(self, batch: fused.Batch, group: dict[str, Any]) -> fused.Outcome:
        lost, finite = False, True
        steps = [state["step"] + 1 for state in batch.states]
        # The bias corrections depend on the step, and parameters may be at different ones.
        for step in sorted(set(steps)):
            outcome = fused.adam(
                [kernel for kernel, own in zip(batch.kernels, steps, strict=True) if own == step],
                step,
                group["lr"],
                group["betas"],
                group["eps"],
                group["weight_decay"],
                group["decoupled"],
                *batch.kind,
            )
            lost, finite = lost or outcome.lost, finite and outcome.finite
        return fused.Outcome(lost, finite)
