"""Making and forgetting volumes: the registry and the disks, in the order that loses nothing.

A volume and its mirror are registered before the mirror is formatted (mirror_set.py): so the name and the disks are
claimed, and no disk that has a role already is overwritten. If formatting fails, the registration is taken back.
"""

import contextlib
import os

from lockstep.disk.probe import Disk, inspect, overlap
from lockstep.errors import (
    HeaderIsDisk,
    HeaderTaken,
    MirrorIsTarget,
    MirrorTaken,
    StillAttached,
    StillServed,
    TargetEmpty,
)
from lockstep.registry.store import OnDenied, VolumeRecord
from lockstep.service import attach, borrowing, mirrors
from lockstep.service.managing import manager, unserved
from lockstep.service.memory import protect_memory
from lockstep.service.mirror_set import MirrorPlan, forget_records, make_registered, refuse_taken, require_sector
from lockstep.service.state import State


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
    if mirror is not None:
        require_sector(mirror)
        _refuse_target(target, mirror)
    with state.registry() as registry:
        refuse_taken(registry, [target_path] + ([mirror.path, mirror.header or ""] if mirror else []))
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
                make_registered(state, registry, volume, target, mirror, actor)
            except BaseException:
                registry.remove_volume(name, actor=actor)
                raise
        return registry.volume(name)


def _refuse_target(target: Disk, mirror: MirrorPlan) -> None:
    """Raises MirrorIsTarget, HeaderIsDisk."""
    if os.path.exists(mirror.path) and (how := overlap(target, inspect(mirror.path))):
        raise MirrorIsTarget(path=os.path.abspath(mirror.path), target=target.path, how=how)
    header = mirror.header
    if header is not None and os.path.exists(header) and (how := overlap(target, inspect(header))):
        raise HeaderIsDisk(path=os.path.abspath(header), disk=target.path, how=how)


def move_target(state: State, name: str, path: str) -> None:
    """Have a volume look for its target at `path`; its next server sees whether that is the disk that it was.

    It may be what another volume calls its target: names are exchanged as easily as they move.

    Raises NotManager, StillServed, TargetUnfinished, TargetResized, MirrorTaken and its like, registry and disk errors.
    """
    actor = manager(state, f"change the settings of {name}")
    with state.registry() as registry, unserved(state, registry, name) as volume:
        if volume is None:
            raise StillServed(volume=name, action="told another name of its target")
        mirrors.refuse_filling(volume)
        mirrors.require_size(inspect(path), volume)
        refuse_taken(registry, [path], refused=(MirrorTaken, HeaderTaken))
        registry.move_target(name, os.path.abspath(path), actor=actor)


def remove_volume(state: State, name: str) -> VolumeRecord:
    """Forget a volume. The disks keep what is on them.

    Raises StillServed, StillAttached, MirrorBorrowed, VolumeUnknown.
    """
    actor = manager(state, f"remove the volume {name}")
    with state.registry() as registry, unserved(state, registry, name) as volume:
        if volume is None:
            raise StillServed(volume=name, action="removed")
        attachment = attach.current(state.run_dir, name)
        if attachment is not None:
            raise StillAttached(volume=name, device=attachment.device)
        with borrowing.nobodys(state, volume.mirrors):
            registry.remove_volume(name, actor=actor)
            for mirror in volume.mirrors:
                forget_records(state, mirror.luks_uuid)
        for record in (state.missing(volume.id), state.overwritten(volume.id)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(record)
    return volume
