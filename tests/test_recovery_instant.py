"""The target is destroyed under load: what was synced is in use again from the mirror, at once, and becomes a disk.

Destroyed is: the target's file cut to nothing and its server killed with -9, in the middle of the work.
"""

import contextlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import MIB, Lab, Served, needs, opened, run, wait_until

pytestmark = needs("nbdfuse", "fusermount3", "losetup", "mount", "mkfs.ext4", "e2fsck", "/dev/fuse", root=True)

FILES = 150


def content(number: int, version: int) -> bytes:
    return random.Random(number * 1000 + version).randbytes(1000 + 37 * (number * 7919 % 1500))


class Workload(threading.Thread):
    """Makes and rewrites files, and syncs each with its directory, until that fails. Keeps account."""

    def __init__(self, root: Path) -> None:
        super().__init__(daemon=True)
        self.root = root
        self.synced: dict[int, int] = {}  # file -> the version that fsync has confirmed
        self.begun: dict[int, int] = {}

    def run(self) -> None:
        chance = random.Random(1)
        with contextlib.suppress(OSError):
            for version in range(10_000):
                number = chance.randrange(FILES)
                self.begun[number] = version
                self._put(self.root / f"{number}", content(number, version))
                self.synced[number] = version

    def _put(self, path: Path, data: bytes) -> None:
        """As a careful program does it: a new file, synced, in place of the old one."""
        new = path.with_suffix(".new")
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
        fd = os.open(self.root, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def assert_there(self, root: Path) -> None:
        """Every file has the version that was synced last, or the one that was under way."""
        assert self.synced
        for number, version in self.synced.items():
            data = (root / f"{number}").read_bytes()
            assert data in (content(number, version), content(number, self.begun[number])), f"file {number}"


@contextlib.contextmanager
def destroyed(served: Served, mount: Path) -> Iterator[None]:
    """Cut the target to nothing and kill the server; take away what is left of the device in the end."""
    os.truncate(served.volume.target, 0)
    served.process.kill()
    served.process.wait()
    try:
        yield
    finally:
        wait_until(lambda: subprocess.run(["umount", mount], check=False).returncode == 0, f"{mount} not to be in use")
        assert "is detached" in served.volume.lab.lockstep("detach", served.volume.name).err


@contextlib.contextmanager
def mounted(device: str, mount: Path) -> Iterator[Path]:
    mount.mkdir(exist_ok=True)
    run("mount", device, str(mount))
    try:
        yield mount
    finally:
        run("umount", str(mount))


def test_every_synced_file_is_there_seconds_after_the_target_was_destroyed(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    volume, dead = lab.volume("vol", 64 * MIB), lab.home / "dead"
    overlay = lab.home / "overlay"
    with volume.served() as served:
        device = lab.lockstep("attach", "vol").ok().strip()
        run("mkfs.ext4", "-q", "-F", device)
        dead.mkdir()
        run("mount", device, str(dead))
        work = Workload(dead)
        work.start()
        wait_until(lambda: len(work.synced) >= 40, "the workload to sync some files")
        with destroyed(served, dead):
            work.join(60)
            assert not work.is_alive()
            mirror = volume.mirror.read_bytes()

            began_s = time.monotonic()
            with opened(volume, "--writable", "--overlay", overlay, "--attach") as (process, _):
                process.line("overlay")
                device = process.line("device")
                with mounted(device, lab.home / "mnt") as mount:
                    took_s = time.monotonic() - began_s
                    work.assert_there(mount)
                    (mount / "written since").write_bytes(b"x" * 100_000)
                run("e2fsck", "-f", "-n", device)
    with capsys.disabled():
        print(f"\n{len(work.synced)} files synced; from the command to the mounted file system: {took_s:.2f} s")
    assert took_s < 20  # on an idle machine it is below one
    assert volume.mirror.read_bytes() == mirror, "the mirror was written"

    new = lab.home / "new"
    lab.lockstep("commit", volume.mirror, overlay, new, "--key-file", lab.key).ok()
    run("e2fsck", "-f", "-n", str(new))
    with mounted(str(new), lab.home / "mnt") as mount:
        work.assert_there(mount)
        assert (mount / "written since").read_bytes() == b"x" * 100_000
    with opened(volume, "--writable", "--overlay", overlay):  # it goes on being an overlay
        pass
