import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest

import swalp
from swalp.training import config, data, loop, models, run_directory, study
from swalp.training.mistakes import UserError
from swalp_command import cli, runs
from tiny_runs import finished, settings, train

ROOT = Path(__file__).parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
TINY = ["digits", "--set", "width=4", "--set", "batch_size=500", "--set", "epochs=2"]
TINY += ["--set", "averaging_start=1", "--set", "seeds=2", "--set", "model=mlp"]


@pytest.fixture
def run_swalp(capsys, tmp_path, monkeypatch):
    """Status, stdout and stderr of a command, run in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = cli.run([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    """A finished run, not to be changed."""
    return finished(tmp_path_factory.mktemp("old")).path


def test_train_and_evaluate(run_swalp, tmp_path):
    status, out, err = run_swalp("train", *TINY, "--out", "made/here")
    assert (status, err) == (0, "")
    rows = re.findall(
        r"^(float|paper-small-block-\d+) (SGD.*?|SWA|SWALP)  +(\d+\.\d\d) ± ", out, re.M
    )
    assert len(rows) == 9
    assert len(re.findall(r"(SWA|SWALP), bfp8\[0\] weights  +\d", out)) == 3
    assert len(re.findall(r"(SWA|SWALP), and bfp\S+ activations  +\d", out)) == 3
    assert (
        "digits: 1,000 training and 797 test images; mean ± standard deviation of 2 seeds." in out
    )
    assert re.search(r"^paper-small-block-8: low precision costs SGD [+-]\d", out, re.M)
    assert out.endswith(
        "Saved in made/here; README.txt there says what is what.\n"
        "As a page with curves and histograms: swalp report made/here --open\n"
    )
    made = tmp_path / "made" / "here"
    assert (made / "curves.png").read_bytes().startswith(b"\x89PNG")

    status, again, err = run_swalp("evaluate", made)
    assert (status, err) == (0, "")
    assert again.startswith(out[: out.index("\nSaved in")])
    assert f"Every error equals the one in {made}." in again


def test_a_stream_without_our_letters_gets_question_marks(run_swalp, old_run, monkeypatch):
    _, said, _ = run_swalp("evaluate", old_run)
    assert "±" in said
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["swalp", "evaluate", str(old_run)])
    assert cli.main() == 0
    assert stream.buffer.getvalue() == said.encode("ascii", "replace")


def test_train_makes_a_directory_of_its_own(run_swalp, tmp_path):
    assert run_swalp("train", *TINY, "--set", 'arms=["float"]')[0] == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-\d{8}-\d{6}", made.name)


def test_a_file_of_settings(run_swalp, tmp_path, old_run):
    status, _, err = run_swalp("train", old_run / "config.toml", "--out", "again")
    assert (status, err) == (0, "")
    for name in ("summary.json", "metrics.jsonl", "config.toml"):
        assert (tmp_path / "again" / name).read_bytes() == (old_run / name).read_bytes()


def test_evaluate_says_what_differs(run_swalp, tmp_path):
    run = finished(tmp_path / "run")
    summary = run.summary()
    summary["rows"][1]["test_error"] = [1.5]
    run.finish(summary)
    status, _, err = run_swalp("evaluate", run.path)
    assert status == 1
    assert re.fullmatch(
        rf"swalp: differs from {run.path}: float SGD, last iterate, seed 1 of 1: 1.5 % became "
        rf"\d[\d.]* %\n",
        err,
    )


def test_doctor(run_swalp):
    status, out, err = run_swalp("doctor")
    assert (status, err) == (0, "")
    found = dict(re.split("  +", line, maxsplit=1) for line in out.splitlines())
    assert found["swalp"] == VERSION
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert int(found["threads"]) >= 1
    assert found["quantizer"]
    assert found["data without --data-dir"].endswith("swalp")


def test_version(run_swalp):
    assert run_swalp("--version") == (0, f"swalp {VERSION}\n", "")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[(.*)\]", changelog, re.MULTILINE)[1] == VERSION


def test_help(run_swalp):
    for words in (
        [],
        ["--help"],
        ["train", "--help"],
        ["evaluate", "--help"],
        ["doctor", "--help"],
    ):
        status, out, err = run_swalp(*words)
        assert status == 0 or not words
        assert "Usage: swalp" in out + err


def test_export_weights(run_swalp, tmp_path, old_run):
    status, out, err = run_swalp(
        "export", old_run, "--format", "bfp8", "--out", "a/model.safetensors"
    )
    assert (status, err) == (0, "")
    errors = dict(re.findall(r"^(.*?)  +(\d+\.\d\d)$", out, re.M))
    assert list(errors) == ["float average", "quantized to bfp8", "the file, read back"]
    assert errors["quantized to bfp8"] == errors["the file, read back"]
    summary = json.loads((old_run / "summary.json").read_text())
    row = next(
        r for r in summary["rows"] if (r["arm"], r["model"]) == ("paper-small-block-8", "average")
    )
    assert errors["float average"] == f"{row['test_error'][0]:.2f}"
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert (
        f"Saved in a/model.safetensors: {size:,} bytes; {row['model_bytes']:,} in float32." in out
    )
    plain = models.build("mlp", size=8, width=8, classes=10, seed=9)
    plain.load_state_dict(swalp.load_quantized(tmp_path / "a" / "model.safetensors"))
    found = loop.error(plain, data.load("digits").test)
    assert f"{found:.2f}" == errors["the file, read back"]
    status, _, err = run_swalp("export", old_run, "--out", "a/model.safetensors")
    assert (status, err) == (
        2, "swalp: a/model.safetensors: is there already; choose another file with --out\n"
    )  # fmt: skip


def test_export_of_a_graph(run_swalp, tmp_path, old_run):
    pytest.importorskip("onnxruntime")
    words = ["export", old_run, "--format", "onnx", "--arm", "float", "--activations"]
    status, out, err = run_swalp(*words, "--out", "model.onnx")
    assert (status, err) == (0, "")
    errors = dict(re.findall(r"^(.*?)  +(\d+\.\d\d)$", out, re.M))
    assert list(errors) == ["float average", "quantized to bfp8[0]", "onnxruntime"]
    values = [float(value) for value in errors.values()]
    assert max(values) - min(values) < 2


def test_graphs_with_and_without_activations_lie_side_by_side(run_swalp, tmp_path):
    pytest.importorskip("onnxruntime")
    run = finished(tmp_path / "run", arms=("paper-small-block-8",))
    folder = run.path / "models" / "paper-small-block-8" / "seed-0"
    for words, name in (([], "average.onnx"), (["--activations"], "average-activations.onnx")):
        status, out, err = run_swalp("export", run.path, "--format", "onnx", *words)
        assert (status, err) == (0, "")
        assert f"Saved in {folder / name}: " in out


def test_export_goes_beside_the_average(run_swalp, tmp_path):
    run = finished(tmp_path / "run", averages=("every=epoch",))
    assert run_swalp("export", run.path)[0] == 0
    assert run_swalp("export", run.path, "--average", "every=epoch", "--format", "fixed8.4")[0] == 0
    folder = run.path / "models" / "paper-small-block-8" / "seed-0"
    assert {"average-bfp8[0].safetensors", "average-every=epoch-fixed8.4.safetensors"} <= {
        path.name for path in folder.iterdir()
    }
    assert run_swalp("evaluate", run.path)[0] == 0


def test_a_run_stands_without_its_recipe_files(run_swalp, tmp_path, monkeypatch):
    (tmp_path / "my3.toml").write_text('base = "paper-small-block-8"\n')
    run = tmp_path / "run"
    words = [*TINY, "--set", 'arms=["my3.toml"]', "--out", run]
    status, out, err = run_swalp("train", *words)
    assert (status, err) == (0, "")
    assert re.search("^my3.toml SGD", out, re.M)
    assert (run / "models" / "my3.toml" / "seed-0" / "average.safetensors").exists()
    (tmp_path / "my3.toml").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_swalp("train", run / "config.toml", "--out", "again")[0] == 0
    for name in ("summary.json", "metrics.jsonl", "config.toml", "run.json"):
        assert (run / name).read_bytes() == Path("again", name).read_bytes()
    (run / "summary.json").unlink()
    (run / "diagnostics.jsonl").unlink()
    assert run_swalp("report", run, "--out", "half.html")[0] == 0
    assert "bfp8" in Path("half.html").read_text()
    for words in (["resume"], ["evaluate"], ["export"]):
        status, _, err = run_swalp(*words, run)
        assert (status, err) == (0, "")


EDITS = [
    ([("epochs = 4", "epochs = 5")], "epochs was 4 when the run began and is 5 now; put it back"),
    ([("epochs = 4", "epochs = 3")], "epochs was 4 when the run began and is 3 now; put it back"),
    (
        [("averaging_start = 2", "averaging_start = 1"), ('data = "digits"', 'data = "mnist"')],
        'data was "digits" when the run began and is "mnist" now, averaging_start was 2 when the '
        "run began and is 1 now; put them back",
    ),
    (
        [('arms = ["float", "paper-small-block-8"]', 'arms = ["float"]')],
        'arms was ["float", "paper-small-block-8"] when the run began and is ["float"] now; '
        "put it back",
    ),
]


@pytest.fixture
def stopped_run(tmp_path):
    run = run_directory.create(tmp_path / "run", settings(epochs=4))
    with pytest.raises(study.Stopped):
        train(run, stop_at=7)
    return run


@pytest.mark.parametrize(("edits", "message"), EDITS)
def test_edited_settings_are_not_gone_on_with(run_swalp, stopped_run, edits, message):
    path = stopped_run.path / "config.toml"
    text = path.read_text()
    for old, new in edits:
        assert f"{old}\n" in text
        text = text.replace(f"{old}\n", f"{new}\n")
    path.write_text(text)
    status, out, err = run_swalp("resume", stopped_run.path)
    assert (status, out) == (2, "")
    assert err == (f"swalp: {path}: {message}, or start anew with: swalp train {path} --out DIR\n")
    with pytest.raises(UserError, match="when the run began"):
        train(stopped_run)


def test_settings_on_which_no_result_depends_may_be_edited(run_swalp, stopped_run):
    path = stopped_run.path / "config.toml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    text = "# mine\n" + "\n\n".join(reversed(lines)).replace(
        "learning_rate = 0.1", "learning_rate=1e-1"
    )
    text = text.replace("checkpoint_seconds = 1000.0", "checkpoint_seconds = 10")
    path.write_text(text.replace("keep_checkpoints = 2", "keep_checkpoints = 3"))
    assert stopped_run.config().keep_checkpoints == 3
    assert run_swalp("resume", stopped_run.path)[0] == 0


def test_a_run_that_kept_no_settings_goes_on(run_swalp, stopped_run):
    (stopped_run.path / "run.json").write_text('{"version": 1}\n')
    assert run_swalp("resume", stopped_run.path)[0] == 0


MISTAKES = [
    (["train", "digts"], "unknown preset 'digts'; did you mean 'digits'?"),
    (["train", ""], "unknown preset ''; presets: cifar10-"),
    (["train", "none.toml"], "none.toml: cannot read the settings: No such file or directory"),
    (["train", "bad.toml"], "bad.toml: malformed TOML: "),
    (["train", "--set", "epoch=3"], "--set: unknown key 'epoch'; did you mean 'epochs'?"),
    (["train", "--set", "epochs"], "--set 'epochs': give key=value"),
    (["train", "--set", "momentum=2"], "digits: momentum = 2: should be less than 1 (of SGD)"),
    (["train", "--set", "batch_size=2000"], "batch_size = 2000 exceeds the 1000 training examples"),
    (["train", "--set"], "Option '--set' requires an argument"),
    (["train", "--sets", "a=3"], "No such option: --sets"),
    (["train", "digits", "mnist"], "Got unexpected extra argument(s) (mnist)"),
    (["trian"], "No such command 'trian'"),
    (["train", "mnist", "--data-dir", "."], "no train-images-idx3-ubyte.gz of mnist in mnist or ."),
    (["train", "--set", f"epochs={'9' * 5000}"], "--set epochs: Exceeds the limit"),
    (["train", "--set", f"arms={'[' * 3000}"], "--set arms: maximum recursion depth exceeded"),
    (["train", "--tensorboard", "bad.toml"], "bad.toml: File exists"),
    (["reproduce", "--list", "x"], "--list shows all claims; leave 'x' away, or --list"),
    (["train", "--out", "full"], "full: the directory is not empty; choose another with --out"),
    (["train", "--out", "bad.toml"], "bad.toml: cannot make the run directory: "),
    (["train", "--out", "bad.toml/a"], "cannot make the run directory: Not a directory"),
    (["train", "--out", "/proc/none"], "/proc/none: cannot make the run directory: "),
    (["train", "--resume", "none"], "none: not a run directory (it has no run.json)"),
    (["train", "--resume", "full"], "full: not a run directory (it has no run.json)"),
    (["resume", "OLD"], "this run is finished; see it again with: swalp evaluate "),
    (["resume", "none"], "none: not a run directory (it has no run.json)"),
    (["train", "--resume", "OLD"], "this run is finished; see it again with: swalp evaluate "),
    (["train", "digits", "--resume", "OLD"], "takes the settings of that run: leave out"),
    (["train", "--resume", "OLD", "--set", "epochs=9"], "takes the settings of that run"),
    (["train", "--resume", "OLD", "--out", "x"], "takes the settings of that run"),
    (["export", "none"], "none: not a run directory (it has no run.json)"),
    (["export", "OLD", "--format", "bfp"], "--format bfp: "),
    (
        ["export", "OLD", "--format", "bfp20"],
        "--format bfp20: bfp20 has 20 bits; an exported weight",
    ),
    (
        ["export", "OLD", "--format", "fixed8.200"],
        "--format fixed8.200: quantize: fixed8.200 reaches",
    ),
    (
        ["export", "OLD", "--format", "e8m0"],
        "--format e8m0: Recipe 'export': weight cannot use e8m0",
    ),
    (["export", "OLD", "--arm", "flot"], "--arm flot: this run has float, paper-small-block-8"),
    (["export", "OLD", "--seed", "7"], "--seed 7: this run has 0"),
    (["export", "OLD", "--average", "best"], "--average best: this run has average"),
    (["export", "OLD", "--average", "x"], "swalp: --average x: this run has average\n"),
    (["export", "OLD", "--activations"], "--activations is for --format onnx"),
    (["export", "OLD", "--seed", "abc"], "swalp: --seed abc: "),
    (["reproduce", "--seeds=x"], "swalp: --seeds x: "),
    (["profile", "--steps", "3", "--steps", "0"], "swalp: --steps 0: "),
    (["evaluate", "none"], "none: not a run directory (it has no run.json)"),
    (["evaluate"], "Missing argument"),
    (["evaluate", "OLD", "OLD"], "Got unexpected extra argument(s)"),
]


@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=[" ".join(words)[:40] for words, _ in MISTAKES]
)
def test_a_mistake_gets_one_line_and_status_2(run_swalp, tmp_path, old_run, words, message):
    (tmp_path / "bad.toml").write_text("epochs = = 3")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("untouched")
    before = {path: path.stat().st_mtime_ns for path in old_run.rglob("*")}
    status, out, err = run_swalp(*(old_run if word == "OLD" else word for word in words))
    assert (status, out) == (2, "")
    assert err.startswith("swalp: ")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    assert before == {path: path.stat().st_mtime_ns for path in old_run.rglob("*")}


def test_a_run_of_another_version(run_swalp, tmp_path):
    (tmp_path / "run.json").write_text('{"version": 2}')
    for words in (["train", "--resume", "."], ["evaluate", "."]):
        status, _, err = run_swalp(*words)
        assert status == 2
        assert err == (
            "swalp: .: a run directory of version 2; this swalp reads version 1: "
            "use the swalp that made it\n"
        )


def test_a_damaged_run(run_swalp, tmp_path):
    run = finished(tmp_path / "run", arms=("float",), epochs=2, averaging_start=1)
    damages = {
        "models/float/seed-0/last.safetensors": "damaged: it does not match the SHA-256",
        "summary.json": "damaged: ",
        "config.toml": "malformed TOML",
        "run.json": "damaged: ",
    }
    for name, message in damages.items():
        (run.path / name).write_bytes((run.path / name).read_bytes()[:-9])
        status, out, err = run_swalp("evaluate", run.path)
        assert (status, out) == (2, "")
        assert message in err
        assert str(run.path / name) in err
        assert err.count("\n") == 1


def test_our_own_defects_are_not_hidden(run_swalp, monkeypatch):
    def defect(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(config, "load", defect)
    with pytest.raises(RuntimeError, match="a defect"):
        run_swalp("train")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_and_resumed(tmp_path, run_swalp, number):
    path = tmp_path / "run"
    (tmp_path / "long.toml").write_text(config.to_toml(settings(epochs=4, seeds=100)))
    process = subprocess.Popen(
        [sys.executable, "-c", "from swalp_command import main; main()"]
        + ["train", "long.toml", "--out", str(path)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    metrics = path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "")
    assert err == f"stopped; go on with: swalp resume {path}\n"

    run = run_directory.open_run(path)
    (saved,) = run.checkpoints.iterdir()
    with run.locked():
        status, _, err = run_swalp("resume", path)
        assert (status, err) == (2, f"swalp: {path}: another process is working on this run\n")
    assert [saved] == list(run.checkpoints.iterdir())


def test_importing_the_library_does_not_import_the_command_line():
    code = "import sys, swalp; print([name for name in sys.modules if name.startswith('swalp.')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "swalp.formats" in run.stdout
    for name in ("training", "report"):
        assert f"swalp.{name}" not in run.stdout
    assert set(swalp.__all__).isdisjoint({"training", "report"})


@pytest.mark.parametrize(
    ("words", "status"),
    [("--help", 0), ("--version", 0), ("train --help", 0), ("trian", 2), ("train --otu x", 2)],
)
def test_help_and_slips_wait_for_nothing(words, status):
    """PyTorch takes seconds to import, and matplotlib one."""
    code = (
        "import sys; from swalp_command import cli; status = cli.run(sys.argv[1:]); "
        "print(status, 'torch' in sys.modules, 'swalp' in sys.modules)"
    )
    command = [sys.executable, "-c", code, *words.split()]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == f"{status} False False"
    assert run.stderr.count("\n") == (status != 0)


def test_profile_prints_a_table_for_each_arm(run_swalp):
    words = ("profile", "digits", "--set", "batch_size=20", "--steps", "1", "--layers", "3")
    status, out, err = run_swalp(*words)
    assert (status, err) == (0, "")
    for start in (
        "float\n",
        "paper-small-block-8\n",
        "a step of",
        "cnn of width 16 on digits, batch",
    ):
        assert f"\n{start}" in f"\n{out}"
    assert out.count("more)") == 3
    status, out, err = run_swalp("profile", "digit")
    assert (status, out) == (2, "")
    assert "unknown preset 'digit'; did you mean 'digits'?" in err


@pytest.mark.parametrize("command", ["evaluate", "export", "report"])
@pytest.mark.parametrize(
    ("old", "new"),
    [("width = 8", "width = 7"), ("validation_examples = 0", "validation_examples = 300")],
)
def test_models_of_a_run_are_not_read_with_edited_settings(run_swalp, tmp_path, command, old, new):
    path = finished(tmp_path / "run").path
    file = path / "config.toml"
    assert f"{old}\n" in file.read_text()
    file.write_text(file.read_text().replace(f"{old}\n", f"{new}\n"))
    status, out, err = run_swalp(command, path)
    assert (status, out) == (2, "")
    assert f"{new.split(' = ')[0]} was {old.split(' = ')[1]} when the run began" in err


def test_records_that_a_checkpoint_counts_must_be_there(run_swalp, stopped_run):
    (stopped_run.path / "metrics.jsonl").write_bytes(b"")
    status, _, err = run_swalp("resume", stopped_run.path)
    assert status == 2
    assert "metrics.jsonl: it has 0 bytes where the checkpoint counts" in err


def test_the_c_locale_gets_question_marks(old_run):
    command = [sys.executable, "-c", "from swalp_command import main; main()", "evaluate", old_run]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = subprocess.run(command, capture_output=True, env=os.environ | plain)
    assert (said.returncode, said.stderr) == (0, b"")
    assert b"mean ? standard deviation" in said.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("metrics.jsonl", "its first "),
        ("sessions.jsonl", "line 1: damaged: "),
    ],
)
def test_a_garbled_record_is_not_gone_on_with(run_swalp, stopped_run, name, message):
    path = stopped_run.path / name
    path.write_bytes(b'{"arm"\n' + path.read_bytes())
    status, _, err = run_swalp("resume", stopped_run.path)
    assert status == 2
    assert f"{path}: {message}" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("batch_size=1001", "batch_size = 1001 exceeds the 1000 training examples"),
        ("validation_examples=1000", "validation_examples"),
        ("averages=['window=9999']", "fewer than its window of 9999"),
        ("learning_rate=1e300", "learning_rate"),
        ("epochs=99999999999999999999", "epochs"),
    ],
)
def test_settings_that_cannot_be_trained_leave_no_directory(run_swalp, tmp_path, change, message):
    status, out, err = run_swalp("train", *TINY, "--set", change, "--out", "new")
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_an_average_says_how_many_iterates_it_holds(tmp_path):
    run = finished(tmp_path / "run", averages=("every=1 window=2", "every=1"))
    rows = {row.get("average"): row for row in run.summary()["rows"] if row["arm"] == "float"}
    assert set(rows["every=1 window=2"]["averaged"]) == {2}
    assert rows["every=1"]["averaged"][0] > 2


def _without(model):
    def change(summary):
        summary["rows"] = [row for row in summary["rows"] if row["model"] != model]

    return change


def _row(key, value):
    return lambda summary: summary["rows"][0].update({key: value})


DAMAGES = [
    ("summary.json", dict.clear, "it has no rows"),
    ("summary.json", lambda summary: summary.update(rows=None), "it has no rows"),
    ("summary.json", lambda summary: summary.update(rows=[]), "it has no row of float, sgd"),
    ("summary.json", _without("last"), "it has no row of float, last"),
    ("summary.json", _row("arm", "flaot"), "it has no row of float, sgd"),
    ("summary.json", _row("sha256", []), "sha256 of float, sgd must be a value for each of 1"),
    ("summary.json", _row("test_error", [None]), "test_error of float, sgd must be a value for"),
    ("summary.json", _row("model_bytes", None), "model_bytes of float, sgd must be an integer"),
    (
        "summary.json",
        lambda summary: summary.pop("test_examples"),
        "test_examples must be a number",
    ),
    ("run.json", lambda began: began.update(settings=None), "settings is not a JSON object"),
    ("run.json", lambda began: began.update(recipes=[]), "recipes is not a JSON object"),
    ("run.json", lambda began: began.update(version="1"), "it has no version"),
]


@pytest.mark.parametrize(("name", "change", "message"), DAMAGES)
@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_record_of_other_values(run_swalp, tmp_path, old_run, command, name, change, message):
    run = tmp_path / "run"
    shutil.copytree(old_run, run)
    record = json.loads((run / name).read_text())
    change(record)
    (run / name).write_text(json.dumps(record))
    status, out, err = run_swalp(command, run)
    assert (status, out) == (2, "")
    assert f"{run / name}: damaged: {message}" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("summary.json", _row("model_bytes", None)),
        ("summary.json", _row("test_error", [None])),
        ("metrics.jsonl", lambda line: line.update(epoch=[1])),
        ("diagnostics.jsonl", lambda line: line.update(errors=3)),
        ("sessions.jsonl", lambda line: line.update(seconds=[])),
    ],
)
def test_a_page_of_other_values_gets_one_line(run_swalp, tmp_path, old_run, name, change):
    run = tmp_path / "run"
    shutil.copytree(old_run, run)
    first, *rest = (run / name).read_text().split("\n", 0 if name == "summary.json" else 1)
    record = json.loads(first)
    change(record)
    (run / name).write_text("\n".join([json.dumps(record), *rest]))
    status, out, err = run_swalp("report", run)
    assert (status, out) == (2, "")
    assert f"swalp: {run}: damaged: a value is missing or is not what it was written as" in err
    assert err.count("\n") == 1


def test_without_words_there_is_help(run_swalp):
    status, out, err = run_swalp()
    assert (status, err) == (0, "")
    assert out.startswith("Usage: swalp [OPTIONS] COMMAND")


def test_a_style_that_matplotlib_cannot_have_here_is_left_out(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    words = ["train", *TINY, "--set", "seeds=1", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-c", "from swalp_command import main; main()", *words],
        cwd=tmp_path, env=os.environ | {"MPLBACKEND": "module://none.such"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_goes_on_knows_where_the_data_lay(tmp_path, run_swalp, monkeypatch):
    """As the default is elsewhere."""
    monkeypatch.setattr(runs.study, "train", stopped := Stopping())
    monkeypatch.setattr(runs, "asked_to_end", lambda: nullcontext([signal.SIGINT]))
    run = tmp_path / "a run"
    status, _, err = run_swalp("train", "--data-dir", tmp_path, "--out", run)
    command = f"swalp resume '{run}' --data-dir {tmp_path}"
    assert (status, err) == (130, f"stopped; go on with: {command}\n")
    assert stopped.go_on == command


class Stopping:
    """A run that stops before its first step."""

    go_on = ""

    def __call__(self, *_, go_on, **__):
        self.go_on = go_on
        raise study.Stopped


@pytest.mark.parametrize("made", [False, True])
def test_a_data_dir_that_is_none(tmp_path, run_swalp, made):
    path = tmp_path / "x"
    if made:
        path.write_text("")
    status, _, err = run_swalp("train", "mnist", "--data-dir", path)
    is_what = "is no folder" if made else "does not exist"
    said = f"--data-dir {path}: it {is_what}; name the folder with the data files"
    assert (status, err) == (2, f"swalp: {said}\n")


@pytest.mark.parametrize(
    ("setting", "said"),
    [("model=vgg16", "VGG16 halves"), ('arms=["r.toml"]', "matches no layer")],
)
def test_a_run_that_cannot_begin_leaves_nothing(tmp_path, run_swalp, monkeypatch, setting, said):
    monkeypatch.chdir(tmp_path)
    override = '[[overrides]]\nlayers = "nowhere"\nactivation = "float"\n'
    Path("r.toml").write_text(f'base = "paper-small-block-8"\n{override}')
    status, _, err = run_swalp("train", "digits", "--set", setting, "--out", "run")
    assert status == 2
    assert said in err
    assert err.count("\n") == 1
    assert not Path("run").exists()
