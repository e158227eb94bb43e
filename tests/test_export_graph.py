import math
import sys

import pytest
import torch
from torch import nn

import swalp
from swalp.export import MissingPackageError, graph

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Network(nn.Module):
    """Convolution, batch norm, a residual sum, and linear layers on more than two dimensions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.mix = nn.Linear(8, 8, bias=False)
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = x + torch.tanh(self.second(x))
        x = self.mix(x.flatten(2).transpose(1, 2))
        return self.last(x.mean(1))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = Network()
    for _ in range(5):
        model(torch.randn(32, 1, 6, 6))
    return model.eval()


X = torch.randn(50, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def run(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def rounded(model, fmt):
    recipe = swalp.recipes.Recipe(name="r", weight=swalp.recipes.Quantizer(fmt, swalp.Nearest()))
    return swalp.convert(swalp.to_float(model), recipe).eval()


@pytest.mark.parametrize("text", ["bfp8[0]", "bfp8", "bfp4[0]", "fixed8.5", "bfp16[0]"])
def test_onnxruntime_computes_what_pytorch_does(network, text, tmp_path):
    fmt, path = swalp.parse_format(text), tmp_path / "model.onnx"
    swalp.save_onnx(network, path, fmt, X[:2])
    with torch.no_grad():
        torch.testing.assert_close(run(path, X), rounded(network, fmt)(X), rtol=1e-4, atol=1e-5)
    model = onnx.load(path)
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    kinds = {"int16"} if fmt.bits > 8 else {"int8"}
    assert {str(stored[f"{n}.codes"].dtype) for n, _ in network.named_parameters()} == kinds
    floats = [each for name, each in stored.items() if str(each.dtype) == "float32"]
    assert max(each.size for each in floats) <= 8  # scales and batch-norm statistics
    exact = rounded(network, fmt)
    for name, parameter in exact.named_parameters():
        shape = [-1] + [1] * (parameter.dim() - 1) if stored[f"{name}.scale"].ndim else []
        scale = torch.tensor(stored[f"{name}.scale"]).reshape(shape)
        assert torch.equal(torch.tensor(stored[f"{name}.codes"]).float() * scale, parameter)


def test_activations_are_quantized_before_every_product_but_the_first(network, tmp_path):
    fmt, path = swalp.BlockFloat(8, axes=(0,)), tmp_path / "model.onnx"
    swalp.save_onnx(network, path, fmt, X[:2], calibration=[X])
    nodes = onnx.load(path).graph.node
    made = [each for each in nodes if each.op_type == "QuantizeLinear"]
    assert [each.output[0] for each in made] == [
        f"{layer}.input.codes" for layer in ("second", "mix", "last")
    ]
    model = rounded(network, fmt)
    with torch.no_grad():
        exact = model(X)
        close = (run(path, X) - exact).abs().max()
    assert 1e-5 < close < 0.05 * exact.abs().max()
    # The finest power of two that holds what was seen, all of it above zero where nothing is below.
    ranges = graph._ranges(model, [X])
    stored = {
        each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer
    }
    for name in ("second", "mix", "last"):
        (low, high), zero = ranges[name], int(stored[f"{name}.input.zero_point"])
        step = float(stored[f"{name}.input.scale"])
        assert zero == (0 if low >= 0 else 128)
        assert math.frexp(step)[0] == 0.5
        assert -zero * step <= low
        assert high <= (255 - zero) * step
        assert low < -zero * step / 2 or high > (255 - zero) * step / 2
    assert ranges["second"][0] == 0
    assert ranges["mix"][0] < 0
    # The same quantizers, of PyTorch, at the same places.

    def hook(name):
        low, high = ranges[name]
        zero = 0 if low >= 0 else 128
        step = max(high / (255 - zero), -low / zero if zero else 0)
        step = 2.0 ** torch.tensor(step).log2().ceil().item()
        return lambda module, inputs: torch.fake_quantize_per_tensor_affine(
            inputs[0], step, zero, 0, 255
        )

    for name in ("second", "mix", "last"):
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        torch.testing.assert_close(run(path, X), model(X), rtol=0.02, atol=0.02)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Product(nn.Module):
    """Matrices that are no layer's, in both orders."""

    def __init__(self):
        super().__init__()
        self.left = nn.Parameter(torch.randn(6, 64) / 8)
        self.right = nn.Parameter(torch.randn(64, 64) / 8)
        self.bias = nn.Parameter(torch.randn(64))

    def forward(self, x):
        return torch.addmm(
            self.bias, (self.left @ x.transpose(1, 2)).flatten(1)[:, :64], self.right
        )


def matrices(kind):
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return {"linear": linear, "attention": Attention(), "product": Product()}[kind].eval()


