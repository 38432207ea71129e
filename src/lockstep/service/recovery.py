"""Restoring from a mirror alone: no registry, no target, only the mirror, its header and what unlocks it."""

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from lockstep.crypto import luks
from lockstep.crypto.cipher import self_test
from lockstep.crypto.unlock import Unlock
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.mirror import open_mirror
from lockstep.disk.plain import PlainDisk
from lockstep.disk.probe import Disk, holds_data, inspect, overlap, signatures, users_of
from lockstep.errors import (
    DiskBusy,
    DiskFailed,
    LockstepError,
    MirrorIncomplete,
    NoToken,
    OutputExists,
    OutputIsMirror,
    OutputTooSmall,
)
from lockstep.service.managing import commander
from lockstep.service.memory import protect_memory
from lockstep.service.state import State
from lockstep.volume.link import FROZEN, IN_SYNC
from lockstep.volume.restore import copy_out

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """What a restore has done."""

    volume_name: str
    output: str
    size_bytes: int
    luks_uuid: str
    frozen: bool  # it is the disk as it was when writes began that the mirror was not given


def restore(
    mirror_path: str,
    output_path: str,
    unlock: Unlock,
    *,
    header_path: str | None = None,
    force: bool = False,
    incomplete: bool = False,
    on_progress: Callable[[int, int], None],
) -> Restored:
    """Restore the target that a mirror holds, exactly its size, onto a disk or a file.

    `on_progress` is given bytes done and bytes in all. Raises MirrorIncomplete unless `incomplete`; OutputExists
    unless `force`; OutputIsMirror, OutputTooSmall, DiskBusy, DiskFailed, and whatever opening the mirror raises.
    An output that this made is removed when the restore fails.
    """
    protect_memory()
    self_test()
    with contextlib.ExitStack() as stack:
        header = luks.read_header(header_path or mirror_path)
        token = header.token
        if token is None:
            raise NoToken(path=mirror_path)
        if token.state not in (IN_SYNC, FROZEN) and not incomplete:
            raise MirrorIncomplete(path=mirror_path, state=token.state)
        size_bytes = token.target_size_bytes
        _refuse_same_storage(mirror_path, header_path, output_path)
        made = not os.path.lexists(output_path)
        with contextlib.ExitStack() as undo:
            if made:
                _make_output(output_path)
                undo.callback(os.unlink, output_path)
            output = _open_output(inspect(output_path), size_bytes, made=made, force=force)
            stack.callback(output.close)
            unlock.prepare()
            mirror = open_mirror(mirror_path, header_path, header, unlock, size_bytes, writable=False)
            stack.callback(mirror.close)
            _copy(mirror, mirror_path, output, size_bytes, made, on_progress)
            undo.pop_all()
    return Restored(token.volume_name, output_path, size_bytes, header.uuid, token.state == FROZEN)


def note_restore(state: State, mirror_path: str, done: Restored) -> None:
    """Put a restore into the audit trail of the state directory, if that knows the mirror.

    A restore needs no registry, and one that is absent or broken is no reason to fail afterwards: the log says so.
    """
    if not os.path.exists(state.registry_path):
        return
    try:
        with state.registry() as registry:
            known = {mirror.luks_uuid: volume.name for volume in registry.volumes() for mirror in volume.mirrors}
            if done.luks_uuid in known:
                actor, path = commander(), os.path.abspath(mirror_path)
                reason = f"{actor.user} restored the mirror {path} to {done.output}"
                details = {"mirror": path, "output": done.output, "bytes": done.size_bytes, "frozen": done.frozen}
                registry.audit("restore", actor=actor, volume=known[done.luks_uuid], reason=reason, details=details)
    except LockstepError as error:
        log.warning("the restore is not in the audit trail: %s", error)


def _copy(
    mirror: EncryptedDisk,
    mirror_path: str,
    output: PlainDisk,
    size_bytes: int,
    made: bool,
    on_progress: Callable[[int, int], None],
) -> None:
    try:
        if not output.disk.is_block:
            os.truncate(output.disk.path, size_bytes)
        copy_out(mirror, output, size_bytes, blank=made, on_progress=lambda done: on_progress(done, size_bytes))
    except OSError as error:
        raise DiskFailed(
            path=f"{mirror_path} to {output.disk.path}", doing="Copying", reason=error.strerror or str(error)
        ) from error


def _refuse_same_storage(mirror_path: str, header_path: str | None, output_path: str) -> None:
    if not os.path.exists(output_path):
        return
    output = inspect(output_path)
    for path in filter(None, (mirror_path, header_path)):
        how = overlap(inspect(path), output)
        if how:
            raise OutputIsMirror(path=output_path, mirror=path, how=how)


def _make_output(path: str) -> None:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise DiskFailed(path=path, doing="Making", reason=error.strerror) from error


def _open_output(disk: Disk, size_bytes: int, *, made: bool, force: bool) -> PlainDisk:
    users = users_of(disk)
    if users:
        raise DiskBusy(path=disk.path, users=" and ".join(users))
    if disk.is_block and disk.size_bytes < size_bytes:
        raise OutputTooSmall(path=disk.path, size_bytes=disk.size_bytes, needed_bytes=size_bytes)
    if not made and not force:
        _refuse_content(disk)
    return PlainDisk.claim(disk)


def _refuse_content(disk: Disk) -> None:
    """Without force, a file that exists is never overwritten, and a device only when it is blank."""
    if not disk.is_block:
        raise OutputExists(path=disk.path, found="the file exists already")
    found = signatures(disk) or (("it holds data of an unknown kind",) if holds_data(disk) else ())
    if found:
        raise OutputExists(path=disk.path, found=" and ".join(found))
