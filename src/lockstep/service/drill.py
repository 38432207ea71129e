"""A restore drill: whether what the mirror holds can be used, tried on the mirror itself.

The steps, each with its time; the first that fails ends the drill:

    open       the mirror is unlocked, and served with a temporary overlay over it
    attach     as a block device
    look       what is on it: a file system, or partitions, or LVM's logical volumes, with file systems in them
    replay     of each file system: mounted and unmounted, so that its journal is replayed, as after a power cut
    check      its own checker finds nothing wrong, and is not allowed to repair
    read       it is mounted read-only; all directories are walked, and a sample of files is read
    command    in the place of the last four: a command of the user's, given the device
    return     if the volume is being served: its server takes the mirror back, and copies what was written meanwhile

A server lets the mirror go for the drill, between two updates, so that it is the disk as it was at one moment, and a
backup of that moment for as long as the drill takes. It costs the clients nothing, where keeping the old content of
whatever they overwrite would cost them a read and a write each.

Everything happens on the overlay: the mirror is never written, whatever a journal or a command does. In the end
mounts, device and overlay are taken away again, also after a failure or Ctrl-C. What a killed drill left behind is
taken away by the next one of that volume; it is found by its names, below run/.drill-NAME in the state directory.

A file system that is mounted elsewhere at the same time (the target's, say) is a matter for its kind: ext4 does not
mind, XFS is told not to, and a btrfs with the same UUID is refused by the kernel, so the drill fails then and says so.

LVM's metadata is read, and nothing is activated: a volume group of that name may be in use on this machine. A logical
volume that lies in one piece gets a loop device, like a partition.

Not handled: logical volumes in several pieces, striped or thin; md, and what is encrypted. The drill says what it
found, and asks for a command.
"""

import contextlib
import fcntl
import json
import os
import random
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from lockstep.crypto.unlock import Unlock
from lockstep.disk.probe import mounted_paths
from lockstep.errors import (
    DetachRefused,
    DetachStuck,
    DetachUnflushed,
    DiskError,
    DrillBusy,
    DrillFailed,
    DrillOverlayFailed,
    DrillStuck,
    LockstepError,
    LuksError,
    MirrorIncomplete,
    MirrorNotDrilled,
    NoMirror,
    NotAttached,
    NotServed,
    StateDirUnusable,
    TargetUnfinished,
)
from lockstep.registry.store import MirrorRecord
from lockstep.service import attach as attaching
from lockstep.service import borrowing
from lockstep.service.managing import manager
from lockstep.service.memory import protect_memory
from lockstep.service.opening import exported, opened
from lockstep.service.state import State
from lockstep.volume.overlay import Overlay

SAMPLE_FILES: Final = 2000
SAMPLE_BYTES: Final = 1 << 30
_READ_BYTES: Final = 1 << 20
COMMAND_ENDS_S: Final = 10.0
UNMOUNT_S: Final = 3.0
POLL_S: Final = 0.05
_SILENT: Final = "it said nothing"


@dataclass(frozen=True)
class Kind:
    """How a kind of file system is mounted and checked. A checker changes nothing, and fails if anything is wrong."""

    check: tuple[str, ...]
    package: str
    options: str = "noatime"


_EXT: Final = Kind(("e2fsck", "-f", "-n"), "e2fsprogs")
KINDS: Final = {
    "ext2": _EXT,
    "ext3": _EXT,
    "ext4": _EXT,
    "xfs": Kind(("xfs_repair", "-n"), "xfsprogs", "noatime,nouuid"),
    "btrfs": Kind(("btrfs", "check", "--readonly"), "btrfs-progs"),
    "vfat": Kind(("fsck.fat", "-n"), "dosfstools"),
}
_HARMLESS: Final = ("swap",)  # nothing of it is worth a backup


@dataclass(frozen=True)
class Step:
    """One step that was taken."""

    name: str
    what: str
    seconds: float
    passed: bool
    detail: str


