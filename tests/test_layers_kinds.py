"""Every kind of layer: what converts, with which sites, and what is refused."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import swalp
from rounded import lossless, recipe, rounded
from swalp.layers import Quantized
from swalp.recipes import Override

PAPER = swalp.recipes.get("paper-small-block-8")
LAYERS = {
    "Linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "Conv1d": (lambda: nn.Conv1d(4, 3, 3, padding=1), (2, 4, 6)),
    "Conv2d": (lambda: nn.Conv2d(4, 2, 3, groups=2, padding_mode="circular", padding=1),
               (2, 4, 6, 6)),
    "Conv3d": (lambda: nn.Conv3d(4, 3, 2), (2, 4, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2), (2, 4, 6)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), (2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 3, 2), (2, 4, 3, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_products_of_one_input(name):
    """Forward and backward against the parent's, between Q_A and Q_E."""
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = build()
    model = swalp.convert(copy.deepcopy(plain), recipe(), seed=2)
    assert type(model).__name__ == name
    assert isinstance(model, type(plain))
    x = torch.randn(shape, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    given, expected = model(x), plain(rounded(twin, "", seed=2, step=1))
    assert torch.equal(given, expected)
    given.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, twin.grad)
    assert torch.equal(model.weight.grad, plain.weight.grad)


def test_transposed_convolution_takes_its_output_size():
    torch.manual_seed(0)
    plain = nn.ConvTranspose2d(4, 3, 3, stride=2)
    model = swalp.convert(copy.deepcopy(plain), lossless())
    x = torch.randn(1, 4, 5, 5)
    expected = plain(x, output_size=(12, 12))
    torch.testing.assert_close(model(x, output_size=(12, 12)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("on", [False, True])
def test_bilinear_quantizes_both_inputs(on):
    torch.manual_seed(0)
    plain = nn.Bilinear(4, 5, 3)
    model = swalp.convert(copy.deepcopy(plain), recipe(quantize_input=on), seed=2)
    x, y = torch.randn(6, 4), torch.randn(6, 5)
    expected = plain(x, y)
    if on:
        expected = plain(rounded(x, "", seed=2, step=1), rounded(y, "", seed=2, step=1, call=1))
    assert torch.equal(model(x, y), expected)


def embedding(kind=nn.Embedding, **options):
    torch.manual_seed(0)
    return nn.Sequential(kind(7, 4, **options), nn.Linear(4, 4), nn.Linear(4, 3))


def test_an_embedding_has_weights_on_the_grid_and_no_site():
    model = swalp.convert(embedding(padding_idx=0), PAPER)
    start = embedding(padding_idx=0)[0].weight.detach()
    assert torch.equal(model[0].weight, swalp.quantize(start, PAPER.weight.format))
    assert model[0]._swalp_layer.input_site is None
    assert model[0]._swalp_layer.output_site is None
    rows = torch.tensor([3, 0, 3])
    assert torch.equal(model[0](rows), model[0].weight[rows])
    model(rows).sum().backward()
    assert model[0].weight.grad[0].abs().sum() == 0
    # The embedding takes the network's input, so the first layer after it is quantized.
    assert model[1]._swalp_layer.input_site is not None


def test_outputs_of_embeddings_are_quantized_by_output():
    model = swalp.convert(embedding(), recipe(placement="output"), seed=2)
    rows = torch.tensor([3, 1])
    assert torch.equal(model[0](rows), rounded(model[0].weight[rows], "0", seed=2, step=0))


def test_an_embedding_cannot_quantize_its_input():
    chosen = recipe(overrides=[Override(kind="Embedding", placement="input")])
    with pytest.raises(ValueError, match=r"placement='input' for '0', which takes indices; use "):
        swalp.convert(embedding(), chosen)


def test_bags_of_embeddings():
    model = swalp.convert(embedding(nn.EmbeddingBag, mode="sum"), PAPER)
    bags = torch.tensor([[1, 2], [2, 6]])
    torch.testing.assert_close(model[0](bags), model[0].weight[bags].sum(1))


NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "LayerNorm": lambda: nn.LayerNorm(6),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_compute_in_float_unless_a_recipe_says_otherwise(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), NORMS[name]())
    plain = copy.deepcopy(model[1])
    with torch.no_grad():
        model[1].weight.uniform_()
        plain.weight.copy_(model[1].weight)
    x = torch.randn(2, 4, 6, 6)
    loose = swalp.convert(copy.deepcopy(model), recipe())
    assert type(loose[1]) is type(plain)
    assert torch.equal(loose[1](x), plain(x))
    on = swalp.recipes.get("paper-big-block-4").weight
    on_grid = swalp.convert(copy.deepcopy(model), recipe(weight=on))
    assert torch.equal(on_grid[1].weight, swalp.quantize(plain.weight.detach(), on.format))
    for placement, expected in (
        ("input", lambda: plain(rounded(x, "1", seed=0, step=0))),
        ("output", lambda: rounded(plain(x), "1", seed=0, step=0)),
    ):
        override = Override(kind=name, placement=placement)
        tight = swalp.convert(copy.deepcopy(model), recipe(overrides=[override]))
        assert torch.equal(tight[1](x), expected())
        assert type(swalp.to_float(tight)[1]) is type(plain)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)
        self.total = nn.Identity()

    def forward(self, x):
        x = self.first(x)
        return self.total(x + self.inner(x))


