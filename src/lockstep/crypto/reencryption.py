"""A new volume key for a LUKS2 volume: cryptsetup re-encrypts the data in place and keeps account in the header.

How it stays readable (LUKS2 On-Disk Format Specification, section 5, and libcryptsetup's luks2_reencrypt.c)
    The header holds both volume keys, each in key slots of its own, and says up to where the new one counts.
    cryptsetup works on one zone after the other. Before it writes there, it has in the header, durably: where the zone
    is, and what restores it. With `checksum` that is a hash of each block of old ciphertext: a block with the right
    hash is still old, any other is new. With `journal` it is the old ciphertext itself.

    A hash is enough where a block is written whole or not at all, as the sectors of a disk are. A file's blocks are
    4096 bytes, and nobody promises that these are: there the journal is taken, which costs a second writing.

    So at every moment, also after a kill or a power cut, the header and the data together give back everything to
    whoever has the passphrase. cryptsetup goes on from there (`--resume-only`), and `cryptsetup open` maps it as it is.

When it is over, the slots of the old key, its digest and what restores the zone are gone from the header, overwritten.

What is read here of an unfinished one
    `read` says which parts of the data have which key. A volume key is got by showing cryptsetup a copy of the header,
    in memory, in which there is that key alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lockstep.crypto import cryptsetup, luks, recovery_key
from lockstep.errors import HeaderDamaged, RekeyUnfinished

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

CHECKSUM, JOURNAL = "checksum", "journal"

_OFFLINE: Final = "--force-offline-reencrypt"  # nobody has it mapped: our lock says so, and what else uses the disk
_PROGRESS: Final = ("--progress-json", "--progress-frequency=1")
_HASH: Final = "sha256"


@dataclass(frozen=True)
class Volume:
    """What is re-encrypted: the first `size_bytes` of the data on `device`, whose header is at `header`."""

    device: str
    header: str
    size_bytes: int
    resilience: str

    @property
    def place(self) -> tuple[str, ...]:
        """Where the header is, for cryptsetup; and which lock it does without."""
        detached = () if self.header == self.device else (f"--header={os.path.abspath(self.header)}",)
        # Who is not root may not write where cryptsetup keeps this lock; the caller has one of its own.
        return detached if os.geteuid() == 0 else (*detached, "--disable-locks")

    @property
    def options(self) -> tuple[str, ...]:
        """What each run is told, the first one and those that go on."""
        zone = (f"--resilience={self.resilience}", f"--resilience-hash={_HASH}", f"--device-size={self.size_bytes}")
        return (_OFFLINE, *zone, *self.place, "--key-file=-")


def begin(volume: Volume, passphrase: Buffer, slot: int, *, iter_time_ms: int | None, fds: Sequence[int]) -> None:
    """Make a new volume key, under the passphrase of key slot `slot`; no data is changed yet.

    What an attempt has left that was killed is taken away. CryptsetupFailed.
    """
    for left in unbound_slots(volume.header):
        arguments = ("luksKillSlot", "--key-file=-")
        cryptsetup.checked("tidy up", volume.header, *arguments, stdin=passphrase, after=[str(left)])
    cost = () if iter_time_ms is None else (f"--iter-time={iter_time_ms}",)
    arguments = ("--init-only", f"--key-slot={slot}", "--pbkdf=argon2id", *cost, *volume.options)
    cryptsetup.checked("begin to re-key", volume.device, "reencrypt", *arguments, stdin=passphrase, fds=fds)


def go_on(volume: Volume, passphrase: Buffer, *, on_progress: Callable[[int, int], None], fds: Sequence[int]) -> None:
    """Go on to the end; the process has the descriptors `fds`, and with them the locks, for as long as it lives.

    `on_progress` is given bytes done and bytes in all. WrongPassphrase, CryptsetupFailed, and what `read` raises.
    """
    if read(volume.header).zone is not None:
        arguments = (*volume.place, "--key-file=-")
        action = "restore the zone that was being re-keyed of"
        # A zone may have a GiB: on a slow disk, or behind a slow line, that takes longer than a header.
        done = cryptsetup.follow(
            action, volume.device, "repair", *arguments, stdin=passphrase, told=lambda _: None, fds=fds
        )
        _refuse(volume, passphrase, action, done)
    if not under_way(volume.header):
        return
    if read(volume.header).is_over(volume.size_bytes):
        _forget_old_key(volume, read(volume.header))
        return

    def told(line: bytes) -> None:
        try:
            progress = json.loads(line)
            on_progress(int(progress["device_bytes"]), int(progress["device_size"]))
        except (ValueError, KeyError, TypeError):  # a sentence for people
            return

    arguments = ("--resume-only", *_PROGRESS, *volume.options)
    action = "re-key"
    done = cryptsetup.follow(action, volume.device, "reencrypt", *arguments, stdin=passphrase, told=told, fds=fds)
    _refuse(volume, passphrase, action, done)


def _refuse(volume: Volume, passphrase: Buffer, action: str, done: cryptsetup.Completed) -> None:
    if cryptsetup.rejected(done):
        raise recovery_key.wrong_passphrase(volume.header, passphrase)
    if done.returncode == cryptsetup.INVALID_EXIT and under_way(volume.header):  # a wrong passphrase looks so as well
        luks.wipe(read(volume.header).volume_key(volume.header, passphrase, new=True))
    if done.returncode != 0:
        raise cryptsetup.failure(action, volume.device, done)


def _forget_old_key(volume: Volume, unfinished: Unfinished) -> None:
    """Do the last step, which cryptsetup cannot repeat: it takes the old key's slots away before it is over.

    A header that has the new key alone is put in the place of the one that is there.
    """
    with cryptsetup.memory_file(_with_one_key(volume.header, unfinished.metadata, new=True)) as fd:
        backup = f"--header-backup-file=/dev/fd/{fd}"
        cryptsetup.checked("finish the header of", volume.header, "luksHeaderRestore", backup, fds=[fd])


def unbound_slots(path: str) -> tuple[int, ...]:
    """The key slots whose volume key no data has. Raises what `luks.read_metadata` raises."""
    digests = luks.read_metadata(path)["digests"].values()
    return tuple(sorted(int(slot) for each in digests if not each["segments"] for slot in each["keyslots"]))


def key_mark(path: str) -> str:
    """What tells the volume key from any other, and is no secret: the salt of the digest that proves it."""
    return next(str(each["salt"]) for each in luks.read_metadata(path)["digests"].values() if each["segments"])


def under_way(path: str) -> bool:
    """Whether the header tells of one that was begun and is not over. Raises what `luks.read_metadata` raises."""
    return "reencrypt" in str(luks.read_metadata(path)["config"].get("requirements", {}))


# -- an unfinished one, read as it is -------------------------------------------------------------------


@dataclass(frozen=True)
class Zone:
    """[start, end) of the data, in bytes, which was being written: `area_offset` of the header has what restores it."""

    start: int
    end: int
    resilience: str
    area_offset: int
    block_bytes: int


@dataclass(frozen=True)
class Unfinished:
    """Which key each part of the data has: the old one, but the new one in `renewed`; and in the zone, either."""

    segment: luks.Segment
    renewed: tuple[tuple[int, int], ...]  # [start, end)
    zone: Zone | None
    metadata: dict[str, Any]

    def is_over(self, size_bytes: int) -> bool:
        """Whether so much of the data has the new key: all that is left is to forget the old one, if it is there."""
        return self.zone is None and any(start <= 0 and end >= size_bytes for start, end in self.renewed)

    def volume_key(self, path: str, passphrase: Buffer, *, new: bool) -> bytearray:
        """One of the two keys of the header at `path`. The caller wipes it. Raises what `luks.volume_key` does."""
        with cryptsetup.memory_file(_with_one_key(path, self.metadata, new=new)) as fd:
            return luks.volume_key(path, passphrase, copy=fd)


def read(path: str) -> Unfinished:
    """What the header says of one that is not over. HeaderDamaged, and what `luks.read_metadata` raises."""
    metadata = luks.read_metadata(path)
    try:
        previous, final = _backup(metadata, "previous"), _backup(metadata, "final")
        segment = luks.segment_of(path, metadata["segments"][previous])
        if segment != luks.segment_of(path, metadata["segments"][final]):
            raise RekeyUnfinished(path=path)  # it is not one of ours: more than the key is to change
        renewed, zone = [], None
        for number, part in metadata["segments"].items():
            start = int(part["offset"]) - segment.offset_bytes
            flags = part.get("flags", [])
            if "in-reencryption" in flags:
                zone = _zone(metadata, start, start + int(part["size"]))
            elif (
                not any(flag.startswith("backup") for flag in flags) and number in _digest(metadata, final)["segments"]
            ):
                end = start + int(part["size"]) if part["size"] != "dynamic" else _END
                renewed.append((start, end))
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise HeaderDamaged(path=path, reason=f"its metadata makes no sense ({error!r})") from None
    return Unfinished(segment, tuple(renewed), zone, metadata)


_END: Final = 2**63
_BINARY_BYTES: Final = 4096
_CHECKSUM: Final = slice(448, 512)


def _area(slot: dict[str, Any]) -> tuple[int, int]:
    """Where in the header a key slot's material is: [start, end)."""
    start = int(slot["area"]["offset"])
    return start, start + int(slot["area"]["size"])


