import copy
import dataclasses
import weakref

import pytest
import torch
from torch import nn

import swalp
from swalp import (
    BlockFloat,
    FixedPoint,
    Minifloat,
    Nearest,
    PackedTensor,
    Stochastic,
    pack,
    quantize,
)
from swalp.noise import stream_seed
from swalp.optim import fused
from swalp.quantize import plans
from swalp.recipes import Override, Quantizer, Recipe

SETTINGS = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    {"lr": 0.1, "momentum": 1e-37},
]
LOSSLESS = Recipe(
    name="float32 as a minifloat",
    **{role: Quantizer(Minifloat(8, 23), Stochastic()) for role in swalp.recipes.ROLES},
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 3))


def train(model, optimizer, steps=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 7, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_mistakes_in_arguments():
    model = network()
    mistakes = [
        (lambda: swalp.optim.SGD(model, lr=True), "SGD: lr must be a number, not True"),
        (lambda: swalp.optim.SGD(model, lr="0.1"), "SGD: lr must be a number, not '0.1'"),
        (lambda: swalp.optim.SGD(model, 0.1, momentum=0.9, nesterov="no"), "nesterov must be True"),
        (lambda: swalp.optim.Adam(model, decoupled=1), "Adam: decoupled must be True or False"),
        (lambda: swalp.convert("model", "native-8"), "model must be a torch.nn.Module, not str"),
        (lambda: swalp.convert(model, "native-8", packed=1), "packed must be True or False, not 1"),
        (lambda: swalp.WeightAverage([model]), "model must be a torch.nn.Module, not list"),
        (lambda: swalp.WeightAverage(model, overlap=2), "overlap must be True or False, not 2"),
    ]
    for mistake, message in mistakes:
        with pytest.raises(TypeError, match=message):
            mistake()
    with pytest.raises(ValueError, match="lr=nan must be 0 or more"):
        swalp.optim.SGD(model, lr=float("nan"))
    swalp.optim.SGD(model, lr=torch.tensor(0.1))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("recipe", [None, LOSSLESS], ids=["off", "lossless"])
def test_equals_pytorch_bit_for_bit(settings, recipe):
    ours, theirs = network(), network()
    after = train(ours, swalp.optim.SGD(ours.named_parameters(), recipe=recipe, **settings))
    expected = train(theirs, torch.optim.SGD(theirs.parameters(), **settings))
    assert same(after, expected)


def test_step_is_algorithm_2():
    """Three steps against the algorithm written out with the public quantizer."""
    recipe = swalp.recipes.get("paper-small-block-6")
    model = network()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(w) for name, w in weights.items()}
    optimizer = swalp.optim.SGD(
        model.named_parameters(), 0.3, momentum=0.9, weight_decay=0.01, recipe=recipe, seed=7
    )

    def q(role, bits, name, step, value):
        axes = (0,) if value.dim() > 1 else None
        rule = Stochastic(stream_seed(7, role, name), random_bits=bits, step=step)
        return quantize(value, BlockFloat(6, axes=axes, symmetric=False), rule)

    generator = torch.Generator().manual_seed(2)
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            g = q("gradient", 16, name, step, parameter.grad) + 0.01 * weights[name]
            # v <- rho Q_M(v) + g: Q_M with the noise of the step that made v
            if step:
                velocity[name] = q("momentum", 16, name, step - 1, velocity[name])
            velocity[name] = 0.9 * velocity[name] + g
            weights[name] = q("weight", 32, name, step, weights[name] - 0.3 * velocity[name])
        optimizer.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), weights[name], rtol=0, atol=1e-6)


def test_everything_kept_is_on_its_grid():
    recipe = swalp.recipes.get("paper-big-block-8")
    model = swalp.convert(network(), recipe)
    optimizer = swalp.optim.SGD(model.named_parameters(), 0.1, momentum=0.9, recipe=recipe)
    train(model, optimizer)
    grid = BlockFloat(9)  # one bit more holds the lowest code of two's complement
    for parameter in model.parameters():
        kept = optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(quantize(parameter.detach(), grid), parameter)
        assert torch.equal(quantize(kept, grid), kept)
        assert kept.unique().numel() > 2 or kept.numel() < 4


def test_accumulator_takes_the_updates():
    fine, coarse = (Quantizer(BlockFloat(w), Nearest()) for w in (16, 3))
    recipe = Recipe(name="accumulated", weight=coarse, accumulator=fine)
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = swalp.optim.SGD(model.named_parameters(), lr=0.01, recipe=recipe)
    for _ in range(30):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
    accumulated = optimizer.state[model.weight]["accumulator"]
    torch.testing.assert_close(accumulated.item(), 0.7, rtol=0, atol=1e-3)
    assert model.weight.item() == 0.75  # the nearest of 3 bits; without accumulator it stays 1


@pytest.mark.parametrize("named", [True, False])
def test_state_round_trip_continues_bit_for_bit(named):
    recipe = swalp.recipes.get("paper-small-block-4")

    def make(model):
        params = model.named_parameters() if named else model.parameters()
        return swalp.optim.SGD(params, 0.1, momentum=0.9, recipe=recipe, seed=3)

    model = network()
    optimizer = make(model)
    train(model, optimizer)
    other = copy.deepcopy(model)
    resumed = make(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(train(model, optimizer), train(other, resumed))


def test_noise_depends_on_seed_and_name_not_on_order():
    recipe = swalp.recipes.get("paper-big-block-4")

    def weights(seed, reverse=False):
        model = network()
        params = list(model.named_parameters())
        optimizer = swalp.optim.SGD(
            params[::-1] if reverse else params, 0.1, recipe=recipe, seed=seed
        )
        return train(model, optimizer)

    assert same(weights(1), weights(1, reverse=True))
    assert not same(weights(1), weights(2))


def test_pytorch_habits():
    model = network()
    optimizer = swalp.optim.SGD(model[0].named_parameters(), lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": list(model[2].named_parameters()), "lr": 0.0})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 7)).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    scheduler.step()
    assert loss.item() == pytest.approx(loss.item())
    assert scheduler.get_last_lr() == [0.05, 0.0]
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [True, True, False, False]
    model[0].bias.grad = None  # a parameter without a gradient stays
    kept = model[0].bias.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].bias, kept)


