import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

import swalp
from swalp.export import weights

FORMATS = ["bfp8", "bfp8[0]", "bfp8t[0]", "bfp4[0]", "bfp16", "fixed8.6", "e4m3fn", "mxfp8_e4m3"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    )


@pytest.mark.parametrize("text", FORMATS)
def test_the_plain_network_gets_the_rounded_weights(text, tmp_path):
    fmt, model = swalp.parse_format(text), network()
    model(torch.randn(8, 1, 6, 6))
    swalp.save_quantized(model, tmp_path / "model.safetensors", fmt)
    plain = network()
    plain.load_state_dict(swalp.load_quantized(tmp_path / "model.safetensors"))
    rounded = swalp.convert(
        model,
        swalp.recipes.Recipe(name="r", weight=swalp.recipes.Quantizer(fmt, swalp.Nearest())),
    )
    for name, value in plain.state_dict().items():
        assert torch.equal(value, rounded.state_dict()[name]), name
    packed = swalp.load_quantized(tmp_path / "model.safetensors", packed=True)
    assert isinstance(packed["0.weight"], swalp.PackedTensor)


def test_both_names_of_a_tied_weight_are_rounded(tmp_path):
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False))
    model[1].weight = model[0].weight
    fmt = swalp.parse_format("bfp4[0]")
    swalp.save_quantized(model, tmp_path / "model.safetensors", fmt)
    expected = swalp.quantize(model[0].weight.detach(), fmt)
    for value in swalp.load_quantized(tmp_path / "model.safetensors").values():
        assert torch.equal(value, expected)
    assert sorted(swalp.load_quantized(tmp_path / "model.safetensors")) == ["0.weight", "1.weight"]


def test_one_byte_a_weight(tmp_path):
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
    path = tmp_path / "model.safetensors"
    swalp.save_quantized(model, path, swalp.BlockFloat(8, axes=(0,)))
    assert path.stat().st_size < 1.01 * 2 * 512**2
    swalp.save_quantized(model, path, swalp.BlockFloat(4))
    assert path.stat().st_size < 0.51 * 2 * 512**2


def test_packed_weights_of_another_format_are_rounded_anew(tmp_path):
    model = swalp.convert(network(), swalp.recipes.get("paper-small-block-8"), packed=True)
    path = tmp_path / "model.safetensors"
    swalp.save_quantized(model, path, swalp.BlockFloat(4))
    floats = model[0].weight.detach().dequantize()
    expected = swalp.quantize(floats, swalp.BlockFloat(4))
    assert torch.equal(swalp.load_quantized(path)["0.weight"], expected)


def test_float64_weights_are_rounded_once(tmp_path):
    model, path = nn.Linear(2, 1, bias=False).double(), tmp_path / "model.safetensors"
    with torch.no_grad():
        model.weight[0, 0] = 1.0
        model.weight[0, 1] = (0.5 + 2.0**-40) * 2.0**-6
    swalp.save_quantized(model, path, swalp.BlockFloat(8))
    assert swalp.load_quantized(path)["weight"].tolist() == [[1.0, 2.0**-6]]


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("scale", [1.0, 2.0**-145, 2.0**124, 2.0**-300])
def test_float64_weights_are_those_of_quantize(text, scale, tmp_path):
    fmt, path = swalp.parse_format(text), tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(64, 6, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(scale * torch.randn(6, 64, generator=generator, dtype=torch.float64))
    swalp.save_quantized(model, path, fmt)
    expected = swalp.quantize(model.weight.detach(), fmt)
    assert torch.equal(swalp.load_quantized(path)["weight"].double(), expected)


def test_integer_and_bool_parameters_go_along_as_they_are(tmp_path):
    model, path = nn.Linear(4, 4), tmp_path / "model.safetensors"
    model.table = nn.Parameter(torch.tensor([1, 2**40 + 1, -3]), requires_grad=False)
    model.mask = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
    swalp.save_quantized(model, path, swalp.BlockFloat(8))
    loaded = swalp.load_quantized(path)
    for name in ("table", "mask"):
        assert loaded[name].dtype == model.get_parameter(name).dtype
        assert torch.equal(loaded[name], model.get_parameter(name))


def test_complex_parameters_are_refused_by_name(tmp_path):
    model, path = nn.Linear(4, 4), tmp_path / "model.safetensors"
    model.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"'phase' is torch\.complex64.*torch\.view_as_real"):
        swalp.save_quantized(model, path, swalp.BlockFloat(8))
    assert not path.exists()


def test_a_buffer_with_two_names_and_extra_state(tmp_path):
    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.same = self.norm
            self.register_buffer("across", torch.arange(6.0).reshape(2, 3).t())

        def get_extra_state(self):
            return {"note": 1}

        def set_extra_state(self, state):
            pass

    model, path = Noted(), tmp_path / "model.safetensors"
    swalp.save_quantized(model, path, swalp.BlockFloat(8))
    loaded = swalp.load_quantized(path)
    assert loaded.keys() == model.state_dict().keys() - {"_extra_state"}
    assert torch.equal(loaded["across"], model.across)
    assert torch.equal(loaded["same.running_var"], model.norm.running_var)


