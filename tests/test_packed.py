import contextlib
import copy
import io
import signal

import pytest
import safetensors.torch
import torch
from torch import distributed, nn

import swalp
from swalp import (
    BlockFloat,
    FixedPoint,
    Microscaling,
    Nearest,
    PackedTensor,
    Stochastic,
    pack,
    parse_format,
    quantize,
)
from swalp.packed import _rebuild, from_plain, storage_bytes, to_plain
from swalp.quantize import codes, dispatch

NO_NAN = [
    *("fixed8.4", "fixed12.6", "fixed4.2", "bfp8t", "bfp8t[0,1]"),
    *("e2m1", "e3m0", "e2m3", "mxfp4_e2m1/8", "binary"),
]
HAVE_NAN = [
    *("fixed8.4s", "ternary", "bfp8", "bfp4", "bfp3[0]", "bfp8/8", "bfp6/2x4", "bfp12e5[1]"),
    *("bfp16e10", "e4m3fn", "e5m2", "e4m3fnuz", "e8m0", "fp16", "bf16", "mxfp8_e4m3/8", "mxint8/8"),
]
FORMATS = [parse_format(text) for text in NO_NAN + HAVE_NAN]
RULES = [Nearest(), Stochastic(5, random_bits=16)]
BYTE = BlockFloat(8, axes=(0,))
COARSE = BlockFloat(5)


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(left, right):
    return torch.equal(left.nan_to_num(7e7), right.nan_to_num(7e7))


@pytest.mark.parametrize("text", HAVE_NAN)
def test_nan_is_found_whenever_codes_change(text):
    fmt, clean = parse_format(text), values(6, 8).abs()
    holed = clean.clone()
    holed[3, 5] = torch.nan
    packed = pack(clean, fmt)
    kept = packed.detach()
    for change in (holed, clean, pack(holed, fmt), pack(clean, fmt)):
        assert packed.has_nan() == kept.has_nan() == bool(packed.dequantize().isnan().any())
        packed.copy_(change)
        assert packed.has_nan() == kept.has_nan() == bool(packed.dequantize().isnan().any())
    with torch.inference_mode():
        packed.copy_(holed)
        inside = pack(clean, fmt)
        assert not inside.has_nan()
        inside.copy_(holed)
        assert inside.has_nan()
    assert packed.has_nan()