def test_bad_arguments():
    parameters = list(network().parameters())
    with pytest.raises(ValueError, match="lr=-1 must be 0 or more"):
        swalp.optim.SGD(parameters, -1)
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        swalp.optim.SGD(parameters, 0.1, nesterov=True)
    with pytest.raises(TypeError, match="SGD: recipe must be a Recipe or the name of one, not 8"):
        swalp.optim.SGD(parameters, 0.1, recipe=8)
    overridden = Recipe(name="mine", overrides=(Override(layers="0", weight=None),))
    with pytest.raises(ValueError, match="SGD: recipe 'mine' has overrides for some layers, but"):
        swalp.optim.SGD(parameters, 0.1, recipe=overridden)
    by_kind = Recipe(name="mine", overrides=(Override(kind="Linear", weight=None),))
    with pytest.raises(ValueError, match="'Linear', and the name '0' does not tell the kind; give"):
        swalp.optim.SGD(network().named_parameters(), 0.1, recipe=by_kind)
    with pytest.raises(ValueError, match="did you mean 'Linear'"):
        swalp.optim.SGD(
            network(),
            0.1,
            recipe=dataclasses.replace(by_kind, overrides=(Override(kind="linear", weight=None),)),
        )
    with pytest.raises(
        ValueError, match=r"Override\(layers='5'\) matches no layer; there .*required="
    ):
        swalp.optim.SGD(
            network().named_parameters(),
            0.1,
            recipe=dataclasses.replace(overridden, overrides=(Override(layers="5", weight=None),)),
        )
    with pytest.raises(ValueError, match="Adam: recipe 'mine' has an accumulator"):
        swalp.optim.Adam(
            network(),
            recipe=Recipe(
                name="mine",
                overrides=(Override(layers="0", accumulator=Quantizer(BlockFloat(8), Nearest())),),
            ),
        )


def test_names_that_are_not_the_models_are_refused():
    """Overrides go by them, and so does the noise."""
    model = network()
    overrides = (Override(layers="2", weight=None), Override(layers="9", activation=None))
    recipe = Recipe(name="mine", overrides=overrides)
    parts = [{"params": list(part.named_parameters())} for part in (model[0], model[2])]
    with pytest.raises(
        ValueError, match="two parameters have the name 'weight', and so would have"
    ):
        swalp.optim.SGD(parts, 0.1, recipe=recipe)
    optimizer = swalp.optim.SGD(parts[:1], 0.1, recipe="paper-small-block-8")
    with pytest.raises(ValueError, match="two parameters have the name 'weight'"):
        optimizer.add_param_group(dict(parts[1]))
    assert len(optimizer.param_groups) == 1
    wrapped = [(f"_orig_mod.{name}", parameter) for name, parameter in model.named_parameters()]
    with pytest.raises(
        ValueError, match=r"layers='2'\) matches no layer; .*model\.named_parameters"
    ):
        swalp.optim.SGD(wrapped, 0.1, recipe=recipe)
    swalp.optim.SGD(model.named_parameters(), 0.1, recipe=recipe)  # the other is not for parameters
    some = dataclasses.replace(
        recipe, overrides=(dataclasses.replace(overrides[0], required=False),)
    )
    swalp.optim.SGD(model[0].named_parameters(prefix="0"), 0.1, recipe=some)


def test_another_recipe_holds_from_the_next_step_on():
    base = swalp.recipes.get("paper-small-block-8")
    first, second = (
        dataclasses.replace(base, overrides=(Override(layers="0", weight=weight),))
        for weight in (None, Quantizer(BlockFloat(4, axes=(0,)), Stochastic()))
    )

    def step(model, optimizer):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()

    model, alike = network(), network()
    optimizer = swalp.optim.SGD(model, 0.1, recipe=first)
    step(model, optimizer)
    alike.load_state_dict(model.state_dict())
    other = swalp.optim.SGD(alike, 0.1, recipe=second)
    other.load_state_dict(optimizer.state_dict())
    optimizer.recipe = second
    step(model, optimizer)
    step(alike, other)
    for one, two in zip(model.parameters(), alike.parameters(), strict=True):
        assert torch.equal(one, two)
    assert optimizer.recipe_of("0.weight").weight == second.overrides[0].weight


@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
@pytest.mark.parametrize("compiled", [False, True])
def test_overrides_per_parameter(kind, compiled, monkeypatch):
    """Each parameter steps as it would under a recipe of its own."""
    if not compiled:
        monkeypatch.setattr(fused, "available", lambda: False)
    base = swalp.recipes.get("paper-small-block-8")
    wide = Quantizer(BlockFloat(12, axes=(0,)), Stochastic())
    mixed = dataclasses.replace(base, overrides=(
        Override(kind="Linear", gradient=None, required=False),
        Override(layers="2", weight=wide, momentum=None),
        Override(parameter="bias", weight=wide),
    ))  # fmt: skip
    settings = {"momentum": 0.9, "weight_decay": 0.01} if kind is swalp.optim.SGD else {}

    def trained(recipe):
        model = network()
        for name, parameter in model.named_parameters():
            parameter.data = torch.full_like(parameter, 0.5 + 0.1 * len(name))
        optimizer = kind(model, lr=0.1, recipe=recipe, seed=4, **settings)
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        fast = {n: id(p) in optimizer._kernels for n, p in model.named_parameters()}
        return dict(model.named_parameters()), fast

    together, fast = trained(mixed)
    for name, parameter in together.items():
        layer, own = name.split(".")
        alone, _ = trained(mixed.at(layer, "Linear", own))
        assert torch.equal(parameter, alone[name]), name
        assert not torch.equal(parameter, trained(base)[0][name])
        assert fast[name] == (compiled and fused.available() and layer == "0")


def test_weight_decay_is_that_of_the_accumulator():
    fine, coarse = (Quantizer(BlockFloat(w), Nearest()) for w in (16, 3))
    recipe = Recipe(name="accumulated", weight=coarse, accumulator=fine)
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.90625)
    optimizer = swalp.optim.SGD(model.named_parameters(), 0.5, weight_decay=0.5, recipe=recipe)
    model.weight.grad = torch.zeros(1, 1)
    optimizer.step()
    assert model.weight.item() == 0.75  # and the accumulator 0.90625 * 0.75
    optimizer.step()
    assert optimizer.state[model.weight]["accumulator"].item() == 0.90625 * 0.75**2


