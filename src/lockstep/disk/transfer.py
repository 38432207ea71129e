"""Moving all of a piece of data to or from a descriptor, and whether that can be made to wait.

Failures are OSErrors.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from typing import Final

from lockstep.disk.probe import mounts

SHORTER: Final = "it is shorter than it was"


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


def read_all(fd: int, into: memoryview, offset: int, *, block_bytes: int = 1) -> None:
    """Fill `into` from `offset` (bytes), or raise an OSError: EIO where the disk ends, which is shorter than it was.

    What belongs there is unknown: zeroes would be a wrong answer. A read that was cut short goes on at a block.
    """
    while into:
        count = os.preadv(fd, (into,), offset)
        if not count or count % block_bytes:
            raise OSError(errno.EIO, SHORTER)
        into, offset = into[count:], offset + count


class Promptness:
    """Whether a file takes small writes without ever making the writer wait, and how to ask for that.

    `flags` are what pwritev2(2) then needs: none where the file system is memory; RWF_NOWAIT where it keeps its word,
    and fails with EAGAIN instead of waiting. None means that writes may block: ext4, FUSE, older kernels, and direct
    I/O anywhere. `cached` is whether a flush may find something left to write out: neither in memory, nor direct.
    """

    def __init__(self, fd: int) -> None:
        self.flags = _flag_in_memory(fd)
        self.cached = self.unknown = self.flags is None and not is_direct(fd)

    def learn(self, write: Callable[[int], int]) -> None:
        """Find out by a write that is about to happen anyway: `write` is given the flags to try."""
        self.unknown = False
        try:
            write(os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                return
        self.flags = os.RWF_NOWAIT


def cached_read_flag(fd: int) -> int | None:
    """Return the flag that makes a read of `fd` give up rather than wait; None when there is no way to know."""
    if is_direct(fd):
        return None
    try:
        os.preadv(fd, (bytearray(1),), 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            return None
        return _flag_in_memory(fd)
    return os.RWF_NOWAIT


def writes_take_turns(fd: int) -> bool:
    """Whether the kernel lets one write at a time into its cache of this: a file has a lock, a block device has not."""
    return stat.S_ISREG(os.fstat(fd).st_mode) and not is_direct(fd)


def is_direct(fd: int) -> bool:
    """Whether the descriptor was opened for direct I/O."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def _flag_in_memory(fd: int) -> int | None:
    """A device is no memory, though its node lie there: /dev of a container does, as a rule."""
    file = stat.S_ISREG(os.fstat(fd).st_mode) and not is_direct(fd)
    return 0 if file and _in_memory(os.readlink(f"/proc/self/fd/{fd}")) else None


def _in_memory(path: str) -> bool:
    """Whether the file lies on a file system that is memory, where a read never waits."""
    best, kind = "", ""
    with contextlib.suppress(OSError):
        for mount in mounts():
            inside = path == mount.point or path.startswith(mount.point.rstrip("/") + "/")
            if inside and len(mount.point) >= len(best):
                best, kind = mount.point, mount.kind
    return kind in ("tmpfs", "ramfs")
