"""A new volume key for a mirror: its data is re-encrypted in place, while the volume goes on being served.

    begin    the mirror is let go by its server, and locked; on record in the audit trail; a new key in the header
    go on    cryptsetup re-encrypts zone after zone (lockstep/crypto/reencryption.py)
    end      a new generation, so that no header with the old key fits the intent bitmap; the server takes the mirror
             back, and copies what was written meanwhile; a new passphrase, if one was given; on record

Rules:

1. Whatever interrupts this, the mirror alone gives back all of the data as it was when it was let go:
   `lockstep restore` and `cryptsetup open` read it as it is.
2. The same command again goes on where it was. How far that is, is told by the header (is the re-encryption under way?)
   and by the audit trail (which volume key was there when it began, and has it ended?).
3. While this runs, nobody else writes to the mirror: whoever opens it asks for the borrowing lock and for the disk's.
   Both are cryptsetup's as well: if this command is killed, they last until cryptsetup has ended too.
4. The plaintext stays what it was, so nothing need be copied but what was written meanwhile; a mirror that is frozen,
   or behind, or keeps what is held from it, stays so.

Not handled: other passphrases. Their key slots hold the old key, and are gone in the end.
"""

import asyncio
import contextlib
import mmap
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from lockstep.crypto import keyslots, luks, reencryption
from lockstep.crypto.unlock import Unlock
from lockstep.disk.mirror import claim_for_rekeying, whole_sectors
from lockstep.disk.probe import inspect
from lockstep.errors import DiskFailed, LockstepError, NotServed, RekeyDropsKeys, TargetUnfinished
from lockstep.registry.store import MirrorRecord, Registry, VolumeRecord
from lockstep.service import borrowing
from lockstep.service.gate import VolumeGate
from lockstep.service.managing import MirrorWork, working_on
from lockstep.service.state import State
from lockstep.service.volume_session import open_volume
from lockstep.volume.workers import Workers

BEGUN, REKEYED = "rekey-begun", "rekeyed"
"""Events of the audit trail."""

WORKERS: Final = 4

Ask = Callable[[], bytes]


@dataclass(frozen=True)
class Rekeyed:
    """What was done; `resumed` if it had been begun before, `behind` why the server has not taken the mirror back."""

    mirror: MirrorRecord
    slot: int
    resumed: bool
    behind: str | None


@dataclass(frozen=True)
class _Work(MirrorWork):
    passphrase: Ask


def rekey(
    state: State,
    name: str,
    mirror_path: str | None,
    passphrase: Ask,
    new: Ask | None,
    iter_time_ms: int | None,
    *,
    drop_others: bool,
    on_progress: Callable[[int, int], None],
) -> Rekeyed:
    """Give a mirror a new volume key, or go on with it; `new` is a passphrase in place of the one that is there.

    `on_progress` is given bytes done and bytes in all. Raises NotManager, RekeyDropsKeys unless `drop_others`,
    MirrorBorrowed, TargetUnfinished, DiskBusy, DiskLocked, registry errors, MirrorOfAnotherVolume, header errors and
    cryptsetup's.
    """
    with working_on(state, name, mirror_path, "re-key a mirror of") as begun:
        _refuse_filling(begun.volume)
        for ask in (passphrase, new):
            if ask is not None:
                luks.refuse_empty(ask())
        with borrowing.alone(state, begun.mirror) as lock:
            work = _Work(**vars(begun.renewed()), passphrase=passphrase)
            _refuse_filling(work.volume)
            former = _former_key(work)
            resumed = former is not None
            if reencryption.under_way(work.header) or former in (None, reencryption.key_mark(work.header)):
                _reencrypt(work, lock, iter_time_ms, resumed=resumed, drop_others=drop_others, on_progress=on_progress)
        behind = _hand_back(work, new)
        slot = _change_passphrase(work, new, iter_time_ms)
        work.note(REKEYED, "gave a new volume key to", slot=slot)
    return Rekeyed(work.mirror, slot, resumed, behind)


def _refuse_filling(volume: VolumeRecord) -> None:
    """Raise TargetUnfinished where a new target may read what it lacks from the mirror."""
    if volume.filled_from is not None:
        source = next(mirror.path for mirror in volume.mirrors if mirror.id == volume.filled_from)
        raise TargetUnfinished(path=volume.target_path, volume=volume.name, mirror=source)


# --- how far it is ---


def _former_key(work: _Work) -> str | None:
    """The volume key that was there when a re-keying began that has not ended; None if there is none."""
    former = None
    for row in work.registry.audit_rows(volume=work.volume.name, events=(BEGUN, REKEYED)):
        if row.details.get("luks_uuid") == work.mirror.luks_uuid:
            former = str(row.details["volume_key"]) if row.event == BEGUN else None
    return former


def former_keys(registry: Registry, volume: str, luks_uuid: str) -> set[str]:
    """What `reencryption.key_mark` says of each volume key that a re-keying of this mirror began to replace."""
    rows = registry.audit_rows(volume=volume, events=(BEGUN,))
    return {str(row.details["volume_key"]) for row in rows if row.details.get("luks_uuid") == luks_uuid}


# --- re-encrypting ---


