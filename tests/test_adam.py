import dataclasses

import pytest
import torch
from torch import nn

import swalp
from swalp import Minifloat, PackedTensor, Stochastic
from swalp.recipes import Quantizer, Recipe, fit

SETTINGS = [
    {"lr": 0.01},
    {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6},
    {"lr": 0.01, "weight_decay": 0.1},
    {"lr": 0.01, "weight_decay": 0.1, "decoupled": True},
]
WIDE = Quantizer(Minifloat(8, 23), Stochastic())
LOSSLESS = Recipe(
    name="float32 as a minifloat", weight=WIDE, gradient=WIDE, momentum=WIDE
)  # without the root, as a root squared is not what it was


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 3))


def train(model, optimizer, steps=5):
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 7, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("recipe", [None, LOSSLESS], ids=["off", "lossless"])
def test_equals_pytorch_bit_for_bit(settings, recipe):
    ours, theirs = network(), network()
    train(ours, swalp.optim.Adam(ours.named_parameters(), recipe=recipe, **settings))
    settings = dict(settings)
    kind = torch.optim.AdamW if settings.pop("decoupled", False) else torch.optim.Adam
    settings.setdefault("weight_decay", 0)
    train(theirs, kind(theirs.parameters(), **settings))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_parameters_may_be_at_different_steps():
    ours, theirs = network(), network()
    optimizers = (
        swalp.optim.Adam(ours.named_parameters(), 0.01),
        torch.optim.Adam(theirs.parameters(), 0.01),
    )
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        model[0].requires_grad_(False)
        train(model, optimizer, steps=3)
        model[0].requires_grad_(True)
        train(model, optimizer, steps=3)
    assert optimizers[0].state[ours[0].weight]["step"] == 3
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_roots_are_rounded_to_nearest_however_long_the_tensor(monkeypatch):
    recipe = dataclasses.replace(LOSSLESS, second_moment=WIDE)
    found = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(64, 1026)
        optimizer = swalp.optim.Adam(model.named_parameters(), lr=0.01, recipe=recipe)
        if not compiled:
            monkeypatch.setattr(optimizer, "_kernel", lambda *_: None)
        for _ in range(3):
            model.weight.grad, model.bias.grad = torch.rand(1026, 64) * 10, torch.rand(1026)
            optimizer.step()
        root = optimizer.state[model.weight]["root"]
        found += [root, model.weight.detach(), model.bias.detach()]
    assert all(torch.equal(one, other) for one, other in zip(found[:3], found[3:], strict=True))


@pytest.mark.parametrize("fmt", ["bfp8", "bfp8[0]", "bfp16", "mxfp8_e4m3", "e5m2", "fixed8.7"])
@pytest.mark.parametrize("packed", [False, True])
def test_roots_of_any_format_equal_the_definition(fmt, packed, monkeypatch):
    root = Quantizer(swalp.parse_format(fmt), Stochastic())
    recipe = dataclasses.replace(
        swalp.recipes.get("paper-big-block-8"), name="root", second_moment=root
    )
    found = []
    for compiled in (True, False):
        model = swalp.convert(network(), recipe, packed=packed)
        optimizer = swalp.optim.Adam(model.named_parameters(), lr=0.01, eps=0.1, recipe=recipe)
        if not compiled:
            monkeypatch.setattr(optimizer, "_kernel", lambda *_: None)
        train(model, optimizer)
        states = [state["root"] for state in optimizer.state.values()]
        found.append([x.detach().to(torch.float64) for x in (*model.parameters(), *states)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_momentum_of_more_than_16_bits_stays_float():
    wide = Quantizer(swalp.BlockFloat(20), Stochastic())
    recipe = dataclasses.replace(
        swalp.recipes.get("paper-big-block-8"), name="wide", momentum=wide, second_moment=wide
    )
    for kind in (swalp.optim.Adam, swalp.optim.SGD):
        found = []
        for packed in (False, True):
            model = swalp.convert(network(), recipe, packed=packed)
            train(model, kind(model.named_parameters(), lr=0.01, recipe=recipe))
            found.append([torch.Tensor.detach(p).to(torch.float64) for p in model.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("decoupled", [False, True])
def test_packed_training_is_the_same_and_learns(decoupled):
    recipe = swalp.recipes.get("paper-small-block-8")
    weights = []
    for packed in (False, True):
        model = swalp.convert(network(), recipe, packed=packed)
        optimizer = swalp.optim.Adam(
            model.named_parameters(), 0.01, weight_decay=0.01, decoupled=decoupled, recipe=recipe
        )
        losses = train(model, optimizer, steps=60)
        assert losses[-1] < 0.5 * losses[0]
        weights.append([torch.Tensor.detach(p).to(torch.float64) for p in model.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*weights, strict=True))
    states = optimizer.state.values()
    assert all(isinstance(state["exp_avg"], PackedTensor) for state in states)
    assert all(isinstance(state["root"], PackedTensor) for state in states)
    held = sum(state["exp_avg"].nbytes + state["root"].nbytes for state in states)
    assert held < 0.26 * 8 * sum(p.numel() for p in model.parameters()) + 40


def test_mistakes():
    parameters = list(network().parameters())
    with pytest.raises(ValueError, match=r"betas=\(1, 0\.9\) must lie in \[0, 1\)"):
        swalp.optim.Adam(parameters, betas=(1, 0.9))
    for betas in ((0.9,), (0.9, 0.99, 0.5), 0.9):
        with pytest.raises(ValueError, match=r"betas=.* must be two numbers"):
            swalp.optim.Adam(parameters, betas=betas)
    for seed in (1.5, "x", None):
        with pytest.raises(TypeError, match="Adam: seed must be an int"):
            swalp.optim.Adam(parameters, seed=seed)
    with pytest.raises(ValueError, match="eps=-1 must be 0 or more"):
        swalp.optim.Adam(parameters, eps=-1)
    with pytest.raises(ValueError, match="'a' has an accumulator, which only SGD keeps"):
        swalp.optim.Adam(parameters, recipe=Recipe(name="a", accumulator=WIDE))
    override = swalp.recipes.Override(layers="0", accumulator=WIDE)
    with pytest.raises(ValueError, match="'b' has an accumulator, which only SGD keeps"):
        swalp.optim.Adam(parameters, recipe=Recipe(name="b", weight=WIDE, overrides=(override,)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("first", "then"), [(None, "paper-small-block-8"), ("paper-small-block-8", None)]
)
def test_a_state_goes_from_float_to_rounded_and_back(first, then, packed):
    """The second moment is kept as its root where it is rounded, under a name of its own."""
    weights = torch.full((64,), 0.5)

    def optimizer(recipe):
        held = weights.clone()
        if packed and recipe:
            held = swalp.pack(held, fit(swalp.recipes.get(recipe).weight.format, held.shape))
        parameter = torch.nn.Parameter(held)
        return parameter, swalp.optim.Adam([("p", parameter)], 0.01, recipe=recipe)

    parameter, before = optimizer(first)
    for _ in range(1000):
        parameter.grad = torch.full((64,), 1e-3)
        before.step()
    parameter, after = optimizer(then)
    after.load_state_dict(before.state_dict())
    assert len(after.state[parameter]) == 3
    parameter.grad = torch.full((64,), 1e-3)
    after.step()
    moved = (parameter.dequantize() if packed and then else parameter.detach()) - weights
    assert moved.mean().item() == pytest.approx(-0.01, rel=0.1)
    assert ("root" in after.state[parameter]) == (then is not None)
    assert ("exp_avg_sq" in after.state[parameter]) == (then is None)
