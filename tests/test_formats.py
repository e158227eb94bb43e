"""Formats are frozen values that know their own numbers."""

import dataclasses
import math

import pytest
import torch

from oracle import finite_magnitudes
from strategies import FORMATS
from swalp import Binary, BlockFloat, FixedPoint, Microscaling, Minifloat
from swalp.formats import NAMED

LISTED = [fmt for fmt in FORMATS if fmt.bits <= 12]


@pytest.mark.parametrize(
    ("name", "largest", "smallest", "gap", "bits", "finite"),
    [
        ("fp16", 65504.0, 2.0**-24, 2.0**-10, 16, 2 * 31 * 1024 - 1),
        ("bf16", 3.3895313892515355e38, 2.0**-133, 2.0**-7, 16, 2 * 255 * 128 - 1),
        ("e6m9", (2 - 2.0**-9) * 2.0**31, 2.0**-39, 2.0**-9, 16, 2 * 63 * 512 - 1),
        ("e5m2", 57344.0, 2.0**-16, 0.25, 8, 2 * 31 * 4 - 1),
        ("e4m3fn", 448.0, 2.0**-9, 0.125, 8, 2 * 127 - 1),
        ("e3m2", 28.0, 0.0625, 0.25, 6, 63),
        ("e2m3", 7.5, 0.125, 0.125, 6, 63),
        ("e2m1", 6.0, 0.5, 0.5, 4, 15),
        ("e3m0", 16.0, 0.25, 1.0, 4, 15),
        ("e8m0", 2.0**127, 2.0**-127, 1.0, 8, 255),
        ("ternary", 1.0, 1.0, 1.0, 2, 3),
        ("binary", 1.0, 1.0, 2.0, 1, 2),
        ("mxfp8_e5m2", 57344.0 * 2.0**127, 2.0**-16 * 2.0**-127, 0.25, 8, 2 * 31 * 4 - 1),
        ("mxfp8_e4m3", 448.0 * 2.0**127, 2.0**-9 * 2.0**-127, 0.125, 8, 2 * 127 - 1),
        ("mxfp6_e3m2", 28.0 * 2.0**127, 2.0**-4 * 2.0**-127, 0.25, 6, 63),
        ("mxfp6_e2m3", 7.5 * 2.0**127, 2.0**-3 * 2.0**-127, 0.125, 6, 63),
        ("mxfp4_e2m1", 6.0 * 2.0**127, 2.0**-1 * 2.0**-127, 0.5, 4, 15),
        ("mxint8", 127 / 64 * 2.0**127, 2.0**-6 * 2.0**-127, 2.0**-6, 8, 255),
    ],
)
def test_named_formats_have_the_numbers_of_their_standards(
    name, largest, smallest, gap, bits, finite
):
    fmt = NAMED[name]
    assert (fmt.largest, fmt.smallest, fmt.gap, fmt.bits) == (largest, smallest, gap, bits)
    assert fmt.num_codes == 2**bits
    assert len(fmt.values()) == finite


def test_every_named_format_is_in_the_list_above():
    assert len(NAMED) == 18


@pytest.mark.parametrize("fmt", LISTED, ids=str)
def test_values_ascend_and_agree_with_the_facts(fmt):
    values = fmt.values()
    assert values.dtype == torch.float64
    assert bool((values.diff() > 0).all())
    assert len(values) <= fmt.num_codes
    positive = values[values > 0]
    scale, low_scale = 1.0, 1.0  # values() are those of a block with exponent 0
    if isinstance(fmt, BlockFloat):
        scale, low_scale = 2.0**fmt.max_exponent, 2.0**fmt.min_exponent
    elif isinstance(fmt, Microscaling):
        scale = 2.0 ** (127 + fmt.element_exponent)
        low_scale = 2.0 ** (fmt.element_exponent - 127)
    assert values.abs().max().item() * scale == fmt.largest
    assert positive.min().item() * low_scale == fmt.smallest
    low = 2.0**fmt.min_exponent if isinstance(fmt, Minifloat) else 1.0
    in_binade = values[(values >= low) & (values <= 2 * low)]
    if len(in_binade) > 1:
        assert in_binade.diff().unique().tolist() == [fmt.gap * low]


@pytest.mark.parametrize("fmt", [f for f in LISTED if isinstance(f, Minifloat)], ids=str)
def test_minifloat_values_are_the_decoded_codes(fmt):
    magnitudes = [float(value) for value, _ in finite_magnitudes(fmt)]
    negative = [-value for value in magnitudes if value > 0] if fmt.signed else []
    assert fmt.values().tolist() == sorted(negative + magnitudes)


def test_integer_formats_list_their_integers():
    assert FixedPoint(3, 1).values().tolist() == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5]
    assert FixedPoint(3, 1, symmetric=True).values().tolist() == [
        -1.5, -1, -0.5, 0, 0.5, 1, 1.5,
    ]  # fmt: skip
    assert BlockFloat(3).values().tolist() == [-1.5, -1, -0.5, 0, 0.5, 1, 1.5]
    assert BlockFloat(3, symmetric=False).values().tolist()[0] == -2
    assert NAMED["ternary"].values().tolist() == [-1, 0, 1]
    assert Binary(1).values().tolist() == [-0.5, 0.5]


