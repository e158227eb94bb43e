"""A float network becomes the same network in low precision, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn

from swalp._validation import require_bool, require_model
from swalp.buffers import release, share_with_torch
from swalp.layers import (
    CONVERTIBLE,
    Family,
    Kind,
    Lowered,
    NoiseClock,
    Quantized,
    QuantizedFunctions,
    QuantizedLayer,
    Rule,
    Site,
    check_convertible,
    float_class,
    kind_of,
    lean_mixin,
    native_mixin,
    obstacle,
    quantized_class,
    simulated_mixin,
)
from swalp.packed import PackedTensor, check_packable, pack
from swalp.quantize import check, quantize
from swalp.recipe import KEEP
from swalp.recipes import LayerName, Quantizer, Recipe, fit, named
from swalp.rounding import Stochastic

_Module = TypeVar("_Module", bound=nn.Module)
_Rules = tuple[Rule | None, Rule | None]


@dataclass(slots=True)
class Conversion:
    """What `convert` leaves on a model: the recipe, the clock, and the hook that drives it.

    Attributes:
        recipe: with its overrides resolved for this model.
        clock: of the model's noise.
        significand: the most significant bits that an operand has.
    """

    recipe: Recipe
    clock: NoiseClock
    significand: int

    def __call__(self, module: nn.Module, args: object) -> None:
        """Begin a pass."""
        self._check_autocast()
        if not module.training:
            return
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "torch.export: a converted model in training mode would repeat the noise of one "
                "step for ever; export model.eval()"
            )
        self.clock.tick()

    def _check_autocast(self) -> None:
        """Raise if autocast would round operands that have more bits than its type."""
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                carrier = torch.get_autocast_dtype(device)
                if self.significand > _SIGNIFICANDS[carrier]:
                    raise RuntimeError(
                        f"autocast to {carrier} keeps {_SIGNIFICANDS[carrier]} significant bits, "
                        f"but recipe {self.recipe.name!r} has operands of {self.significand}: "
                        f"its products would be of other numbers. Leave autocast out, or take a "
                        f"shorter word"
                    )


def convert(
    model: _Module, recipe: Recipe | str, *, seed: int = 0, packed: bool = False
) -> _Module:
    """Make `model` compute in low precision, in place, and return it.

    Layers quantize their activations and errors where the recipe's placement says. By default that
    is what enters products: the input of linear, convolution and recurrent layers, the hidden state
    of the latter at each step, both operands of both products of attention, and those of products
    that a module of any other class calls as functions in its forward. The layer that takes the
    input of the network (the first, in registration order) takes it as it is unless the recipe says
    otherwise; the output of the network and the gradient of the loss stay float. All parameters
    are rounded, to nearest, to the weight format. `swalp.summary` says what each layer quantizes,
    and what stayed float and why; ``docs/layers.md`` describes each kind. Gradients, momentum and
    weights are quantized by `swalp.optim`.

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
        TypeError: `model` is no module, or `packed` no bool.
        ValueError: `model` is converted already, has no layer to convert, or one that cannot be; it
            should be packed without a weight format; or an override of the recipe matches none of
            its layers.
    """
    require_model("convert", model)
    require_bool("convert", "packed", packed)
    recipe = named(recipe, "convert")
    if any(isinstance(module, Quantized) for module in model.modules()):
        raise ValueError(
            "convert: this model, or a part of it, is converted already; convert the float model, "
            "or take swalp.to_float(model) first"
        )
    for name, module in model.named_modules():
        check_convertible(name, module)
    kinds = {name: kind_of(module) for name, module in model.named_modules()}
    if not any(kind.family in _COMPUTING for kind in kinds.values()):
        raise ValueError(
            f"convert: {type(model).__name__} has no layer to convert; these kinds convert: "
            f"{', '.join(CONVERTIBLE)}, and any module that computes products itself"
        )
    if packed and recipe.weight is None:
        raise ValueError(f"convert: packed=True needs a weight format; {recipe.name!r} has none")
    layers = layer_names(model)
    resolved = recipe.resolve(layers)
    clock = NoiseClock(seed)
    entry = None if recipe.quantize_input else _entry(kinds)
    places = {
        name: _sites(
            resolved.at(name), name, kinds, _named(recipe, name, type(module).__name__), clock
        )
        for name, module in model.named_modules()
    }
    _check_placements(recipe, resolved, layers, places)
    _check_parameters(model, resolved, packed)
    for name, module in list(model.named_modules()):
        kind, (before, after) = kinds[name], places[name]
        lean = lean_mixin(module) if recipe.product == "native" else None
        if kind.family in _COMPUTING or before is not None or after is not None or lean:
            outer = name == entry
            if outer and kind.mixin is QuantizedLayer:
                before = None  # the others have further operands
            mixin = kind.mixin if lean is None or before or after else lean
            layer = Lowered(before, after, outer)
            if recipe.product == "native" and kind.family is Family.PRODUCT:
                mixin = _native(module, kind, resolved, name, layer)
            elif recipe.product == "native" and kind.mixin is QuantizedFunctions:
                layer.simulated = obstacle(before, after)
                layer.native = not layer.simulated
            module.__class__ = quantized_class(mixin, type(module))
            assert isinstance(module, Quantized)
            module._swalp_layer = layer
    _round_parameters(model, resolved, packed)
    if recipe.product == "native":
        share_with_torch()
    if packed:
        release()  # memory of float weights
    model._swalp = Conversion(resolved, clock, _significand(resolved))  # type: ignore[assignment]  # no tensor or module
    model.register_forward_pre_hook(model._swalp)  # type: ignore[arg-type]  # typed as above
    return model


# The layers of a network, of which one is the first and one the last; and all that a recipe's
# placement speaks of, which are converted even where they have no site.
_LAYERS = (Family.PRODUCT, Family.LOOKUP, Family.ATTENTION)
_COMPUTING = (*_LAYERS, Family.FUNCTIONS)


_SIGNIFICANDS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


def _significand(recipe: Recipe) -> int:
    """The most significant bits of any operand of a product."""
    operands = ("weight", "activation", "error")
    quantizers = [getattr(recipe, role) for role in operands]
    quantizers += [
        value
        for override in recipe.overrides
        for role, value in override.changes()
        if role in operands
    ]
    return max((q.format.significand_bits for q in quantizers if q is not None), default=0)


def _native(
    module: nn.Module, kind: Kind, recipe: Recipe, name: str, layer: Lowered
) -> type[Quantized]:
    """What computes the products of a layer: integers if they can; `layer` is told."""
    native = native_mixin(module)
    weight = module._parameters.get("weight")
    quantizer = recipe.at(name, parameter="weight").weight
    if isinstance(native, str):
        reason = native
    elif weight is None or quantizer is None:
        reason = "its weight is float"
    elif not (reason := obstacle(layer.input_site, layer.output_site)):
        layer.weight_format = fit(quantizer.format, weight.shape)
        return native
    layer.simulated = reason
    return simulated_mixin(module, kind.mixin) if kind.mixin is QuantizedLayer else kind.mixin


def layer_names(model: nn.Module) -> list[LayerName]:
    """What the overrides of a recipe match: every module but those that only hold others."""
    return [
        LayerName(name, type(module).__name__, tuple(module._parameters))
        for name, module in model.named_modules()
        if module._parameters or not module._modules or kind_of(module).family is not Family.OTHER
    ]


def noise_clock(model: nn.Module) -> NoiseClock:
    """The clock of a converted model, whose state a resumed run must restore.

    Raises:
        ValueError: `model` is not what `convert` returned.
    """
    return conversion(model).clock


def to_float(model: _Module) -> _Module:
    """A copy of `model` with the same parameters and no quantizers; of a float model, a copy.

    Raises:
        ValueError: a layer's class is another than `convert` gave it.
    """
    return strip(copy.deepcopy(model))


def strip(model: _Module) -> _Module:
    """Take the quantizers off `model`, in place, and return it: a float network again.

    Raises:
        ValueError: a layer's class is another than `convert` gave it.
    """
    for name, module in model.named_modules():
        if isinstance(module, Quantized) and "_swalp_kind" not in vars(type(module)):
            raise ValueError(
                f"layer {name!r} has had its class changed since convert, as a parametrization "
                f"does; remove that first, or register it before convert"
            )
    _replace_parameters(
        model,
        lambda value, *_: value.dequantize() if isinstance(value, PackedTensor) else value,
    )
    for module in model.modules():
        if isinstance(module, Quantized):
            del module._swalp_layer
            module.__class__ = float_class(module)  # type: ignore[assignment]  # its parent
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Conversion):
                del module._forward_pre_hooks[key]
                del module._swalp
    return model


def conversion(model: nn.Module) -> Conversion:
    """What `convert` left on `model`.

    Raises:
        ValueError: `model` is not what `convert` returned.
    """
    found = getattr(model, "_swalp", None)
    if not isinstance(found, Conversion):
        raise ValueError(
            f"{type(model).__name__} is not a converted model; use what swalp.convert(model, "
            f"recipe) returned"
        )
    return found


def _sites(
    recipe: Recipe, name: str, kinds: dict[str, Kind], named: bool, clock: NoiseClock
) -> tuple[Site | None, Site | None]:
    """The sites at the input and the output of a layer.

    Args:
        recipe: that holds for the layer.
        name: of the layer.
        kinds: of all layers, in order.
        named: whether an override of the placement is meant for this layer, or its kind, alone.
        clock: of the model.
    """
    family, placement = kinds[name].family, recipe.placement
    if named:
        if family is Family.LOOKUP and placement != "output":
            raise ValueError(
                f"convert: recipe {recipe.name!r} has placement={placement!r} for {name!r}, which "
                f"takes indices; use placement='output'"
            )
        used = placement != "nonlinearity" or family is Family.NONLINEARITY
    elif placement == "nonlinearity":
        used = family is Family.NONLINEARITY
    elif placement == "output":
        last = [other for other, kind in kinds.items() if kind.family in _LAYERS][-1]
        used = family in _COMPUTING and name != last
    else:
        used = family in _COMPUTING and family is not Family.LOOKUP
    if not used:
        return None, None
    activation = _rule(recipe.activation, clock.seed, "activation", name)
    error = _rule(recipe.error, clock.seed, "error", name)
    match placement:
        case "input":
            return _site(name, clock, activation, error, "input"), None
        case "operands":
            before = _site(name, clock, activation, None, "input")
            return before, _site(name, clock, None, error, "output")
        case _:
            return None, _site(name, clock, activation, error, "output")


def _site(
    name: str, clock: NoiseClock, activation: Rule | None, error: Rule | None, place: str
) -> Site | None:
    if activation is None and error is None:
        return None
    return Site(name, clock, activation, error, place)


def _entry(kinds: dict[str, Kind]) -> str | None:
    """The layer that takes the network's input, if it is one that could take it unquantized."""
    first = next((name for name, kind in kinds.items() if kind.family in _LAYERS), None)
    return first if first is not None and kinds[first].family is Family.PRODUCT else None


