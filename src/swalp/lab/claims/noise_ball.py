"""The noise ball: SGD-LP's grows with the gap, SWALP's bias with its square."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, linear_regression
from typing import Literal

import torch
from matplotlib.figure import Figure

from swalp.formats import FixedPoint
from swalp.lab import engine, plots
from swalp.lab.claim import Claim, Context, Row, Verdict, figures, markdown, pick
from swalp.lab.engine import Method
from swalp.lab.parallel import in_threads
from swalp.lab.problems import Scalars
from swalp.noise import stream_seed
from swalp.rounding import Stochastic

LIMIT = math.sqrt(2 / math.pi) / 2  # of E w**2 / (sigma gap) as the rate goes to 0, on w**2 / 2
_INTEGER_BITS = 4  # of the format, sign included: the iterate never meets its ends
_FAR = 5  # times what float leaves at the same rate: what is of the gap, not of the rate


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one-dimensional descent from gradients with noise N(0, sigma**2).

    Attributes:
        frac_bits: F to try; the gap is 2**-F.
        rates: learning rates, in gaps. Of the last, where the gap tells more than the rate, float
            SGD is run, too.
        swept_bits: the F at which `swept_rates` are tried, on the quadratic.
        swept_rates: further learning rates, in gaps.
        sigma: of the gradients' noise.
        copies: independent trajectories of each seed.
        steps: that are averaged, all of them.
        warmup: time before that, in units of 1 / rate.
        seeds: of the noise.
    """

    frac_bits: tuple[int, ...]
    rates: tuple[float, ...]
    swept_bits: int
    swept_rates: tuple[float, ...]
    sigma: float
    copies: int
    steps: int
    warmup: int
    seeds: int


def run(settings: Settings, context: Context) -> list[Row]:
    """Both functions at every gap and rate, and the sweep of rates, from every seed."""
    kinds: tuple[Literal["quadratic", "skewed"], ...] = ("quadratic", "skewed")
    cases = [
        (kind, frac_bits, rate, "SGD-LP")
        for kind in kinds
        for frac_bits in settings.frac_bits
        for rate in settings.rates
    ]
    cases += [("quadratic", settings.swept_bits, rate, "SGD-LP") for rate in settings.swept_rates]
    last = settings.rates[-1]
    cases += [(kind, frac_bits, last, "SGD") for kind in kinds for frac_bits in settings.frac_bits]
    jobs = [
        partial(_copies, settings, seed, *case)
        for seed in range(settings.seeds)
        for case in dict.fromkeys(cases)
    ]
    return in_threads(context, jobs)


def _copies(
    settings: Settings,
    seed: int,
    kind: Literal["quadratic", "skewed"],
    frac_bits: int,
    rate: float,
    method_name: str,
    check: Callable[[], None],
) -> list[Row]:
    problem = Scalars(kind, settings.sigma, settings.copies)
    fmt = FixedPoint(frac_bits + _INTEGER_BITS, frac_bits)
    name = f"{kind}/{frac_bits}/{rate}"
    warmup = math.ceil(settings.warmup / (rate * fmt.gap))
    method = Method(
        rate * fmt.gap,
        None if method_name == "SGD" else fmt,
        Stochastic(stream_seed(seed, "weight", name)),
        start=warmup,
    )
    state = engine.begin(torch.zeros(problem.shape))
    noise = stream_seed(seed, "gradient noise", name)
    while (left := warmup + settings.steps - state.step) > 0:
        check()
        engine.descend(problem, method, state, noise, min(left, 20_000))
    average = state.average(method)
    return [
        {
            "seed": seed,
            "function": kind,
            "method": method_name,
            "frac_bits": frac_bits,
            "gap": fmt.gap,
            "rate_in_gaps": rate,
            "mean_square": figures(float(state.mean_square(method).mean())),
            "average_mean": figures(float(average.mean())),
            "average_variance": figures(float(average.var())),
        }
    ]


def mean_square(rows: Sequence[Row], **wanted: object) -> float:
    """E w**2 of the iterates, over time, copies and seeds."""
    return fmean(row["mean_square"] for row in pick(rows, **wanted))


def squared_bias(settings: Settings, rows: Sequence[Row], **wanted: object) -> tuple[float, float]:
    """The squared mean of the averages of all copies, and the standard error of that mean.

    The expected square of the mean's own error is taken off, so that it is 0 on average if the
    average is unbiased.
    """
    found = pick(rows, **wanted)
    count = settings.copies * len(found)
    error = fmean(row["average_variance"] for row in found) / count
    return fmean(row["average_mean"] for row in found) ** 2 - error, math.sqrt(error)


def per_bit(settings: Settings, values: Sequence[float]) -> float:
    """By what factor values change from one bit to the next: a least-squares fit of logarithms."""
    fit = linear_regression(settings.frac_bits, [math.log2(value) for value in values])
    return float(2**fit.slope)


