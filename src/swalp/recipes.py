"""The recipes that have a name, and what recipes are made of."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from swalp.formats import BlockFloat, FixedPoint, Format, Microscaling, Minifloat
from swalp.recipe import (
    PARAMETER_ROLES,
    ROLES,
    SIGNAL_ROLES,
    LayerName,
    Override,
    Placement,
    Quantizer,
    Recipe,
    fit,
)
from swalp.recipe_text import from_settings, settings_of, to_toml
from swalp.rounding import Nearest, Stochastic

__all__ = [
    "PARAMETER_ROLES",
    "ROLES",
    "SIGNAL_ROLES",
    "LayerName",
    "Override",
    "Placement",
    "Quantizer",
    "Recipe",
    "fit",
    "get",
    "load",
    "named",
    "names",
    "summary",
    "to_toml",
]

# 16 bits serve where each number is rounded once; a weight sums thousands of small updates.
_SHORT = Stochastic(random_bits=16)
_LONG = Stochastic(random_bits=32)


# Roots of second moments span many orders of magnitude within a tensor, so each has an exponent of
# its own: 8 bits without a sign, from 2**-29 to 30. Rounding to nearest would never move them, as a
# step changes them by less than half a gap.
_ROOT = Quantizer(Minifloat(5, 3, bias=27, specials="finite", signed=False), _SHORT)


def _paper(name: str, word_length: int, *, small: bool) -> Recipe:
    parameter = BlockFloat(word_length, axes=(0,) if small else None, symmetric=False)
    signal = BlockFloat(word_length, axes=(0, 1) if small else None, symmetric=False)
    return _recipe(name, parameter, signal, signal)


def _official(name: str, word_length: int) -> Recipe:
    """The published code on a network whose quantizers follow the nonlinearities, as its VGG's do.

    Weights are rounded from an accumulator. The code rounds them once more, which moves nothing: in
    a block whose lowest number doubled the largest magnitude, the first rounding took a wider gap.
    """
    parameter = Quantizer(BlockFloat(word_length, axes=(0,), symmetric=False), _SHORT)
    signal = Quantizer(BlockFloat(word_length, symmetric=False), _SHORT)
    return Recipe(
        name=name,
        weight=_long(parameter),
        activation=signal,
        error=signal,
        gradient=parameter,
        momentum=parameter,
        accumulator=_long(parameter),
        placement="nonlinearity",
    )


def _official_preresnet(name: str, word_length: int) -> Recipe:
    """The published code on its PreResNet-164: quantizers follow the convolutions, too.

    None stands behind a shortcut's convolution, nor behind the last nonlinearity, whose names are
    those of `swalp.training.networks`.
    """
    return replace(
        _official(name, word_length),
        overrides=(
            Override(kind="Conv2d", placement="output"),
            Override(layers="*.shortcut", activation=None, error=None),
            Override(layers="56", activation=None, error=None),
        ),
    )


def _qtorch(name: str, word_length: int) -> Recipe:
    """QPyTorch's example: at the output of convolutions and linear layers, blocks by sample.

    It asks for one exponent per index of the first dimension; in biases and the parameters of
    normalization that is one per element.
    """
    blocks = BlockFloat(word_length, axes=(0,))
    alone = Quantizer(BlockFloat(word_length, tile=1), _SHORT)
    vectors = Override(weight=_long(alone), gradient=alone, momentum=alone, required=False)
    return replace(
        _recipe(name, blocks, blocks, blocks),
        second_moment=None,
        placement="output",
        overrides=(
            replace(vectors, parameter="bias"),
            replace(vectors, kind="*Norm*"),
        ),
    )


def _native(name: str, word_length: int) -> Recipe:
    """Operands as integer hardware takes them: one exponent per tensor, no lowest number."""
    fmt = BlockFloat(word_length)
    return replace(
        _recipe(name, fmt, fmt, fmt), quantize_input=True, placement="operands", product="native"
    )


def _fixed(name: str, word_length: int) -> Recipe:
    """Fixed point: the gap of each role is a constant, chosen for a mean loss over a batch."""
    return replace(
        _recipe(
            name,
            FixedPoint(word_length, word_length - 2),
            FixedPoint(word_length, word_length - 4),
            FixedPoint(word_length, word_length + 6),
        ),
        gradient=Quantizer(FixedPoint(word_length, word_length + 2), _SHORT),
        momentum=Quantizer(FixedPoint(word_length, word_length), _SHORT),
    )


def _fp8(name: str) -> Recipe:
    """OCP's 8-bit floating point: precision for weights and activations, range for the way back."""
    return _recipe(name, _E4M3, _E4M3, _E5M2, backward=_E5M2)


