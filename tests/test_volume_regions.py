"""Which regions differ: the map follows its model, and no mark is lost."""

import itertools
import timeit
from collections.abc import Iterable
from typing import Final

from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.volume.regions import LARGEST_REGION_BYTES, REGIONS_WANTED, RegionMap, region_bytes_for

REGION_BYTES: Final = 64 << 10

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("mark"), st.integers(0, 40 * REGION_BYTES), st.integers(1, 5 * REGION_BYTES)),
        st.tuples(st.just("begin"), st.integers(0, 40 * REGION_BYTES), st.just(0)),
        st.tuples(st.just("finish"), st.integers(0, 40 * REGION_BYTES), st.integers(0, 1)),
        st.tuples(st.just("several"), st.integers(0, 2**20), st.just(0)),
        st.tuples(st.just("hold"), st.integers(0, 40 * REGION_BYTES), st.integers(1, 5 * REGION_BYTES)),
        st.tuples(st.just("release"), st.integers(0, 2**20), st.just(0)),
    ),
    max_size=40,
)


@given(st.integers(1, 40 * REGION_BYTES), st.booleans(), OPERATIONS)
@settings(max_examples=200, deadline=None)
def test_regions_follow_their_model(size_bytes: int, dirty: bool, operations: list[tuple[str, int, int]]) -> None:
    count = -(-size_bytes // REGION_BYTES)
    regions = RegionMap(size_bytes, bytes([dirty]) * count)
    marked, copying, held = (set(range(count)) if dirty else set()), set[int](), set[int]()
    at = 0  # where the next copy looks first

    def bytes_of(numbers: Iterable[int]) -> int:
        return sum(min(REGION_BYTES, size_bytes - number * REGION_BYTES) for number in numbers)

    for what, number, value in operations:
        chosen = {region for region in range(count) if number >> region % 20 & 1}
        states = bytes(region in chosen for region in range(count))
        if what in ("mark", "hold") and number < size_bytes:
            length = min(value, size_bytes - number)
            touched = set(range(number // REGION_BYTES, (number + length - 1) // REGION_BYTES + 1))
            {"mark": regions.mark, "hold": regions.hold}[what](number, length)
            held |= touched if what == "hold" else set()
            marked, copying = (marked | touched) - held, copying - touched
        elif what == "begin":
            limit_bytes = number // 8
            begun = regions.begin_copy(limit_bytes)
            left = max(1, limit_bytes // REGION_BYTES)
            for stretch_begun in begun:
                wanted = min(marked, key=lambda region: (region < at, region))
                stretch = list(itertools.takewhile(marked.__contains__, range(wanted, wanted + left)))
                assert stretch_begun == (wanted * REGION_BYTES, bytes_of(stretch))
                marked -= set(stretch)
                copying |= set(stretch)
                at, left = stretch[-1] + 1, left - len(stretch)
            assert not left or not marked
        elif what == "finish" and number < size_bytes:  # also of regions that were marked since, or never begun
            length = min(1 + number // 16, size_bytes - number)
            regions.finish_copy([(number, length)], equal=bool(value % 2))
            over = set(range(number // REGION_BYTES, (number + length - 1) // REGION_BYTES + 1))
            if not value % 2:
                marked |= copying & over
            copying -= over
        elif what == "several":
            regions.mark_regions(states)
            marked |= chosen - held
            copying -= chosen
        elif what == "release":
            regions.release(states)
            marked |= chosen & held
            held -= chosen
        assert regions.held_bytes == bytes_of(held)
        assert regions.dirty_bytes == bytes_of(marked | copying)
        assert regions.dirty() == bytes(region in marked | copying for region in range(count))
        differing = marked | copying | held
        equal = [regions.equal(region * regions.region_bytes, 1) for region in range(count)]
        assert equal == [each not in differing for each in range(count)]


def test_how_much_differs_is_known_at_once() -> None:
    """Each flush asks, and a disk may have a million regions."""

    def quickest_s(count: int) -> float:
        regions = RegionMap(count * REGION_BYTES, bytes(count))
        return min(timeit.repeat(lambda: regions.dirty_bytes + regions.held_bytes, number=10, repeat=7))

    assert quickest_s(1 << 20) < 10 * quickest_s(1 << 8)


@given(st.integers(1, 1 << 60))
def test_region_size(size_bytes: int) -> None:
    size = region_bytes_for(size_bytes)
    assert size.bit_count() == 1
    assert 64 << 10 <= size <= 16 << 20
    assert -(-size_bytes // size) <= REGIONS_WANTED or size == LARGEST_REGION_BYTES
    assert size == 64 << 10 or -(-size_bytes // (size // 2)) > REGIONS_WANTED
