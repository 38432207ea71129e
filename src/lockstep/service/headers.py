"""Copies of a mirror's header: made, put back, and missed where there is none.

Without its header a mirror is noise, and a detached header is one file. So somebody must have a copy of it that was
made after the last change of a passphrase; the audit trail knows, and `reminders` says how it stands.

Putting a copy back
    1. The copy must be of this mirror: LUKS UUID, volume, and volume key if the header that is there can be read.
    2. It takes force where its key slots are others than those that are there: what was removed would come back. So
       it does where the header that is there cannot be read, and the audit trail tells of a re-keying since: what has
       the new key already would be noise for ever, should the header only be unreadable for the moment.
    3. The copy's token is of its time, and says nothing about the data of today. So it gets a new token first, in a
       copy of the copy, in memory: a new generation, which fits no intent bitmap, so that everything is copied; and the
       state that the header that is there tells, or else `syncing`: what the mirror holds is not known. Then the header
       is overwritten at once.
    4. Whatever fails before that has changed nothing. If overwriting is interrupted, the header may be damaged, and
       putting the copy back again mends it.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from lockstep.crypto import cryptsetup, header_backup, luks, reencryption
from lockstep.crypto.header_backup import Content
from lockstep.disk.mirror import require_unused
from lockstep.disk.probe import MIB, holds_data, inspect, signatures
from lockstep.errors import (
    BackupExists,
    BackupKeyFormer,
    BackupKeysDiffer,
    BackupMissing,
    BackupNotComparable,
    BackupNotWritten,
    BackupOfAnother,
    HeaderDamaged,
    HeaderUnreadable,
    MirrorHoldsData,
    NotLuks2,
    StillServed,
)
from lockstep.registry.store import MirrorRecord, Registry, VolumeRecord
from lockstep.service import keys, mirrors, rekey
from lockstep.service.managing import manager, unserved
from lockstep.service.state import State
from lockstep.volume.link import SYNCING

BACKED_UP, RESTORED = "header-backup", "header-restored"
"""Events of the audit trail."""

MISSING, OUTDATED, CURRENT = "missing", "outdated", "current"
"""How it stands with the copy of a header."""

_CHANGES: Final = (keys.BEGUN, keys.UNCHANGED, keys.ADDED, keys.REMOVED, keys.CHANGED, rekey.BEGUN, rekey.REKEYED)


Slots = tuple[int, ...]


@dataclass(frozen=True)
class Restored:
    """A header that was put back; `compared` is false when there was nothing sound to compare it with."""

    mirror: MirrorRecord
    compared: bool
    back: Slots
    gone: Slots
    state: str


# --- reminding ---


def backups(registry: Registry, volume: VolumeRecord) -> dict[str, str]:
    """LUKS UUID of each mirror -> MISSING, OUTDATED or CURRENT, by what Lockstep's own commands did."""
    found = {mirror.luks_uuid: MISSING for mirror in volume.mirrors}
    former = dict(found)  # before the change that was begun last
    for row in registry.audit_rows(volume=volume.name, events=(BACKED_UP, RESTORED, *_CHANGES)):
        uuid = row.details.get("luks_uuid")
        if uuid in found:
            former[uuid] = found[uuid] if row.event == keys.BEGUN else former[uuid]
            if row.event in (BACKED_UP, RESTORED):
                found[uuid] = CURRENT
            elif row.event == keys.UNCHANGED:
                found[uuid] = former[uuid]
            elif found[uuid] == CURRENT:
                found[uuid] = OUTDATED
    return found


def reminders(registry: Registry, volume: VolumeRecord) -> Iterator[str]:
    """A sentence for each mirror whose detached header has no copy of today's passphrases."""
    known = backups(registry, volume)
    for mirror in volume.mirrors:
        if mirror.header_path is not None:
            sentence = reminder(volume.name, mirror.header_path, known[mirror.luks_uuid])
            if sentence:
                yield sentence


def reminder(name: str, header: str, backup: str) -> str | None:
    """What to tell whoever has a detached header; None when there is a copy."""
    advice = f"Make one, on another disk: lockstep header backup {name} OUTPUT"
    if backup == MISSING:
        return f"THE HEADER {header} HAS NO SECOND COPY. If it is lost, nobody can ever open the mirror. {advice}"
    if backup == OUTDATED:
        return f"The last copy of the header {header} is older than its keys. {advice}"
    return None


