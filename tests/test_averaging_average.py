import copy
import json
import os
import re
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from torch import nn

import swalp
from swalp import FixedPoint, Nearest, Stochastic, WeightAverage, quantize
from swalp.averaging import Equal, ExactSum, Exponential, Window
from swalp.recipes import Quantizer


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
    average = WeightAverage(model, start=4, every=3, accumulator=torch.float64)
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
    average = WeightAverage(model, accumulator=torch.float64)
    total = [Fraction(0)] * 3
    for step in range(100):
        wander(model, step)
        average.update_parameters(model)
        total = [t + Fraction(w) for t, w in zip(total, model.weight[0].tolist(), strict=True)]
    kept = average.state_dict()["average"]["weight"]["average"][0].tolist()
    for value, sum_ in zip(kept, total, strict=True):
        assert abs(Fraction(value) - sum_ / 100) < Fraction(1, 10**13)


def test_bfloat16_weights_are_averaged_in_float32():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    average = WeightAverage(model)
    for step in range(1000):
        with torch.no_grad():
            model.weight.fill_(step % 2)
        average.update_parameters(model)
    assert average.state_dict()["average"]["weight"]["average"].item() == pytest.approx(
        0.5, abs=1e-3
    )


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
    with pytest.raises(ValueError, match=r"another network or kind; what differs: 0\.bias, 0"):
        WeightAverage(nn.Linear(2, 2)).load_state_dict(average.state_dict())


def test_average_mistakes():
    with pytest.raises(RuntimeError, match="no average after 0 steps; it starts after step 5"):
        _ = WeightAverage(network(), start=5).module
    with pytest.raises(ValueError, match="every=0 must be 1"):
        WeightAverage(network(), every=0)
    with pytest.raises(ValueError, match=r"bfloat16 must be torch\.float32, torch\.float64, Exact"):
        WeightAverage(network(), accumulator=torch.bfloat16)


def test_exponential_equals_pytorch():
    model = network()
    ours = WeightAverage(model, kind=Exponential(0.9))
    theirs = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for step in range(30):
        wander(model, step)
        ours.update_parameters(model)
        theirs.update_parameters(model)
    for mine, other in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_window_is_the_mean_of_the_last():
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, kind=Window(3))
    means = []
    for value in (1.0, 5.0, 6.0, 10.0, 20.0):
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        means.append(average.module.weight.item())
    assert means == [1, 3, 4, 7, 12]


def test_low_precision_average_is_on_its_grid_and_unbiased():
    grid = FixedPoint(8, 4)
    model = nn.Linear(100, 100, bias=False)
    average = WeightAverage(model, accumulator=Quantizer(grid, Stochastic()), seed=4)
    nn.init.constant_(model.weight, 0.3)  # 4.8 gaps
    for _ in range(20):
        average.update_parameters(model)
    kept = average.value("weight")
    assert torch.equal(quantize(kept, grid), kept)
    assert kept.mean().item() == pytest.approx(0.3, abs=2e-3)
    nearest = WeightAverage(model, accumulator=Quantizer(grid, Nearest()))
    nearest.update_parameters(model)
    assert nearest.value("weight").unique().tolist() == [0.3125]


@pytest.mark.parametrize("packed", [False, True])
def test_applied_swaps_the_average_in_and_back(packed):
    recipe = swalp.recipes.get("paper-small-block-8")
    model = swalp.convert(network(), recipe, packed=packed)
    average = WeightAverage(model)
    for step in range(3):
        wander(model, step)
        average.update_parameters(model)
    own = [parameter.clone() for parameter in model.parameters()]
    identities = [id(parameter) for parameter in model.parameters()]
    statistics = model[1].running_mean.clone()
    with average.applied(model):
        for mine, mean in zip(model.parameters(), average.module.parameters(), strict=True):
            assert torch.equal(mine, mean)
        swalp.recompute_batchnorm(model, [torch.randn(4, 1, 6, 6)])
        assert not torch.equal(model[1].running_mean, statistics)
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert all(torch.equal(a, b) for a, b in zip(own, model.parameters(), strict=True))
    assert torch.equal(model[1].running_mean, statistics)


