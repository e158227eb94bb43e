import builtins
import errno

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from swalp.report.scalars import Scalars
from swalp.training import run_directory, study
from swalp_command import cli
from tiny_runs import settings, train

TINY = ["train", "digits", "--set", "model=mlp", "--set", "width=4", "--set", "batch_size=200"]
TINY += ["--set", "epochs=3", "--set", "averaging_start=1", "--set", "seeds=1"]
TINY += ["--set", 'arms=["float", "paper-small-block-8"]']


def scalars(folder):
    """Tags to lists of (step, value), as TensorBoard reads them."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def require_equal_to_records(folder, run):
    for arm in ("float", "paper-small-block-8"):
        found = scalars(folder / arm / "seed-0")
        rows = [row for row in run.metrics() if row["arm"] == arm]
        for key in ("test_error", "train_loss", "average_error"):
            wanted = [(row["step"], row[key]) for row in rows if row[key] is not None]
            assert [step for step, _ in found[key]] == [step for step, _ in wanted]
            assert [value for _, value in found[key]] == pytest.approx(
                [value for _, value in wanted], rel=1e-6
            )
        assert [step for step, _ in found["step/loss"]] == list(range(1, 16))
        per_epoch = [value for _, value in found["step/loss"]]
        assert sum(per_epoch[:5]) / 5 == pytest.approx(rows[0]["train_loss"], rel=1e-5)
        assert not {"seed", "epoch", "step", "arm"} & set(found)


def test_scalars_are_the_records(tmp_path, capsys):
    status = cli.run([*TINY, "--out", f"{tmp_path}/run", "--tensorboard", f"{tmp_path}/board"])
    assert status == 0, capsys.readouterr().err
    require_equal_to_records(tmp_path / "board" / "run", run_directory.open_run(tmp_path / "run"))


def test_the_arm_of_a_recipe_file_stays_in_its_folder(tmp_path, capsys):
    (tmp_path / "mine.toml").write_text('base = "paper-big-block-8"')
    words = [*TINY, "--set", f'arms=["{tmp_path}/mine.toml"]', "--out", f"{tmp_path}/run"]
    assert cli.run([*words, "--tensorboard", f"{tmp_path}/board"]) == 0, capsys.readouterr().err
    (arm,) = (tmp_path / "board" / "run").iterdir()
    assert arm.name.endswith("mine.toml")
    assert "test_error" in scalars(arm / "seed-0")


@pytest.mark.parametrize("stop_at", [8, 22])
@pytest.mark.parametrize("watched_before", [True, False])
def test_a_resumed_run_has_each_step_once(tmp_path, capsys, stop_at, watched_before):
    from swalp.report.scalars import Scalars
    from swalp.training import data

    chosen = settings(averaging_start=1)
    run = run_directory.create(tmp_path / "run", chosen)
    if watched_before:
        done = []
        with (
            Scalars(tmp_path / "board" / "run", [], trajectories=2) as watch,
            pytest.raises(study.Stopped),
        ):
            study.train(
                run,
                data.load("digits"),
                watch=lambda moment: (done.append(1), watch(moment)),
                say=lambda line: None,
                stop=lambda: len(done) == stop_at,
            )
    else:
        with pytest.raises(study.Stopped):
            train(run, stop_at=stop_at)
    words = ["resume", f"{run.path}", "--tensorboard", f"{tmp_path}/board"]
    assert cli.run(words) == 0, capsys.readouterr().err
    if watched_before:
        require_equal_to_records(tmp_path / "board" / "run", run)
    else:
        for arm in ("float", "paper-small-block-8"):
            found = scalars(tmp_path / "board" / "run" / arm / "seed-0")
            rows = [row for row in run.metrics() if row["arm"] == arm]
            # Files of one second are read in the order of their names.
            assert sorted(step for step, _ in found["test_error"]) == [row["step"] for row in rows]


def test_without_tensorboard(tmp_path, capsys, monkeypatch):
    load = builtins.__import__

    def without(name, *rest):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError("No module named 'tensorboard'")
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    status = cli.run([*TINY, "--out", f"{tmp_path}/run", "--tensorboard", f"{tmp_path}/board"])
    assert status == 2
    assert "needs the package tensorboard" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    board = Scalars(tmp_path / "board", [], trajectories=1)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    moment = study.Progress("float", 0, 1, 1, 2, 0.1, 1.0, None)
    board(moment)
    monkeypatch.setattr(board._writer, "add_scalar", full)
    monkeypatch.setattr(board._writer, "close", full)
    with pytest.raises(OSError, match="No space left") as caught, board:
        board(moment)
    assert caught.value.filename == str(tmp_path / "board")
    with pytest.raises(ValueError, match="of the run"), board:
        raise ValueError("of the run")
    with pytest.raises(OSError, match="board"), board:
        pass
