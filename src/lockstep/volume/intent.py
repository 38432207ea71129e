r"""The write-intent bitmap: where a mirror may differ from its target, on disk, whatever happens.

Rules:

1. A region's bit is durable before either disk is written there. So after a crash every region in which
   the two may differ is marked, and only those are copied.
2. A bit is cleared only when the region is equal on both disks, both have been flushed since it was last written,
   nobody is writing there, and the mirror has been given a new generation since: so a copy of the mirror from before
   the clearing is never taken for the mirror. Clearing need not be durable: a bit too many costs a copy, no data.
3. A region that is written again and again stays marked. So steady work inside a hot set costs no metadata write:
   the fast path only looks whether the bit is set.
4. Whoever must wait for a bit shares one write and one sync with all others who wait (`Rounds`).
5. A bitmap that is missing, damaged, of another mirror, of another generation, or newer than this program means:
   everything is marked. So does one that was closed in order when the target file has been written since. It is
   never an error, and never silent.

On disk, little-endian, in pages of 512 bytes, the unit that a disk writes whole:

    page 0      offset  bytes
                0       4      CRC-32 of the rest of the page
                4       4      version, 1
                8       16     magic "LOCKSTEP-INTENT\\0"
                24      16     volume id (UUID)
                40      16     LUKS UUID of the mirror
                56      8      generation: the number that the mirror's token carries
                64      8      the generation that is being given to the token, or the same one
                72      8      when the target file was last written, in ns since 1970, when it was closed in order;
                               0 while it is served, and for a block device, which does not tell
                80      8      size of the target in bytes
                88      8      region size in bytes
                96      416    zeroes
    page 1...   0       4      CRC-32 of the rest of the page
                4       508    one bit per region, 1 for marked, the lowest bit of the first byte first

A page whose checksum is wrong (damaged, or torn in spite of its size) marks all of its regions.
"""

import contextlib
import errno
import logging
import os
import uuid
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from struct import Struct
from typing import Final

from lockstep.volume.regions import region_bytes_for
from lockstep.volume.rounds import Rounds

log = logging.getLogger(__name__)

PAGE_BYTES: Final = 512
PAGE_REGIONS: Final = (PAGE_BYTES - 4) * 8
GROUP_REGIONS: Final = 16
VERSION: Final = 1

_MAGIC: Final = b"LOCKSTEP-INTENT\0"
_CRC: Final = Struct("<I")
_HEADER: Final = Struct("<I16s16s16sQQQQQ")
_GENERATIONS: Final = Struct("<QQQ")  # the part of it that a reader does not know beforehand
_GENERATIONS_AT: Final = 56
_BODY_BYTES: Final = PAGE_BYTES - _CRC.size

# Byte -> its eight bits, a byte each, and back.
_SPREAD: Final = [bytes(value >> bit & 1 for bit in range(8)) for value in range(256)]
_GATHER: Final = {spread: value for value, spread in enumerate(_SPREAD)}
_WHOLE_GROUP: Final = (bytes(GROUP_REGIONS), b"\1" * GROUP_REGIONS)


@dataclass(frozen=True)
class Identity:
    """Whose bitmap it is. `size_bytes` is the target's."""

    volume_id: str
    luks_uuid: str
    size_bytes: int


