"""A real block device of the operating system for a served volume.

Theory
------
Two ways, chosen by what the kernel can do:

    nbd     /dev/nbdN    nbd-client hands the socket to the kernel's nbd driver
    fuse    /dev/loopN   nbdfuse shows the export as a file, losetup makes a block device of the file

The kernel keeps the truth. The record (RUN_DIR/EXPORT.attached, JSON, replaced atomically) only says which
device was given out, and is believed as far as the kernel agrees: a record from before a reboot must not take
down somebody else's loop device. The fuse way's pieces are found by their names below RUN_DIR, also without a
record, so that whatever a killed attach or a dead nbdfuse left behind is found and cleaned up:

    EXPORT.fuse/          mount point; the file in it is EXPORT     found in /proc/self/mountinfo
    nbdfuse               also one that has not mounted yet         found in /proc, by the arguments that we gave it
    EXPORT.fuse.log       what nbdfuse says                         quoted when it dies
    /dev/loopN            over EXPORT.fuse/EXPORT                   found in /sys/block/loopN/loop/backing_file

Order. Up: nbdfuse, loop device, record; what fails undoes what was done. Down, the reverse: nobody uses the device
(else refused) -> flush -> let go of the loop device -> unmount -> nbdfuse ends -> files. Each step is bounded
in time, and the next one starts only when the kernel shows that the last one is complete (`losetup -d` only
*asks* for the detach: a device that is still open goes later). One lock per RUN_DIR keeps attaches and detaches apart.
RUN_DIR may be another account's, which may put links to root's files there, or a pipe in the place of the record: no
file of ours is opened through a link, and no pipe is waited for.

Measured over nbdfuse 1.14 (Linux 6.18, 2 cores, nbdkit's memory disk in the place of the server):
- Direct I/O on the loop device: buffered 1 MiB writes 694 instead of 105 MB/s, 4 KiB writes at depth 32 about 17k
  instead of 10k per second, and no second copy in the page cache, which nobody could invalidate. Repeated small
  reads of one place are slower (18k instead of 130k per second: they really go to the server). With and without,
  an fsync on the device is a FLUSH at the server, a discard is a TRIM, and zeroing is WRITE_ZEROES.
- One, two or four connections: no difference beyond the noise. So one: its FLUSH covers every write before it
  without a promise about multi-conn, and the volume's status shows one client.
- A size that is no multiple of the sector: the device ends with the last whole sector. Left to itself, the kernel
  shows the torn sector and fails every access to it.

Not handled: after its server ended, nbdfuse and the nbd driver answer EIO for ever; `attach` recognises that
and makes a fresh device, once nobody uses the old one. A loop device over FUSE needs memory to write back memory.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from urllib.parse import quote

from lockstep.disk import probe
from lockstep.errors import (
    ActingNeedsRoot,
    AttachedForAnother,
    AttachFailed,
    AttachNeedsRoot,
    AttachToolMissing,
    DetachRefused,
    DetachStuck,
    DetachUnflushed,
    FuseMissing,
    LockstepError,
    NotAttached,
    StateDirUnusable,
    UserNameInvalid,
)
from lockstep.nbd.identity import is_user_name

READY_S = 30.0
"""For a server to answer the handshake."""
STEP_S = 15.0
"""For what the kernel does at once unless something is wrong."""
FLUSH_S = 600.0
"""For all that the page cache holds, to a slow mirror."""
SETTLE_S = 3.0
"""For the short looks that the device manager takes at every new or changed device."""
_POLL_S = 0.01

_RECORD_BYTES = 32 << 10  # more than any has: two paths, two names
# Nothing is there; or what the owner of the directory put there: a link, a directory, a socket, a pipe.
_NO_RECORD = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EAGAIN)
_CONNECTIONS = 1  # see "Measured"
_PACKAGES = {
    "nbd-client": "nbd-client",
    "nbdfuse": "nbdfuse (or libnbd-bin)",
    "fusermount3": "fuse3",
}  # else util-linux

# nbdfuse outlives us, and is still our child until then: kept to reap it when it ends.
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Attachment:
    """One block device given to the operating system."""

    device: str
    mountpoint: str | None
    """nbdfuse's directory; None where the kernel speaks NBD itself."""
    pid: int | None
    """nbdfuse, or the process that the nbd driver names for the device."""
    export: str
    user: str | None = None
    """On whose behalf; None: root's own."""


