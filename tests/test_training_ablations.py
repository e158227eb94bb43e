from dataclasses import replace

from swalp.report import ablations as report
from swalp.training import ablations, data, loop
from tiny_runs import settings

CONFIG = settings(epochs=4, batch_size=100, seeds=2, arms=("paper-small-block-8",))


def test_averages_of_one_training_run():
    digits = data.load("digits")
    done = []
    rows = ablations.averaging(
        CONFIG, digits, examples=700, watch=lambda *steps: done.append(steps)
    )
    assert done == [(step, 2 * 4 * 7) for step in range(1, 57)]
    frequencies = ["every=1", "every=4", "every=epoch", "every=2epochs"]
    bits = [f"precision=bfp{bits}[0]" for bits in ablations.PRECISIONS]
    last = [row["average"] for row in rows if (row["seed"], row["epoch"]) == (1, 4)]
    assert last == ["iterate", *frequencies, *bits, "precision=float32"]
    before = [row["average"] for row in rows if (row["seed"], row["epoch"]) == (1, 3)]
    assert before == ["iterate", "every=1", "every=4", "every=epoch"]
    taken = {row["average"]: row["averaged"] for row in rows if row["epoch"] == 4}
    assert [taken[name] for name in ("iterate", *frequencies)] == [0, 14, 3, 2, 1]
    assert {taken[name] for name in (*bits, "precision=float32")} == {14}
    # The same numbers as of a training run with that frequency alone.
    alone = CONFIG.model_copy(update={"average_every": "epoch", "seeds": 1})
    part = replace(digits, train=digits.train.between(0, 700))
    trajectory = loop.begin(alone, part, "paper-small-block-8", 0)
    (*_, final) = loop.train(trajectory, part, alone)
    found = {(row["seed"], row["epoch"], row["average"]): row["test_error"] for row in rows}
    assert final.record["average_error"] == found[0, 4, "every=epoch"]
    assert final.record["test_error"] == found[0, 4, "iterate"]
    assert found[0, 4, "every=1"] == found[0, 4, "precision=float32"]


def test_one_question_alone_has_the_answers_of_both():
    digits = data.load("digits")
    both = ablations.averaging(CONFIG, digits, examples=700)
    for question in ablations.QUESTIONS:
        alone = ablations.averaging(CONFIG, digits, examples=700, questions=(question,))
        answers = ablations.answers(both, question, CONFIG.epochs)
        assert ablations.answers(alone, question, CONFIG.epochs) == answers
    assert {row["epoch"] for row in answers} == {4}


def test_precisions():
    rows = ablations.averaging(CONFIG, data.load("digits"), questions=("precision",))
    rows = ablations.answers(rows, "precision", CONFIG.epochs)
    assert len(rows) == 2 * (1 + len(ablations.PRECISIONS) + 1)
    errors = {row["average"]: row["test_error"] for row in rows if row["seed"] == 0}
    assert abs(errors["precision=bfp16[0]"] - errors["precision=float32"]) < 0.5
    assert errors["precision=bfp4[0]"] > errors["precision=float32"]
    text = report.table(rows)
    assert " bfp4[0] " in text
    assert "last iterate" in text
    assert report.precision_png(rows, "digits").startswith(b"\x89PNG")
    assert report.frequency_png(rows, "digits").startswith(b"\x89PNG")


def test_table():
    rows = [
        {"arm": "low", "seed": seed, "epoch": 2, "average": average, "averaged": n,
         "test_error": error + seed}
        for average, n, error in (("iterate", 0, 5.0), ("every=1", 9, 2.0), ("every=epoch", 2, 3.0))
        for seed in (0, 1)
    ]  # fmt: skip
    lines = [line.split("  ") for line in report.table(rows).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[2:5] == [
        ["low", "last iterate", "5.50 ± 0.71", "+3.00 ± 0.00*"],
        ["low", "every step", "9", "2.50 ± 0.71"],
        ["low", "every epoch", "2", "3.50 ± 0.71", "+1.00 ± 0.00*"],
    ]
