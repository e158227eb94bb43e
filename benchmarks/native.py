"""Training on integers: time and peak memory of a step against float32 and bfloat16 autocast."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import swalp
from benchmarks import peers, process
from benchmarks.harness import Spread, Times, interleave
from benchmarks.plan import Plan
from benchmarks.records import Goal, Row, at_least, at_most, compared
from benchmarks.training import _vgg16

RECIPE = swalp.recipes.get("native-8")
LR = 1e-3
STEPS = 3  # of which the peak is taken, in a process of its own
PROCESSES = 9  # of those: in float32 the peak of the smaller MLP is 36 to 52 MB, as it comes
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # PyTorch's large tensors go back to the system
# Small native steps depend on where the processors lie (`sharing`), which may change by the minute.
_LONGER = 3
# In training a step follows another, for long.
_TURN = 0.5
_TRANSFORMERS = ("encoder", "small")
Step = Callable[[], object]

FLOAT, LAST, BFLOAT, NATIVE = (
    "float32", "float32 channels-last", "bfloat16 autocast", "swalp native"
)  # fmt: skip


class Block(nn.Module):
    """A block of GPT-2: causal attention and a perceptron, each behind a norm and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation = nn.GELU(approximate="tanh")
        # PyTorch's own has no such setting; ours, converted, has.
        self.activation.inplace = True  # type: ignore[assignment]  # no tensor, no module

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        x = x + self.attention(self.norm1(x))
        y: Tensor = self.down(self.activation(self.up(self.norm2(x))))
        return x + y

    def attention(self, x: Tensor) -> Tensor:
        """Apart, so that queries, keys and values are gone, unless kept, when it is over."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def _mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _loss(y: Tensor, target: Tensor | None) -> Tensor:
    return y.square().mean() if target is None else F.cross_entropy(y, target)


class Work:
    """A network with a batch: what it is, how to build it, what its native step should reach."""

    def __init__(
        self,
        what: str,
        build: Callable[[], nn.Module],
        shape: tuple[int, ...],
        goals: dict[str, float],
        classes: int | None = 10,
    ) -> None:
        self.what, self.build, self.shape, self.goals = what, build, shape, goals
        self.classes = classes

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """Inputs and labels."""
        target = None if self.classes is None else torch.randint(self.classes, self.shape[:1])
        return torch.randn(self.shape), target

    def step(self, kind: str) -> Step:
        """A training step of that kind: forward, loss, backward, update."""
        if kind == peers.TORCHAO:
            return _torchao_step(self)
        torch.manual_seed(0)
        x, target = self.batch()
        model = self.build()
        if kind == NATIVE:
            model = swalp.convert(model, RECIPE, packed=True)
            optimizer: Any = swalp.optim.SGD(
                model.named_parameters(), lr=LR, momentum=0.9, recipe=RECIPE
            )
            optimizer.consume_gradients()
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        if kind == LAST:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's stub
        if kind in (LAST, BFLOAT) and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == BFLOAT):
                loss = _loss(model(x), target)
            loss.backward()  # type: ignore[no-untyped-call]  # PyTorch ships no type
            optimizer.step()

        return step


def works(plan: Plan) -> dict[str, Work]:
    """The networks measured, by the names of their benchmarks, or of `_TRANSFORMERS`."""
    large = plan.vgg_batch == 128
    rows, wide, images = (512, 2048, 128) if large else (64, 64, 8)
    count, short = (8, 32) if large else (1, 2)
    return {
        "native-mlp": Work(
            f"MLP 784-1024-1024-10, batch {rows}", lambda: _mlp(784, 1024, 1024, 10), (rows, 784),
            {FLOAT: 3.1, BFLOAT: 1.5},
        ),
        "native-wide": Work(
            f"MLP 784-2048-2048-10, batch {wide}", lambda: _mlp(784, 2048, 2048, 10), (wide, 784),
            {FLOAT: 3.7, BFLOAT: 1.7},
        ),
        "native-block": Work(
            f"GPT-2 block, 768 wide, 12 heads, 512 tokens x {count}",
            lambda: Block(768, 12), (count, 512, 768), {FLOAT: 2.5, BFLOAT: 1.4}, None,
        ),
        "native-vgg16": Work(
            f"VGG16, 32x32 images, batch {images}", _vgg16, (images, 3, 32, 32),
            {FLOAT: 2.4, LAST: 2.0, BFLOAT: 1.05},
        ),
        "encoder": Work(
            f"encoder layer of PyTorch's, 768 wide, 12 heads, 512 tokens x {count}",
            lambda: nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True),
            (count, 512, 768), {}, None,
        ),
        "small": Work(
            f"4 GPT-2 blocks, 128 wide, 4 heads, 64 tokens x {short}",
            lambda: nn.Sequential(*(Block(128, 4) for _ in range(4))), (short, 64, 128), {}, None,
        ),
    }  # fmt: skip


def network(name: str) -> Callable[[Plan], list[Row]]:
    """The benchmark of one of `works`: speed against each peer, and peak bytes."""

    def measure(plan: Plan) -> list[Row]:
        work = works(plan)[name]
        kinds = [NATIVE, *work.goals]
        what = f"step, {work.what}"
        steps = _steps(name, (*kinds, peers.TORCHAO), plan)
        times, rows = _against(name, what, steps, work.goals, plan)
        what = f"peak memory of {what}"
        # Whose time was not worth a second turn would take minutes for this, too.
        patient = [kind for kind in kinds if kind == FLOAT or len(times[kind]) > 1]
        peaks = _peaks(name, patient, plan, {})
        for peer in patient[1:]:
            goal = at_most(0.35) if peer == FLOAT else None
            rows.append(_peak_row(name, what, peer, peaks, goal))
        peaks = _peaks(name, [NATIVE, FLOAT], plan, HUGE_PAGES)
        setting = " ".join(f"{key}={value}" for key, value in HUGE_PAGES.items())
        return [*rows, _peak_row(name, f"{what}, {setting}", FLOAT, peaks, None)]

    return measure


def _steps(name: str, kinds: Sequence[str], plan: Plan) -> dict[str, str]:
    """Calls that make a step of one of `works`, by their kinds."""
    return {kind: f"works({plan!r})[{name!r}].step({kind!r})" for kind in kinds}


def _against(
    benchmark: str, what: str, calls: dict[str, str], goals: dict[str, float], plan: Plan
) -> tuple[Times, list[Row]]:
    """What native passes or steps take, and other kinds of them, and our speed against each.

    Each has a process of its own: whoever trains in float32 has PyTorch's memory, and not ours.
    """
    with process.contenders(__name__, calls, plan.threads) as found:
        times = interleave(found, plan.rounds, seconds=_LONGER * plan.seconds, turn=_TURN)
    ours, *theirs = found
    return times, [
        compared(
            benchmark, what, times, ours, peer, "speedup",
            at_least(goals[peer.name]) if peer.name in goals else None,
        )
        for peer in theirs
    ]  # fmt: skip


def _peaks(
    name: str, kinds: list[str], plan: Plan, environment: dict[str, str]
) -> dict[str, list[float]]:
    """Peaks of several processes each: what the C library keeps differs from one to the next."""
    turns = range(min(plan.rounds, PROCESSES))
    return {
        kind: [
            process.result(__name__, f"peak({name!r}, {kind!r}, {plan!r})", environment)
            for _ in turns
        ]
        for kind in kinds
    }


def _peak_row(
    name: str, what: str, peer: str, peaks: dict[str, list[float]], goal: Goal | None
) -> Row:
    ours, theirs = peaks[NATIVE], peaks[peer]
    return Row(
        benchmark=name, what=what, subject=NATIVE, peer=peer, measure="bytes ratio", goal=goal,
        rounds=len(ours), value=Spread.of([a / b for a, b in zip(ours, theirs, strict=True)]),
        details={
            "bytes": int(statistics.median(ours)), "peer_bytes": int(statistics.median(theirs))
        },
    )  # fmt: skip


def transformers(plan: Plan) -> list[Row]:
    """Steps of PyTorch's own encoder layer, and of a small GPT, whose kernels are short."""
    rows = []
    for name in _TRANSFORMERS:
        what, steps = f"step, {works(plan)[name].what}", _steps(name, (NATIVE, FLOAT, BFLOAT), plan)
        rows += _against("native-transformers", what, steps, {}, plan)[1]
    return rows


