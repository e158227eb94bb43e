"""The sections on what happens inside a run's networks: formats, weights, errors of rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from shlex import quote
from typing import Literal

from swalp import recipes
from swalp.format_text import parse_format
from swalp.formats import BlockFloat, Format, Microscaling
from swalp.report.blocks import Block, Cell, Figure, Folded, Grid, Section, Text
from swalp.report.charts import Chart, Panel, Series
from swalp.report.formats import KIND, note, short
from swalp.report.number_line import staircase
from swalp.report.records import Row, Run

_LISTED_BITS = 12  # of words whose values are drawn one by one
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_POINTS = 401  # of a staircase
_ENOUGH = 12  # weights in a bin, on average
_MIDDLE = 12.5  # codes on each side of 0

# What is measured of each rounding: key, name, unit, and how a number is written.
_MEASURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("relative", "relative error, %", lambda value: f"{100 * value:.3g}"),
    ("in_gaps", "error, gaps (RMS)", lambda value: f"{value:.2f}"),
    ("saturated", "saturated, %", lambda value: f"{100 * value:.2g}" if value else "0"),
    ("underflowed", "underflowed, %", lambda value: f"{100 * value:.2g}" if value else "0"),
)


def number_formats(run: Run, prefix: str) -> list[Block]:
    """The formats of the run's arms by role, and pictures of them."""
    roles = _roles(run)
    if not roles:
        return []
    names = list(dict.fromkeys(role for chosen in roles.values() for role in chosen))
    body = [
        [Cell(arm), *(Cell(", ".join(chosen.get(role, ["float"]))) for role in names)]
        for arm, chosen in roles.items()
    ]
    grid = Grid("Formats of each role", ("arm", *names), body)
    formats: dict[str, Format] = {}
    for chosen in roles.values():
        for text in (text for texts in chosen.values() for text in texts):
            fmt = parse_format(text)
            formats.setdefault(str(_in_one_block(fmt)), fmt)
    facts = Grid(
        "These formats",
        ("format", "kind", "bits", "smallest", "largest", "gap in [1, 2)", "note"),
        [
            [
                Cell(name), Cell(KIND[type(fmt)]), Cell(str(fmt.bits)), Cell(_power(fmt.smallest)),
                Cell(_power(fmt.largest)), Cell(_power(fmt.gap)), Cell(_note(fmt)),
            ]
            for name, fmt in formats.items()
        ],
        frozenset({2, 3, 4, 5}),
    )  # fmt: skip
    panels = [panel for name, fmt in formats.items() for panel in _pictures(name, fmt)]
    chart = Chart(f"{prefix}number-lines", "The numbers of a format, and rounding to them", panels)
    return [grid, facts, *([Figure(chart)] if panels else [])]


def _roles(run: Run) -> dict[str, dict[str, list[str]]]:
    """Of each arm, the formats of each role: of what was measured, else of the recipe."""
    found: dict[str, dict[str, list[str]]] = {}
    measured = {record["arm"]: record["errors"] for record in run.diagnostics}
    for arm in dict.fromkeys([*run.settings.get("arms", []), *measured]):
        chosen: dict[str, list[str]] = {}
        for row in measured.get(arm, []):
            if row["role"] != "average" and row["format"] not in chosen.setdefault(row["role"], []):
                chosen[row["role"]].append(row["format"])
        if not chosen and arm != "float":
            try:
                recipe = run.recipes.get(arm) or recipes.named(arm, "arms")
            except (ValueError, OSError):
                continue  # a recipe of another version of swalp, or a file that is gone
            for role in recipes.ROLES:
                quantizer = getattr(recipe, role)
                if quantizer is not None and role != "second_moment":  # Adam's; runs train with SGD
                    chosen[role] = [str(quantizer.format)]
        if chosen:
            found[arm] = chosen
    return found


def _note(fmt: Format) -> str:
    if isinstance(fmt, BlockFloat):
        clamp = "symmetric" if fmt.symmetric else "two's complement"
        return f"a block shares an exponent of {fmt.exponent_bits} bits; {clamp}"
    return note(fmt)


def _power(value: float) -> str:
    """A magnitude as `short` has it, powers raised."""
    mantissa, power, exponent = short(value).partition("2^")
    return f"{mantissa}2{exponent.translate(_RAISED)}" if power else mantissa


def _in_one_block(fmt: Format) -> Format:
    """The same numbers, whatever shares an exponent."""
    if isinstance(fmt, BlockFloat):
        return BlockFloat(fmt.word_length, exponent_bits=fmt.exponent_bits, symmetric=fmt.symmetric)
    return fmt


