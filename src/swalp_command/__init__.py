"""The console script: outside `swalp`, whose import takes seconds, for PyTorch."""

import contextlib
import os
import signal
import stat
import sys
from collections.abc import Iterator

_WORDS = {"SIGTERM": "terminated", "SIGHUP": "the terminal was closed"}


class Terminated(KeyboardInterrupt):
    """An interrupt by another signal than Ctrl-C's, which ends with another status.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def main() -> None:
    """The command line; also while it is being imported, a signal ends it in one line."""
    for name in (signal.SIGINT, *ending_signals()):
        if signal.getsignal(name) is not signal.SIG_IGN:  # as of what runs in the background
            signal.signal(name, _leave)
    try:
        from swalp_command import cli

        status = cli.main()
    except KeyboardInterrupt as stop:
        status = interrupted(stop)
    if status > 128:  # a further signal would find Python on its way out
        for name in (signal.SIGINT, *ending_signals()):
            signal.signal(name, signal.SIG_IGN)
    sys.exit(status)


def raise_interrupts() -> None:
    """From now on a signal is an exception where the program is; until then it ends it at once.

    While modules are imported, which take no exception at every place, nothing can be lost.
    """
    for name in (signal.SIGINT, *ending_signals()):
        if signal.getsignal(name) is _leave:  # set by `main`
            raises = signal.default_int_handler if name == signal.SIGINT else _terminate
            signal.signal(name, raises)


def interrupted(stop: BaseException) -> int:
    """Say in one line that a signal ended it; the status, as shells report it."""
    number = signal.Signals(stop.number) if isinstance(stop, Terminated) else signal.SIGINT
    print(_line(number), file=sys.stderr)
    return 128 + number


def _line(number: signal.Signals) -> str:
    return f"swalp: {_WORDS.get(number.name, 'interrupted')}"


def ending_signals() -> list[signal.Signals]:
    """What asks a process to end, beside Ctrl-C: SIGTERM; SIGHUP, unless `nohup` has it ignored."""
    known = (signal.Signals[name] for name in _WORDS if hasattr(signal, name))
    return [each for each in known if signal.getsignal(each) is not signal.SIG_IGN]


@contextlib.contextmanager
def asked_to_end() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list; a second one acts at once."""
    asked: list[int] = []
    names = (signal.SIGINT, *ending_signals())

    def handle(number: int, frame: object) -> None:
        leave_terminal(number)
        if asked:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)
        asked.append(number)

    before = [signal.signal(name, handle) for name in names]
    try:
        yield asked
    finally:
        for name, old in zip(names, before, strict=True):
            signal.signal(name, old)


def leave_terminal(number: int) -> None:
    """After SIGHUP, drop what would be written to the terminal: there is none, only an error."""
    if number != getattr(signal, "SIGHUP", None):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # closed
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)


def own_style() -> None:
    """Draw in Matplotlib's own style: a user's may need what is not there."""
    import matplotlib  # it may be missing or broken, and takes its time

    matplotlib.rcdefaults()


def _leave(number: int, frame: object) -> None:
    leave_terminal(number)
    with contextlib.suppress(OSError):
        os.write(2, f"{_line(signal.Signals(number))}\n".encode())
    os._exit(128 + number)


def _terminate(number: int, frame: object) -> None:
    leave_terminal(number)
    raise Terminated(number)
