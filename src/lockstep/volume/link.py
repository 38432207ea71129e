"""One mirror as its volume sees it: the encrypted disk, where it differs, and whether it is still followed.

    state      means                                                    left by
    syncing    regions differ and are being copied                      the flush after the last -> in-sync
    in-sync    no region differs; every write goes to both disks        a failed mirror write  -> degraded,
                                                                        a held update, a failed
                                                                        target write           -> behind
    behind     regions differ, and nothing is copying them: they are    a window's opening, a
               held, nobody may update the mirror, or the target failed sync, the next start   -> syncing
    degraded   the mirror failed and is not written any more            the next start         -> syncing

The state is never stored: it is derived from what is known of the regions and of the failure.

Every write is recorded in the intent bitmap before it reaches either disk, also while the mirror is degraded. Its
marks are cleared only after both disks were flushed; so when one of them fails, whatever its caches lost lies in
marked regions, and these are what differs.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

from lockstep.disk.encrypted import EncryptedDisk
from lockstep.volume.held import HeldRecord
from lockstep.volume.intent import IntentBitmap
from lockstep.volume.regions import RegionMap, positions

log = logging.getLogger(__name__)

IN_SYNC: Final = "in-sync"
SYNCING: Final = "syncing"
BEHIND: Final = "behind"
DEGRADED: Final = "degraded"
FROZEN: Final = "frozen"
"""What the mirror's own token says in place of `behind` while the mirror is the disk as it was at one moment."""


@dataclass
class SyncProgress:
    """How far a resync is. Bytes; seconds of the monotonic clock."""

    total_bytes: int
    started_s: float
    done_bytes: int = 0

    def rate_bytes_s(self) -> float:
        """Return the average so far."""
        return self.done_bytes / max(time.monotonic() - self.started_s, 1e-3)


class Keeper(Protocol):
    """Who keeps what is written about a mirror, on the mirror and beside it."""

    async def announce(self, state: str) -> None:
        """Write the state on the mirror, if it is not there yet and can be; in bounded time, and never an error."""

    async def advance(self) -> None:
        """Give the mirror a new generation, so that no older copy is taken for it. Raises OSError."""

    async def disown(self) -> None:
        """Have the next start copy everything: the bitmap cannot say what differs. Raises OSError."""


