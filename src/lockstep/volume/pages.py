"""Bits on disk, in pages that are each written whole: what the records of a mirror's differences are made of.

A file is one header page, which belongs to its owner, and then the bits, little-endian, in pages of 512 bytes, the unit
that a disk writes whole:

    offset  bytes
    0       4      CRC-32 of the rest of the page
    4       508    one bit each, the lowest bit of the first byte first

Whoever waits for a bit to be durable shares one write and one sync with all others who wait (`Rounds`).
"""

import contextlib
import errno
import os
import threading
import zlib
from collections.abc import Awaitable, Callable, Iterable
from struct import Struct
from typing import Final

from lockstep.volume.files import rename, sync_directory
from lockstep.volume.rounds import Rounds

PAGE_BYTES: Final = 512
CRC: Final = Struct("<I")
BODY_BYTES: Final = PAGE_BYTES - CRC.size
PAGE_BITS: Final = BODY_BYTES * 8

# A state as a digit, and back: the interpreter turns long binary numbers into digits quickly, a million in a moment.
# Mostly there is not a single one among them, and to find that out takes no time at all.
_AS_DIGITS: Final = bytes.maketrans(b"\0\1", b"01")
_AS_STATES: Final = bytes.maketrans(b"01", b"\0\1")


def spread(bits: bytes | bytearray) -> bytes:
    """Return a byte, 0 or 1, for each bit, the lowest bit of the first byte first."""
    if not bits.strip(b"\0"):
        return bytes(8 * len(bits))
    digits = f"{int.from_bytes(bits, 'little'):0{8 * len(bits)}b}"[::-1]
    return digits.encode().translate(_AS_STATES)


