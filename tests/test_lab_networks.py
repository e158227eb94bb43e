"""The claims on networks, on the scanned digits: rows, tables, pictures, verdicts both ways."""

import dataclasses
import math
import os

import pytest
import torch

from swalp import recipes
from swalp.lab import network
from swalp.lab.claim import Context, Stopped, pick
from swalp.lab.claims import averaging, related_work, word_length
from swalp.lab.network import Training
from swalp.lab.parallel import in_processes
from swalp.training import averages, data, loop
from swalp.training.mistakes import UserError

TRAINING = Training("mlp", 16, 50, 4, 2, 0.1, 0.02, 0.9, 5e-4)
ALONE = Context(None, False, lambda done, total: None, lambda: False, 1)
WORDS = dataclasses.replace(
    word_length.CLAIM.quick,
    networks=(("digits", "mlp", 16),),
    word_lengths=(3, 8),
    batch_size=50,
    epochs=4,
    averaging_start=2,
    seeds=1,
)
MODELS = ("SGD", "average", related_work.LONGER)
FORMATS = related_work.Settings("digits", TRAINING, (8, 4), "every=2", 1)
AVERAGING = dataclasses.replace(
    averaging.FREQUENCY.quick, data="digits", model="mlp", width=16, examples=900, epochs=4
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def nothing():
    pass


def test_training_is_that_of_the_training_loop():
    digits = data.load("digits")
    config = averaging.FREQUENCY.full.config("paper-small-block-8", 3).model_copy(
        update={
            "data": "digits", "model": "mlp", "width": 16, "batch_size": 50, "epochs": 3,
            "averaging_start": 2, "average_every": 5, "learning_rate": 0.1,
            "averaging_rate": 0.02,
        }
    )  # fmt: skip
    run = loop.begin(config, digits, "paper-small-block-8", 3)
    records = [step.record for step in loop.train(run, digits, config) if step.record]
    training = dataclasses.replace(TRAINING, epochs=3)
    recipe = recipes.get("paper-small-block-8")
    rows = network.train(training, digits, recipe, 3, ["every=5"], nothing)
    assert [row["test_error"] for row in rows] == [
        records[1]["test_error"],
        records[2]["average_error"],
    ]


def test_a_run_that_diverges_counts_as_guessing():
    digits = data.load("digits")
    wild = dataclasses.replace(TRAINING, learning_rate=1e30)
    rows = network.train(wild, digits, None, 0, ["every=1"], nothing)
    assert [row["test_error"] for row in rows] == [network.FAILED] * 2


def test_word_lengths():
    rows = word_length.run(WORDS, ALONE)
    assert len(rows) == 2 * (1 + 2 * 2)
    assert pick(rows, word_length=8, block="small", model="average")[0]["test_error"] < 20
    verdict = word_length.verdict(WORDS, rows)
    assert "on digits the shortest word within 1 point of float SGD" in verdict.sentence
    assert "| 3 " in word_length.table(WORDS, rows)
    assert len(word_length.plot(WORDS, rows).axes) == 1


def test_the_shortest_word_is_read_off_the_rows():
    def rows(errors):
        made = [{"data": "digits", "word_length": None, "model": "SGD", "test_error": 5.0}]
        return made + [
            {
                "data": "digits", "word_length": bits, "block": block, "model": model,
                "test_error": error,
            }
            for (block, model), pair in errors.items()
            for bits, error in zip((3, 8), pair, strict=True)
        ]  # fmt: skip

    good = {("big", "SGD"): (20, 9), ("big", "average"): (19, 5.5)}
    good |= {("small", "SGD"): (15, 5.9), ("small", "average"): (6, 5)}
    found = rows(good)
    assert word_length.shortest(WORDS, found, "digits", "big", "SGD") is None
    assert word_length.shortest(WORDS, found, "digits", "small", "SGD") == 8
    assert word_length.shortest(WORDS, found, "digits", "small", "average") == 3
    assert word_length.verdict(WORDS, found).holds
    same = good | {(block, "average"): good[block, "SGD"] for block in word_length.BLOCKS}
    assert not word_length.verdict(WORDS, rows(same)).holds  # averaging saves nothing
    unknown = good | {("small", "average"): (math.nan, math.nan)}
    assert word_length.shortest(WORDS, rows(unknown), "digits", "small", "average") is None
    bad = good | {("small", "average"): (20, 7)}
    assert not word_length.verdict(WORDS, rows(bad)).holds


def test_formats_of_related_work():
    seen = []
    context = dataclasses.replace(ALONE, progress=lambda *parts: seen.append(parts))
    rows = related_work.run(FORMATS, context)
    assert seen[-1] == (21, 21)
    # Each has an iterate and an average; what is rounded stochastically, and float, one more.
    assert len(rows) == 2 * 21 + 11
    longer = pick(rows, scheme="BFP, small block", bits=8, model=related_work.LONGER)
    assert [(row["rounding"], row["epoch"]) for row in longer] == [("stochastic", TRAINING.epochs)]
    assert {row["scheme"] for row in rows} == {"float", *related_work.SCHEMES}
    eight = pick(rows, bits=8, rounding="stochastic", model="average")
    assert all(row["test_error"] < 30 for row in eight if "BFP" in row["scheme"])
    verdict = related_work.verdict(FORMATS, rows)
    assert "at 4 bits" in verdict.sentence
    assert "| 8 bits " in related_work.table(FORMATS, rows)
    assert len(related_work.plot(FORMATS, rows).axes) == 2
    for row in rows:
        if row["model"] == "average" and row["rounding"] == "stochastic":
            row["test_error"] += 100
    assert not related_work.verdict(FORMATS, rows).holds


def test_gains_from_averaging_are_judged_by_their_scatter():
    gains: dict[str, tuple[float, ...]] = dict.fromkeys(related_work.SCHEMES, (0.4, 0.2, 0.3))

    def rows(gains):
        rows = [
            {"scheme": scheme, "bits": 8, "rounding": rounding, "model": model, "seed": seed,
             "test_error": 13 + seed - (gain if model == "average" else 0)
             - (0.5 if model == related_work.LONGER else 0)}
            for scheme, values in gains.items()
            for rounding in related_work.ROUNDINGS
            for seed, gain in enumerate(values)
            for model in MODELS
        ]  # fmt: skip
        float_row = {"scheme": "float", "bits": 32, "rounding": "", "seed": 0, "test_error": 11}
        return rows + [float_row | {"model": model} for model in MODELS]

    def verdict(**changed):
        return related_work.verdict(settings, rows(gains | changed))

    settings = dataclasses.replace(FORMATS, bits=(8,), seeds=3)
    only = {"scheme": "MX", "bits": 8, "rounding": "stochastic"}
    assert related_work.gains(rows(gains), only) == pytest.approx(gains["MX"])
    assert verdict().holds
    assert "all 4 epochs it is better by -0.20 ± 0.06" in verdict().sentence
    assert not verdict(**dict.fromkeys(related_work.SCHEMES, (0.4,))).holds  # one seed is chance
    undecided = verdict(MX=(-0.3, 0.3, -0.06))
    assert undecided.holds
    assert "it helps in 4 of them, and hurts in none" in undecided.sentence
    hurt = verdict(MX=(-0.3, -0.2, -0.25))
    assert not hurt.holds
    assert "and hurts in MX" in hurt.sentence
    assert not verdict(**dict.fromkeys(related_work.SCHEMES, (-0.9, 1.2, 0.3))).holds


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scheme", related_work.SCHEMES)
def test_every_role_of_a_scheme_has_its_bits(scheme, bits):
    recipe = related_work.recipe(scheme, bits, "stochastic")
    for role in ("weight", "activation", "error", "gradient", "momentum"):
        assert getattr(recipe, role).format.bits == bits


def killed(check):
    os._exit(9)


def test_processes_give_the_same_rows_and_stop():
    settings = dataclasses.replace(AVERAGING, what="precision", arms=("paper-small-block-4",))
    two = dataclasses.replace(ALONE, workers=2)
    rows = averaging.run(settings, two)
    assert averaging.run(settings, ALONE) == rows
    assert "| float32 " in averaging.table(settings, rows)
    assert len(averaging.plot(settings, rows).axes) == 1
    assert "bits or more" in averaging.precision_verdict(settings, rows).sentence

    long = dataclasses.replace(settings, seeds=50, epochs=30)
    with pytest.raises(Stopped):
        averaging.run(long, dataclasses.replace(two, stopped=lambda: True))
    with pytest.raises(UserError, match="was killed"):
        in_processes(two, [killed])


def test_frequencies_and_their_verdict():
    rows = averaging.run(AVERAGING, ALONE)
    names = averaging.averages(rows)
    assert names[0] == averaging.ITERATE
    assert all(averages.parse(name) for name in names[1:])
    table = averaging.table(AVERAGING, rows)
    assert "| every step " in table
    assert "every second epoch" not in table or "every=2epochs" in names
    assert len(averaging.plot(AVERAGING, rows).axes) == 1

    def made(often, seldom, iterate):
        return [
            {"arm": arm, "seed": 0, "epoch": epoch, "average": name, "test_error": error}
            for arm in AVERAGING.arms
            for epoch in (AVERAGING.averaging_start + 1, AVERAGING.epochs)
            for name, error in (
                ("iterate", iterate), ("every=1", often), ("every=epoch", seldom),
            )
        ]  # fmt: skip

    assert averaging.frequency_verdict(AVERAGING, made(3.0, 3.1, 4.0)).holds
    assert not averaging.frequency_verdict(AVERAGING, made(3.5, 3.1, 4.0)).holds
    assert not averaging.frequency_verdict(AVERAGING, made(3.0, 5.0, 4.0)).holds