def test_the_file_can_be_read_without_swalp(tmp_path):
    """As docs/export.md says."""
    paths = []
    for text in ("bfp8[0]", "fixed8.5", "bfp12"):
        paths.append(str(tmp_path / f"{text}.safetensors"))
        swalp.save_quantized(network(), paths[-1], swalp.parse_format(text))
    code = f"""
import json, sys, torch
from safetensors import safe_open
for path in {paths!r}:
    with safe_open(path, framework="pt") as file:
        tensors = {{name: file.get_tensor(name) for name in file.keys()}}
        described = json.loads(file.metadata()["swalp"])["parameters"]
    for name, each in described.items():
        codes = tensors.pop(name + ".codes").float()
        exponents = tensors.pop(name + ".exponents", torch.zeros(1)).float()
        tensors[name] = codes * 2.0 ** (exponents + each["scale"])
    print(json.dumps({{name: value.flatten().tolist() for name, value in tensors.items()}}))
assert "swalp" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for path, line in zip(paths, run.stdout.splitlines(), strict=True):
        found = json.loads(line)
        for name, value in swalp.load_quantized(path).items():
            assert found[name] == value.flatten().tolist()


def test_mistakes(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="codes have at most 16"):
        swalp.save_quantized(network(), path, swalp.BlockFloat(20))
    assert not path.exists()
    swalp.save_quantized(network(), path, swalp.BlockFloat(8))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="not a whole file of quantized weights"):
        swalp.load_quantized(path)
    path.write_bytes(safetensors.torch.save({"a": torch.ones(1)}))
    with pytest.raises(ValueError, match="not a whole file of quantized weights"):
        swalp.load_quantized(path)
    with pytest.raises(OSError, match="No such file"):
        swalp.load_quantized(tmp_path / "none")
    assert weights.to_bytes(network(), swalp.BlockFloat(8)) == whole


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    model = nn.Linear(3, 3)
    swalp.save_quantized(model, path, swalp.BlockFloat(8))
    before = path.read_bytes()

    def full(_):
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="full"):
            swalp.save_quantized(nn.Linear(5, 5), path, swalp.BlockFloat(8))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    link = tmp_path / "link"
    link.symlink_to(path)
    swalp.save_quantized(nn.Linear(5, 5), link, swalp.BlockFloat(8))
    assert link.is_symlink()
    assert path.read_bytes() != before


@pytest.mark.parametrize("change", [
    lambda tensors, about: about.update(shape=[3200000, 12]),
    lambda tensors, about: about.update(shape=[-1, -1]),
    lambda tensors, about: about.update(shape=[0]),
    lambda tensors, about: about.update(shape=[32.0, 12.0]),
    lambda tensors, about: about.update(format="bfp8"),
    lambda tensors, about: about.update(format="bfp4[0]"),
    lambda tensors, about: tensors.pop("weight.exponents"),
    lambda tensors, about: tensors.pop("weight.codes"),
    lambda tensors, about: tensors.update({"weight.codes": tensors["weight.codes"][:3]}),
])  # fmt: skip
def test_a_file_whose_parts_do_not_fit_is_damaged(change, tmp_path):
    path = tmp_path / "model.safetensors"
    swalp.save_quantized(nn.Linear(12, 32), path, swalp.BlockFloat(4))
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["swalp"])
    change(tensors, about["parameters"]["weight"])
    safetensors.torch.save_file(tensors, path, {"swalp": json.dumps(about)})
    with pytest.raises(
        ValueError, match=r"not a whole file of quantized weights: .*('weight'|shape)"
    ):
        swalp.load_quantized(path)


def test_codes_of_four_bits_share_a_byte_also_where_there_is_one(tmp_path):
    path = tmp_path / "model.safetensors"
    swalp.save_quantized(nn.Linear(1, 1), path, swalp.BlockFloat(4))
    with safetensors.safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["swalp"])["parameters"]
    assert [each["codes_per_byte"] for each in described.values()] == [2, 2]


def test_mistakes_are_named(tmp_path):
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"save_quantized: fmt must be a format such as .*'bfp8'"):
        swalp.save_quantized(model, tmp_path / "x", "bfp8")
    with pytest.raises(FileNotFoundError) as caught:
        swalp.save_quantized(model, tmp_path / "no" / "x", swalp.BlockFloat(8))
    assert caught.value.filename == str(tmp_path / "no" / "x")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "plain")
    with pytest.raises(ValueError, match="save_quantized did not write it"):
        swalp.load_quantized(tmp_path / "plain")