@pytest.mark.parametrize("text", NO_NAN)
def test_formats_without_nan_have_none(text):
    assert not pack(values(6, 8), parse_format(text)).has_nan()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_codes_hold_what_quantize_gives(fmt, rule):
    x = values(6, 8) * 3
    x[0, :4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    x[1] = 0
    x[2] *= 1e-30
    if str(fmt) == "e8m0":
        x = x.abs()
    packed = pack(x, fmt, rule)
    assert same(packed.dequantize(), quantize(x, fmt, rule))
    assert packed.nbytes == storage_bytes(x.shape, fmt)
    assert packed.shape == x.shape
    assert packed.dtype == torch.float32


def test_nan_has_a_code_or_is_refused():
    x = values(2, 8).abs()
    x[1, 3] = torch.nan
    for text in HAVE_NAN:
        fmt = parse_format(text)
        assert same(pack(x, fmt).dequantize(), quantize(x, fmt))
    for text in NO_NAN:
        with pytest.raises(ValueError, match=r"the tensor has a NaN, and .* no code for it"):
            pack(x, parse_format(text))


def test_an_infinity_among_subnormals_packs_to_the_largest_code():
    # The block's limit, 127 * 2**-155, is finer than float32, which makes it 2**-148: code 128.
    x = torch.tensor([torch.inf, 2.0**-149, -torch.inf])
    for run in (codes.pack, dispatch.pack):
        packed, _ = run(x, BlockFloat(8, exponent_bits=9), Nearest())
        assert packed.tolist() == [127, 64, -127]


def test_bytes():
    assert pack(values(100, 10), BlockFloat(8)).nbytes == 1000 + 1
    assert pack(values(100, 10), BYTE).nbytes == 1000 + 100
    assert pack(values(100, 10), BlockFloat(4)).nbytes == 500 + 1
    assert pack(values(3, 5), BlockFloat(4)).nbytes == 8 + 1
    assert pack(values(4, 64), Microscaling(parse_format("e2m1"))).nbytes == 128 + 8
    assert storage_bytes((10, 10), None) == 400


@pytest.mark.parametrize("fmt", [BYTE, BlockFloat(4), FixedPoint(8, 5), parse_format("bfp8/4")])
def test_moving_numbers_keeps_them_packed(fmt):
    packed = pack(values(8, 4, 4), fmt)
    full = packed.dequantize()
    for copied in (packed.clone(), packed.detach(), copy.deepcopy(packed), packed.to("cpu")):
        assert isinstance(copied, PackedTensor)
        assert torch.equal(copied.dequantize(), full)
    assert torch.equal(packed[2:6], full[2:6])
    assert torch.equal(packed[:, 1:3], full[:, 1:3])
    assert torch.equal(packed[3], full[3])
    assert torch.equal(packed.permute(2, 0, 1), full.permute(2, 0, 1))
    assert torch.equal(packed.transpose(0, 2)[1:3], full.transpose(0, 2)[1:3])


def test_slices_and_transposes_share_codes_and_are_read_only():
    packed = pack(values(8, 6), BYTE)
    for part in (packed[2:4], packed.t(), packed[:, 1:]):
        assert isinstance(part, PackedTensor)
        assert part.codes.untyped_storage().data_ptr() == packed.codes.untyped_storage().data_ptr()
        with pytest.raises(RuntimeError, match="is read-only"):
            part.zero_()
    assert packed.t().format == BlockFloat(8, axes=(1,))


def test_what_is_assigned_shares_no_codes_with_a_whole():
    whole = pack(values(8, 6), BYTE)
    before = whole.dequantize()
    other = pack(values(2, 6, seed=1), BYTE)
    other.data = whole[2:4]
    assert torch.equal(other.dequantize(), before[2:4])
    other.zero_()
    assert torch.equal(whole.dequantize(), before)


@pytest.mark.parametrize("fmt", ["bfp8/4", "bfp8[0]/4", "mxfp8_e4m3"])
def test_slices_that_cut_through_tiles_have_the_values(fmt):
    packed = pack(values(64, 64), parse_format(fmt))
    full = packed.dequantize()
    for start, end in ((0, 32), (32, 64), (0, 6), (2, 32), (32, 38), (1, 2)):
        assert torch.equal(packed[:, start:end] + 0, full[:, start:end])
        assert torch.equal(packed[start:end] + 0, full[start:end])


def test_acts_as_float():
    packed, other = pack(values(5, 5), BYTE), values(5, 5, seed=1)
    full = packed.dequantize()
    assert torch.equal(packed + other, full + other)
    assert torch.equal(other @ packed, other @ full)
    assert torch.equal(packed.sum(), full.sum())
    assert torch.equal(packed.to(torch.float64), full.double())
    assert "PackedTensor(tensor([[" in repr(packed)
    other.copy_(packed)
    assert torch.equal(other, full)


def test_writing_rounds():
    packed = pack(values(4, 4), BYTE)
    new = values(4, 4, seed=3)
    packed.copy_(new)
    assert torch.equal(packed.dequantize(), quantize(new, BYTE))
    torch.manual_seed(0)
    ones = pack(torch.ones(200, 200), BlockFloat(8))
    ones.mul_(1 + 2**-8)  # a quarter of the gap: one in four goes up
    assert ones.dequantize().mean().item() == pytest.approx(1 + 2**-8, abs=1e-4)
    assert ones.dequantize().unique().tolist() == [1, 1 + 2**-6]


@pytest.mark.parametrize("fmt", [BYTE, BlockFloat(4), parse_format("e4m3fn")], ids=str)
def test_saved_and_loaded(fmt, tmp_path):
    packed = pack(values(4, 6), fmt)
    file = io.BytesIO()
    torch.save({"w": packed}, file)
    file.seek(0)
    loaded = torch.load(file)["w"]  # weights_only: no arbitrary objects
    assert isinstance(loaded, PackedTensor)
    assert loaded.format == fmt
    assert torch.equal(loaded, packed)

    tensors, metadata = to_plain({"w": packed, "b": values(3)})
    safetensors.torch.save_file(tensors, tmp_path / "s", metadata)
    with safetensors.safe_open(tmp_path / "s", "pt") as opened:
        names = list(opened.keys())
        state = from_plain({k: opened.get_tensor(k) for k in names}, opened.metadata())
    assert set(state) == {"w", "b"}
    assert torch.equal(state["w"], packed)
    assert state["w"].format == fmt
    assert torch.equal(state["b"], values(3))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    )


