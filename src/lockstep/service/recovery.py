"""Restoring from a mirror alone: no registry, no target, only the mirror, its header and what unlocks it.

Whatever can be refused is refused before the first byte, and nothing is left behind then. After that nothing is taken
away: the output stays, and beside it the record of how far it came (volume/restore_record.py); `resume` goes on there.

1. header, token, range; the output is looked at, locked if it exists, and compared with the record: refusals
2. what unlocks the mirror; it is locked; samples of what is to be resumed are compared: the last refusals
3. a missing output is made; the record, durably, and that of a target (overwriting.py); a file is emptied and given
   its size
4. the copy, with checkpoints; the last one also when it fails or is interrupted
5. flush; read back and compare, if asked; where the output is a volume's target, its other mirrors are to be compared
   with that; then the record is removed
"""

import contextlib
import dataclasses
import functools
import logging
import os
import stat
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from lockstep.crypto import luks, reencryption
from lockstep.crypto.cipher import self_test
from lockstep.crypto.unlock import Unlock
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.half_rekeyed import HalfRekeyedDisk
from lockstep.disk.mirror import open_mirror, open_unfinished
from lockstep.disk.plain import PlainDisk
from lockstep.disk.probe import Disk, holds_data, inspect, make_file, overlap, refuse_busy, signatures
from lockstep.disk.stream import Stream
from lockstep.errors import (
    DiskFailed,
    LockstepError,
    NothingToResume,
    OutputDiffers,
    OutputExists,
    OutputIsMirror,
    OutputTooSmall,
    RangeInvalid,
    RekeyUnfinished,
    RestoreRecordInvalid,
    RestoreStopped,
    RestoreUnfinished,
    ResumeUnfit,
    StreamCannot,
    StreamIsTerminal,
    StreamStopped,
    TargetTaken,
)
from lockstep.service import mirrors
from lockstep.service.memory import protect_memory
from lockstep.service.noting import note_if_known
from lockstep.service.overwriting import overwriting
from lockstep.service.state import State
from lockstep.volume.files import sync_directory
from lockstep.volume.link import STILL
from lockstep.volume.restore import DiskSink, Extent, Progress, copy_out, differences, samples
from lockstep.volume.restore_record import SUFFIX, RestoreRecord, remove_record

log = logging.getLogger(__name__)

STDOUT: Final = "-"
COPYING: Final = "copy"
VERIFYING: Final = "verify"

Mirror = EncryptedDisk | HalfRekeyedDisk

OnProgress = Callable[[str, int, int], None]
"""Is given COPYING or VERIFYING, the bytes done and the bytes in all."""


@dataclass(frozen=True)
class Restored:
    """What a restore has done."""

    volume_name: str
    output: str
    extent: Extent
    luks_uuid: str
    frozen: bool  # it is the disk as it was when writes began that the mirror was not given
    resumed_bytes: int  # were there already
    verified: bool


@dataclass(frozen=True)
class Wanted:
    """What is to be restored to where: `length` None is up to the end, `record_path` None is beside the output."""

    mirror_path: str
    output_path: str
    header_path: str | None = None
    offset: int = 0
    length: int | None = None
    force: bool = False
    incomplete: bool = False
    resume: bool = False
    verify: bool = False
    record_path: str | None = None


