"""Products of codes: exact, equal to the simulation, refused where the machine is wrong."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import swalp
from swalp import BlockFloat, FixedPoint, Minifloat, Nearest, Stochastic
from swalp.matmul import kernels, operands, products
from swalp.matmul.operands import Operand
from swalp.quantize import plans

if plans.available:
    from swalp import _kernels


def codes(*shape: int, seed: int = 0, low: int = -127) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 128, shape, generator=generator, dtype=torch.int8)


def exact(left: Operand, right: Operand) -> torch.Tensor:
    return operands.values(left) @ operands.values(right)


def plain(x: torch.Tensor, gap: int = 0) -> Operand:
    return Operand(x, None, gap)


E4M3 = Minifloat(4, 3, specials="fn")
KERNELS = [kernels.multiply_float]
if kernels.exact(kernels.multiply_int_mm):
    KERNELS.append(kernels.multiply_int_mm)


@contextlib.contextmanager
def running(build: str):
    """The kernels on those instructions: those of this machine that are not its best, too."""
    before = _kernels.used()
    _kernels.use(build)
    try:
        yield
    finally:
        _kernels.use(before)


def has(build: str) -> bool:
    try:
        with running(build):
            return True
    except ValueError:
        return False


BUILDS = [b for b in ("avx2", "avx512", "amx") if has(b)] if plans.available else []


def on(build: str) -> kernels.Multiply:
    """`multiply_codes` as a processor with these instructions runs it."""

    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        with running(build):
            return kernels.multiply_codes(left, right)

    multiply.__name__ = build
    return multiply


ON_BUILDS = [on(build) for build in BUILDS]
KERNELS += ON_BUILDS


@pytest.mark.parametrize("multiply", KERNELS)
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 140), st.integers(1, 140), st.integers(1, 1100)),
    across=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 1 << 30),
)
def test_sums_are_exact(multiply, batch, sizes, across, seed):
    m, n, k = sizes
    left = codes(batch, k, m, seed=seed, low=-128).transpose(1, 2) if across[0] else None
    left = codes(batch, m, k, seed=seed, low=-128) if left is None else left
    right = codes(batch, n, k, seed=seed + 1, low=-128).transpose(1, 2) if across[1] else None
    right = codes(batch, k, n, seed=seed + 1, low=-128) if right is None else right
    assert torch.equal(multiply(left, right).double(), left.double() @ right.double())


@pytest.mark.parametrize("multiply", KERNELS)
@pytest.mark.parametrize("value", [127, -128])
def test_deep_sums_of_the_largest_codes(multiply, value):
    left = torch.full((1, 7, kernels.DEEPEST - 1), value, dtype=torch.int8)
    right = left[:, :5].transpose(1, 2)
    expected = value * value * (kernels.DEEPEST - 1)
    assert torch.equal(multiply(left, right), torch.full((1, 7, 5), expected, dtype=torch.int32))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 512, 1024, 520), (5, 200, 150, 90), (1, 10, 700, 2048)])
def test_large_products_on_any_number_of_threads(shape, threads):
    batch, m, n, k = shape
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for left, right in (
            (codes(batch, m, k), codes(batch, n, k).transpose(1, 2)),
            (codes(batch, m, k), codes(batch, k, n)),
            (codes(batch, k, m).transpose(1, 2), codes(batch, k, n)),
        ):
            expected = left.double() @ right.double()
            assert torch.equal(products.native(plain(left), plain(right)).double(), expected)
    finally:
        torch.set_num_threads(before)


def test_strided_slices_are_read_where_they_lie():
    wide = codes(6, 40, 96)
    left, right = wide[:, :, 32:64], wide[:, :, :32].transpose(1, 2)
    expected = left.double() @ right.double()
    assert torch.equal(products.native(plain(left), plain(right)).double(), expected)
    odd = wide[:, ::2, ::3]  # no stride is 1
    expected = odd.double() @ odd.transpose(1, 2).double()
    result = products.native(plain(odd), plain(odd.transpose(1, 2)))
    assert torch.equal(result.double(), expected)


@pytest.mark.parametrize("multiply", KERNELS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 33, 17, 200), (12, 128, 64, 384), (4, 40, 30, 0)]
)
def test_results_lie_in_larger_tensors(multiply, shape, monkeypatch):
    batch, m, n, k = shape
    chosen = kernels.Kernel("chosen", multiply)
    if multiply in (kernels.multiply_float, kernels.multiply_int_mm):
        monkeypatch.setattr(kernels, "kernel", lambda: chosen)
    left, right = plain(codes(batch, m, k), gap=-3), plain(codes(batch, k, n, seed=1), gap=1)
    around = torch.full((batch, m + 2, 3, n), 7.0)
    with running(multiply.__name__) if multiply in ON_BUILDS else contextlib.nullcontext():
        products.product_into(around[:, 1:-1, 1], left, right)
    assert torch.equal(around[:, 1:-1, 1].double(), exact(left, right))
    around[:, 1:-1, 1] = 7.0
    assert bool((around == 7.0).all())


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 1024),
    formats=st.tuples(*[st.sampled_from([2, 4, 5, 8])] * 2),
    magnitude=st.integers(-90, 50),
    bias=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_native_equals_simulated_where_both_are_exact(k, formats, magnitude, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(9, k, generator=generator) * 2.0**magnitude
    b = torch.randn(k, 33, generator=generator)
    left = operands.quantized(a, BlockFloat(formats[0]), Stochastic(seed))
    right = operands.quantized(b, BlockFloat(formats[1]), Stochastic(seed + 1))
    added = torch.randn(33, generator=generator) * 2.0**magnitude if bias else None
    native = products.native(left, right, added)
    assert torch.equal(native, products.simulated(left, right, added))
    if added is None:
        assert torch.equal(native.double(), exact(left, right))  # k <= 1024: 24 bits suffice


@pytest.mark.parametrize("k", [3000, 20000, 130000])
def test_bounds_where_sums_need_rounding(k):
    left, right = plain(codes(8, k, low=64), -7), plain(codes(k, 8, seed=1, low=64), -3)
    true = exact(left, right)
    native = products.native(left, right)
    assert torch.equal(native, true.float())  # one rounding, the nearest
    size = operands.values(left).abs() @ operands.values(right).abs()
    simulated = products.simulated(left, right)
    assert (simulated.double() - true).abs().le((k - 1) * 2.0**-24 * size * 1.01).all()
    assert (simulated.double() - native.double()).abs().le(k * 2.0**-24 * size * 1.01).all()


def test_sums_too_deep_for_int32_are_added_in_parts():
    x = torch.full((2, 2 * kernels.DEEPEST + 3), 127, dtype=torch.int8)
    x[1] = 1
    result = products.native(plain(x), plain(x).transpose())
    assert torch.equal(result.double(), (x.double() @ x.double().T).float().double())


@pytest.mark.parametrize("depth", [kernels.DEEPEST, 3 * kernels.DEEPEST])
@pytest.mark.parametrize("shape", [(2,), (3, 2)])
def test_sums_of_as_many_lowest_codes_as_int32_just_cannot_hold(depth, shape):
    """2**17 times -128 * -128 is 2**31."""
    x = plain(torch.full((*shape, depth), -128, dtype=torch.int8))
    assert (products.native(x, x.transpose()) == 2.0**14 * depth).all()


def test_parts_stay_as_long_where_codes_are_symmetric():
    x = torch.full((1, 2, 2 * kernels.DEEPEST), -127, dtype=torch.int8)
    assert kernels.deepest(x) == kernels.DEEPEST
    x[0, 1, kernels.DEEPEST] = -128
    assert kernels.deepest(x) < kernels.DEEPEST


def test_exponents_of_each_matrix_and_of_the_whole():
    x, y = torch.randn(6, 8, 16), torch.randn(6, 16, 4)
    x *= torch.logspace(-6, 6, 6).view(6, 1, 1)
    each = operands.quantized(x, BlockFloat(8, axes=(0,)), Nearest())
    whole = operands.quantized(y, BlockFloat(8), Nearest())
    assert (each.each, whole.each) == (True, False)
    expected = (
        swalp.quantize(x, BlockFloat(8, axes=(0,)), Nearest()).double()
        @ swalp.quantize(y, BlockFloat(8), Nearest()).double()
    )
    assert torch.equal(products.native(each, whole).double(), expected)
    # A leading dimension of two joined with the next: heads of a sample share its exponent.
    four = Operand(each.codes.view(6, 2, 4, 16), each.exponents.view(6, 1, 1, 1), each.gap)
    other = Operand(four.codes.transpose(-1, -2), four.exponents, four.gap)
    assert torch.equal(products.native(four, other).double(), exact(four, other))


@pytest.mark.parametrize("gap", [-300, -260, -149, -140, 110, 130, 250])
def test_scales_at_the_ends_of_float32(gap):
    left, right = plain(codes(5, 40), gap), plain(codes(40, 6, seed=1), 0)
    expected = (left.codes.double() @ right.codes.double()) * 2.0 ** max(gap, -400)
    result = products.native(left, right)
    assert torch.equal(result, expected.float())


@given(seed=st.integers(0, 1 << 30), word=st.integers(2, 8), symmetric=st.booleans())
@settings(max_examples=40, deadline=None)
def test_codes_are_those_of_quantize(seed, word, symmetric):
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))
    for fmt in (BlockFloat(word, symmetric=symmetric), FixedPoint(word, word - 2)):
        rule = Stochastic(seed, random_bits=16)
        result = operands.quantized(x, fmt, rule)
        assert torch.equal(operands.values(result).float(), swalp.quantize(x, fmt, rule))
        packed = swalp.pack(x, fmt, rule)
        of = operands.of_packed(packed)
        if word <= 4:
            assert of is None  # two codes to a byte
        else:
            assert of.codes.data_ptr() == packed.codes.data_ptr()
            assert torch.equal(operands.values(of).float(), packed.dequantize())


def test_codes_of_tensors_in_other_layouts():
    x = torch.randn(6, 10).t()
    rule = Stochastic(5)
    result = operands.quantized(x, BlockFloat(8), rule)
    assert result.codes.is_contiguous()
    assert torch.equal(operands.values(result).float(), swalp.quantize(x, BlockFloat(8), rule))
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    result = operands.quantized(image, BlockFloat(8), rule)
    assert torch.equal(operands.values(result).float(), swalp.quantize(image, BlockFloat(8), rule))


@pytest.mark.parametrize("symmetric", [True, False])
def test_nan_is_no_operand(symmetric):
    x = torch.randn(4, 4)
    x[1, 2] = torch.nan
    assert operands.quantized(x, BlockFloat(8, symmetric=symmetric), Nearest()) is None
    if symmetric:
        assert operands.of_packed(swalp.pack(x, BlockFloat(8))) is None
    infinite = torch.where(x.isnan(), torch.inf, x)
    fmt = BlockFloat(8, symmetric=symmetric)
    result = operands.quantized(infinite, fmt, Nearest())
    assert torch.equal(operands.values(result).float(), swalp.quantize(infinite, fmt, Nearest()))


def test_formats_without_integer_operands():
    assert operands.gap_of(E4M3) is None
    assert operands.gap_of(BlockFloat(8, tile=4)) is None
    assert operands.gap_of(BlockFloat(9)) is None
    assert operands.gap_of(FixedPoint(8, 6)) == -6
    assert operands.of_packed(swalp.pack(torch.randn(8, 8), E4M3)) is None


def test_mistakes_are_explained():
    a = plain(codes(3, 4))
    with pytest.raises(ValueError, match=r"shapes \(3, 4\) and \(3, 4\)"):
        products.native(a, a)
    each = Operand(a.codes, torch.zeros(3, 1, dtype=torch.int8), 0)
    with pytest.raises(ValueError, match="must have one exponent"):
        products.native(each, a.transpose())


@pytest.mark.parametrize("shape", [(1, 1), (300, 70), (0, 3), (9, 260, 5, 7), (5, 3, 40)])
def test_sums_of_channels_are_exact_and_rounded_once(shape):
    x = codes(*shape, low=-128)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    given = Operand(x, torch.tensor([-3], dtype=torch.int8), -6)
    expected = x.double().sum([0, *range(2, x.dim())]) * 2.0**-9
    assert torch.equal(products.channel_sums(given), expected.float())
    rounded = Operand(torch.full((1 << 18, 1), 127, dtype=torch.int8), None, 0)
    assert float(products.channel_sums(rounded)) == float(torch.tensor(127.0 * 2**18).float())


def test_empty_products():
    none = products.native(plain(codes(3, 0)), plain(codes(0, 4)), torch.arange(4.0))
    assert torch.equal(none, torch.arange(4.0).expand(3, 4))
    assert products.native(plain(codes(0, 5)), plain(codes(5, 4))).shape == (0, 4)
    assert torch.equal(
        kernels.multiply_int_mm(codes(1, 3, 0), codes(1, 0, 2)), torch.zeros(1, 3, 2).int()
    )
    assert torch.equal(kernels.multiply_float(codes(1, 3, 0), codes(1, 0, 2)), torch.zeros(1, 3, 2))


def saturating(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Unsigned times signed, in pairs that saturate at 16 bits: how processors without VNNI add."""
    terms = (left.int() + 128).unsqueeze(-1) * right.int().unsqueeze(1)
    pairs = terms[:, :, 0::2] + terms[:, :, 1::2]
    sums = pairs.clamp(-(2**15), 2**15 - 1).sum(2, dtype=torch.int32)
    return sums - 128 * right.sum(1, keepdim=True, dtype=torch.int32)