def _pictures(name: str, fmt: Format) -> list[Panel]:
    if fmt.bits > _LISTED_BITS:
        return []
    found = staircase(fmt, _POINTS)
    x = found.x.tolist()
    block = isinstance(fmt, BlockFloat | Microscaling)
    where = " of a block whose largest magnitude lies in [1, 2)" if block else ""
    values = fmt.values()
    lines = [
        Series("the number itself", x, x, colour=6, dash=2),
        Series(
            "stochastic: mean, and the two outcomes",
            x,
            found.expected.tolist(),
            found.below.tolist(),
            found.above.tolist(),
            colour=2,
        ),
        Series("nearest", x, found.nearest.tolist(), colour=0, strong=True),
    ]
    whole = values.tolist()
    return [
        Panel(
            "rounding to it", "x", "Q(x)", lines, group=name,
            note=f"Rounding to {name}: staircases to nearest; the mean of stochastic rounding is "
            f"the number itself as far as the format reaches.",
        ),
        Panel(
            "its values", f"values{where}", "", [Series(name, whole, [1.0] * len(whole),
            kind="strokes")], group=name,
            note=f"The {len(whole)} values of {name}, from {whole[0]:.6g} to {whole[-1]:.6g}.",
        ),
        *_positive(name, [value for value in whole if value > 0], where),
    ]  # fmt: skip


def _positive(name: str, values: list[float], where: str) -> list[Panel]:
    if len(values) < 2 or values[-1] < 16 * values[0]:
        return []
    strokes = [Series(name, values, [1.0] * len(values), kind="strokes")]
    return [
        Panel(
            "its positive values, by binade", f"positive values{where}", "", strokes, group=name,
            log_x=True,
            note=f"The {len(values)} positive values of {name} on a logarithmic axis.",
        )
    ]  # fmt: skip


def diagnostics(run: Run, prefix: str) -> list[Section]:
    """Histograms of the weights, and how far each role of each layer is rounded."""
    if not run.diagnostics:
        if run.summary is None:
            return []
        text = (
            "This run recorded no histograms and no errors of rounding: it was made by a swalp "
            "that did not yet. Its settings make the same run again, with them: swalp train "
            f"{quote(f'{run.path}/config.toml')} --out DIRECTORY"
        )
        return [Section(f"{prefix}inside", "Inside the networks", [Text(text, "note")])]
    return [
        Section(f"{prefix}weights", "Weights", _weights(run.diagnostics, prefix)),
        Section(f"{prefix}rounding", "Quantization error and saturation",
                _errors(run.diagnostics, prefix)),
    ]  # fmt: skip


def _weights(records: Sequence[Row], prefix: str) -> list[Block]:
    panels, sizes = [], []
    for place, record in enumerate(records):
        for row in record["histograms"]:
            made = _histograms(record, row, place)
            panels += made
            # What shows most: the largest tensor of the first low-precision arm.
            low = row["unit"] == "gap"
            sizes += [(low, -place if low else 0, sum(row["iterate"]["counts"]))] * len(made)
    if not panels:
        return []
    chart = Chart(
        f"{prefix}histograms", "Weights of the last iterate, and of the average", panels,
        start=sizes.index(max(sizes)),
    )  # fmt: skip
    return [
        Text(
            "In low precision each weight is divided by the gap of its block, so that the iterate "
            "lies on whole numbers. The average lies between them: that is what it gains."
        ),
        Figure(chart),
    ]


def _histograms(record: Row, row: Row, place: int) -> list[Panel]:
    """All the weights in bins that hold enough of them; then the middle, number by number."""
    average = "SWA" if record["arm"] == "float" else "SWALP"
    elements = sum(row["iterate"]["counts"])
    in_gaps = row["unit"] == "gap"
    note = f"{row['name']}, {' by '.join(map(str, row['shape']))} weights"
    note += f" in {row['format']}." if row["format"] else " in float."
    if row.get("left_out"):
        note += f" Of the average, {row['left_out']} lie beyond the iterate's grid."

    def panel(label: str, joined: int, average_joined: int, middle: float | None) -> Panel:
        series = [
            _bins("iterate (SGD)", row["iterate"], elements, joined, middle, in_gaps, "bars",
                  place),
            _bins(f"average ({average})", row["average"], elements, average_joined, middle,
                  in_gaps, "steps", place + 1),
        ]  # fmt: skip
        return Panel(
            label,
            "weight / gap of its block" if in_gaps else "weight",
            "share of the weights per gap, %" if in_gaps else "density",
            series,
            group=str(record["arm"]),
            note=note,
        )

    bins = len(row["iterate"]["counts"])
    joined = max(1, round(_ENOUGH * bins / elements)) if elements else 1
    joined += 1 - joined % 2  # odd, so that bins stay centred on whole numbers
    if not in_gaps:
        return [panel(row["name"], joined, joined, None)]
    parts = max(1, round(row["iterate"]["width"] / row["average"]["width"]))
    if joined == 1 and bins <= 4 * _MIDDLE:
        return [panel(row["name"], 1, 1, None)]
    fine = panel(f"{row['name']}, the middle", 1, 1, _MIDDLE * row["iterate"]["width"])
    return [panel(row["name"], joined, joined * parts, None), fine]


