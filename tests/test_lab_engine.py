"""The convex engine equals its definition, and so `swalp.quantize`, bit for bit."""

import pytest
import torch

import swalp
from swalp import BlockFloat, FixedPoint, Minifloat, Nearest, Stochastic
from swalp.averaging import ExactSum
from swalp.lab import definition, engine, problems
from swalp.lab.engine import Method
from swalp.quantize import plans
from test_kernels import build  # noqa: F401  (a fixture)

needs_kernels = pytest.mark.skipif(
    not plans.available, reason="swalp was built without C++ kernels"
)
ROUNDING = Stochastic(2**63 + 12345)
METHODS = {
    "float": Method(0.01),
    "fixed": Method(0.01, FixedPoint(8, 6), ROUNDING),
    "fixed, 16 bits": Method(0.01, FixedPoint(8, 6), Stochastic(7, random_bits=16), every=2),
    "block": Method(0.01, BlockFloat(6), ROUNDING, start=2),
    "minifloat": Method(0.01, Minifloat(4, 3), ROUNDING, start=3, every=2),
    "nearest": Method(0.01, FixedPoint(8, 6), Nearest()),
}


def least_squares(n=50, d=37, seed=0):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=make)
    return problems.LeastSquares(x, x @ torch.rand(d, generator=make) + 1)


def softmax(n=40, features=11, classes=3, seed=0):
    make = torch.Generator().manual_seed(seed)
    x = torch.rand(n, features, generator=make)
    x[x < 0.6] = 0.0
    x[:, -1] = 1.0
    y = torch.randint(0, classes, (n,), generator=make)
    return problems.Softmax(x, y, classes, 1e-3)


CASES = {
    "least squares, d = 37": (least_squares(), None),
    "least squares, d = 2048": (least_squares(20, 2048), None),
    "softmax, 3 classes": (softmax(), 8),
    "softmax, 20 classes": (softmax(classes=20), 5),
    "quadratic": (problems.Scalars("quadratic", 1.5, 21), None),
    "skewed": (problems.Scalars("skewed", 0.5, 300), None),
}


def draws_of(problem, batch, steps):
    if isinstance(problem, problems.Scalars):
        return 99
    make = torch.Generator().manual_seed(5)
    shape = (steps,) if batch is None else (steps, batch)
    return torch.randint(0, len(problem.x), shape, generator=make)


def run(problem, method, draws, lengths):
    state = engine.begin(
        torch.linspace(-1, 1, torch.Size(problem.shape).numel()).reshape(problem.shape)
    )
    done = 0
    for steps in lengths:
        part = draws[done : done + steps] if isinstance(draws, torch.Tensor) else draws
        engine.descend(problem, method, state, part, steps)
        done += steps
    return state


@needs_kernels
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize(("problem", "batch"), CASES.values(), ids=CASES.keys())
def test_kernels_equal_the_definition(problem, batch, method, build, monkeypatch):  # noqa: F811
    draws = draws_of(problem, batch, 9)
    fast = run(problem, method, draws, [4, 5])
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_kernel", engine._slow)
        slow = run(problem, method, draws, [9])
    assert fast.step == slow.step == 9
    for name in ("weight", "sum", "squares"):
        assert torch.equal(getattr(fast, name), getattr(slow, name)), name
    assert not torch.equal(fast.weight, engine.begin(fast.weight * 0).weight)


@needs_kernels
def test_a_long_run_is_the_same_on_every_instruction_set(monkeypatch):
    from test_kernels import BUILDS

    problem, method = least_squares(64, 256), METHODS["fixed"]
    draws = draws_of(problem, None, 5000)
    found = []
    for name in BUILDS:
        engine._kernels.use(name)
        found.append(run(problem, method, draws, [5000]))
    assert len(found) >= 1
    for other in found[1:]:
        assert torch.equal(found[0].weight, other.weight)
        assert torch.equal(found[0].sum, other.sum)


def test_the_average_is_that_of_the_library():
    problem, fmt = least_squares(), FixedPoint(8, 6)
    method = Method(0.01, fmt, ROUNDING, start=3, every=2)
    draws = draws_of(problem, None, 12)
    model = torch.nn.Linear(problem.x.shape[1], 1, bias=False)
    average = swalp.WeightAverage(model, start=3, every=2, accumulator=ExactSum(fmt))
    state = engine.begin(torch.zeros(problem.shape))
    for row in draws.split(1):
        engine.descend(problem, method, state, row, 1)
        with torch.no_grad():
            model.weight.copy_(state.weight)
        average.update_parameters(model)
    assert average.count == method.taken(12) == 4
    assert torch.equal(average.value("weight")[0], state.average(method))
    assert torch.equal(
        state.mean_square(method) >= state.average(method).square(), torch.ones(37).bool()
    )


def test_without_kernels_the_definition_runs_and_says_so(monkeypatch):
    from swalp.quantize import dispatch

    monkeypatch.setattr(plans, "available", False)
    dispatch.warn_once.cache_clear()
    problem = softmax()
    with pytest.warns(dispatch.SlowQuantizationWarning):
        state = run(problem, METHODS["fixed"], draws_of(problem, 4, 2), [2])
    assert torch.equal(state.weight * 64, (state.weight * 64).round())


def test_rows_that_are_not_there_are_refused():
    problem = least_squares()
    state = engine.begin(torch.zeros(problem.shape))
    with pytest.raises(ValueError, match="outside the 50"):
        engine.descend(problem, METHODS["float"], state, torch.tensor([50]), 1)
    with pytest.raises(ValueError, match="each of the 2 steps"):
        engine.descend(problem, METHODS["float"], state, torch.tensor([5]), 2)


def test_a_step_goes_down_the_gradient_of_autograd():
    linear, logistic = least_squares(), softmax()
    w = torch.linspace(-1, 1, 37).requires_grad_()
    ((linear.x[7] @ w - linear.y[7]) ** 2 / 2).backward()
    moved = definition.least_squares_moved(linear, w.detach(), 7, 0.1)
    torch.testing.assert_close(moved, w.detach() - 0.1 * w.grad)

    rows = torch.tensor([3, 1, 4, 1])
    w = torch.linspace(-1, 1, 33).reshape(11, 3).requires_grad_()
    loss = torch.nn.functional.cross_entropy(logistic.x[rows] @ w, logistic.y[rows])
    (loss + logistic.l2 / 2 * w.square().sum()).backward()
    moved = definition.softmax_moved(logistic, w.detach(), rows, 0.1)
    torch.testing.assert_close(moved, w.detach() - 0.1 * w.grad)


def test_exp_is_right_to_two_units_in_the_last_place():
    x = torch.cat(
        [-torch.rand(100_000, generator=torch.Generator().manual_seed(1)) * 88, torch.zeros(1)]
    )
    exact = torch.exp(x.double().clamp(min=definition.LOWEST))
    assert ((definition.exp(x) - exact).abs() / exact).max() < 2 * 2.0**-23
    assert definition.exp(torch.zeros(1)).item() == 1


def test_the_noise_of_scalars_is_normal():
    table = problems.gaussian_table(2.0).double()
    assert table.sum() == 0
    assert table.square().mean().item() == pytest.approx(4, rel=1e-6)
    assert (table**4).mean().item() == pytest.approx(3 * 16, rel=2e-3)
    assert (table.abs() < 2).double().mean().item() == pytest.approx(0.682689, abs=1e-4)
