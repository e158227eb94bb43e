import copy

import pytest
import torch
from torch import nn

import swalp
from swalp.recipes import Quantizer, Recipe
from swalp.training import config, data, diagnostics, loop
from swalp.training.run_directory import RunDirectory
from tiny_runs import finished, settings

ARM = "paper-small-block-8"
FIELDS = {"role", "name", "format", "rounding", "elements", "relative", "in_gaps", "saturated"}
FIELDS |= {"underflowed", "smallest_gap", "largest_gap"}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def trained(digits, arm, **changes):
    """A trajectory at its end."""
    chosen = settings(**changes)
    trajectory = loop.begin(chosen, digits, arm, 0)
    for _ in loop.train(trajectory, digits, chosen):
        pass
    return trajectory


def described(trajectory, digits, count=200):
    return diagnostics.describe(
        trajectory.model,
        trajectory.optimizer,
        trajectory.average.module,
        *next(digits.train.batches([torch.arange(count)])),
        recipe=trajectory.optimizer.recipe,
        seed=0,
    )


def bits(trajectory):
    return {
        name: value.dequantize() if isinstance(value, swalp.PackedTensor) else value.clone()
        for name, value in trajectory.model.state_dict().items()
    }


@pytest.mark.parametrize("arm", ["float", ARM])
def test_nothing_that_is_measured_changes(digits, arm):
    trajectory = trained(digits, arm)
    before, state = bits(trajectory), copy.deepcopy(trajectory.state_dict())
    random = torch.get_rng_state()
    assert described(trajectory, digits) == described(trajectory, digits)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in bits(trajectory).items())
    assert trajectory.state_dict()["noise"] == state["noise"]
    assert all(parameter.grad is None for parameter in trajectory.average.module.parameters())


def test_every_role_of_every_layer(digits):
    found = described(trained(digits, ARM), digits)
    assert found["examples"] == diagnostics.EXAMPLES
    names = {}
    for row in found["errors"]:
        assert set(row) == FIELDS
        names.setdefault(row["role"], []).append(row["name"])
    parameters = ["1.weight", "2.weight", "2.bias", "4.weight", "5.weight", "5.bias"]
    parameters += ["7.weight", "7.bias"]
    assert names == {
        "activation": ["4", "7"],  # the first layer takes the input as it is
        "error": ["7", "4"],
        "gradient": parameters,
        "momentum": parameters,
        "weight": parameters,
        "average": parameters,
    }
    for row in found["errors"]:
        assert 0 < row["in_gaps"] < 0.9 or row["name"].endswith("bias"), row
        assert 0 <= row["saturated"] < 0.2
    assert {row["rounding"] for row in found["errors"] if row["role"] == "average"} == {"nearest"}


def test_errors_are_those_of_the_step_itself():
    """A layer whose numbers are known: y = w x, so that the gradient of w is that of y times x."""
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0.5, -0.25, 0.0], [0.5, 1.0, 0.0, 0.25]]))
    fmt = swalp.FixedPoint(4, 2)
    quantizer = Quantizer(fmt, swalp.Nearest())
    recipe = Recipe(name="one", weight=quantizer, activation=quantizer, quantize_input=True)
    swalp.convert(model, recipe)
    optimizer = swalp.optim.SGD(model.named_parameters(), lr=0.5, recipe=recipe)
    average = swalp.to_float(model)
    x, y = torch.tensor([[0.3, 9.0, -0.05, 0.0]]).repeat(2, 1), torch.tensor([0, 1])
    found = diagnostics.describe(model, optimizer, average, x, y, recipe=recipe, seed=0)
    activation, weight, at_rest = found["errors"]
    assert (activation["role"], activation["elements"]) == ("activation", 8)
    assert activation["saturated"] == 2 / 8  # 9 becomes 1.75
    assert activation["underflowed"] == 2 / 6  # -0.05 becomes 0
    assert (weight["role"], at_rest["role"]) == ("weight", "average")
    assert at_rest["relative"] == 0
    rounded = torch.tensor([[0.25, 1.75, 0.0, 0.0]]).repeat(2, 1)
    logits = rounded @ average[1].weight.T
    gradient = (logits.softmax(1) - torch.eye(2)).T @ rounded / 2
    moved = average[1].weight.detach() - 0.5 * gradient
    error = swalp.quantize(moved, fmt) - moved
    assert weight["relative"] == pytest.approx((error.norm() / moved.norm()).item(), rel=1e-5)


@pytest.mark.parametrize("word_length", [4, 6, 8, 12])
def test_histograms_on_the_grid(digits, word_length):
    trajectory = trained(digits, f"paper-small-block-{word_length}")
    for row in described(trajectory, digits)["histograms"]:
        parameter = trajectory.model.get_parameter(row["name"])
        assert (row["unit"], row["shape"]) == ("gap", list(parameter.shape))
        iterate, average = row["iterate"], row["average"]
        assert sum(iterate["counts"]) == parameter.numel()
        assert sum(average["counts"]) + row["left_out"] == parameter.numel()
        assert iterate["width"] == max(1, 2 ** (word_length - 8))
        assert average["width"] < iterate["width"] or word_length > 8
        codes = parameter.codes if word_length > 4 else parameter._element_codes()
        if iterate["width"] == 1:
            counts = torch.bincount(codes.flatten().long() - round(iterate["low"] + 0.5))
            assert iterate["counts"] == counts.tolist()
        mean = sum(
            (average["low"] + (place + 0.5) * average["width"]) * count
            for place, count in enumerate(average["counts"])
        )
        gap = parameter.dequantize() / codes
        exact = trajectory.average.module.get_parameter(row["name"]) / gap
        kept = exact[exact.isfinite() & (codes != 0)]
        assert mean / parameter.numel() == pytest.approx(
            kept.sum().item() / parameter.numel(), abs=1 + average["width"]
        )


def test_histograms_of_floats(digits):
    for row in described(trained(digits, "float"), digits)["histograms"]:
        assert (row["unit"], row["format"], row["left_out"]) == ("value", None, 0)
        assert len(row["iterate"]["counts"]) <= 101


def test_a_run_has_a_line_for_each_arm(tmp_path):
    run = finished(tmp_path / "run", seeds=2)
    lines = run.diagnostics()
    assert [(line["arm"], line["seed"]) for line in lines] == [("float", 0), (ARM, 0)]
    assert lines[0]["errors"] == []
    again = RunDirectory(run.path)
    again.append_diagnostics(lines[0] | {"examples": 7})
    assert [line["examples"] for line in run.diagnostics()] == [32, 7]
    assert config.load(str(run.path / "config.toml")).seeds == 2


@pytest.mark.parametrize("arm", ["native-8", "fp8", "mxfp4", "fixed-8", "official-8"])
def test_recipes_of_every_kind(digits, arm):
    """The integer products of native layers call no sites, and are measured all the same."""
    found = described(trained(digits, arm, epochs=2, averaging_start=1), digits)
    roles = {row["role"] for row in found["errors"]}
    assert {"activation", "error", "gradient", "momentum", "weight", "average"} <= roles
    layers = {row["name"] for row in found["errors"] if row["role"] == "activation"}
    assert layers & {"3", "4"}  # the second product, or the nonlinearity before it
    assert all(0 <= row["relative"] < 1.5 for row in found["errors"])
