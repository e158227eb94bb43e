"""Error against word length: where SGD-LP, SWALP, big and small blocks break."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from swalp import recipes
from swalp.lab import network, plots
from swalp.lab.claim import Claim, Context, Row, Verdict, markdown, pick
from swalp.lab.network import Training
from swalp.lab.parallel import in_processes
from swalp.training import data

BLOCKS = ("big", "small")
BROKEN = 1.0  # points of test error above float SGD


@dataclass(frozen=True, slots=True)
class Settings:
    """Of training small networks with every role of Algorithm 2 in W-bit block floating point.

    Attributes:
        networks: data set, kind of network, and its width.
        word_lengths: W to try.
        average: of the iterates, as `swalp.training.averages.parse` reads it.
        epochs, averaging_start, batch_size, learning_rate, averaging_rate, momentum, weight_decay:
            of the training.
        seeds: of initial weights, order of the data and noise.
    """

    networks: tuple[tuple[str, str, int], ...]
    word_lengths: tuple[int, ...]
    average: str
    epochs: int
    averaging_start: int
    batch_size: int
    learning_rate: float
    averaging_rate: float
    momentum: float
    weight_decay: float
    seeds: int

    def training(self, model: str, width: int) -> Training:
        """Of one of the networks."""
        return Training(
            model, width, self.batch_size, self.epochs, self.averaging_start, self.learning_rate,
            self.averaging_rate, self.momentum, self.weight_decay,
        )  # fmt: skip


def run(settings: Settings, context: Context) -> list[Row]:
    """Every network in float and in each word length and block, from every seed."""
    for name, _, _ in settings.networks:
        data.load(name, context.data_dir, download=context.download)
    cases: list[tuple[int | None, str | None]] = [(None, None)]
    cases += [(bits, block) for bits in settings.word_lengths for block in BLOCKS]
    jobs = [
        partial(_train, settings, each, seed, bits, block, context.data_dir)
        for each in settings.networks
        for seed in range(settings.seeds)
        for bits, block in cases
    ]
    return in_processes(context, jobs)


def _train(
    settings: Settings,
    each: tuple[str, str, int],
    seed: int,
    bits: int | None,
    block: str | None,
    data_dir: Path | None,
    check: Callable[[], None],
) -> list[Row]:
    name, model, width = each
    recipe = None if bits is None else recipes.get(f"paper-{block}-block-{bits}")
    training = settings.training(model, width)
    images = network.load(name, data_dir)
    known = {"seed": seed, "data": name, "word_length": bits, "block": block}
    return [
        known | {"model": "SGD" if row["average"] is None else "average", **row}
        for row in network.train(training, images, recipe, seed, [settings.average], check)
    ]


def mean(rows: Sequence[Row], **wanted: object) -> float:
    """Test error over the seeds."""
    return fmean(row["test_error"] for row in pick(rows, **wanted))


def shortest(
    settings: Settings, rows: Sequence[Row], name: str, block: str, model: str
) -> int | None:
    """The shortest word from which on no error is `BROKEN` points above float SGD's."""
    limit = mean(rows, data=name, word_length=None, model="SGD") + BROKEN
    found = None
    for bits in sorted(settings.word_lengths, reverse=True):
        error = mean(rows, data=name, word_length=bits, block=block, model=model)
        if not error <= limit:  # a NaN neither
            break
        found = bits
    return found


def table(settings: Settings, rows: Sequence[Row]) -> str:
    """Test errors against word length, for each data set."""
    parts = []
    for name, model, width in settings.networks:
        header = ["word length", "SGD-LP, big block", "SWALP, big block"]
        header += ["SGD-LP, small block", "SWALP, small block"]
        lines = [
            [str(bits)]
            + [
                f"{mean(rows, data=name, word_length=bits, block=block, model=kind):.2f}"
                for block in BLOCKS
                for kind in ("SGD", "average")
            ]
            for bits in settings.word_lengths
        ]
        sgd, swa = (mean(rows, data=name, word_length=None, model=m) for m in ("SGD", "average"))
        parts.append(
            f"Test error %, {name}, {model} of width {width}: float SGD {sgd:.2f}, SWA {swa:.2f}; "
            f"mean of {settings.seeds} seeds; SGD and SGD-LP after {settings.averaging_start} "
            f"epochs, averages of the {settings.epochs - settings.averaging_start} that "
            f"follow.\n\n{markdown(header, lines)}"
        )
    return "\n\n".join(parts)


