"""The two steps of a layer's backward pass: what autograd users see is as with one."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import swalp
from swalp.matmul import handed
from swalp.packed import PackedTensor


@pytest.fixture(params=["one step", "two steps"], autouse=True)
def steps(request, monkeypatch):
    if request.param == "two steps":
        monkeypatch.setattr(handed, "SMALL", 0)


def _model(packed=True):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    return swalp.convert(model, "native-8", packed=packed)


def _values(x):
    return x.dequantize() if isinstance(x, PackedTensor) else x


def test_the_weight_may_change_before_the_gradient_of_the_input_is_computed():
    gradients = []
    for consume in (False, True):
        model = _model()
        optimizer = swalp.optim.SGD(
            model.named_parameters(), lr=0.5, momentum=0.9, recipe="native-8"
        )
        if consume:
            optimizer.consume_gradients()
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
        model(x).square().sum().backward()
        optimizer.step()
        gradients.append((x.grad, *(_values(p).detach() for p in model.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert gradients[0][0].abs().max() > 0


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_so_it_may_where_an_error_is_nan(kind):
    """What has no integers goes through float, where the weight is used as it lies."""
    gradients = []
    for consume in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(16, 8) if kind == "linear" else torch.nn.Conv2d(4, 8, 3)
        x = torch.randn(8, 16) if kind == "linear" else torch.randn(8, 4, 6, 6)
        before = torch.nn.Identity()
        recipe = swalp.recipes.get("native-8")
        # Only what is finite changes the weight.
        model = swalp.convert(torch.nn.Sequential(before, layer), recipe, packed=True)
        optimizer = swalp.optim.SGD(model.named_parameters(), lr=0.5, recipe=recipe)
        if consume:
            optimizer.consume_gradients()
        x.requires_grad_()
        y = model(x)
        errors = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        errors[0] = torch.nan
        y.backward(errors)
        optimizer.step()
        gradients.append(x.grad)
    assert gradients[0][1:].abs().max() > 0
    assert gradients[0][0].isnan().any()
    assert torch.equal(gradients[0].nan_to_num(), gradients[1].nan_to_num())


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    model = _model(packed=False)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = model(x).square().sum()
    inputs = [x, *model.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    alone = torch.autograd.grad(loss, [inputs[3]], retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert torch.equal(alone[0], first[3])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_hooks_see_the_gradients_and_no_stand_in():
    model = _model(packed=False)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    seen, errors = [], []
    model[2].register_full_backward_hook(lambda _, given, got: errors.extend((*given, *got)))
    hidden = model[0](x)
    hidden.register_hook(lambda grad: seen.append(grad.clone()))
    y = model[2](model[1](hidden))
    y.retain_grad()
    y.square().sum().backward()
    assert torch.equal(y.grad, 2 * y)
    assert torch.equal(errors[1], 2 * y)
    assert torch.equal(torch.where(hidden > 0, errors[0], 0.0), seen[0])
    assert seen[0].abs().max() > 0
    assert (seen[0][hidden <= 0] == 0).all()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16), (2, 3, 9), (2, 3, 9, 9)])
def test_results_may_be_changed_in_place(shape):
    x, gradients = torch.randn(shape), []
    for inplace in (False, True):
        model = _model()
        if shape[-1] == 9:
            torch.manual_seed(0)
            first = {3: torch.nn.Conv1d, 4: torch.nn.Conv2d}[len(shape)](3, 8, 3)
            model = torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Flatten())
            model = swalp.convert(model, "native-8")
        model[1].inplace = inplace
        given = x.clone().requires_grad_()
        y = model(given).mul_(2.0)
        y.sum().backward()
        gradients.append((given.grad, y.detach()))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("held", [False, True])
def test_a_gradient_that_came_in_is_let_go_unless_somebody_holds_it(held):
    model, kept, gone, after = _model(), [], [], []
    x = torch.randn(32, 16, requires_grad=True)
    hidden = model[0](x)
    y = model[2](model[1](hidden))

    def note(grad):
        gone.append(StorageWeakRef(grad.untyped_storage()))
        if held:
            kept.append(grad)

    hidden.register_hook(note)
    weight = model[0].weight
    weight.register_post_accumulate_grad_hook(lambda _: after.append(gone[0].expired()))
    y.square().sum().backward()
    assert after == [not held]
    if held:
        assert kept[0].shape == hidden.shape
        assert kept[0].abs().max() > 0


def test_gradients_of_gradients_are_refused():
    x = torch.randn(32, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(_model()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


def test_backward_passes_within_one_another():
    """A hook of the weight's gradient takes gradients of the same graph."""
    torch.manual_seed(0)
    width = 1024
    model = swalp.convert(
        nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)), "native-8"
    )
    x = torch.randn(width, width, requires_grad=True)
    y = model(x)
    first, second = torch.randn(2, width, width).unbind()
    alone = [torch.autograd.grad(y, x, seed, retain_graph=True)[0] for seed in (first, second)]
    within = []

    def hook(_):
        within.append(torch.autograd.grad(y, x, second, retain_graph=True)[0])

    handle = model[1].weight.register_post_accumulate_grad_hook(hook)
    y.backward(first, retain_graph=True)
    handle.remove()
    assert torch.equal(x.grad, alone[0])
    assert torch.equal(within[0], alone[1])
