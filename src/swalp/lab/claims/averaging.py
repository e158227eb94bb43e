"""How often iterates must be averaged, and in how many bits the average may be kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from swalp.lab import network, plots
from swalp.lab.claim import Claim, Context, Row, Verdict, markdown, pick
from swalp.lab.parallel import in_processes
from swalp.training import ablations, data
from swalp.training.config import RunConfig

ITERATE = "iterate"
SLACK = 0.15  # points of test error that count as no difference


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one training run from each seed, whose averages are compared.

    Attributes:
        what: "frequency" or "precision" of the average.
        data, model, width, arms, epochs, averaging_start, learning_rate, averaging_rate: as of
            `RunConfig`.
        examples: training images, the first ones.
        seeds: of initial weights, order of the data and noise.
    """

    what: Literal["frequency", "precision"]
    data: str
    model: str
    width: int
    arms: tuple[str, ...]
    examples: int
    epochs: int
    averaging_start: int
    learning_rate: float
    averaging_rate: float
    seeds: int

    def config(self, arm: str, seed: int) -> RunConfig:
        """Of the run of one arm from one seed."""
        known, _ = ablations.SETTINGS["mnist"]
        changes = {
            "data": self.data, "model": self.model, "width": self.width, "arms": (arm,),
            "seeds": 1, "first_seed": seed, "epochs": self.epochs,
            "averaging_start": self.averaging_start, "learning_rate": self.learning_rate,
            "averaging_rate": self.averaging_rate,
        }  # fmt: skip
        return RunConfig(**(known.model_dump() | changes))


def run(settings: Settings, context: Context) -> list[Row]:
    """Every arm from every seed."""
    data.load(settings.data, context.data_dir, download=context.download)
    jobs = [
        partial(_train, settings, arm, seed, context.data_dir)
        for arm in settings.arms
        for seed in range(settings.seeds)
    ]
    return in_processes(context, jobs)


def _train(
    settings: Settings, arm: str, seed: int, data_dir: Path | None, check: Callable[[], None]
) -> list[Row]:
    rows = ablations.averaging(
        settings.config(arm, seed),
        network.load(settings.data, data_dir),
        questions=(settings.what,),
        examples=settings.examples,
        watch=lambda done, steps: check(),
    )
    return ablations.answers(rows, settings.what, settings.epochs)


def averages(rows: Sequence[Row]) -> list[str]:
    """Their texts, the iterate first."""
    return list(dict.fromkeys(row["average"] for row in rows))


def mean(rows: Sequence[Row], **wanted: object) -> float:
    """Test error over the seeds."""
    return fmean(row["test_error"] for row in pick(rows, **wanted))


def label(average: str) -> str:
    """What an average is called in tables."""
    if average == ITERATE:
        return "last iterate"
    key, _, value = average.partition("=")
    if key == "precision":
        bits = re.match(r"bfp(\d+)", value)
        return f"{bits[1]} bits" if bits else value
    spelled = {"1": "every step", "epoch": "every epoch", "2epochs": "every second epoch"}
    return spelled.get(value, f"every {value} steps")


def table(settings: Settings, rows: Sequence[Row]) -> str:
    """Test errors after the first epoch of averaging (frequency alone) and at the end."""
    epochs = [settings.epochs]
    if settings.what == "frequency":
        epochs = [settings.averaging_start + 1, settings.epochs]
    header = ["average"]
    header += [f"{arm}, epoch {epoch}" for arm in settings.arms for epoch in epochs]
    lines = []
    for average in averages(rows):
        cells = []
        for arm in settings.arms:
            for epoch in epochs:
                found = pick(rows, arm=arm, epoch=epoch, average=average)
                values = [row["test_error"] for row in found]
                spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
                cells.append(f"{fmean(values):.2f}{spread}" if values else "–")
        lines.append([label(average), *cells])
    return (
        f"Test error %, {settings.data}, {settings.model} of width {settings.width}, "
        f"{settings.examples:,} training images; mean ± standard deviation of {settings.seeds} "
        f"seeds. Averaging starts after epoch {settings.averaging_start}.\n\n"
        f"{markdown(header, lines)}"
    )


def frequency_verdict(settings: Settings, rows: Sequence[Row]) -> Verdict:
    """Sooner good with more iterates; in the end, no worse for taking one an epoch."""
    told, holds = [], True
    first, last = settings.averaging_start + 1, settings.epochs
    for arm in settings.arms:
        early = [mean(rows, arm=arm, epoch=first, average=f"every={c}") for c in (1, "epoch")]
        late = [mean(rows, arm=arm, epoch=last, average=f"every={c}") for c in (1, "epoch")]
        iterate = mean(rows, arm=arm, epoch=last, average=ITERATE)
        told.append(
            f"with {arm} the average of all iterates is at {early[0]:.2f} % after one epoch of "
            f"averaging, where one iterate is at {early[1]:.2f} %; at the end, all of them "
            f"{late[0]:.2f} %, one an epoch {late[1]:.2f} %, the last iterate {iterate:.2f} %"
        )
        holds &= early[0] <= early[1] + SLACK and late[0] <= late[1] + SLACK
        holds &= max(late) <= iterate + SLACK
    return Verdict(
        holds,
        f"{'; '.join(told)}. (Expected: taking more iterates is never worse, and even one an "
        f"epoch is no worse than the iterate, within {SLACK} points.)",
    )