@dataclass
class Report:
    """What a drill of one mirror has shown."""

    volume: str
    mirror: str
    steps: list[Step] = field(default_factory=list)
    failure: LockstepError | None = None  # why the mirror could not be tried
    ended: bool = False  # by itself: whatever was to be tried was tried, up to the first step that failed

    @property
    def passed(self) -> bool:
        """Whether everything was tried, and nothing failed."""
        return self.ended and all(step.passed for step in self.steps)

    @property
    def outcome(self) -> str:
        """How it ended, in words."""
        if self.passed:
            return "it passed"
        return "it failed" if self.ended or not all(step.passed for step in self.steps) else "it was not finished"


class _Wrong(Exception):
    """A step failed; the reason is a phrase."""


def drill(
    state: State,
    name: str,
    unlock: Unlock,
    *,
    command: str | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
) -> list[Report]:
    """Try every mirror of a volume, one after the other; `on_step` is told of each step as it ends.

    Raises DrillBusy, NoMirror, NotManager, AttachNeedsRoot, StateDirUnusable, DrillOverlayFailed, DrillStuck,
    and what attaching raises. A mirror that cannot be opened, or does not pass, is no error here: see the reports.
    """
    protect_memory()
    actor = manager(state, f"drill the volume {name}")
    attaching.require_root()
    with state.registry() as registry:
        volume = registry.volume(name)
        if not volume.mirrors:
            raise NoMirror(volume=name)
        reports: list[Report] = []
        unlock.prepare()  # while the server still follows the mirror
        for mirror in volume.mirrors:
            report = Report(name, mirror.path)
            try:
                with _place(state, name) as place:
                    _Drill(state, report, place, on_step).run(mirror, unlock, command)
            except (DiskError, LuksError, TargetUnfinished) as error:  # the others are tried all the same
                report.failure = error
            finally:
                if report.steps:
                    reason = f"{actor.user} drilled the mirror {mirror.path}: {report.outcome}"
                    registry.audit("drill", actor=actor, volume=name, reason=reason, details=described(report))
            reports.append(report)
        return reports


def require_passed(report: Report) -> None:
    """Raises DrillFailed, or why the mirror could not be tried."""
    if report.failure is not None:
        raise report.failure
    for step in report.steps:
        if not step.passed:
            raise DrillFailed(volume=report.volume, step=f"{step.name} {step.what}".rstrip(), reason=step.detail)


def described(report: Report) -> dict[str, Any]:
    """The report as JSON has it."""
    steps = [
        {"step": s.name, "what": s.what, "passed": s.passed, "seconds": round(s.seconds, 3), "detail": s.detail}
        for s in report.steps
    ]
    error = str(report.failure) if report.failure else None
    return {"mirror": report.mirror, "passed": report.passed, "error": error, "steps": steps}


# --- its place ----------------------------------------------------------------------------------------------


class _Place:
    """Where a drill has its overlay, socket and mount point."""

    def __init__(self, directory: str, export: str) -> None:
        self.directory = directory
        self.export = export
        self.overlay = f"{directory}/overlay"
        self.socket = f"{directory}/socket"
        self.mount = f"{directory}/mount"

    def clear(self) -> None:
        """Take away whatever there is. Raises DrillStuck."""
        try:
            self._clear()
        except (_Wrong, DetachRefused, DetachStuck) as error:
            raise DrillStuck(volume=self.export, directory=self.directory, reason=str(error)) from error

    def _clear(self) -> None:
        while self.mount in mounted_paths():
            _unmount(self.mount)
        for device in self._devices():
            _detach_loops(device)
        with contextlib.suppress(NotAttached, DetachUnflushed):  # the overlay goes as well: nothing is lost
            attaching.detach(self.directory, self.export)
        for path in (self.overlay, self.socket, f"{self.directory}/.attach.lock"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self.mount)

    def remove(self) -> None:
        """Take everything away, and the directory as well."""
        self.clear()
        os.rmdir(self.directory)

    def _devices(self) -> list[str]:
        current = attaching.current(self.directory, self.export)
        file = f"{self.directory}/{self.export}.fuse/{self.export}"
        return [current.device] if current else attaching.loops_over(file)


