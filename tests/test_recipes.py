import dataclasses

import pytest
import torch

from swalp import (
    Binary,
    BlockFloat,
    FixedPoint,
    Microscaling,
    Minifloat,
    Nearest,
    Stochastic,
    quantize,
    recipes,
)
from swalp.recipes import LayerName, Override, Quantizer, Recipe, fit


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


def test_fixed_point_reaches_as_far_as_documented():
    reach = {"weight": 2, "activation": 8, "error": 2**-7, "gradient": 2**-3, "momentum": 0.5}
    for bits in (4, 8):
        recipe = recipes.get(f"fixed-{bits}")
        for role, most in reach.items():
            fmt = getattr(recipe, role).format
            assert (fmt.bits, fmt.values()[0]) == (bits, -most), role


def test_microscaling_shares_along_what_is_summed_over():
    recipe = recipes.get("mxfp8")
    layers = [recipe.at("a", kind) for kind in ("Linear", "Conv2d", "Conv1D")]
    for role in ("weight", "gradient", "momentum"):
        assert {getattr(layer, role).format.axis for layer in layers} == {1}
    for role in ("activation", "error"):
        assert [getattr(layer, role).format.axis for layer in layers] == [-1, 1, -1]


@pytest.mark.parametrize("name", recipes.names())
def test_names_are_known(name):
    assert recipes.get(name).name == name


def test_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"unknown recipe 'papersmall-8'.*paper-small-block-8"):
        recipes.get("papersmall-8")
    with pytest.raises(ValueError, match=r"may be 2\.\.16"):
        recipes.get("paper-big-block-17")


def test_fit_leaves_elements_that_share():
    assert fit(BlockFloat(8, axes=(0,)), (5,)) == BlockFloat(8)
    assert fit(BlockFloat(8, axes=(0,)), ()) == BlockFloat(8)
    assert fit(BlockFloat(8, axes=(0, 1)), (5, 6)) == BlockFloat(8, axes=(0,))
    assert fit(BlockFloat(8, axes=(0, 1)), (5, 6, 2, 2)) == BlockFloat(8, axes=(0, 1))
    assert fit(BlockFloat(8, axes=(1, -3)), (5, 6)) == BlockFloat(8, axes=(1,))
    assert fit(FixedPoint(8, 6), (5,)) == FixedPoint(8, 6)


def test_fit_takes_tiles_that_divide():
    mx = Microscaling(Minifloat(4, 3, specials="fn"), axis=1)
    assert fit(mx, (3, 64, 2)) == mx
    assert fit(mx, (3, 40)) == Microscaling(mx.element, axis=1, tile=20)
    assert fit(mx, (64,)) == Microscaling(mx.element)
    assert fit(mx, (37,)) == Microscaling(mx.element, tile=1)
    assert fit(BlockFloat(8, tile=1), (5,)) == BlockFloat(8, tile=1)
    assert fit(BlockFloat(8, tile=(16, 16)), (8, 24)) == BlockFloat(8, tile=(8, 12))
    assert fit(BlockFloat(8, tile=(16, 16)), (24,)) == BlockFloat(8, tile=12)
    assert fit(BlockFloat(8, tile=16, axes=(1,)), (24, 6)) == BlockFloat(8, tile=6, axes=(1,))
    assert fit(BlockFloat(8, tile=16, axes=(1,)), (24,)) == BlockFloat(8)
    both = BlockFloat(8, tile=(2, 4), axes=(0, -1))
    assert fit(both, (8, 8)) == both
    assert fit(both, (8,)) == BlockFloat(8, tile=(2,), axes=(0,))


@pytest.mark.parametrize("shape", [(), (5,), (3, 40), (2, 37, 3), (2, 12, 5, 5), (0, 3)], ids=str)
def test_what_fits_can_be_used(shape):
    formats = [
        BlockFloat(8, axes=(0, 1)), BlockFloat(8, axes=(2,)), BlockFloat(8, tile=16),
        BlockFloat(8, tile=(4, 4)), BlockFloat(8, tile=8, axes=(1,)),
        *(Microscaling(Minifloat(4, 3, specials="fn"), axis=axis) for axis in (-1, 1)),
    ]  # fmt: skip
    for fmt in formats:
        fitted = fit(fmt, shape)
        assert fit(fitted, shape) is fitted or fit(fitted, shape) == fitted
        assert quantize(torch.randn(shape), fitted).shape == shape


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
    with pytest.raises(ValueError, match="carries a step or a call"):
        Quantizer(FixedPoint(8, 6), Stochastic(step=3))
    with pytest.raises(TypeError, match="rounding must be a rounding rule"):
        Quantizer(FixedPoint(8, 6), "nearest")
    with pytest.raises(TypeError, match="'mine': weight must be a Quantizer"):
        Recipe(name="mine", weight=FixedPoint(8, 6))