def train(packed, recipe, steps=5, consume=False, momentum=0.9):
    model = swalp.convert(network(), recipe, seed=1, packed=packed)
    optimizer = swalp.optim.SGD(
        model.named_parameters(), 0.05, momentum=momentum, weight_decay=1e-3, recipe=recipe, seed=1
    )
    if consume:
        optimizer.consume_gradients()
    average = swalp.WeightAverage(model)
    for step in range(steps):
        x = values(8, 1, 6, 6, seed=step)
        nn.functional.cross_entropy(model(x), torch.arange(8)).backward()
        if consume:
            assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    return model, optimizer, average


@pytest.mark.parametrize("name", ["paper-small-block-8", "paper-big-block-4"])
@pytest.mark.parametrize("consume", [False, True])
def test_packed_training_is_the_same_training(name, consume):
    recipe = swalp.recipes.get(name)
    plain, plain_optimizer, plain_average = train(False, recipe)
    model, optimizer, average = train(True, recipe, consume=consume)
    for (key, weight), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert isinstance(weight, PackedTensor), key
        assert isinstance(weight, nn.Parameter), key
        assert torch.equal(weight.dequantize(), expected), key
        buffer = optimizer.state[weight]["momentum_buffer"]
        assert isinstance(buffer, PackedTensor)
        assert torch.equal(buffer.dequantize(), plain_optimizer.state[expected]["momentum_buffer"])
    for mine, expected in zip(
        average.module.parameters(), plain_average.module.parameters(), strict=True
    ):
        assert type(mine) is nn.Parameter
        assert torch.equal(mine, expected)


def test_no_float_copy_stays():
    model, optimizer, _ = train(True, swalp.recipes.get("paper-big-block-8"))
    count = sum(parameter.numel() for parameter in model.parameters())
    held = sum(parameter.nbytes for parameter in model.parameters())
    held += sum(state["momentum_buffer"].nbytes for state in optimizer.state.values())
    tensors = len(list(model.parameters()))
    assert held == 2 * (count + tensors)
    for state in optimizer.state.values():
        assert {key for key, value in state.items() if isinstance(value, torch.Tensor)} == {
            "momentum_buffer"
        }


def test_packed_model_copies_and_loads():
    recipe = swalp.recipes.get("paper-small-block-8")
    model, _, _ = train(True, recipe)
    other = copy.deepcopy(model)
    assert all(isinstance(p, PackedTensor) for p in other.parameters())
    fresh = swalp.convert(network(), recipe, packed=True)
    fresh.load_state_dict(model.state_dict())
    floats = swalp.to_float(model)
    for packed, copied, loaded, plain in zip(
        model.parameters(), other.parameters(), fresh.parameters(), floats.parameters(), strict=True
    ):
        assert torch.equal(packed, copied)
        assert torch.equal(packed, loaded)
        assert type(plain) is nn.Parameter
        assert torch.equal(packed.dequantize(), plain)
    plain_state = {k: v.clone() for k, v in swalp.to_float(model).state_dict().items()}
    fresh.load_state_dict(plain_state)


def test_pytorch_optimizers_accept_packed_weights():
    recipe = swalp.recipes.get("paper-small-block-8")
    for make, lr in ((torch.optim.SGD, 0.1), (torch.optim.Adam, 0.02)):
        torch.manual_seed(1)
        model = swalp.convert(network(), recipe, packed=True)
        optimizer = make(model.parameters(), lr=lr)
        losses = []
        for _ in range(12):
            x = values(8, 1, 6, 6)
            loss = nn.functional.cross_entropy(model(x), torch.arange(8))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        assert all(isinstance(p, PackedTensor) for p in model.parameters())


def test_tied_weights_stay_tied():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = swalp.convert(
        nn.Sequential(first, second), swalp.recipes.get("paper-big-block-8"), packed=True
    )
    assert model[0].weight is model[1].weight


