"""Which mirror of a volume is meant, and whether the disk that is there is that mirror."""

import os

from lockstep.crypto import luks
from lockstep.errors import MirrorAmbiguous, MirrorOfAnotherVolume, MirrorUnknown, NoMirror, NoToken
from lockstep.registry.store import MirrorRecord, VolumeRecord


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
