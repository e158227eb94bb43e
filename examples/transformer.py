"""A GPT-2 of Hugging Face's in 8 bits, unmodified, learns PyTorch's words on attention by heart."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import swalp

torch.manual_seed(0)
words = torch.nn.functional.multi_head_attention_forward.__doc__[:400]
alphabet = sorted(set(words))
text = torch.tensor([alphabet.index(character) for character in words])
windows = text.unfold(0, 32, 1)

config = GPT2Config(
    vocab_size=len(alphabet), n_positions=32, n_embd=64, n_layer=2, n_head=4, embd_pdrop=0.0,
    attn_pdrop=0.0, resid_pdrop=0.0, use_cache=False,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
model = swalp.convert(GPT2LMHeadModel(config), "paper-small-block-8", packed=True)
optimizer = swalp.optim.Adam(model, lr=3e-3, recipe="paper-small-block-8")
average = swalp.WeightAverage(model, start=150, every=2)
for _ in range(200):
    x = windows[torch.randint(len(windows), (16,))]
    optimizer.zero_grad()
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    average.update_parameters(model)
print(swalp.summary(model))
for name, network in (("8-bit Adam", model), ("SWALP", average.module)):
    with torch.no_grad():
        guesses = network.eval()(windows).logits[:, 15:-1].argmax(-1)
    wrong = guesses != windows[:, 16:]
    print(f"{name}: next characters wrong: {100 * wrong.float().mean():.2f} %")