def test_applied_restores_when_something_fails():
    model = network()
    average = WeightAverage(model)
    average.update_parameters(model)
    wander(model, 1)
    own = copy.deepcopy(model.state_dict())

    def fail():
        with average.applied(model):
            raise KeyError("validation")

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_recomputed_statistics_stay_until_the_next_iterate():
    model = network()
    average = WeightAverage(model)
    average.update_parameters(model)
    swalp.recompute_batchnorm(average.module, [torch.randn(4, 1, 6, 6) + 3])
    assert not torch.equal(average.module[1].running_mean, model[1].running_mean)
    average.update_parameters(model)
    assert torch.equal(average.module[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize(
    ("kind", "accumulator"),
    [(Equal(), torch.float64), (Exponential(0.5), torch.float32), (Window(2), torch.float32),
     (Equal(), Quantizer(FixedPoint(8, 4), Stochastic()))],
    ids=str,
)  # fmt: skip
def test_every_kind_goes_on_from_its_state(kind, accumulator):
    def make(model):
        return WeightAverage(model, kind=kind, accumulator=accumulator, seed=2)

    model = network()
    average = make(model)
    for step in range(3):
        wander(model, step)
        average.update_parameters(model)
    other = make(network())
    other.load_state_dict(copy.deepcopy(average.state_dict()))
    for step in range(3, 6):
        wander(model, step)
        average.update_parameters(model)
        other.update_parameters(model)
    for left, right in zip(average.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("kind", [Equal(), Exponential(0.5), Window(2)], ids=str)
@pytest.mark.parametrize("accumulator", [torch.float32, torch.float64])
def test_a_state_stays_as_it_was_saved_and_is_seen_at_once(kind, accumulator):
    model = network()
    average = WeightAverage(model, kind=kind, accumulator=accumulator)
    average.update_parameters(model)
    saved = average.state_dict()
    then = {name: value.clone() for name, value in average.module.state_dict().items()}
    wander(model, 1)
    average.update_parameters(model)
    assert not torch.equal(average.module[0].weight, then["0.weight"])
    average.load_state_dict(saved)
    for name, value in average.module.state_dict().items():
        assert torch.equal(value, then[name]), name


def test_the_average_of_a_float64_network_is_float64():
    model = network().double()
    average = WeightAverage(model, accumulator=torch.float64)
    average.update_parameters(model)
    for mine, own in zip(average.module.parameters(), model.parameters(), strict=True):
        assert mine.dtype == torch.float64
        assert torch.equal(mine, own)


def test_combinations_that_make_no_sense_are_refused():
    grid = FixedPoint(8, 4)
    with pytest.raises(ValueError, match="Exponential average has no exact integer sum"):
        WeightAverage(network(), kind=Exponential(0.9), accumulator=ExactSum(grid))
    with pytest.raises(ValueError, match="Window keeps the iterates themselves"):
        WeightAverage(network(), kind=Window(2), accumulator=Quantizer(grid, Nearest()))
    with pytest.raises(ValueError, match=r"decay=1\.5 must lie between"):
        Exponential(1.5)
    with pytest.raises(TypeError, match=r"kind=3 must be Equal\(\), Exponential"):
        WeightAverage(network(), kind=3)
    with pytest.raises(TypeError, match="must be the FixedPoint of the weights"):
        ExactSum(swalp.BlockFloat(8))


def test_exact_sums_need_weights_on_the_grid():
    average = WeightAverage(nn.Linear(1, 1), accumulator=ExactSum(FixedPoint(8, 6)))
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1 / 3)
    with pytest.raises(ValueError, match=r"weight is not on the grid of fixed8\.6"):
        average.update_parameters(model)
    for beyond in (2.0, -2.015625, -(2.0**59), torch.inf):
        nn.init.constant_(model.weight, beyond)
        with pytest.raises(ValueError, match=r"not on the grid of fixed8\.6, or beyond its range"):
            average.update_parameters(model)
    assert average.count == 0


def test_exact_sums_of_wide_words():
    model = nn.Linear(5, 1, bias=False).double()
    values = [torch.randint(-(2**52), 2**52, (1, 5)).double() for _ in range(3)]
    average = WeightAverage(model, accumulator=ExactSum(FixedPoint(53, 0)))
    for value in values:
        model.weight.data = value
        average.update_parameters(model)
    totals = [sum(map(int, each)) for each in zip(*(v[0].tolist() for v in values), strict=True)]
    exact = [float(Fraction(total, 3)) for total in totals]  # rounded once
    assert average.value("weight").tolist() == [exact]
    average.count = average.steps = 2**11 - 1
    with pytest.raises(ValueError, match=r"sums of one more of fixed53\.0 might not fit 64 bits"):
        average.update_parameters(model)


def test_what_an_average_cannot_do_is_told_at_once():
    model = nn.Linear(2, 2)
    for seed in (1.5, "x", None):
        with pytest.raises(TypeError, match="WeightAverage: seed must be an int"):
            WeightAverage(model, start=1000, seed=seed)
    with pytest.raises(ValueError, match="29 significant bits"):
        WeightAverage(
            model, start=1000, accumulator=Quantizer(swalp.parse_format("fixed30.10"), Nearest())
        )
    average = WeightAverage(model)
    average.update_parameters(model)
    with pytest.raises(KeyError, match=r"nope.*; there are weight, bias"):
        average.value("nope")
    with pytest.raises(ValueError, match=r"the saved state has \[\]"):
        average.load_state_dict({})


def test_bfloat16_network_becomes_float32():
    """PyTorch's own keeps a bfloat16 average, which a thousand iterates later does not move."""
    model = network().to(torch.bfloat16)
    ours, theirs = WeightAverage(model), torch.optim.swa_utils.AveragedModel(model)
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for step in range(1000):
        wander(model, step)
        for name, parameter in model.named_parameters():
            sums[name] += parameter.detach().double()
        ours.update_parameters(model)
        theirs.update_parameters(model)
    stalled = 0.0
    for name, total in sums.items():
        mine = ours.module.get_parameter(name)
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), total / 1000, rtol=2e-7, atol=1e-7)
        other = theirs.module.get_parameter(name).double()
        stalled = max(stalled, ((other - total / 1000).abs() / (total / 1000).abs()).max().item())
    assert stalled > 0.05
    assert ours.module[1].running_mean.dtype == torch.float32
    assert ours.module(torch.randn(4, 1, 5, 5)).dtype == torch.float32


