"""One mirror as its volume sees it: the encrypted disk, where it differs, and whether it is still followed.

    state      means                                                    left by
    syncing    regions differ and are being copied                      the flush after the last -> in-sync
    in-sync    no region differs; every write goes to both disks        a failed mirror write  -> degraded,
                                                                        a held update, a failed
                                                                        target write           -> behind
    behind     regions differ, and nothing is copying them: they are    a window's opening, a
               held, nobody may update the mirror, or the target failed sync, the next start   -> syncing
    degraded   the mirror failed, did not answer in time, or is away,   its return             -> syncing
               and is not touched any more                              so, what is held       -> behind

The state is never stored: it is derived from what is known of the regions and of the failure.

Every write is recorded in the intent bitmap before it reaches either disk, also while the mirror is degraded. Its
marks are cleared only after both disks were flushed; so when one of them fails, whatever its caches lost lies in
marked regions, and these are what differs.

The mirror has threads of its own, and patience with it ends (`Workers`). When it is dropped, what they still hold up
may reach the disk at any time: it lies in marked regions, and the mirror is not taken back before its threads are at
rest, so a late completion changes nothing that counts.
"""

import asyncio
import errno
import functools
import logging
import time
from array import array
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.runs import WORDS, places, run_of
from lockstep.volume.backlog import Backlog
from lockstep.volume.held import HeldRecord
from lockstep.volume.intent import IntentBitmap
from lockstep.volume.pages import without
from lockstep.volume.progress import SyncProgress
from lockstep.volume.regions import RegionMap, stretches
from lockstep.volume.rounds import Rounds
from lockstep.volume.workers import Workers

log = logging.getLogger(__name__)

IN_SYNC: Final = "in-sync"
SYNCING: Final = "syncing"
BEHIND: Final = "behind"
DEGRADED: Final = "degraded"
LARGEST_SECTOR_BYTES: Final = 4096
FROZEN: Final = "frozen"
"""What the mirror's own token says in place of `behind` while the mirror is the disk as it was at one moment."""
ASIDE: Final = "aside"
"""What the token says while another command has the mirror, which is the disk as it was when it was let go."""
STILL: Final = (FROZEN, ASIDE)
"""What the token says of a mirror that is the whole disk as it was at an earlier moment."""
WHOLE: Final = (IN_SYNC, *STILL)
"""What the token says of a mirror that is the whole disk as it was at one moment."""


class Keeper(Protocol):
    """Who keeps what is written about a mirror, on the mirror and beside it."""

    async def announce(self, state: str) -> None:
        """Write the state on the mirror, if it is not there yet; in bounded time, and never an error.

        A mirror that is followed and cannot be written to is dropped.
        """

    async def advance(self) -> None:
        """Give the mirror a new generation, so that no older copy is taken for it. Raises OSError."""

    async def disown(self) -> None:
        """Have the next start copy everything: the bitmap cannot say what differs. Raises OSError."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Something that a mirror was asked to do, and of whose threads: it may be back with others when that ends."""

    workers: Workers
    ended: "asyncio.Future[None]"
    then: Callable[[], None]  # what its success means


