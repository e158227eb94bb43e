"""Layers on integers: the same training as their simulation, one byte kept for each element."""

import copy
import io
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import swalp
from swalp import BlockFloat, Stochastic
from swalp.layers.native import NativeLinear
from swalp.layers.native_convolution import ChannelsLast
from swalp.matmul import again, attention
from swalp.matmul.operands import Operand
from swalp.recipes import Override, Quantizer, Recipe

EIGHT = Quantizer(BlockFloat(8), Stochastic(random_bits=16))
NATIVE = Recipe(
    name="native",
    weight=Quantizer(BlockFloat(8), Stochastic()),
    activation=EIGHT,
    error=EIGHT,
    gradient=EIGHT,
    momentum=EIGHT,
    quantize_input=True,
    placement="operands",
    product="native",
)
SIMULATED = replace(NATIVE, product="simulated")


def mlp(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 40, bias=bias), nn.ReLU(), nn.Linear(40, 24, bias=bias), nn.ReLU(),
        nn.Linear(24, 5, bias=bias),
    )  # fmt: skip


def train(model, recipe, steps=6, shape=(32, 12), consume=False, **options):
    model = swalp.convert(copy.deepcopy(model), recipe, seed=3, **options)
    optimizer = swalp.optim.SGD(
        model.named_parameters(), lr=0.1, momentum=0.9, recipe=recipe, seed=3
    )
    if consume:
        optimizer.consume_gradients()
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(shape, generator=generator)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def kinds(model):
    return [type(m).__mro__[1] for m in model.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("options", [{}, {"packed": True}, {"packed": True, "consume": True}])
@pytest.mark.parametrize("shape", [(32, 12), (2, 16, 12)])
def test_training_without_biases_equals_the_simulation_bit_for_bit(options, shape):
    native, losses = train(mlp(bias=False), NATIVE, shape=shape, **options)
    simulated, expected = train(mlp(bias=False), SIMULATED, shape=shape, **options)
    assert kinds(native) == [NativeLinear] * 3
    assert losses == expected
    for a, b in zip(native.parameters(), simulated.parameters(), strict=True):
        assert torch.equal(a.detach() + 0.0, b.detach() + 0.0)


def test_gradients_with_biases():
    native = swalp.convert(mlp(), NATIVE, seed=3)
    simulated = swalp.convert(mlp(), SIMULATED, seed=3)
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = x.detach().clone().requires_grad_()
    native(x).square().mean().backward()
    simulated(y).square().mean().backward()
    # Float adds the bias before or after rounding the sum: an ulp, which may flip a rounding.
    torch.testing.assert_close(x.grad, y.grad, rtol=0.05, atol=1e-4)
    last, other = native[4], simulated[4]
    assert last.bias.grad.shape == (5,)
    torch.testing.assert_close(last.bias.grad, other.bias.grad, rtol=1e-5, atol=1e-7)
    for name in ("weight", "bias"):
        for a, b in ((native[0], simulated[0]), (native[2], simulated[2])):
            a, b = getattr(a, name).grad, getattr(b, name).grad
            assert (a - b).norm() < 0.02 * b.norm()


def test_evaluation_is_the_nearest_and_draws_nothing():
    native, simulated = (swalp.convert(mlp(bias=False), r).eval() for r in (NATIVE, SIMULATED))
    x = torch.randn(7, 12)
    assert torch.equal(native(x), simulated(x))
    assert torch.equal(native(x), native(x))


def test_only_codes_are_kept():
    kept = []
    model = swalp.convert(mlp(), NATIVE, packed=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model[0](torch.randn(64, 12))
    sizes = {t.dtype: t.numel() for t in kept if not isinstance(t, swalp.PackedTensor)}
    assert sizes == {torch.int8: 1} or sizes[torch.int8] in (1, 64 * 12)
    assert all(t.dtype == torch.int8 for t in kept if not isinstance(t, swalp.PackedTensor))
    assert sum(t.numel() for t in kept if t.dtype == torch.int8) == 64 * 12 + 1


def test_checkpointing_repeats_the_noise():
    model = swalp.convert(mlp(bias=False), NATIVE, seed=3)
    other = copy.deepcopy(model)
    x = torch.randn(16, 12)
    model[2](model[0](x)).sum().backward()
    y = torch.utils.checkpoint.checkpoint(other[0], x, use_reentrant=False)
    other[2](y).sum().backward()
    for layer in (0, 2):
        assert torch.equal(model[layer].weight.grad, other[layer].weight.grad)


def test_a_nan_goes_through_float_and_arrives():
    model = swalp.convert(mlp(), NATIVE)
    x = torch.randn(4, 12)
    x[1, 3] = torch.nan
    y = model(x)
    assert y[1].isnan().all()
    assert not y[[0, 2, 3]].isnan().any()
    y.sum().backward()
    assert model[0].weight.grad.isnan().any()
    packed = swalp.convert(mlp(), NATIVE, packed=True)
    with torch.no_grad():
        values = packed[0].weight.dequantize()
        values[3, 2] = torch.nan
        packed[0].weight.copy_(values)
    assert packed[0](torch.randn(4, 12))[:, 3].isnan().all()


def test_a_weight_off_its_grid_is_multiplied_as_it_is():
    model = swalp.convert(mlp(), NATIVE)
    with torch.no_grad():
        model[0].weight.mul_(1.0001)
    x = torch.randn(4, 12)
    y = model[0](x)
    rounded = model[0]._swalp_layer.input_site.activation(x, 0, 0)
    simulated = swalp.convert(mlp(), SIMULATED)
    simulated[0].weight.data.copy_(model[0].weight)
    torch.testing.assert_close(y, simulated[0](x))
    assert rounded.shape == x.shape


def test_what_cannot_run_on_integers_is_simulated_and_said():
    overrides = (Override(layers="2", weight=None), Override(layers="4", error=None))
    recipe = replace(NATIVE, quantize_input=False, overrides=overrides)
    model = swalp.convert(mlp(), recipe)
    assert NativeLinear not in kinds(model)
    notes = {row.name: row.note for row in swalp.summary(model).layers}
    assert "products simulated: its input is float" in notes["0"]
    assert "products simulated: its weight is float" in notes["2"]
    assert "products simulated: its error is float" in notes["4"]
    y = model(torch.randn(3, 12))
    y.sum().backward()
    native = swalp.convert(mlp(), NATIVE)
    assert "products on integers" in {r.name: r.note for r in swalp.summary(native).layers}["0"]
    back = swalp.to_float(native)
    assert [type(m) for m in back] == [type(m) for m in mlp()]
    assert not {"weight_format", "simulated"} & set(vars(back[0]))


def test_float64_autocast_and_vectors_are_simulated():
    model = swalp.convert(mlp(), NATIVE)
    assert model[0](torch.randn(12)).shape == (40,)
    assert model.double()[0](torch.randn(2, 12, dtype=torch.float64)).dtype == torch.float64
    model = swalp.convert(mlp(), NATIVE)
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](torch.randn(2, 12)).dtype == torch.bfloat16
    assert model(torch.randn(0, 12)).shape == (0, 5)


def test_gpt2s_linear_layer():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = Conv1D(20, 12)
    results = []
    for recipe in (NATIVE, SIMULATED):
        model = swalp.convert(nn.Sequential(copy.deepcopy(layer)), recipe, packed=True)
        model[0].bias.data.copy_(torch.zeros(20))
        x = torch.linspace(-1, 1, 96).view(2, 4, 12).requires_grad_()
        y = model(x)
        y.backward(torch.linspace(-2, 1, y.numel()).view_as(y))
        results.append((y, x.grad, model[0].weight.grad, model[0].bias.grad))
    assert isinstance(swalp.convert(nn.Sequential(layer), NATIVE)[0], NativeLinear)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# PyTorch 2.13 makes an instance of an autograd function while it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_models_simulate_the_same_numbers():
    model = swalp.convert(mlp(bias=False), NATIVE).eval()
    x = torch.randn(5, 12)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(x), model(x))


