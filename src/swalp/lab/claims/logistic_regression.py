"""Logistic regression: averaging saves bits on a strongly convex problem with real data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch
from matplotlib.figure import Figure
from torch import Tensor

from swalp.formats import FixedPoint
from swalp.lab import engine, plots
from swalp.lab.claim import Claim, Context, Row, Verdict, figures, markdown, pick
from swalp.lab.engine import Method
from swalp.lab.parallel import in_threads
from swalp.lab.problems import Softmax
from swalp.noise import stream_seed
from swalp.rounding import Nearest, Stochastic
from swalp.training import data
from swalp.training.data import Images, epoch_order, evaluation_batches

JUDGED_AT = 6  # fractional bits
WORSE = 0.7  # points of training error that SGD-LP there is above float SGD


@dataclass(frozen=True, slots=True)
class Settings:
    """Of softmax regression on MNIST, pixels in [0, 1].

    Attributes:
        frac_bits: fractional bits F to try; the word has two more, so that weights lie in [-2, 2).
        epochs: passes over the training images.
        averaging_start: epochs before averaging starts; then every iterate is taken.
        batch_size: examples in a step.
        learning_rate: constant.
        l2: the penalty that makes the problem strongly convex.
        seeds: of the order of the images and of the rounding.
    """

    frac_bits: tuple[int, ...]
    epochs: int
    averaging_start: int
    batch_size: int
    learning_rate: float
    l2: float
    seeds: int


def problem_of(images: Images, classes: int, l2: float) -> Softmax:
    """Softmax regression on pixels in [0, 1], whatever the images' shift and scale, and a bias."""
    x = torch.cat([batch for batch, _ in evaluation_batches(images)]).flatten(1)
    x = ((x - x.min()) / (x.max() - x.min()) * 255).round() / 255
    return Softmax(torch.cat([x, torch.ones(len(x), 1)], dim=1), images.labels, classes, l2)


def load(data_dir: Path | None, download: bool, l2: float) -> tuple[Softmax, Softmax]:
    """The training and the test problem."""
    found = data.load("mnist", data_dir, download=download)
    return (
        problem_of(found.train, found.classes, l2),
        problem_of(found.test, found.classes, l2),
    )


def run(settings: Settings, context: Context) -> list[Row]:
    """Float and each fixed point, from every seed."""
    problem, test = load(context.data_dir, context.download, settings.l2)
    jobs = [
        partial(_trajectory, settings, problem, test, seed, frac_bits)
        for seed in range(settings.seeds)
        for frac_bits in (None, *settings.frac_bits)
    ]
    return in_threads(context, jobs)


def _trajectory(
    settings: Settings,
    problem: Softmax,
    test: Softmax,
    seed: int,
    frac_bits: int | None,
    check: Callable[[], None],
) -> list[Row]:
    per_epoch = len(problem.y) // settings.batch_size
    method = Method(
        settings.learning_rate,
        None if frac_bits is None else FixedPoint(frac_bits + 2, frac_bits),
        Nearest() if frac_bits is None else Stochastic(stream_seed(seed, "weight", "softmax")),
        settings.averaging_start * per_epoch,
    )
    state = engine.begin(torch.zeros(problem.shape))
    for epoch in range(settings.epochs):
        order = epoch_order(len(problem.y), seed, epoch)[: per_epoch * settings.batch_size]
        for rows in torch.split(order.reshape(per_epoch, settings.batch_size), 200):
            check()
            engine.descend(problem, method, state, rows, len(rows))
    average = state.average(method)
    names = ("SGD", "SWA") if frac_bits is None else ("SGD-LP", "SWALP")
    return [
        {"seed": seed, "method": name, "frac_bits": frac_bits, **measured(problem, test, w)}
        for name, w in zip(names, (state.weight.double(), average), strict=True)
    ]


def measured(problem: Softmax, test: Softmax, w: Tensor) -> dict[str, float]:
    """Errors in %, the objective and the norm of its gradient over all training examples."""
    gradient = problem.l2 * w
    objective = float(problem.l2 / 2 * w.square().sum())
    wrong = 0
    count = len(problem.y)
    for rows in torch.split(torch.arange(count), 2_000):
        x, y = problem.x[rows].double(), problem.y[rows]
        logs = torch.log_softmax(x @ w, 1)
        wrong += int((logs.argmax(1) != y).sum())
        objective -= float(logs[torch.arange(len(y)), y].sum()) / count
        residual = logs.exp()
        residual[torch.arange(len(y)), y] -= 1
        gradient = gradient + x.T @ residual / count
    test_wrong = int(((test.x.double() @ w).argmax(1) != test.y).sum())
    return {
        "train_error": 100 * wrong / count,
        "test_error": 100 * test_wrong / len(test.y),
        "objective": figures(objective),
        "gradient_norm": figures(float(gradient.norm())),
    }


def mean(rows: Sequence[Row], method: str, frac_bits: int | None, key: str) -> float:
    """Over the seeds."""
    return fmean(row[key] for row in pick(rows, method=method, frac_bits=frac_bits))


def bits_saved(settings: Settings, rows: Sequence[Row], frac_bits: int) -> tuple[float, bool]:
    """How many more bits SGD-LP needs for the training error of SWALP with `frac_bits`.

    Returns:
        The bits, between two of the settings' by linear interpolation; and whether SGD-LP gets
        there at all. If not, it needs more bits than that.
    """
    target = mean(rows, "SWALP", frac_bits, "train_error")
    before = None
    for bits in sorted(settings.frac_bits):
        value = mean(rows, "SGD-LP", bits, "train_error")
        if value <= target:
            if before is None:
                return bits - frac_bits, True
            last, above = before
            share = (above - target) / (above - value)
            return last + share * (bits - last) - frac_bits, True
        before = bits, value
    return max(settings.frac_bits) - frac_bits, False


