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
   never an error, and never silent. What such a bitmap marks is where the two differed once: where they were equal,
   they are compared before all of it is copied (spot_check.py).

On disk, the bits follow the header in pages as `pages.py` has them, one for each region. The header, little-endian:

    offset  bytes
    0       4      CRC-32 of the rest of the page
    4       4      version, 1
    8       16     magic "LOCKSTEP-INTENT\0"
    24      16     volume id (UUID)
    40      16     LUKS UUID of the mirror
    56      8      generation: the number that the mirror's token carries; 0 if it fits no mirror
    64      8      the generation that is being given to the token, or the same one
    72      8      when the target file was last written, in ns since 1970, when it was closed in order;
                   0 while it is served, and for a block device, which does not tell;
                   1 if it was found to be written later than that, and the mirror has not been back since;
                   2 if earlier, likewise
    80      8      size of the target in bytes
    88      8      region size in bytes
    96      416    zeroes

A page whose checksum is wrong (damaged, or torn in spite of its size) marks all of its regions.
"""

import asyncio
import contextlib
import logging
import os
import uuid
from array import array
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from lockstep.disk.runs import covered, run_of
from lockstep.volume import pages
from lockstep.volume.pages import PAGE_BYTES, PagedBits
from lockstep.volume.regions import region_bytes_for

log = logging.getLogger(__name__)

GROUP_REGIONS: Final = 16
VERSION: Final = 1
NO_MIRROR: Final = (0, 0)
"""Generations that no mirror has."""
WRITTEN: Final = 1
PUT_BACK: Final = 2
"""No file's times: the target was written after it was closed, or is from before that."""

_MAGIC: Final = b"LOCKSTEP-INTENT\0"
_HEADER: Final = Struct("<I16s16s16sQQQQQ")
_GENERATIONS: Final = Struct("<QQQ")  # the part of it that a reader does not know beforehand
_GENERATIONS_AT: Final = 56

_GROUP_SHIFT: Final = GROUP_REGIONS.bit_length() - 1
_WHOLE_GROUP: Final = (bytes(GROUP_REGIONS), b"\1" * GROUP_REGIONS)


