"""Which format and rounding each role of a training run has, and where layers apply them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from fnmatch import fnmatchcase
from functools import lru_cache
from glob import escape
from typing import Final, Literal, NamedTuple, get_args

import torch

from swalp._validation import require_bool
from swalp.formats import Binary, BlockFloat, FixedPoint, Format, Microscaling, Minifloat
from swalp.rounding import Rounding, Stochastic

SIGNAL_ROLES = ("activation", "error")
PARAMETER_ROLES = ("weight", "gradient", "momentum", "second_moment", "accumulator")
ROLES = ("weight", *SIGNAL_ROLES, *PARAMETER_ROLES[1:])

Placement = Literal["input", "operands", "output", "nonlinearity"]
Product = Literal["simulated", "native"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
PRODUCTS: tuple[Product, ...] = get_args(Product)


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A format with the rule that rounds to it.

    A `Stochastic` rule carries no seed here: `convert` and the optimizers give each tensor of a run
    its own stream.
    """

    format: Format
    rounding: Rounding

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format):
            raise TypeError(f"Quantizer: format must be a format, not {self.format!r}")
        if not isinstance(self.rounding, Rounding):
            raise TypeError(f"Quantizer: rounding must be a rounding rule, not {self.rounding!r}")
        if isinstance(self.rounding, Stochastic) and self.rounding.seed is not None:
            raise ValueError(
                f"Quantizer: {self.rounding!r} carries a seed, but a recipe serves many tensors; "
                f"leave the seed out here and give it to convert() and the optimizer"
            )
        if isinstance(self.rounding, Stochastic) and (self.rounding.step or self.rounding.call):
            raise ValueError(
                f"Quantizer: {self.rounding!r} carries a step or a call, which layers and "
                f"optimizers count themselves; leave both out"
            )

    def __str__(self) -> str:
        return f"{self.format} {self.rounding}"


class Keep(Enum):
    """What an override says of a setting that it leaves as it is."""

    KEEP = "keep"


