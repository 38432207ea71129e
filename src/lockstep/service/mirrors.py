"""Which mirror of a volume is meant, whether the disk that is there is that mirror, and which disks have a role."""

import functools
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Final

from lockstep.crypto import luks
from lockstep.crypto.header_backup import Content
from lockstep.disk import patience
from lockstep.disk.probe import Disk, inspect, overlap
from lockstep.errors import (
    BackupOfAnother,
    DiskError,
    DiskMissing,
    HeaderDamaged,
    HeaderTaken,
    HeaderUnreadable,
    LuksError,
    MirrorAmbiguous,
    MirrorIncomplete,
    MirrorOfAnotherVolume,
    MirrorTaken,
    MirrorUnknown,
    NoMirror,
    NotLuks2,
    NoToken,
    RegistryError,
    TargetGone,
    TargetResized,
    TargetTaken,
    TargetUnfinished,
)
from lockstep.registry.store import MirrorRecord, VolumeRecord
from lockstep.volume.link import WHOLE

log = logging.getLogger(__name__)

OTHER_KEY: Final = "it holds another volume key"

Role = type[RegistryError]
"""What a disk is to a volume, as the error that says so."""

ROLES: Final[tuple[Role, ...]] = (TargetTaken, MirrorTaken, HeaderTaken)


def header_path(mirror: MirrorRecord) -> str:
    """Where the mirror's LUKS2 header is."""
    return mirror.header_path or mirror.path


def look_at_target(volume: VolumeRecord) -> Disk:
    """Look at a volume's target. Raises TargetGone, and what `inspect` does else."""
    try:
        return inspect(volume.target_path)
    except DiskMissing as error:
        raise TargetGone(path=volume.target_path, volume=volume.name) from error


def refuse_filling(volume: VolumeRecord) -> None:
    """Raise TargetUnfinished where a new target may read what it lacks from a mirror."""
    if volume.source is not None:
        raise TargetUnfinished(path=volume.target_path, volume=volume.name, mirror=volume.source.path)


def chosen(volume: VolumeRecord, path: str | None) -> MirrorRecord:
    """Return the mirror at `path`, or the only one. Raises NoMirror, MirrorUnknown, MirrorAmbiguous."""
    if not volume.mirrors:
        raise NoMirror(volume=volume.name)
    if path is not None:
        for mirror in volume.mirrors:
            if os.path.realpath(mirror.path) == os.path.realpath(path):
                return mirror
        raise MirrorUnknown(mirror=path, where=f" with the volume {volume.name}")
    if len(volume.mirrors) > 1:
        raise MirrorAmbiguous(volume=volume.name, mirrors=", ".join(mirror.path for mirror in volume.mirrors))
    return volume.mirrors[0]


def require_same_disk(volume: VolumeRecord, mirror: MirrorRecord, luks_uuid: str) -> None:
    """Raise MirrorOfAnotherVolume where another disk has taken the mirror's place."""
    if luks_uuid != mirror.luks_uuid:
        owner = f"another mirror of {volume.name} (LUKS UUID {luks_uuid})"
        raise MirrorOfAnotherVolume(path=mirror.path, volume=volume.name, owner=owner)


def described(path: str, header_path: str | None, header: luks.Header, *, incomplete: bool) -> luks.Token:
    """Return what a mirror that no registry knows says of itself; `header` is its own, or the one at `header_path`.

    A copy of a header tells the state of its day. So where the mirror has a header of its own that can be read, the
    other must be a copy of it, and the token is its own. Raises BackupOfAnother, NoToken, and MirrorIncomplete unless
    `incomplete`.
    """
    token = header.token
    if header_path is not None:
        token = _own_token(path, header_path, header) or token
    if token is None:
        raise NoToken(path=path)
    if token.state not in WHOLE and not incomplete:
        raise MirrorIncomplete(path=path, state=token.state)
    return token