class MirrorLink:
    """A mirror that follows its target, as long as it can."""

    def __init__(
        self, path: str, uuid: str, regions: RegionMap, intent: IntentBitmap, held: HeldRecord, keeper: Keeper
    ) -> None:
        """A mirror that is away; `admit` gives it its disk."""
        self.path = path
        self.uuid = uuid
        self.regions = regions
        self.intent = intent
        self.held = held
        self._keeper = keeper
        self.sync: SyncProgress | None = None
        self.error: str | None = "the mirror is away"  # why it is not followed
        self.hindrance: str | None = None  # why it could not be followed again when that was tried last
        self.admissions = 0
        self.timeouts = 0  # how often it was dropped because it did not answer
        self.silent = False  # it was dropped because it did not answer: nobody should ask it anything more
        self.target_error: str | None = None  # why the target cannot be copied from
        self.waiting = held.frozen_since_s is not None  # nothing may be copied now
        self.as_left = True  # whether it was, at the start, the mirror as it was when it was last followed
        self.is_source = False  # a new target is being filled from it, and would be from no other copy of it
        self._backlog = Backlog(None)
        self._flushes = Rounds(self._flush_once, at_once=True)
        self._writing_out: asyncio.Task[bool] | None = None
        self._freezing = asyncio.Lock()
        self._disk: EncryptedDisk | None = None
        self._workers: Workers | None = None

    # --- coming and going ---

    def admit(self, disk: EncryptedDisk, workers: Workers) -> None:
        """Follow from here on; what it missed is marked in `regions`. `workers` are its own.

        A mirror that comes back must not have larger sectors than it had.
        """
        assert self.at_rest
        assert disk.sector_bytes <= self.sector_bytes
        self._disk, self._workers = disk, workers
        self.error, self.hindrance, self.silent = None, None, False
        self._backlog = Backlog(workers.patience_s, self.timeouts)
        self.admissions += 1

    def drop(self, doing: str, failure: OSError) -> None:
        """Stop following: nothing is asked of the mirror any more, and all that is marked counts as different."""
        if self.error is not None:
            return
        self._part(f"{doing} the mirror failed: {failure.strerror or failure}")
        self.silent = isinstance(failure, TimeoutError)
        self.timeouts += self.silent
        log.error("mirror %s is degraded: %s. The target goes on alone.", self.path, self.error)

    def step_aside(self, reason: str) -> None:
        """Stop following because somebody else is to have the mirror: nobody asks it anything, header included."""
        self._part(reason)
        self.silent = True
        log.warning("mirror %s steps aside: %s. The target goes on alone.", self.path, reason)

    def _part(self, reason: str) -> None:
        self.regions.mark_regions(self.intent.marked())
        self.error = reason
        if self._disk is not None and self._workers is not None:
            self._disk.stop()
            self._workers.give_up()

    def stay_away(self, reason: str) -> None:
        """Say why a mirror that was never admitted is not there; nothing is asked of it."""
        self.error, self.hindrance = reason, None

    def let_go(self) -> EncryptedDisk | None:
        """Give the disk of a mirror that was dropped, and is at rest, to who closes it."""
        assert self.error is not None
        assert self.at_rest
        disk, self._workers = self._disk if self._workers is not None else None, None
        return disk

    def left(self) -> bool:
        """Whether the mirror that is followed has lost its path, by which anybody would look for it. Blocks."""
        disk = self._disk
        return self.error is None and disk is not None and disk.left(self.path)

    def cut_short(self) -> bool:
        """Whether the mirror that is followed has lost its end. Blocks."""
        disk = self._disk
        return self.error is None and disk is not None and disk.cut_short()

    @property
    def at_rest(self) -> bool:
        """Whether nothing that was asked of the mirror is still under way."""
        return self._workers is None or self._workers.at_rest

    def close(self) -> None:
        """Close the disk, if that is possible without waiting for it."""
        if self._disk is not None and self._workers is not None:
            self._workers.close()
            if self._workers.at_rest:
                self._disk.close()
            self._workers = None

    # --- how it stands ---

    @property
    def state(self) -> str:
        """One of the four states in the table above."""
        if self.error is not None:
            return DEGRADED
        if self.sync is None and self.equal:
            return IN_SYNC  # a copy is over when it is durable
        if self.target_error or self.waiting or (self.sync is None and not self.regions.dirty_bytes):
            return BEHIND
        return SYNCING

    @property
    def equal(self) -> bool:
        """Whether no region differs."""
        return not self.regions.dirty_bytes and not self.regions.held_bytes

    @property
    def consistent(self) -> bool:
        """Whether the mirror alone is the whole disk as it was at one moment: now, or when it was frozen."""
        frozen = self.held.frozen_since_s is not None and not self._freezing.locked()  # until it is so, and on record
        return self.error is None and (self.state == IN_SYNC or frozen)

    @property
    def token_state(self) -> str:
        """What the mirror says of itself, for whoever restores from it alone."""
        return FROZEN if self.state == BEHIND and self.consistent else self.state

    async def forget(self, regions: bytes, admissions: int) -> None:
        """Clear the marks of regions, a byte each, that are equal and flushed, where nobody asked to write meanwhile.

        Not if the mirror failed since `admissions` was taken, before the flush: what its cache lost is not equal, even
        if it is back. Nor where the target has lost something meanwhile. Raises OSError, and then clears nothing, when
        the mirror cannot be given a new generation.
        """
        if 1 in regions and self._steady(admissions):
            await self._keeper.advance()
            if self._steady(admissions):
                await self.intent.clear(without(regions, self.regions.differing()))

    def _steady(self, admissions: int) -> bool:
        return self.error is None and self.target_error is None and self.admissions == admissions

    async def announce(self, state: str | None = None) -> None:
        """Have the mirror itself say how it stands, so that a restore from it alone knows."""
        await self._keeper.announce(state or self.token_state)

    async def record(self, extents: Sequence[tuple[int, int]]) -> None:
        """Have each [start, end) marked durably, before it is written anywhere; a frozen mirror is so no more.

        If that fails, the mirror is dropped and disowned; raises OSError when it cannot even be disowned, since then
        the next start would take it for equal. So it does at once while a new target is being filled from it: that
        would be from no mirror that was disowned.
        """
        try:
            await self._thaw()
            await self.intent.mark(extents)
        except OSError as failure:
            if self.is_source:
                raise
            self.drop("recording, in the state directory, the writes to", failure)
            await self._keeper.disown()

    async def hold(self, start: int, end: int, user: str, kind: str) -> None:
        """Have [start, end) recorded durably as what `user` writes to the target without updating the mirror.

        Raises OSError when it cannot be: such a write must not reach the target, since nothing would keep it from
        being copied.
        """
        try:
            async with self._freezing:  # others wait until it is on record whether the mirror was equal
                renewed = self.state == IN_SYNC and await self._renewed()
                if self.state == IN_SYNC:
                    self.regions.hold(start, end - start)
                    await self.flush()
                    await self.held.hold(start, end, user, kind, equal=renewed and self.error is None)
            self.regions.hold(start, end - start)
            await self.held.hold(start, end, user, kind, equal=False)
        except OSError:
            recorded, step = self.held.regions(), self.regions.region_bytes
            for region in range(start // step, -(-end // step)):
                if not recorded[region]:  # else somebody else's is held there
                    self.regions.let_go(region * step, 1)
            raise
        self.regions.hold(start, end - start)  # somebody else's may have failed

    async def _renewed(self) -> bool:
        """Have no copy of the mirror from before be taken for the frozen one; whether that was possible."""
        try:
            await self._keeper.advance()
        except OSError as failure:
            log.warning("mirror %s cannot be given a new generation, and is not frozen: %s", self.path, failure)
            return False
        return True

    async def _thaw(self) -> None:
        """Have it on the mirror, and on record, that it is frozen no more: before anything is written to it.

        Raises OSError.
        """
        async with self._freezing:
            if self.held.frozen_since_s is not None:
                await self.announce(BEHIND)
                await self.held.thaw()

    async def release(self, which: Callable[[], bytes]) -> None:
        """Have copied what `which` says, a byte for each region, as far as it is held. Raises OSError.

        The regions are marked first, like any that is written: the record of what is held forgets them before both
        disks have been flushed. Meanwhile somebody may have written there who may not update the mirror, or whoever
        released them may no more: so `which` is asked again.
        """
        regions = which()
        await self._thaw()
        step = self.regions.region_bytes
        await self.intent.mark([(first * step, after * step) for first, after in stretches(regions)])
        self.regions.release(without(regions, without(regions, which())))
        self.waiting = False

    async def doubt(self) -> None:
        """Have all of it copied, but for what is held: somebody says that it is not what it should be. Raises OSError.

        So it is not the disk as it was when it froze, either.
        """
        self.regions.mark_all()
        await self._thaw()
        await self.intent.mark([(0, self.regions.size_bytes)])

    async def forget_released(self) -> None:
        """Clear the record of what was held, released, copied and flushed. Raises OSError."""
        done = without(self.held.regions(), self.regions.differing())
        if 1 in done:
            await self.held.forget(done)

    # --- what reaches the disk ---

    @property
    def sector_bytes(self) -> int:
        """The mirror's encryption sector; the largest there is, while that is not known."""
        return LARGEST_SECTOR_BYTES if self._disk is None else self._disk.sector_bytes

    @property
    def end_bytes(self) -> int:
        """Where the mirror's last sector ends; the target may end within it."""
        return -(-self.regions.size_bytes // self.sector_bytes) * self.sector_bytes

    @property
    def prompt(self) -> bool:
        """Whether `write_run` may be called where nothing may block."""
        return self.error is not None or (self._disk is not None and self._disk.prompt)

    def recorded(self, run: "array[int]", count: int) -> int:
        """How many writes of a run, from the front, need no record of their own: `record` would do nothing."""
        return 0 if self.held.frozen_since_s is not None else self.intent.covers_run(run, count)

    def write_run(self, data: memoryview, run: "array[int]", count: int) -> int:
        """Carry recorded writes of whole sectors to a prompt mirror; how many it took, from the front."""
        if self.error is not None or self._disk is None:
            for extent in places(run, count):  # the record has their regions, but need not have had them when it failed
                self.regions.mark(*extent)
            return count
        self._count(run, count)
        return self._disk.write_run(data, run, count)

    def begin_update(self, data: memoryview, run: "array[int]", count: int, *, durable: bool) -> Asked | None:
        """Begin to carry a run of whole sectors to the mirror; `settle` takes what is returned."""
        if not durable:
            self._count(run, count)
        return self._ask(lambda disk: disk.write_job(data, run, count, durable))

    async def settle(self, asked: Asked | None, run: "array[int]", count: int) -> None:
        """Wait for an update; a failure drops the mirror and is not the writer's."""
        if not await self._succeeds("writing", asked):
            for offset, length in places(run, count):
                self.regions.mark(offset, length)

    def _count(self, run: "array[int]", count: int) -> None:
        if self.error is None and self._disk is not None and self._disk.cached:
            self._backlog.take(sum(run[1 : WORDS * count : WORDS]), count)
            if self._backlog.large:
                self._write_out()

    async def clear(self, offset: int, length: int) -> None:
        """Carry zeroes to the mirror, whole sectors; failures as in `settle`."""
        self._count(run_of(offset, length), 1)
        if not await self._succeeds("writing", self._ask(lambda disk: functools.partial(disk.zero, offset, length))):
            self.regions.mark(offset, length)

    async def read(self, offset: int, into: memoryview, *, from_medium: bool = False, keep: bool = False) -> bool:
        """Fill `into` with what the mirror holds, whole sectors; False, and it is dropped, when that fails.

        `from_medium` is about what was flushed, not what is cached. `keep` leaves it, if it has answered at all.
        """
        asked = self._ask(lambda disk: disk.read_job(offset, into, from_medium=from_medium))
        return await self._succeeds("reading", asked, keep=keep)

    async def flush(self) -> bool:
        """Make the mirror durable; False, and it is dropped, when that fails."""
        try:
            await self.begin_flush()
        except OSError:
            return False
        return True

    def begin_flush(self) -> Awaitable[None]:
        """Begin to make the mirror durable, once no other flush is under way; it raises OSError when that fails.

        One at a time: the kernel tells one of them only what it could not write out.
        """
        return self._flushes.join()

    def _flush_once(self) -> Coroutine[Any, Any, None]:
        backlog = self._backlog
        then = functools.partial(backlog.flushed, backlog.taken, time.monotonic())
        return self._settle_flush(self._ask(lambda disk: disk.flush_job(), then))

    async def _settle_flush(self, asked: Asked | None) -> None:
        if not await self._succeeds("flushing", asked):
            raise OSError(errno.EIO, "the mirror is not there, or could not be flushed")

    @property
    def full(self) -> bool:
        """Whether it has so much to write out that whoever gives it more has to wait for `room`."""
        return self._backlog.full and self.error is None

    async def room(self) -> None:
        """Wait while it is full; a mirror that fails or hangs meanwhile is dropped."""
        while self.full and await asyncio.shield(self._write_out()):
            pass

    def _write_out(self) -> "asyncio.Task[bool]":
        """Flush what it has cached, unless that is under way."""
        if self._writing_out is None or self._writing_out.done():
            self._writing_out = asyncio.get_running_loop().create_task(self.flush())
        return self._writing_out

    def write_back(self) -> None:
        """Have the next flush find less to wait for."""
        if self.error is None and self._workers and self._disk and (job := self._disk.write_back_job()):
            self._workers.hint(job)

    async def forget_cache(self) -> None:
        """Give back the memory of what was written out: nobody reads it, and what is copied is a whole disk."""
        if self._disk is not None and self._disk.cached:
            await self._succeeds("flushing", self._ask(lambda disk: functools.partial(disk.forget_cache, 0, 0)))

    def _ask(
        self, what: Callable[[EncryptedDisk], Callable[[], None]], then: Callable[[], None] = lambda: None
    ) -> Asked | None:
        if self.error is not None or self._workers is None or self._disk is None:
            return None
        try:
            return Asked(self._workers, self._workers.begin(what(self._disk)), then)
        except (OSError, MemoryError) as failure:  # the target has to be given its write all the same
            self.drop("asking", failure if isinstance(failure, OSError) else OSError(errno.ENOMEM, "no memory is left"))
            return None

    async def _succeeds(self, doing: str, asked: Asked | None, *, keep: bool = False) -> bool:
        if asked is None:
            return False
        try:
            await asked.ended
        except OSError as failure:
            if self._workers is asked.workers and (isinstance(failure, TimeoutError) or not keep):
                self.drop(doing, failure)
            return False
        asked.then()
        return True

    # --- the target ---

    def target_failed(self, failure: OSError, extent: tuple[int, int] | None = None) -> None:
        """The target failed where the mirror did not: which of the two is right there is open.

        `extent` is the offset and length of a write that failed; without it, whatever is marked may be lost. It is not
        copied by itself: a failing target must not overwrite the better copy.
        """
        if extent is None:
            self.regions.mark_regions(self.intent.marked())
        else:
            self.regions.mark(*extent)
        self.target_error = f"the target failed: {failure.strerror or failure}"
        log.error("mirror %s is behind: %s", self.path, self.target_error)