def verdict(settings: Settings, rows: Sequence[Row]) -> Verdict:
    """SWALP lasts longer than SGD-LP somewhere and nowhere less; so small blocks; 8 bits do."""
    told, holds = [], True
    shorter = {"averaging": False, "small blocks": False}
    for name, _, _ in settings.networks:
        ends = {
            (block, model): shortest(settings, rows, name, block, model)
            for block in BLOCKS
            for model in ("SGD", "average")
        }
        text = {key: "none" if bits is None else str(bits) for key, bits in ends.items()}
        told.append(
            f"on {name} the shortest word within {BROKEN:g} point of float SGD is, with big "
            f"blocks, {text['big', 'SGD']} for SGD-LP and {text['big', 'average']} for SWALP; with "
            f"small blocks {text['small', 'SGD']} and {text['small', 'average']}"
        )
        length = {key: 99 if bits is None else bits for key, bits in ends.items()}
        pairs = {
            "averaging": [(length[block, "average"], length[block, "SGD"]) for block in BLOCKS],
            "small blocks": [(length["small", m], length["big", m]) for m in ("SGD", "average")],
        }
        for what, compared in pairs.items():
            holds &= all(with_it <= without for with_it, without in compared)
            shorter[what] |= any(with_it < without for with_it, without in compared)
        holds &= length["small", "average"] <= 8
    return Verdict(
        holds and all(shorter.values()),
        f"{'; '.join(told)}. (Expected: averaging, and so small blocks, somewhere make do with a "
        f"shorter word and nowhere need a longer one, and 8 bits are enough for SWALP with small "
        f"blocks.)",
    )


def plot(settings: Settings, rows: Sequence[Row]) -> Figure:
    """Test error against word length, one picture for each data set."""
    figure, axes = plots.figure(len(settings.networks))
    bits = settings.word_lengths
    for each, (name, model, width) in zip(axes, settings.networks, strict=True):
        for block, style in zip(BLOCKS, ("--", "-"), strict=True):
            for kind, label, colour in (
                ("SGD", "SGD-LP", plots.LOW),
                ("average", "SWALP", plots.AVERAGED),
            ):
                wanted = {"data": name, "block": block, "model": kind}
                values = [
                    [row["test_error"] for row in pick(rows, word_length=b, **wanted)] for b in bits
                ]
                each.plot(
                    bits, list(map(fmean, values)), color=colour, linestyle=style, marker="o",
                    markersize=4, label=f"{label}, {block} block",
                )  # fmt: skip
                each.fill_between(
                    bits, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.12,
                    linewidth=0,
                )  # fmt: skip
        for kind, label, colour in (
            ("SGD", "SGD", plots.FLOAT),
            ("average", "SWA", plots.FLOAT_AVERAGED),
        ):
            value = mean(rows, data=name, word_length=None, model=kind)
            each.axhline(
                value, color=colour, linewidth=1.2, linestyle=":", label=f"{label}, float32"
            )
        each.set_yscale("log")
        each.yaxis.set_major_formatter("{x:g}")
        each.yaxis.set_minor_formatter("{x:g}")
        each.tick_params(axis="y", which="both", labelsize="small")
        each.set_xticks(bits)
        each.set_xlabel("word length of every role, bits")
        each.set_ylabel("test error, %")
        each.set_title(f"{name}, {model} of width {width}", fontsize="medium")
    axes[0].legend(frameon=False, fontsize="small")
    return figure


CLAIM = Claim(
    name="word-length",
    title="Error against word length: where each method breaks",
    statement=(
        "With every number of training in W-bit block floating point, averaging lets words be "
        "shorter, and so does one exponent for each slice (small block) instead of one for each "
        "tensor (big block). Algorithm 2 of Yang et al. 2019, whose own figures are for 8 bits and "
        "larger networks; the networks, the word lengths and the errors here are this project's."
    ),
    full=Settings(
        networks=(("mnist", "mlp", 64), ("fashion-mnist", "strided-cnn", 8)),
        word_lengths=(2, 3, 4, 5, 6, 7, 8, 12, 16), average="every=10", epochs=6, averaging_start=4,
        batch_size=128, learning_rate=0.1, averaging_rate=0.02, momentum=0.9, weight_decay=5e-4,
        seeds=2,
    ),
    quick=Settings(
        networks=(("mnist", "mlp", 32),), word_lengths=(3, 4, 6, 8, 16), average="every=10",
        epochs=3, averaging_start=2, batch_size=128, learning_rate=0.1, averaging_rate=0.02,
        momentum=0.9, weight_decay=5e-4, seeds=2,
    ),
    run=run, table=table, plot=plot, verdict=verdict,
)  # fmt: skip
