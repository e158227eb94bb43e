import pytest

from swalp import BlockFloat, FixedPoint, Nearest, Stochastic, recipes
from swalp.recipes import Override, Quantizer, Recipe


@pytest.mark.parametrize("name", recipes.names())
def test_named_recipes_come_back_equal(name, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(recipes.to_toml(recipes.get(name)))
    assert recipes.load(path) == recipes.get(name)
    assert recipes.named(str(path), "here") == recipes.get(name)


def test_everything_comes_back_equal(tmp_path):
    fine = Quantizer(BlockFloat(8, tile=32), Nearest())
    coarse = Quantizer(FixedPoint(5, 3), Stochastic(random_bits=9))
    recipe = Recipe(
        name='a "name" \x7f',
        weight=fine,
        error=coarse,
        quantize_input=True,
        placement="output",
        overrides=(
            Override(layers="a.*", weight=None, activation=coarse),
            Override(kind="Conv?d", placement="input", required=False),
            Override(parameter="bias", momentum=None),
        ),
    )
    path = tmp_path / "a.toml"
    path.write_text(recipes.to_toml(recipe))
    assert recipes.load(path) == recipe


def test_a_file_may_change_a_named_recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "paper-big-block-8"\nerror = "float"\n'
        '[[overrides]]\nlayers = "classifier.*"\nactivation = "bfp12 nearest"\n'
    )
    recipe = recipes.load(path)
    assert recipe.name == "mine"
    assert recipe.error is None
    assert recipe.weight == recipes.get("paper-big-block-8").weight
    assert recipe.at("classifier.1").activation == Quantizer(BlockFloat(12), Nearest())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight = ", "malformed TOML"),
        ('wieght = "float"', "unknown key 'wieght'; did you mean 'weight'"),
        ('weight = "bfp8"', 'weight = "bfp8": give a format and a rounding, such as'),
        ("weight = 8", "weight = 8: give a format"),
        ('weight = "bpf8 nearest"', "unknown format 'bpf8'; did you mean bfp8"),
        ('weight = "bfp8 stochastic99"', r"random_bits=99 must be 1\.\.32"),
        ('weight = "bfp8 randomly"', "unknown rounding 'randomly'; there are nearest"),
        ('error = "ue5m3 nearest"', "error cannot use ue5m3"),
        ('base = "paper-9"', "base: unknown recipe 'paper-9'"),
        ('placement = "inputs"', "placement='inputs' must be one of"),
        ("overrides = 3", r"overrides must be tables, each headed \[\[overrides\]\]"),
        ('[[overrides]]\nlayer = "a"', "unknown key 'layer'; did you mean 'layers'"),
        ('[[overrides]]\nlayers = "a"', "it changes nothing"),
    ],
)
def test_mistakes(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.toml: .*{message}"):
        recipes.load(path)
