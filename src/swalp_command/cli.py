"""The command line: words become a `RunConfig` and calls, nothing else.

`swalp` is imported by the commands, once it is clear that one is to run: with PyTorch it takes
seconds, and help, and what is wrong with an option, need none of it.
"""

from __future__ import annotations

import os
import signal
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from swalp_command import asked_to_end, interrupted, own_style, raise_interrupts

_MISTAKE = 2
_DIFFERENT = 1
_UNREAD = 128 + signal.SIGPIPE


class _Command(TyperCommand):
    """With swalp there, there is something to lose: an interrupt is an exception from then on."""

    def invoke(self, ctx: Any) -> Any:  # the class differs from version to version
        import swalp  # noqa: F401  (it takes seconds, and no exceptions meanwhile)

        raise_interrupts()
        return super().invoke(ctx)


class _Commands(TyperGroup):
    """Typer's own make an interrupt a status without a word."""

    def invoke(self, ctx: Any) -> Any:  # the class differs from version to version
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            return interrupted(stop)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train networks in 8 bits or fewer, and average the iterates (SWALP).",
)

DataDir = Annotated[
    Path | None,
    typer.Option(help="Where the data files are; default: a cache directory, see `swalp doctor`."),
]
Download = Annotated[
    bool, typer.Option("--download", help="Fetch missing data files from their public mirror.")
]
TensorBoard = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Also write the scalars for TensorBoard, in DIR/RUN."),
]


def main() -> int:
    """Run the command line.

    The exit status is 0; 1 if a claim does not hold, or an evaluated model differs from its record;
    2 on a mistake; 130 when interrupted, 143 when terminated, 129 when its terminal was closed, and
    141 when nobody reads the output.
    """
    for stream in (sys.stdout, sys.stderr):
        # Where "±" has no code, a "?" stands for it, in place of an error.
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files, whatever a notebook asks for
    status = run(sys.argv[1:])
    _end_output()
    return status


def _end_output() -> None:
    """Drop what cannot be written: Python tries again at its end, and ends in its own way then."""
    if sys.stdout is None:  # closed, such as by >&-
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _full_output() -> str:
    """The place of an error that names none: the output, if what is in its buffer finds no room."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        return "standard output: "
    return ""


def run(words: list[str]) -> int:
    """The exit status of ``swalp`` with those words."""
    try:
        status = app(words or ["--help"], prog_name="swalp", standalone_mode=False) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except (SystemExit, BrokenPipeError):  # Typer makes the first of the second
        return _UNREAD
    except OSError as error:
        where = f"{error.filename}: " if error.filename else _full_output()
        return _fail(f"{where}{error.strerror or error}")
    except (KeyboardInterrupt, typer.Abort) as stop:
        return interrupted(stop)
    except Exception as error:
        # Typer's usage errors; the module of their class differs from version to version.
        if hasattr(error, "format_message"):
            message = _value_mistake(error, words) or " ".join(error.format_message().split())
            return _fail(f"{message} (see swalp --help)")
        if str(error).startswith("SWALP_"):  # a variable that keeps swalp from being imported
            return _fail(str(error))
        from swalp.training.mistakes import UserError

        if isinstance(error, UserError):
            return _fail(str(error))
        raise


def _value_mistake(error: Exception, words: list[str]) -> str:
    """What is wrong with an option's value, and the value; empty if `error` is another one."""
    names = getattr(getattr(error, "param", None), "opts", ())
    given = ""
    for word, after in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name in names:
            given = f"{name} {value if equals else after}"
    message = getattr(error, "message", "").removeprefix("Input ")
    return f"{given}: {message}" if given and message else ""