def _named(recipe: Recipe, name: str, kind: str) -> bool:
    """Whether an override changes the placement of this layer, or of its kind, in particular."""
    return any(
        override.placement is not KEEP
        and (
            override.layers == name
            or (
                override.kind != "*"
                and fnmatchcase(kind, override.kind)
                and fnmatchcase(name, override.layers)
            )
        )
        for override in recipe.overrides
    )


def _check_placements(
    recipe: Recipe,
    resolved: Recipe,
    layers: Sequence[LayerName],
    places: Mapping[str, tuple[Site | None, Site | None]],
) -> None:
    """Raise if an override of the placement leaves every layer that it matches without a site."""
    for override in recipe.overrides:
        if not override.required or override.placement == KEEP:
            continue
        matched = [layer.name for layer in layers if override.matches(layer)]
        quantize = [
            name
            for name in matched
            if resolved.at(name).activation is not None or resolved.at(name).error is not None
        ]
        if quantize and all(places[name] == (None, None) for name in matched):
            raise ValueError(
                f"convert: recipe {recipe.name!r}: {override} gives none of {len(matched)} layers "
                f"a place to quantize, {matched[0]!r} among them; for layers without products "
                f"name their kind, too, such as kind='Identity', or one layer by its whole name"
            )


def _check_parameters(model: nn.Module, recipe: Recipe, packed: bool) -> None:
    """Raise unless every parameter can be rounded, and packed if so, before any is."""
    for layer, module in model.named_modules():
        for name, value in module._parameters.items():
            if value is None or not (value.is_floating_point() or value.is_complex()):
                continue
            quantizer = recipe.at(layer, parameter=name).weight
            if value.is_complex() and quantizer is not None:
                raise ValueError(
                    f"convert: parameter {f'{layer}.{name}'.lstrip('.')!r} is {value.dtype}, which "
                    f"no format rounds; make torch.view_as_real of it the parameter, or leave it "
                    f"in float by an override"
                )
            try:
                if quantizer is not None:
                    grid = fit(quantizer.format, value.shape)
                    check(value, grid, quantizer.rounding)
                    if packed:
                        check_packable(value, grid)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"convert: parameter {f'{layer}.{name}'.lstrip('.')!r} cannot be rounded: "
                    f"{error}"
                ) from None


