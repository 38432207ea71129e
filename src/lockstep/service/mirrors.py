"""Which mirror of a volume is meant, whether the disk that is there is that mirror, and which disks have a role."""

import functools
import os
from collections.abc import Iterable, Iterator

from lockstep.crypto import luks
from lockstep.disk import patience
from lockstep.disk.probe import Disk, inspect, overlap
from lockstep.errors import (
    DiskError,
    HeaderTaken,
    MirrorAmbiguous,
    MirrorOfAnotherVolume,
    MirrorTaken,
    MirrorUnknown,
    NoMirror,
    NoToken,
    RegistryError,
    TargetTaken,
)
from lockstep.registry.store import MirrorRecord, VolumeRecord

Role = type[RegistryError]
"""What a disk is to a volume, as the error that says so."""


def header_path(mirror: MirrorRecord) -> str:
    """Where the mirror's LUKS2 header is."""
    return mirror.header_path or mirror.path


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


def identified(volume: VolumeRecord, mirror: MirrorRecord, header: luks.Header) -> luks.Token:
    """Return the token of a mirror that is the one that the registry means. Raises NoToken, MirrorOfAnotherVolume."""
    token = header.token
    if token is None:
        raise NoToken(path=mirror.path)
    if token.volume_id != volume.id:
        raise MirrorOfAnotherVolume(path=mirror.path, volume=volume.name, owner=f"the volume {token.volume_name}")
    require_same_disk(volume, mirror, header.uuid)
    return token


def roles(volume: VolumeRecord) -> Iterator[tuple[str, Role]]:
    """Every path that the registry knows of a volume, and what it is to the volume."""
    yield volume.target_path, TargetTaken
    for mirror in volume.mirrors:
        yield mirror.path, MirrorTaken
        if mirror.header_path is not None:
            yield mirror.header_path, HeaderTaken


def refuse_as_output(
    volumes: Iterable[VolumeRecord], path: str, refused: tuple[Role, ...] = (TargetTaken, MirrorTaken, HeaderTaken)
) -> None:
    """Refuse to write anew what has one of these roles: by its name if it is not there, else under every name.

    A disk of the registry that cannot be looked at, or does not answer, is known by its name alone: it must not keep
    anybody from restoring.
    """
    named, output = os.path.realpath(path), inspect(path) if os.path.exists(path) else None
    known = {known: (taken, volume) for volume in volumes for known, taken in roles(volume) if taken in refused}
    answers = patience.ask({each: functools.partial(_is_output, each, named, output) for each in known})
    for each, (taken, volume) in known.items():
        if answers.get(each, each == named):
            raise taken(path=each, volume=volume.name)


def _is_output(known: str, named: str, output: Disk | None) -> bool:
    try:
        return os.path.realpath(known) == named or (output is not None and overlap(inspect(known), output) is not None)
    except DiskError:
        return False
