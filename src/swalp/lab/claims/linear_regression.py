"""Linear regression: SWALP converges to the optimum, far below the quantization gap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, linear_regression, pvariance

import torch
from matplotlib.figure import Figure
from torch import Tensor

from swalp.formats import FixedPoint
from swalp.lab import engine, housing, plots
from swalp.lab.claim import Claim, Context, Row, Verdict, figures, markdown, pick
from swalp.lab.engine import Method
from swalp.lab.parallel import in_threads
from swalp.lab.problems import LeastSquares
from swalp.noise import stream_seed
from swalp.quantize import quantize
from swalp.rounding import Nearest, Stochastic

NONE = "\u2013"  # in a table
METHODS = {
    "SGD": plots.FLOAT,
    "SWA": plots.FLOAT_AVERAGED,
    "SGD-LP": plots.LOW,
    "SWALP": plots.AVERAGED,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Of linear regression.

    Attributes:
        data: "synthetic": x ~ N(0, I), y = x w + N(0, 1), w ~ U(-1, 1); or "california-housing".
        features, examples: of the synthetic data.
        steps: of one row each.
        warmup_steps: S, before averaging starts; then every iterate is taken.
        learning_rate: constant.
        word_length, frac_bits: of the fixed point that the iterate is rounded to.
        seeds: trajectories; the data are the same.
        judged_at: the step at which distances are compared.
        points: recorded steps in a decade.
    """

    data: str
    features: int
    examples: int
    steps: int
    warmup_steps: int
    learning_rate: float
    word_length: int
    frac_bits: int
    seeds: int
    judged_at: int
    points: int

    @property
    def format(self) -> FixedPoint:
        """Of the iterate."""
        return FixedPoint(self.word_length, self.frac_bits)


def recorded_steps(settings: Settings) -> list[int]:
    """Evenly spread on a log scale, with the start of averaging and the step of judgement."""
    last = settings.points * math.log10(settings.steps)
    spread = {round(10 ** (place / settings.points)) for place in range(int(last) + 1)}
    # After the warm-up, spread by the number of iterates averaged: the slope is fitted to that.
    later = {settings.warmup_steps + step for step in spread}
    found = spread | later | {settings.warmup_steps, settings.judged_at, settings.steps}
    return sorted(step for step in found if step <= settings.steps)


def synthetic(settings: Settings) -> LeastSquares:
    """The data, from a seed of their own."""
    make = torch.Generator().manual_seed(stream_seed(0, "data", "linear regression"))
    truth = 2 * torch.rand(settings.features, generator=make, dtype=torch.float64) - 1
    x = torch.randn(settings.examples, settings.features, generator=make)
    noise = torch.randn(settings.examples, generator=make, dtype=torch.float64)
    return LeastSquares(x, (x.double() @ truth + noise).float())


@dataclass(frozen=True, slots=True, eq=False)
class Exact:
    """What is known of a problem in float64: its optimum and its curvature."""

    x: Tensor
    y: Tensor
    optimum: Tensor
    curvatures: Tensor

    def squared_distance(self, w: Tensor) -> float:
        """||w - w*||**2."""
        return figures(float((w.double() - self.optimum).square().sum()))

    def gradient_variance(self, w: Tensor) -> float:
        """E ||g_i - E g_i||**2 over the rows, for the gradients g_i at `w`."""
        residuals = self.x @ w.double() - self.y
        second = (self.x.square().sum(1) * residuals.square()).mean()
        return figures(float(second - (residuals @ self.x / len(self.y)).square().sum()))


def exact(problem: LeastSquares) -> Exact:
    """Solve a problem."""
    x, y = problem.x.double(), problem.y.double()
    optimum = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    return Exact(x, y, optimum, torch.linalg.eigvalsh(x.T @ x / len(y)))


def run(settings: Settings, context: Context) -> list[Row]:
    """Both precisions from every seed, on one problem."""
    if settings.data == housing.NAME:
        problem = housing.load(context.data_dir, download=context.download)
    else:
        problem = synthetic(settings)
    known = exact(problem)
    representable = quantize(known.optimum.float(), settings.format, Nearest())
    facts = {
        "method": "problem",
        "examples": len(problem.y),
        "features": len(known.optimum),
        "smallest_curvature": figures(float(known.curvatures[0])),
        "largest_curvature": figures(float(known.curvatures[-1])),
        "nearest_representable": known.squared_distance(representable),
        "largest_coefficient": figures(float(known.optimum.abs().max())),
    }
    jobs = [
        partial(_trajectory, settings, problem, known, seed, low)
        for seed in range(settings.seeds)
        for low in (False, True)
    ]
    return [facts, *in_threads(context, jobs)]


