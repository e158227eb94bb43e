"""The console script: outside `swalp`, whose import takes seconds, for PyTorch."""

import sys


def main() -> None:
    """The command line; also while it is being imported, Ctrl-C ends it in one line."""
    try:
        from swalp_command import cli

        cli.main()
    except KeyboardInterrupt:
        print("swalp: interrupted", file=sys.stderr)
        sys.exit(130)  # as `swalp_command.cli` does
