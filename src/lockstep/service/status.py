"""The status of a volume as plain data: what `status --json` prints and the terminal's table is drawn from."""

import asyncio
import functools
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lockstep.crypto import luks
from lockstep.disk import patience
from lockstep.disk.mirror import large_enough
from lockstep.errors import DiskMissing, LockstepError
from lockstep.registry.access import Verdict
from lockstep.registry.store import MirrorRecord, VolumeRecord
from lockstep.service.mirrors import identified
from lockstep.service.state import State
from lockstep.volume import intent, missing
from lockstep.volume.filling import Filling
from lockstep.volume.held import HeldRecord
from lockstep.volume.link import BEHIND, IN_SYNC, MirrorLink
from lockstep.volume.missing import Pair
from lockstep.volume.progress import SyncProgress
from lockstep.volume.regions import RegionMap


def of_volume(
    volume: VolumeRecord,
    mirrors: list[dict[str, Any]],
    *,
    uri: str | None = None,
    restore: dict[str, Any] | None = None,
    clients: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """One volume; `uri` is None when it is not served, and `restore` when its target is not being filled."""
    return {
        "name": volume.name,
        "size_bytes": volume.size_bytes,
        "target": {"path": volume.target_path, "direct": False, "error": None, "restore": restore},
        "serving": uri is not None,
        "uri": uri,
        "clients": clients or [],
        "mirrors": mirrors,
    }


def add_headers(described: dict[str, Any], volume: VolumeRecord, backups: Mapping[str, str]) -> None:
    """Say where the mirrors' headers are and whether there is a copy: what the registry knows, and no server."""
    headers = {mirror.luks_uuid: mirror.header_path for mirror in volume.mirrors}
    for mirror in described["mirrors"]:
        uuid = mirror["uuid"]
        mirror |= {"header": headers.get(uuid), "header_backup": backups.get(uuid)}


def of_client(user: str, verdict: Verdict) -> dict[str, Any]:
    """One client; `until` is when its verdict changes, in seconds since 1970."""
    return {
        "user": user,
        "verdict": "allowed" if verdict.allowed else "denied",
        "reason": verdict.reason,
        "until": verdict.until_s,
    }


def of_link(link: MirrorLink) -> dict[str, Any]:
    """One mirror that is being followed."""
    progress = _progress(link.sync) if link.sync is not None else None
    described = _mirror(link.path, link.uuid, link.state, link.regions, link.held)
    error = link.error or link.target_error
    if link.hindrance is not None and link.hindrance not in (error or ""):
        error = f"{error}; it cannot be followed again yet: {link.hindrance}"
    return described | {"consistent": link.consistent, "sync": progress, "error": error}


def of_filling(filling: Filling, size_bytes: int) -> dict[str, Any]:
    """How far a new target of `size_bytes` is."""
    done_bytes = size_bytes - filling.left_bytes
    return _progress(filling.progress) | {"done_bytes": done_bytes, "total_bytes": size_bytes, "error": filling.error}


def _progress(sync: SyncProgress) -> dict[str, Any]:
    eta_s = sync.eta_s()
    return {
        "done_bytes": sync.done_bytes,
        "total_bytes": sync.total_bytes,
        "rate_bytes_s": round(sync.rate_bytes_s()),
        "eta_s": None if eta_s is None else round(eta_s, 1),
    }


def _filling_at_rest(state: State, volume: VolumeRecord) -> dict[str, Any] | None:
    if volume.filled_from is None:
        return None
    lacks = missing.load(state.missing(volume.id), Pair(volume.id, volume.filled_from, volume.size_bytes))
    left_bytes = volume.size_bytes if lacks is None else RegionMap(volume.size_bytes, lacks).dirty_bytes
    done_bytes = volume.size_bytes - left_bytes
    rate = {"rate_bytes_s": 0, "eta_s": None, "error": None}
    return {"done_bytes": done_bytes, "total_bytes": volume.size_bytes, **rate}


Seen = Mapping[str, Any]
"""What disks at rest have answered: by the id of a volume its target, by the LUKS UUID of a mirror that."""


def look_at(volumes: Iterable[VolumeRecord]) -> Seen:
    """Look at all disks of volumes that nobody serves; those that do not answer in time are not in it."""
    questions: dict[str, Callable[[], Any]] = {}
    for volume in volumes:
        questions[volume.id] = functools.partial(_look_at_target, volume.target_path)
        for mirror in volume.mirrors:
            questions[mirror.luks_uuid] = functools.partial(_look_at_mirror, volume, mirror)
    return patience.ask(questions)


def at_rest(state: State, volume: VolumeRecord, seen: Seen, error: str | None = None) -> dict[str, Any]:
    """A volume that nobody serves, from its own records and what was seen of its disks.

    Or one whose server does not answer, which is the `error` of its mirrors, or of its target where it has none.
    """
    written_ns, target_error = seen.get(volume.id) or (None, str(patience.silent(volume.target_path)))
    mirrors = [_mirror_at_rest(state, volume, mirror, seen, written_ns) for mirror in volume.mirrors]
    for described in mirrors:
        described["error"] = error or described["error"]
    described = of_volume(volume, mirrors, restore=_filling_at_rest(state, volume))
    described["target"]["error"] = target_error or (None if mirrors else error)
    return described


def _look_at_target(path: str) -> tuple[int | None, str | None]:
    """When a target was last written, as its bitmap knows it, or None and why not if it is gone.

    Nobody has written to it since, as far as can be known.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None, str(DiskMissing(path=path))
    except OSError:
        return 0, None
    return found.st_mtime_ns if stat.S_ISREG(found.st_mode) else 0, None


def _look_at_mirror(volume: VolumeRecord, mirror: MirrorRecord) -> tuple[luks.Header | None, str | None]:
    """Its header, or why it cannot be used."""
    try:
        header = luks.read_header(mirror.header_path or mirror.path)
        large_enough(mirror.path, header.segment, volume.size_bytes)
        identified(volume, mirror, header)
    except LockstepError as failure:
        return None, str(failure)
    return header, None


def _mirror_at_rest(
    state: State, volume: VolumeRecord, mirror: MirrorRecord, seen: Seen, written_ns: int | None
) -> dict[str, Any]:
    """A mirror that nobody follows: what its header, its intent bitmap and the record of what is held say together."""
    identity = intent.Identity(volume.id, mirror.luks_uuid, volume.size_bytes)
    header, error = seen.get(mirror.luks_uuid) or (None, str(patience.silent(mirror.path, mirror.header_path)))
    if header is None:
        loaded = intent.Loaded(bytearray(b"\1" * identity.regions), fits=False)
    else:
        loaded = intent.load(state.intent(mirror.luks_uuid), identity, header.token.generation, written_ns)
    held = HeldRecord(state.held(mirror.luks_uuid), identity, asyncio.to_thread, expected=loaded.of_mirror)
    if not loaded.of_mirror:
        held.frozen_since_s = None
    regions = RegionMap(volume.size_bytes, loaded.marked, held.regions())
    equal = error is None and not regions.dirty_bytes and not regions.held_bytes
    described = _mirror(mirror.path, mirror.luks_uuid, IN_SYNC if equal else BEHIND, regions, held)
    return described | {"consistent": equal or held.frozen_since_s is not None, "error": error}


def _mirror(path: str, uuid: str, state: str, regions: RegionMap, held: HeldRecord) -> dict[str, Any]:
    return {
        "path": path,
        "uuid": uuid,
        "state": state,
        "dirty_bytes": regions.dirty_bytes,
        "held_bytes": regions.held_bytes,
        "consistent": state == IN_SYNC,
        "sync": None,
        "sought": False,
        "error": None,
        "held": [{"user": user, "kind": kind, "since": since_s} for (user, kind), since_s in held.writers.items()],
        "frozen_since": held.frozen_since_s,
    }
