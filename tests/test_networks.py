"""The networks of the papers: sizes as known from elsewhere, shapes written out here."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import swalp
from swalp.training import models
from swalp.training.mistakes import UserError

# VGG16 by arithmetic below; the others as published and as torchvision and others count them.
PARAMETERS = [
    ("vgg16", 64, 10, 15_245_130),
    ("vgg16-bn", 64, 10, 15_245_130 + 2 * 4224),
    ("vgg16", 64, 100, 15_245_130 + 90 * 513),
    ("preresnet164", 16, 10, 1_703_258),
    ("preresnet164", 16, 100, 1_726_388),
    ("resnet20", 16, 10, 269_722),
    ("resnet18", 64, 1000, 11_689_512),
]


def built(kind, width=4, classes=10, seed=0):
    return models.build(kind, channels=3, size=32, width=width, classes=classes, seed=seed)


@pytest.mark.parametrize(("kind", "width", "classes", "count"), PARAMETERS)
def test_parameters(kind, width, classes, count):
    model = built(kind, width, classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def products(model, size):
    """(kind, input shape without batch, weight shape, stride) of each product, as they happen."""
    found = []

    def look(module, args, output):
        stride = module.stride[0] if isinstance(module, nn.Conv2d) else 1
        found.append((tuple(args[0].shape[1:]), tuple(module.weight.shape), stride))

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(look)
    model.eval()(torch.zeros(1, 3, size, size))
    return found


@pytest.mark.parametrize("kind", ["vgg16", "vgg16-bn"])
def test_vgg16_is_configuration_d(kind):
    expected, size, before = [], 32, 3
    for stage in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for channels in stage:
            expected.append(((before, size, size), (channels, before, 3, 3), 1))
            before = channels
        size //= 2
    expected += [((512,), (512, 512), 1), ((512,), (512, 512), 1), ((512,), (10, 512), 1)]
    model = built(kind, 64)
    assert products(model, 32) == expected
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == 2
    assert all(layer.bias is not None for layer in model.modules() if isinstance(layer, nn.Conv2d))


def test_resnet18_is_that_of_the_paper():
    expected = [((3, 224, 224), (64, 3, 7, 7), 2)]
    size, before = 56, 64
    for stage, channels in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            expected.append(((before, size, size), (channels, before, 3, 3), stride))
            after = size // stride
            expected.append(((channels, after, after), (channels, channels, 3, 3), 1))
            if stride == 2:
                expected.append(((before, size, size), (channels, before, 1, 1), 2))
            size, before = after, channels
    expected.append(((512,), (1000, 512), 1))
    model = models.build("resnet18", channels=3, size=224, width=64, classes=1000, seed=0)
    assert products(model, 224) == expected


def test_preresnet164_has_54_bottlenecks():
    expected, before, size = [((3, 32, 32), (16, 3, 3, 3), 1)], 16, 32
    for stage in range(3):
        inner = 16 * 2**stage
        for block in range(18):
            stride = 2 if stage and not block else 1
            after = size // stride
            expected += [
                ((before, size, size), (inner, before, 1, 1), 1),
                ((inner, size, size), (inner, inner, 3, 3), stride),
                ((inner, after, after), (4 * inner, inner, 1, 1), 1),
            ]
            if not block:
                expected.append(((before, size, size), (4 * inner, before, 1, 1), stride))
            before, size = 4 * inner, after
    expected.append(((256,), (10, 256), 1))
    assert len(expected) == 1 + 54 * 3 + 3 + 1  # 164 without the shortcuts' convolutions
    assert products(built("preresnet164", 16), 32) == expected


def by_hand_resnet20(model, x):
    """ResNet-20 from the state dict alone."""
    state = model.state_dict()

    def conv_norm(x, conv, norm, stride=1):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, variance, weight, bias = (
            state[f"{norm}.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias

    x = conv_norm(x, "0", "1").relu()
    for block in range(9):
        stride = 2 if block in (3, 6) else 1
        y = conv_norm(x, f"{3 + block}.conv1", f"{3 + block}.bn1", stride).relu()
        y = conv_norm(y, f"{3 + block}.conv2", f"{3 + block}.bn2")
        if stride == 2:
            zeros = torch.zeros(len(x), x.shape[1] // 2, *y.shape[2:])
            x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
        x = (x + y).relu()
    return x.mean((2, 3)) @ state["14.weight"].T + state["14.bias"]


def by_hand_preresnet(model, x):
    """PreResNet-164 from the state dict alone."""
    state = model.state_dict()

    def norm_relu(x, norm):
        mean, variance, weight, bias = (
            state[f"{norm}.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / torch.sqrt(variance + 1e-5) * weight + bias).relu()

    x = F.conv2d(x, state["0.weight"], padding=1)
    for block in range(1, 55):
        stride = 2 if block in (19, 37) else 1
        y = F.conv2d(norm_relu(x, f"{block}.bn1"), state[f"{block}.conv1.weight"])
        y = norm_relu(y, f"{block}.bn2")
        y = F.conv2d(y, state[f"{block}.conv2.weight"], padding=1, stride=stride)
        y = F.conv2d(norm_relu(y, f"{block}.bn3"), state[f"{block}.conv3.weight"])
        if f"{block}.shortcut.weight" in state:
            x = F.conv2d(x, state[f"{block}.shortcut.weight"], stride=stride)
        x = x + y
    return norm_relu(x, "55").mean((2, 3)) @ state["59.weight"].T + state["59.bias"]


@pytest.mark.parametrize(
    ("kind", "by_hand"), [("resnet20", by_hand_resnet20), ("preresnet164", by_hand_preresnet)]
)
def test_residual_networks_equal_the_same_by_hand(kind, by_hand):
    model = built(kind, 8).double()
    generator = torch.Generator().manual_seed(4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=generator)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["vgg16", "resnet18", "preresnet164"])
def test_initial_convolutions_have_the_published_variance(kind):
    model = built(kind, 16)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 4000:
            fan = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
            relative = layer.weight.var().item() / (2 / fan)
            # The variance of a variance is 2 / n; five deviations.
            assert abs(relative - 1) < 5 * math.sqrt(2 / layer.weight.numel())
            if layer.bias is not None:
                assert not layer.bias.any()


@pytest.mark.parametrize("kind", ["vgg16", "vgg16-bn", "preresnet164", "resnet20", "resnet18"])
def test_they_convert_and_learn_from_a_step(kind):
    recipe = swalp.recipes.get("paper-small-block-8")
    model = swalp.convert(built(kind, 4), recipe, packed=True)
    optimizer = swalp.optim.SGD(model.named_parameters(), lr=1.0, recipe=recipe)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)
    before = {
        name: value.dequantize().clone()
        for name, value in model.named_parameters()
        if value.dim() > 1
    }
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert not any(torch.equal(after[name].dequantize(), old) for name, old in before.items())


@pytest.mark.parametrize("width", [3, 5])
def test_odd_widths(width):
    assert built("resnet20", width)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_vgg16_needs_32_pixels():
    with pytest.raises(UserError, match="halves its images five times, so that 28 x 28 pixels are"):
        models.build("vgg16", channels=1, size=28, width=4, classes=10, seed=0)


@pytest.mark.parametrize(
    ("kind", "width"),
    [("resnet18", 2), ("resnet18", 4), ("resnet18", 8), ("resnet18", 16), ("preresnet164", 2)],
)
def test_narrow_networks_take_channels_last(kind, width):
    """PyTorch crashes where these have few channels, unless the shortcut sees to it."""
    model = built(kind, width)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model.zero_grad()
        model(x.contiguous(memory_format=layout)).square().sum().backward()
        gradients.append(next(model.parameters()).grad)
    relative = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert relative < 1e-2
