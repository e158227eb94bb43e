"""With every role off, or formats that lose nothing, training is PyTorch's, bit for bit."""

import copy
import pickle

import pytest
import torch
from torch import nn

import swalp
from swalp import Minifloat, Nearest, Stochastic
from swalp.recipes import ROLES, Quantizer, Recipe

OFF = Recipe(name="off")
LOSSLESS = {
    placement: Recipe(
        name="float32 as a minifloat",
        placement=placement,
        quantize_input=True,
        **{role: Quantizer(Minifloat(8, 23), rule) for role in ROLES},
    )
    for placement, rule in [
        ("input", Stochastic()),
        ("operands", Nearest()),
        ("output", Stochastic(random_bits=16)),
        ("nonlinearity", Stochastic()),
    ]
}
RECIPES = {"off": OFF} | LOSSLESS
SETTINGS = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.01},
    {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)) + x)


NETWORKS = {
    "linear layers": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(128, 33), nn.ReLU(), nn.Linear(33, 16), nn.Tanh(), nn.Linear(16, 5)
    ),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, groups=2), nn.LeakyReLU(), nn.Flatten(), nn.Linear(6, 5),
    ),
    "residual": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2), Residual(), Residual(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 5),
    ),
    "layer norm": lambda: nn.Sequential(
        nn.Flatten(2), nn.Linear(64, 8), nn.LayerNorm(8), nn.GELU(), nn.Flatten(),
        nn.Linear(16, 5),
    ),
}  # fmt: skip


def network(name):
    torch.manual_seed(0)
    return NETWORKS[name]()


def batches(count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 2, 8, 8, generator=generator) for _ in range(count)]


def step(model, optimizer, x):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), torch.arange(6) % 5)
    loss.backward()
    optimizer.step()
    return loss.detach()


def assert_same(ours, theirs):
    for (name, value), other in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s) or "plain")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_pytorchs(name, recipe, settings):
    ours = swalp.convert(network(name), RECIPES[recipe])
    theirs = network(name)
    optimizer = swalp.optim.SGD(ours, lr=0.1, recipe=RECIPES[recipe], **settings)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, **settings)
    for x in batches():
        assert torch.equal(step(ours, optimizer, x), step(theirs, reference, x))
    assert_same(ours, theirs)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def parameter_groups(model, kind, **extra):
    named = list(model.named_parameters())
    biases = [(name, p) for name, p in named if p.dim() == 1]
    weights = [(name, p) for name, p in named if p.dim() > 1]
    optimizer = kind([{"params": weights, "weight_decay": 0.1}], lr=0.2, momentum=0.9, **extra)
    optimizer.add_param_group({"params": biases, "lr": 0.05, "nesterov": True})
    return optimizer


@pytest.mark.parametrize("recipe", ["off", "operands"])
def test_groups_schedulers_closures_and_states_are_pytorchs(recipe):
    low = RECIPES[recipe]
    ours, theirs = swalp.convert(network("convolutions"), low), network("convolutions")
    optimizer = parameter_groups(ours, swalp.optim.SGD, recipe=low)
    reference = parameter_groups(theirs, torch.optim.SGD)
    schedulers = [
        torch.optim.lr_scheduler.SequentialLR(
            one,
            [
                torch.optim.lr_scheduler.LinearLR(one, 0.5, 1.0, total_iters=2),
                torch.optim.lr_scheduler.CosineAnnealingLR(one, 4),
            ],
            milestones=[2],
        )
        for one in (optimizer, reference)
    ]
    for x in batches():
        losses = []
        for model, one in ((ours, optimizer), (theirs, reference)):

            def closure(model=model, one=one, x=x):
                one.zero_grad(set_to_none=False)
                loss = model(x).square().mean()
                loss.backward()
                return loss

            losses.append(one.step(closure))
        assert torch.equal(*losses)
        for scheduler in schedulers:
            scheduler.step()
        assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
    assert_same(ours, theirs)

    twin = copy.deepcopy(ours)
    resumed = parameter_groups(twin, swalp.optim.SGD, recipe=low)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, one in ((ours, optimizer), (twin, resumed), (theirs, reference)):
        step(model, one, x)
    assert_same(ours, twin)
    assert_same(ours, theirs)


@pytest.mark.parametrize("recipe", ["paper-small-block-8", "official-8", "native-8", "mxfp8"])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_of_model_and_optimizer_go_on_alike(recipe, way):
    model = swalp.convert(network("convolutions"), recipe)
    optimizer = swalp.optim.SGD(model, lr=0.1, momentum=0.9, recipe=recipe)
    first, *rest = batches()
    step(model, optimizer, first)
    other, other_optimizer = way((model, optimizer))
    for x in rest:
        assert torch.equal(step(model, optimizer, x), step(other, other_optimizer, x))
    assert_same(model, other)
    assert other_optimizer.param_groups[0]["params"][0] is next(other.parameters())


@pytest.mark.parametrize("recipe", [name for name in swalp.recipes.names() if "resnet" not in name])
def test_every_named_recipe_learns(recipe):
    """In sixty steps on one batch, a small network fits it."""
    model = swalp.convert(network("convolutions"), recipe, packed=True)
    optimizer = swalp.optim.SGD(model, lr=0.05, momentum=0.9, recipe=recipe)
    (x,) = batches(1)
    losses = [step(model, optimizer, x).item() for _ in range(60)]
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]
