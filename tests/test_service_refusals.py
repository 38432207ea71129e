"""`lockstep serve` refuses what it must not touch: a clear sentence, the exit code, and nothing has changed.

Every refusal is checked the same way: the expected error of the catalogue is written down with its data, so class,
three texts and exit code are compared together; and everything below the lab's directory (targets, mirrors, headers,
registry, region records, sockets) is the same before and after, bytes, modes and times of change.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from lockstep.cli.options import passphrase_from
from lockstep.cli.screen import Listing
from lockstep.errors import (
    AddressInvalid,
    AddressUnusable,
    AlreadyServed,
    DiskBusy,
    DiskLocked,
    DiskReadOnly,
    EmptyPassphrase,
    GroupUnknown,
    HeaderDamaged,
    HeaderUnreadable,
    KeyFileUnreadable,
    LockstepError,
    MirrorOfAnotherVolume,
    MirrorTruncated,
    NoKeySlots,
    NotADisk,
    NotLuks2,
    NoToken,
    PassphraseMissing,
    PassphraseNotText,
    RegistryUnreadable,
    SocketUnusable,
    StateDirUnusable,
    TargetGone,
    TargetResized,
    TcpMissing,
    TlsDirUnusable,
    TlsRequired,
    ValueEmpty,
    VolumeUnknown,
    WrongPassphrase,
)
from lockstep.service.serve import parse_tcp
from lockstep.service.state import State
from tests.forks import ForkLab
from tests.lab import MIB, PASSPHRASE, Lab, Result, Volume, run, wait_until

SIZE_BYTES = 4 * MIB
MISSING = "No such file or directory"

needs_devices = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="needs root and loop devices"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


# --- the stage --------------------------------------------------------------------------------------------


class Scene:
    """Three volumes that were served once, brought in sync and stopped in order."""

    def __init__(self, home: Path) -> None:
        self.lab = ForkLab(home)
        content = b"the target's first sectors".ljust(64) * 1024
        self.inline = self.lab.volume("inline", SIZE_BYTES, content=content)
        self.detached = self.lab.volume("detached", 3_000_001, header=True, content=content)
        self.other = self.lab.volume("other", SIZE_BYTES)
        for volume in (self.inline, self.detached):
            with volume.served():
                pass

    def serve(self, volume: Volume | str, *options: object, key: Path | None = None, stdin: bytes = b"") -> Result:
        name = volume if isinstance(volume, str) else volume.name
        return self.lab.lockstep("serve", name, "--key-file", key or self.lab.key, *options, stdin=stdin)

    def refuses(self, error: LockstepError, volume: Volume | str, *options: object, key: Path | None = None) -> None:
        """`lockstep serve` ends with this error, and nothing has changed."""
        before = everything_below(self.lab.home)
        result = self.serve(volume, *options, key=key)
        assert_error(result, error)
        assert everything_below(self.lab.home) == before


def assert_error(result: Result, error: LockstepError) -> None:
    """Class, sentences and exit code, together."""
    report = f"lockstep: {error}\n  Likely cause: {error.likely_cause}\n  Next step:    {error.advice}\n"
    assert result.err.endswith(report), (result.err, report)
    assert "Traceback" not in result.err
    assert "Warning: " not in result.err, result.err
    assert result.code == error.exit_code, result.err
    assert "ready" not in result.out


def everything_below(directory: Path) -> dict[str, tuple[object, ...]]:
    """Each file's kind, mode, time of change and content."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(directory.rglob("*")):
        seen = path.lstat()
        content = ""
        if stat.S_ISREG(seen.st_mode):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        # A directory's own times change with every socket that comes and goes.
        times = 0 if stat.S_ISDIR(seen.st_mode) else seen.st_mtime_ns
        found[str(path.relative_to(directory))] = (seen.st_mode, seen.st_size, times, content)
    return found


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("refusals"))


@contextlib.contextmanager
def away(path: Path) -> Iterator[Path]:
    """The file has another name meanwhile, and is put back, whatever has been put in its place."""
    hidden = path.with_name(path.name + ".hidden")
    path.rename(hidden)
    try:
        yield hidden
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.rmdir() if path.is_dir() else path.unlink()
        hidden.rename(path)


@contextlib.contextmanager
def stand_in(path: Path, source: Path | None = None) -> Iterator[Path]:
    """A copy of `source` (of the file itself) is in the file's place meanwhile, to be changed at will."""
    with away(path) as hidden:
        shutil.copyfile(source or hidden, path)
        yield path


@contextlib.contextmanager
def mounted(*command: str) -> Iterator[None]:
    run("mount", *command)
    try:
        yield
    finally:
        subprocess.run(["umount", command[-1]], check=False, capture_output=True)


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """A file or directory that takes no writes, not even root's."""
    with mounted("--bind", str(path), str(path)):
        run("mount", "-o", "remount,ro,bind", str(path))
        yield


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# --- passphrases ------------------------------------------------------------------------------------------


