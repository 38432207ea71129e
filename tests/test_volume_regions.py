"""Which regions differ: the map follows its model, and no mark is lost, whichever thread makes it."""

import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

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

    def bytes_of(numbers: Iterable[int]) -> int:
        return sum(min(REGION_BYTES, size_bytes - number * REGION_BYTES) for number in numbers)

    for what, number, value in operations:
        if what == "mark" and number < size_bytes:
            length = min(value, size_bytes - number)
            regions.mark(number, length)
            marked |= set(range(number // REGION_BYTES, (number + length - 1) // REGION_BYTES + 1))
            copying -= marked
        elif what == "begin":
            begun = regions.begin_copy(number)
            wanted = min(marked, key=lambda region: (region < number // REGION_BYTES, region), default=None)
            if wanted is None:
                assert begun is None
            else:
                assert begun == (wanted * REGION_BYTES, bytes_of([wanted]))
                marked.discard(wanted)
                copying.add(wanted)
        elif what == "finish" and number < size_bytes:  # also of a region that was marked since, or never begun
            region = number // REGION_BYTES
            regions.finish_copy(number, equal=bool(value % 2))
            if region in copying and not value % 2:
                marked.add(region)
            copying.discard(region)
        elif what == "several":
            chosen = {region for region in range(count) if number >> region % 20 & 1}
            regions.mark_regions(bytes(region in chosen for region in range(count)))
            marked |= chosen
            copying -= chosen
        assert regions.dirty_bytes == bytes_of(marked | copying)
        assert regions.dirty() == bytes(region in marked | copying for region in range(count))
        assert [regions.clean(region) for region in range(count)] == [not dirty for dirty in regions.dirty()]


class _Interrupted(bytearray):
    """States that somebody else changes right after one of them was looked at."""

    meanwhile: Callable[[], Any]

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        self.meanwhile()
        return value


def test_a_mark_from_another_thread_is_not_lost_when_the_copy_ends() -> None:
    regions = RegionMap(16 * REGION_BYTES, b"\1" * 16)
    assert regions.begin_copy() == (0, REGION_BYTES)
    marker = threading.Thread(target=regions.mark, args=(0, 1))

    def meanwhile() -> None:
        if marker.ident is None:
            marker.start()
            marker.join(0.2)  # until it has marked, or waits for its turn

    states = _Interrupted(regions._states)
    states.meanwhile = meanwhile
    regions._states = states
    regions.finish_copy(0, equal=True)
    if marker.ident is None:
        marker.start()
    marker.join()
    assert not regions.clean(0), "a region that was marked while its copy ended is called clean"


@given(st.integers(1, 1 << 60))
def test_region_size(size_bytes: int) -> None:
    size = region_bytes_for(size_bytes)
    assert size.bit_count() == 1
    assert 64 << 10 <= size <= 16 << 20
    assert -(-size_bytes // size) <= REGIONS_WANTED or size == LARGEST_REGION_BYTES
    assert size == 64 << 10 or -(-size_bytes // (size // 2)) > REGIONS_WANTED
