"""Networks of Hugging Face's `transformers`, from a configuration, unmodified."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch

import swalp
from rounded import lossless, recipe, rounded
from swalp.layers import Quantized

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
PAPER = swalp.recipes.get("paper-small-block-8")
IDS = torch.randint(65, (2, 9), generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def gpt2(attention="sdpa"):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=65, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None,
        attn_implementation=attention, loss_type="ForCausalLMLoss",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert(attention="sdpa"):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=65, intermediate_size=32, max_position_embeddings=16, hidden_dropout_prob=0,
        attention_probs_dropout_prob=0, attn_implementation=attention, **SMALL,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def vit(attention="sdpa"):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        intermediate_size=32, image_size=8, patch_size=4, hidden_dropout_prob=0, num_labels=3,
        attention_probs_dropout_prob=0, attn_implementation=attention, **SMALL,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def llama(attention="sdpa"):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=65, intermediate_size=32, max_position_embeddings=16, num_key_value_heads=1,
        use_cache=False, attn_implementation=attention, **SMALL,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


PADDED = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
NETWORKS = {
    "gpt2": (gpt2, {"input_ids": IDS, "labels": IDS}),
    "bert": (bert, {"input_ids": IDS, "labels": IDS, "attention_mask": PADDED}),
    "vit": (
        vit,
        {
            "pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
            "labels": torch.tensor([0, 1, 2, 1]),
        },
    ),
    "llama": (llama, {"input_ids": IDS, "labels": IDS}),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NETWORKS)
def test_with_lossless_operands_a_network_is_as_it_was(name, attention):
    """Outputs and gradients; rotary positions above all, which are products too, stay exact."""
    build, inputs = NETWORKS[name]
    plain, model = build(attention), swalp.convert(build(attention), lossless())
    expected, given = plain(**inputs), model(**inputs)
    torch.testing.assert_close(given.logits, expected.logits, rtol=0, atol=1e-6)
    expected.loss.backward()
    given.loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_both_products_of_every_attention_are_quantized(name):
    build, inputs = NETWORKS[name]
    for attention, called in (("sdpa", "scaled_dot_product_attention"), ("eager", "matmul x 2")):
        model = swalp.convert(build(attention), PAPER)
        model(**inputs)
        notes = [row.note for row in swalp.summary(model).layers]
        assert notes.count(f"operands of {called}") == 2
        assert not any("in float by the recipe" in note for note in notes)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train_in_8_bits(name, packed):
    build, inputs = NETWORKS[name]
    model = swalp.convert(build(), PAPER, packed=packed)
    optimizer = swalp.optim.SGD(model, lr=0.05, momentum=0.9, recipe=PAPER)
    average = swalp.WeightAverage(model, start=20, every=2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert average.module.eval()(**inputs).loss < 0.3 * losses[0]
    # A bit more, as -128 in two's complement is 128 there.
    finer = dataclasses.replace(PAPER.weight.format, word_length=9)
    for parameter in model.parameters():
        grid = swalp.recipes.fit(finer, parameter.shape)
        values = parameter.detach() + 0
        assert torch.equal(values, swalp.quantize(values, grid))


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=65, intermediate_size=32, max_position_embeddings=16, num_key_value_heads=2,
        num_local_experts=2, use_cache=False, **SMALL,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


@pytest.mark.skipif(not hasattr(transformers, "MixtralConfig"), reason="an older transformers")
def test_the_products_of_experts_are_quantized():
    """They are one function for all experts, or one operator where PyTorch has no such function."""
    plain, model = mixtral(), swalp.convert(mixtral(), lossless())
    expected, given = plain(IDS).logits, model(IDS).logits
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)
    report = swalp.summary(model)
    experts = [row for row in report.layers if row.kind == "MixtralExperts"]
    assert experts
    assert all(row.note.startswith("operands of ") for row in experts)


def test_the_operator_for_experts_is_quantized():
    operator = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if operator is None:
        pytest.skip("this version of transformers has no such operator")

    class Experts(torch.nn.Module):
        def forward(self, x, weight, ends):
            return operator(x, weight, ends)

    model = swalp.convert(Experts(), recipe())
    x, weight = torch.randn(4, 3), torch.randn(2, 3, 5)
    ends = torch.tensor([2, 4], dtype=torch.int32)
    inputs = rounded(x, "", seed=0, step=1), rounded(weight.mT, "", seed=0, step=1, call=1).mT
    assert torch.equal(model(x, weight, ends), operator(*inputs, ends))


def test_conversion_and_back():
    model = swalp.convert(gpt2(), PAPER).eval()
    names = [type(module).__name__ for module in gpt2().modules()]
    assert [type(module).__name__ for module in model.modules()] == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, model(IDS).logits)
    # What `transformers.Trainer` and `generate` choose arguments by.
    assert inspect.signature(model.forward) == inspect.signature(gpt2().forward)
    plain = swalp.to_float(model)
    assert not any(isinstance(module, Quantized) for module in plain.modules())
    assert [type(m) for m in plain.modules()] == [type(m) for m in gpt2().modules()]
    reference = gpt2().eval()
    reference.load_state_dict(model.state_dict())
    assert torch.equal(plain(IDS).logits, reference(IDS).logits)


def test_the_config_and_other_networks_of_it_stay():
    config = gpt2().config
    first, second = (transformers.GPT2LMHeadModel(config).eval() for _ in range(2))
    before = second(IDS).logits
    swalp.convert(first, PAPER)
    first(IDS)
    assert config._attn_implementation == "sdpa"
    assert torch.equal(second(IDS).logits, before)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_of_transformers():
    gradients = []
    for on in (False, True):
        model = swalp.convert(gpt2(), PAPER).train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, repeated in zip(*gradients, strict=True):
        assert torch.equal(kept, repeated)


def test_generation():
    model = swalp.convert(gpt2(), PAPER).eval()
    out = model.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        expected = model(out[:, :-1]).logits[0, 3:].argmax(-1)
    assert torch.equal(out[0, 4:], expected)


def test_attention_of_its_kernels_is_refused():
    model = gpt2()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="by 'flex_attention', whose products cannot be reached"):
        swalp.convert(model, PAPER)