def _reencrypt(
    work: _Work,
    lock: int,
    iter_time_ms: int | None,
    *,
    resumed: bool,
    drop_others: bool,
    on_progress: Callable[[int, int], None],
) -> None:
    fresh = not reencryption.under_way(work.header)
    segment = luks.read_header(work.header).segment if fresh else reencryption.read(work.header).segment
    passphrase = work.passphrase()
    if fresh:
        _only_slot(work, drop_others=drop_others)  # so that what is refused never bothers the server
        borrowing.ask(work.state, work.volume.name, work.mirror, borrowing.REKEY)
    with contextlib.ExitStack() as stack:
        claimed = claim_for_rekeying(work.mirror.path, segment, work.volume.size_bytes)
        stack.callback(os.close, claimed)
        volume, fds = _volume(work, segment), (lock, claimed)
        if fresh:
            with work.state.key_lock(work.mirror.luks_uuid):
                slot = _only_slot(work, drop_others=drop_others)  # again: one may have been added until now
                if not resumed:
                    work.note(
                        BEGUN,
                        "began to give a new volume key to",
                        volume_key=reencryption.key_mark(work.header),
                        slot=slot,
                    )
                reencryption.begin(volume, passphrase, slot, iter_time_ms=iter_time_ms, fds=fds)
        reencryption.go_on(volume, passphrase, on_progress=on_progress, fds=fds)


def _volume(work: _Work, segment: luks.Segment) -> reencryption.Volume:
    """What is to be re-encrypted: as much of the mirror as its target fills.

    cryptsetup wants whole blocks of the disk, which for a file are pages: one that ends within a page gets longer.
    """
    disk = inspect(work.mirror.path)
    block_bytes = max(segment.sector_bytes, disk.logical_sector_bytes if disk.is_block else mmap.PAGESIZE)
    size_bytes = whole_sectors(work.volume.size_bytes, block_bytes)
    needed_bytes = segment.offset_bytes + size_bytes
    if not disk.is_block and disk.size_bytes < needed_bytes:
        try:
            os.truncate(disk.path, needed_bytes)
        except OSError as error:
            raise DiskFailed(path=disk.path, doing="Extending", reason=error.strerror or str(error)) from error
    resilience = reencryption.CHECKSUM if disk.is_block else reencryption.JOURNAL
    return reencryption.Volume(work.mirror.path, work.header, size_bytes, resilience)


def _only_slot(work: _Work, *, drop_others: bool) -> int:
    """The slot that the passphrase opens. Raises WrongPassphrase, and RekeyDropsKeys if there are others."""
    slot = keyslots.require_opened_by(work.header, work.passphrase())
    kept = {slot, *reencryption.unbound_slots(work.header)}  # or left by an attempt that was killed
    others = [str(each.number) for each in keyslots.read(work.header) if each.number not in kept]
    if others and not drop_others:
        raise RekeyDropsKeys(path=work.mirror.path, slots=f"key slot{'s' if others[1:] else ''} {', '.join(others)}")
    return slot


# --- the end ---


def _hand_back(work: _Work, new: Ask | None) -> str | None:
    """Give the mirror a new generation; return why its server, if there is one, has not taken it back."""
    with work.state.volume_lock(work.volume.name) as unserved:
        if unserved:
            _renew(work, new)
            return None
    try:
        return borrowing.give_back(work.state, work.volume.name, work.mirror)
    except NotServed as error:
        return str(error)


def _renew(work: _Work, new: Ask | None) -> None:
    """Give mirror and bitmap a new generation, as a server does; if the target is lost or new, to the mirror alone."""
    passphrases = [ask for ask in (work.passphrase, new) if ask is not None]
    opening = next((ask for ask in passphrases if keyslots.opened_by(work.header, ask()) is not None), work.passphrase)
    present = work.registry.volume(work.volume.name)
    record = replace(present, mirrors=(work.mirror,))
    workers = Workers("lockstep-worker", WORKERS)
    try:
        _refuse_filling(present)
        gate = VolumeGate(record.name, record.on_denied, work.registry.grants(record.name))
        with open_volume(work.state, record, Unlock(opening), gate, workers) as session:
            session.claim()
            asyncio.run(session.retire())
    except LockstepError:
        header = luks.read_header(work.header)
        if header.token is None:
            raise
        generation = header.token.generation + 1 + secrets.randbits(31)
        luks.write_token(work.header, replace(header.token, generation=generation), token_id=header.token_id)
        work.registry.set_generation(work.mirror.id, generation)
    finally:
        workers.close()


def _change_passphrase(work: _Work, new: Ask | None, iter_time_ms: int | None) -> int:
    """Put the new passphrase in the place of the old one, as far as that was not done; returns its slot."""
    path, old = work.header, work.passphrase()
    if new is None or new() == old:
        return keyslots.require_opened_by(path, old)
    with work.state.key_lock(work.mirror.luks_uuid):
        slot, former = keyslots.opened_by(path, new()), keyslots.opened_by(path, old)
        if slot is None:
            return keyslots.change(path, old, new(), iter_time_ms=iter_time_ms)[1]
        if former is not None:
            keyslots.remove(path, new(), former)
        return slot
