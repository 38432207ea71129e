"""Resync: copy dirty regions from the target to a mirror while clients go on writing.

A piece is copied while its range is held, so that a client's write there comes either before the copy (and is
part of it) or after (and overwrites it, on both disks). A region is clean once all of its pieces were copied
and nobody marked it meanwhile. What a client writes to a dirty region reaches the mirror at once, and does not make it
dirty again: so each region is copied once, however busy the clients are, and the copy ends.

While clients rest, several pieces are on their way at once, so that reading, encrypting and writing overlap; while they
do not, one, at a pace that gives way (`Pace`).

What is held is not copied. What was held because the user's window was closed is released when it opens; a mirror that
is frozen, and one that nobody may update now, is left as it is.
"""

import asyncio
import contextlib
import logging
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import Final

from lockstep.buffers import page_aligned
from lockstep.disk.runs import WORDS, requests, same
from lockstep.volume.gate import UPDATE, Gate
from lockstep.volume.held import OUTSIDE_WINDOW
from lockstep.volume.link import IN_SYNC, MirrorLink
from lockstep.volume.pace import LARGEST_PIECE_BYTES, Pace
from lockstep.volume.progress import SyncProgress
from lockstep.volume.workers import Workers
from lockstep.volume.write_path import WritePath

log = logging.getLogger(__name__)

Stretches = Sequence[tuple[int, int]]
"""(offset, length) of parts of the disk, in bytes."""

HANDS: Final = 3
TURN_S: Final = 2.0
COMPARED_BYTES: Final = 256 << 10
LOOK_INTERVAL_S: Final = 0.5


