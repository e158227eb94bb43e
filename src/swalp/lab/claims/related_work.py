"""One network and data set under the number formats and roundings of related work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure

from swalp import Nearest, Stochastic, parse_format
from swalp.formats import BlockFloat, FixedPoint, Format, Microscaling, Minifloat
from swalp.lab import network, plots
from swalp.lab.claim import Claim, Context, Row, Verdict, markdown, pick
from swalp.lab.network import Training
from swalp.lab.parallel import in_processes
from swalp.recipes import Override, Quantizer, Recipe
from swalp.training import data

GUESSING = 80.0  # % of test error: above, nothing was learned
CLEAR = 2  # standard errors: a difference that is none of chance
ROUNDINGS = ("nearest", "stochastic")
SCHEMES = {
    "fixed point": "one gap for each role",
    "BFP, big block": "one exponent for each tensor",
    "BFP, small block": "one exponent for each output channel, or sample",
    "minifloat": "E4M3 forward and E5M2 backward; at 4 bits E2M1; no scale",
    "MX": "the same, with a power of two for each 16 neighbours",
}
_TILE = 16  # not 32, which does not divide 784


@dataclass(frozen=True, slots=True)
class Settings:
    """Of training one small network.

    Attributes:
        data: the data set.
        training: of the network; formats hold for all its roles.
        bits: word lengths, 8 or 4.
        average: of the iterates, as `swalp.training.averages.parse` reads it.
        seeds: of initial weights, order of the data and noise.
    """

    data: str
    training: Training
    bits: tuple[int, ...]
    average: str
    seeds: int


def recipe(scheme: str, bits: int, rounding: str) -> Recipe:
    """A scheme with every role at `bits` bits."""
    overrides: tuple[Override, ...] = ()
    names = ("e4m3fn", "e5m2") if bits == 8 else ("e2m1", "e2m1")
    forward, backward = map(parse_format, names)
    assert isinstance(forward, Minifloat)
    assert isinstance(backward, Minifloat)
    match scheme:
        case "fixed point":
            # Points where the largest values of each role just fit in this network.
            weight: Format = FixedPoint(bits, bits - 2)
            activation: Format = FixedPoint(bits, bits - 4)
            error: Format = FixedPoint(bits, bits + 4)
            gradient: Format = FixedPoint(bits, bits + 1)
            momentum: Format = FixedPoint(bits, bits - 2)
        case "BFP, big block":
            weight = activation = error = gradient = momentum = BlockFloat(bits)
        case "BFP, small block":
            weight = gradient = momentum = activation = error = BlockFloat(bits, axes=(0,))
        case "minifloat":
            weight = activation = forward
            error = gradient = momentum = backward
        case _:
            weight = activation = Microscaling(forward, tile=_TILE)
            error = gradient = momentum = Microscaling(backward, tile=_TILE)
            # The last layer's 10 biases fill no tile.
            bare = [_quantizer(fmt, rounding, 32) for fmt in (forward, backward, backward)]
            overrides = (
                Override(parameter="bias", weight=bare[0], gradient=bare[1], momentum=bare[2]),
            )
    return Recipe(
        name=f"{scheme}, {rounding}, {bits} bits",
        weight=_quantizer(weight, rounding, 32),
        activation=_quantizer(activation, rounding, 16),
        error=_quantizer(error, rounding, 16),
        gradient=_quantizer(gradient, rounding, 16),
        momentum=_quantizer(momentum, rounding, 16),
        overrides=overrides,
    )


def _quantizer(fmt: Format, rounding: str, random_bits: int) -> Quantizer:
    rule = Nearest() if rounding == "nearest" else Stochastic(random_bits=random_bits)
    return Quantizer(fmt, rule)


def run(settings: Settings, context: Context) -> list[Row]:
    """Float and every scheme, rounding and word length, from every seed."""
    data.load(settings.data, context.data_dir, download=context.download)
    cases: list[tuple[str, str, int]] = [("float", "", 32)]
    cases += [
        (name, rule, bits) for bits in settings.bits for name in SCHEMES for rule in ROUNDINGS
    ]
    jobs = [
        partial(_train, settings, seed, *case, context.data_dir)
        for seed in range(settings.seeds)
        for case in cases
    ]
    return in_processes(context, jobs)


def _train(
    settings: Settings,
    seed: int,
    scheme: str,
    rounding: str,
    bits: int,
    data_dir: Path | None,
    check: Callable[[], None],
) -> list[Row]:
    found = network.train(
        settings.training,
        network.load(settings.data, data_dir),
        None if scheme == "float" else recipe(scheme, bits, rounding),
        seed,
        [settings.average],
        check,
    )
    known = {"seed": seed, "scheme": scheme, "rounding": rounding, "bits": bits}
    return [
        known | {"model": "SGD" if row["average"] is None else "average", **row} for row in found
    ]


def mean(rows: Sequence[Row], **wanted: object) -> float:
    """Test error over the seeds."""
    return fmean(row["test_error"] for row in pick(rows, **wanted))


def _cell(rows: Sequence[Row], **wanted: object) -> str:
    values = [row["test_error"] for row in pick(rows, **wanted)]
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{spread}"


def table(settings: Settings, rows: Sequence[Row]) -> str:
    """Test errors with and without averaging, for each word length."""
    sgd, swa = (_cell(rows, scheme="float", model=model) for model in ("SGD", "average"))
    parts = [
        f"Test error %, {settings.data}, {settings.training.model} of width "
        f"{settings.training.width}: float SGD {sgd}, SWA {swa}; mean ± standard deviation of "
        f"{settings.seeds} seeds. Formats: {'; '.join(f'{k}: {v}' for k, v in SCHEMES.items())}."
    ]
    for bits in settings.bits:
        header = [f"{bits} bits", "nearest: SGD-LP", "averaged", "stochastic: SGD-LP", "averaged"]
        lines = [
            [name]
            + [
                _cell(rows, scheme=name, bits=bits, rounding=rule, model=model)
                for rule in ROUNDINGS
                for model in ("SGD", "average")
            ]
            for name in SCHEMES
        ]
        parts.append(markdown(header, lines))
    return "\n\n".join(parts)


def gain(rows: Sequence[Row], **wanted: object) -> tuple[float, float]:
    """What averaging takes off the test error: mean over the seeds, and its standard error.

    Iterate and average of a seed are of the same trajectory, so that their differences vary less
    than either. The standard error of one seed is given as 0.
    """
    before, after = (
        {row["seed"]: row["test_error"] for row in pick(rows, model=model, **wanted)}
        for model in ("SGD", "average")
    )
    gains = [before[seed] - after[seed] for seed in sorted(before)]
    return fmean(gains), stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0


def verdict(settings: Settings, rows: Sequence[Row]) -> Verdict:
    """Whether, rounded stochastically, averaging helps on the whole and hurts in no format."""
    told, holds = [], True
    for bits in settings.bits:
        cases = [
            {"scheme": name, "bits": bits, "rounding": "stochastic"}
            for name in SCHEMES
            if mean(rows, scheme=name, bits=bits, rounding="stochastic", model="SGD") < GUESSING
        ]
        failing = sorted(SCHEMES.keys() - {case["scheme"] for case in cases})
        if not cases:
            return Verdict(False, f"at {bits} bits no format trains at all.")
        gains = [gain(rows, **case) for case in cases]
        clear = sum(value > CLEAR * error for value, error in gains)
        hurt = [
            str(case["scheme"])
            for case, (value, error) in zip(cases, gains, strict=True)
            if value < -CLEAR * error
        ]
        whole = fmean(value for value, _ in gains)
        spread = math.hypot(*(error for _, error in gains)) / len(gains)
        better = sum(
            mean(rows, scheme=name, bits=bits, rounding="stochastic", model="average")
            <= mean(rows, scheme=name, bits=bits, rounding="nearest", model="average")
            for name in SCHEMES
            if name not in failing
        )
        best = min(cases, key=lambda case: mean(rows, model="average", **case))
        without = f" ({' and '.join(failing)} do not)" if failing else ""
        told.append(
            f"at {bits} bits, rounded stochastically, averaging lowers the error by {whole:.2f} ± "
            f"{spread:.2f} points over the {len(cases)} formats that train at all{without}, by "
            f"{min(value for value, _ in gains):.2f} to {max(value for value, _ in gains):.2f} in "
            f"one; it helps by more than {CLEAR} standard errors in {clear} of them, and hurts by "
            f"as much in {' and '.join(hurt) or 'none'}; the "
            f"average is at least as good as with rounding to nearest in {better}; the best format "
            f"is {best['scheme']}, at {mean(rows, model='average', **best):.2f} %"
        )
        holds &= whole > CLEAR * spread and not hurt
    sgd, swa = (mean(rows, scheme="float", model=model) for model in ("SGD", "average"))
    return Verdict(
        holds,
        f"{'; '.join(told)}. Float SGD: {sgd:.2f} %, SWA: {swa:.2f} %. (Expected: averaging helps "
        f"on the whole, by more than {CLEAR} standard errors, and hurts by as much in no format.)",
    )


def plot(settings: Settings, rows: Sequence[Row]) -> Figure:
    """SGD-LP and average for each format and rounding, one picture for each word length."""
    figure, axes = plots.figure(len(settings.bits))
    names = list(SCHEMES)
    for each, bits in zip(axes, settings.bits, strict=True):
        for offset, rule in zip((0.15, -0.15), ROUNDINGS, strict=True):
            for model, label, colour in (
                ("SGD", "SGD-LP", plots.LOW),
                ("average", "averaged", plots.AVERAGED),
            ):
                values = [
                    mean(rows, scheme=name, bits=bits, rounding=rule, model=model) for name in names
                ]
                places = [place + offset for place in range(len(names))]
                each.plot(
                    values, places, color=colour, linestyle="", markersize=7,
                    marker="o",
                    fillstyle="full" if rule == "stochastic" else "none",
                    label=f"{label}, {rule}",
                )  # fmt: skip
        for model, label, colour in (
            ("SGD", "SGD", plots.FLOAT),
            ("average", "SWA", plots.FLOAT_AVERAGED),
        ):
            each.axvline(
                mean(rows, scheme="float", model=model), color=colour, linestyle=":",
                label=f"{label}, float32",
            )  # fmt: skip
        each.set_xscale("log")
        each.xaxis.set_major_formatter("{x:g}")
        each.xaxis.set_minor_formatter("{x:g}")
        each.tick_params(axis="x", which="both", labelsize="small")
        each.set_yticks(range(len(names)), names)
        each.invert_yaxis()
        each.set_xlabel("test error, %")
        each.set_title(f"every role in {bits} bits", fontsize="medium")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center",
        ncols=6 if len(axes) > 1 else 3, frameon=False,
        fontsize="small",
    )  # fmt: skip
    return figure


CLAIM = Claim(
    name="related-work",
    title="Related formats and roundings, with and without averaging",
    statement=(
        "Averaging helps whatever low-precision format the iterates are kept in, as long as they "
        "are rounded stochastically. The same small network and data under fixed point, block "
        "floating point, minifloats (FP8) and microscaling (MX), every role at equal bits, rounded "
        "to nearest and stochastically: formats in the manner of the schemes that the paper builds "
        "on or compares with, not those schemes' whole recipes. All figures are this project's."
    ),
    full=Settings(
        data="fashion-mnist", training=Training("mlp", 64, 128, 6, 4, 0.1, 0.02, 0.9, 5e-4),
        bits=(8, 4), average="every=10", seeds=6,
    ),
    quick=Settings(
        data="fashion-mnist", training=Training("mlp", 32, 128, 3, 2, 0.1, 0.02, 0.9, 5e-4),
        bits=(4,), average="every=10", seeds=1,
    ),
    run=run, table=table, plot=plot, verdict=verdict,
)  # fmt: skip