def _curves(
    settings: Settings, rows: Sequence[Row], rate: float, method: str = "SGD-LP"
) -> dict[str, list[float]]:
    """At one rate, against F."""
    bits = settings.frac_bits

    def squares(function: str) -> list[float]:
        wanted = {"function": function, "rate_in_gaps": rate, "method": method}
        return [mean_square(rows, frac_bits=f, **wanted) for f in bits]

    wanted = {"function": "skewed", "rate_in_gaps": rate, "method": method}
    bias = [squared_bias(settings, rows, frac_bits=f, **wanted)[0] for f in bits]
    return {"quadratic": squares("quadratic"), "skewed": squares("skewed"), "bias": bias}


def table(settings: Settings, rows: Sequence[Row]) -> str:
    """Against F, at the last rate beside float; and against the rate, at one F."""
    lines = []
    rate = settings.rates[-1]
    found, float32 = (_curves(settings, rows, rate, name) for name in ("SGD-LP", "SGD"))
    low = [_curves(settings, rows, r)["quadratic"] for r in settings.rates]
    limit = settings.sigma * LIMIT
    for place, bits in enumerate(settings.frac_bits):
        cells = [str(bits), *(f"{values[place]:.3g}" for values in low)]
        cells.append(f"{limit * 2.0**-bits:.3g}")
        for key in ("skewed", "bias"):
            cells += [f"{each[key][place]:.3g}" for each in (found, float32)]
        lines.append(cells)
    header = ["F", *(f"w²/2: E w² of SGD-LP, α = {_gaps(r)}" for r in settings.rates)]
    header += ["limit as α → 0", f"skewed, α = {_gaps(rate)}: E w² of SGD-LP", "of float SGD"]
    header += ["squared bias of SWALP", "of float SWA"]
    swept = [[_gaps(r), f"{_ratio(settings, rows, r):.4f}"] for r in _swept(settings)]
    return (
        f"σ = {settings.sigma:g}; {settings.seeds} seeds of {settings.copies:,} trajectories of "
        f"{settings.steps:,} steps.\n\n{markdown(header, lines)}\n\n"
        f"On w²/2 with F = {settings.swept_bits}, the limit being {LIMIT:.4f}:\n\n"
        f"{markdown(['α', 'E w² / (σδ)'], swept)}"
    )


def _swept(settings: Settings) -> list[float]:
    return sorted({*settings.rates, *settings.swept_rates}, reverse=True)


def _ratio(settings: Settings, rows: Sequence[Row], rate: float) -> float:
    """E w**2 / (sigma gap) on the quadratic at the swept F."""
    wanted = {
        "function": "quadratic",
        "method": "SGD-LP",
        "frac_bits": settings.swept_bits,
        "rate_in_gaps": rate,
    }
    return mean_square(rows, **wanted) * 2.0**settings.swept_bits / settings.sigma


def _gaps(rate: float) -> str:
    return "δ" if rate == 1 else f"δ/{1 / rate:g}"


def verdict(settings: Settings, rows: Sequence[Row]) -> Verdict:
    """Factors per bit, far above what float leaves; the limit; the lower bound at every rate."""
    judged = settings.rates[-1]
    found, float32 = (_curves(settings, rows, judged, name) for name in ("SGD-LP", "SGD"))
    times = {
        key: min(low / abs(other) for low, other in zip(found[key], float32[key], strict=True))
        for key in found
    }
    halving = per_bit(settings, found["quadratic"]), per_bit(settings, found["skewed"])
    usable = all(value > 0 for value in found["bias"])
    quartering = per_bit(settings, found["bias"]) if usable else math.nan
    slowest = min(_swept(settings))
    reached = _ratio(settings, rows, slowest)
    lowest = min(
        row["mean_square"] / (settings.sigma * row["gap"])
        for row in pick(rows, function="quadratic", method="SGD-LP")
    )
    holds = (
        all(abs(factor - 0.5) <= 0.05 for factor in halving)
        and abs(quartering - 0.25) <= 0.04
        and abs(reached / LIMIT - 1) <= 0.03
        and lowest >= 0.97 * LIMIT
        and min(times.values()) >= _FAR
    )
    return Verdict(
        holds,
        f"with a rate of {_gaps(judged)}, from one bit to the next, SGD-LP's E w² is multiplied by "
        f"{halving[0]:.3f} on w²/2 and by {halving[1]:.3f} on the skewed function (expected: 1/2), "
        f"SWALP's squared bias by {quartering:.3f} (expected: 1/4). It is the gap that makes "
        f"it, not the rate: float SGD at the same rates has at most "
        f"1/{min(times['quadratic'], times['skewed']):.0f} of that E w², and float SWA at most "
        f"1/{times['bias']:.0f} of that bias (expected: at most 1/{_FAR}). On w²/2 with a rate of "
        f"{_gaps(slowest)}, E w² is "
        f"{reached:.4f} σδ, where the limit is √(2/π)/2 = {LIMIT:.4f}; at no rate is it below "
        f"{lowest:.3f} σδ.",
    )


