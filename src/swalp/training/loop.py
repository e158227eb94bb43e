"""The training loop of Algorithm 2: one arm, one seed, from any step to the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import swalp
from swalp.noise import stream_seed
from swalp.optim import SGD
from swalp.training import averages, deployment, models
from swalp.training.augmentation import Draws
from swalp.training.config import FLOAT, RunConfig
from swalp.training.data import Dataset, Images, epoch_order, evaluation_batches
from swalp.training.mistakes import UserError


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the text says where."""


@dataclass(slots=True)
class Trajectory:
    """Everything that one training run has at one moment.

    Attributes:
        arm: "float" or the name of a recipe.
        seed: of the initial weights, the order of the data and the noise.
        model: the iterate.
        optimizer: with its momentum.
        average: of the iterates since averaging started.
        averages: the further ones that the settings ask for, by their text.
        step: steps taken.
        loss_sum: of the steps taken in this epoch.
    """

    arm: str
    seed: int
    model: nn.Module
    optimizer: SGD
    average: swalp.WeightAverage
    averages: dict[str, swalp.WeightAverage] = field(default_factory=dict)
    step: int = 0
    loss_sum: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, bit for bit."""
        return {
            "arm": self.arm,
            "seed": self.seed,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "averages": {text: each.state_dict() for text, each in self.averages.items()},
            "noise": None if self.arm == FLOAT else swalp.noise_clock(self.model).state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state of the same arm and seed."""
        assert (self.arm, self.seed) == (state["arm"], state["seed"])
        self.step, self.loss_sum = state["step"], state["loss_sum"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        for text, each in self.averages.items():
            each.load_state_dict(state["averages"][text])
        if state["noise"] is not None:
            swalp.noise_clock(self.model).load_state_dict(state["noise"])


@dataclass(frozen=True, slots=True)
class Step:
    """What one step reports; `record` is a line of metrics at the end of an epoch, else None."""

    loss: float
    record: dict[str, Any] | None


def network(config: RunConfig, data: Dataset, arm: str, seed: int) -> nn.Module:
    """The untrained network of an arm, its weights in real low-precision storage."""
    channels, _, size = data.train.shape
    model = models.build(
        config.model,
        channels=channels,
        size=size,
        width=config.width,
        classes=data.classes,
        seed=seed,
    )
    recipe = config.recipe(arm)
    if recipe is None:
        return model
    packed = recipe.weight is not None and recipe.weight.format.bits <= 16
    try:
        return swalp.convert(model, recipe, seed=seed, packed=packed)
    except ValueError as error:
        raise UserError(f"arm {arm}: {error}") from None


def begin(config: RunConfig, data: Dataset, arm: str, seed: int) -> Trajectory:
    """A trajectory at step 0."""
    model = network(config, data, arm, seed)
    recipe = config.recipe(arm)
    optimizer = SGD(
        model,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        recipe=recipe,
        seed=seed,
    )
    per_epoch = steps_per_epoch(config, data)
    every = config.average_steps(per_epoch)
    average = swalp.WeightAverage(model, start=config.averaging_start * per_epoch, every=every)
    further = {
        text: averages.parse(text).begin(
            model,
            recipe,
            start=config.averaging_start,
            every=every,
            per_epoch=per_epoch,
            seed=seed,
        )
        for text in config.averages
    }
    return Trajectory(arm, seed, model, optimizer, average, further)


def steps_per_epoch(config: RunConfig, data: Dataset) -> int:
    """Full batches in an epoch; the examples left over, others in each epoch, wait for the next."""
    return len(data.train.labels) // config.batch_size


def train(run: Trajectory, data: Dataset, config: RunConfig) -> Iterator[Step]:
    """Train `run` from where it stands to the last epoch.

    Yields:
        After each step, when `run.state_dict()` is a state to go on from.

    Raises:
        NonFiniteLossError: the loss of a step is NaN or infinite; the step was not taken.
    """
    per_epoch = steps_per_epoch(config, data)
    rate = swalp.schedules.Published(
        start=config.averaging_start * per_epoch,
        learning_rate=config.learning_rate,
        averaging_rate=config.averaging_rate,
    )
    while run.step < config.epochs * per_epoch:
        epoch, place = divmod(run.step, per_epoch)
        order = epoch_order(len(data.train.labels), run.seed, epoch)
        rows = torch.split(order[: per_epoch * config.batch_size], config.batch_size)[place:]
        draws = Draws(run.seed, epoch) if config.augment else None
        for x, y in data.train.batches(rows, draws):
            yield _step(run, x, y, data, config, rate)


def _step(
    run: Trajectory,
    x: Tensor,
    y: Tensor,
    data: Dataset,
    config: RunConfig,
    rate: swalp.schedules.Schedule,
) -> Step:
    """One step of Algorithm 2, and the measurements if an epoch ends with it."""
    per_epoch = steps_per_epoch(config, data)
    epoch = run.step // per_epoch
    for group in run.optimizer.param_groups:
        group["lr"] = rate(run.step)

    run.model.train()
    with dropout_noise(run):
        loss = nn.functional.cross_entropy(run.model(x), y)
    value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"the loss is {value} at step {run.step + 1} (epoch {epoch + 1}) of arm "
            f"{run.arm!r}, seed {run.seed}; {_first_non_finite(run.model, x)}"
        )
    run.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # PyTorch ships no type
    run.optimizer.step()
    run.average.update_parameters(run.model)
    for each in run.averages.values():
        each.update_parameters(run.model)
    run.step += 1
    run.loss_sum += value

    record = None
    if run.step % per_epoch == 0:
        record = {
            "arm": run.arm,
            "seed": run.seed,
            "epoch": epoch + 1,
            "step": run.step,
            "learning_rate": group["lr"],
            "train_loss": run.loss_sum / per_epoch,
            **_errors(run, data, config, last=epoch + 1 == config.epochs),
        }
        run.loss_sum = 0.0
    return Step(value, record)


