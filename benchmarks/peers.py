"""The servers under test: one class each, with its recipe.

A peer is entered (its server starts), becomes ready (its mirror is in sync), is measured, proves that what it was
measured at really happened, and is left (nothing of it remains). Every peer gets a directory of its own with the
same random target in it.
"""

import filecmp
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from benchmarks.processes import BenchmarkError, Server, run, wait_for
from benchmarks.qmp import Qmp
from lockstep.crypto.cipher import XtsCipher
from lockstep.service.control_client import ask_status
from lockstep.service.state import ENVIRONMENT, State

LUKS_HEADER_BYTES = 16 << 20
PIECE_BYTES = 1 << 20


class Peer(ABC):
    """A server, the disks in `home` behind it, and the URI at which fio finds it."""

    programs: ClassVar[Mapping[str, str]]  # program -> Debian package
    mirrors: ClassVar[bool] = True
    server: Server
    uri: str

    def __init__(self, name: str, home: Path, size_bytes: int) -> None:
        self.name = name
        self.home = home
        self.size_bytes = size_bytes
        self.target = home / "target"
        self.mirror = home / "mirror"
        self.key_file = home / "key"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        """End the server if there is one."""
        if hasattr(self, "server"):
            self.server.kill()

    @abstractmethod
    def start(self) -> None:
        """Start the server; set `server` and `uri`."""

    @abstractmethod
    def await_in_sync(self) -> None:
        """Wait until the mirror holds everything, so that nobody is measured during a copy. No mirror: no wait."""

    @abstractmethod
    def prove(self) -> str:
        """Stop the server and show that decrypt(mirror) == target; returns what was shown. Different: an error."""

    def _make_key(self) -> None:
        self.key_file.touch(mode=0o600)
        self.key_file.write_text(os.urandom(16).hex())


class Lockstep(Peer):
    """The product, with a mirror whose encryption sector is given; `direct` is with direct I/O."""

    programs: ClassVar[Mapping[str, str]] = {"cryptsetup": "cryptsetup-bin"}

    def __init__(self, home: Path, size_bytes: int, sector_bytes: int, *, direct: bool = False) -> None:
        super().__init__(f"{'direct' if direct else 'lockstep'}-{sector_bytes}", home, size_bytes)
        self.sector_bytes = sector_bytes
        self.options = ["--direct"] if direct else []
        self.state = State(str(home / "state"))

    def start(self) -> None:
        """Create the volume and serve it."""
        self.create()
        self.serve()

    def create(self, *, preallocated: bool = True) -> None:
        """Create the volume, not served yet."""
        self._make_key()
        with self.mirror.open("wb") as mirror:
            if preallocated:
                os.posix_fallocate(mirror.fileno(), 0, self.size_bytes + LUKS_HEADER_BYTES)
            else:
                mirror.truncate(self.size_bytes + LUKS_HEADER_BYTES)
        disks = ["--target", str(self.target), "--mirror", str(self.mirror)]
        luks = ["--key-file", str(self.key_file), "--sector-size", str(self.sector_bytes), "--iter-time", "100"]
        self.lockstep("create", self.name, *disks, *luks)

    def serve(self) -> None:
        """Serve it, and wait until clients may connect."""
        options = ["--key-file", str(self.key_file), "--socket", str(self.home / "socket"), *self.options]
        self.server = Server(
            self._command("serve", self.name, *options),
            self.home / f"{self.name}.log",
        )
        self.uri = self.server.await_ready(self._ready_uri)

    def stop(self) -> None:
        """End it in order."""
        self.server.terminate()
        self.server.await_end()

    def await_in_sync(self) -> None:
        """Wait for its one mirror to be in sync."""
        wait_for(lambda: self.mirror_status()["state"] == "in-sync", 600, f"the mirror of {self.name} to be in sync")

    def mirror_status(self) -> dict[str, Any]:
        """What its status says of the mirror, asked at its control socket: a command would take half a second."""
        (mirror,) = ask_status(self.state.control(self.name), self.name)["mirrors"]
        return dict(mirror)

    def prove(self) -> str:
        """Restore from the mirror alone, and compare with the target."""
        self.stop()
        restored = self.home / "restored"
        self.restore(restored)
        if not filecmp.cmp(self.target, restored, shallow=False):
            raise BenchmarkError(f"{self.name}: what `lockstep restore` gives back differs from the target")
        restored.unlink()
        return "`lockstep restore` from the mirror alone gives back the target, byte for byte"

    def restore(self, output: Path) -> None:
        """Write what the mirror alone gives back to a new file."""
        self.lockstep("restore", str(self.mirror), str(output), "--key-file", str(self.key_file))

    def lockstep(self, *arguments: str) -> str:
        """Run a command to its end."""
        return run(self._command(*arguments))

    def _command(self, *arguments: str) -> list[str]:
        return ["env", f"{ENVIRONMENT}={self.state.path}", sys.executable, "-m", "lockstep", *arguments]

    def _ready_uri(self) -> str | None:
        lines = self.server.log.read_text().splitlines()
        return next((line.removeprefix("ready ").strip() for line in lines if line.startswith("ready ")), None)