def table(settings: Settings, rows: Sequence[Row]) -> str:
    """Errors and gradient norms, mean ± standard deviation over the seeds."""
    lines = []
    for frac_bits in (None, *settings.frac_bits):
        names = ("SGD", "SWA") if frac_bits is None else ("SGD-LP", "SWALP")
        label = "float" if frac_bits is None else f"{frac_bits} (W = {frac_bits + 2})"
        cells = [label]
        for key in ("train_error", "test_error"):
            for name in names:
                values = [row[key] for row in pick(rows, method=name, frac_bits=frac_bits)]
                spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
                cells.append(f"{fmean(values):.2f}{spread}")
        cells += [f"{mean(rows, name, frac_bits, 'gradient_norm'):.2g}" for name in names]
        saved = ""
        if frac_bits is not None:
            bits, reached = bits_saved(settings, rows, frac_bits)
            saved = f"{bits:.1f}" if reached else f"> {bits:.0f}"
        lines.append([*cells, saved])
    header = ["F", "train error %, SGD(-LP)", "SWA(LP)", "test error %, SGD(-LP)", "SWA(LP)"]
    header += ["gradient norm, SGD(-LP)", "SWA(LP)", "bits saved"]
    return (
        f"Mean ± standard deviation of {settings.seeds} seeds. Bits saved: how many more "
        f"fractional bits SGD-LP needs for SWALP's training error.\n\n{markdown(header, lines)}"
    )


def verdict(settings: Settings, rows: Sequence[Row]) -> Verdict:
    """At F = 6, against float SGD."""
    sgd = mean(rows, "SGD", None, "train_error")
    low = mean(rows, "SGD-LP", JUDGED_AT, "train_error")
    averaged = mean(rows, "SWALP", JUDGED_AT, "train_error")
    saved = [(bits, *bits_saved(settings, rows, bits)) for bits in settings.frac_bits]
    told = "; ".join(
        f"with {bits} it does as well as SGD-LP with {bits + more:.1f}"
        if reached
        else f"with {bits} better than SGD-LP with {bits + more:.0f}"
        for bits, more, reached in saved
        if bits <= JUDGED_AT
    )
    return Verdict(
        averaged <= sgd and low >= sgd + WORSE and settings.seeds >= 3,
        f"with {JUDGED_AT} fractional bits SWALP's training error is {averaged:.2f} %, float SGD's "
        f"{sgd:.2f} % (expected: SWALP not above it), and SGD-LP's {low:.2f} %, {low - sgd:+.2f} "
        f"points from float SGD (expected: {WORSE} or more), in {settings.seeds} seeds "
        f"(expected: 3 or more). "
        f"Averaging saves bits: {told}.",
    )


def plot(settings: Settings, rows: Sequence[Row]) -> Figure:
    """Training error, test error and gradient norm against F."""
    figure, axes = plots.figure(3)
    titles = {
        "train_error": "training error, %",
        "test_error": "test error, %",
        "gradient_norm": "norm of the gradient over all training images",
    }
    bits = settings.frac_bits
    for each, (key, title) in zip(axes, titles.items(), strict=True):
        for name, colour in (("SGD-LP", plots.LOW), ("SWALP", plots.AVERAGED)):
            values = [[row[key] for row in pick(rows, method=name, frac_bits=f)] for f in bits]
            each.plot(
                bits, list(map(fmean, values)), color=colour, marker="o", markersize=4, label=name
            )
            each.fill_between(
                bits, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.2,
                linewidth=0,
            )  # fmt: skip
        for name, colour in (("SGD", plots.FLOAT), ("SWA", plots.FLOAT_AVERAGED)):
            each.axhline(
                mean(rows, name, None, key), color=colour, linestyle="--", linewidth=1.2,
                label=f"{name}, float32",
            )  # fmt: skip
        if key == "gradient_norm":
            each.set_yscale("log")
        each.set_xticks(bits)
        each.set_xlabel("fractional bits F (word length F + 2)")
        each.set_title(title, fontsize="medium")
    axes[0].legend(frameon=False, fontsize="small")
    figure.suptitle(
        f"Softmax regression on MNIST, weights in fixed point: mean and range of "
        f"{settings.seeds} seeds",
        fontsize="medium",
    )
    return figure


CLAIM = Claim(
    name="logistic-regression",
    title="Logistic regression on MNIST: averaging saves bits",
    statement=(
        "On a strongly convex problem SWALP's noise floor is of the order of the squared gap, "
        "where SGD-LP's is of the order of the gap (Yang et al. 2019, theorem on strongly convex "
        "functions), so that averaging saves bits. Softmax regression on MNIST; only the weights "
        "are rounded (Algorithm 1), stochastically."
    ),
    full=Settings(
        frac_bits=(2, 4, 6, 8, 10, 12, 14), epochs=20, averaging_start=5, batch_size=64,
        learning_rate=0.5, l2=1e-4, seeds=5,
    ),
    quick=Settings(
        frac_bits=(2, 4, 6, 8), epochs=20, averaging_start=5, batch_size=64,
        learning_rate=0.5, l2=1e-4, seeds=3,
    ),
    run=run, table=table, plot=plot, verdict=verdict,
)  # fmt: skip