@contextmanager
def dropout_noise(run: Trajectory) -> Iterator[None]:
    """PyTorch's generator, from which dropout draws, as a function of seed and step alone."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(stream_seed(run.seed, "dropout", str(run.step)))
    try:
        yield
    finally:
        generator.set_state(before)


def _errors(run: Trajectory, data: Dataset, config: RunConfig, *, last: bool) -> dict[str, Any]:
    """The errors (%) of the iterate and of its averages at the end of an epoch."""
    found: dict[str, Any] = {
        "test_error": error(run.model, data.test),
        "average_error": None,
        "averaged": run.average.count,
    }
    if data.validation is not None:
        found["validation_error"] = error(run.model, data.validation)
        found["average_validation_error"] = None
    if run.average.count > 0:
        average = averaged_model(run.average, config, data, run.seed)
        found["average_error"] = error(average, data.test)
        if data.validation is not None:
            found["average_validation_error"] = error(average, data.validation)
        if last:
            for name in deployment.MODELS:
                model = deployment.deployed(average, config, run.arm, data, name, run.seed)
                found[f"{name}_error"] = error(model, data.test)
    for text, each in run.averages.items():
        if each.count > 0:
            model = averaged_model(each, config, data, run.seed)
            found.setdefault("averages", {})[text] = {
                "error": error(model, data.test),
                "averaged": averages.held(each),
            }
    return found


def averaged_model(
    average: swalp.WeightAverage, config: RunConfig, data: Dataset, seed: int
) -> nn.Module:
    """The averaged network in float, its batch-norm statistics recomputed."""
    deployment.recompute_batchnorm(average.module, config, data, seed)
    return average.module


@torch.no_grad()
def error(model: nn.Module, images: Images) -> float:
    """The share of examples that `model` gets wrong, in %."""
    model.eval()
    wrong = sum(int((model(x).argmax(1) != y).sum()) for x, y in evaluation_batches(images))
    return 100 * wrong / len(images.labels)


def sizes(config: RunConfig, data: Dataset, arm: str) -> dict[str, int]:
    """Bytes really held by an arm, measured after a step.

    Returns:
        "iterate_bytes" and "average_bytes", of the model's parameters and buffers;
        "training_bytes", of parameters and what the optimizer keeps; "averaging_bytes", of what
        averaging keeps beside them; "quantized_bytes", of the exported model;
        "averaging_bytes TEXT", of each further average.
    """
    run = begin(config, data, arm, config.first_seed)
    next(train(run, data, config))
    kept = [value for state in run.optimizer.state.values() for value in state.values()]
    further = {f"averaging_bytes {text}": each.nbytes for text, each in run.averages.items()}
    return {
        "iterate_bytes": _bytes(run.model.state_dict().values()),
        "average_bytes": _bytes(swalp.to_float(run.model).state_dict().values()),
        "training_bytes": _bytes(run.model.parameters()) + _bytes(kept),
        "averaging_bytes": run.average.nbytes,
        "quantized_bytes": deployment.stored_bytes(run.model, config),
        **further,
    }


def _bytes(values: Iterable[object]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _first_non_finite(model: nn.Module, x: Tensor) -> str:
    """Which layer's output, or which parameter, is the first that is not finite."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.detach().isfinite().all()):
            return f"parameter {name!r} is not finite"
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if not found and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(look(name))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return f"layer {found[0]!r} is the first whose output is not finite" if found else "in the loss"