def test_packed_network_where_pytorch_averages_in_8_bits():
    recipe = swalp.recipes.get("paper-small-block-8")
    model = swalp.convert(network(), recipe, packed=True)
    ours = WeightAverage(model, accumulator=torch.float64)
    theirs = torch.optim.swa_utils.AveragedModel(model)
    total = {name: 0 for name, _ in model.named_parameters()}
    for step in range(20):
        wander(model, step)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        for name, parameter in model.named_parameters():
            total[name] = total[name] + parameter.detach().dequantize().double()
    worst = 0.0
    for name, sum_ in total.items():
        mean = (sum_ / 20).float()
        torch.testing.assert_close(ours.module.get_parameter(name), mean, rtol=1e-6, atol=1e-7)
        other = theirs.module.get_parameter(name)
        assert isinstance(other, swalp.PackedTensor)
        worst = max(worst, (other.dequantize() - mean).abs().max().item())
    assert worst > 1e-3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("accumulator", [torch.float32, torch.float64], ids=str)
def test_overlap_changes_nothing(packed, accumulator):
    recipe = swalp.recipes.get("paper-small-block-8")
    model = swalp.convert(network(), recipe, packed=packed)
    plain = WeightAverage(model, accumulator=accumulator, every=2)
    beside = WeightAverage(model, accumulator=accumulator, every=2, overlap=True)
    for step in range(50):
        wander(model, step)
        plain.update_parameters(model)
        beside.update_parameters(model)
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert beside.nbytes == plain.nbytes + held
    for left, right in zip(plain.module.parameters(), beside.module.parameters(), strict=True):
        assert torch.equal(left, right)
    again = copy.deepcopy(beside)
    again.update_parameters(model)
    again.update_parameters(model)
    assert (again.count, beside.count) == (26, 25)


