import errno
import os

import pytest
import safetensors.torch
import torch

from swalp.training import checkpoint, data, run_directory, study
from swalp.training.augmentation import Draws
from swalp.training.mistakes import UserError
from tiny_runs import ARMS, finished, settings, train

STEPS = 2 * 15  # two arms, three epochs of five steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    return finished(tmp_path_factory.mktemp("whole"))


def results(run):
    """Everything that a run computed: metrics, summary and models, as bytes by name."""
    paths = [*run.path.glob("*.json*"), *run.path.rglob("models/**/*.safetensors")]
    return {
        str(path.relative_to(run.path)): path.read_bytes()
        for path in paths
        if path.name != "sessions.jsonl"
    }


def test_a_run_leaves_metrics_models_and_summary(whole):
    rows = whole.summary()["rows"]
    assert [(row["arm"], row["model"]) for row in rows] == [
        (arm, model)
        for arm in ARMS
        for model in ("sgd", "last", "average", "quantized", "quantized-activations")
    ]
    metrics = {(row["arm"], row["epoch"]): row for row in whole.metrics()}
    assert len(metrics) == 6
    for arm in ARMS:
        assert [metrics[arm, epoch]["averaged"] for epoch in (1, 2, 3)] == [0, 0, 5]
        assert metrics[arm, 2]["average_error"] is None
    by_name = {(row["arm"], row["model"]): row for row in rows}
    for arm in ARMS:
        assert by_name[arm, "sgd"]["test_error"] == [metrics[arm, 2]["test_error"]]
        assert by_name[arm, "last"]["test_error"] == [metrics[arm, 3]["test_error"]]
        assert by_name[arm, "average"]["test_error"] == [metrics[arm, 3]["average_error"]]
        assert by_name[arm, "average"]["test_error"][0] < 60  # chance is 90
    rates = [metrics["float", epoch]["learning_rate"] for epoch in (1, 2, 3)]
    assert rates == pytest.approx([0.1, 0.001, 0.05])


def test_sizes_are_those_of_the_tensors(whole):
    rows = {(row["arm"], row["model"]): row for row in whole.summary()["rows"]}
    weights, vectors = 64 * 8 + 8 * 8 + 8 * 10, 4 * 8 + 10  # of the mlp; batch norm and bias
    buffers = 4 * 8 * 4 + 2 * 8  # batch norm's means and variances, and its two counters
    exponents = 8 + 8 + 10 + 5  # of each output channel, and of each vector
    for model in ("sgd", "last", "average"):
        row = rows["float", model]
        assert row["model_bytes"] == 4 * (weights + vectors) + buffers
        assert row["training_bytes"] == 2 * 4 * (weights + vectors)
    low = rows[ARMS[1], "sgd"]
    assert low["training_bytes"] == 2 * (low["model_bytes"] - buffers)
    assert low["model_bytes"] - buffers - weights - vectors in (exponents, 2 * exponents)
    assert rows[ARMS[1], "average"]["model_bytes"] == rows["float", "sgd"]["model_bytes"]
    assert low["averaging_bytes"] == 0
    assert rows[ARMS[1], "average"]["averaging_bytes"] == 8 * (weights + vectors)


FURTHER = (
    "every=epoch",
    "start=0 every=2",
    "every=1 precision=bfp4[0]",
    "precision=float64",
    "decay=0.8",
    "window=3",
)


def test_several_averages_and_the_best_epoch_from_one_run(tmp_path):
    changes = {"averages": FURTHER, "validation_examples": 100, "batch_size": 150, "epochs": 4}
    whole = finished(tmp_path / "whole", **changes)
    summary = whole.summary()
    rows = {(row["arm"], row["model"]): row for row in summary["rows"]}
    assert (summary["train_examples"], summary["validation_examples"]) == (900, 100)
    # Six steps an epoch, averaged in the last two epochs.
    taken = {"every=epoch": 2, "start=0 every=2": 12, "window=3": 3}
    for arm in ARMS:
        for text in FURTHER:
            row = rows[arm, f"average {text}"]
            assert row["averaged"] == [taken.get(text, 12)]
            assert row["test_error"][0] < 60
        alike = rows[arm, "average precision=float64"]["test_error"]
        assert alike == pytest.approx(rows[arm, "average"]["test_error"], abs=0.2)
        coarse = rows[arm, "average every=1 precision=bfp4[0]"]
        assert coarse["test_error"] != rows[arm, "average"]["test_error"]
        errors = {
            record["epoch"]: record["average_validation_error"]
            for record in whole.metrics()
            if record["arm"] == arm
        }
        assert errors[2] is None
        (best,) = rows[arm, "best"]["epochs"]
        assert errors[best] == min(errors[3], errors[4])
    assert rows[ARMS[1], "quantized"]["weight"] == "bfp8[0]"
    assert rows[ARMS[1], "quantized"]["activation"] is None
    assert rows[ARMS[1], "quantized-activations"]["activation"] == "bfp8t[0,1]"
    assert rows["float", "quantized"]["model_bytes"] < rows["float", "average"]["model_bytes"] / 3
    assert study.evaluate(whole, data.load("digits")) == summary
    again = run_directory.create(tmp_path / "again", settings(**changes))
    for _ in range(3):
        with pytest.raises(study.Stopped):
            train(again, stop_at=11)
    train(again)
    assert results(again) == results(whole)