def test_pack_mistakes():
    with pytest.raises(TypeError, match=r"x is torch\.float64; packed tensors act as float32"):
        pack(torch.ones(2).double(), BYTE)
    with pytest.raises(ValueError, match=r"fixed20\.3 has 20 bits; codes have at most 16"):
        pack(torch.ones(2), FixedPoint(20, 3))
    with pytest.raises(ValueError, match="packed=True needs a weight format"):
        swalp.convert(network(), swalp.recipes.Recipe(name="none"), packed=True)


def test_packed_again_in_another_format():
    first = pack(torch.randn(5, 7), BlockFloat(8))
    again = pack(first, BlockFloat(4, axes=(0,)))
    assert again.format == BlockFloat(4, axes=(0,))
    expected = quantize(first.dequantize(), BlockFloat(4, axes=(0,)))
    assert torch.equal(again.dequantize(), expected)


@pytest.mark.parametrize("many", [False, True])
def test_quantize_takes_packed_tensors_and_writes_to_them(many):
    def run(x, out=None):
        if many:
            return swalp.quantize_many([x], COARSE, out=None if out is None else [out])[0]
        return quantize(x, COARSE, out=out)

    x, expected = (
        pack(values(40, 30), BYTE),
        quantize(pack(values(40, 30), BYTE).dequantize(), COARSE),
    )
    assert torch.equal(run(x), expected)
    assert torch.equal(run(x, torch.empty(40, 30)), expected)
    assert torch.equal(run(x.dequantize(), out := pack(values(40, 30, seed=1), BYTE)), out)
    assert torch.equal(out.dequantize(), pack(expected, BYTE).dequantize())
    assert torch.equal(run(x, x).dequantize(), pack(expected, BYTE).dequantize())


WRITES = {
    "p[0] = .5": lambda p: p.__setitem__(0, 0.5),
    "p[0:1] = 0": lambda p: p.__setitem__(slice(0, 1), 0.0),
    "p[:, 2] = 0": lambda p: p.__setitem__((slice(None), 2), 0.0),
    "p[p > 0] = 0": lambda p: p.__setitem__(p > 0, 0.0),
    "p.data = floats": lambda p: setattr(p, "data", torch.zeros(4, 6)),
    "p.data = packed": lambda p: setattr(p, "data", swalp.pack(torch.zeros(4, 6), p.format)),
    "p.data[0] = 0": lambda p: p.data.__setitem__(0, 0.0),
    "vector_to_parameters": lambda p: nn.utils.vector_to_parameters(torch.zeros(24), [p]),
}
VIEWS = {
    "p[0]": lambda p: p[0],
    "p[0:1]": lambda p: p[0:1],
    "p.view(-1)": lambda p: p.view(-1),
    "p.view(-1)[:3]": lambda p: p.view(-1)[:3],
    "p.flatten()": lambda p: p.flatten(),
    "p.unsqueeze(0)": lambda p: p.unsqueeze(0),
    "p.chunk(2)[0]": lambda p: p.chunk(2)[0],
    "p.diagonal()": lambda p: p.diagonal(),
    "p.T": lambda p: p.T,
    "p[0:1].detach()": lambda p: p[0:1].detach(),
    "p[0:1].data": lambda p: p[0:1].data,
}


@pytest.mark.parametrize("fmt", [BlockFloat(8), FixedPoint(8, 4), BlockFloat(4, axes=(0,))])
def test_writes_to_parts_are_kept_or_refused(fmt):
    def packed():
        torch.manual_seed(0)
        return swalp.pack(torch.randn(4, 6), fmt)

    for name, write in WRITES.items():
        p, floats = packed(), packed().dequantize()
        write(p)
        write(floats) if name[-1].isdigit() else floats.zero_()
        assert torch.equal(p.dequantize(), swalp.quantize(floats, fmt)), name
    for name, view in VIEWS.items():
        p = packed()
        part = view(p)
        for write in (torch.zero_, lambda x: x.copy_(torch.ones(x.shape)), lambda x: x.add_(1)):
            with pytest.raises(RuntimeError, match=r"view of a packed tensor is read-only.*assign"):
                write(part)
        assert torch.equal(p.dequantize(), packed().dequantize())
        assert torch.equal(part + 0, view(packed().dequantize())), name
        if not isinstance(part, PackedTensor):
            assert part.tolist() == view(packed().dequantize()).tolist()
        assert torch.equal(copy.deepcopy(part) + 0, part + 0)
    assert f"{packed()[0, 0]:.2f}" == f"{packed().dequantize()[0, 0]:.2f}"
    with pytest.raises(RuntimeError, match="read-only"), torch.no_grad():
        nn.init.orthogonal_(packed())


