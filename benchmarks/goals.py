"""The rows with goals of several machines, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.records import Row, load
from benchmarks.report import cell, number, words

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "benchmarks" / "goals.md"
MACHINES = {
    "Zen 4, AVX-512": RESULTS,
    "Xeon, AMX": RESULTS / "amx",
    "Zen 3, AVX2": RESULTS / "avx2",
}
_FORMER = "swalp native, save_memory()"  # a function of earlier versions


def page(machines: Mapping[str, Path], benchmarks: Sequence[str]) -> str:
    """A table of the goals, in the order of `benchmarks`, and the medians in each folder."""
    goals: dict[tuple[str, ...], dict[str, Row]] = {}
    for machine, folder in machines.items():
        for row in load(folder / "rows.jsonl"):
            if row.goal is not None and row.subject != _FORMER:
                about = (row.benchmark, row.what, row.subject, words(row), str(row.goal))
                goals.setdefault(about, {})[machine] = row
    links = [f"[{machine}]({folder.relative_to(PAGE.parent)}/README.md)"
             for machine, folder in machines.items()]  # fmt: skip
    lines = [
        "# Goals, and what was reached\n",
        "Made of the records by `python -m benchmarks --report`. Medians; in brackets what misses "
        "its goal; empty where a machine cannot or did not run it.\n",
        "| work | whose | measured in | goal | " + " | ".join(links) + " |",
        "|" + "---|" * (4 + len(machines)),
    ]
    for (_, *said), found in sorted(goals.items(), key=lambda item: benchmarks.index(item[0][0])):
        medians = [_median(found[each]) if each in found else "" for each in machines]
        lines.append("| " + " | ".join([*map(cell, said), *medians]) + " |")
    return "\n".join(lines) + "\n"


def _median(row: Row) -> str:
    if row.value is None or row.goal is None:
        return ""
    text = number(row.value.median)
    return text if row.goal.met(row.value.median) else f"({text})"
