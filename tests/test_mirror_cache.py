"""What a copy writes to a mirror, and what a comparison reads from it, does not stay in the machine's memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import MIB, Lab, Volume, needs, run, wait_until

SIZE_BYTES = 64 * MIB
LITTLE_BYTES = 4 * MIB


def cached_bytes(device: Path) -> int:
    return int(run("fincore", "--bytes", "--noheadings", "--output", "RES", str(device)))


@pytest.fixture
def disk(lab: Lab) -> Iterator[Path]:
    """Where a file system is that writes out what it has cached, wherever the tests run."""
    image, point = lab.disk("image", SIZE_BYTES + 64 * MIB), lab.home / "disk"
    point.mkdir()
    run("mkfs.ext4", "-q", "-F", str(image))
    run("mount", "-o", "loop", str(image), str(point))
    yield point
    run("umount", str(point))


@needs("losetup", "/dev/loop-control", "mount", "mkfs.ext4", "fincore", root=True)
def test_the_mirror_is_not_left_in_memory(lab: Lab, disk: Path) -> None:
    target, mirror = lab.disk("target", SIZE_BYTES, b"\x55" * SIZE_BYTES), disk / "mirror"
    disks = ["--target", target, "--mirror", mirror, "--key-file", lab.key]
    lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
    volume = Volume(lab, "vol", target, mirror, None)
    with volume.served() as served:
        wait_until(lambda: served.mirror_state() == "in-sync", "the copy to end")
        assert cached_bytes(volume.mirror) < LITTLE_BYTES
        run("qemu-io", "-f", "raw", "-c", "write -P 7 8M 16M", "-c", "flush", served.uri)
        assert cached_bytes(volume.mirror) >= 16 * MIB, "what clients write, and may write again, stays"
        lab.lockstep("verify", "vol").ok()
        assert cached_bytes(volume.mirror) < LITTLE_BYTES
    volume.assert_equal_disks()
