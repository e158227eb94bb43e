import io
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from swalp.report import progress


@dataclass
class Moment:
    step: int
    record: dict[str, Any] | None = None
    arm: str = "float"
    seed: int = 3
    epoch: int = 2
    steps: int = 100
    learning_rate: float = 0.05
    loss: float = 0.25


RECORD = {"test_error": 4.5, "average_error": None}


def shown(terminal, moments, monkeypatch):
    times = iter(range(0, 10_000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(times)))
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80, highlight=False)
    with progress.Display(console) as display:
        for moment in moments:
            display(moment)
        display.say("a [line] with brackets")
    return file.getvalue()


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    moments = [
        Moment(10),
        Moment(11, RECORD),
        Moment(12, RECORD | {"average_error": 3.25}),
    ]
    # The clock goes on by 20 s at each look: 40 s for two steps, 89 to go.
    first, second, said = shown(False, moments, monkeypatch).splitlines()
    assert first == (
        " 11 %  float, seed 3, epoch 2: error 4.50 %, loss 0.250, rate 0.05; about 1780 s left"
    )
    assert "error 4.50 %, of the average 3.25 %, loss 0.250," in second
    assert said == "a [line] with brackets"


def test_a_bar_on_a_terminal(monkeypatch):
    text = shown(True, [Moment(10), Moment(11, RECORD)], monkeypatch)
    assert "float, seed 3, epoch 2: error 4.50 %" in text
    assert "loss 0.250, rate 0.05" in text
    assert "11%" in text
    assert "\x1b[" in text
