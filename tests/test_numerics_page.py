"""docs/numerics.md: its examples, and what it says the short ways get wrong."""

import doctest
from pathlib import Path

import torch

from swalp import BlockFloat, FixedPoint, Minifloat, Stochastic, parse_format, quantize
from swalp.quantize import reference

PAGE = Path(__file__).parents[1] / "docs" / "numerics.md"


def test_the_examples_give_what_the_page_shows():
    results = doctest.testfile(str(PAGE), module_relative=False)
    assert results.attempted >= 6
    assert results.failed == 0


def test_every_format_the_page_writes_can_be_written():
    assert BlockFloat(8, tile=(16, 16)).tile == (16, 16)
    assert parse_format("mxint8").element.symmetric
    assert not FixedPoint(8, 6).symmetric
    assert Minifloat(4, 3, specials="fnuz").bias == Minifloat(4, 3).bias + 1


def test_log2_in_float32_misses_the_exponent_below_a_power_of_two():
    x = torch.tensor([8 - 2.0**-21])
    assert x.log2().floor().item() == 3
    assert reference.shared_exponents(x, BlockFloat(8)).item() == 2


def test_the_published_formula_makes_a_block_of_zeros_nan():
    zeros = torch.zeros(4)
    exponent = zeros.abs().max().log2().floor().clamp(-128, 127)
    scale = 2.0 ** (-exponent + 6)
    published = (zeros * scale).floor().clamp(-128, 127) / scale
    assert bool(published.isnan().all())
    assert quantize(zeros, BlockFloat(8)).tolist() == [0, 0, 0, 0]


def test_adding_the_noise_first_moves_representable_values():
    # 127 + u rounds up to 128 once u comes within half an ulp of 127 of 1.
    draws = 1 - torch.arange(1, 9) * 2.0**-20
    u = torch.cat([draws, torch.tensor([1 - 2.0**-24])])
    x = torch.full_like(u, 127.0)
    assert (x + u).floor().max().item() == 128
    assert quantize(x.repeat(1000), FixedPoint(9, 0), Stochastic(0)).unique().tolist() == [127]
