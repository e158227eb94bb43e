"""Gradients in their places: joined without a copy, and to anybody else tensors like others."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import swalp
from swalp.matmul import shares
from swalp.matmul.shares import never, places, runs_everything, share
from swalp.quantize import plans

pytestmark = pytest.mark.skipif(not plans.available, reason="swalp was built without C++ kernels")

B, T, H, D = 2, 5, 4, 6


class Sum(torch.autograd.Function):
    """q + 2 k + 3 v, its gradients in their places."""

    @staticmethod
    def forward(ctx, q, k, v, room, never):
        ctx.room = room
        return q + 2 * k + 3 * v

    @staticmethod
    def backward(ctx, grad):
        gradients = ctx.room.gradients()
        for factor, x in enumerate(gradients, 1):
            x.copy_(grad * factor)
        return (*ctx.room.handed_out(gradients, runs_everything(ctx)), None, None)


def placed(q, k, v):
    room = places(q, k, v)
    assert room is not None
    return Sum.apply(q, k, v, room, never())


def plain(q, k, v):
    return q + 2 * k + 3 * v


def unbound(y):
    return y.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind()


VIEWS = {
    "unbound": unbound,
    "split": lambda y: y.split(H * D, dim=2),
    "split by sizes": lambda y: y.split([H * D] * 3, dim=-1),
    "chunked": lambda y: y.chunk(3, dim=-1),
    "rows": lambda y: y.view(3, B, T, H * D).unbind(),
    "columns": lambda y: y.view(B, T, H, 3, D).unbind(-2),
}


def base(seed=0):
    torch.manual_seed(seed)
    x = torch.randn(B, T, 3 * H * D, requires_grad=True)
    return x, x * 1


@pytest.fixture
def joined(monkeypatch):
    """What parts were joined to; None: to a copy."""
    found = []
    join = shares._joined
    monkeypatch.setattr(shares, "_joined", lambda *args: found.append(join(*args)) or found[-1])
    return found


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
def test_joined_they_are_the_memory_that_they_lie_in(views, joined):
    results = []
    for run in (placed, plain):
        x, y = base()
        q, k, v = views(y)
        arrived = []
        y.register_hook(arrived.append)
        z = run(q, k, v)
        z.backward(torch.randn(z.shape, generator=torch.Generator().manual_seed(1)))
        results.append(x.grad)
        if run is placed:
            assert type(arrived[0]) is torch.Tensor
            assert joined[0] is not None
            assert arrived[0].untyped_storage().data_ptr() == joined[0].untyped_storage().data_ptr()
            assert arrived[0].is_contiguous()
    assert torch.equal(*results)


def test_views_that_are_not_all_of_a_tensor_or_lie_otherwise_have_no_places():
    _, y = base()
    q, k, v = unbound(y)
    assert places(q, k, v) is not None
    assert places(q, k) is None
    assert places(q, q, v) is None
    assert places(q, k, k) is None
    assert places(k, q, v) is None  # in no order
    assert places(q, k, v * 1) is None
    assert places(q[:, :2], k[:, :2], v[:, :2]) is None
    assert places(q, k, v.transpose(-1, -2)) is None
    assert places(*(x.transpose(1, 2) for x in (q, k, v))) is None  # of functions of their own
    assert places(*(y[..., i : i + H * D] for i in (0, H * D, 2 * H * D))) is None
    assert places(*unbound(y.detach())) is None
    assert places(*y.view(B, T, H, D, 3).unbind(-1)) is None  # rows lie apart
    assert places(*y.view(B, T, 3, D, H).permute(2, 0, 4, 1, 3).unbind(0)) is None
    overlapping = y.as_strided((3, 4, 8), (4, 8, 1)).unbind()
    assert places(*overlapping) is None
    three = torch.randn(3, requires_grad=True) * 1
    assert places(three, three, three) is None


def keeps(q, seen):
    q.retain_grad()


def looks(q, seen):
    q.register_hook(lambda g: seen.append(g))


def changes(q, seen):
    q.register_hook(lambda g: 2 * g)


def watches_all(q, seen):
    torch.autograd.graph.register_multi_grad_hook([q], lambda grads: seen.extend(grads))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("watch", [keeps, looks, changes, watches_all])
def test_who_watches_a_view_sees_a_tensor_of_its_own(watch, late):
    results = []
    for run in (placed, plain):
        x, y = base()
        q, k, v = unbound(y)
        seen = []
        if not late:
            watch(q, seen)
        z = run(q, k, v)
        if late:
            watch(q, seen)
        held = q if watch is keeps else None
        q = None  # hooks stay
        (z.square().sum() + k.exp().sum()).backward()
        seen += [] if held is None else [held.grad]
        results.append([x.grad, *seen])
        for gradient in seen:
            assert type(gradient) is torch.Tensor
            assert run is plain or gradient.untyped_storage().nbytes() == 4 * gradient.numel()
            before = x.grad.clone()
            gradient.zero_()  # shares no memory with anything
            assert torch.equal(x.grad, before)
    assert len(results[0]) == len(results[1]) == (1 if watch is changes else 2)
    assert torch.equal(results[0][0], results[1][0])


def test_gradients_that_autograd_is_asked_for_are_tensors_of_their_own():
    _, y = base()
    q, k, v = unbound(y)
    gradients = torch.autograd.grad(placed(q, k, v).sum(), (q, k, v, y))
    assert all(type(x) is torch.Tensor for x in gradients)
    expected = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(H * D).expand(B, T, -1)
    gradients[0].zero_()
    for factor, gradient in enumerate(gradients[1:3], 2):
        assert torch.equal(gradient, torch.full(q.shape, float(factor)))
    assert torch.equal(gradients[3], expected)
    _, y = base()
    q, k, v = unbound(y)
    placed(q, k, v).sum().backward(inputs=[q])
    assert type(q.grad) is torch.Tensor
    assert never().grad is None


def test_views_of_a_leaf_and_passes_that_repeat():
    results = []
    for run in (placed, plain):
        leaf = torch.randn(
            B, T, 3 * H * D, generator=torch.Generator().manual_seed(2)
        ).requires_grad_()
        q, k, v = unbound(leaf)
        z = run(q, k, v).square().sum()
        z.backward(retain_graph=True)
        first = leaf.grad.clone()
        z.backward()
        results += [first, leaf.grad]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_is_cut_in_a_compiled_function():
    """Its gradients go to a function of the compiler's, which has seen plain ones."""
    torch._dynamo.reset()
    cut = torch.compile(unbound, backend="aot_eager")
    _, y = base()
    q, k, v = cut(y)
    assert places(q, k, v) is None
    torch._dynamo.reset()


