"""Kernels work on addresses: tensors whose memory is not what it seems must not reach them."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

import swalp
from swalp import BlockFloat, FixedPoint, pack, quantize
from swalp.averaging.kernel import take_rounded
from swalp.lab.engine import Method, Trajectory, descend
from swalp.lab.problems import LeastSquares, Softmax
from swalp.matmul import handed
from swalp.quantize import codes, dispatch, plans

BYTE = BlockFloat(8)


class Wrapper(torch.Tensor):
    """A tensor that holds another and has no memory of its own, as some libraries' have."""

    @staticmethod
    def __new__(cls, inner):
        result = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
        )
        result.held = inner
        return result

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(x):
            return x.held if isinstance(x, Wrapper) else x

        result = func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
        wrapped = isinstance(result, torch.Tensor) and func is not torch.ops.aten.copy_.default
        return Wrapper(result) if wrapped else result


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(native=True, packed=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU())
    recipe = swalp.recipes.get("native-8")
    if not native:
        recipe = replace(recipe, product="simulated")
    return swalp.convert(model, recipe, packed=packed)


def forward_and_gradients(model, x, dy):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    return y.detach(), x.grad


STRANGE_BIASES = {
    "strided": lambda: values(16)[::2],
    "expanded": lambda: torch.full((1,), 0.5).expand(8),
    "negated": lambda: torch._neg_view(values(8)),
    "wrapped": lambda: Wrapper(values(8)),
}


@pytest.mark.parametrize("kind", STRANGE_BIASES)
@pytest.mark.parametrize("layer", ["linear", "convolution"])
def test_a_bias_is_added_whatever_its_memory(kind, layer):
    results = []
    for native in (True, False):
        torch.manual_seed(0)
        first = nn.Linear(16, 8) if layer == "linear" else nn.Conv1d(16, 8, 1)
        recipe = swalp.recipes.get("native-8")
        recipe = recipe if native else replace(recipe, product="simulated")
        model = swalp.convert(nn.Sequential(first), recipe)
        model[0].bias = nn.Parameter(STRANGE_BIASES[kind]())
        x = values(4, 16) if layer == "linear" else values(2, 16, 3)
        results.append(model(x))
    native, simulated = (getattr(y, "held", y) for y in results)
    # Where PyTorch adds a convolution's bias within its sum differs by the processor.
    torch.testing.assert_close(native, simulated, rtol=1e-6, atol=1e-6)


def test_a_bias_of_another_shape_or_type_is_an_error_as_in_float():
    for bias in (torch.ones(2), torch.ones(8, dtype=torch.float64)):
        model = linear()
        model[0].bias = nn.Parameter(bias)
        with pytest.raises(RuntimeError):
            model(values(4, 16))


def test_negated_gradients_keep_their_sign():
    model, x = linear(), values(4, 16)
    expected = forward_and_gradients(model, x, -torch.ones(4, 8))
    model = linear()
    found = forward_and_gradients(model, x, torch._neg_view(torch.ones(4, 8)))
    assert torch.equal(found[1], expected[1])
    images = values(2, 3, 8, 8).requires_grad_()
    torch.manual_seed(0)
    pooled = swalp.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2)), "native-8")
    pooled(images).backward(torch._neg_view(torch.ones(2, 4, 4, 4)))
    assert float(pooled[0].bias.grad.sum()) == -128.0


@pytest.mark.parametrize("kind", ["wrapped", "fake"])
def test_tensors_without_memory_do_not_crash(kind):
    model = linear()
    image = swalp.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2)), "native-8")
    if kind == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert model(torch.empty(4, 16)).shape == (4, 8)
            assert nn.Sequential(nn.ReLU())(torch.empty(4, 16)).shape == (4, 16)
        return
    given = values(4, 16)
    assert torch.equal(model(Wrapper(given)).held, linear(native=False)(given))
    assert model[1](Wrapper(values(4, 8).requires_grad_())).shape == (4, 8)
    assert image(Wrapper(values(2, 3, 8, 8).requires_grad_())).shape == (2, 4, 4, 4)
    assert torch.equal(quantize(Wrapper(given), BYTE).held, quantize(given, BYTE))


def test_parameters_without_memory_are_averaged_and_trained_as_others():
    average = pack(torch.zeros(4, 4), BYTE)
    assert not take_rounded(average, Wrapper(values(4, 4)), swalp.Nearest(), 1.0, 1)
    inner = values(4, 4)
    parameter = nn.Parameter(Wrapper(inner.clone()))
    optimizer = swalp.optim.SGD([parameter], 0.1, recipe="paper-big-block-8")
    parameter.grad = torch.ones(4, 4)
    optimizer.step()
    plain = nn.Parameter(inner.clone())
    other = swalp.optim.SGD([plain], 0.1, recipe="paper-big-block-8")
    plain.grad = torch.ones(4, 4)
    other.step()
    assert torch.equal(parameter.detach().held, plain)


def test_negated_parameters_are_trained_as_others():
    results = []
    for negated in (True, False):
        value = torch._neg_view(values(4, 4).clone())
        parameter = nn.Parameter(value if negated else value.resolve_neg())
        optimizer = swalp.optim.SGD([parameter], 0.1, recipe="paper-big-block-8")
        parameter.grad = torch.ones(4, 4)
        optimizer.step()
        results.append(parameter.detach().resolve_neg())
    assert torch.equal(*results)


