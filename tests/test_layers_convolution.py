"""Convolution networks on integers: the simulation's numbers, and little kept between layers."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import swalp
from swalp import BlockFloat, Stochastic
from swalp.layers.native_convolution import ChannelsLast, NativeConvolution
from swalp.matmul import convolution
from swalp.recipes import Quantizer, Recipe

pytestmark = pytest.mark.skipif(bool(convolution.obstacle()), reason=convolution.obstacle())

EIGHT = Quantizer(BlockFloat(8), Stochastic(random_bits=16))
NATIVE = Recipe(
    name="native", weight=Quantizer(BlockFloat(8), Stochastic()), activation=EIGHT, error=EIGHT,
    gradient=EIGHT, momentum=EIGHT, quantize_input=True, placement="operands", product="native",
)  # fmt: skip
SIMULATED = replace(NATIVE, product="simulated")


def network(norm=True, inplace=False):
    torch.manual_seed(0)
    layers = []
    for inner, outer in ((3, 16), (16, 24)):
        layers += [nn.Conv2d(inner, outer, 3, padding="same")]
        layers += [nn.BatchNorm2d(outer)] if norm else []
        layers += [nn.ReLU(inplace), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 9, 10))


def train(model, recipe, steps=4, **options):
    model = swalp.convert(copy.deepcopy(model), recipe, seed=3, **options)
    optimizer = swalp.optim.SGD(
        model.named_parameters(), lr=0.02, momentum=0.9, recipe=recipe, seed=3
    )
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 3, 12, 12, generator=generator)
        y = torch.randint(10, (8,), generator=generator)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_trains_like_the_simulation(inplace, packed):
    # Without batch normalization every sum here is exact in float32 too: equal bit for bit.
    native, losses = train(network(False, inplace), NATIVE, packed=packed)
    simulated, expected = train(network(False, inplace), SIMULATED, packed=packed)
    assert losses == expected
    for mine, theirs in zip(native.parameters(), simulated.parameters(), strict=True):
        assert torch.equal(mine.detach() + 0.0, theirs.detach() + 0.0)


def test_batch_normalization_trains_alike():
    # Statistics are sums in another order: the memory's.
    native, losses = train(network(), NATIVE)
    simulated, expected = train(network(), SIMULATED)
    assert losses == pytest.approx(expected, rel=0.02)
    assert torch.allclose(native[1].running_mean, simulated[1].running_mean, atol=0.02)
    assert native[1].num_batches_tracked == 4


def test_batch_normalization_computes_its_input_again():
    torch.manual_seed(0)
    x, dy = torch.randn(6, 8, 9, 9), torch.randn(6, 12, 9, 9)
    results = []
    for lean in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12))
        model = swalp.convert(model, NATIVE, seed=5)
        given = x.clone().requires_grad_()
        middle = model[0](given)
        # A copy is no output of the convolution: PyTorch's own function keeps it.
        y = model[1](middle if lean else middle.clone())
        y.backward(dy)
        grads = [parameter.grad for parameter in model.parameters()]
        results.append([y.detach(), given.grad, *grads, model[1].running_var])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("layer", "features", "shape", "message"),
    [
        (nn.Conv2d(4, 6, 3), 6, (1, 4, 3, 3), "more than 1 value per channel"),
        (nn.Conv2d(4, 6, 3), 5, (2, 4, 5, 5), "6 elements not 5"),
        (nn.Conv1d(4, 6, 3), 6, (2, 4, 5), "expected 4D input"),
    ],
)
def test_batch_normalization_refuses_what_pytorchs_refuses(layer, features, shape, message):
    model = nn.Sequential(copy.deepcopy(layer), nn.BatchNorm2d(features))
    model = swalp.convert(model, NATIVE)
    before = model[1].running_var.clone()
    y = model[0](torch.randn(shape))
    with pytest.raises((ValueError, RuntimeError), match=message):
        model[1](y)
    assert torch.equal(model[1].running_var, before)


def test_a_changed_output_is_not_computed_again():
    model = swalp.convert(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), NATIVE)
    y = model[0](torch.randn(3, 4, 6, 6))
    y.detach().mul_(2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model[1](y)
    assert any(t.data_ptr() == y.data_ptr() for t in saved)


def kept(model, x):
    """Bytes that autograd keeps of the activations of one pass, each block of memory once."""
    own = {p.data_ptr() for p in model.parameters() if type(p) is nn.Parameter}
    blocks = {}

    def pack(t):
        if type(t) is torch.Tensor and t.data_ptr() not in own:
            blocks[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return sum(size for size, _ in blocks.values()), y


@pytest.mark.parametrize("norm", [False, True])
def test_keeps_a_fraction_of_the_bytes(norm):
    x = torch.randn(32, 3, 12, 12)
    theirs, _ = kept(network(norm), x)
    ours, _ = kept(swalp.convert(network(norm), NATIVE, packed=True), x)
    assert ours < 0.25 * theirs


CASES = [
    (nn.MaxPool2d(2), (4, 5, 8, 8)),
    (nn.MaxPool2d(3, 2, 1), (3, 70, 9, 7)),
    (nn.MaxPool2d(3, 1), (2, 5, 6, 6)),
    (nn.MaxPool2d((1, 2), padding=(0, 1)), (2, 5, 6, 7)),
    (nn.MaxPool2d(2, ceil_mode=True), (2, 5, 7, 7)),
    (nn.ReLU(), (3, 5, 7, 7)),
    (nn.ReLU(True), (3, 5, 7, 7)),
]


@pytest.mark.parametrize(("layer", "shape"), CASES)
@pytest.mark.parametrize("last", [False, True])
def test_layers_between_equal_their_own(layer, shape, last):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), copy.deepcopy(layer))
    lean = swalp.convert(model, NATIVE)[1]
    x = torch.randn(shape)
    x[0, 0, 0, :3] = torch.tensor([float("nan"), 0.0, -0.0])
    x[1] = x[1].round()  # ties
    results = []
    for module in (lean, layer):
        given = x.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
        given.requires_grad_()
        y = module(given + 0)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        y.backward(dy)
        results.append((y.detach(), given.grad))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine.nan_to_num(99.0), theirs.nan_to_num(99.0))


def test_summary_says_which_and_why():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 8, 2, padding="same"),
        nn.Conv3d(8, 8, 1), nn.Conv1d(8, 8, 3),
    )  # fmt: skip
    recipe = replace(NATIVE, quantize_input=False)
    text = str(swalp.summary(swalp.convert(model, recipe))).splitlines()
    lines = [next(line for line in text if line.split()[:1] == [str(i)]) for i in range(7)]
    assert "its input is float" in lines[0]
    assert "products on integers" in lines[1]
    assert "float is faster" in lines[2]
    assert "reflect" in lines[3]
    assert "one side more" in lines[4]
    assert "no integer products" in lines[5]
    assert "products on integers" in lines[6]
    mixins = [type(layer).__mro__[1] for layer in model]
    assert mixins[:3] == [ChannelsLast, NativeConvolution, ChannelsLast]


def test_back_to_float_and_through_pickle():
    model = network()
    names = list(model.state_dict())
    low = swalp.convert(copy.deepcopy(model), NATIVE)
    assert list(low.state_dict()) == names
    again = pickle.loads(pickle.dumps(low))
    x = torch.randn(4, 3, 12, 12)
    assert torch.equal(again.eval()(x), low.eval()(x))
    plain = swalp.to_float(low)
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]


def test_an_image_that_is_too_large_is_simulated():
    layer = swalp.convert(nn.Sequential(nn.Conv2d(4, 4, 1)), NATIVE)
    y = layer(torch.randn(1, 4, 400, 400))
    assert y.shape == (1, 4, 400, 400)
    assert y.grad_fn.name() != "_ConvolveBackward"


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("size", [3, 4, 1])
def test_an_image_smaller_than_the_window_is_refused_as_by_pytorch(dimensions, size):
    kind = nn.Conv1d if dimensions == 1 else nn.Conv2d
    layer = swalp.convert(nn.Sequential(kind(4, 4, 3, stride=2, dilation=2)), NATIVE)
    assert isinstance(layer[0], NativeConvolution)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        layer(torch.randn(1, 4, *[size] * dimensions))
    assert layer(torch.randn(1, 4, *[5] * dimensions)).numel() == 4


def test_a_window_larger_than_most_images():
    layer = swalp.convert(nn.Sequential(nn.Conv1d(4, 4, 100)), NATIVE)
    assert isinstance(layer[0], NativeConvolution)
    assert layer(torch.randn(1, 4, 120)).grad_fn.name() == "_ConvolveBackward"


def test_a_single_image_without_a_batch():
    layer = swalp.convert(nn.Sequential(nn.Conv2d(4, 6, 3)), NATIVE)
    assert layer(torch.randn(4, 9, 9)).shape == (6, 7, 7)


def test_several_gradients_at_once_are_refused():
    layer = swalp.convert(nn.Sequential(nn.Conv2d(4, 6, 3)), NATIVE)
    y = layer(torch.randn(2, 4, 9, 9))
    with pytest.raises(RuntimeError, match="native layers take back one gradient at a time"):
        torch.autograd.grad(y, layer[0].weight, torch.randn(3, *y.shape), is_grads_batched=True)
