"""What a path is, as a disk: its identity, what it carries, who uses it, what it shares with another disk.

Theory
------
Everything that may destroy data asks here first, so the rule is: *a doubt is reported, never resolved
in favour of writing*.

Identity is what the kernel says, never a name. A file is (device, inode), which sees through symbolic
links, hard links and bind mounts; a block device is its device number. A path is kept for sentences.

Storage lies on storage. One step down leads from

    a partition                 to  its disk                    /sys/dev/block/M:m/partition
    a loop device               to  its file or block device    LOOP_GET_STATUS64: device and inode
    a device-mapper or md disk  to  its members                 /sys/dev/block/M:m/slaves
    a file                      to  the device of its file system

and two disks overlap exactly when one of them is reached from the other, or from a loop device that has some
of the same bytes. Two partitions of one disk, or two files in one file system, share what is below them and yet
are different storage. What this cannot see:
one disk behind two paths of a multipath, a file on a file system without one device of its own (btrfs,
network file systems), and two network names for one remote disk.

Use is reported as phrases that complete "/dev/sdb is ...". The kernel's O_EXCL is the referee: `open_disk`
asks for it, so what the phrases overlook is still refused.
"""

import errno
import fcntl
import json
import os
import re
import stat
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lockstep.errors import (
    DirectImpossible,
    DirectoryMissing,
    DiskBusy,
    DiskChanged,
    DiskError,
    DiskFailed,
    DiskForbidden,
    DiskMissing,
    DiskReadOnly,
    DiskToolMissing,
    DiskUnreadable,
    NotADisk,
)

FILE_SECTOR_BYTES = 512
MIB = 1 << 20

# linux/fs.h and linux/loop.h
_BLKSSZGET = 0x1268
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO64_BYTES = 232
_LOOP_IDENTITY = struct.Struct("=QQQ")  # lo_device, lo_inode, lo_rdevice: how struct loop_info64 begins

_KINDS = (
    (stat.S_ISDIR, "directory"),
    (stat.S_ISCHR, "character device"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
)


@dataclass(frozen=True)
class Disk:
    """A disk as it was when it was looked at."""

    path: str
    """As given, made absolute."""
    real_path: str
    is_block: bool
    size_bytes: int
    logical_sector_bytes: int
    device: int
    """Of a block device its own number (st_rdev), of a file the number of its file system's device (st_dev)."""
    inode: int
    """0 for a block device."""


# --- looking at and opening a disk ------------------------------------------------------------------------


def inspect(path: str) -> Disk:
    """Look at a path. Raises DiskMissing, NotADisk, DiskForbidden or DiskUnreadable."""
    path = os.path.abspath(path)
    try:
        _require_disk(path, os.stat(path).st_mode)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _catalogued(path, error, "reading") from error
    try:
        found = os.fstat(fd)
        _require_disk(path, found.st_mode)  # the path may have changed hands since
        return _measured(path, fd, found)
    except OSError as error:
        raise _catalogued(path, error, "reading") from error
    finally:
        os.close(fd)


def open_disk(disk: Disk, *, writable: bool, direct: bool = False) -> int:
    """Open the disk that was inspected, close-on-exec; the caller closes it.

    A block device opened for writing is claimed (O_EXCL): the kernel refuses one that is mounted, held, or
    claimed by somebody else, and then refuses them until it is closed. `direct` is for direct I/O (O_DIRECT). Raises
    DiskBusy, DiskReadOnly, DiskForbidden, DiskMissing, DiskChanged, DiskUnreadable or DirectImpossible.
    """
    flags = os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY) | (os.O_DIRECT if direct else 0)
    if writable and disk.is_block:
        flags |= os.O_EXCL
        if _sysfs_text(disk.device, "ro") == "1":  # some kernels open it all the same, and fail the first write
            raise DiskReadOnly(path=disk.path)
    try:
        fd = os.open(disk.path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DiskBusy(path=disk.path, users=_sentence(users_of(disk))) from error
        if direct and error.errno == errno.EINVAL:
            raise DirectImpossible(path=disk.path, reason="its file system has no direct I/O") from error
        raise _catalogued(disk.path, error, "writing" if writable else "reading") from error
    if _identity(os.fstat(fd)) != _node(disk):
        os.close(fd)
        raise DiskChanged(path=disk.path)
    return fd


def refuse_claimed(disk: Disk) -> None:
    """Raise DiskBusy where somebody has claimed a block device, as `open_disk` does; and what `inspect` raises."""
    if not disk.is_block:
        return
    try:
        os.close(os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC | os.O_EXCL))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DiskBusy(path=disk.path, users=_sentence(users_of(disk))) from error
        raise _catalogued(disk.path, error, "reading") from error


def node_of(where: str | int) -> "Node":
    """Which disk a path leads to, or a descriptor. Raises OSError."""
    return _identity(os.stat(where))