def _version(value: bool) -> None:
    if value:
        print(f"swalp {metadata.version('swalp')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command(cls=_Command)
def train(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[PRESET|CONFIG.toml]",
            help="digits (default), mnist, cifar10-small, cifar10-vgg16 and others, or a file.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated."),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's directory, new or empty; default: runs/SOURCE-TIME."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a run that was stopped.")
    ] = None,
    tensorboard: TensorBoard = None,
) -> int:
    """Train in float and in low precision side by side, and compare SGD with its average."""
    from swalp.training.mistakes import UserError
    from swalp_command import runs

    if resume is None:
        return runs.begin(
            "digits" if source is None else source, set_ or [], data_dir, download, out, tensorboard
        )
    if source is not None or set_ or out is not None:
        raise UserError(
            f"--resume {resume} takes the settings of that run: leave out the preset or file, "
            f"--set and --out"
        )
    return runs.go_on(resume, data_dir, download, tensorboard)


@app.command(cls=_Command)
def resume(
    run: Annotated[Path, typer.Argument(help="The directory of a run that was stopped.")],
    data_dir: DataDir = None,
    download: Download = False,
    tensorboard: TensorBoard = None,
) -> int:
    """Go on with a run that was stopped or killed: it ends as if it had never been."""
    from swalp_command import runs

    return runs.go_on(run, data_dir, download, tensorboard)


@app.command(cls=_Command)
def evaluate(
    run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
    data_dir: DataDir = None,
    download: Download = False,
) -> int:
    """Compute every error of a run's table again, from its saved models."""
    from swalp.report import tables
    from swalp.training import data, run_directory, study

    directory = run_directory.open_run(run)
    examples = data.load(directory.config().data, data_dir, download=download)
    summary = study.evaluate(directory, examples)
    print(tables.render(summary))
    changed = tables.differing(directory.summary(), summary)
    for line in changed:
        print(f"swalp: differs from {run}: {line}", file=sys.stderr)
    if not changed:
        print(f"\nEvery error equals the one in {run}.")
    return _DIFFERENT if changed else 0


@app.command(cls=_Command)
def report(
    records: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN…|CLAIM…", help="Directories of runs, or names or directories of claims."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The file; default: report-NAME.html here, report.html for several."),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Make one HTML page of runs or claims: verdicts, tables, curves, weights, errors, settings."""
    from swalp.report import page
    from swalp.training.mistakes import UserError

    written = page.write(records or [], out)
    print(f"written: {written}")
    if open_ and not webbrowser.open(written.resolve().as_uri()):
        raise UserError(f"no browser was found; open {written} yourself")


@app.command(cls=_Command)
def reproduce(
    claim: Annotated[
        str | None, typer.Argument(metavar="[CLAIM]", help="One of those that --list shows.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the claims.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller: a minute or two on two cores.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(help="How many seeds to run; default: the claim's own.")
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    out: Annotated[
        Path | None,
        typer.Option(help="The record's directory; default: reproduced/CLAIM, or CLAIM-quick."),
    ] = None,
) -> int:
    """Run one of the paper's claims: a table, a plot and a verdict, kept as a record."""
    from swalp.lab import reproduce as lab
    from swalp.report.progress import parts

    if list_ and claim is not None:
        raise typer.BadParameter(f"--list shows all claims; leave {claim!r} away, or --list")
    if list_ or claim is None:
        print(lab.listing())
        return 0
    own_style()
    found = lab.find(claim)
    settings = lab.settings_of(found, quick=quick, seeds=seeds)
    name = f"{claim}-quick" if quick else claim
    words = ["swalp", "reproduce", claim, *(["--quick"] if quick else [])]
    words += [] if seeds is None else ["--seeds", str(seeds)]
    words += [] if data_dir is None else ["--data-dir", "DIR"]  # a path means nothing elsewhere
    with asked_to_end() as asked, parts(claim) as progress:
        try:
            verdict = lab.reproduce(
                found,
                settings,
                out or Path("reproduced") / name,
                data_dir=data_dir,
                download=download,
                command=words,
                progress=progress,
                stopped=lambda: bool(asked),
                say=print,
            )
        except lab.Stopped:
            print("swalp: stopped; nothing was written", file=sys.stderr)
            return 128 + asked[0]
    return 0 if verdict.holds else _DIFFERENT