def gather(states: bytes | bytearray) -> bytes:
    """Return the inverse of `spread`; the number of `states` is a multiple of eight."""
    if 1 not in states:
        return bytes(len(states) // 8)
    return int(states[::-1].translate(_AS_DIGITS), 2).to_bytes(len(states) // 8, "little")


def union(one: bytes | bytearray, other: bytes | bytearray) -> bytes:
    """Return the states that are 1 in either of two of the same length."""
    if 1 not in other:
        return bytes(one)
    return (int.from_bytes(one, "little") | int.from_bytes(other, "little")).to_bytes(len(one), "little")


def without(one: bytes | bytearray, other: bytes | bytearray) -> bytes:
    """Return the states that are 1 in the first of two of the same length, and not in the other."""
    if 1 not in other:
        return bytes(one)
    return (int.from_bytes(one, "little") & ~int.from_bytes(other, "little")).to_bytes(len(one), "little")


def sealed(body: bytes) -> bytes:
    """Return a page with its checksum; `body` is at most BODY_BYTES long."""
    body = body.ljust(BODY_BYTES, b"\0")
    return CRC.pack(zlib.crc32(body)) + body


def intact(page: bytes) -> bool:
    """Whether a page is whole and its checksum right."""
    return len(page) == PAGE_BYTES and page == sealed(page[CRC.size :])


def unpack(content: bytes, count: int) -> tuple[bytearray, list[int]]:
    """Return `count` bits of a file's content, a byte each, and the numbers of the pages that are damaged.

    The bits of a damaged or missing page are ones.
    """
    states, damaged = bytearray(), []
    for number in range(1, 2 + (count - 1) // PAGE_BITS):
        page = content[PAGE_BYTES * number : PAGE_BYTES * (number + 1)]
        if intact(page):
            states += spread(page[CRC.size :])
        else:
            damaged.append(number)
            states += b"\1" * PAGE_BITS
    return states[:count], damaged


class PagedBits:
    """`count` bits in a file. Calls come from the loop's thread, but for those of its life, which block."""

    def __init__(self, path: str, count: int, in_worker: Callable[..., Awaitable[None]]) -> None:
        """Nothing is on disk before `create`; `in_worker` runs a blocking function with its arguments."""
        self.durable = bytearray(count)  # what the file is known to say, a byte each
        self._path = path
        self._in_worker = in_worker
        self._bits = bytearray(-(-count // PAGE_BITS) * BODY_BYTES)  # what the file shall say
        self._pages: set[int] = set()  # pages whose bits have changed
        self._marks: set[int] = set()  # bits that become durable with them
        self._rounds = Rounds(self._write_changes)
        self._fd = -1
        # Who writes and syncs is alone with the file: the kernel tells only one of two syncs what it could not write
        # out; and a page that is changed while it is written out may be torn on the medium until the next sync.
        self._alone = threading.Lock()

    # --- life ---

    def create(self, header: bytes, states: bytes | bytearray) -> None:
        """Write the whole file anew, durably, in place of the old one: `header`, a page, and a bit for each byte."""
        padded = bytes(states).ljust(len(self._bits) * 8, b"\0")
        self._bits[:] = gather(padded)
        body = b"".join(self._page(page) for page in range(len(self._bits) // BODY_BYTES))
        temporary = self._path + ".new"
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write(fd, header + body, 0)
            os.fsync(fd)
            rename(temporary, self._path)
        except BaseException:
            os.close(fd)
            raise
        with self._alone:
            self.close()
            self._fd = fd
        self.durable[:] = states

    def write_header(self, header: bytes) -> None:
        """Replace the header, durably."""
        with self._alone:
            write_header(self._fd, header)

    def discard(self) -> None:
        """Take the file away, durably."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        sync_directory(self._path)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # --- bits ---

    def marked(self) -> bytes:
        """Which bits are set, or are about to be, a byte each."""
        count = len(self.durable)
        return union(spread(self._bits)[:count], self.durable)

    def halves(self, second: int) -> tuple[bytes, bytes]:
        """The bits themselves, as the file shall have them; the other half begins at the `second`, a whole page."""
        return bytes(self._bits[: second // 8]), bytes(self._bits[second // 8 :])

    async def mark(self, numbers: Iterable[int]) -> None:
        """Set bits, and return when the file says so, unless they were cleared meanwhile. Raises OSError."""
        for number in numbers:
            if not self.durable[number]:
                self._bits[number >> 3] |= 1 << (number & 7)
                self._pages.add(number // PAGE_BITS)
                self._marks.add(number)
        await self._rounds.join()

    def unmark(self, numbers: Iterable[int]) -> None:
        """Take back marks that could not be made durable; who waits for them marks again."""
        for number in numbers:
            if not self.durable[number]:
                self._bits[number >> 3] &= ~(1 << (number & 7))

    async def clear(self, numbers: Iterable[int]) -> None:
        """Clear bits; they count as cleared at once, unless somebody marks them meanwhile. Raises OSError."""
        for number in numbers:
            self.durable[number] = 0
            self._bits[number >> 3] &= ~(1 << (number & 7))
            self._pages.add(number // PAGE_BITS)
        if self._pages:
            await self._rounds.join()

    async def clear_all(self, states: bytes) -> None:
        """Like `clear`, of all that are 1: any number of them takes no time."""
        gone = int.from_bytes(gather(states.ljust(len(self._bits) * 8, b"\0")), "little")
        self._bits[:] = (int.from_bytes(self._bits, "little") & ~gone).to_bytes(len(self._bits), "little")
        self.durable[:] = without(self.durable, states)
        pages = range(len(self._bits) // BODY_BYTES)
        self._pages.update(page for page in pages if 1 in states[page * PAGE_BITS : (page + 1) * PAGE_BITS])
        if self._pages:
            await self._rounds.join()

    # --- pages ---

    async def _write_changes(self) -> None:
        """One round: write the changed pages, sync once, and then rely on the marks in them."""
        pages, self._pages = self._pages, set()
        marks = {number for number in self._marks if self._bits[number >> 3] >> (number & 7) & 1}  # not taken back
        self._marks = set()
        try:
            await self._in_worker(self._write_pages, {page: self._page(page) for page in sorted(pages)})
        except BaseException:
            self._pages |= pages
            self._marks |= marks
            raise
        for number in marks:
            if self._bits[number >> 3] >> (number & 7) & 1:  # not cleared meanwhile
                self.durable[number] = 1

    def _write_pages(self, pages: dict[int, bytes]) -> None:
        with self._alone:
            for page, content in pages.items():
                _write(self._fd, content, PAGE_BYTES * (1 + page))
            os.fdatasync(self._fd)

    def _page(self, page: int) -> bytes:
        return sealed(bytes(self._bits[page * BODY_BYTES : (page + 1) * BODY_BYTES]))


def write_header(fd: int, header: bytes) -> None:
    """Replace the header of a file of such pages, durably. Raises OSError."""
    _write(fd, header, 0)
    os.fdatasync(fd)


def _write(fd: int, data: bytes, offset: int) -> None:
    written = os.pwrite(fd, data, offset)
    if written != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
