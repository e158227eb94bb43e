"""Where the time and the memory of a training step go, layer by layer."""

from __future__ import annotations

import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swalp.optim import SGD
from swalp.packed import PackedTensor
from swalp.packed_views import View
from swalp.quantize import api, dispatch
from swalp.training import loop
from swalp.training.augmentation import Draws
from swalp.training.config import RunConfig
from swalp.training.data import synthetic

BETWEEN = "(between layers)"  # sums of residuals, the loss, and what autograd does itself
WARM_UP = 2  # steps before any is timed
_CONVERTS = {  # between floats and codes: the outermost of them on the stack is timed
    function.__code__
    for function in (
        api.quantize,
        api.quantize_at,
        dispatch.run,
        dispatch.pack,
        dispatch.pack_integers,
        dispatch.unpack,
    )
}


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one layer costs in a step.

    Attributes:
        name: of the layer, or `BETWEEN`.
        kind: its class; of `BETWEEN` empty.
        parameter_bytes: of its parameters as they are held, packed or not.
        saved_bytes: of what it keeps for the backward pass beside its parameters and buffers;
            memory that several layers keep is the first one's.
        forward: seconds; the median of the steps, as of all times.
        backward: seconds, from the gradient of its output to that of the output before.
        optimizer: seconds for its parameters alone.
        quantizing: seconds of forward and backward spent between floats and codes.
    """

    name: str
    kind: str
    parameter_bytes: int
    saved_bytes: int
    forward: float
    backward: float
    optimizer: float
    quantizing: float


@dataclass(frozen=True, slots=True)
class ArmCost:
    """What a step costs an arm.

    Attributes:
        arm: "float" or the name of a recipe.
        layers: in order, then `BETWEEN`.
        loading: seconds to make a batch.
        forward: seconds of the whole pass, as a run has it: without looking at layers.
        backward: likewise.
        optimizer: likewise.
        state_bytes: of momentum.
    """

    arm: str
    layers: tuple[LayerCost, ...]
    loading: float
    forward: float
    backward: float
    optimizer: float
    state_bytes: int

    @property
    def step(self) -> float:
        """Seconds of loading, both passes and the optimizer."""
        return self.loading + self.forward + self.backward + self.optimizer

    def total(self, column: str) -> float:
        """The sum over layers of one of `LayerCost`'s numbers."""
        return float(sum(getattr(layer, column) for layer in self.layers))


@dataclass(slots=True)
class _Watch:
    """Charges time and memory to the layer at work."""

    names: dict[nn.Module, str]
    spent: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    saved: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    layer: str = BETWEEN
    part: str = "forward"
    since: float = 0.0

    def turn_to(self, layer: str) -> None:
        """Charge the time until now to the layer at work; from now on `layer` is."""
        now = time.perf_counter()
        self.spent[self.part, self.layer] += now - self.since
        self.layer, self.since = layer, now

    def begin(self, part: str) -> None:
        """Start the clock for another part of the step."""
        self.layer, self.part, self.since = BETWEEN, part, time.perf_counter()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Hooks on every layer, inside a ``with`` block."""
        handles: list[RemovableHandle] = []
        for module, name in self.names.items():
            handles += [
                module.register_forward_pre_hook(self._enter(name)),
                module.register_forward_hook(self._leave),
                module.register_full_backward_pre_hook(self._enter(name)),
            ]
        try:
            with warnings.catch_warnings():
                # Of the first layer, whose input needs none; only the hook before matters here.
                warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self.turn_to(name)

    def _leave(self, *_: object) -> None:
        self.turn_to(BETWEEN)


def profile(config: RunConfig, *, steps: int = 5) -> tuple[ArmCost, ...]:
    """Measure training steps of every arm of `config`, on random images of its data's shape.

    Args:
        config: a run; its batch size and threads apply.
        steps: timed ones, of which medians are taken.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        return tuple(_arm(config, arm, steps) for arm in config.arms)
    finally:
        torch.set_num_threads(before)


