"""Overlapping updates take turns, first come, first served; others do not wait, and a turn given up blocks nobody."""

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.volume.ranges import Ranges


@dataclass
class Holder:
    """Somebody who wants a range: when they come, how long they stay, and whether they are cut off."""

    start: int
    length: int
    stays: int
    cancelled_after: int | None = None
    state: str = field(default="", compare=False)

    def overlaps(self, other: "Holder") -> bool:
        return self.start < other.start + other.length and other.start < self.start + self.length


HOLDERS = st.lists(
    st.builds(
        Holder,
        st.integers(0, 40),
        st.integers(1, 20),
        st.integers(0, 4),
        st.one_of(st.none(), st.none(), st.integers(0, 6)),
    ),
    min_size=1,
    max_size=16,
)


class Crowd:
    """Holders at work on the same ranges, watching each other."""

    def __init__(self, holders: list[Holder]) -> None:
        self.ranges = Ranges()
        self.holders = holders
        for holder in holders:
            holder.state = "not yet"

    def of(self, *states: str, overlapping: Holder) -> list[Holder]:
        return [other for other in self.holders if other.state in states and other.overlaps(overlapping)]

    async def work(self, me: Holder) -> None:
        before_me = self.of("asked", "in", overlapping=me)
        assert self.ranges.free(me.start, me.start + me.length) == (not before_me)
        me.state = "asked"
        try:
            async with self.ranges.hold([(me.start, me.start + me.length)]):
                assert not [other for other in before_me if other.state in ("asked", "in")]
                assert not self.of("in", overlapping=me)
                me.state = "in"
                await _steps(me.stays)
        finally:
            me.state = "out"

    async def cut_off(self, task: "asyncio.Task[None]", after: int) -> None:
        await _steps(after)
        task.cancel()


async def _steps(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@given(holders=HOLDERS, gaps=st.lists(st.integers(0, 2), min_size=16, max_size=16))
@settings(max_examples=150, deadline=None)
def test_overlapping_holders_take_turns_in_the_order_of_asking(holders: list[Holder], gaps: list[int]) -> None:
    async def everything() -> None:
        crowd = Crowd(holders)
        tasks: list[asyncio.Task[None]] = []
        for holder, gap in zip(holders, gaps, strict=False):
            tasks.append(asyncio.create_task(crowd.work(holder)))
            if holder.cancelled_after is not None:
                tasks.append(asyncio.create_task(crowd.cut_off(tasks[-1], holder.cancelled_after)))
            await _steps(gap)
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        for task in tasks:
            if not task.cancelled():
                task.result()
        assert crowd.ranges.free(0, 1 << 60)

    asyncio.run(everything())


def test_who_overlaps_nobody_has_the_range_at_once() -> None:
    async def check() -> None:
        ranges = Ranges()
        async with ranges.hold([(0, 10)]):
            for start, end in ((10, 20), (20, 21)):
                hold = ranges.hold([(start, end)]).__aenter__()
                with pytest.raises(StopIteration):  # entered without giving control away
                    hold.send(None)
            waiting = ranges.hold([(9, 10)]).__aenter__()
            waiting.send(None)
            waiting.close()

    asyncio.run(check())