KEEP: Final = Keep.KEEP


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """Other settings for some layers of a recipe; of several, the last that matches decides.

    Patterns are those of a shell: ``*`` any text, dots included, ``?`` one character, ``[ab]`` one
    of these.

    Args:
        layers: pattern for the layer's name in the model, such as ``"features.0"``,
            ``"classifier.*"``.
        kind: pattern for the name of the layer's class, such as ``"Linear"``, ``"BatchNorm*"``.
        parameter: pattern for the parameter's name in its layer, such as ``"bias"``. It narrows an
            override of weight, gradient, momentum, second_moment or accumulator.
        required: whether a model with no such layer is an error.
        weight: a quantizer, or None to switch the role off there, as for each of the roles.
        activation: likewise.
        error: likewise.
        gradient: likewise.
        momentum: likewise.
        second_moment: likewise.
        accumulator: likewise.
        placement: where these layers quantize activation and error; see `Recipe`.
    """

    layers: str = "*"
    kind: str = "*"
    parameter: str = "*"
    required: bool = True
    weight: Quantizer | Keep | None = KEEP
    activation: Quantizer | Keep | None = KEEP
    error: Quantizer | Keep | None = KEEP
    gradient: Quantizer | Keep | None = KEEP
    momentum: Quantizer | Keep | None = KEEP
    second_moment: Quantizer | Keep | None = KEEP
    accumulator: Quantizer | Keep | None = KEEP
    placement: Placement | Keep = KEEP

    def __post_init__(self) -> None:
        for name in ("layers", "kind", "parameter"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(
                    f"Override: {name} must be a pattern such as '*', not {getattr(self, name)!r}"
                )
        changes = dict(self.changes())
        for role in ROLES:
            if role in changes and changes[role] is not None:
                _check_role(str(self), role, changes[role])
        if self.placement is not KEEP:
            _check_choice(str(self), "placement", self.placement, PLACEMENTS)
        if not changes:
            raise ValueError(f"{self}: it changes nothing; give a role or a placement")
        narrow = [name for name in (*SIGNAL_ROLES, "placement") if name in changes]
        if self.parameter != "*" and narrow:
            raise ValueError(
                f"{self}: {narrow[0]} belongs to a layer, not to one of its parameters; leave out "
                f"parameter={self.parameter!r}"
            )

    def matches(self, layer: LayerName) -> bool:
        """Whether it changes something at that layer."""
        return (
            fnmatchcase(layer.name, self.layers)
            and fnmatchcase(layer.kind, self.kind)
            and (
                self.parameter == "*"
                or any(fnmatchcase(name, self.parameter) for name in layer.parameters)
            )
        )

    def concerns_parameters(self) -> bool:
        """Whether it changes what parameters and their states are rounded to."""
        return any(name in PARAMETER_ROLES for name, _ in self.changes())

    def changes(self) -> Iterator[tuple[str, Quantizer | Placement | None]]:
        """Each setting that it changes, with the new value."""
        for name in (*ROLES, "placement"):
            value = getattr(self, name)
            if value is not KEEP:
                yield name, value

    def __str__(self) -> str:
        given = [
            f"{name}={getattr(self, name)!r}"
            for name in ("layers", "kind", "parameter")
            if getattr(self, name) != "*"
        ]
        return f"Override({', '.join(given)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A quantizer, or None for float, for each role of Algorithm 2, and where layers apply it.

    Args:
        name: what reports call it.
        weight: Q_W, of the updated weights, biases and normalization parameters included.
        activation: Q_A, of a layer's values on the way forward.
        error: Q_E, of the gradient on the way back.
        gradient: Q_G, of the parameters' gradients, before weight decay is added.
        momentum: Q_M, of the momentum (Adam: the first moment) as it is kept between steps.
        second_moment: of the root of Adam's second moment, as it is kept between steps.
        accumulator: of a separate accumulator that takes the updates, the weights being quantized
            from it; None, as in the paper: the weights are the accumulator.
        quantize_input: whether the input of the network (of its first converted layer) is quantized
            too; in the paper it is not.
        placement: where activation and error are quantized.

            * "input": at the input of product layers: activation as it enters, error as it leaves
              toward the layer before;
            * "operands": what enters the products: activation at the input of product layers, error
              at their output, so that one quantized error serves both backward products. That is
              what integer hardware multiplies, so an exponent is shared by the whole tensor or by
              each index of its first dimension;
            * "output": both at the output of product layers, but for the network's last;
            * "nonlinearity": both at the output of `torch.nn` nonlinearities.
        product: how products of quantized operands are computed: "simulated", in float, or
            "native", on integers of 8 bits, in the layers where all three operands are quantized.
        overrides: other settings for some layers.

    Raises:
        TypeError: a role is neither a `Quantizer` nor None.
        ValueError: a role cannot use its format, or settings exclude each other.

    Source: Yang et al. 2019 (arXiv:1904.11943), Algorithm 2.
    """

    name: str
    weight: Quantizer | None = None
    activation: Quantizer | None = None
    error: Quantizer | None = None
    gradient: Quantizer | None = None
    momentum: Quantizer | None = None
    second_moment: Quantizer | None = None
    accumulator: Quantizer | None = None
    quantize_input: bool = False
    placement: Placement = "input"
    product: Product = "simulated"
    overrides: tuple[Override, ...] = field(default=())

    def __post_init__(self) -> None:
        owner = f"Recipe {self.name!r}"
        for role in ROLES:
            if getattr(self, role) is not None:
                _check_role(owner, role, getattr(self, role))
        _check_choice(owner, "placement", self.placement, PLACEMENTS)
        _check_choice(owner, "product", self.product, PRODUCTS)
        require_bool(owner, "quantize_input", self.quantize_input)
        object.__setattr__(self, "overrides", tuple(self.overrides))
        for override in self.overrides:
            if not isinstance(override, Override):
                raise TypeError(f"{owner}: overrides must be Override values, not {override!r}")
            for role, value in override.changes():
                if isinstance(value, Quantizer) and override.placement is KEEP:
                    _check_operands(f"{owner}, {override}", role, value, self)
        if self.placement == "operands":
            for role in SIGNAL_ROLES:
                _check_operands(owner, role, getattr(self, role), self)
        if self.product == "native":
            if self.placement != "operands":
                raise ValueError(
                    f'{owner}: product="native" multiplies quantized operands; it needs '
                    f'placement="operands", not {self.placement!r}'
                )
            for role in ("weight", *SIGNAL_ROLES):
                _check_native(owner, role, getattr(self, role))

    def at(self, layer: str, kind: str | None = None, parameter: str | None = None) -> Recipe:
        """The recipe that holds for one layer, or one parameter of it: overrides applied.

        Args:
            layer: the layer's name in the model.
            kind: the name of its class; it may be left out if no override asks for it.
            parameter: the parameter's name in the layer, such as "weight"; None for what concerns
                the layer as a whole.

        Raises:
            ValueError: an override goes by the kind of layer, and none is given.
        """
        return _at(self, layer, kind, parameter)

    def resolve(self, layers: Sequence[LayerName]) -> Recipe:
        """The same recipe for a model with those layers: overrides by kind go by name instead.

        Raises:
            ValueError: an override that is required matches no layer; the text names near ones.
        """
        found: list[Override] = []
        for override in self.overrides:
            matched = [layer for layer in layers if override.matches(layer)]
            if not matched and override.required:
                raise ValueError(f"recipe {self.name!r}: {_mismatch(override, layers)}")
            if override.kind == "*":
                found += [override] if matched else []
            else:
                names = [escape(layer.name) for layer in matched]
                found += [replace(override, layers=name, kind="*") for name in names]
        return replace(self, overrides=tuple(found))


class LayerName(NamedTuple):
    """What patterns match of a layer: its name in the model, its class's name, its parameters'."""

    name: str
    kind: str
    parameters: tuple[str, ...] = ()


def _mismatch(override: Override, layers: Sequence[LayerName]) -> str:
    """Why an override matches no layer, and what is near."""
    rest = [layer for layer in layers if fnmatchcase(layer.name, override.layers)]
    if not rest:
        names = [layer.name for layer in layers]
        inner = f"{override.layers}.*"
        if any(fnmatchcase(name, inner) for name in names):
            return f"{override} matches no layer, but what holds some; use layers={inner!r}"
        return f"{override} matches no layer; {_near(override.layers, names)}"
    of_kind = [layer for layer in rest if fnmatchcase(layer.kind, override.kind)]
    if not of_kind:
        kinds = [layer.kind for layer in rest]
        return f"{override} matches no layer of that kind; {_near(override.kind, kinds)}"
    parameters = [name for layer in of_kind for name in layer.parameters]
    return f"{override} matches no parameter; {_near(override.parameter, parameters)}"


def _near(pattern: str, names: Iterable[str]) -> str:
    known = list(dict.fromkeys(names))
    near = difflib.get_close_matches(pattern.strip("*."), known, n=3, cutoff=0.4)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    more = ", ..." if len(known) > 8 else ""
    return f"there are {', '.join(map(repr, known[:8]))}{more}" if known else "there is none"


# No cache: hashing a recipe with the overrides of a hundred layers costs more than the look.
def _at(recipe: Recipe, layer: str, kind: str | None, parameter: str | None) -> Recipe:
    settings: dict[str, object] = {}
    for override in recipe.overrides:
        if parameter is not None and not override.concerns_parameters():
            continue
        if override.kind != "*" and kind is None:
            raise ValueError(
                f"recipe {recipe.name!r} has an override for layers of kind {override.kind!r}, and "
                f"the name {layer!r} does not tell the kind; give the optimizer the model itself "
                f"instead of its parameters"
            )
        if (
            fnmatchcase(layer, override.layers)
            and (override.kind == "*" or fnmatchcase(kind or "", override.kind))
            and (override.parameter == "*" or fnmatchcase(parameter or "", override.parameter))
        ):
            settings |= override.changes()
    operands = [settings.get(role, getattr(recipe, role)) for role in ("weight", *SIGNAL_ROLES)]
    if parameter is not None or None in operands:
        # How products are computed concerns a layer as a whole, and only one of integers.
        settings["product"] = "simulated"
    return replace(recipe, overrides=(), **settings)  # type: ignore[arg-type]  # of those fields


def fit(fmt: Format, shape: Sequence[int]) -> Format:
    """`fmt` for a tensor of that shape, which may have fewer dimensions than its blocks have.

    * One exponent per index of all axes would be one per element, so such axes are dropped from the
      end: "one exponent per output channel" becomes one for the tensor for a bias, "per sample and
      channel" one per sample for the output of a linear layer.
    * A tile runs along axes that exist, a microscaling block otherwise along the last; where its
      extent does not divide the tensor's, the largest that does takes its place.
    """
    if isinstance(fmt, BlockFloat) and fmt.tile is None:
        if fmt.axes is None:
            return fmt
        axes = tuple(axis for axis in fmt.axes if -len(shape) <= axis < len(shape))
        axes = axes[: max(len(shape) - 1, 0)]
        if axes == fmt.axes:
            return fmt
        # Dynamo warns of caches, and needs none: what it traces, it keeps.
        compiling = torch.compiler.is_compiling()
        return _with_axes(fmt, axes) if compiling else _with_axes_kept(fmt, axes)
    if isinstance(fmt, BlockFloat | Microscaling):
        compiling = torch.compiler.is_compiling()
        return _tiled(fmt, tuple(shape)) if compiling else _tiled_kept(fmt, tuple(shape))
    return fmt


def _with_axes(fmt: BlockFloat, axes: tuple[int, ...]) -> BlockFloat:
    return replace(fmt, axes=axes or None)


def _tiled(fmt: BlockFloat | Microscaling, shape: tuple[int, ...]) -> Format:
    if isinstance(fmt, Microscaling):
        if not shape:  # one number with a scale of its own: integers of as many bits, shared by one
            return BlockFloat(fmt.significand_bits + 1)
        axis = fmt.axis if -len(shape) <= fmt.axis < len(shape) else -1
        return replace(fmt, axis=axis, tile=_divisor(shape[axis], fmt.tile))
    assert isinstance(fmt.tile, tuple)
    last = tuple(range(-len(fmt.tile), 0))
    along = [
        (axis, extent)
        for axis, extent in zip(fmt.axes or last, fmt.tile, strict=True)
        if -len(shape) <= axis < len(shape)
    ]
    if not along:
        return replace(fmt, axes=None, tile=None)
    # From the front and from the back two axes can be one of a tensor of few: the first holds.
    along = list({axis % len(shape): (axis, extent) for axis, extent in reversed(along)}.values())
    along.reverse()
    axes = tuple(axis for axis, _ in along)
    tile = tuple(_divisor(shape[axis], extent) for axis, extent in along)
    return replace(fmt, axes=fmt.axes and axes, tile=tile)


_with_axes_kept = lru_cache(maxsize=1024)(_with_axes)
_tiled_kept = lru_cache(maxsize=1024)(_tiled)


def _divisor(extent: int, most: int) -> int:
    """The largest divisor of `extent` up to `most`."""
    return next((tile for tile in range(min(most, extent), 0, -1) if extent % tile == 0), 1)


def _check_role(owner: str, role: str, value: object) -> None:
    """Raise unless `value` is a quantizer whose format that role can use."""
    if not isinstance(value, Quantizer):
        raise TypeError(
            f"{owner}: {role} must be a Quantizer(format, rounding) or None, not {value!r}"
        )
    fmt = value.format
    signed = not isinstance(fmt, Minifloat) or fmt.signed
    if not signed and role not in ("activation", "second_moment"):
        raise ValueError(
            f"{owner}: {role} cannot use {fmt}, which has no negative numbers; take a signed format"
        )
    has_zero = not isinstance(fmt, Binary) and (not isinstance(fmt, Minifloat) or fmt.has_zero)
    if not has_zero and role not in ("weight", "activation"):
        raise ValueError(
            f"{owner}: {role} cannot use {fmt}, which has no zero, where zeros must stay zeros; "
            f"take a format with a zero"
        )


def _check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{owner}: {name}={value!r} must be one of {', '.join(choices)}")


def _check_operands(owner: str, role: str, value: Quantizer | None, recipe: Recipe) -> None:
    """Raise unless products of integers can take the format of an operand."""
    if recipe.placement != "operands" or role not in SIGNAL_ROLES or value is None:
        return
    fmt = value.format
    shared = not isinstance(fmt, BlockFloat) or (fmt.tile is None and fmt.axes in (None, (0,)))
    if isinstance(fmt, Microscaling) or not shared:
        raise ValueError(
            f'{owner}: with placement="operands", {role} needs one exponent for the tensor or for '
            f"each index of its first dimension (bfp8, bfp8[0]), not {fmt}, whose exponents change "
            f"within a sum of products"
        )


def _check_native(owner: str, role: str, value: Quantizer | None) -> None:
    """Raise unless int8 products can take the format of an operand."""
    fmt = None if value is None else value.format
    per_tensor = (
        isinstance(fmt, BlockFloat)
        and fmt.axes is None
        and fmt.tile is None
        and fmt.exponent_bits <= 8
    )
    if not (per_tensor or isinstance(fmt, FixedPoint)) or (fmt is not None and fmt.bits > 8):
        raise ValueError(
            f'{owner}: with product="native", {role} must be integers of up to 8 bits with one '
            f"scale for the tensor, its exponent too of up to 8 bits (bfp8, fixed8.6), not "
            f"{'float' if fmt is None else fmt}"
        )
