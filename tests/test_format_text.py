"""Every format prints as a short string that reads back as the same value."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import FORMATS, block_floats, fixed_points, microscalings, minifloats, shapes
from swalp import Binary, BlockFloat, FixedPoint, Microscaling, Minifloat, parse_format
from swalp.formats import NAMED


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_listed_formats_read_back(fmt):
    assert parse_format(str(fmt)) == fmt


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        fixed_points(),
        minifloats(30),
        shapes().flatmap(block_floats),
        shapes().filter(len).flatmap(microscalings),
        st.builds(Binary, st.integers(-900, 900)),
    )
)
def test_any_format_reads_back(fmt):
    text = str(fmt)
    assert parse_format(text) == fmt
    assert " " not in text
    assert len(text) <= 40


@pytest.mark.parametrize(
    ("fmt", "text"),
    [
        (FixedPoint(8, 6), "fixed8.6"),
        (FixedPoint(8, -2, symmetric=True), "fixed8.-2s"),
        (FixedPoint(2, 0, symmetric=True), "ternary"),
        (BlockFloat(8), "bfp8"),
        (BlockFloat(8, axes=(0,)), "bfp8[0]"),
        (BlockFloat(8, axes=(0, -1), symmetric=False), "bfp8t[0,-1]"),
        (BlockFloat(6, tile=32, exponent_bits=5), "bfp6e5/32"),
        (BlockFloat(8, tile=(16, 16)), "bfp8/16x16"),
        (BlockFloat(8, axes=(1,), tile=4), "bfp8[1]/4"),
        (Minifloat(4, 3, specials="fn"), "e4m3fn"),
        (Minifloat(4, 3, specials="fn", saturating=False), "e4m3fn-inf"),
        (Minifloat(4, 3, specials="fnuz"), "e4m3fnuz"),
        (Minifloat(4, 3, specials="fnuz", bias=11), "e4m3fnuzb11"),
        (Minifloat(4, 3), "e4m3"),
        (Minifloat(3, 2), "e3m2ieee"),  # e3m2 is the finite one of OCP
        (Minifloat(3, 2, specials="finite"), "e3m2"),
        (Minifloat(5, 2), "e5m2"),
        (Minifloat(5, 2, saturating=False), "e5m2-inf"),
        (Minifloat(2, 1, saturating=False), "e2m1ieee-inf"),
        (Minifloat(5, 3, subnormals=False), "e5m3-nosub"),
        (Minifloat(5, 3, signed=False, bias=-4), "ue5m3b-4"),
        (Minifloat(5, 10), "fp16"),
        (Microscaling(Minifloat(2, 1, specials="finite")), "mxfp4_e2m1"),
        (Microscaling(Minifloat(2, 1, specials="finite"), tile=16, axis=0), "mxfp4_e2m1[0]/16"),
        (Microscaling(FixedPoint(4, 2, symmetric=True)), "mx_fixed4.2s"),
        (Microscaling(Minifloat(3, 3), axis=1), "mx_e3m3[1]"),
        (Binary(), "binary"),
        (Binary(-2), "binary.-2"),
    ],
)
def test_short_strings(fmt, text):
    assert str(fmt) == text
    assert parse_format(text) == fmt


def test_names_also_have_a_systematic_spelling():
    assert parse_format("e5m10") == NAMED["fp16"]
    assert parse_format("e8m7") == NAMED["bf16"]
    assert parse_format("e3m2finite") == NAMED["e3m2"]
    assert parse_format("mx_e4m3fn") == NAMED["mxfp8_e4m3"]
    assert parse_format("fixed2.0s") == NAMED["ternary"]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("e4m3f", "did you mean e4m3fn"),
        ("mxfp8-e4m3", "did you mean mxfp8_e4m3"),
        ("ternery", "did you mean ternary"),
        ("float16", "examples: fixed8.6, bfp8, "),
        ("", "examples: fixed8.6, bfp8, "),
        ("bfp8[]", "did you mean bfp8"),
        ("bfp8/", "did you mean bfp8"),
        ("fixed8", "did you mean fixed8.6"),
        (" bfp8", "did you mean bfp8"),
        ("mx_binary", "unknown format 'mx_binary'"),
        ("mx_bfp8", "unknown format 'mx_bfp8'"),
        ("bfp\u0668", "did you mean bfp8"),  # a digit, but not one of ours
        ("fixed" + "9" * 5000 + ".0", "examples: fixed8.6"),
    ],
)
def test_unknown_strings_name_the_nearest_formats(text, hint):
    with pytest.raises(ValueError, match=f"unknown format {text!r}".replace("[", r"\[")) as caught:
        parse_format(text)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bfp99", "BlockFloat: word_length=99 must be 2..53"),
        ("fixed1.0", "FixedPoint: word_length=1 must be 2..53"),
        ("e12m3", "Minifloat: exponent_bits=12 must be 1..11"),
        ("e2m1finite-inf", "neither infinity nor NaN to overflow into"),
        ("bfp8[0,1]/4", "tile=\\(4,\\) runs along 1 axes"),
        ("mx_e4m3fn-inf", "must be signed, saturating"),
    ],
)
def test_well_formed_strings_of_impossible_formats_say_why(text, message):
    with pytest.raises(ValueError, match=message):
        parse_format(text)


def test_only_strings_are_parsed():
    with pytest.raises(TypeError, match="must be a string such as 'bfp8'"):
        parse_format(BlockFloat(8))


def test_what_is_no_text_of_a_format():
    with pytest.raises(TypeError, match="must be a string"):
        parse_format(["bfp8"])
    with pytest.raises(ValueError, match="unknown format"):
        parse_format("mx_" * 3000 + "e2m1")
