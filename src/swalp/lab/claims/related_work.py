"""One network and data set under the number formats and roundings of related work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from swalp.training.significance import differs_from_zero

GUESSING = 80.0  # % of test error: above, nothing was learned
ROUNDINGS = ("nearest", "stochastic")
LONGER = "SGD, all epochs"
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
    """Float and every scheme, rounding and word length, from every seed.

    Of what is rounded stochastically, and of float, also SGD whose rate falls over all epochs: as
    many as the average had.
    """
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
    low = None if scheme == "float" else recipe(scheme, bits, rounding)
    found = network.train(
        settings.training,
        network.load(settings.data, data_dir),
        low,
        seed,
        [settings.average],
        check,
    )
    known = {"seed": seed, "scheme": scheme, "rounding": rounding, "bits": bits}
    rows = [
        known | {"model": "SGD" if row["average"] is None else "average", **row} for row in found
    ]
    if rounding == "nearest":
        return rows
    training = replace(settings.training, averaging_start=settings.training.epochs)
    (longer,) = network.train(training, network.load(settings.data, data_dir), low, seed, [], check)
    return [*rows, known | {"model": LONGER, **longer}]


def mean(rows: Sequence[Row], **wanted: object) -> float:
    """Test error over the seeds."""
    return fmean(row["test_error"] for row in pick(rows, **wanted))


def _cell(rows: Sequence[Row], **wanted: object) -> str:
    values = [row["test_error"] for row in pick(rows, **wanted)]
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{spread}"


def table(settings: Settings, rows: Sequence[Row]) -> str:
    """Test errors with and without averaging, for each word length."""
    sgd, swa, longer = (
        _cell(rows, scheme="float", model=model) for model in ("SGD", "average", LONGER)
    )
    epochs, start = settings.training.epochs, settings.training.averaging_start
    parts = [
        f"Test error %, {settings.data}, {settings.training.model} of width "
        f"{settings.training.width}: float SGD {sgd}, SWA {swa}, SGD over {epochs} epochs "
        f"{longer}; mean ± standard deviation of {settings.seeds} seeds. SGD and SGD-LP are "
        f"iterates after {start} epochs, where averaging starts, as in the paper; averages are of "
        f"the {epochs - start} epochs that follow; the last column is SGD-LP whose rate falls over "
        f"{epochs} epochs, as many as the average had. Formats: "
        f"{'; '.join(f'{k}: {v}' for k, v in SCHEMES.items())}."
    ]
    for bits in settings.bits:
        header = [f"{bits} bits", "nearest: SGD-LP", "averaged", "stochastic: SGD-LP", "averaged"]
        header.append(f"SGD-LP, {epochs} epochs")
        lines = [
            [name]
            + [
                _cell(rows, scheme=name, bits=bits, rounding=rule, model=model)
                for rule in ROUNDINGS
                for model in ("SGD", "average")
            ]
            + [_cell(rows, scheme=name, bits=bits, rounding="stochastic", model=LONGER)]
            for name in SCHEMES
        ]
        parts.append(markdown(header, lines))
    return "\n\n".join(parts)


def gains(rows: Sequence[Row], wanted: Mapping[str, object], than: str = "SGD") -> list[float]:
    """How far the average's test error is below that of the model `than`, for each seed.

    They share the seed's initial weights and order of the data, and iterate and average the
    trajectory, so that their differences vary less than either.
    """
    before, after = (
        {row["seed"]: row["test_error"] for row in pick(rows, model=model, **wanted)}
        for model in (than, "average")
    )
    return [before[seed] - after[seed] for seed in sorted(before)]


def _over_formats(each: Sequence[Sequence[float]]) -> list[float]:
    """The mean over the formats, for each seed."""
    return [fmean(values) for values in zip(*each, strict=True)]


def _with_error(values: Sequence[float]) -> str:
    """A mean over seeds and its standard error."""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{round(fmean(values), 2) + 0.0:.2f}{error}"  # + 0.0: there is no -0.00


def verdict(settings: Settings, rows: Sequence[Row]) -> Verdict:
    """Whether, rounded stochastically, averaging helps on the whole and hurts in no format."""
    told, holds = [], True
    epochs = settings.training.epochs
    for bits in settings.bits:
        cases = [
            {"scheme": name, "bits": bits, "rounding": "stochastic"}
            for name in SCHEMES
            if mean(rows, scheme=name, bits=bits, rounding="stochastic", model="SGD") < GUESSING
        ]
        failing = sorted(SCHEMES.keys() - {case["scheme"] for case in cases})
        if not cases:
            return Verdict(False, f"at {bits} bits no format trains at all.")
        found = [gains(rows, case) for case in cases]
        helped = sum(fmean(values) > 0 and differs_from_zero(values) for values in found)
        hurt = [
            str(case["scheme"])
            for case, values in zip(cases, found, strict=True)
            if fmean(values) < 0 and differs_from_zero(values)
        ]
        whole = _over_formats(found)
        longer = _over_formats([gains(rows, case, LONGER) for case in cases])
        better = sum(
            mean(rows, scheme=name, bits=bits, rounding="stochastic", model="average")
            <= mean(rows, scheme=name, bits=bits, rounding="nearest", model="average")
            for name in SCHEMES
            if name not in failing
        )
        best = min(cases, key=lambda case: mean(rows, model="average", **case))
        without = f" ({' and '.join(failing)} do not)" if failing else ""
        told.append(
            f"at {bits} bits, rounded stochastically, averaging lowers the error of the iterate "
            f"that it starts from by {_with_error(whole)} points over the {len(cases)} formats "
            f"that train at all{without}, by {min(map(fmean, found)):.2f} to "
            f"{max(map(fmean, found)):.2f} in one; by Student's t it helps in {helped} of them, "
            f"and hurts in {' and '.join(hurt) or 'none'}; than SGD-LP whose rate falls over all "
            f"{epochs} epochs it is better by {_with_error(longer)}; the average is at least as "
            f"good as with rounding to nearest in {better}; the best format is {best['scheme']}, "
            f"at {mean(rows, model='average', **best):.2f} %"
        )
        holds &= fmean(whole) > 0 and differs_from_zero(whole) and not hurt
    sgd, swa, longest = (
        mean(rows, scheme="float", model=model) for model in ("SGD", "average", LONGER)
    )
    return Verdict(
        holds,
        f"{'; '.join(told)}. Float SGD: {sgd:.2f} %, SWA: {swa:.2f} %, SGD over all {epochs} "
        f"epochs: {longest:.2f} %; {settings.seeds} seeds, ± their standard error. (Expected, at "
        f"the 5 % level of Student's t: averaging improves on the iterate on the whole, and hurts "
        f"in no format.)",
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
        "Averaging improves on the iterate that it starts from whatever low-precision format the "
        "iterates are kept in, as long as they are rounded stochastically. The same small network "
        "and data under fixed point, block floating point, minifloats (FP8) and microscaling (MX), "
        "every role at equal bits, rounded to nearest and stochastically: formats in the manner of "
        "the schemes that the paper builds on or compares with, not those schemes' whole recipes. "
        "All figures are this project's; among them, that of SGD-LP with as many epochs as the "
        "average had."
    ),
    full=Settings(
        data="fashion-mnist", training=Training("mlp", 64, 128, 6, 4, 0.1, 0.02, 0.9, 5e-4),
        bits=(8, 4), average="every=10", seeds=6,
    ),
    quick=Settings(
        data="fashion-mnist", training=Training("mlp", 32, 128, 3, 2, 0.1, 0.02, 0.9, 5e-4),
        bits=(4,), average="every=10", seeds=3,
    ),
    run=run, table=table, plot=plot, verdict=verdict,
)  # fmt: skip