def restore(state: State, wanted: Wanted, unlock: Unlock, *, on_progress: OnProgress) -> Restored:
    """Restore the target that a mirror holds, or a range of it, onto a disk, a file, or standard output.

    Raises MirrorIncomplete unless `incomplete`; OutputExists or RestoreUnfinished unless `force` or `resume`;
    BackupOfAnother, RangeInvalid, NothingToResume, ResumeUnfit, RestoreRecordInvalid, OutputIsMirror, OutputInState,
    MirrorTaken, HeaderTaken, TargetUnfinished, OutputTooSmall, StreamCannot, StreamIsTerminal, DiskBusy, DiskFailed,
    StateDirUnusable, and whatever opening the mirror raises: nothing was changed then. RestoreStopped or StreamStopped
    when a disk or the reader failed later, OutputDiffers when it was compared.
    """
    protect_memory()
    self_test()
    header, unfinished = _header(wanted.header_path or wanted.mirror_path)
    token = mirrors.described(wanted.mirror_path, wanted.header_path, header, incomplete=wanted.incomplete)
    extent = _range(wanted, token.target_size_bytes)
    begun = RestoreRecord(header.uuid, token.generation, token.target_size_bytes, extent.offset, extent.length)

    def opened() -> Mirror:
        unlock.prepare()
        disks, size_bytes = (wanted.mirror_path, wanted.header_path), token.target_size_bytes
        if unfinished is None:
            return open_mirror(*disks, header, unlock, size_bytes, writable=False)
        return open_unfinished(*disks, header, unfinished, unlock, size_bytes)

    if wanted.output_path == STDOUT:
        _to_stream(wanted, extent, opened, on_progress)
        resumed_bytes = 0
    else:
        refuse_known(state, wanted.output_path)
        like = header.uuid if extent.length == token.target_size_bytes else None
        claim = functools.partial(overwriting, state, wanted.output_path, like=like)
        resumed_bytes = _DiskRestore(wanted, extent, begun, on_progress).run(opened, claim)
    frozen = token.state in STILL
    return Restored(token.volume_name, wanted.output_path, extent, header.uuid, frozen, resumed_bytes, wanted.verify)


def _header(path: str) -> tuple[luks.Header, reencryption.Unfinished | None]:
    """The header, and how far its re-keying is where that is not finished."""
    try:
        return luks.read_header(path), None
    except RekeyUnfinished:
        unfinished = reencryption.read(path)
        return luks.read_unfinished(path, unfinished.segment, unfinished.metadata), unfinished


def note_restore(state: State, mirror_path: str, done: Restored) -> None:
    """Put a restore into the audit trail of the state directory, if that knows the mirror."""
    path = os.path.abspath(mirror_path)
    output = STDOUT if done.output == STDOUT else os.path.abspath(done.output)
    details = {"output": output, "bytes": done.extent.length, "offset": done.extent.offset, "frozen": done.frozen}
    note_if_known(state, "restore", f"restored the mirror {path} to {output}", path, done.luks_uuid, details)


def _range(wanted: Wanted, size_bytes: int) -> Extent:
    length = size_bytes - wanted.offset if wanted.length is None else wanted.length
    if length < 1 or wanted.offset + length > size_bytes:
        raise RangeInvalid(offset=wanted.offset, length=length, size_bytes=size_bytes)
    return Extent(wanted.offset, length)


# --- to standard output -----------------------------------------------------------------------------------


def _to_stream(wanted: Wanted, extent: Extent, opened: Callable[[], Mirror], on_progress: OnProgress) -> None:
    for option, given in (
        ("--resume", wanted.resume),
        ("--verify", wanted.verify),
        ("--record", wanted.record_path is not None),
    ):
        if given:
            raise StreamCannot(option=option)
    fd = sys.stdout.fileno()
    if os.isatty(fd):
        raise StreamIsTerminal
    kind = os.fstat(fd).st_mode
    if stat.S_ISREG(kind) or stat.S_ISBLK(kind):  # the shell opened it, and not necessarily emptied
        refuse_same_storage(wanted.output_path, f"/proc/self/fd/{fd}", wanted.mirror_path, wanted.header_path)
    stream, progress = Stream(fd), Progress()
    with contextlib.closing(opened()) as mirror:
        try:
            copy_out(
                mirror, stream, extent, progress, on_progress=lambda done: on_progress(COPYING, done, extent.length)
            )
            stream.flush()
        except OSError as error:
            raise StreamStopped(mirror=wanted.mirror_path, reason=error.strerror or str(error)) from error


# --- to a disk --------------------------------------------------------------------------------------------


