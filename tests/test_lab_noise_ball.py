"""The noise-ball claim, small: stationary values against theory, factors per bit, verdicts."""

import dataclasses
import math

import pytest

from swalp.lab.claim import Context, pick
from swalp.lab.claims import noise_ball as claim

SMALL = dataclasses.replace(
    claim.CLAIM.quick,
    frac_bits=(3, 4, 5),
    swept_rates=(1 / 32,),
    copies=256,
    steps=100_000,
    seeds=2,
)
CONTEXT = Context(None, False, lambda done, total: None, lambda: False, 2)


@pytest.fixture(scope="module")
def rows():
    return claim.run(SMALL, CONTEXT)


def test_it_holds_on_a_small_scale(rows):
    verdict = claim.verdict(SMALL, rows)
    assert verdict.holds, verdict.sentence
    assert len(rows) == SMALL.seeds * (2 * 3 * 2 + 1 + 2 * 3)
    assert claim.run(SMALL, CONTEXT) == rows
    assert "δ/32" in claim.table(SMALL, rows)
    assert len(claim.plot(SMALL, rows).axes) == 3


def test_the_average_is_unbiased_on_the_quadratic_and_only_there(rows):
    for bits in SMALL.frac_bits:
        wanted = {"frac_bits": bits, "rate_in_gaps": 1.0, "method": "SGD-LP"}
        bias, error = claim.squared_bias(SMALL, rows, function="quadratic", **wanted)
        assert abs(bias) < 16 * error**2
        bias, error = claim.squared_bias(SMALL, rows, function="skewed", **wanted)
        assert bias > 100 * error**2


def test_iterates_settle_where_the_noise_of_gradient_and_rounding_put_them(rows):
    # E w**2 = (rate**2 sigma**2 + E q**2) / (2 rate - rate**2), with gap**2 / 6 of rounding noise
    # where the move is spread over many gaps; at rate = gap it is at most gap**2 / 4.
    for row in pick(rows, function="quadratic", rate_in_gaps=1.0):
        gap = row["gap"]
        low, high = (gap**2 * (1 + noise) / (2 * gap - gap**2) for noise in (0, 1 / 4))
        assert low < row["mean_square"] < high


def test_verdicts_are_computed_from_rows():
    def row(kind, bits, rate, square, bias, method="SGD-LP"):
        known = {"function": kind, "frac_bits": bits, "gap": 2.0**-bits, "rate_in_gaps": rate}
        known |= {"method": method, "mean_square": square}
        return {**known, "average_mean": bias, "average_variance": 0.0}

    def rows(power, ratio, of_the_rate=0.01):
        made = [row("quadratic", 4, rate, ratio / 16, 0) for rate in (1.0, 1 / 32)]
        for b in SMALL.frac_bits:
            made += [
                row("quadratic", b, 1 / 16, 0.4 * 2.0**-b, 0),
                row("skewed", b, 1 / 16, 0.4 * 2.0**-b, 2.0 ** (power * b)),
                row("quadratic", b, 1 / 16, of_the_rate * 0.4 * 2.0**-b, 0, "SGD"),
                row("skewed", b, 1 / 16, of_the_rate * 0.4 * 2.0**-b, 0.1 * 2.0**-b, "SGD"),
            ]
        return made

    assert claim.verdict(SMALL, rows(-1, claim.LIMIT)).holds
    assert "by 0.250 (expected: 1/4)" in claim.verdict(SMALL, rows(-1, claim.LIMIT)).sentence
    assert not claim.verdict(SMALL, rows(-0.5, claim.LIMIT)).holds
    assert not claim.verdict(SMALL, rows(-1, 0.3)).holds
    # As much without quantization: it would be of the rate, which shrinks with the gap.
    assert not claim.verdict(SMALL, rows(-1, claim.LIMIT, of_the_rate=1.0)).holds
    assert math.isclose(claim.LIMIT, 0.3989422804)
