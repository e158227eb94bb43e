"""Claims from settings to records: what is written, when nothing is, and what is refused."""

import dataclasses
import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from swalp.lab import claims, record, reproduce
from swalp.lab.claim import Claim, Context, Stopped, Verdict, markdown, pick
from swalp.lab.claims import CLAIMS
from swalp.lab.parallel import in_threads
from swalp.lab.plots import figure
from swalp.training import environment
from swalp.training.mistakes import UserError
from swalp_command import cli


@dataclasses.dataclass(frozen=True)
class Settings:
    seeds: int = 2
    power: int = 2


def squares(settings, context):
    assert torch.get_num_threads() == 1
    jobs = [
        lambda check, seed=seed: [{"seed": seed, "value": seed**settings.power}]
        for seed in range(settings.seeds)
    ]
    return in_threads(context, jobs)


CLAIM = Claim(
    name="squares",
    title="Squares grow",
    statement="The square of 1 is 1.",
    full=Settings(),
    quick=Settings(power=3),
    run=squares,
    table=lambda settings, rows: markdown(
        ["seed", "value"], [[str(row["seed"]), str(row["value"])] for row in rows]
    ),
    plot=lambda settings, rows: figure()[0],
    verdict=lambda settings, rows: Verdict(
        pick(rows, seed=1)[0]["value"] == 1, f"{len(rows)} rows."
    ),
)


@pytest.fixture(autouse=True)
def only_squares(monkeypatch):
    for module in (claims, reproduce):
        monkeypatch.setattr(module, "CLAIMS", {"squares": CLAIM})


def run(*words):
    return cli.run(["reproduce", *map(str, words)])


def test_a_claim_leaves_a_record_and_the_same_again(tmp_path, capsys):
    out = tmp_path / "record"
    assert run("squares", "--out", out) == 0
    said = capsys.readouterr().out
    assert "| 1    |     1 |" in said
    assert "Holds: 2 rows." in said
    assert sorted(path.name for path in out.iterdir()) == sorted(record.FILES)
    assert record.read_rows(out) == [{"seed": 0, "value": 0}, {"seed": 1, "value": 1}]
    kept = record.read(out)
    assert kept["settings"] == {"seeds": 2, "power": 2}
    assert kept["verdict"] == {"holds": True, "sentence": "2 rows."}
    assert kept["command"] == "swalp reproduce squares"
    assert kept["environment"]["torch"] == torch.__version__
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "README.md").read_text()
    assert "**Holds.** 2 rows." in page
    assert "| 0    |     0 |" in page

    assert run("squares", "--out", out) == 0
    assert "The rows equal those" in capsys.readouterr().out
    (out / "rows.jsonl").write_text("{}\n")
    assert run("squares", "--out", out) == 0
    assert "The rows differ from those" in capsys.readouterr().out


def test_quick_and_seeds_change_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("squares", "--quick", "--seeds", 3) == 0
    kept = record.read(tmp_path / "reproduced" / "squares-quick")
    assert kept["settings"] == {"seeds": 3, "power": 3}
    assert kept["command"] == "swalp reproduce squares --quick --seeds 3"


