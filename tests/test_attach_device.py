"""A served volume becomes a block device and goes away again, also when everything around it is killed.

The server is nbdkit: the attachment must work with any NBD server. Nothing here waits for a fixed time.
"""

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lockstep.disk import probe
from lockstep.errors import (
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
)
from lockstep.service import attach as attaching
from lockstep.service.attach import Attachment, _text, attach, current, detach
from tests.lab import loop_devices

MIB = 1 << 20
TOOLS = ("nbdkit", "nbdfuse", "fusermount3", "losetup", "mkfs.ext4")

needs_devices = pytest.mark.skipif(
    os.geteuid() != 0
    or not os.path.exists("/dev/fuse")
    or not os.path.exists("/dev/loop-control")
    or any(shutil.which(tool) is None for tool in TOOLS),
    reason=f"needs root, /dev/fuse, loop devices, and {', '.join(TOOLS)}",
)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def wait_until(holds: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Server:
    """nbdkit over one image file, logging every request; it can be killed, stopped and started again."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "target.img"
        self.socket = str(directory / "a volume.sock")
        self.log = directory / "requests.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, size_bytes: int) -> None:
        if not self.image.exists():
            with self.image.open("wb") as image:
                image.truncate(size_bytes)
        Path(self.socket).unlink(missing_ok=True)
        self._process = subprocess.Popen(
            ["nbdkit", "-f", "-U", self.socket, "-e", "vol", "--filter=log", "file", self.image, f"logfile={self.log}"]
        )
        wait_until(self._listens)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(self.socket) == 0

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def requests(self) -> str:
        return self.log.read_text(errors="replace").replace("\0", "") if self.log.exists() else ""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start(64 * MIB)
    yield server
    server.kill()


@pytest.fixture
def run_dir(tmp_path: Path, server: Server) -> Iterator[str]:
    directory = str(tmp_path / "run")
    yield directory
    subprocess.run(["umount", str(tmp_path / "mnt")], capture_output=True, check=False)
    with suppress(ProcessLookupError):
        server.signal(signal.SIGCONT) if server._process else None
    with suppress(NotAttached, DetachUnflushed):
        detach(directory, "vol")
    assert leftovers(directory) == []
    for child in attaching._children.values():  # what was given up ends as soon as the server answers or is gone
        child.wait(30)
    attaching._children.clear()


@pytest.fixture
def mnt(tmp_path: Path) -> str:
    (tmp_path / "mnt").mkdir()
    return str(tmp_path / "mnt")


def leftovers(run_dir: str) -> list[str]:
    """What is still there of any attachment: files, mounts, loop devices."""
    found = [name for name in (os.listdir(run_dir) if os.path.isdir(run_dir) else []) if name != ".attach.lock"]
    found += [path for path in probe.mounted_paths() if path.startswith(run_dir)]
    return found + [path for path in loop_devices().values() if path.startswith(run_dir)]


def assert_told(error: LockstepError, *words: str) -> None:
    assert error.likely_cause
    assert error.advice
    for word in words:
        assert word in str(error)


# --- the life of an attachment ----------------------------------------------------------------------------


@needs_devices
def test_a_file_system_lives_on_the_device(server: Server, run_dir: str, mnt: str) -> None:
    attachment = attach(server.socket, "vol", run_dir, 512)
    assert current(run_dir, "vol") == attachment
    assert probe.inspect(attachment.device).size_bytes == 64 * MIB
    run("mkfs.ext4", "-q", attachment.device)
    run("mount", attachment.device, mnt)
    payload = os.urandom(3 * MIB)
    Path(mnt, "file").write_bytes(payload)

    with pytest.raises(DetachRefused) as refused:
        detach(run_dir, "vol")
    assert_told(refused.value, attachment.device, f"mounted at {mnt}")
    assert current(run_dir, "vol") == attachment

    run("umount", mnt)
    assert detach(run_dir, "vol") == attachment
    assert leftovers(run_dir) == []
    assert current(run_dir, "vol") is None
    run("e2fsck", "-fn", str(server.image))
    run("mount", "-o", "loop", str(server.image), mnt)
    assert Path(mnt, "file").read_bytes() == payload


@needs_devices
def test_a_loop_device_that_was_made_read_only_once_is_writable_again(server: Server, run_dir: str) -> None:
    device = attach(server.socket, "vol", run_dir, 512).device
    run("blockdev", "--setro", device)
    detach(run_dir, "vol")
    try:
        for _ in range(5):  # others may take the first free one meanwhile
            if (again := attach(server.socket, "vol", run_dir, 512).device) == device:
                break
            detach(run_dir, "vol")
        assert again == device
        assert run("blockdev", "--getro", device).strip() == "0"
        with open(device, "r+b", buffering=0) as disk:
            disk.write(b"w" * 4096)
            os.fsync(disk.fileno())
        detach(run_dir, "vol")
    finally:
        run("blockdev", "--setrw", device)
    assert server.image.read_bytes()[:4096] == b"w" * 4096


@needs_devices
def test_attaching_twice_gives_the_same_device(server: Server, run_dir: str) -> None:
    first = attach(server.socket, "vol", run_dir, 512)
    assert attach(server.socket, "vol", run_dir, 512) == first
    detach(run_dir, "vol")
    with pytest.raises(NotAttached) as told:
        detach(run_dir, "vol")
    assert_told(told.value, "vol")


@needs_devices
def test_flush_discard_and_zero_reach_the_server(server: Server, run_dir: str, mnt: str) -> None:
    device = attach(server.socket, "vol", run_dir, 512).device
    before = server.requests()
    with open(device, "r+b", buffering=0) as disk:
        disk.write(b"x" * 4096)
        os.fsync(disk.fileno())
    done = server.requests()[len(before) :]
    assert 0 < done.index(" Write ") < done.index(" Flush ")
    run("blkdiscard", "--offset", str(MIB), "--length", str(MIB), device)
    assert "Trim" in server.requests()
    run("blkdiscard", "--zeroout", "--offset", str(2 * MIB), "--length", str(MIB), device)
    assert "Zero" in server.requests()
    run("mkfs.ext4", "-q", "-E", "nodiscard", device)
    run("mount", device, mnt)
    trims = server.requests().count("Trim")
    run("fstrim", mnt)
    assert server.requests().count("Trim") > trims
    run("umount", mnt)


@needs_devices
def test_what_was_written_without_fsync_is_flushed_by_detach(server: Server, run_dir: str) -> None:
    device = attach(server.socket, "vol", run_dir, 512).device
    payload = os.urandom(8 * MIB)
    with open(device, "r+b") as disk:
        disk.write(payload)
    before = server.requests()
    detach(run_dir, "vol")
    assert "Flush" in server.requests()[len(before) :]
    assert server.image.read_bytes()[: 8 * MIB] == payload


@needs_devices
@pytest.mark.parametrize(("sector_bytes", "usable_bytes"), [(512, 9_999_872), (4096, 9_998_336)])
def test_an_odd_size_ends_with_the_last_whole_sector(
    tmp_path: Path, run_dir: str, server: Server, sector_bytes: int, usable_bytes: int
) -> None:
    server.kill()
    server.image.unlink()
    server.start(10_000_000)
    device = attach(server.socket, "vol", run_dir, sector_bytes).device
    disk = probe.inspect(device)
    assert (disk.size_bytes, disk.logical_sector_bytes) == (usable_bytes, sector_bytes)
    with open(device, "r+b", buffering=0) as raw:
        raw.seek(usable_bytes - sector_bytes)
        assert raw.write(b"y" * sector_bytes) == sector_bytes
        os.fsync(raw.fileno())
    assert server.image.read_bytes()[usable_bytes - sector_bytes : usable_bytes] == b"y" * sector_bytes


@needs_devices
def test_the_kernel_is_asked_for_partitions(server: Server, run_dir: str) -> None:
    """Whether devices for them appear is up to the kernel's configuration."""
    name = os.path.basename(attach(server.socket, "vol", run_dir, 512).device)
    assert Path(f"/sys/block/{name}/loop/partscan").read_text() == "1\n"


# --- refusals ---------------------------------------------------------------------------------------------


@needs_devices
def test_nobody_serves(tmp_path: Path, server: Server, run_dir: str) -> None:
    with pytest.raises(AttachFailed) as told:
        attach(str(tmp_path / "nowhere.sock"), "vol", run_dir, 512)
    assert_told(told.value, "vol", "nbdfuse", "No such file or directory")
    assert leftovers(run_dir) == []


@needs_devices
def test_a_failing_later_step_undoes_the_earlier_ones(
    server: Server, run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AttachFailed) as told:
        attach(server.socket, "vol", run_dir, 128 * MIB)
    assert_told(told.value, "less than one sector")
    assert leftovers(run_dir) == []
    with pytest.raises(AttachFailed) as told:
        attach(server.socket, "vol", run_dir, 500)  # no sector that losetup knows
    assert_told(told.value, "losetup")
    assert leftovers(run_dir) == []

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(attaching, "_write_record", full)
    with pytest.raises(StateDirUnusable) as unusable:
        attach(server.socket, "vol", run_dir, 512)
    assert_told(unusable.value, "No space left")
    assert leftovers(run_dir) == []


@needs_devices
def test_a_server_that_does_not_answer_is_given_up(
    server: Server, run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attaching, "READY_S", 0.3)
    server.signal(signal.SIGSTOP)
    with pytest.raises(AttachFailed) as told:
        attach(server.socket, "vol", run_dir, 512)
    assert_told(told.value, "nbdfuse", "0.3 seconds")
    assert leftovers(run_dir) == []


@needs_devices
def test_a_program_that_keeps_the_device_open_is_named(
    server: Server, run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attaching, "SETTLE_S", 0.2)
    attachment = attach(server.socket, "vol", run_dir, 512)
    with open(attachment.device, "rb") as device, subprocess.Popen(["sleep", "600"], stdin=device) as holder:
        with pytest.raises(DetachRefused) as told:
            detach(run_dir, "vol")
        holder.kill()
    assert_told(told.value, f"open in sleep (process {holder.pid})")
    assert current(run_dir, "vol") == attachment


def test_only_root_attaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(AttachNeedsRoot):
        attach("x.sock", "vol", str(tmp_path), 512)
    with pytest.raises(AttachNeedsRoot):
        detach(str(tmp_path), "vol")


@needs_devices
def test_missing_tools_name_their_package(server: Server, run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool, package in (("nbdfuse", "libnbd-bin"), ("fusermount3", "fuse3"), ("losetup", "util-linux")):
        with monkeypatch.context() as patched:
            real = shutil.which
            found = {name: real(name) for name in TOOLS if name != tool}
            patched.setattr(shutil, "which", found.get)
            with pytest.raises(AttachToolMissing) as told:
                attach(server.socket, "vol", run_dir, 512)
        assert_told(told.value, tool)
        assert package in told.value.likely_cause
    assert leftovers(run_dir) == []


def test_a_name_that_leaves_the_run_directory_is_refused(tmp_path: Path) -> None:
    for name in ("", ".", "..", "../x", "a/b", "a\0b"):
        with pytest.raises(AttachFailed):
            current(str(tmp_path), name)


@needs_devices
def test_the_owner_of_the_run_directory_can_see_that_it_is_attached(server: Server) -> None:
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o755)
        run_dir = os.path.join(open_to_all, "run")
        os.mkdir(run_dir, 0o755)
        before = os.umask(0o077)  # as hardened systems have it for root
        try:
            attachment = attach(server.socket, "vol", run_dir, 512)
        finally:
            os.umask(before)
        os.seteuid(pwd.getpwnam("nobody").pw_uid)
        try:
            seen = current(run_dir, "vol")
        finally:
            os.seteuid(0)
            assert detach(run_dir, "vol") == attachment
        assert seen == attachment


@needs_devices
def test_no_file_of_roots_is_made_or_emptied_through_a_link(
    server: Server, run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run directory may be another account's."""
    os.makedirs(run_dir)
    nologin, shadow = tmp_path / "nologin", tmp_path / "shadow"
    lock = Path(run_dir, ".attach.lock")
    lock.symlink_to(nologin)
    with pytest.raises(StateDirUnusable):
        attach(server.socket, "vol", run_dir, 512)
    assert not nologin.exists()
    lock.unlink()
    shadow.write_text("root's own")
    lock.symlink_to(shadow)
    with pytest.raises(StateDirUnusable):
        detach(run_dir, "vol")
    lock.unlink()
    for name in ("vol.fuse.log", "vol.attached.new"):
        link = Path(run_dir, name)
        with monkeypatch.context() as patched:  # made at the last moment
            patched.setattr(attaching, "_take_down", lambda *_, link=link: link.symlink_to(shadow))
            with pytest.raises(StateDirUnusable):
                attach(server.socket, "vol", run_dir, 512)
        assert shadow.read_text() == "root's own"
    assert leftovers(run_dir) == []


def test_what_is_no_record_is_none_and_is_not_waited_for(run_dir: str, tmp_path: Path) -> None:
    """The run directory may be another account's; root waited for ever for a pipe, with the lock held."""
    os.makedirs(run_dir)
    record, elsewhere = Path(run_dir, "vol.attached"), tmp_path / "elsewhere"
    elsewhere.write_text('{"device": "/dev/loop0", "mountpoint": null, "pid": null, "export": "vol"}')
    asks = f"from lockstep.service.attach import current; print(current({run_dir!r}, 'vol'))"

    def seen() -> str:
        return subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, timeout=60).stdout.strip()

    for make in (
        lambda: os.mkfifo(record),
        lambda: record.symlink_to(record),
        lambda: record.symlink_to(elsewhere),
        lambda: record.write_text("[" * 20_000),
    ):
        make()
        assert seen() == "None"
        record.unlink()
    os.mkfifo(record)
    with open(os.open(record, os.O_RDWR | os.O_NONBLOCK), "wb"):  # one that somebody writes to, and nothing comes
        assert seen() == "None"
    record.unlink()
    record.mkdir()
    assert seen() == "None"
    record.rmdir()


# --- what dies --------------------------------------------------------------------------------------------


@needs_devices
def test_a_killed_nbdfuse_is_replaced(server: Server, run_dir: str) -> None:
    first = attach(server.socket, "vol", run_dir, 512)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: current(run_dir, "vol") is None)
    second = attach(server.socket, "vol", run_dir, 512)
    assert second.pid != first.pid
    assert len(Path(second.device).read_bytes()) == 64 * MIB
    os.kill(second.pid or 0, signal.SIGKILL)
    wait_until(lambda: current(run_dir, "vol") is None)
    with pytest.raises(DetachUnflushed):  # and yet cleaned up
        detach(run_dir, "vol")
    assert leftovers(run_dir) == []


