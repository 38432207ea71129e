"""How fast background work may go: as fast as it can while clients rest, and giving way while they do not.

While clients are at work, each piece is followed by a rest that is longer each time, up to GIVE_WAY times as long as
the piece took: so clients have the disks nearly to themselves. But never so long that less than FLOOR_BYTES_S gets
done: so whatever has begun ends.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final

FLOOR_BYTES_S: Final = 8 << 20
GIVE_WAY: Final = 8.0


class Pace:
    """The pace of one piece of work, which `stopping` ends."""

    def __init__(self, requests: Callable[[], int], stopping: asyncio.Event) -> None:
        """`requests` counts what clients have asked so far."""
        self._requests = requests
        self._stopping = stopping
        self._seen = requests()
        self._since_s = time.monotonic()
        self._factor = 0.0

    def begin(self) -> None:
        """A piece begins."""
        self._seen = self._requests()
        self._since_s = time.monotonic()

    async def rest(self, count: int) -> None:
        """A piece of `count` bytes has ended: let clients have the disks, if they want them."""
        if self._requests() == self._seen:
            self._factor = 0.0
            return
        self._factor = min(GIVE_WAY, self._factor * 2 or 1.0)
        took_s = time.monotonic() - self._since_s
        rest_s = min(took_s * self._factor, count / FLOOR_BYTES_S - took_s)
        if rest_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), rest_s)

    @property
    def gives_way(self) -> bool:
        """Whether clients were at work during the last piece."""
        return self._factor > 0
