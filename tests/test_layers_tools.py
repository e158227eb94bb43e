"""PyTorch's tools on converted networks: compile, export, checkpointing, autocast, accumulation."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import swalp
from rounded import lossless

pytestmark = [  # Dynamo's own, about what it does
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects"),
]

PAPER = swalp.recipes.get("paper-small-block-8")


class Attends(nn.Module):
    """Layers, attention as a function, and a product of two activations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.first(x)
        x = x + nn.functional.scaled_dot_product_attention(x, x, self.norm(x), is_causal=True)
        return self.last((x @ x.mT) @ x)


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


NETWORKS = {"mlp": mlp, "attention": Attends, "encoder": encoder}
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_training_is_eager_training_bit_for_bit(name):
    """In one graph, compiled once for training although every step has noise of its own."""
    eager = swalp.convert(NETWORKS[name](), PAPER)
    model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(3):
        given, expected = compiled(X), eager(X)
        assert torch.equal(given, expected)
        given.square().sum().backward()
        expected.square().sum().backward()
        assert swalp.noise_clock(model).step == step + 1
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2  # the first pass has nothing counted yet
    graphs = counter.frame_count
    compiled(X)
    assert counter.frame_count == graphs


def test_compiled_evaluation():
    model = swalp.convert(Attends(), PAPER).eval()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X))


def test_recurrent_layers_leave_the_graph_and_are_computed_as_ever():
    """Dynamo compiles no recurrent layer, PyTorch's own either."""
    model = swalp.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.GRU(8, 4)), PAPER)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(X)[0], model(X)[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_export(name):
    model = swalp.convert(NETWORKS[name](), PAPER).eval()
    program = torch.export.export(model, (X,))
    assert any("swalp.quantize" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(X), model(X))


def test_export_of_training_is_refused():
    model = swalp.convert(mlp(), PAPER)
    with pytest.raises(RuntimeError, match=r"repeat the noise .*; export model\.eval\(\)"):
        torch.export.export(model, (X,))


class Blocks(nn.Module):
    def __init__(self, on):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.on = nn.Linear(8, 8), on
        self.blocks = nn.ModuleList([Attends(), encoder(), nn.GRU(4, 4)])
        self.blocks[0].last = nn.Linear(8, 8)
        self.blocks[2] = nn.GRU(8, 4)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.on else block(x)
        return x[0]


def test_activation_checkpointing_repeats_every_kind_of_noise():
    gradients = []
    for on in (False, True):
        model = swalp.convert(Blocks(on), PAPER)
        model(X).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, repeated in zip(*gradients, strict=True):
        assert torch.equal(kept, repeated)


def test_autocast_multiplies_the_same_numbers():
    """8-bit operands are bfloat16 numbers; only sums are rounded, as autocast has it."""
    model = swalp.convert(mlp(), PAPER)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = model(X)
    assert given.dtype == torch.bfloat16
    torch.testing.assert_close(given.float(), twin(X), rtol=0.05, atol=0.02)
    given.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_of_attention():
    model = swalp.convert(Attends(), PAPER).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = model(X)
    expected = model(X)
    assert (given.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("training", [True, False])
def test_autocast_that_would_round_operands_is_refused(training):
    model = swalp.convert(mlp(), "paper-small-block-12").train(training)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match=r"bfloat16 keeps 8 significant bits, .* operands of 11"),
    ):
        model(X)


def test_gradients_accumulate():
    """Two half batches, each with noise of its own, add up to the sum of their gradients."""
    model = swalp.convert(Attends(), PAPER, seed=1)
    parts = []
    for half in X.split(1):
        one = copy.deepcopy(model)
        if parts:
            swalp.noise_clock(one).load_state_dict({"seed": 1, "step": 1})
        one(half).sum().backward()
        parts.append([p.grad for p in one.parameters()])
    for half in X.split(1):
        model(half).sum().backward()
    for parameter, first, second in zip(model.parameters(), *parts, strict=True):
        assert torch.equal(parameter.grad, first + second)
    other = swalp.convert(Attends(), PAPER, seed=1)
    losses = [other(half).sum() for half in X.split(1)]  # both forward, then both backward
    sum(losses).backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_functional_calls_with_other_parameters():
    model = swalp.convert(mlp(), lossless(activation=None, error=None)).eval()
    zero = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert torch.func.functional_call(model, zero, (X,)).abs().sum() == 0
