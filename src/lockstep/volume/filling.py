"""A new target is filled from a mirror while clients go on: the reverse of a first copy.

Of each region one of the two disks has the truth. Rules:

1. What a missing region holds is what the mirror holds there, whatever is known of the mirror otherwise. Nobody writes
   to a missing region, on either disk, so that stays true; and no mirror is followed but the one that was left
   (`is_source`).
2. Whoever wants to read a region has it copied first. Whoever wants to write to it also waits until the record says,
   durably, that it is not missing any more: else a crash would bring the mirror's older content back, where the write
   was not the mirror's to have, or the mirror had failed. So does a resync, which overwrites what it was copied from:
   until then the target may lose it. From then on it is a region like any other.
3. A region is copied as a whole, while its range is held, and only where it is still missing then.
4. The record is cleared after the target was flushed (volume/missing.py). So a crash at any moment leaves regions
   missing that are there already, never the other way round; they are copied once more. So they are where the target
   fails a flush: what it had cached of them may be lost, and nobody has written there yet.
5. Until it is on record that nothing is missing, the target is not prompt: each request passes `WritePath._hold` or
   `ReadPath.read`. From then on the target is one like any other; a volume whose target was not replaced knows nothing
   of all this.

If the mirror cannot be read, regions that are there go on; for all others clients get the error, and `error` says why.
It is tried again until the mirror is back. A mirror that cannot be read in one place only is not given up: everything
else is copied, and that place is tried again and again. If the new target fails, reads are answered by the mirror.
"""

import asyncio
import contextlib
import errno
import logging
from array import array
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from lockstep.buffers import page_aligned
from lockstep.disk.plain import PlainDisk
from lockstep.disk.runs import WORDS, same
from lockstep.volume.link import MirrorLink
from lockstep.volume.pace import Pace
from lockstep.volume.pages import PagedBits
from lockstep.volume.progress import SyncProgress
from lockstep.volume.ranges import Extents, Ranges
from lockstep.volume.regions import region_bytes_for
from lockstep.volume.rounds import Rounds
from lockstep.volume.workers import Workers

log = logging.getLogger(__name__)

PIECE_BYTES: Final = 1 << 20
HANDS: Final = 3
SETTLE_BYTES: Final = 64 << 20
RETRY_S: Final = 0.5
RETRY_PLACES_S: Final = 30.0  # a disk takes its time over each place that it cannot read
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class UnreadableError(OSError):
    """A place of the mirror that cannot be read, while others can."""


