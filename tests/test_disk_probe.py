"""What a path is, as a disk; who uses it; what it shares; and the lock on it. On real files, loop devices, QEMU."""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lockstep.disk import lock, probe
from lockstep.disk.transfer import Promptness
from lockstep.errors import (
    DiskBusy,
    DiskChanged,
    DiskForbidden,
    DiskLocked,
    DiskMissing,
    DiskReadOnly,
    DiskToolMissing,
    LockstepError,
    NotADisk,
)

MIB = 1 << 20

needs_loop = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="loop devices need root and the loop driver"
)
needs_qemu = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def wait_until(holds: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., str]:
    def make(name: str = "disk.img", size_bytes: int = 16 * MIB) -> str:
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(size_bytes)
        return str(path)

    return make


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., str]]:
    points: list[str] = []

    def make(device: str, name: str = "mount point") -> str:
        point = str(tmp_path / f"{name} {len(points)}")
        os.mkdir(point)
        run("mount", device, point)
        points.append(point)
        return point

    yield make
    for point in reversed(points):
        subprocess.run(["umount", point], capture_output=True, check=False)


def assert_refused(error: LockstepError, kind: type[LockstepError], *words: str) -> None:
    assert type(error) is kind
    assert error.likely_cause
    assert error.advice
    for word in words:
        assert word in str(error)


# --- what it is -------------------------------------------------------------------------------------------


def test_a_file_is_a_disk_of_512_byte_sectors(image: Callable[..., str]) -> None:
    path = image(size_bytes=1_000_001)
    disk = probe.inspect(path)
    found = os.stat(path)
    assert (disk.path, disk.is_block, disk.size_bytes, disk.logical_sector_bytes) == (path, False, 1_000_001, 512)
    assert (disk.device, disk.inode) == (found.st_dev, found.st_ino)


