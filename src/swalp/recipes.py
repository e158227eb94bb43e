"""Which format and rounding each role of a training run has: recipes, and the named ones."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from swalp.formats import BlockFloat, Format, Minifloat
from swalp.rounding import Rounding, Stochastic

ROLES = (
    "weight",
    "activation",
    "error",
    "gradient",
    "momentum",
    "second_moment",
    "accumulator",
)


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

    def __str__(self) -> str:
        return f"{self.format} {self.rounding}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A quantizer, or None for float, for each role of Algorithm 2.

    Args:
        name: what reports call it.
        weight: Q_W, of the updated weights, biases and normalization parameters included.
        activation: Q_A, of what enters a layer's product.
        error: Q_E, of the gradient that leaves a layer toward its input.
        gradient: Q_G, of the parameters' gradients, before weight decay is added.
        momentum: Q_M, of the momentum (Adam: the first moment) as it is kept between steps.
        second_moment: of the root of Adam's second moment, as it is kept between steps.
        accumulator: of a separate accumulator that takes the updates, the weights being quantized
            from it; None, as in the paper: the weights are the accumulator.
        quantize_input: whether the input of the network (of its first converted layer) is quantized
            too; in the paper it is not.

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

    def __post_init__(self) -> None:
        for role in ROLES:
            value = getattr(self, role)
            if value is not None and not isinstance(value, Quantizer):
                raise TypeError(
                    f"Recipe {self.name!r}: {role} must be a Quantizer(format, rounding) or None, "
                    f"not {value!r}"
                )


def fit(fmt: Format, ndim: int) -> Format:
    """`fmt` for a tensor of `ndim` dimensions: some elements always share an exponent.

    One exponent per index of all axes would be one per element. Such axes are dropped from the end:
    "one exponent per output channel" becomes one for the tensor for a bias, "per sample and
    channel" becomes one per sample for the output of a linear layer.
    """
    if not isinstance(fmt, BlockFloat) or fmt.axes is None or fmt.tile is not None:
        return fmt
    axes = fmt.axes[: max(ndim - 1, 0)]
    return fmt if axes == fmt.axes else replace(fmt, axes=axes or None)


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
