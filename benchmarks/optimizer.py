"""One optimizer step on ten million parameters: 8-bit SGD with momentum against float32's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import swalp
from benchmarks import peers
from benchmarks.harness import Contender, Spread, contender, interleave
from benchmarks.plan import Plan
from benchmarks.records import Row, at_least, at_most, compared

RECIPE = swalp.recipes.get("paper-small-block-8")
# Small, so that hundreds of steps along one gradient leave the weights where they were.
LR = 1e-3
_GRADIENT_SCALE = 1e-3


def step(plan: Plan) -> list[Row]:
    """The fused step on packed weights and momentum against QPyTorch's and PyTorch's optimizers."""
    ours = Contender("swalp", _packed(plan).step)
    others = [
        contender(peers.QPYTORCH, lambda: _qpytorch(plan, optimized=False)),
        contender(peers.QPYTORCH_O3, lambda: _qpytorch(plan, optimized=True)),
        Contender("eager quantizers around SGD", _eager(plan)),
        Contender("torch SGD(foreach)", _torch(plan, foreach=True).step),
        Contender("torch SGD(fused)", _torch(plan, fused=True).step),
    ]
    goals = [at_least(200), None, None, at_least(4), at_least(0.6)]
    times = interleave([ours, *others], plan.rounds)
    count = plan.optimizer_tensors * plan.optimizer_width**2
    what = f"SGD step, {count / 1e6:.1f} M parameters in {plan.optimizer_tensors} tensors"
    return [
        compared("optimizer", what, times, ours, other, "speedup", goal,
                 {"parameters": count, "tensors": plan.optimizer_tensors})
        for other, goal in zip(others, goals, strict=True)
    ]  # fmt: skip


def memory(plan: Plan) -> list[Row]:
    """Bytes held for weights and momentum after a step, gradients aside."""
    packed, plain = _packed(plan), _torch(plan)
    packed.step()
    plain.step()
    ours, theirs = held_bytes(packed), held_bytes(plain)
    return [
        Row(
            benchmark="memory",
            what="weights and momentum",
            peer="float32",
            measure="bytes ratio",
            value=Spread.of([ours / theirs]),
            goal=at_most(0.26),
            rounds=1,
            details={"bytes": ours, "peer_bytes": theirs},
        )
    ]


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the memory blocks behind parameters and state, each counted once and whole."""
    blocks: dict[int, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for tensor in _tensors([parameter, *optimizer.state[parameter].values()]):
                storage = tensor.untyped_storage()
                blocks[storage.data_ptr()] = storage.nbytes()
    return sum(blocks.values())


def _tensors(values: list[Any]) -> list[Tensor]:
    """The plain tensors that hold the tensors among `values`."""
    plain = []
    for value in values:
        if isinstance(value, swalp.PackedTensor):
            plain += [part for part in (value.codes, value.exponents) if part is not None]
        elif isinstance(value, Tensor):
            plain.append(value)
    return plain


def _model(plan: Plan) -> nn.Sequential:
    width = plan.optimizer_width
    layers = [nn.Linear(width, width, bias=False) for _ in range(plan.optimizer_tensors)]
    return nn.Sequential(*layers)


def _with_gradients(model: nn.Module) -> list[nn.Parameter]:
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = _GRADIENT_SCALE * torch.randn(parameter.shape)
    return parameters


def _packed(plan: Plan) -> swalp.optim.SGD:
    model = swalp.convert(_model(plan), RECIPE, packed=True)
    _with_gradients(model)
    return swalp.optim.SGD(
        model.named_parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, recipe=RECIPE
    )


def _torch(plan: Plan, **options: bool) -> torch.optim.SGD:
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
