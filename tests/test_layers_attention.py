"""Attention: both products' operands, in PyTorch's layer and in modules that call it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import swalp
from rounded import lossless, recipe, rounded


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.after = nn.Linear(4, 2)

    def forward(self, q, k, v):
        return self.after(F.scaled_dot_product_attention(q, k, v, **self.options))


def operands(gqa=False):
    torch.manual_seed(0)
    heads = 1 if gqa else 2
    shapes = ((3, 2, 5, 4), (3, heads, 6, 4), (3, heads, 6, 4))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_attention_quantizes_the_operands_of_both_products():
    """Against the two products written out, with Q_A and Q_E at each of the four operands."""
    model, inputs = swalp.convert(Attention(), recipe(), seed=7), operands()
    twins = [x.detach().clone().requires_grad_() for x in inputs]
    y = model(*inputs)

    def q(x, call):
        return rounded(x, "", seed=7, step=1, call=call)

    query, key, value = twins
    scores = q(query, 0) @ q(key, 1).mT / 2
    z = q(scores.softmax(-1), 2) @ q(value.mT, 3).mT
    z = F.linear(rounded(z, "after", seed=7, step=1), model.after.weight, model.after.bias)
    assert torch.equal(y, z)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    z.backward(gradient)
    for ours, theirs in zip(inputs, twins, strict=True):
        assert torch.equal(ours.grad, theirs.grad)


MASKS = {
    "none": {},
    "boolean": {"attn_mask": torch.arange(30).reshape(5, 6) % 4 != 0},
    "a row with nothing": {"attn_mask": torch.arange(5).unsqueeze(1).expand(5, 6) != 2},
    "added": {"attn_mask": torch.linspace(-1, 1, 30).reshape(5, 6)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_with_lossless_operands_is_pytorchs(name):
    inputs = operands(gqa=name == "grouped")
    plain = Attention(**MASKS[name])
    model = swalp.convert(copy.deepcopy(plain), lossless())
    torch.testing.assert_close(model(*inputs), plain(*inputs), rtol=0, atol=1e-6)


def test_attention_with_every_role_off_is_pytorchs_to_the_bit():
    inputs = operands()
    model = swalp.convert(Attention(), lossless(activation=None, error=None))
    expected = F.scaled_dot_product_attention(*inputs)
    assert torch.equal(model(*inputs), model.after(expected))


def test_dropout_of_probabilities():
    """The same random numbers as PyTorch's own written-out form."""
    inputs = operands()
    model = swalp.convert(Attention(dropout_p=0.5), lossless())
    torch.manual_seed(3)
    given = model(*inputs)
    torch.manual_seed(3)
    q, k, v = inputs
    expected = model.after(F.dropout((q @ k.mT / 2).softmax(-1), 0.5) @ v)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)


LAYERS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "other widths": {"kdim": 6, "vdim": 10},
    "appended": {"add_bias_kv": True, "add_zero_attn": True},
    "no bias": {"bias": False},
}
CALLS = {
    "plain": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3)},
    "added mask": {"attn_mask": torch.linspace(-1, 1, 20).reshape(4, 5)},
    "mask for each head": {"attn_mask": torch.arange(120).reshape(6, 4, 5) % 3 == 0},
    "both masks": {
        "key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3),
        "attn_mask": torch.arange(20).reshape(4, 5) % 3 == 1,
    },
    "no weights": {"need_weights": False},
    "weights of heads": {"average_attn_weights": False},
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("call", CALLS)
def test_multi_head_attention_with_lossless_operands_is_pytorchs(layer, call):
    torch.manual_seed(0)
    options = LAYERS[layer]
    plain = nn.MultiheadAttention(8, 2, **options)
    model = swalp.convert(copy.deepcopy(plain), lossless())
    q = torch.randn(4, 3, 8)
    k, v = torch.randn(5, 3, options.get("kdim", 8)), torch.randn(5, 3, options.get("vdim", 8))
    if options.get("batch_first"):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    for given, expected in zip(*(f(q, k, v, **CALLS[call]) for f in (model, plain)), strict=True):
        assert (given is None) == (expected is None)
        if given is not None:  # float32 sums in another order, which depends on the processor
            torch.testing.assert_close(given, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("training", [True, False])
def test_multi_head_attention_of_one_sequence_and_of_itself(training):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2).train(training)
    model = swalp.convert(copy.deepcopy(plain), lossless())
    for x in (torch.randn(4, 8), torch.randn(4, 3, 8)):
        with torch.no_grad():  # in evaluation, PyTorch takes a fast path of its own
            for given, expected in zip(model(x, x, x), plain(x, x, x), strict=True):
                torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["native-8", "paper-small-block-8"])
def test_multi_head_attention_of_an_empty_batch(name):
    model = swalp.convert(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), name)
    x = torch.randn(0, 5, 16, requires_grad=True)
    y = model(x, src_key_padding_mask=torch.zeros(0, 5, dtype=torch.bool))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 5, 16)
    assert all((p.grad == 0).all() for p in model.parameters())


def test_multi_head_attention_quantizes_what_is_shared_once():
    """Self-attention written out: the input of the three projections has one rounding."""
    torch.manual_seed(0)
    model = swalp.convert(nn.MultiheadAttention(8, 2, bias=False), recipe(), seed=5)
    x = torch.randn(4, 3, 8)

    def q(value, call):
        return rounded(value, "", seed=5, step=1, call=call)

    entered = q(x, 0)
    heads = [
        F.linear(entered, weight).reshape(4, 3, 2, 4).permute(1, 2, 0, 3)
        for weight in model.in_proj_weight.chunk(3)
    ]
    probabilities = q((q(heads[0], 1) @ q(heads[1], 2).mT / 2).softmax(-1), 3)
    y = (probabilities @ q(heads[2].mT, 4).mT).permute(2, 0, 1, 3).reshape(4, 3, 8)
    expected = F.linear(q(y, 5), model.out_proj.weight)
    given, weights = model(x, x, x)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(weights.shape, torch.Size([3, 4, 4]))


def test_transformer_encoders_take_no_fast_path():
    """In evaluation without gradients PyTorch would go around the layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2).eval()
    model = swalp.convert(copy.deepcopy(plain), recipe())
    x, padded = torch.randn(3, 5, 8), torch.tensor([[False] * 4 + [True]] * 3)
    for mask in (None, padded):
        with torch.no_grad():
            short = model(x, src_key_padding_mask=mask)
        assert torch.equal(short[:, :4], model(x, src_key_padding_mask=mask)[:, :4])
        assert not torch.allclose(short[:, :4], plain(x)[:, :4], atol=1e-2)


def test_a_mask_and_is_causal_exclude_each_other():
    model = swalp.convert(Attention(is_causal=True, attn_mask=torch.ones(5, 6)), recipe())
    with pytest.raises(RuntimeError, match="give attn_mask or is_causal, not both"):
        model(*operands())
