"""The write path: every update of a target, from its interception to both disks.

The steps, in the order in which they are taken, by the numbers of the method:

    101/501/601  intercept       `write_now`, `write`: a write request arrives that a client meant for the target
    502          look up         does this target have a mirror? If not: 505 alone
    602          gate            may this user update the mirror, and now? If not: it is held, 505 alone; or refused
    (record)     the intent      where the two disks are about to differ, durably
    102/503      encrypt         `_update`: the data that the request carries
    103/504      mirror          the ciphertext, at the position given by offset and length
    103/505      target          the plaintext, at the same position

Rules:

1. A request is answered after the target and every mirror that is followed took it. A mirror that fails is
   dropped, and the request goes on; a target that fails fails the request.
2. `decrypt(mirror) == target` for every clean region, whatever the alignment: an update smaller than the
   encryption sector is first merged with the *target's* plaintext around it. Where something is held, it is merged with
   the mirror's: what surrounds it on the target may be what the mirror must not be given.
3. Overlapping updates reach both disks in one order. Small aligned ones are carried out at once on the loop,
   alone by construction, unless their sectors are held; all others hold their sectors (`Ranges`), and so does
   each piece of a resync.
4. A region is marked in the intent bitmap, durably, before either disk is written there; a held one in the record of
   what is held. So a small write is carried out at once only inside the hot set, where the marks are already; and
   marks are cleared by `tidy` alone.
5. A hole on the target is zeroes on a clean mirror, so clearing what is a hole already costs the mirror nothing.
6. FLUSH covers what was answered before it began, on the target and on every followed mirror.
"""

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Final

from lockstep.disk.plain import PlainDisk
from lockstep.volume.gate import UPDATE, Gate, Ruling
from lockstep.volume.held import NO_RIGHT, OUTSIDE_WINDOW
from lockstep.volume.link import MirrorLink
from lockstep.volume.ranges import Ranges
from lockstep.volume.rounds import Rounds

log = logging.getLogger(__name__)

INLINE_BYTES: Final = 128 << 10  # an update up to this size delays the other clients less than a thread would
CLEAR_PIECE_BYTES: Final = 8 << 20

Mirrors = tuple[MirrorLink, ...]

_KINDS: Final = {Ruling.UNTIL_WINDOW: OUTSIDE_WINDOW, Ruling.UNTIL_RELEASED: NO_RIGHT}


