"""The open file or device below a disk, whatever its content: how it takes writes, and what makes them durable."""

import os
import stat
from collections.abc import Callable

from lockstep.disk.direct import DirectFile
from lockstep.disk.probe import leads_elsewhere, node_of
from lockstep.disk.runs import flush_job, write_back_job
from lockstep.disk.transfer import Promptness, cached_read_flag, writes_take_turns


class DiskFile:
    """A descriptor with content of `size_bytes` from `base` bytes on. Any thread may call; failures are OSErrors."""

    size_bytes: int

    def __init__(self, fd: int, base: int = 0) -> None:
        """Take over `fd`; it must allow whatever will be asked (reading, writing)."""
        self._fd = fd
        self._base = base
        self._direct = DirectFile.of(fd)
        self._in_turn = writes_take_turns(fd)
        self._nowait = cached_read_flag(fd)
        self._promptness = Promptness(fd)

    def close(self) -> None:
        """Close the descriptor, which also gives up its locks."""
        os.close(self._fd)

    def left(self, path: str) -> bool:
        """Whether `path` leads here no more: the file was renamed, taken away, or replaced by another."""
        return leads_elsewhere(path, node_of(self._fd))

    def cut_short(self) -> bool:
        """Whether it is a file that has become shorter than its content."""
        found = os.fstat(self._fd)
        return stat.S_ISREG(found.st_mode) and found.st_size < self._base + self.size_bytes

    @property
    def direct(self) -> bool:
        """Whether it goes past the page cache."""
        return self._direct is not None

    @property
    def prompt(self) -> bool:
        """Whether `write_run` may be called where nothing may block."""
        return self._promptness.flags is not None

    @property
    def cached(self) -> bool:
        """Whether a flush may find something left to write out."""
        return self._promptness.cached

    def flush(self) -> None:
        """Make every completed write durable."""
        os.fdatasync(self._fd)

    def flush_job(self) -> Callable[[], None]:
        """Return what a thread does to flush."""
        return flush_job(self._fd)

    def write_back_job(self) -> Callable[[], None] | None:
        """Return what a thread does to have less to wait for in the next flush; None where none waits for writing."""
        return write_back_job(self._fd) if self.cached else None

    def forget_cache(self, offset: int, length: int) -> None:
        """Have the range read from the medium next time, as far as it was flushed; 0 bytes mean up to the end."""
        os.posix_fadvise(self._fd, self._base + offset, length, os.POSIX_FADV_DONTNEED)
