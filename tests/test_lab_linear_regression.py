"""The linear-regression claim, small: rows, the numbers made of them, verdicts both ways."""

import dataclasses
import math

import pytest
import torch

from swalp.lab import housing
from swalp.lab.claim import Context, pick
from swalp.lab.claims import linear_regression as claim
from swalp.training.mistakes import UserError

SMALL = dataclasses.replace(
    claim.SYNTHETIC.quick,
    features=16,
    examples=256,
    learning_rate=1e-2,
    steps=200_000,
    warmup_steps=2_000,
    judged_at=200_000,
    seeds=3,
)
CONTEXT = Context(None, False, lambda done, total: None, lambda: False, 2)


@pytest.fixture(scope="module")
def rows():
    return claim.run(SMALL, CONTEXT)


def test_rows_are_a_function_of_the_settings(rows):
    alone = Context(None, False, lambda done, total: None, lambda: False, 1)
    assert claim.run(SMALL, alone) == rows
    fewer = claim.run(dataclasses.replace(SMALL, seeds=1), CONTEXT)
    assert fewer == [row for row in rows if row.get("seed") in (None, 0)]


def test_every_method_is_recorded_at_the_steps_that_count(rows):
    for method in claim.METHODS:
        for step in (SMALL.warmup_steps + 1, SMALL.judged_at):
            assert len(pick(rows, method=method, step=step)) == SMALL.seeds
    assert not pick(rows, method="SWALP", step=SMALL.warmup_steps)
    assert pick(rows, method="SWALP", step=SMALL.steps)[0]["averaged"] == 198_000


def test_the_optimum_and_the_nearest_point_are_right(rows):
    problem = claim.synthetic(SMALL)
    known = claim.exact(problem)
    gradient = problem.x.double().T @ (problem.x.double() @ known.optimum - problem.y.double())
    assert gradient.abs().max() < 1e-9
    on_grid = (known.optimum * 64).round() / 64
    facts = rows[0]
    assert facts["nearest_representable"] == pytest.approx(known.squared_distance(on_grid))
    w = torch.zeros(16)
    each = (problem.x @ w - problem.y)[:, None].double() * problem.x.double()
    variance = (each - each.mean(0)).square().sum(1).mean().item()
    assert known.gradient_variance(w) == pytest.approx(variance)


def test_the_slope_and_the_bound_are_computed_from_rows():
    rows = [{"method": "problem", "smallest_curvature": 0.5, "features": 16, "nearest": 0}]
    for n in (10, 100, 1000):
        rows.append({"method": "SWALP", "averaged": n, "step": n, "squared_distance": 3 / n})
    assert claim.slope(rows) == (pytest.approx(-1), 0.0)
    more = [row | {"squared_distance": 4.0 / row["averaged"] ** 1.2} for row in rows[1:]]
    fitted, error = claim.slope([*rows, *more])  # of two seeds that leaves one each
    assert -1.2 < fitted < -1
    assert error == pytest.approx(0.1)
    for step, variance in ((1, 99.0), (SMALL.warmup_steps, 2.0), (SMALL.steps, 4.0)):
        found = {"method": "SGD-LP", "step": step, "gradient_variance": variance}
        rows.append({**found, "squared_distance": 7.0})
    contraction = (1e-2 * 0.5) ** 2
    expected = 7 / (contraction * 100) + (1e-4 * 4 + 2**-12 * 16 / 4) / (contraction * 10)
    assert claim.bound(SMALL, rows)(10) == pytest.approx(expected)


def test_the_verdict_holds_here_and_not_with_a_biased_average(rows):
    verdict = claim.verdict(SMALL, rows)
    assert verdict.holds, verdict.sentence
    assert "200,000 steps" in verdict.sentence
    worse = [row | {"squared_distance": 0.1} if row["method"] == "SWALP" else row for row in rows]
    assert not claim.verdict(SMALL, worse).holds
    table = claim.table(SMALL, rows)
    assert "| 200,000 |" in table
    assert claim.plot(SMALL, rows).axes[0].get_xscale() == "log"


def test_settings_of_the_paper():
    for settings in (claim.SYNTHETIC.full, claim.SYNTHETIC.quick):
        assert (settings.features, settings.word_length, settings.frac_bits) == (256, 8, 6)
        assert settings.judged_at == 3_000_000
        assert settings.judged_at in claim.recorded_steps(settings)
        assert claim.recorded_steps(settings)[-1] == settings.steps
        assert math.isclose(settings.format.gap, 2**-6)


def test_housing_needs_the_published_file(tmp_path, monkeypatch):
    monkeypatch.setattr(housing, "cache_dir", lambda: tmp_path / "nowhere")
    with pytest.raises(UserError, match="give --data-dir DIR or --download"):
        housing.load(None)
    (tmp_path / housing.FILE).write_text("longitude\n")
    with pytest.raises(UserError, match="not the published"):
        housing.load(tmp_path)