def test_a_wrong_passphrase(scene: Scene, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_bytes(PASSPHRASE + b"\n")  # a key file counts whole
    scene.refuses(WrongPassphrase(path=scene.inline.mirror), scene.inline, key=wrong)
    assert scene.detached.header is not None
    scene.refuses(WrongPassphrase(path=scene.detached.header), scene.detached, key=wrong)


def test_an_empty_passphrase(scene: Scene) -> None:
    scene.refuses(EmptyPassphrase(), scene.inline, key=Path("/dev/null"))
    scene.refuses(EmptyPassphrase(), scene.inline, key=Path("-"))  # nothing arrives on standard input


def test_no_passphrase_at_all(scene: Scene, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    scene.refuses(KeyFileUnreadable(path=nowhere, reason=MISSING), scene.inline, key=nowhere)
    before = everything_below(scene.lab.home)
    result = scene.lab.lockstep("serve", "inline")
    assert_error(result, PassphraseMissing(what="the mirror of inline"))
    assert result.code == 2
    assert everything_below(scene.lab.home) == before


# --- mirrors ----------------------------------------------------------------------------------------------


def test_a_header_that_is_not_there(scene: Scene) -> None:
    header = scene.detached.header
    assert header is not None
    with away(header):
        scene.refuses(HeaderUnreadable(path=header, reason=MISSING), scene.detached)


def test_a_truncated_mirror(scene: Scene) -> None:
    whole = SIZE_BYTES + 16 * MIB
    with stand_in(scene.inline.mirror) as mirror:
        os.truncate(mirror, whole - 1)
        scene.refuses(MirrorTruncated(path=mirror, size_bytes=whole - 1, needed_bytes=whole), scene.inline)
    with stand_in(scene.inline.mirror) as mirror:
        os.truncate(mirror, 8192)  # within the header
        result = scene.serve(scene.inline)
        assert result.code == 1
        result.failed(1, str(mirror))


def test_a_damaged_first_copy_of_the_header_is_no_obstacle(scene: Scene) -> None:
    overwrite(scene.inline.mirror, 4096, b"\xff" * 512)
    with scene.inline.served():
        pass
    scene.inline.assert_equal_disks()


def test_both_copies_of_the_header_damaged(scene: Scene) -> None:
    with stand_in(scene.inline.mirror) as mirror:
        overwrite(mirror, 4096, b"\xff" * 512)
        overwrite(mirror, 0x4000 + 4096, b"\xff" * 512)
        error = HeaderDamaged(path=mirror, reason="no copy of it has the right checksum")
        scene.refuses(error, scene.inline)
    with stand_in(scene.inline.mirror) as mirror:
        overwrite(mirror, 0, bytes(1 * MIB))
        scene.refuses(NotLuks2(path=mirror), scene.inline)


def test_a_mirror_whose_keys_were_erased(scene: Scene) -> None:
    with stand_in(scene.inline.mirror) as mirror:
        run("cryptsetup", "luksErase", "--batch-mode", str(mirror))
        scene.refuses(NoKeySlots(path=mirror), scene.inline)


def test_the_mirror_of_another_volume(scene: Scene) -> None:
    with stand_in(scene.inline.mirror, scene.other.mirror) as mirror:
        error = MirrorOfAnotherVolume(path=mirror, volume="inline", owner="the volume other")
        scene.refuses(error, scene.inline)


def test_a_mirror_that_got_another_uuid(scene: Scene) -> None:
    new = str(uuid.uuid4())
    with stand_in(scene.inline.mirror) as mirror:
        run("cryptsetup", "luksUUID", "--batch-mode", "--uuid", new, str(mirror))
        owner = f"another mirror of inline (LUKS UUID {new})"
        scene.refuses(MirrorOfAnotherVolume(path=mirror, volume="inline", owner=owner), scene.inline)
        assert "is not the mirror of inline" in scene.lab.lockstep("status", "inline").ok()


def test_a_mirror_that_somebody_formatted_anew(scene: Scene) -> None:
    cheap = ["--batch-mode", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", f"--key-file={scene.lab.key}"]
    with stand_in(scene.inline.mirror) as mirror:
        run("cryptsetup", "luksFormat", "--type=luks2", *cheap, str(mirror))
        scene.refuses(NoToken(path=mirror), scene.inline)
    with stand_in(scene.inline.mirror) as mirror:
        run("wipefs", "--all", str(mirror))
        run("cryptsetup", "luksFormat", "--type=luks1", *cheap, str(mirror))
        scene.refuses(NotLuks2(path=mirror), scene.inline)
    for program in (["mkfs.ext4", "-q", "-F"], ["mkswap", "-q"]):
        with stand_in(scene.inline.mirror) as mirror:
            run(*program, str(mirror))
            scene.refuses(NotLuks2(path=mirror), scene.inline)


def test_a_new_signature_in_front_of_an_old_header(scene: Scene) -> None:
    """The second copy of the header alone must not bring back to life what somebody else uses by now."""
    with stand_in(scene.inline.mirror) as mirror, stand_in(scene.other.target) as swap:
        run("mkswap", "-q", str(swap))
        overwrite(mirror, 0, swap.read_bytes()[:4096])
        before = everything_below(scene.lab.home)
        result = scene.serve(scene.inline)
        result.failed(1, f"The LUKS2 header in {mirror} is damaged: ", "signature")
        assert everything_below(scene.lab.home) == before


@needs_root
def test_a_header_that_takes_no_writes(scene: Scene) -> None:
    """It is found when the mirror is claimed; what was known of the mirror must outlive that."""
    header = scene.detached.header
    assert header is not None
    before = everything_below(scene.lab.home)
    with read_only(header), scene.detached.served(in_sync=False) as served:
        assert served.mirror_state() == "degraded"
        assert "claiming the mirror failed" in served.mirror()["error"]
        wait_until(lambda: "cannot be followed again yet" in served.log.read_text(), "the mirror to be looked for")
        assert served.mirror()["error"].count("could not write the token") == 1, "the same reason is told once"
    after = everything_below(scene.lab.home)
    for disk in ("detached.target", "detached.mirror", "detached.header"):
        assert after[disk] == before[disk]
    (described,) = json.loads(scene.lab.lockstep("status", "detached", "--json").ok())["volumes"]
    (mirror,) = described["mirrors"]
    assert (mirror["state"], mirror["dirty_bytes"]) == ("in-sync", 0), "the next start would copy all, for nothing"


# --- targets ----------------------------------------------------------------------------------------------


def test_a_target_that_is_not_there_or_no_disk(scene: Scene) -> None:
    target = scene.inline.target
    with away(target):
        scene.refuses(TargetGone(path=target, volume="inline"), scene.inline)
        assert not target.exists(), "a missing target is never made by serving"
        target.mkdir()
        scene.refuses(NotADisk(path=target, kind="directory"), scene.inline)


@pytest.mark.parametrize("change", [-1, 1, -SIZE_BYTES])
def test_a_target_that_was_resized(scene: Scene, change: int) -> None:
    with stand_in(scene.inline.target) as target:
        os.truncate(target, SIZE_BYTES + change)
        error = TargetResized(path=target, volume="inline", size_bytes=SIZE_BYTES + change, expected_bytes=SIZE_BYTES)
        scene.refuses(error, scene.inline)


@needs_root
def test_a_target_or_a_mirror_that_takes_no_writes(scene: Scene) -> None:
    for disk in (scene.inline.target, scene.inline.mirror):
        with read_only(disk):
            scene.refuses(DiskReadOnly(path=disk), scene.inline)


@needs_devices
def test_a_block_device_that_is_in_use(tmp_path: Path, loop: Callable[..., str]) -> None:
    lab = ForkLab(tmp_path)
    device = loop(lab.disk("image", 16 * MIB))
    point = tmp_path / "mounted"
    point.mkdir()
    lab.lockstep("create", "block", "--target", device).ok()

    def refused(error: LockstepError) -> None:
        lab.lockstep("status").ok()
        before = everything_below(lab.state), hashlib.sha256(Path(device).read_bytes()).digest()
        assert_error(lab.lockstep("serve", "block"), error)
        after = everything_below(lab.state), hashlib.sha256(Path(device).read_bytes()).digest()
        assert after == before

    with contextlib.suppress(FileNotFoundError):
        (lab.state / "run" / "block.lock").touch()
    run("blockdev", "--setro", device)
    refused(DiskReadOnly(path=device))
    run("blockdev", "--setrw", device)

    claimed = os.open(device, os.O_RDWR | os.O_EXCL)
    refused(DiskBusy(path=device, users="another program has claimed it"))
    os.close(claimed)

    run("mkswap", "-q", device)
    run("swapon", device)
    try:
        refused(DiskBusy(path=device, users="swap space"))
    finally:
        run("swapoff", device)

    run("mkfs.ext4", "-q", "-F", device)
    with mounted("-o", "ro", device, str(point)):  # a file system that may write does so when it likes
        refused(DiskBusy(path=device, users=f"mounted at {point}"))


@needs_devices
def test_a_file_with_a_loop_device_over_it(scene: Scene, loop: Callable[..., str]) -> None:
    for disk in (scene.inline.target, scene.inline.mirror):
        device = loop(disk)
        scene.refuses(DiskBusy(path=disk, users=f"backing file of {device}"), scene.inline)
        run("losetup", "-d", device)


# --- two that want one disk -------------------------------------------------------------------------------


def holder(process: "subprocess.Popen[bytes] | subprocess.Popen[str]") -> str:
    return f"{Path(f'/proc/{process.pid}/comm').read_text().strip()} (process {process.pid})"


def test_a_second_server_is_refused_and_the_first_goes_on(scene: Scene, tmp_path: Path) -> None:
    with scene.inline.served() as first:
        # The server notes in the audit trail what it found; after that it writes nothing by itself.
        wait_until(lambda: "is in-sync" in scene.lab.lockstep("audit", "inline").ok(), "the state in the audit trail")
        scene.refuses(AlreadyServed(volume="inline"), scene.inline)
        scene.refuses(AlreadyServed(volume="inline"), scene.inline, "--socket", tmp_path / "another.sock")

        # Another state directory that knows the same disks; then one that knows the same mirror only.
        copy = tmp_path / "state"
        shutil.copytree(scene.lab.state, copy, ignore=shutil.ignore_patterns("run"))
        elsewhere = ForkLab(tmp_path)
        elsewhere.lockstep("status", "inline")
        before = everything_below(scene.lab.home)
        result = elsewhere.lockstep("serve", "inline", "--key-file", scene.lab.key)
        assert_error(result, DiskLocked(path=scene.inline.target, holder=holder(first.process)))
        twin = tmp_path / "twin"
        shutil.copyfile(scene.inline.target, twin)
        with contextlib.closing(sqlite3.connect(copy / "registry.db")) as registry, registry:
            registry.execute("UPDATE volumes SET target_path = ? WHERE name = 'inline'", (str(twin),))
        result = elsewhere.lockstep("serve", "inline", "--key-file", scene.lab.key)
        assert_error(result, DiskLocked(path=scene.inline.mirror, holder=holder(first.process)))
        assert everything_below(scene.lab.home) == before

        # QEMU respects our locks as well.
        for disk in (scene.inline.target, scene.inline.mirror):
            assert "lock" in run("qemu-io", "-f", "raw", "-c", "write 0 512", str(disk), check=False)
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 4k", "-c", "flush", "-c", "read -P 7 0 4k", first.uri)
        assert first.mirror_state() == "in-sync"
    scene.inline.assert_equal_disks()


@contextlib.contextmanager
def used_by_qemu(disk: Path, directory: Path, *, writable: bool) -> Iterator["subprocess.Popen[bytes]"]:
    sock, pid_file = directory / f"{disk.name}.qsd", directory / f"{disk.name}.pid"
    read_only = "off" if writable else "on"
    with subprocess.Popen(
        [
            "qemu-storage-daemon",
            f"--blockdev=driver=file,node-name=disk,filename={disk},locking=on,read-only={read_only}",
            f"--nbd-server=addr.type=unix,addr.path={sock}",
            f"--export=type=nbd,id=export,node-name=disk,writable={'on' if writable else 'off'}",
            f"--pidfile={pid_file}",
        ]
    ) as daemon:
        try:
            wait_until(lambda: pid_file.exists() and bool(pid_file.read_text()), "QEMU to have the disk")
            yield daemon
        finally:
            daemon.terminate()


def test_a_disk_that_qemu_uses(scene: Scene, tmp_path: Path) -> None:
    for disk, writable in ((scene.inline.target, True), (scene.inline.target, False), (scene.inline.mirror, True)):
        with used_by_qemu(disk, tmp_path, writable=writable) as qemu:
            scene.refuses(DiskLocked(path=disk, holder=holder(qemu)), scene.inline)
        (tmp_path / f"{disk.name}.pid").unlink(missing_ok=True)


# --- sockets and addresses --------------------------------------------------------------------------------


def test_the_sockets_of_a_killed_server_are_replaced(scene: Scene) -> None:
    with scene.inline.served() as server:
        nbd, control = Path(server.socket), scene.lab.state / "run" / "inline.control"
        assert control.is_socket()
        server.kill()
    assert nbd.is_socket()
    assert control.is_socket()
    born = nbd.stat().st_ctime_ns, control.stat().st_ctime_ns
    with scene.inline.served() as server:
        assert Path(server.socket) == nbd
        assert all(new.stat().st_ctime_ns > old for new, old in zip((nbd, control), born, strict=True))
        run("qemu-io", "-f", "raw", "-c", "read 0 4k", server.uri)
    assert not nbd.exists()
    assert not control.exists()


def test_a_socket_path_that_cannot_be_used(scene: Scene, tmp_path: Path) -> None:
    file = scene.lab.home / "a file"
    file.write_bytes(b"keep me")
    reason = "something that is not a socket has that name"
    scene.refuses(SocketUnusable(path=file, reason=reason), scene.inline, "--socket", file)

    long = tmp_path / ("x" * 120)
    scene.refuses(SocketUnusable(path=long, reason="AF_UNIX path too long"), scene.inline, "--socket", long)

    nowhere = tmp_path / "nowhere" / "s"
    scene.refuses(SocketUnusable(path=nowhere, reason=MISSING), scene.inline, "--socket", nowhere)

    below = file / "s"
    scene.refuses(SocketUnusable(path=below, reason="Not a directory"), scene.inline, "--socket", below)


def test_a_socket_that_another_program_listens_on(scene: Scene, tmp_path: Path) -> None:
    path = tmp_path / "theirs"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        error = SocketUnusable(path=path, reason="another program is listening on it")
        scene.refuses(error, scene.inline, "--socket", path)
        assert path.is_socket()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_control_socket_that_cannot_be_made(scene: Scene) -> None:
    control = scene.lab.state / "run" / "inline.control"
    control.mkdir()
    try:
        scene.refuses(SocketUnusable(path=control, reason="Is a directory"), scene.inline)
    finally:
        control.rmdir()


def test_a_state_directory_whose_path_is_too_long_for_a_socket(tmp_path: Path) -> None:
    lab = ForkLab(tmp_path)
    lab.state = tmp_path / ("s" * 110)
    target = lab.disk("target", MIB)
    lab.lockstep("create", "vol", "--target", target).ok()
    assert_error(
        lab.lockstep("serve", "vol"),
        SocketUnusable(path=lab.state / "run" / "vol.sock", reason="AF_UNIX path too long"),
    )
    # The NBD socket may be elsewhere, but the control socket is where it is.
    result = lab.lockstep("serve", "vol", "--socket", tmp_path / "s")
    assert_error(result, SocketUnusable(path=lab.state / "run" / "vol.control", reason="AF_UNIX path too long"))
    assert not (tmp_path / "s").exists()
    assert "no" in lab.lockstep("status", "vol").ok(), "it is not served, and status must say so"


def test_an_empty_value_is_another_thing_than_none(tmp_path: Path) -> None:
    """Taken for none, it would serve the plaintext to everybody who reaches the address."""
    lab = ForkLab(tmp_path)
    lab.volume("vol", MIB)
    tcp = ("--tcp", "127.0.0.1:0")
    for options in (("--tls-dir", ""), ("--tls-dir", " "), ("--socket", ""), ("--socket-group", ""), ("--tcp", "")):
        serve = ("serve", "vol", "--key-file", lab.key, *(tcp if options[0] == "--tls-dir" else ()), *options)
        assert_error(lab.lockstep(*serve), ValueEmpty(option=options[0]))
    for command in (("init",), ("client",), ("show",)):
        name = ("alice",) if command == ("client",) else ()
        assert_error(lab.lockstep("tls", *command, "", *name), ValueEmpty(option="DIR"))
    assert_error(lab.lockstep("tls", "client", tmp_path, "alice", "--out", ""), ValueEmpty(option="--out"))
    mirror, free = lab.home / "vol.mirror", lab.disk("free", MIB)
    refused: list[tuple[tuple[object, ...], str]] = [
        (("open", mirror, "--socket", ""), "--socket"),
        (("create", "new", "--target", free, "--mirror", tmp_path / "m", "--header", ""), "--header"),
        (("header", "backup", "vol", ""), "OUTPUT"),
        (("restore", mirror, ""), "OUTPUT"),
        (("list", "--state-dir", ""), "--state-dir"),
        (("--state-dir", "", "list"), "--state-dir"),
        (("status", ""), "NAME"),
    ]
    for arguments, option in refused:
        assert_error(lab.lockstep(*arguments), ValueEmpty(option=option))
    volumes = json.loads(lab.lockstep("status", "--json").ok())["volumes"]
    assert [each["mirrors"][0]["header_backup"] for each in volumes] == ["missing"]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org"])
def test_plain_tcp_is_for_loopback_addresses_only(host: str) -> None:
    address = f"[{host}]:10809" if ":" in host else f"{host}:10809"
    with pytest.raises(TlsRequired) as caught:
        parse_tcp(address)
    assert caught.value.data == {"address": address}
    assert parse_tcp(address, tls=True) == (host, 10809)


@pytest.mark.parametrize("address", [":10809", "127.0.0.1", "127.0.0.1:", "127.0.0.1:-1"])
@pytest.mark.parametrize("tls", [False, True])
def test_what_is_no_address_is_refused(address: str, tls: bool) -> None:
    with pytest.raises(AddressInvalid) as caught:
        parse_tcp(address, tls=tls)
    assert caught.value.data == {"address": address, "reason": "it is not HOST:PORT"}


@pytest.mark.parametrize("port", ["65536", "99999", "9" * 5000])
def test_what_is_no_port_is_refused(port: str) -> None:
    with pytest.raises(AddressInvalid) as caught:
        parse_tcp(f"127.0.0.1:{port}")
    assert caught.value.data["reason"] == "a port is at most 65535"


@pytest.mark.parametrize(
    ("address", "parsed"),
    [("127.0.0.1:1", ("127.0.0.1", 1)), ("[::1]:65535", ("::1", 65535)), ("localhost:0", ("localhost", 0))],
)
def test_loopback_addresses_are_understood(address: str, parsed: tuple[str, int]) -> None:
    assert parse_tcp(address) == parsed


def test_a_tcp_address_that_is_refused_or_occupied(scene: Scene) -> None:
    error = TlsRequired(address="0.0.0.0:10809")
    assert error.exit_code == 2
    scene.refuses(error, scene.inline, "--tcp", "0.0.0.0:10809")
    scene.refuses(TcpMissing(), scene.inline, "--tls-dir", scene.lab.home)
    missing = TlsDirUnusable(path=scene.lab.home, reason="server-cert.pem is missing or cannot be read")
    scene.refuses(missing, scene.inline, "--tls-dir", scene.lab.home, "--tcp", "0.0.0.0:10809")
    scene.refuses(GroupUnknown(group="no-such-group"), scene.inline, "--socket-group", "no-such-group")
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        address = f"127.0.0.1:{occupied.getsockname()[1]}"
        before = everything_below(scene.lab.home)
        result = scene.serve(scene.inline, "--tcp", address)
        assert everything_below(scene.lab.home) == before
    result.failed(1, f"The server cannot listen on {address}: ", "in use", AddressUnusable.cause)


# --- the state directory ----------------------------------------------------------------------------------


def test_a_volume_that_nobody_knows(scene: Scene) -> None:
    scene.refuses(VolumeUnknown(volume="inlin", near=("inline",), hint=" Did you mean inline?"), "inlin")
    scene.refuses(VolumeUnknown(volume="../../etc", near=(), hint=""), "../../etc")


@needs_root
def test_a_state_directory_that_takes_no_writes(scene: Scene) -> None:
    with read_only(scene.lab.state):
        error = StateDirUnusable(path=scene.lab.state, reason="Read-only file system")
        scene.refuses(error, scene.inline)
        assert "inline" in scene.lab.lockstep("list").ok(), "looking needs no writes"


def test_a_state_directory_that_is_a_file(tmp_path: Path) -> None:
    lab = ForkLab(tmp_path)
    lab.state.write_bytes(b"keep me")
    result = lab.lockstep("serve", "vol")
    assert_error(result, StateDirUnusable(path=lab.state, reason="File exists"))
    assert lab.state.read_bytes() == b"keep me"


@pytest.fixture
def small_state(tmp_path: Path) -> Iterator[Lab]:
    """A lab whose state directory lies on a file system of 1 MiB."""
    lab = ForkLab(tmp_path)
    lab.state.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=1M", "tmpfs", str(lab.state)):
        yield lab


def fill_up(directory: Path) -> None:
    with (directory / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@needs_root
def test_nothing_can_be_created_in_a_full_state_directory(small_state: Lab) -> None:
    target = small_state.disk("target", MIB, b"t" * 512)
    small_state.lockstep("list").ok()
    fill_up(small_state.state)
    result = small_state.lockstep(
        "create", "vol", "--target", target, "--mirror", small_state.home / "mirror", "--key-file", small_state.key
    )
    registry = small_state.state / "registry.db"
    assert_error(result, RegistryUnreadable(registry=registry, reason="database or disk is full"))
    assert not (small_state.home / "mirror").exists()
    assert "There are no volumes" in small_state.lockstep("list").ok()


@needs_root
def test_a_state_directory_that_fills_up_meanwhile_ends_in_a_sentence(small_state: Lab) -> None:
    """The disks are what counts: they are closed in order; only the knowledge that they are equal may be lost."""
    volume = small_state.volume("vol", SIZE_BYTES)
    with volume.served() as server:
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", "-c", "flush", server.uri)
        fill_up(small_state.state)
        server.process.terminate()
        server.process.wait(60)
        log = server.log.read_text()
    assert "Traceback" not in log, log
    volume.assert_equal_disks()
    (small_state.state / "filler").unlink()
    with volume.served():  # as after a crash: it finds its way
        pass
    volume.assert_equal_disks()


# --- whatever the input, a sentence -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A volume whose paths look like markup."""
    lab = ForkLab(tmp_path_factory.mktemp("odd"))
    (lab.home / "a[").mkdir()
    disks = ("--target", lab.disk("a[/x]t[red]", MIB), "--mirror", lab.home / "a[/x]m[red]é")
    create = ("create", "vol", *disks, "--key-file", lab.key, "--iter-time", "10")
    lab.lockstep(*create, environment=lab.quick_format()).ok()
    return lab


def test_what_looks_like_markup_is_shown(odd: Lab) -> None:
    for command in (("list",), ("status",), ("mirror", "list", "vol"), ("key", "list", "vol")):
        said = odd.lockstep(*command).ok()
        assert f"{odd.home}/a[/x]m[red]é" in said
        assert command in (("mirror", "list", "vol"), ("key", "list", "vol")) or f"{odd.home}/a[/x]t[red]" in said


def test_a_narrow_terminal_is_shown_everything() -> None:
    shown, table = io.StringIO(), Listing("Time", "What happened", "From")
    table.add_row("2026-11-24 03:12:09", f"somebody restored a mirror to {'/a' * 60}", "/b" * 60)
    Console(file=shown, width=60).print(table)
    assert shown.getvalue().count("/") == 120


def test_a_terminal_that_cannot_show_a_name_gets_it_escaped(odd: Lab) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    for command in (("list",), ("status",), ("remove", "nobody")):
        done = Lab.lockstep(odd, *command, environment=ascii_only)
        assert "Traceback" not in done.err
        assert command[0] == "remove" or "a[/x]m[red]\\" in done.ok()


def test_a_locale_that_has_no_word_for_a_name_finds_its_file_all_the_same(odd: Lab) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}

    def said(*command: object) -> str:
        return Lab.lockstep(odd, *command, environment=ascii_only).ok()

    path = f"{odd.home}/a[/x]m[red]é"
    for command in ("list", "status", "mirror list vol"):
        assert path.replace("é", "\\xe9") in said(*command.split())
    for command in ("status --json", "mirror list vol --json"):
        described = json.loads(said(*command.split()))
        (mirror,) = described.get("volumes", [described])[0]["mirrors"]
        assert (mirror["path"], mirror["error"]) == (path, None)
    for command in ("audit", "audit --json", "grants", "whocan vol", "verify vol --history", "key list vol"):
        said(*command.split())
    said("header", "backup", "vol", odd.home / "backupé")
    assert (odd.home / "backupé").exists()
    row = json.loads(odd.lockstep("audit", "vol", "--json").ok().splitlines()[-1])
    assert row["details"]["output"] == f"{odd.home}/backupé"


def test_names_that_are_no_text(odd: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, bad = Volume(odd, "vol", odd.home / "a[/x]t[red]", odd.home / "a[/x]m[red]é", None), "\udcff"
    for command in (("status", bad), ("audit", bad), ("audit", "--user", bad), ("mirror", "list", bad), ("list",)):
        done = odd.lockstep(*command)
        assert done.code in (0, 1)
        assert "Traceback" not in done.err
    for names in (("status", bad), ("mirror", "list", bad), ("grants", bad)):
        odd.lockstep(*names).failed(1, "There is no volume")
    odd.lockstep("revoke", "vol", bad).failed(1, "has no grant")
    volume.copy_by_hand()
    monkeypatch.chdir(tmp_path)
    said = odd.lockstep("restore", volume.mirror, bad, "--key-file", odd.key).ok()
    assert " \\udcff in" in said or " \\udcff (" in said
    row = json.loads(odd.lockstep("audit", "vol", "--json").ok().splitlines()[-1])
    assert (row["event"], row["details"]["output"]) == ("restore", f"{tmp_path}/\\udcff")
    assert "none removed or altered" in odd.lockstep("audit", "--check").ok()


@pytest.mark.parametrize("given", ["nan", "inf", "1e400", "-inf", "0", "86401", "ten"])
def test_no_patience_without_end(odd: Lab, given: str) -> None:
    done = odd.lockstep("serve", "vol", "--key-file", odd.key, "--mirror-timeout", given)
    assert (done.code, "from 0.1 to 86400" in done.err) == (2, True)


@pytest.mark.parametrize("given", ["9999-12-31T23:59:59", "0001-01-01T00:00", "0001-01-01T00:00+14:00"])
def test_no_time_at_an_end_of_the_calendar(odd: Lab, given: str) -> None:
    odd.lockstep("grant", "vol", "ada", "--window", "sun 03:00-06:00").ok()
    odd.lockstep("whocan", "vol", "--at", given).failed(2, "is not a time")


def in_shell(lab: Lab, command: str, **environment: str) -> Result:
    surroundings = {**os.environ, **environment, "LOCKSTEP": f"{sys.executable} -m lockstep --state-dir {lab.state}"}
    script = ["sh", "-c", command, "sh", str(lab.home / "a[/x]m[red]é"), str(lab.key)]
    return Result(subprocess.run(script, capture_output=True, check=False, timeout=60, env=surroundings))


@pytest.mark.parametrize("stdout", [">&-", ">/dev/full"])
@pytest.mark.parametrize(
    "command", ["status", "list", "status --json", 'restore "$1" - --key-file "$2" --incomplete', "tls show /nowhere"]
)
def test_output_that_goes_nowhere(odd: Lab, command: str, stdout: str) -> None:
    said = in_shell(odd, f"$LOCKSTEP {command} {stdout}").failed(1)
    assert "tandard output" in said or "/nowhere" in said


def test_a_server_is_one_though_nobody_can_be_told(odd: Lab) -> None:
    command = (
        '$LOCKSTEP serve vol --key-file "$2" --socket served >&- & until $LOCKSTEP status vol --json | grep -q served'
    )
    done = in_shell(odd, f"cd {odd.home}; {command}; do sleep 0.1; done; kill -TERM $!; wait $!")
    assert (done.code, "Traceback" in done.err) == (0, False), done.err
    assert "nobody could be told" in done.err


def test_a_standard_input_that_is_closed(odd: Lab) -> None:
    for options in ("", "--key-file -"):
        in_shell(odd, f'$LOCKSTEP restore "$1" output --incomplete {options} <&-').failed(
            1 if options else 2, "assphrase"
        )


def test_a_passphrase_that_is_no_text(odd: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def typed(_prompt: str) -> str:
        return b"\xff".decode()

    monkeypatch.setattr("getpass.getpass", typed)
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    with pytest.raises(PassphraseNotText):
        passphrase_from(None, "the mirror")()


def test_what_nobody_foresaw_is_told_in_three_sentences(odd: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_state: State, _name: str) -> None:
        raise ZeroDivisionError("of what is secret")

    monkeypatch.setattr("lockstep.cli.volumes.remove_volume", broken)
    assert "secret" not in odd.lockstep("remove", "vol").failed(5, "ZeroDivisionError", "-v stands")
    verbose = odd.lockstep("--verbose", "remove", "vol")
    assert verbose.code == 5
    assert "Traceback" in verbose.err


def test_an_interruption_of_the_imports(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = Lab(tmp_path).lockstep("list", environment={"PYTHONPATH": path})
    assert (done.code, done.err) == (130, "")


def test_what_would_be_silently_useless(odd: Lab) -> None:
    for command in ("", "  "):
        drill = odd.lockstep("drill", "vol", "--key-file", odd.key, "--command", command)
        assert_error(drill, ValueEmpty(option="--command"))
    head = json.loads(odd.lockstep("audit", "--check", "--json").ok())["head"]
    odd.lockstep("audit", "--check", "--head", head.upper()).ok()
    odd.lockstep("audit", "--head", head).failed(2, "there is no --check")
    for wrong in (head[1:], "g" * 64):
        odd.lockstep("audit", "--check", "--head", wrong).failed(2, "64 hexadecimal digits")
    odd.lockstep("audit", "vo1", "--user", "mallory").failed(1, "There is no volume vo1. Did you mean vol?")
    odd.lockstep("create", "gone", "--target", odd.disk("gone", MIB)).ok()
    odd.lockstep("remove", "gone").ok()
    assert "removed the volume gone" in odd.lockstep("audit", "gone").ok()
    odd.lockstep("audit", "gone", "--since", "2100-01-01").ok()
    odd.lockstep("set", "vol", "on-denied=hold", "--timezone", "Bad/Zone").failed(2, "has no time zone")
    odd.lockstep("set", "vol", "scrub=off", "--timezone", "").failed(2, "--timezone is empty")


def test_messages_that_help(odd: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, mirror = odd.home / "a[/x]t[red]", odd.home / "a[/x]m[red]é"
    assert "truncate" not in odd.lockstep("commit", mirror, "nope", tmp_path / "o").failed(1, "no overlay nope")
    nowhere = tmp_path / "no" / "disk"
    keyed = ("--key-file", odd.key)
    for command in (
        ("restore", mirror, nowhere, *keyed, "--incomplete"),
        ("create", "new", "--target", odd.disk("free", MIB), "--mirror", nowhere, *keyed),
        ("open", mirror, *keyed, "--incomplete", "--writable", "--overlay", nowhere),
    ):
        odd.lockstep(*command).failed(1, f"there is no directory {nowhere.parent}")
    large = odd.disk("large", 8 * MIB + 1)
    for key in (large, "/dev/zero"):
        restore = ("restore", mirror, tmp_path / "o", "--incomplete", "--key-file", key)
        odd.lockstep(*restore).failed(2, "more than the 8388608 bytes")
    for user in ("*", "ada"):
        odd.lockstep("grant", "vol", user).ok()
    assert "lockstep revoke vol '*'" in odd.lockstep("revoke", "vol", "ada").ok()
    assert "Everybody" not in odd.lockstep("revoke", "vol", "*").ok()
    odd.lockstep("sync", "nosuch").failed(1, "There is no volume nosuch")
    odd.lockstep("sync", "vol").failed(1, "not being served")
    assert target.exists()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    odd.lockstep("demo").failed(4, "needs root")
