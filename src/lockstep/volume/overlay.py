"""An opened mirror that can be written: what is written lands in a file over it, and the mirror is only read.

Theory
------
The file has a header, a map with one byte for each cluster, and room for the whole disk (docs/formats.md). It is
sparse: it takes the space of what was written. A cluster is

    MIRROR    as the mirror has it
    HERE      in the file, all of it
    ZERO      zeroes, stored nowhere

A write fills up the clusters of MIRROR and ZERO that it touches in part, once; from then on they are HERE, and are
written in place. To zero or to give up a whole cluster makes it ZERO, at once; the space that it took is used again
when it is written again.

What is in the file is encrypted like the mirror, with a key of its own: derived from the mirror's volume key and a
random salt. So the file is as useless to a thief as the mirror is, and comparing the two tells nothing but where was
written.

Order of durability. A flush takes a copy of the changed map, syncs the data, writes the copy, syncs it. So what the map
says was on the medium before. What was written since the last flush may be there or not after a crash, sector by
sector, as on any disk. A map page is 512 bytes, which a disk writes whole. Once a sync has failed, nobody knows what is
on the medium (the kernel forgets), so every later flush fails as well.

The overlay fits one mirror in one generation: a server gives its mirror a new one when it begins to write, and so do
those who re-key it, or put a copy of its header back, which no longer tells what was written since.

Every method may be called from any thread. Requests that overlap must take turns, over whole clusters (ranges.py): that
is the caller's business. Failures are OSErrors. Not handled: whoever can write the file can change it unnoticed, as
with the mirror.
"""

import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final, Self

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lockstep.crypto.cipher import XtsCipher
from lockstep.crypto.luks import CIPHER, Segment, wipe
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.lock import lock_exclusive
from lockstep.disk.probe import inspect, not_made, open_disk
from lockstep.disk.transfer import read_all, write_all
from lockstep.errors import DiskFailed, OverlayDamaged, OverlayOfAnother, OverlayUnfit
from lockstep.volume.files import sync_directory
from lockstep.volume.pages import BODY_BYTES, CRC, PAGE_BYTES, intact, sealed

VERSION: Final = 1
MAGIC: Final = b"LOCKSTEP-OVERLAY"
SALT_BYTES: Final = 32
KEY_PURPOSE: Final = b"lockstep overlay 1"
SMALLEST_CLUSTER_BYTES: Final = 4096
LARGEST_CLUSTER_BYTES: Final = 1 << 20
CLUSTERS_WANTED: Final = 1 << 24
DATA_ALIGNMENT_BYTES: Final = 1 << 20

MIRROR, HERE, ZERO = range(3)
_STATES: Final = [bytes([state]) for state in (MIRROR, HERE, ZERO)]
_ZEROES: Final = bytes(1 << 20)

# version, magic, LUKS UUID, generation, size, cluster size, data offset, salt
_HEADER: Final = Struct(f"<I16s16sQQQQ{SALT_BYTES}s")


@dataclass(frozen=True)
class Base:
    """What an overlay lies over."""

    luks_uuid: str
    generation: int
    size_bytes: int


def cluster_bytes(size_bytes: int) -> int:
    """Return the size of a cluster for a disk of `size_bytes`."""
    cluster = SMALLEST_CLUSTER_BYTES
    while cluster < LARGEST_CLUSTER_BYTES and size_bytes > cluster * CLUSTERS_WANTED:
        cluster *= 2
    return cluster


class OverlayFile:
    """The file of an overlay, locked for this process alone: its header and its map. Not yet the key to its data."""

    def __init__(self, path: str, fd: int, base: Base, salt: bytes, states: bytearray) -> None:
        self.path = path
        self.fd = fd
        self.base = base
        self.states = states
        self._salt = salt
        self._key = bytearray()

    @classmethod
    def make(cls, path: str, base: Base) -> None:
        """Make an empty overlay, durably, at an absolute path where nothing is yet. DiskFailed, DirectoryMissing."""
        cluster = cluster_bytes(base.size_bytes)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise not_made(path, error, "Making the overlay") from error
        try:
            write_all(fd, _header(base, os.urandom(SALT_BYTES)), 0)
            os.ftruncate(fd, _data_offset(base.size_bytes) + _clusters(base.size_bytes) * cluster)
            os.fsync(fd)
            sync_directory(path)
        except OSError as error:
            os.unlink(path)
            raise DiskFailed(path=path, doing="Making the overlay", reason=error.strerror or str(error)) from error
        finally:
            os.close(fd)

    @classmethod
    def claim(cls, path: str, base: Base) -> Self:
        """Open an overlay of `base`. Raises OverlayUnfit, OverlayOfAnother, OverlayDamaged, DiskLocked, DiskError."""
        disk = inspect(path)
        if disk.is_block:
            raise OverlayUnfit(path=path, reason="it is a block device")
        fd = open_disk(disk, writable=True)
        try:
            lock_exclusive(fd, disk)
            try:
                salt, states = _read_header(path, fd, base), _read_map(path, fd, base.size_bytes)
            except OSError as error:
                raise DiskFailed(path=path, doing="Reading", reason=error.strerror or str(error)) from error
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, base, salt, states)

    def unlock(self, volume_key: bytearray) -> None:
        """Derive the key of the data."""
        derivation = HKDF(algorithm=SHA256(), length=64, salt=self._salt, info=KEY_PURPOSE)
        self._key = bytearray(derivation.derive(volume_key))

    def data(self, sector_bytes: int, size_bytes: int) -> EncryptedDisk:
        """Return the room for the data, as a disk of its own, which owns the descriptor from now on."""
        segment = Segment(_data_offset(self.base.size_bytes), sector_bytes, 0, CIPHER, None)
        cipher = XtsCipher(self._key, sector_bytes)
        wipe(self._key)
        return EncryptedDisk(self.fd, segment, cipher, size_bytes)