def _backup(metadata: dict[str, Any], which: str) -> str:
    segments = metadata["segments"].items()
    return next(str(number) for number, each in segments if f"backup-{which}" in each.get("flags", []))


def _digest(metadata: dict[str, Any], segment: str) -> dict[str, Any]:
    """The digest of the volume key that a segment has."""
    return next(dict(each) for each in metadata["digests"].values() if segment in each["segments"])


def _zone(metadata: dict[str, Any], start: int, end: int) -> Zone:
    area = next(slot["area"] for slot in metadata["keyslots"].values() if slot["type"] == "reencrypt")
    if area["type"] == CHECKSUM and area["hash"] == _HASH:
        return Zone(start, end, CHECKSUM, int(area["offset"]), int(area["sector_size"]))
    if area["type"] == JOURNAL:
        return Zone(start, end, JOURNAL, int(area["offset"]), end - start)
    raise ValueError(f"a zone with the resilience {area['type']}")


def _mended(path: str, metadata: dict[str, Any]) -> bytearray:
    """The whole header; its first copy is sound, though only the second one be on the medium: cryptsetup mends it."""
    header = luks.header_bytes(path, metadata)
    with cryptsetup.memory_file(header) as fd:
        cryptsetup.checked("read the header of", f"/dev/fd/{fd}", "luksDump", fds=[fd])
        return bytearray(os.pread(fd, len(header), 0))


