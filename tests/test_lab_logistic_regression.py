"""The logistic-regression claim on the scanned digits: rows, bits saved, verdicts both ways."""

import dataclasses

import pytest
import torch

from swalp.lab.claim import Context, pick
from swalp.lab.claims import logistic_regression as claim
from swalp.training import data
from swalp.training.datasets.images import MemoryImages

SMALL = dataclasses.replace(
    claim.CLAIM.quick, frac_bits=(2, 6), epochs=4, averaging_start=1, batch_size=20
)
CONTEXT = Context(None, False, lambda done, total: None, lambda: False, 2)


def digits(data_dir, download, l2):
    images = data.load("digits")
    return claim.problem_of(images.train, 10, l2), claim.problem_of(images.test, 10, l2)


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claim, "load", digits)
        return claim.run(SMALL, CONTEXT)


def test_there_is_a_row_for_each_model_and_seed(rows):
    assert len(rows) == SMALL.seeds * 3 * 2
    assert len(pick(rows, method="SWALP", frac_bits=2)) == SMALL.seeds
    for row in rows:
        assert 0 <= row["train_error"] < 40
        assert row["gradient_norm"] > 0
    for bits in SMALL.frac_bits:
        averaged = claim.mean(rows, "SWALP", bits, "gradient_norm")
        assert averaged < claim.mean(rows, "SGD-LP", bits, "gradient_norm")
    assert "| 6 (W = 8) |" in claim.table(SMALL, rows)
    assert len(claim.plot(SMALL, rows).axes) == 3


def test_what_is_measured_is_right():
    train, test = digits(None, False, 1e-2)
    w = torch.linspace(-1, 1, 650, dtype=torch.float64).reshape(65, 10).requires_grad_()
    logits = train.x.double() @ w
    loss = torch.nn.functional.cross_entropy(logits, train.y) + 1e-2 / 2 * w.square().sum()
    loss.backward()
    found = claim.measured(train, test, w.detach())
    assert found["objective"] == pytest.approx(loss.item())
    assert found["gradient_norm"] == pytest.approx(w.grad.norm().item())
    wrong = (logits.argmax(1) != train.y).double().mean().item()
    assert found["train_error"] == pytest.approx(100 * wrong)
    wrong = ((test.x.double() @ w).argmax(1) != test.y).double().mean().item()
    assert found["test_error"] == pytest.approx(100 * wrong)


def test_pixels_are_whole_255ths_whatever_their_scale():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    images = MemoryImages(
        pixels, torch.zeros(1, dtype=torch.int64), torch.tensor([33.3]), torch.tensor([78.6])
    )
    x = claim.problem_of(images, 10, 0.1).x
    assert torch.equal(x[0, :-1], torch.arange(256.0) / 255)
    assert x[0, -1] == 1


def made_up(low, averaged, sgd=7.0):
    errors = [("SGD", None, sgd), ("SWA", None, sgd)]
    for bits, iterate, average in zip((2, 4, 6, 8), low, averaged, strict=True):
        errors += [("SGD-LP", bits, iterate), ("SWALP", bits, average)]
    return [
        {"method": method, "frac_bits": bits, "train_error": error}
        for method, bits, error in errors
    ]


def test_bits_saved_are_interpolated():
    settings = claim.CLAIM.quick
    rows = made_up([14, 10, 8, 7], [9, 7.5, 6.9, 6.8])
    assert claim.bits_saved(settings, rows, 2) == (pytest.approx(3), True)
    assert claim.bits_saved(settings, rows, 4) == (pytest.approx(3), True)
    assert claim.bits_saved(settings, rows, 6) == (2, False)
    verdict = claim.verdict(settings, rows)
    assert verdict.holds
    assert "with 2 it does as well as SGD-LP with 5.0" in verdict.sentence
    assert "with 6 better than SGD-LP with 8" in verdict.sentence
    assert not claim.verdict(settings, made_up([14, 10, 8, 7], [9, 7.5, 7.1, 6.8])).holds
    assert not claim.verdict(settings, made_up([14, 10, 7.6, 7], [9, 7.5, 6.9, 6.8])).holds
    assert not claim.verdict(dataclasses.replace(settings, seeds=2), rows).holds
