"""Replacing a target: the volume gets a new one, which is filled from a mirror when it is served next.

Nothing is copied here. The command decides that from now on the volume is what one of its mirrors holds, and says so
everywhere, each step durably before the next:

1. whatever can be refused; a new file is made; the record of an earlier new target is removed, for it would fit
2. registry    the new target, the mirror that it is filled from; its other mirrors are to be compared. Not before that
               does a new file get its name, and one that was there its size: it may be the old target's, and would be
               taken for that, blank as it is
3. mirrors     what was known by the old target is forgotten. Of the one: its bitmap says that nothing differs, its
               token that it is in sync. Of the others: everything differs, and their tokens say so
4. record      everything is missing (volume/missing.py)

Interrupted before 2, nothing has happened, unless an earlier new target was still being filled. Interrupted later, or
in that case, `serve` refuses the volume, for want of 4; the command can be run again.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import tempfile
from dataclasses import dataclass, replace

from lockstep.crypto import luks
from lockstep.crypto.unlock import Unlock
from lockstep.disk.mirror import open_mirror, require_unused
from lockstep.disk.plain import PlainDisk
from lockstep.disk.probe import MIB, Disk, holds_data, inspect, not_made, refuse_busy, signatures
from lockstep.errors import (
    DiskBusy,
    DiskError,
    DiskFailed,
    DiskLocked,
    LockstepError,
    MirrorIncomplete,
    MirrorMissed,
    MirrorsAlike,
    MirrorStale,
    NoMirror,
    OutputExists,
    OutputTooSmall,
    StillServed,
    TargetStillThere,
)
from lockstep.registry.store import MirrorRecord, Registry, VolumeRecord
from lockstep.service import borrowing, mirrors
from lockstep.service.managing import manager, unserved
from lockstep.service.memory import protect_memory
from lockstep.service.mirror_set import forget_records, refuse_taken
from lockstep.service.overwriting import unfinished
from lockstep.service.state import State
from lockstep.service.trail import LOST, MIRROR, SERVED
from lockstep.service.volume_session import pair_of
from lockstep.volume import intent, missing
from lockstep.volume.files import rename, sync_directory
from lockstep.volume.held import HeldRecord
from lockstep.volume.intent import Identity, IntentBitmap
from lockstep.volume.link import ASIDE, DEGRADED, FROZEN, IN_SYNC, STILL, SYNCING, WHOLE
from lockstep.volume.missing import Pair
from lockstep.volume.pages import union
from lockstep.volume.restore_record import remove_record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replaced:
    """A target that was replaced; `frozen`: the mirror is the disk as it was when it froze."""

    path: str
    size_bytes: int
    mirror: str
    frozen: bool


@dataclass(frozen=True)
class _Source:
    mirror: MirrorRecord
    header: luks.Header
    token: luks.Token


def replace_target(
    state: State,
    name: str,
    path: str,
    unlock: Unlock,
    *,
    mirror_path: str | None = None,
    force: bool = False,
    incomplete: bool = False,
) -> Replaced:
    """Give a volume that is not served the new target `path`; a file that does not exist is made.

    `force` lets it hold something; `incomplete` takes a mirror that may not have everything. Raises StillServed,
    NoMirror, MirrorIncomplete, MirrorStale, MirrorMissed, MirrorsAlike, MirrorBorrowed, TargetStillThere,
    OutputTooSmall, OutputExists, DiskBusy or DiskLocked, also of another mirror, and registry, disk and LUKS errors.
    """
    protect_memory()
    actor = manager(state, f"replace the target of {name}")
    with state.registry() as registry, contextlib.ExitStack() as stack:
        volume = stack.enter_context(unserved(state, registry, name))
        if volume is None:
            raise StillServed(volume=name, action="given another target")
        path = os.path.abspath(path)
        refuse_taken(registry, [path], but=volume.target_path if _same(path, volume.target_path) else None)
        source = _source(state, registry, volume, mirror_path, incomplete=incomplete)
        stack.enter_context(borrowing.nobodys(state, [source.mirror]))
        for other in volume.mirrors:
            if other.id != source.mirror.id:
                _refuse_use(other)
        if not incomplete:
            _refuse_what_is_better(state, volume, source, path)
        undo = stack.enter_context(contextlib.ExitStack())
        place = path
        if not os.path.lexists(path):
            place = _made_file(path, volume.size_bytes)
            undo.callback(os.unlink, place)
        _require_fit(inspect(place), volume.size_bytes, force=force)
        unlock.prepare()
        mirror = source.mirror
        open_mirror(mirror.path, mirror.header_path, source.header, unlock, volume.size_bytes, writable=True).close()
        _forget_earlier(state, volume)
        registry.replace_target(name, path, mirror.id, actor=actor)
        undo.pop_all()
        _finish_file(place, path, volume.size_bytes)
        _forget_restores(state, volume, path)
        registry.set_generation(mirror.id, _take_for_true(state, volume, source))
        for other in volume.mirrors:
            if other.id != mirror.id:
                _have_compared(state, volume, other)
        pair = Pair(volume.id, mirror.id, volume.size_bytes)
        with state.told():
            missing.record(state.missing(volume.id), pair, b"\1" * pair.regions, asyncio.to_thread).close()
    return Replaced(path, volume.size_bytes, mirror.path, source.token.state in STILL)


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _forget_earlier(state: State, volume: VolumeRecord) -> None:
    """Remove, durably, what is on record of an earlier new target: this one lacks everything."""
    path = state.missing(volume.id)
    with state.told():
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        sync_directory(path)


def _forget_restores(state: State, volume: VolumeRecord, path: str) -> None:
    """Remove the records of what was not finished on the old target, or the new one: it is filled otherwise now."""
    for record in unfinished(state, replace(volume, target_path=path)):
        try:
            remove_record(record)
        except OSError as error:
            raise DiskFailed(path=record, doing="Removing", reason=error.strerror or str(error)) from error


# --- which mirror ---


def _source(state: State, registry: Registry, volume: VolumeRecord, path: str | None, *, incomplete: bool) -> _Source:
    """Return the mirror to fill from: the one at `path`, else the one that lacks least; or say why none will do.

    What a mirror says of itself is not enough: one that vanished while the volume was served says `in-sync` for ever.
    """
    if not volume.mirrors:
        raise NoMirror(volume=volume.name)
    found: list[_Source] = []
    failures: list[tuple[MirrorRecord, LockstepError]] = []
    for mirror in [mirrors.chosen(volume, path)] if path else volume.mirrors:
        try:
            found.append(_usable(state, volume, mirror, incomplete=incomplete))
        except LockstepError as failure:
            failures.append((mirror, failure))
    if not found:
        raise failures[0][1]
    lacks = [_lacking(state, volume, each.mirror, each.token.generation).count(1) for each in found]
    least = min(lacks)
    alike = [each for each, count in zip(found, lacks, strict=True) if count == least]
    rivals: list[tuple[MirrorRecord, LockstepError]] = []
    for mirror, reason in failures:
        count = _lacking(state, volume, mirror, None).count(1)
        if count < least:
            raise MirrorMissed(path=mirror.path, volume=volume.name, other=alike[0].mirror.path, reason=str(reason))
        rivals += [(mirror, reason)] if count == least else []
    if _untold(state, volume, found):
        raise MirrorsAlike(volume=volume.name, mirrors=", ".join(each.mirror.path for each in found))
    if any(1 in _marked(state, volume, each.mirror, each.token.generation) for each in alike):
        alike = [_followed_last(registry, volume, alike, rivals)]
    ranks = {IN_SYNC: 0, ASIDE: 1, FROZEN: 2}
    return min(alike, key=lambda each: ranks.get(each.token.state, len(ranks)))


def _followed_last(
    registry: Registry, volume: VolumeRecord, alike: list[_Source], rivals: list[tuple[MirrorRecord, LockstepError]]
) -> _Source:
    """Return the one that the last server was following when others were lost, by the audit trail.

    The `rivals` are as good by the bitmaps, and cannot be used. Raises MirrorMissed, MirrorsAlike.
    """
    states: dict[str, str] = {}
    for row in registry.audit_rows(volume=volume.name, events=(SERVED, MIRROR, LOST)):
        if row.event != MIRROR:
            states.clear()
        elif "luks_uuid" in row.details:
            states[row.details["luks_uuid"]] = row.details["state"]
    if all(each.luks_uuid in states for each in (*(one.mirror for one in alike), *(mirror for mirror, _ in rivals))):
        followed = [each for each in alike if states[each.mirror.luks_uuid] != DEGRADED]
        for mirror, reason in rivals:
            if not followed and states[mirror.luks_uuid] != DEGRADED:
                other = alike[0].mirror.path
                raise MirrorMissed(path=mirror.path, volume=volume.name, other=other, reason=str(reason))
        alike = followed or alike
    if len(alike) > 1:
        raise MirrorsAlike(volume=volume.name, mirrors=", ".join(each.mirror.path for each in alike))
    return alike[0]


def _usable(state: State, volume: VolumeRecord, mirror: MirrorRecord, *, incomplete: bool) -> _Source:
    header = luks.read_header(mirrors.header_path(mirror))
    token = mirrors.identified(volume, mirror, header)
    if not incomplete:
        if token.state not in WHOLE:
            raise MirrorIncomplete(path=mirror.path, state=token.state)
        known = intent.load(state.intent(mirror.luks_uuid), _identity(volume, mirror), None, None).generations
        seen = max(mirror.generation, known[0] if known else 0)  # a server gives it new ones while it runs
        if token.generation < seen:
            raise MirrorStale(path=mirror.path, generation=token.generation, seen=seen)
    return _Source(mirror, header, token)


def _refuse_use(mirror: MirrorRecord) -> None:
    """Refuse where somebody uses a mirror whose header is to be written: no overlay over it would fit any more."""
    try:
        luks.read_header(mirrors.header_path(mirror))
        require_unused(inspect(mirror.path))
    except (DiskBusy, DiskLocked):
        raise
    except LockstepError:  # it is away, or being re-keyed: its header is left as it is
        return


def _lacking(
    state: State, volume: VolumeRecord, mirror: MirrorRecord, generation: int | None, written_ns: int | None = None
) -> bytes:
    """Where a mirror may lack something that the old target had, by what is on record; as `intent.load` is asked."""
    identity = _identity(volume, mirror)
    loaded = intent.load(state.intent(mirror.luks_uuid), identity, generation, written_ns)
    held = HeldRecord(state.held(mirror.luks_uuid), identity, asyncio.to_thread, expected=loaded.of_mirror)
    return union(loaded.marked, held.regions())


def _marked(state: State, volume: VolumeRecord, mirror: MirrorRecord, generation: int | None) -> bytearray:
    return intent.load(state.intent(mirror.luks_uuid), _identity(volume, mirror), generation, None).marked


def _refuse_what_is_better(state: State, volume: VolumeRecord, source: _Source, path: str) -> None:
    """Refuse to forget an old target that is there, and may have what the mirror misses."""
    try:
        disk = inspect(volume.target_path)
    except DiskError:
        return
    unprepared = volume.filled_from and missing.load(state.missing(volume.id), pair_of(volume)) is None
    restored = unfinished(state, volume)  # half of it, from a mirror
    exchanged = _same(path, volume.target_path) and not _content(disk)  # a new disk has the old one's name
    if disk.size_bytes < volume.size_bytes or unprepared or restored or exchanged:
        return
    written_ns = 0 if disk.is_block else os.stat(disk.path).st_mtime_ns
    if 1 in _lacking(state, volume, source.mirror, source.token.generation, written_ns):
        raise TargetStillThere(path=disk.path, volume=volume.name, mirror=source.mirror.path)


def _untold(state: State, volume: VolumeRecord, found: list[_Source]) -> bool:
    """Whether the records do not tell which of several mirrors, all of which say that they are whole, lacks least.

    They are older than one of them; or they fit some only, and not one that was set aside, say: what the others have
    may be of another disk, which was there under the target's name.
    """
    fits, newer = set[bool](), False
    for each in found:
        mirror, generation = each.mirror, each.token.generation
        loaded = intent.load(state.intent(mirror.luks_uuid), _identity(volume, mirror), generation, None)
        fits.add(loaded.fits)
        newer = newer or 0 < max(loaded.named) < generation
    return len(fits) > 1 or (newer and len(found) > 1)


def _identity(volume: VolumeRecord, mirror: MirrorRecord) -> Identity:
    return Identity(volume.id, mirror.luks_uuid, volume.size_bytes)


# --- what the mirrors are from now on ---


def _take_for_true(state: State, volume: VolumeRecord, source: _Source) -> int:
    """Have it on record that nothing differs from this mirror, and nothing is held; return its new generation."""
    mirror, token = source.mirror, source.token
    generation = token.generation + 1 + secrets.randbits(31)
    identity = _identity(volume, mirror)
    held = HeldRecord(state.held(mirror.luks_uuid), identity, asyncio.to_thread, expected=False)
    bitmap = IntentBitmap(state.intent(mirror.luks_uuid), identity, asyncio.to_thread)
    try:
        with state.told():
            held.clear()
            bitmap.claim(token.generation, generation, bytes(Pair(volume.id, mirror.id, volume.size_bytes).regions))
            ours = replace(token, generation=generation, state=IN_SYNC)
            luks.write_token(mirrors.header_path(mirror), ours, token_id=source.header.token_id)
            bitmap.settle(generation)
    finally:
        bitmap.close()
        held.close()
    return generation


def _have_compared(state: State, volume: VolumeRecord, mirror: MirrorRecord) -> None:
    """Have everything differ from a mirror; one that is away then waits for a release if its token tells of held."""
    forget_records(state, mirror.luks_uuid)
    try:
        header = luks.read_header(mirrors.header_path(mirror))
        token = mirrors.identified(volume, mirror, header)
        ours = replace(token, generation=token.generation + 1 + secrets.randbits(31), state=SYNCING)
        luks.write_token(mirrors.header_path(mirror), ours, token_id=header.token_id)
    except LockstepError as failure:
        log.warning("the header of mirror %s could not be updated: %s", mirror.path, failure)


# --- the new disk ---


def _made_file(path: str, size_bytes: int) -> str:
    """Make what is going to be the file `path`, durably, and return its name; it is not left if that fails."""
    try:
        fd, place = tempfile.mkstemp(prefix=".lockstep-", dir=os.path.dirname(path))
        with contextlib.ExitStack() as undo:
            undo.callback(os.unlink, place)
            try:
                os.ftruncate(fd, size_bytes)
                os.fsync(fd)
            finally:
                os.close(fd)
            undo.pop_all()
    except OSError as error:
        raise not_made(path, error) from error
    return place


def _finish_file(place: str, path: str, size_bytes: int) -> None:
    """Give a new file its name, and one that was there its size."""
    try:
        if place != path:
            rename(place, path)
        elif os.path.isfile(path):
            os.truncate(path, size_bytes)
    except OSError as error:
        raise not_made(path, error) from error


def _require_fit(disk: Disk, size_bytes: int, *, force: bool) -> None:
    refuse_busy(disk)
    if disk.size_bytes < size_bytes:
        raise OutputTooSmall(path=disk.path, size_bytes=disk.size_bytes, needed_bytes=size_bytes)
    PlainDisk.claim(disk).close()
    if force:
        return
    if found := _content(disk):
        raise OutputExists(path=disk.path, found=" and ".join(found))


def _content(disk: Disk) -> tuple[str, ...]:
    """What a disk holds, as far as can be told, as phrases."""
    found = signatures(disk)
    if not found and holds_data(disk, MIB if disk.is_block else disk.size_bytes):
        found = ("it holds data of an unknown kind",)
    return found
