"""The convolutions of VGG16 on integers: all three products, with all that is rounded for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import swalp
from benchmarks import process
from benchmarks.harness import Spread, interleave
from benchmarks.native import NATIVE, RECIPE
from benchmarks.plan import Plan
from benchmarks.records import Row, at_least, compared

# Channels in and out, height and width, and how many of VGG16's twelve 3 x 3 layers are so.
SHAPES = [
    (64, 64, 32, 1), (64, 128, 16, 1), (128, 128, 16, 1), (128, 256, 8, 1), (256, 256, 8, 2),
    (256, 512, 4, 1), (512, 512, 4, 2), (512, 512, 2, 3),
]  # fmt: skip
GOALS = {"float32": 2.4, "float32 channels-last": 2.0, "bfloat16 channels-last": 1.05}


def layers(plan: Plan) -> list[Row]:
    """Each shape, and the twelve together."""
    shapes = SHAPES if plan.vgg_batch == 128 else SHAPES[:2]
    rows: list[Row] = []
    total: dict[str, list[float]] = {name: [0.0] * plan.rounds for name in (NATIVE, *GOALS)}
    for inner, outer, size, count in shapes:
        calls = {
            name: f"passes({name!r}, {plan.vgg_batch}, {inner}, {outer}, {size})" for name in total
        }
        with process.contenders(__name__, calls, plan.threads) as contenders:
            times = interleave(contenders, plan.rounds)
        what = f"convolution {inner} to {outer}, {size}x{size}, batch {plan.vgg_batch}"
        ours, *theirs = contenders
        rows += [
            compared("native-convolutions", what, times, ours, peer, "speedup") for peer in theirs
        ]
        for name, seconds in times.items():
            total[name] = [
                before + count * now for before, now in zip(total[name], seconds, strict=True)
            ]
    what = f"the {sum(shape[3] for shape in shapes)} convolutions of VGG16, batch {plan.vgg_batch}"
    for peer, goal in GOALS.items():
        gains = [theirs / ours for ours, theirs in zip(total[NATIVE], total[peer], strict=True)]
        rows.append(
            Row(
                benchmark="native-convolutions", what=what, subject=NATIVE, peer=peer,
                measure="speedup", value=Spread.of(gains), goal=at_least(goal),
                subject_seconds=Spread.of(total[NATIVE]), peer_seconds=Spread.of(total[peer]),
                rounds=plan.rounds,
            )
        )  # fmt: skip
    return rows


def passes(name: str, batch: int, inner: int, outer: int, size: int) -> Callable[[], object]:
    """Forward and backward of one layer."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1))
    x, dy = torch.randn(batch, inner, size, size), torch.randn(batch, outer, size, size)
    dtype = torch.bfloat16 if name.startswith("bfloat16") else torch.float32
    last = name != "float32"
    order = torch.channels_last if last else torch.contiguous_format
    x, dy = (one.to(dtype).contiguous(memory_format=order) for one in (x, dy))
    if name == NATIVE:
        model = swalp.convert(model, RECIPE, packed=True)
    else:
        model = model.to(dtype).to(memory_format=order)  # type: ignore[call-overload]  # PyTorch's stub
    x.requires_grad_()

    def step() -> None:
        x.grad = None
        model.zero_grad()
        model(x).backward(dy)

    return step