def test_a_residual_sum_is_rounded_where_an_identity_stands():
    torch.manual_seed(0)
    at = Override(layers="total", placement="output")
    x, weights = torch.randn(3, 4), Residual().state_dict()
    models = []
    for overrides in ([], [at]):
        model = Residual()
        model.load_state_dict(weights)
        models.append(swalp.convert(model, recipe(overrides=overrides)))
    loose, tight = (model(x) for model in models)
    assert torch.equal(tight, rounded(loose, "total", seed=0, step=1))
    assert not torch.equal(tight, loose)


class Residuals(nn.Module):
    def __init__(self):
        super().__init__()
        self.block1, self.block2 = Residual(), Residual()

    def forward(self, x):
        return self.block2(self.block1(x))


def test_a_pattern_of_names_gives_no_site_but_with_a_kind_it_does():
    at = Override(layers="block*.total", kind="Identity", placement="output")
    model = swalp.convert(Residuals(), recipe(overrides=[at]))
    inner = model.block1.inner, model.block2.inner
    assert model.block1.total._swalp_layer.output_site is not None
    assert model.block2.total._swalp_layer.output_site is not None
    assert all(layer._swalp_layer.output_site is None for layer in inner)
    with pytest.raises(ValueError, match=r"gives none of 2 layers a place .*'block1\.total'.*kind"):
        swalp.convert(
            Residuals(), recipe(overrides=[Override(layers="block*.total", placement="output")])
        )
    # Nor where it says what the recipe says: a layer without products needs its kind named.
    with pytest.raises(ValueError, match=r"gives none of 2 layers a place"):
        swalp.convert(
            Residuals(),
            recipe(overrides=[Override(layers="block*.total", placement=recipe().placement)]),
        )
    broad = recipe(overrides=[Override(layers="block*", placement="output")])
    model = swalp.convert(Residuals(), broad)
    assert model.block1.inner._swalp_layer.output_site is not None


def test_a_named_container_is_no_site():
    with pytest.raises(ValueError, match=r"matches no layer, but what holds some"):
        swalp.convert(
            nn.Sequential(nn.Sequential(nn.Linear(4, 4))),
            recipe(overrides=[Override(layers="0", placement="output")]),
        )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, rows):
        return self.head(self.table(rows))


@pytest.mark.parametrize("packed", [False, True])
def test_tied_weights_stay_tied(packed):
    torch.manual_seed(0)
    model = swalp.convert(Tied(), PAPER, packed=packed)
    assert model.head.weight is model.table.weight
    optimizer = swalp.optim.SGD(model, lr=0.1, recipe=PAPER)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1
    before = model.table.weight.detach().clone()
    model(torch.tensor([1, 2])).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.head.weight.detach() + 0, before + 0)
    assert copy.deepcopy(model).head.weight is not model.head.weight
    for other in (copy.deepcopy(model), swalp.to_float(model)):
        assert other.head.weight is other.table.weight


class Named(nn.Linear):
    """A subclass that computes what its parent does."""


class Doubled(nn.Linear):
    """A subclass that computes something of its own."""

    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


def test_subclasses():
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    model = swalp.convert(Named(4, 3), recipe(), seed=2)
    expected = F.linear(rounded(x, "", seed=2, step=1), model.weight, model.bias)
    assert type(model).__name__ == "Named"
    assert torch.equal(model(x), expected)
    assert type(swalp.to_float(model)) is Named
    model = swalp.convert(Doubled(4, 3), recipe(), seed=2)
    weight = rounded(2 * model.weight, "", seed=2, step=1, call=1)
    assert torch.equal(model(x), F.linear(rounded(x, "", seed=2, step=1), weight, model.bias))


