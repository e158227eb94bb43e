import math

import pytest
import torch

import swalp
from swalp.quantize.error import RoundingError, gaps, rounding_error
from swalp.rounding import Nearest, Stochastic


def test_by_hand():
    fmt = swalp.FixedPoint(4, 2)  # -2 … 1.75 in quarters
    x = torch.tensor([0.0, 0.1, 0.3, -2.5, 5.0, math.inf, math.nan])
    found = rounding_error(x, swalp.quantize(x, fmt), fmt)
    errors = [0.0, 0.1, 0.05, 0.5, 3.25]
    assert found.elements == 5
    assert found.relative == pytest.approx(
        math.hypot(*errors) / math.hypot(0.1, 0.3, 2.5, 5.0), rel=1e-6
    )
    assert found.in_gaps == pytest.approx(math.hypot(*errors) / 0.25 / 5**0.5, rel=1e-6)
    assert found.saturated == 2 / 5
    assert found.underflowed == 1 / 4
    assert (found.smallest_gap, found.largest_gap) == (0.25, 0.25)


@pytest.mark.parametrize(
    "name",
    [
        "bfp8",
        "bfp6[0]",
        "bfp4/8",
        "e4m3fn",
        "e2m1",
        "mxint8",
        "mxfp4_e2m1",
        "mxfp8_e4m3",
        "e3m2-nosub",
    ],
)
def test_gaps_are_the_distance_of_the_neighbours(name):
    fmt = swalp.parse_format(name)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[1e-3], [1.0], [3.0], [40.0]]
    )
    below = swalp.quantize(x, fmt, swalp.TowardNegative())
    above = swalp.quantize(x, fmt, swalp.TowardPositive())
    between = above > below
    assert between.sum() > 60
    assert torch.equal(gaps(x, fmt)[between], (above - below)[between].double())


@pytest.mark.parametrize(
    ("rule", "expected"), [(Nearest(), 12**-0.5), (Stochastic(3), 6**-0.5)], ids=str
)
def test_evenly_spread_numbers_err_by_a_known_part_of_the_gap(rule, expected):
    fmt = swalp.FixedPoint(16, 6)
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(2))
    found = rounding_error(x, swalp.quantize(x, fmt, rule), fmt)
    assert found.in_gaps == pytest.approx(expected, rel=0.02)
    assert found.saturated == 0


def test_nothing_and_zeros():
    fmt = swalp.BlockFloat(8)
    for x in (torch.zeros(0), torch.zeros(3)):
        assert rounding_error(x, x, fmt) == RoundingError(x.numel(), 0, 0, 0, 0, 0, 0)


def test_numbers_whose_squares_are_beyond_float64():
    fmt = swalp.FixedPoint(12, 2)
    for unit in (2.0**1000, 2.0**-1000):
        x = torch.tensor([3.0, 4.0], dtype=torch.float64) * unit
        found = rounding_error(x, x + torch.tensor([0.0, 0.5], dtype=torch.float64) * unit, fmt)
        assert found.relative == 0.1
        assert found.in_gaps == pytest.approx(unit * 2 / 2**0.5)


def test_values_of_the_format_do_not_err():
    for name in ("bfp8", "e5m2", "binary", "mxfp6_e3m2"):
        fmt = swalp.parse_format(name)
        x = torch.tensor([1.5, -1.0, 0.25, 0.75] * 8) if name != "binary" else torch.ones(3)
        x = swalp.quantize(x, fmt)
        found = rounding_error(x, x, fmt)
        assert (found.relative, found.in_gaps, found.saturated) == (0, 0, 0)