@needs_devices
def test_an_attach_that_was_killed_while_the_server_was_silent_leaves_nothing(server: Server, run_dir: str) -> None:
    def starting() -> list[str]:
        listed = subprocess.run(["pgrep", "--exact", "nbdfuse"], capture_output=True, text=True, check=False).stdout
        return [pid for pid in listed.split() if run_dir in (_text(Path(f"/proc/{pid}/cmdline")) or "")]

    server.signal(signal.SIGSTOP)
    asks = f"from lockstep.service.attach import attach; attach({server.socket!r}, 'vol', {run_dir!r}, 512)"
    with subprocess.Popen([sys.executable, "-c", asks]) as killed:
        wait_until(lambda: bool(starting()))
        killed.kill()
    with pytest.raises(NotAttached):
        detach(run_dir, "vol")
    assert starting() == []  # it would have mounted as soon as the server answers, and below whatever is attached then
    assert leftovers(run_dir) == []
    server.signal(signal.SIGCONT)
    first = attach(server.socket, "vol", run_dir, 512)
    assert detach(run_dir, "vol") == first


@needs_devices
def test_a_dead_device_that_is_still_mounted_is_not_pulled_away(server: Server, run_dir: str, mnt: str) -> None:
    first = attach(server.socket, "vol", run_dir, 512)
    run("mkfs.ext4", "-q", first.device)
    run("mount", first.device, mnt)
    os.kill(first.pid or 0, signal.SIGKILL)
    wait_until(lambda: current(run_dir, "vol") is None)
    with pytest.raises(DetachRefused) as told:
        attach(server.socket, "vol", run_dir, 512)
    assert_told(told.value, f"mounted at {mnt}")
    with pytest.raises(DetachRefused):
        detach(run_dir, "vol")
    run("umount", mnt)
    second = attach(server.socket, "vol", run_dir, 512)
    run("mount", second.device, mnt)
    run("umount", mnt)


