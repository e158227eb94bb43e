"""Formats as tables, facts and pictures."""

import re
import resource

import pytest
from rich.console import Console

from strategies import FORMATS
from swalp import BlockFloat, FixedPoint, Microscaling, Minifloat, parse_format
from swalp.formats import NAMED
from swalp.report.formats import (
    SHOWN,
    facts,
    format_table,
    note,
    short,
)
from swalp.report.number_line import plot_format
from swalp_command import cli


@pytest.fixture
def run(capsys):
    """Status, stdout and stderr of ``swalp formats``."""

    def run(*words):
        status = cli.run(["formats", *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def text_of(table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_table_has_a_row_for_each_format():
    lines = text_of(format_table([NAMED["e4m3fn"], BlockFloat(8, axes=(0,)), NAMED["e8m0"]]))
    rows = [line.strip().split(maxsplit=7) for line in lines.splitlines() if line.strip()]
    assert rows[0] == ["format", "kind", "bits", "codes", "smallest", "largest", "gap", "note"]
    assert rows[2] == [
        "e4m3fn", "minifloat", "8", "256", "2^-9", "448", "0.125", "NaN, no inf",
    ]  # fmt: skip
    assert rows[3] == [
        "bfp8[0]", "block", "8", "256", "2^-134", "3.38e+38", "2^-6",
        "8-bit exponent for each index of axis 0",
    ]  # fmt: skip
    assert rows[4][7] == "NaN, no inf, unsigned, no zero"


def test_the_table_fits_a_narrow_terminal():
    console = Console(width=80)
    with console.capture() as capture:
        console.print(format_table(SHOWN))
    lines = capture.get().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "…" not in capture.get()


@pytest.mark.parametrize(
    ("fmt", "text"),
    [
        (FixedPoint(8, 6), "two's complement"),
        (FixedPoint(8, 6, symmetric=True), "symmetric"),
        (BlockFloat(8), "8-bit exponent for the tensor"),
        (BlockFloat(8, axes=(0, 2), symmetric=False),
         "8-bit exponent for each index of axes 0, 2, two's complement"),
        (BlockFloat(8, tile=32, exponent_bits=5), "5-bit exponent for 32 neighbours"),
        (BlockFloat(8, tile=(16, 16)), "8-bit exponent for 16 x 16"),
        (BlockFloat(8, axes=(1,), tile=4), "8-bit exponent for 4 neighbours along axis 1"),
        (Minifloat(5, 2, saturating=False), "inf, NaN, overflows"),
        (Minifloat(4, 3, specials="fnuz"), "NaN, no inf, no -0"),
        (Minifloat(5, 2, subnormals=False, specials="finite"), "no inf, no NaN, no subnormals"),
        (NAMED["mxfp4_e2m1"], "e2m1, a scale for 32: 4.25 bits"),
        (Microscaling(NAMED["e2m1"], tile=16, axis=0),
         "e2m1, a scale for 16 along axis 0: 4.5 bits"),
        (NAMED["binary"], "no zero"),
    ],
)  # fmt: skip
def test_notes(fmt, text):
    assert note(fmt) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (448.0, "448"),
        (0.125, "0.125"),
        (2.0**-9, "2^-9"),
        (2.0**127, "2^127"),
        (1024.0, "1024"),
        (65504.0, "65504"),
        (3.3895313892515355e38, "3.39e+38"),
        (127 / 64, "1.9844"),
        (0.0, "beyond float64"),
        (float("inf"), "beyond float64"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_facts_rebuild_the_format(fmt):
    known = dict(facts(fmt))
    assert eval(known["in Python"], vars(__import__("swalp"))) == fmt
    assert known["codes"] == str(2**fmt.bits)
    listed = [text for key, text in known.items() if key.startswith("values")]
    assert len(listed) == (fmt.num_codes <= 64)
    if listed:
        assert [float(word) for word in listed[0].split()] == pytest.approx(
            fmt.values().tolist(), rel=1e-5
        )


def test_without_arguments_all_named_formats_are_listed(run):
    status, out, _ = run()
    assert status == 0
    assert all(name in out for name in NAMED)
    assert "bfp8/32" in out


def test_one_format_tells_its_facts_and_few_values(run):
    assert "8-bit exponent for each index of axis 0" in " ".join(run("bfp8[0]")[1].split())
    assert "values" not in run("bfp8")[1]
    assert "-6 -4 -3 -2 -1.5 -1 -0.5 0 0.5 1 1.5 2 3 4 6" in run("e2m1")[1]


@pytest.mark.parametrize(
    "name",
    ["bfp8", "bfp4t[0]/4", "e4m3fn", "e2m1", "e8m0", "bf16", "mxfp4_e2m1", "mxint8", "binary",
     "ternary", "fixed8.6", "e4m3-nosub", "ue3m2b-5", "e5m10", "fixed16.3", "mx_e5m8"],
)  # fmt: skip
def test_pictures(name, tmp_path):
    path = tmp_path / "picture.png"
    plot_format(parse_format(name), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 15_000


def test_the_plot_option_writes_and_says_where(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("bfp8[0]/16", "--plot") == (0, "drawn: bfp8-0-16.png\n", "")
    assert (tmp_path / "bfp8-0-16.png").stat().st_size > 15_000
    assert run("e2m1", "--plot", "other.png") == (0, "drawn: other.png\n", "")
    assert (tmp_path / "other.png").exists()


def test_pictures_overwrite_nothing(run, tmp_path):
    path = tmp_path / "kept.png"
    path.write_text("mine")
    status, _, err = run("bfp8", "--plot", str(path))
    assert status == 2
    assert "kept.png exists and is not overwritten" in err
    assert path.read_text() == "mine"
    status, _, err = run("bfp8", "--plot", str(tmp_path / "nowhere" / "x.png"))
    assert status == 2
    assert "No such file or directory; name a file that can be" in err


def test_a_picture_that_finds_no_room_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"x\.png: File too large; name a file that can be"):
            plot_format(parse_format("bfp8"), tmp_path / "x.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--plot"], "--plot needs a format to draw: swalp formats bfp8 --plot"),
        (["bfp8", "x.png"], r"x\.png is for a picture: swalp formats bfp8 --plot x\.png"),
        (["bfp"], "unknown format 'bfp'; did you mean bfp8"),
        (["bfp99"], "word_length=99 must be 2..53"),
        (["e8m23", "--plot"], "e8m23 has 2.*32 codes; values"),
    ],
)
def test_mistakes_get_one_clear_line(run, words, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert re.search(text, err)
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