@contextlib.contextmanager
def _place(state: State, name: str) -> Iterator[_Place]:
    directory = f"{state.run_dir}/.drill-{name}"
    place = _Place(directory, name)
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            place.clear()
            stack.callback(place.remove)
            os.mkdir(place.mount, mode=0o700)
        except BlockingIOError as error:
            raise DrillBusy(volume=name) from error
        except OSError as error:
            raise StateDirUnusable(path=state.path, reason=error.strerror or str(error)) from error
        yield place


def _unmount(where: str) -> None:
    """Unmount; a program that looks at what is mounted gets a moment to finish. Raises _Wrong."""
    deadline_s = time.monotonic() + UNMOUNT_S
    while True:
        try:
            _run("umount", where)
        except _Wrong:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(POLL_S)
        else:
            return


def _detach_loops(path: str) -> None:
    """Take away the loop devices over `path`, and those over these."""
    for device in attaching.loops_over(path):
        _detach_loops(device)
        _run("losetup", "-d", device)


# --- its steps ----------------------------------------------------------------------------------------------


class _Drill:
    def __init__(self, state: State, report: Report, place: _Place, on_step: Callable[[Step], None]) -> None:
        self._state = state
        self._report = report
        self._place = place
        self._on_step = on_step
        self._overlay: Overlay | None = None  # as long as something may be written to it

    def run(self, mirror: MirrorRecord, unlock: Unlock, command: str | None) -> None:
        """Take all steps, or those up to the first that fails."""
        served = False
        try:
            with borrowing.alone(self._state, mirror):
                served = borrowing.ask(self._state, self._report.volume, mirror, borrowing.DRILL)
                self._run(mirror, unlock, command)
            self._report.ended = True
        finally:
            if served:
                self._give_back(mirror)

    def _give_back(self, mirror: MirrorRecord) -> None:
        with contextlib.suppress(_Wrong), self._step("return") as note:
            try:
                if reason := borrowing.give_back(self._state, self._report.volume, mirror):
                    raise _Wrong(f"its server does not follow the mirror again yet: {reason}")
            except NotServed:
                note("its server has ended meanwhile")

    def _run(self, mirror: MirrorRecord, unlock: Unlock, command: str | None) -> None:
        with contextlib.suppress(_Wrong), contextlib.ExitStack() as stack:
            place = self._place
            with self._step("open") as note:
                unlocked = opened(
                    mirror.path, unlock, header_path=mirror.header_path, overlay_path=lambda _: place.overlay
                )
                try:
                    view = stack.enter_context(unlocked)
                except MirrorIncomplete as error:
                    raise MirrorNotDrilled(path=mirror.path, state=error.data["state"]) from error
                self._overlay = view.overlay
                stack.callback(setattr, self, "_overlay", None)
                stack.enter_context(exported(view, place.socket))
                note(f"{view.size_bytes} bytes{', frozen' if view.frozen else ''}")
            with self._step("attach") as note:
                device = attaching.attach(place.socket, place.export, place.directory, view.sector_bytes).device
                stack.callback(place.clear)
                note(device)
            if command is not None:
                with self._step("command") as note:
                    note(_run_command(command, device))
                return
            with self._step("look") as note:
                found = list(_look(device, stack))
                note(", ".join(f"{each.what}: {each.kind or 'nothing known'}" for each in found))
                _require_something_to_check(found)
            for each in found:
                if each.kind in KINDS:
                    self._try(each)

    def _try(self, found: "_Found") -> None:
        kind, place = KINDS[found.kind], self._place
        what = f"{found.kind} on {found.what}"
        with self._step("replay", what), _mounted(found, kind.options, place):
            pass
        with self._step("check", what) as note:
            note(_said(_run(*kind.check, found.device, package=kind.package), lines=1))
        with self._step("read", what) as note, _mounted(found, f"ro,{kind.options}", place):
            note(_read_sample(place.mount))

    @contextlib.contextmanager
    def _step(self, name: str, what: str = "") -> Iterator[Callable[[str], None]]:
        began_s, details = time.monotonic(), [""]

        def ended(passed: bool, detail: str) -> None:
            step = Step(name, what, time.monotonic() - began_s, passed, detail)
            self._report.steps.append(step)
            self._on_step(step)

        try:
            with self._overlay_blamed():
                yield details.append
        except (_Wrong, LockstepError) as error:
            ended(False, str(error).removesuffix("."))
            raise
        except BaseException:
            ended(False, "it was interrupted")
            raise
        ended(True, details[-1])

    @contextlib.contextmanager
    def _overlay_blamed(self) -> Iterator[None]:
        """Raise DrillOverlayFailed, whatever came of a step, where the overlay lost something."""
        try:
            yield
        except (_Wrong, LockstepError):
            self._require_overlay()
            raise
        self._require_overlay()

    def _require_overlay(self) -> None:
        if self._overlay is not None and (failure := self._overlay.failure):
            reason = failure.strerror or str(failure)
            raise DrillOverlayFailed(volume=self._report.volume, overlay=self._place.overlay, reason=reason)