def test_a_parameter_is_written_to_as_pytorch_has_it():
    p = nn.Parameter(swalp.pack(torch.randn(4, 6), BlockFloat(8)))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        p[0] = 0.0
    p.view(-1).square().sum().backward()  # of a view that autograd watches
    assert torch.equal(p.grad, 2 * p.dequantize())
    with torch.no_grad():
        p[0] = 0.0
    assert not p.dequantize()[0].any()
    for change in (nn.Module.double, nn.Module.half):
        model = swalp.convert(nn.Sequential(nn.Linear(4, 4)), "native-8", packed=True)
        with pytest.raises(ValueError, match=r"acts as torch\.float32 .* become torch\.float"):
            change(model)
        assert model(torch.ones(2, 4)).dtype == torch.float32


def test_shared_memory():
    model = swalp.convert(nn.Sequential(nn.Linear(4, 4)), "native-8", packed=True)
    before = model[0].weight.dequantize()
    model.share_memory()
    assert model[0].weight.codes.is_shared()
    assert torch.equal(model[0].weight.dequantize(), before)
    with pytest.raises(BufferError, match="no floats in memory to share"):
        torch.from_dlpack(model[0].weight.detach())


def test_inference_mode():
    model = swalp.convert(nn.Sequential(nn.Linear(4, 4)), "native-8", packed=True)
    average = swalp.WeightAverage(model)
    with torch.inference_mode():
        state = model.state_dict()
        average.update_parameters(model)
        inside = swalp.pack(torch.ones(3), BlockFloat(8))
        assert inside.detach().is_inference()
    assert torch.equal(state["0.weight"].dequantize(), model[0].weight.dequantize())
    assert average.steps == 1


