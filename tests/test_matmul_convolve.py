"""The convolution layer on integers: the numbers of the simulation, codes alone kept."""

import pytest
import torch
import torch.nn.functional as F

import swalp
from swalp import BlockFloat, FixedPoint, Nearest, Stochastic, pack
from swalp.matmul import convolution
from swalp.matmul.convolution import Window
from swalp.matmul.convolve import convolve
from swalp.quantize import quantize

pytestmark = pytest.mark.skipif(bool(convolution.obstacle()), reason=convolution.obstacle())

ACTIVATION = (BlockFloat(8), Stochastic(1, random_bits=16))
ERROR = (BlockFloat(8), Stochastic(2, random_bits=16))
WEIGHT = BlockFloat(8)


class Simulated(torch.autograd.Function):
    """The definition: quantized operands, products in float64."""

    @staticmethod
    def forward(ctx, x, w, b, window, activation, error):
        x = quantize(x, *activation)
        ctx.save_for_backward(x, w)
        ctx.window, ctx.error = window, error
        convolution_of = F.conv2d if x.dim() == 4 else F.conv1d
        y = convolution_of(
            x.double(), w.double(), None, window.stride, window.padding, window.dilation,
            window.groups,
        ).float()  # fmt: skip
        return y + b.view(1, -1, *[1] * (x.dim() - 2))

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        e = quantize(grad, *ctx.error)
        window = ctx.window
        dx, dw, db = torch.ops.aten.convolution_backward(
            e.double(), x.double(), w.double(), [w.shape[0]], window.stride, window.padding,
            window.dilation, False, [0] * len(window.stride), window.groups, [True] * 3,
        )  # fmt: skip
        return dx.float(), dw.float(), db.float(), None, None, None


def run(function, x, w, b, dy):
    x, w, b = (tensor.detach().requires_grad_() for tensor in (x, w, b))
    y = function(x, w, b)
    y.backward(dy)
    return y.detach(), x.grad, w.grad, b.grad


CASES = [
    ((4, 8, 9, 9), (12, 8, 3, 3), Window((1, 1), (1, 1), (1, 1))),
    ((4, 8, 9, 9), (12, 8, 3, 3), Window((2, 2), (1, 1), (1, 1))),
    ((3, 8, 20, 14), (16, 4, 1, 3), Window((1, 2), (0, 2), (1, 2), groups=2)),
    ((5, 6, 31), (10, 6, 5), Window((2,), (2,), (1,))),
]


@pytest.mark.parametrize(("shape", "weight", "window"), CASES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_simulation(shape, weight, window, last, packed):
    torch.manual_seed(0)
    x, b = torch.randn(shape), torch.randn(weight[0])
    w = quantize(torch.randn(weight), WEIGHT)
    dy = torch.randn(shape[0], weight[0], *window.out_size(shape[2:], weight[2:]))
    if last and x.dim() == 4:
        x, dy, w = (one.to(memory_format=torch.channels_last) for one in (x, dy, w))
    expected = run(lambda *a: Simulated.apply(*a, window, ACTIVATION, ERROR), x, w, b, dy)
    given = pack(w, WEIGHT) if packed else w
    found = run(lambda *a: convolve(*a, window, WEIGHT, ACTIVATION, ERROR), x, given, b, dy)
    for mine, true in zip(found, expected, strict=True):
        assert torch.equal(mine, true)
    if not packed:
        assert found[2].stride() == w.stride()


def test_keeps_codes_alone():
    saved = []
    x = torch.randn(4, 16, 12, 12, requires_grad=True)
    w = pack(torch.randn(8, 16, 3, 3), WEIGHT).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        convolve(x, w, None, Window((1, 1), (1, 1), (1, 1)), WEIGHT, ACTIVATION, ERROR)
    activations = [t for t in saved if type(t) is torch.Tensor]
    assert sum(t.nbytes for t in activations) == x.numel() + 1  # and an exponent


def test_fixed_point_and_nearest():
    torch.manual_seed(0)
    fmt = FixedPoint(8, 5)
    window = Window((1, 1), (1, 1), (1, 1))
    x, w = torch.randn(4, 8, 9, 9), quantize(torch.randn(6, 8, 3, 3), fmt)
    b, dy = torch.randn(6), torch.randn(4, 6, 9, 9)
    way = (fmt, Nearest())
    expected = run(lambda *a: Simulated.apply(*a, window, way, way), x, w, b, dy)
    found = run(lambda *a: convolve(*a, window, fmt, way, way), x, w, b, dy)
    for mine, true in zip(found, expected, strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("where", ["input", "error", "weight"])
def test_what_has_no_integers_goes_through_float(where):
    torch.manual_seed(0)
    window = Window((1, 1), (1, 1), (1, 1))
    x, w = torch.randn(4, 8, 9, 9), quantize(torch.randn(6, 8, 3, 3), WEIGHT)
    b, dy = torch.randn(6), torch.randn(4, 6, 9, 9)
    if where == "weight":
        w = torch.randn(6, 8, 3, 3)  # off the grid
    else:
        (x if where == "input" else dy)[1, 2, 3, 4] = float("nan")
    expected = run(lambda *a: Simulated.apply(*a, window, ACTIVATION, ERROR), x, w, b, dy)
    found = run(lambda *a: convolve(*a, window, WEIGHT, ACTIVATION, ERROR), x, w, b, dy)
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, equal_nan=True, rtol=1e-5, atol=1e-4)
    assert found[0].isnan().any() == (where == "input")


def test_the_noise_does_not_depend_on_memory():
    torch.manual_seed(0)
    x, w = torch.randn(4, 8, 9, 9), swalp.pack(torch.randn(6, 8, 3, 3), WEIGHT)
    window = Window((1, 1), (1, 1), (1, 1))
    a, b = (
        convolve(one, w, None, window, WEIGHT, ACTIVATION, ERROR)
        for one in (x, x.to(memory_format=torch.channels_last))
    )
    assert torch.equal(a, b)
