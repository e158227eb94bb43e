"""kill -9 at any moment, a full disk, a damaged file: a run loses nothing, and ends the same."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swalp.training import checkpoint, run_directory, study
from swalp.training.mistakes import UserError
from test_training_study import results
from tiny_runs import finished, settings, train

KILLS = 6
SCRIPT = Path(__file__).parents[1] / "experiments" / "kill-and-resume" / "run.py"
# A checkpoint after every step, so that many of the moments lie within the writing of one.
CHANGES = {"epochs": 6, "averaging_start": 3, "checkpoint_seconds": 0.0}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What an uninterrupted run leaves."""
    return results(finished(tmp_path_factory.mktemp("reference"), **CHANGES))


def test_killed_and_resumed(tmp_path):
    """Bounded; experiments/kill-and-resume has fifty. The script compares, and fails otherwise."""
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(KILLS), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == KILLS
    assert {row["within"] for row in rows} - {"anywhere"}


def test_no_room_for_a_checkpoint(tmp_path, reference):
    """By the kernel's limit of a file's size; on a full disk it is as with the patched fsync."""
    run = run_directory.create(tmp_path, settings(**CHANGES))
    with pytest.raises(study.Stopped):
        train(run, stop_at=20)
    before = checkpoint.newest(run.checkpoints)
    size = (before / "tensors.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(UserError) as caught:
            train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large; the last good checkpoint is" in str(caught.value)
    assert str(caught.value).endswith(f"go on with: swalp resume {tmp_path}")
    assert checkpoint.newest(run.checkpoints) == before
    train(run)
    assert results(run) == reference


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot make the run directory: Permission denied"):
            run_directory.create(tmp_path / "run", settings())
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "both of them"])
def test_a_damaged_checkpoint_gives_way_to_the_older_one(tmp_path, damage):
    run = run_directory.create(tmp_path / "run", settings())
    for _ in range(2):
        with pytest.raises(study.Stopped):
            train(run, stop_at=6)
    newest, older = sorted(run.checkpoints.iterdir(), reverse=True)
    file = newest / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    if damage == "both of them":
        (older / "state.json").unlink()
        with pytest.raises(UserError, match=r"no checkpoint is whole: .*; start the run anew"):
            train(run)
        return
    said = []
    train(run, said=said)
    assert len(said) == 1
    assert said[0].startswith(f"{newest}: damaged: tensors.safetensors does not match its SHA-256")
    assert said[0].endswith(f"going on from {older}")
    assert results(run) == results(finished(tmp_path / "whole"))
