"""Making and forgetting volumes: the registry and the disks, in the order that loses nothing.

A volume and its mirror are registered before the mirror is formatted: so the name and the disks are claimed, and no
disk that has a role already is overwritten. If formatting fails, the registration is taken back.
"""

import contextlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from lockstep.crypto import luks
from lockstep.disk.mirror import SECTOR_SIZES, make_mirror
from lockstep.disk.probe import Disk, inspect, overlap
from lockstep.errors import (
    HeaderTaken,
    MirrorIsTarget,
    MirrorTaken,
    RegistryError,
    SectorSizeInvalid,
    StillAttached,
    StillServed,
    TargetEmpty,
    TargetTaken,
)
from lockstep.registry.audit import Actor
from lockstep.registry.store import OnDenied, Registry, VolumeRecord
from lockstep.service import attach
from lockstep.service.managing import manager
from lockstep.service.memory import protect_memory
from lockstep.service.state import State
from lockstep.volume.link import SYNCING


@dataclass(frozen=True)
class MirrorPlan:
    """How to make a mirror; None stands for the natural choice."""

    path: str
    passphrase: Callable[[], bytes]
    header: str | None = None
    sector_bytes: int | None = None
    iter_time_ms: int | None = None
    force: bool = False


def create_volume(
    state: State, name: str, target_path: str, mirror: MirrorPlan | None, on_denied: OnDenied = "hold"
) -> VolumeRecord:
    """Register a volume, and format its mirror. Raises NotManager, and registry, disk and LUKS errors.

    After an error nothing is registered.
    """
    protect_memory()
    actor = manager(state, f"create the volume {name}")
    target = inspect(target_path)
    if not target.size_bytes:
        raise TargetEmpty(path=target.path)
    if mirror is not None and mirror.sector_bytes not in (None, *SECTOR_SIZES):
        raise SectorSizeInvalid(sector_bytes=mirror.sector_bytes, allowed=", ".join(map(str, SECTOR_SIZES)))
    if mirror is not None and os.path.exists(mirror.path):
        how = overlap(target, inspect(mirror.path))
        if how:
            raise MirrorIsTarget(path=os.path.abspath(mirror.path), target=target.path, how=how)
    with state.registry() as registry:
        _refuse_taken(registry, [target_path] + ([mirror.path, mirror.header or ""] if mirror else []))
        volume = registry.add_volume(
            name,
            target_path=target.path,
            size_bytes=target.size_bytes,
            sector_bytes=target.logical_sector_bytes,
            on_denied=on_denied,
            actor=actor,
        )
        if mirror is not None:
            try:
                _add_mirror(registry, volume, target, mirror, actor)
            except BaseException:
                registry.remove_volume(name, actor=actor)
                raise
        return registry.volume(name)


def _refuse_taken(registry: Registry, paths: list[str]) -> None:
    """Refuse a disk that has a role already under another name; the registry itself compares names."""
    wanted = [inspect(path) for path in paths if os.path.exists(path)]
    for volume in registry.volumes():
        roles: list[tuple[str, type[RegistryError]]] = [(volume.target_path, TargetTaken)]
        for mirror in volume.mirrors:
            roles += [(mirror.path, MirrorTaken), (mirror.header_path or "", HeaderTaken)]
        for path, taken in roles:
            if os.path.exists(path) and any(overlap(inspect(path), disk) for disk in wanted):
                raise taken(path=path, volume=volume.name)


def _add_mirror(registry: Registry, volume: VolumeRecord, target: Disk, plan: MirrorPlan, actor: Actor) -> None:
    path = os.path.abspath(plan.path)
    header_path = os.path.abspath(plan.header) if plan.header else None
    luks_uuid = str(uuid.uuid4())
    registry.add_mirror(volume.name, path=path, luks_uuid=luks_uuid, header_path=header_path, generation=1, actor=actor)
    made = [each for each in (path, header_path) if each and not os.path.lexists(each)]
    header = make_mirror(
        target,
        path,
        header=header_path,
        passphrase=plan.passphrase(),
        sector_bytes=plan.sector_bytes or target.logical_sector_bytes,
        label=f"lockstep-{volume.name}"[:47],
        uuid=luks_uuid,
        iter_time_ms=plan.iter_time_ms,
        force=plan.force,
    )
    token = luks.Token(volume.id, volume.name, volume.size_bytes, generation=1, state=SYNCING)
    try:
        luks.write_token(header_path or path, token, token_id=header.token_id)
    except BaseException:
        for each in made:
            os.unlink(each)
        raise


def remove_volume(state: State, name: str) -> VolumeRecord:
    """Forget a volume. The disks keep what is on them. Raises StillServed, StillAttached, VolumeUnknown."""
    actor = manager(state, f"remove the volume {name}")
    with state.registry() as registry:
        volume = registry.volume(name)
        with state.volume_lock(name) as mine:
            if not mine:
                raise StillServed(volume=name, action="removed")
            attachment = attach.current(state.run_dir, name)
            if attachment is not None:
                raise StillAttached(volume=name, device=attachment.device)
            registry.remove_volume(name, actor=actor)
            for mirror in volume.mirrors:
                for path in state.records(mirror.luks_uuid):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
    return volume