FUSED = [
    "paper-small-block-8",
    "paper-big-block-8",
    "paper-small-block-6",
    "paper-big-block-4",  # packed: two codes to a byte
    "paper-small-block-3",  # packed: likewise; rows of odd length are left to the pure step
    "fixed-8",
    "fp8",
    "mxint8",  # blocks of 32 neighbours, many at a time; tiles that do not fit go the pure way
    "mxfp8",
    "mxfp6",
    "mxfp4",
]


def odd_network():
    """Shapes around vector widths, long blocks, a scalar, a row of zeros, a tiny block."""
    torch.manual_seed(0)
    model = nn.ParameterDict(
        {
            "long": nn.Parameter(torch.randn(70_001)),
            "rows": nn.Parameter(torch.randn(37, 53)),
            "conv": nn.Parameter(torch.randn(5, 3, 3, 3)),
            "wide": nn.Parameter(torch.randn(2, 70_003)),
            "middle": nn.Parameter(torch.randn(3, 1100)),
            "scalar": nn.Parameter(torch.randn(())),
            "even": nn.Parameter(torch.randn(6, 2, 17)),
            "tiny": nn.Parameter(torch.randn(4, 17) * 1e-36),
            "tiles": nn.Parameter(torch.randn(67, 96) * 2.0 ** torch.randint(-30, 30, (67, 96))),
        }
    )
    with torch.no_grad():
        model["rows"][3] = 0
    return model


def steps_of(recipe, packed, make, gradient_of, monkeypatch, compiled):
    model = odd_network()
    for name, parameter in list(model.items()):
        grid = swalp.recipes.fit(recipe.weight.format, parameter.shape)
        value = swalp.pack(parameter, grid) if packed else quantize(parameter.detach(), grid)
        model[name] = nn.Parameter(value)
    with monkeypatch.context() as patch:
        if not compiled:
            patch.setattr(fused, "available", lambda: False)
        optimizer = make(model.named_parameters(), recipe)
        for step in range(4):
            for name, parameter in model.items():
                parameter.grad = gradient_of(name, parameter.shape, step)
            optimizer.step()
    for prepared in optimizer._kernels.values():
        parameter = prepared.parameter
        grid = swalp.recipes.fit(recipe.weight.format, parameter.shape)
        # Blocks that are no stretches of memory, or a byte would belong to two.
        blocks = fused.blocks(grid, parameter.shape)
        halved = packed and grid.bits <= 4
        cut = blocks is None or (halved and blocks[0] > 1 and blocks[1] % 2)
        assert (prepared.kernel is not None) == (compiled and fused.available() and not cut)
    kept = {}
    for name, parameter in model.items():
        state = optimizer.state[parameter]
        for key, value in [("weight", parameter), *state.items()]:
            if isinstance(value, torch.Tensor):
                kept[name, key] = torch.Tensor.detach(value).to(torch.float64)
    return kept


def gradient_of(name, shape, step):
    generator = torch.Generator().manual_seed(step)
    gradient = torch.randn(shape, generator=generator)
    if name == "rows":
        gradient[7] = 0
        gradient[:, 0], gradient[:, 1] = 0, -0.0
    if name == "wide" and step == 2:
        gradient[0, 5] = torch.inf
    return gradient * (1e-37 if name == "tiny" else 1)


def makers():
    for settings in SETTINGS:
        yield lambda p, r, s=settings: swalp.optim.SGD(p, recipe=r, seed=5, **s)
    for extra in ({}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True},
                  {"betas": (0.3, 0.99)}):  # fmt: skip
        yield lambda p, r, s=extra: swalp.optim.Adam(p, 0.01, recipe=r, seed=5, **s)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_step_is_the_pure_step(name, packed, monkeypatch):
    recipe = swalp.recipes.get(name)
    # Every setting with 8 bits; of other word lengths, which share their code, every third.
    for number, make in enumerate(list(makers())[:: 1 if "8" in name else 3]):
        arguments = (recipe, packed, make, gradient_of, monkeypatch)
        pure, compiled = (steps_of(*arguments, compiled) for compiled in (False, True))
        assert pure.keys() == compiled.keys()
        for key, value in pure.items():
            assert torch.equal(value, compiled[key]), (number, key)


def edges(length, seed):
    """(weight, gradients of three steps) whose largest magnitudes lie where exponents change."""
    generator = torch.Generator().manual_seed(seed)

    def near(scale):
        """Numbers of which one is a power of two, or so close that rounding may make it one."""
        x = torch.rand(length, generator=generator).sub(0.5).mul(scale)
        place = int(torch.randint(length, (1,), generator=generator))
        x[place] = scale * (1 - 2.0 ** -float(torch.randint(1, 25, (1,), generator=generator)))
        if seed % 3 == 0:
            x[(place + 1) % length] = -scale
        return x

    scale = 2.0 ** float(torch.randint(-10, 4, (1,), generator=generator))
    special = {
        5: torch.full((length,), 3.4e38),  # overflows
        6: torch.full((length,), torch.inf),
        7: torch.zeros(length),
        8: near(2.0**-126),  # subnormal
        9: near(2.0**-149),
    }
    gradients = [near(scale * 2.0 ** (-k * (seed % 2))) for k in range(3)]
    if seed in special:
        gradients[1] = special[seed]
    return near(2.0 ** (seed % 4 - 1)), gradients


BIG = BlockFloat(8)
LONG = {
    "all": {},
    "nearest": {"gradient": Quantizer(BIG, Nearest())},
    "no gradient": {"gradient": None},
    "16 bits": {"gradient": Quantizer(BIG, Stochastic(random_bits=16))},
    "16 bits, evenly": {
        "gradient": Quantizer(BlockFloat(8, symmetric=True), Stochastic(random_bits=16)),
        "momentum": Quantizer(Minifloat(4, 3), Stochastic()),
    },
    "fixed gradient": {"gradient": Quantizer(FixedPoint(8, 6), Stochastic())},
    "clamped gradient": {"gradient": Quantizer(BlockFloat(8, exponent_bits=2), Stochastic())},
    "minifloat gradient": {"gradient": Quantizer(Minifloat(4, 3), Stochastic())},
    "fixed momentum": {"momentum": Quantizer(FixedPoint(8, 6), Stochastic())},
    "fixed weight": {"weight": Quantizer(FixedPoint(8, 6), Stochastic())},
    "coarse": {"gradient": Quantizer(BlockFloat(3), Stochastic())},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LONG)
