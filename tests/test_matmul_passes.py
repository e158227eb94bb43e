"""A linear layer's passes in one compiled call each: what they find step by step, bit for bit."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad

import swalp
from swalp import BlockFloat, FixedPoint, Nearest, Stochastic
from swalp.extension import WATCHERS
from swalp.matmul import kernels, passes, relu
from swalp.matmul.linear import linear
from swalp.noise import fresh_seed
from swalp.quantize import plans
from test_matmul import BUILDS, running

if plans.available:
    from swalp import _kernels

pytestmark = pytest.mark.skipif(not BUILDS, reason="there is no compiled product here")

EIGHT = BlockFloat(8)
NOISY = Stochastic(5, random_bits=16, step=3)


@pytest.fixture(params=BUILDS)
def build(request):
    with running(request.param):
        yield


@pytest.fixture
def calls(monkeypatch):
    """What the passes gave, one after another: None where they left it to the steps."""
    found = []
    for name in ("forward", "backward", "errors"):
        own = getattr(passes, name)
        monkeypatch.setattr(passes, name, lambda *a, own=own: found.append(own(*a)) or found[-1])
    return found


def step_by_step(monkeypatch):
    for name in ("forward", "backward", "errors"):
        monkeypatch.setattr(passes, name, lambda *_: None)


def tensors(shape, outputs, packed, transposed, bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(outputs, shape[-1], generator=generator)
    added = torch.randn(outputs, generator=generator) if bias else None
    if transposed:
        weight = weight.t().contiguous()
    if packed:
        weight = swalp.pack(weight, EIGHT, Nearest())
        added = None if added is None else swalp.pack(added, EIGHT, Nearest())
    else:
        weight = swalp.quantize(weight, EIGHT, Nearest())
    grad = torch.randn(*shape[:-1], outputs, generator=generator)
    return x, weight, added, grad


def run(x, weight, bias, grad, formats=(EIGHT, EIGHT), rounding=NOISY, wanted=(1, 1, 1), **options):
    """The result, and the gradients that are wanted."""
    x = x.clone().requires_grad_(bool(wanted[0]))
    leaves = [x]
    for given, needs in ((weight, wanted[1]), (bias, wanted[2])):
        if given is not None:
            leaf = given.detach().clone().requires_grad_(bool(needs))
            leaves.append(leaf)
    y = linear(
        *leaves, *[None] * (3 - len(leaves)), EIGHT, (formats[0], rounding), (formats[1], rounding),
        **options,
    )  # fmt: skip
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    return [y.detach().clone(), *torch.autograd.grad(y, inputs, grad)]


def same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.is_contiguous()
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


SHAPES = [(1, 1), (3, 5), (7, 16), (2, 3, 40), (2, 2, 3, 8), (130, 70), (512, 784)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_one_call_is_all_its_steps(shape, rectified, packed, build, monkeypatch, calls):
    outputs = 48 if shape[-1] < 100 else 1024
    for transposed, bias, rounding in itertools.product(
        (False, True), (False, True), (Nearest(), NOISY)
    ):
        given = tensors(shape, outputs, packed, transposed, bias)
        options = {"rounding": rounding, "transposed": transposed, "rectified": rectified}
        calls.clear()
        found = run(*given, **options)
        assert len(calls) == 2
        assert None not in calls
        with monkeypatch.context() as patch:
            step_by_step(patch)
            expected = run(*given, **options)
        same(found, expected)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_gradients_that_nobody_wants_are_left_out(wanted, monkeypatch):
    given = tensors((6, 20), 32, True, False, True)
    found = run(*given, wanted=wanted, rectified=True)
    everything = run(*given, rectified=True)
    same(
        found, [everything[0], *(g for g, want in zip(everything[1:], wanted, strict=True) if want)]
    )


@pytest.mark.parametrize("outputs", [1, 7, 10, 33])
def test_a_rectified_result_that_the_kernel_does_not_write(outputs, build, monkeypatch, calls):
    given = tensors((9, 24), outputs, True, False, True)
    found = run(*given, rectified=True)
    assert calls[0] is None  # bits of 16 columns at a time
    assert calls[1] is not None
    with monkeypatch.context() as patch:
        step_by_step(patch)
        same(found, run(*given, rectified=True))


FORMATS = [
    FixedPoint(8, 4),
    BlockFloat(4),
    BlockFloat(8, symmetric=False),
    BlockFloat(6, exponent_bits=5),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_formats(fmt, build, monkeypatch, calls):
    given = tensors((40, 24), 32, True, False, True)
    found = run(*given, formats=(fmt, fmt), rectified=True)
    assert None not in calls
    with monkeypatch.context() as patch:
        step_by_step(patch)
        same(found, run(*given, formats=(fmt, fmt), rectified=True))


def test_what_one_call_cannot_do_goes_step_by_step(monkeypatch, calls):
    x, weight, bias, grad = tensors((6, 4, 16), 32, True, False, True)
    rows = BlockFloat(8, axes=(0,))  # an exponent for each sample
    for changed, reason in (
        ({"formats": (rows, EIGHT)}, 0), ({"formats": (EIGHT, rows)}, 1),
        ({"rounding": Stochastic(random_bits=16)}, 0),
    ):  # fmt: skip
        calls.clear()
        try:
            run(x, weight, bias, grad, **changed)
        except ValueError:
            assert "formats" in changed  # of a sum along which an exponent changes
        assert calls[reason] is None
    off_grid = weight.dequantize() + 0.01
    calls.clear()
    run(x, off_grid, bias, grad)
    assert calls[0] is None


def with_nan(x, place):
    x = x.clone()
    x.view(-1)[place] = torch.nan
    return x


@pytest.mark.parametrize("rectified", [False, True])
def test_a_nan_goes_through_float32(rectified, monkeypatch, calls):
    x, weight, bias, grad = tensors((6, 16), 32, True, False, True)
    for given in ((with_nan(x, 20), weight, bias, grad), (x, weight, bias, with_nan(grad, 3))):
        calls.clear()
        found = run(*given, rectified=rectified)
        passed_over = rectified and given[0] is x and calls[1] is not None
        assert None in calls or passed_over
        with monkeypatch.context() as patch:
            step_by_step(patch)
            expected = run(*given, rectified=rectified)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert any(a.isnan().any() for a in found) or passed_over


def test_a_nan_that_did_not_pass_is_no_number_of_the_gradient(calls):
    x, weight, bias, grad = tensors((6, 16), 32, True, False, True)
    y, *expected = run(x, weight, bias, grad, rectified=True)
    stopped = int((y.view(-1) == 0).nonzero()[0])
    plain = grad.clone()
    plain.view(-1)[stopped] = 1e30  # the largest by far
    for given in (with_nan(grad, stopped), plain):
        calls.clear()
        _, *found = run(x, weight, bias, given, rectified=True)
        assert None not in calls
        same(found, expected)


@pytest.mark.parametrize("rectified", [False, True])
def test_gradients_that_others_hold_or_that_lie_otherwise(rectified, monkeypatch):
    x, weight, bias, grad = tensors((64, 96), 2048, True, False, True)  # large enough for `buffers`
    laid = (
        grad,
        grad.t().contiguous().t(),
        torch.ones(()).expand_as(grad),
        torch._neg_view(grad),
        grad[:, :1].expand_as(grad),
    )
    for each in laid:
        before = each.clone()
        found = run(x, weight, bias, each, rectified=rectified)
        assert torch.equal(each, before)
        with monkeypatch.context() as patch:
            step_by_step(patch)
            same(found, run(x, weight, bias, each, rectified=rectified))


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_gradient(bits, rectified):
    *given, grad = tensors((6, 16), 32, True, False, True)
    packed = swalp.pack(grad, BlockFloat(bits), Nearest())
    same(
        run(*given, packed, rectified=rectified),
        run(*given, packed.dequantize(), rectified=rectified),
    )


@pytest.mark.parametrize("columns", [8, 64, 10_000])
def test_a_weight_that_became_another_is_refused(columns):
    x, weight, _, grad = tensors((6, 16), 32, False, False, False)
    x.requires_grad_()
    y = linear(x, weight.requires_grad_(), None, EIGHT, (EIGHT, NOISY), (EIGHT, NOISY))
    weight.data = swalp.quantize(torch.randn(32, columns), EIGHT, Nearest())
    with pytest.raises(RuntimeError, match="invalid gradient"):
        torch.autograd.grad(y, x, grad)


def test_what_was_saved_may_come_back_elsewhere():
    given = tensors((6, 16), 32, True, False, True)

    def apart(x):
        if type(x) is not torch.Tensor or x.dtype == torch.float32:
            return x
        room = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        room[..., ::2] = x
        return room[..., ::2]

    for rectified in (False, True):
        expected = run(*given, rectified=rectified)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, apart):
            same(run(*given, rectified=rectified), expected)


def test_a_gradient_is_let_go_unless_somebody_holds_it():
    x, weight, bias, _ = tensors((64, 96), 2048, True, False, True)
    x.requires_grad_()
    held = []

    def given(held_by):
        y = linear(x, weight, bias, EIGHT, (EIGHT, NOISY), (EIGHT, NOISY), rectified=True)
        if held_by is not None:
            y.register_hook(lambda g: held_by.append(g))
        return y

    given(held).square().sum().backward()
    assert held[0].shape == (64, 2048)
    expected, x.grad = x.grad, None
    given(None).square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_twice_through_one_graph():
    x, weight, bias, grad = tensors((6, 16), 32, True, False, True)
    x.requires_grad_()
    y = linear(x, weight, bias, EIGHT, (EIGHT, NOISY), (EIGHT, NOISY), rectified=True)
    first = torch.autograd.grad(y, x, grad, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x, grad)[0])


def test_large_layers_make_one_gradient_after_the_other(build, monkeypatch, calls):
    """There the steps remain, but what passes ReLU is rounded as it is read."""
    given = tensors((1024, 768), 1024, True, False, True)
    for _ in range(3):  # a likely exponent is tried first from the second time on
        calls.clear()
        found = run(*given, rectified=True)
        assert [each is None for each in calls] == [False, False]
    with monkeypatch.context() as patch:
        step_by_step(patch)
        same(found, run(*given, rectified=True))


def test_sums_that_an_int32_does_not_hold(monkeypatch, calls):
    deep = kernels.DEEPEST + 3
    for shape, outputs, done in (((2, deep), 16, [False, True]), ((deep, 2), 3, [True, False])):
        given = tensors(shape, outputs, True, False, True)
        calls.clear()
        found = run(*given)
        assert [each is not None for each in calls] == done  # along inputs, and along rows
        with monkeypatch.context() as patch:
            step_by_step(patch)
            same(found, run(*given))


def test_without_pytorchs_exchange(monkeypatch, calls):
    given = tensors((6, 16), 32, True, False, True)
    expected = run(*given, rectified=True)
    calls.clear()
    watching = _kernels.Torch(torch, forward_ad, WATCHERS, fresh_seed, False)
    monkeypatch.setattr(passes, "TORCH", watching)
    same(run(*given, rectified=True), expected)
    assert calls == [None] * 3


@pytest.mark.parametrize("count", [1, 7, 8, 15, 16, 17, 1000, 2048, 70001, (1 << 20) + 5])
@pytest.mark.parametrize("rounding", [Nearest(), NOISY])
def test_what_passed_is_rounded_as_if_the_rest_were_zero(count, rounding, build):
    generator = torch.Generator().manual_seed(count)
    grad = torch.randn(1, count, generator=generator)
    y = torch.randn(1, count, generator=generator)
    passed = relu.forward(y, torch.empty_like(y))
    grad.masked_fill_(y <= 0, 1e20)  # of no weight
    expected = plans.available and swalp.pack(grad.where(y > 0, torch.zeros(())), EIGHT, rounding)
    for _ in range(3):
        found = passes.errors(grad, passed, (EIGHT, rounding))
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.exponents, expected.exponents)