class _StepFailed(Exception):
    def __init__(self, step: str, reason: str) -> None:
        super().__init__(step, reason)
        self.step, self.reason = step, reason


class _StepTimedOut(_StepFailed):
    pass


class _Place:
    """The names of one export's pieces below the run directory."""

    def __init__(self, run_dir: str, export: str, user: str | None = None) -> None:
        if not export or export.startswith(".") or "/" in export or "\0" in export:
            raise AttachFailed(export=export, step="naming its files", reason="the name is not a file name")
        base = os.path.join(os.path.realpath(run_dir), export)
        self.export = export
        self.user = user
        self.name = f"{export}@{user}" if user else export  # what the server is asked for
        self.lock = os.path.join(os.path.dirname(base), ".attach.lock")
        self.record = f"{base}.attached"
        self.mountpoint = f"{base}.fuse"
        self.file = os.path.join(self.mountpoint, export)
        self.log = f"{base}.fuse.log"


# --- the three verbs --------------------------------------------------------------------------------------


def attach(
    uri_socket: str, export: str, run_dir: str, logical_sector_bytes: int, user: str | None = None
) -> Attachment:
    """Give the served export a block device. An attachment that works is returned as it is; a dead one is replaced.

    `uri_socket` is the path of the server's unix socket; `user` is on whose behalf, if not root's own. Raises
    AttachNeedsRoot, AttachToolMissing, FuseMissing, AttachFailed, AttachedForAnother, StateDirUnusable, or
    DetachRefused and DetachStuck where a dead attachment is still in use or does not go away.
    """
    require_root()
    place = _Place(run_dir, export, user)
    try:
        os.makedirs(run_dir, exist_ok=True)
        with _alone(place):
            return _attached(os.path.abspath(uri_socket), place, logical_sector_bytes)
    except _StepFailed as failed:
        raise AttachFailed(export=export, step=failed.step, reason=failed.reason) from failed
    except OSError as error:
        raise StateDirUnusable(path=run_dir, reason=error.strerror or str(error)) from error


def _attached(socket: str, place: _Place, logical_sector_bytes: int) -> Attachment:
    existing = _current(place)
    if existing is not None and _answers(existing):
        if existing.user != place.user:
            device, user = existing.device, existing.user or "root itself"
            raise AttachedForAnother(export=place.export, device=device, user=user)
        return existing
    _take_down(place, existing)
    way = _attach_nbd if _kernel_speaks_nbd() else _attach_fuse
    with ExitStack() as undo:
        attachment = way(socket, place, logical_sector_bytes, undo)
        _write_record(place, attachment)
        undo.pop_all()
    return attachment


def detach(run_dir: str, export: str) -> Attachment:
    """Take the device away, flushed, and return what it was. Also cleans up after a dead attachment.

    Raises DetachRefused (in use), DetachStuck (a step did not end in its time), DetachUnflushed (detached, but the
    server did not take the last writes), NotAttached, AttachNeedsRoot.
    """
    require_root()
    place = _Place(run_dir, export)
    if not os.path.exists(place.lock):  # nobody has attached anything here; nor need there be room to make it
        raise NotAttached(export=export)
    with _alone(place):
        existing, loops = _current(place), loops_over(place.file)
        there = existing is not None or bool(loops) or _is_mounted(place)
        gone = existing or Attachment((loops or [""])[0], place.mountpoint, None, export)
        unflushed = _take_down(place, existing)
        if not there:  # but for a record, whose device may be somebody else's by now
            raise NotAttached(export=export)
        if unflushed is not None:
            raise DetachUnflushed(device=gone.device, export=export, reason=unflushed)
        return gone


def require_right_to_act_for(user: str) -> None:
    """Raises UserNameInvalid, or ActingNeedsRoot unless this is root."""
    if not is_user_name(user):
        raise UserNameInvalid(user=user)
    if os.geteuid() != 0:
        raise ActingNeedsRoot(user=user)


def current(run_dir: str, export: str) -> Attachment | None:
    """The attachment, if the kernel agrees that it exists. Asks nothing of the server."""
    return _current(_Place(run_dir, export))


