"""The standard streams, whatever a command finds in their place: closed, full, or unable to show a name."""

import contextlib
import io
import os
import sys
from typing import Any, NoReturn, TextIO

from lockstep.errors import StdoutFailed


class _Stdout(io.FileIO):
    """Standard output whose failures are told as such: elsewhere nobody could tell them from a disk's."""

    def __init__(self, found: TextIO) -> None:
        super().__init__(found.fileno(), "wb", closefd=False)
        self._found = found  # it closes the descriptor when nobody has it any more

    def write(self, data: Any, /) -> Any:
        """Write; raises StdoutFailed, and BrokenPipeError where nobody reads any more."""
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StdoutFailed(reason=error.strerror) from error


def prepare() -> None:
    """Have all three streams, and have them show every name, with escapes where it takes them.

    The next disk that is opened would be in the place of one that is closed. To write to a standard output that is
    closed fails.
    """
    sys.stdin = sys.stdin or _nothing(os.O_RDONLY, "r")
    sys.stderr = sys.stderr or _nothing(os.O_WRONLY, "w")
    found = sys.stdout or _nothing(os.O_RDONLY, "w")
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Stdout(found)),
        encoding=found.encoding,
        errors="backslashreplace",
        line_buffering=found.line_buffering if isinstance(found, io.TextIOWrapper) else False,
    )
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Have what standard output did not take forgotten, and not tried once more at the end of the program."""
    fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(fd, sys.stdout.fileno())
    os.close(fd)


def end(code: int) -> NoReturn:
    """End the program here: it waits for no pipe that is full, and for no thread that a disk keeps."""
    discard_output()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def _nothing(flags: int, mode: str) -> TextIO:
    stream = os.fdopen(os.open(os.devnull, flags), mode, encoding="utf-8", closefd=False)
    assert isinstance(stream, io.TextIOWrapper)
    return stream