def _trajectory(
    settings: Settings,
    problem: LeastSquares,
    known: Exact,
    seed: int,
    low: bool,
    check: Callable[[], None],
) -> list[Row]:
    rounding = Stochastic(stream_seed(seed, "weight", "linear regression"))
    method = Method(
        settings.learning_rate,
        settings.format if low else None,
        rounding if low else Nearest(),
        settings.warmup_steps,
    )
    # Both precisions see the same rows.
    make = torch.Generator().manual_seed(stream_seed(seed, "rows", "linear regression"))
    state = engine.begin(torch.zeros(problem.shape))
    names = ("SGD-LP", "SWALP") if low else ("SGD", "SWA")
    rows = []
    for step in recorded_steps(settings):
        while state.step < step:
            check()
            steps = min(step - state.step, 100_000)
            drawn = torch.randint(0, len(problem.y), (steps,), generator=make)
            engine.descend(problem, method, state, drawn, steps)
        row: Row = {"seed": seed, "method": names[0], "step": step, "averaged": 0}
        row["squared_distance"] = known.squared_distance(state.weight)
        row["gradient_variance"] = known.gradient_variance(state.weight)
        rows.append(row)
        if (averaged := method.taken(step)) > 0:
            row = {"seed": seed, "method": names[1], "step": step, "averaged": averaged}
            row["squared_distance"] = known.squared_distance(state.average(method))
            rows.append(row)
    return rows


def _distances(rows: Sequence[Row], method: str, key: str) -> dict[int, list[float]]:
    """The squared distances of all seeds, by `key`, in its order."""
    found: dict[int, list[float]] = {}
    for row in pick(rows, method=method):
        found.setdefault(row[key], []).append(row["squared_distance"])
    return dict(sorted(found.items()))


def curve(rows: Sequence[Row], method: str, key: str = "step") -> list[tuple[int, float]]:
    """Mean squared distance over the seeds, against `key`."""
    return [(place, fmean(values)) for place, values in _distances(rows, method, key).items()]


def slope(rows: Sequence[Row]) -> tuple[float, float]:
    """Of log mean distance against log number of iterates averaged, over the last decade of it.

    Returns:
        The slope, and its standard error: from the slopes that leave out a seed each (jackknife);
        0 of one seed.
    """
    found = _distances(rows, "SWALP", "averaged")
    last = [n for n in found if n >= max(found) / 10]
    places = [math.log10(n) for n in last]

    def fitted(means: Sequence[float]) -> float:
        return linear_regression(places, [math.log10(mean) for mean in means]).slope

    whole = fitted([fmean(found[n]) for n in last])
    seeds = len(found[last[0]])
    if seeds == 1:
        return whole, 0.0
    without = [
        fitted([(sum(found[n]) - found[n][seed]) / (seeds - 1) for n in last])
        for seed in range(seeds)
    ]
    return whole, math.sqrt(pvariance(without) * (seeds - 1))


def bound(settings: Settings, rows: Sequence[Row]) -> Callable[[int], float]:
    """The quadratic theorem's bound on E ||average - w*||**2, of the number T of iterates averaged.

    ||w_S - w*||**2 / (rate mu T)**2 + (rate**2 sigma**2 + gap**2 d / 4) / ((rate mu)**2 T), with
    sigma**2 the largest gradient variance met from the start of averaging on.
    """
    facts = pick(rows, method="problem")[0]
    later = [row for row in pick(rows, method="SGD-LP") if row["step"] >= settings.warmup_steps]
    variance = max(row["gradient_variance"] for row in later)
    start = fmean(row["squared_distance"] for row in later if row["step"] == settings.warmup_steps)
    rate = settings.learning_rate
    contraction = (rate * facts["smallest_curvature"]) ** 2
    steady = rate**2 * variance + settings.format.gap**2 * facts["features"] / 4
    return lambda averaged: start / (contraction * averaged**2) + steady / (contraction * averaged)


def _at(rows: Sequence[Row], method: str, step: int) -> list[float]:
    return [row["squared_distance"] for row in pick(rows, method=method, step=step)]


def table(settings: Settings, rows: Sequence[Row]) -> str:
    """Squared distances at powers of ten, the step of judgement and the end."""
    nearest = pick(rows, method="problem")[0]["nearest_representable"]
    powers = [10**k for k in range(3, 9) if settings.warmup_steps < 10**k < settings.steps]
    steps = sorted({settings.warmup_steps, *powers, settings.judged_at, settings.steps})
    limit = bound(settings, rows)
    lines = []
    for step in steps:
        cells = [f"{step:,}"]
        for method in METHODS:
            values = _at(rows, method, step)
            cells.append(f"{fmean(values):.3g}" if values else NONE)
        averaged = step - settings.warmup_steps
        cells.append(f"{limit(averaged):.3g}" if averaged else NONE)
        lines.append(cells)
    header = ["step", *METHODS, "theorem's bound for SWALP"]
    return (
        f"Squared distance to the optimum, mean of {settings.seeds} seeds. The nearest "
        f"representable point is {nearest:.3g} away.\n\n{markdown(header, lines)}"
    )


