"""How fast background work may go: as fast as it can while clients rest, and giving way while they do not.

While clients are at work, each piece is followed by a rest that is longer each time, up to GIVE_WAY times as long as
the piece took: so clients have the disks nearly to themselves. But never so long that less than FLOOR_BYTES_S gets
done: so whatever has begun ends.

While they rest, and as long as the disks are quick, pieces grow, since each has to be handed to a thread and back.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final

PIECE_BYTES: Final = 1 << 20
LARGEST_PIECE_BYTES: Final = 2 << 20  # larger ones no longer fit the processor's cache, several at a time
GENTLE_PIECE_BYTES: Final = 128 << 10
QUICK_S: Final = 0.01
FLOOR_BYTES_S: Final = 8 << 20
GIVE_WAY: Final = 8.0


class Pace:
    """The pace of one piece of work, which `stopping` ends."""

    def __init__(self, requests: Callable[[], int], stopping: asyncio.Event, *, gently: bool = False) -> None:
        """`requests` counts what clients have asked so far; `gently` keeps pieces small, for a disk that is slow."""
        self._requests = requests
        self._stopping = stopping
        self._seen = requests()
        self._since_s = time.monotonic()
        self._factor = 0.0
        self._least_bytes, self._most_bytes = (
            (GENTLE_PIECE_BYTES, GENTLE_PIECE_BYTES) if gently else (PIECE_BYTES, LARGEST_PIECE_BYTES)
        )
        self.piece_bytes = self._least_bytes  # how large the next piece may be

    def begin(self) -> None:
        """A piece begins."""
        self._seen = self._requests()
        self._since_s = time.monotonic()

    async def rest(self, count: int) -> None:
        """A piece of `count` bytes has ended: let clients have the disks, if they want them."""
        took_s = time.monotonic() - self._since_s
        idle = self._requests() == self._seen
        quick = idle and took_s < QUICK_S
        self.piece_bytes = min(2 * self.piece_bytes, self._most_bytes) if quick else self._least_bytes
        if idle:
            self._factor = 0.0
            return
        self._factor = min(GIVE_WAY, self._factor * 2 or 1.0)
        rest_s = min(took_s * self._factor, count / FLOOR_BYTES_S - took_s)
        if rest_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), rest_s)

    @property
    def gives_way(self) -> bool:
        """Whether clients were at work during the last piece."""
        return self._factor > 0
