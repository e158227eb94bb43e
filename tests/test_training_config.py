import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import swalp
from swalp.training import config
from swalp.training.config import RunConfig
from swalp.training.mistakes import UserError


@pytest.mark.parametrize("name", config.preset_names())
def test_presets_load_and_survive_the_round_trip(name, tmp_path):
    settings = config.load(name)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(settings))
    assert config.load(str(path)) == settings
    assert settings.arms[0] == "float"
    assert len(settings.arms) >= 2


def test_preset_names():
    assert config.preset_names() == [
        "cifar10-preresnet164",
        "cifar10-resnet20",
        "cifar10-small",
        "cifar10-vgg16",
        "cifar10-vgg16-bn",
        "cifar100-preresnet164",
        "cifar100-vgg16",
        "digits",
        "fashion-mnist",
        "imagenet-resnet18",
        "mnist",
    ]


@given(
    learning_rate=st.floats(min_value=0, exclude_min=True, max_value=config.FLOAT32_MAX),
    seed=st.integers(0, 2**32 - 1),
)
def test_toml_round_trip_of_any_number(learning_rate, seed):
    settings = config.load("digits")
    settings = settings.model_copy(update={"learning_rate": learning_rate, "first_seed": seed})
    again = config.parse(config.to_toml(settings).encode(), "text")
    assert config.validated(again, "text") == settings


def test_settings_are_frozen_values():
    settings = config.load("digits")
    assert hash(settings) == hash(config.load("digits"))
    with pytest.raises(ValidationError):
        settings.epochs = 3


def test_a_file_may_start_from_a_preset(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('preset = "digits"\nepochs = 40\n')
    assert config.load(str(path)) == config.load("digits", ["epochs=40"])


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        (["epochs=60"], 30),
        (["epochs=31"], 16),
        (["epochs=2"], 1),
        (["epochs=60", "averaging_start=20"], 20),
        (["averaging_start=20"], 20),
    ],
)
def test_averaging_starts_in_proportion_to_the_epochs(changes, start):
    assert config.load("digits").averaging_start == 15
    assert config.load("digits", changes).averaging_start == start


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
@pytest.mark.parametrize(
    ("model", "width", "epochs", "start", "rate", "decay"),
    [("vgg16", 64, 300, 200, 0.05, 5e-4), ("preresnet164", 16, 225, 150, 0.1, 3e-4)],
)
def test_the_published_settings(data, model, width, epochs, start, rate, decay):
    settings = config.load(f"{data}-{model}")
    assert (settings.data, settings.model, settings.width) == (data, model, width)
    assert (settings.epochs, settings.averaging_start) == (epochs, start)
    assert (settings.learning_rate, settings.averaging_rate) == (rate, 0.01)
    assert (settings.batch_size, settings.momentum) == (128, 0.9)
    assert settings.weight_decay == decay
    assert settings.average_every == "epoch"
    assert settings.augment


def test_a_short_run_keeps_the_shape_of_the_published_schedule():
    whole, short = config.load("cifar10-vgg16"), config.load("cifar10-vgg16", ["epochs=30"])
    assert (short.epochs, short.averaging_start) == (30, 20)
    rates = [
        swalp.schedules.Published(
            start=each.averaging_start,
            learning_rate=each.learning_rate,
            averaging_rate=each.averaging_rate,
        )
        for each in (whole, short)
    ]
    for epoch in range(30):
        assert rates[0](10 * epoch) == pytest.approx(rates[1](epoch))


