import json

import pytest
import torch

import swalp
from swalp.training import run_directory
from swalp.training.mistakes import UserError
from tiny_runs import settings


@pytest.fixture
def run(tmp_path):
    return run_directory.create(tmp_path / "run", settings())


def test_a_new_run_explains_itself(run):
    assert run_directory.open_run(run.path) == run
    assert run.config() == settings()
    assert not run.finished
    explained = (run.path / "README.txt").read_text()
    assert all(path.name in explained for path in run.path.iterdir() if path.suffix != ".txt")


def test_nothing_is_overwritten(run, tmp_path):
    before = (run.path / "config.toml").read_bytes()
    with pytest.raises(UserError, match="the directory is not empty; choose another with --out"):
        run_directory.create(run.path, settings(epochs=9))
    assert (run.path / "config.toml").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file: cannot make the run directory: "):
        run_directory.create(tmp_path / "file", settings())
    with pytest.raises(UserError, match="inside: cannot make the run directory: Not a directory"):
        run_directory.create(tmp_path / "file" / "inside", settings())
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_directory_will_do(tmp_path):
    assert run_directory.create(tmp_path, settings()).config() == settings()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 99}', "a run directory of version 99; this swalp reads version 1"),
        ("{}", "a run directory of version None"),
        ("{", "run.json: damaged: Expecting property name"),
        ("[]", "run.json: damaged: not a JSON object"),
    ],
)
def test_other_versions_are_refused(run, content, message):
    (run.path / "run.json").write_text(content)
    with pytest.raises(UserError, match=message):
        run_directory.open_run(run.path)


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"not a run directory \(it has no run.json\)"):
        run_directory.open_run(tmp_path)
    with pytest.raises(UserError, match="not a run directory"):
        run_directory.open_run(tmp_path / "none")


def test_metrics_are_cut_back_to_a_checkpoint(run):
    run.append_metrics({"epoch": 1, "loss": 1 / 3})
    size = run.metrics_size()
    run.append_metrics({"epoch": 2})
    assert run.metrics() == [{"epoch": 1, "loss": 1 / 3}, {"epoch": 2}]
    run.truncate_metrics(size)
    run.append_metrics({"epoch": 7})
    assert run.metrics() == [{"epoch": 1, "loss": 1 / 3}, {"epoch": 7}]


def test_models_are_stored_packed_and_checked(run):
    weights = torch.linspace(-1, 1, 64).reshape(4, 16)
    state = {"w": swalp.pack(weights, swalp.BlockFloat(8, axes=(0,))), "b": torch.ones(3)}
    path = run.model_path("an-arm", 3, "sgd")
    run.save_model(path, state)
    run.save_model(run.path / "again", state)
    assert path.read_bytes() == (run.path / "again").read_bytes()
    import hashlib

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = run.load_model(path, digest)
    assert torch.equal(loaded["w"].dequantize(), state["w"].dequantize())
    assert loaded["w"].nbytes == 68
    assert torch.equal(loaded["b"], torch.ones(3))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged: it does not match the SHA-256"):
        run.load_model(path, digest)
    path.unlink()
    with pytest.raises(UserError, match="cannot read: No such file"):
        run.load_model(path, digest)


def test_the_summary_marks_the_end(run):
    with pytest.raises(UserError, match="the run is not finished; go on with: swalp resume"):
        run.summary()
    run.finish({"rows": []})
    assert run.finished
    assert run.summary() == {"rows": []}


def test_only_one_process_works_on_a_run(run):
    message = "another process is working on this run"
    with run.locked(), pytest.raises(UserError, match=message), run.locked():
        pass
    with run.locked():
        pass


def test_sessions_are_lines(run):
    run.append_session({"a": 1})
    run.append_session({"a": 2})
    lines = (run.path / "sessions.jsonl").read_text().splitlines()
    assert [json.loads(line)["a"] for line in lines] == [1, 2]