@dataclass(frozen=True)
class _Found:
    what: str
    device: str
    kind: str
    """What blkid calls it; nothing where it knows nothing."""


def _look(device: str, stack: contextlib.ExitStack) -> Iterator[_Found]:
    """What is on the device. Partitions get loop devices of their own: not every kernel makes nodes for them."""
    signature = _blkid(device)
    if "TYPE" in signature or "PTTYPE" not in signature:
        yield from _inside(_Found("the whole disk", device, signature.get("TYPE", "")), stack)
        return
    columns = "NR,START,SECTORS"
    for line in _run("partx", "--raw", "--noheadings", "--output", columns, device).splitlines():
        number, start, sectors = map(int, line.split())
        yield from _inside(_part(f"partition {number}", device, start * 512, sectors * 512, stack), stack)


def _part(what: str, device: str, offset: int, length: int, stack: contextlib.ExitStack) -> _Found:
    """A part of a device, in bytes, as a loop device."""
    part = _run("losetup", "--find", "--show", "--offset", str(offset), "--sizelimit", str(length), device).strip()
    stack.callback(_run, "losetup", "-d", part)
    return _Found(what, part, _blkid(part).get("TYPE", ""))


def _inside(found: _Found, stack: contextlib.ExitStack) -> Iterator[_Found]:
    """The logical volumes of an LVM physical volume; of anything else, itself."""
    if found.kind != "LVM2_member":
        yield found
        return
    first_byte = int(_lvm("pvs", found.device, "pe_start")[0]["pe_start"])
    fields = "vg_name,lv_name,segtype,seg_start,seg_pe_ranges,vg_extent_size"
    segments = sorted(_lvm("lvs", found.device, fields, "--segments"), key=lambda each: int(each["seg_start"]))
    for vg, lv in sorted({(each["vg_name"], each["lv_name"]) for each in segments}):
        own = [each for each in segments if (each["vg_name"], each["lv_name"]) == (vg, lv)]
        what, extent = f"logical volume {vg}/{lv} on {found.what}", int(own[0]["vg_extent_size"])
        extents = _one_piece(own, found.device)
        if extents is None:
            yield _Found(what, "", "several pieces, or " + own[0]["segtype"])
        else:
            first, last = extents
            yield _part(what, found.device, first_byte + first * extent, (last + 1 - first) * extent, stack)


def _one_piece(segments: list[dict[str, str]], device: str) -> tuple[int, int] | None:
    """The first and the last extent of a logical volume on a device, if it is linear and lies there in one piece."""
    ranges: list[tuple[int, int]] = []
    for each in segments:
        path, _, extents = each["seg_pe_ranges"].rpartition(":")
        first, _, last = extents.partition("-")
        if each["segtype"] != "linear" or path != device or (ranges and int(first) != ranges[-1][1] + 1):
            return None
        ranges.append((int(first), int(last)))
    return ranges[0][0], ranges[-1][1]