def _round_parameters(model: nn.Module, recipe: Recipe, packed: bool) -> None:
    def rounded(value: Tensor, layer: str, name: str) -> Tensor:
        quantizer = recipe.at(layer, parameter=name).weight
        if quantizer is None or not value.is_floating_point():
            return value
        grid = fit(quantizer.format, value.shape)
        return pack(value, grid) if packed else quantize(value, grid, out=value)

    _replace_parameters(model, rounded)


@torch.no_grad()
def _replace_parameters(model: nn.Module, change: Callable[[Tensor, str, str], Tensor]) -> None:
    """Every parameter by `change(it, its layer's name, its own)`, where that is another tensor.

    A parameter of several layers stays theirs in common; the first of them counts.
    """
    changed: dict[nn.Parameter, nn.Parameter] = {}
    for layer, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter not in changed:
                value = change(parameter, layer, name)
                same = value is parameter
                changed[parameter] = (
                    parameter if same else nn.Parameter(value, parameter.requires_grad)
                )
            if changed[parameter] is not parameter:
                setattr(module, name, changed[parameter])  # recurrent layers keep a list, too


def _rule(quantizer: Quantizer | None, seed: int, role: str, name: str) -> Rule | None:
    if quantizer is None:
        return None
    rounding = quantizer.rounding
    if isinstance(rounding, Stochastic):
        rounding = rounding.seeded(seed).stream(role, name)
    return Rule(quantizer.format, rounding)
