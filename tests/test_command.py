"""The console script before the command line is there."""

import os
import signal
import subprocess
import sys
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


SIGNALS = [
    (signal.SIGINT, "interrupted"),
    (signal.SIGTERM, "terminated"),
    (signal.SIGHUP, "the terminal was closed"),
]


@pytest.mark.parametrize(("number", "word"), SIGNALS)
@pytest.mark.parametrize("slow_package", ["typer", "swalp"])
def test_stopped_while_importing(tmp_path, slow_package, number, word):
    (tmp_path / slow_package).mkdir()
    # Naps, not one long sleep: a signal just before a sleep begins waits until it ends.
    naps = "for _ in range(600): time.sleep(0.1)"
    slow = f"import time\nprint('importing', flush=True)\n{naps}\n"
    (tmp_path / slow_package / "__init__.py").write_text(slow)
    module, _, name = PROJECT["project"]["scripts"]["swalp"].partition(":")
    places = [str(tmp_path), str(ROOT / "src"), *filter(None, sys.path)]
    process = subprocess.Popen(
        # Without site: an editable install finds its own swalp before the one here.
        [sys.executable, "-S", "-c", f"from {module} import {name}; {name}()", "doctor"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert first == "importing\n", err
    assert (process.returncode, err) == (128 + number, f"swalp: {word}\n")


@pytest.mark.parametrize(("number", "word"), SIGNALS)
def test_stopped_at_any_moment_before_the_end(number, word):
    """Whatever Typer, or a module that is being imported, makes of an exception."""
    code = "from swalp_command import main; main()"
    for wait in (0.05, 0.1, 0.12, 0.15, 0.2, 0.3, 0.4, 0.5):
        process = subprocess.Popen(
            # A moment that cannot be missed: the recipes are printed after it.
            [sys.executable, "-c", f"print('on', flush=True); {code}", "recipes"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "on\n"
        time.sleep(wait)
        process.send_signal(number)
        printed, said = process.communicate(timeout=60)
        if wait < 0.1 and process.returncode == -number:
            continue  # Python had not come to `main` yet
        if process.returncode == 0 and printed:
            continue  # it was quicker
        assert (process.returncode, said) == (128 + number, f"swalp: {word}\n")


@pytest.mark.skipif(find_spec("swalp._kernels") is None, reason="swalp was built without kernels")
def test_a_wrong_instruction_set_is_one_line():
    code = "from swalp_command import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", code, "doctor"],
        env=os.environ | {"SWALP_ISA": "sse4"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("swalp: SWALP_ISA=sse4: this machine or build has no 'sse4'")
    assert run.stderr.count("\n") == 1


def test_nohup_is_heeded():
    code = "from swalp_command import ending_signals; print(*[s.name for s in ending_signals()])"
    for ignored, names in (("", "SIGTERM SIGHUP"), ("trap '' HUP; ", "SIGTERM")):
        script = f'{ignored}exec "{sys.executable}" -c "{code}"'
        run = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == names


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [(">&-", 0, ""), ("> /dev/full", 2, "swalp: standard output: No space left on device\n")],
)
@pytest.mark.parametrize("words", ["--version", "formats"])
def test_output_that_is_closed_or_finds_no_room(where, status, said, words):
    code = "from swalp_command import main; main()"
    script = f'"{sys.executable}" -c "{code}" {words} {where}'
    for unbuffered in ("", "1"):  # in a buffer it is lost at another place
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        run = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=environment)
        if unbuffered:  # nothing waits to be written: who found no room is not known
            said = said.replace("standard output: ", "")
        assert (run.returncode, run.stdout, run.stderr) == (status, "", said)


def test_it_is_a_module_too():
    run = subprocess.run(
        [sys.executable, "-m", "swalp", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"swalp {PROJECT['project']['version']}\n"


@pytest.mark.parametrize("words", [["--help"], ["formats"]])
def test_output_that_nobody_reads_is_no_difference(words):
    code = "from swalp_command import main; main()"
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", code, *words]
    for unbuffered in ("", "1"):
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        run = subprocess.run(
            command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert (run.returncode, run.stderr) == (141, "")
    os.close(write)


def test_what_the_script_needs_is_shipped():
    module = PROJECT["project"]["scripts"]["swalp"].partition(":")[0]
    packages = PROJECT["tool"]["scikit-build"]["wheel"]["packages"]
    assert f"src/{module}" in packages
    assert all((ROOT / package / "__init__.py").exists() for package in packages)
