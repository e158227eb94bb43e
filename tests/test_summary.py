import pytest
import torch
from torch import nn

import swalp
from rounded import recipe
from swalp import BlockFloat
from swalp.packed import PackedTensor

PAPER = swalp.recipes.get("paper-small-block-5")
SIGNAL = BlockFloat(5, axes=(0, 1), symmetric=False)
WEIGHT = BlockFloat(5, axes=(0,), symmetric=False)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8),
        nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def rows(model):
    return {row.name: row for row in swalp.summary(model).layers}


def test_every_module_has_a_row_with_every_role():
    model = swalp.convert(network(), PAPER)
    found = rows(model)
    assert list(found) == ["", "0", "1", "2", "3", "4", "5", "6"]
    linear = found["4"]
    assert (linear.kind, linear.parameters, linear.bytes) == ("Linear", 520, 2080)
    assert linear.formats["activation"] == (SIGNAL,)
    assert linear.formats["error"] == (SIGNAL,)
    assert {linear.format(role) for role in ("weight", "gradient", "momentum")} == {WEIGHT}
    assert linear.note == "at its input"
    assert found["0"].formats["activation"] == (None,)
    assert found["0"].note == "takes the network's input as it is"
    assert found["1"].format("weight") == WEIGHT
    assert found["1"].note == "float statistics and scaling, no product"
    assert found["2"].note == "no product"
    assert found["2"].formats["weight"] == ()


def test_the_table():
    lines = str(swalp.summary(swalp.convert(network(), PAPER))).splitlines()
    assert lines[0] == "recipe paper-small-block-5"
    assert lines[1].split()[:6] == ["layer", "kind", "weight", "activation", "error", "gradient"]
    assert set(lines[2]) == {"-"}
    assert lines[3].split() == ["(model)", "Sequential"]
    assert lines[4].startswith("  0      Conv2d       bfp5t[0]  float       float       bfp5t[0]")
    assert lines[8].split()[:4] == ["4", "Linear", "bfp5t[0]", "bfp5t[0,1]"]
    assert lines[-1].startswith("631 parameters: 2,524 bytes in float32, ")
    assert len(lines) == 3 + 8 + 1
    assert lines[1].index("bytes") + 5 == lines[4].index("304") + 3


@pytest.mark.parametrize("packed", [False, True])
def test_bytes_are_those_held(packed):
    model = swalp.convert(network(), PAPER, packed=packed)
    report = swalp.summary(model)
    held = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert report.bytes == held
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.float_bytes == 4 * report.parameters
    everything = swalp.convert(network(), PAPER, packed=True).parameters()
    assert report.packed_bytes == sum(p.nbytes for p in everything)
    assert all(isinstance(p, PackedTensor) for p in model.parameters()) == packed


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    report = swalp.summary(swalp.convert(model, PAPER))
    assert report.parameters == 28
    assert report.layers[2].bytes == 0
    assert report.layers[2].note == "shares weight of 0; at its input"


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x = self.layer(x)
        return nn.functional.scaled_dot_product_attention(x, x, x) @ x.mT @ x


def test_products_called_as_functions_are_listed_once_they_ran():
    model = swalp.convert(nn.Sequential(Attends()), recipe())
    report = swalp.summary(model)
    assert not report.complete
    assert "is listed once the model has run" in str(report)
    model(torch.randn(2, 3, 4))
    report = swalp.summary(model)
    assert report.complete
    assert rows(model)["0"].note == "operands of scaled_dot_product_attention, matmul x 2"
    assert rows(model)["0"].format("activation") == BlockFloat(5)
    assert "once the model" not in str(report)


def test_products_left_in_float_are_listed_too():
    off = swalp.recipes.Override(kind="Attends", activation=None, error=None)
    model = swalp.convert(nn.Sequential(Attends()), recipe(overrides=[off]))
    model(torch.randn(2, 3, 4))
    note = "scaled_dot_product_attention, matmul x 2 in float by the recipe"
    assert rows(model)["0"].note == note
    assert rows(model)["0"].formats["activation"] == (None,)


def test_places():
    model = swalp.convert(
        nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)),
        recipe(placement="operands"),
    )
    found = rows(model)
    assert found["0"].note == "activation at its input; error at its output"
    assert found["1"].note == "activation at its input and hidden states; error at its output"
    assert found["2"].note.startswith("activation at its inputs, queries, keys, values and")
    assert found["2.out_proj"].note == "quantized by the attention around it"


def test_overrides_show():
    wide = swalp.recipes.Quantizer(BlockFloat(9), swalp.Nearest())
    bias = swalp.recipes.Override(layers="0", parameter="bias", weight=wide)
    model = swalp.convert(network(), recipe(weight=None, overrides=[bias]))
    assert rows(model)["0"].formats["weight"] == (None, BlockFloat(9))
    assert "float, bfp9" in str(swalp.summary(model))


def test_a_model_that_is_not_converted():
    with pytest.raises(ValueError, match="not a converted model"):
        swalp.summary(network())
