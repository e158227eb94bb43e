import pytest

from swalp.report import tables


def summary(*arms, **errors):
    rows = []
    for arm in arms:
        for model in ("sgd", "last", "average"):
            rows.append(
                {
                    "arm": arm,
                    "model": model,
                    "test_error": errors[f"{arm}_{model}"],
                    "model_bytes": 12345,
                    "training_bytes": 2000,
                    "averaging_bytes": 800 if model == "average" else 0,
                }
            )
    return {"data": "digits", "train_examples": 1000, "test_examples": 797, "rows": rows}


EXAMPLE = summary(
    "float",
    "low",
    float_sgd=[3.0, 4.0, 5.0],
    float_last=[3.5, 3.5, 3.5],
    float_average=[2.5, 3.5, 4.5],
    low_sgd=[5.0, 6.0, 7.0],
    low_last=[9.0, 10.0, 11.0],
    low_average=[3.5, 4.5, 4.5],
)


def test_table():
    lines = tables.render(EXAMPLE).splitlines()
    assert lines[0].split("  ")[0] == "model"
    assert lines[2].split() == ["float", "SGD", "4.00", "±", "1.00", "12,345", "2,000"]
    assert lines[3].split()[:5] == ["float", "SGD,", "last", "iterate", "3.50"]
    assert lines[4].split() == ["float", "SWA", "3.50", "±", "1.00", "12,345", "2,000", "800"]
    assert set(lines[1]) == set(lines[5]) == set(lines[9]) == {"-", " "}
    assert lines[8].startswith("low SWALP ")
    assert "mean ± standard deviation of 3 seeds" in lines[10]


def test_findings_are_computed_from_the_rows():
    sentence, note = tables.findings(EXAMPLE["rows"])
    assert sentence == (
        "low: low precision costs SGD +2.00 ± 0.00* points of test error; averaging brings back "
        "+1.83 ± 0.58*, which leaves SWALP +0.17 ± 0.58 from float SGD and +0.67 ± 0.58 from "
        "float SWA."
    )
    assert "paired by seed" in note


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.5], "+0.50"),
        ([-0.001], "+0.00"),
        ([-1.0, 1.0], "+0.00 ± 1.41"),
        ([-1.0, -1.0], "-1.00 ± 0.00*"),
        # t = 4.30 with 2 degrees of freedom is the 5 % bound: mean / (sd / sqrt(3)).
        ([1.0, 2.0, 2.36], "+1.79 ± 0.70*"),
        ([1.0, 2.0, 2.45], "+1.82 ± 0.74"),
    ],
)
def test_a_star_marks_what_the_spread_does_not_explain(values, shown):
    assert tables.difference(values) == shown


def test_one_seed_is_called_chance():
    rows = [row | {"test_error": row["test_error"][:1]} for row in EXAMPLE["rows"]]
    sentence, note = tables.findings(rows)
    assert "low precision costs SGD +2.00 points" in sentence
    assert note == "(One seed: the differences may be chance.)"
    assert "float SGD " in tables.render(EXAMPLE | {"rows": rows})


def test_without_float_there_is_nothing_to_compare_with():
    assert tables.findings(EXAMPLE["rows"][3:]) == []
    assert tables.findings(EXAMPLE["rows"][:3]) == []


def test_differing():
    assert tables.differing(EXAMPLE, EXAMPLE) == []
    rows = [dict(row) for row in EXAMPLE["rows"]]
    rows[2]["test_error"] = [2.5, 3.5, 4.0]
    assert tables.differing(EXAMPLE, {"rows": rows}) == [
        "float SWA, seed 3 of 3: 4.5 % became 4.0 %"
    ]


def test_pairs():
    assert tables.pairs({"a": 1, "long": "x y"}) == "a     1\nlong  x y"
