import json
import re

import pytest

from swalp import recipes
from swalp.report import records
from swalp.report.records import Claim, Run, load
from swalp.training import kept_recipes
from swalp.training.mistakes import UserError

CONFIG = '# the data set\ndata = "digits"\n# how many seeds\nseeds = 2\nepochs = 3\n'
METRIC = {"arm": "float", "seed": 0, "epoch": 1, "step": 5, "test_error": 4.0}
ROW = {"arm": "float", "model": "sgd", "test_error": [1.0, 2.0]}
RECORD = {
    "version": 1,
    "claim": "c",
    "title": "A claim",
    "verdict": {"holds": True, "sentence": "It is so."},
}


def write_run(path, **files):
    path.mkdir(parents=True, exist_ok=True)
    contents = {
        "config.toml": CONFIG,
        "metrics.jsonl": json.dumps(METRIC) + "\n",
        "summary.json": json.dumps({"data": "digits", "rows": [ROW]}),
    }
    for name, content in (contents | files).items():
        if content is not None:
            (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_claim(path, **files):
    path.mkdir(parents=True, exist_ok=True)
    contents = {"record.json": json.dumps(RECORD), "rows.jsonl": '{"step": 1, "error": 2.5}\n'}
    for name, content in (contents | files).items():
        (path / name).write_text(content)
    return path


def test_a_run(tmp_path):
    run = load(str(write_run(tmp_path / "made")))
    assert isinstance(run, Run)
    assert run.name == "made"
    assert run.settings == {"data": "digits", "seeds": 2, "epochs": 3}
    assert run.meanings == {"data": "the data set", "seeds": "how many seeds"}
    assert run.metrics == [METRIC]
    assert run.summary == {"data": "digits", "rows": [ROW]}
    assert (run.sessions, run.diagnostics, run.picture) == ([], [], None)


def test_a_run_keeps_recipes(tmp_path):
    recipe = recipes.get("fp8")
    said = kept_recipes.save(write_run(tmp_path), {"my.toml": recipe})
    write_run(tmp_path, **{"run.json": json.dumps(said)})
    assert load(str(tmp_path)).recipes == {"my.toml": recipe}
    (tmp_path / "recipes" / "my.toml").write_text("")
    with pytest.raises(UserError, match=r"my\.toml: not the recipe that the run began with"):
        load(str(tmp_path))


def test_an_unfinished_run_may_end_in_half_a_line(tmp_path):
    half = json.dumps(METRIC) + "\n" + json.dumps(METRIC)[:20]
    run = load(str(write_run(tmp_path, **{"metrics.jsonl": half, "summary.json": None})))
    assert run.metrics == [METRIC]
    assert run.summary is None


def test_a_claim_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = "# Title\n\n| n | *error* |\n|---|---:|\n| `a` | **1** |\n\n<b>raw</b> ![x](plot.png)\n"
    write_claim(tmp_path / "reproduced" / "first", **{"README.md": table})
    claim = load("first")
    assert isinstance(claim, Claim)
    assert (claim.title, claim.rows) == ("A claim", [{"step": 1, "error": 2.5}])
    (found,) = claim.tables
    assert (found.title, found.header, found.rows) == ("Title", ("n", "*error*"), (("a", "1"),))
    assert found.numeric == (False, True)
    assert claim.page == ""
    write_claim(
        tmp_path / "experiments" / "first", **{"record.json": json.dumps(RECORD | {"title": "B"})}
    )
    assert load("first").title == "B"


def test_another_experiment_is_its_page_and_sheet(tmp_path):
    (tmp_path / "README.md").write_text("# Heading\n\n<script>x</script> *so* ![p](a.png)\n")
    (tmp_path / "results.csv").write_text("name,count,share\na,3,0.5\nb,4,\n")
    claim = load(str(tmp_path))
    assert claim.record == {}
    assert claim.rows == [
        {"name": "a", "count": 3, "share": 0.5},
        {"name": "b", "count": 4, "share": ""},
    ]
    assert "<em>so</em>" in claim.page
    assert "<script>" not in claim.page
    assert "<img" not in claim.page


def test_several_files_of_rows_are_told_apart(tmp_path):
    (tmp_path / "mnist-rows.jsonl").write_text('{"error": 1}\n')
    (tmp_path / "cifar10-rows.jsonl").write_text('{"error": 2}\n')
    assert load(str(tmp_path)).rows == [
        {"rows": "cifar10", "error": 2},
        {"rows": "mnist", "error": 1},
    ]


def test_settings_may_begin_with_a_byte_order_mark(tmp_path):
    path = write_run(tmp_path)
    before = load(str(path)).settings
    file = path / "config.toml"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load(str(path)).settings == before


MISTAKES = [
    ({"metrics.jsonl": '{"a": 1}\n'}, r"metrics.jsonl: damaged: record 1 has no 'arm'"),
    ({"metrics.jsonl": "{\n{}\n"}, r"metrics.jsonl: line 1: damaged: Expecting property name"),
    ({"metrics.jsonl": "3\n"}, r"metrics.jsonl: line 1: damaged: not a JSON object"),
    ({"metrics.jsonl": b"\xff\n"}, r"metrics.jsonl: line 1: damaged: not UTF-8 text \(byte 0\)"),
    ({"summary.json": "{"}, r"summary.json: damaged: Expecting"),
    ({"summary.json": "{}"}, r"summary.json: damaged: it has no rows"),
    ({"summary.json": '{"rows": [{}]}'}, r"summary.json: damaged: record 1 has no 'arm'"),
    ({"config.toml": "a = = 1"}, r"config.toml: damaged: Invalid value"),
    ({"diagnostics.jsonl": "{}\n"}, r"diagnostics.jsonl: damaged: record 1 has no 'arm'"),
]


@pytest.mark.parametrize(("files", "message"), MISTAKES, ids=[text for _, text in MISTAKES])
def test_damage_gets_one_line(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as caught:
        load(str(write_run(tmp_path, **files)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record", ["{}x", "{}", '{"claim": "c"}', "[]"])
def test_a_damaged_claim(tmp_path, record):
    with pytest.raises(UserError, match=r"record\.json: damaged"):
        load(str(write_claim(tmp_path, **{"record.json": record})))


def test_no_such_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments" / "known").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for word, message in [
        (
            "none",
            "none: no such directory, and no claim of that name in experiments/ or reproduced/",
        ),
        ("none", "; claims here: known"),
        ("some/none", "some/none: no such directory"),
        ("file", "file: not a directory"),
        ("experiments", "experiments: neither a run (it has no config.toml and metrics.jsonl) nor"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            load(word)
    assert records.CLAIM_FOLDERS == ("experiments", "reproduced")