def test_at_applies_the_overrides_that_match():
    fine, coarse = (Quantizer(FixedPoint(width, 4), Nearest()) for width in (12, 6))
    recipe = Recipe(
        name="mine",
        weight=coarse,
        overrides=(
            Override(layers="head.*", weight=fine),
            Override(layers="head.last", weight=None, placement="output"),
            Override(parameter="bias", gradient=fine),
        ),
    )
    assert recipe.at("body.0") == Recipe(name="mine", weight=coarse)
    assert recipe.at("head.0") == Recipe(name="mine", weight=fine)
    assert recipe.at("head.last") == Recipe(name="mine", placement="output")
    assert recipe.at("body.0", parameter="weight").gradient is None
    assert recipe.at("body.0", parameter="bias") == Recipe(
        name="mine", weight=coarse, gradient=fine
    )


def test_kinds_become_names():
    recipe = Recipe(
        name="mine",
        overrides=(
            Override(kind="Conv?d", weight=Quantizer(FixedPoint(8, 4), Nearest())),
            Override(kind="Embedding", weight=None, required=False),
        ),
    )
    with pytest.raises(ValueError, match="does not tell the kind; give the optimizer the model"):
        recipe.at("0")
    resolved = recipe.resolve([LayerName("a[0]", "Conv2d"), LayerName("b", "Linear")])
    assert resolved.at("a[0]") == recipe.at("a[0]", "Conv2d")
    assert resolved.at("a[0]").weight is not None
    assert resolved.at("b").weight is None
    assert len(resolved.overrides) == 1


def test_native_settings():
    eight = Quantizer(BlockFloat(8), Nearest())
    roles = {"weight": eight, "activation": eight, "error": eight, "placement": "operands"}
    wide = Override(layers="head", parameter="bias", weight=Quantizer(BlockFloat(12), Nearest()))
    recipe = Recipe(
        name="n", product="native", **roles, overrides=(Override(layers="first", error=None), wide)
    )
    assert recipe.at("middle").product == "native"
    assert recipe.at("first").product == "simulated"
    assert recipe.at("head", parameter="bias").weight == wide.weight
    with pytest.raises(ValueError, match="'n': product=\"native\" multiplies quantized operands"):
        Recipe(name="n", product="native", **(roles | {"placement": "input"}))
    for given, text in [
        (None, "float"),
        (Quantizer(BlockFloat(8, axes=(0,)), Nearest()), r"bfp8\[0\]"),
        (Quantizer(BlockFloat(9), Nearest()), "bfp9"),
        (Quantizer(Minifloat(4, 3), Nearest()), "e4m3"),
    ]:
        with pytest.raises(ValueError, match=f"weight must be integers of up to 8.*not {text}"):
            Recipe(name="n", product="native", **(roles | {"weight": given}))


def test_formats_that_a_role_cannot_use():
    unsigned = Quantizer(Minifloat(5, 3, signed=False), Nearest())
    signs = Quantizer(Binary(), Nearest())
    tiles = Quantizer(BlockFloat(8, tile=32), Nearest())
    Recipe(name="r", activation=unsigned, second_moment=unsigned, weight=signs)
    for role in ("weight", "error", "gradient", "momentum", "accumulator"):
        with pytest.raises(ValueError, match=f"{role} cannot use ue5m3, which has no negative"):
            Recipe(name="r", **{role: unsigned})
    for role in ("error", "gradient", "momentum", "second_moment", "accumulator"):
        with pytest.raises(ValueError, match=f"{role} cannot use binary, which has no zero"):
            Override(**{role: signs})
    with pytest.raises(ValueError, match=r'with placement="operands", error needs one exponent'):
        Recipe(name="r", error=tiles, placement="operands")
    with pytest.raises(ValueError, match=r"Override\(layers='a'\): with placement=\"operands\""):
        Recipe(name="r", placement="operands", overrides=(Override(layers="a", error=tiles),))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="placement='inputs' must be one of input, operands"):
        Recipe(name="r", placement="inputs")
    with pytest.raises(ValueError, match="product='fast' must be one of simulated, native"):
        Recipe(name="r", product="fast")
    with pytest.raises(ValueError, match=r"Override\(layers='a'\): it changes nothing"):
        Override(layers="a")
    with pytest.raises(ValueError, match="error belongs to a layer, not to one of its parameters"):
        Override(parameter="bias", error=None)
    with pytest.raises(TypeError, match="overrides must be Override values, not 3"):
        Recipe(name="r", overrides=(3,))
    with pytest.raises(TypeError, match="layers must be a pattern"):
        Override(layers=0, weight=None)