@app.command("profile", cls=_Command)
def profile_command(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[PRESET|CONFIG.toml]", help="digits (default), or as for train."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps; the table has medians.")] = 5,
    layers: Annotated[
        int, typer.Option(min=1, help="Rows of a table: the slowest layers, the rest in one.")
    ] = 20,
) -> None:
    """Show where the time and the memory of a training step go, layer by layer, in each arm.

    Images are random, of the shape that the data has; no file is needed.
    """
    from swalp.report import costs
    from swalp.training import config, profile

    settings = config.load("digits" if source is None else source, set_ or [])
    about = (
        f"{settings.model} of width {settings.width} on {settings.data}, batch "
        f"{settings.batch_size}, {settings.threads} threads; medians of {steps} steps.\n"
        f"Share: of the time of all layers. Quantizing: the part of a layer's time that goes into "
        f"rounding.\nSaved: kept for the backward pass. Float layers hold 4 bytes a parameter."
    )
    print(costs.render(profile.profile(settings, steps=steps), layers=layers, about=about))


@app.command(cls=_Command)
def export(
    run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="Of the weights, such as bfp8 or bfp8[0] (see `swalp formats`), in a safetensors "
            "file; or onnx.",
        ),
    ] = "bfp8[0]",
    arm: Annotated[
        str | None, typer.Option(help="Whose average; default: the first in low precision.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of which seed; default: the first.")] = None,
    average: Annotated[
        str, typer.Option(help='Which average: "best", or one of the further ones by its text.')
    ] = "average",
    activations: Annotated[
        bool, typer.Option("--activations", help="ONNX: quantize activations as well.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="The file; default: beside the saved average.")
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
) -> None:
    """Write a run's average quantized to nearest, to be shipped, and measure its error."""
    from swalp.report import tables
    from swalp.training import data, run_directory, shipping

    directory = run_directory.open_run(run)
    directory.summary()
    examples = data.load(directory.config().data, data_dir, download=download)
    made = shipping.export(
        directory,
        examples,
        fmt=format_,
        arm=arm,
        seed=seed,
        model=average if average in ("average", "best") else f"average {average}",
        activations=activations,
        out=out,
    )
    body = [(name, f"{error:.2f}") for name, error in made.errors.items()]
    print(tables.aligned(("computed by", "test error, %"), body))
    print(f"\nSaved in {made.path}: {made.nbytes:,} bytes; {made.float_bytes:,} in float32.")


@app.command(cls=_Command)
def doctor() -> None:
    """Show versions, processor, threads, the kernel in use, and where data is looked for."""
    from swalp.report.tables import pairs
    from swalp.training import data, environment

    found = environment.describe() | {
        "large tensors": environment.memory(),
        "data without --data-dir": str(data.cache_dir()),
    }
    if remedy := environment.remedy():
        found["faster"] = remedy
    print(pairs(found))


@app.command(cls=_Command)
def formats(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[FORMAT]", help="Such as bfp8, fixed8.6, e4m3fn, mxfp4_e2m1."),
    ] = None,
    path: Annotated[
        Path | None,
        typer.Argument(metavar="[PATH]", help="Where --plot writes; default: FORMAT.png."),
    ] = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw the numbers and the rounding, as a PNG.")
    ] = False,
) -> None:
    """List the number formats, tell one's facts, or draw it."""
    from swalp.report.formats import show_formats

    if plot:
        own_style()
    with _mistakes():
        show_formats(name, path, plot=plot)


@app.command(cls=_Command)
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE|FILE.toml]", help="Such as paper-small-block-8."),
    ] = None,
    toml: Annotated[
        bool, typer.Option("--toml", help="Print it as TOML, to change and give back.")
    ] = False,
) -> None:
    """List the recipes, or show one, role by role."""
    from swalp.report.recipes import show_recipes

    with _mistakes():
        show_recipes(name, toml=toml)


@contextmanager
def _mistakes() -> Iterator[None]:
    """Take a ValueError of the library for the user's mistake."""
    try:
        yield
    except ValueError as error:
        from swalp.training.mistakes import UserError

        raise UserError(str(error)) from None


def _fail(message: str) -> int:
    print(f"swalp: {message}", file=sys.stderr)
    return _MISTAKE