class Resync:
    """Brings one mirror in sync."""

    def __init__(
        self, path: WritePath, link: MirrorLink, gate: Gate, workers: Workers, *, compare: bool = False
    ) -> None:
        """`workers` read the target."""
        self.compare = compare  # whether to look first what is equal already, and leave that as it is, until in sync
        self._gently = False  # it did not answer in time to as much as is usual
        self._unfinished = False  # something was copied, and may be on record as held all the same
        self._path = path
        self._link = link
        self._gate = gate
        self._in_worker = workers.run
        self._stopping = asyncio.Event()
        self._wanted = asyncio.Event()

    def stop(self) -> None:
        """Have `run` return after the pieces that it is at."""
        self._stopping.set()
        self._wanted.set()

    def wake(self) -> None:
        """Have `run` look at once whether there is something to copy."""
        self._wanted.set()

    async def run(self) -> None:
        """Copy whatever there is to copy and may be copied, until `stop`."""
        while not self._stopping.is_set():
            self._wanted.clear()
            with contextlib.suppress(OSError):  # of a record: what is held stays so, and the next look tries again
                await self._release_what_may_be()
            try:
                await self.copy()
            except Exception:  # such as no memory
                log.exception("copying to mirror %s failed, and is tried again", self._link.path)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), LOOK_INTERVAL_S)

    async def copy(self) -> None:
        """Copy until no region is dirty, or nothing may be copied; `link.sync` tells how far it is."""
        link = self._link
        link.waiting = not self._permitted()
        if not link.regions.dirty_bytes:
            self.compare = False
            with contextlib.suppress(OSError):  # of a record, and the next look tries again
                if self._unfinished and self._may_go_on():  # what was left to copy then is held by now
                    await self._finish()
                await link.held.settle()
            return
        if not self._may_go_on():
            return
        link.sync = SyncProgress(link.regions.dirty_bytes)
        try:
            await self._copy(link.sync)
        finally:
            link.sync, link.waiting = None, not self._permitted()

    async def _copy(self, progress: SyncProgress) -> None:
        link = self._link
        await link.announce()  # before the first piece: half a copy is no disk of any moment
        self._unfinished = True
        timeouts = link.timeouts
        log.info("copying %d bytes to mirror %s", progress.total_bytes, link.path)
        while link.regions.dirty_bytes and self._may_go_on():
            until_s = time.monotonic() + TURN_S
            hands = (self._copy_regions(progress, number, until_s) for number in range(1 if self._gently else HANDS))
            for failure in filter(None, await asyncio.gather(*hands, return_exceptions=True)):
                raise failure
            await link.forget_cache()
        self._gently = self._gently or link.timeouts > timeouts
        if not link.regions.dirty_bytes:
            with contextlib.suppress(OSError):  # of a record, or of the target: both are seen again
                await self._finish()

    async def _finish(self) -> None:
        """Once it is durable, forget what was held, and have the mirror itself say so before the status does."""
        link = self._link
        if not await link.flush():
            return
        await link.forget_cache()
        await link.forget_released()
        self._unfinished = False
        if not link.regions.held_bytes:
            await link.announce(IN_SYNC)
            self.compare = False
            log.info("mirror %s is in sync", link.path)
            await self._path.tidy()
            self._gently = self._gently and link.error is not None

    async def _release_what_may_be(self) -> None:
        """Have the regions copied that were held until windows opened which are open now.

        Not while they could not be copied: a mirror that is frozen stays so as long as nothing is written to it.
        """
        if not self._failed and self._link.regions.held_bytes and self._releasable():
            await self._link.release(self._releasable)

    def _releasable(self) -> bytes:
        """The regions, a byte each, that only closed windows have held, all of which are open now; else nothing."""
        held = self._link.held
        users = held.users(OUTSIDE_WINDOW)
        free = users and all(self._gate(user) is UPDATE for user in users)
        return held.only_outside_window() if free else b""

    async def _copy_regions(self, progress: SyncProgress, number: int, until_s: float) -> None:
        """Copy stretches of dirty regions until there are none, or the turn ends.

        All hands but the first end theirs as soon as clients are at work.
        """
        regions = self._link.regions
        pace = Pace(lambda: self._path.requests, self._stopping, gently=self._gently)
        buffers = page_aligned(LARGEST_PIECE_BYTES), page_aligned(LARGEST_PIECE_BYTES)
        while self._may_go_on() and time.monotonic() < until_s and not (number and pace.gives_way):
            taken = regions.begin_copy(pace.piece_bytes)
            if not taken:
                return
            equal = False
            try:
                equal = await self._copy_taken(taken, buffers, pace)
            finally:
                regions.finish_copy(taken, equal=equal)
            progress.note(sum(length for _, length in taken) if equal else 0, regions.dirty_bytes)

    async def _copy_taken(self, taken: Stretches, buffers: tuple[memoryview, memoryview], pace: Pace) -> bool:
        """Copy it piece by piece; True when all of it was copied."""
        for piece in _pieces(taken, pace):
            pace.begin()
            if not await self._are_there(piece):
                return False
            async with self._path.ranges.hold([(start, start + count) for start, count in piece]):
                if not self._may_go_on() or any(self._link.regions.held(*stretch) for stretch in piece):
                    return False
                if not await self._copy_piece(piece, buffers):
                    return False
            await self._link.room()
            await self._path.tidied()
            if not self._may_go_on():
                return False
            await pace.rest(sum(count for _, count in piece))
        return True

    async def _are_there(self, piece: Stretches) -> bool:
        """Whether the target has it all, or gets it, durably: what a new target lacks must not overwrite anything."""
        try:
            if self._path.filling is not None:
                await self._path.filling.secure([(start, start + count) for start, count in piece])
        except OSError:  # it is on record why, and `_may_go_on` waits for its end
            return False
        return True

    async def _copy_piece(self, piece: Stretches, buffers: tuple[memoryview, memoryview]) -> bool:
        """Copy one piece, whose ranges are held; False, and it is noted at the link, when the target cannot be read."""
        link = self._link
        run, used = array("Q"), 0
        for offset, length in piece:
            whole = -(-length // link.sector_bytes) * link.sector_bytes
            run.extend((offset, whole, used, 0))
            used += whole
        data, theirs = (buffer[:used] for buffer in buffers)
        try:
            await self._in_worker(self._path.target.read_job(data, run, len(piece)))
        except OSError as failure:
            link.target_failed(failure, piece[0])  # all of it stays different
            return False
        if self.compare:
            run = await self._without_equal(run, data, theirs)
        if not self._permitted():  # a window has closed while the disks were read
            return False
        count = len(run) // WORDS
        if count:
            await link.settle(link.begin_update(data, run, count, durable=False), run, count)
            link.write_back()
        return True

    async def _without_equal(self, run: "array[int]", data: memoryview, theirs: memoryview) -> "array[int]":
        """Return a run of those parts that are not on the mirror."""
        differing = array("Q")
        for offset, length, at in requests(run, 0, len(run) // WORDS):
            if not await self._link.read(offset, theirs[:length]):
                return run
            for part in range(0, length, COMPARED_BYTES):
                count = min(COMPARED_BYTES, length - part)
                if not same(data[at + part : at + part + count], theirs[part : part + count]):
                    differing.extend((offset + part, count, at + part, 0))
        return differing

    def _may_go_on(self) -> bool:
        return not self._stopping.is_set() and not self._failed and self._permitted()

    @property
    def _failed(self) -> bool:
        """Whether one of the disks is not there, or not to be trusted."""
        filling = self._path.filling
        unfilled = filling is not None and filling.error is not None
        return unfilled or self._link.error is not None or self._link.target_error is not None

    def _permitted(self) -> bool:
        return self._gate.anyone() and self._link.held.frozen_since_s is None


def _pieces(taken: Stretches, pace: Pace) -> Iterator[Stretches]:
    """Split what was taken: several stretches are one piece, a single one is as many as the pace makes of it."""
    if len(taken) > 1:
        yield taken
        return
    ((start, length),) = taken
    end = start + length
    while start < end:
        count = min(pace.piece_bytes, end - start)
        yield [(start, count)]
        start += count
