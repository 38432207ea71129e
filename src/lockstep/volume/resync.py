"""Resync: copy dirty regions from the target to a mirror while clients go on writing.

A piece is copied while its range is held, so that a client's write there comes either before the copy (and is
part of it) or after (and overwrites it, on both disks). A region is clean once all of its pieces were copied
and nobody marked it meanwhile. Clients come first: after each piece the copy rests as long as the piece took when
they have written meanwhile.

What is held is not copied. What was held because the user's window was closed is released when it opens; a mirror that
is frozen, and one that nobody may update now, is left as it is.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from lockstep.disk.encrypted import EncryptedDisk
from lockstep.volume.gate import UPDATE, Gate
from lockstep.volume.held import NO_RIGHT, OUTSIDE_WINDOW
from lockstep.volume.link import IN_SYNC, MirrorLink, SyncProgress
from lockstep.volume.write_path import WritePath

log = logging.getLogger(__name__)

PIECE_BYTES: Final = 1 << 20
LOOK_INTERVAL_S: Final = 0.5


class Resync:
    """Brings one mirror in sync."""

    def __init__(self, path: WritePath, link: MirrorLink, disk: EncryptedDisk, gate: Gate, workers: Executor) -> None:
        self._path = path
        self._link = link
        self._disk = disk
        self._gate = gate
        self._workers = workers
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self._stopping = asyncio.Event()
        self._wanted = asyncio.Event()

    def stop(self) -> None:
        """Have `run` return after the piece that it is at."""
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
            await self.copy()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), LOOK_INTERVAL_S)

    async def copy(self) -> None:
        """Copy until no region is dirty, or nothing may be copied; `link.sync` tells how far it is."""
        link = self._link
        link.waiting = not self._permitted()
        if not link.regions.dirty_bytes or not self._may_go_on():
            return
        link.sync = SyncProgress(link.regions.dirty_bytes, time.monotonic())
        log.info("copying %d bytes to mirror %s", link.sync.total_bytes, link.path)
        position = 0
        while self._may_go_on() and (region := link.regions.begin_copy(position)):
            offset, length = region
            equal = False
            try:
                equal = await self._copy_region(offset, length)
            finally:
                link.regions.finish_copy(offset, equal=equal)
            position = offset + length
            link.sync.done_bytes = max(0, link.sync.total_bytes - link.regions.dirty_bytes)
        if not link.regions.dirty_bytes:
            await self._in_worker(link.flush)
        if not link.regions.dirty_bytes and link.error is None:
            with contextlib.suppress(OSError):  # of a record, or of the target: both are seen again
                await self._finish()
        link.sync, link.waiting = None, not self._permitted()

    async def _finish(self) -> None:
        """Forget what was held, and have the mirror itself say that it is in sync before the status does."""
        link = self._link
        await link.forget_released()
        if not link.regions.held_bytes:
            await link.announce(IN_SYNC)
            log.info("mirror %s is in sync", link.path)
            await self._path.tidy()

    async def _release_what_may_be(self) -> None:
        """Have the regions copied that were held until windows opened which are open now."""
        held = self._link.held
        users = held.users(OUTSIDE_WINDOW)
        if users and all(self._gate(user) is UPDATE for user in users):
            barred = held.regions(NO_RIGHT)
            free = bytes(region & ~other for region, other in zip(held.regions(OUTSIDE_WINDOW), barred, strict=True))
            if any(free) and self._link.regions.held_bytes:
                await self._link.release(free)

    async def _copy_region(self, offset: int, length: int) -> bool:
        """Copy one region piece by piece; True when all of it was copied."""
        for start in range(offset, offset + length, PIECE_BYTES):
            began_s = time.monotonic()
            updates = self._path.updates
            count = min(PIECE_BYTES, offset + length - start)
            async with self._path.ranges.hold(start, start + count):
                if not self._may_go_on() or self._link.regions.held(start, count):
                    return False
                await self._in_worker(self._copy, start, count)
            if not self._may_go_on():
                return False
            if self._path.updates != updates:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), time.monotonic() - began_s)
        return True

    def _may_go_on(self) -> bool:
        failed = self._link.error is not None or self._link.target_error is not None
        return not self._stopping.is_set() and not failed and self._permitted()

    def _permitted(self) -> bool:
        return self._gate.anyone() and self._link.held.frozen_since_s is None

    def _copy(self, offset: int, length: int) -> None:
        sector = self._disk.sector_bytes
        data = self._buffer[: -(-length // sector) * sector]
        try:
            self._path.target.read(offset, data)
        except OSError as failure:
            self._link.target_failed(failure)
            return
        self._link.update(offset, data, durable=False)

    async def _in_worker(self, work: Callable[..., None], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._workers, work, *args)
