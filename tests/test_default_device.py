"""PyTorch's default device is where the user's new tensors go; ours go where their operands are."""

import subprocess
import sys

import pytest

SCRIPT = """
import hashlib, sys, tempfile, torch, swalp
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 600),
        nn.GELU(), nn.LayerNorm(600), nn.Linear(600, 5),
    )

networks = [network() for _ in range(4)]
images, labels = torch.randn(450, 3, 6, 6), torch.randint(5, (450,))
numbers, found = torch.randn(64, 64), []

def work():
    for name in ("e4m3", "e5m2", "fixed8.6", "bfp8[0]", "bfp4", "mxfp4_e2m1", "binary", "bfp16"):
        fmt = swalp.parse_format(name)
        for rule in (swalp.Nearest(), swalp.Stochastic(1)):
            found.append(swalp.quantize(numbers, fmt, rule))
            found.append(swalp.quantize(numbers.double(), fmt, rule))
            found.append(swalp.pack(numbers, fmt, rule).dequantize())
        assert swalp.quantize(numbers, fmt, swalp.Stochastic()).device == numbers.device
        found.append(swalp.quantize_many([numbers], fmt)[0])
    for model, recipe, kind, packed in zip(
        networks, ("native-8", "native-8", "fp8", "paper-small-block-4"),
        (swalp.optim.SGD, swalp.optim.Adam, swalp.optim.Adam, swalp.optim.SGD),
        (False, True, True, True),
    ):
        model = swalp.convert(model, recipe, seed=1, packed=packed)
        optimizer = kind(model, lr=0.01, recipe=recipe)
        average = swalp.WeightAverage(model)
        for _ in range(2):
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        swalp.recompute_batchnorm(average.module, [images])
        found.extend(average.module.state_dict().values())
        with tempfile.TemporaryDirectory() as folder:
            swalp.save_quantized(average.module, folder + "/x.safetensors", swalp.BlockFloat(8))
            loaded = swalp.load_quantized(folder + "/x.safetensors")
        found.extend(loaded[name] for name in sorted(loaded))

if sys.argv[1] == "none":
    work()
elif sys.argv[1] == "default":
    torch.set_default_device("meta")
    work()
    torch.set_default_device("cpu")
else:
    with torch.device("meta"):
        work()
bits = b"".join(x.detach().numpy().tobytes() for x in found)
print(len(found), hashlib.sha256(bits).hexdigest())
"""


def digest(how):
    """Of many results, in a process of its own: what is made once is made under that default."""
    run = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr or f"ended by signal {-run.returncode}"
    return run.stdout


@pytest.fixture(scope="module")
def ordinary():
    return digest("none")


@pytest.mark.parametrize("how", ["default", "context"])
def test_another_default_device_changes_nothing(how, ordinary):
    assert digest(how) == ordinary
