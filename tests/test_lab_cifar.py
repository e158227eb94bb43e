"""The CIFAR table: published figures as they are published, measured ones from finished runs."""

import dataclasses
import shutil

import pytest

from swalp.lab.claim import Context, pick
from swalp.lab.claims import cifar
from swalp.training import run_directory
from swalp.training.mistakes import UserError
from tiny_runs import settings as tiny

CONTEXT = Context(None, False, lambda done, total: None, lambda: False, 1)


@pytest.fixture
def records(tmp_path):
    config = tiny().model_copy(
        update={
            "data": "cifar10", "model": "small-vgg", "width": 16, "epochs": 15, "seeds": 2,
            "arms": ("float", "paper-small-block-8", "paper-small-block-4"),
        }
    )  # fmt: skip
    run = run_directory.create(tmp_path / "small", config)
    errors = {
        ("float", "sgd"): [14.0, 14.2],
        ("float", "average"): [13.0, 13.2],
        ("paper-small-block-8", "sgd"): [15.0, 15.2],
        ("paper-small-block-8", "average"): [13.3, 13.5],
        ("paper-small-block-4", "sgd"): [25.0, 25.2],
    }
    rows = [
        {"arm": arm, "model": model, "test_error": found} for (arm, model), found in errors.items()
    ]
    run.finish({"data": "cifar10", "train_examples": 50000, "test_examples": 10000, "rows": rows})
    run_directory.create(tmp_path / "unfinished", config)
    run_directory.create(tmp_path / "digits", tiny()).finish({"rows": []})
    return dataclasses.replace(cifar.CLAIM.full, records=str(tmp_path))


def test_measured_stands_beside_published(records):
    rows = cifar.run(records, CONTEXT)
    measured = pick(rows, kind="measured")
    assert [row["column"] for row in measured] == list(cifar.COLUMNS)
    assert measured[3]["test_error"] == pytest.approx(13.4)
    assert measured[3]["seeds"] == 2
    table = cifar.table(records, rows)
    (line,) = [line for line in table.splitlines() if "small-vgg" in line]
    assert "measured |     15 | 14.10 ± 0.14 | 13.10 ± 0.14 |" in line
    vgg = next(line for line in table.splitlines() if line.startswith("| cifar10, VGG16"))
    cells = [cell.strip() for cell in vgg.split("|")[4:8]]
    assert cells == ["6.81 ± 0.09", "6.51 ± 0.14", "7.61 ± 0.15", "6.70 ± 0.12"]
    assert len(cifar.plot(records, rows).axes) == 1


def test_the_verdict_says_what_epochs_were_run(records):
    rows = cifar.run(records, CONTEXT)
    verdict = cifar.verdict(records, rows)
    assert verdict.holds
    assert "15 epochs: 8 bits cost SGD +1.00 points" in verdict.sentence
    assert "No run here has the published networks' epochs" in verdict.sentence
    for row in rows:
        if row["kind"] == "measured" and row["column"] == "8-bit SWALP":
            row["test_error"] = 16.0
    assert not cifar.verdict(records, rows).holds


def test_without_a_run_it_says_how_to_make_one(records, tmp_path):
    shutil.rmtree(tmp_path / "small")
    with pytest.raises(UserError, match="swalp train cifar10-small"):
        cifar.run(records, CONTEXT)