class MirrorLink:
    """A mirror that is open and follows its target."""

    def __init__(
        self,
        path: str,
        uuid: str,
        disk: EncryptedDisk,
        regions: RegionMap,
        intent: IntentBitmap,
        held: HeldRecord,
        keeper: Keeper,
    ) -> None:
        self.path = path
        self.uuid = uuid
        self.regions = regions
        self.intent = intent
        self.held = held
        self._keeper = keeper
        self.sync: SyncProgress | None = None
        self.error: str | None = None  # why the mirror is not followed any more
        self.target_error: str | None = None  # why the target cannot be copied from
        self.waiting = held.frozen_since_s is not None  # nothing may be copied now
        self._first_hold = asyncio.Lock()
        self._disk = disk

    @property
    def state(self) -> str:
        """One of the four states in the table above."""
        if self.error is not None:
            return DEGRADED
        if self.sync is None and not self.regions.dirty_bytes and not self.regions.held_bytes:
            return IN_SYNC  # a copy is over when it is durable
        if self.target_error or self.waiting or (self.sync is None and not self.regions.dirty_bytes):
            return BEHIND
        return SYNCING

    @property
    def consistent(self) -> bool:
        """Whether the mirror alone is the whole disk as it was at one moment: now, or when it was frozen."""
        return self.error is None and (self.state == IN_SYNC or self.held.frozen_since_s is not None)

    @property
    def token_state(self) -> str:
        """What the mirror says of itself, for whoever restores from it alone."""
        return FROZEN if self.state == BEHIND and self.consistent else self.state

    async def forget(self, regions: list[int]) -> None:
        """Clear the marks of regions that are equal and flushed, unless somebody asked to write there meanwhile.

        Raises OSError, and then clears nothing, when the mirror cannot be given a new generation.
        """
        if regions and self.error is None and self.target_error is None:
            await self._keeper.advance()
            await self.intent.clear(regions)

    async def announce(self, state: str | None = None) -> None:
        """Have the mirror itself say how it stands, so that a restore from it alone knows."""
        await self._keeper.announce(state or self.token_state)

    async def record(self, start: int, end: int) -> None:
        """Have [start, end) marked durably, before it is written anywhere; a frozen mirror is so no more.

        If that fails, the mirror is dropped and disowned; raises OSError when it cannot even be disowned, since then
        the next start would take it for equal.
        """
        try:
            await self.held.thaw()
            await self.intent.mark(start, end)
        except OSError as failure:
            self.drop("recording the writes to", failure)
            await self._keeper.disown()

    async def hold(self, start: int, end: int, user: str, kind: str, in_worker: Callable[..., Awaitable[None]]) -> None:
        """Have [start, end) recorded durably as what `user` writes to the target without updating the mirror.

        Raises OSError when it cannot be: such a write must not reach the target, since nothing would keep it from
        being copied.
        """
        async with self._first_hold:  # others wait until it is on record whether the mirror was equal
            if self.state == IN_SYNC:
                self.regions.hold(start, end - start)
                await in_worker(self.flush)
                await self.held.hold(start, end, user, kind, equal=self.error is None)
        self.regions.hold(start, end - start)
        await self.held.hold(start, end, user, kind, equal=False)

    async def release(self, regions: bytes) -> None:
        """Have these regions, a byte each, copied, as far as they are held. Raises OSError."""
        await self.held.thaw()
        self.regions.release(regions)
        self.waiting = False

    async def forget_released(self) -> None:
        """Clear the record of what was held, released, copied and flushed. Raises OSError."""
        done = [region for region in positions(self.held.regions()) if self.regions.clean(region)]
        if done:
            await self.held.forget(done)

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with what the mirror holds, whole sectors; a failure drops the mirror and is not the writer's."""
        try:
            self._disk.read(offset, into)
        except OSError as failure:
            self.drop("reading", failure)

    def update(self, offset: int, data: memoryview, *, durable: bool) -> None:
        """Carry an update to the mirror, whole sectors; a failure drops the mirror and is not the writer's."""
        if self.error is None:
            try:
                self._disk.write(offset, data, durable)
            except OSError as failure:
                self.drop("writing", failure)
            else:
                return
        self.regions.mark(offset, len(data))

    def clear(self, offset: int, length: int) -> None:
        """Carry zeroes to the mirror, whole sectors; failures as in `update`."""
        if self.error is None:
            try:
                self._disk.zero(offset, length)
            except OSError as failure:
                self.drop("writing", failure)
        if self.error is not None:
            self.regions.mark(offset, length)

    def flush(self) -> None:
        """Make the mirror durable; failures as in `update`."""
        if self.error is None:
            try:
                self._disk.flush()
            except OSError as failure:
                self.drop("flushing", failure)

    def drop(self, doing: str, failure: OSError) -> None:
        """Stop following: nothing is written to the mirror any more, and all that is marked counts as different."""
        self.regions.mark_regions(self.intent.marked())
        self.error = f"{doing} the mirror failed: {failure.strerror or failure}"
        log.error("mirror %s is degraded: %s. The target goes on alone.", self.path, self.error)

    def target_failed(self, failure: OSError) -> None:
        """The target failed where the mirror did not: whatever is marked may differ, and which is right is open.

        It is not copied by itself: a failing target must not overwrite the better copy.
        """
        self.regions.mark_regions(self.intent.marked())
        self.target_error = f"the target failed: {failure.strerror or failure}"
        log.error("mirror %s is behind: %s", self.path, self.target_error)

    def close(self) -> None:
        """Close the disk."""
        self._disk.close()
