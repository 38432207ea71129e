"""The write path: what becomes of a request that a client sends to the target.

The method, in its order; every step is named where it is taken, below:

    101/501/601  intercept       a request has arrived
    502          look up         does the target have mirrors?  no: 505 alone
    602          gate            may this user update the mirrors, now?  no: the target alone, on record
                 intent          the regions are marked, durably, before either disk is written
    102/503      encrypt         the data that the request carries
    103/504      mirror          the ciphertext, at the position given by offset and length
    103/505      target          the plaintext, at the same position

Writes come in runs (lockstep/disk/runs.py): as many as have arrived together. There are two ways, of the same steps:
`write_run` takes what can be carried out at once, on the loop; `write` takes anything, and waits where it must.

Rules:

1. A request is answered after the target and every mirror that is followed took it. A mirror that fails, or does not
   answer, is dropped, and the request goes on; a target that fails fails the request.
2. `decrypt(mirror) == target` for every clean region, whatever the alignment: an update smaller than the
   encryption sector is first merged with the *target's* plaintext around it. Where something is held, it is merged with
   the mirror's: what surrounds it on the target may be what the mirror must not be given.
3. Overlapping updates reach both disks in one order. What `write_run` does is alone by construction, unless its sectors
   are held; all others hold their sectors (`Ranges`), and so does each piece of a resync.
4. A region is marked in the intent bitmap, durably, before either disk is written there; a held one in the record of
   what is held. So a write is carried out at once only inside the hot set, where the marks are already; and
   marks are cleared by `tidy` alone.
5. Nothing that may block is done on the loop: a write at once needs disks that are prompt (lockstep/disk/transfer.py),
   all others are written by threads, the target and each mirror by their own and at the same time.
6. A hole on the target is zeroes on a clean mirror, so clearing what is a hole already costs the mirror nothing.
7. FLUSH covers what was answered before it began, on the target and on every followed mirror. It is the only thing
   that does: what is written back early (EARLY_BYTES) is as little durable as before.
8. The kernel tells one caller of what it failed to write out, and takes it for clean then. So once the target has
   failed a FLUSH, or FUA for any other reason than the write itself, it has lost something of whoever wrote; everything
   marked counts as different, and every FLUSH and FUA fails until somebody has looked after the target.
9. What a mirror has cached is bounded (lockstep/volume/backlog.py): whoever flushes waits for all of it, as long as the
   mirror's patience lasts.
"""

import asyncio
import contextlib
import errno
import functools
import logging
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lockstep.disk.plain import PlainDisk
from lockstep.disk.runs import WORDS, aligned, places, run_of
from lockstep.volume.filling import Filling
from lockstep.volume.gate import UPDATE, Gate, Ruling
from lockstep.volume.held import NO_RIGHT, OUTSIDE_WINDOW
from lockstep.volume.link import ASIDE, IN_SYNC, Asked, MirrorLink
from lockstep.volume.pages import without
from lockstep.volume.ranges import Extents, Ranges, Turn
from lockstep.volume.rounds import Rounds
from lockstep.volume.workers import Workers

log = logging.getLogger(__name__)

CLEAR_PIECE_BYTES: Final = 8 << 20
# So much of what comes after a flush begins its way to the medium at once: the next flush, if it comes soon, has less
# to wait for. Beyond that a cache does more for its user, since it writes only once what is written again and again.
EARLY_BYTES: Final = 16 << 20

Mirrors = tuple[MirrorLink, ...]

_KINDS: Final = {Ruling.UNTIL_WINDOW: OUTSIDE_WINDOW, Ruling.UNTIL_RELEASED: NO_RIGHT}

_Copy = tuple[MirrorLink, int, memoryview, "array[int]", int]
"""A mirror, its `admissions` when this was made, and a run: one that is back since is given nothing of before."""
_Clearing = tuple[MirrorLink, int, list[tuple[int, int, memoryview | None]]]
"""Likewise, with (offset, length) to be zeroes, or whole sectors to be written because zeroes end within them."""


