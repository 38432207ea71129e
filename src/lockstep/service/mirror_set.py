"""The mirrors of a volume: one more is made or adopted, one is forgotten, all of them are doubted.

A mirror is registered before it is formatted or given our token: so it is claimed, and no disk that has a role already
is overwritten. If what follows fails, the registration is taken back. If it is interrupted, the disk is no mirror that
`serve` would take; then it is removed, and added again.

A new mirror has no intent bitmap, so everything counts as different, and is copied when the volume is served next. So
it is with an adopted one, but the registry remembers to compare first: only what really differs is written.

Where something is held from another mirror, no mirror is added: it would be given what that one must not have.
"""

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lockstep.crypto import luks, recovery_key
from lockstep.crypto.unlock import Unlock
from lockstep.disk import patience
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.mirror import SECTOR_SIZES, make_mirror, open_mirror, refuse_unfit, whole_sectors
from lockstep.disk.plain import PlainDisk
from lockstep.disk.probe import Disk, inspect, open_disk, overlap
from lockstep.errors import (
    AlreadyServed,
    HeaderDamaged,
    HeaderIsCopy,
    HeaderUnreadable,
    LockstepError,
    LuksUuidTaken,
    MirrorKeysDiffer,
    MirrorOfAnotherVolume,
    MirrorsHoldBack,
    MirrorUnlike,
    NoKeySlots,
    NoMirror,
    NotLuks2,
    SectorSizeInvalid,
    StillServed,
    TargetResized,
    TargetUnfinished,
)
from lockstep.registry.audit import Actor
from lockstep.registry.store import MirrorRecord, Registry, VolumeRecord
from lockstep.service import borrowing, mirrors
from lockstep.service.control_client import ask, ask_status
from lockstep.service.managing import manager, unserved
from lockstep.service.memory import protect_memory
from lockstep.service.state import State
from lockstep.volume import intent
from lockstep.volume.files import sync_directory
from lockstep.volume.held import HeldRecord
from lockstep.volume.link import SYNCING, WHOLE
from lockstep.volume.regions import positions
from lockstep.volume.spot_check import spot_check

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MirrorPlan:
    """How to make a mirror, or to adopt one; None stands for the natural choice."""

    path: str
    passphrase: Callable[[], bytes]
    header: str | None = None
    sector_bytes: int | None = None
    iter_time_ms: int | None = None
    force: bool = False
    adopt: bool = False


@dataclass(frozen=True)
class Added:
    """A mirror that was added; or one of a served volume that is looked for, and its state at that moment."""

    mirror: MirrorRecord
    sought: str | None = None


def add_mirror(state: State, name: str, plan: MirrorPlan) -> Added:
    """Give a volume that is not served one more mirror; have the server of one that is look for a mirror of it.

    Raises NotManager, StillServed, MirrorsHoldBack, MirrorKeysDiffer, and registry, disk and LUKS errors. After an
    error nothing is registered.
    """
    protect_memory()
    actor = manager(state, f"add a mirror to {name}")
    require_sector(plan)
    with state.registry() as registry:
        with unserved(state, registry, name) as volume:
            if volume is None:
                return _sought(state, registry.volume(name), plan.path)
            target = mirrors.look_at_target(volume)
            if target.size_bytes < volume.size_bytes:
                raise TargetResized(
                    path=target.path, volume=name, size_bytes=target.size_bytes, expected_bytes=volume.size_bytes
                )
            refuse_taken(registry, [plan.path, plan.header or ""])
            _refuse_where_held(state, volume)
            _refuse_another_key(volume, plan)
            make = _adopt if plan.adopt else make_registered
            make(state, registry, volume, replace(target, size_bytes=volume.size_bytes), plan, actor)
        path = os.path.abspath(plan.path)
        return Added(next(mirror for mirror in registry.volume(name).mirrors if mirror.path == path))


def remove_mirror(state: State, name: str, path: str) -> MirrorRecord:
    """Forget a mirror, and what is on record about it; its disk is not touched.

    Raises NotManager, StillServed, MirrorBorrowed, MirrorUnknown, NoMirror, TargetUnfinished.
    """
    actor = manager(state, f"remove a mirror from {name}")
    with state.registry() as registry, unserved(state, registry, name) as volume:
        mirror = mirrors.chosen(volume or registry.volume(name), path)
        if volume is None:
            raise StillServed(volume=name, action="parted from a mirror")
        if mirror.id == volume.filled_from:
            raise TargetUnfinished(path=volume.target_path, volume=name, mirror=mirror.path)
        with borrowing.nobodys(state, [mirror]):
            registry.remove_mirror(name, mirror.path, actor=actor)
            forget_records(state, mirror.luks_uuid)
    return mirror