def test_converted_classes_pickle_and_copy():
    torch.manual_seed(0)
    model = swalp.convert(
        nn.Sequential(Named(4, 4), nn.TransformerEncoderLayer(4, 1, 4, batch_first=True)), PAPER
    )
    model.eval()
    x = torch.randn(2, 3, 4)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(x), model(x))
        assert type(other[0]) is type(model[0])
        assert other[1]._swalp_layer.input_site.clock is swalp.noise_clock(other)
        assert swalp.noise_clock(other) is not swalp.noise_clock(model)
    plain = swalp.to_float(model)
    assert not any(isinstance(module, Quantized) for module in plain.modules())
    for module in plain.modules():
        assert not {"input_site", "output_site", "outer", "functions"} & set(vars(module))


def forward_replaced():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


REFUSED = {
    r"Embedding 'e' has sparse gradients.*sparse=False": lambda: nn.Embedding(3, 2, sparse=True),
    r"EmbeddingBag 'e' has sparse": lambda: nn.EmbeddingBag(3, 2, sparse=True),
    r"Embedding 'e' rescales.*without max_norm": lambda: nn.Embedding(3, 2, max_norm=1.0),
    r"LazyLinear 'e' has no parameters yet; run one batch": lambda: nn.LazyLinear(3),
    r"Linear 'e' has its forward replaced.*convert first": forward_replaced,
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_cannot_be_converted_is_named_and_nothing_changes(message):
    model = nn.Sequential()
    model.add_module("d", nn.Linear(2, 2))
    model.add_module("e", REFUSED[message]())
    with pytest.raises(ValueError, match=message):
        swalp.convert(model, PAPER)
    assert type(model.d) is nn.Linear
    swalp.convert(nn.Sequential(model.d), PAPER)


def test_a_traced_graph_is_refused():
    with pytest.raises(ValueError, match="a traced graph; convert the module that it was traced"):
        swalp.convert(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4))), PAPER)


@pytest.mark.parametrize("name", ["native-8", "paper-small-block-8"])
def test_layers_take_their_tensor_by_name(name):
    model = swalp.convert(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.GELU()), name
    ).eval()
    x = torch.randn(3, 4)
    for layer in model:
        assert torch.equal(layer(input=x), layer(x))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        model[0]()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_a_hook_computes_is_an_operand(norm):
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(4, 3))).eval()
    x = torch.randn(5, 4)
    low = swalp.convert(model, recipe())
    y = low(x)
    weight = low[0].weight.detach()
    fmt = recipe().activation.format
    expected = F.linear(swalp.quantize(x, fmt), swalp.quantize(weight, fmt), low[0].bias)
    assert torch.equal(y, expected)
    assert not torch.equal(swalp.quantize(weight, fmt), weight)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="TorchScript; convert the Python module"):
        swalp.convert(model, PAPER)


def test_attention_out_of_reach_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model.config = type("Config", (), {"_attn_implementation": "flash_attention_2"})()
    with pytest.raises(ValueError, match=r"'flash_attention_2', .* attn_implementation='sdpa'"):
        swalp.convert(model, PAPER)


def test_a_part_that_is_converted_already_is_refused():
    part = swalp.convert(nn.Linear(2, 2), PAPER)
    with pytest.raises(ValueError, match="or a part of it, is converted already"):
        swalp.convert(nn.Sequential(nn.Linear(2, 2), part), PAPER)


def test_a_parameter_that_cannot_be_rounded_is_named_and_nothing_changes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"parameter '1\.weight' cannot be rounded: .*bfloat16"):
        swalp.convert(model, "paper-small-block-12")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model[0]) is nn.Linear


def test_a_state_of_another_shape_is_pytorchs_error():
    model = swalp.convert(nn.Sequential(nn.Linear(2, 3)), PAPER)
    other = nn.Sequential(nn.Linear(2, 4)).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        model.load_state_dict(other)
    packed = swalp.convert(nn.Sequential(nn.Linear(2, 3)), PAPER, packed=True)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        packed.load_state_dict(other)


def test_whole_numbers_stay():
    model = nn.Sequential(nn.Linear(2, 2))
    model.count = nn.Parameter(torch.arange(3), requires_grad=False)
    swalp.convert(model, PAPER)
    assert torch.equal(model.count, torch.arange(3))