def test_a_relative_path_becomes_absolute(image: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = image()
    monkeypatch.chdir(os.path.dirname(path))
    assert probe.inspect("disk.img").path == path


@needs_loop
def test_a_block_device_has_its_own_sector_and_number(image: Callable[..., str], loop: Callable[..., str]) -> None:
    device = loop(image(), "--sector-size=4096")
    disk = probe.inspect(device)
    assert (disk.is_block, disk.size_bytes, disk.logical_sector_bytes) == (True, 16 * MIB, 4096)
    assert (disk.device, disk.inode) == (os.stat(device).st_rdev, 0)


def test_what_is_missing_or_no_disk_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    for name in ("nowhere", "dangling", "nowhere/below"):
        with pytest.raises(DiskMissing) as missing:
            probe.inspect(str(tmp_path / name))
        assert_refused(missing.value, DiskMissing, name)
    for path, kind in ((tmp_path, "directory"), (tmp_path / "fifo", "pipe"), (Path("/dev/null"), "character device")):
        with pytest.raises(NotADisk) as refused:
            probe.inspect(str(path))
        assert_refused(refused.value, NotADisk, kind)


def test_an_unreadable_file_is_refused(image: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")  # root is never refused by the mode

    path = image()
    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(DiskForbidden) as refused:
        probe.inspect(path)
    assert_refused(refused.value, DiskForbidden, path, "Permission denied")


def test_opening_checks_that_it_is_still_the_same_disk(image: Callable[..., str]) -> None:
    path = image()
    disk = probe.inspect(path)
    fd = probe.open_disk(disk, writable=True)
    assert os.get_inheritable(fd) is False
    os.close(fd)
    os.rename(image("other.img"), path)
    with pytest.raises(DiskChanged):
        probe.open_disk(disk, writable=False)
    os.unlink(path)
    with pytest.raises(DiskMissing):
        probe.open_disk(disk, writable=False)


@needs_loop
def test_a_read_only_device_is_named_as_such(image: Callable[..., str], loop: Callable[..., str]) -> None:
    disk = probe.inspect(loop(image(), "--read-only"))
    with pytest.raises(DiskReadOnly):
        probe.open_disk(disk, writable=True)
    os.close(probe.open_disk(disk, writable=False))


@needs_loop
def test_a_block_device_has_one_writer(image: Callable[..., str], loop: Callable[..., str]) -> None:
    disk = probe.inspect(loop(image()))
    fd = probe.open_disk(disk, writable=True)
    with pytest.raises(DiskBusy) as refused:
        probe.open_disk(disk, writable=True)
    assert_refused(refused.value, DiskBusy, "another program has claimed it")
    os.close(fd)


# --- what it carries --------------------------------------------------------------------------------------


def test_every_signature_is_listed(image: Callable[..., str]) -> None:
    path = image()
    disk = probe.inspect(path)
    assert probe.signatures(disk) == ()
    run("mkfs.ext4", "-q", path)
    assert probe.signatures(disk) == ("ext4 file system",)
    with open(path, "r+b") as file:  # a partition table that contradicts the file system
        file.seek(446)
        file.write(bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + (4096).to_bytes(4, "little"))
        file.seek(510)
        file.write(b"\x55\xaa")
    assert set(probe.signatures(disk)) == {"ext4 file system", "dos partition table"}


def test_swap_and_luks_are_recognised(image: Callable[..., str]) -> None:
    swap = image("swap.img")
    os.chmod(swap, 0o600)
    run("mkswap", "-q", swap)
    assert probe.signatures(probe.inspect(swap)) == ("swap space",)
    if shutil.which("cryptsetup"):
        luks = image("luks.img", 20 * MIB)
        subprocess.run(
            ["cryptsetup", "luksFormat", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", luks, "-"],
            input=b"x",
            check=True,
        )
        assert probe.signatures(probe.inspect(luks)) == ("crypto_LUKS",)


def test_a_missing_tool_names_its_package(image: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    disk = probe.inspect(image())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DiskToolMissing) as refused:
        probe.signatures(disk)
    assert_refused(refused.value, DiskToolMissing, "wipefs")
    assert "util-linux" in refused.value.advice


@pytest.mark.parametrize(
    ("position", "held"), [(0, True), (MIB - 1, True), (MIB, False), (9 * MIB - 1, False), (-1, True), (-MIB, True)]
)
def test_data_without_a_signature_is_noticed_at_both_ends(image: Callable[..., str], position: int, held: bool) -> None:
    path = image(size_bytes=10 * MIB)
    with open(path, "r+b") as file:
        file.seek(position, os.SEEK_END if position < 0 else os.SEEK_SET)
        file.write(b"\x01")
    assert probe.holds_data(probe.inspect(path)) is held


def test_an_empty_or_tiny_disk(image: Callable[..., str]) -> None:
    assert probe.holds_data(probe.inspect(image(size_bytes=0))) is False
    path = image(size_bytes=3)
    assert probe.holds_data(probe.inspect(path)) is False
    Path(path).write_bytes(b"abc")
    assert probe.holds_data(probe.inspect(path)) is True


# --- who uses it ------------------------------------------------------------------------------------------


@needs_loop
def test_a_mounted_device_and_its_file_are_in_use(
    image: Callable[..., str], loop: Callable[..., str], mount: Callable[[str], str]
) -> None:
    path = image()
    run("mkfs.ext4", "-q", path)
    os.link(path, path + ".hard")
    file, linked = probe.inspect(path), probe.inspect(path + ".hard")
    assert probe.users_of(file) == ()
    device = loop(path)
    disk = probe.inspect(device)
    assert probe.users_of(disk) == ()
    assert probe.users_of(file) == probe.users_of(linked) == (f"backing file of {device}",)
    os.close(probe.open_disk(disk, writable=True))
    point = mount(device)
    assert probe.users_of(disk) == (f"mounted at {point}",)
    with pytest.raises(DiskBusy) as refused:
        probe.open_disk(disk, writable=True)
    assert_refused(refused.value, DiskBusy, device, f"mounted at {point}")


@needs_loop
def test_a_mounted_device_is_in_use_through_another_loop_device(
    image: Callable[..., str], loop: Callable[..., str], mount: Callable[[str], str]
) -> None:
    path = image()
    run("mkfs.ext4", "-q", path)
    device = loop(path)
    twin, above = probe.inspect(loop(path)), probe.inspect(loop(device))
    assert probe.users_of(twin) == probe.users_of(above) == ()
    point = mount(device)
    for disk in (twin, above):
        assert probe.users_of(disk) == (f"its data is on {device}, mounted at {point}",)
        with pytest.raises(DiskBusy):
            probe.refuse_busy(disk)


@needs_loop
def test_what_others_mount_may_have_any_name(
    image: Callable[..., str], loop: Callable[..., str], mount: Callable[..., str]
) -> None:
    name = os.fsdecode("no-break\u00a0space, line\u2028separator, ".encode() + b"caf\xe9 in Latin-1")
    path = image(name)
    run("mkfs.ext4", "-q", path)
    device = loop(path)
    point = mount(device, name)
    assert probe.users_of(probe.inspect(device)) == (f"mounted at {point}",)
    assert point in probe.mounted_paths()
    bystander = image("bystander")
    assert probe.users_of(probe.inspect(bystander)) == ()
    fd = os.open("/dev/shm", os.O_RDWR | os.O_TMPFILE)
    try:
        assert Promptness(fd).flags == 0, "it is memory"
    finally:
        os.close(fd)


@needs_loop
def test_a_deleted_backing_file_is_found_by_its_other_name(image: Callable[..., str], loop: Callable[..., str]) -> None:
    path = image()
    os.link(path, path + ".hard")
    device = loop(path)
    os.unlink(path)
    assert probe.users_of(probe.inspect(path + ".hard")) == (f"backing file of {device}",)


def test_partitions_and_holders_are_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk 8:16 with a mounted partition and a held one, laid out as the kernel does."""
    numbers = {"sdb": 16, "sdb1": 17, "sdb2": 18}
    for name, minor in numbers.items():
        directory = tmp_path / "sdb" / ("" if name == "sdb" else name)
        (directory / "holders").mkdir(parents=True)
        (directory / "slaves").mkdir()
        (directory / "dev").write_text(f"8:{minor}\n")
        if name != "sdb":
            (directory / "partition").write_text(name[-1])
    (tmp_path / "sdb/sdb2/holders/dm-0").mkdir()
    places = {os.makedev(8, minor): name for name, minor in numbers.items()}
    real = probe._sysfs
    monkeypatch.setattr(
        probe,
        "_sysfs",
        lambda device: (
            str(tmp_path / "sdb" / (places[device] if places[device] != "sdb" else "")).rstrip("/")
            if device in places
            else real(device)
        ),
    )
    monkeypatch.setattr(probe, "_mount_points", lambda device: iter(["/boot"] if device == os.makedev(8, 17) else []))

    def disk(name: str) -> probe.Disk:
        return probe.Disk(f"/dev/{name}", f"/dev/{name}", True, MIB, 512, os.makedev(8, numbers[name]), 0)

    assert probe.users_of(disk("sdb")) == (
        "its partition sdb1 is mounted at /boot",
        "its partition sdb2 is held by dm-0",
    )
    assert probe.users_of(disk("sdb1")) == ("mounted at /boot",)
    (tmp_path / "sdb/holders/md0").mkdir()
    assert probe.users_of(disk("sdb1")) == ("mounted at /boot", "its disk sdb is held by md0")
    assert probe.overlap(disk("sdb1"), disk("sdb")) == "/dev/sdb1 is a partition of /dev/sdb"
    assert probe.overlap(disk("sdb"), disk("sdb1")) == "/dev/sdb1 is a partition of /dev/sdb"
    assert probe.overlap(disk("sdb1"), disk("sdb2")) is None


_ODD_NAMES = r"""
import os, subprocess, sys
from lockstep.disk import probe

home, image, device = sys.argv[1:]
os.chdir(home)
points = [os.path.join(home, os.fsdecode(name)) for name in (b"\xff", "\u2028".encode(), b"\x0c", "a\u00a0b".encode())]
for point in points:
    os.mkdir(point)
    subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True)
with open("shown", "wb") as shown:
    shown.write(b"/tmp/\xff.img\n")
subprocess.run(["mount", "--bind", "shown", f"/sys/block/{device[5:]}/loop/backing_file"], check=True)
with open("/proc/self/comm", "wb") as comm:
    comm.write(b"a\xc3")
assert probe.mounted_paths() >= set(points)
assert probe.users_of(probe.inspect(image)) == (f"backing file of {device}",)
assert probe.users_of(probe.inspect(device)) == ()
assert probe.process_name(os.getpid()) == f"a\udcc3 (process {os.getpid()})"
"""


@needs_loop
def test_what_others_have_given_odd_names_keeps_nobody_from_looking(
    image: Callable[..., str], loop: Callable[..., str], tmp_path: Path
) -> None:
    below = image()
    run("unshare", "--mount", sys.executable, "-c", _ODD_NAMES, str(tmp_path), below, loop(below))


@needs_loop
def test_a_program_that_has_the_device_open_is_named(image: Callable[..., str], loop: Callable[..., str]) -> None:
    disk = probe.inspect(loop(image()))
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as idle:
        assert not any(f"process {idle.pid}" in phrase for phrase in probe.opened_by(disk))
    with open(disk.path, "rb") as device, subprocess.Popen(["sleep", "600"], stdin=device) as holder:
        try:
            assert f"open in sleep (process {holder.pid})" in probe.opened_by(disk)
        finally:
            holder.kill()


# --- what it shares ---------------------------------------------------------------------------------------


def test_links_to_one_file_are_the_same_file(image: Callable[..., str]) -> None:
    path, other = image(), image("other.img")
    os.link(path, path + ".hard")
    os.symlink(path, path + ".soft")
    for name in (path, path + ".hard", path + ".soft"):
        assert probe.overlap(probe.inspect(path), probe.inspect(name)) == "the same file"
    assert probe.overlap(probe.inspect(path), probe.inspect(other)) is None


@needs_loop
def test_a_chain_of_loop_devices_overlaps_all_the_way_down(
    image: Callable[..., str], loop: Callable[..., str], tmp_path: Path
) -> None:
    path = image()
    lower = loop(path)
    upper = loop(lower)
    file, below, above = probe.inspect(path), probe.inspect(lower), probe.inspect(upper)
    alias = tmp_path / "alias"
    os.mknod(alias, 0o600 | stat.S_IFBLK, below.device)
    assert probe.overlap(below, file) == probe.overlap(file, below) == f"{lower} is a loop device over {path}"
    assert probe.overlap(above, below) == f"{upper} is a loop device over {lower}"
    assert probe.overlap(file, above) == f"{upper} is a loop device over {path}"
    assert probe.overlap(below, probe.inspect(lower)) == "the same block device"
    assert probe.overlap(above, probe.inspect(loop(image("other.img")))) is None
    with suppress(DiskForbidden):  # a file system mounted with nodev
        assert probe.overlap(probe.inspect(str(alias)), below) == "the same block device"


@needs_loop
def test_a_file_on_the_file_system_of_a_disk_overlaps_it(
    image: Callable[..., str], loop: Callable[..., str], mount: Callable[[str], str]
) -> None:
    path = image()
    run("mkfs.ext4", "-q", path)
    device = loop(path)
    inner = os.path.join(mount(device), "mirror.img")
    with open(inner, "wb") as file:
        file.truncate(MIB)
    assert (
        probe.overlap(probe.inspect(device), probe.inspect(inner))
        == f"{inner} is stored in the file system on {device}"
    )
    assert probe.overlap(probe.inspect(inner), probe.inspect(path)) == f"{inner} is stored on {path}"


# --- the lock ---------------------------------------------------------------------------------------------

LOCKER = """
import sys
from lockstep.disk import lock, probe
disk = probe.inspect(sys.argv[1])
fd = probe.open_disk(disk, writable=True)
getattr(lock, "lock_" + sys.argv[2])(fd, disk)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def locker() -> Iterator[Callable[[str, str], int]]:
    children: list[subprocess.Popen[str]] = []

    def start(path: str, kind: str) -> int:
        command = [sys.executable, "-c", LOCKER, path, kind]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        return child.pid

    yield start
    for child in children:
        child.kill()
        child.communicate()


@pytest.mark.parametrize(
    ("held", "wanted"), [("exclusive", "exclusive"), ("exclusive", "shared"), ("shared", "exclusive")]
)
def test_a_second_process_is_refused_and_told_by_whom(
    image: Callable[..., str], locker: Callable[[str, str], int], held: str, wanted: str
) -> None:
    path = image()
    pid = locker(path, held)
    disk = probe.inspect(path)
    fd = probe.open_disk(disk, writable=True)
    with pytest.raises(DiskLocked) as refused:
        getattr(lock, f"lock_{wanted}")(fd, disk)
    assert_refused(refused.value, DiskLocked, path, f"(process {pid})")
    os.close(fd)


@needs_loop
@pytest.mark.parametrize(
    ("held", "wanted", "allowed"),
    [
        ("exclusive", "exclusive", False),
        ("exclusive", "shared", False),
        ("shared", "exclusive", False),
        ("shared", "shared", True),
    ],
)
def test_a_lock_on_the_file_below_a_chain_of_loop_devices_is_respected(
    image: Callable[..., str],
    loop: Callable[..., str],
    locker: Callable[[str, str], int],
    held: str,
    wanted: str,
    allowed: bool,
) -> None:
    path = image()
    disk = probe.inspect(loop(loop(path)))
    pid = locker(path, held)
    fd = probe.open_disk(disk, writable=wanted == "exclusive")
    if allowed:
        getattr(lock, f"lock_{wanted}")(fd, disk)
    else:
        with pytest.raises(DiskLocked) as refused:
            getattr(lock, f"lock_{wanted}")(fd, disk)
        assert_refused(refused.value, DiskLocked, disk.path, f"(process {pid})", path)
        again = os.open(disk.path, os.O_RDWR)
        lock._set(again, fcntl.F_WRLCK, lock._EVERYTHING)  # what was refused holds nothing
        os.close(again)
    os.close(fd)


@needs_loop
def test_a_lock_of_our_own_on_the_file_below_does_not_count(
    image: Callable[..., str], loop: Callable[..., str]
) -> None:
    path = image()
    below = probe.inspect(path)
    file = probe.open_disk(below, writable=True)
    lock.lock_exclusive(file, below)
    disk = probe.inspect(loop(path))
    fd = probe.open_disk(disk, writable=True)
    lock.lock_exclusive(fd, disk)
    os.close(fd)
    os.close(file)


@needs_loop
def test_a_writer_of_a_block_device_is_noticed_through_another_node(
    image: Callable[..., str], loop: Callable[..., str], tmp_path: Path
) -> None:
    """As a container has one: the inode is another, and so are the locks."""
    disk, node = probe.inspect(loop(image())), str(tmp_path / "node")
    os.mknod(node, 0o600 | stat.S_IFBLK, disk.device)
    other = probe.inspect(node)
    writer = probe.open_disk(disk, writable=True)
    lock.lock_exclusive(writer, disk)
    fd = probe.open_disk(other, writable=False)
    with pytest.raises(DiskBusy):
        lock.lock_shared(fd, other)
    os.close(writer)
    lock.lock_shared(fd, other)
    reader = probe.open_disk(disk, writable=False)
    lock.lock_shared(reader, disk)
    os.close(reader)
    os.close(fd)


@needs_loop
def test_two_loop_devices_over_one_file_are_one_disk(
    image: Callable[..., str], loop: Callable[..., str], locker: Callable[[str, str], int]
) -> None:
    path = image()
    one, other = (probe.inspect(loop(path)) for _ in range(2))
    assert probe.overlap(one, other) == f"{one.path} is a loop device over the same as {other.path}"
    locker(one.path, "exclusive")
    fd = probe.open_disk(other, writable=True)
    with pytest.raises(DiskLocked) as refused:
        lock.lock_exclusive(fd, other)
    assert_refused(refused.value, DiskLocked, other.path, one.path)
    os.close(fd)


@needs_loop
def test_two_loop_devices_over_parts_of_one_file_are_two_disks(
    image: Callable[..., str], loop: Callable[..., str]
) -> None:
    path = image()
    first = probe.inspect(loop(path, "--sizelimit", "64K"))
    rest, all_of_it = probe.inspect(loop(path, "--offset", "64K")), probe.inspect(loop(path))
    assert probe.overlap(first, rest) is None
    assert probe.overlap(all_of_it, rest)
    assert probe.overlap(first, all_of_it)


def test_readers_share_and_other_descriptors_do_not_drop_the_lock(
    image: Callable[..., str], locker: Callable[[str, str], int]
) -> None:
    path = image()
    disk = probe.inspect(path)
    locker(path, "shared")
    fd = probe.open_disk(disk, writable=False)
    lock.lock_shared(fd, disk)
    os.close(fd)
    other = image("other.img")
    mine = probe.inspect(other)
    first, second = (probe.open_disk(mine, writable=True) for _ in range(2))
    lock.lock_exclusive(first, mine)
    lock.lock_exclusive(first, mine)
    probe.inspect(other)  # opens and closes the file: a POSIX lock would be gone now
    with pytest.raises(DiskLocked):
        lock.lock_exclusive(second, mine)
    os.close(first)
    lock.lock_exclusive(second, mine)
    os.close(second)


@needs_qemu
@pytest.mark.parametrize(
    ("ours", "theirs", "allowed"),
    [("exclusive", "write", False), ("exclusive", "read", False), ("shared", "write", False), ("shared", "read", True)],
)
def test_qemu_respects_our_locks(image: Callable[..., str], ours: str, theirs: str, allowed: bool) -> None:
    disk = probe.inspect(image())
    fd = probe.open_disk(disk, writable=ours == "exclusive")
    command = ["qemu-io", "-f", "raw", *(["-r"] if theirs == "read" else []), "-c", f"{theirs} 0 512", disk.path]
    getattr(lock, f"lock_{ours}")(fd, disk)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is allowed
    assert allowed or "lock" in done.stderr
    os.close(fd)
    run(*command)


@needs_qemu
@pytest.mark.parametrize(
    ("theirs", "ours", "allowed"),
    [("write", "exclusive", False), ("read", "exclusive", False), ("write", "shared", False), ("read", "shared", True)],
)
def test_we_respect_the_locks_of_qemu(image: Callable[..., str], theirs: str, ours: str, allowed: bool) -> None:
    disk = probe.inspect(image())
    fd = probe.open_disk(disk, writable=True)
    take = getattr(lock, f"lock_{ours}")
    command = ["qemu-io", "-f", "raw", *(["-r"] if theirs == "read" else []), "-c", "sleep 600000", disk.path]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as qemu:
        try:
            wait_until(lambda: lock._has_lock(qemu.pid, disk.inode, disk.device))
            if allowed:
                take(fd, disk)
            else:
                with pytest.raises(DiskLocked) as refused:
                    take(fd, disk)
                assert_refused(refused.value, DiskLocked, f"qemu-io (process {qemu.pid})")
        finally:
            qemu.kill()
    lock.lock_exclusive(fd, disk)
    os.close(fd)


@pytest.mark.skipif(shutil.which("cryptsetup") is None, reason="cryptsetup is not installed")
def test_cryptsetup_works_on_what_we_locked(image: Callable[..., str]) -> None:
    path = image(size_bytes=20 * MIB)
    disk = probe.inspect(path)
    fd = probe.open_disk(disk, writable=True)
    lock.lock_exclusive(fd, disk)
    command = ["cryptsetup", "luksFormat", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", path, "-"]
    subprocess.run(command, input=b"x", check=True)
    assert "LUKS header" in run("cryptsetup", "luksDump", path)
    os.close(fd)
