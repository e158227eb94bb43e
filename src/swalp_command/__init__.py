"""The console script: outside `swalp`, whose import takes seconds, for PyTorch."""

import signal
import sys


class Terminated(KeyboardInterrupt):
    """SIGTERM: an interrupt that ends with another status."""


def main() -> None:
    """The command line; also while it is being imported, a signal ends it in one line."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        from swalp_command import cli

        status = cli.main()
    except KeyboardInterrupt as stop:
        status = interrupted(stop)
    if status > 128:  # a further signal would find Python on its way out
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(status)


def interrupted(stop: BaseException) -> int:
    """Say in one line that a signal ended it; the status, as shells report it."""
    terminated = isinstance(stop, Terminated)
    print("swalp: terminated" if terminated else "swalp: interrupted", file=sys.stderr)
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def _terminate(number: int, frame: object) -> None:
    raise Terminated
