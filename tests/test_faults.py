"""kill -9 at any moment, a full disk, a damaged file: a run loses nothing, and ends the same."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
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


# Several commands, the lines of the standard input, in one process: most of the time that a command
# takes is the import of PyTorch.
EACH = """
import sys
from swalp_command import cli
for line in sys.stdin:
    print("status", cli.run(line.split()), flush=True)
"""
SWALP = str(Path(sys.executable).with_name("swalp"))
TOOLS = {"SWALP": SWALP, "PYTHON": sys.executable, "EACH": EACH, "OMP_NUM_THREADS": "1"}
# In namespaces of its own: a user's, so that anybody may mount, and that of the mounts, which are
# gone with the shell.
ISOLATED = ["unshare", "--user", "--map-root-user", "--mount"]
# Owner of the files, but without root's privilege to write anywhere.
UNPRIVILEGED = ["unshare", "--user"] if os.geteuid() == 0 else []


def usable(*command):
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


needs_mounts = pytest.mark.skipif(
    not usable(*ISOLATED, "mount", "-t", "tmpfs", "-o", "size=16k", "none", "/mnt"),
    reason="this machine lets nobody mount a small disk in a user namespace",
)


def on_disk(tmp_path, options, script):
    """What a shell script prints, its errors included, in a folder with a small disk as `disk`."""
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o {options} none disk && cd ."
    run = subprocess.run(
        [*ISOLATED, "sh", "-c", f"{mount}\n{textwrap.dedent(script)}"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | TOOLS,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout
    return run.stdout.splitlines()


@needs_mounts
def test_a_full_disk_stops_training_which_goes_on_when_there_is_room(tmp_path, reference):
    """A real one: filled up while the run stands, with room for half a checkpoint."""
    run = run_directory.create(tmp_path / "run", settings(**CHANGES, keep_checkpoints=3))
    with pytest.raises(study.Stopped):
        train(run, stop_at=20)
    size = sum(file.stat().st_size for file in checkpoint.newest(run.checkpoints).iterdir())
    lines = on_disk(
        tmp_path,
        "size=4m",
        f"""
        cp -r run disk/run
        ls disk/run/checkpoints > before
        free=$(df --output=avail -B 1 disk | tail -n 1)
        head -c $((free - {size // 2})) /dev/zero > disk/others
        $SWALP resume disk/run; echo status $?
        ls disk/run/checkpoints | diff before - && echo the same checkpoints
        rm disk/others
        $SWALP resume disk/run > /dev/null 2>&1; echo status $?
        cp -r disk/run after
        """,
    )
    error, *rest = [line for line in lines if not line.startswith("going on")]
    assert error.startswith("swalp: disk/run")
    assert "No space left on device; the last good checkpoint is disk/run/checkpoints/" in error
    assert error.endswith(". Mend that and go on with: swalp resume disk/run")
    assert rest == ["status 2", "the same checkpoints", "status 0"]
    found = results(run_directory.open_run(tmp_path / "after"))
    assert found.keys() == reference.keys()
    different = {name for name in found if found[name] != reference[name]}
    assert different <= {"summary.json"}  # which holds the settings, so keep_checkpoints


@needs_mounts
def test_a_full_disk_takes_no_part_of_an_export(tmp_path):
    finished(tmp_path / "run", width=64)  # more than the page that is free
    lines = on_disk(
        tmp_path,
        "size=64k",
        """
        head -c 60K /dev/zero > disk/others
        $PYTHON -c "$EACH" << END
        export run --format bfp8[0] --out disk/new/model
        export run --format bfp16 --out disk/new/model
        export run --format onnx --out disk/new/model
        export run --out disk/others
        END
        ls -A disk/new
        stat -c %s disk/others
        """,
    )
    for line in lines[:6:2]:
        assert re.fullmatch(
            r"swalp: disk/new/model: cannot write [\d,]+ bytes: No space left on device; choose "
            r"another place with --out",
            line,
        )
    assert lines[1:6:2] == ["status 2"] * 3
    assert lines[6].startswith("swalp: disk/others: is there already")
    assert lines[7:] == ["status 2", str(60 * 1024)]


@needs_mounts
def test_a_full_disk_takes_no_part_of_a_new_run(tmp_path):
    lines = on_disk(
        tmp_path,
        "size=16k",
        """
        head -c 1M /dev/zero > disk/others 2> /dev/null
        mkdir disk/empty
        $PYTHON -c "$EACH" << END
        train digits --out disk/new
        train digits --out disk/empty
        END
        ls -A disk disk/empty
        """,
    )
    full = "cannot make the run directory: No space left on device"
    assert lines[:4] == [
        f"swalp: disk/new: {full}", "status 2", f"swalp: disk/empty: {full}", "status 2",
    ]  # fmt: skip
    assert lines[4:] == ["disk:", "empty", "others", "", "disk/empty:"]


@needs_mounts
def test_a_disk_that_cannot_be_written(tmp_path):
    finished(tmp_path / "run")
    lines = on_disk(
        tmp_path,
        "ro",
        """
        $PYTHON -c "$EACH" << END
        train digits --out disk/new
        export run --out disk/model
        END
        """,
    )
    assert lines[:2] == [
        "swalp: disk/new: cannot make the run directory: Read-only file system", "status 2",
    ]  # fmt: skip
    assert lines[2].startswith("swalp: disk/model: cannot write ")
    assert lines[2].endswith(" bytes: Read-only file system; choose another place with --out")
    assert lines[3:] == ["status 2"]


@pytest.mark.skipif(
    not usable(*UNPRIVILEGED, "true"), reason="root may write anywhere, and no user namespace here"
)
def test_a_directory_that_cannot_be_written(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    run = subprocess.run(
        [*UNPRIVILEGED, SWALP, "train", "digits", "--out", str(locked / "run")],
        capture_output=True,
        text=True,
    )
    assert run.stderr == f"swalp: {locked}/run: cannot make the run directory: Permission denied\n"
    assert run.returncode == 2
    assert not list(locked.iterdir())


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