SEQUENCES = torch.randn(5, 16, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("text", ["bfp8[0]", "bfp8[1]", "bfp8", "bfp4[0]"])
@pytest.mark.parametrize("kind", ["linear", "attention", "product"])
def test_onnxruntime_leaves_activations_float(kind, text, tmp_path):
    fmt, path, model = swalp.parse_format(text), tmp_path / "model.onnx", matrices(kind)
    swalp.save_onnx(model, path, fmt, SEQUENCES[:2])
    with torch.no_grad():
        expected = rounded(model, fmt)(SEQUENCES)
    torch.testing.assert_close(run(path, SEQUENCES), expected, rtol=1e-5, atol=2e-6)


def test_onnxruntime_sums_products_of_calibrated_activations_exactly(tmp_path):
    model, path = matrices("linear"), tmp_path / "model.onnx"
    swalp.save_onnx(model, path, swalp.BlockFloat(8), SEQUENCES[:2], calibration=[SEQUENCES])
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    expected = torch.from_numpy(session.run(None, {"input": SEQUENCES.numpy()})[0])
    torch.testing.assert_close(run(path, SEQUENCES), expected, rtol=1e-5, atol=2e-6)


def test_a_layer_used_twice_is_quantized_before_each_use(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(torch.relu(self.b(torch.relu(self.a(x)))))

    torch.manual_seed(0)
    model, path, x = Twice().eval(), tmp_path / "model.onnx", torch.randn(20, 8)
    fmt = swalp.BlockFloat(8, axes=(0,))
    swalp.save_onnx(model, path, fmt, x[:2], calibration=[x])
    saved = onnx.load(path).graph
    made = [each.output[0] for each in saved.node if each.op_type == "QuantizeLinear"]
    assert made == ["b.input.codes", "b.input.2.codes"]
    step = next(each for each in saved.initializer if each.name == "b.input.scale")
    step = float(onnx.numpy_helper.to_array(step))
    exact = rounded(model, fmt)
    exact.b.register_forward_pre_hook(
        lambda module, inputs: torch.fake_quantize_per_tensor_affine(inputs[0], step, 0, 0, 255)
    )
    with torch.no_grad():
        torch.testing.assert_close(run(path, x), exact(x), rtol=1e-4, atol=step / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_graph_is_float32_whatever_the_network(network, dtype, tmp_path):
    fmt, path, x = swalp.BlockFloat(8, axes=(0,)), tmp_path / "model.onnx", X.to(dtype)
    model = swalp.to_float(network).to(dtype)
    swalp.save_onnx(model, path, fmt, x[:2], calibration=[x])
    swalp.save_onnx(model, path, fmt, x[:2])
    assert model.last.weight.dtype == dtype
    with torch.no_grad():
        expected = rounded(model.float(), fmt)(x.float())
    torch.testing.assert_close(run(path, x.float()), expected, rtol=1e-4, atol=1e-5)


def test_extra_state_and_integers_stay_out_of_the_graph(tmp_path):
    class Table(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.order = nn.Parameter(torch.arange(8).flip(0), requires_grad=False)

        def forward(self, x):
            return super().forward(x[:, self.order])

        def get_extra_state(self):
            return "a text"

        def set_extra_state(self, state):
            assert state == "a text"

    torch.manual_seed(0)
    model, path, x = Table().eval(), tmp_path / "model.onnx", torch.randn(20, 8)
    swalp.save_onnx(model, path, swalp.BlockFloat(8), x[:2])
    exact = swalp.to_float(model)
    with torch.no_grad():
        for each in (exact.weight, exact.bias):
            swalp.quantize(each, swalp.BlockFloat(8), out=each)
        torch.testing.assert_close(run(path, x), exact(x), rtol=1e-4, atol=1e-5)


def test_any_batch_size(network, tmp_path):
    swalp.save_onnx(network, tmp_path / "model.onnx", swalp.BlockFloat(8), X[:2])
    assert run(tmp_path / "model.onnx", X[:1]).shape == (1, 5)
    assert run(tmp_path / "model.onnx", X).shape == (50, 5)


def test_mistakes(network, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    for fmt, message in (
        (swalp.parse_format("e4m3fn"), "e4m3fn has no integers to store"),
        (swalp.BlockFloat(8, axes=(0, 1)), "ONNX has scales for the tensor or along one axis"),
        (swalp.BlockFloat(8, tile=2), "ONNX has scales for"),
    ):
        with pytest.raises(ValueError, match=message):
            swalp.save_onnx(network, path, fmt, X[:2])
    with pytest.raises(ValueError, match="example has 1 rows; give 2 or more"):
        swalp.save_onnx(network, path, swalp.BlockFloat(8), X[:1])
    with pytest.raises(ValueError, match="the calibration has no batch"):
        swalp.save_onnx(network, path, swalp.BlockFloat(8), X[:2], calibration=[])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'swalp\[onnx\]'"):
        swalp.save_onnx(network, path, swalp.BlockFloat(8), X[:2])
    assert not path.exists()
