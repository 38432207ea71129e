"""Who is writing where: overlapping updates take turns, in the order in which they asked.

Two disks stay equal only if overlapping writes reach both in one order. A write that is carried out at once, on
the loop, is alone by construction; one that leaves the loop for a worker holds its range meanwhile, and so
does a piece of a resync, which is why a late copy never overwrites newer data.

Turns are taken strictly first come, first served among those that overlap, so nobody starves; and a turn
waits only for earlier ones, so there is no cycle to deadlock in. All calls come from the loop's thread.
"""

import asyncio
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import chain

from lockstep.disk.runs import apart, run_of

Extents = Sequence[tuple[int, int]]


class Turn:
    """Somebody's turn, on all `extents` at once."""

    __slots__ = ("ahead", "behind", "bounds", "ready")

    def __init__(self, extents: Extents) -> None:
        """Of these [start, end), at least one."""
        self.bounds = array("Q", chain.from_iterable(extents))
        self.ahead = 0  # turns that must end before this one begins
        self.behind: list[Turn] = []
        self.ready: asyncio.Future[None] | None = None


class Ranges:
    """The byte ranges [start, end) on which somebody works."""

    def __init__(self) -> None:
        self._turns: dict[Turn, None] = {}  # in the order of asking

    def free(self, start: int, end: int) -> bool:
        """Whether nobody works on, or waits for, any part of the range."""
        return self.free_run(run_of(start, end - start), 1) == 1

    def free_run(self, run: "array[int]", count: int) -> int:
        """On how many writes of a run, from the front, nobody works."""
        for turn in self._turns:
            count = apart(run, count, turn.bounds)
        return count

    def busy(self) -> Iterator[tuple[int, int]]:
        """Each [start, end) on which somebody works, or for which somebody waits."""
        for turn in self._turns:
            yield from zip(turn.bounds[::2], turn.bounds[1::2], strict=True)

    def take(self, extents: Extents) -> Turn:
        """Have the turn on ranges that are known to be free, until `end`."""
        turn = Turn(extents)
        self._turns[turn] = None
        return turn

    def ask(self, extents: Extents) -> Turn:
        """Ask for the turn on all of these ranges, after all who asked before; `end` is to be called."""
        turn, run = Turn(extents), array("Q", chain.from_iterable((start, end - start, 0, 0) for start, end in extents))
        for other in self._turns:
            if apart(run, len(extents), other.bounds) < len(extents):
                other.behind.append(turn)
                turn.ahead += 1
        self._turns[turn] = None
        return turn

    def end(self, turn: Turn) -> None:
        """Give up a turn, whether it had begun or not."""
        del self._turns[turn]
        for other in turn.behind:
            other.ahead -= 1
            if not other.ahead and other.ready is not None and not other.ready.done():
                other.ready.set_result(None)

    @asynccontextmanager
    async def hold(self, extents: Extents) -> AsyncIterator[None]:
        """Wait for the turn on all of these ranges, and have it until the block ends."""
        turn = self.ask(extents)
        try:
            if turn.ahead:
                turn.ready = asyncio.get_running_loop().create_future()
                await turn.ready
            yield
        finally:
            self.end(turn)
