"""What a copy writes to a mirror, and what a comparison reads from it, does not stay in the machine's memory."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lockstep.disk.transfer import Promptness
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


@needs("losetup", "/dev/loop-control", "mount", root=True)
def test_a_device_is_no_memory_though_its_node_lies_there(lab: Lab, loop: Callable[..., str]) -> None:
    """So it is in a container. What is taken for memory is written on the event loop, and nothing bounds its cache."""
    point = lab.home / "dev"
    point.mkdir()
    run("mount", "-t", "tmpfs", "-o", "dev", "tmpfs", str(point))
    try:
        os.mknod(point / "disk", stat.S_IFBLK | 0o600, os.stat(loop(lab.disk("image", MIB))).st_rdev)
        fd = os.open(point / "disk", os.O_RDWR)
        found = Promptness(fd)
        os.close(fd)
    finally:
        run("umount", str(point))
    assert found.flags is None
    assert found.cached