def _fp8_accumulator(name: str) -> Recipe:
    """8-bit floating point with a 16-bit accumulator, as Wang et al. 2018."""
    nearest = Quantizer(_E5M2, Nearest())
    return Recipe(
        name=name,
        weight=nearest,
        activation=nearest,
        error=nearest,
        gradient=nearest,
        momentum=Quantizer(_E6M9, _LONG),
        accumulator=Quantizer(_E6M9, _LONG),
    )


def _microscaling(element: Minifloat | FixedPoint, error: Minifloat | FixedPoint) -> _Builder:
    """OCP microscaling along the axis that products sum over: channels, or features."""

    def build(name: str) -> Recipe:
        forward, backward = Microscaling(element), Microscaling(error)
        channels = Override(
            kind="Conv*d",  # not the Conv1D of transformers, which is a linear layer
            required=False,
            activation=Quantizer(replace(forward, axis=1), _SHORT),
            error=Quantizer(replace(backward, axis=1), _SHORT),
        )
        parameter, gradient = replace(forward, axis=1), replace(backward, axis=1)
        recipe = _recipe(name, parameter, forward, backward, backward=gradient)
        return replace(recipe, overrides=(channels,))

    return build


def _recipe(
    name: str, parameter: Format, activation: Format, error: Format, backward: Format | None = None
) -> Recipe:
    """All roles stochastic; gradient and momentum as the weights, unless `backward` is given."""
    backward = parameter if backward is None else backward
    return Recipe(
        name=name,
        weight=Quantizer(parameter, _LONG),
        activation=Quantizer(activation, _SHORT),
        error=Quantizer(error, _SHORT),
        gradient=Quantizer(backward, _SHORT),
        momentum=Quantizer(backward, _SHORT),
        second_moment=_ROOT,
    )


def _long(quantizer: Quantizer) -> Quantizer:
    return replace(quantizer, rounding=_LONG)


_E4M3 = Minifloat(4, 3, specials="fn")
_E5M2 = Minifloat(5, 2)
_E6M9 = Minifloat(6, 9)
_Builder = Callable[[str], Recipe]
_FAMILIES: dict[str, tuple[Callable[[str, int], Recipe], range]] = {
    "paper-big-block": (partial(_paper, small=False), range(2, 17)),
    "paper-small-block": (partial(_paper, small=True), range(2, 17)),
    "official": (_official, range(2, 17)),
    "official-preresnet": (_official_preresnet, range(2, 17)),
    "qtorch": (_qtorch, range(2, 17)),
    "native": (_native, range(2, 9)),
    "fixed": (_fixed, range(4, 17)),
}
_SINGLE: dict[str, _Builder] = {
    "fp8": _fp8,
    "fp8-accumulator": _fp8_accumulator,
    "mxint8": _microscaling(FixedPoint(8, 6, symmetric=True), FixedPoint(8, 6, symmetric=True)),
    "mxfp8": _microscaling(_E4M3, _E5M2),
    "mxfp6": _microscaling(*[Minifloat(2, 3, specials="finite")] * 2),
    "mxfp4": _microscaling(*[Minifloat(2, 1, specials="finite")] * 2),
}


def names() -> tuple[str, ...]:
    """The names that `get` knows, at 8 bits where a word length ends them."""
    return (*(f"{family}-8" for family in _FAMILIES), *_SINGLE)


def summary(name: str) -> str:
    """What a recipe is, in one line."""
    family = name.rpartition("-")[0]
    if name not in _SINGLE and family in _FAMILIES:
        widths = _FAMILIES[family][1]
        return f"{_SUMMARIES[family]}; W {widths[0]}..{widths[-1]}"
    return _SUMMARIES[name]


