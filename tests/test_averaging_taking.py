"""The compiled pass equals the definition; what the definition promises."""

from fractions import Fraction

import pytest
import torch

import swalp
from swalp import BlockFloat, FixedPoint, Minifloat, pack
from swalp.averaging import ExactSum, compensated_mean, kernel, moving_mean, taking
from swalp.averaging.kinds import Equal
from swalp.quantize import plans

SHAPES = [(), (1,), (7,), (3, 5), (64, 130), (8, 3, 3, 3), (70, 1000)]
FORMATS = [
    BlockFloat(8, axes=(0,)),
    BlockFloat(8),
    BlockFloat(4, axes=(0,)),
    BlockFloat(12, tile=5),
    FixedPoint(8, 6),
    FixedPoint(16, 12),
    Minifloat(4, 3),
    swalp.parse_format("mxfp4_e2m1"),
]


def iterates(shape, count=4):
    generator = torch.Generator().manual_seed(3)
    scale = 2.0 ** torch.randint(-3, 3, shape, generator=generator)
    return [scale * torch.randn(shape, generator=generator) for _ in range(count)]


def averaged(values, accumulator, threads=2):
    """The state after taking all values."""
    state = taking.empty(values[0], Equal(), accumulator, None)
    for count, each in enumerate(values):
        taking.take(
            state, each, Equal(), accumulator,
            weight=1 / (count + 1), count=count, seed=5, name="w", threads=threads,
        )  # fmt: skip
    return state


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def without_kernel(monkeypatch):
    """A call that gives a state made by the definition alone."""

    def run(values, accumulator):
        with monkeypatch.context() as patched:
            patched.setattr(kernel, "take", lambda *_: False)
            patched.setattr(kernel, "take_rounded", lambda *_: False)
            return averaged(values, accumulator)

    return run


needs_kernels = pytest.mark.skipif(not plans.available, reason="no C++ kernels")


