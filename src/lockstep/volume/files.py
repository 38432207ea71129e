"""Small files that are whole under their names, and names that a power cut leaves as they were made."""

import contextlib
import os
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def made(path: str, content: str) -> Iterator[str]:
    """Make a file with this content, durable and for its owner alone, which shall have the name `path`.

    What it is called until the block gives it that is yielded; if the block fails before, it is gone. Raises OSError.
    """
    fd, place = tempfile.mkstemp(prefix=".lockstep-", dir=os.path.dirname(path))
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        yield place
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place)
        raise


def rename(path: str, new: str) -> None:
    """Give a file another name, durably, in place of what has that. Raises OSError."""
    os.replace(path, new)
    sync_directory(new)


def sync_directory(path: str) -> None:
    """Make the name `path` durable, or its absence."""
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