def test_operations_on_a_share_are_those_on_its_memory():
    whole = torch.arange(24.0).view(2, 3, 4)
    a, b, c = (share(x) for x in whole.unbind(1))
    for result, expected in (
        (a + 1, whole[:, 0] + 1),
        (a.t(), whole[:, 0].t()),
        (torch.stack((a, b, c), 1), whole),
        (torch.cat((a, b, c), 1), whole.flatten(1)),
        (swalp.pack(torch.ones(2, 4), swalp.BlockFloat(8)) + a, 1 + whole[:, 0]),
    ):
        assert type(result) is torch.Tensor
        assert torch.equal(result, expected)
    assert torch.stack((a, b, c), 1).data_ptr() != whole.data_ptr()  # in no backward pass
    a.mul_(2)
    assert torch.equal(a + 0, whole[:, 0])


def test_joining():
    whole = torch.arange(24.0).view(2, 3, 4)
    a, b, c = (share(x) for x in whole.unbind(1))
    with torch._C._DisableTorchDispatch():
        for join, parts, dim, expected in (
            (shares._stacked, (a, b, c), 1, whole),
            (shares._stacked, (a, b, c), 0, whole.transpose(0, 1)),
            (shares._stacked, (a, b, c), -1, whole.transpose(1, 2)),
            (shares._side_by_side, (a, b, c), 1, whole.flatten(1)),
            (shares._side_by_side, (a, b, c), -1, whole.flatten(1)),
        ):
            found = shares._joined(join, parts, dim)
            assert found.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            assert torch.equal(found, expected)
        for join, parts, dim in (
            (shares._stacked, (a, c, b), 1),
            (shares._stacked, (a, b, whole[:, 2]), 1),
            (shares._stacked, (a, a), 1),
            (shares._side_by_side, (a, b, c), 0),
            (shares._side_by_side, (a, c), 1),
            (shares._side_by_side, (a, share(whole[:, 1, :2])), 1),
        ):
            assert shares._joined(join, parts, dim) is None


class Block(nn.Module):
    def __init__(self, views):
        super().__init__()
        self.qkv, self.views = nn.Linear(H * D, 3 * H * D, bias=False), views

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(*self.views(self.qkv(x)), is_causal=True)


def in_heads(y):
    return [x.view(B, T, H, D).transpose(1, 2) for x in y.split(H * D, dim=2)]


def last_of_all(y):
    return y.view(B, T, H, D, 3).transpose(1, 2).unbind(-1)


@pytest.mark.parametrize("views", [unbound, in_heads, last_of_all])
def test_attention_puts_its_gradients_where_they_belong(views, joined):
    torch.manual_seed(0)
    plain, x = Block(views), torch.randn(B, T, H * D)
    results = []
    for product in ("native", "simulated"):
        recipe = replace(swalp.recipes.get("native-8"), product=product)
        model = swalp.convert(copy.deepcopy(plain), recipe, seed=1)
        inputs = x.clone().requires_grad_()
        model(inputs).square().sum().backward()
        results.append((inputs.grad, model.qkv.weight.grad))
    assert [x is not None for x in joined] == ([True] if views is unbound else [])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