@pytest.mark.parametrize(
    "view",
    [
        lambda m: m.weight[0],
        lambda m: next(iter(m.weight)),
        lambda m: m.weight.chunk(2, 1)[1],
        lambda m: m.weight.view(-1),
        lambda m: m.weight.t(),
    ],
)
def test_views_that_autograd_watches_are_read_only_and_have_gradients(view):
    model = swalp.convert(nn.Embedding(5, 6), "native-8", packed=True)
    before = model.weight.dequantize()
    part = view(model)
    with pytest.raises(RuntimeError, match="read-only"):
        nn.init.constant_(part, 0.75)
    with pytest.raises(RuntimeError, match="requires grad"):
        part.numpy()
    assert torch.equal(model.weight, before)
    part.square().sum().backward()
    plain = nn.Embedding(5, 6, _weight=before)
    view(plain).square().sum().backward()
    assert torch.equal(model.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("fmt", [BYTE, BlockFloat(4)], ids=str)
@pytest.mark.parametrize("made_inside", [False, True])
def test_views_are_made_in_inference_mode_as_their_base_was(fmt, made_inside):
    with torch.inference_mode(made_inside):
        packed = pack(values(4, 6), fmt)
    full = packed.dequantize()
    views = {name: view for name, view in VIEWS.items() if "detach" not in name}
    views |= {"p.t()": lambda p: p.t(), "p[1:3][0]": lambda p: p[1:3][0]}
    for mode in (True, False):
        with torch.inference_mode(mode):
            for name, view in views.items():
                part = view(packed)
                assert part.is_inference() == made_inside, name
                assert torch.equal(part + 0, view(full)), name


def test_packed_layers_run_in_inference_mode():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    layer = swalp.convert(layer, "native-8", packed=True).eval()
    x = values(2, 3, 16)
    with torch.no_grad():
        expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


@pytest.fixture
def alone(tmp_path):
    """A group of this process only."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_collectives_on_packed_tensors_are_refused():
    packed = pack(values(4, 6), BYTE)
    for x in (packed, nn.Parameter(packed).data, packed[0], packed[1:3]):
        for call in (
            lambda x: distributed.broadcast(x, 0),
            distributed.all_reduce,
            lambda x: distributed.all_gather([torch.zeros(x.shape)], x),
            lambda x: distributed.scatter(x, [torch.zeros(x.shape)]),
        ):
            with pytest.raises(RuntimeError, match=r"communicate \.codes and \.exponents"):
                call(x)


@pytest.mark.usefixtures("alone")
def test_distributed_data_parallel_takes_packed_weights():
    model = swalp.convert(nn.Sequential(nn.Linear(4, 4)), "native-8", packed=True)
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(torch.ones(2, 4)).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("text", ["bfp8[0]", "bfp8/4", "mxfp8_e4m3/2", "bf16", "fixed8.4", "bfp4"])
def test_strides_are_those_of_the_codes(text):
    floats = values(4, 4, 8, 8).to(memory_format=torch.channels_last)
    packed = pack(floats, parse_format(text))
    full = packed.dequantize()
    assert packed.stride() == full.stride()
    for move in (
        lambda x: x.permute(1, 2, 0, 3),
        lambda x: x.contiguous(),
        lambda x: x.permute(1, 2, 0, 3).contiguous().view(-1),
        lambda x: x.permute(3, 1, 0, 2).clone(),
        copy.deepcopy,
    ):
        assert torch.equal(move(packed), move(full))
        assert move(packed).stride() == move(full).stride()
    if text != "bfp4":  # two of its codes share a byte, always in row-major order
        last = packed.contiguous().to(memory_format=torch.channels_last)
        assert isinstance(last, PackedTensor)
        assert last.stride() == floats.stride() == last.codes.stride()


def test_what_is_assigned_to_data_brings_its_strides():
    weight = nn.Parameter(pack(values(2, 3, 4, 5), BYTE))
    last = pack(values(2, 3, 4, 5, seed=1).to(memory_format=torch.channels_last), BYTE)
    weight.data = last
    assert weight.stride() == weight.codes.stride() == last.stride()
    assert torch.equal(weight, last)


def test_as_lists_and_arrays():
    packed = pack(values(4, 6), BYTE)
    full = packed.dequantize()
    assert packed.tolist() == full.tolist()
    assert packed.numpy().tolist() == full.tolist()
    with pytest.raises(RuntimeError, match="requires grad"):
        nn.Parameter(packed).numpy()
    assert nn.Parameter(packed).numpy(force=True).tolist() == full.tolist()


def test_compiled_code_packs():
    @torch.compile(backend="eager")
    def packed_and_back(x):
        return pack(2 * x, BlockFloat(8, axes=(0,)), Stochastic(3)).dequantize() + 1

    x = values(4, 6)
    assert torch.equal(packed_and_back(x), quantize(2 * x, BYTE, Stochastic(3)) + 1)


@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of much
@pytest.mark.parametrize("theirs", [False, True])
def test_compiled_code_trains_packed_weights(theirs):
    recipe = "paper-small-block-8"

    def trained(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        swalp.convert(model, recipe, packed=True)
        optimizer = (
            torch.optim.SGD(model.parameters(), 0.1)
            if theirs
            else swalp.optim.SGD(model, 0.1, recipe=recipe)
        )

        def step(x):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

        run = torch.compile(step, backend="eager") if compiled else step
        torch.manual_seed(1)
        for seed in range(3):
            run(values(2, 4, seed=seed))
        return model[0].weight.dequantize()

    torch._dynamo.reset()
    assert torch.equal(trained(compiled=True), trained(compiled=False))


def test_a_constant_is_rounded_to_nearest():
    packed = pack(torch.zeros(64), FixedPoint(8, 4))
    assert packed.fill_(0.3).tolist() == [0.3125] * 64
    assert nn.init.constant_(packed, -0.3).tolist() == [-0.3125] * 64


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no timer here")
def test_an_interrupted_copy_is_the_old_or_the_new():
    one, other = (pack(torch.full((1024, 1024), x), BlockFloat(8)) for x in (1.0, 24000.0))
    target = one.clone()

    def ring(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    try:
        for delay in range(200):
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + 5 * delay))
                for _ in range(50):
                    target.copy_(one)
                    target.copy_(other)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert target[0, 0].item() in (1.0, 24064.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_shared_memory_is_told():
    packed = pack(torch.ones(4, 4), BlockFloat(8))
    assert not packed.is_shared()
    assert packed.share_memory_().is_shared()


WHOLE = swalp.pack(torch.linspace(-1, 1, 24).reshape(4, 6), swalp.BlockFloat(8))


@pytest.mark.parametrize(("codes", "exponents", "fmt", "shape"), [
    (WHOLE.codes[:2], WHOLE.exponents, "bfp8t", (4, 6)),
    (WHOLE.codes, None, "bfp8t", (4, 6)),
    (WHOLE.codes, WHOLE.exponents, "bfp8t[0]", (4, 6)),
    (WHOLE.codes, WHOLE.exponents, "bfp8t", (6, 4)),
    (WHOLE.codes, WHOLE.exponents, "bfp12t", (4, 6)),
    (WHOLE.codes, WHOLE.exponents, "bfp4t", (4, 6)),
    (WHOLE.codes, WHOLE.exponents.to(torch.int16), "bfp8t", (4, 6)),
    (WHOLE.codes, WHOLE.exponents, "bfp8t", (-4, -6)),
    (WHOLE.codes, WHOLE.exponents, "fixed8.4", (4, 6)),
    (WHOLE.codes, WHOLE.exponents, "bfp8t[7]", (4, 6)),
])  # fmt: skip
def test_codes_that_are_not_of_the_format_and_shape_are_refused(codes, exponents, fmt, shape):
    """Kernels trust format and shape, and files may say anything."""
    with pytest.raises(ValueError, match=r"bfp|fixed"):
        swalp.PackedTensor(codes, exponents, swalp.parse_format(fmt), shape)
    tensors = {"w.codes": codes}
    if exponents is not None:
        tensors["w.exponents"] = exponents
    with pytest.raises(ValueError, match="from_plain: 'w': "):
        from_plain(tensors, {"w": f"{fmt} {','.join(map(str, shape))}"})

    class Forged:
        def __reduce__(self):
            return _rebuild, (codes, exponents, fmt, shape, None)

    file = io.BytesIO()
    torch.save({"w": Forged()}, file)
    file.seek(0)
    with pytest.raises(ValueError, match=r"bfp|fixed"):
        torch.load(file, weights_only=True)


def test_metadata_of_no_tensor_are_refused():
    with pytest.raises(
        ValueError, match=r"describe 'format', but there is no tensor 'format.codes'"
    ):
        from_plain({}, {"format": "pt"})


def test_parts_stay_read_only_wherever_they_go():
    """They share codes with the whole, but not all of its exponents."""
    whole = swalp.pack(torch.randn(4, 8), swalp.BlockFloat(8))
    values = whole.dequantize()
    with pytest.raises(RuntimeError, match="read-only"):
        copy.copy(whole[2:]).fill_(1000.0)
    file = io.BytesIO()
    torch.save({"whole": whole, "part": whole[2:]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    with pytest.raises(RuntimeError, match="read-only"):
        loaded["part"].fill_(1000.0)
    assert torch.equal(loaded["part"].dequantize(), values[2:])
    own = from_plain(*to_plain({"part": whole[2:]}))["part"]
    own.fill_(1000.0)
    whole[2:].clone().fill_(1000.0)
    assert torch.equal(whole.dequantize(), values)


def test_packed_parameters_come_back_from_the_meta_device_packed():
    model = swalp.convert(torch.nn.Linear(64, 64), "paper-small-block-8", packed=True)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu")
    assert all(isinstance(each, swalp.PackedTensor) for each in model.parameters())
    model.load_state_dict(saved)
    assert all(
        torch.equal(value.dequantize(), saved[name].dequantize())
        for name, value in model.state_dict().items()
    )


def test_tensors_without_values_are_packed():
    for fmt in ("bfp8t", "fixed8.4", "e2m3", "mxfp4_e2m1"):
        packed = swalp.pack(torch.empty(32, 32, device="meta"), swalp.parse_format(fmt))
        assert packed.is_meta
        assert packed.shape == (32, 32)