def test_a_failure_in_the_other_thread_is_told():
    model = nn.Linear(1, 1)
    average = WeightAverage(model, accumulator=ExactSum(FixedPoint(8, 6)), overlap=True)
    nn.init.constant_(model.weight, 1 / 3)
    average.update_parameters(model)
    with pytest.raises(ValueError, match="weight is not on the grid"):
        average.state_dict()


def test_memory_is_as_stated():
    model = nn.Linear(64, 64, bias=False)
    weights = 64 * 64
    fmt = swalp.BlockFloat(8, axes=(0,))
    packed = swalp.convert(
        nn.Sequential(nn.Linear(64, 64, bias=False)),
        swalp.recipes.get("paper-small-block-8"),
        packed=True,
    )
    for of, arguments, before, after in (
        (model, {}, 8 * weights, 8 * weights),
        (packed, {}, 8 * weights, 8 * weights),
        (model, {"accumulator": torch.float64}, 8 * weights, 12 * weights),
        (model, {"kind": Window(3)}, 12 * weights, 16 * weights),
        (packed, {"kind": Window(3)}, 3 * (weights + 64), 3 * (weights + 64) + 4 * weights),
        (model, {"accumulator": Quantizer(fmt, Nearest())}, weights + 64, 5 * weights + 64),
    ):
        average = WeightAverage(of, **arguments)
        average.update_parameters(of)
        assert average.nbytes == before
        _ = average.module
        assert average.nbytes == after


def test_averaged_state_dict_loads_into_a_plain_network():
    model = network()
    average = WeightAverage(model)
    with pytest.raises(RuntimeError, match="no average after 0 steps"):
        average.averaged_state_dict()
    for step in range(3):
        wander(model, step)
        average.update_parameters(model)
    plain = network()
    plain.load_state_dict(average.averaged_state_dict())
    for left, right in zip(plain.state_dict().values(), average.module.state_dict().values(),
                           strict=True):  # fmt: skip
        assert torch.equal(left, right)


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    average = WeightAverage(model)
    average.update_parameters(model)
    assert average.module[0].weight is average.module[1].weight
    with average.applied(model):
        assert torch.equal(model[1].weight, average.value("0.weight"))
    assert model[1].weight is model[0].weight


def test_only_the_network_that_it_was_made_from():
    """Names in a wrapper are others: nothing would be found, and nothing said."""
    model = nn.Linear(2, 2)
    average = WeightAverage(model, start=1)
    message = (
        r"^WeightAverage: OptimizedModule has parameters of other names or shapes than the network "
        r"that the average was made from \(they differ in _orig_mod\.bias, _orig_mod\.weight, "
        r"bias, weight\); pass that network, of a wrapper such as torch\.compile's its _orig_mod "
        r"or module$"
    )
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=message):
        average.update_parameters(compiled)  # at once, not after the steps before the start
    assert (average.steps, average.count) == (0, 0)
    average.update_parameters(model)
    average.update_parameters(model)
    with pytest.raises(ValueError, match=message):
        average.update_parameters(compiled)
    assert (average.steps, average.count) == (2, 1)
    with pytest.raises(ValueError, match=message), average.applied(compiled):
        pass
    wider = nn.Linear(2, 2)
    wider.scale = nn.Parameter(torch.ones(1))
    with (
        pytest.raises(ValueError, match=r"Linear has parameters of other .*differ in scale\)"),
        average.applied(wider),
    ):
        pass
    average.update_parameters(compiled._orig_mod)
    with average.applied(compiled._orig_mod):
        pass
    assert average.count == 2


