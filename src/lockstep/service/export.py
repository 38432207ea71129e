"""A volume as the NBD server knows it: its write and read path on one side, the protocol's terms on the other."""

from collections.abc import Sequence

from lockstep.nbd import wire
from lockstep.nbd.negotiation import ExportInfo
from lockstep.service.volume_session import VolumeSession

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
    """Joins a volume to the NBD server; what the two have in common is handed through as it is."""

    def __init__(self, session: VolumeSession) -> None:
        name, target = session.record.name, session.target
        self.info = ExportInfo(name, target.size_bytes, _FLAGS, f"Lockstep volume {name}")
        self._target = target
        self._in_worker = session.workers.run
        self.read_run = session.reads.read_run
        self.read = session.reads.read
        self.write_run = session.writes.write_run
        self.write = session.writes.write
        self.half_done = session.writes.half_done
        self.zero = session.writes.zero
        self.trim = session.writes.trim
        self.flush = session.writes.flush

    async def cache(self, offset: int, length: int) -> None:
        """Have the page cache read ahead."""
        await self._in_worker(self._target.prefetch, offset, length)

    async def allocation(self, offset: int, length: int, limit: int) -> Sequence[tuple[int, int]]:
        """Holes of the target read as zeroes."""
        return await self._in_worker(self._extents, offset, length, limit)

    def _extents(self, offset: int, length: int, limit: int) -> Sequence[tuple[int, int]]:
        extents: list[tuple[int, int]] = []
        for _start, count, data in self._target.extents(offset, length):
            if count:  # none where somebody trims while we look
                extents.append((count, 0 if data else wire.STATE_HOLE | wire.STATE_ZERO))
            if len(extents) == limit:
                break
        return extents
