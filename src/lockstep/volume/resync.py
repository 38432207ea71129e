"""Resync: copy dirty regions from the target to a mirror while clients go on writing.

A piece is copied while its range is held, so that a client's write there comes either before the copy (and is
part of it) or after (and overwrites it, on both disks). A region is clean once all of its pieces were copied
and nobody marked it meanwhile. Clients come first: after each piece the copy rests as long as the piece took when
they have written meanwhile.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from lockstep.disk.encrypted import EncryptedDisk
from lockstep.volume.link import IN_SYNC, MirrorLink, SyncProgress
from lockstep.volume.write_path import WritePath

log = logging.getLogger(__name__)

PIECE_BYTES: Final = 1 << 20


class Resync:
    """Brings one mirror in sync."""

    def __init__(self, path: WritePath, link: MirrorLink, disk: EncryptedDisk, workers: Executor) -> None:
        self._path = path
        self._link = link
        self._disk = disk
        self._workers = workers
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Have `run` return after the piece that it is at."""
        self._stopping.set()

    async def run(self) -> None:
        """Copy until no region is dirty, `stop`, or one of the disks fails; `link.sync` tells how far it is."""
        link = self._link
        if not link.regions.dirty_bytes:
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
            await link.announce(IN_SYNC)
            log.info("mirror %s is in sync", link.path)
            with contextlib.suppress(OSError):  # of the target: its state shows it
                await self._path.tidy()
        link.sync = None

    async def _copy_region(self, offset: int, length: int) -> bool:
        """Copy one region piece by piece; True when all of it was copied."""
        for start in range(offset, offset + length, PIECE_BYTES):
            began_s = time.monotonic()
            updates = self._path.updates
            count = min(PIECE_BYTES, offset + length - start)
            async with self._path.ranges.hold(start, start + count):
                await self._in_worker(self._copy, start, count)
            if not self._may_go_on():
                return False
            if self._path.updates != updates:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), time.monotonic() - began_s)
        return True

    def _may_go_on(self) -> bool:
        return not self._stopping.is_set() and self._link.error is None and self._link.target_error is None

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
