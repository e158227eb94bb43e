"""A gradient that its function alone holds makes room for the result; any other stays as it is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame

import swalp
from swalp import buffers
from swalp.layers import lean
from swalp.matmul import owned
from swalp.matmul.owned import References
from swalp.quantize import plans

pytestmark = pytest.mark.skipif(not plans.available, reason="swalp was built without C++ kernels")

ROWS, WIDTH = 1024, 1024  # large enough for `buffers`, and for two steps
HOLDERS = {
    "the tensor": lambda h, kept: h.register_hook(lambda g: kept.append(g)),
    "an alias": lambda h, kept: h.register_hook(lambda g: kept.append(g.detach())),
    "a part": lambda h, kept: h.register_hook(lambda g: kept.append(g[7:9])),
    "an array": lambda h, kept: h.register_hook(lambda g: kept.append(g.numpy())),
    "its storage": lambda h, kept: h.register_hook(lambda g: kept.append(g.untyped_storage())),
    "what its node is given": lambda h, kept: h.grad_fn.register_prehook(kept.extend),
    "autograd": lambda h, kept: h.retain_grad() or kept.append(h),
}


def network(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), kind(), nn.Linear(WIDTH, WIDTH))
    return swalp.convert(model, "native-8", seed=1)


def batch():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)


def numbers(kept):
    if isinstance(kept, torch.UntypedStorage):
        return torch.tensor([], dtype=torch.float32).set_(kept)
    return torch.as_tensor(kept if getattr(kept, "grad_fn", None) is None else kept.grad)


@pytest.fixture(params=[nn.ReLU, nn.GELU])
def kind(request):
    return request.param


@pytest.fixture
def never(monkeypatch):
    """Turns the reuse off."""
    return lambda: monkeypatch.setattr(lean, "references", lambda _: References(0, 0, 0, 0))


def test_the_result_takes_the_place_of_a_gradient_that_nobody_else_holds(kind):
    model, x, places = network(kind), batch(), []
    middle = model[0](x)
    middle.register_hook(lambda g: places.append(g.data_ptr()))
    h = model[1](middle)
    h.register_hook(lambda g: places.append(g.data_ptr()))
    model[2](h).square().sum().backward()
    assert places[0] == places[1]


def held_after_other_calls(kind, holders):
    """A gradient that so many hold, and the input's, after a pass in which calls held more."""
    before = set_eval_frame(False)  # as Dynamo leaves it after an error, but to be undone
    try:
        test_the_result_takes_the_place_of_a_gradient_that_nobody_else_holds(kind)
    finally:
        set_eval_frame(before)
    model, x, kept = network(kind), batch(), []
    h = model[1](model[0](x))
    for _ in range(holders):
        HOLDERS["the tensor"](h, kept)
    model[2](h).square().sum().backward()
    return [*map(numbers, kept), x.grad]


def test_another_way_to_call_functions():
    """In a process of its own, as no error of Dynamo's may have been there before."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch; from torch import nn; import test_matmul_owned as here
for kind in (nn.ReLU, nn.GELU):
    results = [here.held_after_other_calls(kind, holders) for holders in range(1, 5)]
    here.lean.references = lambda _: here.References(0, 0, 0, 0)
    model, x, kept = here.network(kind), here.batch(), []
    h = model[1](model[0](x))
    here.HOLDERS["the tensor"](h, kept)
    model[2](h).square().sum().backward()
    for *held, gradient in results:
        assert all(torch.equal(kept[0], each) for each in held)
        assert torch.equal(x.grad, gradient)
    here.lean.references = here.owned.references
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_somebody_holds_stays_as_it_is(holder, kind, never):
    results = []
    for reuses in (True, False):
        if not reuses:
            never()
        model, x, kept = network(kind), batch(), []
        h = model[1](model[0](x))
        HOLDERS[holder](h, kept)
        model[2](h).square().sum().backward()
        results.append([*map(numbers, kept), x.grad, *(p.grad for p in model.parameters())])
    assert len(results[0]) == 6
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_gradient_that_two_functions_are_given(kind, never):
    results = []
    for reuses in (True, False):
        if not reuses:
            never()
        model, x = network(kind), batch()
        first, second = model[0](x), model[0](x.detach() + 1)
        model[2](model[1](first) + model[1](second)).square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_memory_that_is_not_of_buffers_stays_as_it_is(kind):
    model, x = network(kind), batch()
    h = model[1](model[0](x))
    mine = torch.ones(ROWS, WIDTH).numpy()
    h.register_hook(lambda _: torch.from_numpy(mine))  # nobody holds that tensor, but its memory
    model[2](h).square().sum().backward()
    assert (mine == 1).all()


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (7, 33, WIDTH), (1, ROWS, WIDTH)])
def test_parts_that_are_computed_again_are_those_of_the_whole(shape, monkeypatch):
    results = []
    for part in (1 << 40, 1, 3 * WIDTH * 4):
        monkeypatch.setattr(lean, "_PART", part)
        model = network(nn.GELU)
        x = batch()[: shape[0] * shape[1] if len(shape) > 2 else ROWS].detach().reshape(shape)
        x.requires_grad_()
        model(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_gelu_of_a_convolution_in_parts(monkeypatch):
    results = []
    for part in (1 << 40, 1):
        monkeypatch.setattr(lean, "_PART", part)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.GELU(), nn.Conv2d(16, 4, 3))
        model = swalp.convert(model, "native-8", seed=1)
        x = torch.randn(5, 8, 12, 12, generator=torch.Generator().manual_seed(3))
        x.requires_grad_()
        model(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_gelu_of_a_vector():
    model = network(nn.GELU)
    x = torch.randn(WIDTH, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (WIDTH,)


def test_without_a_way_to_count_nothing_is_reused(monkeypatch):
    monkeypatch.setattr(owned, "_COUNTS", False)
    owned._alone.cache_clear()
    try:
        assert owned.references(torch.zeros(2)) != owned.alone()
    finally:
        owned._alone.cache_clear()


def test_holds():
    assert buffers.holds(buffers.empty(ROWS, WIDTH))
    assert not buffers.holds(torch.empty(ROWS, WIDTH))
