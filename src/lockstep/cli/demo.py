"""demo: the whole story on real files, in a temporary directory, told by the commands that a user would type."""

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import typer

from lockstep.cli.output import human_bytes
from lockstep.errors import AttachNeedsRoot, DemoFailed, DiskToolMissing

TARGET_BYTES: Final = 256 << 20
FILES_WANTED: Final = 4000
NEEDLE_BYTES: Final = 64
NEEDLES: Final = 20
PATIENCE_S: Final = 60.0

# Program -> the Debian package that it is in.
_PROGRAMS: Final = {
    "cryptsetup": "cryptsetup-bin",
    "mkfs.ext4": "e2fsprogs",
    "fsck.ext4": "e2fsprogs",
    "losetup": "util-linux",
    "mount": "util-linux",
    "blkid": "util-linux",
}


@dataclass
class _Written:
    """What was copied onto the volume."""

    digests: dict[str, str]
    size_bytes: int
    elapsed_s: float


def demo() -> None:
    """Show it all: mirror a file system, destroy its disk, get every file back from the mirror alone."""
    if os.geteuid() != 0:
        raise AttachNeedsRoot
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            raise DiskToolMissing(tool=program, package=package)
    began_s = time.monotonic()
    directory = tempfile.mkdtemp(prefix="lockstep-demo-")
    story = _Story(Path(directory))
    try:
        written = story.tell()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        story.clean_up()
        shutil.rmtree(directory, ignore_errors=True)
    elapsed_s = time.monotonic() - began_s
    typer.secho("\nWhat was shown", bold=True)
    copied = f"{len(written.digests)} files, {human_bytes(written.size_bytes)}"
    typer.echo(
        f"  written    {copied}, at {human_bytes(written.size_bytes / written.elapsed_s)}/s, each write to both disks"
    )
    typer.echo("  encrypted  the mirror is a LUKS2 volume; nothing of the files can be found in it")
    typer.echo("  distinct   the system sees one ext4 and one crypto_LUKS, never two disks with the same signature")
    typer.echo(f"  restored   {human_bytes(TARGET_BYTES)} from the mirror alone; fsck clean")
    typer.echo(f"  compared   the SHA-256 of all {len(written.digests)} files: every one as it was written")
    typer.echo(f"All of it in {elapsed_s:.0f} seconds; the temporary directory is gone again.")