@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        (
            {"accumulator": ExactSum(FixedPoint(8, 6))},
            {"accumulator": ExactSum(FixedPoint(8, 4))},
            "the saved average is Equal() in ExactSum(fixed8.6), this one Equal() in "
            "ExactSum(fixed8.4); make it with the kind and accumulator of the saved one",
        ),
        (
            {},
            {"kind": Exponential(0.9)},
            "is Equal() in torch.float32, this one Exponential(0.9) in torch.float32;",
        ),
        (
            {"kind": Exponential(0.99)},
            {"kind": Exponential(0.9)},
            "is Exponential(0.99) in torch.float32, this one Exponential(0.9) in torch.float32;",
        ),
        (
            {"accumulator": Quantizer(FixedPoint(24, 12), Nearest())},
            {"accumulator": Quantizer(FixedPoint(24, 12), Stochastic())},
            "is Equal() in Quantizer(fixed24.12, nearest), this one Equal() in "
            "Quantizer(fixed24.12, stochastic32);",
        ),
        ({"kind": Window(2)}, {"kind": Window(3)}, "is Window(2), this one Window(3);"),
    ],
    ids=["format", "weights", "decay", "rounding", "length"],
)
def test_a_state_of_another_kind_is_refused(saved, own, message):
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, 0.5)
    nn.init.constant_(model.bias, 0.25)
    average, other = WeightAverage(model, **saved), WeightAverage(model, **own)
    average.update_parameters(model)
    other.update_parameters(model)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        other.load_state_dict(average.state_dict())
    assert same_states(other.state_dict(), before)


def test_a_state_is_tensors_numbers_and_strings():
    model = network()
    average = WeightAverage(model, accumulator=ExactSum(FixedPoint(8, 6)))
    state = average.state_dict()
    json.dumps({key: state[key] for key in state.keys() - {"average", "buffers"}})
    assert all(isinstance(each, torch.Tensor) for each in state["buffers"].values())


def test_a_state_from_before_kinds_were_saved_loads():
    model = network()
    average = WeightAverage(model, kind=Exponential(0.9))
    average.update_parameters(model)
    state = average.state_dict()
    del state["kind"]
    other = WeightAverage(model, kind=Exponential(0.9))
    other.load_state_dict(state)
    assert same_states(other.state_dict(), average.state_dict())


def same_states(left, right):
    tensors = [
        {f"{name}/{key}": value for name, kept in state["average"].items()
         for key, value in kept.items()} | state["buffers"]
        for state in (left, right)
    ]  # fmt: skip
    return (
        tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
        and (left["steps"], left["count"]) == (right["steps"], right["count"])
    )


class Tied(nn.Module):
    """Weights, and statistics, with two names each; buffers that are saved, and that are not."""

    def __init__(self):
        super().__init__()
        self.register_buffer("places", torch.arange(3), persistent=False)
        self.embedding, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(10)
        self.again = self.norm


@pytest.mark.parametrize("packed", [False, True])
def test_averaged_state_dict_has_the_names_of_the_networks_own(packed):
    model = Tied()
    if packed:
        swalp.convert(model, swalp.recipes.get("paper-small-block-8"), packed=True)
    average = WeightAverage(model)
    wander(model, 1)
    model.norm.running_mean.fill_(3)
    average.update_parameters(model)
    found = average.averaged_state_dict()
    assert list(found) == list(model.state_dict()) == list(average.module.state_dict())
    plain = Tied()
    plain.load_state_dict(found)
    for name, value in average.module.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)


