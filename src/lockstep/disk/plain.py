"""A disk as it is: a file or a block device, read and written at byte offsets through the page cache or past it.

Every method may be called from any thread. Failures are OSErrors. Nothing is durable before `flush`, or
before a write with `durable` returns.
"""

import ctypes
import errno
import functools
import os
from array import array
from collections.abc import Callable, Iterator
from typing import Final, Self

from lockstep.disk.direct import copy_from, require_direct
from lockstep.disk.file import DiskFile
from lockstep.disk.lock import lock_exclusive
from lockstep.disk.probe import Disk, open_disk
from lockstep.disk.runs import fetch_job, places, read_run, requests, write_job, write_run
from lockstep.disk.transfer import SHORTER, read_all, write_all

_FALLOC_FL_KEEP_SIZE: Final = 0x01  # linux/falloc.h
_FALLOC_FL_PUNCH_HOLE: Final = 0x02
_FALLOC_FL_ZERO_RANGE: Final = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_ZEROES: Final = bytes(1 << 20)
_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, errno.ENOTTY})


class PlainDisk(DiskFile):
    """An open disk: the target, or the output of a restore."""

    missing = bytearray()  # of a new target that is being filled, whether it lacks a region, a byte for each

    def __init__(self, disk: Disk, fd: int, size_bytes: int | None = None) -> None:
        """Take over `fd`, an open descriptor of `disk`, of which only the first `size_bytes` are used if given.

        What lies behind them is another's, or not there, and reads as zeroes.
        """
        super().__init__(fd)
        self.disk = disk
        self.size_bytes = disk.size_bytes if size_bytes is None else size_bytes
        self._grows = True  # where something is written beyond its end

    @classmethod
    def claim(cls, disk: Disk, size_bytes: int | None = None, *, direct: bool = False) -> Self:
        """Open `disk` for writing, for this process alone; `direct` leaves the page cache out.

        Raises DiskLocked, DirectImpossible and what `open_disk` does.
        """
        fd = open_disk(disk, writable=True, direct=direct)
        try:
            if direct:
                require_direct(fd, disk.path, size=disk.size_bytes)
            lock_exclusive(fd, disk)
            return cls(disk, fd, size_bytes)
        except BaseException:
            os.close(fd)
            raise

    def keep_short(self) -> None:
        """From here on fail with EIO what would make a file that was cut short long again: a hole is not what was lost.

        For the thread that asks whether it is `prompt`, which it is no more.
        """
        self._grows = False
        self._promptness.flags, self._promptness.unknown = None, False

    def cut_short(self) -> bool:
        """Whether it is a file that has become shorter than its content, or was: `keep_short` was called.

        One that somebody has made long again is no better for it: what it lost is a hole by then.
        """
        return not self._grows or super().cut_short()

    @property
    def block_bytes(self) -> int:
        """What writes have to themselves, though they be smaller: more than a byte only with direct I/O."""
        return 1 if self._direct is None else self._direct.block_bytes

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset`; it may lie past the end of the size, where zeroes are read.

        EIO where the disk has become shorter than that.
        """
        if offset + len(into) > self.size_bytes:
            within = max(0, self.size_bytes - offset)
            into[within:] = bytes(len(into) - within)
            into = into[:within]
        if self._direct is None:
            read_all(self._fd, into, offset)
        else:
            self._direct.read(offset, into)

    def read_run(self, into: bytearray, run: "array[int]", count: int) -> int:
        """Read a run without waiting for the medium; return how many of its reads, from the front."""
        return 0 if self._nowait is None else read_run(self._fd, self._nowait, into, run, count)

    def read_job(self, into: memoryview, run: "array[int]", count: int) -> Callable[[], None]:
        """Return what a thread does to read a run, from the medium if need be: all of it at the same time."""
        if any(at + length > self.size_bytes for at, length in places(run, count)):
            return functools.partial(self._read_each, into, run, count, 0)
        if self._direct is not None:
            return functools.partial(self._read_direct, into, run, count)
        return fetch_job(self._fd, into, run, count, functools.partial(self._read_each, into, run, count))

    def _read_direct(self, into: memoryview, run: "array[int]", count: int) -> None:
        assert self._direct is not None
        self._read_each(into, run, count, self._direct.read_run(into, run, count))

    def _read_each(self, into: memoryview, run: "array[int]", count: int, done: int) -> None:
        """Read what is left of a run: where it ended, the read itself tells why."""
        for offset, length, position in requests(run, done, count):
            self.read(offset, into[position : position + length])

    def write(self, offset: int, data: memoryview | bytes, *, durable: bool = False) -> None:
        """Write all of `data` at `offset`."""
        self._refuse_growth(offset, len(data))
        if self._direct is not None:
            self._direct.write(offset, data, durable=durable)
            return
        if self._promptness.unknown:
            self._promptness.learn(lambda flags: os.pwritev(self._fd, (data,), offset, flags))
        if durable or os.pwrite(self._fd, data, offset) != len(data):
            write_all(self._fd, data, offset, durable=durable)

    def write_run(self, data: memoryview, run: "array[int]", count: int) -> int:
        """Write a run without ever waiting; return how many of its writes, from the front. Only on a prompt disk."""
        flags = self._promptness.flags
        assert flags is not None
        return write_run(self._fd, flags, data, run, count)

    def write_job(self, data: memoryview, run: "array[int]", count: int, durable: bool = False) -> Callable[[], None]:
        """Return what a thread does to write a run."""
        rest = functools.partial(self._write_each, data, run, count, durable)
        if self._promptness.unknown or not self._grows:
            return functools.partial(rest, 0)
        if self._direct is not None:
            return functools.partial(self._write_direct, data, run, count, durable)
        in_turn = self._in_turn and not durable  # the kernel lets the next one in while the medium is waited for
        return write_job(self._fd, os.RWF_DSYNC if durable else 0, data, run, count, rest, in_turn)

    def _write_direct(self, data: memoryview, run: "array[int]", count: int, durable: bool) -> None:
        assert self._direct is not None
        done = self._direct.write_run(run, count, copy_from(data), durable=durable)
        self._write_each(data, run, count, durable, done)

    def _write_each(self, data: memoryview, run: "array[int]", count: int, durable: bool, done: int) -> None:
        """Write what is left of a run: where it ended, the write itself tells why."""
        for offset, length, position in requests(run, done, count):
            self.write(offset, data[position : position + length], durable=durable)

    def zero(self, offset: int, length: int, *, allocate: bool) -> None:
        """Have the range read as zeroes: as a hole where that is possible, unless `allocate`.

        On a block device a punched hole is a zeroing discard (block/fops.c), which unlike BLKDISCARD says what
        is read afterwards.
        """
        self._refuse_growth(offset, length)
        mode = _FALLOC_FL_ZERO_RANGE if allocate else _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        try:
            _fallocate(self._fd, mode, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            for position in range(offset, offset + length, len(_ZEROES)):
                piece = min(len(_ZEROES), offset + length - position)
                self.write(position, memoryview(_ZEROES)[:piece])

    def _refuse_growth(self, offset: int, length: int) -> None:
        if not self._grows and offset + length > os.fstat(self._fd).st_size:
            raise OSError(errno.EIO, SHORTER)

    def resize(self, size_bytes: int) -> None:
        """Empty a file and give it a size: all of it reads as zeroes then."""
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, size_bytes)
        self.size_bytes = size_bytes

    def prefetch(self, offset: int, length: int) -> None:
        """Start reading the range into the page cache."""
        if length and self._direct is None:  # 0 would mean up to the end
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def written_ns(self) -> int:
        """When the content was last written, in ns since 1970; 0 for a block device, which does not tell."""
        return 0 if self.disk.is_block else os.fstat(self._fd).st_mtime_ns

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Split the range into (offset, length, whether it holds data); the rest are holes, read as zeroes."""
        end = offset + length
        shorter = not self.disk.is_block and os.fstat(self._fd).st_size < min(end, self.size_bytes)
        if self.disk.is_block or shorter:  # it does not tell
            yield offset, length, True
            return
        while offset < end:
            data = self._seek(offset, os.SEEK_DATA, end)
            if data > offset:
                yield offset, data - offset, False
                offset = data
            if offset < end:
                hole = self._seek(offset, os.SEEK_HOLE, end)
                yield offset, hole - offset, True
                offset = hole

    def _seek(self, offset: int, whence: int, end: int) -> int:
        try:
            return min(os.lseek(self._fd, offset, whence), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here to the end of the file
                return end
            raise


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), of which the os module has only the POSIX part."""
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
