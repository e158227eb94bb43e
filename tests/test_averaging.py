import copy
from fractions import Fraction

import pytest
import torch
from torch import nn

import swalp
from swalp import WeightAverage, recompute_batchnorm


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5))


def wander(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_when_and_what():
    """t > S and (t - S) a multiple of c; the mean of exactly those iterates."""
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, start=4, every=3, dtype=torch.float64)
    taken = []
    for t in range(1, 15):
        with torch.no_grad():
            model.weight.fill_(t * t)
        before = average.count
        average.update_parameters(model)
        if average.count > before:
            taken.append(t)
    assert taken == [7, 10, 13]
    assert average.module.weight.item() == pytest.approx((49 + 100 + 169) / 3, rel=1e-7)


def test_equals_pytorch_on_float():
    model = network()
    ours, theirs = WeightAverage(model), torch.optim.swa_utils.AveragedModel(model)
    for step in range(20):
        wander(model, step)
        ours.update_parameters(model)
        theirs.update_parameters(model)
    for mine, other in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_float64_average_is_the_rational_mean():
    model = nn.Linear(3, 1, bias=False)
    average = WeightAverage(model, dtype=torch.float64)
    total = [Fraction(0)] * 3
    for step in range(100):
        wander(model, step)
        average.update_parameters(model)
        total = [t + Fraction(w) for t, w in zip(total, model.weight[0].tolist(), strict=True)]
    kept = average.state_dict()["average"]["weight"][0].tolist()
    for value, sum_ in zip(kept, total, strict=True):
        assert abs(Fraction(value) - sum_ / 100) < Fraction(1, 10**13)


def test_bfloat16_weights_are_averaged_in_float32():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    average = WeightAverage(model)
    for step in range(1000):
        with torch.no_grad():
            model.weight.fill_(step % 2)
        average.update_parameters(model)
    assert average.state_dict()["average"]["weight"].item() == pytest.approx(0.5, abs=1e-3)


def test_module_is_float_with_the_latest_buffers():
    model = swalp.convert(network(), swalp.recipes.get("paper-big-block-8"))
    average = WeightAverage(model)
    model(torch.randn(4, 1, 5, 5))
    average.update_parameters(model)
    assert type(average.module[0]) is nn.Conv2d
    assert torch.equal(average.module[1].running_mean, model[1].running_mean)
    assert not any(p.requires_grad for p in average.module.parameters())


def test_state_round_trip():
    model = network()
    average = WeightAverage(model, start=2, every=2)
    for step in range(7):
        wander(model, step)
        average.update_parameters(model)
    other = WeightAverage(network(), start=2, every=2)
    other.load_state_dict(copy.deepcopy(average.state_dict()))
    for step in range(7, 20):
        wander(model, step)
        average.update_parameters(model)
        other.update_parameters(model)
    for left, right in zip(average.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(left, right)
    assert (other.steps, other.count) == (20, 9)
    with pytest.raises(ValueError, match=r"another network; names or shapes differ: 0\.bias"):
        WeightAverage(nn.Linear(2, 2)).load_state_dict(average.state_dict())


def test_average_mistakes():
    with pytest.raises(RuntimeError, match="no average after 0 steps; it starts after step 5"):
        _ = WeightAverage(network(), start=5).module
    with pytest.raises(ValueError, match="every=0 must be 1"):
        WeightAverage(network(), every=0)
    with pytest.raises(ValueError, match=r"must be torch\.float32 or torch\.float64"):
        WeightAverage(network(), dtype=torch.bfloat16)


def test_batchnorm_weighs_samples_not_batches():
    model = network()
    x = torch.randn(37, 1, 6, 6) * 3 + 1
    batches = x.split(10)  # 10, 10, 10, 7
    recompute_batchnorm(model, batches)
    outputs = [model[0](batch) for batch in batches]
    sizes = torch.tensor([float(len(batch)) for batch in batches])
    for statistic, kept in (
        ([o.mean((0, 2, 3)) for o in outputs], model[1].running_mean),
        ([o.var((0, 2, 3)) for o in outputs], model[1].running_var),
    ):
        expected = (torch.stack(statistic) * sizes[:, None]).sum(0) / sizes.sum()
        torch.testing.assert_close(kept, expected)
    assert model[1].momentum == 0.1
    assert model.training
    assert model[3].training


def test_batchnorm_in_every_batch_form():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(x)

    x = torch.randn(8, 2)
    means = []
    for batches in ([x], [(x, torch.zeros(8))], [[x, 1]], [{"x": x}]):
        model = Keyword()
        recompute_batchnorm(model, batches)
        means.append(model.norm.running_mean)
    assert all(torch.equal(mean, means[0]) for mean in means)
    torch.testing.assert_close(means[0], x.mean(0))


def test_batchnorm_is_restored_when_something_fails():
    model = network().eval()
    recompute_batchnorm(model, [torch.randn(4, 1, 5, 5)])
    before = copy.deepcopy(model.state_dict())

    def batches():
        yield torch.randn(4, 1, 5, 5)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        recompute_batchnorm(model, batches())
    with pytest.raises(ValueError, match="no batch"):
        recompute_batchnorm(model, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert model[1].momentum == 0.1


def test_batchnorm_uses_the_evaluation_quantizers():
    recipe = swalp.recipes.get("paper-big-block-3")
    model = swalp.convert(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)), recipe
    )
    x = torch.randn(64, 4)
    recompute_batchnorm(model, [x])
    model.eval()
    torch.testing.assert_close(model[2].running_mean, model[1](model[0](x)).mean(0))