FIXED = FixedPoint(8, 6)
SYMMETRIC = FixedPoint(8, 6, symmetric=True)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("accumulator", "packed", "bad", "message"),
    [
        (ExactSum(FIXED), None, 0.3, "bias is not on the grid of fixed8.6"),
        (ExactSum(FIXED), None, torch.nan, "bias is not on the grid of fixed8.6"),
        (ExactSum(FIXED), None, torch.inf, "bias is not on the grid of fixed8.6"),
        (ExactSum(SYMMETRIC), SYMMETRIC, torch.nan, "bias is not on the grid of fixed8.6s"),
        (ExactSum(FIXED), FixedPoint(9, 7), 3 / 128, "bias is not on the grid of fixed8.6"),
        (Quantizer(FIXED, Nearest()), None, torch.nan, "bias has a NaN, and fixed8.6 no code"),
        (Quantizer(FIXED, Stochastic()), SYMMETRIC, torch.nan, "bias has a NaN, and fixed8.6 no"),
    ],
    ids=str,
)  # fmt: skip
def test_an_iterate_is_taken_whole_or_not_at_all(accumulator, packed, bad, message, overlap):
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, 0.5)
    nn.init.constant_(model.bias, 0.25)
    if packed is not None:
        model.weight = nn.Parameter(swalp.pack(model.weight, packed))
        model.bias = nn.Parameter(swalp.pack(model.bias, packed))
    average = WeightAverage(model, accumulator=accumulator, overlap=overlap)
    average.update_parameters(model)
    before = average.state_dict()
    with torch.no_grad():
        model.bias.copy_(torch.tensor([0.25, bad]))
    if overlap:  # a failure is told later, when its call has been counted
        average.update_parameters(model)
        before["steps"] += 1
    with pytest.raises(ValueError, match=message):
        average.update_parameters(model)
    assert same_states(average.state_dict(), before)
    with torch.no_grad():
        model.bias.fill_(0.5)
    average.update_parameters(model)
    assert average.value("weight").tolist() == [[0.5, 0.5]] * 2
    assert average.value("bias").tolist() == [0.375, 0.375]


def test_other_shapes_are_refused_before_anything_is_taken():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = WeightAverage(model)
    average.update_parameters(model)
    before = average.state_dict()
    wander(model, 1)
    other = copy.deepcopy(model)
    other[1].bias = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"parameters of other .* \(they differ in 1\.bias\)"):
        average.update_parameters(other)
    with pytest.raises(ValueError, match=r"they differ in 1\.bias"), average.applied(other):
        pass
    other = copy.deepcopy(model)
    other.register_buffer("mask", torch.ones(2))
    other[1].running_var = torch.ones(1)
    with pytest.raises(ValueError, match=r"buffers of other .* \(they differ in 1\.running_var, m"):
        average.update_parameters(other)
    assert same_states(average.state_dict(), before)


def test_a_state_of_other_buffers_is_refused_before_anything_is_loaded():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average, other = WeightAverage(model), WeightAverage(model)
    average.update_parameters(model)
    before = other.state_dict()
    state = average.state_dict()
    del state["buffers"]["1.running_var"]
    with pytest.raises(ValueError, match=r"another network or kind; what differs: 1\.running_var"):
        other.load_state_dict(state)
    assert same_states(other.state_dict(), before)


def test_an_interrupted_wait_is_waited_for_again(monkeypatch):
    """Else the next iterate would be copied over the one that is still being taken."""
    model = nn.Linear(3, 2)
    average = WeightAverage(model, overlap=True)
    average.update_parameters(model)
    running = average._overlap._running

    def interrupted(timeout=None):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "exception", interrupted)
    with pytest.raises(KeyboardInterrupt):
        average.update_parameters(model)
    assert average._overlap._running is running
    average.update_parameters(model)
    assert (average.steps, average.count) == (2, 2)
    torch.testing.assert_close(average.value("weight"), model.weight.detach())


KINDS = [
    {},
    {"accumulator": torch.float64},
    {"accumulator": ExactSum(FixedPoint(8, 6))},
    {"accumulator": Quantizer(swalp.BlockFloat(8), Nearest())},
    {"kind": Window(3)},
]


@pytest.mark.parametrize("options", KINDS)
def test_value_needs_an_iterate(options):
    average = WeightAverage(nn.Linear(2, 2), start=1, **options)
    with pytest.raises(RuntimeError, match="no average after 0 steps"):
        average.value("weight")


class Indexed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.table = nn.Parameter(torch.tensor([2**40 + 1, 5, 7]), requires_grad=False)
        self.mask = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
        self.again = self.table

    def forward(self, x):
        return x


