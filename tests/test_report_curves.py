import io

import matplotlib.image
import numpy as np

from swalp.report import curves


def record(arm, seed, epoch, test_error, average_error=None):
    return {
        "arm": arm,
        "seed": seed,
        "epoch": epoch,
        "test_error": test_error,
        "average_error": average_error,
    }


METRICS = [
    record(arm, seed, epoch, 20 / epoch + seed, 4.0 + seed if epoch > 3 else None)
    for arm in ("float", "paper-small-block-8")
    for seed in (0, 1)
    for epoch in range(1, 6)
]


def pixels(metrics):
    content = curves.png(metrics, averaging_start=3, title="digits")
    return matplotlib.image.imread(io.BytesIO(content))


def test_the_picture_shows_the_records():
    image = pixels(METRICS)
    assert image.shape[0] > 500
    assert np.array_equal(image, pixels(METRICS))
    changed = [dict(row) for row in METRICS]
    changed[-1]["average_error"] = 9.0
    assert not np.array_equal(image, pixels(changed))


def test_bands_are_over_the_seeds():
    epochs, low, middle, high = curves._bands(METRICS, "float", "average_error")
    assert (epochs, low, middle, high) == ([4, 5], [4.0, 4.0], [4.5, 4.5], [5.0, 5.0])


def test_runs_with_perfect_or_few_epochs_are_drawn():
    assert pixels([record("float", 0, 1, 0.0)]).shape == pixels(METRICS).shape