def verdict(settings: Settings, rows: Sequence[Row]) -> Verdict:
    """Slope, distances at the step of judgement, and the bound."""
    nearest = pick(rows, method="problem")[0]["nearest_representable"]
    low = fmean(_at(rows, "SGD-LP", settings.judged_at))
    averaged = fmean(_at(rows, "SWALP", settings.judged_at))
    (fitted, error), limit = slope(rows), bound(settings, rows)
    below = all(value <= limit(n) for n, value in curve(rows, "SWALP", "averaged"))
    near = error <= 0.15 and abs(fitted + 1) <= max(0.15, 2 * error)
    scatter = f", with a standard error of {error:.2f} over the seeds" if settings.seeds > 1 else ""
    holds = near and averaged < nearest and low >= 100 * averaged and below
    return Verdict(
        holds,
        f"after {settings.judged_at:,} steps SWALP's squared distance to the optimum is "
        f"{averaged:.2g}, {averaged / nearest:.2f} times that of the nearest representable point "
        f"({nearest:.2g}); SGD-LP's is {low:.2g}, {low / averaged:,.0f} times SWALP's. Over the "
        f"last decade SWALP's falls as T^{fitted:.2f}{scatter} (expected: T^-1, within 0.15 or "
        f"two standard errors of at most that), and it "
        f"{'never exceeds' if below else 'exceeds'} the quadratic theorem's bound.",
    )


def plot(settings: Settings, rows: Sequence[Row]) -> Figure:
    """Squared distance against steps, on log scales: means, with all seeds as bands."""
    figure, (axes,) = plots.figure()
    nearest = pick(rows, method="problem")[0]["nearest_representable"]
    limit = bound(settings, rows)
    for method, colour in METHODS.items():
        points = curve(rows, method)
        steps = [step for step, _ in points]
        width = 2.5 if method.startswith("SWA") else 1.2
        axes.plot(
            steps, [value for _, value in points], color=colour, linewidth=width, label=method
        )
        bands = [_at(rows, method, step) for step in steps]
        axes.fill_between(
            steps,
            list(map(min, bands)),
            list(map(max, bands)),
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
    points = [
        (row[0] + settings.warmup_steps, limit(row[0])) for row in curve(rows, "SWALP", "averaged")
    ]
    axes.plot(
        *zip(*points, strict=True),
        color=plots.REFERENCE,
        linestyle="--",
        linewidth=1,
        label="theorem's bound",
    )
    axes.axhline(nearest, color=plots.REFERENCE, linestyle=":", linewidth=1.2)
    axes.annotate(
        "nearest representable point", (0.01, nearest), xycoords=("axes fraction", "data"),
        xytext=(0, 3), textcoords="offset points", color=plots.REFERENCE, fontsize="small",
    )  # fmt: skip
    axes.axvline(settings.warmup_steps, color="0.6", linewidth=0.8, linestyle=":")
    axes.annotate(
        "averaging starts", (settings.warmup_steps, 0.02), xycoords=("data", "axes fraction"),
        xytext=(-4, 0), textcoords="offset points", color=plots.REFERENCE, fontsize="small",
        ha="right",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    highest = max(value for method in METHODS for _, value in curve(rows, method))
    axes.set_ylim(top=10 * highest)
    axes.set_xlabel("steps of one example")
    axes.set_ylabel("squared distance to the optimum")
    facts = pick(rows, method="problem")[0]
    axes.set_title(
        f"Linear regression, {settings.data}, d = {facts['features']}, {settings.format}: "
        f"SWALP falls as T^{slope(rows)[0]:.2f}",
        fontsize="medium",
    )
    axes.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0.0, 0.07))
    return figure


_STATEMENT = (
    "On a quadratic, the average of low-precision iterates converges to the optimum as 1/T, "
    "arbitrarily close and far below the quantization gap, while the iterates themselves stay in a "
    "ball whose size the gap sets (Yang et al. 2019, theorem on quadratics; the form of the bound "
    "was re-derived for this project). Batch of one, constant rate, only the weights rounded "
    "(Algorithm 1), stochastically."
)

SYNTHETIC = Claim(
    name="linear-regression",
    title="Linear regression: the average of low-precision iterates reaches the optimum",
    statement=_STATEMENT,
    full=Settings(
        data="synthetic", features=256, examples=4096, steps=10_000_000, warmup_steps=20_000,
        learning_rate=1e-3, word_length=8, frac_bits=6, seeds=5, judged_at=3_000_000, points=10,
    ),
    quick=Settings(
        data="synthetic", features=256, examples=4096, steps=3_000_000, warmup_steps=20_000,
        learning_rate=1e-3, word_length=8, frac_bits=6, seeds=2, judged_at=3_000_000, points=10,
    ),
    run=run, table=table, plot=plot, verdict=verdict,
)  # fmt: skip

HOUSING = Claim(
    name="linear-regression-housing",
    title="Linear regression on California housing: the same on real data",
    statement=_STATEMENT + " Real data: 20,433 blocks of the 1990 census (Pace & Barry 1997).",
    full=Settings(
        data=housing.NAME, features=9, examples=20433, steps=10_000_000, warmup_steps=50_000,
        learning_rate=3e-3, word_length=8, frac_bits=6, seeds=60, judged_at=3_000_000, points=5,
    ),
    quick=Settings(
        data=housing.NAME, features=9, examples=20433, steps=3_000_000, warmup_steps=50_000,
        learning_rate=3e-3, word_length=8, frac_bits=6, seeds=40, judged_at=3_000_000, points=10,
    ),
    run=run, table=table, plot=plot, verdict=verdict,
)  # fmt: skip
