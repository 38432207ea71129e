"""File systems live on an attached volume, and its mirror alone gives them back.

The system's own tools are the referees: fsck of the target and of the restored image, blkid and cryptsetup of the
mirror, and grep for what must not be readable there.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.lab import MIB, Lab, Volume, needs, run

pytestmark = needs("nbdfuse", "fusermount3", "losetup", "mount", "blkid", "cryptsetup", "/dev/fuse", root=True)

FILES: Final = 1100
SAMPLES: Final = 100


@dataclass(frozen=True)
class FileSystem:
    """How to make and check one kind; `check` changes nothing and fails when anything is wrong."""

    kind: str
    size_bytes: int
    sector_bytes: int
    make: tuple[str, ...]
    check: tuple[str, ...]


FILE_SYSTEMS: Final = (
    FileSystem("ext4", 64 * MIB, 512, ("mkfs.ext4", "-q", "-F"), ("e2fsck", "-fn")),
    FileSystem("xfs", 300 * MIB, 4096, ("mkfs.xfs", "-q", "-f"), ("xfs_repair", "-n", "-f")),
    FileSystem("btrfs", 112 * MIB, 4096, ("mkfs.btrfs", "-q", "-f"), ("btrfs", "check", "--readonly")),
)


@contextlib.contextmanager
def attached(volume: Volume) -> Iterator[str]:
    """The volume as a block device, gone again in the end."""
    device = volume.lab.lockstep("attach", volume.name).ok().strip()
    try:
        yield device
        volume.lab.lockstep("detach", volume.name).ok()
    finally:
        volume.lab.lockstep("detach", volume.name)


@contextlib.contextmanager
def mounted(device: str, where: Path) -> Iterator[Path]:
    """A file system, unmounted in the end."""
    where.mkdir(exist_ok=True)
    run("mount", device, str(where))
    try:
        yield where
        run("umount", str(where))
    finally:
        subprocess.run(["umount", where], capture_output=True, check=False)


def python_files() -> list[Path]:
    """Real files of many sizes, the same in each run."""
    found = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    files = [path for path in found if "site-packages" not in path.parts and path.stat().st_size < 100_000][:FILES]
    assert len(files) >= 1000, "this Python has no library to copy"
    return files


def copy_tree(files: list[Path], to: Path) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    for path in files:
        copy = to / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def sampled_lines(tree: Path) -> list[bytes]:
    """Lines of the files, each within one block of its file, so that they lie in one piece on the disk."""
    found: set[bytes] = set()
    paths = sorted(tree.rglob("*.py"))
    chance = random.Random(9)
    while len(found) < SAMPLES:
        path = chance.choice(paths)
        at = 0
        for line in path.read_bytes().splitlines(keepends=True):
            text = line.strip()
            if len(text) >= 40 and at // 512 == (at + len(line)) // 512 and chance.random() < 0.05:
                found.add(text)
                break
            at += len(line)
    return sorted(found)


def lines_in(path: Path, lines: list[bytes], home: Path) -> set[bytes]:
    """Which of the lines occur anywhere in a file."""
    patterns = home / "patterns"
    patterns.write_bytes(b"\n".join(lines))
    command = ["grep", "--text", "--only-matching", "--fixed-strings", f"--file={patterns}", str(path)]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "LC_ALL": "C"}, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    return set(done.stdout.splitlines())


def identity(disk: Path) -> dict[str, str]:
    """What blkid says of a disk."""
    said = run("blkid", "--probe", "--output", "export", str(disk))
    return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)


def fill_and_change(files: list[Path], mount: Path, target: Path) -> tuple[dict[str, bytes], list[bytes]]:
    """Copy, trim, delete, write again; what must be there afterwards, and lines that occur in it."""
    copy_tree(files, mount / "tree")
    copy_tree(files[::3], mount / "doomed")
    run("sync", "-f", str(mount))
    shutil.rmtree(mount / "doomed")
    for path in sorted((mount / "tree").rglob("*.py"))[::7]:
        path.unlink()
    run("sync", "-f", str(mount))
    allocated = target.stat().st_blocks
    run("fstrim", str(mount))
    assert target.stat().st_blocks < allocated, "a trim did not reach the target"
    copy_tree(files[::5], mount / "again")
    with (mount / "large").open("wb") as large:
        for seed in range(5):
            large.write(random.Random(seed).randbytes(MIB + 1))
    run("fstrim", str(mount))
    return tree_of(mount), sampled_lines(mount)


def tree_of(mount: Path) -> dict[str, bytes]:
    return {str(p.relative_to(mount)): p.read_bytes() for p in sorted(mount.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", FILE_SYSTEMS, ids=lambda kind: kind.kind)
def test_a_file_system_lives_on_a_volume_and_comes_back_from_the_mirror(lab: Lab, kind: FileSystem) -> None:
    for program in (kind.make[0], kind.check[0]):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    volume = lab.volume("vol", kind.size_bytes, "--sector-size", kind.sector_bytes)
    with volume.served(), attached(volume) as device:
        run(*kind.make, device)
        with mounted(device, lab.home / "mnt") as mount:
            expected, lines = fill_and_change(python_files(), mount, volume.target)
        with mounted(device, lab.home / "mnt") as mount:
            assert tree_of(mount) == expected
    volume.assert_equal_disks()
    run(*kind.check, str(volume.target))

    restored = lab.home / "restored"
    volume.restore(restored).ok()
    run(*kind.check, str(restored))
    run("cmp", str(restored), str(volume.target))

    run("cryptsetup", "open", "--test-passphrase", f"--key-file={lab.key}", str(volume.mirror))
    target, mirror = identity(volume.target), identity(volume.mirror)
    assert target["TYPE"] == kind.kind
    assert mirror["TYPE"] == "crypto_LUKS"
    assert mirror["UUID"] != target["UUID"]
    assert mirror.get("LABEL") != target.get("LABEL") or "LABEL" not in mirror
    assert lines_in(volume.target, lines, lab.home) == set(lines)
    assert lines_in(volume.mirror, lines, lab.home) == set()


@needs("mkfs.ext4", "e2fsck")
def test_two_volumes_are_attached_at_once(lab: Lab) -> None:
    volumes = [lab.volume(name, 8 * MIB) for name in ("one", "two")]
    with contextlib.ExitStack() as stack:
        for volume in volumes:
            stack.enter_context(volume.served())
        devices = [stack.enter_context(attached(volume)) for volume in volumes]
        assert len(set(devices)) == 2
        mounts = []
        for volume, device in zip(volumes, devices, strict=True):
            run("mkfs.ext4", "-q", "-F", device)
            mounts.append(stack.enter_context(mounted(device, lab.home / f"mnt-{volume.name}")))
        for number in range(50):
            for volume, mount in zip(volumes, mounts, strict=True):
                (mount / str(number)).write_bytes(volume.name.encode() * 5000)
    for volume in volumes:
        volume.assert_equal_disks()
        run("e2fsck", "-fn", str(volume.target))
        assert lines_in(volume.target, [b"onetwo", volume.name.encode() * 20], lab.home) == {volume.name.encode() * 20}
