"""The rules: values, and what their rounding adds up to."""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch

from strategies import FORMATS, ROUNDINGS, carriers, is_binary, reaches_zero, rules
from swalp import (
    Binary,
    FixedPoint,
    Nearest,
    Stochastic,
    TowardNegative,
    TowardPositive,
    TowardZero,
    quantize,
)
from swalp.noise import random_bits, stream_seed


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Nearest(), "nearest"),
        (TowardZero(), "toward-zero"),
        (TowardPositive(), "toward-positive"),
        (TowardNegative(), "toward-negative"),
        (Stochastic(3), "stochastic32"),
        (Stochastic(3, random_bits=16), "stochastic16"),
    ],
)
def test_rules_print(rule, text):
    assert str(rule) == text


def test_rules_are_frozen_hashable_values():
    assert len(set(ROUNDINGS)) == len(ROUNDINGS)
    assert Stochastic(3) == Stochastic(3, random_bits=32, step=0, call=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Stochastic(3).seed = 4


def test_steps_and_streams():
    rule = Stochastic(3, random_bits=16)
    assert rule.at(5, 2) == Stochastic(3, random_bits=16, step=5, call=2)
    assert rule.stream("weight", "fc.weight") == Stochastic(
        stream_seed(3, "weight", "fc.weight"), random_bits=16
    )
    with pytest.raises(ValueError, match="no seed to derive the stream of weight 'w' from"):
        Stochastic().stream("weight", "w")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"seed": -1}, ValueError, "seed=-1 must be 0..18446744073709551615"),
        ({"seed": 2**64}, ValueError, "it is a 64-bit key"),
        ({"seed": 1.0}, TypeError, "seed must be an int, not 1.0"),
        ({"random_bits": 0}, ValueError, "random_bits=0 must be 1..32"),
        ({"random_bits": 33}, ValueError, "random_bits=33 must be 1..32"),
        ({"step": 2**32}, ValueError, "step=4294967296 must be 0..4294967295"),
        ({"call": -1}, ValueError, "call=-1 must be 0..4294967295"),
    ],
)
def test_impossible_rules_are_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        Stochastic(**arguments)


def test_four_rules_on_a_line():
    x = torch.tensor([-1.5, -1.25, -0.75, -0.5, 0.25, 0.5, 1.5, 1.75])
    grid = FixedPoint(8, 0)
    assert quantize(x, grid).tolist() == [-2, -1, -1, 0, 0, 0, 2, 2]
    assert quantize(x, grid, TowardZero()).tolist() == [-1, -1, 0, 0, 0, 0, 1, 1]
    assert quantize(x, grid, TowardPositive()).tolist() == [-1, -1, 0, 0, 1, 1, 2, 2]
    assert quantize(x, grid, TowardNegative()).tolist() == [-2, -2, -1, -1, 0, 0, 1, 1]


@pytest.mark.parametrize("seed", [0, 2**40 + 1])
@pytest.mark.parametrize("bits", [1, 2, 8, 16, 24, 32])
def test_the_mean_is_right_within_the_binomial(bits, seed):
    count = 40_000
    for share in (0.5, 0.25, 1 / 3, 0.9):
        x = torch.full((count,), 3 + share)
        share = x[0].item() - 3
        ups = (quantize(x, FixedPoint(8, 0), Stochastic(seed, random_bits=bits)) - 3).sum().item()
        deviation = math.sqrt(count * share * (1 - share))
        assert abs(ups - count * share) <= 5 * deviation + count * 2.0 ** -(bits + 1)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_bias_is_at_most_half_a_random_step(bits, sign):
    # One element for each of the 2**bits draws: the mean over them is the expectation, exactly.
    rule = Stochastic(11, random_bits=bits)
    draws = random_bits(64 << bits, bits, 11, 0, 0)
    places = [int((draws == u).nonzero()[0]) for u in range(1 << bits)]
    bound = Fraction(1, 2 ** (bits + 1))
    worst = Fraction(0)
    for share in [k / 256 for k in range(257)] + [1 / 3, 1e-7, 2.0 ** -(bits + 1)]:
        x = torch.full((64 << bits,), sign * (2 + share), dtype=torch.float64)
        rounded = quantize(x, FixedPoint(8, 0), rule)[places].tolist()
        mean = sum(map(Fraction, rounded)) / len(places)
        worst = max(worst, abs(mean - Fraction(x[0].item())))
        assert abs(mean - Fraction(x[0].item())) <= bound
    assert worst == bound  # half way between two draws the bound is met


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_the_bias_of_a_binary_format_is_as_small(bits):
    draws = random_bits(64 << bits, bits, 11, 0, 0)
    places = [int((draws == u).nonzero()[0]) for u in range(1 << bits)]
    bound = Fraction(Binary().gap) / 2 ** (bits + 1)
    worst = Fraction(0)
    for share in [k / 256 for k in range(-256, 257)] + [1 / 3, -1e-7]:
        x = torch.full((64 << bits,), share, dtype=torch.float64)
        rounded = quantize(x, Binary(), Stochastic(11, random_bits=bits))[places].tolist()
        error = abs(sum(map(Fraction, rounded)) / len(places) - Fraction(share))
        worst = max(worst, error)
        assert error <= bound
    assert worst == bound or bits == 8  # a grid of 1/256 meets no half of a draw


def test_an_update_below_half_a_random_step_never_happens():
    x = 1 + torch.full((20_000,), 2.0**-12)
    assert quantize(x, FixedPoint(8, 0), Stochastic(0, random_bits=11)).unique().tolist() == [1]
    assert quantize(x, FixedPoint(8, 0), Stochastic(0, random_bits=12)).unique().tolist() == [1, 2]


@pytest.mark.parametrize("bits", [3, 8, 32])
def test_binary_rounds_stochastically_by_the_hard_sigmoid(bits):
    count = 40_000
    for x in (0.0, 0.5, -0.75, 0.99):
        positive = quantize(torch.full((count,), x), Binary(), Stochastic(4, random_bits=bits)) > 0
        probability = (torch.tensor(x).item() + 1) / 2
        deviation = math.sqrt(count * probability * (1 - probability))
        error = abs(positive.sum().item() - count * probability)
        assert error <= 5 * deviation + count * 2.0 ** -(bits + 1)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_stochastic_gives_one_of_the_two_neighbours(fmt):
    dtype = carriers(fmt)[0]
    x = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    above, below = quantize(x, fmt, TowardPositive()), quantize(x, fmt, TowardNegative())
    drawn = quantize(x, fmt, Stochastic(8))
    known = ~drawn.isnan()
    assert bool(((drawn == above) | (drawn == below))[known].all())
    if not is_binary(fmt) and reaches_zero(fmt):
        inward = quantize(x, fmt, TowardZero())
        assert torch.equal(inward[known], torch.where(x > 0, below, above)[known])


def test_one_list_of_rules_covers_all():
    assert {type(rule) for rule in ROUNDINGS} == {
        Nearest, TowardZero, TowardPositive, TowardNegative, Stochastic,
    }  # fmt: skip
    assert TowardZero() not in rules(Binary())