def _bins(
    label: str,
    bins: Row,
    elements: int,
    joined: int,
    middle: float | None,
    in_gaps: bool,
    kind: Literal["bars", "steps"],
    colour: int,
) -> Series:
    """A histogram as a series, `joined` bins being made one, within `middle` of zero."""
    width, low, counts = bins["width"], bins["low"], bins["counts"]
    # Joined bins begin where a bin centred on 0 would.
    wide = joined * width
    lead = round((low + wide / 2) / width) % joined
    counts = [0] * lead + counts
    low -= lead * width
    heights: list[float] = []
    edges: list[float] = []
    for place in range(0, len(counts), joined):
        left = low + place * width
        if middle is not None and not -middle <= left + wide / 2 <= middle:
            continue
        edges.append(left)
        share = sum(counts[place : place + joined]) / elements / wide
        heights.append(100 * share if in_gaps else share)
    return Series(label, edges, heights, kind=kind, colour=colour)


def _errors(records: Sequence[Row], prefix: str) -> list[Block]:
    blocks: list[Block] = []
    panels, folded = [], []
    for record in records:
        rows = record["errors"]
        if not rows:
            continue
        names = _in_order(rows)
        roles = list(dict.fromkeys(row["role"] for row in rows))
        for key, title, _ in _MEASURES:
            scale = 1 if key == "in_gaps" else 100
            series = [
                Series(
                    role,
                    [float(names.index(row["name"])) for row in rows if row["role"] == role],
                    [scale * row[key] for row in rows if row["role"] == role],
                    kind="points",
                    colour=place,
                )
                for place, role in enumerate(roles)
            ]
            panels.append(
                Panel(title, "layer or parameter", title, series, group=str(record["arm"]),
                      names=names, log_y=key == "relative", note=_explained(key))
            )  # fmt: skip
        folded.append(_table(record, rows))
    if panels:
        examples = records[0].get("examples")
        seed = records[0].get("seed")
        blocks.append(
            Text(
                f"Measured in the step that would have come next, on {examples} training "
                f"examples, seed {seed}. Activations and errors are named by their layer, the "
                f"others by their parameter; “average” is the average rounded to the weights' "
                f"format, to nearest."
            )
        )
        chart = Chart(f"{prefix}layers", "How far numbers move when they are rounded", panels)
        blocks.append(Figure(chart))
        blocks += folded
    return blocks


def _in_order(rows: Sequence[Row]) -> list[str]:
    """Layers and parameters as they follow each other in the network, a layer first."""
    layers = [row["name"] for row in rows if row["role"] in ("activation", "error")]
    names: list[str] = []
    for row in rows:
        name = row["name"]
        if name not in layers and name not in names:
            layer = name.rpartition(".")[0]
            names += [layer] if layer in layers and layer not in names else []
            names.append(name)
    return [*names, *(name for name in dict.fromkeys(layers) if name not in names)]


def _explained(key: str) -> str:
    return {
        "relative": "The norm of the error over the norm of the numbers.",
        "in_gaps": "The root mean square of the error, in gaps of the grid: numbers spread evenly "
        "between two values have 0.29 to nearest and 0.41 stochastically.",
        "saturated": "The share beyond the largest value of its grid, which was clipped.",
        "underflowed": "The share of the numbers other than 0 that became 0.",
    }[key]


def _table(record: Row, rows: Sequence[Row]) -> Folded:
    header = ["role", "layer", "format", "rounding", "numbers"]
    header += [title for _, title, _ in _MEASURES] + ["gaps"]
    body = []
    for row in rows:
        low, high = (
            _power(row[key]) if row[key] else "0" for key in ("smallest_gap", "largest_gap")
        )
        body.append(
            [
                Cell(str(row["role"])), Cell(str(row["name"])), Cell(str(row["format"])),
                Cell(str(row["rounding"])), Cell(f"{row['elements']:,}"),
                *(Cell(write(row[key])) for key, _, write in _MEASURES),
                Cell(low if low == high else f"{low} to {high}"),
            ]
        )  # fmt: skip
    grid = Grid(
        f"{record['arm']}: error, saturation and underflow of each role of each layer",
        header, body, frozenset(range(4, len(header))),
    )  # fmt: skip
    return Folded(f"{record['arm']}: all {len(rows)} rows", [grid])
