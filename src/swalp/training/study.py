"""A run: every arm from every seed, saved so that it can stop and go on anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from shlex import quote
from typing import Any

import torch
from torch import nn

from swalp import to_float
from swalp.averaging import Window
from swalp.training import (
    averages,
    checkpoint,
    deployment,
    diagnostics,
    environment,
    loop,
    summary,
)
from swalp.training.config import RunConfig
from swalp.training.data import Dataset, hold_out
from swalp.training.loop import Trajectory
from swalp.training.mistakes import UserError
from swalp.training.reading import Record
from swalp.training.run_directory import RunDirectory


class Stopped(Exception):  # noqa: N818  (not an error)
    """The run was asked to stop, and saved its state."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands, after a step.

    Attributes:
        arm: being trained.
        seed: likewise.
        epoch: being trained, from 1.
        step: steps taken in the whole run.
        steps: of the whole run.
        learning_rate: of the step.
        loss: of the step.
        record: the metrics, if an epoch has just ended.
    """

    arm: str
    seed: int
    epoch: int
    step: int
    steps: int
    learning_rate: float
    loss: float
    record: Record | None


def check(config: RunConfig, data: Dataset) -> None:
    """Raise UserError unless the settings fit the data."""
    data = hold_out(data, config.validation_examples)
    examples = len(data.train.labels)
    if config.batch_size > examples:
        raise UserError(
            f"batch_size = {config.batch_size} exceeds the {examples} training examples"
        )
    _require_iterates(config, loop.steps_per_epoch(config, data))


def check_networks(config: RunConfig, data: Dataset) -> None:
    """Raise UserError unless each arm can begin: the data fits the model, the recipe its layers."""
    data = hold_out(data, config.validation_examples)
    for arm in config.arms:
        loop.begin(config, data, arm, config.first_seed)


def train(
    run: RunDirectory,
    data: Dataset,
    *,
    watch: Callable[[Progress], None],
    say: Callable[[str], None],
    stop: Callable[[], bool],
    go_on: str = "",
) -> Record:
    """Go on with a run from its newest checkpoint, or begin it, and train to the end.

    Args:
        run: its directory, locked by the caller.
        data: as its settings say.
        watch: called after each step.
        say: called with a line that the user should see.
        stop: asked after each step; if true, the state is saved.
        go_on: the command that goes on with the run; default: where its data are at hand.

    Returns:
        The summary, which the caller passes to `RunDirectory.finish`.

    Raises:
        Stopped: `stop` said so.
        UserError: the settings are not those that the run began with; or the loss is not finite, or
            the disk fails, and the text names the last checkpoint.
    """
    config = run.config()
    run.require_settings(config)
    check(config, data)
    data = hold_out(data, config.validation_examples)
    began = environment.describe() | {"threads": config.threads, "began": _now()}
    for line in _changes(run, began):
        say(line)
    started = time.monotonic()
    outcome = "failed"
    try:
        run.append_session(began)
        with threads(config.threads):
            _train(run, config, data, watch, say, stop)
            result = summary.build(run, config, data)
        outcome = "finished"
        return result
    except Stopped:
        outcome = "stopped"
        raise
    except loop.NonFiniteLossError as error:
        raise UserError(
            f"{error}; {_last_checkpoint(run)}. Start anew with a smaller learning_rate"
        ) from None
    except OSError as error:
        raise UserError(
            f"{error.filename or run.path}: {error.strerror or error}; {_last_checkpoint(run)}. "
            f"Mend that and go on with: {go_on or f'swalp resume {quote(str(run.path))}'}"
        ) from None
    finally:
        seconds = round(time.monotonic() - started, 1)
        with suppress(OSError):  # if the disk failed, the user is being told that
            run.append_session({"ended": _now(), "seconds": seconds, "outcome": outcome})


def evaluate(run: RunDirectory, data: Dataset) -> Record:
    """The summary of a finished run with every error computed anew from the saved models.

    Raises:
        UserError: the run is not finished, or a model is missing or damaged.
    """
    config = run.config()
    run.require_settings(config)
    before = summary.read(run, config)
    data = hold_out(data, config.validation_examples)
    rows = []
    for row in before["rows"]:
        errors = []
        for number, sha256 in enumerate(row["sha256"]):
            seed = config.first_seed + number
            with threads(config.threads):
                model = saved_model(run, config, data, row, seed, sha256)
                errors.append(loop.error(model, data.test))
        rows.append(row | {"test_error": errors})
    return before | {"rows": rows}


def saved_model(
    run: RunDirectory, config: RunConfig, data: Dataset, row: Record, seed: int, sha256: str
) -> nn.Module:
    """The model of a row, for one seed, from its file."""
    arm, name = row["arm"], row["model"]
    model = loop.network(config, data, arm, seed)
    if name not in ("sgd", "last"):
        model = to_float(model)
    path = run.model_path(arm, seed, summary.file_of(name))
    model.load_state_dict(run.load_model(path, sha256))
    if name in deployment.MODELS:
        return deployment.deployed(model, config, arm, data, name, seed)
    return model


def _train(
    run: RunDirectory,
    config: RunConfig,
    data: Dataset,
    watch: Callable[[Progress], None],
    say: Callable[[str], None],
    stop: Callable[[], bool],
) -> None:
    trajectories = _trajectories(config)
    per_epoch = loop.steps_per_epoch(config, data)
    length = config.epochs * per_epoch
    first, saved = _resume(run, say)
    due = time.monotonic() + config.checkpoint_seconds
    for index in range(first, len(trajectories)):
        trajectory = loop.begin(config, data, *trajectories[index])
        if saved is not None:
            trajectory.load_state_dict(saved)
            saved = None
        for step in loop.train(trajectory, data, config):
            if step.record is not None:
                run.append_metrics(step.record)
                _save_models(run, config, trajectory, data, step.record)
            total = index * length + trajectory.step
            # Before the checkpoint: a run that goes on from it shows no earlier step again.
            watch(
                Progress(
                    trajectory.arm,
                    trajectory.seed,
                    (trajectory.step - 1) // per_epoch + 1,
                    total,
                    len(trajectories) * length,
                    trajectory.optimizer.param_groups[0]["lr"],
                    step.loss,
                    step.record,
                )
            )
            stopping = stop()
            if stopping or time.monotonic() >= due:
                size, sha256 = run.metrics_so_far()
                state = {
                    "trajectory": index,
                    "metrics_size": size,
                    "metrics_sha256": sha256,
                    "state": trajectory.state_dict(),
                }
                checkpoint.save(run.checkpoints, total, state, keep=config.keep_checkpoints)
                due = time.monotonic() + config.checkpoint_seconds
            if stopping:
                raise Stopped
        if trajectory.seed == config.first_seed:
            run.append_diagnostics(_diagnostics(trajectory, data, config))


def _diagnostics(trajectory: Trajectory, data: Dataset, config: RunConfig) -> Record:
    """What low precision does inside the network that was trained."""
    recipe = trajectory.optimizer.recipe
    rows = torch.arange(min(config.batch_size, len(data.train.labels)))
    x, y = next(data.train.batches([rows]))
    with loop.dropout_noise(trajectory):
        found = diagnostics.describe(
            trajectory.model,
            trajectory.optimizer,
            trajectory.average.module,
            x,
            y,
            recipe=recipe,
            seed=trajectory.seed,
        )
    return {"arm": trajectory.arm, "seed": trajectory.seed, **found}


def _require_iterates(config: RunConfig, per_epoch: int) -> None:
    """Raise UserError if an average of the run would take nothing, or fewer than its window."""
    for text in ("", *config.averages):
        setting = averages.parse(text or f"every={config.average_every}")
        start, every = setting.when(
            config.averaging_start, config.average_steps(per_epoch), per_epoch
        )
        steps = config.epochs * per_epoch
        taken = (steps - start) // every
        if taken < 1:
            raise UserError(
                f"{'average ' + repr(text) if text else 'the average'} takes nothing: it starts "
                f"after step {start} and takes every {every}th, but the run has {steps} steps"
            )
        if isinstance(setting.kind, Window) and setting.kind.length > taken:
            raise UserError(
                f"average {text!r}: the run takes {taken} iterates, fewer than its window of "
                f"{setting.kind.length}, for all of which there must be memory; give "
                f"window={taken} or less"
            )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch with that many threads, inside a ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _trajectories(config: RunConfig) -> list[tuple[str, int]]:
    """Arm and seed, in the order of training: all arms from one seed, then from the next."""
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    return [(arm, seed) for seed in seeds for arm in config.arms]


def _resume(run: RunDirectory, say: Callable[[str], None]) -> tuple[int, dict[str, Any] | None]:
    """Which trajectory to go on with, and its state; metrics end where the checkpoint was made."""
    loaded = checkpoint.load_newest(run.checkpoints)
    if loaded is None:
        run.truncate_metrics(0)
        return 0, None
    for line in loaded.damaged:
        say(f"{line}; going on from {loaded.path}")
    # An older checkpoint knows the size alone.
    run.truncate_metrics(loaded.state["metrics_size"], loaded.state.get("metrics_sha256"))
    return loaded.state["trajectory"], loaded.state["state"]


def _save_models(
    run: RunDirectory, config: RunConfig, trajectory: Trajectory, data: Dataset, record: Record
) -> None:
    """The models of the table that exist at the end of this epoch."""
    epoch = record["epoch"]
    found: dict[str, nn.Module] = {}
    if epoch == config.averaging_start:
        found["sgd"] = trajectory.model
    if epoch == config.epochs:
        found |= {"last": trajectory.model, "average": trajectory.average.module}
        for text, average in trajectory.averages.items():
            found[f"average {text}"] = average.module
    if record.get("average_validation_error") is not None:
        arm, seed = trajectory.arm, trajectory.seed
        if summary.best_epoch(summary.records(run)[arm, seed]) == epoch:
            found["best"] = trajectory.average.module
    for name, model in found.items():
        path = run.model_path(trajectory.arm, trajectory.seed, name)
        run.save_model(path, model.state_dict())


def _changes(run: RunDirectory, session: Record) -> list[str]:
    """One line for each thing that computes otherwise than when the run began."""
    sessions = run.sessions()
    return [
        f"this run began with {name} {sessions[0].get(name)}, and goes on with {session[name]}: it "
        f"may end otherwise, in the last bits, than an uninterrupted one"
        for name in environment.DECISIVE
        if sessions and sessions[0].get(name) != session[name]
    ]


def _last_checkpoint(run: RunDirectory) -> str:
    path = checkpoint.newest(run.checkpoints)
    return "no checkpoint was made yet" if path is None else f"the last good checkpoint is {path}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