def test_the_guard_finds_saturating_sums():
    assert not kernels.exact(saturating)
    assert kernels.exact(lambda a, b: (a.double() @ b.double()).int())


def test_a_machine_without_integer_kernels_is_found_and_said():
    code = (
        "import warnings; warnings.simplefilter('always')\n"
        "from swalp.matmul import kernels\n"
        "kernels.kernel(); print(kernels.kernel().multiply is kernels.multiply_float)\n"
        "print(kernels.describe())\n"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "SWALP_ISA": "scalar"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    first, second = run.stdout.splitlines()
    assert first == "True"
    assert second.startswith("float32, checked against exact sums (swalp has no integer")
    assert run.stderr.count("NativeProductsWarning: native products run in float32") == 1


SMALL_STACK = """
import ctypes, swalp
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(8192)
def fits():
    stack = Stack(ctypes.addressof(memory), 0, 8192)
    found = ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
    ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(None, 2, 0)), None)
    return found
before = fits()
from swalp import _kernels
print(before, _kernels.matmul_used(), fits())
"""


@pytest.mark.skipif("amx" not in BUILDS, reason="this machine or build has no AMX")
@pytest.mark.parametrize(
    ("choice", "expected"), [("", "True AMX False"), ("avx512", "True AVX-512 VNNI True")]
)
def test_linux_is_asked_for_amx_when_it_is_wanted(choice, expected):
    """It refuses small signal stacks from then on, for the whole process; PyTorch asks, too."""
    run = subprocess.run(
        [sys.executable, "-c", SMALL_STACK], capture_output=True, text=True, check=True,
        env=os.environ | {"SWALP_ISA": choice},
    )  # fmt: skip
    assert run.stdout.strip() == expected


@pytest.mark.parametrize(("right", "slow", "found"), [
    ((True, True), False, kernels.multiply_int_mm),
    ((True, True), True, kernels.multiply_float),
    ((False, True), False, kernels.multiply_float),
    ((False, False), False, None),
])  # fmt: skip
def test_the_kernel_is_right_and_then_fast(right, slow, found, monkeypatch):
    of = dict(zip((kernels.multiply_int_mm, kernels.multiply_float), right, strict=True))
    monkeypatch.setattr(kernels, "exact", of.get)
    monkeypatch.setattr(
        kernels, "_seconds", lambda multiply: (multiply is kernels.multiply_int_mm) == slow
    )
    kernel = kernels._checked.__wrapped__("")
    assert kernel.multiply is found
    assert bool(kernel.reason) == (found is not kernels.multiply_int_mm)


@pytest.mark.parametrize("gap", [-75, -63, 0, 55, 64])
def test_scales_beyond_a_float_in_one_factor(gap, monkeypatch):
    """As where there are no kernels of swalp's: a power of two may be no normal float32."""
    monkeypatch.setattr(kernels, "kernel", lambda: kernels.Kernel("f", kernels.multiply_float))
    left, right = plain(codes(3, 2, seed=1), gap), plain(codes(2, 4, seed=2), gap)
    expected = exact(left, right).float()
    assert torch.equal(products.native(left, right), expected)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("exponent", [-128, -20, 0, 100])
@pytest.mark.parametrize("k", [40, kernels.DEEPEST + 3])
def test_a_bias_in_codes(k, exponent):
    left, right = plain(codes(6, k), -9), plain(codes(k, 33, seed=1), -5)
    bias = Operand(codes(33, seed=2), torch.tensor(exponent, dtype=torch.int8), -6)
    expected = products.native(left, right, operands.floats(bias))
    assert torch.equal(products.native(left, right, bias), expected)
    floats = operands.floats(left)
    expected = (floats @ operands.floats(right)).add_(operands.floats(bias))
    assert torch.equal(products.product(floats, operands.floats(right), bias), expected)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "shape", [(7, 16, 40), (600, 48, 2000), (20, 512, 700), (513, 1040, 130), (9, 40, 50)]
)
def test_relu_of_a_product_is_relu_of_its_result(shape, threads, build):
    m, n, k = shape
    left, right = plain(codes(m, k), -9), plain(codes(k, n, seed=1), -5)
    right.codes[:, 3] = 0  # zeros, of which a bias below 0 makes others
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).mul_(8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for added in (None, bias, -bias.abs()):
            with running(build):
                y = products.product(left, right, added)
                z, passed = products.rectified(left, right, added)
            assert torch.equal(z, y.relu())
            bits = (passed.reshape(-1, 1) >> torch.arange(8)) & 1
            assert torch.equal(bits.reshape(-1)[: m * n].bool(), (y > 0).reshape(-1))
            assert bool((z.view(torch.int32) >= 0).all())  # no -0
    finally:
        torch.set_num_threads(before)


def test_float_sums_are_exact_under_autocast():
    left, right = codes(1, 5, 3000, seed=1, low=-128), codes(1, 3000, 4, seed=2, low=-128)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernels.multiply_float(left, right)
    assert torch.equal(got.double(), left.double() @ right.double())