def plot(settings: Settings, rows: Sequence[Row]) -> Figure:
    """E w**2 and squared bias against the gap; E w**2 against the rate."""
    figure, (left, middle, right) = plots.figure(3)
    gaps = [2.0**-f for f in settings.frac_bits]
    limit = settings.sigma * LIMIT
    shades = (plots.LOW, plots.OTHERS[0])
    for rate, colour in zip(settings.rates, shades, strict=False):
        found = _curves(settings, rows, rate)
        left.plot(
            gaps, found["quadratic"], color=colour, marker="o", markersize=4,
            label=f"SGD-LP, α = {_gaps(rate)}",
        )  # fmt: skip
    left.plot(
        gaps, [limit * gap for gap in gaps], color=plots.REFERENCE, linestyle="--", linewidth=1,
        label="limit as α → 0: √(2/π)/2 · σδ",
    )  # fmt: skip
    left.set_title("w²/2: E w² of the iterates", fontsize="medium")
    rate = settings.rates[-1]
    found, float32 = (_curves(settings, rows, rate, name) for name in ("SGD-LP", "SGD"))
    middle.plot(
        gaps, found["skewed"], color=plots.LOW, marker="o", markersize=4,
        label=f"E w² of SGD-LP: × {per_bit(settings, found['skewed']):.2f} a bit",
    )  # fmt: skip
    middle.plot(
        gaps, found["bias"], color=plots.AVERAGED, marker="o", markersize=4,
        label=f"squared bias of SWALP: × {per_bit(settings, found['bias']):.2f} a bit",
    )  # fmt: skip
    middle.plot(
        gaps, float32["skewed"], color=plots.FLOAT, marker="o", markersize=4,
        label="E w² of SGD in float",
    )  # fmt: skip
    middle.plot(
        gaps, [abs(value) for value in float32["bias"]], color=plots.FLOAT_AVERAGED, marker="o",
        markersize=4, label="squared bias of SWA in float",
    )  # fmt: skip
    for each, power in ((found["skewed"], 1), (found["bias"], 2)):
        guide = [each[-1] * (gap / gaps[-1]) ** power for gap in gaps]
        middle.plot(gaps, guide, color=plots.REFERENCE, linestyle=":", linewidth=1)
    middle.set_title(
        f"strongly convex, skewed, α = {_gaps(rate)} (dotted: δ and δ²)", fontsize="medium"
    )
    for axes in (left, middle):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("gap δ")
        axes.legend(frameon=False, fontsize="small")
    rates = _swept(settings)
    right.plot(
        rates, [_ratio(settings, rows, rate) for rate in rates], color=plots.LOW, marker="o",
        markersize=4, label="SGD-LP",
    )  # fmt: skip
    gap = 2.0**-settings.swept_bits
    right.plot(
        rates, [rate / (2 - rate * gap) for rate in rates], color=plots.FLOAT, linewidth=1.2,
        label="SGD in float: α/(2 − α) · σ²",
    )  # fmt: skip
    right.axhline(LIMIT, color=plots.REFERENCE, linestyle="--", linewidth=1, label="√(2/π)/2")
    right.set_xscale("log", base=2)
    right.set_ylim(bottom=0)
    right.set_xlabel("learning rate α, in gaps")
    right.set_title(f"w²/2, F = {settings.swept_bits}: E w² / (σδ)", fontsize="medium")
    right.legend(frameon=False, fontsize="small")
    return figure


CLAIM = Claim(
    name="noise-ball",
    title="The noise ball: SGD-LP's halves with every bit, SWALP's bias quarters",
    statement=(
        "However small the rate, low-precision SGD on w²/2 keeps E w² ≥ A·σ·δ: its error is of the "
        "order of the gap δ, where the average's floor on a strongly convex function is of the "
        "order of δ² (Yang et al. 2019, lower bound and theorem on strongly convex functions, "
        "without their constants; the limit √(2/π)/2·σδ for small rates and gaps was derived for "
        "this project). Gradients w + σu, u normal; and, skewed, w + w²/(1 + w²) + σu, whose third "
        "derivative turns fluctuation into bias."
    ),
    full=Settings(
        frac_bits=(3, 4, 5, 6, 7, 8), rates=(1.0, 1 / 16), swept_bits=4,
        swept_rates=(1 / 2, 1 / 4, 1 / 8, 1 / 32, 1 / 64, 1 / 128), sigma=1.0, copies=1024,
        steps=1 << 21, warmup=10, seeds=3,
    ),
    quick=Settings(
        frac_bits=(3, 4, 5, 6, 7), rates=(1.0, 1 / 16), swept_bits=4,
        swept_rates=(1 / 4, 1 / 64), sigma=1.0, copies=512, steps=1 << 19, warmup=10, seeds=2,
    ),
    run=run, table=table, plot=plot, verdict=verdict,
)  # fmt: skip
