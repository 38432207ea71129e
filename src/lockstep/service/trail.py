"""The audit trail as a served volume writes it: in order, by one task, beside the work that it tells of.

If a row cannot be written, it is tried again until it can be, and meanwhile no mirror is updated: what nobody could
account for is recorded as different, and copied afterwards. The target goes on. So it is while the registry does not
answer; then the row is waited for, since it may be written yet.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from lockstep.errors import LockstepError
from lockstep.registry.audit import Actor
from lockstep.registry.store import Registry
from lockstep.service.answers import in_time
from lockstep.service.gate import VolumeGate

log = logging.getLogger(__name__)

RETRY_S: Final = 1.0
SETTLE_S: Final = 10.0
UNWRITABLE: Final = "the audit trail cannot be written"
MAX_WAITING: Final = 10_000

SERVED, MIRROR, LOST = "serve", "mirror", "events-lost"
"""Events of the audit trail: from the first on, and after the last, it tells anew in which state each mirror is."""


@dataclass(frozen=True, slots=True)
class _Row:
    """What happened, and when: it may be written much later."""

    event: str
    actor: Actor
    reason: str
    details: dict[str, Any]
    at_us: int


class Trail:
    """What happens to one volume, on its way to the registry. Calls come from the loop's thread."""

    def __init__(
        self, registry: Registry, volume_name: str, gate: VolumeGate, in_worker: Callable[..., Awaitable[None]]
    ) -> None:
        """`in_worker` runs a blocking function with its arguments."""
        self.error: str | None = None  # why rows cannot be written
        self._registry = registry
        self._volume_name = volume_name
        self._gate = gate
        self._in_worker = in_worker
        self._rows: deque[_Row] = deque()
        self._lost = 0
        self._something = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()

    def note(self, event: str, actor: Actor, reason: str, **details: Any) -> None:
        """Have a row written soon. Past MAX_WAITING rows, those that come are counted only."""
        if len(self._rows) >= MAX_WAITING:
            self._lost += 1
            return
        self._rows.append(_Row(event, actor, reason, details, time.time_ns() // 1000))
        self._written.clear()
        self._something.set()

    @contextlib.asynccontextmanager
    async def written(self) -> AsyncIterator[None]:
        """Write rows as they come, and at the end of the block those that are left, as far as SETTLE_S allow."""
        writing = asyncio.create_task(self.run())
        try:
            yield
        finally:
            await self.settle(SETTLE_S)
            writing.cancel()

    async def settle(self, timeout_s: float) -> None:
        """Wait until every row is written, or `timeout_s` have passed."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._written.wait(), timeout_s)
        if self._rows:
            log.error("%d events of the volume could not be written to the audit trail", len(self._rows) + self._lost)

    async def run(self) -> None:
        """Write rows as they come, until cancelled."""
        while True:
            await self._something.wait()
            self._something.clear()
            while self._rows:
                if await self._write(self._rows[0]):
                    self._rows.popleft()
                else:
                    await asyncio.sleep(RETRY_S)
            if self._lost:
                lost, self._lost = self._lost, 0
                reason = f"{lost} events came faster than they could be written, and are not in the trail"
                self.note(LOST, Actor("lockstep", "server"), reason, count=lost)
            else:
                self._written.set()

    async def _write(self, row: _Row) -> bool:
        def append() -> None:
            self._registry.audit(
                row.event,
                actor=row.actor,
                volume=self._volume_name,
                reason=row.reason,
                details=row.details,
                at_us=row.at_us,
            )

        writing = asyncio.ensure_future(self._in_worker(append))
        try:
            try:
                await in_time(writing)
            except TimeoutError as silence:
                self._suspend(silence, None)
                await writing
        except Exception as failure:  # noqa: BLE001 (it is logged there)
            self._suspend(failure, None if isinstance(failure, LockstepError) else failure)
            return False
        if self.error is not None:
            log.info("the audit trail can be written again")
            self.error = None
            self._gate.suspend(False)
        return True

    def _suspend(self, failure: Exception, where: Exception | None) -> None:
        if self.error is None:
            log.error("%s, so the mirrors are not updated: %s", UNWRITABLE, failure, exc_info=where)
        self.error = f"{UNWRITABLE}: {failure}"
        self._gate.suspend(True)
