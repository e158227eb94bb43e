"""What the optimizers share: names, quantizers of a parameter, the loop over parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from swalp._validation import require_int
from swalp.convert import Conversion, layer_names
from swalp.optim import fused
from swalp.packed import PackedTensor, pack
from swalp.quantize import quantize
from swalp.recipes import LayerName, Quantizer, Recipe, fit, named
from swalp.rounding import Stochastic

# quantized(role, tensor): the tensor rounded for that role; the tensor itself if the role is off.
Quantize = Callable[[str, Tensor], Tensor]
# Of PyTorch's optimizers, or of a whole one of these: a group with it would train otherwise than it
# says.
_NOT_IN_GROUPS = {"amsgrad", "dampening", "differentiable", "maximize", "recipe", "seed"}


class LowPrecisionOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that quantizes by a recipe, one parameter at a time.

    The noise of a parameter is a function of seed, name, role, its step and the element alone.
    Without names (`model.parameters()`), its place among the parameters serves as its name.
    Overrides of the recipe go by names; those by the kind of a layer need the model.

    Attributes:
        kept_always: what the state of a parameter has after its first step.
        takes_sparse: whether it steps along sparse gradients where nothing is rounded.
    """

    kept_always: tuple[str, ...] = ("step",)
    takes_sparse: bool = True

    def __init__(
        self,
        params: Iterable[Any] | nn.Module,
        defaults: dict[str, Any],
        recipe: Recipe | str | None,
        seed: int,
    ) -> None:
        require_int(type(self).__name__, "seed", seed, 0, 2**64 - 1, "it is a 64-bit key")
        if recipe is not None:
            recipe = named(recipe, type(self).__name__)
        whole = isinstance(params, nn.Module)
        if isinstance(params, nn.Module):
            if recipe is not None:
                recipe = recipe.resolve(layer_names(params))
            _require_its_grids(type(self).__name__, params, recipe)
            params = params.named_parameters()
        self.recipe = recipe
        self.seed = seed
        # Derived; never saved.
        self._kernels: dict[int, fused.Prepared] = {}  # by the id of the parameter they hold
        # Those of the last step, with what they were made for, by the id of their first parameter.
        self._batches: dict[int, tuple[tuple[Any, ...], list[fused.Batch]]] = {}
        self._resolved: tuple[Recipe | None, dict[str, Recipe | None]] = (None, {})  # by name
        self._check_values(defaults)
        super().__init__(params, defaults)
        if not whole:
            self._require_matches()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch.

        Raises:
            TypeError: a hyperparameter of the group is of a wrong kind.
            ValueError: one is out of range, or one of PyTorch's that this optimizer has not; a
                parameter is given twice; there is a recipe, and two parameters have one name; or
                it has overrides, and the parameters come without names.
        """
        super().add_param_group(param_group)
        try:
            self._check_values(self.param_groups[-1])
            self._check_group(self.param_groups[-1])
            self._check_names(self.param_groups[-1].get("param_names"))
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        kind = type(self).__name__
        for name in _NOT_IN_GROUPS - self.defaults.keys():
            if group.get(name):
                raise ValueError(
                    f"{kind}: a group has {name}={group[name]!r}, which no group here has; leave "
                    f"it out, or use torch.optim or an optimizer of its own"
                )
        if len({id(each) for each in group["params"]}) < len(group["params"]):
            raise ValueError(f"{kind}: a parameter is given twice; give each once")

    def _check_names(self, names: Sequence[str] | None) -> None:
        if self.recipe is None:
            return
        kind = type(self).__name__
        uses = Counter(name for group in self.param_groups for name in group.get("param_names", ()))
        if names is not None and (twice := [name for name in names if uses[name] > 1]):
            raise ValueError(
                f"{kind}: two parameters have the name {twice[0]!r}, and so would have the same "
                f"noise; give all the names that model.named_parameters() gives"
            )
        if self.recipe.overrides:
            if names is None:
                raise ValueError(
                    f"{kind}: recipe {self.recipe.name!r} has overrides for some "
                    f"layers, but the parameters have no names; give the optimizer the model, or "
                    f"model.named_parameters()"
                )
            for name in names:
                self.recipe_of(name)

    def _require_matches(self) -> None:
        """Raise unless each override for parameters matches the name of one."""
        if self.recipe is None or not self.recipe.overrides:
            return
        found: dict[str, list[str]] = {}
        for group in self.param_groups:
            for name in group["param_names"]:
                layer, _, parameter = name.rpartition(".")
                found.setdefault(layer, []).append(parameter)
        layers = [LayerName(layer, "", tuple(names)) for layer, names in found.items()]
        overrides = (each for each in self.recipe.overrides if each.concerns_parameters())
        try:
            replace(self.recipe, overrides=tuple(overrides)).resolve(layers)
        except ValueError as error:
            raise ValueError(
                f"{type(self).__name__}: {error}; names of parameters must be those that "
                f"model.named_parameters() gives, and overrides for others required=False"
            ) from None

    def recipe_of(self, name: str) -> Recipe | None:
        """The recipe that holds for the parameter of that name; None: float."""
        if self.recipe is None or not self.recipe.overrides:
            return self.recipe
        if self._resolved[0] is not self.recipe:  # someone may have set another
            self._resolved = self.recipe, {}
        resolved = self._resolved[1]
        if name not in resolved:
            layer, _, parameter = name.rpartition(".")
            resolved[name] = self.recipe.at(layer, parameter=parameter)
        return resolved[name]

    def state_dict(self) -> dict[str, Any]:
        """As in PyTorch, and the seed, with which alone a run goes on as it would have."""
        return {**super().state_dict(), "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch: by the place of parameters, which keep the names that they have here.

        Raises:
            ValueError: another kind of optimizer saved the state, one of another seed, or one with
                these names in another order.
        """
        kind = type(self).__name__
        seed = state_dict.get("seed", self.seed)  # earlier versions did not save it
        if seed != self.seed:
            raise ValueError(
                f"{kind}: the saved state is of seed={seed}, and this optimizer has {self.seed}, "
                f"so its noise would be another; make it with seed={seed}"
            )
        for state in state_dict["state"].values():
            if state and (missing := self._lacking(state)):
                raise ValueError(
                    f"{kind}: the saved state of a parameter lacks {sorted(missing)}: it is not of "
                    f"swalp.optim.{kind}; begin with a new state"
                )
        own = [group.get("param_names") for group in self.param_groups]
        for names, group in zip(own, state_dict["param_groups"], strict=False):
            if missing := self.defaults.keys() - group.keys():
                raise ValueError(
                    f"{kind}: a saved group of parameters lacks {sorted(missing)}: it is not of "
                    f"swalp.optim.{kind}; begin with a new state"
                )
            saved = group.get("param_names")
            if names and saved and names != saved and sorted(names) == sorted(saved):
                first = next(pair for pair in zip(names, saved, strict=True) if len({*pair}) > 1)
                raise ValueError(
                    f"{kind}: the saved state has {first[1]!r} where this optimizer has "
                    f"{first[0]!r}; give it the parameters in the order of the saved one"
                )
        super().load_state_dict(state_dict)
        for names, group in zip(own, self.param_groups, strict=True):
            group.pop("param_names", None)
            if names is not None:
                group["param_names"] = names

    def _lacking(self, state: dict[str, Any]) -> set[str]:
        """Keys that the state of a parameter, of a step or more, should have and has not."""
        return set(self.kept_always) - state.keys()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # PyTorch puts it there for its own steps; no group of ours has it.
        self.defaults.pop("differentiable", None)
        self._kernels = {}
        self._batches = {}
        self._resolved = (None, {})

    def __getstate__(self) -> dict[str, Any]:
        # PyTorch's keeps these three; what makes the steps reproducible must come along.
        kept = ("defaults", "state", "param_groups", "recipe", "seed")
        return {name: getattr(self, name) for name in kept}

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
        for group, parameters in self._groups():
            ready = [(name, p, g) for name, p in parameters if (g := p.grad) is not None]
            self._update_group(ready, group)
        return loss

    def consume_gradients(self) -> list[RemovableHandle]:
        """Update each parameter as soon as its gradient is complete, and free the gradient.

        From then on `backward()` trains: gradients never all exist at once, and `step()` has
        nothing left to do, but for parameters that do not require a gradient now. Not for
        accumulating gradients over several backward passes, clipping their common norm, a
        `GradScaler`, nor under `DistributedDataParallel`, which reduces gradients later: each
        process would train on its own. Call it again for parameters that are thawed or added
        later.

        Returns:
            The hooks' handles; `remove()` each to go back to `step()`. Until then the optimizer
            lives as long as the process, as PyTorch does not show Python's collector what a hook
            refers to.
        """

        def hook(parameter: Tensor, name: str, number: int) -> None:
            gradient = parameter.grad
            if gradient is None:  # another hook was first
                return
            # The group of now: loading a state makes new ones.
            self._update_group([(name, parameter, gradient)], self.param_groups[number])
            parameter.grad = None

        return [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]  # PyTorch has no type
                partial(hook, name=name, number=number)
            )
            for number, (_, parameters) in enumerate(self._groups())
            for name, parameter in parameters
            if parameter.requires_grad
        ]

    def _update_group(
        self, parameters: list[tuple[str, Tensor, Tensor]], group: dict[str, Any]
    ) -> None:
        """Update named parameters with gradients, in one compiled call as far as possible."""
        if is_dynamo_compiling():
            # Not a decorator, which would import all of Dynamo.
            torch.compiler.disable(self._update_group)(parameters, group)  # type: ignore[no-untyped-call]  # PyTorch has no type
            return
        self._check_values(group)  # as someone may have set them
        if not parameters:
            return
        for batch in self._last_batches(parameters, group) or self._batch(parameters, group):
            outcome = self._run(batch, group)
            batch.took_step(outcome.finite)
            if outcome.lost:
                raise ValueError(
                    f"{type(self).__name__}: a parameter or its state became NaN, for which its "
                    f"format has no code: it is 0 now, and others have moved; go back to a "
                    f"checkpoint, and lower the learning rate or see why a gradient is NaN"
                )

    def _last_batches(
        self, parameters: list[tuple[str, Tensor, Tensor]], group: dict[str, Any]
    ) -> list[fused.Batch]:
        """The compiled calls of the last step, ready for the next; none if they cannot take it."""
        made_for, batches = self._batches.get(id(parameters[0][1]), ((), []))
        names, tensors, gradients = zip(*parameters, strict=True)
        keys = self._kept_keys(group)
        if made_for != (names, self.recipe, keys, self.seed):
            return []
        states = [self.state[each] for each in tensors]
        begin = all(batch.begins(tensors, gradients, states, keys) for batch in batches)
        return batches if begin else []

    def _batch(
        self, parameters: list[tuple[str, Tensor, Tensor]], group: dict[str, Any]
    ) -> list[fused.Batch]:
        """Compiled calls for all that they can step; the others are updated here."""
        ready: dict[tuple[bool, bool], dict[int, fused.Prepared]] = {}
        others = []
        for place, (name, parameter, gradient) in enumerate(parameters):
            prepared = self._kernel(name, parameter, gradient, group)
            if prepared is None:
                others.append((name, parameter, gradient))
            else:
                ready.setdefault(prepared.kind, {})[place] = prepared
        for place in fused.overlapping(ready):  # to be updated one after another
            name, parameter, gradient = parameters[place]
            others.append((name, parameter, gradient))
        for each in others:  # all, before any is updated
            self._check_update(*each)
        if others:
            with torch.no_grad():
                for each in others:
                    self._update(*each, group)
        batches = [fused.Batch([*each.values()], [*each]) for each in ready.values() if each]
        first = id(parameters[0][1])
        self._batches.pop(first, None)
        if not others:
            names = tuple(name for name, _, _ in parameters)
            made_for = names, self.recipe, self._kept_keys(group), self.seed
            self._batches[first] = made_for, batches
        return batches

    def _check_update(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        """Raise ValueError unless the pure step function can update the parameter."""
        kind, recipe = type(self).__name__, self.recipe_of(name)
        if gradient.layout is not torch.strided and not (recipe is None and self.takes_sparse):
            what = "no recipe quantizes" if recipe is not None else "it takes no step along"
            raise ValueError(
                f"{kind}: the gradient of {name!r} is sparse, which {what}; make it dense, as with "
                f"nn.Embedding(sparse=False)"
            )
        if recipe is None or recipe.weight is None or not isinstance(parameter, PackedTensor):
            return
        fmt = fit(recipe.weight.format, parameter.shape)
        if fmt != parameter.format:
            raise ValueError(
                f"{kind}: parameter {name!r} is packed as {parameter.format}, but the recipe "
                f"rounds it to {fmt}, and to round it twice would lose small updates; give the "
                f"optimizer the recipe that the model was converted with"
            )

    @abstractmethod
    def _check_values(self, group: dict[str, Any]) -> None:
        """Raise TypeError or ValueError unless a group's hyperparameters can be used."""

    @abstractmethod
    def _update(
        self, name: str, parameter: Tensor, gradient: Tensor, group: dict[str, Any]
    ) -> None:
        """Update one parameter and its state: by the pure step function."""

    @abstractmethod
    def _kernel(
        self, name: str, parameter: Tensor, gradient: Tensor, group: dict[str, Any]
    ) -> fused.Prepared | None:
        """The compiled step's view of one parameter, its state ready; None if it cannot do it."""

    @abstractmethod
    def _kept_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """What the compiled step keeps in the state of a parameter, besides the step."""

    @abstractmethod
    def _run(self, batch: fused.Batch, group: dict[str, Any]) -> fused.Outcome:
        """Step the parameters of a batch by the compiled step."""

    def _groups(self) -> Iterator[tuple[dict[str, Any], list[tuple[str, Tensor]]]]:
        """Every group with its parameters, each with its name or its place."""
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [
                f"{number}.{index}" for index in range(len(group["params"]))
            ]
            yield group, list(zip(names, group["params"], strict=True))

    def _prepared(
        self,
        kind: str,
        roles: tuple[str, ...],
        recipe: Recipe,
        name: str,
        gradient: Tensor,
        state: dict[str, Any],
        kept: list[Tensor],
    ) -> fused.Prepared | None:
        """The compiled step's view of one parameter; None if it cannot take it as it is.

        Made once, and again when the memory or the recipe is another. `kept`: the parameter, and
        what there is already of its `state`, in the order of the `roles` after "gradient".
        """
        prepared = self._kernels.get(id(kept[0]))
        if prepared is None or not prepared.serves(recipe, roles, kept, name, self.seed):
            blocks = fused.takes(recipe, roles, kept)
            if blocks is None:
                self._kernels.pop(id(kept[0]), None)
                return None
            prepared = fused.Prepared(kind, blocks, roles, recipe, kept, name, self.seed)
            self._kernels[id(kept[0])] = prepared
        return prepared if prepared.begins(state, gradient) else None

    def _quantizer(self, name: str, step: int, parameter: Tensor) -> Quantize:
        """Q of each role for one parameter at one step; of a packed one what is kept is codes."""
        recipe = self.recipe_of(name)
        packed = isinstance(parameter, PackedTensor)

        def quantized(role: str, tensor: Tensor) -> Tensor:
            quantizer = None if recipe is None else getattr(recipe, role)
            if quantizer is None and role == "weight" and isinstance(parameter, PackedTensor):
                # It must be rounded; to nearest, small updates would be lost.
                quantizer = Quantizer(parameter.format, Stochastic())
            if quantizer is None:
                return tensor
            rounding = quantizer.rounding
            if isinstance(rounding, Stochastic):
                rounding = rounding.seeded(self.seed).stream(role, name).at(step)
            fmt = fit(quantizer.format, tensor.shape)
            kept = packed and role != "gradient" and fmt.bits <= 16
            return pack(tensor, fmt, rounding) if kept else quantize(tensor, fmt, rounding)

        return quantized


def _require_its_grids(kind: str, model: nn.Module, recipe: Recipe | None) -> None:
    """Raise ValueError if float weights of a converted model would leave the grids they are on."""
    converted = getattr(model, "_swalp", None)
    if not isinstance(converted, Conversion):
        return
    for name, parameter in model.named_parameters():
        layer, _, own = name.rpartition(".")
        kept = converted.recipe.at(layer, parameter=own).weight
        if kept is None or isinstance(parameter, PackedTensor):  # its codes have no other values
            continue
        given = None if recipe is None else recipe.at(layer, parameter=own).weight
        if given is None or given.format != kept.format:
            does = "does not round it" if given is None else f"rounds it to {given.format}"
            raise ValueError(
                f"{kind}: the model was converted to keep {name!r} in {kept.format}, but the "
                f"optimizer {does}; give it the recipe {converted.recipe.name!r}, or, if that is "
                f"meant, model.named_parameters()"
            )
