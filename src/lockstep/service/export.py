"""A volume as the NBD server knows it: the write path on one side, the protocol's terms on the other."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from lockstep.nbd import wire
from lockstep.nbd.negotiation import ExportInfo
from lockstep.volume.write_path import WritePath

_FLAGS = (
    wire.HAS_FLAGS
    | wire.SEND_FLUSH
    | wire.SEND_FUA
    | wire.SEND_TRIM
    | wire.SEND_WRITE_ZEROES
    | wire.SEND_FAST_ZERO
    | wire.SEND_CACHE
    | wire.CAN_MULTI_CONN  # all connections share one write path, and a flush covers what any of them was answered
)


class VolumeExport:
    """Joins a write path to the NBD server; what the two have in common is handed through as it is."""

    def __init__(self, name: str, path: WritePath, workers: Executor) -> None:
        self.info = ExportInfo(name, path.target.size_bytes, _FLAGS, f"Lockstep volume {name}")
        self._target = path.target
        self._workers = workers
        self.read_now = path.target.read_cached
        self.write_now = path.write_now
        self.write = path.write
        self.zero = path.zero
        self.trim = path.trim
        self.flush = path.flush

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` from the target."""
        await self._in_worker(self._target.read, offset, into)

    async def cache(self, offset: int, length: int) -> None:
        """Have the page cache read ahead."""
        await self._in_worker(self._target.prefetch, offset, length)

    async def allocation(self, offset: int, length: int, limit: int) -> Sequence[tuple[int, int]]:
        """Holes of the target read as zeroes."""
        extents: list[tuple[int, int]] = []

        def look() -> None:
            for _start, count, data in self._target.extents(offset, length):
                if count:  # none where somebody trims while we look
                    extents.append((count, 0 if data else wire.STATE_HOLE | wire.STATE_ZERO))
                if len(extents) == limit:
                    break

        await self._in_worker(look)
        return extents

    async def _in_worker(self, work: Callable[..., None], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._workers, work, *args)