def shortest(settings: Settings, rows: Sequence[Row], arm: str) -> int | None:
    """Bits from which on the average's error is within `SLACK` of the float32 average's."""
    wanted = {"arm": arm, "epoch": settings.epochs}
    limit = mean(rows, average="precision=float32", **wanted) + SLACK
    found = None
    for bits in sorted(ablations.PRECISIONS, reverse=True):
        error = mean(rows, average=f"precision=bfp{bits}[0]", **wanted)
        if not error <= limit:  # a NaN neither
            break
        found = bits
    return found


def precision_verdict(settings: Settings, rows: Sequence[Row]) -> Verdict:
    """How few bits of the average are as good as float32."""
    told, holds = [], True
    for arm in settings.arms:
        bits = shortest(settings, rows, arm)
        exact = mean(rows, arm=arm, epoch=settings.epochs, average="precision=float32")
        iterate = mean(rows, arm=arm, epoch=settings.epochs, average=ITERATE)
        enough = "no tried word" if bits is None else f"{bits} bits"
        told.append(
            f"with {arm} the float32 average's error is {exact:.2f} % (the last iterate's "
            f"{iterate:.2f} %), and {enough} or more of the average are within {SLACK} points of it"
        )
        holds &= bits is not None and bits <= 12
    return Verdict(
        holds,
        f"{'; '.join(told)}. (Expected: 12 bits are enough, as the average is all that is kept.)",
    )


def plot(settings: Settings, rows: Sequence[Row]) -> Figure:
    """Test error against the epoch for each frequency, or against the bits of the average."""
    figure, axes = plots.figure(len(settings.arms))
    for each, arm in zip(axes, settings.arms, strict=True):
        own = pick(rows, arm=arm)
        if settings.what == "frequency":
            names = [name for name in averages(rows) if name != ITERATE]
            colours = colormaps["viridis"].resampled(len(names) + 1)
            for number, name in enumerate(names):
                found = pick(own, average=name)
                epochs = sorted({row["epoch"] for row in found})
                values = [mean(found, epoch=epoch) for epoch in epochs]
                each.plot(
                    epochs, values, color=colours(number), marker=".", linewidth=1.8,
                    label=label(name),
                )  # fmt: skip
            epochs = sorted({row["epoch"] for row in own})
            values = [mean(own, average=ITERATE, epoch=epoch) for epoch in epochs]
            each.plot(epochs, values, color=plots.LOW, linewidth=1, label="iterate (SGD-LP)")
            each.xaxis.set_major_locator(MaxNLocator(integer=True))
            each.set_xlabel("epoch")
        else:
            last = pick(own, epoch=settings.epochs)
            bits = ablations.PRECISIONS
            values = [mean(last, average=f"precision=bfp{b}[0]") for b in bits]
            each.plot(bits, values, color=plots.AVERAGED, marker="o", markersize=4, label="SWALP")
            for name, text, colour in (
                (ITERATE, "last iterate (SGD-LP)", plots.LOW),
                ("precision=float32", "average in float32", plots.FLOAT_AVERAGED),
            ):
                each.axhline(
                    mean(last, average=name), color=colour, linestyle="--", linewidth=1.2,
                    label=text,
                )  # fmt: skip
            each.set_yscale("log")
            each.yaxis.set_major_formatter("{x:g}")
            each.yaxis.set_minor_formatter("{x:g}")
            each.tick_params(axis="y", which="both", labelsize="small")
            each.set_xticks(bits)
            each.set_xlabel("bits of the average")
        each.set_ylabel("test error, %")
        each.set_title(arm, fontsize="medium")
        each.legend(frameon=False, fontsize="small")
    return figure


_FULL = {
    "data": "mnist", "model": "strided-cnn", "width": 8,
    "arms": ("paper-small-block-8", "paper-small-block-4"), "examples": 20_000, "epochs": 9,
    "averaging_start": 5, "learning_rate": 0.05, "averaging_rate": 0.02, "seeds": 3,
}  # fmt: skip
_QUICK = _FULL | {
    "arms": ("paper-small-block-4",), "examples": 5_000, "epochs": 6, "averaging_start": 3,
    "seeds": 2,
}  # fmt: skip

FREQUENCY = Claim(
    name="averaging-frequency",
    title="How often to average: every step is soon good, once an epoch is enough",
    statement=(
        "Algorithm 2 averages every c steps, and leaves c open; the published runs take one "
        "iterate an epoch. One training run from each seed keeps averages of several frequencies, "
        "so that nothing but the frequency differs. All figures are this project's."
    ),
    full=Settings(what="frequency", **_FULL),  # type: ignore[arg-type]  # as listed above
    quick=Settings(what="frequency", **_QUICK),  # type: ignore[arg-type]
    run=run,
    table=table,
    plot=plot,
    verdict=frequency_verdict,
)

PRECISION = Claim(
    name="averaging-precision",
    title="How precise an average: a few more bits than the iterates",
    statement=(
        "The average is kept in high precision in Algorithm 2; here it is also kept in block "
        "floating point of few bits, each update rounded stochastically (Q_SWA). One training run "
        "from each seed keeps averages of all precisions. All figures are this project's."
    ),
    full=Settings(what="precision", **_FULL),  # type: ignore[arg-type]
    quick=Settings(what="precision", **_QUICK),  # type: ignore[arg-type]
    run=run,
    table=table,
    plot=plot,
    verdict=precision_verdict,
)