@pytest.mark.parametrize("options", [*KINDS, {"overlap": True}])
def test_integer_parameters_are_carried_like_buffers(options):
    model = Indexed()
    average = WeightAverage(model, **options)
    for step in range(1, 3):
        with torch.no_grad():
            model.weight.fill_(step / 4)
            model.table.add_(1)
            model.mask.logical_not_()
        average.update_parameters(model)
        module = average.module
        assert module.table is module.again
        assert isinstance(module.table, nn.Parameter)
        for name in ("table", "mask"):
            carried = module.get_parameter(name)
            assert carried.dtype == model.get_parameter(name).dtype
            assert torch.equal(carried, model.get_parameter(name))
            assert torch.equal(average.averaged_state_dict()[name], carried)
        assert torch.equal(average.averaged_state_dict()["again"], model.table)
    kept = model.table
    with average.applied(model):
        assert model.table is kept
        assert torch.equal(model.weight, average.value("weight").float())
    assert "table" not in average.state_dict()["average"]
    with torch.no_grad():
        other = Indexed()
        other.table.zero_()
    resumed = WeightAverage(other, **options)
    resumed.load_state_dict(average.state_dict())
    assert torch.equal(resumed.module.table, model.table)
    copied = copy.deepcopy(average)
    with torch.no_grad():
        other.table.fill_(9)
    copied.update_parameters(other)
    assert torch.equal(copied.module.table, other.table)
    alone = nn.Module()
    alone.weight = nn.Parameter(torch.full((3,), 0.25))
    without = WeightAverage(alone, **options)
    without.update_parameters(alone)
    assert without.module.weight.shape == (3,)
    assert average.nbytes == without.nbytes


def test_complex_parameters_are_refused_by_name():
    model = nn.Linear(2, 2)
    model.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"'phase' is torch\.complex64.*torch\.view_as_real"):
        WeightAverage(model)


@pytest.mark.parametrize("kind", [Equal(), Window(2)])
@pytest.mark.parametrize("overlap", [False, True])
def test_evaluated_in_inference_mode_and_taken_on(kind, overlap):
    model = nn.Linear(3, 2)
    accumulator = torch.float64 if kind == Equal() else torch.float32
    average = WeightAverage(model, kind=kind, accumulator=accumulator, overlap=overlap)
    with torch.inference_mode():
        average.update_parameters(model)
        average.module(torch.ones(1, 3))
    wander(model, 0)
    average.update_parameters(model)
    assert torch.equal(average.module.weight.double(), average.value("weight").float().double())


def test_buffers_that_a_forward_replaces_are_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.layer(x)

    model = Counting()
    average = WeightAverage(model)
    average.update_parameters(model)
    with average.applied(model):
        model(torch.ones(1, 2))
    assert model.calls == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_an_interrupted_update_is_not_gone_on_with(overlap, monkeypatch):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    average = WeightAverage(model, overlap=overlap)
    average.update_parameters(model)
    saved = copy.deepcopy(average.state_dict())
    owner, name = (average._overlap, "start") if overlap else (swalp.averaging.taking, "take")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            average.update_parameters(model)
    for use in (
        lambda: average.update_parameters(model),
        lambda: average.value("0.weight"),
        lambda: average.module,
        average.state_dict,
    ):
        with pytest.raises(RuntimeError, match="an update was interrupted"):
            use()
    average.load_state_dict(saved)
    average.update_parameters(model)
    assert average.count == 2
    assert torch.equal(average.value("0.weight"), model[0].weight)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_an_overlapped_average_goes_on_in_a_forked_process():
    program = """
import os, torch, swalp
torch.set_num_threads(1)
model = torch.nn.Linear(8, 8)
average = swalp.WeightAverage(model, overlap=True)
average.update_parameters(model)
child = os.fork()
average.update_parameters(model)
assert torch.equal(average.module.weight, model.weight) and average.count == 2
os._exit(0) if child == 0 else os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=60, check=False)
    assert run.returncode == 0
