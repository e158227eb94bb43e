"""Convolutions of codes: exact in every shape, with every instruction set and number of threads."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from swalp import _kernels
from swalp.matmul import convolution
from swalp.matmul.convolution import Weight, Window
from swalp.matmul.operands import Operand

BUILDS = ["scalar", "avx2", "avx512", "amx"]


def codes(*shape: int, seed: int, low: int = -128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 128, shape, generator=generator, dtype=torch.int8)


@pytest.fixture(params=BUILDS)
def build(request):
    best = _kernels.used()
    try:
        _kernels.use(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    _kernels.use(best)


def truth(x, w, dy, window):
    """Forward, input gradient, weight gradient in float64, where all these sums are exact."""
    settings = [*map(list, (window.stride, window.padding, window.dilation))]
    zero = [0] * len(window.stride)
    operands = [tensor.double() for tensor in (x, w, dy)]
    y = torch.ops.aten.convolution(
        operands[0], operands[1], None, *settings, False, zero, window.groups
    )
    dx, dw, _ = torch.ops.aten.convolution_backward(
        operands[2], operands[0], operands[1], None, *settings, False, zero, window.groups,
        [True, True, False],
    )  # fmt: skip
    return y, dx, dw


def compare(x, w, dy, window, bias=None):
    ops = [
        Operand(x, None, -3),
        Operand(w, torch.tensor([5], dtype=torch.int8), -2),
        Operand(dy, None, 1),
    ]
    weight = Weight(ops[1], window.groups)
    y, dx, dw = truth(x, w, dy, window)
    expected = y.float()
    if bias is not None:
        expected = expected + bias.view(1, -1, *[1] * (x.dim() - 2))
    assert torch.equal(convolution.forward(ops[0], weight, bias, window), expected)
    found = convolution.input_gradient(ops[2], weight, x.shape[2:], window)
    assert torch.equal(found, (dx * 16).float())
    for last in (False, True):
        found = convolution.weight_gradient(ops[0], ops[2], w.shape[2:], window, last)
        assert torch.equal(found, (dw / 4).float())


sizes = st.sampled_from([1, 2, 3, 4, 5, 8, 11, 17, 26])
channels = st.sampled_from([1, 3, 4, 7, 16, 17, 33, 70])


@settings(max_examples=50, deadline=None)
@given(data=st.data(), dims=st.integers(1, 2), groups=st.sampled_from([1, 1, 2, 3]))
def test_exact_in_every_shape(data, dims, groups):
    def each(strategy):
        return tuple(data.draw(strategy) for _ in range(dims))

    window = Window(
        each(st.integers(1, 3)), each(st.integers(0, 3)), each(st.integers(1, 2)), groups
    )
    size, kernel = each(sizes), each(st.integers(1, 4))
    out_size = window.out_size(size, kernel)
    assume(min(out_size) > 0)
    batch, seed = data.draw(st.sampled_from([1, 2, 5, 13, 19, 66])), data.draw(st.integers(0, 99))
    inner, outer = data.draw(channels) * groups, data.draw(channels) * groups
    w = codes(outer, inner // groups, *kernel, seed=seed)
    if dims == 2 and data.draw(st.booleans()):
        w = w.to(memory_format=torch.channels_last)
    bias = torch.randn(outer) if data.draw(st.booleans()) else None
    compare(
        codes(batch, inner, *size, seed=seed + 1), w,
        codes(batch, outer, *out_size, seed=seed + 2), window, bias,
    )  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_instructions_and_threads(build, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch, size, groups in ((9, 5, 1), (9, 26, 1), (18, 20, 1), (67, 3, 1), (16, 34, 2)):
            window = Window((2, 1), (1, 2), (1, 2), groups)
            out = window.out_size((size, size), (3, 3))
            compare(
                codes(batch, 24 * groups, size, size, seed=1),
                codes(37 * groups, 24, 3, 3, seed=2), codes(batch, 37 * groups, *out, seed=3),
                window,
            )  # fmt: skip
    finally:
        torch.set_num_threads(before)


def test_depthwise():
    window = Window((1, 2), (1, 1), (1, 1), groups=21)
    out = window.out_size((14, 14), (3, 3))
    compare(
        codes(3, 21, 14, 14, seed=1), codes(42, 1, 3, 3, seed=2), codes(3, 42, *out, seed=3), window
    )


def test_a_large_image_is_taken_in_bands():
    window = Window((1, 1), (1, 1), (1, 1))
    compare(
        codes(1, 64, 200, 40, seed=1), codes(8, 64, 3, 3, seed=2),
        codes(1, 8, 200, 40, seed=3), window,
    )  # fmt: skip


@pytest.mark.parametrize("value", [127, -127])
def test_the_deepest_sums(value):
    x = torch.full((128, 1, 32, 32), 127, dtype=torch.int8)
    dy = torch.full((128, 1, 32, 32), value, dtype=torch.int8)
    dw = convolution.weight_gradient(
        Operand(x, None, 0), Operand(dy, None, 0), (1, 1), Window((1, 1), (0, 0), (1, 1))
    )
    assert torch.equal(dw, torch.full((1, 1, 1, 1), 127.0 * value * 131072))


@pytest.mark.parametrize("shape", [(128, 32, 32), (1, 256, 512), (130, 32, 32), (1, 1 << 17)])
def test_sums_of_as_many_lowest_codes_as_int32_just_cannot_hold(shape):
    """2**17 times -128 * -128 is 2**31."""
    codes = torch.full((shape[0], 4, *shape[1:]), -128, dtype=torch.int8)
    x, kernel = Operand(codes, None, 0), (1,) * (len(shape) - 1)
    window = Window(kernel, (0,) * len(kernel), kernel)
    dw = convolution.weight_gradient(x, x, kernel, window)
    assert (dw == 2.0**14 * (x.codes.numel() // 4)).all()


def test_parts_of_a_batch_whose_sums_would_overflow():
    x, dy = codes(140, 5, 32, 32, seed=1), codes(140, 3, 32, 32, seed=2)
    window = Window((1, 1), (1, 1), (1, 1))
    found = convolution.weight_gradient(Operand(x, None, 0), Operand(dy, None, 0), (3, 3), window)
    w = codes(3, 5, 3, 3, seed=3)
    assert torch.allclose(found.double(), truth(x, w, dy, window)[2], rtol=2e-7, atol=16)


def test_scales_beyond_float32():
    x = Operand(torch.ones(1, 1, 1, 1, dtype=torch.int8), None, 100)
    for gap, expected in ((-249, 2.0**-149), (-260, 0.0), (27, 2.0**127), (60, float("inf"))):
        w = Weight(Operand(torch.ones(1, 1, 1, 1, dtype=torch.int8), None, gap), 1)
        y = convolution.forward(x, w, None, Window((1, 1), (0, 0), (1, 1)))
        assert y.item() == expected


def test_results_have_their_channels_last():
    window = Window((1, 1), (1, 1), (1, 1))
    x = codes(2, 8, 5, 5, seed=1)
    weight = Weight(Operand(codes(6, 8, 3, 3, seed=2), None, 0), 1)
    y = convolution.forward(Operand(x, None, 0), weight, None, window)
    assert y.shape == (2, 6, 5, 5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    dw = convolution.weight_gradient(
        Operand(x, None, 0), Operand(codes(2, 6, 5, 5, seed=3), None, 0), (3, 3), window, True
    )
    assert dw.is_contiguous(memory_format=torch.channels_last)


def test_what_is_simulated_says_why():
    window = Window((1, 1), (1, 1), (1, 1))
    assert convolution.unsupported(8, (32, 32), (64, 64, 3, 3), window) == ""
    deep = convolution.unsupported(8, (32, 32), (64, 1 << 15, 3, 3), window)
    assert "131072 products" in deep
    assert convolution.unsupported(8, (32, 32), (64, 1 << 17, 1, 1), window) != ""
    assert "positions" in convolution.unsupported(1, (400, 400), (64, 64, 3, 3), window)
    assert "larger than the padded image" in convolution.unsupported(
        1, (9, 2), (64, 64, 3, 5), window
    )
    grouped = Window((1, 1), (1, 1), (1, 1), groups=64)
    assert "float is faster" in convolution.unsupported(8, (32, 32), (64, 1, 3, 3), grouped)
    volume = Window((1,) * 3, (0,) * 3, (1,) * 3)
    assert "3 dimensions" in convolution.unsupported(8, (4, 4, 4), (8, 8, 1, 1, 1), volume)


def test_the_obstacle_is_named():
    best = _kernels.used()
    try:
        _kernels.use("scalar")
        assert "no AVX2" in convolution.obstacle()
    finally:
        _kernels.use(best)
    assert convolution.obstacle() == "" or not _kernels.has_fast_convolution()


def test_exponents_must_be_one():
    x = Operand(codes(2, 4, 5, 5, seed=1), torch.zeros(2, 1, 1, 1, dtype=torch.int8), 0)
    with pytest.raises(ValueError, match="2 exponents"):
        convolution.exponent_of(x)
