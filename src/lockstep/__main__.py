"""`lockstep`, and `python -m lockstep`."""

import sys


def run() -> None:
    """Run a command; Ctrl-C ends it quietly also while what it needs is still being imported."""
    try:
        from lockstep.cli.main import main  # noqa: PLC0415

        main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
