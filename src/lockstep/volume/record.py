"""What a clean stop leaves behind, so that the next start need not copy everything: the region record.

One file per mirror, little-endian:

    offset  bytes  content
    0       16     magic "LOCKSTEP-REGIONS"
    16      4      version, 1
    20      4      CRC-32 of everything from offset 24 on
    24      16     volume id (UUID)
    40      16     LUKS UUID of the mirror
    56      8      generation: the same number that the mirror's token carries
    64      8      size of the target in bytes
    72      8      region size in bytes
    80      ...    one bit per region, 1 for dirty, the lowest bit of the first byte first

It is written when both disks have been flushed and nobody writes to them any more, and it is taken away,
durably, before anybody writes again. So a record that is there is true; after a crash there is none, and the whole
mirror counts as different. One that does not fit exactly (another mirror, an older generation, another size,
a damaged byte) is as good as none.
"""

import contextlib
import os
import uuid
import zlib
from dataclasses import dataclass
from struct import Struct
from typing import Final

from lockstep.volume.regions import RegionMap

_MAGIC: Final = b"LOCKSTEP-REGIONS"
_VERSION: Final = 1
_PREFIX: Final = Struct("<16sII")
_FIELDS: Final = Struct("<16s16sQQQ")


@dataclass(frozen=True)
class Identity:
    """Whose regions a record describes."""

    volume_id: str
    luks_uuid: str
    generation: int
    size_bytes: int


def save(path: str, identity: Identity, regions: RegionMap) -> None:
    """Write the record durably; an interrupted save leaves the old one or none."""
    body = _pack_fields(identity, regions.region_bytes) + regions.to_bits()
    temporary = path + ".new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(_PREFIX.pack(_MAGIC, _VERSION, zlib.crc32(body)) + body)
        file.flush()
        os.fsync(fd)
    os.replace(temporary, path)
    _sync_directory(path)


def load(path: str, identity: Identity) -> RegionMap | None:
    """Read the record; None when there is none that fits."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return None
    regions = RegionMap(identity.size_bytes, dirty=True)
    fields = _pack_fields(identity, regions.region_bytes)
    body = content[_PREFIX.size :]
    bits = body[len(fields) :]
    if (
        content[: _PREFIX.size] != _PREFIX.pack(_MAGIC, _VERSION, zlib.crc32(body))
        or body[: len(fields)] != fields
        or len(bits) != len(regions.to_bits())
    ):
        return None
    regions.load_bits(bits)
    return regions


def discard(path: str) -> None:
    """Take the record away, durably: from here on the disks may differ anywhere."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        _sync_directory(path)


def _pack_fields(identity: Identity, region_bytes: int) -> bytes:
    return _FIELDS.pack(
        uuid.UUID(identity.volume_id).bytes,
        uuid.UUID(identity.luks_uuid).bytes,
        identity.generation,
        identity.size_bytes,
        region_bytes,
    )


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
