import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import swalp
from swalp import recompute_batchnorm
from swalp.recipes import fit


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5))


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


def test_batches_are_counted_from_zero():
    model = network()
    for _ in range(5):
        model(torch.randn(4, 1, 6, 6))
    assert model[1].num_batches_tracked == 5
    recompute_batchnorm(model, torch.randn(30, 1, 6, 6).split(10))
    assert model[1].num_batches_tracked == 3


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


def test_a_batch_of_nothing_counts_for_nothing():
    model, expected = network(), network()
    x = torch.randn(20, 1, 6, 6)
    recompute_batchnorm(expected, [x])
    recompute_batchnorm(model, [x[:0], x, x[:0]])
    assert torch.equal(model[1].running_mean, expected[1].running_mean)
    with pytest.raises(ValueError, match="there is no batch"):
        recompute_batchnorm(model, [x[:0]])


def test_batches_of_any_other_form():
    model, expected = network(), network()
    x = torch.randn(20, 1, 6, 6)
    recompute_batchnorm(expected, x.split(8))
    graphs = [{"image": [part, "left"], "weight": 2} for part in x.split(8)]
    with pytest.raises(ValueError, match="a batch of type dict has no tensor to tell its size"):
        recompute_batchnorm(model, graphs)
    recompute_batchnorm(
        model,
        graphs,
        forward=lambda model, batch: model(batch["image"][0]),
        size=lambda batch: len(batch["image"][0]),
    )
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert model[1].num_batches_tracked == 3


def test_progress(capsys):
    done = []
    recompute_batchnorm(network(), torch.randn(20, 1, 6, 6).split(8), progress=done.append)
    assert done == [8, 8, 4]
    model, expected = network(), network()
    recompute_batchnorm(model, torch.ones(20, 1, 6, 6).split(8), progress=True)
    recompute_batchnorm(expected, torch.ones(20, 1, 6, 6).split(8))
    assert torch.equal(model[1].running_mean, expected[1].running_mean)
    assert capsys.readouterr().out == ""


class Shared(nn.Module):
    """One layer for both halves of a pair, the second of which has mean 10; one layer, by turns."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.late = nn.BatchNorm1d(3)
        self.never = nn.BatchNorm1d(3)
        for layer in (self.norm, self.late, self.never):
            layer.running_mean.fill_(100)

    def forward(self, pair, late):
        y = self.norm(pair[:, 0]) + self.norm(pair[:, 1])
        return self.late(y) if late else y


def test_each_layer_weighs_what_it_has_seen():
    """Used twice in a pass, or not in all: the mean over all that passed the layer."""
    torch.manual_seed(0)
    pairs = torch.randn(37, 2, 3)
    pairs[:, 1] += 10
    model = Shared()
    late = []
    model.late.register_forward_hook(lambda module, args, output: late.append(args[0]))
    batches = [{"pair": part, "late": place > 0} for place, part in enumerate(pairs.split(10))]
    recompute_batchnorm(model, batches)
    torch.testing.assert_close(model.norm.running_mean, pairs.mean((0, 1)))
    sizes = torch.tensor([10.0, 10.0, 7.0])[:, None]
    for statistic, kept in (
        ([x.mean(0) for x in late], model.late.running_mean),
        ([x.var(0) for x in late], model.late.running_var),
    ):
        torch.testing.assert_close(kept, (torch.stack(statistic) * sizes).sum(0) / sizes.sum())
    assert model.never.running_mean.tolist() == [100] * 3
    assert [layer.momentum for layer in (model.norm, model.late, model.never)] == [0.1] * 3
    counts = [layer.num_batches_tracked for layer in (model.norm, model.late)]
    assert counts == [8, 3]
    model(pairs, True)
    assert model.norm.momentum == 0.1  # nothing is left that would set it


def test_copies_of_layers_are_refused():
    """`nn.DataParallel` runs copies, whose batches would each count."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"runs copies of its layers.*pass its module"):
        recompute_batchnorm(
            model,
            [torch.randn(4, 2)],
            forward=lambda model, x: model[0]._replicate_for_data_parallel()(x),
        )


def test_a_compiled_network():
    x = torch.randn(37, 1, 6, 6)
    model, expected = network(), network()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    expected(x)
    for batches in (x.split(10), x[:20].split(5)):
        recompute_batchnorm(compiled, batches)
        recompute_batchnorm(expected, batches)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value)


@pytest.mark.parametrize("placement", ["input", "output"])
def test_sites_of_batchnorm_itself_round_to_nearest(placement):
    """As in evaluation, so that statistics are of the numbers that will be; and draw no noise."""
    recipe = replace(
        swalp.recipes.get("paper-big-block-4"),
        overrides=(swalp.recipes.Override(kind="BatchNorm1d", placement=placement),),
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    swalp.convert(model, recipe, seed=3)
    x = torch.randn(64, 4)
    model(x)
    uses = dict(swalp.noise_clock(model).uses)
    lowered = [layer._swalp_layer for layer in model]
    recompute_batchnorm(model, [x])
    model.eval()

    def rounded(y, place):
        fmt = recipe.activation.format
        return swalp.quantize(y, fit(fmt, y.shape), swalp.Nearest()) if place == placement else y

    y = rounded(model[0](x), "input")
    torch.testing.assert_close(model[1].running_mean, y.mean(0))
    y = nn.functional.batch_norm(y, None, None, model[1].weight, model[1].bias, training=True)
    y = rounded(rounded(y, "output"), "input")
    torch.testing.assert_close(model[2].running_mean, y.mean(0))
    assert swalp.noise_clock(model).uses == uses
    assert [layer._swalp_layer for layer in model] == lowered