@dataclass(slots=True)
class _Update:
    """What threads were asked to write: to each mirror, and to the target."""

    copies: "Sequence[tuple[MirrorLink, Asked | None, array[int], int]]"
    target: "asyncio.Future[None]"
    data: memoryview
    run: "array[int]"
    count: int
    durable: bool


class WritePath:
    """The updates of one target. Offsets and lengths are bytes within the target; failures are OSErrors."""

    def __init__(self, target: PlainDisk, mirrors: Mirrors, gate: Gate, sector_bytes: int, workers: Workers) -> None:
        """Serve `target`; `mirrors` is what the registry says of it; `sector_bytes` suits all of them."""
        self.target = target
        self.mirrors = mirrors
        self.ranges = Ranges()
        self.requests = 0  # counts what clients ask, for background work that gives way
        self.filling: Filling | None = None  # where the target is a new one that is being filled
        self.durability_lost: OSError | None = None  # with which the target failed to make something durable
        self._gate = gate
        self._sector_mask = sector_bytes - 1
        self._in_worker = workers.begin
        self._hint = workers.hint
        self._early_bytes = 0  # left of EARLY_BYTES
        self._half_done: set[tuple[int, int]] = set()  # (offset, length) of what mirrors may have alone
        self._unjudged: dict[asyncio.Future[None], asyncio.Future[None]] = {}  # FLUSH, FUA -> whose loss a failure was
        self._flushes = Rounds(self._flush_all, at_once=True)
        self._tidying = asyncio.Lock()

    # --- 101/501/601: what arrives ---

    def write_run(self, user: str, data: memoryview, run: "array[int]", count: int) -> int:
        """Carry out at once as many writes of a run as can be; return how many, from the front.

        Where that leaves something `half_done`, the rest has to be given to `write` before the loop goes on; else it
        counts as different.
        """
        if not self.target.prompt:
            return 0
        for mirror in self.mirrors:
            if not mirror.prompt:
                return 0
        count = self._free(user, run, count)
        if not count:
            return 0
        asked, done = count, 0
        try:
            for mirror in self.mirrors:
                count = mirror.write_run(data, run, count)  # 102/503, 103/504
            done = self.target.write_run(data, run, count)  # 103/505
        finally:
            if done < asked and self.mirrors:  # also where there was no memory for the rest
                self._half_done.update(places(run, asked)[done:])
                asyncio.get_running_loop().call_soon(self._settle_half_done)
        self.requests += done
        if self._early_bytes > 0:
            self._write_back(run, done)
        return done

    def half_done(self) -> bool:
        """Whether a mirror may have what the target has not been given yet."""
        return bool(self._half_done)

    def write(
        self, user: str, data: memoryview, run: "array[int]", count: int, *, durable: bool
    ) -> Coroutine[Any, Any, None]:
        """Carry out a run of any writes; `durable` has them on the medium of every disk before they are answered.

        What needs wait for nothing first is under way when this returns, and has to be waited for all the same.
        """
        if self.filling is not None or self._free(user, run, count) < count:
            self._settle_half_done()
            return self._write(user, data, run, count, durable)
        copies = [(mirror, mirror.admissions, data, run, count) for mirror in self.mirrors]
        update = self._begin(copies, data, run, count, durable)
        self._half_done.difference_update(places(run, count) if self._half_done else ())
        return self._finish(update, self.ranges.take([(at, at + length) for at, length in places(run, count)]))

    async def _finish(self, update: _Update, turn: Turn) -> None:
        try:
            await self._settle(update)
        finally:
            self.ranges.end(turn)

    async def _write(self, user: str, data: memoryview, run: "array[int]", count: int, durable: bool) -> None:
        """Carry out a run of any writes, waiting where it must.

        One that is no whole sectors is merged with what the ones before it wrote, so it is carried out by itself.
        """
        at = 0
        while at < count:
            rest = run[WORDS * at :]
            number = max(1, aligned(rest, count - at, self._sector_mask))
            copies: list[_Copy] = []
            prepare = functools.partial(self._prepare, copies, data, rest, number)
            async with self._hold(user, places(rest, number), prepare) as mirrors:
                await self._settle(self._begin(copies if mirrors else (), data, rest, number, durable))
            at += number

    def _settle_half_done(self) -> None:
        """Have what mirrors may have alone count as different: it is not carried out, or not before others are."""
        for offset, length in self._half_done:
            for mirror in self.mirrors:
                mirror.regions.mark(offset, length)
        self._half_done.clear()

    async def zero(self, user: str, offset: int, length: int, *, durable: bool, allocate: bool) -> None:
        """Write zeroes; `allocate` keeps the space."""
        end = offset + length
        while offset < end:
            stop = min(end, (offset // CLEAR_PIECE_BYTES + 1) * CLEAR_PIECE_BYTES)
            clearings: list[_Clearing] = []
            prepare = functools.partial(self._prepare_clearing, clearings, offset, stop - offset)
            async with self._hold(user, [(offset, stop - offset)], prepare) as mirrors:
                await self._clear(clearings if mirrors else (), offset, stop - offset, allocate)
            offset = stop
        if durable:
            await self.flush()

    async def trim(self, user: str, offset: int, length: int, *, durable: bool) -> None:
        """Give up content: a hole on a file; on a mirrored block device the hint is not followed.

        A device does not tell what is a hole already, so the mirror would have to be overwritten with encrypted
        zeroes all over each time that somebody makes a file system.
        """
        if self.mirrors and self.target.disk.is_block:
            return
        await self.zero(user, offset, length, durable=durable, allocate=False)

    def flush(self) -> Awaitable[None]:
        """Make durable what was answered so far; requests that come meanwhile share the next round.

        If none is under way, it has begun when this returns.
        """
        return self._flushes.join()

    async def part_from(self, mirror: MirrorLink, reason: str) -> str:
        """Follow a mirror no more, between two updates, and return what it may say of itself.

        If that is one of `WHOLE`, it is the disk as it was at this moment, or when it was frozen; durably.
        """
        async with self.ranges.hold([self.sectors(0, self.target.size_bytes)]):
            await mirror.flush()
            left_as = mirror.token_state
            mirror.step_aside(reason)
            return ASIDE if left_as == IN_SYNC else left_as

    async def tidy(self) -> None:
        """Clear the marks of regions that are equal, and that nobody writes to, after flushing both disks.

        Raises OSError when that fails; the marks then stay, of the mirror for which it does. One at a time: a second
        would forget who wrote since the first began.
        """
        async with self._tidying:
            await self._tidy()

    async def tidied(self) -> None:
        """Wait while marks are being cleared: whatever a slow mirror is given now holds its header up."""
        async with self._tidying:
            pass

    async def _tidy(self) -> None:
        idle = {mirror: self._at_rest(mirror, mirror.intent.idle()) for mirror in self.mirrors}
        if not any(1 in regions for regions in idle.values()):
            return
        admissions = {mirror: mirror.admissions for mirror in self.mirrors}
        await self.flush()
        forgetting = (mirror.forget(regions, admissions[mirror]) for mirror, regions in idle.items())
        for failure in filter(None, await asyncio.gather(*forgetting, return_exceptions=True)):
            raise failure  # but each mirror by itself: one whose header fails keeps no other's marks

    def _at_rest(self, mirror: MirrorLink, regions: bytes) -> bytes:
        """Those of these regions, a byte each, that are equal on both disks, and to which no write is under way."""
        resting, step = bytearray(without(regions, mirror.regions.differing())), mirror.regions.region_bytes
        for start, end in self.ranges.busy():
            resting[start // step : -(-end // step)] = bytes(-(-end // step) - start // step)
        return bytes(resting[: len(regions)])

    def lacks(self, offset: int, length: int) -> bool:
        """Whether the target is a new one that does not have all of this range yet."""
        return self.filling is not None and self.filling.lacks(offset, length)

    # --- the method ---

    def _free(self, user: str, run: "array[int]", count: int) -> int:
        """How many writes of a run, from the front, need wait for nobody, merge with nothing, and go on no record."""
        if self.mirrors and self._gate(user) is not UPDATE:  # 502, 602
            return 0
        count = self.ranges.free_run(run, aligned(run, count, self._sector_mask))
        for mirror in self.mirrors:
            count = 0 if mirror.full else mirror.recorded(run, count)
        return count

    async def _room(self) -> None:
        """Wait while a mirror has too much to write out: rule 9."""
        while full := next((mirror for mirror in self.mirrors if mirror.full), None):
            await full.room()

    @contextlib.asynccontextmanager
    async def _hold(
        self, user: str, writes: Extents, prepare: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[Mirrors]:
        """Have the sectors of these (offset, length) to oneself, on record; yields the mirrors that `user` may update.

        `prepare` does what their update has to wait for: the ruling is one from after that. Raises PermissionError
        where such updates are refused, and OSError when what is held cannot be recorded, or when a new target lacks
        what is to be overwritten and cannot get it.
        """
        extents = [self.sectors(*write) for write in writes]
        if self.filling is not None:
            await self.filling.secure(extents)
        async with self.ranges.hold(extents):
            mirrors = self.mirrors  # 502
            ruling, recorded = self._gate(user) if mirrors else UPDATE, None  # 602
            while recorded is not ruling:  # again where the ruling changed meanwhile
                recorded = ruling
                if ruling is Ruling.REFUSE:
                    break
                if ruling is UPDATE and prepare is not None:
                    await prepare()
                await self._record(user, recorded, extents)
                if ruling is UPDATE:
                    await self._room()  # last, so that not all who waited begin before any of them counts
                ruling = self._gate(user) if mirrors else UPDATE
            if ruling is not UPDATE:
                for _offset, length in writes:
                    self._gate.denied(user, ruling, length)
            if ruling is Ruling.REFUSE:
                raise PermissionError(errno.EPERM, f"{user} may not update the mirror")
            yield mirrors if ruling is UPDATE else ()

    async def _record(self, user: str, ruling: Ruling, extents: Extents) -> None:
        """Have it on record, durably, what is about to happen to each [start, end)."""
        within = [(start, min(end, self.target.size_bytes)) for start, end in extents]
        for mirror in self.mirrors:
            if ruling in _KINDS:
                for start, end in within:
                    await mirror.hold(start, end, user, _KINDS[ruling])
            else:
                await mirror.record(within)
            if ruling is Ruling.FALL_BEHIND:
                for start, end in within:
                    mirror.regions.mark(start, end - start)

    async def _prepare(self, copies: list[_Copy], data: memoryview, run: "array[int]", count: int) -> None:
        """Say in `copies` what each mirror is to be given of a run of whole sectors, or of one write that is not."""
        copies.clear()
        for mirror in self.mirrors:
            admissions, whole = mirror.admissions, (data, run, count)
            if not aligned(run, count, self._sector_mask):
                whole = await self._whole_sectors(mirror, data, run)
            copies.append((mirror, admissions, *whole))

    def _begin(
        self, copies: "Sequence[_Copy]", data: memoryview, run: "array[int]", count: int, durable: bool
    ) -> "_Update":
        """Have threads write a run; what is returned goes to `_settle`."""
        self.requests += count
        job = self.target.write_job(data, run, count, durable)  # first, for once a mirror has begun, nothing may fail
        begun = []
        for mirror, admissions, sectors, whole, number in copies:
            fits = mirror.admissions == admissions
            copy = mirror.begin_update(sectors, whole, number, durable=durable) if fits else None  # 102/503, 103/504
            begun.append((mirror, copy, whole, number))
        target = self._in_worker(job)  # 103/505
        if durable:
            self._unjudged[target] = asyncio.get_running_loop().create_future()
        return _Update(begun, target, data, run, count, durable)

    async def _settle(self, update: "_Update") -> None:
        """Wait for both disks; for the mirrors first, which encrypt and so come last as a rule."""
        for mirror, copy, run, count in update.copies:
            await mirror.settle(copy, run, count)
        try:
            await update.target
        except OSError as failure:
            if update.durable and await self._takes(update):
                self._lose_durability(failure)
            else:
                for extent in places(update.run, update.count):
                    self._target_failed(failure, extent)
            raise
        finally:
            self._judge(update.target)
        if update.durable:
            await self._announce_faults()
            await self._require_durability_of_all()
        elif self._early_bytes > 0:  # after the reply, which need not wait for this
            asyncio.get_running_loop().call_soon(self._write_back, update.run, update.count)

    async def _prepare_clearing(self, clearings: list[_Clearing], offset: int, length: int) -> None:
        """Like `_prepare`, for zeroes, which have no payload to encrypt."""
        clearings.clear()
        for mirror in self.mirrors:
            admissions = mirror.admissions
            parts = await self._in_worker(self._data_within, mirror, offset, length)
            steps = [step for part in parts for step in await self._cleared(mirror, *part)]
            clearings.append((mirror, admissions, steps))

    async def _clear(self, clearings: Sequence[_Clearing], offset: int, length: int, allocate: bool) -> None:
        """Like `_begin` and `_settle`, for zeroes."""
        self.requests += 1
        try:
            for mirror, admissions, steps in clearings:
                for start, count, sectors in steps:  # 102/503, 103/504
                    if mirror.admissions != admissions:
                        mirror.regions.mark(start, count)
                    elif sectors is None:
                        await mirror.clear(start, count)
                    else:
                        run = run_of(start, count)
                        await mirror.settle(mirror.begin_update(sectors, run, 1, durable=False), run, 1)
            await self._in_worker(functools.partial(self.target.zero, offset, length, allocate=allocate))  # 103/505
        except OSError as failure:
            self._target_failed(failure, (offset, length))
            raise

    # --- whole sectors ---

    def sectors(self, offset: int, length: int) -> tuple[int, int]:
        """The sectors that a range touches: [start, end)."""
        mask = self._sector_mask
        return offset & ~mask, (offset + length + mask) & ~mask

    async def _whole_sectors(
        self, mirror: MirrorLink, data: memoryview, run: "array[int]"
    ) -> tuple[memoryview, "array[int]", int]:
        """Return the first write of a run, with the plaintext round it, as a run of whole sectors of its own."""
        offset, length, position = run[:3]
        start, whole = await self._merged(mirror, offset, data[position : position + length])
        return whole, run_of(start, len(whole)), 1

    async def _merged(self, mirror: MirrorLink, offset: int, data: memoryview) -> tuple[int, memoryview]:
        """Return `data` with the plaintext round it, so that it begins and ends on a sector of the mirror.

        The end of the mirror may come before that of a sector of ours: those of another mirror are larger.
        """
        length = len(data)
        start, end = self.sectors(offset, length)
        whole = memoryview(bytearray(end - start))
        sector = self._sector_mask + 1
        if start < offset:
            await self._read_beside(mirror, start, whole[:sector])
        if offset + length < end and (end - start > sector or start == offset):
            await self._read_beside(mirror, end - sector, whole[-sector:])
        whole[offset - start : offset - start + length] = data
        return start, whole[: mirror.end_bytes - start]

    async def _read_beside(self, mirror: MirrorLink, offset: int, into: memoryview) -> None:
        """Read what surrounds an update of a mirror: rule 2."""
        if mirror.regions.held(offset, len(into)):
            await mirror.read(offset, into[: mirror.end_bytes - offset])
        else:
            await self._in_worker(self.target.read, offset, into)

    def _data_within(self, mirror: MirrorLink, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts of a range whose sectors are not all zeroes on the mirror already, in order: (offset, length).

        Rounded to sectors and joined, so that no sector is merged twice: the target still holds its old content.
        """
        if mirror.regions.held(offset, length):  # the target's holes say nothing of it
            return [(offset, length)]
        parts: list[tuple[int, int]] = []  # [start, end)
        for at, count, data in self.target.extents(offset, length):
            if data:
                start, end = self.sectors(at, count)
                if parts and start <= parts[-1][1]:
                    start = parts.pop()[0]
                parts.append((start, end))
        clipped = ((max(start, offset), min(end, offset + length)) for start, end in parts)
        return [(start, end - start) for start, end in clipped]

    async def _cleared(self, mirror: MirrorLink, offset: int, length: int) -> list[tuple[int, int, memoryview | None]]:
        """What a mirror is to be given where this range becomes zeroes: see `_Clearing`."""
        mask = self._sector_mask
        first, last = (offset + mask) & ~mask, (offset + length) & ~mask
        if first >= last:  # within one sector, or two halves
            return [await self._merged_zeroes(mirror, offset, length)]
        steps: list[tuple[int, int, memoryview | None]] = [(first, last - first, None)]
        if offset < first:
            steps.append(await self._merged_zeroes(mirror, offset, first - offset))
        if last < offset + length:
            steps.append(await self._merged_zeroes(mirror, last, offset + length - last))
        return steps

    async def _merged_zeroes(self, mirror: MirrorLink, offset: int, length: int) -> tuple[int, int, memoryview]:
        start, sectors = await self._merged(mirror, offset, memoryview(bytes(length)))
        return start, len(sectors), sectors

    # --- durability and failure ---

    def _write_back(self, run: "array[int]", count: int) -> None:
        self._early_bytes -= sum(run[1 : WORDS * count : WORDS])
        if job := self.target.write_back_job():
            self._hint(job)
        for mirror in self.mirrors:
            mirror.write_back()

    def _flush_all(self) -> Coroutine[Any, Any, None]:
        self._early_bytes = EARLY_BYTES
        copies = [mirror.begin_flush() for mirror in self.mirrors]
        target = self._in_worker(self.target.flush_job())
        self._unjudged[target] = asyncio.get_running_loop().create_future()
        return self._settle_flush(copies, target)

    async def _settle_flush(self, copies: Sequence[Awaitable[None]], target: "asyncio.Future[None]") -> None:
        for copy in copies:
            with contextlib.suppress(OSError):  # the mirror was dropped
                await copy
        try:
            await target
        except OSError as failure:
            self._lose_durability(failure)
            raise
        finally:
            self._judge(target)
        await self._announce_faults()
        await self._require_durability_of_all()

    def _judge(self, target: "asyncio.Future[None]") -> None:
        if known := self._unjudged.pop(target, None):
            known.set_result(None)

    async def _require_durability_of_all(self) -> None:
        """Like `require_durability`, once it is known of each FLUSH and FUA that has failed whose loss that was.

        Those that failed may still wait for a mirror, and what they were told may be about others' data.
        """
        failed = [known for target, known in self._unjudged.items() if target.done() and target.exception() is not None]
        if failed:
            await asyncio.wait(failed)
        self.require_durability()

    async def _takes(self, update: _Update) -> bool:
        """Whether the target takes a write that it has failed to make durable."""
        try:
            await self._in_worker(self.target.write_job(update.data, update.run, update.count))
        except OSError:
            return False
        return True

    def _lose_durability(self, failure: OSError) -> None:
        """The target did not make durable what it had taken: rule 8."""
        self.durability_lost = failure
        self._target_failed(failure)
        if self.filling is not None:
            self.filling.lose()
        log.error("%s", self.error)

    @property
    def error(self) -> str | None:
        """That the target failed to make something durable, in words."""
        if self.durability_lost is None:
            return None
        return (
            f"the target failed to make durable what was written to it: {self.durability_lost.strerror}. What was lost"
            " is not known, so every flush fails from here on. See to the target, then `lockstep sync`."
        )

    def require_durability(self) -> None:
        """Raise the OSError with which the target once failed to make something durable: rule 8."""
        if self.durability_lost is not None:
            raise OSError(self.durability_lost.errno, self.durability_lost.strerror)

    async def _announce_faults(self) -> None:
        """Nothing that a mirror has missed is answered as durable before the mirror says that it misses something."""
        for mirror in self.mirrors:
            if mirror.error or mirror.target_error or not mirror.equal:
                await mirror.announce()

    def _target_failed(self, failure: OSError, extent: tuple[int, int] | None = None) -> None:
        for mirror in self.mirrors:
            mirror.target_failed(failure, extent)
