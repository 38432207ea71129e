"""One mirror as its volume sees it: the encrypted disk, where it differs, and whether it is still followed.

    state      means                                                    left by
    syncing    regions differ and are being copied                      the flush after the last -> in-sync
    in-sync    no region differs; every write goes to both disks        a failed mirror write  -> degraded,
                                                                        a failed target write  -> behind
    behind     regions differ, and nothing is copying them              the next start         -> syncing
    degraded   the mirror failed and is not written any more            the next start         -> syncing

The state is never stored: it is derived from what is known of the regions and of the failure. A mirror
that failed once is left alone until the next start, when all of it is copied: of what it held in its own
caches nothing is known.
"""

import logging
import time
from dataclasses import dataclass
from typing import Final

from lockstep.disk.encrypted import EncryptedDisk
from lockstep.volume.regions import RegionMap

log = logging.getLogger(__name__)

IN_SYNC: Final = "in-sync"
SYNCING: Final = "syncing"
BEHIND: Final = "behind"
DEGRADED: Final = "degraded"


@dataclass
class SyncProgress:
    """How far a resync is. Bytes; seconds of the monotonic clock."""

    total_bytes: int
    started_s: float
    done_bytes: int = 0

    def rate_bytes_s(self) -> float:
        """Return the average so far."""
        return self.done_bytes / max(time.monotonic() - self.started_s, 1e-3)


class MirrorLink:
    """A mirror that is open and follows its target."""

    def __init__(self, path: str, uuid: str, disk: EncryptedDisk, regions: RegionMap) -> None:
        self.path = path
        self.uuid = uuid
        self.regions = regions
        self.sync: SyncProgress | None = None
        self.error: str | None = None  # why the mirror is not followed any more
        self.target_error: str | None = None  # why the target cannot be copied from
        self._disk = disk

    @property
    def state(self) -> str:
        """One of the four states in the table above."""
        if self.error is not None:
            return DEGRADED
        if not self.regions.dirty_bytes and self.sync is None:  # a copy is over when it is durable
            return IN_SYNC
        return BEHIND if self.target_error else SYNCING

    def update(self, offset: int, data: memoryview, *, durable: bool) -> None:
        """Carry an update to the mirror, whole sectors; a failure drops the mirror and is not the writer's."""
        if self.error is None:
            try:
                self._disk.write(offset, data, durable=durable)
            except OSError as failure:
                self.drop("writing", failure)

    def clear(self, offset: int, length: int) -> None:
        """Carry zeroes to the mirror, whole sectors; failures as in `update`."""
        if self.error is None:
            try:
                self._disk.zero(offset, length)
            except OSError as failure:
                self.drop("writing", failure)

    def flush(self) -> None:
        """Make the mirror durable; failures as in `update`."""
        if self.error is None:
            try:
                self._disk.flush()
            except OSError as failure:
                self.drop("flushing", failure)

    def drop(self, doing: str, failure: OSError) -> None:
        """Stop following: nothing is written to the mirror any more, and all of it counts as different."""
        self.regions.mark_all()
        self.error = f"{doing} the mirror failed: {failure.strerror or failure}"
        log.error("mirror %s is degraded: %s. The target goes on alone.", self.path, self.error)

    def target_failed(self, offset: int, length: int, failure: OSError) -> None:
        """A write to the target failed after the mirror took it: the range may differ, and which is right is open.

        It is not copied by itself: a failing target must not overwrite the better copy.
        """
        self.regions.mark(offset, length)
        self.target_error = f"the target failed: {failure.strerror or failure}"
        log.error("mirror %s is behind: %s", self.path, self.target_error)

    def close(self) -> None:
        """Close the disk."""
        self._disk.close()