# --- what exists ------------------------------------------------------------------------------------------


def _current(place: _Place) -> Attachment | None:
    recorded = _read_record(place)
    if recorded is None:
        return None
    if recorded.mountpoint is None:
        return recorded if recorded.pid == _nbd_pid(recorded.device) is not None else None
    served = recorded.pid is not None and _is_nbdfuse(recorded.pid, place) and _is_mounted(place)
    return recorded if served and recorded.device in loops_over(place.file) else None


def _read_record(place: _Place) -> Attachment | None:
    """What was given out, if the record can be read as one; in one step, that ends whatever has its name."""
    try:
        descriptor = os.open(place.record, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return Attachment(**json.loads(os.read(descriptor, _RECORD_BYTES)))
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _NO_RECORD:
            return None
        raise
    except (ValueError, TypeError, RecursionError):  # not ours, or from another version: the kernel knows the pieces
        return None


def _write_record(place: _Place, attachment: Attachment) -> None:
    # Not fsynced: what it describes does not survive a power cut either.
    temporary = f"{place.record}.new"
    with open(temporary, "x", encoding="utf-8") as record:
        os.fchmod(record.fileno(), 0o644)  # whatever root's umask: the directory's owner asks whether it is attached
        json.dump(asdict(attachment), record)
    os.replace(temporary, place.record)


def _is_mounted(place: _Place) -> bool:
    return place.mountpoint in probe.mounted_paths()


def loops_over(path: str) -> list[str]:
    """The loop devices whose backing file has this path."""
    return [
        f"/dev/{backing.parts[3]}"
        for backing in sorted(Path("/sys/block").glob("loop*/loop/backing_file"))
        if _text(backing) == path
    ]


def _nbdfuses(place: _Place) -> list[int]:
    """The processes that serve our mount point, or are about to. A zombie has no arguments."""
    for child in list(_children.values()):
        if child.poll() is not None:
            del _children[child.pid]
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_nbdfuse(pid, place)]


def _is_nbdfuse(pid: int, place: _Place) -> bool:
    program, *arguments = (_text(Path(f"/proc/{pid}/cmdline")) or "").split("\0")
    return os.path.basename(program) == "nbdfuse" and place.file in arguments


def _answers(attachment: Attachment) -> bool:
    """Whether a read gets through to the server; a slow server does answer, one that ended does not."""
    # The FUSE file, not the loop device over it: a read that waits for FUSE can be killed.
    source = attachment.device
    if attachment.mountpoint is not None:
        source = os.path.join(attachment.mountpoint, attachment.export)
    command = ["dd", f"if={source}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"]
    try:
        _run("reading from the server", command, STEP_S)
    except _StepTimedOut:
        return True
    except _StepFailed:
        return False
    return True


# --- the nbd way ------------------------------------------------------------------------------------------


def _kernel_speaks_nbd() -> bool:
    if not os.path.exists("/sys/module/nbd"):
        with suppress(_StepFailed, AttachToolMissing):
            _run("modprobe", ["modprobe", "--quiet", "nbd"], STEP_S)
    return os.path.exists("/sys/module/nbd") and os.path.exists("/dev/nbd0")


def _attach_nbd(socket: str, place: _Place, sector_bytes: int, undo: ExitStack) -> Attachment:
    device = _first_free_nbd()
    # Without -persist: a device that comes back under a mounted file system, perhaps with other content than
    # before, is worse than one that fails.
    command = ["nbd-client", "-unix", socket, device, "-name", place.name, "-block-size", str(sector_bytes)]
    _run("nbd-client", command, READY_S)
    undo.callback(_quietly, _disconnect_nbd, device)  # only now: who failed was not given it, another may have been
    _wait_until("nbd-client", lambda: _nbd_pid(device) is not None and _size_sectors(device) > 0, READY_S)
    return Attachment(device, None, _nbd_pid(device), place.export, place.user)