def test_an_average_takes_nothing_of_another_shape():
    average = pack(torch.zeros(64, 64), BYTE)
    assert not take_rounded(average, values(2, 2), swalp.Nearest(), 1.0, 1)


def test_many_tensors_into_memory_that_overlaps_theirs():
    for fmt in (BYTE, FixedPoint(8, 4)):
        memory, apart = values(1001), values(1001)
        (found,) = swalp.quantize_many([memory[:-1]], fmt, out=[memory[1:]])
        assert torch.equal(found, quantize(apart[:-1], fmt))


def test_exponents_of_any_integer_type_are_read():
    packed = pack(values(6, 8), BlockFloat(8, axes=(0,)))
    for dtype in (torch.int16, torch.int32, torch.int64):
        read = dispatch.unpack(packed.codes, packed.exponents.to(dtype), packed.format)
        assert torch.equal(read, packed.dequantize())


def test_native_products_refuse_exponents_of_two_bytes():
    recipe = swalp.recipes.get("native-8")
    wide = swalp.recipes.Quantizer(BlockFloat(8, exponent_bits=10), recipe.weight.rounding)
    with pytest.raises(ValueError, match="exponent too"):
        replace(recipe, weight=wide)


@pytest.mark.parametrize("part", [lambda w: w[:2], lambda w: w.t()])
def test_parts_of_packed_tensors_see_nan_in_the_whole(part):
    whole = pack(values(4, 4), BYTE)
    piece = part(whole)
    assert not piece.has_nan()
    whole.copy_(torch.full((4, 4), torch.nan))
    assert piece.has_nan()


def test_packed_tensors_in_shared_memory_see_nan_that_another_process_wrote():
    ours = pack(values(4, 4), BYTE).share_memory_()
    assert not ours.has_nan()
    # As another process has it: other tensors, with versions of their own, on the same memory.
    codes, exponents = (torch.from_numpy(part.numpy()) for part in (ours.codes, ours.exponents))
    theirs = swalp.PackedTensor(codes, exponents, BYTE, (4, 4))
    theirs.copy_(torch.full((4, 4), torch.nan))
    assert ours.has_nan()


def test_deep_copies_of_packed_tensors_look_for_nan_themselves():
    whole = pack(values(4, 4), BYTE)
    for _ in range(3):
        whole.copy_(values(4, 4))
        assert not whole.has_nan()
    for writes in range(1, 7):
        other = copy.deepcopy(whole)
        for _ in range(writes):
            other.copy_(torch.full((4, 4), torch.nan))
        assert other.has_nan()
    assert not whole.has_nan()


@pytest.mark.parametrize("packed", [True, False])
def test_autograd_knows_of_the_compiled_step(packed):
    model = linear(packed=packed)
    optimizer = swalp.optim.SGD(model.named_parameters(), 0.5, recipe="native-8")
    loss = model(values(4, 16).requires_grad_()).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("again", [True, False])
def test_autograd_knows_of_quantizing_in_place(many, again):
    x = values(8, 8).requires_grad_()
    y = x * 1.0
    loss = y.square().sum()
    with torch.no_grad():
        for _ in range(1 + again):  # the second finds its format known
            if many:
                swalp.quantize_many([y], BYTE, out=[y])
            else:
                quantize(y, BYTE, out=y)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_autograd_knows_of_an_average_that_moves():
    average = swalp.WeightAverage(model := nn.Linear(4, 4))
    average.update_parameters(model)
    x = values(2, 4).requires_grad_()
    loss = average.module(x).square().sum()
    average.update_parameters(model)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_graph_quantizes():
    traced = torch.jit.trace(lambda x: quantize(x, BYTE), (values(5),), check_trace=False)
    assert torch.equal(traced(values(5, seed=1)), quantize(values(5, seed=1), BYTE))


def test_a_plan_is_seen_whole_by_other_threads(monkeypatch):
    fmt = swalp.parse_format("e4m3fn")
    packed, found = pack(values(100), fmt), []
    plans.plan_of(fmt).table = None
    made = codes.table

    def slowly(element):
        other = threading.Thread(target=lambda: found.append(packed.dequantize()))
        if not found:
            found.append(None)
            other.start()
            other.join()
        return made(element)

    monkeypatch.setattr(codes, "table", slowly)
    expected = dispatch.unpack(packed.codes, None, fmt)
    assert torch.equal(found[1], expected)


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)])
def test_results_of_other_kernels_may_be_changed_in_place_too(shape, monkeypatch):
    from swalp.matmul import kernels

    monkeypatch.setattr(kernels, "kernel", lambda: kernels.Kernel("f", kernels.multiply_float))
    assert handed.SMALL > 96
    model = linear()
    model[1].inplace = True
    assert (model(values(*shape).requires_grad_()) >= 0).all()


def test_data_of_convex_problems_are_checked():
    data = values(20, 4)
    rows = torch.arange(5)
    for problem in (
        LeastSquares(data[:, :3], data[:, 3].contiguous()),
        LeastSquares(data[:, :3].contiguous(), data[:, 3]),
        Softmax(data, torch.full((20,), 3), 3, 0.1),
        Softmax(data, torch.zeros(20), 3, 0.1),
    ):
        zeros = torch.zeros(problem.shape)
        run = Trajectory(zeros.clone(), zeros.double(), zeros.double())
        draws = rows if isinstance(problem, LeastSquares) else rows[:, None].contiguous()
        with pytest.raises(ValueError, match="descend"):
            descend(problem, Method(0.1), run, draws, 5)
