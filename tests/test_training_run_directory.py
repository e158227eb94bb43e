import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import swalp
from swalp.training import config, data, run_directory, study
from swalp.training.mistakes import UserError
from tiny_runs import finished, settings, train


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
        ("{}", "damaged: it has no version"),
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


def test_a_record_that_was_cut_off_is_none(run):
    run.append_metrics({"epoch": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lo')
    assert run.metrics() == [{"epoch": 1}]


def test_two_processes_that_begin_one_run(tmp_path, monkeypatch):
    """Both see an empty directory; the second leaves alone what the first made there."""
    path, first = tmp_path / "run", []
    make = Path.mkdir

    def first_the_other(self, *arguments, **options):
        if self.name == "checkpoints" and not first:
            first.append(None)
            first[0] = run_directory.create(path, settings())
        return make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", first_the_other)
    with pytest.raises(UserError, match="the directory is not empty"):
        run_directory.create(path, settings(epochs=9))
    assert first[0].config() == settings()


def test_metrics_are_cut_back_to_a_checkpoint(run):
    run.append_metrics({"epoch": 1, "loss": 1 / 3})
    size, sha256 = run.metrics_so_far()
    run.append_metrics({"epoch": 2})
    assert run.metrics() == [{"epoch": 1, "loss": 1 / 3}, {"epoch": 2}]
    run.truncate_metrics(size, sha256)
    run.append_metrics({"epoch": 7})
    assert run.metrics() == [{"epoch": 1, "loss": 1 / 3}, {"epoch": 7}]


def test_a_disk_that_is_full_names_the_metrics(run, monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run.append_metrics({"epoch": 1})
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left") as caught:
        run.metrics_so_far()
    assert caught.value.filename == str(run.path / "metrics.jsonl")


def test_metrics_that_were_changed_are_not_gone_on_with(run):
    run.append_metrics({"epoch": 1, "loss": 1.5})
    size, sha256 = run.metrics_so_far()
    path = run.path / "metrics.jsonl"
    changed = path.read_bytes().replace(b"1.5", b"4.5") + b"more"
    path.write_bytes(changed)
    with pytest.raises(UserError, match="are not the records that the checkpoint counts; put them"):
        run.truncate_metrics(size, sha256)
    assert path.read_bytes() == changed


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


def test_commands_to_copy_are_quoted(tmp_path):
    path = tmp_path / "my runs; first"
    path.mkdir()
    (path / "there").touch()
    with pytest.raises(UserError, match=f"swalp resume '{path}'$"):
        run_directory.create(path, settings())


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


RECIPE = 'base = "paper-small-block-8"\nerror = "float"\n\n[[overrides]]\nkind = "Linear"\n'
RECIPE += 'activation = "bfp4 nearest"\n'


@pytest.fixture
def own_recipe(tmp_path, monkeypatch):
    """A recipe file of the user's, by its path from where the user is."""
    monkeypatch.chdir(tmp_path)
    path = Path("mine") / "my3.toml"
    path.parent.mkdir()
    path.write_text(RECIPE)
    return path


def test_a_run_keeps_its_recipe_files(own_recipe, monkeypatch):
    arm = str(own_recipe)
    run = run_directory.create(Path("run").absolute(), settings(arms=("float", arm)))
    recipe = swalp.recipes.load(own_recipe)
    assert swalp.recipes.load(run.path / "recipes" / "mine-my3.toml") == recipe
    own_recipe.write_text('base = "fp8"\n')
    assert run.config().recipe(arm) == recipe
    own_recipe.unlink()
    monkeypatch.chdir("/")
    assert run.config().recipe(arm) == recipe
    assert run.config().recipe("float") is None
    assert run.config().arms == ("float", arm)
    again = config.load(str(run.path / "config.toml"))
    assert (again, again.recipe(arm)) == (run.config(), recipe)


def test_a_run_goes_on_with_the_recipe_that_it_began_with(own_recipe):
    changes = {"arms": (str(own_recipe),), "averages": ("precision=float64",)}
    finished(Path("whole"), **changes)
    run = run_directory.create(Path("run"), settings(**changes))
    with pytest.raises(study.Stopped):
        train(run, stop_at=7)
    own_recipe.write_text('base = "fp8"\n')
    train(run)
    for name in ("metrics.jsonl", "summary.json"):
        assert (run.path / name).read_bytes() == (Path("whole") / name).read_bytes()
    own_recipe.unlink()
    assert study.evaluate(run, data.load("digits")) == run.summary()


def test_settings_read_a_recipe_file_once(own_recipe):
    chosen = settings(arms=(str(own_recipe),))
    recipe = swalp.recipes.load(own_recipe)
    own_recipe.unlink()
    assert chosen.recipe(str(own_recipe)) == recipe
    assert run_directory.create(Path("run"), chosen).config() == chosen


def test_a_kept_recipe_is_checked(own_recipe):
    run = run_directory.create(Path("run"), settings(arms=(str(own_recipe),)))
    kept = run.path / "recipes" / "mine-my3.toml"
    kept.write_bytes(kept.read_bytes().replace(b"bfp4", b"bfp6"))
    with pytest.raises(UserError, match=r"mine-my3\.toml: not the recipe that the run began with"):
        run.config()
    kept.unlink()
    with pytest.raises(UserError, match=r"mine-my3\.toml: cannot read: No such file"):
        run.config()


def test_a_run_that_kept_no_recipes_reads_the_file(own_recipe):
    run = run_directory.create(Path("run"), settings(arms=(str(own_recipe),)))
    (run.path / "run.json").write_text('{"version": 1}\n')
    shutil.rmtree(run.path / "recipes")
    assert run.config().recipe(str(own_recipe)) == swalp.recipes.load(own_recipe)
    own_recipe.unlink()
    with pytest.raises(UserError, match="cannot read the recipe: No such file"):
        run.config()


def test_arms_that_would_share_a_folder_are_refused(own_recipe):
    Path("mine-my3.toml").write_text('base = "fp8"\n')
    arms = (str(own_recipe), "mine-my3.toml")
    with pytest.raises(UserError, match=r"would share the folder models/mine-my3\.toml; rename"):
        run_directory.create(Path("run"), settings(arms=arms))
    assert not Path("run").exists()