def require_sector(plan: MirrorPlan) -> None:
    """Raise SectorSizeInvalid."""
    if plan.sector_bytes not in (None, *SECTOR_SIZES):
        raise SectorSizeInvalid(sector_bytes=plan.sector_bytes, allowed=", ".join(map(str, SECTOR_SIZES)))


def refuse_taken(
    registry: Registry, paths: list[str], *, but: str | None = None, refused: tuple[mirrors.Role, ...] = mirrors.ROLES
) -> None:
    """Refuse a disk that has one of these roles already under another name; the registry itself compares names.

    `but` is a path whose role does not count. Raises TargetTaken and its like, and DiskSilent where a disk with a role
    does not answer: it might be the one that is given.
    """
    wanted = [inspect(path) for path in paths if os.path.exists(path)]
    known = [(path, taken, volume) for volume in registry.volumes() for path, taken in mirrors.roles(volume)]
    roles = [each for each in known if each[1] in refused]
    answers = patience.ask({path: functools.partial(_is_one_of, path, wanted) for path, _, _ in roles if path != but})
    for path, taken, volume in roles:
        if path != but and path not in answers:
            raise patience.silent(path)
        if path != but and answers[path]:
            raise taken(path=path, volume=volume.name)


def _is_one_of(path: str, disks: list[Disk]) -> bool:
    return os.path.exists(path) and any(overlap(inspect(path), disk) for disk in disks)


def forget_records(state: State, luks_uuid: str) -> None:
    """Remove, durably, what is kept about a mirror: then everything differs, and nothing is held.

    Raises StateDirUnusable.
    """
    _forget(state, state.records(luks_uuid))


def doubt_mirrors(state: State, name: str, *, compare: bool) -> None:
    """Have the next server of a volume copy everything that is not held, or with `compare` whatever really differs.

    Raises NotManager, AlreadyServed, NoMirror, TargetUnfinished, StateDirUnusable, registry errors.
    """
    actor = manager(state, f"sync {name}")
    with state.registry() as registry, unserved(state, registry, name) as volume:
        if volume is None:
            raise AlreadyServed(volume=name)
        if not volume.mirrors:
            raise NoMirror(volume=name)
        mirrors.refuse_filling(volume)
        for mirror in volume.mirrors:
            if compare:
                registry.set_generation(mirror.id, mirror.generation, compare=True)
            with state.told():
                intent.doubt(
                    state.intent(mirror.luks_uuid), intent.Identity(volume.id, mirror.luks_uuid, volume.size_bytes)
                )
        reason = f"{actor.user} had everything copied to the mirrors anew, by the next server"
        registry.audit("sync", actor=actor, volume=name, reason=reason, details={})


def forget_marks(state: State, volume: VolumeRecord, *, but: str | None) -> None:
    """Have a volume's mirrors compared by its next server, but the one with that LUKS UUID. Raises StateDirUnusable.

    A registry that is broken by now is no reason to fail: all of it is copied then.
    """
    doubted = [mirror for mirror in volume.mirrors if mirror.luks_uuid != but]
    _forget(state, [state.intent(mirror.luks_uuid) for mirror in doubted])
    try:
        with state.registry() as registry:
            for mirror in doubted:
                registry.set_generation(mirror.id, mirror.generation, compare=True)
    except LockstepError as error:
        log.warning("the mirrors of %s are not going to be compared, but copied to: %s", volume.name, error)


def _forget(state: State, records: Sequence[str]) -> None:
    with state.told():
        for path in records:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for path in records:
            sync_directory(path)


def make_registered(
    _state: State, registry: Registry, volume: VolumeRecord, target: Disk, plan: MirrorPlan, actor: Actor
) -> None:
    """Register a mirror and format it."""
    path = os.path.abspath(plan.path)
    header_path = os.path.abspath(plan.header) if plan.header else None
    luks_uuid = str(uuid.uuid4())
    registry.add_mirror(volume.name, path=path, luks_uuid=luks_uuid, header_path=header_path, generation=1, actor=actor)
    made = [each for each in (path, header_path) if each and not os.path.lexists(each)]
    try:
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
    except BaseException:
        registry.remove_mirror(volume.name, path, actor=actor)
        raise