@needs_kernels
@pytest.mark.parametrize("accumulator", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_floats_equal_the_definition(shape, accumulator, without_kernel):
    for values in (
        iterates(shape),
        [each.to(torch.bfloat16) for each in iterates(shape)],
        [each.to(torch.float64) for each in iterates(shape)],
    ):
        assert same(averaged(values, accumulator), without_kernel(values, accumulator))


@needs_kernels
@pytest.mark.parametrize("accumulator", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_packed_equal_the_definition(fmt, accumulator, without_kernel):
    for shape in [(70, 960), (6, 160), (5, 7, 160)]:
        values = [pack(each, fmt) for each in iterates(shape)]
        found = averaged(values, accumulator)
        assert same(found, without_kernel(values, accumulator))
        floats = [each.dequantize() for each in values]
        assert same(found, averaged(floats, accumulator))


@needs_kernels
@pytest.mark.parametrize("accumulator", [torch.float32, torch.float64], ids=str)
def test_any_memory_layout(accumulator, without_kernel):
    values = iterates((8, 16, 5, 5))
    last = [each.to(memory_format=torch.channels_last) for each in values]
    fmt = BlockFloat(8, axes=(0,))
    expected = averaged(values, accumulator)
    assert same(averaged(last, accumulator), expected)
    assert averaged(last, accumulator)["average"].stride() == last[0].stride()
    assert same(averaged([each[:, ::2] for each in values], accumulator),
                without_kernel([each[:, ::2] for each in values], accumulator))  # fmt: skip
    packed = [pack(each, fmt) for each in last]
    assert same(
        averaged(packed, accumulator), without_kernel([pack(v, fmt) for v in values], accumulator)
    )


@needs_kernels
def test_kernel_takes_what_it_should():
    """Or these tests would compare the definition with itself."""
    state = taking.empty(torch.zeros(3), Equal(), torch.float32, None)
    assert kernel.take(state, torch.ones(3), torch.float32, 1.0, 1)
    packed = pack(torch.ones(3, 4), BlockFloat(4, axes=(0,)))
    state = taking.empty(packed, Equal(), torch.float64, None)
    assert kernel.take(state, packed, torch.float64, 1.0, 1)
    fixed = pack(torch.ones(3, 4), FixedPoint(8, 6))
    state = taking.empty(fixed, Equal(), ExactSum(FixedPoint(8, 6)), None)
    assert kernel.take(state, fixed, ExactSum(FixedPoint(8, 6)), 1.0, 1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fmt", [FixedPoint(8, 6), FixedPoint(16, 9), FixedPoint(4, 2)], ids=str)
def test_exact_sum_is_the_rational_mean(fmt, packed):
    values = [swalp.quantize(each, fmt) for each in iterates((4, 6), 97)]
    given = [pack(each, fmt) for each in values] if packed else values
    state = averaged(given, ExactSum(fmt))
    means = taking.value(state, Equal(), ExactSum(fmt), 97).flatten().tolist()
    for place, mean in enumerate(means):
        total = sum(Fraction(each.flatten()[place].item()) for each in values)
        assert mean == float(total / 97)


def test_exact_sum_of_another_packed_format():
    values = [pack(each, FixedPoint(6, 4)) for each in iterates((4, 6))]
    state = averaged(values, ExactSum(FixedPoint(8, 5)))
    total = sum(each.dequantize().double() for each in values)
    assert torch.equal(state["sum"].double() / 32, total)


@pytest.mark.parametrize(
    "fmt", [BlockFloat(8, axes=(0,)), BlockFloat(4), FixedPoint(8, 4)], ids=str
)
def test_low_precision_average_is_held_in_codes(fmt, without_kernel):
    accumulator = swalp.recipes.Quantizer(fmt, swalp.Stochastic())
    values = iterates((16, 40))
    state = averaged(values, accumulator)
    assert state["average"].nbytes <= 16 * 40 * fmt.bits / 8 + 16
    assert same(state, without_kernel(values, accumulator))
    # As if it were rounded in floats.
    expected = torch.zeros(16, 40)
    for count, each in enumerate(values):
        rounding = swalp.Stochastic(5).stream("average", "w").at(count)
        expected = swalp.quantize(moving_mean(expected, each, 1 / (count + 1)), fmt, rounding)
    assert torch.equal(state["average"].dequantize(), expected)


ROUNDED = [
    BlockFloat(8, axes=(0,)),
    BlockFloat(8),
    BlockFloat(4, axes=(0,)),
    BlockFloat(4),
    BlockFloat(6, tile=5),
    FixedPoint(8, 4),
    FixedPoint(4, 2, symmetric=True),
    FixedPoint(8, 5, symmetric=True),
]


@needs_kernels
@pytest.mark.parametrize("rounding", [swalp.Stochastic(), swalp.Nearest()], ids=str)
@pytest.mark.parametrize("fmt", ROUNDED, ids=str)
def test_rounded_averages_equal_the_definition(fmt, rounding, without_kernel):
    """Of floats and of packed weights; blocks that one thread takes, and that all share."""
    accumulator = swalp.recipes.Quantizer(fmt, rounding)
    for shape in [(), (1,), (5,), (70, 960), (6, 160), (7, 15), (5, 7, 2, 10), (3, 70_000)]:
        if fmt == BlockFloat(6, tile=5) and (not shape or shape[-1] % 5):
            continue
        values = iterates(shape)
        values[1].view(-1)[0] = 1e-30
        formats = own_formats(shape) if values[0].numel() < 1 << 17 else [BlockFloat(8)]
        for given in (
            values,
            [each.to(torch.bfloat16) for each in values],
            *([pack(each, own) for each in values] for own in formats),
        ):
            found, expected = averaged(given, accumulator), without_kernel(given, accumulator)
            assert same_codes(found["average"], expected["average"])
            assert same_codes(averaged(given, accumulator, 1)["average"], expected["average"])


def own_formats(shape):
    """Of the iterates: in the blocks of the average, in others, in none."""
    formats = [BlockFloat(8), FixedPoint(6, 4, symmetric=True), Minifloat(4, 3), BlockFloat(16)]
    if shape:
        formats += [BlockFloat(8, axes=(0,)), BlockFloat(4, axes=(0,))]
    return formats


def same_codes(left, right):
    exponents = left.exponents is None or torch.equal(left.exponents, right.exponents)
    return exponents and torch.equal(left.codes, right.codes)


@needs_kernels
def test_rounded_averages_where_numbers_are_not_finite(without_kernel):
    accumulator = swalp.recipes.Quantizer(BlockFloat(8, axes=(0,)), swalp.Stochastic())
    values = iterates((4, 70))
    values[1][0, 3], values[1][1, 5], values[2][2] = float("nan"), float("inf"), 0.0
    for scale in (1.0, 1e-38, 1e37):
        given = [each * scale for each in values]
        found, expected = averaged(given, accumulator), without_kernel(given, accumulator)
        assert same_codes(found["average"], expected["average"])
        assert found["average"].dequantize()[0, 3].isnan()


@needs_kernels
def test_rounded_kernel_takes_what_it_should():
    rounding = swalp.Stochastic(1).at(3)

    def takes(average, parameter):
        return kernel.take_rounded(average, parameter, rounding, 0.5, 1)

    rows = BlockFloat(8, axes=(0,))
    average = pack(torch.zeros(4, 6), rows)
    assert takes(average, torch.ones(4, 6))
    assert takes(average, pack(torch.ones(4, 6), rows))
    assert takes(average, pack(torch.ones(4, 6), BlockFloat(4, axes=(0,))))
    assert takes(average, pack(torch.ones(4, 6), FixedPoint(8, 6)))
    assert takes(pack(torch.zeros(4, 10), BlockFloat(6, tile=5)), torch.ones(4, 10))
    assert not takes(average, torch.ones(6, 4).t())
    assert not takes(average, pack(torch.ones(4, 6), BlockFloat(8)))
    assert not takes(average, pack(torch.ones(6, 4), BlockFloat(8, axes=(1,))).t())
    assert not takes(pack(torch.zeros(4, 6), BlockFloat(8, axes=(1,))), torch.ones(4, 6))
    assert not takes(pack(torch.zeros(4, 6), BlockFloat(12)), torch.ones(4, 6))
    assert not takes(pack(torch.zeros(4, 5), BlockFloat(4, axes=(0,))), torch.ones(4, 5))


def test_float32_average_loses_nothing_where_the_naive_one_stalls():
    """20 000 iterates: within 2 units in the last place of float64; naive float32 is far off."""
    generator = torch.Generator().manual_seed(0)
    average, naive = torch.zeros(2, 32), torch.zeros(32)
    exact, half = torch.zeros(32, dtype=torch.float64), torch.zeros(32, dtype=torch.bfloat16)
    values = 1 + 1e-3 * torch.randn(500, 32, generator=generator)
    for step in range(20_000):
        iterate, weight = values[step % 500] + 1e-6 * (step % 7), 1 / (step + 1)
        compensated_mean(average[0], average[1], iterate, weight)
        naive = moving_mean(naive, iterate, weight)
        half = moving_mean(half, iterate, weight)
        exact = moving_mean(exact, iterate, weight)
    ulp = 2**-23
    assert (average[0] - exact).abs().max().item() <= 2 * ulp
    assert (naive - exact).abs().max().item() > 4 * ulp
    assert (half - exact).abs().max().item() > 1e-4


def test_many_iterates_of_packed_weights():
    """In float32 within 2 units in the last place of the rational mean; in integers, equal."""
    fmt, count = FixedPoint(8, 6), 100_000
    generator = torch.Generator().manual_seed(1)
    codes = (torch.randn(1000, 64, generator=generator) * 20 + 30).round().clamp(-127, 127)
    packed = [pack(row[None] * fmt.gap, fmt) for row in codes]
    accumulators = (torch.float32, torch.float64, ExactSum(fmt))
    states = [taking.empty(packed[0], Equal(), each, None) for each in accumulators]
    for step in range(count):
        for state, accumulator in zip(states, accumulators, strict=True):
            taking.take(
                state, packed[step % 1000], Equal(), accumulator,
                weight=1 / (step + 1), count=step, seed=0, name="w", threads=1,
            )  # fmt: skip
    short, long, exact = (
        taking.value(state, Equal(), accumulator, count).double()
        for state, accumulator in zip(states, accumulators, strict=True)
    )
    assert torch.equal(exact[0], codes.double().mean(0) * fmt.gap)
    ulp = 2.0 ** (exact.abs().log2().floor() - 23)
    assert ((short - exact).abs() <= 2 * ulp).all()
    assert ((long - exact).abs() <= 1e-6 * ulp).all()
