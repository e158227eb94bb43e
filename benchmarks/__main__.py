"""Measure, print, save: see `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import (
    environment,
    goals,
    memory,
    native,
    native_conv,
    optimizer,
    quantizers,
    records,
    report,
    sharing,
    startup,
    training,
)
from benchmarks.plan import FULL, QUICK, Plan
from benchmarks.records import Row

BENCHMARKS: dict[str, Callable[[Plan], list[Row]]] = {
    "quantize": quantizers.against_copy,
    "quantize-peers": quantizers.against_peers,
    "codes": quantizers.codes,
    "floats": quantizers.floats,
    "calls": quantizers.small_calls,
    "scaling": quantizers.scaling,
    "sharing": sharing.writes,
    "optimizer": optimizer.step,
    "optimizer-large": optimizer.large,
    "optimizer-formats": optimizer.formats,
    "memory": memory.held,
    "training-mlp": training.mlp,
    "training-vgg16": training.vgg16,
    "native-linear": native.linear,
    "native-mlp": native.network("native-mlp"),
    "native-wide": native.network("native-wide"),
    "native-block": native.network("native-block"),
    "native-vgg16": native.network("native-vgg16"),
    "native-transformers": native.transformers,
    "native-convolutions": native_conv.layers,
    "import": startup.import_time,
}
TRIAL = environment.ROOT / "runs" / "benchmarks"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    folder = options.out or (TRIAL if options.quick else goals.RESULTS)
    path = folder / "rows.jsonl"
    if not options.report:
        try:  # before the minutes of measuring
            folder.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            parser.error(f"cannot write {path}: {error.strerror}; choose another folder with --out")
    elif not path.is_file():
        parser.error(f"there is no {path} to report; choose a folder of results with --out")
    try:
        rows = records.load(path)
    except ValueError as error:
        parser.error(str(error))
    if options.report:
        _write(rows, folder)
        console.print(report.screen_table(rows))
        return
    measured: list[Row] = []
    status = 0
    try:
        for found in _measure(options.only or list(BENCHMARKS), options.quick, console):
            measured += found
            rows = records.merged(rows, found)
            records.save(rows, path)
    except KeyboardInterrupt:
        console.print("interrupted; what was measured before is kept")
        status = 130
    _write(rows, folder)
    console.print(report.screen_table(measured))
    console.print(f"{len(measured)} rows, a table and plots in {folder}")
    if status:
        sys.exit(status)


def _write(rows: Sequence[Row], folder: Path) -> None:
    """What is made of a folder's rows."""
    report.write(rows, folder)
    if folder.resolve() in goals.MACHINES.values():
        page = goals.page(goals.MACHINES, list(BENCHMARKS))
        goals.PAGE.write_text(page, encoding="utf-8")


def _measure(names: Sequence[str], quick: bool, console: Console) -> Iterator[list[Row]]:
    """The rows of one benchmark after another."""
    plan = QUICK if quick else FULL
    torch.set_num_threads(plan.threads)
    where = environment.describe(plan.threads)
    for name in names:
        torch.manual_seed(0)
        start = time.perf_counter()
        with console.status(f"measuring {name}"):
            rows = BENCHMARKS[name](plan)
        console.print(f"{name}: {time.perf_counter() - start:.0f} s")
        if quick:  # the goals are for the full sizes
            rows = [replace(row, quick=True, goal=None) for row in rows]
        yield [replace(row, environment=where) for row in rows]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Speed and size of swalp beside its peers: a table, rows and plots.",
    )
    parser.add_argument(
        "--only", action="append", choices=list(BENCHMARKS), metavar="NAME",
        help=f"measure this one, and keep the saved rows of the others; repeatable. "
        f"One of: {', '.join(BENCHMARKS)}",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="small sizes, three rounds, no goals, saved apart: to try the suite, not to quote",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for rows, table and plots (default: benchmarks/results; "
        "with --quick: runs/benchmarks)",
    )  # fmt: skip
    parser.add_argument(
        "--report", action="store_true",
        help="measure nothing; make table and plots from the saved rows",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    main()
