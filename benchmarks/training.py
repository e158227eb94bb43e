"""A whole training step in simulated 8 bits against the same step in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import swalp
from benchmarks import peers
from benchmarks.harness import Contender, contender, interleave
from benchmarks.plan import Plan
from benchmarks.records import Row, at_most, compared

LR = 1e-3
Step = Callable[[], object]
Batch = tuple[Tensor, Tensor]


def mlp(plan: Plan) -> list[Row]:
    """784-1024-1024-10, batch 128."""
    batch = (torch.randn(128, 784), torch.randint(10, (128,)))
    return _against_float(
        "training-mlp", "step, MLP 784-1024-1024-10, batch 128", _mlp, batch, 1.25, plan
    )


def vgg16(plan: Plan) -> list[Row]:
    """VGG16 for 32 x 32 images."""
    batch = (torch.randn(plan.vgg_batch, 3, 32, 32), torch.randint(10, (plan.vgg_batch,)))
    what = f"step, VGG16, 32x32 images, batch {plan.vgg_batch}"
    return _against_float("training-vgg16", what, _vgg16, batch, 1.08, plan)


def _against_float(
    benchmark: str,
    what: str,
    build: Callable[[], nn.Module],
    batch: Batch,
    bound: float,
    plan: Plan,
) -> list[Row]:
    plain = Contender("float32", _float_step(build(), batch))
    small = Contender("swalp small-block", _swalp_step(build(), batch, "paper-small-block-8"))
    big = Contender("swalp big-block", _swalp_step(build(), batch, "paper-big-block-8"))
    packed = Contender(
        "swalp small-block, packed", _swalp_step(build(), batch, "paper-small-block-8", packed=True)
    )
    rivals = [
        contender(name, functools.partial(load, build(), batch))
        for name, load in ((peers.EAGER, _eager_step), (peers.QPYTORCH, _qpytorch_step))
    ]
    times = interleave([plain, small, big, packed, *rivals], plan.rounds, seconds=plan.seconds)
    goals = [at_most(bound)] * 3 + [None] * len(rivals)
    return [
        compared(benchmark, what, times, entry, plain, "time ratio", goal)
        for entry, goal in zip([small, big, packed, *rivals], goals, strict=True)
    ]


def _step(model: nn.Module, optimizer: Any, batch: Batch) -> Step:
    """Forward, loss, backward, update, on the same batch every time."""
    x, y = batch

    def step() -> None:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]  # PyTorch ships no type
        optimizer.step()

    return step


def _float_step(model: nn.Module, batch: Batch) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    return _step(model, optimizer, batch)


def _swalp_step(model: nn.Module, batch: Batch, name: str, packed: bool = False) -> Step:
    recipe = swalp.recipes.get(name)
    model = swalp.convert(model, recipe, packed=packed)
    optimizer = swalp.optim.SGD(
        model.named_parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, recipe=recipe
    )
    return _step(model, optimizer, batch)


def _eager_step(model: nn.Module, batch: Batch) -> Step:
    # One exponent per tensor for activations and errors: what the published code does.
    _quantize_signals(model, lambda x: peers.eager_quantize(x, False))
    optimizer = peers.LowPrecisionSGD(list(model.parameters()), LR, peers.eager_quantize)
    return _step(model, optimizer, batch)


def _qpytorch_step(model: nn.Module, batch: Batch) -> Step:
    # One exponent per sample: what its example does.
    quantize = peers.qpytorch_quantize(optimized=False)
    _quantize_signals(model, lambda x: quantize(x, True))
    optimizer = peers.qpytorch_optimizer(list(model.parameters()), LR, quantize)
    return _step(model, optimizer, batch)


class _Signal(torch.autograd.Function):
    """A peer's quantizer on the way forward, and on the gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.quantize = quantize
        return quantize(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.quantize(gradient), None


def _quantize_signals(model: nn.Module, quantize: Callable[[Tensor], Tensor]) -> None:
    """At the input of every product layer but the first: where `swalp.convert` quantizes."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for layer in layers[1:]:
        layer.register_forward_pre_hook(
            lambda _module, inputs: (_Signal.apply(inputs[0], quantize),)  # type: ignore[no-untyped-call]  # as above
        )


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def _vgg16() -> nn.Module:
    """Thirteen 3 x 3 convolutions in five stages, and three linear layers of width 512."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for _ in range(2):
        layers += [nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))
