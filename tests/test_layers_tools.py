"""PyTorch's tools on converted networks: compile, export, checkpointing, autocast, accumulation."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import swalp
from rounded import lossless

pytestmark = [  # Dynamo's own, about what it does
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects"),
]

PAPER = swalp.recipes.get("paper-small-block-8")


@pytest.fixture(autouse=True)
def dynamo():
    """Without what it compiled, and gave up, in other tests."""
    torch._dynamo.reset()


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


def test_eager_passes_between_compiled_ones_count_and_compile_nothing_anew():
    torch.manual_seed(0)
    eager = swalp.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), PAPER, seed=4)
    model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(12):
        x = torch.randn(4, 8)
        for _ in range((step + 2) % 4):
            assert torch.equal(model(x), eager(x))
        assert torch.equal(compiled(x), eager(x))
        clocks = swalp.noise_clock(model), swalp.noise_clock(eager)
        assert clocks[0].state_dict() == clocks[1].state_dict()
        assert int(clocks[0].counter) == int(clocks[1].counter) == clocks[0].step
    assert counter.frame_count == 2  # the first graph found passes that no tensor had counted


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


def at_start(model):
    """`model`, as before its first pass."""
    swalp.noise_clock(model).load_state_dict({"seed": 1, "step": 0})
    return model


@pytest.fixture(params=["paper-small-block-8", "native-8"])
def quantized(request):
    def convert(name, training):
        return swalp.convert(NETWORKS[name](), request.param, seed=1).train(training)

    return convert


TRANSFORMED = [("mlp", True), ("mlp", False), ("attention", True), ("encoder", True)]


@pytest.mark.parametrize(("name", "training"), TRANSFORMED)
def test_transforms_of_functions_are_eager_mode_bit_for_bit(quantized, name, training):
    """Slices of `vmap` are passes of their own with the same noise."""
    model = quantized(name, training)

    def loss(x):
        return at_start(model)(x).square().sum()

    xs = X.repeat(3, 1, 1).unflatten(0, (3, 2)) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    outputs, gradients = [], []
    for x in xs:
        given = x.clone().requires_grad_()
        y = at_start(model)(given)
        outputs.append(y.detach())
        gradients += torch.autograd.grad(y.square().sum(), given)
    assert torch.equal(torch.func.vmap(at_start(model))(xs), torch.stack(outputs))
    assert torch.equal(torch.func.grad(loss)(xs[1]), gradients[1])
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(xs), torch.stack(gradients))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own use
@pytest.mark.parametrize("training", [True, False])
def test_tangents_pass_straight_through(training):
    recipe = replace(PAPER, quantize_input=True)
    model = swalp.convert(mlp()[:1], recipe, seed=1).train(training)
    x = X[0]
    direction = torch.randn_like(x)
    y, tangent = torch.func.jvp(at_start(model), (x,), (direction,))
    assert torch.equal(y, at_start(model)(x))
    torch.testing.assert_close(tangent, direction @ model[0].weight.mT)
    forward = torch.func.jacfwd(at_start(model))(x)
    torch.testing.assert_close(forward.sum((1, 2)), model[0].weight.sum(0).expand(5, 8))
    hessian = torch.func.hessian(lambda x: at_start(model)(x).square().sum())(x[0])
    torch.testing.assert_close(hessian, 2 * model[0].weight.mT @ model[0].weight)


def test_gradients_of_each_sample_for_parameters_leave_the_noise_in_order():
    model = swalp.convert(mlp(), "native-8", seed=1)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    parameters = dict(model.named_parameters())
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
    assert swalp.noise_clock(model).step == 1
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # which no wrapper of PyTorch's can be
    assert swalp.noise_clock(twin).step == 1
    for i, x in enumerate(X):
        for name, gradient in torch.func.grad(loss)(parameters, x).items():
            assert gradient.shape == found[name][i].shape
    at_start(model)(X[0]).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, found[name][0])


@pytest.mark.parametrize("training", [True, False])
def test_several_gradients_at_once_are_a_loop(training):
    model = swalp.convert(Attends(), PAPER, seed=1).train(training)
    x = X.clone().requires_grad_()
    y = model(x)
    gradients = torch.randn(3, *y.shape)
    (found,) = torch.autograd.grad(y, x, gradients, retain_graph=True, is_grads_batched=True)
    for one, gradient in zip(found, gradients, strict=True):
        assert torch.equal(one, torch.autograd.grad(y, x, gradient, retain_graph=True)[0])


def test_vectorized_jacobians():
    model = swalp.convert(mlp(), PAPER, seed=1).eval()
    jacobian = torch.autograd.functional.jacobian
    assert torch.equal(jacobian(model, X, vectorize=True), jacobian(model, X))


@pytest.mark.parametrize("kind", [swalp.optim.SGD, swalp.optim.Adam])
@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_step_of_training_is_the_same(kind, packed):
    found = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        model = swalp.convert(
            nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 3)), PAPER, packed=packed
        )
        optimizer = kind(model.named_parameters(), lr=0.1, recipe=PAPER)

        def step(x, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        run = step if backend is None else torch.compile(step, backend=backend)
        for _ in range(3):
            run(torch.ones(4, 7))
        found.append([p.detach().to(torch.float64) for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Broken(nn.Module):
    """Two graphs, of which each runs while the forward's products are being intercepted."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.second(self.first(x).relu())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_graphs_that_run_inside_a_forward_round_no_operand_twice(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = swalp.convert(Broken(), "paper-big-block-4")
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(8, 16)
    for _ in range(2):
        given, expected = compiled(x), eager(x)
        assert torch.equal(given, expected)
    given.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


class _Shapes(nn.Module):
    """An encoder layer, a convolution, a norm and a product of its own."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.convolution, self.norm = nn.Conv1d(32, 32, 3, padding=1), nn.BatchNorm1d(32)

    def forward(self, x):
        y = self.norm(self.convolution(self.encoder(x).mT))
        return y @ y.mT


@pytest.mark.parametrize("recipe", ["native-8", "paper-small-block-8", "mxfp8"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("real", [False, True])
def test_shapes_alone(recipe, packed, real):
    """As who estimates memory asks for: results have none, and nothing is left behind."""
    model = swalp.convert(_Shapes(), recipe, packed=packed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 9, 32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(x if real else mode.from_tensor(x))
        assert isinstance(y, FakeTensor)
        assert y.shape == (2, 32, 32)
        assert isinstance(swalp.quantize(x, swalp.BlockFloat(8), swalp.Nearest()), FakeTensor)
        assert isinstance(swalp.pack(x, swalp.BlockFloat(8)).codes, FakeTensor)
        y.sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    model.load_state_dict(before)
    optimizer = swalp.optim.SGD(
        model.named_parameters(), lr=0.1, momentum=0.9, recipe=swalp.recipes.get(recipe)
    )
    y = model(x)
    y.square().mean().backward()
    optimizer.step()
    assert type(y) is torch.Tensor
    assert all(bool(parameter.dequantize().isfinite().all()) for parameter in model.parameters())
