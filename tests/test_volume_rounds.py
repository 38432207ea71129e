"""Group commit: nobody is answered by a round that began before they asked, and there is one round at a time."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.volume.rounds import Rounds

TICKS = st.lists(st.integers(0, 3), max_size=12)


class Work:
    """Rounds of a few ticks of the loop, which must not meet."""

    def __init__(self, *, at_once: bool, takes: int = 2) -> None:
        self.begun = self.ended = 0
        self.takes = takes
        self.rounds = Rounds(self.begin, at_once=at_once)

    def begin(self) -> Coroutine[Any, Any, None]:
        assert self.begun == self.ended, "two rounds at a time"
        self.begun += 1
        return self._end()

    async def _end(self) -> None:
        for _ in range(self.takes):
            await asyncio.sleep(0)
        self.ended += 1

    async def ask(self) -> None:
        before = self.begun
        await self.rounds.join()
        assert self.ended > before, "answered by a round that had begun before"


@given(TICKS, st.integers(0, 3), st.booleans())
def test_whoever_asks_gets_a_round_of_after(pauses: list[int], takes: int, at_once: bool) -> None:
    async def main() -> None:
        work = Work(at_once=at_once, takes=takes)
        asking = []
        for pause in pauses:
            for _ in range(pause):
                await asyncio.sleep(0)
            asking.append(asyncio.create_task(work.ask()))
        await asyncio.gather(*asking)
        assert work.begun == work.ended <= len(pauses)

    asyncio.run(main())


@pytest.mark.parametrize(("at_once", "rounds"), [(False, 1), (True, 2)])
def test_those_who_ask_together_share_a_round(at_once: bool, rounds: int) -> None:
    async def main() -> int:
        work = Work(at_once=at_once)
        await asyncio.gather(*(work.ask() for _ in range(10)))
        return work.begun

    assert asyncio.run(main()) == rounds


def test_a_round_that_nothing_is_in_the_way_of_begins_at_once() -> None:
    async def main() -> None:
        work = Work(at_once=True)
        first = work.rounds.join()
        assert work.begun == 1
        second = work.rounds.join()
        assert work.begun == 1
        await first
        await second
        assert work.begun == 2

    asyncio.run(main())


def test_who_no_longer_waits_does_not_end_the_round_of_the_others() -> None:
    async def main() -> None:
        work = Work(at_once=True)
        leaving = asyncio.create_task(work.ask())
        await asyncio.sleep(0)
        staying = asyncio.create_task(work.ask())
        leaving.cancel()
        await staying
        assert work.begun == work.ended == 2

    asyncio.run(main())