class _DiskRestore:
    """One restore onto a file or a block device; `begun` is its record with nothing done."""

    def __init__(self, wanted: Wanted, extent: Extent, begun: RestoreRecord, on_progress: OnProgress) -> None:
        self._wanted = wanted
        self._extent = extent
        self._begun = begun
        self._on_progress = on_progress
        self._path = wanted.output_path
        # By the name that the output has whatever it is called: a server may know it by another.
        self._record_path = os.path.abspath(wanted.record_path or os.path.realpath(wanted.output_path) + SUFFIX)

    def run(self, opened: Callable[[], Mirror], overwriting: Callable[[], AbstractContextManager[None]]) -> int:
        """Do it, while it counts as what is being overwritten; return how many bytes were there already."""
        record = self._found_record()
        with contextlib.ExitStack() as stack:
            output = self._existing_output(record)
            if output is not None:
                stack.callback(output.close)
            mirror = stack.enter_context(contextlib.closing(opened()))
            progress = Progress()
            if output is None:
                output = self._made_output()
                stack.callback(output.close)
            elif record is not None and record.done_bytes and self._wanted.resume:
                progress = Progress(record.done_bytes, record.witness)
                self._refuse_other_output(mirror, output, progress)
            else:
                self._save_begun()
            resumed_bytes = progress.done_bytes
            try:
                with overwriting():
                    self._fill(mirror, output, progress)
                    if not output.disk.is_block:
                        sync_directory(self._path)  # the record's may be another
                    if self._wanted.verify:
                        self._verify(mirror, output)
                remove_record(self._record_path)
            except OSError as error:
                raise RestoreStopped(
                    path=self._path,
                    mirror=self._wanted.mirror_path,
                    done_bytes=progress.done_bytes,
                    length=self._extent.length,
                    reason=error.strerror or str(error),
                ) from error
        return resumed_bytes

    # --- before the first byte ---

    def _found_record(self) -> RestoreRecord | None:
        """Read the record that is there. Refuse a file that is none, or does not fit what is to be resumed."""
        if os.path.realpath(self._record_path) == os.path.realpath(self._path):
            raise RestoreRecordInvalid(path=self._record_path, reason="it is the output")
        record, begun = RestoreRecord.load(self._record_path), self._begun
        if record is None or not self._wanted.resume:
            return record
        if (record.luks_uuid, record.target_size_bytes) != (begun.luks_uuid, begun.target_size_bytes):
            raise self._unfit("it was begun from another mirror")
        if (record.offset, record.length) != (begun.offset, begun.length):
            raise self._unfit(f"it was begun for another range, {record.length} bytes at {record.offset}")
        if record.generation != begun.generation:
            raise self._unfit("the mirror was served since it was begun, and may hold newer data")
        return record

    def _existing_output(self, record: RestoreRecord | None) -> PlainDisk | None:
        """Claim the output if it exists and may be overwritten, or gone on with."""
        if not os.path.lexists(self._path):
            return None
        refuse_same_storage(self._path, self._path, self._wanted.mirror_path, self._wanted.header_path)
        disk = inspect(self._path)
        refuse_busy(disk)
        if disk.is_block and disk.size_bytes < self._extent.length:
            raise OutputTooSmall(path=disk.path, size_bytes=disk.size_bytes, needed_bytes=self._extent.length)
        if self._wanted.resume:
            self._refuse_unresumable(disk, record)
        elif not self._wanted.force:
            if record is not None:
                raise RestoreUnfinished(
                    path=self._path, record=self._record_path, done_bytes=record.done_bytes, length=record.length
                )
            refuse_content(disk)
        return PlainDisk.claim(disk)

    def _refuse_unresumable(self, disk: Disk, record: RestoreRecord | None) -> None:
        if record is None:
            if disk.is_block or disk.size_bytes:  # an empty file may be as old as the moment before the record
                raise NothingToResume(path=self._path, record=self._record_path)
        elif not record.done_bytes:
            # A file may be overwritten: the record says so. A device's name may have gone to another disk since.
            if disk.is_block and not self._wanted.force:
                refuse_content(disk)
        elif not disk.is_block and disk.size_bytes != self._extent.length:
            raise self._unfit(f"it has {disk.size_bytes} bytes now, and had {self._extent.length}")

    def _refuse_other_output(self, mirror: Mirror, output: PlainDisk, progress: Progress) -> None:
        """Refuse an output that does not hold what was restored to it, as far as samples tell."""
        try:
            found = next(differences(mirror, output, self._extent, samples(self._extent, progress)), None)
        except OSError as error:
            raise DiskFailed(path=self._path, doing="Comparing", reason=error.strerror or str(error)) from error
        if found is not None:
            at = found.offset - self._extent.offset
            raise self._unfit(f"it does not hold what was restored to it, at byte {at}")

    def _unfit(self, reason: str) -> ResumeUnfit:
        return ResumeUnfit(path=self._path, record=self._record_path, reason=reason)

    def _made_output(self) -> PlainDisk:
        """Make the output and its record; neither is left if one of them cannot be made."""
        with contextlib.ExitStack() as undo:
            make_file(self._path)
            undo.callback(os.unlink, self._path)
            output = PlainDisk.claim(inspect(self._path))
            undo.callback(output.close)
            self._save_begun()
            undo.pop_all()
        return output

    def _save_begun(self) -> None:
        try:
            self._begun.save(self._record_path)
        except OSError as error:
            raise RestoreRecordInvalid(path=self._record_path, reason=error.strerror or str(error)) from error

    # --- from then on ---

    def _fill(self, mirror: Mirror, output: PlainDisk, progress: Progress) -> None:
        """Copy what the output lacks; make it and the record of it durable, also when that fails or is interrupted."""
        failed: list[OSError] = []

        def checkpoint(done_bytes: int, witness: int | None) -> None:
            if failed:  # the kernel forgets what it has lost: another flush would say that it is there
                raise failed[0]
            try:
                output.flush()
            except OSError as error:
                failed.append(error)
                raise
            dataclasses.replace(self._begun, done_bytes=done_bytes, witness=witness).save(self._record_path)

        def note(done_bytes: int) -> None:
            self._on_progress(COPYING, done_bytes, self._extent.length)

        if not progress.done_bytes and not output.disk.is_block:
            output.resize(self._extent.length)
        sink = DiskSink(output, blank=not output.disk.is_block)
        try:
            copy_out(mirror, sink, self._extent, progress, on_progress=note, checkpoint=checkpoint)
        except BaseException:
            with contextlib.suppress(OSError):  # then the record stays behind, and more is repeated
                checkpoint(progress.done_bytes, progress.witness)
            raise
        checkpoint(progress.done_bytes, progress.witness)

    def _verify(self, mirror: Mirror, output: PlainDisk) -> None:
        """Read the output back from its medium, and compare all of it with the mirror."""

        def note(done_bytes: int) -> None:
            self._on_progress(VERIFYING, done_bytes, self._extent.length)

        output.forget_cache(0, 0)  # 0 bytes mean up to the end
        mirror.forget_cache(0, 0)
        note(0)
        found = list(differences(mirror, output, self._extent, on_progress=note))
        if found:
            remove_record(self._record_path)  # going on would not mend it
            raise OutputDiffers(
                path=self._path,
                mirror=self._wanted.mirror_path,
                count_bytes=sum(each.length for each in found),
                offset=found[0].offset,
            )


