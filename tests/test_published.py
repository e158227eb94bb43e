"""The recipes `official`, `official-preresnet` and `qtorch` against the codes said again."""

import pytest
import torch
from torch import nn

import swalp
from published import OfficialPreResNet, OfficialVGG, QPyTorch, uniform
from swalp.noise import random_bits

SETTINGS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def vgg16(width, batch_norm=False):
    layers, channels = [], 3
    for depth, multiple in ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8)):
        for _ in range(depth):
            layers.append(nn.Conv2d(channels, multiple * width, 3, padding=1))
            channels = multiple * width
            if batch_norm:
                layers.append(nn.BatchNorm2d(channels))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for _ in range(2):
        layers += [nn.Dropout(), nn.Linear(8 * width, 8 * width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(8 * width, 10))


class Bottleneck(nn.Module):
    def __init__(self, inputs, inner, stride):
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(inner), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn3, self.relu3 = nn.BatchNorm2d(inner), nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(inner, 4 * inner, 1, bias=False)
        same = stride == 1 and inputs == 4 * inner
        self.shortcut = (
            nn.Identity() if same else nn.Conv2d(inputs, 4 * inner, 1, stride, bias=False)
        )

    def forward(self, x):
        out = self.conv1(self.relu1(self.bn1(x)))
        out = self.conv2(self.relu2(self.bn2(out)))
        return self.conv3(self.relu3(self.bn3(out))) + self.shortcut(x)


def preresnet164(width=16):
    blocks, inputs = [], width
    for stage in range(3):
        for place in range(18):
            blocks.append(Bottleneck(inputs, width << stage, 2 if stage and not place else 1))
            inputs = 4 * (width << stage)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), *blocks, nn.BatchNorm2d(inputs),
        nn.ReLU(inplace=True), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(inputs, 10),
    )  # fmt: skip


def same_training(model, recipe, code, steps=3):
    """Outputs, gradients, weights and momenta of some steps, bit for bit."""
    model = swalp.convert(model, recipe)
    theirs = code(swalp.to_float(model), **SETTINGS)
    optimizer = swalp.optim.SGD(model, recipe=recipe, **SETTINGS)
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        x = torch.randn(2, 3, 32, 32, generator=generator)
        y = torch.randint(10, (2,), generator=generator)
        outputs = []
        for forward, parameters in (
            (model, dict(model.named_parameters())),
            (theirs.forward, theirs.parameters),
        ):
            torch.manual_seed(step)  # of the dropout
            outputs.append(forward(x))
            for parameter in parameters.values():
                parameter.grad = None
            nn.functional.cross_entropy(outputs[-1], y).backward()
        assert torch.equal(*outputs), step
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, theirs.parameters[name].grad), (step, name)
        optimizer.step()
        theirs.step()
        for name, parameter in model.named_parameters():
            other, state = theirs.parameters[name], optimizer.state[parameter]
            assert same(parameter, other), (step, name)
            assert same(state["momentum_buffer"], theirs.momentum(other)["momentum_buffer"])
            if "accumulator" in state:
                assert same(state["accumulator"], theirs.accumulators[name]), (step, name)
    return model, theirs


def same(ours, theirs):
    plain = ours.dequantize() if isinstance(ours, swalp.PackedTensor) else ours.detach()
    return torch.equal(plain, theirs.detach())


def seeded(build, *arguments):
    torch.manual_seed(0)
    return build(*arguments)


def test_the_noise_is_the_librarys():
    for bits in (16, 32):
        u = uniform((7, 12345), bits, 77, 5, 2)
        expected = (random_bits(7 * 12345, bits, 77, 5, 2).double() + 0.5) / 2**bits
        assert torch.equal(u.reshape(-1), expected)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_official_vgg16(batch_norm):
    same_training(seeded(vgg16, 8, batch_norm), "official-8", OfficialVGG)


def test_official_preresnet164():
    same_training(seeded(preresnet164, 4), "official-preresnet-8", OfficialPreResNet)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_qtorch_vgg16(batch_norm):
    same_training(seeded(vgg16, 8, batch_norm), "qtorch-8", QPyTorch)


@pytest.mark.parametrize("name", ["official-8", "official-4", "qtorch-8"])
def test_packed_parameters_step_alike(name):
    results = []
    for packed in (False, True):
        model = swalp.convert(seeded(vgg16, 4, True), name, packed=packed)
        optimizer = swalp.optim.SGD(model, recipe=name, **SETTINGS)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        kept = [*model.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values())]
        results.append(kept)
    for plain, codes in zip(*results, strict=True):
        assert same(codes, plain)
