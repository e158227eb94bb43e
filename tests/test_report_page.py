"""What the page says and how it is built, without a browser."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from swalp.report import page
from swalp.report.records import load
from swalp.report.run_sections import setting
from swalp.training import run_directory
from swalp.training.mistakes import UserError
from swalp_command import cli
from test_report_records import RECORD, write_claim, write_run
from tiny_runs import finished, settings, train

VOID = {"meta", "link", "input", "img", "br", "hr", "circle", "path"}


class Outline(HTMLParser):
    """The elements of a page, and that they nest."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names), (tag, attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A finished run of two seeds, with a further average."""
    return finished(tmp_path_factory.mktemp("runs") / "tiny", seeds=2, averages=["every=2"]).path


@pytest.fixture(scope="module")
def outline(tiny):
    return Outline(page.render([load(str(tiny))]))


def data(text, identity):
    found = re.search(rf'id="{identity}-data">(.*?)</script>', text, re.S)
    return json.loads(found[1])


def test_everything_of_a_run_is_there(tiny, outline):
    run = load(str(tiny))
    titles = ["Verdict", "Results", "Curves", "Bytes and time", "Number formats", "Weights"]
    titles += ["Quantization error and saturation", "What was run"]
    for title in titles:
        assert title in outline.words
    for key, value in run.settings.items():
        assert key in outline.words
        assert setting(value) in outline.words
    for key, value in run.sessions[0].items():
        assert key == "began" or f"{key} {value}" in outline.words
    assert "averaging brings back" in outline.words
    assert "paper-small-block-8 SWALP, every=2" in outline.words


def test_curves_are_the_records(tiny):
    run = load(str(tiny))
    main, further = data(page.render([run]), "errors")["panels"]
    series = {one["label"]: one for one in main["series"]}
    assert set(series) == {
        f"{arm} {name}"
        for arm, names in {"float": ("SGD", "SWA"), "paper-small-block-8": ("SGD", "SWALP")}.items()
        for name in names
    }
    for label, key in (("float SGD", "test_error"), ("float SWA", "average_error")):
        for epoch, middle, low, high in zip(
            *(series[label][name] for name in ("x", "y", "low", "high")), strict=True
        ):
            values = [
                row[key] for row in run.metrics if (row["arm"], row["epoch"]) == ("float", epoch)
            ]
            assert middle == pytest.approx(sum(values) / 2, rel=1e-4)
            assert (low, high) == (
                pytest.approx(min(values), rel=1e-4),
                pytest.approx(max(values), rel=1e-4),
            )
    assert main["marks"] == [{"axis": "x", "at": 2, "label": "averaging starts"}]
    assert "float SWA, every=2" in [one["label"] for one in further["series"]]


def test_histograms_hold_every_weight(tiny):
    run = load(str(tiny))
    panels = data(page.render([run]), "histograms")["panels"]
    sizes = {
        (record["arm"], row["name"]) for record in run.diagnostics for row in record["histograms"]
    }
    assert {(one["group"], one["label"].split(",")[0]) for one in panels} == sizes
    for panel in panels:
        if "middle" in panel["label"] or panel["group"] == "float":
            continue
        bars, steps = panel["series"]
        wide = bars["x"]["by"] if isinstance(bars["x"], dict) else bars["x"][1] - bars["x"][0]
        assert sum(bars["y"]) * wide == pytest.approx(100, rel=1e-3)
        assert (bars["kind"], steps["kind"]) == ("bars", "steps")


def test_the_outline(outline):
    """What can be told of validity and accessibility from the elements alone."""
    (html,) = outline.all("html")
    assert html["lang"] == "en"
    assert len(outline.all("title")) == len(outline.all("main")) == len(outline.all("h1")) == 1
    assert outline.all("nav")[0]["aria-label"]
    identities = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(set(identities)) == len(identities)
    for tag, attributes in outline.elements:
        assert all(value.startswith(("data:", "#")) for name, value in attributes.items()
                   if name in ("src", "href")), (tag, attributes)  # fmt: skip
        assert not any(name.startswith("on") for name in attributes)
        if "href" in attributes and attributes["href"].startswith("#"):
            assert attributes["href"][1:] in identities
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in identities
    assert all(image["alt"] for image in outline.all("img"))
    assert all(cell["scope"] in ("row", "col") for cell in outline.all("th"))
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    regions = [
        attributes for _, attributes in outline.elements if attributes.get("role") == "region"
    ]
    assert regions
    assert all(one["tabindex"] == "0" and one["aria-label"] for one in regions)


def test_nothing_breaks_out_of_the_page(tmp_path):
    evil = '</script><script>alert(1)</script>"&'
    run = write_run(
        tmp_path / "run",
        **{
            "config.toml": f"data = {json.dumps(evil)}\n",
            "metrics.jsonl": json.dumps(
                {"arm": evil, "seed": 0, "epoch": 1, "step": 1, "test_error": 1.0}
            ) + "\n",
            "summary.json": json.dumps(
                {"rows": [{"arm": evil, "model": "sgd", "test_error": [1.0]}]}
            ),
        },
    )  # fmt: skip
    text = page.render([load(str(run))])
    outline = Outline(text)
    assert len(outline.all("script")) == len(outline.all("figure")) + 1
    assert "alert(1)</script>" not in text
    assert evil in outline.words


