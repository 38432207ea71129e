"""A new volume key for a mirror: its data is re-encrypted in place, while the volume goes on being served.

    begin    the mirror is let go by its server, and locked; on record in the audit trail; a new generation, so that no
             header with the old key fits the intent bitmap; a new key in the header
    go on    cryptsetup re-encrypts zone after zone (lockstep/crypto/reencryption.py)
    end      the server takes the mirror back, and copies what was written meanwhile; a new passphrase, if one was
             given; on record

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

import contextlib
import mmap
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from lockstep.crypto import keyslots, luks, reencryption
from lockstep.disk.mirror import claim_for_rekeying, whole_sectors
from lockstep.disk.probe import inspect
from lockstep.errors import DiskFailed, NotServed, RekeyDropsKeys
from lockstep.registry.store import MirrorRecord, Registry
from lockstep.service import borrowing, mirrors
from lockstep.service.managing import MirrorWork, working_on
from lockstep.service.state import State
from lockstep.volume import intent

BEGUN, REKEYED = "rekey-begun", "rekeyed"
"""Events of the audit trail."""

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
        mirrors.refuse_filling(begun.volume)
        for ask in (passphrase, new):
            if ask is not None:
                luks.refuse_empty(ask())
        with borrowing.alone(state, begun.mirror) as lock:
            work = _Work(**vars(begun.renewed()), passphrase=passphrase)
            mirrors.refuse_filling(work.volume)
            former = _former_key(work)
            resumed = former is not None
            if reencryption.under_way(work.header) or former in (None, reencryption.key_mark(work.header)):
                _reencrypt(work, lock, iter_time_ms, resumed=resumed, drop_others=drop_others, on_progress=on_progress)
        behind = _hand_back(work)
        slot = _change_passphrase(work, new, iter_time_ms)
        work.note(REKEYED, "gave a new volume key to", slot=slot)
    return Rekeyed(work.mirror, slot, resumed, behind)


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
    header = None if reencryption.under_way(work.header) else luks.read_header(work.header)
    segment = header.segment if header else reencryption.read(work.header).segment
    passphrase = work.passphrase()
    if header:
        _only_slot(work, drop_others=drop_others)  # so that what is refused never bothers the server
        borrowing.ask(work.state, work.volume.name, work.mirror, borrowing.REKEY)
    with contextlib.ExitStack() as stack:
        claimed = claim_for_rekeying(work.mirror.path, segment, work.volume.size_bytes)
        stack.callback(os.close, claimed)
        volume, fds = _volume(work, segment), (lock, claimed)
        if header:
            with work.state.key_lock(work.mirror.luks_uuid):
                slot = _only_slot(work, drop_others=drop_others)  # again: one may have been added until now
                if not resumed:
                    work.note(
                        BEGUN,
                        "began to give a new volume key to",
                        volume_key=reencryption.key_mark(work.header),
                        slot=slot,
                    )
                _renew(work, header)
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


def _renew(work: _Work, former: luks.Header) -> None:
    """See that the mirror has another generation than in the header `former`, and so than in any copy of that.

    With one that fits, a header that is put back would be taken for the mirror's own, and what it opens is noise soon.
    A server gave another one when it let the mirror go; where it could not, everything is copied in the end. Where
    there is no server, the bitmap is given it as well. Raises StateDirUnusable, registry errors and header errors.
    """
    header = luks.read_header(work.header)
    token, uuid = header.token, work.mirror.luks_uuid
    if token is None or former.token is None or token.generation != former.token.generation:
        return
    generation = max(token.generation, work.mirror.generation) + 1 + secrets.randbits(31)

    def give() -> None:
        luks.write_token(work.header, replace(token, generation=generation), token_id=header.token_id)

    with work.state.volume_lock(work.volume.name) as unserved:
        if unserved:
            identity = intent.Identity(work.volume.id, uuid, work.volume.size_bytes)
            with work.state.told():
                intent.renew(work.state.intent(uuid), identity, token.generation, generation, give)
        else:
            give()
    work.registry.set_generation(work.mirror.id, generation)


def _only_slot(work: _Work, *, drop_others: bool) -> int:
    """The slot that the passphrase opens. Raises WrongPassphrase, and RekeyDropsKeys if there are others."""
    slot = keyslots.require_opened_by(work.header, work.passphrase())
    kept = {slot, *reencryption.unbound_slots(work.header)}  # or left by an attempt that was killed
    others = [str(each.number) for each in keyslots.read(work.header) if each.number not in kept]
    if others and not drop_others:
        raise RekeyDropsKeys(path=work.mirror.path, slots=f"key slot{'s' if others[1:] else ''} {', '.join(others)}")
    return slot


# --- the end ---


def _hand_back(work: _Work) -> str | None:
    """Return why the mirror's server, if there is one, has not taken it back."""
    with work.state.volume_lock(work.volume.name) as unserved:
        if unserved:
            return None
    try:
        return borrowing.give_back(work.state, work.volume.name, work.mirror)
    except NotServed as error:
        return str(error)


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
