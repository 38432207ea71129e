"""Which regions of a mirror differ from the target, or may: what a resync copies.

A region is clean only when the two disks are known to be equal there. While it is being copied it counts as
dirty; a mark that arrives meanwhile is not lost when the copy ends, because finishing clears only regions that
nobody has marked since.

A region is one byte, so that finding, counting and marking are single operations of the interpreter. Marks come from
any thread: a lock keeps them out while the end of a copy looks at a region and then clears it.
"""

import threading
from typing import Final

SMALLEST_REGION_BYTES: Final = 64 << 10
LARGEST_REGION_BYTES: Final = 16 << 20
REGIONS_WANTED: Final = 1 << 20

_CLEAN, _DIRTY, _COPYING = 0, 1, 2
_AS_DIRTY: Final = bytes([0, 1, 1]).ljust(256, b"\1")


def region_bytes_for(size_bytes: int) -> int:
    """Return the power of two that keeps a disk of this size at about a million regions or fewer."""
    needed = -(-size_bytes // REGIONS_WANTED)
    return max(SMALLEST_REGION_BYTES, min(LARGEST_REGION_BYTES, 1 << max(0, needed - 1).bit_length()))


class RegionMap:
    """Clean or dirty, for each region of a disk of `size_bytes`."""

    def __init__(self, size_bytes: int, dirty: bytes | bytearray) -> None:
        """`dirty` has a byte for each region: 1 if it may differ, 0 if it is equal."""
        self.size_bytes = size_bytes
        self.region_bytes = region_bytes_for(size_bytes)
        self._lock = threading.Lock()
        self._states = bytearray(dirty)

    @property
    def dirty_bytes(self) -> int:
        """How much of the disk is not known to be equal."""
        dirty = len(self._states) - self._states.count(_CLEAN)
        if self._states and self._states[-1] != _CLEAN:
            return dirty * self.region_bytes - (len(self._states) * self.region_bytes - self.size_bytes)
        return dirty * self.region_bytes

    def mark(self, offset: int, length: int) -> None:
        """The content of this range is unknown."""
        first, end = offset // self.region_bytes, -(-(offset + length) // self.region_bytes)
        with self._lock:
            self._states[first:end] = bytes([_DIRTY]) * (end - first)

    def mark_regions(self, regions: bytes) -> None:
        """The content of these regions, a byte each, is unknown."""
        with self._lock:
            for region in range(len(regions)):
                if regions[region]:
                    self._states[region] = _DIRTY

    def dirty(self) -> bytes:
        """Which regions may differ, a byte each."""
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