class WritePath:
    """The updates of one target. Offsets and lengths are bytes within the target; failures are OSErrors."""

    def __init__(self, target: PlainDisk, mirrors: Mirrors, gate: Gate, sector_bytes: int, workers: Executor) -> None:
        """Serve `target`; `mirrors` is what the registry says of it; `sector_bytes` suits all of them."""
        self.target = target
        self.mirrors = mirrors
        self.ranges = Ranges()
        self.updates = 0  # counts them, for a resync that gives way
        self._gate = gate
        self._sector_mask = sector_bytes - 1
        self._workers = workers
        self._flushes = Rounds(self._flush_all)

    # --- 101/501/601: what arrives ---

    def write_now(self, user: str, offset: int, data: memoryview) -> bool:
        """Carry out a small aligned write at once; False, and nothing happened, when it has to wait."""
        length = len(data)
        end = offset + length
        if length > INLINE_BYTES or (offset | length) & self._sector_mask or not self.ranges.free(offset, end):
            return False
        mirrors = self.mirrors  # 502
        if mirrors and self._gate(user) is not UPDATE:  # 602
            return False
        for mirror in mirrors:
            if mirror.held.frozen_since_s is not None or not mirror.intent.covers(offset, end):
                return False
        self._update(mirrors, offset, data)
        return True

    async def write(self, user: str, offset: int, data: memoryview, *, durable: bool) -> None:
        """Carry out any write; `durable` has it on the medium of every disk before it is answered."""
        async with self._hold(user, offset, len(data)) as mirrors:
            await self._in_worker(self._update, mirrors, offset, data, durable)
        if durable:
            await self._announce_faults()

    async def zero(self, user: str, offset: int, length: int, *, durable: bool, allocate: bool, fast: bool) -> None:
        """Write zeroes; `allocate` keeps the space; `fast` fails with ENOTSUP when a mirror makes it slow."""
        if fast and self.mirrors:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        end = offset + length
        while offset < end:
            stop = min(end, (offset // CLEAR_PIECE_BYTES + 1) * CLEAR_PIECE_BYTES)
            async with self._hold(user, offset, stop - offset) as mirrors:
                await self._in_worker(self._clear, mirrors, offset, stop - offset, allocate)
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
        await self.zero(user, offset, length, durable=durable, allocate=False, fast=False)

    async def flush(self) -> None:
        """Make durable what was answered so far; requests that come meanwhile share the next round."""
        await self._flushes.join()

    async def tidy(self) -> None:
        """Clear the marks of regions that are equal, and that nobody writes to, after flushing both disks.

        Raises OSError when that fails; the marks then stay.
        """
        idle = {mirror: [r for r in mirror.intent.idle() if self._at_rest(mirror, r)] for mirror in self.mirrors}
        if not any(idle.values()):
            return
        await self.flush()
        for mirror, regions in idle.items():
            await mirror.forget(regions)

    def _at_rest(self, mirror: MirrorLink, region: int) -> bool:
        """Whether a region is equal on both disks, and no write to it is under way."""
        start = region * mirror.regions.region_bytes
        return mirror.regions.clean(region) and self.ranges.free(start, start + mirror.regions.region_bytes)

    # --- the method ---

    @contextlib.asynccontextmanager
    async def _hold(self, user: str, offset: int, length: int) -> AsyncIterator[Mirrors]:
        """Have the range's sectors to oneself, on record; yields the mirrors that `user` may update now.

        Raises PermissionError where such updates are refused, and OSError when what is held cannot be recorded.
        """
        start, end = self._sectors(offset, length)
        async with self.ranges.hold(start, end):
            mirrors = self.mirrors  # 502
            ruling, recorded = self._gate(user) if mirrors else UPDATE, None  # 602
            while recorded is not ruling:  # again where the ruling changed while it was being recorded
                recorded = ruling
                await self._record(user, recorded, start, min(end, self.target.size_bytes))
                ruling = self._gate(user) if mirrors else UPDATE
            if ruling is not UPDATE:
                self._gate.denied(user, ruling, length)
            yield mirrors if ruling is UPDATE else ()

    async def _record(self, user: str, ruling: Ruling, start: int, end: int) -> None:
        """Have it on record, durably, what is about to happen to [start, end)."""
        if ruling is Ruling.REFUSE:
            self._gate.denied(user, ruling, end - start)
            raise PermissionError(errno.EPERM, f"{user} may not update the mirror")
        for mirror in self.mirrors:
            if ruling in _KINDS:
                await mirror.hold(start, end, user, _KINDS[ruling], self._in_worker)
            else:
                await mirror.record(start, end)
            if ruling is Ruling.FALL_BEHIND:
                mirror.regions.mark(start, end - start)

    def _update(self, mirrors: Mirrors, offset: int, data: memoryview, durable: bool = False) -> None:
        self.updates += 1
        whole = not (offset | len(data)) & self._sector_mask
        for mirror in mirrors:
            start, sectors = (offset, data) if whole else self._whole_sectors(mirror, offset, data)
            mirror.update(start, sectors, durable=durable)  # 102/503 encrypt, 103/504 write
        try:
            self.target.write(offset, data, durable=durable)  # 103/505
        except OSError as failure:
            self._target_failed(failure)
            raise

    def _clear(self, mirrors: Mirrors, offset: int, length: int, allocate: bool) -> None:
        """Like `_update`, for zeroes, which have no payload to encrypt."""
        self.updates += 1
        for mirror in mirrors:
            for start, count in self._data_within(mirror, offset, length):
                self._clear_mirror(mirror, start, count)  # 102/503, 103/504
        try:
            self.target.zero(offset, length, allocate=allocate)  # 103/505
        except OSError as failure:
            self._target_failed(failure)
            raise

    # --- whole sectors ---

    def _sectors(self, offset: int, length: int) -> tuple[int, int]:
        """The sectors that a range touches: [start, end)."""
        mask = self._sector_mask
        return offset & ~mask, (offset + length + mask) & ~mask

    def _whole_sectors(self, mirror: MirrorLink, offset: int, data: memoryview) -> tuple[int, memoryview]:
        """Return `data` with the plaintext round it, so that it begins and ends on a sector."""
        length = len(data)
        start, end = self._sectors(offset, length)
        read = mirror.read if mirror.regions.held(start, end - start) else self.target.read
        whole = memoryview(bytearray(end - start))
        sector = self._sector_mask + 1
        if start < offset:
            read(start, whole[:sector])
        if offset + length < end and (end - start > sector or start == offset):
            read(end - sector, whole[-sector:])
        whole[offset - start : offset - start + length] = data
        return start, whole

    def _data_within(self, mirror: MirrorLink, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts of a range whose sectors are not all zeroes on the mirror already, in order: (offset, length).

        Rounded to sectors and joined, so that no sector is merged twice: the target still holds its old content.
        """
        if mirror.regions.held(offset, length):  # the target's holes say nothing of it
            return [(offset, length)]
        parts: list[tuple[int, int]] = []  # [start, end)
        for at, count, data in self.target.extents(offset, length):
            if data:
                start, end = self._sectors(at, count)
                if parts and start <= parts[-1][1]:
                    start = parts.pop()[0]
                parts.append((start, end))
        clipped = ((max(start, offset), min(end, offset + length)) for start, end in parts)
        return [(start, end - start) for start, end in clipped]

    def _clear_mirror(self, mirror: MirrorLink, offset: int, length: int) -> None:
        mask = self._sector_mask
        first, last = (offset + mask) & ~mask, (offset + length) & ~mask
        if first >= last:  # within one sector, or two halves
            self._merge_zeroes(mirror, offset, length)
            return
        if offset < first:
            self._merge_zeroes(mirror, offset, first - offset)
        mirror.clear(first, last - first)
        if last < offset + length:
            self._merge_zeroes(mirror, last, offset + length - last)

    def _merge_zeroes(self, mirror: MirrorLink, offset: int, length: int) -> None:
        start, sectors = self._whole_sectors(mirror, offset, memoryview(bytes(length)))
        mirror.update(start, sectors, durable=False)

    # --- durability and failure ---

    async def _flush_all(self) -> None:
        disks = [mirror.flush for mirror in self.mirrors]
        await asyncio.gather(self._in_worker(self._flush_target), *map(self._in_worker, disks))
        await self._announce_faults()

    async def _announce_faults(self) -> None:
        """Nothing that a mirror has missed is answered as durable before the mirror says that it misses something."""
        for mirror in self.mirrors:
            if mirror.error is not None or mirror.target_error is not None or mirror.regions.held_bytes:
                await mirror.announce()

    def _flush_target(self) -> None:
        try:
            self.target.flush()
        except OSError as failure:
            self._target_failed(failure)
            raise

    def _target_failed(self, failure: OSError) -> None:
        for mirror in self.mirrors:
            mirror.target_failed(failure)

    async def _in_worker(self, work: Callable[..., None], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._workers, work, *args)