class Attention(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.qkv = nn.Linear(32, 96, bias=False)
        self.out = nn.Linear(32, 32, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        if self.kind == "sdpa":
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def test_weights_off_their_grid_are_multiplied_as_they_are_wherever_the_layer_stands():
    """Also where the forward of the module around it quantizes products that it calls."""
    torch.manual_seed(0)
    model = Attention("sdpa")
    x = torch.randn(3, 20, 32)
    outputs = []
    for recipe in (NATIVE, SIMULATED):
        converted = swalp.convert(copy.deepcopy(model), recipe).eval()
        with torch.no_grad():
            for parameter in converted.parameters():
                parameter.mul_(1.01)
        outputs.append(converted(x))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_attention_equals_the_simulation_bit_for_bit(kind):
    torch.manual_seed(0)
    model = Attention(kind)
    native, losses = train(model, NATIVE, shape=(3, 20, 32), packed=True)
    simulated, expected = train(model, SIMULATED, shape=(3, 20, 32), packed=True)
    assert native._swalp_layer.native
    assert losses == expected
    for a, b in zip(native.parameters(), simulated.parameters(), strict=True):
        assert torch.equal(a.detach() + 0.0, b.detach() + 0.0)
    note = swalp.summary(native).layers[0].note
    assert "products of matrices on integers" in note


def test_attention_of_a_layer_of_pytorchs():
    torch.manual_seed(0)
    for build in (
        lambda: nn.MultiheadAttention(32, 4, bias=False, batch_first=True),
        lambda: nn.TransformerEncoderLayer(32, 4, 64, 0.0, bias=False, batch_first=True),
    ):
        model = build()
        results = []
        for recipe in (NATIVE, SIMULATED):
            low = swalp.convert(copy.deepcopy(model), recipe, seed=1)
            x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
            y = low(x, x, x)[0] if isinstance(model, nn.MultiheadAttention) else low(x)
            y.square().sum().backward()
            results.append((y, x.grad, *(p.grad for p in low.parameters())))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


class Masked(nn.Module):
    def forward(self, q, k, v, **options):
        return nn.functional.scaled_dot_product_attention(q, k, v, **options)


@pytest.fixture(params=[1, 2, None], ids=["each", "two", "all"])
def together(request, monkeypatch):
    """How many samples are worked on at a time; None: as many as their size allows."""
    if request.param is not None:
        found = attention._together

        def some(q, k):
            samples, count = found(q, k)[-1].stop, request.param
            return [slice(at, min(at + count, samples)) for at in range(0, samples, count)]

        monkeypatch.setattr(attention, "_together", some)


@pytest.mark.parametrize("mask", ["none", "boolean", "each", "added", "scale"])
def test_attention_whole_equals_its_two_products(mask, together):
    generator = torch.Generator().manual_seed(1)

    def tensor(*shape, size=1.0):
        return (size * torch.randn(shape, generator=generator)).requires_grad_()

    low = [swalp.convert(Masked(), recipe, seed=5) for recipe in (NATIVE, SIMULATED)]
    options = {
        "none": {},
        "boolean": {"attn_mask": torch.rand(12, 9, generator=generator) > 0.2},
        "each": {"attn_mask": torch.rand(3, 1, 12, 9, generator=generator) > 0.2},
        "added": {"attn_mask": torch.randn(2, 12, 9, generator=generator)},
        "scale": {"scale": 2.0},
    }[mask]
    for size in (0.1, 30.0, 1.0):  # exponents change, so guesses fail
        tensors = [tensor(3, 2, n, 8, size=size) for n in (12, 9, 9)]
        results = []
        for model in low:
            for x in tensors:
                x.grad = None
            y = model(*tensors, **options)
            (y * size).square().sum().backward()
            results.append((y.detach(), *(x.grad for x in tensors)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a + 0.0, b + 0.0)
    assert swalp.noise_clock(low[0]).hints
    assert not swalp.noise_clock(low[1]).hints


def test_small_samples_are_worked_on_together():
    def of(samples, heads, rows, columns):
        q, k = (
            Operand(torch.empty(samples, heads, n, 8, dtype=torch.int8), None, 0)
            for n in (rows, columns)
        )
        return [(some.start, some.stop) for some in attention._together(q, k)]

    assert of(8, 12, 512, 512) == [(i, i + 1) for i in range(8)]
    assert of(32, 4, 64, 64) == [(0, 32)]
    assert of(5, 4, 128, 512) == [(0, 2), (2, 4), (4, 5)]
    assert of(3, 4, 4096, 512) == [(0, 2), (2, 3)]  # by bands
    assert of(1, 1, 1, 1) == [(0, 1)]


BANDS = [(300, 300), (130, 300), (300, 130), (128, 257), (129, 128), (16, 1), (1, 300), (257, 256)]
LARGE = [(0.1, 1.0), (30.0, 1.0), (1.0, 1.0), (1e17, 1.0), (1.0, 1e17)]


@pytest.mark.parametrize("lengths", BANDS, ids=str)
@pytest.mark.parametrize("mask", ["causal", "none", "rows", "all", "each head"])
def test_attention_in_bands_equals_its_two_products(lengths, mask, together):
    """With scores, or errors of probabilities, that come near infinity, too."""
    rows, columns = lengths
    generator = torch.Generator().manual_seed(1)
    low = [swalp.convert(Masked(), recipe, seed=5) for recipe in (NATIVE, SIMULATED)]
    options = {
        "causal": {"is_causal": True},
        "none": {},
        "rows": {"attn_mask": torch.rand(rows, columns, generator=generator) > 0.2},
        "all": {"attn_mask": torch.rand(2, 1, 1, columns, generator=generator) > 0.2},
        "each head": {"attn_mask": torch.randn(3, rows, columns, generator=generator)},
    }[mask]
    for scores, values in LARGE:
        tensors = [
            (size * torch.randn(2, 3, n, 8, generator=generator)).requires_grad_()
            for n, size in ((rows, scores), (columns, scores), (columns, values))
        ]
        gradient = values * torch.randn(2, 3, rows, 8, generator=generator)
        results = []
        for model in low:
            for x in tensors:
                x.grad = None
            y = model(*tensors, **options)
            y.backward(gradient)
            results.append((y.detach(), *(x.grad for x in tensors)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert swalp.noise_clock(low[0]).hints
    assert not swalp.noise_clock(low[1]).hints


def test_samples_are_run_with_the_exponent_of_all():
    """Again where it was another; and of what comes and goes the usual is tried first."""
    guess, ran, runs = attention.Guess(), [None] * 4, []
    for own in ([0, -3, 2, 1], [2, 2, 2, 2], [-5, -7, -6, -5], [2, 3, 2, 3], [2, 2, 2, 2]):
        count = 0

        def run(some, exponent, own=own):
            nonlocal count
            count += 1
            ran[some] = [exponent]
            return own[some.start]

        assert attention._settle(run, [slice(i, i + 1) for i in range(4)], guess) == max(own)
        assert ran == [max(own)] * 4
        runs.append(count)
    # Guesses: 0 until 2 is as frequent, of such the lowest; in the end 2.
    assert runs == [4 + 3, 4 + 1, 4 + 4, 4 + 2, 4]


@pytest.mark.parametrize(
    ("query", "key", "mask"),
    [
        ((1, 2), (3, 2), None),
        ((3, 2), (1, 2), None),
        ((3, 2), (3, 1), None),
        ((1, 2), (1, 2), (3, 1, 5, 6)),
        ((3, 1), (3, 1), (2, 5, 6)),
        ((3, 2), (3, 2), (1, 3, 2, 5, 6)),
    ],
)
def test_attention_that_broadcasts_is_the_simulations(query, key, mask):
    torch.manual_seed(0)
    operands = [torch.randn(*query, 5, 8), torch.randn(*key, 6, 8), torch.randn(*key, 6, 8)]
    masks = [None] if mask is None else [torch.randn(mask), torch.rand(mask) > 0.2]
    for attn_mask in masks:
        results = []
        for recipe in (NATIVE, SIMULATED):
            tensors = [x.clone().requires_grad_() for x in operands]
            y = swalp.convert(Masked(), recipe, seed=5)(*tensors, attn_mask=attn_mask)
            y.square().sum().backward()
            results.append((y.detach(), *(x.grad for x in tensors)))
        plain = torch.broadcast_shapes((*query, 5, 8), (*key, 1, 1), (*(mask or (1,))[:-1], 1))
        assert results[0][0].shape == plain
        for a, b in zip(*results, strict=True):
            assert torch.equal(a + 0.0, b + 0.0)


@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_a_mask_that_changes_before_the_backward_pass(kind):
    """One that is added is refused by autograd, as in PyTorch's own; of a boolean one is a copy."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 5, 8, requires_grad=True)
    mask = torch.rand(5, 5).sub(0.3).round().to(kind)
    model = swalp.convert(Masked(), NATIVE)
    y = model(x, x, x, attn_mask=mask).square().sum()
    (expected,) = torch.autograd.grad(y, x, retain_graph=True)
    mask.fill_(1)
    if kind == torch.bool:
        assert torch.equal(torch.autograd.grad(y, x)[0], expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_attention_keeps_codes_alone():
    kept = []
    model = swalp.convert(Masked(), NATIVE)
    q, k, v = (torch.randn(2, 2, 16, 8, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(q, k, v)
    assert sorted((t.dtype, t.numel()) for t in kept if t.numel() > 1) == [(torch.int8, 512)] * 3
    with torch.no_grad():
        q[0, 0, 0, 0] = torch.nan
    assert model(q, k, v)[0, 0, 0].isnan().all()
    assert y.isfinite().all()


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_unmodified_transformers_train_on_integers(kind):
    import transformers

    torch.manual_seed(0)
    options = {"attn_implementation": "sdpa", "hidden_dropout_prob": 0.0}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4, use_cache=False,
            embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
        tokens = torch.randint(50, (4, 16))
        batch = {"input_ids": tokens, "labels": tokens}
    else:
        config = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            image_size=16, patch_size=4, num_labels=5, **options,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config)
        batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.arange(4)}
    model = swalp.convert(model, "native-8", packed=True)
    optimizer = swalp.optim.SGD(
        model.named_parameters(), lr=0.1, momentum=0.9, recipe=swalp.recipes.get("native-8")
    )
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    notes = [row.note for row in swalp.summary(model).layers]
    assert sum("on integers" in note for note in notes) >= 2 * (4 if kind == "gpt2" else 6)
    assert swalp.noise_clock(model).hints  # both products of attention


def _between(layer, x, dy, seed, copies):
    """Output and gradients of `layer` behind a linear one, or, if `copies`, behind its copy."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 40), copy.deepcopy(layer))
    model = swalp.convert(model, "native-8", seed=5)
    given = x.clone().requires_grad_()
    middle = model[0](given)
    y = model[1](middle.clone() if copies else middle)
    y.backward(dy)
    return [y.detach(), given.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_computes_its_input_again(approximate):
    torch.manual_seed(0)
    x, dy = torch.randn(7, 33, 24), torch.randn(7, 33, 40)
    layer = nn.GELU(approximate)
    mine, pytorchs = (_between(layer, x, dy, 1, copies) for copies in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(mine, pytorchs, strict=True))


@pytest.mark.parametrize("rows", [7, 700])
def test_gelu_in_place_gives_the_same_numbers(rows):
    torch.manual_seed(0)
    x, dy = torch.randn(rows, 33, 24), torch.randn(rows, 33, 40)
    apart, inplace = nn.GELU("tanh"), nn.GELU("tanh")
    inplace.inplace = True
    mine, pytorchs = (_between(layer, x, dy, 1, False) for layer in (inplace, apart))
    assert all(torch.equal(one, other) for one, other in zip(mine, pytorchs, strict=True))


def test_gelu_in_place_takes_its_input_s_place_and_autograd_knows():
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU())
    model = swalp.convert(model, "native-8")
    model[1].inplace = True
    hidden = model[0](torch.randn(64, 24))
    squares = hidden.square()
    y = model[1](hidden)
    assert y.data_ptr() == hidden.data_ptr()
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        squares.sum().backward()
    # Whose input cannot be computed again is left alone.
    for other in (torch.randn(64, 40), torch.randn(64, 40, requires_grad=True)):
        assert model[1](other).data_ptr() != other.data_ptr()
    with torch.no_grad():
        hidden = model[0](torch.randn(64, 24))
        assert model[1](hidden).data_ptr() != hidden.data_ptr()


def test_gelu_keeps_nothing_of_its_own():
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU())
    model = swalp.convert(model, "native-8", packed=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(64, 24, requires_grad=True))
    large = [t for t in saved if t.dtype == torch.float32 and t.numel() >= 64 * 24]
    assert all(type(t) is not torch.Tensor for t in large)
    assert saved


@pytest.mark.parametrize(
    ("affine", "needs"),
    [(True, "both"), (True, "input"), (True, "parameters"), (False, "both")],
)
@pytest.mark.parametrize("rows", [9, 4000])  # of which 1,820 are a band
def test_layer_norm_equals_pytorchs(affine, needs, rows):
    torch.manual_seed(0)
    norm = nn.LayerNorm((6, 24), elementwise_affine=affine)
    model = nn.Sequential(copy.deepcopy(norm), nn.Flatten(), nn.Linear(144, 4))
    lean = swalp.convert(model, "native-8")[0]
    x, dy = torch.randn(rows, 6, 24), torch.randn(rows, 6, 24)
    results = []
    for layer in (lean, norm):
        layer.load_state_dict(lean.state_dict())
        for parameter in layer.parameters():
            parameter.requires_grad_(needs != "input")
        given = x.clone().requires_grad_(needs != "parameters")
        y = layer(given)
        y.backward(dy)
        results.append([y.detach(), *(p.grad for p in (given, *layer.parameters()))])
    results = [[one for one in found if one is not None] for found in results]
    assert len(results[0]) == 1 + (needs != "parameters") + 2 * (affine and needs != "input")
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_rows_of_which_nothing_takes_part_are_zeros_as_in_the_simulation():
    torch.manual_seed(0)
    mask = torch.rand(16, 16) < 0.5
    mask[3], mask[:, 5] = False, True
    mask[3, 5] = False
    x, dy = torch.randn(2, 16, 8), torch.randn(2, 16, 8)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return y.transpose(1, 2).flatten(2)

    found = []
    for product in ("native", "simulated"):
        torch.manual_seed(1)
        recipe = replace(swalp.recipes.get("native-8"), product=product)
        model = swalp.convert(Attention(), recipe)
        given = x.clone().requires_grad_()
        y = model(given)
        y.backward(dy)
        found.append([y.detach(), given.grad, model.qkv.weight.grad])
    assert (found[0][0][:, 3] == 0).all()
    assert all(torch.equal(one + 0.0, other + 0.0) for one, other in zip(*found, strict=True))


class Product(nn.Module):
    def forward(self, x):
        return x @ x.mT


class Itself(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


LAYERS = {
    "linear": lambda: nn.Linear(8, 8),
    "relu": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
    "gelu": lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()),
    "norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)),
    "product": Product,
    "attention": lambda: nn.Sequential(nn.Unflatten(0, (2, 1)), Itself()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_several_gradients_at_once_are_refused(name):
    torch.manual_seed(0)
    model = swalp.convert(nn.Sequential(LAYERS[name]()), NATIVE)
    x = torch.randn(2, 5, 8, requires_grad=True)
    y = model(x)
    gradients = torch.randn(3, *y.shape)
    with pytest.raises(RuntimeError, match="native layers take back one gradient at a time"):
        torch.autograd.grad(y, x, gradients, is_grads_batched=True)
    simulated = swalp.convert(nn.Sequential(LAYERS[name]()), SIMULATED)
    torch.autograd.grad(simulated(x), x, gradients, is_grads_batched=True)


def test_batch_norm_without_statistics_leaves_them_alone():
    model = swalp.convert(
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "native-8"
    )
    model[2].track_running_stats = False
    model(torch.randn(2, 4, 9, 9))
    assert not model[2].running_mean.any()
    assert torch.equal(model[2].running_var, torch.ones(8))


def test_views_of_a_convolutions_result():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            y = self.b(self.a(x))
            return y, y.view(2, -1), y.view(2, 8, -1), y.view(torch.int32)

    y, flat, planes, bits = swalp.convert(Views(), "native-8")(torch.randn(2, 4, 9, 9))
    assert torch.equal(flat, y.flatten(1))
    assert torch.equal(planes, y.flatten(2))
    assert planes.data_ptr() == y.data_ptr()
    assert torch.equal(bits.view(torch.float32), y)
    with pytest.raises(RuntimeError, match="shape"):
        swalp.convert(nn.Sequential(Wrong(), nn.Linear(2, 2)), "native-8")(torch.randn(2, 3))


class Wrong(nn.Module):
    def forward(self, x):
        return x.view(5, 5)


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def other_default(request):
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def _images():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * 4 * 4, 24), nn.LayerNorm(24), nn.Linear(24, 24), nn.GELU(),
        nn.Linear(24, 5),
    )  # fmt: skip
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(4, 16, 3, 8, 8).to(torch.float32)
    return model, [part.contiguous(memory_format=torch.channels_last) for part in x]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
def test_the_default_dtype_changes_nothing(kind, packed, other_default):
    results = []
    options = {"momentum": 0.9} if kind is swalp.optim.SGD else {}
    for default in (torch.float32, other_default):
        model, batches = _images()
        torch.set_default_dtype(default)
        model = swalp.convert(model, "native-8", packed=packed, seed=3)
        optimizer = kind(model, lr=0.01, recipe="native-8", seed=3, **options)
        for x in batches:
            optimizer.zero_grad()
            y = model(x)
            y.square().mean().backward()
            optimizer.step()
        results.append([y, *(p.grad for p in model.parameters()), *model.state_dict().values()])
        torch.set_default_dtype(torch.float32)
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        if isinstance(one, swalp.PackedTensor):
            one, other = one.dequantize(), other.dequantize()
        assert torch.equal(one, other)


def _nan_runs(mask, error):
    """Results and gradients of attention with that mask and gradient, native and simulated."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 2, n, 4) for n in (5, 6, 6)]
    for recipe in (NATIVE, SIMULATED):
        given = [x.clone().requires_grad_() for x in tensors]
        model = swalp.convert(Masked(), recipe, seed=5)
        y = model(*given, attn_mask=mask)
        z = model(*given)  # what comes after has the same noise
        y.backward(error)
        yield [y.detach(), z.detach(), *(x.grad for x in given)]


@pytest.mark.parametrize("place", ["mask", "scores", "error"])
def test_a_nan_in_attention_arrives_where_it_should(place):
    mask, error = torch.zeros(2, 2, 5, 6), torch.randn(2, 2, 5, 4)
    if place == "mask":
        mask[0, 0, 0, 0] = torch.nan
    elif place == "scores":
        mask[0, 0, 0, 0] = torch.inf
    else:
        error[1, 0, 2, 3] = torch.nan
    native, simulated = _nan_runs(mask, error)
    for one, other in zip(native, simulated, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert not one.isnan().all()
        torch.testing.assert_close(one, other, equal_nan=True)
    assert native[0].isnan().any() == (place != "error")
    assert all(x.isnan().any() for x in native[2:])


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"attn_mask": torch.ones(40, 40).tril() > 0}]
)
def test_a_nan_error_does_not_reach_keys_that_its_query_cannot_see(options, recomputed):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, 40, 8, generator=generator) for _ in range(3)]
    error = torch.randn(2, 3, 40, 8, generator=generator)
    error[1, 0, 20, 3] = torch.nan
    results = []
    for recipe in (NATIVE, SIMULATED):
        model = swalp.convert(Masked(), recipe, seed=5)
        inputs = [x.clone().requires_grad_() for x in tensors]
        if recomputed:
            y = torch.utils.checkpoint.checkpoint(model, *inputs, use_reentrant=False, **options)
        else:
            y = model(*inputs, **options)
        y.backward(error)
        results.append([x.grad for x in inputs])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        torch.testing.assert_close(one, other, equal_nan=True)
    assert not results[0][1][1, 0, 21:].isnan().any()
    assert results[0][1][1, 0, :21].isnan().any()


def test_errors_of_scores_beyond_float32_are_the_simulations():
    error = torch.full((2, 2, 5, 4), 1e38)
    error[0] = 1.0
    native, simulated = _nan_runs(torch.zeros(5, 6), error)
    for one, other in zip(native, simulated, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.filterwarnings("ignore")  # tracing has many
@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv2d(2, 8, 3), Itself()], ids=str)
def test_traced_layers_are_simulated(layer):
    model = swalp.convert(nn.Sequential(copy.deepcopy(layer)), "native-8").eval()
    x, other = (torch.randn(2, 2, 8, 8) for _ in range(2))
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(other), model(other))


_NARROW = """
import copy, torch, swalp
from torch import nn
torch.manual_seed(0)
x = torch.randn(2, 4, 5, 2)
layers = [
    nn.Conv2d(4, 4, 1, stride=(2, 3), padding=(2, 4), dilation=(1, 3), groups=2),
    nn.Conv2d(4, 4, (3, 1), stride=(1, 3), padding=(0, 1), groups=2),
    nn.Conv2d(4, 4, (3, 2), stride=(1, 6), padding=(1, 2), dilation=(1, 4), groups=2),
]
for layer in layers:
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        model = nn.Sequential(nn.Conv2d(4, 4, 1), copy.deepcopy(layer))
        model = swalp.convert(model, "native-8").eval()
        y = model(images)
        assert torch.equal(y, model[1].bias.view(1, -1, 1, 1).expand_as(y)), y
"""


def test_images_whose_columns_no_window_meets():
    """PyTorch's convolution crashes on them where channels are last in memory."""
    layer = nn.Conv2d(4, 4, 1, stride=3, padding=1, groups=2)
    assert isinstance(swalp.convert(nn.Sequential(layer), "native-8")[0], ChannelsLast)
    done = subprocess.run([sys.executable, "-c", _NARROW], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv2d(2, 8, 3)], ids=str)
def test_results_can_be_saved_and_loaded(layer):
    model = swalp.convert(nn.Sequential(copy.deepcopy(layer)), "native-8")
    y = model(torch.randn(2, 2, 8, 8))
    assert again.again_of(y) is not None
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file), y)
    count = len(again._known)
    del y
    assert len(again._known) == count - 1


def test_of_results_changed_in_place_nothing_is_computed_again():
    y = swalp.convert(nn.Sequential(nn.Linear(8, 8)), "native-8")(torch.randn(4, 8))
    with torch.no_grad():
        y.mul_(2.0)
    assert again.again_of(y) is None


class Apart(nn.Sequential):
    """Its layers one by one, as a network of anybody's calls them."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def passes(model, x, dy):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("strange", [False, True])
@pytest.mark.parametrize("shape", [(32, 12), (4, 8, 12), (1024, 12)])
def test_a_relu_after_a_linear_layer_is_one_with_it(shape, strange, packed):
    """With the same numbers, and no result between them."""
    model = mlp()
    apart = Apart(*copy.deepcopy(model))
    one, two = (swalp.convert(m, "native-8", seed=1, packed=packed) for m in (model, apart))
    x, dy = torch.randn(shape), torch.randn(*shape[:-1], 5)
    if strange:
        x[0, 0] = torch.nan  # the first layer computes in float
    for each in zip(passes(one, x, dy), passes(two, x, dy), strict=True):
        torch.testing.assert_close(*each, rtol=0, atol=0, equal_nan=True)
    kinds = {type(node).__name__ for node in nodes(one(x))}
    assert "_ReLUBackward" not in kinds
    assert "_ReLUBackward" in {type(node).__name__ for node in nodes(two(x))}


def nodes(y):
    found, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [before for before, _ in node.next_functions]
    return found


def test_gradients_of_any_layout_and_owner_pass_a_relu():
    one, two = (
        swalp.convert(kind(nn.Linear(12, 600), nn.ReLU()), "native-8", seed=1)
        for kind in (nn.Sequential, Apart)
    )
    two.load_state_dict(one.state_dict())
    x = torch.randn(500, 12)
    for dy in (torch.randn(600, 500).T, torch.randn(1, 600).expand(500, 600)):
        before = dy.clone()
        for each in zip(passes(one, x, dy), passes(two, x, dy), strict=True):
            assert torch.equal(*each)
        assert torch.equal(dy, before)
        for model in (one, two):
            model.zero_grad()


@pytest.mark.parametrize("watch", ["hook", "pre-hook", "backward", "everywhere", "own forward"])
@pytest.mark.parametrize("place", [0, 1])
def test_who_watches_a_layer_sees_its_result(place, watch):
    model = swalp.convert(nn.Sequential(nn.Linear(12, 40), nn.ReLU()), "native-8")
    layer, seen = model[place], []
    match watch:
        case "hook":
            handle = layer.register_forward_hook(lambda module, given, y: seen.append(y))
        case "pre-hook":
            handle = layer.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        case "backward":
            handle = layer.register_full_backward_hook(lambda *given: seen.append(given))
        case "everywhere":
            handle = nn.modules.module.register_module_forward_hook(
                lambda module, given, y: seen.append(y) if module is layer else None
            )
        case "own forward":
            layer.forward = lambda x: seen.append(x) or type(layer).forward(layer, x)
            handle = None
    model(torch.randn(8, 12, requires_grad=True)).sum().backward()
    if handle is not None:
        handle.remove()
    assert len(seen) == 1


def test_without_a_gradient_relu_keeps_nothing():
    model = swalp.convert(mlp(), "native-8").eval()
    with torch.no_grad():
        y = model(torch.randn(8, 12))
    assert y.grad_fn is None


def test_a_sequence_is_what_it_was_when_it_is_float_again():
    model = swalp.convert(mlp(), "native-8")
    assert isinstance(model, nn.Sequential)
    assert type(model).__name__ == "Sequential"
    assert type(swalp.to_float(model)) is nn.Sequential
    assert type(copy.deepcopy(model)) is type(model)
    assert len(model[1:]) == 4
