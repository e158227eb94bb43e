import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import swalp
from swalp import BlockFloat, Nearest, Stochastic, quantize
from swalp.noise import stream_seed
from swalp.recipes import Override, Quantizer, Recipe

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


@pytest.mark.parametrize("recipe", ["paper-small-block-5", "native-8"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_the_whole_model_repeats_the_noise(recipe, reentrant):
    runs = []
    for on in (False, True):
        model, gradients = swalp.convert(network(), recipe), []
        for seed in range(2):
            x = images(seed).requires_grad_()
            y = checkpoint(model, x, use_reentrant=reentrant) if on else model(x)
            y.square().sum().backward()
            gradients += [x.grad, *(p.grad for p in model.parameters())]
            model.zero_grad()
        assert swalp.noise_clock(model).step == 2
        runs.append(gradients)
    assert all(map(torch.equal, *runs))


def test_checkpointing_two_passes_before_their_backward_is_refused():
    model = swalp.convert(network(), PAPER)
    losses = [checkpoint(model, images(s), use_reentrant=False).sum() for s in range(2)]
    with pytest.raises(RuntimeError, match=r"ran 2 times before .*call backward\(\) after each"):
        sum(losses).backward()
    for seed in range(3):  # one after the other, and again from one graph
        loss = checkpoint(model, images(seed), use_reentrant=False).sum()
        loss.backward(retain_graph=True)
        loss.backward()


class Names(nn.Module):
    """Its own attributes have the names that a converted layer might have wanted."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.native, self.outer = nn.Linear(9, 9), nn.Linear(9, 9)
        self.functions = nn.ModuleList([nn.Linear(9, 9)])
        self.simulated, self.input_site, self.namespace = 3.0, "here", nn.Linear(9, 9)

    def forward(self, x):
        for layer in (self.native, self.outer, *self.functions, self.namespace):
            x = layer(x)
        return x @ x.mT * self.simulated


@pytest.mark.parametrize("recipe", ["paper-big-block-16", "native-8"])
def test_attributes_of_the_model_stay_its_own(recipe):
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    expected = Names()(x)
    model = swalp.convert(Names(), recipe).eval()
    bound = 0.1 * expected.abs().max()
    assert (model(x) - expected).abs().max() < bound
    plain = swalp.to_float(model)
    assert vars(plain).keys() == vars(Names()).keys()
    assert (plain.input_site, plain.simulated) == ("here", 3.0)
    assert (plain(x) - expected).abs().max() < bound


@pytest.mark.parametrize("recipe", ["paper-small-block-5", "native-8"])
def test_a_parametrization_after_convert(recipe):
    model = swalp.convert(network(), recipe)
    nn.utils.parametrizations.weight_norm(model[4])
    model(images()).sum().backward()
    assert model[4].parametrizations.weight.original0.grad is not None
    assert "4" in str(swalp.summary(model))
    with pytest.raises(ValueError, match=r"layer '4' has had its class changed since convert"):
        swalp.to_float(model)


def test_layers_called_without_the_model_go_on_where_they_were():
    """As in a GAN, or a training step that calls parts: the model's clock never ticks."""
    for recipe in ("paper-small-block-5", "native-8"):
        model = swalp.convert(network(), recipe)
        for seed in range(3):
            if seed == 2:
                state = copy.deepcopy(swalp.noise_clock(model).state_dict())
            y = model[4:](torch.ones(2, 64))
        other = swalp.convert(network(), recipe)
        swalp.noise_clock(other).load_state_dict(state)
        assert torch.equal(other[4:](torch.ones(2, 64)), y)
    model = swalp.convert(nn.Sequential(nn.RNN(9, 9)), PAPER)
    swalp.noise_clock(model).uses["input of 0"] = 1 << 16
    with pytest.raises(RuntimeError, match=r"ran 65536 times in one pass.*noise_clock"):
        model[0](torch.ones(2, 9))


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


def test_mistakes():
    model = swalp.convert(network(), PAPER)
    with pytest.raises(ValueError, match="converted already"):
        swalp.convert(model, PAPER)
    with pytest.raises(ValueError, match=r"ReLU has no layer to convert; these kinds.*Linear"):
        swalp.convert(nn.ReLU(), PAPER)
    with pytest.raises(TypeError, match="recipe must be a Recipe or the name of one, not 8"):
        swalp.convert(network(), 8)
    with pytest.raises(ValueError, match="unknown recipe 'paper'; did you mean paper-"):
        swalp.convert(network(), "paper")
    with pytest.raises(ValueError, match="not a converted model"):
        swalp.noise_clock(network())


def placed(placement, **overrides):
    return Recipe(
        name=placement,
        activation=Quantizer(BlockFloat(5), Stochastic(random_bits=16)),
        error=Quantizer(BlockFloat(4), Stochastic(random_bits=16)),
        placement=placement,
        **overrides,
    )


class Rounded(torch.autograd.Function):
    """x on the way forward and its gradient on the way back, each by a function or as it is."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward = backward
        return x.clone() if forward is None else forward(x)

    @staticmethod
    def backward(ctx, grad):
        return grad if ctx.backward is None else ctx.backward(grad), None, None


# Where each placement quantizes activation and error in Conv2d-ReLU-Conv2d-ReLU-Flatten-Linear:
# by layer, at its input or its output, as a letter for each role.
PLACES = {
    "input": {"2": ("AE", ""), "5": ("AE", "")},
    "operands": {"0": ("", "E"), "2": ("A", "E"), "5": ("A", "E")},
    "output": {"0": ("", "AE"), "2": ("", "AE")},
    "nonlinearity": {"1": ("", "AE"), "3": ("", "AE")},
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("placement", PLACES)
def test_placements(placement, inplace):
    """Against the network with the quantizers written where the placement has them."""

    def convolutional():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 4, 3), nn.ReLU(inplace),
            nn.Flatten(), nn.Linear(16, 3),
        )  # fmt: skip

    def q(role, width, name, step):
        rule = Stochastic(stream_seed(9, role, name), random_bits=16, step=step)
        return lambda x: quantize(x, BlockFloat(width), rule)

    def place(x, roles, name, step):
        return Rounded.apply(
            x,
            q("activation", 5, name, step) if "A" in roles else None,
            q("error", 4, name, step) if "E" in roles else None,
        )

    model, plain = swalp.convert(convolutional(), placed(placement), seed=9), convolutional()
    for step in (1, 2):
        x = expected = images(step)
        for name, layer in plain.named_children():
            before, after = PLACES[placement].get(name, ("", ""))
            expected = place(layer(place(expected, before, name, step)), after, name, step)
        given = model(x)
        assert torch.equal(given, expected)
        (given.square().sum() + given[0, 0]).backward()
        (expected.square().sum() + expected[0, 0]).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_error_at_the_output_reaches_a_layer_that_returns_a_view():
    """A linear layer on 3 dimensions returns a view, which the in-place nonlinearity changes."""
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))
    model = swalp.convert(layers, placed("operands"), seed=2)
    gradient = torch.randn(2, 3, 8)
    y = model(torch.randn(2, 3, 8))
    y.backward(gradient)
    rule = Stochastic(stream_seed(2, "error", "0"), random_bits=16, step=1)
    error = quantize(gradient * (y > 0), BlockFloat(4), rule)
    assert torch.equal(model[0].bias.grad, error.sum((0, 1)))


def test_quantize_input_reaches_the_first_operand():
    for on in (False, True):
        recipe = placed("operands", quantize_input=on)
        model = swalp.convert(network(), recipe)
        assert (model[0]._swalp_layer.input_site is not None) == on
        assert model[0]._swalp_layer.output_site.activation is None


def test_overrides_reach_layers_by_name_and_kind():
    wide, narrow = (Quantizer(BlockFloat(width), Nearest()) for width in (9, 3))
    recipe = Recipe(
        name="mine",
        activation=narrow,
        error=narrow,
        weight=narrow,
        overrides=(
            Override(kind="Linear", activation=wide),
            Override(layers="6", activation=None, error=None, weight=None),
            Override(kind="BatchNorm*", weight=wide),
            Override(layers="4", parameter="bias", weight=None),
        ),
    )
    model, plain = swalp.convert(network(), recipe), network()
    assert model[4]._swalp_layer.input_site.activation.format == BlockFloat(9)
    assert model[4]._swalp_layer.input_site.error.format == BlockFloat(3)
    assert model[6]._swalp_layer.input_site is None
    assert torch.equal(model[6].weight, plain[6].weight)
    assert torch.equal(model[4].bias, plain[4].bias)
    assert torch.equal(model[4].weight, quantize(plain[4].weight.detach(), BlockFloat(3)))
    assert torch.equal(model[1].weight, quantize(plain[1].weight.detach(), BlockFloat(9)))
    placed_apart = placed("nonlinearity", overrides=(Override(layers="0", placement="output"),))
    model = swalp.convert(network(), placed_apart)
    assert model[0]._swalp_layer.output_site.activation.format == BlockFloat(5)
    assert type(model[2]) is not nn.ReLU
    assert model[2]._swalp_layer.output_site.error.format == BlockFloat(4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (Override(layers="clasifier.*", weight=None), r"layers='clasifier\.\*'\) matches no layer"),
        (Override(layers="00", weight=None), "did you mean '0'"),
        (Override(kind="linear", weight=None), "no layer of that kind; did you mean 'Linear'"),
        (Override(layers="4", kind="Conv2d", weight=None), "of that kind; there are 'Linear'"),
        (Override(parameter="wieght", weight=None), "matches no parameter; did you mean 'weight'"),
    ],
)
def test_an_override_that_matches_nothing_is_an_error(override, message):
    recipe = Recipe(name="mine", overrides=(override,))
    before = network()
    with pytest.raises(ValueError, match=f"recipe 'mine': .*{message}"):
        swalp.convert(before, recipe)
    assert [type(m) for m in before.modules()] == [type(m) for m in network().modules()]
    optional = dataclasses.replace(override, required=False)
    swalp.convert(before, Recipe(name="mine", overrides=(optional,)))


def test_a_container_in_a_pattern_is_explained():
    model = nn.Sequential(network())
    recipe = Recipe(name="mine", overrides=(Override(layers="0", weight=None),))
    with pytest.raises(ValueError, match=r"what holds some; use layers='0\.\*'"):
        swalp.convert(model, recipe)


def test_a_recipe_by_name():
    model = swalp.convert(network(), "paper-small-block-5", seed=3)
    expected = swalp.convert(network(), PAPER, seed=3)
    assert torch.equal(model(images()), expected(images()))


def test_what_a_class_does_with_its_subclasses_is_left_alone():
    known = []

    class Base(nn.Module):
        def __init_subclass__(cls, *, tag, **kwargs):
            known.append((cls, tag))

    class Block(Base, tag="x"):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x)

    swalp.convert(Block(), "paper-big-block-8")(torch.randn(2, 4))
    assert known == [(Block, "x")]


def test_complex_parameters_are_refused_by_name():
    model = nn.Linear(3, 3)
    model.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'phase' is torch\.complex64.*torch\.view_as_real"):
        swalp.convert(model, "paper-big-block-4")
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(("change", "recipe"), [
    (lambda m: m.bfloat16(), "paper-small-block-8"),
    (lambda m: m.double(), "paper-small-block-8"),
    (lambda m: nn.init.constant_(m[2].bias, torch.nan), "paper-small-block-8"),
])  # fmt: skip
def test_what_cannot_be_packed_stays_as_it_was(change, recipe):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    change(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"convert: parameter '\d\.(weight|bias)' cannot be rounded"
    ):
        swalp.convert(model, recipe, packed=True)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    after = model.state_dict()
    assert all(
        torch.equal(after[name], value) or value.isnan().any() for name, value in before.items()
    )


def test_a_network_without_values_is_converted_packed():
    model = nn.Linear(4, 4, device="meta")
    swalp.convert(model, "paper-small-block-8", packed=True)
    assert isinstance(model.weight, swalp.PackedTensor)