# --- backing up ---


def back_up_header(state: State, name: str, mirror_path: str | None, output: str, *, force: bool) -> MirrorRecord:
    """Copy a mirror's header to a file; it may be served meanwhile.

    Even with `force` it takes the place of nothing but an earlier copy of the same header. Raises NotManager,
    BackupExists, OutputInState, TargetTaken and its like, BackupNotWritten, MirrorOfAnotherVolume, and header errors.
    """
    actor = manager(state, f"back up a header of {name}")
    if os.path.exists(output):  # a link stays one: it shows where the copies are
        output = os.path.realpath(output)  # once, so that it leads nowhere else later
    with state.registry() as registry:
        volume = registry.volume(name)
        mirror = mirrors.chosen(volume, mirror_path)
        path = mirrors.header_path(mirror)
        state.refuse_output(output)
        _refuse_output(registry, mirror, output, force=force)
        with state.key_lock(mirror.luks_uuid):
            mirrors.require_same_disk(volume, mirror, luks.read_uuid(path))
            reason = f"{actor.user} copied the header of the mirror {mirror.path} to {os.path.abspath(output)}"
            details = {"mirror": mirror.path, "luks_uuid": mirror.luks_uuid, "output": os.path.abspath(output)}
            with header_backup.written(path, output):  # there is none that is not in the audit trail
                registry.audit(BACKED_UP, actor=actor, volume=name, reason=reason, details=details)
    return mirror


def _refuse_output(registry: Registry, mirror: MirrorRecord, output: str, *, force: bool) -> None:
    try:
        found = os.stat(output).st_mode
    except FileNotFoundError:
        if os.path.islink(output):
            raise BackupNotWritten(path=output, reason="it is a link that leads nowhere") from None
        found = None
    except OSError as error:
        raise BackupNotWritten(path=output, reason=error.strerror) from error
    if found is not None and not stat.S_ISREG(found):
        raise BackupNotWritten(path=output, reason="it is there, and is not a file")
    mirrors.refuse_as_output(registry.volumes(), output)
    if found is not None and not force:
        raise BackupExists(path=output)
    if found is None:
        return
    if (copied := header_backup.copied(output)) is None:
        raise BackupNotWritten(path=output, reason="it is there, and is no header backup")
    if copied != mirror.luks_uuid:  # perhaps all that opens something of which nobody here knows
        reason = f"it is the header of another LUKS volume, UUID {copied}, not {mirror.luks_uuid}, or a copy of that"
        raise BackupNotWritten(path=output, reason=reason)


# --- putting back ---


def restore_header(state: State, name: str, mirror_path: str | None, backup: str, *, force: bool) -> Restored:
    """Put a copy of a mirror's header back, over whatever is there.

    Raises NotManager, StillServed, BackupMissing, BackupOfAnother, MirrorOfAnotherVolume, DiskBusy, DiskLocked; unless
    `force` BackupKeysDiffer, BackupKeyFormer, BackupNotComparable, and MirrorHoldsData where the header's place was
    given to something else.
    """
    actor = manager(state, f"restore a header of {name}")
    with state.registry() as registry, contextlib.ExitStack() as stack:
        volume = stack.enter_context(unserved(state, registry, name))
        if volume is None:
            raise StillServed(volume=name, action="given another header")
        mirror = mirrors.chosen(volume, mirror_path)
        path = mirrors.header_path(mirror)
        stack.enter_context(state.key_lock(mirror.luks_uuid))
        token, token_id = _token_of(backup, volume, mirror)
        require_unused(inspect(mirror.path))
        back, gone = _compared(registry, volume, mirror, backup, force=force)
        compared = back is not None
        token = _renewed(token, mirror, mirrors.present_token(path))
        done = Restored(mirror, compared, back or (), gone or (), token.state)
        reason = f"{actor.user} restored the header of the mirror {mirror.path} from {os.path.abspath(backup)}"
        reason += f": {_listed(done.back)} came back, {_listed(done.gone)} lost" if compared else ""
        details = {"mirror": mirror.path, "luks_uuid": mirror.luks_uuid, "backup": os.path.abspath(backup)}
        what = {"compared": compared, "slots_back": done.back, "slots_gone": done.gone}
        # Before it is done: no passphrase comes back that is not in the audit trail.
        registry.audit(RESTORED, actor=actor, volume=name, reason=reason, details=details | what)
        _put_back(path, backup, token, token_id)
        registry.set_generation(mirror.id, token.generation)
    return done


