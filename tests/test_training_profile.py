import sys

import pytest
import torch

from swalp.training import data
from swalp.training.profile import BETWEEN, profile
from tiny_runs import ARMS, settings


@pytest.fixture(scope="module")
def costs():
    return profile(settings(batch_size=100), steps=3)


def test_every_layer_has_its_row(costs):
    assert [cost.arm for cost in costs] == list(ARMS)
    for cost in costs:
        assert [layer.name for layer in cost.layers] == [*map(str, range(8)), BETWEEN]
    kinds = ["Flatten", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [layer.kind for layer in costs[0].layers] == [*kinds, ""]


def test_bytes_are_those_of_the_tensors(costs):
    plain, low = costs
    parameters = {"1": 64 * 8, "2": 16, "4": 64, "5": 16, "7": 80 + 10}
    for layer in plain.layers:
        assert layer.parameter_bytes == 4 * parameters.get(layer.name, 0)
    held = {layer.name: layer.parameter_bytes for layer in low.layers}
    assert held["1"] == 64 * 8 + 8  # a code each, and an exponent for each output
    assert plain.state_bytes == plain.total("parameter_bytes")
    assert low.state_bytes == low.total("parameter_bytes")
    # Linear layers keep their input, batch norm also mean and deviation, ReLU its output, which is
    # the next input and counts once; the loss keeps its probabilities.
    saved = {layer.name: layer.saved_bytes for layer in plain.layers}
    hidden = 100 * 8 * 4
    assert saved["1"] == 100 * 64 * 4
    assert saved["2"] == saved["5"] == hidden + 2 * 8 * 4
    assert saved["3"] == saved["6"] == hidden
    assert saved["0"] == saved["4"] == saved["7"] == 0
    assert saved[BETWEEN] >= 100 * 10 * 4


def test_times_add_up(costs):
    for cost in costs:
        assert min(cost.loading, cost.forward, cost.backward, cost.optimizer) > 0
        assert cost.step == cost.loading + cost.forward + cost.backward + cost.optimizer
        for layer in cost.layers:
            assert layer.forward > 0
            assert (layer.optimizer > 0) == (layer.parameter_bytes > 0)
        assert all(layer.backward > 0 for layer in cost.layers if layer.parameter_bytes)
    assert costs[0].total("quantizing") == 0
    for layer in costs[1].layers:
        # The first layer takes the images as they are, and packed weights become floats.
        assert (layer.quantizing > 0) == (layer.parameter_bytes > 0)


def test_nothing_stays_behind(costs):
    assert sys.getprofile() is None
    assert torch.get_num_threads() == profile_threads
    chosen = settings(batch_size=20, threads=1, arms=("float",))
    profile(chosen, steps=1)
    assert torch.get_num_threads() == profile_threads


profile_threads = torch.get_num_threads()


@pytest.mark.parametrize("kind", ["resnet20", "preresnet164", "vgg16"])
def test_residuals_and_dropout(kind):
    chosen = settings(data="cifar10", model=kind, width=2, batch_size=4, arms=ARMS[1:])
    (cost,) = profile(chosen, steps=1)
    names = {layer.name: layer for layer in cost.layers}
    last = cost.layers[-2]
    assert last.kind == "Linear"
    assert last.backward > 0
    if kind == "preresnet164":
        assert names["1.shortcut"].parameter_bytes > 0
        assert len(cost.layers) > 54 * 9
    if kind == "vgg16":
        assert names["32"].kind == "Dropout"
        assert names["32"].saved_bytes > 0


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar100", "imagenet"])
def test_synthetic_data_has_the_shape_of_the_real(name):
    found = data.synthetic(name, 3)
    ((x, y),) = found.train.batches([torch.arange(3)])
    channels, size, classes = data.SHAPES[name]
    assert x.shape == (3, channels, size, size)
    assert found.classes == classes
    assert 0 <= int(y.min()) <= int(y.max()) < classes
    if name == "digits":
        assert data.load("digits").train.shape == found.train.shape
    assert torch.equal(x, next(data.synthetic(name, 3).train.batches([torch.arange(3)]))[0])
