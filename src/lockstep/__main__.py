"""`lockstep`, and `python -m lockstep`."""

import os
import sys


def run() -> None:
    """Run a command; Ctrl-C ends it quietly also while what it needs is still being imported."""
    try:
        _take_names_as_utf8()
        from lockstep.cli.main import main  # noqa: PLC0415

        main()
    except KeyboardInterrupt:
        sys.exit(130)


def _take_names_as_utf8() -> None:
    """Have a path of the registry mean the same file in every locale, also in one that cannot write it, by a new start.

    What is printed stays in the locale's encoding.
    """
    if sys.getfilesystemencoding() != "utf-8":
        if sys.stdout is not None:
            os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 (it is ourselves)


if __name__ == "__main__":
    run()
