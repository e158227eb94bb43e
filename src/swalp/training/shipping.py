"""`swalp export`: a run's average, quantized, as a file, with its error measured."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import swalp
from swalp import parse_format
from swalp.durable import write_file
from swalp.export import MissingPackageError, graph, weights
from swalp.training import deployment, loop, study, summary
from swalp.training.config import FLOAT, RunConfig, weight_format
from swalp.training.data import Dataset, evaluation_batches, hold_out
from swalp.training.mistakes import UserError
from swalp.training.reading import Record
from swalp.training.run_directory import RunDirectory

ONNX = "onnx"
_CALIBRATION = 1000  # training images


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and what it costs.

    Attributes:
        path: of the file.
        nbytes: of the file.
        float_bytes: of the float average's parameters and buffers.
        errors: test error, %, by what computed it.
    """

    path: Path
    nbytes: int
    float_bytes: int
    errors: dict[str, float]


def export(
    run: RunDirectory,
    data: Dataset,
    *,
    fmt: str,
    arm: str | None = None,
    seed: int | None = None,
    model: str = "average",
    activations: bool = False,
    out: Path | None = None,
) -> Exported:
    """Write the average of a finished run with quantized weights.

    Args:
        run: a finished run.
        data: as its settings say: batch norm is fitted to the quantized weights, and errors are
            measured.
        fmt: of the weights, such as "bfp8", in a safetensors file; or "onnx": a graph, with weights
            in the run's `export_format`.
        arm: default: the first in low precision.
        seed: default: the run's first.
        model: "average", "best", or "average TEXT" for a further one.
        activations: ONNX: quantize what enters each product too.
        out: the file, which must not be there; default: in the run's directory.

    Raises:
        UserError: an argument does not fit the run, a package is missing, or the file cannot be
            written; then there is none.
    """
    config = run.config()
    run.require_settings(config)
    rows = summary.read(run, config)["rows"]
    data = hold_out(data, config.validation_examples)
    arm = arm or next((each for each in config.arms if each != FLOAT), config.arms[0])
    seed = config.first_seed if seed is None else seed
    row = _row(rows, config, arm, seed, model)
    onnx = fmt == ONNX
    if activations and not onnx:
        raise UserError(
            "--activations is for --format onnx: a file of weights holds no activations"
        )
    if not onnx:
        config = config.model_copy(update={"export_format": _format(fmt)})
    path = out or _default(run, arm, seed, model, _kind(config, onnx, activations))
    if path.exists():
        raise UserError(f"{path}: is there already; choose another file with --out")
    with study.threads(config.threads):
        average = study.saved_model(
            run, config, data, row, seed, row["sha256"][seed - config.first_seed]
        )
        quantized = swalp.to_float(
            deployment.deployed(average, config, arm, data, "quantized", seed)
        )
        errors = {
            "float average": loop.error(average, data.test),
            f"quantized to {config.export_format}": loop.error(quantized, data.test),
        }
        content = _content(quantized, config, data, onnx, activations)
        _write(path, content)
        if onnx and importlib.util.find_spec("onnxruntime") is not None:
            errors["onnxruntime"] = _runtime_error(path, data)
        elif not onnx:
            quantized.load_state_dict(weights.load_quantized(path))
            errors["the file, read back"] = loop.error(quantized, data.test)
    size = sum(value.nbytes for value in average.state_dict().values())
    return Exported(path, len(content), size, errors)


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write {len(content):,} bytes: {error.strerror or error}; "
            f"choose another place with --out"
        ) from None


def _content(
    quantized: nn.Module, config: RunConfig, data: Dataset, onnx: bool, activations: bool
) -> bytes:
    fmt = parse_format(config.export_format)
    try:
        if not onnx:
            return weights.to_bytes(quantized, fmt)
        few = data.train.between(0, min(_CALIBRATION, len(data.train.labels)))
        inputs = [x for x, _ in evaluation_batches(few)]
        return graph.to_bytes(
            quantized, fmt, inputs[0][:2], calibration=inputs if activations else None
        )
    except (MissingPackageError, ValueError) as error:
        raise UserError(str(error)) from None


def _runtime_error(path: Path, data: Dataset) -> float:
    """The test error, %, of the file as `onnxruntime` runs it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    class Runtime(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])

    return loop.error(Runtime(), data.test)


def _row(rows: list[Record], config: RunConfig, arm: str, seed: int, model: str) -> Record:
    averages = [str(row["model"]) for row in rows if row["arm"] == config.arms[0]]
    averages = [each for each in averages if each.split(" ")[0] in ("average", "best")]
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    for name, value, allowed in (
        ("--arm", arm, list(config.arms)),
        ("--seed", seed, list(seeds)),
        ("--average", model, averages),
    ):
        if value not in allowed:
            shown = ", ".join(str(each).removeprefix("average ") for each in allowed)
            given = str(value).removeprefix("average ")
            raise UserError(f"{name} {given}: this run has {shown}")
    return next(row for row in rows if (row["arm"], row["model"]) == (arm, model))


def _format(text: str) -> str:
    try:
        return weight_format(text)
    except ValueError as error:
        raise UserError(f"--format {text}: {error}; or onnx") from None


def _default(run: RunDirectory, arm: str, seed: int, model: str, kind: str) -> Path:
    saved = run.model_path(arm, seed, model)
    return saved.with_name(saved.stem + kind)


def _kind(config: RunConfig, onnx: bool, activations: bool) -> str:
    """How the file's name ends: what differs in content differs in name."""
    if onnx:
        return "-activations.onnx" if activations else ".onnx"
    return f"-{config.export_format}.safetensors"
