import pytest
import torch

from swalp.training import models


@pytest.mark.parametrize("kind", ["cnn", "strided-cnn", "mlp", "small-vgg"])
@pytest.mark.parametrize("size", [8, 28])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(kind, size, channels):
    model = models.build(kind, channels=channels, size=size, width=4, classes=10, seed=0)
    assert model(torch.zeros(3, channels, size, size)).shape == (3, 10)


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_weights_depend_on_the_seed_alone(kind):
    def weights(seed):
        return models.build(kind, size=8, width=4, classes=10, seed=seed).state_dict()

    torch.manual_seed(1)
    first = weights(5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, other = weights(5), weights(6)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(
        first["1.weight" if kind == "mlp" else "0.weight"],
        other["1.weight" if kind == "mlp" else "0.weight"],
    )
    assert torch.equal(state, torch.get_rng_state())
