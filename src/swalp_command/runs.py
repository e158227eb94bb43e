"""A run at the command line: what it shows while it goes on, how it is stopped, what it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import join, quote
from typing import Any

from swalp.report import tables
from swalp.report.progress import Display, Moment
from swalp.training import config, data, run_directory, study
from swalp.training.config import RunConfig
from swalp.training.mistakes import UserError
from swalp.training.run_directory import RunDirectory
from swalp_command import asked_to_end, own_style


def begin(
    source: str,
    changes: Sequence[str],
    data_dir: Path | None,
    download: bool,
    out: Path | None,
    tensorboard: Path | None,
) -> int:
    """A new run: the exit status."""
    if tensorboard is not None:
        _require_tensorboard()
    settings = config.load(source, changes)
    examples = data.load(settings.data, data_dir, download=download)
    study.check(settings, examples)
    study.check_networks(settings, examples)
    if tensorboard is not None:
        tensorboard.mkdir(parents=True, exist_ok=True)  # or fail before anything is made
    name = f"{Path(source).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory = run_directory.create(out or Path("runs") / name, settings)
    return _train(directory, settings, examples, data_dir, tensorboard)


def go_on(path: Path, data_dir: Path | None, download: bool, tensorboard: Path | None) -> int:
    """A run that was stopped, to its end: the exit status."""
    if tensorboard is not None:
        _require_tensorboard()
    directory = run_directory.open_run(path)
    settings = directory.config()
    directory.require_settings(settings)
    examples = data.load(settings.data, data_dir, download=download)
    return _train(directory, settings, examples, data_dir, tensorboard)


def _train(
    directory: RunDirectory,
    settings: RunConfig,
    examples: data.Dataset,
    data_dir: Path | None,
    tensorboard: Path | None,
) -> int:
    # No run remembers where its data lay: it may be read elsewhere.
    words = ["swalp", "resume", str(directory.path)]
    go_on = join(words if data_dir is None else [*words, "--data-dir", str(data_dir)])
    with directory.locked(), Display() as display, asked_to_end() as asked:
        if directory.finished:
            raise UserError(
                f"{directory.path}: this run is finished; see it again with: "
                f"swalp evaluate {quote(str(directory.path))}"
            )
        try:
            with _watching(display, directory, settings, tensorboard) as watch:
                summary = study.train(
                    directory,
                    examples,
                    watch=watch,
                    say=display.say,
                    stop=lambda: bool(asked),
                    go_on=go_on,
                )
        except study.Stopped:
            display.say(f"stopped; go on with: {go_on}")
            return 128 + asked[0]
        try:
            directory.save_curves(_picture(directory.metrics(), settings))
        except (ImportError, ValueError, RuntimeError) as error:  # of Matplotlib's installation
            reason = " ".join(str(error).split())
            display.say(f"curves.png cannot be drawn ({reason}); the run is whole without it")
        directory.finish(summary)
    print(tables.render(summary))
    print(f"\nSaved in {directory.path}; README.txt there says what is what.")
    print(f"As a page with curves and histograms: swalp report {quote(str(directory.path))} --open")
    return 0


def _picture(metrics: list[dict[str, Any]], settings: RunConfig) -> bytes:
    own_style()
    from swalp.report import curves

    title = f"{settings.data}, {settings.model} of width {settings.width}"
    return curves.png(metrics, averaging_start=settings.averaging_start, title=title)


def _require_tensorboard() -> None:
    try:
        import torch.utils.tensorboard  # noqa: F401  # what `Scalars` needs
    except ImportError as error:
        raise UserError(
            f"--tensorboard needs the package tensorboard ({error}): pip install "
            f"'swalp[tensorboard]'"
        ) from None


@contextmanager
def _watching(
    display: Display, run: RunDirectory, settings: RunConfig, tensorboard: Path | None
) -> Iterator[Callable[[Moment], None]]:
    """What is called after each step: the display, and TensorBoard's writer if there is one."""
    if tensorboard is None:
        yield display
        return
    from swalp.report.scalars import Scalars

    folder = tensorboard / run.path.resolve().name
    trajectories = len(settings.arms) * settings.seeds
    with Scalars(folder, run.metrics(), trajectories=trajectories) as scalars:

        def both(moment: Moment) -> None:
            display(moment)
            scalars(moment)

        yield both
