"""Making a disk of a mirror and the overlay that was written over it: the new target."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lockstep.crypto.unlock import Unlock
from lockstep.disk.mirror import require_unused
from lockstep.disk.plain import PlainDisk
from lockstep.disk.probe import inspect, make_file, not_made
from lockstep.errors import DiskFailed, OutputTooSmall, OverlayMissing
from lockstep.service.noting import note_if_known
from lockstep.service.opening import opened
from lockstep.service.overwriting import overwriting
from lockstep.service.recovery import refuse_content, refuse_known, refuse_same_storage
from lockstep.service.state import State
from lockstep.volume.files import rename
from lockstep.volume.restore import DiskSink, Extent, Progress, Source, copy_out

UNFINISHED: Final = ".committing"
"""What a file is called, after its own name, before it has everything."""


@dataclass(frozen=True)
class Committed:
    """What a commit has done."""

    volume_name: str
    output: str
    size_bytes: int
    luks_uuid: str


def commit(
    state: State,
    mirror_path: str,
    overlay_path: str,
    output_path: str,
    unlock: Unlock,
    *,
    header_path: str | None = None,
    force: bool = False,
    incomplete: bool = False,
    on_progress: Callable[[int, int], None],
) -> Committed:
    """Write what one sees through the overlay, exactly the target's size, onto a disk or a file.

    Mirror and overlay stay as they are. An output that this made is removed when it fails; a file that was there keeps
    the other name that it has meanwhile. If it is the target of a volume, that is not served before it has everything,
    and its mirrors are compared with it then: they lack what was written over them. Raises OutputExists unless `force`;
    OutputIsMirror, OutputInState, MirrorTaken, HeaderTaken, TargetUnfinished, OutputTooSmall, DiskBusy, DiskFailed,
    StateDirUnusable; what opening the mirror and
    claiming the overlay raise, DiskLocked while it is open elsewhere.
    """
    if not os.path.exists(overlay_path):
        raise OverlayMissing(path=overlay_path)
    inspect(overlay_path)
    refuse_known(state, output_path)
    place = output_path
    if os.path.islink(place) and not Path(place).is_block_device():
        place = os.path.realpath(place)  # it is the file that has another name meanwhile, not the link
    for path in filter(os.path.lexists, (place, place + UNFINISHED)):
        refuse_same_storage(path, path, mirror_path, header_path, overlay_path)
    with opened(
        mirror_path,
        unlock,
        header_path=header_path,
        overlay_path=lambda _name: overlay_path,
        make_overlay=False,
        incomplete=incomplete,
    ) as view:
        size_bytes = view.size_bytes
        with _claimed(place, size_bytes, force=force) as output:
            try:
                with overwriting(state, output_path):
                    _copy(view.disk, output, size_bytes, on_progress)
            except OSError as error:
                raise DiskFailed(
                    path=f"{mirror_path} to {output_path}", doing="Copying", reason=error.strerror or str(error)
                ) from error
        return Committed(view.name, output_path, size_bytes, view.luks_uuid)


def _copy(view: Source, output: PlainDisk, size_bytes: int, on_progress: Callable[[int, int], None]) -> None:
    if not output.disk.is_block:
        output.resize(size_bytes)
    sink = DiskSink(output, blank=not output.disk.is_block)
    whole = Extent(0, size_bytes)
    copy_out(view, sink, whole, Progress(), on_progress=lambda done: on_progress(done, size_bytes))
    output.flush()


@contextlib.contextmanager
def _claimed(path: str, size_bytes: int, *, force: bool) -> Iterator[PlainDisk]:
    """The output. A file has another name until the block has ended well, also one that was there before.

    So no file that has the name, and the size, lacks anything, whatever ended this.
    """
    there = os.path.lexists(path)
    place = path if there and inspect(path).is_block else path + UNFINISHED
    for each in filter(os.path.lexists, {path, place}):
        _refuse_output(each, size_bytes, force=force)
    with contextlib.ExitStack() as undo:
        if not there:
            if not os.path.lexists(place):
                make_file(place)
            undo.callback(os.unlink, place)
        with contextlib.closing(PlainDisk.claim(inspect(path if there else place))) as output:
            if there and place != path:
                _rename(path, place)
            yield output
        undo.pop_all()
    if place != path:
        _name(place, path)


def _name(place: str, path: str) -> None:
    if os.path.lexists(path):
        error = FileExistsError(errno.EEXIST, f"it was made meanwhile; {place} has everything")
        raise not_made(path, error)
    _rename(place, path)


def _rename(path: str, new: str) -> None:
    try:
        rename(path, new)
    except OSError as error:
        raise not_made(new, error) from error


def _refuse_output(path: str, size_bytes: int, *, force: bool) -> None:
    disk = inspect(path)
    require_unused(disk)
    if disk.is_block and disk.size_bytes < size_bytes:
        raise OutputTooSmall(path=disk.path, size_bytes=disk.size_bytes, needed_bytes=size_bytes)
    if not force:
        refuse_content(disk)


def note_commit(state: State, mirror_path: str, overlay_path: str, done: Committed) -> None:
    """Put a commit into the audit trail of the state directory, if that knows the mirror."""
    mirror, overlay, output = map(os.path.abspath, (mirror_path, overlay_path, done.output))
    did = f"wrote the mirror {mirror} and the overlay {overlay} to {output}"
    details = {"overlay": overlay, "output": output, "bytes": done.size_bytes}
    note_if_known(state, "commit", did, mirror_path, done.luks_uuid, details)
