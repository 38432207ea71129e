r"""The record of what a new target lacks: which regions are still on the mirror only, on disk, whatever happens.

A region that is marked is missing: what the target has there means nothing, the mirror's content is the volume's. A
mark is cleared only after the region was copied to the target and the target was flushed.

The bits follow the header in pages as `pages.py` has them, one for each region. The header, little-endian:

    offset  bytes
    0       4      CRC-32 of the rest of the page
    4       4      version, 1
    8       16     magic "LOCKSTEP-MISSING"
    24      16     volume id (UUID)
    40      16     id of the mirror in the registry (UUID)
    56      8      size of the target in bytes
    64      8      region size in bytes
    72      440    zeroes

There is no way to make up for a record that is not there, is damaged, or not of this volume and mirror: nobody would
know which of the two disks is right where. So it is never guessed.
"""

import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from struct import Struct
from typing import Final

from lockstep.volume import pages
from lockstep.volume.pages import PAGE_BYTES, PagedBits
from lockstep.volume.regions import region_bytes_for

log = logging.getLogger(__name__)

VERSION: Final = 1

_MAGIC: Final = b"LOCKSTEP-MISSING"
_HEADER: Final = Struct("<I16s16s16sQQ")


@dataclass(frozen=True)
class Pair:
    """Which target is filled from which mirror; both are ids. `size_bytes` is the target's."""

    volume_id: str
    mirror_id: str
    size_bytes: int

    @property
    def regions(self) -> int:
        """How many regions there are."""
        return -(-self.size_bytes // region_bytes_for(self.size_bytes))


def load(path: str, pair: Pair) -> bytearray | None:
    """Return which regions are missing, a byte each; None when there is no such record, and it was logged why."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as failure:
        log.warning("the record %s cannot be read: %s", path, failure)
        return None
    if content[:PAGE_BYTES] != _header(pair):
        log.warning("the record %s is damaged, or not of this volume and mirror", path)
        return None
    states, damaged = pages.unpack(content, pair.regions)
    if damaged:
        log.warning("the record %s is damaged, in its pages %s", path, ", ".join(map(str, damaged)))
        return None
    return states


def record(path: str, pair: Pair, missing: bytes | bytearray, in_worker: Callable[..., Awaitable[None]]) -> PagedBits:
    """Write the record anew, durably, and return it open. Raises OSError."""
    bits = PagedBits(path, pair.regions, in_worker)
    bits.create(_header(pair), missing)
    return bits


def _header(pair: Pair) -> bytes:
    return pages.sealed(
        _HEADER.pack(
            VERSION,
            _MAGIC,
            uuid.UUID(pair.volume_id).bytes,
            uuid.UUID(pair.mirror_id).bytes,
            pair.size_bytes,
            region_bytes_for(pair.size_bytes),
        )
    )
