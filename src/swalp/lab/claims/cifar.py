"""The paper's table of CIFAR errors, beside what training runs here have measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

import swalp
from swalp.lab import plots
from swalp.lab.claim import Claim, Context, Row, Verdict, markdown, pick
from swalp.training.config import FLOAT
from swalp.training.mistakes import UserError
from swalp.training.run_directory import RunDirectory

COLUMNS = ("float SGD", "float SWA", "8-bit SGD-LP", "8-bit SWALP")
_README = "README of the published code"
_BLOG = "README of the published code; 8 bits: a PyTorch blog post"
# Test error and its spread, %, in the order of COLUMNS; None: no figure is published.
PUBLISHED: tuple[tuple[str, str, int, str, tuple[tuple[float, float | None] | None, ...]], ...] = (
    ("cifar10", "VGG16", 300, _README, ((6.81, 0.09), (6.51, 0.14), (7.61, 0.15), (6.70, 0.12))),
    ("cifar10", "PreResNet-164", 225, _README, ((4.63, 0.18), (4.03, 0.10), None, None)),
    (
        "cifar100", "VGG16", 300, _README,
        ((27.23, 0.17), (25.93, 0.21), (29.59, 0.32), (26.65, 0.29)),
    ),
    (
        "cifar100", "PreResNet-164", 225, _BLOG,
        ((22.20, 0.57), (19.95, 0.19), (24.0, None), (21.8, None)),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the comparison, which trains nothing.

    Attributes:
        records: the folder whose run directories are read, here or else in swalp's own source tree.
        seeds: at least so many a run must have to be shown.
    """

    records: str
    seeds: int


def run(settings: Settings, context: Context) -> list[Row]:
    """The published figures, and a row for each network, arm and model of the finished runs."""
    rows: list[Row] = []
    for name, network, epochs, source, cells in PUBLISHED:
        for column, cell in zip(COLUMNS, cells, strict=True):
            if cell is not None:
                known = {"kind": "published", "data": name, "network": network, "epochs": epochs}
                known |= {"column": column, "test_error": cell[0], "spread": cell[1]}
                rows.append(known | {"source": source})
    measured = [row for path in _runs(settings) for row in _measured(settings, path)]
    if not measured:
        raise UserError(
            f"no finished run on CIFAR in {settings.records}/; make one with: swalp train "
            f"cifar10-small --data-dir DIR --out {quote(f'{settings.records}/cifar10-small')}"
        )
    context.progress(1, 1)
    return rows + measured


def _runs(settings: Settings) -> Iterator[Path]:
    """Directories of finished runs on CIFAR."""
    source = Path(swalp.__file__).parents[2]
    folder = next(
        (place for place in (Path(settings.records), source / settings.records) if place.is_dir()),
        None,
    )
    if folder is None:
        return
    for summary in sorted(folder.glob("*/summary.json")):  # written when a run is finished
        if not (summary.parent / "config.toml").exists():
            continue
        if RunDirectory(summary.parent).config().data in ("cifar10", "cifar100"):
            yield summary.parent


def _measured(settings: Settings, path: Path) -> Iterator[Row]:
    found = RunDirectory(path)
    config, summary = found.config(), found.summary()
    if config.seeds < settings.seeds:
        return
    for row in summary["rows"]:
        low = row["arm"] != FLOAT
        if low and not row["arm"].endswith("-8"):
            continue
        names = {"sgd": "SGD-LP" if low else "SGD", "average": "SWALP" if low else "SWA"}
        if row["model"] not in names or not row["test_error"]:
            continue
        errors = row["test_error"]
        yield {
            "kind": "measured",
            "data": config.data,
            "network": f"{config.model}, width {config.width}",
            "epochs": config.epochs,
            "column": f"{'8-bit' if low else 'float'} {names[row['model']]}",
            "arm": row["arm"],
            "test_error": fmean(errors),
            "spread": stdev(errors) if len(errors) > 1 else None,
            "seeds": len(errors),
            "training_images": summary["train_examples"],
            "source": path.name,
        }


