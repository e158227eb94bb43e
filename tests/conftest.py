"""What holds for the whole suite."""

import signal


def pytest_configure() -> None:
    # In the background Ctrl-C is ignored, and under nohup SIGHUP; what tests start would inherit
    # that, and a handler it does not.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
