"""The recipes that have a name, and what recipes are made of."""

from __future__ import annotations

import difflib
import re

from swalp.formats import BlockFloat, Minifloat
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
from swalp.rounding import Stochastic

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
    "named",
    "names",
]

# 16 bits serve where each number is rounded once; a weight sums thousands of small updates.
_SHORT = Stochastic(random_bits=16)
_LONG = Stochastic(random_bits=32)


# Roots of second moments span many orders of magnitude within a tensor, so each has an exponent of
# its own: 8 bits without a sign, from 2**-29 to 30. Rounding to nearest would never move them, as a
# step changes them by less than half a gap.
_ROOT = Minifloat(5, 3, bias=27, specials="finite", signed=False)


def _paper(name: str, word_length: int, *, small: bool) -> Recipe:
    parameter = BlockFloat(word_length, axes=(0,) if small else None, symmetric=False)
    signal = BlockFloat(word_length, axes=(0, 1) if small else None, symmetric=False)
    return Recipe(
        name=name,
        weight=Quantizer(parameter, _LONG),
        activation=Quantizer(signal, _SHORT),
        error=Quantizer(signal, _SHORT),
        gradient=Quantizer(parameter, _SHORT),
        momentum=Quantizer(parameter, _SHORT),
        second_moment=Quantizer(_ROOT, _SHORT),
    )


_PAPER = re.compile(r"paper-(big|small)-block-(\d+)")


def names() -> tuple[str, ...]:
    """The names that `get` knows at 8 bits; the word length at the end may be 2..16."""
    return ("paper-big-block-8", "paper-small-block-8")


def get(name: str) -> Recipe:
    """The named recipe.

    Args:
        name: ``paper-big-block-W``: Algorithm 2 in W-bit block floating point, one exponent per
            tensor; ``paper-small-block-W``: one per output channel of weights, gradients and
            momentum, one per sample and channel of activations and errors. W is 2..16.

    Raises:
        ValueError: no such recipe; the text names the nearest ones.
    """
    if (match := _PAPER.fullmatch(name)) and 2 <= int(match[2]) <= 16:
        return _paper(name, int(match[2]), small=match[1] == "small")
    near = difflib.get_close_matches(name, names(), n=2, cutoff=0.4) or list(names())
    raise ValueError(
        f"unknown recipe {name!r}; did you mean {' or '.join(near)}? The word length may be 2..16"
    )


def named(recipe: Recipe | str, owner: str) -> Recipe:
    """`recipe`, or the one of that name; `owner` says in errors who asked.

    Raises:
        TypeError: neither a recipe nor a name.
    """
    if isinstance(recipe, str):
        return get(recipe)
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"{owner}: recipe must be a Recipe or the name of one, not {recipe!r}; "
            f"swalp.recipes.get('paper-small-block-8') is one"
        )
    return recipe
