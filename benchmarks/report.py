"""Rows to a table on the screen, a table in a README, and plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.markup import escape
from rich.table import Table

from benchmarks.harness import Spread
from benchmarks.records import Row

_WORDS = {
    "time ratio": " x the time of ",
    "speedup": " x faster than ",
    "bytes ratio": " x the bytes of ",
    "exponent": "",
    "us": " µs",
    "s": " s",
}
_HEADINGS = ("work", "contender", "result", "quartiles", "goal", "met")

# Colours that remain apart for the colour-blind (Okabe and Ito), and in grey.
_COLOURS = {"swalp": "#0072B2", "copy_": "#999999"}


def screen_table(rows: Iterable[Row]) -> Table:
    """What a run prints."""
    table = Table(title="swalp beside its peers: medians over the rounds")
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    previous = ""
    for row in _listed(rows):
        if previous not in ("", row.benchmark):
            table.add_section()
        previous = row.benchmark
        cells = _cells(row)
        colour = {"yes": "green", "no": "red"}.get(cells[-1], "yellow" if row.missing else "")
        style = colour or None
        table.add_row(*map(escape, cells), style=style)
    return table


def markdown(rows: Sequence[Row], pictures: Iterable[str] = ()) -> str:
    """The README beside the rows: one table a machine and commit, then the pictures."""
    parts = [
        "# Measured\n",
        "Computed from `rows.jsonl` by `python -m benchmarks --report`; measured by "
        "`python -m benchmarks`. Contenders take turns in one process, those of `native-*` in one "
        "each, the order reversed every round; a ratio is taken within each round, and its median "
        "and quartiles over the rounds are shown. Absolute times depend on the machine's load; "
        "trust the ratios.\n",
    ]
    for group in _by_environment(_listed(rows)):
        parts.append(_setting(group))
        parts.append("| " + " | ".join(_HEADINGS) + " |")
        parts.append("|" + "---|" * len(_HEADINGS))
        parts += ["| " + " | ".join(map(cell, _cells(row))) + " |" for row in group]
        parts.append("")
    parts += [f"![{name}]({name})\n" for name in pictures]
    return "\n".join(parts)


def throughput_plot(rows: Iterable[Row]) -> Figure | None:
    """Elements a second against size, one and two threads, beside the copy; None without rows."""
    points: dict[tuple[str, int], list[tuple[int, Spread]]] = {}
    for row in rows:
        if row.curve == "throughput" and row.value is not None:
            key = (row.subject, row.details["threads"])
            points.setdefault(key, []).append((row.details["elements"], row.value))
    if not points:
        return None
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for (subject, threads), line in points.items():
        line.sort()
        sizes = [size for size, _ in line]
        label = "stochastic BFP8 per row" if subject == "swalp" else "copy"
        axes.plot(
            sizes, [1 / spread.median for _, spread in line],
            color=_COLOURS[subject], linestyle="-" if threads == 2 else "--",
            marker="o" if threads == 2 else "s", markersize=3.5, linewidth=1.4,
            label=f"{label}, {threads} thread{'s' if threads > 1 else ''}",
        )  # fmt: skip
        axes.fill_between(
            sizes, [1 / spread.high for _, spread in line], [1 / spread.low for _, spread in line],
            color=_COLOURS[subject], alpha=0.18, linewidth=0,
        )  # fmt: skip
    axes.set(xscale="log", xlabel="elements (float32)")
    axes.set(yscale="log", ylabel="10⁹ elements per second")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def peers_plot(rows: Iterable[Row]) -> Figure | None:
    """Nanoseconds an element of every quantizer, per tensor, as bars; None without rows."""
    bars: dict[str, Spread] = {}
    for row in rows:
        if row.benchmark != "quantize-peers" or "given buffer" not in row.what:
            continue
        if "per tensor" in row.what and row.subject_seconds and row.peer_seconds:
            bars["swalp"] = _per_element(row.subject_seconds, row)
            bars[row.peer] = _per_element(row.peer_seconds, row)
    if not bars:
        return None
    names = sorted(bars, key=lambda name: bars[name].median)
    figure = Figure(figsize=(5.2, 0.5 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        spread = bars[name]
        reach = [[spread.median - spread.low], [spread.high - spread.median]]
        axes.barh(
            place, spread.median, xerr=reach, height=0.62,
            color=_COLOURS["swalp"] if name == "swalp" else _COLOURS["copy_"],
            error_kw={"linewidth": 0.9, "capsize": 2},
        )  # fmt: skip
        text = f" {spread.median:.2g}" if spread.median < 100 else f" {spread.median:.0f}"
        axes.text(spread.high * 1.04, place, text, va="center", fontsize=8)
    axes.set(xscale="log", xlabel="ns per element, stochastic BFP8 per tensor")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(names)), names)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write(rows: Sequence[Row], folder: Path) -> None:
    """README.md and the plots of `rows` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"throughput.png": throughput_plot(rows), "peers.png": peers_plot(rows)}
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=160)
    (folder / "README.md").write_text(markdown(rows, drawn), encoding="utf-8")


def _listed(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not row.curve]


def _cells(row: Row) -> tuple[str, ...]:
    goal = "" if row.goal is None else str(row.goal)
    if row.value is None:
        return (row.what, row.subject, f"missing: {row.missing}", "", goal, "-" if goal else "")
    result = f"{number(row.value.median)}{_WORDS[row.measure]}{row.peer}"
    quartiles = f"{number(row.value.low)} - {number(row.value.high)}" if row.rounds > 1 else ""
    met = "" if row.goal is None else "yes" if row.goal.met(row.value.median) else "no"
    return (row.what, row.subject, result, quartiles, goal, met)


def words(row: Row) -> str:
    """What a figure of `row` says, without the figure."""
    return f"{_WORDS[row.measure]}{row.peer}".strip()


def number(value: float) -> str:
    """Three significant digits, in plain notation."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cell(text: str) -> str:
    """`text` in a table of Markdown."""
    return text.replace("|", "\\|")


def _per_element(seconds: Spread, row: Row) -> Spread:
    scale = 1e9 / row.details["elements"]
    return Spread(seconds.low * scale, seconds.median * scale, seconds.high * scale)


def _by_environment(rows: Iterable[Row]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(repr((row.quick, row.environment)), []).append(row)
    return list(groups.values())


def _setting(rows: Sequence[Row]) -> str:
    """Heading and paragraph on what these rows, of one environment, were measured with."""
    where, quick = rows[0].environment, rows[0].quick
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    settings = ", ".join(f"{name}={value}" for name, value in where["settings"].items())
    lines = [
        f"## Commit {where['commit']}, {where['date']}{', quick' if quick else ''}\n",
        f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB, "
        f"{where['threads']} threads, load {where['load']:g} before; {where['system']}, "
        f"Python {where['python']}; {versions}. Up to {max(row.rounds for row in rows)} rounds. "
        f"Instruction sets: {where['cpu_flags']}. Environment: {settings or 'nothing set'}.\n",
    ]
    return "\n".join(lines)
