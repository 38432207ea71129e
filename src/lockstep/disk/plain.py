"""A disk as it is: a file or a block device, read and written at byte offsets through the page cache.

Every method may be called from any thread. Failures are OSErrors. Nothing is durable before `flush`, or
before a write with `durable` returns.
"""

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from typing import Final, Self

from lockstep.disk.lock import lock_exclusive
from lockstep.disk.probe import Disk, open_disk

_FALLOC_FL_KEEP_SIZE: Final = 0x01  # linux/falloc.h
_FALLOC_FL_PUNCH_HOLE: Final = 0x02
_FALLOC_FL_ZERO_RANGE: Final = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_ZEROES: Final = bytes(1 << 20)
_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, errno.ENOTTY})


def write_all(fd: int, data: memoryview | bytes | bytearray, offset: int, *, durable: bool = False) -> None:
    """Write all of `data` at `offset` (bytes), or raise the OSError that stopped it."""
    written = os.pwritev(fd, (data,), offset, os.RWF_DSYNC) if durable else os.pwrite(fd, data, offset)
    if written == len(data):
        return
    rest = memoryview(data)[written:]
    while rest:
        # A short write is a full disk or a signal; the next one says which.
        written = os.pwritev(fd, (rest,), offset + len(data) - len(rest), os.RWF_DSYNC if durable else 0)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest = rest[written:]


def read_all(fd: int, into: memoryview, offset: int) -> None:
    """Fill `into` from `offset` (bytes); past the end of the disk there are zeroes."""
    while into:
        count = os.preadv(fd, (into,), offset)
        if not count:
            into[:] = bytes(len(into))
            return
        into, offset = into[count:], offset + count


class PlainDisk:
    """An open disk: the target, or the output of a restore."""

    def __init__(self, disk: Disk, fd: int) -> None:
        """Take over `fd`, an open descriptor of `disk`."""
        self.disk = disk
        self.size_bytes = disk.size_bytes
        self._fd = fd
        self._nowait = self._probe_nowait()

    @classmethod
    def claim(cls, disk: Disk) -> Self:
        """Open `disk` for writing, for this process alone. Raises DiskLocked and what `open_disk` does."""
        fd = open_disk(disk, writable=True)
        try:
            lock_exclusive(fd, disk)
            return cls(disk, fd)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close the descriptor, which also gives up its locks."""
        os.close(self._fd)

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset`; it may lie past the end, where zeroes are read."""
        read_all(self._fd, into, offset)

    def read_cached(self, offset: int, into: bytearray) -> bool:
        """Fill `into` without waiting for the medium, or return False."""
        if self._nowait is None:
            return False
        try:
            return os.preadv(self._fd, (into,), offset, self._nowait) == len(into)
        except BlockingIOError:
            return False

    def write(self, offset: int, data: memoryview | bytes, *, durable: bool = False) -> None:
        """Write all of `data` at `offset`."""
        if durable or os.pwrite(self._fd, data, offset) != len(data):
            write_all(self._fd, data, offset, durable=durable)

    def zero(self, offset: int, length: int, *, allocate: bool) -> None:
        """Have the range read as zeroes: as a hole where that is possible, unless `allocate`.

        On a block device a punched hole is a zeroing discard (block/fops.c), which unlike BLKDISCARD says what
        is read afterwards.
        """
        mode = _FALLOC_FL_ZERO_RANGE if allocate else _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        try:
            _fallocate(self._fd, mode, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            for position in range(offset, offset + length, len(_ZEROES)):
                piece = min(len(_ZEROES), offset + length - position)
                write_all(self._fd, memoryview(_ZEROES)[:piece], position)

    def flush(self) -> None:
        """Make every completed write durable."""
        os.fdatasync(self._fd)

    def prefetch(self, offset: int, length: int) -> None:
        """Start reading the range into the page cache."""
        if length:  # 0 would mean up to the end
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def written_ns(self) -> int:
        """When the content was last written, in ns since 1970; 0 for a block device, which does not tell."""
        return 0 if self.disk.is_block else os.fstat(self._fd).st_mtime_ns

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Split the range into (offset, length, whether it holds data); the rest are holes, read as zeroes."""
        if self.disk.is_block:  # it does not tell
            yield offset, length, True
            return
        end = offset + length
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

    def _probe_nowait(self) -> int | None:
        """Return the flag that makes a read give up rather than wait; None when there is no way to know."""
        try:
            os.preadv(self._fd, (bytearray(1),), 0, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                return None
            return 0 if _in_memory(self.disk.real_path) else None
        return os.RWF_NOWAIT


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), of which the os module has only the POSIX part."""
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _in_memory(path: str) -> bool:
    """Whether the file lies on a file system that is memory, where a read never waits."""
    best, kind = "", ""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as rows:
        for row in rows:
            fields, _, rest = row.partition(" - ")
            point = fields.split()[4].encode().decode("unicode_escape")
            inside = path == point or path.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, rest.split()[0]
    return kind in ("tmpfs", "ramfs")
