"""The C++ kernels equal the reference bit for bit: every instruction set, layout, thread count."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

import swalp
from swalp import (
    Binary,
    BlockFloat,
    FixedPoint,
    Microscaling,
    Minifloat,
    Nearest,
    Stochastic,
    TowardNegative,
    TowardPositive,
    TowardZero,
    parse_format,
)
from swalp.extension import WATCHERS
from swalp.matmul import kernels, operands, products
from swalp.noise import fresh_seed, random_bits
from swalp.packed import PackedTensor, pack
from swalp.quantize import codes, cpu, dispatch, plans, quantize_many, reference
from swalp.quantize.api import check

pytestmark = pytest.mark.skipif(not plans.available, reason="swalp was built without C++ kernels")
if plans.available:
    from swalp import _kernels

FORMATS = [
    *(FixedPoint(8, 4), FixedPoint(8, 4, symmetric=True), FixedPoint(2, 0, symmetric=True)),
    *(FixedPoint(9, 3), FixedPoint(16, 8), FixedPoint(12, 130), FixedPoint(25, 10)),
    *(FixedPoint(8, -119), Binary(), Binary(3), Binary(-100), Binary(120)),
    *(BlockFloat(8), BlockFloat(8, symmetric=False), BlockFloat(2), BlockFloat(16), BlockFloat(25)),
    *(BlockFloat(8, axes=(0,)), BlockFloat(8, axes=(1,)), BlockFloat(8, axes=(0, 1))),
    *(
        BlockFloat(8, axes=(-1,), symmetric=False),
        BlockFloat(8, tile=8),
        BlockFloat(6, tile=(2, 8)),
    ),
    *(BlockFloat(4, axes=(0,), tile=2), BlockFloat(8, tile=8, exponent_bits=2)),
    *(BlockFloat(8, axes=(0,), exponent_bits=11), BlockFloat(12, tile=4, exponent_bits=9)),
    *map(parse_format, ["fp16", "bf16", "e6m9", "e5m2", "e4m3fn", "e3m2", "e2m3", "e2m1", "e3m0"]),
    *map(
        parse_format, ["e8m0", "e4m3fnuz", "e5m2-inf", "e4m3fn-inf", "e4m3fnuz-inf", "e5m2-nosub"]
    ),
    *map(parse_format, ["e3m0-nosub", "ue4m3", "ue4m3-nosub-inf", "e8m0-inf", "e8m15", "e5m0"]),
    *map(parse_format, ["e1m2finite", "e4m3b20", "e8m23"]),
    *map(parse_format, ["mxfp8_e5m2/8", "mxfp8_e4m3/8", "mxfp4_e2m1/8", "mxint8/8", "mx_e3m0/8"]),
    *map(parse_format, ["mxfp6_e3m2[0]/2", "mx_fixed8.6[1]/2", "mx_e4m3fn-nosub/8"]),
]
SEED = 0x123456789ABCDEF0
RULES = [
    *(Nearest(), TowardZero(), TowardPositive(), TowardNegative()),
    *(
        Stochastic(SEED, random_bits=n, step=2**32 - 1, call=7)
        for n in (1, 5, 8, 15, 16, 17, 31, 32)
    ),
]
FEW_RULES = [Nearest(), *(Stochastic(SEED, random_bits=n) for n in (8, 16, 32))]


def builds():
    if not plans.available:
        return []
    names, best = [], _kernels.used()
    for name in ("scalar", "avx2", "avx512"):  # with AMX all but products of codes is as avx512
        try:
            _kernels.use(name)
        except ValueError:
            continue
        names.append(name)
    _kernels.use(best)
    return names


BUILDS = builds()


@pytest.fixture(params=BUILDS)
def build(request):
    before = _kernels.used()
    _kernels.use(request.param)
    yield request.param
    _kernels.use(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


SPECIAL = [
    *(0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 2.0**-126, -(2.0**-127)),
    *(3.4028234663852886e38, -3.4028234663852886e38, 2.0**126, 2.0**127, 0.5, -0.5, 1.5, -2.5),
]


def ugly(*shape, seed=0):
    """Numbers of all sizes, bit patterns of all kinds, ties and special values."""
    make = torch.Generator().manual_seed(seed)
    patterns = torch.randint(-(2**31), 2**31, shape, generator=make).int().view(torch.float32)
    scale = torch.exp2(torch.randint(-20, 20, shape, generator=make).float())
    x = torch.randn(shape, generator=make) * scale
    special = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), shape, generator=make)]
    ties = torch.randint(-300, 300, shape, generator=make) / 2
    kind = torch.randint(0, 12, shape, generator=make)
    for place, values in enumerate((patterns, special, ties)):
        x = torch.where(kind == place, values, x)
    return x


def tame(*shape, seed=0):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make)


def inputs():
    """Every block of the formats fits these."""
    x = tame(4, 8, 16, seed=3)
    x[0, 0], x[1], x[2, :, 0] = 0, torch.nan, torch.inf
    return [
        ugly(4, 4, 40),
        tame(16, 24, seed=1) * torch.exp2(torch.arange(-12.0, 12)),
        tame(2, 8, 16, seed=2) * 1e-38,
        tame(2, 8, 16, seed=2) * 1e38,
        x,
    ]


def same_bits(got, want):
    return torch.equal(got.contiguous().view(torch.int32), want.contiguous().view(torch.int32))


def rules_of(fmt, rules):
    return [rule for rule in rules if not isinstance(fmt, Binary) or rule != TowardZero()]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_values_and_codes_on_every_build(fmt):
    before = _kernels.used()
    for x in inputs():
        for rule in rules_of(fmt, RULES):
            check(x, fmt, rule)
            assert plans.supports(fmt, rule, x.dtype)
            want = reference.quantize(x, fmt, rule)
            want_codes = outcome(codes.pack, x, fmt, rule) if fmt.bits <= 16 else None
            for name in BUILDS:
                _kernels.use(name)
                assert same_bits(cpu.quantize(x, fmt, rule), want), (name, rule)
                if want_codes is not None:
                    got_codes = outcome(cpu.pack, x, fmt, rule)
                    assert_same_codes(got_codes, want_codes)
                    if not isinstance(want_codes, str):
                        assert same_bits(
                            cpu.unpack(*got_codes, fmt), codes.unpack(*want_codes, fmt)
                        )
    _kernels.use(before)


@pytest.mark.parametrize("fmt", [*FORMATS, Minifloat(8, 7), Minifloat(5, 10)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_numbers_of_16_bits(dtype, fmt):
    """By way of float32; where that would be another result, by the definition itself."""
    make = torch.Generator().manual_seed(SEED)
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    shuffled = numbers[torch.randperm(1 << 16, generator=make)]
    for x in (numbers.view(2, 8, 4096), shuffled.view(2, 64, 512).transpose(1, 2), numbers[:0]):
        for rule in rules_of(fmt, RULES):
            try:
                check(x, fmt, rule)
            except ValueError:  # it does not fit this dtype, or this shape
                continue
            got, want = dispatch.run(x, fmt, rule), reference.quantize(x, fmt, rule)
            assert torch.equal(
                got.contiguous().view(torch.int16), want.contiguous().view(torch.int16)
            )
            assert got.stride() == want.stride()


def outcome(pack, x, fmt, rule):
    """The codes, or the words of the error."""
    try:
        return pack(x, fmt, rule)
    except ValueError as error:
        return str(error)


def assert_same_codes(got, want):
    if isinstance(want, str) or isinstance(got, str):
        assert got == want
        return
    for ours, theirs in zip(got, want, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def channels_last(*shape):
    return ugly(*shape).to(memory_format=torch.channels_last)


LAYOUTS = {
    "positions a multiple of 8": channels_last(3, 16, 8, 8),
    "positions a multiple of 4": channels_last(2, 24, 2, 2),
    "odd positions": channels_last(2, 64, 7, 7),
    "more odd positions than a tile": channels_last(2, 20, 9, 9),
    "three channels": channels_last(2, 3, 8, 8),
    "channels beyond a tile": channels_last(2, 600, 4, 4),
    "channels no multiple of the lanes": channels_last(1, 33, 16, 8),
    "one position": channels_last(4, 24, 1, 1),
    "one channel": channels_last(4, 1, 6, 6),
    "volumes": ugly(2, 16, 4, 4, 4).to(memory_format=torch.channels_last_3d),
    "above the threads' threshold": channels_last(2, 40, 32, 26),
    "transposed": ugly(64, 40).t(),
    "batch of transposed": ugly(3, 16, 24).transpose(1, 2),
    "permuted": ugly(2, 4, 6, 8).permute(3, 1, 0, 2),
    "strided": ugly(40, 60)[::2, 1::3],
    "expanded": ugly(1, 16).expand(4, 16),
    "unaligned": ugly(4 * 4097 + 1)[1:].view(4, 4097),
    "no dimension": torch.tensor(3.3),
    "empty": torch.empty(0, 8),
}


def formats_for(x):
    formats = [FixedPoint(8, 4), BlockFloat(8), parse_format("e4m3fn")]
    if x.dim() > 1:
        formats += [BlockFloat(8, axes=axes) for axes in ((0,), (1,), (0, 1))]
    return formats


@cache
def definition(make, argument, fmt, rule):
    """An input and what the reference makes of it: values, and the codes without its NaNs."""
    x = make(argument)
    clean = x.nan_to_num()  # in the same layout
    packed = codes.pack(clean, fmt, rule)
    return x, clean, reference.quantize(x, fmt, rule), packed, codes.unpack(*packed, fmt)


def assert_equals_definition(make, argument, fmt, rule):
    x, clean, values, packed, unpacked = definition(make, argument, fmt, rule)
    got = cpu.quantize(x, fmt, rule)
    assert same_bits(got, values), (fmt, rule)
    assert got.stride() == torch.empty_like(x).stride()
    assert_same_codes(cpu.pack(clean, fmt, rule), packed)
    assert same_bits(cpu.unpack(*packed, fmt), unpacked)
    ours = cpu.pack(clean, fmt, rule)  # which lie in memory as `x` does
    assert same_bits(cpu.unpack(*ours, fmt), unpacked)
    assert cpu.unpack(*ours, fmt).stride() == torch.empty_like(ours[0]).stride()


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, build, threads):
    for fmt in formats_for(LAYOUTS[name]):
        for rule in FEW_RULES:
            assert_equals_definition(LAYOUTS.__getitem__, name, fmt, rule)


@pytest.mark.parametrize(
    "size", [1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 1023, 1025, 4097, 70_001]
)
def test_sizes(size, build, threads):
    for fmt in (FixedPoint(8, 4), BlockFloat(8), parse_format("e5m2")):
        for rule in FEW_RULES:
            assert_equals_definition(ugly, size, fmt, rule)


@pytest.mark.parametrize("text", ["bfp8", "bfp8t", "bfp6e5", "bfp12", "bfp16t"])
def test_all_codes_of_all_exponents(text, build):
    """Of rows, of columns, and of columns that are rows in memory."""
    fmt = parse_format(text)
    last = 1 << (fmt.bits - 1)
    numbers = torch.arange(-last, last, max(1, last >> 10), dtype=codes.code_dtype(fmt))
    exponents = torch.arange(fmt.min_exponent, fmt.max_exponent + 1)
    exponents = exponents.to(codes.exponent_dtype(fmt)).view(-1, 1)
    rows, columns = (replace(fmt, axes=(axis,)) for axis in (0, 1))
    whole = numbers.expand(len(exponents), -1).contiguous()
    want = codes.unpack(whole, exponents, rows)
    assert same_bits(cpu.unpack(whole, exponents, rows), want)
    for turned in (whole.t(), whole.t().contiguous()):
        got = cpu.unpack(turned, exponents.t(), columns)
        assert same_bits(got, want.t())
        assert got.stride() == turned.stride()


BLOCKS = [
    ((70, 1025), BlockFloat(8, axes=(0,))),
    ((3, 30_000), BlockFloat(8, axes=(0,))),
    ((9000, 8), BlockFloat(8, axes=(0,))),
    ((8, 9000), BlockFloat(8, axes=(1,))),
    ((600, 128), BlockFloat(8, axes=(1,), symmetric=False)),
    ((4096, 32), BlockFloat(8, tile=16)),
    ((128, 560), BlockFloat(8, tile=(16, 7))),
    ((560, 128), BlockFloat(8, axes=(0,), tile=7)),
    ((6, 40, 17, 17), BlockFloat(8, axes=(1,))),
    ((6, 40, 17, 17), BlockFloat(8, axes=(0, 2))),
    ((6, 40, 17, 18), BlockFloat(8, axes=(0, 1, 3), tile=(2, 5, 6))),
    ((64, 1100), Microscaling(Minifloat(4, 3, specials="fn"), tile=32, axis=0)),
    ((2, 4, 3, 5, 2, 3, 2, 2, 2, 2), BlockFloat(8, axes=(0, 2, 4, 6, 8))),
]


def uneven(shape):
    return tame(*shape) * torch.exp2(torch.arange(shape[-1]) % 9.0)


@pytest.mark.parametrize(("shape", "fmt"), BLOCKS, ids=str)
def test_blocks(shape, fmt, build, threads):
    for rule in (Nearest(), Stochastic(1, random_bits=16)):
        assert_equals_definition(uneven, shape, fmt, rule)


def to_the_ends(shape):
    """Rows from the lowest integer of a byte, or of a shorter word, to beyond the highest."""
    make = torch.Generator().manual_seed(1)
    reach = 2.0 ** torch.randint(2, 8, (shape[0], 1), generator=make)
    x = torch.rand(shape, generator=make).sub(0.5).mul(2 * reach)
    x[:, 1::7] = reach * (1 - torch.rand(x[:, 1::7].shape, generator=make) / reach)
    x[:, 2::9] = -x[:, 1:2]
    x[:, 3::11] = -reach
    x[:, 5::13] = -0.0
    x[::2] *= 2.0**-30
    return x


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("word", [3, 4, 7, 8, 9])
def test_codes_at_the_ends(word, symmetric, build):
    for shape, axes in (((60, 333), (0,)), ((60, 64), (0,)), ((1, 3000), None)):
        fmt = BlockFloat(word, axes=axes, symmetric=symmetric)
        for rule in FEW_RULES:
            assert_equals_definition(to_the_ends, shape, fmt, rule)


def ugly_of_shape(shape):
    return ugly(*shape)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65])
def test_short_blocks(length, build, threads):
    tiled, several = BlockFloat(8, tile=length), BlockFloat(6, axes=(0, 2), tile=(2, length))
    scaled = Microscaling(parse_format("e4m3fn"), tile=length)
    for shape, fmt in (
        ((70_000 // length, length), BlockFloat(8, axes=(0,))),
        ((41, 37, length), BlockFloat(8, axes=(1,))),
        ((3, 41, length), BlockFloat(8, axes=(0, 1))),
        ((1100, length), BlockFloat(8, axes=(1,))),
        ((300, length, 2), BlockFloat(8, axes=(1,), symmetric=False)),
        ((5, 23, 3 * length), tiled),
        ((6, 23, 3 * length), several),
        ((40, 2 * length), scaled),
    ):
        for rule in FEW_RULES:
            assert_equals_definition(ugly_of_shape, shape, fmt, rule)


floats = st.floats(width=32) | st.sampled_from(SPECIAL)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(floats, min_size=1, max_size=70),
    exponent=st.integers(-12, 12),
    fmt=st.one_of(
        st.builds(FixedPoint, st.integers(2, 16), st.integers(-20, 60), symmetric=st.booleans()),
        st.builds(
            BlockFloat,
            st.integers(2, 25),
            axes=st.sampled_from([None, (0,), (1,)]),
            exponent_bits=st.integers(2, 11),
            symmetric=st.booleans(),
        ),
        st.builds(
            Minifloat,
            st.integers(2, 8),
            st.integers(1, 10),
            bias=st.integers(1, 130),
            subnormals=st.booleans(),
            specials=st.sampled_from(["ieee", "fn", "fnuz"]),
            saturating=st.booleans(),
        ),
    ),
    rule=st.one_of(
        st.sampled_from(RULES[:4]),
        st.builds(Stochastic, st.integers(0, 2**64 - 1), random_bits=st.integers(1, 32)),
    ),
)
def test_random_cases(values, exponent, fmt, rule):
    x = torch.tensor([values, values[::-1]]) * 2.0**exponent
    try:
        check(x, fmt, rule)
    except ValueError:
        return  # float32 cannot carry that format
    want = reference.quantize(x, fmt, rule)
    before = _kernels.used()
    for name in BUILDS:
        _kernels.use(name)
        assert same_bits(cpu.quantize(x, fmt, rule), want)
    _kernels.use(before)


def nearly_undecided(argument):
    """64 to 127 gaps large, with a fraction that starts like the first 16 random bits of
    its element, so that it takes the other bits to tell whether it is rounded up."""
    bits, gap, shape = argument
    first = random_bits(4096, 16, SEED, 0, 0)
    make = torch.Generator().manual_seed(bits)
    whole, rest, sign = (torch.randint(0, n, first.shape, generator=make) for n in (63, 2, 2))
    size = 64 + whole.double() + (2 * first + rest) * 2.0**-17
    return laid_out((torch.where(sign == 0, gap, -gap) * size).float(), shape)


def nearly_undecided_signs(argument):
    """Fractions of 1 of which the first 16 random bits do not tell the sign."""
    bits, _, shape = argument
    first = random_bits(4096, 16, SEED, 0, 0)
    make = torch.Generator().manual_seed(bits)
    rest, sign = (torch.randint(0, 2, first.shape, generator=make) for _ in range(2))
    size = (2.0**16 - 2 - 2 * first.double() + 0.5 + rest) * 2.0**-16
    return laid_out((torch.where(sign == 0, 1, -1) * size.clamp(min=0)).float(), shape)


def laid_out(values, shape):
    x = values.reshape(shape)
    return x if x.dim() < 4 else x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(4096,), (4, 16, 8, 8), (4, 4, 256, 1), (32, 128)])
@pytest.mark.parametrize("bits", [17, 23, 31, 32])
@pytest.mark.parametrize(
    ("fmt", "gap"),
    [
        (FixedPoint(8, 4), 2.0**-4),
        (FixedPoint(16, 8), 2.0**-8),
        (BlockFloat(8), 2.0**-5),
        (BlockFloat(8, axes=(0,)), 2.0**-5),
        (BlockFloat(8, axes=(1,)), 2.0**-5),
        (BlockFloat(8, symmetric=False), 2.0**-5),
        (Minifloat(5, 6), 1.0),
    ],
)
def test_random_bits_beyond_the_first_16(fmt, gap, bits, shape, build):
    if len(shape) == 1 and isinstance(fmt, BlockFloat) and fmt.axes == (1,):
        return  # no such axis
    rule = Stochastic(SEED, random_bits=bits)
    argument = bits, gap, shape
    assert_equals_definition(nearly_undecided, argument, fmt, rule)
    x, _, values, _, _ = definition(nearly_undecided, argument, fmt, rule)
    up = values != reference.quantize(x, fmt, TowardZero())
    assert 0.2 < up.float().mean() < 0.3  # half of those in the middle of an interval


@pytest.mark.parametrize("shape", [(4096,), (4, 16, 8, 8)])
@pytest.mark.parametrize("bits", [17, 23, 31, 32])
def test_random_bits_beyond_the_first_16_of_signs(bits, shape, build):
    assert_equals_definition(
        nearly_undecided_signs, (bits, None, shape), Binary(), Stochastic(SEED, random_bits=bits)
    )


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 100_000, 199_999])
def test_one_strange_element_among_many(place, strange, build, threads):
    x = tame(200_000)
    x[place] = strange
    for fmt in (BlockFloat(8), BlockFloat(8, symmetric=False), BlockFloat(8, tile=1000)):
        for rule in FEW_RULES:
            assert same_bits(cpu.quantize(x, fmt, rule), reference.quantize(x, fmt, rule))


def successors(shape):
    """Tensors that come one after the other at one place, while their exponents change."""
    x = tame(*shape, seed=5)
    late, early, strange = x.clone(), x.clone(), x.clone()
    late.view(-1)[-1], early.view(-1)[0] = 900.0, -900.0
    strange[-1, 3, 2, 1], strange[0, 0, 0, 0] = torch.nan, torch.inf
    return [x, x, late, x, early, strange, x * 0, x, x * 2**-140, x / 2, x, x]


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def rows_apart(x):
    """With its rows apart in memory."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] + 5)[..., 3:-2].copy_(x)