def test_a_run_that_is_not_finished(tmp_path):
    run = run_directory.create(tmp_path / "run", settings())
    text = page.render([load(str(run.path))])
    assert "This run is not finished." in text
    assert "It has no records yet." in text
    from swalp.training import study

    with pytest.raises(study.Stopped):
        train(run, stop_at=12)
    words = Outline(page.render([load(str(run.path))])).words
    assert (
        "Its last record is of float, seed 0, epoch 2 of 3; 0 of 2 trainings have ended." in words
    )
    assert f"Go on with it: swalp resume {run.path}" in words


def test_a_record_of_an_older_swalp(tmp_path, tiny):
    for name in ("config.toml", "metrics.jsonl", "summary.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    words = Outline(page.render([load(str(tmp_path))])).words
    assert "This run recorded no histograms and no errors of rounding" in words
    assert "Versions and machine were not recorded." in words


def test_several_side_by_side(tmp_path, tiny):
    other = finished(tmp_path / "other", width=4)
    claim = write_claim(tmp_path / "claim")
    text = page.render([load(str(path)) for path in (tiny, other.path, claim)])
    outline = Outline(text)
    identities = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(set(identities)) == len(identities)
    assert "Settings that differ" in outline.words
    assert re.search(r"width 8 4", outline.words)
    assert re.search(r"seeds 2 1", outline.words)
    labels = [one["label"] for one in data(text, "compared-errors")["panels"][0]["series"]]
    assert "tiny: float SGD" in labels
    assert "other: paper-small-block-8 SWALP" in labels
    assert "claim holds It is so." in outline.words


def test_records_of_one_name(tmp_path):
    paths = [write_run(tmp_path / name / "run") for name in ("a", "b")]
    words = Outline(page.render([load(str(path)) for path in [*paths, paths[0]]])).words
    for name in ("b/run", "(1)", "(2)"):
        assert name in words


@pytest.mark.parametrize(("holds", "lead"), [(True, "Holds:"), (False, "Does not hold:")])
def test_a_claim(tmp_path, holds, lead):
    record = RECORD | {
        "statement": "We claim it.",
        "verdict": {"holds": holds, "sentence": "The rows say so."},
        "settings": {"steps": 30, "inner": {"rate": 0.5}},
        "environment": {"torch": "2", "commit": "abc"},
        "command": "swalp reproduce c",
        "seconds": 75.04,
    }
    rows = [{"method": "SGD", "seed": 0, "step": step, "error": 1 / step} for step in (1, 10)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    claim = write_claim(tmp_path, **{"record.json": json.dumps(record), "rows.jsonl": lines})
    text = page.render([load(str(claim))])
    words = Outline(text).words
    assert f"{lead} The rows say so." in words
    for told in ("We claim it.", "inner rate 0.5", "commit abc", "time 75 s", "swalp reproduce c"):
        assert told in words
    (panel,) = data(text, "claim")["panels"]
    assert panel["series"][0]["y"] == [1, 0.1]


def test_every_experiment_of_the_repository():
    from pathlib import Path

    for page_of in sorted(Path(__file__).parent.parent.glob("experiments/*/README.md")):
        path = page_of.parent
        outline = Outline(page.render([load(str(path))]))
        assert outline.all("table")


@pytest.fixture
def run_swalp(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = cli.run([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_command(run_swalp, tmp_path, tiny):
    assert run_swalp("report", tiny) == (0, "written: report-tiny.html\n", "")
    made = tmp_path / "report-tiny.html"
    first = made.read_text()
    assert first.startswith("<!doctype html>")
    assert run_swalp("report", tiny)[0] == 0  # its own page is replaced
    assert run_swalp("report", tiny, tiny, "--out", "two.html")[1] == "written: two.html\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report-tiny.html", "two.html"]


def test_open(run_swalp, tmp_path, tiny, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    assert run_swalp("report", tiny, "--open")[0] == 0
    assert opened == [(tmp_path / "report-tiny.html").resolve().as_uri()]
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    status, _, err = run_swalp("report", tiny, "--open")
    assert (status, err) == (2, "swalp: no browser was found; open report-tiny.html yourself\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report"], "name what to report: the directory of a run"),
        (["report", "none"], "none: no such directory, and no claim of that name"),
        (["report", "TINY", "--out", "mine.html"], "mine.html exists, is no report, and is not"),
        (["report", "TINY", "--out", "folder"], "folder: a directory; name a file, such as --out"),
        (["report", "TINY", "--out", "none/a.html"], "none/a.html: cannot write: No such file"),
        (["report", "TINY", "--out", "/dev/full"], "/dev/full exists, is no report"),
    ],
)
def test_mistakes(run_swalp, tmp_path, tiny, words, message):
    (tmp_path / "mine.html").write_text("precious")
    (tmp_path / "folder").mkdir()
    status, out, err = run_swalp(*(tiny if word == "TINY" else word for word in words))
    assert (status, out) == (2, "")
    assert err.startswith("swalp: ")
    assert message in err
    assert err.count("\n") == 1
    assert (tmp_path / "mine.html").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "mine.html"]


def test_a_full_disk_leaves_the_older_page(tiny, tmp_path, monkeypatch):
    target = page.write([str(tiny)], tmp_path / "page.html")
    before = target.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="cannot write: No space left on device"):
        page.write([str(tiny)], target)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
