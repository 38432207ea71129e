"""P3, P4, P7: a target that a restore or a commit overwrites is not served half done, nor taken for what it was."""

import random
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.lab import MIB, Lab, Volume, needs, opened, run, wait_until, write
from tests.test_mirror_set import in_sync

pytestmark = needs("qemu-io", "losetup", root=True)

SIZE_BYTES = 32 * MIB
CONTENT = random.Random(1).randbytes(SIZE_BYTES)
KILLED = """
import os, lockstep.cli.main as cli, lockstep.service.{module} as module
real = module.copy_out

def copy_out(*disks, on_progress, **options):
    real(*disks, on_progress=lambda done: os._exit(9) if done > {at} else None, **options)

module.copy_out = copy_out
cli.main()
"""


@pytest.fixture
def volume(lab: Lab, loop: Callable[..., str]) -> Volume:
    """A volume in sync, of a block device, which does not say when it was written."""
    volume = lab.volume("vol", SIZE_BYTES, content=CONTENT)
    device = loop(volume.target)
    lab.lockstep("remove", "vol").ok()
    disks = ["--target", device, "--mirror", volume.mirror, "--key-file", lab.key, "--iter-time", "10", "--force"]
    lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
    with volume.served():
        pass
    return volume


def device_of(volume: Volume) -> str:
    """The target, which is the file `volume.target` behind it."""
    return run("losetup", "--noheadings", "--output=NAME", "--associated", str(volume.target)).strip()


def killed(volume: Volume, module: str, *command: object) -> None:
    """Run a command that is killed in the middle; and the machine's /dev is empty of what was there."""
    program = KILLED.format(module=module, at=SIZE_BYTES // 2)
    options = ["--state-dir", str(volume.lab.state), *map(str, command), "--key-file", str(volume.lab.key)]
    assert subprocess.run([sys.executable, "-c", program, *options], check=False).returncode == 9
    run("rm", "-f", f"{device_of(volume)}.restoring")


def refusal(volume: Volume) -> str:
    return volume.lab.lockstep("serve", "vol", "--key-file", volume.lab.key).failed(1, "unfinished restore, or commit")


def test_a_commit_that_was_killed_is_not_served_half_done(volume: Volume) -> None:
    lab, device, overlay = volume.lab, device_of(volume), volume.lab.home / "overlay"
    with opened(volume, "--writable", "--overlay", overlay) as (_, uri):
        run("qemu-io", "-f", "raw", "-c", "write -P 7 5M 64k", "-c", "write -P 8 30M 64k", "-c", "flush", uri)
    commit = ["commit", volume.mirror, overlay, device, "--force"]
    killed(volume, "committing", *commit)
    refusal(volume)
    lab.lockstep(*commit, "--key-file", lab.key).ok()
    with volume.served():
        pass
    expected = bytearray(CONTENT)
    expected[5 * MIB : 5 * MIB + (64 << 10)] = b"\7" * (64 << 10)
    expected[30 * MIB : 30 * MIB + (64 << 10)] = b"\10" * (64 << 10)
    assert volume.target.read_bytes() == expected
    volume.assert_equal_disks()


def test_a_restore_is_not_served_half_done_where_its_own_record_is_lost(volume: Volume) -> None:
    lab, restore = volume.lab, ["restore", volume.mirror, device_of(volume), "--force"]
    killed(volume, "recovery", *restore)
    refusal(volume)
    lab.lockstep(*restore, "--key-file", lab.key).ok()
    with volume.served():
        pass
    assert volume.target.read_bytes() == CONTENT
    volume.assert_equal_disks()


def test_a_target_that_is_replaced_is_not_half_done_any_more(volume: Volume) -> None:
    lab = volume.lab
    killed(volume, "recovery", "restore", volume.mirror, device_of(volume), "--force")
    lab.lockstep("replace-target", "vol", device_of(volume), "--force", "--key-file", lab.key).ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: served.now()["target"]["restore"] is None, "the target to have everything")
    assert volume.target.read_bytes() == CONTENT


def test_a_newer_mirror_is_not_called_equal_to_a_target_that_was_restored_from_an_older_one(volume: Volume) -> None:
    lab, second = volume.lab, volume.lab.home / "second"
    quick = ["--key-file", lab.key, "--iter-time", "10"]
    lab.lockstep("mirror", "add", "vol", second, *quick, environment=lab.quick_format()).ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: in_sync(served), "both mirrors to be in sync")
    away = volume.mirror.rename(lab.home / "away")
    with volume.served(in_sync=False) as served:
        write(served, "write -P 7 5M 64k")
    away.rename(volume.mirror)
    lab.lockstep("restore", volume.mirror, device_of(volume), "--force", "--key-file", lab.key).ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: in_sync(served), "both mirrors to be in sync")
    assert volume.target.read_bytes() == CONTENT
    volume.assert_equal_disks()
    Volume(lab, "vol", volume.target, second, None).assert_equal_disks()


def test_a_target_that_is_being_filled_is_not_overwritten(volume: Volume) -> None:
    """What it lacks would be read from the mirror all the same: of two disks, a part each."""
    lab, device, overlay = volume.lab, device_of(volume), volume.lab.home / "overlay"
    lab.lockstep("replace-target", "vol", device, "--force", "--key-file", lab.key).ok()
    with opened(volume, "--writable", "--overlay", overlay) as (_, uri):
        run("qemu-io", "-f", "raw", "-c", "write -P 7 5M 64k", "-c", "flush", uri)
    for command in (["restore", volume.mirror, device], ["commit", volume.mirror, overlay, device]):
        lab.lockstep(*command, "--force", "--key-file", lab.key).failed(1, "is still being filled")
