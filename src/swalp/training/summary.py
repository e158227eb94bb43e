"""The rows of a run's table, from its records: each model of each arm, over all seeds."""

from __future__ import annotations

import hashlib
from typing import Any

from swalp.training import deployment, loop
from swalp.training.config import RunConfig
from swalp.training.data import Dataset
from swalp.training.mistakes import UserError
from swalp.training.reading import Record
from swalp.training.run_directory import RunDirectory

_FURTHER = "average "  # and the text of its setting


def models(config: RunConfig) -> list[str]:
    """What the rows of an arm are called.

    "sgd", the iterate where averaging starts; "last", the last iterate; "average"; "best", the
    average of the epoch that held-out examples choose, if there are such; the quantized averages of
    `deployment.MODELS`; "average TEXT" for each of the further averages.
    """
    best = ["best"] if config.validation_examples else []
    further = [f"{_FURTHER}{text}" for text in config.averages]
    return ["sgd", "last", "average", *best, *deployment.MODELS, *further]


def read(run: RunDirectory, config: RunConfig) -> Record:
    """What `build` made.

    Raises:
        UserError: the run is not finished, or the file is damaged.
    """
    found = run.summary()
    rows = found.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{run.summary_path}: damaged: it has no rows")
    known = [(arm, model) for arm in config.arms for model in models(config)]
    pairs = [(row.get("arm"), row.get("model")) for row in rows]
    for arm in config.arms:
        for model in ("sgd", "last", "average"):
            if (arm, model) not in pairs:
                raise UserError(f"{run.summary_path}: damaged: it has no row of {arm}, {model}")
    for row, (arm, model) in zip(rows, pairs, strict=True):
        if (arm, model) not in known:
            raise UserError(f"{run.summary_path}: damaged: {arm}, {model} is not of this run")
        for key, kind in (("test_error", float), ("sha256", str)):
            values = row.get(key)
            if not isinstance(values, list) or list(map(type, values)) != [kind] * config.seeds:
                raise UserError(
                    f"{run.summary_path}: damaged: {key} of {arm}, {model} must be a value for "
                    f"each of {config.seeds} seeds"
                )
        for key in ("model_bytes", "training_bytes", "averaging_bytes"):
            if type(row.get(key)) is not int:
                raise UserError(
                    f"{run.summary_path}: damaged: {key} of {arm}, {model} must be an integer"
                )
    for key in ("train_examples", "test_examples"):
        if type(found.get(key)) is not int:
            raise UserError(f"{run.summary_path}: damaged: {key} must be a number of examples")
    return found


def file_of(model: str) -> str:
    """The saved model that a row is computed from."""
    return "average" if model in deployment.MODELS else model


def records(run: RunDirectory) -> dict[tuple[str, int], list[Record]]:
    """The metrics of each arm and seed, epoch by epoch."""
    found: dict[tuple[str, int], list[Record]] = {}
    for record in run.metrics():
        found.setdefault((record["arm"], record["seed"]), []).append(record)
    return found


def best_epoch(epochs: list[Record]) -> int:
    """The first epoch at which the average had its lowest error on held-out examples."""
    tried = [row for row in epochs if row["average_validation_error"] is not None]
    best = min(tried, key=lambda row: (row["average_validation_error"], row["epoch"]))
    return int(best["epoch"])


def build(run: RunDirectory, config: RunConfig, data: Dataset) -> Record:
    """The summary of a run whose training has ended."""
    metrics = records(run)
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    rows = []
    for arm in config.arms:
        sizes = loop.sizes(config, data, arm)
        epochs = [metrics[arm, seed] for seed in seeds]
        for model in models(config):
            files = [run.model_path(arm, seed, file_of(model)) for seed in seeds]
            rows.append(
                {
                    "arm": arm,
                    "model": model,
                    "test_error": [_error(config, model, each) for each in epochs],
                    "model_bytes": sizes[_size(model)],
                    "training_bytes": sizes["training_bytes"],
                    "averaging_bytes": _averaging_bytes(sizes, model),
                    "sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
                    **_details(config, arm, model, epochs),
                }
            )
    return {
        "data": config.data,
        "train_examples": len(data.train.labels),
        "test_examples": len(data.test.labels),
        "validation_examples": config.validation_examples,
        "rows": rows,
    }


def _error(config: RunConfig, model: str, epochs: list[Record]) -> float:
    """The test error of a model of one arm and seed, from its records."""
    epoch = config.averaging_start if model == "sgd" else config.epochs
    if model == "best":
        epoch = best_epoch(epochs)
    record = next(record for record in epochs if record["epoch"] == epoch)
    if model.startswith(_FURTHER):
        return float(record["averages"][model.removeprefix(_FURTHER)]["error"])
    key = {"sgd": "test_error", "last": "test_error", "best": "average_error"}
    return float(record[key.get(model, f"{model}_error")])


def _size(model: str) -> str:
    if model in ("sgd", "last"):
        return "iterate_bytes"
    return "quantized_bytes" if model in deployment.MODELS else "average_bytes"


def _averaging_bytes(sizes: dict[str, int], model: str) -> int:
    """What averaging keeps beside the iterate, to get that model."""
    if model in ("sgd", "last"):
        return 0
    text = model.removeprefix(_FURTHER)
    return sizes["averaging_bytes" if text == model else f"averaging_bytes {text}"]


def _details(config: RunConfig, arm: str, model: str, epochs: list[list[Record]]) -> dict[str, Any]:
    """What only some rows have: the epochs chosen, formats, iterates in a further average."""
    if model == "best":
        return {"epochs": [best_epoch(each) for each in epochs]}
    if model in deployment.MODELS:
        formats = deployment.recipe(config, arm, model)
        return {
            role: None if quantizer is None else str(quantizer.format)
            for role, quantizer in (
                ("weight", formats.weight),
                ("activation", formats.activation),
            )
        }
    if model.startswith(_FURTHER):
        text = model.removeprefix(_FURTHER)
        taken = [each[-1]["averages"][text]["averaged"] for each in epochs]
        return {"average": text, "averaged": taken}
    return {}
