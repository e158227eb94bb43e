"""Minifloats equal ml_dtypes and gfloat, MX blocks the OCP text; where they differ, exactly how."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import RoundMode, decode_float, decode_ndarray, round_float, round_ndarray

import oracle
from conformance import (
    FNUZ,
    GFLOAT,
    ML_DTYPES,
    MODES,
    compare_with_gfloat,
    compare_with_ml_dtypes,
    converted,
    differences,
    info,
    landmarks,
    ours,
    overflowing,
    patterns,
)
from strategies import same, ugly_tensor
from swalp import (
    FixedPoint,
    Microscaling,
    Minifloat,
    Nearest,
    Stochastic,
    TowardNegative,
    TowardPositive,
    TowardZero,
    quantize,
)
from swalp.formats import NAMED
from swalp.quantize import reference

E8M0 = NAMED["e8m0"]
COUNT = 200_000


def inputs(fmt) -> np.ndarray:
    """Random patterns, and all landmarks of the format."""
    return np.concatenate([patterns(COUNT, fmt.bits), landmarks(fmt)])


@pytest.mark.parametrize("fmt", [fmt for fmt in ML_DTYPES if fmt != E8M0], ids=str)
def test_nearest_equals_ml_dtypes(fmt):
    x = inputs(fmt)
    if fmt.specials == "finite":  # without a code for NaN, ml_dtypes makes it a zero: see below
        x = x[~np.isnan(x)]
    for unequal in compare_with_ml_dtypes(x, fmt).values():
        assert not unequal.any(), x[unequal]


@pytest.mark.parametrize("fmt", [fmt for fmt in GFLOAT if fmt != E8M0], ids=str)
def test_nearest_equals_gfloat(fmt):
    x = inputs(fmt)
    if fmt.specials == "finite":  # gfloat carries a NaN through, and so do we
        assert np.isnan(ours(x[np.isnan(x)], fmt)).all()
    for unequal in compare_with_gfloat(x, fmt).values():
        assert not unequal.any(), x[unequal]


@pytest.mark.parametrize("fmt", GFLOAT, ids=str)
def test_the_definition_is_what_was_compared(fmt):
    x = torch.from_numpy(np.concatenate([patterns(10_000, 2), landmarks(fmt)]))
    for rule in MODES:
        assert same(reference.quantize(x, fmt, rule), quantize(x, fmt, rule))


@pytest.mark.parametrize("rule", MODES, ids=str)
@pytest.mark.parametrize("fmt", [fmt for fmt in GFLOAT if fmt != E8M0 and fmt.bits <= 8], ids=str)
def test_directed_rules_equal_gfloat(fmt, rule):
    x = np.concatenate([patterns(10_000, 1), landmarks(fmt)])
    for unequal in compare_with_gfloat(x, fmt, rule).values():
        assert not unequal.any(), x[unequal]


@pytest.mark.parametrize("fmt", [fmt for fmt in ML_DTYPES if fmt.bits <= 8], ids=str)
def test_the_codes_of_all_three_mean_the_same_numbers(fmt):
    codes = np.arange(fmt.num_codes, dtype=np.uint8)
    theirs = codes.view(ML_DTYPES[fmt]).astype(np.float64)
    assert not differences(theirs, decode_ndarray(info(fmt), codes.astype(np.int64))).any()
    finite = np.unique(theirs[np.isfinite(theirs)])
    assert finite.tolist() == fmt.values().tolist()
    assert not differences(ours(theirs, fmt), np.clip(theirs, finite[0], finite[-1])).any()


# Where the libraries differ, and how exactly.


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2"])
def test_without_a_code_for_nan_ml_dtypes_makes_it_zero_and_we_keep_it(name):
    fmt = NAMED[name]
    nan = patterns(COUNT, 3)
    nan = nan[np.isnan(nan)]
    theirs = converted(nan, ML_DTYPES[fmt])
    assert len(nan) > 500
    assert (theirs == 0).all()
    assert (np.signbit(theirs) != np.signbit(nan)).all()  # with the sign turned round, even
    assert np.isnan(ours(nan, fmt)).all()


def test_e8m0_equals_ml_dtypes_but_for_zero_ties_and_the_lowest_binade():
    x = np.concatenate([patterns(COUNT, 4), landmarks(E8M0), np.float32([0.0, -0.0])])
    smallest = np.float32(2.0**-127)
    lowest_binade = (x > smallest) & (x < 2 * smallest)
    mantissa, exponent = np.frexp(np.where(np.isfinite(x), x, 1).astype(np.float64))
    tie_to_lower = (mantissa == 0.75) & (exponent % 2 == 0)  # 3 * 2**k between even and odd field
    known = (x == 0) | lowest_binade | (tie_to_lower & (x > 0))
    for kind, unequal in compare_with_ml_dtypes(x, E8M0).items():
        assert not (unequal & ~known).any(), (kind, x[unequal & ~known])

    theirs = converted(x, ML_DTYPES[E8M0])
    assert np.isnan(theirs[x == 0]).all()  # zero has no code: theirs is NaN, ours the smallest
    assert (ours(x, E8M0)[x == 0] == smallest).all()
    # float32 is subnormal there: theirs goes to the upper end from everywhere, ours to the nearer.
    assert (theirs[lowest_binade] == 2 * smallest).all()
    nearer = np.where(x <= 1.5 * smallest, smallest, 2 * smallest)
    assert (ours(x, E8M0)[lowest_binade] == nearer[lowest_binade]).all()
    # A tie goes up in theirs, to the even exponent field in ours.
    assert converted(np.float32([1.5, 3, 6, 12]), ML_DTYPES[E8M0]).tolist() == [2, 4, 8, 16]
    assert ours(np.float32([1.5, 3, 6, 12]), E8M0).tolist() == [2, 2, 8, 8]


def test_e8m0_equals_gfloat_where_gfloat_keeps_to_its_range():
    x = np.concatenate([patterns(COUNT, 5), landmarks(E8M0)])
    in_range = x >= np.float32(E8M0.smallest)
    for unequal in compare_with_gfloat(x[in_range | np.isnan(x)], E8M0).values():
        assert not unequal.any()
    # Below, gfloat goes on with powers of two that the format does not have, and with zero.
    assert round_float(info(E8M0), 2.0**-140, sat=True) == 2.0**-140
    assert round_float(info(E8M0), 0.0, sat=True) == 0.0
    assert ours(np.float32([2.0**-140, 0.0]), E8M0).tolist() == [E8M0.smallest] * 2
    assert np.isnan(ours(np.float32([-1.0, -0.5, -np.inf]), E8M0)).all()


def test_without_subnormals_gfloat_equals_ours_above_the_smallest_number():
    fmt = Minifloat(4, 3, subnormals=False)
    x = patterns(COUNT, 6)
    x = x[~(np.abs(x) < fmt.smallest)]
    for rule in MODES:
        for unequal in compare_with_gfloat(x, fmt, rule).values():
            assert not unequal.any(), x[unequal]


# Stochastic rounding: gfloat takes the random bits as an argument.


@pytest.mark.parametrize("bits", [1, 4, 8, 16])
@pytest.mark.parametrize("fmt", [FNUZ, *map(NAMED.get, ("e4m3fn", "e5m2", "e2m1"))], ids=str)
def test_stochastic_equals_gfloat_with_the_same_bits(fmt, bits):
    rule = Stochastic(2, random_bits=bits, step=3, call=1)
    generator = np.random.default_rng(bits)
    x = generator.standard_normal(4000) * np.exp2(generator.integers(-14, 1, 4000))
    x = (x * fmt.largest).astype(np.float32)
    x[:2000] = ours(x[:2000], Minifloat(8, fmt.mantissa_bits + bits + 1))  # half ways of draws
    draws = np.array([oracle.uniform(rule, index) for index in range(len(x))])
    mirrored = 2**bits - 1 - draws  # gfloat adds its bits to the fraction; we compare ours with it

    def theirs(mode):
        rounded = round_ndarray(info(fmt), x.astype(np.float64), mode, True, mirrored, bits)
        return rounded.astype(np.float32)

    below = ours(x, fmt, TowardZero()).astype(np.float64)
    up, down = ours(x, fmt, TowardPositive()), ours(x, fmt, TowardNegative())
    above = np.where(x > 0, up, down).astype(np.float64)
    between = below != above
    position = 2.0**bits * (x - below) / np.where(between, above - below, 1.0)
    # Fast: away from zero if fraction + (bits + 1/2) / 2**n >= 1. Ours has > where that has >=.
    met = between & (position == draws + 0.5)
    expected = np.where(met, below, theirs(RoundMode.StochasticFast))
    result = ours(x, fmt, rule)
    assert not differences(result, expected.astype(np.float32)).any()
    assert met.any() or bits > 4
    # The other mode first rounds the fraction to n bits, ties to even: ours would round them down.
    tie = between & (position % 1 == 0.5)
    unequal = differences(result, theirs(RoundMode.Stochastic))
    assert not (unequal & ~tie).any()
    assert (result == below)[between].sum() > 500
    assert (result == above)[between].sum() > 500


# Microscaling, from the text of the OCP specification (MX 1.0, section 6.3).


def mx_block(numbers, element_name) -> list[float]:
    """One block of finite numbers after a conversion to MX and back, in fractions."""
    ocp = {  # elements: largest exponent, significand and field -> magnitude, counts of both
        "mxfp8_e5m2": (15, lambda s, e: s * Fraction(2) ** (max(e, 1) - 17), 4, 31),
        "mxfp8_e4m3": (8, lambda s, e: s * Fraction(2) ** (max(e, 1) - 10), 8, 16),
        "mxfp6_e3m2": (4, lambda s, e: s * Fraction(2) ** (max(e, 1) - 5), 4, 8),
        "mxfp6_e2m3": (2, lambda s, e: s * Fraction(2) ** (max(e, 1) - 4), 8, 4),
        "mxfp4_e2m1": (2, lambda s, e: s * Fraction(2) ** (max(e, 1) - 2), 2, 4),
    }
    exact = [Fraction(number) for number in numbers]
    largest = max(map(abs, exact))
    if element_name == "mxint8":  # two's complement with an implied scale of 2**-6
        emax, magnitudes = 0, [Fraction(k, 64) for k in range(128)]
    else:
        emax, magnitude, mantissas, fields = ocp[element_name]
        magnitudes = [
            magnitude(stored + (mantissas if field else 0), field)
            for field in range(fields)
            for stored in range(mantissas)
        ]
        if element_name == "mxfp8_e4m3":
            magnitudes.pop()  # S.1111.111 is NaN
    shared = 0
    if largest:
        while Fraction(2) ** (shared + 1) <= largest:
            shared += 1
        while Fraction(2) ** shared > largest:
            shared -= 1
    scale = Fraction(2) ** min(max(shared - emax, -127), 127)
    results = []
    for number in exact:
        target = abs(number) / scale
        # The nearest magnitude; of two, the one with the even code; beyond the last, the last.
        index = min(
            range(len(magnitudes)), key=lambda code: (abs(magnitudes[code] - target), code % 2)
        )
        results.append(float(magnitudes[index] * scale) * (-1 if number < 0 else 1))
    return results


@pytest.mark.parametrize(
    "name", ["mxfp8_e5m2", "mxfp8_e4m3", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4_e2m1", "mxint8"]
)
def test_mx_blocks_equal_the_ocp_text(name):
    generator = torch.Generator().manual_seed(8)
    blocks = torch.randn(12, 32, generator=generator)
    blocks *= 2.0 ** torch.randint(-8, 2, blocks.shape, generator=generator)
    blocks *= 2.0 ** torch.tensor([0, 3, -20, 126, -126, 100, 1, 2, -140, 0, 0, 0])[:, None]
    blocks[9] = (torch.arange(32) - 16) / 16  # ties
    blocks[10] = 0.0
    blocks[11] = 2.0 ** torch.arange(-16, 16)
    ugly = ugly_tensor((8, 32), seed=3)
    x = torch.cat([blocks, torch.where(ugly.isfinite(), ugly, 1.0)])
    expected = [mx_block(row.tolist(), name) for row in x.double()]
    assert torch.equal(quantize(x, NAMED[name]), torch.tensor(expected))


def test_mx_differs_from_the_ocp_text_in_nan_alone():
    # OCP lets a NaN spoil its whole block, by a scale that is NaN; we keep the other elements.
    x = torch.ones(32)
    x[5] = torch.nan
    result = quantize(x, NAMED["mxfp8_e4m3"])
    assert result.isnan().nonzero().tolist() == [[5]]
    assert result.nan_to_num(nan=1.0).eq(1).all()


def test_mxint8_is_symmetric_and_twos_complement_can_be_had():
    x = torch.full((32,), -1.999)
    assert quantize(x, NAMED["mxint8"]).unique().tolist() == [-127 / 64]
    assert quantize(x, Microscaling(FixedPoint(8, 6))).unique().tolist() == [-2]


def test_every_minifloat_here_has_both_libraries_agreeing_on_its_largest():
    for fmt, dtype in ML_DTYPES.items():
        assert info(fmt).max == fmt.largest
        assert float(ml_dtypes.finfo(dtype).max) == fmt.largest
        assert (overflowing(fmt) is None) == (fmt.specials == "finite")
        assert decode_float(info(fmt), 1).fval == (fmt.smallest if fmt != E8M0 else 2.0**-126)


def test_nearest_is_the_default_rule():
    x = patterns(1000, 0)
    assert not differences(ours(x, FNUZ), ours(x, FNUZ, Nearest())).any()
