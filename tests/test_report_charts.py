import pytest

from swalp.report.charts import Chart, Panel, Series, flat, guess, over_seeds, words


def test_over_seeds():
    rows = [
        {"epoch": 2, "error": 3.0},
        {"epoch": 1, "error": 5.0},
        {"epoch": 2, "error": 6.0},
        {"epoch": 2, "error": None},
        {"epoch": 3},
    ]
    assert over_seeds(rows, "epoch", "error") == ([1, 2], [5.0, 4.5], [5.0, 3.0], [5.0, 6.0])


def test_flat():
    assert flat({"a": 1, "averages": {"every=epoch": {"error": 2.5}}}) == {
        "a": 1,
        "averages every=epoch error": 2.5,
    }


@pytest.mark.parametrize(
    ("key", "text"),
    [("test_error", "test error, %"), ("squared_distance", "squared distance"), ("step", "step")],
)
def test_words(key, text):
    assert words(key) == text


def test_numbers_are_short():
    series = Series("s", [0.0, 1.0, 2.0], [1 / 3, None, 12345678.9], [float("nan")] * 3, [1.0] * 3)
    panel = Panel("p", "x", "y", [series])
    (plain,) = Chart("id", "title", [panel]).plain()["panels"]
    assert plain["series"][0]["x"] == [0, 1, 2]
    assert plain["series"][0]["y"] == [0.33333, None, 12346000]
    assert plain["series"][0]["low"] == [None] * 3


def test_evenly_spaced_numbers_are_three():
    places = [-2.5 + place / 3 for place in range(50)]
    plain = Panel("p", "x", "y", [Series("s", places, places)]).plain()
    assert plain["series"][0]["x"] == {"from": -2.5, "by": pytest.approx(1 / 3), "count": 50}
    uneven = [*places[:-1], 99.0]
    assert len(Panel("p", "x", "y", [Series("s", uneven, uneven)]).plain()["series"][0]["x"]) == 50


def test_rows_that_nobody_described():
    rows = [{"method": "problem", "nearest": 0.5}]
    for seed in (0, 1):
        for step in (10, 100, 10_000):
            for method, size in (("SGD", 1), ("SWALP", 0.001)):
                rows.append({"seed": seed, "method": method, "step": step, "averaged": step,
                             "distance": size * (seed + 1) / step})  # fmt: skip
    (panel,) = guess(rows, ("step", "averaged"))
    assert (panel.x_label, panel.y_label) == ("step", "distance")
    assert (panel.log_x, panel.log_y, panel.whole) == (True, True, True)
    assert [series.label for series in panel.series] == ["SGD", "SWALP"]
    sgd, swalp = panel.series
    assert (sgd.x, sgd.y) == ([10, 100, 10_000], pytest.approx([0.15, 0.015, 0.00015]))
    assert (sgd.low[0], sgd.high[0]) == (0.1, 0.2)
    assert (sgd.strong, swalp.strong) == (False, True)
    assert guess(rows, ("epoch",)) == []


def test_rows_that_stand_for_all_are_marks():
    rows = [{"method": "SGD", "bits": None, "error": 3.0, "device": "cpu"}]
    rows += [
        {"method": "SGD-LP", "bits": bits, "error": 9.0 - bits, "device": "cpu"} for bits in (2, 4)
    ]
    (panel,) = guess(rows, ("bits",))
    (series,) = panel.series
    assert (series.label, series.y) == ("SGD-LP", [7.0, 5.0])  # the device says nothing
    assert [(mark.axis, mark.at, mark.label) for mark in panel.marks] == [("y", 3.0, "SGD")]
    assert panel.note == "At the right end: SGD-LP 5."


def test_what_was_set_is_a_name_and_no_measure():
    """Several rows of one seed at one place: bands over them would mix settings."""
    rows = [
        {"seed": seed, "bits": bits, "gap": 2.0**-bits, "rate": rate, "square": rate / bits + seed}
        for seed in (0, 1)
        for bits in (3, 4)
        for rate in (1.0, 0.0625)
    ]
    (panel,) = guess(rows, ("bits",))  # none of the gap, which the bits say already
    assert panel.y_label == "square"
    assert [series.label for series in panel.series] == ["rate 1", "rate 0.0625"]
    assert panel.series[0].y == pytest.approx([1 / 3 + 0.5, 1 / 4 + 0.5])
    assert panel.series[0].high == pytest.approx([1 / 3 + 1, 1 / 4 + 1])
