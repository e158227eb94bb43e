import dataclasses

import pytest

from swalp import BlockFloat, FixedPoint, Nearest, Stochastic, recipes
from swalp.recipes import Quantizer, Recipe, fit


def test_paper_small_block():
    recipe = recipes.get("paper-small-block-8")
    parameter, signal = (BlockFloat(8, axes=axes, symmetric=False) for axes in ((0,), (0, 1)))
    formats = {role: getattr(recipe, role).format for role in ("weight", "gradient", "momentum")}
    assert set(formats.values()) == {parameter}
    assert recipe.activation.format == recipe.error.format == signal
    assert recipe.accumulator is None
    assert recipe.weight.rounding == Stochastic(random_bits=32)
    assert recipe.activation.rounding == Stochastic(random_bits=16)


def test_paper_big_block_has_one_exponent_per_tensor():
    recipe = recipes.get("paper-big-block-5")
    big = BlockFloat(5, symmetric=False)
    roles = ("weight", "activation", "error", "gradient", "momentum")
    assert {getattr(recipe, role).format for role in roles} == {big}


@pytest.mark.parametrize("name", recipes.names())
def test_names_are_known(name):
    assert recipes.get(name).name == name


def test_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"unknown recipe 'papersmall-8'.*paper-small-block-8"):
        recipes.get("papersmall-8")
    with pytest.raises(ValueError, match=r"may be 2\.\.16"):
        recipes.get("paper-big-block-17")


def test_fit_leaves_elements_that_share():
    assert fit(BlockFloat(8, axes=(0,)), 1) == BlockFloat(8)
    assert fit(BlockFloat(8, axes=(0,)), 0) == BlockFloat(8)
    assert fit(BlockFloat(8, axes=(0, 1)), 2) == BlockFloat(8, axes=(0,))
    assert fit(BlockFloat(8, axes=(0, 1)), 4) == BlockFloat(8, axes=(0, 1))
    assert fit(BlockFloat(8, tile=1), 1) == BlockFloat(8, tile=1)
    assert fit(FixedPoint(8, 6), 1) == FixedPoint(8, 6)


def test_recipes_are_values():
    recipe = recipes.get("paper-big-block-8")
    assert recipe == recipes.get("paper-big-block-8")
    assert len({recipe, recipes.get("paper-big-block-8")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.weight = None


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="carries a seed"):
        Quantizer(FixedPoint(8, 6), Stochastic(3))
    with pytest.raises(TypeError, match="format must be a format, not 8"):
        Quantizer(8, Nearest())
    with pytest.raises(TypeError, match="rounding must be a rounding rule"):
        Quantizer(FixedPoint(8, 6), "nearest")
    with pytest.raises(TypeError, match="'mine': weight must be a Quantizer"):
        Recipe(name="mine", weight=FixedPoint(8, 6))
