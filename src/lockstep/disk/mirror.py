"""Making a LUKS2 volume fit to be a mirror, and opening one again.

Making one destroys what its disk held, so everything that can be refused is refused before the first byte is
written: a disk that is in use, that is the target (under whatever name), that carries anything (unless
`force`), or that is too small. Opening one only reads: header, token, and the volume key as `unlock` gets it.
"""

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from lockstep.crypto import luks, reencryption
from lockstep.crypto.cipher import XtsCipher
from lockstep.crypto.unlock import Unlock
from lockstep.disk.direct import require_direct
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.half_rekeyed import HalfRekeyedDisk
from lockstep.disk.lock import lock_exclusive, lock_shared
from lockstep.disk.probe import Disk, holds_data, inspect, make_file, open_disk, overlap, refuse_busy, signatures
from lockstep.errors import (
    DiskChanged,
    DiskFailed,
    HeaderExists,
    HeaderIsDisk,
    MirrorHoldsData,
    MirrorIsTarget,
    MirrorTooSmall,
    MirrorTruncated,
    RekeyUnfinished,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

SECTOR_SIZES: Final = (512, 1024, 2048, 4096)


def whole_sectors(size_bytes: int, sector_bytes: int) -> int:
    """Return the size of a mirror's data for a target of this size: rounded up to the encryption sector."""
    return -(-size_bytes // sector_bytes) * sector_bytes


def make_mirror(
    target: Disk,
    path: str,
    *,
    header: str | None,
    passphrase: bytes,
    sector_bytes: int,
    label: str,
    uuid: str,
    iter_time_ms: int | None = None,
    force: bool = False,
) -> luks.Header:
    """Format `path` as the empty mirror of `target`; a file that does not exist is made, exactly large enough.

    Raises MirrorIsTarget, MirrorTooSmall, MirrorHoldsData, HeaderExists, HeaderIsDisk, DiskBusy, DiskLocked and what
    cryptsetup meets. Nothing that existed is changed when a check fails; what was made here is removed when a later
    step fails.
    """
    data_bytes = whole_sectors(target.size_bytes, sector_bytes)
    needed_bytes = data_bytes if header else data_bytes + luks.INLINE_DATA_OFFSET_BYTES
    with contextlib.ExitStack() as undo:
        if not os.path.lexists(path):
            undo.callback(_unlink_if_there, path)
            make_file(path, needed_bytes)
        disk = inspect(path)
        refuse_unfit(target, disk, needed_bytes, detached=header is not None)
        if not force:
            _refuse_content(disk)
        if header:
            _refuse_header(header, (target, disk), force=force)
            if not os.path.lexists(header):
                undo.callback(_unlink_if_there, header)
        require_unused(disk)
        luks.format_mirror(
            path,
            header=header,
            passphrase=passphrase,
            sector_bytes=sector_bytes,
            iter_time_ms=iter_time_ms,
            label=label,
            uuid=uuid,
        )
        undo.pop_all()
    return luks.read_header(header or path)


def require_unused(disk: Disk) -> None:
    """Raise DiskBusy or DiskLocked where anybody else uses the disk at this moment.

    Its lock is not kept: cryptsetup needs the device for itself. A server that comes between is refused by its lock.
    """
    refuse_busy(disk)
    fd = open_disk(disk, writable=True)
    try:
        lock_exclusive(fd, disk)
    finally:
        os.close(fd)


def open_mirror(
    path: str,
    header_path: str | None,
    header: luks.Header,
    unlock: Unlock,
    size_bytes: int,
    *,
    writable: bool,
    direct: bool = False,
    with_key: Callable[[bytearray], None] | None = None,
) -> EncryptedDisk:
    """Unlock the mirror of a target of `size_bytes`, whose `header` was read before, and lock it against others.

    `direct` leaves the page cache out; `with_key` is shown the volume key, which is wiped afterwards. Raises
    MirrorTruncated, DiskBusy, DiskLocked, DiskChanged, DirectImpossible, and what reading the volume key can raise.
    """
    disk, data_bytes = large_enough(path, header.segment, size_bytes)
    refuse_busy(disk)
    fd = open_disk(disk, writable=writable, direct=direct)
    try:
        if direct:
            segment = header.segment
            require_direct(fd, path, sector=segment.sector_bytes, beginning=segment.offset_bytes)
        (lock_exclusive if writable else lock_shared)(fd, disk)
        _refuse_changed(path, header_path, header)
        key = unlock.volume_key(header_path or path)
        try:
            cipher = XtsCipher(key, header.segment.sector_bytes)
            if with_key is not None:
                with_key(key)
        finally:
            luks.wipe(key)
        return EncryptedDisk(fd, header.segment, cipher, data_bytes)
    except BaseException:
        os.close(fd)
        raise


def open_unfinished(
    path: str,
    header_path: str | None,
    header: luks.Header,
    unfinished: reencryption.Unfinished,
    unlock: Unlock,
    size_bytes: int,
) -> HalfRekeyedDisk:
    """Open a mirror whose re-keying is not finished, for reading, and keep others from going on with it.

    Raises RekeyUnfinished where a token is to unlock it, MirrorTruncated, DiskBusy, DiskLocked, DiskChanged, and what
    reading the volume keys can raise.
    """
    where = header_path or path
    if unlock.passphrase is None:
        raise RekeyUnfinished(path=where)  # no token has the new key
    disk, data_bytes = large_enough(path, header.segment, size_bytes)
    refuse_busy(disk)  # stock cryptsetup goes on with one as well
    passphrase = unlock.passphrase()
    with contextlib.ExitStack() as undo:
        fd = open_disk(disk, writable=False)
        undo.callback(os.close, fd)
        lock_shared(fd, disk)
        if luks.read_metadata(where) != unfinished.metadata:
            raise DiskChanged(path=path)
        header_fd = open_disk(inspect(where), writable=False)
        undo.callback(os.close, header_fd)
        new = _cipher(unfinished, where, passphrase, new=True)
        old = new if unfinished.is_over(data_bytes) else _cipher(unfinished, where, passphrase, new=False)
        undo.pop_all()
    return HalfRekeyedDisk(fd, header_fd, unfinished, old, new, data_bytes)


def _cipher(unfinished: reencryption.Unfinished, header: str, passphrase: "Buffer", *, new: bool) -> XtsCipher:
    key = unfinished.volume_key(header, passphrase, new=new)
    try:
        return XtsCipher(key, unfinished.segment.sector_bytes)
    finally:
        luks.wipe(key)


def claim_for_rekeying(path: str, segment: luks.Segment, size_bytes: int) -> int:
    """Lock the mirror of a target of `size_bytes` against everybody else; returns the descriptor that has the lock.

    A device is not opened exclusively: that is what cryptsetup does. Raises MirrorTruncated, DiskBusy, DiskLocked.
    """
    disk, _data_bytes = large_enough(path, segment, size_bytes)
    require_unused(disk)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DiskFailed(path=path, doing="Opening", reason=error.strerror) from error
    try:
        lock_exclusive(fd, disk)
    except BaseException:
        os.close(fd)
        raise
    return fd


def large_enough(path: str, segment: luks.Segment, size_bytes: int) -> tuple[Disk, int]:
    """Return the disk, and the size of its data. Raises MirrorTruncated."""
    disk, data_bytes = inspect(path), whole_sectors(size_bytes, segment.sector_bytes)
    needed_bytes = segment.offset_bytes + data_bytes
    if disk.size_bytes < needed_bytes:
        raise MirrorTruncated(path=path, size_bytes=disk.size_bytes, needed_bytes=needed_bytes)
    return disk, data_bytes


def refuse_unfit(target: Disk, disk: Disk, needed_bytes: int, *, detached: bool) -> None:
    """Raise MirrorIsTarget, DiskBusy or MirrorTooSmall where the disk cannot be a mirror, whatever it holds."""
    how = overlap(target, disk)
    if how:
        raise MirrorIsTarget(path=disk.path, target=target.path, how=how)
    refuse_busy(disk)
    if disk.size_bytes < needed_bytes:
        advice = "Give a larger disk."
        if not detached and disk.size_bytes >= needed_bytes - luks.INLINE_DATA_OFFSET_BYTES:
            advice = "Give a larger disk, or keep the LUKS2 header in a file of its own with --header FILE."
        raise MirrorTooSmall(
            path=disk.path,
            size_bytes=disk.size_bytes,
            needed_bytes=needed_bytes,
            short_bytes=needed_bytes - disk.size_bytes,
            advice=advice,
        )


def _refuse_content(disk: Disk) -> None:
    found = signatures(disk)
    if not found and holds_data(disk):
        found = ("data of an unknown kind",)
    if found:
        raise MirrorHoldsData(path=disk.path, found=" and ".join(found))


def _refuse_header(path: str, disks: tuple[Disk, ...], *, force: bool) -> None:
    if not os.path.lexists(path):
        return
    header = inspect(path)
    for disk in disks:
        how = overlap(header, disk)
        if how:
            raise HeaderIsDisk(path=path, disk=disk.path, how=how)
    if not force:
        raise HeaderExists(path=path)


def _refuse_changed(path: str, header_path: str | None, header: luks.Header) -> None:
    """Refuse a mirror that somebody else had until a moment ago, after its header was read."""
    if luks.read_header(header_path or path) != header:
        raise DiskChanged(path=path)


def _unlink_if_there(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
