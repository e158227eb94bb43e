"""One optimizer step on ten million parameters: 8-bit SGD with momentum against float32's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

import swalp
from benchmarks import peers
from benchmarks.harness import Contender, contender, interleave
from benchmarks.plan import Plan
from benchmarks.records import Row, at_least, compared

RECIPE = swalp.recipes.get("paper-small-block-8")
WHOLE = swalp.recipes.get("native-8")  # one exponent for each tensor
# Small, so that hundreds of steps along one gradient leave the weights where they were.
LR = 1e-3
_GRADIENT_SCALE = 1e-3


def step(plan: Plan) -> list[Row]:
    """The fused step on packed weights and momentum against QPyTorch's and PyTorch's optimizers."""
    ours = Contender("swalp", packed(plan).step)
    others = [
        contender(peers.QPYTORCH, lambda: _qpytorch(plan, optimized=False)),
        contender(peers.QPYTORCH_O3, lambda: _qpytorch(plan, optimized=True)),
        Contender("eager quantizers around SGD", _eager(plan)),
        Contender("torch SGD(foreach)", plain(plan, foreach=True).step),
        Contender("torch SGD(fused)", plain(plan, fused=True).step),
    ]
    goals = [at_least(200), None, None, at_least(4), at_least(0.6)]
    times = interleave([ours, *others], plan.rounds, seconds=plan.seconds)
    count = plan.optimizer_tensors * plan.optimizer_width**2
    what = f"SGD step, {count / 1e6:.1f} M parameters in {plan.optimizer_tensors} tensors"
    return [
        compared("optimizer", what, times, ours, other, "speedup", goal,
                 {"parameters": count, "tensors": plan.optimizer_tensors})
        for other, goal in zip(others, goals, strict=True)
    ]  # fmt: skip


def large(plan: Plan) -> list[Row]:
    """Fused SGD and Adam on one tensor with one exponent against PyTorch's."""
    plan = replace(plan, optimizer_tensors=1, optimizer_width=math.isqrt(plan.elements))
    what = f"one tensor of {plan.optimizer_width**2 / 1e6:.1f} M parameters, one exponent"
    model = swalp.convert(_model(plan), WHOLE, packed=True)
    _with_gradients(model)
    adam = swalp.optim.Adam(model.named_parameters(), LR, recipe=WHOLE)
    rivals = {
        "SGD": (packed(plan, WHOLE).step, plain(plan, fused=True).step),
        "Adam": (adam.step, torch.optim.Adam(_with_gradients(_model(plan)), LR, fused=True).step),
    }
    rows = []
    for kind, steps in rivals.items():
        ours, theirs = Contender("swalp", steps[0]), Contender(f"torch {kind}(fused)", steps[1])
        times = interleave([ours, theirs], plan.rounds, seconds=plan.seconds)
        rows.append(
            compared("optimizer-large", f"{kind} step, {what}", times, ours, theirs, "time ratio")
        )
    return rows


def formats(plan: Plan) -> list[Row]:
    """SGD and Adam on packed weights of the recipes' formats against PyTorch's fused ones."""
    rows = []
    count = plan.optimizer_tensors * plan.optimizer_width**2
    adam = torch.optim.Adam(_with_gradients(_model(plan)), LR, fused=True)
    rivals = {
        "SGD": Contender("torch SGD(fused)", plain(plan, fused=True).step),
        "Adam": Contender("torch Adam(fused)", adam.step),
    }
    for name in ("paper-small-block-8", "native-8", "fp8", "mxint8", "mxfp8", "mxfp4"):
        recipe = swalp.recipes.get(name)
        model = swalp.convert(_model(plan), recipe, packed=True)
        _with_gradients(model)
        ours = {
            "SGD": packed(plan, recipe).step,
            "Adam": swalp.optim.Adam(model.named_parameters(), LR, recipe=recipe).step,
        }
        for kind, rival in rivals.items():
            mine = Contender("swalp", ours[kind])
            times = interleave([mine, rival], plan.rounds, seconds=plan.seconds)
            what = f"{kind} step, {name}, {count / 1e6:.1f} M parameters"
            rows.append(compared("optimizer-formats", what, times, mine, rival, "time ratio"))
    return rows


def _model(plan: Plan) -> nn.Sequential:
    width = plan.optimizer_width
    layers = [nn.Linear(width, width, bias=False) for _ in range(plan.optimizer_tensors)]
    return nn.Sequential(*layers)


def _with_gradients(model: nn.Module) -> list[nn.Parameter]:
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = _GRADIENT_SCALE * torch.randn(parameter.shape)
    return parameters


def packed(plan: Plan, recipe: swalp.recipes.Recipe = RECIPE) -> swalp.optim.SGD:
    """8-bit SGD over packed parameters that have gradients."""
    model = swalp.convert(_model(plan), recipe, packed=True)
    _with_gradients(model)
    return swalp.optim.SGD(
        model.named_parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, recipe=recipe
    )


def plain(plan: Plan, **options: bool) -> torch.optim.SGD:
    """PyTorch's SGD over float32 parameters that have gradients."""
    parameters = _with_gradients(_model(plan))
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=5e-4, **options)


def _qpytorch(plan: Plan, optimized: bool) -> Callable[[], object]:
    quantize = peers.qpytorch_quantize(optimized)
    optimizer = peers.qpytorch_optimizer(_with_gradients(_model(plan)), LR, quantize)
    step: Callable[[], object] = optimizer.step
    return step


def _eager(plan: Plan) -> Callable[[], object]:
    parameters = _with_gradients(_model(plan))
    return peers.LowPrecisionSGD(parameters, LR, peers.eager_quantize).step
