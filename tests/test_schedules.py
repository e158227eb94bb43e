import itertools

import pytest

from swalp.schedules import published


def rate(epoch):
    return published(epoch, start=200, learning_rate=0.05, averaging_rate=0.01)


def test_published_vgg16_rates():
    assert [rate(epoch) for epoch in (0, 99, 100)] == [0.05] * 3
    assert rate(140) == pytest.approx(0.05 * (1 - 0.99 * 0.5))
    assert [rate(epoch) for epoch in (180, 190, 199)] == [pytest.approx(0.0005)] * 3
    assert [rate(epoch) for epoch in (200, 299)] == [0.01] * 2


def test_falls_and_is_continuous_before_averaging():
    rates = [rate(epoch / 10) for epoch in range(2000)]
    assert all(0 <= before - after < 1e-4 for before, after in itertools.pairwise(rates))


def test_start_must_be_positive():
    with pytest.raises(ValueError, match="start=0 must be positive"):
        published(1, start=0, learning_rate=0.1, averaging_rate=0.1)