def test_a_file_sets_epochs_and_a_change_scales_them(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('preset = "digits"\nepochs = 40\naveraging_start = 10\n')
    assert config.load(str(path)).averaging_start == 10
    assert config.load(str(path), ["epochs=80"]).averaging_start == 20


def test_one_average_an_epoch():
    assert config.load("digits", ["average_every=epoch"]).average_every == "epoch"


def test_changes_are_toml_values_or_bare_words():
    settings = config.load(
        "digits", ["model=mlp", "epochs = 50", "learning_rate=1", 'arms=["float"]', "data='mnist'"]
    )
    assert (settings.model, settings.epochs, settings.learning_rate) == ("mlp", 50, 1.0)
    assert (settings.arms, settings.data) == (("float",), "mnist")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["epoch=3"], "--set: unknown key 'epoch'; did you mean 'epochs'? keys: data, model,"),
        (["zzz=3"], "--set: unknown key 'zzz'; keys: data,"),
        (["epochs"], "--set 'epochs': give key=value"),
        (["=3"], "--set '=3': give key=value"),
        (["width=5\nepochs=9"], "more than one setting; give each its own --set"),
        (["epochs=3.5"], "digits: epochs = 3.5: should be a valid integer"),
        (["epochs=ten"], 'digits: epochs = "ten": should be a valid integer'),
        (["epochs=true"], "digits: epochs = true: should be a valid integer"),
        (["momentum=1"], "momentum = 1: should be less than 1 (of SGD)"),
        (["learning_rate=nan"], "learning_rate = NaN: should be a finite number"),
        (["learning_rate=-1"], "learning_rate = -1: should be greater than 0"),
        (["model=rnn"], "model = \"rnn\": should be 'cnn', 'strided-cnn', 'mlp'"),
        (["data=cifar"], "data = \"cifar\": should be 'digits', 'mnist', 'fashion-mnist'"),
        (["augment=true"], "augment = true flips images, and the digits of data = 'digits' are"),
        (["average_every=0"], "average_every = 0: should be greater than or equal to 1"),
        (["average_every=week"], 'average_every = "week": '),
        (["arms=[]"], "arms = []: list should have at least 1 item"),
        (["arms=float"], 'arms = "float": should be a valid list'),
        (['arms=["float", "float"]'], "each arm may be named once"),
        (['arms=["paper-smal-block-8"]'], "did you mean paper-small-block-8"),
        (["averaging_start=30"], "averaging_start = 30 must be less than epochs = 30"),
        (["epochs=0", "width=0"], "digits: width = 0: should be greater than or equal to 1"),
        (["epochs=0", "width=0"], "(and 1 more)"),
        (['averages=["evry=3"]'], "average 'evry=3': 'evry=3' is not one of words such as every="),
        (['averages=["start=30"]'], "'start=30': start must be less than epochs = 30"),
        (['averages=["precision=exact"]'], "needs weights in fixed point, and the arm 'float'"),
        (['averages=["every=1", "every=1 "]'], "each average may be named once"),
        (["export_format=bfp9x"], 'export_format = "bfp9x": '),
        (["export_format=bfp24"], "an exported weight has at most 16"),
        (["keep_checkpoints=0"], "keep_checkpoints = 0: should be greater than or equal to 1"),
    ],
)
def test_mistakes_get_one_line(changes, message):
    with pytest.raises(UserError) as caught:
        config.load("digits", changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_as_windows_editors_save_them(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b'\xef\xbb\xbfpreset = "digits"\r\nepochs = 7\r\n')
    assert config.load(str(path)).epochs == 7
    path.write_bytes(b'\xef\xbb\xbfbase = "paper-big-block-8"\r\n')
    assert swalp.recipes.load(path).weight == swalp.recipes.get("paper-big-block-8").weight


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epochs = = 3", "malformed TOML: Invalid value (at line 1, column 10)"),
        (b'preset = "digits"\nepochs', "(at end of document)"),
        (b"\xff", "not UTF-8 text (byte 0)"),
        (b'preset = "digts"', "unknown preset 'digts'; did you mean 'digits'?"),
        (b"epochs = 3", "the key 'data' is missing; name a preset"),
        (b'preset = "digits"\n[optimizer]\nlr = 3', "unknown key 'optimizer'"),
    ],
)
def test_mistakes_in_files_name_the_file(content, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        config.load(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_sources(tmp_path):
    with pytest.raises(UserError, match=r"unknown preset 'digit'; did you mean 'digits'"):
        config.load("digit")
    with pytest.raises(UserError, match=r"none\.toml: cannot read the settings: No such file"):
        config.load(str(tmp_path / "none.toml"))
    with pytest.raises(UserError, match="cannot read the settings: Is a directory"):
        config.load(f"{tmp_path}/")


def test_every_setting_is_described():
    assert all(field.description for field in RunConfig.model_fields.values())


@pytest.mark.parametrize(
    "text", ["fixed8.200", "fixed8.-130", "e11m4", "e8m7b300", "e4m3b200", "e8m0", "ue4m3"]
)
def test_export_formats_that_hold_no_float32_weights_are_refused_at_the_start(text):
    with pytest.raises(UserError, match="export_format"):
        config.load("digits", [f"export_format={text}"])


@pytest.mark.parametrize("role", ["activation", "gradient", "momentum"])
def test_recipes_that_hold_no_float32_are_refused_at_the_start(role, tmp_path):
    text = swalp.recipes.to_toml(swalp.recipes.get("fp8"))
    path = tmp_path / "wide.toml"
    lines = [
        f'{role} = "e11m2 nearest"' if line.startswith(f"{role} = ") else line
        for line in text.splitlines()
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"wide\.toml: {role}: .* float32"):
        config.load("digits", [f'arms=["float", "{path}"]'])
