"""Products that modules call as functions: which are quantized, and that nothing leaks."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import swalp
from rounded import lossless, recipe, rounded
from swalp.layers import functions
from swalp.layers.functions import _HANDLERS


class Calls(nn.Module):
    """A module whose forward is a function of it and its arguments."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        self.images = nn.Parameter(torch.linspace(-1, 1, 24).reshape(2, 3, 2, 2))

    def forward(self, *arguments):
        return self.function(self, *arguments)


def q(x, call):
    return rounded(x, "", seed=0, step=1, call=call)


X, Y, Z = (torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
BATCH, OTHER = torch.randn(2, 5, 4), torch.randn(2, 4, 3)
IMAGES = torch.randn(2, 3, 4, 4)
# A call, and the same written out with Q at each operand, the summed dimension being the last.
PRODUCTS = {
    "matmul": (lambda m: torch.matmul(X, Y.mT), lambda m: q(X, 0) @ q(Y, 1).mT),
    "method": (lambda m: X.matmul(other=Y.mT), lambda m: q(X, 0) @ q(Y, 1).mT),
    "@": (lambda m: X @ Y.mT, lambda m: q(X, 0) @ q(Y, 1).mT),
    "mm": (lambda m: torch.mm(X, mat2=Y.mT), lambda m: q(X, 0) @ q(Y, 1).mT),
    "linalg.matmul": (lambda m: torch.linalg.matmul(X, Y.mT), lambda m: q(X, 0) @ q(Y, 1).mT),
    "dot": (lambda m: X[0].dot(Y[0]), lambda m: torch.dot(q(X[0], 0), q(Y[0], 1))),
    "vdot": (lambda m: torch.vdot(X[0], Y[0]), lambda m: torch.vdot(q(X[0], 0), q(Y[0], 1))),
    "vecdot": (
        lambda m: torch.linalg.vecdot(X, Y),
        lambda m: torch.linalg.vecdot(q(X, 0), q(Y, 1)),
    ),
    "bmm": (lambda m: BATCH.bmm(OTHER), lambda m: q(BATCH, 0) @ q(OTHER.mT, 1).mT),
    "mv": (lambda m: torch.mv(X, Y[0]), lambda m: q(X, 0) @ q(Y[0], 1)),
    "addmm": (
        lambda m: torch.addmm(torch.ones(5), X, Y.mT),
        lambda m: torch.addmm(torch.ones(5), q(X, 0), q(Y, 1).mT),
    ),
    "baddbmm": (
        lambda m: torch.baddbmm(torch.ones(2, 5, 3), BATCH, OTHER),
        lambda m: torch.baddbmm(torch.ones(2, 5, 3), q(BATCH, 0), q(OTHER.mT, 1).mT),
    ),
    "addmv": (
        lambda m: torch.addmv(torch.ones(5), X, Y[0]),
        lambda m: torch.addmv(torch.ones(5), q(X, 0), q(Y[0], 1)),
    ),
    "addbmm": (
        lambda m: torch.addbmm(torch.ones(5, 3), BATCH, OTHER),
        lambda m: torch.addbmm(torch.ones(5, 3), q(BATCH, 0), q(OTHER.mT, 1).mT),
    ),
    "inner": (lambda m: torch.inner(X, Y), lambda m: torch.inner(q(X, 0), q(Y, 1))),
    "tensordot": (
        lambda m: torch.tensordot(BATCH, OTHER, dims=([0, 2], [0, 1])),
        lambda m: torch.tensordot(q(BATCH, 0), q(OTHER, 1), dims=([0, 2], [0, 1])),
    ),
    "einsum": (
        lambda m: torch.einsum("ik, jk -> ij", X, Y),
        lambda m: torch.einsum("ik,jk->ij", q(X, 0), q(Y, 1)),
    ),
    "einsum, as lists": (
        lambda m: torch.einsum(X, [0, 1], Y, [2, 1], [0, 2]),
        lambda m: torch.einsum("ik,jk->ij", q(X, 0), q(Y, 1)),
    ),
    "einsum, a list of operands": (
        lambda m: torch.einsum("ik,jk->ij", [X, Y]),
        lambda m: torch.einsum("ik,jk->ij", q(X, 0), q(Y, 1)),
    ),
    "linear, a parameter": (
        lambda m: F.linear(X, m.weight),
        lambda m: F.linear(q(X, 0), m.weight),
    ),
    "linear, a computed weight": (
        lambda m: F.linear(X, m.weight * 2),
        lambda m: F.linear(q(X, 0), q(m.weight * 2, 1)),
    ),
    "a parameter to the right": (
        lambda m: BATCH @ m.weight.mT,
        lambda m: q(BATCH, 0) @ q(m.weight, 1).mT,
    ),
    "conv2d": (lambda m: F.conv2d(IMAGES, m.images), lambda m: F.conv2d(q(IMAGES, 0), m.images)),
    "conv_transpose2d": (
        lambda m: F.conv_transpose2d(IMAGES[:, :2], weight=m.images, stride=2),
        lambda m: F.conv_transpose2d(q(IMAGES[:, :2], 0), m.images, stride=2),
    ),
    "bilinear": (
        lambda m: F.bilinear(X, Y, m.images[:, 0, :1].expand(2, 4, 2).repeat(1, 1, 2)),
        lambda m: F.bilinear(q(X, 0), q(Y, 1), m.images[:, 0, :1].expand(2, 4, 2).repeat(1, 1, 2)),
    ),
    "one after the other": (
        lambda m: (X @ Y.mT) @ Z,
        lambda m: q(q(X, 0) @ q(Y, 1).mT, 2) @ q(Z.mT, 3).mT,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_operands_are_quantized(name):
    call, written_out = PRODUCTS[name]
    model = swalp.convert(Calls(call), recipe())
    given = model()
    assert torch.equal(given, written_out(model))
    assert not torch.equal(given, call(model))


HEADS = BATCH.unsqueeze(1)
GROUPS = {"offs": torch.tensor([2, 5], dtype=torch.int32)}
KEYWORDS = {
    "matmul": (torch.matmul, {"input": X, "other": Y.mT}, {}),
    "mm": (torch.mm, {"input": X, "mat2": Y.mT}, {}),
    "bmm": (torch.bmm, {"input": BATCH, "mat2": OTHER}, {}),
    "mv": (torch.mv, {"input": X, "vec": Y[0]}, {}),
    "addmm": (torch.addmm, {"input": torch.ones(5), "mat1": X, "mat2": Y.mT}, {"alpha": 2}),
    "addmv": (torch.addmv, {"input": torch.ones(5), "mat": X, "vec": Y[0]}, {}),
    "baddbmm": (torch.baddbmm, {"input": BATCH[0, :, :3], "batch1": BATCH, "batch2": OTHER}, {}),
    "addbmm": (torch.addbmm, {"input": BATCH[0, :, :3], "batch1": BATCH, "batch2": OTHER}, {}),
    "method": (X[:, :1].expand(5, 5).addmm, {"mat1": X, "mat2": Y.mT}, {"beta": 0.5}),
    "inner": (torch.inner, {"input": X, "other": Y}, {}),
    "tensordot": (torch.tensordot, {"a": X, "b": Y.mT}, {"dims": 1}),
    "linear": (F.linear, {"input": X, "weight": Y, "bias": Z[:, 0]}, {}),
    "bilinear": (F.bilinear, {"input1": X, "input2": Y, "weight": torch.ones(2, 4, 4)}, {}),
    "conv1d": (F.conv1d, {"input": BATCH, "weight": torch.randn(3, 5, 2)}, {"padding": 1}),
    "conv2d": (F.conv2d, {"input": IMAGES, "weight": torch.randn(2, 3, 2, 2)}, {}),
    "conv_transpose2d": (
        F.conv_transpose2d,
        {"input": IMAGES, "weight": torch.randn(3, 2, 2, 2)},
        {"stride": 2},
    ),
    "attention": (
        F.scaled_dot_product_attention,
        {"query": HEADS, "key": HEADS, "value": HEADS, "attn_mask": X[:, :1] > 0},
        {},
    ),
}
for _owner, _name, *_names in (
    (F, "grouped_mm", "mat_a", "mat_b"),
    (torch, "_grouped_mm", "input", "mat2"),
):
    if hasattr(_owner, _name):
        operands = dict(zip(_names, (X, torch.randn(2, 4, 4)), strict=True))
        KEYWORDS[_name] = (getattr(_owner, _name), operands, GROUPS)


@pytest.mark.parametrize("name", KEYWORDS)
def test_arguments_by_name_are_those_by_place(name):
    function, named, others = KEYWORDS[name]

    def quantized(call):
        return swalp.convert(Calls(call), recipe())()

    expected = quantized(lambda m: function(*named.values(), **others))
    assert torch.equal(quantized(lambda m: function(**named, **others)), expected)
    first, *rest = named
    left = {name: named[name] for name in reversed(rest)}
    assert torch.equal(quantized(lambda m: function(named[first], **others, **left)), expected)
    assert not torch.equal(function(**named, **others), expected)


def test_names_that_only_pytorch_knows_are_refused_where_something_is_quantized():
    def call(m):
        return torch.matmul(x1=X, x2=Y.mT)

    with pytest.raises(TypeError, match=r"got 0 .* and x1, x2; give input, other by place or name"):
        swalp.convert(Calls(call), recipe())()
    off = swalp.convert(Calls(call), lossless(activation=None, error=None))
    assert torch.equal(off(), X @ Y.mT)


# Not sums of products of numbers: positions times frequencies above all must stay exact.
UNTOUCHED = {
    "an outer product": lambda m: X[:, :1] @ Y[:1, :],
    "einsum without a sum": lambda m: torch.einsum("i,j->ij", X[0], Y[0]),
    "einsum of one": lambda m: torch.einsum("ij->ji", X),
    "integers": lambda m: torch.arange(4).reshape(2, 2) @ torch.arange(4).reshape(2, 2),
    "elementwise": lambda m: X * Y + Z,
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_is_no_product_stays(name):
    model = swalp.convert(Calls(UNTOUCHED[name]), recipe())
    assert torch.equal(model(), UNTOUCHED[name](model))


def test_errors_of_functions_are_quantized():
    x = X.clone().requires_grad_()
    twin = X.clone().requires_grad_()
    model = swalp.convert(Calls(lambda m, x: x @ Y.mT), recipe())
    model(x).sum().backward()
    (q(twin, 0) @ q(Y, 1).mT).sum().backward()
    assert torch.equal(x.grad, twin.grad)


def test_error_at_the_result_for_operands():
    """One quantized error serves both backward products."""
    x = X.clone().requires_grad_()
    model = swalp.convert(Calls(lambda m, x: x @ Y.mT), recipe(placement="operands"))
    gradient = torch.randn(5, 5)
    model(x).backward(gradient)
    twin = torch.zeros_like(gradient, requires_grad=True)
    rounded(twin, "", seed=0, step=1, call=2).backward(gradient)  # uses 0 and 1 are X and Y
    activation = q(Y, 1)
    torch.testing.assert_close(x.grad, twin.grad @ activation, rtol=0, atol=1e-6)


def test_nothing_leaks_out_of_the_forward():
    seen = []

    def inside(model):
        seen.append(torch._C._len_torch_function_stack())
        raise RuntimeError("stop")

    model = swalp.convert(Calls(inside), recipe())
    with pytest.raises(RuntimeError, match="stop"):
        model()
    assert seen == [1]
    assert torch._C._len_torch_function_stack() == 0
    assert torch.equal(Calls(lambda m: X @ Y.mT)(), X @ Y.mT)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(self.layer(x)) @ Z.mT


def test_nested_modules_and_layers_quantize_once_each():
    """A layer inside a module that calls functions does not have its input rounded again."""
    model = swalp.convert(Outer(Calls(lambda m, x: x @ Y.mT @ Y)), recipe(), seed=3)

    def at(x, layer, call=0):
        return rounded(x, layer, seed=3, step=1, call=call)

    x = F.linear(at(X, "layer"), model.layer.weight, model.layer.bias)
    x = at(x, "inner") @ at(Y, "inner", 1).mT
    x = at(x, "inner", 2) @ at(Y.mT, "inner", 3).mT
    assert torch.equal(model(X), at(x, "") @ at(Z, "", 1).mT)


def test_a_module_that_is_off_is_not_seen_by_the_one_around_it():
    off = swalp.recipes.Override(layers="inner", activation=None, error=None)
    model = swalp.convert(Outer(Calls(lambda m, x: x @ Y.mT @ Y)), recipe(overrides=[off]), seed=3)

    def at(x, layer, call=0):
        return rounded(x, layer, seed=3, step=1, call=call)

    x = F.linear(at(X, "layer"), model.layer.weight, model.layer.bias) @ Y.mT @ Y
    assert torch.equal(model(X), at(x, "") @ at(Z, "", 1).mT)


def test_a_parametrized_weight_is_an_operand():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    model = swalp.convert(layer, recipe())
    expected = F.linear(q(X, 0), q(model.weight, 1), model.bias)
    assert torch.equal(model(X), expected)


def test_several_uses_in_several_passes():
    """Each pass and each use has noise of its own; a second run in one pass, too."""
    model = swalp.convert(nn.Sequential(Calls(lambda m, x: x @ Y.mT)), recipe())
    first, second = model(X), model(X)
    assert torch.equal(first, rounded(X, "0", seed=0, step=1) @ rounded(Y, "0", seed=0, step=1,
                                                                        call=1).mT)  # fmt: skip
    assert not torch.equal(first, second)
    again = model[0](X)  # no tick: the second run of the layer in pass 2
    expected = [rounded(x, "0", seed=0, step=2, call=(1 << 16) + i) for i, x in enumerate((X, Y))]
    assert torch.equal(again, expected[0] @ expected[1].mT)


@pytest.mark.parametrize("chain", [torch.linalg.multi_dot, lambda xs: torch.chain_matmul(*xs)])
@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
def test_a_product_of_several_is_one_after_the_other(chain):
    found = [
        swalp.convert(Calls(function), recipe())()
        for function in (lambda m: chain([X, Y.mT, Z]), lambda m: X @ Y.mT @ Z)
    ]
    assert torch.equal(*found)
    assert not torch.equal(found[0], X @ Y.mT @ Z)


def test_einsum_of_an_outer_product_without_an_arrow_is_exact():
    x, y = X[0], Y[:, 0]
    model = swalp.convert(Calls(lambda m: torch.einsum("i,j", x, y)), recipe())
    assert torch.equal(model(), torch.outer(x, y))
    model = swalp.convert(Calls(lambda m: torch.einsum("i,i", x, Y[0])), recipe())
    assert not torch.equal(model(), torch.dot(x, Y[0]))


@pytest.mark.parametrize("product", ["native", "simulated"])
def test_functional_calls_know_their_weights(product):
    """They have plain tensors in the place of parameters."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.own = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return F.linear(self.inner(x) @ self.own, self.inner.weight)

    torch.manual_seed(0)
    settings = dataclasses.replace(swalp.recipes.get("native-8"), product=product)
    models = [swalp.convert(Tied(), settings) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    weights = {name: value.detach() for name, value in models[1].named_parameters()}
    expected, found = models[0](X), torch.func.functional_call(models[1], weights, (X,))
    assert torch.equal(expected, found)


def test_the_page_names_every_function():
    page = (Path(__file__).parent.parent / "docs/layers.md").read_text()
    for function in _HANDLERS:
        if not hasattr(function, "__name__"):
            continue  # an operator of another library
        name = (
            function.__name__.removesuffix("_forward")
            .removesuffix("_fallback")
            .strip("_")
            .replace("linalg_", "linalg.")
        )
        assert re.search(rf"`{name}|`{name[:-2]}1d`–`3d`", page), name


def test_too_many_uses_are_refused():
    def many(module):
        for _ in range(3):
            X @ Y.mT

    model = swalp.convert(Calls(many), lossless())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swalp.layers.products._USES", 4)
        with pytest.raises(RuntimeError, match="more than 4 tensors in one pass"):
            model()


def test_einsum_that_sums_over_an_ellipsis_is_a_product():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, y):
            return torch.einsum("...i,...i->i", x, y)

    model = swalp.convert(Sums(), "paper-big-block-8").eval()
    model(torch.randn(3, 4), torch.randn(3, 4))
    assert model._swalp_layer.functions == {"einsum": 1}


class _Seen(TorchFunctionMode):
    """Notes what it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


class _Around(nn.Module):
    """A product of its own beside a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) @ x.mT


class _Failing(nn.Linear):
    def forward(self, x):
        raise FloatingPointError


@pytest.mark.parametrize("recipe", ["paper-small-block-8", "native-8"])
def test_nothing_inside_a_layer_goes_through_the_mode_around_it(recipe, monkeypatch):
    model = swalp.convert(_Around(nn.Linear(16, 16)), recipe, seed=1)
    seen = []
    own = functions._Interception.__torch_function__

    def noting(self, func, *rest):
        seen.append(getattr(func, "__name__", ""))
        return own(self, func, *rest)

    monkeypatch.setattr(functions._Interception, "__torch_function__", noting)
    x = torch.randn(4, 16)
    expected = model(x)
    assert "matmul" in seen or "__matmul__" in seen
    assert "linear" not in seen
    assert len(seen) < 6
    # A mode of the user's, entered before or inside, sees what it saw.
    again = swalp.convert(_Around(nn.Linear(16, 16)), recipe, seed=1)
    again.load_state_dict(model.state_dict())
    with _Seen() as outer:
        assert torch.equal(again(x), expected)
    assert outer.names


def test_a_layer_that_fails_leaves_the_mode_as_it_was():
    model = swalp.convert(_Around(_Failing(16, 16)), "paper-small-block-8", seed=1)
    x = torch.randn(4, 16)
    for _ in range(2):
        with pytest.raises(FloatingPointError):
            model(x)
        assert torch._C._len_torch_function_stack() == 0
    with _Seen() as outer:
        with pytest.raises(FloatingPointError):
            model(x)
        assert torch._C._get_function_stack_at(0) is outer
    assert torch._C._len_torch_function_stack() == 0
