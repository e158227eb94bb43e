"""Linear products that modules call as functions: attention's projections, `F.linear`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import swalp
from swalp import BlockFloat, Nearest, Stochastic
from swalp.matmul import heads, kernels, passes, projections
from swalp.matmul.linear import linear
from swalp.quantize import plans
from test_layers_native import NATIVE, SIMULATED

EIGHT = BlockFloat(8)


def noisy(call):
    return EIGHT, Stochastic(7, random_bits=16, step=2, call=call)


class Counted:
    """How many products ran on integers, forward and backward."""

    def __init__(self, monkeypatch):
        kernels.kernel()  # checked at its first use, by products
        self.count = 0
        places = [(kernels, "product"), (kernels, "run_codes")]
        if plans.available:  # those of attention
            places.append((heads._kernels, "multiply"))
        for place, name in places:
            own = getattr(place, name)
            monkeypatch.setattr(place, name, lambda *a, own=own: self.note(own(*a)))

    def note(self, result):
        self.count += 1
        return result


def both(model, inputs, packed, steps=2, **options):
    """Results and gradients of training steps, on integers and simulated."""
    found = []
    for recipe in (NATIVE, SIMULATED):
        low = swalp.convert(copy.deepcopy(model), recipe, seed=4, packed=packed)
        own = [x.clone().requires_grad_() for x in inputs]
        numbers = []
        for _ in range(steps):
            y = low(*own, **options)
            y = y[0] if isinstance(y, tuple) else y
            y.square().sum().backward()
            numbers.append(y.detach().clone())
        numbers += [x.grad for x in own if x.grad is not None]
        numbers += [p.grad for p in low.parameters() if p.grad is not None]
        found.append(numbers)
    return found


def same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a + 0.0, b + 0.0)  # of zeros either


INPUTS = {
    "self": lambda q, k, v: (q, q, q),
    "memory": lambda q, k, v: (q, k, k),
    "three": lambda q, k, v: (q, k, v),
    "query and key": lambda q, k, v: (q, q, v[:, : q.shape[1]]),
}


class Attends(nn.Module):
    def __init__(self, inputs, **options):
        super().__init__()
        self.inputs = inputs
        self.attention = nn.MultiheadAttention(32, 4, bias=False, batch_first=True, **options)

    def forward(self, q, k, v, **options):
        return self.attention(*INPUTS[self.inputs](q, k, v), **options)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_attention_of_pytorchs_equals_the_simulation(inputs, packed, weights, monkeypatch):
    torch.manual_seed(0)
    counted = Counted(monkeypatch)
    tensors = [torch.randn(2, n, 32) for n in (9, 9, 9)]
    same(*both(Attends(inputs), tensors, packed, need_weights=weights))
    assert counted.count > 20


def test_attention_of_one_sequence_with_masks():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, bias=False)
    x = torch.randn(9, 32)
    mask = torch.triu(torch.ones(9, 9, dtype=torch.bool), 1)
    for options in ({}, {"attn_mask": mask}, {"attn_mask": mask.float() * -3.0}):
        for weights in (False, True):
            same(*both(model, [x, x, x], True, need_weights=weights, **options))


def test_attention_whose_projections_have_weights_of_their_own():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, bias=False, kdim=16, vdim=8)
    tensors = [torch.randn(9, 2, n) for n in (32, 16, 8)]
    same(*both(model, tensors, True))
    low = swalp.convert(model, NATIVE)
    assert swalp.summary(low).layers[0].note.endswith("; products but projections on integers")


def test_an_encoder_layer_runs_all_its_products_on_integers():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    low = swalp.convert(layer, NATIVE, seed=1, packed=True)
    x = torch.randn(2, 9, 32, requires_grad=True)
    with FlopCounterMode(display=False) as flops:
        low(x).sum().backward()
    assert flops.get_total_flops() == 0  # PyTorch multiplies nothing
    assert swalp.summary(low).layers[1].note.endswith("; products on integers")


class Calls(nn.Module):
    """A linear product of its own."""

    def __init__(self, call, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 32))
        self.bias = nn.Parameter(torch.randn(24)) if bias else None
        self.call = call

    def forward(self, x):
        return self.call(self, x)


CALLS = {
    "places": lambda m, x: F.linear(x, m.weight),
    "names": lambda m, x: F.linear(weight=m.weight, input=x),
    "bias None": lambda m, x: F.linear(x, m.weight, None),
    "twice": lambda m, x: F.linear(x, m.weight) + F.linear(2 * x, m.weight),
    "a part": lambda m, x: F.linear(x, m.weight[:8]),
    "of the batch": lambda m, x: F.linear(m.weight, x[0]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("packed", [False, True])
def test_linear_as_a_function_equals_the_simulation(call, packed, monkeypatch):
    torch.manual_seed(0)
    counted = Counted(monkeypatch)
    one_call = []
    own = passes.forward
    monkeypatch.setattr(passes, "forward", lambda *a: one_call.append(own(*a)) or one_call[-1])
    same(*both(Calls(CALLS[call]), [torch.randn(3, 7, 32)], packed))
    native = call in ("places", "names", "bias None", "twice")
    assert bool(one_call) == native
    assert native or not counted.count


def test_linear_as_a_function_adds_its_bias():
    torch.manual_seed(0)
    model = Calls(lambda m, x: F.linear(x, m.weight, bias=m.bias), bias=True)
    found, expected = both(model, [torch.randn(3, 7, 32)], True, steps=1)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[-1], expected[-1])  # of the bias: sums of integers, of floats


def test_what_linear_does_not_take_is_pytorchs_to_refuse():
    low = swalp.convert(Calls(lambda m, x: F.linear(x, m.weight, other=1)), NATIVE)
    with pytest.raises(TypeError):
        low(torch.randn(2, 32))
    low = swalp.convert(Calls(lambda m, x: F.linear(x, m.weight)), NATIVE)
    with pytest.raises(RuntimeError, match="shape"):
        low(torch.randn(2, 31))


def tensors(shape=(6, 5, 16), outputs=30, packed=True):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator)
    weight = swalp.quantize(torch.randn(outputs, shape[-1], generator=generator), EIGHT, Nearest())
    return x, swalp.pack(weight, EIGHT) if packed else weight


PARTS = [slice(0, 8), slice(8, 24), slice(24, 30)]


@pytest.mark.parametrize("shape", [(5, 16), (6, 5, 16)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [None, "float", "packed"])
def test_projections_are_linear_layers_of_one_input(shape, packed, bias):
    x, weight = tensors(shape, packed=packed)
    added = None if bias is None else torch.randn(30)
    added = swalp.pack(added, EIGHT) if bias == "packed" else added
    values = added.dequantize() if bias == "packed" else added
    grads = [torch.randn(*shape[:-1], part.stop - part.start) for part in PARTS]
    leaves = [
        one.clone().requires_grad_() for one in (x, weight, *([] if bias is None else [added]))
    ]
    results = projections.projections(
        *leaves, *[None] * (3 - len(leaves)), EIGHT, noisy(0), PARTS, [noisy(i) for i in (1, 2, 3)]
    )
    found = torch.autograd.grad(results, leaves, grads)
    dx, dw, db = None, torch.zeros(30, 16), torch.zeros(30)
    for i in (2, 1, 0):
        part = PARTS[i]
        own = x.clone().requires_grad_(), weight.detach().dequantize() if packed else weight.clone()
        rows = own[1][part].clone().requires_grad_()
        one = None if values is None else values[part].clone().requires_grad_()
        y = linear(own[0], rows, one, EIGHT, noisy(0), noisy(i + 1))
        assert torch.equal(y, results[i])
        d, dw[part], *rest = torch.autograd.grad(
            y, (own[0], rows, *([] if one is None else [one])), grads[i]
        )
        dx = d if dx is None else dx + d
        if rest:
            db[part] = rest[0]
    same(found, [dx, dw, *([] if bias is None else [db])])


def test_projections_of_which_some_are_not_used():
    x, weight = tensors()
    x.requires_grad_()
    weight.requires_grad_()
    settings = (None, EIGHT, noisy(0), PARTS, [noisy(i) for i in (1, 2, 3)])
    _, y, _ = projections.projections(x, weight, *settings)
    dx, dw = torch.autograd.grad(y.square().sum(), (x, weight))
    assert torch.equal(dw[PARTS[0]], torch.zeros(8, 16))
    assert torch.equal(dw[PARTS[2]], torch.zeros(6, 16))
    assert dw[PARTS[1]].any()
    assert dx.any()


def test_a_nan_goes_through_the_projections_that_it_enters():
    x, weight = tensors()
    settings = (None, EIGHT, noisy(0), PARTS, [noisy(i) for i in (1, 2, 3)])
    x.requires_grad_()
    weight.requires_grad_()
    results = projections.projections(x, weight, *settings)
    grads = [torch.randn_like(y) for y in results]
    grads[1][0, 0, 0] = torch.nan
    dx, dw = torch.autograd.grad(results, (x, weight), grads)
    assert dx[0, 0].isnan().all()
    assert not dx[1:].isnan().any()
    assert dw[8].isnan().all()
    assert not dw[:8].isnan().any()
    with torch.no_grad():
        x[2, 3, 4] = torch.nan
    results = projections.projections(x, weight, *settings)
    for y in results:
        assert y[2, 3].isnan().all()
        assert not y[:2].isnan().any()


def test_projections_refuse_gradients_of_gradients():
    x, weight = tensors()
    x.requires_grad_()
    settings = (None, EIGHT, noisy(0), PARTS, [noisy(i) for i in (1, 2, 3)])
    results = projections.projections(x, weight, *settings)
    (dx,) = torch.autograd.grad(results[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
