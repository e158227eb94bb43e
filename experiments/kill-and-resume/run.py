"""`swalp train`, killed again and again, then resumed to its end: `python run.py KILLS FOLDER`.

One process imports everything and then does nothing but fork: each child is `swalp train` or `swalp
resume` on the same run, and dies by SIGKILL. Half of the kills come at a random time, the others at
a random one of the operations by which checkpoints are written, some of them half done.
"""

import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time

import matplotlib.backends.backend_agg  # noqa: F401  (loaded before the fork)
import rich.progress  # noqa: F401  (loaded before the fork)
import sklearn.datasets  # noqa: F401  (loaded before the fork)

from swalp.report import curves, tables  # noqa: F401  (loaded before the fork)
from swalp.training import checkpoint, config, study  # noqa: F401  (loaded before the fork)
from swalp_command import cli

SEED = 5
SETTINGS = [
    "model=mlp", "width=8", "seeds=1", "batch_size=200", "epochs=16", "averaging_start=8",
    'arms=["float", "paper-small-block-8"]', "checkpoint_seconds=0",
    'averages=["every=epoch", "precision=bfp8[0]"]',
]  # fmt: skip


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_within(operation, count):
    """Have the `count`-th of an operation among checkpoints end this process."""
    left = count

    def counted(real, before, concerns):
        def run(*args, **kwargs):
            nonlocal left
            left -= concerns(args)
            if left == 0:
                before(*args)
                die()
            return real(*args, **kwargs)

        return run

    def among(args):
        return "checkpoints" in str(args[0])

    def nothing(*_):
        pass

    def half_removed(path, *_):
        next(iter(pathlib.Path(path).iterdir())).unlink()

    def half_written(path, *_):
        path.write_bytes(b"half")

    holder, name, before, concerns = {
        "fsync": (os, "fsync", nothing, lambda args: True),
        "before renaming": (pathlib.Path, "rename", nothing, among),
        "after renaming": (pathlib.Path, "rename", os.rename, among),
        "removing": (shutil, "rmtree", half_removed, lambda args: os.path.isdir(args[0])),
        "writing": (pathlib.Path, "open", half_written, among),
    }[operation]
    setattr(holder, name, counted(getattr(holder, name), before, concerns))


OPERATIONS = ("fsync", "before renaming", "after renaming", "removing", "writing")


def child(words, within=None):
    """Fork a process that runs ``swalp`` with those words."""
    process = os.fork()
    if process == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        if within is not None:
            die_within(*within)
        os._exit(cli.run(words))
    return process


def results(run):
    """SHA-256 of everything that a run computed."""
    paths = [run / "metrics.jsonl", run / "summary.json", *run.glob("models/**/*.safetensors")]
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }


def finish(words):
    process = child(words)
    status = os.waitpid(process, 0)[1]
    assert status == 0, f"swalp {' '.join(words)}: status {status}"


def main(kills, folder):
    folder = pathlib.Path(folder)
    settings = [word for change in SETTINGS for word in ("--set", change)]
    train = ["train", "digits", *settings, "--out"]
    began = time.monotonic()
    finish([*train, str(folder / "whole")])
    seconds = time.monotonic() - began
    expected = results(folder / "whole")
    moments, rows = random.Random(SEED), []
    run, number = folder / "run-0", 0
    while len(rows) < kills:
        words = ["resume", str(run)] if (run / "run.json").exists() else [*train, str(run)]
        operation = moments.choice(OPERATIONS) if moments.random() < 0.5 else None
        within = None if operation is None else (operation, moments.randint(1, 40))
        process = child(words, within)
        if within is None:
            time.sleep(moments.uniform(0.02, seconds / 4))
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        killed = os.WIFSIGNALED(status)
        if killed:
            newest = checkpoint.newest(run / "checkpoints")
            step = 0 if newest is None else int(newest.name[-12:])
            rows.append({"run": number, "within": operation or "anywhere", "checkpoint": step})
        if not killed or len(rows) == kills:
            if (run / "run.json").exists():
                if not (run / "summary.json").exists():
                    finish(["resume", str(run)])
                assert results(run) == expected, f"{run} ended otherwise"
            number += 1
            run = folder / f"run-{number}"
    # A process killed before it made its run directory leaves one without run.json.
    equal = all(
        results(path) == expected
        for path in folder.glob("run-*")
        if (path / "summary.json").exists()
    )
    assert equal
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