@dataclass(frozen=True)
class Identity:
    """Whose bitmap it is. `size_bytes` is the target's."""

    volume_id: str
    luks_uuid: str
    size_bytes: int

    @property
    def regions(self) -> int:
        """How many regions there are."""
        return -(-self.size_bytes // region_bytes_for(self.size_bytes))


@dataclass(frozen=True)
class Loaded:
    """What a bitmap says: `fits` is false when there is none of this mirror as it is, and then everything is marked."""

    marked: bytearray  # a byte for each region
    fits: bool
    generations: tuple[int, int] | None = None  # those of the mirror, now and soon, if it is of the mirror as it is
    left: bytearray | None = None  # what is marked in one that does not fit
    named: tuple[int, int] = NO_MIRROR  # the generations that it names, whether it fits or not
    changed: int = 0  # what has become of the target since it was closed: WRITTEN, PUT_BACK

    @property
    def of_mirror(self) -> bool:
        """Whether it is of the mirror as it is, though the target may have been written since."""
        return self.generations is not None


def load(path: str, identity: Identity, generation: int | None, written_ns: int | None) -> Loaded:
    """Read the bitmap at `path`.

    It has to fit the mirror's `generation`, and if it was closed in order, when the target was last written. None
    stands for whichever it is: the mirror is away, or the target is.
    """
    count = identity.regions
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        content = b""
    except OSError as failure:
        log.warning("the intent bitmap %s cannot be read (%s): everything counts as different", path, failure)
        content = b""
    said = _said(content[:PAGE_BYTES], identity)
    if said is None:
        return Loaded(bytearray(b"\1" * count), fits=False)
    marked, damaged = pages.unpack(content, count)
    for number in damaged:
        log.warning("page %d of the intent bitmap %s is damaged: it counts as marked", number, path)
    now, soon, closed_ns = said
    generations = _fitting((now, soon), generation)
    changed = closed_ns if closed_ns in (WRITTEN, PUT_BACK) else 0
    if not changed and written_ns is not None and closed_ns not in (0, written_ns):
        changed = WRITTEN if written_ns > closed_ns else PUT_BACK
    if generations is None or changed:
        return Loaded(bytearray(b"\1" * count), False, generations, marked, (now, soon), changed)
    return Loaded(marked, True, generations, named=(now, soon))


def doubt(path: str, identity: Identity) -> None:
    """Have everything differ, durably, by the word of somebody who knows. Raises OSError."""
    bitmap = IntentBitmap(path, identity, asyncio.to_thread)
    try:
        bitmap.claim(*NO_MIRROR, b"\1" * identity.regions)
    finally:
        bitmap.close()


def renew(path: str, identity: Identity, generation: int, following: int, give: Callable[[], None]) -> None:
    """Call `give`, which gives a mirror that nobody serves `following` in place of `generation`.

    If the bitmap at `path` fits it, it still does afterwards, and at every moment meanwhile. Raises OSError.
    """
    with contextlib.ExitStack() as stack:
        fd = None
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
        head = os.pread(fd, PAGE_BYTES, 0) if fd is not None else b""
        said = _said(head, identity)
        if fd is None or said is None or _fitting(said[:2], generation) is None:
            give()
            return
        *_, written_ns = said
        pages.write_header(fd, _header(identity, generation, following, written_ns))
        give()
        pages.write_header(fd, _header(identity, following, following, written_ns))


class IntentBitmap:
    """The bitmap of a mirror that is being served. Calls come from the loop's thread, but for those of its life.

    Regions are marked and cleared by groups: who writes to one region soon writes to its neighbours, and a group costs
    one wait instead of many.
    """

    def __init__(self, path: str, identity: Identity, in_worker: Callable[..., Awaitable[None]]) -> None:
        """Nothing is on disk before `claim`; `in_worker` runs a blocking function with its arguments."""
        region_bytes = region_bytes_for(identity.size_bytes)
        self._identity = identity
        self._shift = region_bytes.bit_length() - 1
        self._count = -(-identity.size_bytes // region_bytes)
        self._pages = PagedBits(path, self._count, in_worker)
        self._durable = self._pages.durable
        self._touched = bytearray(-(-self._count // GROUP_REGIONS))  # groups that somebody asked to write lately

    # --- life ---

    def claim(self, generation: int, following: int, marked: bytes | bytearray, written_ns: int = 0) -> None:
        """Write the whole bitmap anew, durably: its mirror has `generation`, and is about to be given `following`.

        `written_ns`: at an orderly end, when the target was written; or what has become of it.
        """
        self._pages.create(_header(self._identity, generation, following, written_ns), marked)

    def advance(self, generation: int, following: int, written_ns: int = 0) -> None:
        """Note, durably, that the mirror has `generation` and is about to be given `following`."""
        self._pages.write_header(_header(self._identity, generation, following, written_ns))

    def settle(self, generation: int, written_ns: int = 0) -> None:
        """Note, durably, that the mirror was given `generation`."""
        self._pages.write_header(_header(self._identity, generation, generation, written_ns))

    def discard(self) -> None:
        """Take the bitmap away, durably: everything counts as different from here on, and nothing need be marked."""
        self._pages.discard()
        self.ignore()

    def ignore(self) -> None:
        """Mark nothing any more: the bitmap does not count, since the mirror has another generation."""
        self._durable[:] = b"\1" * self._count

    def marked(self) -> bytes:
        """Which regions are marked, or are about to be, a byte each."""
        return self._pages.marked()

    def close(self) -> None:
        """Close the file."""
        self._pages.close()

    # --- marking ---

    def covers(self, start: int, end: int) -> bool:
        """Whether [start, end) may be written without waiting; the caller does so at once, or asks again."""
        return self.covers_run(run_of(start, end - start), 1) == 1

    def covers_run(self, run: "array[int]", count: int) -> int:
        """How many writes of a run, from the front, may be written without waiting; as for `covers`."""
        return covered(run, count, self._durable, self._touched, self._shift, _GROUP_SHIFT)

    async def mark(self, extents: Iterable[tuple[int, int]]) -> None:
        """Return when each [start, end), not empty, is marked durably. Raises OSError when it cannot be."""
        while missing := [extent for extent in extents if not self.covers(*extent)]:
            groups = {
                group
                for start, end in missing
                for group in range(
                    (start >> self._shift) // GROUP_REGIONS, ((end - 1) >> self._shift) // GROUP_REGIONS + 1
                )
            }
            regions = (range(group * GROUP_REGIONS, (group + 1) * GROUP_REGIONS) for group in groups)
            await self._pages.mark(region for each in regions for region in each if region < self._count)

    # --- clearing ---

    def idle(self) -> bytes:
        """Return the marked regions, a byte each, in groups to which nobody asked to write since the last call."""
        left = pages.without(self._durable, self._asked_for())
        self._touched[:] = bytes(len(self._touched))
        return left

    async def clear(self, regions: bytes) -> None:
        """Clear those of `regions` that nobody has asked to write since `idle`; the caller knows them to be equal."""
        await self._pages.clear_all(pages.without(regions, self._asked_for()))

    def _asked_for(self) -> bytes:
        """The regions, a byte each, in groups to which somebody asked to write."""
        return b"".join(map(_WHOLE_GROUP.__getitem__, self._touched))[: self._count]


def _said(header: bytes, identity: Identity) -> tuple[int, int, int] | None:
    """Both generations, and when the target was written, of a header that is whole, and of this mirror."""
    if len(header) != PAGE_BYTES:
        return None
    given, following, written_ns = _GENERATIONS.unpack_from(header, _GENERATIONS_AT)
    whole = header == _header(identity, given, following, written_ns)
    return (given, following, written_ns) if whole else None


def _fitting(given: Sequence[int], generation: int | None) -> tuple[int, int] | None:
    """The generations that a header gives, if it is of this generation, or on the way to or from it."""
    now, soon = given
    return (now, soon) if (now, soon) != NO_MIRROR and generation in (None, now, soon) else None


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
    return pages.sealed(fields)