@needs_devices
def test_a_restarted_server_gets_a_fresh_device(server: Server, run_dir: str) -> None:
    first = attach(server.socket, "vol", run_dir, 512)
    server.kill()
    server.start(0)
    second = attach(server.socket, "vol", run_dir, 512)
    assert second.pid != first.pid
    assert len(Path(second.device).read_bytes()) == 64 * MIB


@needs_devices
def test_detaching_without_a_server_says_what_is_lost(server: Server, run_dir: str) -> None:
    device = attach(server.socket, "vol", run_dir, 512).device
    fd = os.open(device, os.O_RDWR)
    os.write(fd, b"z" * 4096)
    server.kill()
    os.close(fd)
    with pytest.raises(DetachUnflushed) as told:
        detach(run_dir, "vol")
    assert_told(told.value, device, "Input/output error")
    assert leftovers(run_dir) == []


@needs_devices
def test_a_stopped_server_makes_detach_give_up_in_time(
    server: Server, run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attachment = attach(server.socket, "vol", run_dir, 512)
    monkeypatch.setattr(attaching, "FLUSH_S", 0.3)
    monkeypatch.setattr(attaching, "STEP_S", 0.3)
    server.signal(signal.SIGSTOP)
    with pytest.raises(DetachStuck) as told:
        detach(run_dir, "vol")
    assert_told(told.value, "flushing", "0.3 seconds")
    assert attach(server.socket, "vol", run_dir, 512) == attachment  # slow is not dead
    server.signal(signal.SIGCONT)
    monkeypatch.undo()
    # The flush and the read that were given up end by themselves now, and let go of the device.
    assert detach(run_dir, "vol") == attachment


@needs_devices
def test_the_pieces_are_found_without_a_record(server: Server, run_dir: str) -> None:
    attachment = attach(server.socket, "vol", run_dir, 512)
    os.unlink(os.path.join(run_dir, "vol.attached"))
    assert current(run_dir, "vol") is None
    assert detach(run_dir, "vol").device == attachment.device
    assert leftovers(run_dir) == []


@needs_devices
def test_a_record_from_before_a_reboot_harms_nobody(server: Server, run_dir: str, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    with other.open("wb") as image:
        image.truncate(MIB)
    foreign = run("losetup", "--find", "--show", str(other))
    try:
        os.makedirs(run_dir)
        old = {"device": foreign, "mountpoint": f"{run_dir}/vol.fuse", "pid": os.getpid(), "export": "vol"}
        record = Path(run_dir, "vol.attached")
        record.write_text(json.dumps(old))
        assert current(run_dir, "vol") is None
        attachment = attach(server.socket, "vol", run_dir, 512)
        assert attachment.device != foreign
        detach(run_dir, "vol")
        for content in (json.dumps(old), "{", '{"unknown": 1}', "[]"):
            record.write_text(content)
            with pytest.raises(NotAttached):  # and not that the foreign one was detached
                detach(run_dir, "vol")
            assert leftovers(run_dir) == []
        assert str(other) in run("losetup", "--noheadings", "--output", "BACK-FILE", foreign)
    finally:
        run("losetup", "-d", foreign)


# --- the choice of the way --------------------------------------------------------------------------------


def fake_kernel(monkeypatch: pytest.MonkeyPatch, *, module: bool, modprobe: bool, node: bool) -> list[list[str]]:
    """A kernel with or without the nbd driver; modprobe may load it. Returns the commands that are run."""
    loaded, commands, real = [module], [], os.path.exists

    def run_(step: str, command: list[str], timeout_s: float) -> str:
        commands.append(command)
        loaded[0] = loaded[0] or modprobe
        return ""

    def exists(path: str) -> bool:
        answers = {"/sys/module/nbd": loaded[0], "/dev/nbd0": node, "/dev/fuse": False}
        return answers[path] if path in answers else real(path)

    monkeypatch.setattr(os.path, "exists", exists)
    monkeypatch.setattr(attaching, "_run", run_)
    return commands


@pytest.mark.parametrize(
    ("module", "modprobe", "node", "chosen"),
    [
        (True, False, True, True),
        (False, True, True, True),
        (False, False, True, False),
        (True, False, False, False),
        (False, True, False, False),
    ],
)
def test_nbd_is_chosen_where_the_kernel_has_it(
    monkeypatch: pytest.MonkeyPatch, module: bool, modprobe: bool, node: bool, chosen: bool
) -> None:
    commands = fake_kernel(monkeypatch, module=module, modprobe=modprobe, node=node)
    assert attaching._kernel_speaks_nbd() is chosen
    assert commands == ([] if module else [["modprobe", "--quiet", "nbd"]])


def test_neither_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    fake_kernel(monkeypatch, module=False, modprobe=False, node=False)
    with pytest.raises(FuseMissing):
        attach("x.sock", "vol", str(tmp_path / "run"), 512)


def test_the_first_free_nbd_device_is_connected_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nbd0 has a process, nbd1 a size, nbd2 is free; nbd10 would sort before nbd2 by name."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    pids: dict[str, int] = {"/dev/nbd0": 77}
    sizes = {"/dev/nbd1": 8}
    commands = fake_kernel(monkeypatch, module=True, modprobe=False, node=True)

    def run_(step: str, command: list[str], timeout_s: float) -> str:
        commands.append(command)
        if command[1] == "-unix":
            pids[command[3]], sizes[command[3]] = 4711, 2048
        elif command[1] == "-d":
            del pids[command[2]], sizes[command[2]]
        return ""

    def names(pattern: str) -> list[Path]:
        return [Path(f"/sys/block/nbd{number}") for number in (0, 1, 10, 2)] if pattern == "nbd*" else []

    monkeypatch.setattr(attaching, "_run", run_)
    monkeypatch.setattr(attaching, "_nbd_pid", pids.get)
    monkeypatch.setattr(attaching, "_size_sectors", lambda device: sizes.get(device, 0))
    monkeypatch.setattr(attaching, "_require_unused", lambda device, export: None)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(names(pattern)))

    run_dir = str(tmp_path / "run")
    attachment = attach("/run/vol.sock", "vol", run_dir, 4096)
    assert attachment == Attachment("/dev/nbd2", None, 4711, "vol")
    assert commands == [["nbd-client", "-unix", "/run/vol.sock", "/dev/nbd2", "-name", "vol", "-block-size", "4096"]]
    assert attach("/run/vol.sock", "vol", run_dir, 4096) == attachment  # after a read that went through
    assert detach(run_dir, "vol") == attachment
    assert commands[-2:] == [["sync", "/dev/nbd2"], ["nbd-client", "-d", "/dev/nbd2"]]
    assert pids == {"/dev/nbd0": 77}
    assert leftovers(run_dir) == []

    def overtaken(step: str, command: list[str], timeout_s: float) -> str:
        pids["/dev/nbd2"], sizes["/dev/nbd2"] = 99, 2048  # in another state directory, which has a lock of its own
        if command[1] == "-d":
            del pids[command[2]]
        raise attaching._StepFailed(step, "Failed to setup device, check dmesg")

    monkeypatch.setattr(attaching, "_run", overtaken)
    with pytest.raises(AttachFailed) as told:
        attach("/run/vol.sock", "vol", run_dir, 4096)
    assert_told(told.value, "check dmesg")
    assert pids == {"/dev/nbd0": 77, "/dev/nbd2": 99}
    pids["/dev/nbd10"] = 1
    with pytest.raises(AttachFailed) as told:
        attach("/run/vol.sock", "vol", run_dir, 4096)
    assert_told(told.value, "every /dev/nbdN is taken")
