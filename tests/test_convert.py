import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import swalp
from swalp import BlockFloat, Nearest, Stochastic, quantize
from swalp.noise import stream_seed
from swalp.recipes import Quantizer, Recipe

PAPER = swalp.recipes.get("paper-small-block-5")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8),
        nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def images(seed=0):
    return torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_forward_and_backward_are_algorithm_2():
    """Against the network written out, with Q_A and Q_E where the algorithm has them."""
    model = swalp.convert(network(), PAPER, seed=3)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    for name, weight in weights.items():
        axes = (0,) if weight.dim() > 1 else None
        start = network().state_dict()[name]
        rounded = quantize(start, BlockFloat(5, axes=axes, symmetric=False), Nearest())
        assert torch.equal(weight, rounded)

    class Q(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, layer, step):
            ctx.layer, ctx.step = layer, step
            return q("activation", x, layer, step)

        @staticmethod
        def backward(ctx, grad):
            return q("error", grad, ctx.layer, ctx.step), None, None

    def q(role, x, layer, step):
        axes = (0,) if x.dim() == 2 else (0, 1)
        rule = Stochastic(stream_seed(3, role, layer), random_bits=16, step=step)
        return quantize(x, BlockFloat(5, axes=axes, symmetric=False), rule)

    norm = copy.deepcopy(model[1])
    for step in (1, 2):  # the noise of a pass is its own
        x = images(step)
        a = nn.functional.conv2d(x, weights["0.weight"], weights["0.bias"])
        a = nn.functional.batch_norm(
            a, norm.running_mean, norm.running_var, weights["1.weight"], weights["1.bias"], True
        )
        a = Q.apply(a.relu().flatten(1), "4", step)
        a = Q.apply((a @ weights["4.weight"].T + weights["4.bias"]).relu(), "6", step)
        expected = nn.functional.linear(a, weights["6.weight"], weights["6.bias"])
        given = model(x)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)
        given.square().sum().backward()
        expected.square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.grad, weights[name].grad, rtol=1e-4, atol=1e-4, msg=name
            )


def test_names_state_and_types_stay():
    plain, model = network(), network()
    keys = list(model.state_dict())
    assert swalp.convert(model, PAPER) is model
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert isinstance(model[4], nn.Linear)
    model.load_state_dict(plain.state_dict())


def test_eval_is_not_stochastic_and_does_not_tick():
    model = swalp.convert(network(), PAPER).eval()
    first, second = model(images()), model(images())
    assert torch.equal(first, second)
    assert swalp.noise_clock(model).step == 0


def test_training_passes_differ_and_replay():
    model = swalp.convert(network(), PAPER, seed=1)
    clock = swalp.noise_clock(model)
    first, second = model(images()), model(images())
    assert not torch.equal(first, second)
    clock.load_state_dict({"seed": 1, "step": 0})
    assert torch.equal(model(images()), first)
    with pytest.raises(ValueError, match="has seed 2, this model was converted with seed 1"):
        clock.load_state_dict({"seed": 2, "step": 0})


def test_copies_have_clocks_of_their_own():
    model = swalp.convert(network(), PAPER)
    model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert swalp.noise_clock(other).step == 1
        there, here = other(images()), copy.deepcopy(model)(images())
        assert torch.equal(there, here)
        assert swalp.noise_clock(model).step == 1


def test_layer_used_twice_has_noise_of_its_own_each_time():
    shared = nn.Linear(16, 16)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared = nn.Linear(16, 16), shared

        def forward(self, x):
            return self.shared(x), self.shared(x)

    model = swalp.convert(Twice(), PAPER)
    left, right = model(torch.randn(4, 16))
    assert not torch.equal(left, right)


class Checkpointed(nn.Module):
    def __init__(self, on, times=1):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.on, self.times = nn.Linear(9, 9), nn.Linear(9, 9), on, times

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.times):
            x = checkpoint(self.second, x, use_reentrant=False) if self.on else self.second(x)
        return x


def test_activation_checkpointing_repeats_the_noise():
    gradients = []
    for on in (False, True):
        model = swalp.convert(Checkpointed(on), PAPER)
        model(torch.ones(3, 9)).sum().backward()
        gradients.append(model.second.weight.grad)
    assert torch.equal(*gradients)


def test_checkpointing_a_layer_used_twice_is_refused():
    model = swalp.convert(Checkpointed(True, times=2), PAPER)
    with pytest.raises(RuntimeError, match="layer 'second' ran 2 times in one pass"):
        model(torch.ones(3, 9)).sum().backward()


def test_to_float_undoes_everything_but_the_parameters():
    model = swalp.convert(network(), PAPER)
    plain = swalp.to_float(model)
    assert [type(m) for m in plain.modules()] == [type(m) for m in network().modules()]
    reference = network()
    reference.load_state_dict(model.state_dict())
    assert torch.equal(plain(images()), reference(images()))
    assert not plain._forward_pre_hooks
    model(images())  # the original still works
    swalp.convert(plain, PAPER)  # and the copy converts again


def test_input_is_quantized_on_request():
    on = Quantizer(BlockFloat(2), Nearest())
    for quantize_input, steps in ((False, 36), (True, 2)):
        recipe = Recipe(name="r", activation=on, quantize_input=quantize_input)
        model = swalp.convert(nn.Sequential(nn.Linear(36, 36, bias=False)), recipe)
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(36))
            assert len(model(torch.arange(36.0)).unique()) == steps


def test_summary_names_every_layer():
    text = str(swalp.summary(swalp.convert(network(), PAPER)))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["recipe", "paper-small-block-5"]
    assert lines[2] == ["0", "Conv2d", "76", "float", "float"]
    assert lines[6] == ["4", "Linear", "520", "bfp5t[0,1]", "bfp5t[0,1]"]
    assert len(lines) == 2 + 7


def test_mistakes():
    model = swalp.convert(network(), PAPER)
    with pytest.raises(ValueError, match="converted already"):
        swalp.convert(model, PAPER)
    with pytest.raises(ValueError, match=r"ReLU has no layer to convert; these kinds.*Linear"):
        swalp.convert(nn.ReLU(), PAPER)
    with pytest.raises(TypeError, match="recipe must be a Recipe, not 'paper'"):
        swalp.convert(network(), "paper")
    with pytest.raises(ValueError, match="not a converted model"):
        swalp.noise_clock(network())
