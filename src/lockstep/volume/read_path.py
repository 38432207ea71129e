"""Reads come from the target; where it cannot be read, from a mirror that is equal there (promise P6)."""

import logging
import time
from array import array
from collections.abc import Awaitable, Coroutine
from typing import Any, Final

from lockstep.disk.runs import requests, run_of
from lockstep.volume.filling import FULL
from lockstep.volume.workers import Workers
from lockstep.volume.write_path import WritePath

log = logging.getLogger(__name__)

REPORT_INTERVAL_S: Final = 10.0


class ReadPath:
    """The reads of one target. Offsets and lengths are bytes within it; failures are OSErrors."""

    def __init__(self, updates: WritePath, workers: Workers) -> None:
        """`updates` is how the same target and mirrors are written."""
        self.errors = 0  # reads that the target failed
        self.error: str | None = None  # what became of the last of them
        self._updates = updates
        self._target = updates.target
        self._in_worker = workers.begin
        self._reported_s = float("-inf")

    def read_run(self, into: bytearray, run: "array[int]", count: int) -> int:
        """Carry out as many reads of a run as the target's cache answers at once; return how many, from the front."""
        self._updates.requests += count
        return self._target.read_run(into, run, count)

    def read(self, into: memoryview, run: "array[int]", count: int) -> Coroutine[Any, Any, None]:
        """Carry out a run, from the target, or from a mirror that is equal there.

        The target has been asked when this returns, unless it is a new one. What is returned raises OSError when there
        is neither, for any of its reads.
        """
        self._updates.requests += count
        if self._updates.filling is not None:
            return self._read_each(into, run, count)
        return self._settle(self._in_worker(self._target.read_job(into, run, count)), into, run, count)

    async def _settle(self, begun: Awaitable[None], into: memoryview, run: "array[int]", count: int) -> None:
        try:
            await begun
        except OSError as failure:
            await self._read_each(into, run, count, failure if count == 1 else None)

    async def _read_each(self, into: memoryview, run: "array[int]", count: int, failure: OSError | None = None) -> None:
        for offset, length, position in requests(run, 0, count):
            await self._read(offset, into[position : position + length], failure)

    async def _read(self, offset: int, into: memoryview, failure: OSError | None) -> None:
        """Read from the target, unless that is known to be a `failure`, or from a mirror."""
        try:
            if failure is not None:
                raise failure
            if self._updates.filling is not None:
                await self._updates.filling.fetch(offset, len(into))
            await self._in_worker(self._target.read_job(into, run_of(offset, len(into)), 1))
        except OSError as error:
            rescued = await self._read_mirror(offset, into)
            self._report(offset, len(into), error, rescued)
            if rescued is None:
                raise

    async def _read_mirror(self, offset: int, into: memoryview) -> str | None:
        """Fill `into` from a mirror, and return which; nobody writes there meanwhile."""
        start, end = self._updates.sectors(offset, len(into))
        async with self._updates.ranges.hold([(start, end)]):
            for mirror in self._updates.mirrors:
                equal = mirror.error is None and mirror.regions.equal(offset, len(into))
                # Each its own: one that was given up may still fill it.
                whole = memoryview(bytearray(min(end, mirror.end_bytes) - start))
                if equal and await mirror.read(start, whole, keep=mirror.is_source):
                    into[:] = whole[offset - start : offset - start + len(into)]
                    return mirror.path
        return None

    def _report(self, offset: int, length: int, failure: OSError, rescued: str | None) -> None:
        self.errors += 1
        answer = f"the mirror {rescued} answered" if rescued else "no mirror could answer"
        reason = failure.strerror or str(failure)
        self.error = f"reading {length} bytes of the target at offset {offset} failed ({reason}): {answer}"
        if time.monotonic() - self._reported_s > REPORT_INTERVAL_S:
            self._reported_s = time.monotonic()
            advice = "Make room there" if failure.errno in FULL else "Replace it"
            log.error("%s. Reads that the target has failed so far: %d. %s.", self.error, self.errors, advice)