def leads_elsewhere(path: str, node: "Node") -> bool:
    """Whether the path leads to another disk by now, or to none. In doubt it does not."""
    try:
        return node_of(path) != node
    except OSError as error:
        return error.errno in {errno.ENOENT, errno.ENOTDIR}


def _require_disk(path: str, mode: int) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise NotADisk(path=path, kind=next((kind for is_kind, kind in _KINDS if is_kind(mode)), "special file"))


def _measured(path: str, fd: int, found: os.stat_result) -> Disk:
    is_block = stat.S_ISBLK(found.st_mode)
    sector_bytes = FILE_SECTOR_BYTES
    if is_block:
        (sector_bytes,) = struct.unpack("=i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))
    return Disk(
        path=path,
        real_path=os.path.realpath(path),
        is_block=is_block,
        size_bytes=os.lseek(fd, 0, os.SEEK_END),
        logical_sector_bytes=sector_bytes,
        device=found.st_rdev if is_block else found.st_dev,
        inode=0 if is_block else found.st_ino,
    )


def _catalogued(path: str, error: OSError, access: str) -> DiskError:
    reason = error.strerror or str(error)
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return DiskMissing(path=path)
    if error.errno in {errno.EACCES, errno.EPERM}:
        return DiskForbidden(path=path, access=access, reason=reason)
    if error.errno == errno.EROFS:
        return DiskReadOnly(path=path)
    return DiskUnreadable(path=path, reason=reason)


def make_file(path: str, size_bytes: int = 0) -> None:
    """Make a file of so many zeroes, for its owner, where nothing is yet. Raises DiskFailed, DirectoryMissing."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if size_bytes:
                os.ftruncate(fd, size_bytes)
        finally:
            os.close(fd)
    except OSError as error:
        raise not_made(path, error) from error


def not_made(path: str, error: OSError, doing: str = "Making") -> DiskError:
    """Why a file could not be made: that its directory is missing is no failure of a disk."""
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return DirectoryMissing(path=path, directory=os.path.dirname(os.path.abspath(path)))
    return DiskFailed(path=path, doing=doing, reason=error.strerror or str(error))


# --- what it carries --------------------------------------------------------------------------------------


def signatures(disk: Disk) -> tuple[str, ...]:
    """Every signature on the disk, in the order of position, such as "ext4 file system", "gpt partition table".

    From `wipefs`, which lists them all; `blkid` names one, and none at all where two contradict each other.
    Raises DiskToolMissing or DiskUnreadable.
    """
    command = ["wipefs", "--no-act", "--json", "--output", "TYPE,USAGE,OFFSET", "--", disk.path]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise DiskToolMissing(tool="wipefs", package="util-linux") from error
    if done.returncode != 0:
        raise DiskUnreadable(path=disk.path, reason=done.stderr.strip() or f"wipefs ended with {done.returncode}")
    rows = json.loads(done.stdout or "{}").get("signatures", [])
    rows.sort(key=lambda row: int(row["offset"], 0))
    return tuple(dict.fromkeys(_described(row["type"], row["usage"]) for row in rows))


def _described(kind: str, usage: str | None) -> str:
    if usage == "filesystem":
        return f"{kind} file system"
    if usage == "partition-table":
        return f"{kind} partition table"
    if kind in {"swap", "swsuspend"}:
        return "swap space"
    return kind


def holds_data(disk: Disk, limit: int = MIB) -> bool:
    """Whether any of the first or last `limit` bytes is not zero. Raises what `open_disk` raises."""
    fd = open_disk(disk, writable=False)
    try:
        return any(
            chunk.count(0) != len(chunk)
            for start in {0, max(0, disk.size_bytes - limit)}
            for chunk in _chunks(fd, start, min(limit, disk.size_bytes))
        )
    except OSError as error:
        raise _catalogued(disk.path, error, "reading") from error
    finally:
        os.close(fd)


def _chunks(fd: int, start: int, length: int) -> Iterator[bytes]:
    end = start + length
    while start < end and (chunk := os.pread(fd, min(MIB, end - start), start)):
        yield chunk
        start += len(chunk)


# --- who uses it ------------------------------------------------------------------------------------------


def users_of(disk: Disk) -> tuple[str, ...]:
    """Who uses the disk now, as phrases that complete "the disk is in use: ...".

    Its partitions, its whole disk, and what it is stored in count, down to the first file.
    """
    phrases = list(_direct_uses(_node(disk)))
    if disk.is_block:
        for name, partition in _partitions(disk.device):
            phrases += [f"its partition {name} is {use}" for use in _direct_uses((partition, 0))]
        if whole := _whole_disk(disk.device):
            name = os.path.basename(_block_path(whole))
            phrases += [f"its disk {name} is {use}" for use in _direct_uses((whole, 0))]
        for lower in (device for device, inode in _stored_in(disk) if not inode):
            phrases += [f"its data is on {_block_path(lower)}, mounted at {where}" for where in _mount_points(lower)]
    return tuple(dict.fromkeys(phrases))


def refuse_busy(disk: Disk) -> None:
    """Raise DiskBusy where anybody uses the disk now."""
    if users := users_of(disk):
        raise DiskBusy(path=disk.path, users=" and ".join(users))


def opened_by(disk: Disk) -> tuple[str, ...]:
    """Processes that have this block device open, as "open in NAME (process N)"; only root sees them all."""
    phrases = []
    for link in _process_files():
        try:
            # Only names below /dev are looked at: a stat of a file on a dead network file system would hang.
            if os.readlink(link).startswith("/dev/") and _identity(os.stat(link)) == _node(disk):
                phrases.append(f"open in {process_name(_process_of(link))}")
        except OSError:  # the process or the descriptor is gone by now, or is not ours to look at
            continue
    return tuple(dict.fromkeys(phrases))


def mounted_paths() -> set[str]:
    """Every mount point that this process sees; unlike a stat, this neither fails nor hangs on a dead one."""
    return {mount.point for mount in mounts()}


def process_name(pid: int) -> str:
    """Such as "qemu-io (process 312)". Never the argument list: it may carry what must not be shown."""
    try:
        return f"{kernel_text(Path(f'/proc/{pid}/comm'))} (process {pid})"
    except OSError:
        return f"process {pid}"


def _process_files() -> Iterator[str]:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        try:
            numbers = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        yield from (f"/proc/{pid}/fd/{number}" for number in numbers)


def _process_of(link: str) -> int:
    return int(link.split("/")[2])


def _direct_uses(node: "Node") -> Iterator[str]:
    device, inode = node
    if inode == 0:
        yield from (f"mounted at {where}" for where in _mount_points(device))
        yield from (f"held by {name}" for name in sorted(_sysfs_names(device, "holders")))
    if any(_identity_of(path) == node for path in _swap_paths()):
        yield "swap space"
    for loop, below in _loops():
        if below == node:
            yield f"backing file of {_block_path(loop)}"


def _mount_points(device: int) -> Iterator[str]:
    """Where the device is mounted in this process's view."""
    for mount in mounts():
        # btrfs shows a number of its own and names the device only as the source.
        if mount.number == _numbered(device) or (
            mount.number.startswith("0:")
            and mount.source.startswith("/dev/")
            and _identity_of(mount.source) == (device, 0)
        ):
            yield mount.point


def _swap_paths() -> Iterator[str]:
    for line in kernel_text(Path("/proc/swaps")).split("\n")[1:]:
        yield _unescaped(line.partition(" ")[0]).removesuffix(" (deleted)")


class Mount(NamedTuple):
    """A row of the kernel's table of mounts (proc_pid_mountinfo(5)); `number` is the device's, as MAJOR:MINOR."""

    number: str
    point: str
    kind: str
    source: str


def mounts() -> Iterator[Mount]:
    """Every mount that this process sees."""
    for line in filter(None, kernel_text(Path("/proc/self/mountinfo")).split("\n")):
        front, _, back = line.partition(" - ")
        fields, (kind, source) = front.split(" "), back.split(" ")[:2]
        yield Mount(fields[2], _unescaped(fields[4]), kind, _unescaped(source))


def kernel_text(file: Path) -> str:
    """What the kernel shows in a file: names in it are bytes, which need be no text, and may hold any white space."""
    return os.fsdecode(file.read_bytes()).rstrip("\n")


def _unescaped(text: str) -> str:
    """Undo the kernel's octal escapes: a blank is a backslash and 040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


# --- what it shares with another disk ---------------------------------------------------------------------

# (device, 0) is a block device, (device, inode) a file. Inode 0 is never in use.
Node = tuple[int, int]


def overlap(a: Disk, b: Disk) -> str | None:
    """How the two are the same storage, as a phrase; None when they are surely not, as far as this can see."""
    if _node(a) == _node(b):
        return "the same block device" if a.is_block else "the same file"
    for upper, lower in ((a, b), (b, a)):
        steps = _way_down(_node(upper), _node(lower))
        if steps is not None:
            relation = steps[0] if len(set(steps)) == 1 else "stored on"
            return f"{upper.path} is {relation} {lower.path}"
    return None


def _way_down(start: Node, goal: Node) -> tuple[str, ...] | None:
    """The relations on the way from one disk down to another, or None where there is no way."""
    ways: list[tuple[Node, tuple[str, ...]]] = [(start, ())]
    seen = {start}
    for node, steps in ways:  # grows while it is walked: breadth first
        if node == goal:
            return steps
        for relation, below in _beneath(node):
            if below not in seen:
                seen.add(below)
                ways.append((below, (*steps, relation)))
        if goal in _twins(node):
            return (*steps, "a loop device over the same as")
    return None


def stored_in(disk: Disk) -> Iterator[str]:
    """The paths of what a block device lies on, down to the first file on each way; none of what cannot be opened."""
    for lower, upper in _stored_in(disk).items():
        path = (_sysfs_text(upper, "loop/backing_file") or "") if lower[1] else _block_path(lower[0])
        if _identity_of(path) == lower:
            yield path


def _stored_in(disk: Disk) -> dict[Node, int]:
    """What a block device lies on, down to the first file on each way, and for each the device that led there.

    The twins of loop devices count, and what these lie on does not: it may be more than is shared.
    """
    found: dict[Node, int] = {}
    uppers = [disk.device] if disk.is_block else []
    for device in uppers:  # grows while it is walked: breadth first
        for _, lower in _beneath((device, 0)):
            if lower not in found and not lower[1]:
                uppers.append(lower[0])
            found.setdefault(lower, device)
        for twin in _twins((device, 0)):
            found.setdefault(twin, device)
    return found


def _beneath(node: Node) -> Iterator[tuple[str, Node]]:
    device, inode = node
    if inode:
        yield "stored in the file system on", (device, 0)
        return
    if whole := _whole_disk(device):
        yield "a partition of", (whole, 0)
    if below := _loop_backing(device):
        yield "a loop device over", below
    for name in _sysfs_names(device, "slaves"):
        if member := _sysfs_device(f"/sys/class/block/{name}"):
            yield "built on", (member, 0)


# --- the kernel's tables ----------------------------------------------------------------------------------


def _node(disk: Disk) -> Node:
    return disk.device, disk.inode


def _identity(found: os.stat_result) -> Node:
    return (found.st_rdev, 0) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)


def _identity_of(path: str) -> Node | None:
    try:
        return _identity(os.stat(path))
    except OSError:
        return None


def _numbered(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _sysfs(device: int) -> str:
    return os.path.realpath(f"/sys/dev/block/{_numbered(device)}")


def _sysfs_text(device: int, name: str) -> str | None:
    try:
        return kernel_text(Path(_sysfs(device), name))
    except OSError:
        return None


def _sysfs_names(device: int, name: str) -> list[str]:
    try:
        return os.listdir(os.path.join(_sysfs(device), name))
    except OSError:
        return []


def _sysfs_device(directory: str) -> int | None:
    try:
        major, minor = kernel_text(Path(f"{directory}/dev")).split(":")
    except OSError:
        return None
    return os.makedev(int(major), int(minor))


def _block_path(device: int) -> str:
    return "/dev/" + os.path.basename(_sysfs(device)).replace("!", "/")


def _partitions(device: int) -> Iterator[tuple[str, int]]:
    for name in sorted(_sysfs_names(device, ".")):
        directory = os.path.join(_sysfs(device), name)
        if os.path.exists(f"{directory}/partition") and (partition := _sysfs_device(directory)):
            yield name, partition


def _whole_disk(device: int) -> int | None:
    return _sysfs_device(os.path.dirname(_sysfs(device))) if _sysfs_text(device, "partition") else None


def _loops() -> Iterator[tuple[int, Node]]:
    for name in sorted(os.listdir("/sys/class/block")):
        if name.startswith("loop") and (device := _sysfs_device(f"/sys/class/block/{name}")):
            below = _loop_backing(device)
            if below:
                yield device, below


def _twins(node: Node) -> Iterator[Node]:
    """The other loop devices that have some of a loop device's bytes."""
    device, inode = node
    below = None if inode else _loop_backing(device)
    if below is None:
        return
    start, end = _loop_range(device)
    for twin, its_below in _loops():
        if its_below == below and twin != device:
            its_start, its_end = _loop_range(twin)
            if its_start < end and start < its_end:
                yield twin, 0


def _loop_range(device: int) -> tuple[int, int]:
    """Which bytes a loop device has of what it lies on: [start, end)."""
    start = int(_sysfs_text(device, "loop/offset") or 0)
    return start, start + 512 * int(_sysfs_text(device, "size") or 0)


def _loop_backing(device: int) -> Node | None:
    """What a loop device lies on, None where it is no loop device or is free."""
    path = _sysfs_text(device, "loop/backing_file")
    if path is None:
        return None
    try:
        fd = os.open(_block_path(device), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:  # not root: the name is the next best thing
        return _identity_of(path.removesuffix(" (deleted)"))
    try:
        info = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64_BYTES))
    except OSError:  # it was let go just now
        return None
    finally:
        os.close(fd)
    holder, inode, block = _LOOP_IDENTITY.unpack_from(info)
    return (block, 0) if block else (holder, inode)


def _sentence(phrases: tuple[str, ...]) -> str:
    return ", ".join(phrases) or "another program has claimed it"