def test_a_record_of_other_settings_is_never_overwritten(tmp_path, capsys):
    out = tmp_path / "record"
    assert run("squares", "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run("squares", "--seeds", 5, "--out", out) == 2
    assert "other settings (seeds = 2, not 5)" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "notes.txt").write_text("mine")
    assert run("squares", "--out", out) == 2
    assert "holds notes.txt" in capsys.readouterr().err
    assert (out / "notes.txt").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["sqares"], "unknown claim 'sqares'; did you mean 'squares'?"),
        (["squares", "--seeds", "0"], "give how many seeds"),
        (["squares", "--seeds", "x"], "--seeds"),
    ],
)
def test_a_mistake_is_one_line(words, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_out_that_is_a_file_or_damaged(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("squares", "--out", tmp_path / "file") == 2
    assert "not a directory" in capsys.readouterr().err
    out = tmp_path / "record"
    out.mkdir()
    (out / "record.json").write_text("{")
    assert run("squares", "--out", out) == 2
    assert "damaged" in capsys.readouterr().err
    (out / "record.json").write_text(json.dumps({"version": 99}))
    assert run("squares", "--out", out) == 2
    assert "version 1" in capsys.readouterr().err


def no_space(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_record_is_written_before_anything_is_said(tmp_path, monkeypatch):
    written = []

    def hear(*words, **options):
        written.append((tmp_path / "record" / "README.md").exists())

    monkeypatch.setattr("builtins.print", hear)
    assert run("squares", "--out", tmp_path / "record") == 0
    assert written == [True, True]


def test_a_record_that_cannot_be_written_is_said_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", no_space)
    assert run("squares", "--out", tmp_path / "record") == 2
    out, err = capsys.readouterr()
    assert "Holds: 2 rows." in out
    assert err == (
        f"swalp: {tmp_path}/record: cannot write the record: No space left on device; choose "
        f"another place with --out\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["/proc/none", "/proc/none/deep", "file/record", "/proc"])
def test_a_place_that_cannot_be_written_is_told_at_once(place, tmp_path, monkeypatch, capsys):
    never = dataclasses.replace(CLAIM, run=None)
    monkeypatch.setattr(reproduce, "CLAIMS", {"squares": never})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert run("squares", "--out", place) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"swalp: {place}: ")
    assert "with --out" in err
    assert err.count("\n") == 1


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs a mount point")
def test_a_mount_point_cannot_be_replaced(monkeypatch):
    with pytest.raises(UserError, match="a mount point, which cannot be replaced"):
        record.require_writable(Path("/dev/shm"))


@pytest.mark.parametrize("place", [".", "link"])
def test_a_record_goes_where_the_path_leads(place, tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    monkeypatch.chdir(target if place == "." else tmp_path)
    assert run("squares", "--out", place) == 0
    assert record.read(target)["verdict"]["holds"]
    assert (tmp_path / "link").is_symlink()


def test_a_claim_that_does_not_hold_is_told_by_the_exit_status(tmp_path, monkeypatch):
    failing = dataclasses.replace(CLAIM, verdict=lambda settings, rows: Verdict(False, "It is 3."))
    monkeypatch.setattr(reproduce, "CLAIMS", {"squares": failing})
    assert run("squares", "--out", tmp_path / "record") == 1
    assert "**Does not hold.** It is 3." in (tmp_path / "record" / "README.md").read_text()


def test_interrupted_it_writes_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(settings, context):
        os.kill(os.getpid(), signal.SIGINT)
        return in_threads(context, [lambda check: check() or []])

    stopping = dataclasses.replace(CLAIM, run=interrupted)
    monkeypatch.setattr(reproduce, "CLAIMS", {"squares": stopping})
    assert run("squares", "--out", tmp_path / "record") == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "record").exists()


def test_all_jobs_end_when_one_is_stopped_or_fails():
    stop = []
    context = Context(None, False, lambda done, total: None, lambda: bool(stop), 2)
    ended = []

    def endless(check):
        try:
            while True:
                check()
        finally:
            ended.append(1)

    def failing(check):
        raise UserError("no data")

    with pytest.raises(UserError, match="no data"):
        in_threads(context, [endless, failing])
    assert ended == [1]

    def stopping(check):
        stop.append(1)
        return []

    with pytest.raises(Stopped):
        in_threads(context, [endless, stopping])
    assert ended == [1, 1]


def test_the_list_shows_every_claim(capsys):
    assert run("--list") == 0
    assert capsys.readouterr().out == "squares  Squares grow\n"
    assert run() == 0
    assert all(name == claim.name for name, claim in CLAIMS.items())


def test_a_commit_is_named():
    assert environment.commit() == "unknown" or len(environment.commit().rstrip("+")) == 12