def test_an_average_that_takes_nothing_is_refused(tmp_path):
    run = run_directory.create(tmp_path, settings(averages=("start=2 every=2epochs",)))
    with pytest.raises(UserError, match="takes nothing: it starts after step 10 and takes every"):
        train(run)


def test_a_window_longer_than_the_run_is_refused(tmp_path):
    """All of a window has its memory from the start."""
    run = run_directory.create(tmp_path, settings(averages=("every=1 window=100000000",)))
    with pytest.raises(
        UserError, match=r"the run takes \d+ iterates, fewer than its window of 1000"
    ):
        train(run)


def test_evaluation_gives_the_same_errors(whole):
    assert study.evaluate(whole, data.load("digits")) == whole.summary()


def test_evaluation_looks_at_the_models(whole, tmp_path):
    run = finished(tmp_path)
    assert results(run) == results(whole)
    summary = run.summary()
    row = summary["rows"][-1]
    row["sha256"] = summary["rows"][-5]["sha256"]
    run.finish(summary)
    with pytest.raises(UserError, match="damaged: it does not match the SHA-256"):
        study.evaluate(run, data.load("digits"))


# In the middle of an epoch and at its end, before averaging, in it, and in the second arm.
@pytest.mark.parametrize("step", [1, 5, 10, 13, 15, 16, 22, 29, 30])
def test_a_stopped_run_ends_bit_for_bit_like_a_whole_one(whole, tmp_path, step):
    run = run_directory.create(tmp_path, settings())
    with pytest.raises(study.Stopped):
        train(run, stop_at=step)
    assert not run.finished
    train(run_directory.open_run(tmp_path))
    assert results(run) == results(whole)


@pytest.mark.parametrize("step", [1, 4, 9, 12])
def test_augmentation_and_dropout_survive_a_stop(tmp_path, step):
    changes = {
        "data": "cifar10",
        "augment": True,
        "model": "vgg16",
        "width": 2,
        "batch_size": 8,
        "averaging_start": 1,
        "average_every": "epoch",
        "arms": (ARMS[1],),
    }
    examples = data.synthetic("cifar10", 35)
    runs = [run_directory.create(tmp_path / name, settings(**changes)) for name in ("a", "b")]
    train(runs[0], examples=examples)
    random = torch.get_rng_state()
    with pytest.raises(study.Stopped):
        train(runs[1], stop_at=step, examples=examples)
    torch.manual_seed(step)
    train(runs[1], examples=examples)
    assert results(runs[0]) == results(runs[1])
    assert [record["averaged"] for record in runs[0].metrics()] == [0, 1, 2]
    assert study.evaluate(runs[0], examples) == runs[0].summary()
    torch.set_rng_state(random)


def test_augmentation_and_dropout_change_the_run(tmp_path):
    found = []
    examples = data.synthetic("cifar10", 35)
    for name, augment in (("plain", False), ("augmented", True)):
        chosen = settings(
            data="cifar10", model="vgg16-bn", width=2, batch_size=8, arms=ARMS[:1], augment=augment
        )
        run = run_directory.create(tmp_path / name, chosen)
        train(run, examples=examples)
        found.append([record["train_loss"] for record in run.metrics()])
    assert found[0] != found[1]