def _own_token(path: str, header_path: str, header: luks.Header) -> luks.Token | None:
    try:
        uuid, own = luks.read_uuid(path), Content.of(path)
    except (NotLuks2, HeaderDamaged, HeaderUnreadable):
        if header.segment.offset_bytes:  # else it is detached, and tells the state of today
            log.warning(
                "the header of %s cannot be read, and %s tells the state of the day on which it was made: "
                "the mirror may have become incomplete since, so check the file systems that it gives back",
                path,
                header_path,
            )
        return None
    require_copy(header_path, header.uuid, path, uuid)
    given = Content.of(header_path)
    if given.digests != own.digests:
        raise BackupOfAnother(backup=header_path, path=path, reason=OTHER_KEY)
    if given.segments != own.segments:
        raise BackupOfAnother(backup=header_path, path=path, reason="it is of another moment of a re-keying")
    return present_token(path)


def require_copy(backup: str, backup_uuid: str, path: str, uuid: str) -> None:
    """Raise BackupOfAnother where a copy of a header is not of this mirror's, by their LUKS UUIDs."""
    if backup_uuid != uuid:
        raise BackupOfAnother(backup=backup, path=path, reason=f"it has the LUKS UUID {backup_uuid}, not {uuid}")


def present_token(path: str) -> luks.Token | None:
    """The token of the header that is there, if it can be read: it knows the state of the data."""
    try:
        return luks.read_header(path).token
    except LuksError:
        return None


def identified(volume: VolumeRecord, mirror: MirrorRecord, header: luks.Header) -> luks.Token:
    """Return the token of a mirror that is the one that the registry means. Raises NoToken, MirrorOfAnotherVolume."""
    token = header.token
    if token is None:
        raise NoToken(path=mirror.path)
    if token.volume_id != volume.id:
        owner = "another volume of that name" if token.volume_name == volume.name else f"the volume {token.volume_name}"
        raise MirrorOfAnotherVolume(path=mirror.path, volume=volume.name, owner=owner)
    require_same_disk(volume, mirror, header.uuid)
    return token


def roles(volume: VolumeRecord) -> Iterator[tuple[str, Role]]:
    """Every path that the registry knows of a volume, and what it is to the volume."""
    yield volume.target_path, TargetTaken
    for mirror in volume.mirrors:
        yield mirror.path, MirrorTaken
        if mirror.header_path is not None:
            yield mirror.header_path, HeaderTaken


def require_size(disk: Disk, record: VolumeRecord) -> None:
    """Refuse what cannot be the volume's target: only a device may have more room than that needs.

    Raises TargetResized.
    """
    if disk.size_bytes < record.size_bytes or (disk.size_bytes > record.size_bytes and not disk.is_block):
        raise TargetResized(
            path=disk.path, volume=record.name, size_bytes=disk.size_bytes, expected_bytes=record.size_bytes
        )


def refuse_as_output(volumes: Iterable[VolumeRecord], path: str) -> None:
    """Refuse to write anew what has a role: by its name if it is not there, else under every name.

    A disk of the registry that cannot be looked at, or does not answer, is known by its name alone: it must not keep
    anybody from restoring.
    """
    for known, taken, volume in roles_of(volumes, path, ROLES):
        raise taken(path=known, volume=volume.name)


def roles_of(
    volumes: Iterable[VolumeRecord], path: str, among: tuple[Role, ...]
) -> Iterator[tuple[str, Role, VolumeRecord]]:
    """What the output `path` is to volumes, each with the path by which that is known; as for `refuse_as_output`."""
    named, output = os.path.realpath(path), inspect(path) if os.path.exists(path) else None
    known = {known: (role, volume) for volume in volumes for known, role in roles(volume) if role in among}
    answers = patience.ask({each: functools.partial(_is_output, each, named, output) for each in known})
    for each, (role, volume) in known.items():
        if answers.get(each, each == named):
            yield each, role, volume


def _is_output(known: str, named: str, output: Disk | None) -> bool:
    try:
        return os.path.realpath(known) == named or (output is not None and overlap(inspect(known), output) is not None)
    except DiskError:
        return False