def _groups(rows: Sequence[Row]) -> list[tuple[Row, dict[str, Row]]]:
    """The lines of the table: what they share, and their cells by column.

    A run with several 8-bit recipes has a line for each, its float cells repeated.
    """
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        arm = None if row.get("arm") == FLOAT else row.get("arm")
        key: tuple[Any, ...] = (
            row["kind"],
            row["data"],
            row["network"],
            row["epochs"],
            row["source"],
            arm,
        )
        groups.setdefault(key, {})[row["column"]] = row
    lines = []
    for key, cells in groups.items():
        shared = groups.get((*key[:-1], None), {})
        if key[-1] is None and any(k[:-1] == key[:-1] and k[-1] is not None for k in groups):
            continue  # its float cells stand in the lines of the recipes
        merged = shared | cells
        lines.append((next(iter(cells.values())), merged))
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    spread = "" if row["spread"] is None else f" ± {row['spread']:.2f}"
    return f"{row['test_error']:.2f}{spread}"


def table(settings: Settings, rows: Sequence[Row]) -> str:
    """Published and measured errors."""
    lines = []
    for first, cells in _groups(rows):
        what = f"{first['data']}, {first['network']}"
        if first["kind"] == "measured":
            what += f" ({first['source']}{_recipe(cells)}, {first['seeds']} seeds)"
        epochs = f"{first['epochs']}"
        lines.append([what, first["kind"], epochs, *(_cell(cells.get(name)) for name in COLUMNS)])
    header = ["data, network", "figures", "epochs", *COLUMNS]
    sources = {row["source"] for row in pick(rows, kind="published")}
    return (
        f"Test error %, mean ± standard deviation. Published: {'; '.join(sorted(sources))}. "
        f"A dash: no figure.\n\n{markdown(header, lines)}"
    )


def _recipe(cells: dict[str, Row]) -> str:
    low = cells.get("8-bit SWALP")
    return "" if low is None else f", {low['arm']}"


def verdict(settings: Settings, rows: Sequence[Row]) -> Verdict:
    """What low precision costs and averaging brings back, published and measured."""
    told, judged = [], list[bool]()
    full = False
    for first, cells in _groups(rows):
        if not set(COLUMNS) <= set(cells):
            continue
        error = {name: cells[name]["test_error"] for name in COLUMNS}
        cost = error["8-bit SGD-LP"] - error["float SGD"]
        back = error["8-bit SGD-LP"] - error["8-bit SWALP"]
        left = error["8-bit SWALP"] - error["float SWA"]
        told.append(
            f"{first['kind']}, {first['data']} with {first['network']}, {first['epochs']} epochs: "
            f"8 bits cost SGD {cost:+.2f} points, averaging brings back {back:+.2f}, which leaves "
            f"SWALP {left:+.2f} from float SWA"
        )
        if first["kind"] == "measured":
            judged.append(back > 0 and left < 1.0)
            full |= first["epochs"] >= 225
    caveat = (
        ""
        if full
        else " No run here has the published networks' epochs: the measured errors say whether the "
        "pattern is the same, not whether the figures are."
    )
    return Verdict(
        bool(judged) and all(judged),  # without all four errors a run shows nothing
        f"{'; '.join(told)}.{caveat} (Expected of the measured: averaging brings something "
        f"back, and SWALP is within a point of float SWA.)",
    )


def plot(settings: Settings, rows: Sequence[Row]) -> Figure:
    """The four errors of every line, published and measured."""
    figure, (axes,) = plots.figure()
    colours = (plots.FLOAT, plots.FLOAT_AVERAGED, plots.LOW, plots.AVERAGED)
    lines = _groups(rows)
    for place, (_, cells) in enumerate(lines):
        for name, colour in zip(COLUMNS, colours, strict=True):
            if (row := cells.get(name)) is not None:
                axes.errorbar(
                    row["test_error"], place, xerr=row["spread"], color=colour, marker="o",
                    markersize=6, linestyle="",
                )  # fmt: skip
    for name, colour in zip(COLUMNS, colours, strict=True):
        axes.plot([], [], color=colour, marker="o", linestyle="", label=name)
    labels = [
        f"{first['data']}, {first['network']}\n{first['kind']}, {first['epochs']} epochs"
        for first, _ in lines
    ]
    axes.set_yticks(range(len(lines)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("test error, %")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


CLAIM = Claim(
    name="cifar",
    title="CIFAR: the published table beside what is measured here",
    statement=(
        "8-bit SGD loses 0.8 to 2.4 points to float SGD on CIFAR-10 and CIFAR-100; averaging "
        "(SWALP) brings 8 bits back to float SGD or better (Yang et al. 2019; figures from the "
        "published code's README, and where said from a blog post). Measured: every finished run "
        "on CIFAR in experiments/, at whatever number of epochs it was given."
    ),
    full=Settings(records="experiments", seeds=1),
    quick=Settings(records="experiments", seeds=1),
    run=run, table=table, plot=plot, verdict=verdict,
)  # fmt: skip