def test_extremes_beyond_float64_are_told_and_not_raised():
    assert BlockFloat(8, exponent_bits=11).largest == math.ldexp(127, 1023 - 6)
    assert BlockFloat(8, exponent_bits=11, symmetric=False).largest == math.inf
    assert BlockFloat(53, exponent_bits=11).smallest == 0.0


def test_fnuz_formats_have_one_binade_more_at_the_bottom():
    assert Minifloat(4, 3, specials="fnuz").bias == 8
    assert Minifloat(5, 2, specials="fnuz").bias == 16
    assert Minifloat(4, 3, specials="fn").bias == 7


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_formats_are_frozen_hashable_values(fmt):
    field = dataclasses.fields(fmt)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(fmt, field, 3)
    again = dataclasses.replace(fmt)
    assert again == fmt
    assert hash(again) == hash(fmt)


def test_formats_differ_where_a_field_does():
    assert len(set(FORMATS)) == len(FORMATS)
    assert BlockFloat(8, tile=4) == BlockFloat(8, tile=(4,))
    assert BlockFloat(8, axes=[0, 1]) == BlockFloat(8, axes=(0, 1))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: FixedPoint(1, 0), ValueError, "word_length=1 must be 2..53"),
        (lambda: FixedPoint(54, 0), ValueError, "word_length=54 must be 2..53"),
        (lambda: FixedPoint(8.0, 0), TypeError, "word_length must be an int, not 8.0"),
        (lambda: FixedPoint(True, 0), TypeError, "word_length must be an int, not True"),
        (lambda: FixedPoint(8, 901), ValueError, "frac_bits=901 must be -900..900"),
        (lambda: FixedPoint(8, 0, symmetric=1), TypeError, "symmetric must be True or False"),
        (lambda: BlockFloat(1), ValueError, "word_length=1 must be 2..53"),
        (lambda: BlockFloat(8, exponent_bits=12), ValueError, "exponent_bits=12 must be 2..11"),
        (lambda: BlockFloat(8, symmetric=None), TypeError, "symmetric must be True or False"),
        (lambda: BlockFloat(8, axes=()), TypeError, "non-empty tuple of ints such as"),
        (lambda: BlockFloat(8, axes=0), TypeError, "non-empty tuple of ints such as"),
        (lambda: BlockFloat(8, axes=(0, 0)), ValueError, "names an axis twice"),
        (lambda: BlockFloat(8, axes=(0, 64)), ValueError, "axes=64 must be -64..63"),
        (lambda: BlockFloat(8, tile=0), ValueError, "tile=0 must be 1.."),
        (lambda: BlockFloat(8, tile=()), TypeError, "an int or a tuple of ints"),
        (lambda: BlockFloat(8, tile="8"), TypeError, "an int or a tuple of ints"),
        (lambda: BlockFloat(8, axes=(0, 1), tile=8), ValueError, "one axis for each extent"),
        (lambda: Minifloat(0, 3), ValueError, "exponent_bits=0 must be 1..11"),
        (lambda: Minifloat(4, 53), ValueError, "mantissa_bits=53 must be 0..52"),
        (lambda: Minifloat(4, 3, specials="nan"), ValueError, "'ieee', 'fn', 'fnuz' or 'finite'"),
        (lambda: Minifloat(4, 3, signed=2), TypeError, "signed must be True or False"),
        (lambda: Minifloat(4, 3, bias=2000), ValueError, "bias=2000 must be -900..1100"),
        (lambda: Minifloat(8, 3, bias=-800), ValueError, "use another bias"),
        (lambda: Minifloat(4, 3, bias=1100), ValueError, r"reach from 2\*\*-1102"),
        (lambda: Minifloat(1, 3), ValueError, "takes the only exponent field for normal numbers"),
        (lambda: Minifloat(1, 0, specials="fn"), ValueError, "use specials='finite'"),
        (
            lambda: Minifloat(2, 1, specials="finite", saturating=False),
            ValueError, "neither infinity nor NaN to overflow into",
        ),
        (
            lambda: Minifloat(4, 3, specials="fnuz", signed=False),
            ValueError, "puts NaN in the place of -0",
        ),
        (lambda: Microscaling(BlockFloat(8)), TypeError, "a Minifloat or a FixedPoint"),
        (
            lambda: Microscaling(Minifloat(4, 3, saturating=False)),
            ValueError, "must be signed, saturating and have a zero",
        ),
        (lambda: Microscaling(NAMED["e8m0"]), ValueError, "must be signed, saturating and have"),
        (lambda: Microscaling(NAMED["e2m1"], tile=0), ValueError, "tile=0 must be 1.."),
        (lambda: Microscaling(NAMED["e2m1"], axis=64), ValueError, "axis=64 must be -64..63"),
        (lambda: Binary(1000), ValueError, "frac_bits=1000 must be -900..900"),
        (lambda: FixedPoint(25, 0).values(), ValueError, "lists those of up to 24 bits"),
        (lambda: Minifloat(8, 23).values(), ValueError, r"e8m23 has 2\*\*32 codes"),
    ],
)  # fmt: skip
def test_impossible_formats_are_refused_in_one_clear_line(make, error, text):
    with pytest.raises(error, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)
