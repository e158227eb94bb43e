"""The suite's method: interleaving, statistics, records. Nothing here is timed."""

from __future__ import annotations

import math
import subprocess
from dataclasses import replace

import pytest
import torch
from torch import nn

import benchmarks.__main__
import swalp
from benchmarks import environment, goals, memory, optimizer, peers, process, report, training
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.harness import Contender, MissingError, Spread, contender, interleave, ratios
from benchmarks.records import Row, at_least, at_most, compared, load, merged, save, timed


class Machine:
    """A clock that only work moves, and a diary of what was done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.diary: list[str] = []

    def clock(self) -> float:
        return self.now

    def work(self, name: str, seconds: float):
        def run() -> None:
            self.now += seconds
            self.diary.append(name)

        return run


def test_contenders_take_turns_and_the_order_turns_every_round():
    machine = Machine()
    entries = [Contender(name, machine.work(name, 1.0)) for name in "abc"]
    interleave(entries, 3, turn=0.5, clock=machine.clock)
    assert "".join(machine.diary[-9:]) == "abc" + "cba" + "abc"


def test_rounds_go_on_until_they_have_taken_some_seconds():
    machine = Machine()
    entries = [Contender(name, machine.work(name, 1.0)) for name in "ab"]
    times = interleave(entries, 3, seconds=9.0, turn=0.5, clock=machine.clock)
    assert [len(each) for each in times.values()] == [5, 5]
    assert "".join(machine.diary[-10:]) == "ab" + "ba" + "ab" + "ba" + "ab"


def test_each_turn_repeats_a_short_call_until_the_turn_is_filled():
    machine = Machine()
    entries = [
        Contender("long", machine.work("long", 1.0)),
        Contender("short", machine.work("short", 2**-6)),
    ]
    times = interleave(entries, 2, turn=0.5, clock=machine.clock)
    assert times == {"long": [1.0, 1.0], "short": [2**-6, 2**-6]}
    # 32 short calls fill 0.5 s; the second round begins where the first ended
    assert machine.diary[-66:] == ["long"] + ["short"] * 64 + ["long"]


def test_a_hopelessly_slow_contender_has_one_turn():
    machine = Machine()
    entries = [Contender("a", machine.work("a", 1.0)), Contender("b", machine.work("b", 80.0))]
    times = interleave(entries, 3, turn=0.5, patience=10, clock=machine.clock)
    assert times == {"a": [1.0, 1.0, 1.0], "b": [80.0]}
    assert machine.diary.count("b") == 2  # to warm up, and its turn
    assert ratios(times, "b", "a") == [80.0]


def test_preparing_is_not_timed_and_precedes_every_turn():
    machine = Machine()
    entry = Contender("a", machine.work("run", 1.0), machine.work("prepare", 100.0))
    times = interleave([entry], 2, turn=0.5, clock=machine.clock)
    assert times == {"a": [1.0, 1.0]}
    assert machine.diary[-4:] == ["prepare", "run", "prepare", "run"]


def test_names_must_differ():
    with pytest.raises(ValueError, match="different names"):
        interleave([Contender("a", int), Contender("a", int)], 1)


def test_ratios_pair_the_rounds():
    times = {"a": [2.0, 30.0, 5.0], "b": [1.0, 10.0, 5.0]}
    assert ratios(times, "a", "b") == [2.0, 3.0, 1.0]


def test_contenders_with_a_process_each(capfd):
    raising = "(_ for _ in ()).throw(process.MissingError('get it'))"
    calls = {"real": "partial(abs, -1)", "missing": f"partial and {raising}"}
    with process.contenders("functools", calls, 1) as (real, missing):
        times = interleave([real, missing], 2, turn=1e-6)
        assert missing == Contender("missing", None, missing="get it")
    assert [len(each) for each in times.values()] == [2]
    assert all(0 < each < 1e-3 for each in times["real"])
    with (
        pytest.raises(subprocess.CalledProcessError),
        process.contenders("functools", {"wrong": "nothing"}, 1),
    ):
        pass
    assert "'functools' has no attribute 'nothing'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], Spread(5.0, 5.0, 5.0)),
        ([4.0, 1.0, 3.0, 2.0, 5.0], Spread(2.0, 3.0, 4.0)),
        ([0.0, 1.0], Spread(0.25, 0.5, 0.75)),
    ],
)
def test_spread_is_median_and_quartiles(values, expected):
    assert Spread.of(values) == expected


A, B = Contender("a", int), Contender("b", int)
TIMES = {"a": [2.0, 30.0, 5.0], "b": [1.0, 10.0, 5.0]}


def test_time_ratio_and_speedup_are_inverse():
    slow = compared("x", "w", TIMES, A, B, "time ratio", at_most(2.5))
    fast = compared("x", "w", TIMES, B, A, "speedup")
    assert slow.value == fast.value == Spread(1.5, 2.0, 2.5)
    assert slow.subject_seconds == fast.peer_seconds == Spread(3.5, 5.0, 17.5)
    assert slow.rounds == 3
    inverse = compared("x", "w", TIMES, A, B, "speedup")
    assert inverse.value is not None
    assert inverse.value.median == 0.5


def test_time_is_divided_by_items_and_unit():
    row = timed("x", "w", {"a": [3e-3]}, A, "us", per=1000)
    assert row.value is not None
    assert row.value.median == pytest.approx(3.0)


def test_a_missing_peer_is_reported_never_skipped():
    def no_peer():
        raise MissingError("not installed: pip install b")

    absent = contender("b", no_peer)
    times = interleave([A, absent], 1, turn=0)
    assert list(times) == ["a"]
    row = compared("x", "work", times, A, absent, "speedup", at_least(2))
    assert row.value is None
    assert row.missing == "b: not installed: pip install b"
    text = report.markdown([with_environment(row)])
    assert "| work | a | missing: b: not installed: pip install b |  | ≥ 2 | - |" in text


@pytest.mark.parametrize(
    ("goal", "met"), [(at_most(2), "yes"), (at_most(1.9), "no"), (at_least(2), "yes"), (None, "")]
)
def test_the_table_says_whether_the_median_meets_the_goal(goal, met):
    row = compared("x", "work", TIMES, A, B, "time ratio", goal)
    text = report.markdown([with_environment(row)])
    goal_text = "" if goal is None else str(goal)
    assert f"| work | a | 2 x the time of b | 1.5 - 2.5 | {goal_text} | {met} |" in text
    assert report.screen_table([row]).row_count == 1


def with_environment(row: Row) -> Row:
    return replace(row, environment=environment.describe(threads=2))


def test_rows_survive_saving(tmp_path):
    rows = [
        with_environment(compared("x", "w", TIMES, A, B, "time ratio", at_most(2))),
        with_environment(timed("y", "w", TIMES, A, "s", curve="c", details={"elements": 3})),
    ]
    path = tmp_path / "deep" / "rows.jsonl"
    save(rows, path)
    assert load(path) == rows
    assert load(tmp_path / "none") == []


def test_new_rows_replace_those_of_the_same_benchmark_only():
    def row(benchmark, what):
        return Row(benchmark=benchmark, what=what, measure="s")

    old, new = [row("a", "old"), row("b", "old"), row("b", "older")], [row("b", "new")]
    assert [(r.benchmark, r.what) for r in merged(old, new)] == [("a", "old"), ("b", "new")]


def test_curves_are_drawn_not_listed():
    rows = [
        with_environment(
            timed("scaling", "w", {"swalp": [n * 2e-9]}, Contender("swalp", int), "ns/element",
                  per=n, curve="throughput", details={"elements": n, "threads": 2})
        )
        for n in (1000, 100)
    ]  # fmt: skip
    figure = report.throughput_plot(rows)
    assert figure is not None
    (line,) = figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [100, 1000]
    assert list(line.get_ydata()) == pytest.approx([0.5, 0.5])  # 2 ns an element
    assert report.screen_table(rows).row_count == 0
    assert report.throughput_plot([]) is None


def test_machines_are_set_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(goals, "PAGE", tmp_path / "goals.md")
    folders = {"quick": tmp_path / "a", "slow": tmp_path / "b"}
    step = Row(benchmark="optimizer", what="a|b", peer="SGD", measure="speedup", goal=at_least(4))
    call = Row(benchmark="calls", what="call", measure="us", goal=at_most(2.5))
    rows = {
        "quick": [replace(call, value=Spread.of([2.5])), replace(step, value=Spread.of([9.49]))],
        "slow": [replace(step, value=Spread.of([3.999])), replace(call, missing="no clock"),
                 replace(step, what="no goal", goal=None, value=Spread.of([1.0]))],
    }  # fmt: skip
    for name, folder in folders.items():
        save(rows[name], folder / "rows.jsonl")
    page = goals.page(folders, ["optimizer", "calls"])
    assert page.splitlines()[4:] == [
        "| work | whose | measured in | goal | [quick](a/README.md) | [slow](b/README.md) |",
        "|---|---|---|---|---|---|",
        "| a\\|b | swalp | x faster than SGD | ≥ 4 | 9.49 | (4) |",
        "| call | swalp | µs | ≤ 2.5 | 2.5 |  |",
    ]


def test_pages_are_those_of_their_rows():
    for folder in (*goals.MACHINES.values(), goals.RESULTS / "zen5"):
        pictures = [name for name in ("throughput.png", "peers.png") if (folder / name).exists()]
        rows = load(folder / "rows.jsonl")
        assert (folder / "README.md").read_text() == report.markdown(rows, pictures)
    assert goals.PAGE.read_text() == goals.page(goals.MACHINES, list(BENCHMARKS))


@pytest.mark.parametrize("per_row", [False, True])
def test_the_eager_peer_rounds_to_a_neighbour_on_its_grid(per_row):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * torch.arange(8).view(-1, 1)
    y = peers.eager_quantize(x, per_row)
    for row, rounded in zip(x, y, strict=True):
        block = row if per_row else x
        largest = float(block.abs().max())
        gap = 2.0 ** (math.floor(math.log2(largest)) - 6) if largest else 1.0
        assert torch.equal(rounded / gap, (rounded / gap).round())
        inside = row < 127 * gap
        assert bool(((rounded - row).abs() < gap)[inside].all())


def test_tensor_bytes_counts_codes_exponents_and_momentum_once():
    layer = swalp.convert(
        nn.Sequential(nn.Linear(16, 4, bias=False)), optimizer.RECIPE, packed=True
    )
    sgd = swalp.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, recipe=optimizer.RECIPE)
    layer[0].weight.grad = torch.ones(4, 16)
    sgd.step()
    assert memory.tensor_bytes(sgd) == 2 * (64 + 4)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(4, 16))], lr=0.1, momentum=0.9)
    assert memory.tensor_bytes(plain) == 4 * 64


def test_vgg16_is_vgg16():
    with torch.device("meta"):
        model = training._vgg16()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert (convolutions, linear) == (13, 3)
    assert sum(parameter.numel() for parameter in model.parameters()) == 15_245_130


def test_a_folder_that_cannot_be_written_is_refused_before_measuring(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "import", "--quick", "--out", str(tmp_path / "file" / "folder")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Not a directory; choose another folder with --out" in said


def test_results_that_are_none_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--report", "--out", str(tmp_path / "typo")])
    assert "there is no " in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()
    for text in ("{", "{}", '{"value": 1}'):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(SystemExit, match="2"):
            main(["--quick", "--only", "memory", "--out", str(tmp_path)])
        assert "line 1 is no row of results" in capsys.readouterr().err
        assert (tmp_path / "rows.jsonl").read_text() == text


def test_ctrl_c_keeps_what_was_measured_before(tmp_path, capsys, monkeypatch):
    def interrupted(plan):
        raise KeyboardInterrupt

    row = Row(benchmark="import", what="one", subject="swalp", measure="s", value=Spread(1, 1, 1))
    monkeypatch.setitem(benchmarks.__main__.BENCHMARKS, "import", lambda plan: [row])
    monkeypatch.setitem(benchmarks.__main__.BENCHMARKS, "memory", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "import", "--only", "memory", "--quick", "--out", str(tmp_path)])
    assert stopped.value.code == 130
    assert [kept.what for kept in load(tmp_path / "rows.jsonl")] == ["one"]
    assert "interrupted; what was measured before is kept" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "rows.jsonl"]
