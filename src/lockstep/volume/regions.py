"""Which regions of a mirror differ from the target, or may: what a resync copies.

A region is clean only when the two disks are known to be equal there. While it is being copied it counts as
dirty; a mark that arrives meanwhile is not lost when the copy ends, because finishing clears only regions that
nobody has marked since. A region that is held differs as well, and is not copied before it is released.

A region is one byte, so that finding, counting and marking are single operations of the interpreter. Marks come from
any thread: a lock keeps them out while the end of a copy looks at a region and then clears it.
"""

import threading
from typing import Final

SMALLEST_REGION_BYTES: Final = 64 << 10
LARGEST_REGION_BYTES: Final = 16 << 20
REGIONS_WANTED: Final = 1 << 20

_CLEAN, _DIRTY, _COPYING, _HELD = 0, 1, 2, 3
# What each state is to those who ask, or becomes.
_AS_DIRTY: Final = bytes([0, 1, 1, 0]).ljust(256, b"\1")
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
        self._lock = threading.Lock()
        self._states = bytearray(dirty)
        for region in positions(held):
            self._states[region] = _HELD

    @property
    def dirty_bytes(self) -> int:
        """How much of the disk is not known to be equal, and may be copied."""
        return self._bytes_in(_DIRTY) + self._bytes_in(_COPYING)

    @property
    def held_bytes(self) -> int:
        """How much of the disk is held."""
        return self._bytes_in(_HELD)

    def _bytes_in(self, state: int) -> int:
        total = self._states.count(state) * self.region_bytes
        if self._states and self._states[-1] == state:
            total -= len(self._states) * self.region_bytes - self.size_bytes
        return total

    def mark(self, offset: int, length: int) -> None:
        """The content of this range is unknown; what is held stays so."""
        part = self._slice(offset, length)
        with self._lock:
            self._states[part] = self._states[part].translate(_MARKED)

    def mark_regions(self, regions: bytes) -> None:
        """The content of these regions, a byte each, is unknown; what is held stays so."""
        with self._lock:
            for region in positions(regions):
                self._states[region] = _MARKED[self._states[region]]

    def hold(self, offset: int, length: int) -> None:
        """Keep this range from being copied, also where it is being copied already."""
        part = self._slice(offset, length)
        with self._lock:
            self._states[part] = bytes([_HELD]) * (part.stop - part.start)

    def held(self, offset: int, length: int) -> bool:
        """Whether any of this range is held."""
        return _HELD in self._states[self._slice(offset, length)]

    def release(self, regions: bytes) -> None:
        """Have these regions, a byte each, copied, as far as they are held."""
        with self._lock:
            for region in positions(regions):
                if self._states[region] == _HELD:
                    self._states[region] = _DIRTY

    def _slice(self, offset: int, length: int) -> slice:
        return slice(offset // self.region_bytes, -(-(offset + length) // self.region_bytes))

    def dirty(self) -> bytes:
        """Which regions may differ and are not held, a byte each."""
        return bytes(self._states).translate(_AS_DIRTY)

    def clean(self, region: int) -> bool:
        """Whether a region is known to be equal."""
        return self._states[region] == _CLEAN

    def begin_copy(self, start: int = 0) -> tuple[int, int] | None:
        """Pick the first dirty region at or after offset `start`, else from the beginning: (offset, length)."""
        region = self._states.find(_DIRTY, start // self.region_bytes)
        if region < 0:
            region = self._states.find(_DIRTY)
        if region < 0:
            return None
        self._states[region] = _COPYING
        offset = region * self.region_bytes
        return offset, min(self.region_bytes, self.size_bytes - offset)

    def finish_copy(self, offset: int, *, equal: bool) -> None:
        """End what `begin_copy` began: the region is clean when `equal` and nobody marked it meanwhile."""
        region = offset // self.region_bytes
        with self._lock:
            if self._states[region] == _COPYING:
                self._states[region] = _CLEAN if equal else _DIRTY


def positions(states: bytes | bytearray) -> list[int]:
    """Where the ones are."""
    found, at = [], states.find(1)
    while at >= 0:
        found.append(at)
        at = states.find(1, at + 1)
    return found