def _adopt(
    state: State, registry: Registry, volume: VolumeRecord, target: Disk, plan: MirrorPlan, actor: Actor
) -> None:
    """Register a LUKS2 volume that is there as a mirror: nothing of it is changed but the token."""
    path = os.path.abspath(plan.path)
    header_path = os.path.abspath(plan.header) if plan.header else None
    disk, header = inspect(path), luks.read_header(header_path or path)
    if header_path is not None:
        _refuse_copy(path, header_path, header.uuid)
    token, segment = header.token, header.segment
    if token is not None and token.volume_id != volume.id:
        owners = {each.id for each in registry.volumes()}
        if token.volume_id in owners:
            owner = f"the volume {token.volume_name}, which is registered here"
            raise MirrorOfAnotherVolume(path=path, volume=volume.name, owner=owner)
    data_bytes = whole_sectors(volume.size_bytes, segment.sector_bytes)
    if segment.length_bytes is not None:  # what lies behind it may be something else's
        disk = replace(disk, size_bytes=min(disk.size_bytes, segment.offset_bytes + segment.length_bytes))
    refuse_unfit(target, disk, segment.offset_bytes + data_bytes, detached=True)
    _refuse_twin(registry, path, header.uuid)
    unlock = Unlock(plan.passphrase)
    with contextlib.closing(open_mirror(path, header_path, header, unlock, volume.size_bytes, writable=True)) as mirror:
        if token is not None and token.state in WHOLE and not plan.force:
            _refuse_stranger(volume, target, path, mirror)
    generation = (token.generation if token else 0) + 1 + secrets.randbits(31)
    forget_records(state, header.uuid)
    registry.add_mirror(
        volume.name,
        path=path,
        luks_uuid=header.uuid,
        header_path=header_path,
        generation=generation,
        compare=True,
        actor=actor,
    )
    ours = luks.Token(volume.id, volume.name, volume.size_bytes, generation, SYNCING)
    try:
        luks.write_token(header_path or path, ours, token_id=header.token_id)
    except BaseException:
        registry.remove_mirror(volume.name, path, actor=actor)
        raise


def _refuse_stranger(volume: VolumeRecord, target: Disk, path: str, mirror: EncryptedDisk) -> None:
    """Raise MirrorUnlike where a whole mirror, perhaps the only copy, would be overwritten with another disk."""
    with contextlib.closing(PlainDisk(target, open_disk(target, writable=False), volume.size_bytes)) as disk:
        regions = intent.Identity(volume.id, volume.id, volume.size_bytes).regions
        check = spot_check(disk, mirror, lambda: bytes(regions))
    if check.telling and check.differing == check.telling:
        raise MirrorUnlike(path=path, target=target.path, volume=volume.name)


def _refuse_copy(path: str, header_path: str, luks_uuid: str) -> None:
    """Raise HeaderIsCopy where the mirror would keep a header that goes on telling the state of today."""
    with contextlib.suppress(NotLuks2, HeaderDamaged, HeaderUnreadable):
        if luks.read_uuid(path) == luks_uuid:
            raise HeaderIsCopy(path=path, header=header_path)


def _refuse_twin(registry: Registry, path: str, luks_uuid: str) -> None:
    """Raise LuksUuidTaken before what is on record of the mirror that has this UUID would be forgotten."""
    for volume in registry.volumes():
        for mirror in volume.mirrors:
            if mirror.luks_uuid == luks_uuid:
                raise LuksUuidTaken(path=path, luks_uuid=luks_uuid, registered=mirror.path)


def _sought(state: State, volume: VolumeRecord, path: str) -> Added:
    """Have the server look for a mirror that it has; it cannot be given another one."""
    real = os.path.realpath(path)
    mirror = next((each for each in volume.mirrors if os.path.realpath(each.path) == real), None)
    if mirror is None:
        raise StillServed(volume=volume.name, action="given another mirror")
    control = state.control(volume.name)
    ask(control, volume.name, "POST", "/v1/mirrors")
    described = ask_status(control, volume.name)["mirrors"]
    return Added(mirror, next(str(each["state"]) for each in described if each["uuid"] == mirror.luks_uuid))


def _refuse_where_held(state: State, volume: VolumeRecord) -> None:
    for mirror in volume.mirrors:
        identity = intent.Identity(volume.id, mirror.luks_uuid, volume.size_bytes)
        known = intent.load(state.intent(mirror.luks_uuid), identity, None, None).of_mirror
        held = HeldRecord(state.held(mirror.luks_uuid), identity, asyncio.to_thread, expected=known)
        if positions(held.regions()):
            raise MirrorsHoldBack(volume=volume.name, mirror=mirror.path)


def _refuse_another_key(volume: VolumeRecord, plan: MirrorPlan) -> None:
    """All mirrors of a volume are unlocked by one passphrase; one that cannot be asked now is let pass."""
    for mirror in volume.mirrors:
        try:
            luks.wipe(luks.volume_key(mirrors.header_path(mirror), plan.passphrase()))
        except recovery_key.WRONG as error:
            raise MirrorKeysDiffer(path=plan.path, other=mirror.path, volume=volume.name) from error
        except (HeaderUnreadable, HeaderDamaged, NotLuks2, NoKeySlots):
            continue