def test_exponents_of_long_blocks(name, packed, monkeypatch):
    """Those of the pure step, wherever a survey of the block leaves them open."""
    roles = {role: Quantizer(BIG, Stochastic()) for role in ("gradient", "momentum", "weight")}
    recipe = Recipe(name=name, **{**roles, **LONG[name]})
    settings = [
        {"lr": 1.0, "momentum": 0.5},
        {"lr": 0.25, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"lr": 0.5},
    ]
    lengths = {"alone": 16_387, "shared": 66_563}
    for seed in range(14):
        results = []
        for compiled in (False, True):
            with monkeypatch.context() as patch:
                if not compiled:
                    patch.setattr(fused, "available", lambda: False)
                parameters = {}
                steps = {}
                for key, length in lengths.items():
                    weight, steps[key] = edges(length, seed)
                    weight = quantize(weight, recipe.weight.format)
                    held = swalp.pack(weight, recipe.weight.format) if packed else weight
                    parameters[key] = nn.Parameter(held)
                optimizer = swalp.optim.SGD(
                    parameters.items(), recipe=recipe, seed=seed, **settings[seed % 3]
                )
                said = None
                for step in range(3):
                    for key, parameter in parameters.items():
                        parameter.grad = steps[key][step]
                    try:
                        optimizer.step()
                    except ValueError as error:  # infinite weights, which have no code
                        said = str(error)
                        break
            kept = {"said": said}
            for key, parameter in parameters.items():
                kept[key] = [torch.Tensor.detach(parameter).to(torch.float64)]
                if "momentum_buffer" in optimizer.state[parameter]:
                    kept[key].append(
                        optimizer.state[parameter]["momentum_buffer"].to(torch.float64)
                    )
            results.append(kept)
        pure, compiled = results
        assert (pure["said"] is None) == (compiled["said"] is None)
        if pure["said"] is None:
            for key in lengths:
                for left, right in zip(pure[key], compiled[key], strict=True):
                    same_nan = (left.nan_to_num(1.5e300), right.nan_to_num(1.5e300))
                    assert torch.equal(*same_nan), (seed, key)


def test_a_momentum_whose_product_with_a_gap_is_subnormal(monkeypatch):
    """The compiled step takes both as one factor where that is exact, and only there."""
    roles = {role: Quantizer(BIG, Stochastic()) for role in ("gradient", "momentum", "weight")}
    gradient = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 1e-36
    kept = []
    for compiled in (False, True):
        with monkeypatch.context() as patch:
            if not compiled:
                patch.setattr(fused, "available", lambda: False)
            weight = nn.Parameter(swalp.pack(torch.zeros(100_000), BIG))
            optimizer = swalp.optim.SGD(
                [("w", weight)], 1.0, momentum=1e-7, recipe=Recipe(name="r", **roles), seed=0
            )
            for scale in (1, 0):
                weight.grad = gradient * scale
                optimizer.step()
            kept.append(optimizer.state[weight]["momentum_buffer"].to(torch.float64))
    assert kept[0].count_nonzero() > 50
    assert torch.equal(*kept)


@pytest.mark.parametrize("which", [0, len(SETTINGS)], ids=["SGD", "Adam"])
@pytest.mark.parametrize("name", ["paper-big-block-8", "fp8", "mxfp8", "mxfp4"])
def test_compiled_step_does_not_depend_on_threads_or_instructions(name, which, monkeypatch):
    recipe = swalp.recipes.get(name)
    make = list(makers())[which]
    results = []
    before, threads = fused._kernels.used(), torch.get_num_threads()
    try:
        for isa, count in ((before, 1), (before, 2), ("avx2", 2), ("scalar", 2)):
            fused._kernels.use(isa)
            torch.set_num_threads(count)
            results.append(steps_of(recipe, True, make, gradient_of, monkeypatch, True))
    finally:
        fused._kernels.use(before)
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[key]) for key, value in results[0].items())


