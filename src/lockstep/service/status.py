"""The status of a volume as plain data: what `status --json` prints and the terminal's table is drawn from."""

import os
from typing import Any

from lockstep.crypto import luks
from lockstep.errors import LockstepError
from lockstep.registry.store import MirrorRecord, VolumeRecord
from lockstep.service.state import State
from lockstep.volume import intent
from lockstep.volume.link import BEHIND, IN_SYNC, MirrorLink
from lockstep.volume.regions import RegionMap


def of_volume(
    volume: VolumeRecord,
    mirrors: list[dict[str, Any]],
    *,
    uri: str | None = None,
    clients: list[dict[str, str]] | None = None,
) -> dict[str, Any]:
    """One volume; `uri` is None when it is not served."""
    return {
        "name": volume.name,
        "size_bytes": volume.size_bytes,
        "target": {"path": volume.target_path},
        "serving": uri is not None,
        "uri": uri,
        "clients": clients or [],
        "mirrors": mirrors,
    }


def of_link(link: MirrorLink) -> dict[str, Any]:
    """One mirror that is being followed."""
    sync = link.sync
    progress = None
    if sync is not None:
        rate = sync.rate_bytes_s()
        left_bytes = max(0, sync.total_bytes - sync.done_bytes)
        progress = {
            "done_bytes": sync.done_bytes,
            "total_bytes": sync.total_bytes,
            "rate_bytes_s": round(rate),
            "eta_s": round(left_bytes / rate, 1) if rate else None,
        }
    return _mirror(
        link.path, link.uuid, link.state, link.regions.dirty_bytes, sync=progress, error=link.error or link.target_error
    )


def at_rest(state: State, volume: VolumeRecord, error: str | None = None) -> dict[str, Any]:
    """A volume that nobody serves, from its intent bitmaps; or one whose server does not answer, which is `error`."""
    mirrors = [_mirror_at_rest(state, volume, mirror) for mirror in volume.mirrors]
    for described in mirrors:
        described["error"] = error or described["error"]
    return of_volume(volume, mirrors)


def _mirror_at_rest(state: State, volume: VolumeRecord, mirror: MirrorRecord) -> dict[str, Any]:
    """A mirror that nobody follows: what its header and its intent bitmap say together."""
    error, regions = None, None
    try:
        header = luks.read_header(mirror.header_path or mirror.path)
    except LockstepError as failure:
        error = str(failure)
    else:
        if header.token is not None and (header.token.volume_id, header.uuid) == (volume.id, mirror.luks_uuid):
            identity = intent.Identity(volume.id, mirror.luks_uuid, volume.size_bytes)
            written_ns = os.stat(volume.target_path).st_mtime_ns if os.path.isfile(volume.target_path) else 0
            marked = intent.load(state.intent(mirror.luks_uuid), identity, header.token.generation, written_ns)
            regions = RegionMap(volume.size_bytes, marked)
        else:
            error = "another disk has taken its place"
    dirty_bytes = volume.size_bytes if regions is None else regions.dirty_bytes
    return _mirror(
        mirror.path, mirror.luks_uuid, BEHIND if error or dirty_bytes else IN_SYNC, dirty_bytes, sync=None, error=error
    )


def _mirror(
    path: str, uuid: str, state: str, dirty_bytes: int, *, sync: dict[str, Any] | None, error: str | None
) -> dict[str, Any]:
    return {
        "path": path,
        "uuid": uuid,
        "state": state,
        "dirty_bytes": dirty_bytes,
        "held_bytes": 0,
        "consistent": state == IN_SYNC,
        "sync": sync,
        "error": error,
    }