def linear(plan: Plan) -> list[Row]:
    """All three products of a linear layer 1024 wide, with all that is rounded for them."""
    rows = []
    for count in (512, 1024, 4096) if plan.vgg_batch == 128 else (64,):
        what = f"linear layer {count} x 1024 x 1024, forward and backward"
        calls = {kind: f"passes({count}, {kind!r})" for kind in (NATIVE, FLOAT, BFLOAT)}
        rows += _against("native-linear", what, calls, {FLOAT: 3.8, BFLOAT: 1.8}, plan)[1]
    return rows


def passes(count: int, kind: str) -> Step:
    """Those of that linear layer, for so many rows."""
    torch.manual_seed(0)
    x, dy = torch.randn(count, 1024, requires_grad=True), torch.randn(count, 1024)
    layer: nn.Module = nn.Sequential(nn.Linear(1024, 1024))
    if kind == NATIVE:
        layer = swalp.convert(layer, RECIPE, packed=True)
    if kind == BFLOAT:
        dy = dy.bfloat16()

    def step() -> None:
        x.grad = None
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == BFLOAT):
            y = layer(x)
        y.backward(dy)

    return step


def _torchao_step(work: Work) -> Step:
    """Mixed int8 training of torchao's linear layers."""
    quantize, config = peers.torchao_int8_training()
    torch.manual_seed(0)
    x, target = work.batch()
    model = work.build()
    quantize(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        _loss(model(x), target).backward()  # type: ignore[no-untyped-call]  # PyTorch ships no type
        optimizer.step()

    peers.check_runs(step)
    return step


def peak(name: str, kind: str, plan: Plan) -> float:
    """Bytes by which this process grows at most, in steps after the first, beyond the batch."""
    torch.set_num_threads(plan.threads)
    warm = Work("", lambda: _mlp(8, 8, 8), (4, 8), {}, None)
    for _ in range(2):
        warm.step(kind)()  # what is loaded or allocated only once
    work = works(plan)[name]
    batch = work.batch()  # as large as the one that the step holds
    before = process.resident_bytes()
    del batch
    step = work.step(kind)
    step()
    process.resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    for _ in range(STEPS):
        step()
    status = Path("/proc/self/status").read_text()
    mark = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(mark.split()[1]) * 1024 - before
