"""Verify: compare a mirror with its target while clients go on, and say where they differ.

A piece is compared while its range is held, so nobody writes there meanwhile and there are no false alarms. Regions
that are known to differ (dirty, or held), or that a new target still lacks, are left out: nothing new would be said of
them. The mirror is read from its medium, as far as it was flushed; the target as its clients see it.

A difference is one that nothing accounts for: the mirror lost or changed something, or the target did. With `repair` it
is marked, durably, and then copied like any other.
"""

import asyncio
import bisect
import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from lockstep.buffers import page_aligned
from lockstep.disk.runs import run_of, same
from lockstep.volume.link import MirrorLink
from lockstep.volume.pace import LARGEST_PIECE_BYTES, Pace
from lockstep.volume.workers import Workers
from lockstep.volume.write_path import WritePath

log = logging.getLogger(__name__)

HANDS: Final = 3
UNCACHE_BYTES: Final = 64 << 20  # how much of the mirror is in the page cache at most: nobody reads it again


@dataclass
class Comparison:
    """How far a comparison is, and what it has found. Bytes."""

    total_bytes: int
    done_bytes: int = 0
    compared_bytes: int = 0
    left_out_bytes: int = 0  # known to differ
    mismatches: list[tuple[int, int]] = field(default_factory=list)  # (offset, length), in order, adjacent ones joined
    repaired_bytes: int = 0
    error: str | None = None  # why it ended early

    def differ(self, offset: int, length: int) -> None:
        """Note a difference."""
        end = offset + length
        first = bisect.bisect_left(self.mismatches, (offset, 0))
        if first and sum(self.mismatches[first - 1]) >= offset:
            first -= 1
        after = first
        while after < len(self.mismatches) and self.mismatches[after][0] <= end:
            offset, end = min(offset, self.mismatches[after][0]), max(end, sum(self.mismatches[after]))
            after += 1
        self.mismatches[first:after] = [(offset, end - offset)]


class Verify:
    """Compares one mirror."""

    def __init__(self, path: WritePath, link: MirrorLink, workers: Workers, *, repair: bool) -> None:
        """`workers` read the target."""
        self.found = Comparison(path.target.size_bytes)
        self._path = path
        self._link = link
        self._in_worker = workers.run
        self._repair = repair
        self._stopping = asyncio.Event()
        self._next = 0
        self._admissions = 0  # of the mirror, when `run` began
        self._failure: Exception | None = None

    def stop(self) -> None:
        """Have `run` return after the pieces that it is at."""
        self._stopping.set()

    async def run(self, may_go_on: Callable[[], bool] = lambda: True) -> None:
        """Compare all of it, as long as it `may_go_on`; called again, it goes on where it was."""
        self.found.error = self._failure = None
        self._admissions = self._link.admissions
        try:
            await self._path.flush()
            await asyncio.gather(*(self._hand(number, may_go_on) for number in range(HANDS)))
        except OSError as failure:
            self._failure = failure
        await self._link.forget_cache()
        self.found.error = self._broken_off()

    def _broken_off(self) -> str | None:
        """Why not all of it was compared that there was."""
        if self._failure is None:
            return self._parted or ("it was stopped" if self._stopping.is_set() else None)
        if isinstance(self._failure, OSError):  # of the target, or of a record
            return self._parted or self._failure.strerror or str(self._failure)
        return "it failed in a way that Lockstep did not expect; the log has more"

    @property
    def over(self) -> bool:
        """Whether everything has been looked at."""
        return self._next >= self.found.total_bytes

    @property
    def _parted(self) -> str | None:
        """Why the mirror was not there all the time; what was passed over, nobody knows."""
        if self._link.error is not None:
            return self._link.error
        return None if self._link.admissions == self._admissions else "the mirror failed meanwhile, and is back"

    async def _hand(self, number: int, may_go_on: Callable[[], bool]) -> None:
        try:
            await self._compare(number, lambda: may_go_on() and self._failure is None)
        except Exception as failure:
            self._failure = failure
            if not isinstance(failure, OSError):
                log.exception("comparing mirror %s failed", self._link.path)

    async def _compare(self, number: int, may_go_on: Callable[[], bool]) -> None:
        pace = Pace(lambda: self._path.requests, self._stopping)
        sector = self._link.sector_bytes if self._link.error is None else 1
        buffers = [page_aligned(LARGEST_PIECE_BYTES) for _ in range(2)]
        while not (self.over or self._stopping.is_set() or self._parted) and may_go_on():
            if number and pace.gives_way:
                return
            start = self._next
            count = min(pace.piece_bytes, self.found.total_bytes - start)
            self._next += count
            pace.begin()
            if parts := self._known_equal(start, count):
                async with self._path.ranges.hold([(offset, offset + length) for offset, length in parts]):
                    parts = [still for part in parts for still in self._known_equal(*part)]  # it was until a moment ago
                    for offset, length in parts:
                        whole = -(-length // sector) * sector
                        await self._compare_part(offset, length, [buffer[:whole] for buffer in buffers], sector)
            self.found.left_out_bytes += count - sum(length for _, length in parts)
            self.found.done_bytes += count
            if start // UNCACHE_BYTES != (start + count) // UNCACHE_BYTES:
                await self._link.forget_cache()
            await pace.rest(count)

    def _known_equal(self, start: int, count: int) -> list[tuple[int, int]]:
        """The parts of a range that count as equal."""
        step = self._link.regions.region_bytes
        parts: list[tuple[int, int]] = []
        for offset in range(start, start + count, min(step, count)):
            length = min(step, start + count - offset)
            if self._link.regions.equal(offset, length) and not self._path.lacks(offset, length):
                if parts and sum(parts[-1]) == offset:
                    parts[-1] = (parts[-1][0], parts[-1][1] + length)
                else:
                    parts.append((offset, length))
        return parts

    async def _compare_part(self, offset: int, length: int, buffers: list[memoryview], sector: int) -> None:
        """Compare a part whose range is held."""
        link, (ours, theirs) = self._link, buffers
        reading = self._in_worker(self._path.target.read_job(ours, run_of(offset, len(ours)), 1))
        theirs_read = link.read(offset, theirs, from_medium=True)
        readable, failure = await asyncio.gather(theirs_read, reading, return_exceptions=True)
        for each in (readable, failure):
            if isinstance(each, BaseException) and (not isinstance(each, OSError) or each.errno == errno.ENOMEM):
                raise each
        if failure is not None:
            self.found.differ(offset, length)  # nothing can be said of it, and that is worth an alarm
            return
        if readable is not True:
            return
        self.found.compared_bytes += length
        if await self._in_worker(same, ours, theirs):
            return
        differing = _differing(offset, length, ours, theirs, sector)
        for start, count in differing:
            self.found.differ(start, count)
        if self._repair:
            await self._mark(differing)

    async def _mark(self, differing: list[tuple[int, int]]) -> None:
        """Have it copied: on record first, as any difference."""
        await self._link.record([(start, start + count) for start, count in differing])
        for start, count in differing:
            self._link.regions.mark(start, count)
            self.found.repaired_bytes += count


def _differing(offset: int, length: int, ours: memoryview, theirs: memoryview, sector: int) -> list[tuple[int, int]]:
    """Which sectors differ, as (offset, length) on the disk."""
    return [
        (offset + at, min(sector, length - at))
        for at in range(0, length, sector)
        if not same(ours[at : at + sector], theirs[at : at + sector])
    ]
