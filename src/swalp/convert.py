"""A float network becomes the same network in low precision, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from swalp.formats import Format
from swalp.layers import PRODUCTS, NoiseClock, QuantizedLayer, Rule, Site
from swalp.nonlinearities import NONLINEARITIES
from swalp.packed import PackedTensor, pack
from swalp.quantize import quantize
from swalp.recipes import LayerName, Quantizer, Recipe, fit, named
from swalp.rounding import Stochastic

_Module = TypeVar("_Module", bound=nn.Module)
_LOW = PRODUCTS | NONLINEARITIES
_FLOAT_OF: dict[type, type[nn.Module]] = {low: kind for kind, low in _LOW.items()}


@dataclass(slots=True)
class _Conversion:
    """What `convert` leaves on a model: the recipe, the clock, and the hook that drives it."""

    recipe: Recipe
    clock: NoiseClock

    def __call__(self, module: nn.Module, args: object) -> None:
        if module.training:
            self.clock.step += 1


def convert(
    model: _Module, recipe: Recipe | str, *, seed: int = 0, packed: bool = False
) -> _Module:
    """Make `model` compute in low precision, in place, and return it.

    Linear and convolution layers, or nonlinearities, quantize their activations and errors where
    the recipe's placement says. By default that is the input of product layers, except that the
    first of them, in registration order, takes the network's input as it is unless the recipe says
    otherwise; the output of the network and the gradient of the loss stay float. All parameters are
    rounded, to nearest, to the weight format. Everything else computes in float: `summary` lists
    it. Gradients, momentum and weights are quantized by `swalp.optim`.

    Names, parameters and `state_dict` keys do not change. In `eval()` activations are rounded to
    nearest and nothing is random.

    Args:
        model: a float network; its parameters are changed.
        recipe: a recipe, or the name of one: see `swalp.recipes`.
        seed: the run's seed. The noise of a layer is a function of seed, layer name, training pass
            and element alone.
        packed: hold each parameter as a `PackedTensor` of the weight format, about a byte each for
            8 bits, instead of as floats on its grid. The numbers are the same. Parameters are
            replaced: make the optimizer afterwards.

    Raises:
        ValueError: `model` is converted already, or has no layer to convert, or should be packed
            without a weight format; or an override of the recipe matches none of its layers.
    """
    recipe = named(recipe, "convert")
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise ValueError(
            "convert: this model is converted already; convert the float model, or take "
            "swalp.to_float(model) first"
        )
    if recipe.product == "native":
        raise ValueError(
            f"convert: recipe {recipe.name!r} asks for native products, which this version cannot "
            f'compute yet; product="simulated" gives the same numbers'
        )
    products = [name for name, module in model.named_modules() if type(module) in PRODUCTS]
    if not products:
        kinds = ", ".join(kind.__name__ for kind in PRODUCTS)
        raise ValueError(
            f"convert: {type(model).__name__} has no layer to convert; these kinds convert: {kinds}"
        )
    if packed and recipe.weight is None:
        raise ValueError(f"convert: packed=True needs a weight format; {recipe.name!r} has none")
    resolved = recipe.resolve(layer_names(model))
    clock = NoiseClock(seed)
    for name, module in list(model.named_modules()):
        if type(module) not in _LOW:
            continue
        places = _sites(resolved.at(name), name, products, clock)
        if type(module) in PRODUCTS or places != (None, None):
            module.__class__ = _LOW[type(module)]
            assert isinstance(module, QuantizedLayer)
            module.input_site, module.output_site = places
    _round_parameters(model, resolved, packed)
    model._swalp = _Conversion(recipe, clock)  # type: ignore[assignment]  # no tensor or module
    model.register_forward_pre_hook(model._swalp)  # type: ignore[arg-type]  # typed as above
    return model


def layer_names(model: nn.Module) -> list[LayerName]:
    """What the overrides of a recipe match: every module with parameters of its own or sites."""
    return [
        LayerName(name, type(module).__name__, tuple(module._parameters))
        for name, module in model.named_modules()
        if module._parameters or type(module) in _LOW or isinstance(module, QuantizedLayer)
    ]


def noise_clock(model: nn.Module) -> NoiseClock:
    """The clock of a converted model, whose state a resumed run must restore.

    Raises:
        ValueError: `model` is not what `convert` returned.
    """
    return _conversion(model).clock


def to_float(model: _Module) -> _Module:
    """A copy of `model` with the same parameters and no quantizers; of a float model, a copy."""
    result = copy.deepcopy(model)
    _replace_parameters(
        result,
        lambda value, *_: value.dequantize() if isinstance(value, PackedTensor) else value,
    )
    for module in result.modules():
        if isinstance(module, QuantizedLayer):
            del module.input_site, module.output_site
            module.__class__ = _FLOAT_OF[type(module)]  # type: ignore[assignment]  # its parent
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Conversion):
                del module._forward_pre_hooks[key]
                del module._swalp
    return result


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One row of `summary`: a layer, and the formats at its sites (None: float)."""

    name: str
    kind: str
    parameters: int
    activation: Format | None
    error: Format | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What `convert` did: every module without children of its own, in order."""

    recipe: Recipe
    layers: tuple[LayerSummary, ...]

    def __str__(self) -> str:
        rows = [("layer", "kind", "parameters", "activation", "error")]
        rows += [
            (row.name, row.kind, f"{row.parameters:,}", _name(row.activation), _name(row.error))
            for row in self.layers
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                cell.rjust(width) if i == 2 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([f"recipe {self.recipe.name}", *lines])


def summary(model: nn.Module) -> Summary:
    """What each layer of a converted model quantizes, and what it left in float.

    Raises:
        ValueError: `model` is not what `convert` returned.
    """
    rows = []
    for name, module in model.named_modules():
        converted = isinstance(module, QuantizedLayer)
        if not converted and next(module.children(), None) is not None:
            continue
        sites = [module.input_site, module.output_site] if converted else []
        rows.append(
            LayerSummary(
                name,
                type(module).__name__,
                sum(parameter.numel() for parameter in module.parameters(recurse=False)),
                _format(site.activation for site in sites if site is not None),
                _format(site.error for site in sites if site is not None),
            )
        )
    return Summary(_conversion(model).recipe, tuple(rows))


def _conversion(model: nn.Module) -> _Conversion:
    found = getattr(model, "_swalp", None)
    if not isinstance(found, _Conversion):
        raise ValueError(
            f"{type(model).__name__} is not a converted model; use what swalp.convert(model, "
            f"recipe) returned"
        )
    return found


def _sites(
    recipe: Recipe, name: str, products: list[str], clock: NoiseClock
) -> tuple[Site | None, Site | None]:
    """The sites at the input and the output of the layer that `recipe` holds for."""
    activation = _rule(recipe.activation, clock.seed, "activation", name)
    error = _rule(recipe.error, clock.seed, "error", name)
    product = name in products
    before: tuple[Rule | None, Rule | None] = (None, None)
    after: tuple[Rule | None, Rule | None] = (None, None)
    outer = name == products[0] and not recipe.quantize_input
    if recipe.placement == "input" and product and not outer:
        before = activation, error
    elif recipe.placement == "operands" and product:
        before, after = (None if outer else activation, None), (None, error)
    elif (recipe.placement == "output" and product and name != products[-1]) or (
        recipe.placement == "nonlinearity" and not product
    ):
        after = activation, error
    return (
        None if before == (None, None) else Site(name, clock, *before),
        None if after == (None, None) else Site(name, clock, *after),
    )


def _round_parameters(model: nn.Module, recipe: Recipe, packed: bool) -> None:
    def rounded(value: Tensor, layer: str, name: str) -> Tensor:
        quantizer = recipe.at(layer, parameter=name).weight
        if quantizer is None:
            return value
        grid = fit(quantizer.format, value.dim())
        return pack(value, grid) if packed else quantize(value, grid, out=value)

    _replace_parameters(model, rounded)


@torch.no_grad()
def _replace_parameters(model: nn.Module, change: Callable[[Tensor, str, str], Tensor]) -> None:
    """Every parameter by `change(it, its layer's name, its own)`, where that is another tensor.

    A parameter of several layers stays theirs in common; the first of them counts.
    """
    changed: dict[nn.Parameter, nn.Parameter] = {}
    for layer, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in changed:
                value = change(parameter, layer, name)
                same = value is parameter
                changed[parameter] = (
                    parameter if same else nn.Parameter(value, parameter.requires_grad)
                )
            module._parameters[name] = changed[parameter]


def _rule(quantizer: Quantizer | None, seed: int, role: str, name: str) -> Rule | None:
    if quantizer is None:
        return None
    rounding = quantizer.rounding
    if isinstance(rounding, Stochastic):
        rounding = rounding.seeded(seed).stream(role, name)
    return Rule(quantizer.format, rounding)


def _format(rules: Iterable[Rule | None]) -> Format | None:
    return next((rule.format for rule in rules if rule is not None), None)


def _name(fmt: Format | None) -> str:
    return "float" if fmt is None else str(fmt)
