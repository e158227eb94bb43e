import pytest
import torch
from torch import nn

import swalp
from swalp.averaging import Equal, Exponential, Window
from swalp.recipes import Quantizer
from swalp.training import averages

OWN = {"start": 4, "every": 3, "per_epoch": 10}


def begun(text, arm="float"):
    recipe = None if arm == "float" else swalp.recipes.get(arm)
    return averages.parse(text).begin(nn.Linear(1, 1), recipe, **OWN, seed=0)


@pytest.mark.parametrize(
    ("text", "start", "every", "kind", "accumulator"),
    [
        ("every=20", 40, 20, Equal(), torch.float32),
        ("every=epoch", 40, 10, Equal(), torch.float32),
        ("every=3epochs start=0", 0, 30, Equal(), torch.float32),
        ("start=7", 70, 3, Equal(), torch.float32),
        ("decay=0.5 precision=float64", 40, 3, Exponential(0.5), torch.float64),
        ("window=5", 40, 3, Window(5), torch.float32),
        (
            "precision=bfp6",
            40,
            3,
            Equal(),
            Quantizer(swalp.BlockFloat(6), swalp.Stochastic()),
        ),
    ],
)
def test_words_become_an_average(text, start, every, kind, accumulator):
    average = begun(text)
    assert (average.start, average.every) == (start, every)
    assert (average.kind, average.accumulator) == (kind, accumulator)


def test_the_order_of_words_does_not_matter():
    assert averages.parse("precision=bfp4  every=2").text == "every=2 precision=bfp4"
    assert averages.parse("precision=bfp4 every=2") == averages.parse("every=2 precision=bfp4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an average is described by words such as"),
        ("every", "'every' is not one of words such as every=20"),
        ("every=1 every=2", "'every=2' is not one of"),
        ("every=0", "every is a number of steps, epoch or 2epochs"),
        ("every=0epochs", "every is a number of steps"),
        ("every=x", "every is a number of steps"),
        ("start=-1", "start must be 0 or more epochs"),
        ("start=1.5", r"start=1\.5 is no number"),
        ("decay=2", "must lie between 0 and 1"),
        ("decay=0.9 window=2", "a decay or a window, not both"),
        ("window=2 precision=bfp8", "a window keeps iterates and has no precision"),
        ("window=0", "length=0 must be 1"),
        ("precision=exact decay=0.9", "has no exact integer sum"),
        ("precision=bfp", "precision is float32, float64, exact or a format: "),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(ValueError, match=message):
        averages.parse(text)
