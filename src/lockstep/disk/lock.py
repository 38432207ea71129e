"""One writer for one disk: locks that Lockstep and QEMU both respect.

Theory
------
Linux offers three advisory locks on a file; only one fits.

- `flock` locks the file as a whole, and cryptsetup takes it while it reads or writes a LUKS header. A server
  that held it would lock out its own key management.
- POSIX record locks (F_SETLK) belong to the process: closing *any* descriptor of the file drops them, also one
  that a library opened and closed behind our back.
- Open file description locks (F_OFD_SETLK, Linux 3.15, fcntl_locking(2)) live as long as the descriptor that
  they were taken on, and are what QEMU takes.

QEMU (block/file-posix.c, raw_apply_lock_bytes and raw_check_lock_bytes) takes shared locks only: on byte 100 + n for
each permission n that it uses, on byte 200 + n for each that it does not let others have; permission 0 is reading,
1 writing, 3 resizing. Then it looks whether anybody's bytes contradict its own. Hence

    exclusive   one writer, nobody else    write lock over [0, infinity): meets every byte that anybody locks
    shared      readers, no writer         byte 0 for our own writers; 100, 201 and 203 as a QEMU that reads; and
                                           nobody may be found on 101 and 103, where a QEMU that writes would be

A lock ends with the last copy of the descriptor, also when the process is killed.

A loop device has another inode than its file, and so has other locks. Whoever has taken his lock on a block device
therefore looks at what lies below it, down to the first file, and at other loop devices over that (probe.stored_in),
for a lock that contradicts his own; one of his own process does not count. The other way round, a file over which a
loop device lies is refused by probe.users_of. The two miss each other only where the loop device is made between that
look and the lock of the file.

Not covered: another node for the same block device (`mknod`, or a container's), whose inode is another one; there the
kernel's O_EXCL is the guard (probe.open_disk, refuse_claimed), though not for a reader against a writer who comes
later. A file below that has no name here: it was deleted, or lies in another mount namespace.
A file in a file system that itself lies on a locked one. Network file systems keep these locks between machines only
where the server does.
"""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Callable

from lockstep.disk.probe import Disk, process_name, refuse_claimed, stored_in
from lockstep.errors import DiskForbidden, DiskLocked

_EVERYTHING = ((0, 0),)  # start, length; 0 is infinity
_READING = ((0, 1), (100, 1), (201, 1), (203, 1))
_QEMU_WRITES = ((101, 1), (103, 1))

_FLOCK = struct.Struct("@hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid
_CONFLICT = {errno.EAGAIN, errno.EACCES}


def lock_exclusive(fd: int, disk: Disk) -> None:
    """Lock the disk for the one writer, at once or not at all; `fd` must be open for writing. Raises DiskLocked."""
    _lock(fd, disk, fcntl.F_WRLCK, _EVERYTHING)
    _refuse_below(fd, disk, lambda below: _is_locked(below, *_EVERYTHING[0]))


def lock_shared(fd: int, disk: Disk) -> None:
    """Lock the disk for a reader, at once or not at all; `fd` must be open for reading. Raises DiskLocked, DiskBusy."""
    _lock(fd, disk, fcntl.F_RDLCK, _READING)
    if _is_written(fd):
        _set(fd, fcntl.F_UNLCK, _EVERYTHING)
        raise DiskLocked(path=disk.path, holder=_holder(fd))
    _refuse_below(fd, disk, lambda below: _is_locked(below, *_READING[0], to=fcntl.F_RDLCK) or _is_written(below))
    refuse_claimed(disk)


def _refuse_below(fd: int, disk: Disk, contradicts: Callable[[int], bool]) -> None:
    """Give the lock up again, and raise DiskLocked, if somebody has one on what lies below that contradicts it."""
    for path in stored_in(disk):
        if holder := _holder_below(path, contradicts):
            _set(fd, fcntl.F_UNLCK, _EVERYTHING)
            raise DiskLocked(path=disk.path, holder=f"{holder}, which uses {path} below it")


def _holder_below(path: str, contradicts: Callable[[int], bool]) -> str | None:
    with contextlib.suppress(OSError):  # it is gone, or has no locks
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if contradicts(fd) and not _has_lock(os.getpid(), found.st_ino, found.st_dev):
                return _holder(fd)
        finally:
            os.close(fd)
    return None


def _lock(fd: int, disk: Disk, kind: int, ranges: tuple[tuple[int, int], ...]) -> None:
    try:
        _set(fd, kind, ranges)
    except OSError as error:
        _set(fd, fcntl.F_UNLCK, _EVERYTHING)
        if error.errno in _CONFLICT:
            raise DiskLocked(path=disk.path, holder=_holder(fd)) from error
        raise DiskForbidden(path=disk.path, access="locking", reason=error.strerror) from error


def _set(fd: int, kind: int, ranges: tuple[tuple[int, int], ...]) -> None:
    for start, length in ranges:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def _is_written(fd: int) -> bool:
    return any(_is_locked(fd, start, length) for start, length in _QEMU_WRITES)


def _is_locked(fd: int, start: int, length: int, to: int = fcntl.F_WRLCK) -> bool:
    """Whether anybody else has a lock there that stands in the way of this one, which is not taken."""
    asked = _FLOCK.pack(to, os.SEEK_SET, start, length, 0)
    return bool(_FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK)


def _holder(fd: int) -> str:
    """Who has a lock on this file: the kernel names no process for an OFD lock, but fdinfo shows its locks."""
    inode = os.fstat(fd).st_ino
    for pid in sorted(map(int, filter(str.isdigit, os.listdir("/proc")))):
        if pid != os.getpid() and _has_lock(pid, inode, os.fstat(fd).st_dev):
            return process_name(pid)
    return "another program"


def _has_lock(pid: int, inode: int, device: int) -> bool:
    """Whether a descriptor of the process carries a record lock (OFD or POSIX) on the file (proc_pid_fdinfo(5))."""
    try:
        for number in os.listdir(f"/proc/{pid}/fdinfo"):
            with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii", errors="replace") as lines:
                locks = [line.split() for line in lines if line.startswith("lock:")]
            # lock:  1: OFDLCK  ADVISORY  READ  -1  fe:00:1234  100  100
            if any(lock[2] in {"OFDLCK", "POSIX"} and lock[6].endswith(f":{inode}") for lock in locks):
                found = os.stat(f"/proc/{pid}/fd/{number}")
                return (found.st_dev, found.st_ino) == (device, inode)
    except (OSError, IndexError):  # the process is gone by now, or is not ours to look at
        return False
    return False
