"""Progress of a run on a terminal as a bar, elsewhere as plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_LINES_EVERY = 10.0  # seconds, where there is no bar


class Moment(Protocol):
    """What is shown: see `swalp.training.study.Progress`."""

    @property
    def arm(self) -> str: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def epoch(self) -> int: ...  # noqa: D102
    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def steps(self) -> int: ...  # noqa: D102
    @property
    def learning_rate(self) -> float: ...  # noqa: D102
    @property
    def loss(self) -> float: ...  # noqa: D102
    @property
    def record(self) -> dict[str, Any] | None: ...  # noqa: D102


class _TwoLines(Progress):
    """What is trained, with its errors, above the bar: both fit into 80 columns."""

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            yield Text(task.description, no_wrap=True, overflow="ellipsis")
        yield self.make_tasks_table(self.tasks)


class Display:
    """A context that shows a run's progress on stderr; `say` puts a line above the bar.

    Args:
        console: where to; default: stderr.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._bar = _TwoLines(
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, figures="")
        self._error = ""
        self._began = self._printed = time.monotonic()
        self._first: int | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Show a line."""
        self._console.print(line, markup=False, soft_wrap=True)

    def __call__(self, moment: Moment) -> None:
        """Show where the run stands."""
        if self._first is None:
            self._first = moment.step - 1
        if moment.record is not None:
            average = moment.record["average_error"]
            self._error = f": error {moment.record['test_error']:.2f} %"
            self._error += "" if average is None else f", of the average {average:.2f} %"
        what = f"{moment.arm}, seed {moment.seed}, epoch {moment.epoch}{self._error}"
        figures = f"loss {moment.loss:.3f}, rate {moment.learning_rate:.2g}"
        if not self._bar.disable:
            self._bar.update(
                self._task,
                total=moment.steps,
                completed=moment.step,
                description=what,
                figures=figures,
            )
            return
        now = time.monotonic()
        if moment.record is not None and now - self._printed >= _LINES_EVERY:
            self._printed = now
            done = moment.step - self._first
            left = (now - self._began) / done * (moment.steps - moment.step)
            share = 100 * moment.step / moment.steps
            self.say(f"{share:3.0f} %  {what}, {figures}; about {left:.0f} s left")


@contextmanager
def parts(name: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """A function that shows, on a terminal, how many parts of some work are done, until all are.

    Args:
        name: of the work.
        console: where to; default: stderr.
    """
    console = console or Console(stderr=True, highlight=False)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f} of {task.total:.0f}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(name, total=None, visible=False)

    def show(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total, visible=True)
        if done >= total:
            bar.stop()

    with bar:
        yield show