def _lvm(report: str, device: str, fields: str, *options: str) -> list[dict[str, str]]:
    """What LVM's metadata on this one device says; sizes in bytes. Nothing is activated."""
    alone = ("--driverloaded", "n", "--devices", device)
    form = ("--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields)
    (said,) = json.loads(_run(report, *alone, *form, *options, package="lvm2"))["report"]
    rows: list[dict[str, str]] = next(iter(said.values()))
    return rows


def _blkid(device: str) -> dict[str, str]:
    try:
        said = _run("blkid", "--probe", "--output", "export", device)
    except _Wrong:  # exit code 2 says that it knows nothing
        return {}
    return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)


def _require_something_to_check(found: list[_Found]) -> None:
    opaque = [each for each in found if each.kind and each.kind not in KINDS and each.kind not in _HARMLESS]
    if opaque:
        raise _Wrong(f"{opaque[0].what} holds {opaque[0].kind}, which only a command of yours (--command) can check")
    if not any(each.kind in KINDS for each in found):
        raise _Wrong("no file system was found; what is there, only a command of yours (--command) can check")


@contextlib.contextmanager
def _mounted(found: _Found, options: str, place: _Place) -> Iterator[None]:
    """Raises DrillStuck where somebody keeps it from being unmounted: that is no fault of the mirror's."""
    _run("mount", "-t", found.kind, "-o", options, found.device, place.mount)
    try:
        yield
    finally:
        try:
            _unmount(place.mount)
        except _Wrong as error:
            raise DrillStuck(volume=place.export, directory=place.mount, reason=str(error)) from error


def _read_sample(root: str) -> str:
    """Look at every directory and file, and read some of the files. Raises _Wrong."""
    files = entries = 0
    sample: list[str] = []

    def fail(error: OSError) -> None:
        raise error

    try:
        for directory, names, others in os.walk(root, onerror=fail):
            for name in (*names, *others):
                entries += 1
                path = os.path.join(directory, name)
                if not stat.S_ISREG(os.lstat(path).st_mode):
                    continue
                files += 1
                if len(sample) < SAMPLE_FILES:
                    sample.append(path)
                elif (place := random.randrange(files)) < SAMPLE_FILES:  # noqa: S311 (any choice will do)
                    sample[place] = path
        read_bytes = _read_files(sample)
    except OSError as error:
        raise _Wrong(f"{os.path.relpath(error.filename or root, root)}: {error.strerror}") from error
    return f"{entries} entries, of {files} files {len(sample)} in the sample, {read_bytes} bytes read"


def _read_files(paths: list[str]) -> int:
    buffer, total = bytearray(_READ_BYTES), 0
    for path in paths:
        try:
            with open(path, "rb", buffering=0) as file:
                while total < SAMPLE_BYTES and (count := file.readinto(buffer)):
                    total += count
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error
    return total


# --- programs -----------------------------------------------------------------------------------------------


def _run(*command: str, package: str = "util-linux") -> str:
    """Run a program to its end, and return what it prints. Raises _Wrong."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError as error:
        raise _Wrong(f"the program {command[0]} is not installed (package {package})") from error
    if done.returncode:
        raise _Wrong(f"{command[0]} ended with {done.returncode}: {_said(done.stdout + done.stderr) or _SILENT}")
    return done.stdout


def _run_command(command: str, device: str) -> str:
    """Run a command of the user's in the shell, with the device in $LOCKSTEP_DEVICE. Raises _Wrong.

    In a session of its own, so that it ends as a whole when the drill is interrupted.
    """
    child = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "LOCKSTEP_DEVICE": device},
        start_new_session=True,
    )
    try:
        said = child.communicate()[0].decode(errors="replace")
    except BaseException:
        os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(COMMAND_ENDS_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    if child.returncode:
        raise _Wrong(f"it ended with {child.returncode}: {_said(said) or _SILENT}")
    return _said(said)


def _said(text: str, lines: int = 3) -> str:
    return "; ".join([line.strip() for line in text.splitlines() if line.strip()][-lines:])
