"""Which regions of a mirror differ from the target, or may: what a resync copies.

A region is clean only when the two disks are known to be equal there. While it is being copied it counts as
dirty; a mark that arrives meanwhile is not lost when the copy ends, because finishing clears only regions that
nobody has marked since. A region that is held differs as well, and is not copied before it is released.

A region is one byte, so that finding and marking are single operations of the interpreter. How many there are of each
state is counted when they change: each flush asks, and a million of them take half a millisecond to count. All calls
come from the loop's thread.
"""

from collections.abc import Sequence
from typing import Final

SMALLEST_REGION_BYTES: Final = 64 << 10
LARGEST_REGION_BYTES: Final = 16 << 20
REGIONS_WANTED: Final = 1 << 20

_CLEAN, _DIRTY, _COPYING, _HELD = 0, 1, 2, 3
# What each state is to those who ask, or becomes.
_AS_DIRTY: Final = bytes([0, 1, 1, 0]).ljust(256, b"\1")
_AS_DIFFERING: Final = bytes([0, 1, 1, 1]).ljust(256, b"\1")
_COPIED: Final = bytes([_CLEAN, _DIRTY, _CLEAN, _HELD]).ljust(256, b"\1")
_NOT_COPIED: Final = bytes([_CLEAN, _DIRTY, _DIRTY, _HELD]).ljust(256, b"\1")
_LET_GO: Final = bytes([_CLEAN, _DIRTY, _COPYING, _DIRTY]).ljust(256, b"\1")
_MARKED: Final = bytes([_DIRTY, _DIRTY, _DIRTY, _HELD]).ljust(256, b"\1")


def region_bytes_for(size_bytes: int) -> int:
    """Return the power of two that keeps a disk of this size at about a million regions or fewer."""
    needed = -(-size_bytes // REGIONS_WANTED)
    return max(SMALLEST_REGION_BYTES, min(LARGEST_REGION_BYTES, 1 << max(0, needed - 1).bit_length()))


class RegionMap:
    """Clean or dirty, for each region of a disk of `size_bytes`."""

    def __init__(self, size_bytes: int, dirty: bytes | bytearray, held: bytes = b"") -> None:
        """`dirty` and `held` have a byte for each region: 1 if it may differ, 0 if it is equal."""
        self.size_bytes = size_bytes
        self.region_bytes = region_bytes_for(size_bytes)
        self._states = bytearray(dirty)
        self._next = 0  # where the next copy looks first
        for region in positions(held):
            self._states[region] = _HELD
        self._counts = [self._states.count(state) for state in (_CLEAN, _DIRTY, _COPYING, _HELD)]

    @property
    def dirty_bytes(self) -> int:
        """How much of the disk is not known to be equal, and may be copied."""
        return self._bytes_in(_DIRTY) + self._bytes_in(_COPYING)

    @property
    def held_bytes(self) -> int:
        """How much of the disk is held."""
        return self._bytes_in(_HELD)

    def _bytes_in(self, state: int) -> int:
        total = self._counts[state] * self.region_bytes
        if self._states and self._states[-1] == state:
            total -= len(self._states) * self.region_bytes - self.size_bytes
        return total

    def mark(self, offset: int, length: int) -> None:
        """The content of this range is unknown; what is held stays so."""
        self._translate(self._slice(offset, length), _MARKED)

    def mark_regions(self, regions: bytes) -> None:
        """The content of these regions, a byte each, is unknown; what is held stays so."""
        for part in stretches(regions):
            self._translate(slice(*part), _MARKED)

    def mark_all(self) -> None:
        """Nothing is known any more; what is held stays so."""
        self._translate(slice(None), _MARKED)

    def hold(self, offset: int, length: int) -> None:
        """Keep this range from being copied, also where it is being copied already."""
        part = self._slice(offset, length)
        self._put(part, bytes([_HELD]) * (part.stop - part.start))

    def let_go(self, offset: int, length: int) -> None:
        """Have this range copied, as far as it is held."""
        self._translate(self._slice(offset, length), _LET_GO)

    def held(self, offset: int, length: int) -> bool:
        """Whether any of this range is held."""
        return _HELD in self._states[self._slice(offset, length)]

    def equal(self, offset: int, length: int) -> bool:
        """Whether all of this range, not empty, is known to be equal."""
        part = self._slice(offset, length)
        count: int = part.stop - part.start
        return self._states.count(_CLEAN, part.start, part.stop) == count

    def release(self, regions: bytes) -> None:
        """Have these regions, a byte each, copied, as far as they are held."""
        for part in stretches(regions):
            self._translate(slice(*part), _LET_GO)

    def _translate(self, part: slice, becomes: bytes) -> None:
        self._put(part, self._states[part].translate(becomes))

    def _put(self, part: slice, states: bytes | bytearray) -> None:
        former = self._states[part]
        for state in range(len(self._counts)):
            self._counts[state] += states.count(state) - former.count(state)
        self._states[part] = states

    def _slice(self, offset: int, length: int) -> slice:
        return slice(offset // self.region_bytes, -(-(offset + length) // self.region_bytes))

    def dirty(self) -> bytes:
        """Which regions may differ and are not held, a byte each."""
        return bytes(self._states).translate(_AS_DIRTY)

    def differing(self) -> bytes:
        """Which regions are not known to be equal, a byte each."""
        return bytes(self._states).translate(_AS_DIFFERING)

    def begin_copy(self, limit_bytes: int) -> list[tuple[int, int]]:
        """Take the next dirty regions, one or up to `limit_bytes` of them; returns (offset, length) of each stretch."""
        taken: list[tuple[int, int]] = []
        left = max(1, limit_bytes // self.region_bytes)
        while left and (first := self._next_dirty()) >= 0:
            after = first + 1
            while after < min(len(self._states), first + left) and self._states[after] == _DIRTY:
                after += 1
            self._put(slice(first, after), bytes([_COPYING]) * (after - first))
            self._next, left = after, left - (after - first)
            offset = first * self.region_bytes
            taken.append((offset, min(after * self.region_bytes, self.size_bytes) - offset))
        return taken

    def _next_dirty(self) -> int:
        """The next dirty region from where the last copy began, round the end; -1 if there is none."""
        first = self._states.find(_DIRTY, self._next)
        return first if first >= 0 else self._states.find(_DIRTY)

    def finish_copy(self, taken: Sequence[tuple[int, int]], *, equal: bool) -> None:
        """End what `begin_copy` began: a region is clean when `equal` and nobody marked it meanwhile."""
        for offset, length in taken:
            self._translate(self._slice(offset, length), _COPIED if equal else _NOT_COPIED)


def positions(states: bytes | bytearray) -> list[int]:
    """Where the ones are."""
    found, at = [], states.find(1)
    while at >= 0:
        found.append(at)
        at = states.find(1, at + 1)
    return found


def stretches(states: bytes | bytearray) -> list[tuple[int, int]]:
    """Where the ones are, as [first, after)."""
    found, after = [], 0
    while (first := states.find(1, after)) >= 0:
        end = states.find(0, first)
        after = end if end >= 0 else len(states)
        found.append((first, after))
    return found