@pytest.mark.parametrize("laid", [torch.clone, channels_last, rows_apart])
@pytest.mark.parametrize(
    ("fmt", "samples"), [(BlockFloat(8), 1), (BlockFloat(8, axes=(0,)), 2)], ids=str
)
def test_exponents_of_earlier_tensors_change_nothing(fmt, samples, laid):
    tensors = [laid(x) for x in successors((samples, 256, 64, 64))]
    rules = [Stochastic(SEED, random_bits=16, step=step) for step in range(len(tensors))]
    wanted = [reference.quantize(x, fmt, rule) for x, rule in zip(tensors, rules, strict=True)]
    before, threads = _kernels.used(), torch.get_num_threads()
    try:
        for build, count in [(name, count) for name in BUILDS for count in (1, 2)]:
            _kernels.use(build)
            torch.set_num_threads(count)
            for x, rule, want in zip(tensors, rules, wanted, strict=True):
                assert same_bits(cpu.quantize(x, fmt, rule), want), (build, count, rule)
                in_place = x.clone()
                assert same_bits(cpu.quantize(in_place, fmt, rule, in_place), want)
                got, exponents, has_nan = cpu.pack_integers(x, fmt, rule)
                assert has_nan == bool(x.isnan().any())
                values = cpu.unpack(got, exponents, fmt)
                assert same_bits(values.where(~x.isnan(), torch.nan), want), (build, count, rule)
    finally:
        _kernels.use(before)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(2**23 + 5,), (2**13 + 1, 1024), (2**16 + 1, 130)])
