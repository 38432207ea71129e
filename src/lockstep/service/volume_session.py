"""A volume's disks, open and joined: what `serve` lets clients at, and what a command works on while nobody serves it.

    open      the target, then each mirror: whatever can be refused is refused here, and nothing has changed
    check     target and mirrors are compared in some places where they have to be equal
    claim     tokens and intent bitmaps are given a new generation, which no other server has
    retire    flush both disks; only what differs stays marked

A new target (`lockstep replace-target`) is opened with the record of what it lacks, and filled from a mirror while the
volume is served (volume/filling.py).

Whatever ends the process before `retire` leaves its marks: the next start copies the marked regions.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator

from lockstep.crypto.unlock import Unlock
from lockstep.disk.plain import PlainDisk
from lockstep.disk.probe import refuse_busy
from lockstep.errors import (
    DiskFailed,
    FillingImpossible,
    LockstepError,
    TargetHalfRestored,
    TargetUnlike,
    TargetUnprepared,
)
from lockstep.registry.audit import SERVER
from lockstep.registry.store import VolumeRecord
from lockstep.service import mirrors
from lockstep.service.answers import in_time
from lockstep.service.mirror_opening import MirrorOpener
from lockstep.service.mirror_session import MirrorSession
from lockstep.service.overwriting import unfinished
from lockstep.service.state import State
from lockstep.volume import missing
from lockstep.volume.filling import Filling, NewTarget
from lockstep.volume.gate import Gate
from lockstep.volume.missing import Pair
from lockstep.volume.read_path import ReadPath
from lockstep.volume.resync import Resync
from lockstep.volume.spot_check import SpotCheck
from lockstep.volume.workers import Workers
from lockstep.volume.write_path import WritePath

log = logging.getLogger(__name__)

PATIENCE_S = 10.0


class VolumeSession:
    """The target and the mirrors of one volume, whose lock the caller holds."""

    def __init__(
        self,
        state: State,
        record: VolumeRecord,
        target: PlainDisk,
        mirrors: tuple[MirrorSession, ...],
        gate: Gate,
        workers: Workers,
    ) -> None:
        self.record = record
        self.target = target
        self.mirrors = mirrors
        self.workers = workers
        links = tuple(session.link for session in mirrors)
        sector_bytes = max((target.block_bytes, *(link.sector_bytes for link in links)))
        self.writes = WritePath(target, links, gate, sector_bytes, workers)
        self.reads = ReadPath(self.writes, workers)
        self.resyncs = tuple(
            Resync(self.writes, session.link, gate, workers, compare=session.mirror.compare) for session in mirrors
        )
        self.target_error: str | None = None  # that its path leads elsewhere, or that it was cut short, in words
        self._state = state
        self.filling = self.writes.filling = self._filling(record, target)

    def _filling(self, record: VolumeRecord, target: PlainDisk) -> Filling | None:
        """Return what fills a new target. Raises FillingImpossible where its mirror is not there, or not as it was."""
        if not isinstance(target, NewTarget):
            return None
        source = next(session for session in self.mirrors if session.mirror.id == record.filled_from).link
        filling = Filling(target, source, self.writes.ranges, self.workers, self.writes.flush)
        filling.requests = lambda: self.writes.requests
        if filling.left_bytes and (source.error or not source.as_left):
            reason = source.error or "it, or the new target, was changed since, or its intent bitmap is gone"
            raise FillingImpossible(path=target.disk.path, volume=record.name, mirror=source.path, reason=reason)
        source.is_source = True
        return filling

    def check(self) -> None:
        """Let mirrors alone that the target is not like. Raises TargetUnlike where it is like none at all. Blocks."""
        for session, check in self.require_like().items():
            session.follow_if_like(check)

    def require_like(self) -> dict[MirrorSession, SpotCheck]:
        """Return what each mirror has in common with the target. Raises TargetUnlike as `check` does. Blocks.

        A mirror is not overwritten with another disk, nor that disk by clients who take it for theirs. A new target
        that is being filled has to be like the mirror that it is filled from, as far as it has been. An older copy of a
        mirror says nothing against the target.
        """
        checks = {session: session.check() for session in self.mirrors}
        telling = [check for session, check in checks.items() if check.telling and not session.older]
        source = any(check.unlike and session.link.is_source for session, check in checks.items())
        if source or (telling and all(check.strangers for check in telling)):
            worst = max(telling, key=lambda check: check.telling)
            raise TargetUnlike(
                path=self.target.disk.path,
                volume=self.record.name,
                differing=worst.differing,
                telling=worst.telling,
            )
        return checks

    async def look_after_target(self) -> None:
        """See whether the target is all there, and is found by its path: the next start looks for it there."""
        path = self.target.disk.path
        found = None
        if await self.workers.run(self.target.cut_short):
            self.target.keep_short()
            found = (
                f"{path} was cut short. What it lacks is read from a mirror that is equal there, and cannot be written."
                f" Stop the server, and put the target back, or have it filled anew: `lockstep replace-target"
                f" {self.record.name} PATH`."
            )
        elif await self.workers.run(self.target.left, path):
            found = (
                f"{path} leads to another file by now, or to none. What is written goes to the one that was opened; the"
                " next start would take the other for the target. Put the right one back."
            )
        if found and found != self.target_error:
            log.error("%s", found)
        self.target_error = found

    def note_filled(self) -> None:
        """Note, durably, that the new target has everything; then it is one like any other. Blocks.

        Raises registry errors.
        """
        with self._state.registry() as registry:
            registry.target_filled(self.record.name, actor=SERVER)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._state.missing(self.record.id))

    def end_filling(self) -> None:
        """Have the target be one like any other from here on."""
        assert self.filling is not None
        for session in self.mirrors:
            session.link.is_source = False
        self.filling.finish()
        self.filling.close()
        self.filling = self.writes.filling = None

    def _claim_filling(self) -> None:
        if self.filling is None:
            return
        path, pair = self._state.missing(self.record.id), pair_of(self.record)
        with self._state.told():
            self.filling.record_in(missing.record(path, pair, self.filling.missing, self.workers.run))

    async def claim(self) -> None:
        """Have this process alone say what differs, from here on. Raises as `MirrorSession.claim` does."""
        await self.workers.run(self._claim_filling)
        for session in self.mirrors:
            await session.claim()
        await self.workers.run(self._note_generations)

    async def retire(self) -> None:
        """Close in order, when nobody writes any more. Raises DiskFailed when the target cannot be flushed."""
        try:
            if self.filling is not None:
                await self.filling.settle()
            await self.workers.run(self.target.flush)
            self.writes.require_durability()
        except OSError as error:
            raise DiskFailed(path=self.record.target_path, doing="Flushing", reason=error.strerror) from error
        for session in self.mirrors:
            try:
                await session.retire()
            except LockstepError as error:
                path = session.mirror.path
                log.error("mirror %s was not closed, the next start copies what it misses: %s", path, error)
        try:
            await in_time(asyncio.ensure_future(self.workers.run(self._note_generations)))
        except TimeoutError as silence:
            log.warning("the registry could not be updated: %s", silence)

    def _note_generations(self) -> None:
        """Remember what was written last; a registry out of reach is no reason not to serve, or not to stop."""
        try:
            with self._state.registry() as registry:
                for session, resync in zip(self.mirrors, self.resyncs, strict=True):
                    registry.set_generation(session.mirror.id, session.generation, compare=resync.compare)
        except LockstepError as error:
            log.warning("the registry could not be updated: %s", error)


@contextlib.contextmanager
def open_volume(
    state: State,
    record: VolumeRecord,
    unlock: Unlock,
    gate: Gate,
    workers: Workers,
    *,
    patience_s: float = PATIENCE_S,
    direct: bool = False,
) -> Iterator[VolumeSession]:
    """Open a volume whose lock the caller holds; nothing has changed before `claim`.

    `unlock` is asked if there is a mirror; a mirror that does not answer for `patience_s` is dropped; `direct` leaves
    the page cache out for all disks. Raises what opening the target or a mirror does.
    """
    with contextlib.ExitStack() as stack:
        target = _open_target(state, record, direct=direct)
        stack.callback(target.close)
        mirrors = []
        if record.mirrors:
            unlock.prepare()
        for mirror in record.mirrors:
            opener = MirrorOpener(state, record, mirror, unlock, direct=direct)
            session = MirrorSession(state, record, mirror, target, opener, workers, patience_s)
            stack.callback(session.close)
            mirrors.append(session)
        volume = VolumeSession(state, record, target, tuple(mirrors), gate, workers)
        if volume.filling is not None:
            stack.callback(volume.filling.close)
        yield volume


def pair_of(record: VolumeRecord) -> Pair:
    """Which target is filled from which mirror."""
    assert record.filled_from is not None
    return Pair(record.id, record.filled_from, record.size_bytes)


def _open_target(state: State, record: VolumeRecord, *, direct: bool) -> PlainDisk:
    disk = mirrors.look_at_target(record)
    mirrors.require_size(disk, record)
    refuse_busy(disk)
    lacks = None
    if record.filled_from is not None:
        lacks = missing.load(state.missing(record.id), pair_of(record))
        if lacks is None:
            raise TargetUnprepared(path=disk.path, volume=record.name)
    for interrupted in unfinished(state, record):
        raise TargetHalfRestored(path=disk.path, volume=record.name, record=interrupted)
    if lacks is None:
        return PlainDisk.claim(disk, record.size_bytes, direct=direct)
    target = NewTarget.claim(disk, record.size_bytes, direct=direct)
    target.missing = lacks
    return target