class _Story:
    """The demo in a directory of its own; `clean_up` undoes whatever has been done so far."""

    def __init__(self, directory: Path) -> None:
        self.target = directory / "target.img"
        self.mirror = directory / "mirror.img"
        self.restored = directory / "restored.img"
        self._key = directory / "passphrase"
        self._point = directory / "mnt"
        self._state = directory / "state"
        self._server: subprocess.Popen[str] | None = None

    def tell(self) -> _Written:
        """Do it all; returns what was written. Raises DemoFailed."""
        self._set_the_scene()
        with self._served():
            device = self._lockstep("attach", "demo").strip()
            _run("mkfs.ext4", "-q", device)
            with self._mounted(device):
                _say("Copying the Python standard library onto it")
                written = _copy_tree(self._point)
            self._wait_in_sync()
            self._examine_mirror(written)
            self._lockstep("detach", "demo")
        _say("Destroying the target: overwriting it with noise, then deleting it")
        self.target.write_bytes(secrets.token_bytes(1 << 20) * (TARGET_BYTES >> 20))
        self.target.unlink()
        said = self._lockstep("restore", str(self.mirror), str(self.restored), "--key-file", str(self._key))
        typer.echo(f"    {said.strip()}")
        self._check_restored(written)
        return written

    def clean_up(self) -> None:
        """Unmount, detach, stop the server; whatever of it there is."""
        subprocess.run(["umount", "-q", self._point], capture_output=True, check=False)
        if self._server is not None:
            with contextlib.suppress(DemoFailed):
                self._lockstep("detach", "demo", quiet=True)
            self._server.terminate()
            try:
                self._server.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()

    def _set_the_scene(self) -> None:
        _say("Making a 256 MiB target, and a mirror for it")
        self._key.write_text(secrets.token_urlsafe(24))
        self._key.chmod(0o600)
        self._point.mkdir()
        with self.target.open("wb") as file:
            file.truncate(TARGET_BYTES)
        disks = ("--target", str(self.target), "--mirror", str(self.mirror))
        self._lockstep("create", "demo", *disks, "--key-file", str(self._key))

    @contextlib.contextmanager
    def _served(self) -> Iterator[None]:
        command = [*self._program("serve", "demo"), "--key-file", str(self._key)]
        _echo_command("serve", "demo", "--key-file", str(self._key), "&")
        log = self.target.with_name("serve.log")
        with log.open("w") as stderr:
            self._server = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
            )
        assert self._server.stdout is not None
        ready = self._server.stdout.readline()
        if not ready.startswith("ready "):
            raise DemoFailed(step="lockstep serve demo", reason=log.read_text().strip() or "it ended")
        typer.echo(f"    {ready.strip()}")
        yield
        self._server.terminate()
        code = self._server.wait(PATIENCE_S)
        self._server.stdout.close()
        if code:
            raise DemoFailed(step="stopping the server", reason=log.read_text().strip())
        self._server = None

    @contextlib.contextmanager
    def _mounted(self, source: str, *options: str) -> Iterator[None]:
        _run("mount", *options, source, str(self._point))
        yield
        _run("umount", str(self._point))

    def _wait_in_sync(self) -> None:
        """Wait until the copy of what the target held at first has ended."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self._status()["mirrors"][0]["state"] != "in-sync":
            if time.monotonic() > deadline_s:
                raise DemoFailed(step="the initial sync", reason=f"it took more than {PATIENCE_S:.0f} seconds")
            time.sleep(0.2)
        typer.echo(self._lockstep("status", "demo"), nl=False)

    def _status(self) -> dict[str, Any]:
        described: dict[str, Any] = json.loads(self._lockstep("status", "demo", "--json", quiet=True))["volumes"][0]
        return described

    def _examine_mirror(self, written: _Written) -> None:
        _say("Looking at the two disks from outside")
        signatures = {
            path: _run("blkid", "-p", "-s", "TYPE", "-o", "value", str(path)).strip()
            for path in (self.target, self.mirror)
        }
        for path, signature in signatures.items():
            typer.echo(f"    {path.name:<12} {signature}")
        if (signatures[self.target], signatures[self.mirror]) != ("ext4", "crypto_LUKS"):
            raise DemoFailed(step="comparing the signatures", reason="they are not ext4 and crypto_LUKS")
        _run("cryptsetup", "open", "--test-passphrase", "--key-file", str(self._key), str(self.mirror))
        needles = _needles(written)
        in_target, in_mirror = _count_found(self.target, needles), _count_found(self.mirror, needles)
        typer.echo(
            f"    of {len(needles)} pieces of the files, {in_target} are found in the target, {in_mirror} in the mirror"
        )
        if in_target < len(needles) or in_mirror:
            raise DemoFailed(step="searching the disks", reason="the target must hold every piece, the mirror none")

    def _check_restored(self, written: _Written) -> None:
        _say("Checking what came back")
        _run("fsck.ext4", "-f", "-n", str(self.restored))
        with self._mounted(str(self.restored), "-o", "loop,ro"):
            for name, digest in written.digests.items():
                if _digest(self._point / name) != digest:
                    raise DemoFailed(step="comparing the files", reason=f"{name} is not as it was written")

    def _program(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "lockstep", "--state-dir", str(self._state), *arguments]

    def _lockstep(self, *arguments: str, quiet: bool = False) -> str:
        if not quiet:
            _echo_command(*arguments)
        return _run(*self._program(*arguments))


def _copy_tree(point: Path) -> _Written:
    """Copy a few thousand real files, and have them on the disks when this returns."""
    library = Path(sysconfig.get_paths()["stdlib"])
    digests: dict[str, str] = {}
    size_bytes = 0
    began_s = time.monotonic()
    for source in sorted(library.rglob("*")):
        name = str(source.relative_to(library))
        if len(digests) == FILES_WANTED:
            break
        if source.is_symlink() or not source.is_file() or "site-packages" in name or size_bytes > TARGET_BYTES // 2:
            continue
        copy = point / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        digests[name] = _digest(source)
        size_bytes += source.stat().st_size
    subprocess.run(["sync", "-f", point], check=True)
    return _Written(digests, size_bytes, time.monotonic() - began_s)


def _needles(written: _Written) -> list[bytes]:
    """Pieces out of the middle of files, long and varied enough not to occur by chance."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for name in list(written.digests)[:: max(1, len(written.digests) // (4 * NEEDLES))]:
        content = (library / name).read_bytes()
        piece = content[len(content) // 2 : len(content) // 2 + NEEDLE_BYTES]
        # Whole inside one block, or the piece could be split between two places of the disk.
        if len(set(piece)) > 12 and len(content) // 2 % 4096 < 4096 - NEEDLE_BYTES:
            found.append(piece)
    return found[:NEEDLES]


def _count_found(disk: Path, needles: list[bytes]) -> int:
    with disk.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return sum(content.find(needle) >= 0 for needle in needles)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoFailed(step=" ".join(command), reason=(done.stderr or done.stdout).strip())
    return done.stdout


def _say(text: str) -> None:
    typer.secho(f"\n{text}", bold=True)


def _echo_command(*arguments: str) -> None:
    typer.secho(f"  $ lockstep {' '.join(arguments)}", dim=True)


COMMANDS = {"demo": demo}