class Overlay:
    """The disk that one sees: `mirror` below, a file over it."""

    def __init__(self, mirror: EncryptedDisk, file: OverlayFile) -> None:
        """Take over the file, which must be unlocked. The mirror remains its owner's, who closes it afterwards."""
        self.size_bytes = mirror.size_bytes
        self.sector_bytes = mirror.sector_bytes
        self.cluster_bytes = cluster_bytes(file.base.size_bytes)
        self._mirror = mirror
        self._fd = file.fd
        self._data = file.data(mirror.sector_bytes, mirror.size_bytes)
        self._states = file.states
        self._changed: set[int] = set()  # pages of the map
        self._written = False  # anything since the last flush
        self._noting = threading.Lock()  # held for moments
        self._flushing = threading.Lock()
        self._sync_failed: int | None = None
        self.failure: OSError | None = None  # the first, of the file: it does not have everything that was written

    def close(self) -> None:
        """Flush, and give up the file and its lock. Raises OSError; it is closed all the same."""
        try:
            self.flush()
        finally:
            self._data.close()

    # --- reading ---

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into`; whole sectors."""
        for at, count, state in self._runs(offset, len(into)):
            piece = into[at - offset : at - offset + count]
            if state == ZERO:
                piece[:] = bytes(count)
            else:
                (self._data if state == HERE else self._mirror).read(at, piece)

    def read_cached(self, offset: int, into: memoryview) -> bool:
        """Like `read`, or return False where that would wait, or takes more than one step."""
        (_, count, state), *others = self._runs(offset, len(into))
        if others:
            return False
        if state == ZERO:
            into[:] = bytes(count)
            return True
        return (self._data if state == HERE else self._mirror).read_cached(offset, into)

    def zeroes(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Split the range into (length, whether it is known to be zeroes)."""
        for _, count, state in self._runs(offset, length):
            yield count, state == ZERO

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Split the range into (offset, length, state), joining clusters of one state."""
        end = offset + length
        while offset < end:
            ahead = self._states[offset // self.cluster_bytes : (end - 1) // self.cluster_bytes + 1]
            state = ahead[0]
            same = len(ahead) - len(ahead.lstrip(_STATES[state]))
            stop = min((offset // self.cluster_bytes + same) * self.cluster_bytes, end)
            yield offset, stop - offset, state
            offset = stop

    # --- writing ---

    def write(self, offset: int, data: memoryview) -> None:
        """Write, at any offset and length."""
        end = offset + len(data)
        start = offset - offset % self._unit(offset)
        unit = self._unit(end - 1)
        stop = min(-(-end // unit) * unit, self.size_bytes)
        if (start, stop) != (offset, end):
            whole = memoryview(bytearray(stop - start))
            read_any(self, start, whole[: offset - start])
            read_any(self, end, whole[end - start :])
            whole[offset - start : end - start] = data
            data = whole
        try:
            self._data.write(start, data)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self._note(start, stop, HERE)

    def zero(self, offset: int, length: int, *, allocate: bool) -> None:
        """Have the range read as zeroes; `allocate` stores them."""
        end = offset + length
        first, last = self._whole(offset, length)
        if allocate or first >= last:
            self._write_zeroes(offset, end)
            return
        self._write_zeroes(offset, first)
        self._note(first, last, ZERO)
        self._write_zeroes(last, end)

    def trim(self, offset: int, length: int) -> None:
        """Give up the content of the whole clusters within the range; they read as zeroes."""
        first, last = self._whole(offset, length)
        if first < last:
            self._note(first, last, ZERO)

    def _write_zeroes(self, offset: int, end: int) -> None:
        for at in range(offset, end, len(_ZEROES)):
            self.write(at, memoryview(_ZEROES)[: min(len(_ZEROES), end - at)])

    def _unit(self, position: int) -> int:
        """What is written as a whole where `position` lies."""
        here = self._states[position // self.cluster_bytes] == HERE
        return self.sector_bytes if here else self.cluster_bytes

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        """The whole clusters within a range, from and to; the disk's last cluster may be short."""
        end = offset + length
        first = -(-offset // self.cluster_bytes) * self.cluster_bytes
        return first, end if end == self.size_bytes else end - end % self.cluster_bytes

    def _note(self, start: int, stop: int, state: int) -> None:
        first, last = start // self.cluster_bytes, (stop - 1) // self.cluster_bytes
        with self._noting:
            self._written = True
            if self._states.count(state, first, last + 1) != last + 1 - first:
                self._states[first : last + 1] = _STATES[state] * (last + 1 - first)
                self._changed.update(range(first // BODY_BYTES, last // BODY_BYTES + 1))

    # --- durability: see the order above ---

    def flush(self) -> None:
        """Make every completed write durable."""
        with self._flushing:
            with self._noting:
                written, self._written = self._written, False
                changed, self._changed = self._changed, set()
                pages = {page: self._page(page) for page in sorted(changed)}
            if not written and self._sync_failed is None:
                return
            try:
                self._sync()
                for page, content in pages.items():
                    write_all(self._fd, content, PAGE_BYTES * (1 + page))
                if pages:
                    self._sync()
            except BaseException as error:
                with self._noting:
                    self._written = True
                    self._changed |= changed
                if isinstance(error, OSError):
                    self.failure = self.failure or error
                raise

    def _sync(self) -> None:
        if self._sync_failed is not None:
            raise OSError(self._sync_failed, os.strerror(self._sync_failed))
        try:
            self._data.flush()
        except OSError as error:
            self._sync_failed = error.errno
            raise

    def _page(self, page: int) -> bytes:
        return sealed(bytes(self._states[page * BODY_BYTES : (page + 1) * BODY_BYTES]))


def read_any(disk: EncryptedDisk | Overlay, offset: int, into: memoryview) -> None:
    """Fill `into` from any offset, reading the whole sectors around it where need be."""
    if not into:
        return
    start = offset - offset % disk.sector_bytes
    length = -(-(offset + len(into)) // disk.sector_bytes) * disk.sector_bytes - start
    if (start, length) == (offset, len(into)):
        disk.read(offset, into)
    else:
        whole = memoryview(bytearray(length))
        disk.read(start, whole)
        into[:] = whole[offset - start :][: len(into)]


# --- the file -----------------------------------------------------------------------------------------------


def _clusters(size_bytes: int) -> int:
    return -(-size_bytes // cluster_bytes(size_bytes))


def _pages(size_bytes: int) -> int:
    return -(-_clusters(size_bytes) // BODY_BYTES)


def _data_offset(size_bytes: int) -> int:
    return -(-PAGE_BYTES * (1 + _pages(size_bytes)) // DATA_ALIGNMENT_BYTES) * DATA_ALIGNMENT_BYTES


def _header(base: Base, salt: bytes) -> bytes:
    size = base.size_bytes
    mirror = uuid.UUID(base.luks_uuid).bytes
    return sealed(
        _HEADER.pack(VERSION, MAGIC, mirror, base.generation, size, cluster_bytes(size), _data_offset(size), salt)
    )


def _read_header(path: str, fd: int, base: Base) -> bytes:
    """Return the salt of an overlay that fits."""
    page = os.pread(fd, PAGE_BYTES, 0)
    if len(page) < PAGE_BYTES or page[8:24] != MAGIC:
        raise OverlayUnfit(path=path, reason="it is something else")
    if not intact(page):
        raise OverlayDamaged(path=path, reason="the checksum of its header is wrong")
    version, _, mirror, generation, size_bytes, _, _, salt = _HEADER.unpack_from(page, CRC.size)
    if version != VERSION:
        raise OverlayUnfit(path=path, reason=f"it has version {version}, and this Lockstep knows {VERSION}")
    if mirror != uuid.UUID(base.luks_uuid).bytes:
        raise OverlayOfAnother(path=path, reason=f"it was made over the mirror {uuid.UUID(bytes=mirror)}")
    if generation != base.generation:
        raise OverlayOfAnother(path=path, reason="the mirror was written or re-keyed since, or its header was put back")
    if page != _header(base, salt):
        raise OverlayDamaged(path=path, reason=f"its header makes no sense for a disk of {size_bytes} bytes")
    return bytes(salt)


def _read_map(path: str, fd: int, size_bytes: int) -> bytearray:
    content = memoryview(bytearray(PAGE_BYTES * _pages(size_bytes)))
    read_all(fd, content, PAGE_BYTES)
    states = bytearray(_clusters(size_bytes))
    never_written = bytes(PAGE_BYTES)
    for page in range(_pages(size_bytes)):
        raw = bytes(content[PAGE_BYTES * page : PAGE_BYTES * (page + 1)])
        if raw == never_written:
            continue
        start = page * BODY_BYTES
        body = raw[CRC.size :][: len(states) - start]
        if not intact(raw) or max(body) > ZERO or any(raw[CRC.size + len(body) :]):
            raise OverlayDamaged(path=path, reason=f"page {page} of its map makes no sense")
        states[start : start + len(body)] = body
    return states
