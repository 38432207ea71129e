"""Who is writing where: overlapping updates take turns, in the order in which they asked.

Two disks stay equal only if overlapping writes reach both in one order. A write that is carried out at once, on
the loop, is alone by construction; one that leaves the loop for a worker holds its range meanwhile, and so
does a piece of a resync, which is why a late copy never overwrites newer data.

Turns are taken strictly first come, first served among those that overlap, so nobody starves; and a turn
waits only for earlier ones, so there is no cycle to deadlock in. All calls come from the loop's thread.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class _Turn:
    __slots__ = ("ahead", "behind", "end", "ready", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.ahead = 0  # turns that must end before this one begins
        self.behind: list[_Turn] = []
        self.ready: asyncio.Future[None] | None = None


class Ranges:
    """The byte ranges [start, end) on which somebody works."""

    def __init__(self) -> None:
        self._turns: dict[_Turn, None] = {}  # in the order of asking

    def free(self, start: int, end: int) -> bool:
        """Whether nobody works on, or waits for, any part of the range."""
        if not self._turns:
            return True
        return all(end <= turn.start or turn.end <= start for turn in self._turns)

    @asynccontextmanager
    async def hold(self, start: int, end: int) -> AsyncIterator[None]:
        """Wait for the turn on the range, and have it until the block ends."""
        turn = _Turn(start, end)
        for other in self._turns:
            if other.start < end and start < other.end:
                other.behind.append(turn)
                turn.ahead += 1
        self._turns[turn] = None
        try:
            if turn.ahead:
                turn.ready = asyncio.get_running_loop().create_future()
                await turn.ready
            yield
        finally:
            del self._turns[turn]
            for other in turn.behind:
                other.ahead -= 1
                if not other.ahead and other.ready is not None and not other.ready.done():
                    other.ready.set_result(None)