def _first_free_nbd() -> str:
    """The first device of size 0 that no process has set up (nbd.c creates the pid file on start)."""
    directories = sorted(Path("/sys/block").glob("nbd*"), key=lambda path: (len(path.name), path.name))
    for name in (path.name for path in directories):
        device = f"/dev/{name}"
        if _nbd_pid(device) is None and _size_sectors(device) == 0:
            return device
    raise _StepFailed("choosing a device", "every /dev/nbdN is taken; load the nbd driver with a larger nbds_max")


def _nbd_pid(device: str) -> int | None:
    text = _text(Path("/sys/block", os.path.basename(device), "pid"))
    return int(text) if text else None


def _size_sectors(device: str) -> int:
    return int(_text(Path("/sys/block", os.path.basename(device), "size")) or 0)


def _disconnect_nbd(device: str) -> None:
    _run("nbd-client -d", ["nbd-client", "-d", device], STEP_S)
    _wait_until("nbd-client -d", lambda: _nbd_pid(device) is None, STEP_S)


# --- the fuse way -----------------------------------------------------------------------------------------


def _attach_fuse(socket: str, place: _Place, sector_bytes: int, undo: ExitStack) -> Attachment:
    if not os.path.exists("/dev/fuse"):
        raise FuseMissing
    for tool in ("nbdfuse", "fusermount3", "losetup"):
        if shutil.which(tool) is None:
            raise _tool_missing(tool)
    undo.callback(_quietly, _remove_files, place)
    undo.callback(_quietly, _end_nbdfuse, place)
    pid = _start_nbdfuse(socket, place)
    size_bytes = os.stat(place.file).st_size
    usable_bytes = size_bytes - size_bytes % sector_bytes
    if usable_bytes == 0:
        raise _StepFailed("losetup", f"{size_bytes} bytes are less than one sector of {sector_bytes} bytes")
    command = ["losetup", "--find", "--partscan", "--direct-io=on", f"--sector-size={sector_bytes}"]
    if usable_bytes != size_bytes:
        command.append(f"--sizelimit={usable_bytes}")
    undo.callback(_quietly, _release_loops, place)
    _run("losetup", [*command, place.file], READY_S)
    device = loops_over(place.file)[0]
    # A loop device that somebody made read-only while it had another use remains so.
    _run("blockdev --setrw", ["blockdev", "--setrw", device], STEP_S)
    return Attachment(device, place.mountpoint, pid, place.export, place.user)


def _start_nbdfuse(socket: str, place: _Place) -> int:
    """Start nbdfuse in a session of its own, where no Ctrl-C of ours reaches it, and wait until it serves."""
    os.makedirs(place.mountpoint, mode=0o700, exist_ok=True)
    uri = f"nbd+unix:///{quote(place.name, safe='')}?socket={quote(os.fsencode(socket))}"
    command = ["nbdfuse", f"--connections={_CONNECTIONS}", place.file, uri]
    with open(place.log, "xb") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True
        )
    _children[child.pid] = child

    def serves() -> bool:
        if child.poll() is not None:
            raise _StepFailed("nbdfuse", _quoted(_text(Path(place.log)), child.returncode))
        return _is_mounted(place) and os.path.exists(place.file)

    _wait_until("nbdfuse", serves, READY_S)
    return child.pid


def _end_nbdfuse(place: _Place) -> None:
    """Unmount, and have nbdfuse end: also one that has not mounted yet, and would when its server answers."""
    pids = _nbdfuses(place)

    def ended() -> bool:
        return not any(_is_nbdfuse(pid, place) for pid in pids)

    if _is_mounted(place):
        _unmount(place)
        with suppress(_StepFailed):  # it says goodbye to a server that does not answer; nothing is left to lose in it
            _wait_until("the end of nbdfuse", ended, STEP_S)
    for pid in pids:
        if _is_nbdfuse(pid, place):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    _wait_until("the end of nbdfuse", ended, STEP_S)
    if _is_mounted(place):  # it came to that just before its end
        _unmount(place)


def _unmount(place: _Place) -> None:
    _run("fusermount3 -u", ["fusermount3", "-u", place.mountpoint], STEP_S)
    _wait_until("fusermount3 -u", lambda: not _is_mounted(place), STEP_S)


def _release_loops(place: _Place) -> None:
    for device in loops_over(place.file):
        _run("losetup -d", ["losetup", "-d", device], STEP_S)
    _wait_until("losetup -d", lambda: not loops_over(place.file), STEP_S)