_SUMMARIES = {
    "paper-big-block": "Algorithm 2, one exponent per tensor",
    "paper-small-block": "Algorithm 2, one exponent per channel",
    "official": "what the published code does to its VGG16",
    "official-preresnet": "what the published code does to its PreResNet-164",
    "qtorch": "QPyTorch's example: one exponent per sample",
    "native": "products on 8-bit integers, one exponent per tensor",
    "fixed": "fixed point, a constant gap for each role",
    "fp8": "OCP FP8, everything kept in 8 bits",
    "fp8-accumulator": "FP8 to nearest with a 16-bit accumulator",
    "mxint8": "OCP microscaling, 8-bit integers",
    "mxfp8": "OCP microscaling, E4M3 forward and E5M2 back",
    "mxfp6": "OCP microscaling, E2M3",
    "mxfp4": "OCP microscaling, E2M1",
}


def get(name: str) -> Recipe:
    """The named recipe.

    Args:
        name: one of `names()`. A number at the end is the word length W:

            * ``paper-big-block-W``: Algorithm 2 in W-bit block floating point, one exponent per
              tensor; ``paper-small-block-W``: one per output channel of weights, gradients and
              momentum, one per sample and channel of activations and errors;
            * ``official-W``: what the published code does to its VGG16, and
              ``official-preresnet-W`` to its PreResNet-164 (`docs/recipes.md` compares them with
              the paper, point by point);
            * ``qtorch-W``: QPyTorch's example of SWALP;
            * ``native-W``: one exponent per tensor on the operands of every product, the network's
              input included, and the products computed on integers;
            * ``fixed-W``: fixed point, the gap of each role a constant;
            * ``fp8``: E4M3 for weights and activations, E5M2 for errors, gradients and momentum;
              ``fp8-accumulator``: E5M2 to nearest with momentum and accumulator in 16 bits;
            * ``mxint8``, ``mxfp8``, ``mxfp6``, ``mxfp4``: OCP microscaling.

    Raises:
        ValueError: no such recipe; the text names those that there are.
    """
    if not isinstance(name, str):
        raise TypeError(f"recipes.get: {name!r} must be a name, such as 'paper-small-block-8'")
    if name in _SINGLE:
        return _SINGLE[name](name)
    family, _, width = name.rpartition("-")
    if family in _FAMILIES:
        build, widths = _FAMILIES[family]
        if re.fullmatch("[1-9][0-9]*", width) and int(width) in widths:
            return build(name, int(width))
        raise ValueError(
            f"unknown recipe {name!r}: the word length of {family}-W may be "
            f"{widths[0]}..{widths[-1]}"
        )
    near = [known for known in names() if name and known.startswith(name)]
    near = near or difflib.get_close_matches(name, names(), n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"unknown recipe {name!r}; {hint}recipes: {', '.join(names())}")


def load(path: str | Path) -> Recipe:
    """The recipe in a TOML file: see `docs/recipes.md`.

    Keys are the fields of `Recipe`, roles as ``"bfp8 stochastic16"`` or ``"float"``. With
    ``base = "paper-small-block-8"`` the other keys change that recipe, and overrides follow its
    own. Without, roles that are not named stay float.

    Raises:
        OSError: it cannot be read.
        ValueError: no recipe; the text names the file, the key and the mend.
    """
    source = str(path)
    settings = settings_of(Path(path).read_bytes(), source)
    base = settings.pop("base", None)
    start = Recipe(name=Path(path).stem) if base is None else _base(base, source)
    return from_settings({"name": Path(path).stem} | settings, start, source)


def _base(name: object, source: str) -> Recipe:
    try:
        return get(str(name))
    except ValueError as error:
        raise ValueError(f"{source}: base: {error}") from None


def named(recipe: Recipe | str, owner: str) -> Recipe:
    """`recipe`, or the one of that name, or in that file (``….toml``); `owner` asked.

    Raises:
        TypeError: neither a recipe nor a name.
    """
    if isinstance(recipe, str):
        return load(recipe) if recipe.endswith(".toml") else get(recipe)
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"{owner}: recipe must be a Recipe or the name of one, not {recipe!r}; "
            f"swalp.recipes.get('paper-small-block-8') is one"
        )
    return recipe
