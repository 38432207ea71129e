"""Which regions differ: the map follows its model, and no mark is lost."""

import itertools
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
    ),
    max_size=40,
)


@given(st.integers(1, 40 * REGION_BYTES), st.booleans(), OPERATIONS)
@settings(max_examples=200, deadline=None)
def test_regions_follow_their_model(size_bytes: int, dirty: bool, operations: list[tuple[str, int, int]]) -> None:
    count = -(-size_bytes // REGION_BYTES)
    regions = RegionMap(size_bytes, bytes([dirty]) * count)
    marked, copying = (set(range(count)) if dirty else set()), set[int]()
    at = 0  # where the next copy looks first

    def bytes_of(numbers: Iterable[int]) -> int:
        return sum(min(REGION_BYTES, size_bytes - number * REGION_BYTES) for number in numbers)

    for what, number, value in operations:
        if what == "mark" and number < size_bytes:
            length = min(value, size_bytes - number)
            regions.mark(number, length)
            marked |= set(range(number // REGION_BYTES, (number + length - 1) // REGION_BYTES + 1))
            copying -= marked
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
            chosen = {region for region in range(count) if number >> region % 20 & 1}
            regions.mark_regions(bytes(region in chosen for region in range(count)))
            marked |= chosen
            copying -= chosen
        assert regions.dirty_bytes == bytes_of(marked | copying)
        assert regions.dirty() == bytes(region in marked | copying for region in range(count))
        assert [regions.clean(region) for region in range(count)] == [not dirty for dirty in regions.dirty()]


@given(st.integers(1, 1 << 60))
def test_region_size(size_bytes: int) -> None:
    size = region_bytes_for(size_bytes)
    assert size.bit_count() == 1
    assert 64 << 10 <= size <= 16 << 20
    assert -(-size_bytes // size) <= REGIONS_WANTED or size == LARGEST_REGION_BYTES
    assert size == 64 << 10 or -(-size_bytes // (size // 2)) > REGIONS_WANTED
