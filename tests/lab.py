"""A place to run the real thing: volumes of image files, the real server, and outside referees."""

import contextlib
import http.client
import importlib
import importlib.util
import json
import mmap
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from dissect.fve.luks import LUKS

from lockstep.crypto import luks
from lockstep.crypto.unlock import Unlock
from lockstep.disk.mirror import open_mirror

PASSPHRASE = b"correct horse battery staple"
PATIENCE_S = 60.0
MIB = 1 << 20

# cryptsetup measures the machine for seconds to choose argon2's cost; with a given cost it formats at once.
_QUICK_CRYPTSETUP = """#!/bin/sh
command="$1"
if [ "$command" = luksFormat ] || [ "$command" = luksAddKey ] || [ "$command" = reencrypt ]; then
    shift
    for argument; do
        shift
        case "$argument" in --iter-time=*) ;; *) set -- "$@" "$argument" ;; esac
    done
    set -- "$command" --pbkdf-force-iterations=4 --pbkdf-memory=32 --pbkdf-parallel=1 "$@"
fi
exec "{real}" "$@"
"""


def wait_until(holds: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait for a condition, and fail with its name when it does not come true."""
    deadline_s = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline_s, f"waited {patience_s:.0f} s in vain for: {what}"
        time.sleep(0.02)


def run(*command: str, stdin: bytes | None = None, check: bool = True) -> str:
    """Run an outside program; its output, and a readable failure."""
    done = subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=PATIENCE_S)
    said = (done.stdout + done.stderr).decode(errors="replace")
    assert not check or done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}: {said}"
    return said


def loop_devices() -> dict[str, str]:
    """All loop devices, whoever made them, and what each shows; others come and go meanwhile."""
    found = {}
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found[f"/dev/{backing.parts[3]}"] = os.fsdecode(backing.read_bytes()).strip()
    return found


class Result:
    """How a `lockstep` command ended."""

    def __init__(self, done: "subprocess.CompletedProcess[bytes]") -> None:
        self.code = done.returncode
        self.out = done.stdout.decode()
        self.err = done.stderr.decode()

    def ok(self) -> str:
        """Standard output of a command that must have succeeded."""
        assert self.code == 0, self.err
        return self.out

    def failed(self, code: int, *fragments: str) -> str:
        """Standard error of a command that must have failed so, with a cause and a next step, and no traceback."""
        assert self.code == code, (self.code, self.out, self.err)
        assert self.err.startswith("lockstep: "), self.err
        assert "Likely cause: " in self.err, self.err
        assert "Next step: " in self.err, self.err
        assert "Traceback" not in self.err, self.err
        for fragment in fragments:
            assert fragment in self.err, self.err
        return self.err


class Lab:
    """A directory with a key file, a state directory, disks, and the commands that act on them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.state = home / "state"
        self.key = home / "key"
        self.key.write_bytes(PASSPHRASE)
        self.environment: dict[str, str] = {}  # added to our own, for commands and servers

    def lockstep(
        self, *arguments: object, stdin: bytes | None = None, environment: dict[str, str] | None = None
    ) -> Result:
        """Run a command to its end; `environment` is added to the lab's."""
        command = [sys.executable, "-m", "lockstep", "--state-dir", str(self.state), *map(str, arguments)]
        surroundings = {**os.environ, **self.environment, **(environment or {})}
        return Result(
            subprocess.run(
                command, input=stdin or b"", capture_output=True, check=False, timeout=PATIENCE_S, env=surroundings
            )
        )

    def quick_format(self) -> dict[str, str]:
        """An environment in which `create` and `key` take no seconds: passphrases at the least cost, not measured."""
        real = shutil.which("cryptsetup", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
        program = self.home / "bin" / "cryptsetup"
        if real is not None and not program.exists():
            program.parent.mkdir(exist_ok=True)
            program.write_text(_QUICK_CRYPTSETUP.format(real=real))
            program.chmod(0o755)
        return {"PATH": f"{program.parent}:{os.environ.get('PATH', os.defpath)}"}

    def disk(self, name: str, size_bytes: int, content: bytes = b"") -> Path:
        """Make an image file."""
        path = self.home / name
        with path.open("wb") as file:
            file.write(content)
            file.truncate(size_bytes)
        return path

    def volume(
        self,
        name: str = "vol",
        size_bytes: int = 16 * MIB,
        *options: object,
        content: bytes = b"",
        header: bool = False,
    ) -> "Volume":
        """Create a volume with a mirror, both image files."""
        target = self.disk(f"{name}.target", size_bytes, content)
        volume = Volume(
            self, name, target, self.home / f"{name}.mirror", self.home / f"{name}.header" if header else None
        )
        extra = ["--header", volume.header] if header else []
        disks = ["--target", target, "--mirror", volume.mirror, "--key-file", self.key, "--iter-time", "10"]
        self.lockstep("create", name, *disks, *extra, *options, environment=self.quick_format()).ok()
        return volume


class Clock:
    """The wall clock of a lab's commands and servers (clock.c); clocks that only measure time go on as ever."""

    def __init__(self, lab: Lab, shows: datetime) -> None:
        library, file = lab.home / "clock.so", lab.home / "clock"
        run("gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(Path(__file__).with_name("clock.c")), "-ldl")
        file.write_bytes(bytes(8))
        with file.open("rb+") as opened:
            self._moved_ns = mmap.mmap(opened.fileno(), 8)
        self.set(shows)
        lab.environment |= {"LD_PRELOAD": str(library), "LAB_CLOCK": str(file)}

    def set(self, shows: datetime) -> None:
        """Step it."""
        moved_s = (shows - datetime.now(UTC)).total_seconds()
        self._moved_ns[:] = round(moved_s * 1e9).to_bytes(8, "little", signed=True)


class Volume:
    """A volume with its two disks."""

    def __init__(self, lab: Lab, name: str, target: Path, mirror: Path, header: Path | None) -> None:
        self.lab = lab
        self.name = name
        self.target = target
        self.mirror = mirror
        self.header = header

    @contextlib.contextmanager
    def served(
        self,
        *options: object,
        in_sync: bool = True,
        unlocked_by: Sequence[object] | None = None,
        program: str | None = None,
    ) -> Iterator["Served"]:
        """Serve it; `in_sync` waits for the end of the initial copy first. Stops it in order at the end.

        `unlocked_by` are the options in place of the lab's key file, `program` is what runs in place of `lockstep`.
        """
        served = Served(self, options, unlocked_by, program)
        try:
            served.await_ready()
            if in_sync:
                wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be in sync")
            yield served
            if served.process.poll() is None:
                served.stop()
        finally:
            served.kill()

    def grant(self, user: str, *options: object) -> None:
        """Let a user update the mirror; a server that runs knows within a second."""
        self.lab.lockstep("grant", self.name, user, *options).ok()

    def decrypted(self) -> bytes:
        """The mirror's data as an independent LUKS2 reader sees it, as long as the target."""
        with contextlib.ExitStack() as files:
            mirror = files.enter_context(self.mirror.open("rb"))
            header = files.enter_context(self.header.open("rb")) if self.header else None
            return read_luks(mirror, header, self.target.stat().st_size)

    def copy_by_hand(self) -> None:
        """Bring the mirror in sync without a server: what one would leave behind that has stopped in order."""
        path = str(self.header or self.mirror)
        header, data = luks.read_header(path), self.target.read_bytes()
        assert header.token is not None
        detached = str(self.header) if self.header else None
        disk = open_mirror(str(self.mirror), detached, header, Unlock(lambda: PASSPHRASE), len(data), writable=True)
        disk.write(0, memoryview(data.ljust(disk.size_bytes, b"\0")))
        disk.flush()
        disk.close()
        luks.write_token(path, replace(header.token, generation=2, state="in-sync"), token_id=header.token_id)

    def assert_equal_disks(self) -> None:
        """decrypt(mirror) == target, byte for byte; names the first difference."""
        target, mirror = self.target.read_bytes(), self.decrypted()
        assert len(target) == len(mirror)
        if target != mirror:
            first = next(i for i, (a, b) in enumerate(zip(target, mirror, strict=True)) if a != b)
            raise AssertionError(
                f"the disks differ at byte {first}: {target[first : first + 16]!r}, {mirror[first : first + 16]!r}"
            )

    def restore(self, output: Path, *options: object) -> Result:
        """Run `lockstep restore`."""
        extra = ["--header", self.header] if self.header else []
        return self.lab.lockstep("restore", self.mirror, output, "--key-file", self.lab.key, *extra, *options)


class Served:
    """A running `lockstep serve`."""

    def __init__(
        self,
        volume: Volume,
        options: Sequence[object] = (),
        unlocked_by: Sequence[object] | None = None,
        program: str | None = None,
    ) -> None:
        self.volume = volume
        self.log = volume.lab.home / f"{volume.name}.log"
        command = ["serve", volume.name, *(unlocked_by or ["--key-file", volume.lab.key]), *options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    *(("-c", program) if program else ("-m", "lockstep")),
                    *("--state-dir", str(volume.lab.state), *map(str, command)),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **volume.lab.environment},
            )
        self.uris: list[str] = []

    def await_ready(self) -> None:
        """Wait for the first `ready` line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready "), (line, self.log.read_text())
        self.uris.append(line.removeprefix("ready ").strip())

    def next_uri(self) -> str:
        """The next `ready` line: a server that also listens on TCP prints one for each address."""
        self.await_ready()
        return self.uris[-1]

    @property
    def uri(self) -> str:
        """The unix socket's URI."""
        return self.uris[0]

    @property
    def socket(self) -> str:
        """The unix socket's path."""
        return self.uri.partition("?socket=")[2]

    def status(self) -> dict[str, Any]:
        """What `status --json` says of this volume."""
        (volume,) = json.loads(self.volume.lab.lockstep("status", self.volume.name, "--json").ok())["volumes"]
        assert isinstance(volume, dict)
        return volume

    def now(self) -> dict[str, Any]:
        """The status of its volume: asked without starting a command, to be polled often."""
        with contextlib.closing(http.client.HTTPConnection("localhost")) as connection:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(PATIENCE_S)
            try:
                connection.sock.connect(str(self.volume.lab.state / "run" / f"{self.volume.name}.control"))
            except (FileNotFoundError, ConnectionRefusedError):
                return self.status()
            connection.request("GET", "/v1/status")
            status = json.load(connection.getresponse())
            assert isinstance(status, dict)
            return status

    def mirror(self) -> dict[str, Any]:
        """What the status says of its only mirror."""
        (mirror,) = self.now()["mirrors"]
        assert isinstance(mirror, dict)
        return mirror

    def mirror_state(self) -> str:
        """The state of its only mirror."""
        return str(self.mirror()["state"])

    def stop(self) -> None:
        """SIGTERM, and the exit code 0 that must follow."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE_S)
        assert code == 0, (code, self.log.read_text())

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def resident_bytes(self) -> int:
        """Its resident memory."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
        raise AssertionError("no VmRSS")


def write(served: Served, *commands: str) -> None:
    """Have qemu-io write, and flush; every client's write must succeed."""
    arguments = [argument for command in (*commands, "flush") for argument in ("-c", command)]
    run("qemu-io", "-f", "raw", *arguments, served.uri)


class OpenMirror:
    """A running `lockstep open`."""

    def __init__(self, volume: Volume, *options: object) -> None:
        self.volume = volume
        self.log = volume.lab.home / "open.log"
        extra = ["--header", volume.header] if volume.header else []
        command = ["open", volume.mirror, "--key-file", volume.lab.key, *extra, *options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lockstep", "--state-dir", str(volume.lab.state), *map(str, command)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "XDG_RUNTIME_DIR": str(volume.lab.home), **volume.lab.environment},
            )

    def line(self, kind: str) -> str:
        """What its next line of output says, which must be of this kind: ready, overlay or device."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(f"{kind} "), (line, self.log.read_text())
        return line.removeprefix(f"{kind} ").strip()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """SIGTERM or its like, and the exit code 0 that must follow."""
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        assert code == 0, (code, self.log.read_text())

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextlib.contextmanager
def opened(volume: Volume, *options: object) -> Iterator[tuple[OpenMirror, str]]:
    """A mirror, opened, and its URI. Stops it in order at the end."""
    process = OpenMirror(volume, *options)
    try:
        yield process, process.line("ready")
        if process.process.poll() is None:
            process.stop()
    finally:
        process.process.terminate()  # of a test that failed: a device that is attached goes in order
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.process.wait(10)
        process.kill()


_unlocked: dict[UUID, tuple[bytes, int]] = {}  # volume keys that dissect has found, and in which key slot


def forget_volume_keys() -> None:
    """Have `read_luks` find out again what opens a mirror: its volume key was changed."""
    _unlocked.clear()


def read_luks(mirror: BinaryIO, header: BinaryIO | None, length: int, sampled: int = 24) -> bytes:
    """The first `length` bytes of a LUKS2 volume's data, without any of Lockstep's code.

    dissect.fve reads the header, unlocks the key slot and finds the volume key; the bulk is plain AES-XTS, sector by
    sector, because dissect takes seconds for what this does in a moment. Both must agree on the first, the last
    and `sampled` random sectors, in each call.
    """
    luks = LUKS(header or mirror)
    if luks.uuid in _unlocked:
        luks.unlock(*_unlocked[luks.uuid])  # checks the key against the header's digest
    else:
        luks.unlock_with_passphrase(PASSPHRASE.decode())
        _unlocked[luks.uuid] = (luks._active_volume_key, luks._active_keyslot_id)
    luks.fh = mirror
    segment = luks.find_segment(luks._active_keyslot_id)
    assert segment.encryption == "aes-xts-plain64", segment.encryption
    sector = int(segment.sector_size)
    key = algorithms.AES(bytes(luks._active_volume_key))
    mirror.seek(segment.offset)
    count = -(-length // sector)
    ciphertext = mirror.read(count * sector)
    assert len(ciphertext) == count * sector, "the mirror is shorter than its target"

    def plain(number: int) -> bytes:
        position = number * sector // 512 + segment.iv_tweak
        context = Cipher(key, modes.XTS(position.to_bytes(16, "little"))).decryptor()
        return context.update(ciphertext[number * sector : (number + 1) * sector])

    data = b"".join(map(plain, range(count)))
    reader = luks.open()
    reader.align = sector  # it decrypts no more than is asked for
    for number in {0, count - 1, *(random.randrange(count) for _ in range(sampled))}:
        reader.seek(number * sector)
        if reader.read(sector) != data[number * sector : (number + 1) * sector]:
            raise AssertionError(f"the two independent readers disagree on sector {number} of {sector} bytes")
    return data[:length]


def libnbd() -> Any:
    """The distribution's libnbd bindings, an independent NBD client; skips the test where they are missing.

    Of the system's packages just this one is made importable, not all of them.
    """
    try:
        return importlib.import_module("nbd")
    except ImportError:
        pass
    home = Path("/usr/lib/python3/dist-packages")
    for name, pattern in (("libnbdmod", "libnbdmod.cpython-{0}{1}-*.so"), ("nbd", "nbd.py")):
        found = sorted(home.glob(pattern.format(*sys.version_info[:2])))
        spec = importlib.util.spec_from_file_location(name, found[0]) if found else None
        if spec is None or spec.loader is None:
            pytest.skip("needs libnbd's Python bindings for this interpreter (Debian: python3-libnbd)")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["nbd"]


class Clients:
    """Connections to one server, and requests of theirs that are under way at the same time."""

    def __init__(self, uri: str, count: int) -> None:
        self.nbd = libnbd()
        self.handles = [self.nbd.NBD() for _ in range(count)]
        for handle in self.handles:
            handle.connect_uri(uri)
        self._by_fd = {handle.aio_get_fd(): handle for handle in self.handles}
        self._cookies: list[tuple[Any, int]] = []

    def write(self, who: int, offset: int, data: bytes, flags: int = 0) -> None:
        """Begin a write."""
        buffer = self.nbd.Buffer.from_bytearray(bytearray(data))
        self._began(who, self.handles[who].aio_pwrite(buffer, offset, flags=flags))

    def zero(self, who: int, offset: int, length: int, flags: int = 0) -> None:
        """Begin to write zeroes."""
        self._began(who, self.handles[who].aio_zero(length, offset, flags=flags))

    def trim(self, who: int, offset: int, length: int, flags: int = 0) -> None:
        """Begin a trim."""
        self._began(who, self.handles[who].aio_trim(length, offset, flags=flags))

    def flush(self, who: int) -> None:
        """Begin a flush."""
        self._began(who, self.handles[who].aio_flush())

    @property
    def under_way(self) -> int:
        """How many requests have no reply yet."""
        return sum(handle.aio_in_flight() for handle in self.handles)

    def move(self) -> None:
        """Wait for something to happen on any connection, and take it."""
        poll = select.poll()
        for fd, handle in self._by_fd.items():
            direction = handle.aio_get_direction()
            reads, writes = direction & self.nbd.AIO_DIRECTION_READ, direction & self.nbd.AIO_DIRECTION_WRITE
            poll.register(fd, (select.POLLIN if reads else 0) | (select.POLLOUT if writes else 0))
        ready = poll.poll(PATIENCE_S * 1000)
        assert ready, f"no reply in {PATIENCE_S} s, {self.under_way} requests under way"
        for fd, events in ready:
            if events & select.POLLOUT:
                self._by_fd[fd].aio_notify_write()
            else:
                self._by_fd[fd].aio_notify_read()

    def finish(self) -> None:
        """Wait for every reply; raises libnbd's Error for the first failure."""
        while self.under_way:
            self.move()
        cookies, self._cookies = self._cookies, []
        for handle, cookie in cookies:
            assert handle.aio_command_completed(cookie)

    def close(self) -> None:
        """Say good-bye."""
        for handle in self.handles:
            handle.shutdown()

    def _began(self, who: int, cookie: int) -> None:
        self._cookies.append((self.handles[who], cookie))


class Pace:
    """How fast a disk on nbdkit is. It is as fast as it can be, until it is slowed, and at once after it was let go."""

    def __init__(self, path: Path) -> None:
        """Keep it in the file at this path, where nbdkit looks it up before each request."""
        self._path = path
        self.options = ("--filter=rate", f"rate-file={path}", "burstiness=0.1")

    def slow(self, bytes_s: int) -> None:
        """Let so many bytes pass in a second, read or written."""
        self._set(8 * bytes_s)

    def let_go(self) -> None:
        """Let all pass."""
        self._set(0)

    def _set(self, bits_s: int) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(str(bits_s))
        new.replace(self._path)


class Storage:
    """A disk on nbdkit, shown as a file by nbdfuse: every request is on record, and it can be slow or stop."""

    def __init__(
        self,
        home: Path,
        size_bytes: int,
        *,
        write_delay_ms: int = 0,
        read_delay_ms: int = 0,
        pace: "Pace | None" = None,
        plugin: Sequence[str] | None = None,
    ) -> None:
        """Keep the data in the file `image`, or where another of nbdkit's plugins, with its options, keeps it."""
        home.mkdir()
        self.image = home / "image"
        self.path = home / "mnt" / "disk"
        self._log = home / "log"
        socket = home / "socket"
        with self.image.open("wb") as image:
            image.truncate(size_bytes)
        self.path.parent.mkdir()
        self._fuse: subprocess.Popen[bytes] | None = None
        options = (f"logfile={self._log}", f"delay-write={write_delay_ms}ms", f"delay-read={read_delay_ms}ms")
        self._nbdkit = subprocess.Popen(
            [
                *("nbdkit", "-f", "-U", socket, "--filter=log", "--filter=delay"),
                *(plugin or ("file", self.image)),
                *options,
                *(pace.options if pace else ()),
            ]
        )
        wait_until(socket.exists, "nbdkit to listen")
        self._fuse = subprocess.Popen(["nbdfuse", self.path, "--unix", socket])
        wait_until(self.path.exists, "nbdfuse to show the disk")

    def close(self) -> None:
        """Take everything away again, also when it is stopped."""
        for process in filter(None, (self._nbdkit, self._fuse)):
            process.send_signal(signal.SIGCONT)
        subprocess.run(["fusermount3", "-u", "-z", self.path.parent], capture_output=True, check=False)
        if self._fuse is not None:
            self._fuse.terminate()
            self._fuse.wait()
        self._nbdkit.terminate()
        self._nbdkit.wait()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It answers nothing meanwhile."""
        with _standing_still(self._nbdkit):
            yield

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Not even its name can be looked up meanwhile."""
        assert self._fuse is not None
        with _standing_still(self._fuse):
            yield

    def log(self) -> str:
        """What nbdkit says of each request."""
        return self._log.read_text(errors="replace")

    def events(self) -> list[str]:
        """What was begun and ended, in order: Write, ...Write, Flush, ...Flush, each with its number."""
        said = self.log()
        return [f"{what} {number}" for what, number in re.findall(r"((?:\.\.\.)?(?:Write|Zero|Flush)) id=(\d+)", said)]

    def written(self) -> list[tuple[int, int]]:
        """Every write so far: (offset, length)."""
        said = self._log.read_text(errors="replace")
        found = re.findall(r" Write id=\d+ offset=(\w+) count=(\w+)", said)
        return [(int(offset, 0), int(length, 0)) for offset, length in found]

    def durable_since(self, before: int) -> bool:
        """Whether, since `before` events, a flush began when all was written, and has ended."""
        events = self.events()[before:]
        written = max((at for at, event in enumerate(events) if "Write" in event or "Zero" in event), default=0)
        return any(event.startswith("Flush") and f"...{event}" in events for event in events[written:])


@contextlib.contextmanager
def _standing_still(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Each of its threads has stopped: the signal alone is only a request."""

    def stands_still() -> bool:
        threads = Path(f"/proc/{process.pid}/task").glob("*/stat")
        return all(thread.read_text().rpartition(")")[2].split()[0] == "T" for thread in threads)

    process.send_signal(signal.SIGSTOP)
    try:
        wait_until(stands_still, "a process to stop")
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def needs(*things: str, root: bool = False) -> pytest.MarkDecorator:
    """Skip, with the reason in the report, where an outside program, a /path, or the right to do it is missing."""
    missing = [thing for thing in things if not (Path(thing).exists() if "/" in thing else shutil.which(thing))]
    if root and not is_root():
        missing.append("root")
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def is_root() -> bool:
    """Whether block devices can be made."""
    return os.geteuid() == 0