class Nbdkit(Peer):
    """nbdkit's file plugin: the target alone. What an NBD server costs before anything is mirrored or encrypted."""

    programs: ClassVar[Mapping[str, str]] = {"nbdkit": "nbdkit"}
    mirrors: ClassVar[bool] = False

    def __init__(self, home: Path, size_bytes: int) -> None:
        super().__init__("nbdkit", home, size_bytes)

    def start(self) -> None:
        """Serve the file."""
        self._serve("file", str(self.target))

    def _serve(self, plugin: str, *arguments: str) -> None:
        """Have nbdkit serve; it writes its pid file when clients may connect."""
        socket, pid_file = self.home / "socket", self.home / "pid"
        options = ["--foreground", "--unix", str(socket), "--pidfile", str(pid_file)]
        self.server = Server(["nbdkit", *options, plugin, *arguments], self.home / "nbdkit.log")
        self.server.await_ready(pid_file.exists)
        self.uri = f"nbd+unix:///?socket={socket}"

    def await_in_sync(self) -> None:
        """It has no mirror."""

    def prove(self) -> str:
        """It has no mirror."""
        return "no mirror, no encryption: nothing to prove"


class Bare(Nbdkit):
    """Lockstep's work without Lockstep: a plugin of nbdkit in C that encrypts, writes both disks, and flushes both.

    It keeps no record, asks for no right, puts overlapping writes in no order: what is left is what the work itself
    costs, on this machine, in a compiled language.
    """

    programs: ClassVar[Mapping[str, str]] = {"nbdkit": "nbdkit", "cc": "gcc"}
    mirrors: ClassVar[bool] = True

    def __init__(self, home: Path, size_bytes: int, sector_bytes: int) -> None:
        Peer.__init__(self, f"bare-{sector_bytes}", home, size_bytes)
        self.sector_bytes = sector_bytes

    def start(self) -> None:
        """Build the plugin, encrypt the target onto the mirror, and serve."""
        plugin = self.home / "bare.so"
        options = ["-O2", "-shared", "-fPIC", "-o", str(plugin)]
        run(["cc", *options, str(Path(__file__).with_name("bare.c")), "-lgcrypt", "-lpthread"])
        self.key_file.touch(mode=0o600)
        self.key_file.write_bytes(os.urandom(64))
        with self.target.open("rb") as target, self.mirror.open("wb") as mirror:
            mirror.seek(LUKS_HEADER_BYTES)
            for offset in range(0, self.size_bytes, PIECE_BYTES):
                mirror.write(self._encrypted(target.read(PIECE_BYTES), offset))
        disks = [f"target={self.target}", f"mirror={self.mirror}"]
        self._serve(str(plugin), *disks, f"key={self.key_file}", f"sector-size={self.sector_bytes}")

    def prove(self) -> str:
        """Compare the mirror with the target, encrypted."""
        self.server.terminate()
        self.server.await_end()
        with self.target.open("rb") as target, self.mirror.open("rb") as mirror:
            mirror.seek(LUKS_HEADER_BYTES)
            for offset in range(0, self.size_bytes, PIECE_BYTES):
                if mirror.read(PIECE_BYTES) != self._encrypted(target.read(PIECE_BYTES), offset):
                    raise BenchmarkError(f"{self.name}: the mirror differs from the target, encrypted, at {offset}")
        return "the mirror equals the target, encrypted"

    def _encrypted(self, data: bytes, offset: int) -> bytearray:
        encrypted = bytearray(len(data))
        XtsCipher(self.key_file.read_bytes(), self.sector_bytes).encrypt_into(offset // 512, data, encrypted)
        return encrypted


class Qemu(Peer):
    """qemu-storage-daemon: a raw target mirrored to LUKS1, each write acknowledged when both have it.

    The export comes before the job: the job puts its filter between the target and the users it finds there, and a
    user that comes later writes past the filter. `direct` is with direct I/O.
    """

    programs: ClassVar[Mapping[str, str]] = {"qemu-storage-daemon": "qemu-system-common", "qemu-img": "qemu-utils"}

    def __init__(self, home: Path, size_bytes: int, *, direct: bool = False) -> None:
        super().__init__("qemu-direct" if direct else "qemu", home, size_bytes)
        self.cache = ",cache.direct=on,aio=native" if direct else ""
        self.secret = f"secret,id=key,file={self.key_file}"

    def start(self) -> None:
        """Format the mirror, export the target, then start the mirror job."""
        self._make_key()
        wait_for(self._format_mirror, 60, "qemu-img to format the mirror")
        socket, monitor = self.home / "socket", self.home / "qmp"
        options = {
            "--object": [self.secret],
            "--blockdev": [
                f"file,node-name=target-file,filename={self.target}{self.cache}",
                "raw,node-name=target,file=target-file",
                f"file,node-name=mirror-file,filename={self.mirror}{self.cache}",
                "raw,node-name=mirror-raw,file=mirror-file",
                "luks,node-name=mirror,file=mirror-raw,key-secret=key",
            ],
            "--nbd-server": [f"addr.type=unix,addr.path={socket}"],
            "--export": ["nbd,id=export,node-name=target,name=,writable=on"],
            "--chardev": [f"socket,id=monitor,path={monitor},server=on,wait=off"],
            "--monitor": ["chardev=monitor"],
        }
        words = [word for name, values in options.items() for value in values for word in (name, value)]
        self.server = Server(["qemu-storage-daemon", *words], self.home / "qemu.log")
        self.server.await_ready(monitor.exists)
        self.qmp = Qmp(monitor)
        job = {"job-id": "mirror", "device": "target", "target": "mirror", "sync": "full"}
        self.qmp.command("blockdev-mirror", {**job, "copy-mode": "write-blocking"})
        self.uri = f"nbd+unix:///?socket={socket}"

    def await_in_sync(self) -> None:
        """Wait for the job to be READY; a job that met an error is gone."""

        def ready() -> bool:
            jobs = self.qmp.command("query-block-jobs")
            if not jobs:
                raise BenchmarkError(f"qemu: the mirror job ended by itself:\n{self.server.log.read_text()}")
            return bool(jobs[0]["ready"])

        wait_for(ready, 600, "QEMU's mirror job to be READY")

    def prove(self) -> str:
        """Break the job off without a last copy, and compare the decrypted mirror with the target."""
        self.qmp.command("block-job-cancel", {"device": "mirror", "force": True})
        self.qmp.await_event("BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED")
        self.qmp.command("quit")
        self.server.await_end()
        disks = [f"driver=raw,file.filename={self.target}", f"driver=luks,key-secret=key,file.filename={self.mirror}"]
        run(["qemu-img", "compare", "--object", self.secret, "--image-opts", *disks])
        return "`qemu-img compare`: the decrypted LUKS1 mirror equals the target"

    def _format_mirror(self) -> bool:
        luks = "key-secret=key,cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,iter-time=10,preallocation=full"
        options = ["-q", "-f", "luks", "--object", self.secret, "-o", luks]
        try:
            run(["qemu-img", "create", *options, str(self.mirror), str(self.size_bytes)])
        except BenchmarkError as error:
            if "accurate CPU usage" not in str(error):
                raise
            return False  # it times its key derivation with a coarse clock, which fails now and then: again
        return True

    def kill(self) -> None:
        """End the server and the connection to its monitor."""
        super().kill()
        if hasattr(self, "qmp"):
            self.qmp.close()
