"""A place to run the real thing: volumes of image files, the real server, and outside referees."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dissect.fve.luks import LUKS

PASSPHRASE = b"correct horse battery staple"
PATIENCE_S = 60.0
MIB = 1 << 20


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

    def lockstep(self, *arguments: object, stdin: bytes | None = None) -> Result:
        """Run a command to its end."""
        command = [sys.executable, "-m", "lockstep", "--state-dir", str(self.state), *map(str, arguments)]
        return Result(subprocess.run(command, input=stdin or b"", capture_output=True, check=False, timeout=PATIENCE_S))

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
        self.lockstep("create", name, *disks, *extra, *options).ok()
        return volume


class Volume:
    """A volume with its two disks."""

    def __init__(self, lab: Lab, name: str, target: Path, mirror: Path, header: Path | None) -> None:
        self.lab = lab
        self.name = name
        self.target = target
        self.mirror = mirror
        self.header = header

    @contextlib.contextmanager
    def served(self, *options: object, in_sync: bool = True) -> Iterator["Served"]:
        """Serve it; `in_sync` waits for the end of the initial copy first. Stops it in order at the end."""
        served = Served(self, options)
        try:
            served.await_ready()
            if in_sync:
                wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be in sync")
            yield served
            if served.process.poll() is None:
                served.stop()
        finally:
            served.kill()

    def decrypted(self) -> bytes:
        """The mirror's data as an independent LUKS2 reader sees it, as long as the target."""
        with contextlib.ExitStack() as files:
            mirror = files.enter_context(self.mirror.open("rb"))
            header = files.enter_context(self.header.open("rb")) if self.header else None
            luks = LUKS(header or mirror)
            luks.unlock_with_passphrase(PASSPHRASE.decode())
            if header is not None:
                luks.fh = mirror
            stream = luks.open()
            data: bytes = stream.read(self.target.stat().st_size)
            return data

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

    def __init__(self, volume: Volume, options: Sequence[object] = ()) -> None:
        self.volume = volume
        self.log = volume.lab.home / f"{volume.name}.log"
        command = ["serve", volume.name, "--key-file", volume.lab.key, *options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lockstep", "--state-dir", str(volume.lab.state), *map(str, command)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
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

    def mirror_state(self) -> str:
        """The state of its only mirror."""
        (mirror,) = self.status()["mirrors"]
        return str(mirror["state"])

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


def is_root() -> bool:
    """Whether block devices can be made."""
    return os.geteuid() == 0