def load(path: str, identity: Identity, generation: int, written_ns: int) -> bytearray:
    """Return which regions are marked, a byte each; all of them when there is no bitmap that fits.

    It has to fit the mirror's `generation`, and if it was closed in order, when the target was last written.
    """
    count = -(-identity.size_bytes // region_bytes_for(identity.size_bytes))
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        content = b""
    except OSError as failure:
        log.warning("the intent bitmap %s cannot be read (%s): everything counts as different", path, failure)
        content = b""
    header = content[:PAGE_BYTES]
    if not _fits(header, identity, generation, written_ns):
        return bytearray(b"\1" * count)
    marked = bytearray()
    for position in range(PAGE_BYTES, PAGE_BYTES * (1 + -(-count // PAGE_REGIONS)), PAGE_BYTES):
        page = content[position : position + PAGE_BYTES]
        if len(page) == PAGE_BYTES and page == _sealed(page[_CRC.size :]):
            marked += b"".join(map(_SPREAD.__getitem__, page[_CRC.size :]))
        else:
            log.warning("page %d of the intent bitmap %s is damaged: it counts as marked", position // PAGE_BYTES, path)
            marked += b"\1" * PAGE_REGIONS
    return marked[:count]


class IntentBitmap:
    """The bitmap of a mirror that is being served. Calls come from the loop's thread, but for those of its life.

    Regions are marked and cleared by groups: who writes to one region soon writes to its neighbours, and a group costs
    one wait instead of many.
    """

    def __init__(self, path: str, identity: Identity, in_worker: Callable[..., Awaitable[None]]) -> None:
        """Nothing is on disk before `claim`; `in_worker` runs a blocking function with its arguments."""
        region_bytes = region_bytes_for(identity.size_bytes)
        self._path = path
        self._identity = identity
        self._in_worker = in_worker
        self._shift = region_bytes.bit_length() - 1
        self._count = -(-identity.size_bytes // region_bytes)
        self._bits = bytearray(-(-self._count // PAGE_REGIONS) * _BODY_BYTES)  # what the file shall say
        self._durable = bytearray(self._count)  # what it is known to say, a byte each
        self._touched = bytearray(-(-self._count // GROUP_REGIONS))  # groups that somebody asked to write lately
        self._pages: set[int] = set()  # pages whose bits have changed
        self._marks: set[int] = set()  # regions that become durable with them
        self._rounds = Rounds(self._write_changes)
        self._fd = -1

    # --- life ---

    def claim(self, generation: int, following: int, marked: bytes | bytearray) -> None:
        """Write the whole bitmap anew, durably: its mirror has `generation`, and is about to be given `following`."""
        states = bytes(marked).ljust(len(self._bits) * 8, b"\0")
        self._bits[:] = bytes(_GATHER[states[at : at + 8]] for at in range(0, len(states), 8))
        body = b"".join(self._page(page) for page in range(len(self._bits) // _BODY_BYTES))
        temporary = self._path + ".new"
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write(fd, _header(self._identity, generation, following, 0) + body, 0)
            os.fsync(fd)
            os.replace(temporary, self._path)
            _sync_directory(self._path)
        except BaseException:
            os.close(fd)
            raise
        self.close()
        self._fd = fd
        self._durable[:] = marked

    def advance(self, generation: int, following: int) -> None:
        """Note, durably, that the mirror has `generation` and is about to be given `following`."""
        self._write_header(generation, following, 0)

    def settle(self, generation: int, written_ns: int = 0) -> None:
        """Note, durably, that the mirror was given `generation`; and at an orderly end, when the target was written."""
        self._write_header(generation, generation, written_ns)

    def discard(self) -> None:
        """Take the bitmap away, durably: everything counts as different from here on, and nothing need be marked."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        _sync_directory(self._path)
        self.ignore()

    def ignore(self) -> None:
        """Mark nothing any more: the bitmap does not count, since the mirror has another generation."""
        self._durable[:] = b"\1" * self._count

    def marked(self) -> bytes:
        """Which regions are marked, or are about to be, a byte each."""
        wanted = int.from_bytes(b"".join(map(_SPREAD.__getitem__, self._bits))[: self._count], "little")
        return (wanted | int.from_bytes(self._durable, "little")).to_bytes(self._count, "little")

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # --- marking ---

    def covers(self, start: int, end: int) -> bool:
        """Whether [start, end) may be written without waiting; the caller does so at once, or asks again."""
        first, last = start >> self._shift, (end - 1) >> self._shift
        self._touched[first // GROUP_REGIONS] = 1
        if first == last:
            return self._durable[first] == 1
        for group in range(first // GROUP_REGIONS, last // GROUP_REGIONS + 1):
            self._touched[group] = 1
        return 0 not in self._durable[first : last + 1]

    async def mark(self, start: int, end: int) -> None:
        """Return when [start, end), not empty, is marked durably. Raises OSError when it cannot be."""
        while not self.covers(start, end):
            first = (start >> self._shift) // GROUP_REGIONS * GROUP_REGIONS
            last = min((((end - 1) >> self._shift) // GROUP_REGIONS + 1) * GROUP_REGIONS, self._count)
            for region in range(first, last):
                if not self._durable[region]:
                    self._set(region, marked=True)
                    self._marks.add(region)
            await self._rounds.join()

    # --- clearing ---

    def idle(self) -> list[int]:
        """Return the marked regions in groups to which nobody asked to write since the last call."""
        touched, self._touched = self._touched, bytearray(len(self._touched))
        spread = b"".join(map(_WHOLE_GROUP.__getitem__, touched))[: self._count]
        left = int.from_bytes(self._durable, "little") & ~int.from_bytes(spread, "little")
        return _positions(left.to_bytes(self._count, "little"))

    async def clear(self, regions: list[int]) -> None:
        """Clear those of `regions` that nobody has asked to write since `idle`; the caller knows them to be equal."""
        for region in regions:
            if not self._touched[region // GROUP_REGIONS]:
                self._durable[region] = 0
                self._set(region, marked=False)
        if self._pages:
            await self._rounds.join()

    # --- pages ---

    def _write_header(self, generation: int, following: int, written_ns: int) -> None:
        _write(self._fd, _header(self._identity, generation, following, written_ns), 0)
        os.fdatasync(self._fd)

    def _set(self, region: int, *, marked: bool) -> None:
        if marked:
            self._bits[region >> 3] |= 1 << (region & 7)
        else:
            self._bits[region >> 3] &= ~(1 << (region & 7))
        self._pages.add(region // PAGE_REGIONS)

    async def _write_changes(self) -> None:
        """One round: write the changed pages, sync once, and then rely on the marks in them."""
        pages, self._pages = self._pages, set()
        marks, self._marks = self._marks, set()
        try:
            await self._in_worker(self._write_pages, {page: self._page(page) for page in sorted(pages)})
        except BaseException:
            self._pages |= pages
            self._marks |= marks
            raise
        for region in marks:
            if self._bits[region >> 3] >> (region & 7) & 1:  # not cleared meanwhile
                self._durable[region] = 1

    def _write_pages(self, pages: dict[int, bytes]) -> None:
        for page, content in pages.items():
            _write(self._fd, content, PAGE_BYTES * (1 + page))
        os.fdatasync(self._fd)

    def _page(self, page: int) -> bytes:
        return _sealed(bytes(self._bits[page * _BODY_BYTES : (page + 1) * _BODY_BYTES]))


def _positions(states: bytes) -> list[int]:
    """Where the ones are."""
    found, at = [], states.find(1)
    while at >= 0:
        found.append(at)
        at = states.find(1, at + 1)
    return found


def _fits(header: bytes, identity: Identity, generation: int, written_ns: int) -> bool:
    """Whether a header is whole, of this mirror, and of this generation or on the way to or from it."""
    if len(header) != PAGE_BYTES:
        return False
    given, following, written = _GENERATIONS.unpack_from(header, _GENERATIONS_AT)
    return (
        header == _header(identity, given, following, written)
        and generation in (given, following)
        and written in (0, written_ns)
    )


def _header(identity: Identity, generation: int, following: int, written_ns: int) -> bytes:
    fields = _HEADER.pack(
        VERSION,
        _MAGIC,
        uuid.UUID(identity.volume_id).bytes,
        uuid.UUID(identity.luks_uuid).bytes,
        generation,
        following,
        written_ns,
        identity.size_bytes,
        region_bytes_for(identity.size_bytes),
    )
    return _sealed(fields.ljust(PAGE_BYTES - _CRC.size, b"\0"))


def _sealed(body: bytes) -> bytes:
    return _CRC.pack(zlib.crc32(body)) + body


def _write(fd: int, data: bytes, offset: int) -> None:
    written = os.pwrite(fd, data, offset)
    if written != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
