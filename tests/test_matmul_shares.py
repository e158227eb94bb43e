"""Gradients in their places: joined without a copy, and to anybody else tensors like others."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import swalp
from swalp.matmul import shares
from swalp.matmul.shares import Share, places, share
from swalp.quantize import plans

pytestmark = pytest.mark.skipif(not plans.available, reason="swalp was built without C++ kernels")

B, T, H, D = 2, 5, 4, 6


class Sum(torch.autograd.Function):
    """q + 2 k + 3 v, its gradients in their places."""

    @staticmethod
    def forward(ctx, q, k, v, room):
        ctx.room = room
        return q + 2 * k + 3 * v

    @staticmethod
    def backward(ctx, grad):
        gradients = ctx.room.gradients()
        for factor, x in enumerate(gradients, 1):
            x.copy_(grad * factor)
        return (*ctx.room.handed_out(gradients), None)


def unbound(y):
    return y.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind()


def split(y):
    return [x.view(B, T, H, D).transpose(1, 2) for x in y.split(H * D, dim=2)]


def chunked(y):
    return y.chunk(3, dim=-1)


def in_rows(y):
    return y.view(3, B, T, H * D).unbind()


VIEWS = {"unbound": unbound, "split": split, "chunked": chunked, "rows": in_rows}


def base(seed=0):
    torch.manual_seed(seed)
    x = torch.randn(B, T, 3 * H * D, requires_grad=True)
    return x, x * 1


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
def test_joined_they_are_the_memory_that_they_lie_in(views, monkeypatch):
    found = []
    join = shares._joined
    monkeypatch.setattr(shares, "_joined", lambda *args: found.append(join(*args)) or found[-1])
    results = []
    for placed in (True, False):
        x, y = base()
        q, k, v = views(y)
        arrived = []
        y.register_hook(arrived.append)
        z = Sum.apply(q, k, v, places(q, k, v)) if placed else q + 2 * k + 3 * v
        z.backward(torch.randn(z.shape, generator=torch.Generator().manual_seed(1)))
        results.append(x.grad)
        if placed:
            assert type(arrived[0]) is torch.Tensor
            assert found[0] is not None
            assert arrived[0].untyped_storage().data_ptr() == found[0].untyped_storage().data_ptr()
            assert arrived[0].is_contiguous()
    assert torch.equal(*results)


def test_views_that_are_not_all_of_a_tensor_or_lie_on_each_other_have_no_places():
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
    assert places(*unbound(y.detach())) is None
    overlapping = y.as_strided((3, 4, 8), (4, 8, 1)).unbind()
    assert places(*overlapping) is None
    three = torch.randn(3, requires_grad=True) * 1
    assert places(three, three, three) is None


def test_one_of_the_views_may_be_used_elsewhere_or_watched():
    def run(placed, watch):
        x, y = base()
        q, k, v = unbound(y)
        seen = watch(q) if watch else []
        z = Sum.apply(q, k, v, places(q, k, v)) if placed else q + 2 * k + 3 * v
        (z.square().sum() + k.exp().sum()).backward()
        return [x.grad, *seen]

    def keeps(q):
        q.retain_grad()
        kept.append(q)
        return []

    def looks(q):
        seen = []
        q.register_hook(lambda g: seen.append(torch.from_numpy(g.numpy()).clone()))
        q.register_hook(lambda g: seen.append(torch.tensor(g.tolist())))
        return seen

    def changes(q):
        q.register_hook(lambda g: 2 * g)
        return []

    kept = []
    for watch in (None, keeps, looks, changes):
        kept.clear()
        ours, theirs = run(True, watch), run(False, watch)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
    run(True, keeps)
    assert type(kept[-1].grad) is torch.Tensor


def test_a_gradient_that_autograd_is_asked_for():
    _, y = base()
    q, k, v = unbound(y)
    z = Sum.apply(q, k, v, places(q, k, v))
    gradients = torch.autograd.grad(z.sum(), (q, k, v, y))
    for factor, gradient in enumerate(gradients[:3], 1):
        assert torch.equal(gradient + 0, torch.full(q.shape, float(factor)))
    expected = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(H * D).expand(B, T, -1)
    assert torch.equal(gradients[3], expected)


def test_operations_on_a_share_are_those_on_its_memory():
    whole = torch.arange(24.0).view(2, 3, 4)
    a, b, c = (share(x) for x in whole.unbind(1))
    assert type(a + 1) is torch.Tensor
    assert torch.equal(a + 1, whole[:, 0] + 1)
    assert type(a.t()) is Share
    a.mul_(2)
    assert torch.equal(a + 0, whole[:, 0])
    packed = swalp.pack(torch.ones(2, 4), swalp.BlockFloat(8))
    assert torch.equal(packed + a, 1 + whole[:, 0])
    for joined, expected in (
        (torch.stack((a, b, c), 1), whole),
        (torch.stack((a, b, c)), whole.transpose(0, 1)),
        (torch.stack((a, b, c), -1), whole.transpose(1, 2)),
        (torch.cat((a, b, c), 1), whole.flatten(1)),
        (torch.cat((a, b, c), -1), whole.flatten(1)),
    ):
        assert joined.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert torch.equal(joined, expected)
    for joined, expected in (
        (torch.stack((a, c, b), 1), whole[:, [0, 2, 1]]),
        (torch.stack((a, b, c * 1), 1), whole),
        (torch.cat((a, b, c)), whole.transpose(0, 1).flatten(0, 1)),
        (torch.cat((a, c), 1), whole[:, ::2].flatten(1)),
        (torch.stack((a, a), 1), whole[:, [0, 0]]),
        (torch.cat((a, b[:, :2]), 1), whole.flatten(1)[:, :6]),
    ):
        assert type(joined) is torch.Tensor
        assert joined.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
        assert torch.equal(joined, expected)


class Block(nn.Module):
    def __init__(self, views):
        super().__init__()
        self.qkv, self.views = nn.Linear(H * D, 3 * H * D, bias=False), views

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(*self.views(self.qkv(x)), is_causal=True)


@pytest.mark.parametrize("views", [unbound, split])
def test_attention_puts_its_gradients_where_they_belong(views, monkeypatch):
    found = []
    join = shares._joined
    monkeypatch.setattr(shares, "_joined", lambda *args: found.append(join(*args)) or found[-1])
    torch.manual_seed(0)
    plain, x = Block(views), torch.randn(B, T, H * D)
    results = []
    for product in ("native", "simulated"):
        recipe = replace(swalp.recipes.get("native-8"), product=product)
        model = swalp.convert(copy.deepcopy(plain), recipe, seed=1)
        inputs = x.clone().requires_grad_()
        model(inputs).square().sum().backward()
        results.append((inputs.grad, model.qkv.weight.grad))
    assert len(found) == 1
    assert found[0] is not None
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