def test_large_results_equal_those_in_place(shape, build, threads):
    # They are written past the caches, vector by vector where a block ends at one.
    x = tame(*shape)
    for fmt in (FixedPoint(8, 4), BlockFloat(8), BlockFloat(8, axes=(0,))):
        there = x.clone()
        cpu.quantize(there, fmt, Stochastic(SEED, random_bits=16), there)
        assert same_bits(cpu.quantize(x, fmt, Stochastic(SEED, random_bits=16)), there)


@pytest.mark.parametrize("shape", [(2**18 + 5,), (2**10 + 1, 260), (2, 64, 33, 65)])
@pytest.mark.usefixtures("build", "threads")
def test_many_codes(shape):
    # Of several threads they go past the caches, chunk by chunk where those end at a vector.
    x = tame(*shape)
    layouts = [x, x.to(memory_format=torch.channels_last)] if x.dim() == 4 else [x]
    for fmt in (FixedPoint(8, 4), BlockFloat(8), BlockFloat(16), BlockFloat(8, axes=(0,))):
        for rule in (Nearest(), Stochastic(SEED, random_bits=16)):
            packed = codes.pack(x, fmt, rule)
            for laid in layouts:
                assert_same_codes(cpu.pack(laid, fmt, rule), packed)


@pytest.mark.parametrize(
    "x",
    [
        tame(2, 65, 3, 4, 64).permute(2, 0, 3, 1, 4)[1],  # queries of attention
        tame(5, 9, 7, 40).permute(2, 1, 0, 3)[..., 1:38],
        tame(70, 50)[:, 3:40],
        tame(40, 5000)[::3, 2:4999],
        tame(1, 300).expand(9, 300),
        tame(300, 100)[7::9],
        tame(2, 1500, 64)[:, 1:, :].flip(0),
        tame(400, 30)[:, 3:18],  # short rows
        tame(400, 64)[:, ::2],  # no rows
        tame(3, 4, 5, 6).transpose(1, 2),
    ],
    ids=lambda x: str(tuple(x.shape)),
)
@pytest.mark.usefixtures("build", "threads")
def test_codes_of_what_lies_apart(x):
    strange = rows_apart(x)
    strange[..., -1, -1] = torch.nan
    for one in (x, strange, -x, torch._neg_view(x)):
        for fmt in (BlockFloat(8), BlockFloat(8, axes=(0,)), BlockFloat(6), FixedPoint(8, 4)):
            for rule in (Nearest(), Stochastic(SEED, random_bits=16), Stochastic(SEED, step=3)):
                got, exponents, has_nan = cpu.pack_integers(one, fmt, rule)
                packed = cpu.pack_integers(one.resolve_neg().contiguous(), fmt, rule)
                assert has_nan == packed[2] == bool(one.isnan().any())
                number = ~one.isnan()
                assert torch.equal(got[number], packed[0][number])
                assert got.is_contiguous()
                assert (exponents is None) == (packed[1] is None)
                assert exponents is None or torch.equal(exponents, packed[1])


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("start", [0, 5, 1000, 2**35 - 24])
def test_noise(build, bits, start):
    # The last crosses the end of the counter's lower word.
    got = torch.empty(100, dtype=torch.int32)
    _kernels.noise(got.data_ptr(), start, 100, bits, SEED, 3, 7)
    blocks = torch.arange(start // 8, (start + 100) // 8 + 1)
    want = torch.zeros(100, dtype=torch.int64)
    for high in (0, 2**31)[: bits // 16]:
        words = swalp.noise.philox(
            (
                blocks & 0xFFFFFFFF,
                (blocks >> 32) + high,
                torch.full_like(blocks, 3),
                torch.full_like(blocks, 7),
            ),
            SEED,
        )
        halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
        row = torch.stack(halves, dim=1).reshape(-1)[start % 8 : start % 8 + 100]
        want = want << 16 | row
    assert torch.equal(got.long() & 0xFFFFFFFF, want)
    if start == 0:
        assert torch.equal(want, random_bits(100, bits, SEED, 3, 7))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("count", [0, 1, 2, 31, 64, 1001, (1 << 17) + 1])
@pytest.mark.usefixtures("build")
def test_two_codes_to_a_byte(count, dtype):
    lowest = -8 if dtype == torch.int8 else 0
    values = torch.randint(lowest, lowest + 16, (count,), dtype=dtype)
    joined = cpu.join(values)
    assert torch.equal(joined, codes.join(values))
    for split in (cpu.split, codes.split):
        assert torch.equal(split(joined, values.shape, dtype), values)
        assert split(joined, values.shape, dtype).dtype == dtype


def test_out_and_in_place():
    x, rule = ugly(4, 33), Stochastic(1)
    fmt = BlockFloat(8, axes=(0,))
    want = reference.quantize(x, fmt, rule)
    out = torch.empty_like(x)
    assert cpu.quantize(x, fmt, rule, out) is out
    assert same_bits(out, want)
    other = torch.empty(33, 4).t()  # another layout than that of x
    assert cpu.quantize(x, fmt, rule, other) is other
    assert same_bits(other, want)
    storage = torch.empty(140)
    storage[4:136] = x.reshape(-1)
    shifted = storage[2:134].view(4, 33)  # shares memory with what it is computed from
    cpu.quantize(storage[4:136].view(4, 33), fmt, rule, shifted)
    assert same_bits(shifted, want)
    assert cpu.quantize(x, fmt, rule, x) is x
    assert same_bits(x, want)


def test_a_negative_bit_is_seen():
    x = torch.complex(tame(9), tame(9, seed=1)).conj().imag
    assert x.is_neg()
    fmt = FixedPoint(8, 4)
    swalp.quantize(tame(9), fmt)  # now the short way is known
    assert same_bits(swalp.quantize(x, fmt), reference.quantize(x.resolve_neg(), fmt, Nearest()))


def test_flushing_subnormals_changes_nothing():
    x = torch.tensor([1e-40, -3e-42, 2.0**-126, 1.0]).repeat(5)
    fmt = parse_format("bf16")
    want = reference.quantize(x, fmt, Nearest())
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        got = cpu.quantize(x, fmt, Nearest())
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(got, want)
    assert got[0] != 0


@pytest.mark.parametrize("fmt", [FixedPoint(8, 4), BlockFloat(8, axes=(0,))], ids=str)
def test_many_tensors_in_one_call(fmt, threads):
    shapes = [(5, 3), (0, 4), (70, 30), (520, 520), (1, 1), (3, 5000), *[(400, 600)] * 5]
    tensors = [tame(*shape, seed=i) for i, shape in enumerate(shapes)]
    rules = [Stochastic(i, random_bits=16, step=i) for i in range(len(shapes))]
    want = [
        reference.quantize(*each) for each in zip(tensors, [fmt] * len(shapes), rules, strict=True)
    ]
    assert all(map(same_bits, quantize_many(tensors, fmt, rules), want))
    strided = [torch.empty_like(tensor).t().contiguous().t() for tensor in tensors]
    assert all(map(same_bits, quantize_many(tensors, fmt, rules, out=strided), want))
    mixed = [Nearest() if i % 2 else rule for i, rule in enumerate(rules)]
    assert all(map(same_bits, quantize_many(tensors, fmt, mixed)[::2], want[::2]))
    nearest = [reference.quantize(tensor, fmt, Nearest()) for tensor in tensors]
    assert quantize_many(tensors, fmt, Nearest(), out=tensors)[0] is tensors[0]
    assert all(map(same_bits, tensors, nearest))
    assert quantize_many([], fmt, Nearest()) == []
    doubles = [tensor.double() for tensor in tensors]
    assert all(map(same_bits, quantize_many(doubles, fmt, Nearest()), doubles))


@pytest.mark.parametrize("strided", [False, True])
def test_many_tensors_without_a_seed_have_noise_of_their_own(strided):
    x = torch.full((4000,), 0.3)
    tensors = [x, x.repeat_interleave(2)[::2] if strided else x.clone()]
    first, second = quantize_many(tensors, BlockFloat(3), Stochastic())
    assert not torch.equal(first, second)
    first, second = quantize_many(tensors, BlockFloat(3), Stochastic(1))
    assert torch.equal(first, second)


def test_many_tensors_are_checked():
    x, fmt = torch.zeros(4, 4), FixedPoint(8, 4)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, not int"):
        quantize_many([x, 3], fmt, Nearest())
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        quantize_many([x, x.long()], fmt, Nearest())
    with pytest.raises(ValueError, match=r"out is torch\.float32 \(3,\)"):
        quantize_many([x], fmt, Nearest(), out=[torch.zeros(3)])
    with pytest.raises(ValueError, match="2 tensors, 3 rules and 2 outputs"):
        quantize_many([x, x], fmt, [Nearest()] * 3)


def test_the_short_way_through_quantize():
    x = tame(6, 40)
    for fmt in FORMATS:
        for rule in rules_of(fmt, FEW_RULES):
            want = reference.quantize(x, fmt, rule)
            for _ in range(2):  # the first call checks, the second knows
                assert same_bits(swalp.quantize(x, fmt, rule), want)
                out, place = torch.empty_like(x), x.clone()
                assert swalp.quantize(x, fmt, rule, out=out) is out
                assert swalp.quantize(place, fmt, rule, out=place) is place
                assert same_bits(out, want)
                assert same_bits(place, want)
    fmt = FixedPoint(8, 4)
    swalp.quantize(x, fmt)
    assert plans.plan_of(fmt).checked is not None
    with pytest.raises(TypeError, match="rounding must be a rule"):
        swalp.quantize(x, fmt, "nearest")
    with pytest.raises(ValueError, match="gradient="):
        swalp.quantize(x, fmt, gradient="none")
    with pytest.raises(ValueError, match="out is"):
        swalp.quantize(x, fmt, out=torch.empty(40, 6))
    storage = torch.cat([x.reshape(-1), x.new_zeros(8)])
    swalp.quantize(storage[:240], fmt, out=storage[8:])  # memory of both
    assert same_bits(storage[8:].view(6, 40), reference.quantize(x, fmt, Nearest()))
    recorded = swalp.quantize(x.clone().requires_grad_(), fmt)
    assert recorded.requires_grad
    torch.manual_seed(1)
    first = swalp.quantize(x, fmt, Stochastic())
    torch.manual_seed(1)
    assert torch.equal(swalp.quantize(x, fmt, Stochastic()), first)
    assert not torch.equal(swalp.quantize(x, fmt, Stochastic()), first)


def from_c(asked, fmt, x, rule=0, out=None):
    """What the short way does with a tensor, if it takes it."""
    plan = plans.plan_of(fmt)
    rows = None if plan.shapeless else plan.rows
    return _kernels.quantize_plain(asked, plan.kernel, rows, x, out, rule, 16, 0, 0, 0)


class Passing(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("looks", [True, False], ids=["in C", "by attributes"])
@pytest.mark.parametrize("fmt", [BlockFloat(8), BlockFloat(8, axes=(0,))], ids=str)
def test_the_short_way_takes_plain_memory_alone(looks, fmt):
    asked = asking(looks)
    x = tame(6, 40)
    plans.plan_of(fmt).rows_of(x.shape)
    want = reference.quantize(x, fmt, Nearest())
    kept = nn.Parameter(x.clone())
    for taken in (x, torch.cat([x, x])[6:], x[None].select(0, 0), kept.detach()):
        assert same_bits(from_c(asked, fmt, taken), want)
    version, place = x._version, x.clone()
    assert from_c(asked, fmt, place, out=place) is place
    assert same_bits(place, want)
    assert x._version == version
    assert place._version == 1
    refused = [
        *(x.t(), x[:, ::2], x.double(), x.long(), x[:0], torch._neg_view(x), kept, 3, None),
        *(x.to("meta"), x.to_sparse(), x.expand(6, 40)[:1].expand(6, 40), x.numpy()),
        *(pack(x, fmt, Nearest()), torch.stack([x, x])),
    ]
    for other in refused[: None if fmt.axes else -1]:  # one row holds as many as there are
        assert from_c(asked, fmt, other) is None
    with torch.no_grad():
        assert same_bits(from_c(asked, fmt, kept), want)
    # A rule that is none, and what cannot be written to as it is read.
    assert from_c(asked, fmt, x, rule=-1) is None
    store = torch.cat([x.reshape(-1), x.new_zeros(8)])
    for out in (x.t().contiguous(), torch.zeros(6, 40).double(), kept, store[8:].view(6, 40)):
        assert from_c(asked, fmt, store[:240].view(6, 40), out=out) is None
    assert torch.equal(store[:240], x.view(-1))
    # Whom PyTorch shows what is done.
    with Passing():
        assert from_c(asked, fmt, x) is None
    with forward_ad.dual_level():
        assert from_c(asked, fmt, x) is None
    seen = []
    torch.func.vmap(lambda y: seen.append(from_c(asked, fmt, x)) or y)(x)
    torch.jit.trace(lambda y: seen.append(from_c(asked, fmt, x)) or y, (x,), check_trace=False)
    leaf = x.clone().requires_grad_()
    y = leaf * 1
    y.register_hook(lambda grad: seen.append(from_c(asked, fmt, grad)))
    torch.autograd.grad(y, leaf, torch.stack([x, x]), is_grads_batched=True)
    assert len(seen) >= 3
    assert not any(found is not None for found in seen)


def asking(looks):
    return _kernels.Torch(torch, forward_ad, WATCHERS, fresh_seed, looks)


@pytest.mark.parametrize("looks", [True, False], ids=["in C", "by attributes"])
def test_layouts_hold_until_memory_is_another(looks):
    asked = asking(looks)
    x, y = torch.zeros(4, 6), torch.zeros(3, dtype=torch.int8)
    seen = _kernels.Layouts(asked, PackedTensor, [x, y])
    x[0], y[1] = 1.0, 2
    assert seen.hold(asked, [x, y])
    same = x.view(4, 6)  # the same memory in the same order, but another tensor
    assert not seen.hold(asked, [same, y])
    assert not seen.hold(asked, [x])
    assert not seen.hold(asked, [y, x])
    for tensor, other in (
        *((x, each) for each in (x.clone(), x.t(), x.view(6, 4), x.view(4, 6, 1), x[:2], x[1:])),
        *((x, each) for each in (torch._neg_view(x), x.as_strided((4, 6), (0, 1)))),
        *((x, x.view(torch.int32)), (y, y.view(torch.uint8)), (x, torch.zeros(4, 6))),
    ):
        before, tensor.data = tensor.data, other
        assert not seen.hold(asked, [x, y])
        tensor.data = before
        assert seen.hold(asked, [x, y])
    for elsewhere in (torch.zeros(4, 6, device="meta"), torch.zeros(4, 6).to_sparse()):
        z = torch.zeros(4, 6)
        known = _kernels.Layouts(asked, PackedTensor, [z])
        torch.utils.swap_tensors(z, elsewhere)  # the same object, another tensor
        assert not known.hold(asked, [z])
        torch.utils.swap_tensors(z, elsewhere)
        assert known.hold(asked, [z])
    nowhere = torch.zeros(4, 6, device="meta")
    assert _kernels.Layouts(asked, PackedTensor, [nowhere]).hold(asked, [nowhere])


@pytest.mark.parametrize("looks", [True, False], ids=["in C", "by attributes"])
def test_layouts_hold_until_what_is_packed_is_another(looks):
    asked = asking(looks)
    packed = pack(torch.ones(4, 6), BlockFloat(8, axes=(0,)))
    seen = _kernels.Layouts(asked, PackedTensor, [packed])
    packed.copy_(torch.full((4, 6), 3.0))
    assert seen.hold(asked, [packed])
    for part in ("codes", "exponents"):
        before = getattr(packed, part)
        setattr(packed, part, before.clone())
        assert not seen.hold(asked, [packed])
        setattr(packed, part, before)
        assert seen.hold(asked, [packed])
        moved = before.data
        before.data = before.clone()
        assert not seen.hold(asked, [packed])
        before.data = moved
    packed.exponents = None
    assert not seen.hold(asked, [packed])
    plain = _kernels.Layouts(asked, PackedTensor, [torch.nn.Parameter(torch.ones(2))])
    assert not plain.hold(asked, [packed])


def test_one_call_gives_what_several_give(monkeypatch):
    # Products in new tensors, codes of a block: without PyTorch's exchange there are several.
    generator = torch.Generator().manual_seed(0)
    pairs = [
        ((5, 40), (40, 7)),
        ((3, 5, 40), (3, 40, 7)),
        ((300, 64), (64, 1000)),
        ((2, 9), (9, 2)),
    ]
    x = torch.randn(4, 300, 64, generator=generator)
    x[0, 0, 0] = torch.inf

    def found(fmt, rule):
        for shapes in pairs:
            left, right = (x.reshape(-1)[: math.prod(one)].view(one) for one in shapes)
            a, b = (
                operands.quantized(one, fmt, rule) for one in (left[..., 1:], right[..., 1:, :])
            )
            yield products.product(a, b)
            yield products.product(b.transpose(), a.transpose())
        for one in (x, x[0], x[0, 0], x[:, 1], x.mT, x[:0], x[0, 0, 1] * torch.nan):
            made, exponents, lost = cpu.pack_integers(one, fmt, rule)
            yield from (made, torch.tensor(lost), *([] if exponents is None else [exponents]))

    for fmt in (BlockFloat(8), FixedPoint(8, 4), BlockFloat(7, symmetric=False)):
        for rule in (Nearest(), Stochastic(SEED, random_bits=16, step=2)):
            at_once = list(found(fmt, rule))
            with monkeypatch.context() as patched:
                patched.setattr(cpu, "TORCH", asking(False))
                patched.setattr(kernels, "TORCH", asking(False))
                apart = list(found(fmt, rule))
            assert len(at_once) == len(apart)
            for one, other in zip(at_once, apart, strict=True):
                assert one.shape == other.shape
                assert one.dtype == other.dtype
                assert torch.equal(one, other)


@pytest.mark.parametrize("looks", [True, False], ids=["in C", "by attributes"])
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_products_of_tensors_as_they_are_seen(looks, batch):
    asked = asking(looks)
    generator = torch.Generator().manual_seed(0)

    def codes(*shape):
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)

    for a in (codes(*batch, 5, 40), codes(*batch, 40, 5).mT, codes(*batch, 5, 80)[..., :40]):
        for b in (codes(*batch, 40, 7), codes(*batch, 7, 40).mT):
            sums = torch.empty(*batch, 5, 7, dtype=torch.int32)
            nothing = (None, None, None, None, None, 0, None, 2)
            assert _kernels.matmul(asked, a, b, sums, 0, *nothing)
            assert torch.equal(sums.double(), a.double() @ b.double())
            left, right = torch.tensor([-3] * (batch or (1,))[0], dtype=torch.int8), codes(1) // 32
            wide = torch.zeros(*batch, 5, 9)
            bias, raised = codes(7), torch.tensor([2], dtype=torch.int8)
            arguments = (left, right, None, bias, raised, -5, None, 2)
            assert _kernels.matmul(asked, a, b, wide[..., 1:8], 4, *arguments)
            want = (a.double() @ b.double()) * 2.0 ** (1 + int(right)) + bias.double() / 8
            assert torch.equal(wide[..., 1:8], want.float())
            assert not wide[..., [0, 8]].any()
            if not batch:
                out = torch.empty(5, 7)
                arguments = (left, right, bias.float(), None, None, 0, None, 2)
                assert _kernels.matmul(asked, a, b, out, 4, *arguments)
            one = codes(*batch, 9, 9)[..., ::5, ::5][..., :1, :1]  # its strides mean nothing
            for left, right in ((a[..., :1], one), (one, b[..., :1, :]), (one, one)):
                sums = torch.empty(*batch, left.shape[-2], right.shape[-1], dtype=torch.int32)
                assert _kernels.matmul(asked, left, right, sums, 0, *nothing)
                assert torch.equal(sums.double(), left.double() @ right.double())
    left, right = codes(8, 80)[::3, ::2][:0], codes(120, 21)[::3, ::3]  # nothing to write
    assert _kernels.matmul(asked, left, right.contiguous(), torch.empty(0, 7), 0, *nothing)
    for a, b in ((codes(5, 0), codes(0, 7)), (codes(5, 80)[:, ::2], codes(40, 7))):
        assert not _kernels.matmul(asked, a, b, torch.empty(5, 7), 0, *nothing)


@pytest.mark.parametrize("looks", [True, False], ids=["in C", "by attributes"])
def test_results_become_pytorchs_either_way(looks):
    asked, memory = asking(looks), _kernels.Buffers(1 << 10, 1 << 20, 64)
    assert memory.empty(asked, (4, 8), (), 2, 4) is None  # too small
    found = memory.empty(asked, (64, 8), (), 2, 4)
    x = found if looks else torch.utils.dlpack.from_dlpack(found)
    assert type(x) is torch.Tensor
    assert (x.shape, x.dtype, x.is_contiguous(), x._is_view()) == (
        (64, 8),
        torch.float32,
        True,
        False,
    )
    assert memory.holds(x.data_ptr())
    x.fill_(1.0)
    last = memory.empty(asked, (2, 8, 4, 16), (512, 1, 128, 8), 1, 1)
    y = last if looks else torch.utils.dlpack.from_dlpack(last)
    assert y.stride() == (512, 1, 128, 8)
    assert y.dtype == torch.uint8
    before = memory.free_bytes()
    del x, y, found, last
    assert memory.free_bytes() >= before + 64 * 8 * 4
    del memory  # and with it all there was


def test_what_the_kernels_leave_to_the_reference():
    assert not plans.supports(FixedPoint(8, 4), Nearest(), torch.float64)
    tiny = Microscaling(Minifloat(5, 2, bias=100), tile=4)
    assert not plans.supports(tiny, Nearest(), torch.float32)
    x = tame(4, 8)
    assert same_bits(dispatch.run(x, tiny, Nearest()), reference.quantize(x, tiny, Nearest()))


def test_equal_formats_share_a_plan():
    assert plans.plan_of(BlockFloat(7)) is plans.plan_of(BlockFloat(7))


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="no 'mmx' kernels"):
        _kernels.use("mmx")


def run_python(program, **environment):
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_environment_chooses_the_instruction_set():
    program = "import swalp; from swalp import _kernels; print(_kernels.used())"
    assert run_python(program, SWALP_ISA="scalar").stdout == "scalar\n"
    refused = run_python(program, SWALP_ISA="mmx")
    assert refused.returncode != 0
    assert "'mmx'" in refused.stderr


def test_a_compiled_module_of_other_sources_is_not_used():
    program = """
import sys, types
sys.modules["swalp._kernels"] = types.ModuleType("swalp._kernels")
import swalp, torch
from swalp import extension
from swalp.training import environment
print(extension.missing)
print(environment.remedy())
print(swalp.quantize(torch.tensor([0.3, 1.0]), swalp.FixedPoint(4, 2)).tolist())
"""
    run = run_python(program)
    assert run.stdout.splitlines() == [
        "the compiled module is of other sources than these: it has to be built again",
        "install swalp again as at first, with pip's --force-reinstall --no-cache-dir; "
        "in a clone, `make install`",
        "[0.25, 1.0]",
    ]
    assert "swalp works without its C++ kernels" in run.stderr


def test_a_forked_child_does_not_hang():
    # After a parallel region in the parent, one in the child would wait for threads that are gone.
    # PyTorch's loaders set one thread in their workers, and the kernels take that number.
    program = """
import os, torch, swalp
torch.set_num_threads(2)
x = torch.randn(1 << 18)
want = swalp.quantize(x, swalp.BlockFloat(8), swalp.Stochastic(1))
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    same = torch.equal(swalp.quantize(x, swalp.BlockFloat(8), swalp.Stochastic(1)), want)
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(program).stdout == "0\n"


def test_without_the_extension_one_warning_and_the_same_numbers():
    program = """
import sys
sys.modules["swalp._kernels"] = None  # as if it had not been built
import torch, swalp
x = torch.linspace(-9, 9, 50)
for fmt in (swalp.FixedPoint(8, 4), swalp.BlockFloat(8, axes=(0,))):
    for _ in range(2):
        print(swalp.quantize(x, fmt, swalp.Stochastic(3)).tolist())
"""
    slow = run_python(program)
    fast = run_python(program.replace("sys.modules", "{}"))
    assert slow.returncode == 0, slow.stderr
    assert slow.stdout == fast.stdout
    assert slow.stderr.count("SlowQuantizationWarning") == 1
    assert "swalp doctor" in slow.stderr
    assert "SlowQuantizationWarning" not in fast.stderr


PARTS = [
    ((1, 1, 1), (slice(0, 1), slice(0, 1))),
    ((3, 5, 7), (slice(1, 4), slice(2, 7))),
    ((2, 256, 272), (slice(128, 256), slice(0, 256))),
    ((2, 40, 1030), (slice(3, 40), slice(0, 1030))),
    ((3, 2, 3000), (slice(0, 1), slice(5, 2999))),
    ((2, 9, 4096), (slice(0, 9), slice(0, 4096))),
]


@pytest.mark.parametrize(("shape", "part"), PARTS, ids=str)
@pytest.mark.parametrize("rule", [Nearest(), Stochastic(7, random_bits=16), Stochastic(7)], ids=str)
@pytest.mark.usefixtures("build", "threads")
def test_parts_are_rounded_as_in_the_whole(shape, part, rule):
    """Codes, and the largest exponent that parts have alone; the rest of the codes stays."""
    rows, columns = part
    fmt = BlockFloat(8)
    x = tame(4, *shape, seed=5)
    x[2, :, rows, columns][0, 0, 0] = 50.0  # the largest of all
    want, exponents = codes.pack(x, fmt, rule)
    room = torch.full(x.shape, 99, dtype=torch.int8)
    own = []
    for i in range(len(x)):
        parts = cpu.Parts(room[i], fmt, rule, i * x[0].numel(), int(exponents))
        part = x[i][:, rows, columns].contiguous()
        exponent, has_nan = parts.pack(part, rows.start, columns.start)
        assert not has_nan
        own.append(exponent)
    expected = torch.full_like(room, 99)
    expected[:, :, rows, columns] = want[:, :, rows, columns]
    assert torch.equal(room, expected)
    assert own[2] == max(own) == int(exponents)
    x[0, 0, rows.start, columns.start] = torch.nan
    parts = cpu.Parts(room[0], fmt, rule, 0, 0)
    assert parts.pack(x[0][:, rows, columns].contiguous(), rows.start, columns.start)[1]


@pytest.mark.parametrize(
    ("shape", "first"),
    [((1, 1, 1), 0), ((3, 5, 7), 0), ((3, 5, 7), 4), ((2, 3, 40), 128), ((12, 128, 256), 128)],
)
@pytest.mark.usefixtures("build", "threads")
def test_what_causal_attention_hides(shape, first):
    x = ugly(*shape, seed=9)
    _, rows, columns = shape
    hidden = torch.arange(columns) > first + torch.arange(rows).unsqueeze(1)
    want = x.mul(0.3).masked_fill(hidden, -torch.inf)
    got = x.clone()
    _kernels.causal(shape, first, 0.3, got.data_ptr(), torch.get_num_threads())
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