def _with_one_key(path: str, metadata: dict[str, Any], *, new: bool) -> bytes:
    """A header with the key slots of one of the two keys: the first copy of it, and no second one."""
    segment = _backup(metadata, "final" if new else "previous")
    digest = _digest(metadata, segment)
    plain = {name: value for name, value in metadata["segments"][segment].items() if name != "flags"}
    text = json.dumps(
        {
            "keyslots": {number: metadata["keyslots"][number] for number in digest["keyslots"]},
            "tokens": {
                number: token | {"keyslots": [slot for slot in token["keyslots"] if slot in digest["keyslots"]]}
                for number, token in metadata["tokens"].items()  # cryptsetup takes none that names a slot that is gone
            },
            "segments": {"0": plain},
            "digests": {"0": digest | {"segments": ["0"]}},
            "config": {name: value for name, value in metadata["config"].items() if name != "requirements"},
        }
    ).encode()
    header = _mended(path, metadata)
    json_bytes = int(metadata["config"]["json_size"])
    whole = _BINARY_BYTES + json_bytes
    header[_BINARY_BYTES:whole] = text.ljust(json_bytes, b"\0")
    header[whole : 2 * whole] = bytes(whole)
    kept = sorted(_area(metadata["keyslots"][number]) for number in digest["keyslots"])
    for (_, end), (start, _) in itertools.pairwise([(0, 2 * whole), *kept, (len(header), 0)]):
        header[end:start] = bytes(start - end)
    header[_CHECKSUM] = bytes(64)
    header[_CHECKSUM] = hashlib.sha256(header[:whole]).digest().ljust(64, b"\0")
    return bytes(header)