def _token_of(backup: str, volume: VolumeRecord, mirror: MirrorRecord) -> tuple[luks.Token, int | None]:
    """Return the token of a copy that is one of this mirror's header, and its number there."""
    try:
        header = luks.read_header(backup)
    except (NotLuks2, HeaderDamaged, HeaderUnreadable) as error:
        raise BackupMissing(path=backup, reason=str(error)) from error
    mirrors.require_copy(backup, header.uuid, mirror.path, mirror.luks_uuid)
    if header.token is None:
        raise BackupOfAnother(backup=backup, path=mirror.path, reason="it has no lockstep token")
    if header.token.volume_id != volume.id:
        reason = f"it belongs to the volume {header.token.volume_name}"
        raise BackupOfAnother(backup=backup, path=mirror.path, reason=reason)
    return header.token, header.token_id


def _compared(
    registry: Registry, volume: VolumeRecord, mirror: MirrorRecord, backup: str, *, force: bool
) -> tuple[Slots, Slots] | tuple[None, None]:
    """Return the key slots that would come back, and those that would be lost; None where that cannot be known."""
    path = mirrors.header_path(mirror)
    try:
        present = Content.of(path)
    except (NotLuks2, HeaderDamaged, HeaderUnreadable) as failure:
        if not force:
            _refuse_former_key(registry, volume, mirror, backup)
            if isinstance(failure, HeaderUnreadable) and os.path.lexists(path):
                raise BackupNotComparable(backup=backup, path=path, reason=str(failure)) from failure
            _refuse_other_content(path)
        return None, None
    mirrors.require_same_disk(volume, mirror, luks.read_uuid(path))
    offered = Content.of(backup)
    if offered.digests != present.digests:
        raise BackupOfAnother(backup=backup, path=mirror.path, reason=mirrors.OTHER_KEY)
    back, gone = offered.slots_not_in(present), present.slots_not_in(offered)
    if (back or gone) and not force:
        raise BackupKeysDiffer(backup=backup, path=path, back=_listed(back), gone=_listed(gone))
    return back, gone


def _refuse_other_content(path: str) -> None:
    """Refuse what is neither a damaged LUKS2 header nor blank: another disk may have the mirror's name by now."""
    if not os.path.exists(path):
        return
    disk = inspect(path)
    found = signatures(disk)
    if luks.is_luks2(path):
        found = tuple(each for each in found if "luks" not in each.lower())
    elif not found and holds_data(replace(disk, size_bytes=min(disk.size_bytes, MIB))):  # further on is data
        found = ("data of an unknown kind",)
    if found:
        raise MirrorHoldsData(path=path, found=" and ".join(found))


def _refuse_former_key(registry: Registry, volume: VolumeRecord, mirror: MirrorRecord, backup: str) -> None:
    if reencryption.key_mark(backup) in rekey.former_keys(registry, volume.name, mirror.luks_uuid):
        raise BackupKeyFormer(backup=backup, path=mirror.path)


def _listed(slots: Slots) -> str:
    if not slots:
        return "no key slot"
    return f"key slot{'s' if len(slots) > 1 else ''} {', '.join(map(str, slots))}"


def _renewed(token: luks.Token, mirror: MirrorRecord, present: luks.Token | None) -> luks.Token:
    """Return the token with a generation that was never given, and with the state of the data, if that is known."""
    seen = max(token.generation, mirror.generation, present.generation if present else 0)
    generation = seen + 1 + secrets.randbits(31)
    return replace(token, generation=generation, state=present.state if present else SYNCING)


def _put_back(path: str, backup: str, token: luks.Token, token_id: int | None) -> None:
    copy = luks.header_bytes(backup, luks.read_metadata(backup))
    with cryptsetup.memory_file(copy) as fd:
        renewed = f"/dev/fd/{fd}"
        luks.write_token(renewed, token, token_id=token_id, fds=[fd])
        header_backup.put_back(path, renewed, fds=[fd])
    luks.read_header(path)