def refuse_same_storage(shown_as: str, output_path: str, *paths: str | None) -> None:
    """Raise OutputIsMirror where the output is the storage of one of these."""
    output = inspect(output_path)
    for path in filter(None, paths):
        how = overlap(inspect(path), output)
        if how:
            raise OutputIsMirror(path=shown_as, mirror=path, how=how)


def refuse_known(state: State, output_path: str) -> None:
    """Refuse an output that lies in the state directory, or that the registry knows as a mirror or as its header.

    A target may be restored onto, unless it is being filled: it would be overwritten once more. A registry that is
    absent or broken keeps nobody from restoring: the log says so.
    """
    state.refuse_output(output_path)
    if not state.registry_place.used():
        return
    try:
        with state.registry() as registry:
            volumes = registry.volumes()
    except LockstepError as error:
        log.warning("it is not known whether %s is another volume's: %s", output_path, error)
        return
    for known, role, volume in mirrors.roles_of(volumes, output_path, mirrors.ROLES):
        if role is not TargetTaken:
            raise role(path=known, volume=volume.name)
        mirrors.refuse_filling(volume)


def refuse_content(disk: Disk) -> None:
    """Without force, a file that exists is never overwritten, and a device only when it is blank."""
    if not disk.is_block:
        raise OutputExists(path=disk.path, found="the file exists already")
    found = signatures(disk) or (("it holds data of an unknown kind",) if holds_data(disk) else ())
    if found:
        raise OutputExists(path=disk.path, found=" and ".join(found))