def _remove_files(place: _Place) -> None:
    for path in (place.record, f"{place.record}.new", place.log):
        with suppress(FileNotFoundError):
            os.unlink(path)
    with suppress(FileNotFoundError):
        os.rmdir(place.mountpoint)


# --- taking down ------------------------------------------------------------------------------------------


def _take_down(place: _Place, existing: Attachment | None) -> str | None:
    """Remove every piece of an attachment, dead or alive; returns why the last writes may be lost, if they may."""
    nbd = existing.device if existing is not None and existing.mountpoint is None else None
    devices = [nbd] if nbd else loops_over(place.file)
    for device in devices:
        _require_unused(device, place.export)
    try:
        problems = [problem for device in devices if (problem := _flushed(device))]
        if nbd:
            _disconnect_nbd(nbd)
        _release_loops(place)
        _end_nbdfuse(place)
        _remove_files(place)
    except _StepFailed as failed:
        raise DetachStuck(export=place.export, step=failed.step, reason=failed.reason) from failed
    except OSError as error:
        raise DetachStuck(export=place.export, step="removing its files", reason=str(error)) from error
    return problems[0] if problems else None


def _require_unused(device: str, export: str) -> None:
    """Refuse a device that somebody uses; a program that has it open gets a moment to finish."""
    disk = probe.inspect(device)
    if users := probe.users_of(disk):
        raise DetachRefused(device=device, export=export, users=", ".join(users))
    deadline = time.monotonic() + SETTLE_S
    while users := probe.opened_by(disk):
        if time.monotonic() > deadline:
            raise DetachRefused(device=device, export=export, users=", ".join(users))
        time.sleep(_POLL_S)


def _flushed(device: str) -> str | None:
    """Flush page cache and server; returns why that failed. Not in this process: it could not be interrupted."""
    try:
        _run("flushing", ["sync", device], FLUSH_S)
    except _StepTimedOut:
        raise
    except _StepFailed as failed:
        return failed.reason
    return None


# --- small things -----------------------------------------------------------------------------------------


def require_root() -> None:
    """Raises AttachNeedsRoot."""
    if os.geteuid() != 0:
        raise AttachNeedsRoot


def _tool_missing(tool: str) -> AttachToolMissing:
    return AttachToolMissing(tool=tool, package=_PACKAGES.get(tool, "util-linux"))


def _run(step: str, command: list[str], timeout_s: float) -> str:
    """Run a program and return what it prints. Raises _StepFailed, _StepTimedOut, AttachToolMissing.

    Its output goes to a file: a daemon that it leaves behind would hold a pipe open. It is not waited for beyond
    its time, not even after SIGKILL: a process that waits for a disk cannot be killed.
    """
    with TemporaryFile() as output:
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        except FileNotFoundError as error:
            raise _tool_missing(command[0]) from error
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            child.kill()
            _children[child.pid] = child
            raise _StepTimedOut(step, f"it did not end within {timeout_s:g} seconds") from error
        output.seek(0)
        text = output.read().decode(errors="replace")
    if code != 0:
        raise _StepFailed(step, _quoted(text, code))
    return text


def _wait_until(step: str, holds: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise _StepTimedOut(step, f"it was not complete within {timeout_s:g} seconds")
        time.sleep(_POLL_S)


def _quietly(undo: Callable[..., object], *arguments: object) -> None:
    """Undo as far as it goes: the failure that led here is the one to report."""
    with suppress(_StepFailed, LockstepError, OSError):
        undo(*arguments)


def _quoted(said: str | None, code: int) -> str:
    lines = [line.strip() for line in (said or "").splitlines() if line.strip()]
    return "; ".join(lines[-3:]) or (f"it was killed by signal {-code}" if code < 0 else f"it ended with {code}")


def _text(path: Path) -> str | None:
    try:
        return probe.kernel_text(path)
    except OSError:
        return None


@contextmanager
def _alone(place: _Place) -> Iterator[None]:
    """Nobody else attaches or detaches below this run directory meanwhile; every holder's time is bounded."""
    try:
        descriptor = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateDirUnusable(path=os.path.dirname(place.lock), reason=error.strerror or str(error)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