@pytest.mark.parametrize(
    "recipe", ["native-8", "paper-small-block-4", "fp8", "mxint8", "mxfp4", "official-8"]
)
@pytest.mark.parametrize("shape", [(5,), (7, 33), (64, 40), (4, 3, 3, 3), ()])
def test_an_empty_state_is_of_packed_zeros(recipe, shape):
    found = swalp.recipes.get(recipe)
    assert found.momentum is not None
    fmt = swalp.recipes.fit(found.momentum.format, shape)
    expected = pack(torch.zeros(shape), fmt)
    zeros = fused.empty_state(found, "momentum", pack(torch.ones(shape), fmt))
    assert isinstance(zeros, PackedTensor)
    assert (zeros.format, zeros.shape) == (fmt, expected.shape)
    for ours, theirs in ((zeros.codes, expected.codes), (zeros.exponents, expected.exponents)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("packed", [False, True])
def test_nan_is_said(packed):
    recipe = swalp.recipes.get("paper-big-block-8")
    model = swalp.convert(network(), recipe, packed=packed)
    optimizer = swalp.optim.SGD(model.named_parameters(), 0.1, recipe=recipe)
    for parameter in model.parameters():
        parameter.grad = torch.full(parameter.shape, torch.nan)
    if packed:
        with pytest.raises(ValueError, match="NaN"):
            optimizer.step()
    else:
        optimizer.step()
        assert all(parameter.isnan().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["packed", "negated"])
def test_unusual_gradients_are_taken(kind):
    results = []
    for widen in (False, True):
        model = swalp.convert(network(), "native-8", packed=True)
        optimizer = swalp.optim.SGD(model.named_parameters(), 0.1, recipe="native-8")
        for parameter in model.parameters():
            gradient = torch.arange(parameter.numel()).view(parameter.shape) / 64
            if kind == "packed":
                gradient = swalp.pack(gradient, BlockFloat(8))
                parameter.grad = gradient.dequantize() if widen else gradient
            else:
                gradient = torch._neg_view(gradient)  # as a part of a complex conjugate is
                parameter.grad = gradient.resolve_neg() if widen else gradient
        optimizer.step()
        results.append([parameter.dequantize() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_packed_weights_know_that_a_step_made_them_nan():
    model = swalp.convert(network(), "native-8", packed=True)
    optimizer = swalp.optim.SGD(model.named_parameters(), 0.1, recipe="native-8")
    for gradient in (1.0, torch.nan):
        assert not any(parameter.has_nan() for parameter in model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.full(parameter.shape, gradient)
        optimizer.step()
    assert all(parameter.has_nan() for parameter in model.parameters())


@pytest.mark.parametrize("make", [
    lambda p, r: swalp.optim.SGD(p, 0.1, momentum=0.9, recipe=r),
    lambda p, r: swalp.optim.Adam(p, 0.01, recipe=r),
])  # fmt: skip
@pytest.mark.parametrize(("first", "then"), [(True, False), (False, True), (True, True)])
def test_compiled_step_leaves_other_memory_to_the_pure_step(make, first, then, monkeypatch):
    """State of another kind of run."""
    small, big = (swalp.recipes.get(f"paper-{size}-block-8") for size in ("small", "big"))
    results = []
    for compiled in (False, True):
        if not compiled:
            monkeypatch.setattr(fused, "available", lambda: False)
        model = swalp.convert(network(), small, packed=first)
        optimizer = make(model.named_parameters(), small)
        train(model, optimizer)
        recipe = big if first == then else small
        other = swalp.convert(network(), recipe, packed=then)
        resumed = make(other.named_parameters(), recipe)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(other, resumed)
        results.append([torch.Tensor.detach(p).to(torch.float64) for p in other.parameters()])
        monkeypatch.undo()
    assert same(*results)


@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
@pytest.mark.parametrize("formats", [("bfp8t", "bfp12t"), ("fixed8.4", "fixed16.12")])
def test_packed_weights_of_another_format_than_the_recipes_are_refused(kind, formats):
    """Rounded twice, small updates would be lost."""
    held, wanted = map(swalp.parse_format, formats)
    parameters = [nn.Parameter(swalp.pack(torch.ones(8, 8), fmt)) for fmt in (wanted, held)]
    quantizer = swalp.recipes.Quantizer(wanted, swalp.Stochastic())
    recipe = swalp.recipes.Recipe(name="other", weight=quantizer)
    optimizer = kind([("fits", parameters[0]), ("not", parameters[1])], 0.1, recipe=recipe)
    for parameter in parameters:
        parameter.grad = torch.ones(8, 8)
    with pytest.raises(ValueError, match=r"'not' is packed as .* was converted with"):
        optimizer.step()
    assert not optimizer.state[parameters[1]]


@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
def test_a_part_of_a_packed_tensor_is_not_trained(kind):
    """Its exponents are also those of the rest."""
    whole = swalp.pack(torch.randn(8, 8), swalp.BlockFloat(8))
    before = whole.dequantize()
    model = swalp.convert(nn.Linear(8, 4, bias=False), "native-8", packed=True)
    model.load_state_dict({"weight": whole[:4]}, assign=True)
    optimizer = kind(model, 1.0, recipe="native-8")
    model.weight.grad = torch.full((4, 8), 100.0)
    with pytest.raises(RuntimeError, match="is read-only"):
        optimizer.step()
    assert torch.equal(whole.dequantize(), before)


@pytest.mark.parametrize("compiled", [True, False])
def test_an_accumulator_is_kept_where_the_recipe_has_one(compiled, monkeypatch):
    """Whatever recipe the run had that saved the state."""
    if not compiled:
        monkeypatch.setattr(fused, "available", lambda: False)

    def train(recipe, state=None):
        parameter = nn.Parameter(torch.full((64, 64), 0.5))
        optimizer = swalp.optim.SGD([("p", parameter)], 0.01, recipe=recipe)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in range(3):
            parameter.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return parameter.detach(), optimizer.state[parameter], optimizer.state_dict()

    with_one, without = "official-8", "paper-small-block-8"
    *_, saved = train(with_one)
    weights, state, _ = train(without, saved)
    assert "accumulator" not in state
    saved["state"][0].pop("accumulator")
    assert torch.equal(weights, train(without, saved)[0])
    *_, saved = train(without)
    assert "accumulator" in train(with_one, saved)[1]


@pytest.mark.parametrize(("kind", "values", "message"), [
    (swalp.optim.SGD, {"lr": "x"}, "lr must be a number"),
    (swalp.optim.SGD, {"lr": -1.0}, "lr=-1.0 must be 0 or more"),
    (swalp.optim.SGD, {"lr": float("inf")}, "and finite"),
    (swalp.optim.SGD, {"lr": torch.tensor([0.1])}, "tensor without axes"),
    (swalp.optim.SGD, {"nesterov": 1}, "nesterov must be True or False"),
    (swalp.optim.SGD, {"nesterov": True}, r"needs momentum > 0"),
    (swalp.optim.Adam, {"betas": (0.9,)}, "must be two numbers"),
    (swalp.optim.Adam, {"betas": "ab"}, "must be two numbers"),
    (swalp.optim.Adam, {"betas": (None, 0.9)}, "must be two numbers"),
])  # fmt: skip
def test_hyperparameters_of_a_group_are_checked(kind, values, message):
    """When it is added, and at each step, as schedules and users set them."""
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises((TypeError, ValueError), match=message):
        kind([{"params": [parameter], **values}], 0.1)
    optimizer = kind([parameter], 0.1)
    optimizer.param_groups[0].update(values)
    parameter.grad = torch.ones(3)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3))


@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
@pytest.mark.parametrize("packed", [False, True])
def test_memory_that_is_replaced_between_steps(packed, kind, monkeypatch):
    """What the compiled step knows of a parameter's memory holds for it alone, and for one seed."""
    recipe = swalp.recipes.get("paper-small-block-8")
    results = []
    for compiled in (False, True):
        if not compiled:
            monkeypatch.setattr(fused, "available", lambda: False)
        model = swalp.convert(network(), recipe, packed=packed)
        settings = {"momentum": 0.9} if kind is swalp.optim.SGD else {}
        optimizer = kind(model.named_parameters(), lr=0.1, recipe=recipe, **settings)
        train(model, optimizer)
        for parameter in model.parameters():
            if packed:
                parameter.codes = parameter.codes // 2
            else:
                parameter.data = (parameter.data / 2).t().contiguous().t()
        train(model, optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer)
        optimizer.seed += 1
        train(model, optimizer)
        results.append([torch.Tensor.detach(p).to(torch.float64) for p in model.parameters()])
        monkeypatch.undo()
    assert same(*results)


def _first(model, optimizer):
    """A parameter, its state, and the key of its first moment there."""
    parameter = next(model.parameters())
    key = "momentum_buffer" if isinstance(optimizer, swalp.optim.SGD) else "exp_avg"
    return parameter, optimizer.state[parameter], key


def _reverse_order(model, optimizer):
    group = optimizer.param_groups[0]
    group["params"].reverse()
    group["param_names"].reverse()


def _another_moment(model, optimizer):
    _, state, key = _first(model, optimizer)
    state[key] = copy.deepcopy(state[key])
    state[key].zero_()


def _strided_gradient(model, optimizer):
    parameter = model[2].weight
    parameter.register_hook(lambda gradient: gradient.t().contiguous().t())


# What may happen to an optimizer and its parameters between two steps.
EVENTS = {
    "nothing": lambda model, optimizer: None,
    "a state is replaced": lambda m, o: o.state.update({_first(m, o)[0]: {}}),
    "all states go": lambda m, o: o.state.clear(),
    "states are another dict": lambda m, o: setattr(o, "state", type(o.state)(dict)),
    "a moment is replaced": _another_moment,
    "a step is set": lambda m, o: _first(m, o)[1].update(step=1_000),
    "weights are replaced": lambda m, o: setattr(m[2].weight, "data", m[2].weight.data.clone()),
    "weights are frozen": lambda m, o: m[2].weight.requires_grad_(False),
    "a gradient is strided": _strided_gradient,
    "another seed": lambda m, o: setattr(o, "seed", 99),
    "another recipe": lambda m, o: setattr(
        o, "recipe", dataclasses.replace(o.recipe, gradient=None)
    ),
    "another rate": lambda m, o: o.param_groups[0].update(lr=0.5),
    "no momentum": lambda m, o: o.param_groups[0].update(momentum=0.0),
    "other names": lambda m, o: o.param_groups[0]["param_names"].reverse(),
    "another order": _reverse_order,
    "a state is loaded": lambda m, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
}


@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("event", EVENTS)
def test_a_step_like_the_last_sees_what_changed(event, packed, kind, monkeypatch):
    recipe = swalp.recipes.get("paper-small-block-8")
    results = []
    for compiled in (False, True):
        with monkeypatch.context() as patch:
            if not compiled:
                patch.setattr(fused, "available", lambda: False)
            model = swalp.convert(network(), recipe, packed=packed)
            if packed:  # floats among them
                model[2].bias = nn.Parameter(model[2].bias.dequantize())
            settings = {"momentum": 0.9} if kind is swalp.optim.SGD else {}
            optimizer = kind(model.named_parameters(), lr=0.1, recipe=recipe, seed=3, **settings)
            train(model, optimizer, steps=2)
            EVENTS[event](model, optimizer)
            train(model, optimizer, steps=3)
            states = [optimizer.state[parameter] for parameter in model.parameters()]
            kept = [v for state in states for v in state.values() if isinstance(v, torch.Tensor)]
            everything = [*model.parameters(), *kept]
            results.append([torch.Tensor.detach(x).to(torch.float64) for x in everything])
            results[-1].append(torch.tensor([state.get("step", 0) for state in states]))
    assert same(*results)


@pytest.mark.skipif(not fused.available(), reason="no compiled steps")
@pytest.mark.parametrize("consumed", [False, True])
@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
def test_a_step_like_the_last_asks_for_no_parameter_alone(kind, consumed, monkeypatch):
    recipe = swalp.recipes.get("paper-small-block-8")
    model = swalp.convert(network(), recipe, packed=True)
    model[2].bias = nn.Parameter(model[2].bias.dequantize())
    optimizer = kind(model.named_parameters(), lr=0.1, recipe=recipe)
    if consumed:
        optimizer.consume_gradients()
    train(model, optimizer, steps=2)
    before = [torch.Tensor.detach(x).to(torch.float64) for x in model.parameters()]
    monkeypatch.setattr(kind, "_kernel", lambda *_: pytest.fail("it was asked for"))
    train(model, optimizer, steps=2)
    after = [torch.Tensor.detach(x).to(torch.float64) for x in model.parameters()]
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert all(state["step"] == 4 for state in optimizer.state.values())


def test_a_state_that_was_interrupted_begins_anew(monkeypatch):
    recipe = swalp.recipes.get("native-8")
    model = network()
    optimizer = swalp.optim.Adam(model, recipe=recipe)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    make = fused.empty_state

    def interrupted(recipe, role, parameter):
        if role == "second_moment":
            raise KeyboardInterrupt
        return make(recipe, role, parameter)

    with monkeypatch.context() as patch:
        patch.setattr(fused, "empty_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    optimizer.step()
    fresh = network()
    again = swalp.optim.Adam(fresh, recipe=recipe)
    for parameter in fresh.parameters():
        parameter.grad = torch.ones_like(parameter)
    again.step()
    assert same(model.parameters(), fresh.parameters())


@pytest.mark.parametrize("which", ["parameter", "momentum"])
def test_what_is_packed_may_become_plain(which):
    recipe = swalp.recipes.get("native-8")
    model = swalp.convert(network(), recipe, packed=True)
    optimizer = swalp.optim.SGD(model, lr=0.1, momentum=0.9, recipe=recipe)
    train(model, optimizer)
    for parameter in list(model.parameters()):
        old = parameter if which == "parameter" else optimizer.state[parameter]["momentum_buffer"]
        new = old.dequantize()
        if which == "parameter":
            new = nn.Parameter(new)
        torch.utils.swap_tensors(old, new)
        assert not isinstance(old, PackedTensor)
    train(model, optimizer)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.skipif(not fused.available(), reason="no compiled steps")
def test_tables_of_values_live_as_long_as_a_step_reads_them(monkeypatch):
    monkeypatch.setattr(plans, "_CACHED", 4)
    recipe = swalp.recipes.get("fp8")
    fmt = recipe.weight.format
    model = swalp.convert(network(), recipe, packed=True)
    optimizer = swalp.optim.SGD(model, lr=0.1, momentum=0.9, recipe=recipe)
    train(model, optimizer, steps=2)
    table = weakref.ref(plans.plan_of(fmt).value_table())
    for bits in range(2, 16):
        swalp.quantize(torch.ones(3), FixedPoint(bits, 1))
    assert plans.plan_of(fmt).table is not table()  # it is forgotten there
    assert table() is not None
    train(model, optimizer, steps=2)


@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
def test_replaced_state_is_not_kept_alive(kind):
    recipe = dataclasses.replace(swalp.recipes.get("native-8"), momentum=None)
    model = nn.Linear(7, 4)
    optimizer = kind(
        model, lr=0.1, recipe=recipe, **({"momentum": 0.9} if kind is swalp.optim.SGD else {})
    )
    name = "momentum_buffer" if kind is swalp.optim.SGD else "exp_avg"
    train(model, optimizer)
    old = weakref.ref(optimizer.state[model.weight][name])
    train(model, optimizer)
    assert old() is None


@pytest.mark.parametrize("shape", [(3, 5), (200, 300)])
def test_a_parameter_that_gets_another_shape(shape, monkeypatch):
    recipe = swalp.recipes.get("paper-small-block-8")
    results = []
    for compiled in (False, True):
        if not compiled:
            monkeypatch.setattr(fused, "available", lambda: False)
        parameter = nn.Parameter(torch.ones(16, 16))
        optimizer = swalp.optim.SGD([("weight", parameter)], lr=0.1, recipe=recipe)
        for now in ((16, 16), shape):
            parameter.grad = None
            parameter.data = torch.ones(now)
            parameter.grad = gradient_of("weight", now, 0)
            optimizer.step()
        assert parameter.shape == shape
        results.append([parameter.detach()])
        monkeypatch.undo()
    assert same(*results)


@pytest.mark.parametrize("compiled", [False, True])
def test_momentum_that_is_off_for_a_while_is_kept(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(fused, "available", lambda: False)
    recipe = swalp.recipes.get("paper-small-block-8")
    model = swalp.convert(network(), recipe, packed=True)
    optimizer = swalp.optim.SGD(model.named_parameters(), 0.1, momentum=0.9, recipe=recipe)
    train(model, optimizer)
    before = [state["momentum_buffer"].dequantize() for state in optimizer.state.values()]
    optimizer.param_groups[0]["momentum"] = 0.0
    train(model, optimizer)
    after = [state["momentum_buffer"].dequantize() for state in optimizer.state.values()]
    assert same(before, after)


def test_consumed_gradients_follow_the_groups_of_a_loaded_state():
    """PyTorch makes new groups of a loaded state, which schedulers and users then change."""
    model = swalp.convert(network(), "native-8", packed=True)
    optimizer = swalp.optim.SGD(model, 0.5, momentum=0.9, recipe="native-8")
    optimizer.consume_gradients()
    train(model, optimizer, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.dequantize() for p in model.parameters()]
    train(model, optimizer, 2)
    assert same(before, [p.dequantize() for p in model.parameters()])


def test_consumed_gradients_twice_and_of_frozen_parameters():
    runs = []
    for again in (False, True):
        model = network()
        model[2].bias.requires_grad_(False)
        optimizer = swalp.optim.SGD(model, 0.1, momentum=0.9, recipe="paper-small-block-8")
        for _ in range(2 if again else 1):
            optimizer.consume_gradients()
        train(model, optimizer, 2)
        frozen = model[2].bias.detach().clone()
        assert torch.equal(frozen, network()[2].bias)
        model[2].bias.requires_grad_(True)  # step() takes it
        runs.append(train(model, optimizer, 2))
        assert not torch.equal(model[2].bias, frozen)
    assert same(*runs)


def test_a_state_saved_under_other_names():
    """A wrapper's names, as of a model saved inside another: the place of parameters counts."""
    recipe = Recipe(
        name="mine",
        weight=Quantizer(BlockFloat(3), Nearest()),
        overrides=(Override(layers="0", weight=None),),
    )
    model = network()
    wrapped = nn.ModuleDict({"module": copy.deepcopy(model)})
    other = swalp.optim.SGD(wrapped.named_parameters(), 0.1, momentum=0.9)
    optimizer = swalp.optim.SGD(model, 0.1, momentum=0.9, recipe=recipe)
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["param_names"] == [
        name for name, _ in model.named_parameters()
    ]
    train(model, optimizer, 1)
    assert len(model[0].weight.unique()) > 100  # float, as layer 0 is
    unnamed = swalp.optim.SGD(list(model.parameters()), 0.1, momentum=0.9)
    unnamed.load_state_dict(optimizer.state_dict())
    assert "param_names" not in unnamed.param_groups[0]
    named = list(model.named_parameters())
    turned = swalp.optim.SGD(named[::-1], 0.1, momentum=0.9)
    with pytest.raises(
        ValueError, match=r"has '0\.weight' where this optimizer has '2\.bias'; give"
    ):
        turned.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("theirs", "ours", "lacks"),
    [
        (torch.optim.SGD, swalp.optim.SGD, "'step'"),
        (torch.optim.SGD, swalp.optim.Adam, "'exp_avg', 'root', 'step'"),
        (torch.optim.AdamW, swalp.optim.Adam, "'decoupled'"),
    ],
)
def test_a_state_of_another_optimizer_is_refused(theirs, ours, lacks):
    model = network()
    other = theirs(
        model.parameters(), lr=0.1, **({"momentum": 0.9} if "SGD" in str(theirs) else {})
    )
    train(model, other, 1)
    optimizer = ours(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=rf"lacks \[{lacks}\]: it is not of swalp\.optim\."):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="a saved group of parameters lacks"):
        swalp.optim.Adam(model.parameters()).load_state_dict(
            torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
        )


def test_sparse_gradients_are_refused():
    model = nn.Embedding(9, 4, sparse=True)
    optimizer = swalp.optim.SGD(model, 0.1, recipe="paper-small-block-8")
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="the gradient of 'weight' is sparse"):
        optimizer.step()
    plain = swalp.optim.SGD(model, 0.1)
    before = model.weight.detach().clone()
    plain.step()
    assert (model.weight != before).any(1).tolist() == [i in (1, 2) for i in range(9)]
    with pytest.raises(ValueError, match="'weight' is sparse, which it takes no step along"):
        swalp.optim.Adam(model.named_parameters()).step()


@pytest.mark.parametrize("copied", [False, True])
def test_a_state_is_loaded_as_often_as_one_likes(copied):
    model = network()
    optimizer = swalp.optim.SGD(model, 0.1, momentum=0.9, recipe="paper-small-block-8")
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    if copied:
        optimizer = copy.deepcopy(optimizer)
    for _ in range(3):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("recipe", [None, "fixed-8"])
def test_a_gradient_from_before_its_parameter_grew_is_refused(recipe):
    model = nn.Embedding(4, 8)
    optimizer = swalp.optim.SGD(model, 0.1, recipe=recipe)
    model(torch.tensor([1, 2])).sum().backward()
    model.weight.data = torch.zeros(40, 8)
    with pytest.raises(RuntimeError, match="must match the size"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_complex_parameters_as_in_pytorch(kind):
    runs = []
    for module in (swalp.optim, torch.optim):
        weight = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
        optimizer = getattr(module, kind)([weight], lr=0.1, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            weight.abs().square().sum().backward()
            optimizer.step()
        runs.append(weight.detach())
    assert torch.equal(*runs)


@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
def test_without_a_recipe_small_updates_of_packed_weights_are_not_lost(kind):
    def moved():
        linear = torch.nn.Linear(64, 64, bias=False)
        torch.nn.init.constant_(linear.weight, 0.7)
        swalp.convert(linear, "paper-small-block-8", packed=True)
        before = linear.weight.dequantize()
        optimizer = kind(linear.named_parameters(), lr=1e-4, seed=3)
        for _ in range(20):
            linear.weight.grad = torch.ones(64, 64)
            optimizer.step()
        return (linear.weight.dequantize() - before).mean().item()

    assert moved() == pytest.approx(-20e-4, rel=0.2)  # a gap is 2**-7
    assert moved() == moved()


@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize("shape", [(4, 8), (300, 300)])
def test_a_step_says_whether_weights_became_nan(kind, axes, shape):
    rule = Quantizer(BlockFloat(8, axes=axes), Stochastic())
    roots = Quantizer(Minifloat(4, 3, specials="fn"), Stochastic())
    recipe = Recipe(name="nan", weight=rule, momentum=rule, gradient=rule, second_moment=roots)
    module = nn.Linear(*shape, bias=False)
    model = swalp.convert(module, recipe, packed=True)
    optimizer = kind(model, lr=0.1, recipe=recipe)
    for bad in (0.0, torch.nan, 0.0):
        gradient = torch.randn(shape[1], shape[0], generator=torch.Generator().manual_seed(1))
        gradient[-1, -1] += bad
        model.weight.grad = gradient
        optimizer.step()
        assert model.weight.has_nan() == bool(model.weight.dequantize().isnan().any())
        assert model.weight.has_nan() or bad == 0


@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
def test_a_refused_step_does_not_count(kind):
    recipe = swalp.recipes.get("paper-small-block-8")
    results = []
    for refused in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        optimizer = kind(model.named_parameters(), lr=0.01, recipe=recipe)
        model.weight.grad = torch.ones(64, 64)
        if refused:
            model.bias.grad = torch.ones(64).to_sparse()
            with pytest.raises(ValueError, match="is sparse, which no recipe"):
                optimizer.step()
        model.bias.grad = torch.ones(64)
        optimizer.step()
        assert {state["step"] for state in optimizer.state.values()} == {1}
        results.append([model.weight.detach().clone(), model.bias.detach().clone()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
def test_weights_stay_on_the_grid_that_the_model_was_converted_for(kind):
    model = swalp.convert(network(), "paper-small-block-8")
    for recipe, does in ((None, "does not round it"), ("paper-small-block-4", "rounds it to bfp4")):
        with pytest.raises(ValueError, match=f"keep '0.weight' in bfp8.*{does}.*if that is meant"):
            kind(model, lr=0.1, recipe=recipe)
        kind(model.named_parameters(), lr=0.1, recipe=recipe)
    kind(model, lr=0.1, recipe="paper-small-block-8")
    kind(swalp.convert(network(), "paper-small-block-8", packed=True), lr=0.1)
    kind(
        swalp.convert(network(), Recipe(name="mine", error=Quantizer(BlockFloat(8), Nearest()))),
        lr=0.1,
    )


@pytest.mark.parametrize("shared", [slice(200, 400), slice(0, 600)])
def test_parameters_that_share_memory_step_one_after_another(shared):
    """Threads at both at a time would read what the other has just written."""
    recipe = swalp.recipes.get("paper-small-block-8")

    def trained(threads):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        base = quantize(torch.randn(600, 600), recipe.weight.format)
        whole = nn.Parameter(base)
        part = nn.Parameter(torch.zeros(base[shared].shape))
        part.data = base[shared]
        alone = nn.Parameter(torch.ones(600, 600))
        names = [("whole", whole), ("part", part), ("alone", alone)]
        optimizer = swalp.optim.SGD(names, lr=0.1, momentum=0.9, recipe=recipe)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for _, each in names:
                each.grad = torch.randn(each.shape, generator=generator)
            optimizer.step()
        return base, alone

    before = torch.get_num_threads()
    try:
        expected, *others = [trained(threads) for threads in (1, 2, 2, 2)]
    finally:
        torch.set_num_threads(before)
    for found in others:
        for one, two in zip(expected, found, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
def test_groups_that_say_what_is_not_done(kind):
    one = nn.Parameter(torch.zeros(2))
    for name in ("maximize", "amsgrad", "dampening", "differentiable", "recipe", "seed"):
        with pytest.raises(ValueError, match=f"a group has {name}=1, which no group here has"):
            kind([{"params": [one], name: 1}], lr=0.1)
        kind([{"params": [one], name: 0}], lr=0.1)
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="a parameter is given twice; give each once"),
    ):
        kind([one, one], lr=0.1)
    with pytest.raises(ValueError, match=r"lr=1e\+39 must be 0 or more, and finite in float32"):
        kind([one], lr=1e39)


@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
def test_a_state_of_another_seed_is_refused(kind):
    one = nn.Parameter(torch.zeros(2))
    saved = kind([one], lr=0.1, seed=7).state_dict()
    with pytest.raises(ValueError, match=r"is of seed=7, and this optimizer has 0, .* seed=7$"):
        kind([one], lr=0.1).load_state_dict(saved)
    kind([one], lr=0.1, seed=7).load_state_dict(saved)
    del saved["seed"]
    kind([one], lr=0.1).load_state_dict(saved)