def test_averages_get_their_statistics_from_augmented_images(tmp_path):
    examples = data.synthetic("cifar10", 40)
    chosen = settings(
        data="cifar10", model="small-vgg", width=2, batch_size=8, arms=ARMS[:1], augment=True
    )
    run = run_directory.create(tmp_path, chosen)
    train(run, examples=examples)
    saved = safetensors.torch.load_file(run.model_path("float", 0, "average"))
    ((x, _),) = examples.train.batches([torch.arange(40)], Draws(0, chosen.epochs))
    first = torch.nn.functional.conv2d(x, saved["0.weight"], stride=2, padding=1)
    expected = first.mean((0, 2, 3))
    torch.testing.assert_close(saved["1.running_mean"], expected, rtol=1e-4, atol=1e-5)


def test_a_run_may_stop_often(whole, tmp_path):
    run = run_directory.create(tmp_path, settings())
    stops = 0
    while not run.finished:
        try:
            train(run, stop_at=4)
        except study.Stopped:
            stops += 1
    assert stops == STEPS // 4
    assert results(run) == results(whole)
    begun, ended = run.sessions()[::2], run.sessions()[1::2]
    assert [session["outcome"] for session in ended] == ["stopped"] * stops + ["finished"]
    assert all(session["torch"] == torch.__version__ for session in begun)


def test_a_killed_run_goes_on_from_its_last_checkpoint(whole, tmp_path):
    """Metrics and models that were written after the checkpoint are written again."""
    run = run_directory.create(tmp_path, settings(checkpoint_seconds=0.0))
    kept = []

    def watch(progress):
        if progress.step == 9:  # the checkpoint of step 8 is there
            kept.append(checkpoint.load_newest(run.checkpoints))
        if progress.step == 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.train(run, data.load("digits"), watch=watch, say=print, stop=lambda: False)
    for step in (16, 17):
        path = run.checkpoints / f"step-{step:012d}"
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    checkpoint.save(run.checkpoints, 8, kept[0].state)
    train(run)
    assert results(run).keys() == results(whole).keys()
    for name, content in results(whole).items():
        assert results(run)[name] == content, name


def test_a_run_without_a_checkpoint_begins_again(whole, tmp_path):
    run = run_directory.create(tmp_path, settings())
    run.append_metrics({"half": "written"})
    train(run)
    assert results(run) == results(whole)


def test_a_damaged_checkpoint_is_said(whole, tmp_path):
    run = run_directory.create(tmp_path, settings())
    for _ in range(2):
        with pytest.raises(study.Stopped):
            train(run, stop_at=7)
    damaged = checkpoint.newest(run.checkpoints)
    (damaged / "tensors.safetensors").write_bytes(b"")
    said = []
    train(run, said=said)
    assert len(said) == 1
    assert said[0].startswith(f"{damaged}: damaged: tensors.safetensors does not match its SHA-256")
    assert said[0].endswith(f"going on from {run.checkpoints / 'step-000000000007'}")
    assert results(run) == results(whole)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = run_directory.create(tmp_path, settings(learning_rate=1e38, checkpoint_seconds=0.0))
    with pytest.raises(UserError) as caught:
        train(run)
    text = str(caught.value)
    assert text.startswith("the loss is nan at step ")
    assert "of arm 'float', seed 0; layer '" in text
    last = checkpoint.newest(run.checkpoints)
    assert f"the last good checkpoint is {last}" in text
    assert checkpoint.load_newest(run.checkpoints).path == last
    assert run.sessions()[-1]["outcome"] == "failed"


def test_a_full_disk_stops_the_run_and_leaves_it_resumable(whole, tmp_path, monkeypatch):
    run = run_directory.create(tmp_path, settings())
    with pytest.raises(study.Stopped):
        train(run, stop_at=7)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError) as caught:
            train(run)
    assert str(caught.value).startswith(f"{tmp_path}/sessions.jsonl: No space left")
    assert "No space left on device; the last good checkpoint is" in str(caught.value)
    assert str(caught.value).endswith(f"go on with: swalp resume {tmp_path}")
    train(run)
    assert results(run) == results(whole)


def test_another_machine_is_said(whole, tmp_path):
    run = run_directory.create(tmp_path, settings())
    with pytest.raises(study.Stopped):
        train(run, stop_at=7)
    path = tmp_path / "sessions.jsonl"
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    said = []
    train(run, said=said)
    assert said == [
        f"this run began with torch 1.0, and goes on with {torch.__version__}: it may end "
        f"otherwise, in the last bits, than an uninterrupted one"
    ]


def test_a_batch_must_fit(tmp_path):
    run = run_directory.create(tmp_path, settings(batch_size=1001))
    with pytest.raises(UserError, match="batch_size = 1001 exceeds the 1000 training examples"):
        train(run)
