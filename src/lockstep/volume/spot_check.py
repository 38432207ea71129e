"""Whether a target and its mirror are still the pair that they were: a look at places where they have to be equal.

Where the intent bitmap has no mark, and nothing is held, the mirror holds what the target holds; unless one of them is
not the disk that it was. A name like /dev/sdb leads to another disk after the machine's next start, a disk is written
to while nobody serves it, or is rolled back to a snapshot. Nothing else would tell: a target is its user's to the last
byte, and a block device does not say when it was written.

Nor is a mirror that is whole overwritten by a stranger where all of it is to be copied, since nothing tells where the
two differ: the target file was written while nobody served it, the records are lost, or older than the mirror, or it
is. Some of it differs then, as a matter of course.

So some of it is read. Both ends, since there are partition tables and superblocks, which every mount writes; and pieces
from anywhere between, others each time.
"""

import itertools
import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from lockstep.buffers import page_aligned
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.plain import PlainDisk
from lockstep.disk.runs import same
from lockstep.volume.link import LARGEST_SECTOR_BYTES
from lockstep.volume.regions import region_bytes_for

PIECE_BYTES: Final = LARGEST_SECTOR_BYTES  # whole sectors, whichever they are
END_PIECES: Final = 32
PIECES_BETWEEN: Final = 64
PATIENCE_S: Final = 5.0
_TRIES: Final = 16 * PIECES_BETWEEN  # until so many of them lie where the two are equal


@dataclass(frozen=True)
class SpotCheck:
    """What was found. Pieces that are all zeroes on both disks tell nothing, and do not count."""

    telling: int
    places: tuple[int, ...]  # offsets of those that differ
    accounted: bool = True  # whether all are equal, if the two are a pair; else some may differ

    @property
    def differing(self) -> int:
        """How many differ."""
        return len(self.places)

    @property
    def strangers(self) -> bool:
        """Whether the target seems to be another disk, or to have a part of the right one only, as of half a restore.

        What a mount changes is far less, and what is at one end of the disk makes a quarter.
        """
        return 4 * self.differing >= self.telling

    @property
    def unlike(self) -> bool:
        """Whether the two are no pair."""
        return self.differing > 0 and (self.strangers or self.accounted)


def spot_check(
    target: PlainDisk,
    mirror: EncryptedDisk,
    differing: Callable[[], bytes],
    doubted: Collection[int] = (),
    *,
    accounted: bool = True,
) -> SpotCheck:
    """Compare a mirror with its target in some places. Blocks.

    `differing` returns which regions may differ, a byte each; it is asked again at the end, for there may be writers
    meanwhile. In the places that are `doubted` the two differ, marked or not, until they are seen to be equal. Unless
    that is all that is `accounted` for, pieces of which the mirror has zeroes do not count either: something may have
    been written there. A disk that cannot be read ends it, or one that is so slow that it takes PATIENCE_S: what was
    seen until then counts.
    """
    region_bytes, zeroes = region_bytes_for(target.size_bytes), bytes(PIECE_BYTES)
    ours, theirs = page_aligned(PIECE_BYTES), page_aligned(PIECE_BYTES)
    telling = dict.fromkeys(doubted, True)  # where -> whether it differs
    end_s = time.monotonic() + PATIENCE_S
    for offset in (*doubted, *_pieces(target.size_bytes, differing())):
        if time.monotonic() > end_s:
            break
        try:
            target.read(offset, ours)
            mirror.read(offset, theirs)
        except OSError:
            break
        differs = not same(ours, theirs)
        if offset in telling or theirs != zeroes or (differs and accounted):
            telling[offset] = differs
    marked = differing()
    counts = [offset for offset in telling if offset in doubted or not marked[offset // region_bytes]]
    return SpotCheck(len(counts), tuple(offset for offset in counts if telling[offset]), accounted)


def _pieces(size_bytes: int, differing: bytes) -> list[int]:
    """Offsets of pieces that have to be equal, in order."""
    count, region_bytes = size_bytes // PIECE_BYTES, region_bytes_for(size_bytes)
    ends = (*range(min(END_PIECES, count)), *range(max(0, count - END_PIECES), count))
    anywhere = (random.randrange(count) for _ in range(_TRIES if count else 0))  # noqa: S311 (it is no secret)

    def equal(piece: int) -> bool:
        return not differing[piece * PIECE_BYTES // region_bytes]

    chosen = {*filter(equal, ends), *itertools.islice(filter(equal, anywhere), PIECES_BETWEEN)}
    return sorted(piece * PIECE_BYTES for piece in chosen)
