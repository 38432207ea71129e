"""Verify as a command and as a scrub: who began it, how far it is, and what it found, in the audit trail.

A scrub is a verify that repairs nothing, begun by itself when its weekly window opens. When the window closes it
rests, and goes on in the next one; so a large disk is compared over several nights.
"""

import asyncio
import logging
import time
from typing import Any, Final

from lockstep.errors import AlreadyVerifying, NotServed
from lockstep.registry.audit import Actor
from lockstep.registry.windows import Schedule
from lockstep.service.trail import Trail
from lockstep.service.volume_session import VolumeSession
from lockstep.volume.verify import Comparison, Verify

log = logging.getLogger(__name__)

SCRUBBER: Final = Actor("lockstep", "scrub")
MOST_MISMATCHES: Final = 100  # that one row of the trail lists

Verifies = dict[str, Verify]  # mirror's path -> its comparison


class Verification:
    """The comparisons of one served volume, one at a time."""

    def __init__(self, session: VolumeSession, trail: Trail) -> None:
        self.schedule: Schedule | None = None  # when to scrub
        self._session = session
        self._trail = trail
        self._closed = False
        self._task: asyncio.Task[None] | None = None  # of the last comparison, whoever began it
        self._verifies: Verifies = {}  # what was asked for last
        self._asked: asyncio.Task[None] | None = None
        self._scrubs: Verifies = {}  # one that has begun, and has not seen everything yet
        self._scrubbed = 0.0, 0.0  # by the wall clock: when a scrub was begun that was finished, and its window's end

    @property
    def running(self) -> bool:
        """Whether a comparison is under way."""
        return self._task is not None and not self._task.done()

    def begin(self, actor: Actor, *, repair: bool) -> None:
        """Begin to compare all mirrors. Raises AlreadyVerifying, and NotServed after `close`."""
        if self._closed:
            raise NotServed(volume=self._session.record.name)
        if self.running:
            raise AlreadyVerifying(volume=self._session.record.name)
        self._verifies = self._made(repair=repair)
        self._task = self._asked = asyncio.get_running_loop().create_task(self._run(actor))

    async def stop(self) -> None:
        """End the one that was asked for, after the piece that it is at."""
        for verify in self._verifies.values():
            verify.stop()
        if self._asked is not None:
            await self._asked

    async def close(self) -> None:
        """End whatever is under way, after the piece that it is at, and begin no other."""
        self._closed = True
        for verify in (*self._verifies.values(), *self._scrubs.values()):
            verify.stop()
        if self._task is not None:
            await self._task

    async def wait(self, patience_s: float) -> None:
        """Wait for the end of the one that was asked for, not longer than this."""
        if self._asked is not None:
            await asyncio.wait([self._asked], timeout=patience_s)

    def describe(self) -> dict[str, Any]:
        """Return how far the one is that was asked for last, or in the end what it found; a scrub is another matter.

        Mismatches are listed in the end only: they may be many, and how far it is is asked all the time.
        """
        running = self._asked is not None and not self._asked.done()
        most = 0 if running else None
        return {"running": running, "mirrors": [of_comparison(p, v.found, most) for p, v in self._verifies.items()]}

    def look(self) -> None:
        """Begin a scrub, or go on with it, if its window is open; to be called about once a second."""
        now_s, (begun_s, scrubbed_until_s) = time.time(), self._scrubbed
        if self.running or self._closed or self.schedule is None or begun_s <= now_s < scrubbed_until_s:
            return
        open_until_s = self.schedule.open_until(now_s)
        if open_until_s is not None:
            self._scrubs = self._scrubs or self._made(repair=False)
            self._task = asyncio.get_running_loop().create_task(self._scrub(open_until_s))

    def _made(self, *, repair: bool) -> Verifies:
        session = self._session
        return {
            mirror.link.path: Verify(session.writes, mirror.link, session.workers, repair=repair)
            for mirror in session.mirrors
        }

    async def _run(self, actor: Actor) -> None:
        for path, verify in self._verifies.items():
            await verify.run()
            self._note(actor, "verify", path, verify.found)
        for resync in self._session.resyncs:
            resync.wake()

    async def _scrub(self, until_s: float) -> None:
        begun_s = time.time()
        for verify in self._scrubs.values():
            await verify.run(lambda: time.time() < until_s)
        if all(verify.over or verify.found.error for verify in self._scrubs.values()):
            for path, verify in self._scrubs.items():
                self._note(SCRUBBER, "scrub", path, verify.found)
            self._scrubs, self._scrubbed = {}, (begun_s, until_s)

    def _note(self, actor: Actor, event: str, path: str, found: Comparison) -> None:
        self._trail.note(event, actor, sentence(path, found), **of_comparison(path, found, MOST_MISMATCHES))
        (log.error if found.mismatches else log.info)("%s", sentence(path, found))


def of_comparison(path: str, found: Comparison, most: int | None = None) -> dict[str, Any]:
    """A comparison as plain data, with at most so many mismatches."""
    return {
        "path": path,
        "done_bytes": found.done_bytes,
        "total_bytes": found.total_bytes,
        "compared_bytes": found.compared_bytes,
        "left_out_bytes": found.left_out_bytes,
        "mismatches": [{"offset": offset, "length": length} for offset, length in found.mismatches[:most]],
        "differing_bytes": sum(length for _, length in found.mismatches),
        "repaired_bytes": found.repaired_bytes,
        "error": found.error,
    }


def sentence(path: str, found: Comparison) -> str:
    """What a comparison has found, in words."""
    differ = sum(length for _, length in found.mismatches)
    result = f"{differ} bytes differ, in {len(found.mismatches)} places" if differ else "no difference"
    repaired = f", {found.repaired_bytes} of them marked to be copied" if found.repaired_bytes else ""
    left = f"; {found.left_out_bytes} bytes that are known to differ were left out" if found.left_out_bytes else ""
    early = f"; it ended early: {found.error}" if found.error else ""
    outcome = f"{found.compared_bytes} bytes, {result}{repaired}{left}{early}"
    return f"mirror {path} was compared with its target: {outcome}"