def _arm(config: RunConfig, arm: str, steps: int) -> ArmCost:
    data = synthetic(config.data, config.batch_size)
    run = loop.begin(config, data, arm, config.first_seed)
    names = _layers(run.model)
    rows = [torch.arange(config.batch_size)]
    draws = Draws(config.first_seed, 0) if config.augment else None
    whole: defaultdict[str, list[float]] = defaultdict(list)
    spent: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    saved: dict[str, int] = {}
    run.model.train()
    for number in range(WARM_UP + steps):
        began = time.perf_counter()
        x, y = next(data.train.batches(rows, draws))
        times = {"loading": time.perf_counter() - began, **_step(run.model, run.optimizer, x, y)}
        watched = _watched_step(run.model, run.optimizer, x, y, names)
        if number >= WARM_UP:
            for part, seconds in times.items():
                whole[part].append(seconds)
            for key, seconds in watched.spent.items():
                spent[key].append(seconds)
            saved = watched.saved
    state = [value for each in run.optimizer.state.values() for value in each.values()]
    return ArmCost(
        arm=arm,
        layers=tuple(
            LayerCost(
                name,
                "" if module is None else type(module).__name__,
                0 if module is None else sum(p.nbytes for p in module.parameters(recurse=False)),
                saved.get(name, 0),
                *(
                    median(spent[part, name]) if spent[part, name] else 0.0
                    for part in ("forward", "backward", "optimizer", "quantizing")
                ),
            )
            for module, name in [*names.items(), (None, BETWEEN)]
        ),
        state_bytes=sum(value.nbytes for value in state if isinstance(value, Tensor)),
        **{part: median(seconds) for part, seconds in whole.items()},
    )


def _layers(model: nn.Module) -> dict[nn.Module, str]:
    """Name and module of every layer, that is, every module without others inside."""
    return {module: name for name, module in model.named_modules() if not list(module.children())}


def _step(model: nn.Module, optimizer: SGD, x: Tensor, y: Tensor) -> dict[str, float]:
    """Seconds of the parts of a step."""
    optimizer.zero_grad()
    times = [time.perf_counter()]
    loss = nn.functional.cross_entropy(model(x), y)
    times.append(time.perf_counter())
    loss.backward()  # type: ignore[no-untyped-call]  # PyTorch ships no type
    times.append(time.perf_counter())
    optimizer.step()
    times.append(time.perf_counter())
    parts = zip(("forward", "backward", "optimizer"), times, times[1:], strict=False)
    return {part: end - start for part, start, end in parts}


def _watched_step(
    model: nn.Module, optimizer: SGD, x: Tensor, y: Tensor, names: dict[nn.Module, str]
) -> _Watch:
    """Two more steps with an eye on the layers: one for the parts, one for the conversions."""
    watch = _Watch(names)
    with watch.looking():
        for converting in (False, True):
            optimizer.zero_grad()
            kept = watch.spent.copy()
            with _conversions(watch) if converting else _saved(watch, model):
                watch.begin("forward")
                loss = nn.functional.cross_entropy(model(x), y)
                watch.turn_to(BETWEEN)
                watch.begin("backward")
                loss.backward()  # type: ignore[no-untyped-call]  # PyTorch ships no type
                watch.turn_to(BETWEEN)
            if converting:  # times under the tracer count for nothing else
                for key, seconds in kept.items():
                    watch.spent[key] = seconds
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    optimizer.zero_grad()
    for module, name in names.items():
        own = list(module.parameters(recurse=False))
        for parameter in own:
            parameter.grad = gradients[parameter]
        if own:
            watch.begin("optimizer")
            watch.layer = name
            optimizer.step()
            watch.turn_to(BETWEEN)
        for parameter in own:
            parameter.grad = None
    return watch


@contextmanager
def _saved(watch: _Watch, model: nn.Module) -> Iterator[None]:
    """Count the bytes that autograd keeps, inside a ``with`` block."""
    seen = set()
    for own in (*model.parameters(), *model.buffers()):
        held = own.codes if isinstance(own, PackedTensor) else own
        seen.add(held.untyped_storage().data_ptr())

    def keep(tensor: Tensor) -> Tensor:
        held = tensor.codes if isinstance(tensor, PackedTensor) else tensor
        storage = (held.floats if isinstance(held, View) else held).untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            watch.saved[watch.layer] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


@contextmanager
def _conversions(watch: _Watch) -> Iterator[None]:
    """Charge the time in `_CONVERTS` to the layers, inside a ``with`` block."""
    depth, since = 0, 0.0

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal depth, since
        if event not in ("call", "return") or frame.f_code not in _CONVERTS:
            return
        if event == "call":
            depth += 1
            if depth == 1:
                since = time.perf_counter()
        else:
            depth -= 1
            if depth == 0:
                watch.spent["quantizing", watch.layer] += time.perf_counter() - since

    before = sys.getprofile()
    sys.setprofile(trace)
    try:
        yield
    finally:
        sys.setprofile(before)