class NewTarget(PlainDisk):
    """A target of which regions are missing: asked about those, it does not answer at once."""

    @property
    def region_bytes(self) -> int:
        """How large a region is."""
        return region_bytes_for(self.size_bytes)

    @property
    def left_bytes(self) -> int:
        """How much is missing."""
        total = self.missing.count(1) * self.region_bytes
        short = len(self.missing) * self.region_bytes - self.size_bytes
        return total - short if self.missing and self.missing[-1] else total

    @property
    def prompt(self) -> bool:
        """As of any disk, once nothing is missing, and the record says so."""
        return not self.missing and super().prompt

    def read_run(self, into: bytearray, run: "array[int]", count: int) -> int:
        """Read a run as far as it is there, without waiting; return how many of its reads, from the front."""
        if self.missing:
            each = range(count)
            count = next((at for at in each if self.lacks(run[WORDS * at], run[WORDS * at + 1])), count)
        return super().read_run(into, run, count)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Split the range into data and holes; where something is missing, all of it counts as data."""
        if self.lacks(offset, length):
            yield offset, length, True
        else:
            yield from super().extents(offset, length)

    def lacks(self, offset: int, length: int) -> bool:
        """Whether any of this range is missing."""
        return 1 in self.missing[self._part(offset, length)]

    def lacking(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The parts of this range, whole regions, that are missing: (offset, length)."""
        step = self.region_bytes
        part = self._part(offset, length)
        at, after = part.start, part.stop
        while (first := self.missing.find(1, at, after)) >= 0:
            found = self.missing.find(0, first, after)
            at = found if found >= 0 else after
            yield first * step, min(at * step, self.size_bytes) - first * step

    def arrived(self, offset: int, length: int) -> range:
        """Note that a range, whole regions, is there; return these."""
        part = self._part(offset, length)
        self.missing[part] = bytes(part.stop - part.start)
        return range(part.start, part.stop)

    def put(self, offset: int, data: memoryview) -> None:
        """Write what was missing; zeroes as a hole where that is possible."""
        if not same(data, bytes(len(data))):
            self.write(offset, data)
        else:
            self.zero(offset, len(data), allocate=False)

    def _part(self, offset: int, length: int) -> slice:
        step = self.region_bytes
        return slice(offset // step, min(-(-(offset + length) // step), len(self.missing)))


class Filling:
    """Fills one target. Offsets and lengths are bytes within it; failures are OSErrors."""

    def __init__(
        self,
        target: NewTarget,
        source: MirrorLink,
        ranges: Ranges,
        workers: Workers,
        flush: Callable[[], Awaitable[None]],
    ) -> None:
        """`workers` write the target; what is missing of it is known, and `record_in` says where that is recorded.

        `flush` is the clients': it makes the target durable, and says to `lose` where that fails. It may raise the
        OSError of an earlier one.
        """
        self.progress = SyncProgress(target.left_bytes)
        self.error: str | None = None  # why nothing more can be had from the mirror now
        self.requests = lambda: 0  # counts what clients ask
        self._target = target
        self._source = source
        self._ranges = ranges
        self._in_worker = workers.run
        self._flush = flush
        self._losses = 0  # how often the target has lost what it had cached
        self._record: PagedBits | None = None
        self._recorded = bytearray(target.missing)  # regions of which the record may still say that they are missing
        self._fresh: set[int] = set()  # those of them that are there
        self._settling = Rounds(self._settle_fresh)
        self._stopping = asyncio.Event()
        self._next = 0  # where the next hand looks first
        self._unreadable: set[int] = set()  # where missing regions begin that the mirror could not give
        self._readable: int | None = None  # where it was read last

    @property
    def missing(self) -> bytes:
        """Which regions are missing, a byte each."""
        return bytes(self._target.missing)

    def record_in(self, record: PagedBits) -> None:
        """Keep the record, which says what is missing now."""
        self._record = record

    def finish(self) -> None:
        """Have the target be one like any other: everything is there."""
        assert self.over
        self._target.missing = bytearray()

    def close(self) -> None:
        """Close the record."""
        if self._record is not None:
            self._record.close()

    # --- how it stands ---

    @property
    def left_bytes(self) -> int:
        """How much is missing."""
        return self._target.left_bytes

    def lacks(self, offset: int, length: int) -> bool:
        """Whether any of this range is missing."""
        return self._target.lacks(offset, length)

    @property
    def over(self) -> bool:
        """Whether everything is there, and the record says so."""
        return 1 not in self._target.missing and 1 not in self._recorded

    # --- for who reads and writes ---

    async def fetch(self, offset: int, length: int) -> None:
        """Return when all of this range can be read from the target. Raises OSError."""
        if self._target.lacks(offset, length):
            step = self._target.region_bytes
            start = offset // step * step
            end = min(-(-(offset + length) // step) * step, self._target.size_bytes)
            await self._copy(start, end - start)

    async def secure(self, extents: Extents) -> None:
        """Return when each [start, end) is there, and on record as that: rule 2. Raises OSError."""
        step = self._target.region_bytes
        for start, end in extents:
            await self.fetch(start, end - start)
            part = slice(start // step, -(-end // step))
            while 1 in self._recorded[part]:
                await self._settling.join()
                await self.fetch(start, end - start)  # the target may have lost it

    def lose(self) -> None:
        """The target has failed a flush: what was copied since the last one is missing again."""
        self._losses += 1
        for region in self._fresh:
            self._target.missing[region] = 1
        self._fresh.clear()

    # --- in the background ---

    def stop(self) -> None:
        """Have `run` return after the pieces that it is at."""
        self._stopping.set()

    async def run(self) -> None:
        """Copy everything that is missing, until `stop`; tries again where that fails."""
        while not (self.over or self._stopping.is_set()):
            try:
                hands = (self._copy_missing(number) for number in range(HANDS))
                for failure in await asyncio.gather(*hands, return_exceptions=True):
                    if failure is not None:
                        raise failure
                await self.settle()
                retry_s = RETRY_PLACES_S if self._unreadable else 0.0
            except OSError:  # `_copy` has said which, or the next write will
                retry_s = RETRY_S
            if retry_s:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), retry_s)

    async def settle(self) -> None:
        """Have the record say what is there by now. Raises OSError."""
        if self._record is not None and self._recorded.count(1) > self._target.missing.count(1):
            await self._settling.join()  # also where a round that is under way has taken all there is

    async def _copy_missing(self, number: int) -> None:
        """Copy stretch after stretch to the end; all hands but the first end theirs when clients are at work."""
        if number == 0:
            self._next = 0
        pace = Pace(self.requests, self._stopping)
        while not self._stopping.is_set() and not (number and pace.gives_way):
            rest = self._target.lacking(self._next, max(0, self._target.size_bytes - self._next))
            if (found := next(rest, None)) is None:
                return
            offset, length = found[0], min(found[1], max(PIECE_BYTES, self._target.region_bytes))
            self._next = offset + length
            pace.begin()
            try:
                await self._copy(offset, length)
            except UnreadableError:
                await self._copy_apart(offset, length)
            if len(self._fresh) * self._target.region_bytes >= SETTLE_BYTES:
                await self.settle()
            await pace.rest(length)

    async def _copy_apart(self, offset: int, length: int) -> None:
        """Copy what can be read of a range, whole regions, one by one. Raises OSError."""
        step = self._target.region_bytes
        for start in range(offset, offset + length, step) if length > step else ():
            with contextlib.suppress(UnreadableError):
                await self._copy(start, min(step, offset + length - start))

    async def _copy(self, offset: int, length: int) -> None:
        """Copy what is missing of a range, whole regions; what fails is noted. Raises OSError."""
        sector = self._source.sector_bytes
        async with self._ranges.hold([(offset, -(-(offset + length) // sector) * sector)]):
            for start, count in self._target.lacking(offset, length):
                try:
                    await self._copy_surely(start, count)
                except OSError as failure:
                    if isinstance(failure, UnreadableError):
                        self._unreadable.add(start)
                    self._note_failure(failure)
                    raise
                self._unreadable.difference_update(range(start, start + count, self._target.region_bytes))
                self._fresh.update(self._target.arrived(start, count))
                self.progress.note(count, self.left_bytes)
        if self.error is not None and not self._unreadable:
            log.info("the new target is being filled again")
            self.error = None

    async def _copy_surely(self, offset: int, length: int) -> None:
        """Copy it, once more where the target loses something meanwhile."""
        losses = -1
        while losses != self._losses:
            losses = self._losses
            await self._copy_pieces(offset, length)

    async def _copy_pieces(self, offset: int, length: int) -> None:
        sector = self._source.sector_bytes
        for start in range(offset, offset + length, PIECE_BYTES):
            count = min(PIECE_BYTES, offset + length - start)
            data = page_aligned(-(-count // sector) * sector)
            await self._read(start, data)
            try:
                await self._in_worker(self._target.put, start, data[:count])
            except OSError as failure:
                if failure.errno in FULL:
                    raise OSError(failure.errno, "the file system of the new target is full") from failure
                raise

    async def _read(self, offset: int, into: memoryview) -> None:
        """Read from the mirror. It is dropped if it cannot be read where it could be before, either."""
        sector = self._source.sector_bytes
        if await self._source.read(offset, into, keep=True):
            self._readable = offset
            return
        if self._source.error is None:
            elsewhere = self._source.end_bytes - sector if self._readable is None else self._readable
            await self._source.read(elsewhere, page_aligned(sector), from_medium=True)
        if self._source.error is None:
            raise UnreadableError(errno.EIO, f"the mirror {self._source.path} cannot be read in places")
        raise OSError(errno.EIO, f"the mirror {self._source.path} cannot be read: {self._source.error}")

    def _note_failure(self, failure: OSError) -> None:
        error = f"the new target cannot be filled: {failure.strerror or failure}"
        if error != self.error:
            self.error = error
            if failure.errno in FULL:
                log.error("%s. What is missing is read from the mirror, and cannot be written. Make room there.", error)
            else:
                log.error("%s. What is missing can be neither read nor written until that works again.", error)

    async def _settle_fresh(self) -> None:
        """One round: rule 4."""
        assert self._record is not None
        fresh, losses = set(self._fresh), self._losses
        with contextlib.suppress(OSError):
            await self._flush()
        if self._losses != losses:
            raise OSError(errno.EIO, "the target failed to make durable what was written to it")
        self._fresh -= fresh
        try:
            await self._record.clear(fresh)
        except OSError:
            self._fresh |= fresh
            raise
        for region in fresh:
            self._recorded[region] = 0
