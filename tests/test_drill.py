"""`lockstep drill`: a good backup passes, a bad one fails and says where.

Nothing is left behind, and the mirror is as it was.
"""

import contextlib
import functools
import json
import os
import pwd
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep.cli import options
from lockstep.crypto.luks import read_header
from lockstep.errors import DrillOverlayFailed
from tests.lab import MIB, Lab, Served, Volume, needs, run, wait_until

pytestmark = needs("nbdfuse", "fusermount3", "losetup", "mount", "blkid", "mkfs.ext4", "/dev/fuse", root=True)

EXT4 = ("mkfs.ext4", "-q", "-F")


def backed_up(lab: Lab, image: Path) -> Volume:
    """A volume whose mirror is in sync with this image."""
    volume = lab.volume("vol", image.stat().st_size, content=image.read_bytes())
    volume.copy_by_hand()
    return volume


def file_system(lab: Lab, size_bytes: int, *make: str) -> Path:
    """An image with a few files in it."""
    image, content = lab.home / "image", lab.home / "content"
    content.mkdir(exist_ok=True)
    for number in range(20):
        (content / f"file {number}").write_bytes(os.urandom(20_000))
    lab.disk("image", size_bytes)
    if make[0] == "mkfs.ext4":
        run(*make, "-d", str(content), str(image))
    elif make[0] == "mkfs.btrfs":
        run(*make, "--rootdir", str(content), str(image))
    else:
        run(*make, str(image))
    return image


def partitioned(lab: Lab, *contents: Path) -> Path:
    """A disk with an MBR partition table and these partitions, from 1 MiB on."""
    image, at = lab.home / "disk", MIB
    table = bytearray(512)
    with image.open("wb") as disk:
        for number, content in enumerate(contents):
            data = content.read_bytes()
            disk.seek(at)
            disk.write(data)
            struct.pack_into("<B3sB3sII", table, 446 + 16 * number, 0, b"", 0x83, b"", at // 512, len(data) // 512)
            at += len(data)
        table[510:] = b"\x55\xaa"
        disk.seek(0)
        disk.write(table)
    return image


def drill(volume: Volume, *options: object) -> tuple[int, dict[str, object], list[tuple[str, bool]], str]:
    """Its exit code, the report of the only mirror, its steps, and what it said on standard error."""
    mirror = volume.mirror.read_bytes()
    done = volume.lab.lockstep("drill", "vol", "--key-file", volume.lab.key, "--json", *options)
    assert volume.mirror.read_bytes() == mirror, "the mirror was written"
    assert_clean(volume)
    (report,) = json.loads(done.out)["mirrors"]
    row = json.loads(volume.lab.lockstep("audit", "vol", "--json").ok().splitlines()[-1])
    assert (row["event"], row["details"]) == ("drill", report)
    return done.code, report, [(step["step"], step["passed"]) for step in report["steps"]], done.err


def assert_clean(volume: Volume) -> None:
    home = str(volume.lab.home)
    assert f"{home}/state/run" not in Path("/proc/self/mountinfo").read_text()
    assert home not in run("losetup", "--list", "--noheadings", "--output", "BACK-FILE")
    assert not [name for name in os.listdir(volume.lab.state / "run") if name.startswith(".drill")]


GOOD = [("open", True), ("attach", True), ("look", True), ("replay", True), ("check", True), ("read", True)]


def test_what_is_on_the_disk_says_nothing_to_the_terminal(lab: Lab) -> None:
    volume = backed_up(lab, file_system(lab, 8 * MIB, *EXT4, "-L", "\x1b[31mred"))
    said = volume.lab.lockstep("drill", "vol", "--key-file", volume.lab.key).ok()
    assert "\\x1b[31mred: " in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("size_bytes", "make"),
    [
        (8 * MIB, EXT4),
        pytest.param(112 * MIB, ("mkfs.btrfs", "-q", "-f"), marks=needs("mkfs.btrfs", "btrfs")),
        pytest.param(300 * MIB, ("mkfs.xfs", "-q", "-f"), marks=needs("mkfs.xfs", "xfs_repair")),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else "",
)
def test_a_good_backup_passes(lab: Lab, size_bytes: int, make: tuple[str, ...]) -> None:
    volume = backed_up(lab, file_system(lab, size_bytes, *make))
    code, report, steps, _ = drill(volume)
    assert (code, report["passed"], steps) == (0, True, GOOD)
    if make[0] != "mkfs.xfs":
        assert "of 20 files 20 in the sample, 400000 bytes read" in json.dumps(report)


def test_file_systems_in_partitions(lab: Lab) -> None:
    image = file_system(lab, 8 * MIB, *EXT4)
    volume = backed_up(lab, partitioned(lab, image, lab.disk("nothing", MIB), image))
    said = lab.lockstep("drill", "vol", "--key-file", lab.key).ok()
    assert "partition 1: ext4, partition 2: nothing known, partition 3: ext4" in said
    assert said.count("check    ok") == said.count("read     ok") == 2
    assert_clean(volume)


def test_a_journal_is_replayed_on_the_overlay_alone(lab: Lab) -> None:
    """As after a power cut: the image of a mounted file system."""
    image, mount = file_system(lab, 16 * MIB, *EXT4), lab.home / "mnt"
    mount.mkdir()
    run("mount", "-o", "loop", str(image), str(mount))
    try:
        (mount / "new").write_bytes(b"x" * 100_000)
        run("sync", str(mount / "new"))
        copy = lab.home / "copy"
        copy.write_bytes(image.read_bytes())
    finally:
        run("umount", str(mount))
    assert "needs_recovery" in run("dumpe2fs", "-h", str(copy))
    volume = backed_up(lab, copy)
    code, _, steps, _ = drill(volume)
    assert (code, steps) == (0, GOOD)


def test_a_damaged_file_system_fails(lab: Lab) -> None:
    image = file_system(lab, 8 * MIB, *EXT4)
    run("debugfs", "-w", "-R", "clri <2>", str(image))  # its root directory
    volume = backed_up(lab, image)
    code, report, steps, said = drill(volume)
    assert (code, report["passed"]) == (1, False)
    assert not steps[-1][1]
    assert all(passed for _, passed in steps[:-1])
    assert f"The drill of vol failed at {steps[-1][0]} ext4 on the whole disk: " in said


def lvm(lab: Lab, loop: Callable[..., str], *, pieces: bool = False) -> Path:
    """A disk with LVM on it: a logical volume with a file system, and another, which may lie in two pieces."""
    content, disk = file_system(lab, 8 * MIB, *EXT4).read_bytes(), lab.disk("lvm", 64 * MIB)
    device = loop(disk)
    alone = ("--driverloaded", "n", "--devices", device)
    made = (*alone, "-q", "--autobackup", "n", "-an", "-Zn", "-Wn")
    run("pvcreate", *alone, device)
    run("vgcreate", *alone, "--autobackup", "n", "drill", device)
    for name, size in (("other", "4M"), ("data", "8M")):
        run("lvcreate", *made, "-L", size, "-n", name, "drill")
    if pieces:
        run("lvextend", *alone, "--autobackup", "n", "-L", "+4M", "drill/other")  # behind `data`
    first_byte = run("pvs", *alone, "--noheadings", "--units", "b", "--nosuffix", "-o", "pe_start").split()[0]
    run("losetup", "-d", device)
    with disk.open("rb+") as file:
        file.seek(int(first_byte) + 4 * MIB)  # behind the first extent, which is the other's
        file.write(content)
    return disk


@needs("pvcreate", root=True)
def test_file_systems_in_logical_volumes(lab: Lab, loop: Callable[..., str]) -> None:
    volume = backed_up(lab, partitioned(lab, lvm(lab, loop)))
    code, report, steps, _ = drill(volume)
    assert (code, steps) == (0, GOOD), report
    assert "logical volume drill/data on partition 1: ext4" in json.dumps(report)


@needs("pvcreate", root=True)
def test_a_logical_volume_in_pieces_does_not_pass(lab: Lab, loop: Callable[..., str]) -> None:
    volume = backed_up(lab, lvm(lab, loop, pieces=True))
    code, _, steps, said = drill(volume)
    assert (code, steps[-1]) == (1, ("look", False))
    assert "logical volume drill/other on the whole disk holds several pieces" in said


@pytest.mark.parametrize("found", ["no file system was found", "the whole disk holds crypto_LUKS"])
def test_what_it_cannot_check_does_not_pass(lab: Lab, found: str) -> None:
    image = lab.disk("image", 4 * MIB)
    if "LUKS" in found:
        cost = ["--type=luks1", "--pbkdf-force-iterations=1000"]
        run("cryptsetup", "luksFormat", "-q", *cost, str(image), "-d", str(lab.key))
    code, _, steps, said = drill(backed_up(lab, image))
    assert (code, steps) == (1, [("open", True), ("attach", True), ("look", False)])
    assert found in said
    assert "--command" in said


def test_a_command_of_the_users(lab: Lab) -> None:
    volume = backed_up(lab, file_system(lab, 8 * MIB, *EXT4))
    wipe = 'echo on $LOCKSTEP_DEVICE; dd if=/dev/zero of="$LOCKSTEP_DEVICE" bs=1M count=8 conv=fsync 2>/dev/null'
    code, report, steps, _ = drill(volume, "--command", wipe)
    assert (code, steps) == (0, [*GOOD[:2], ("command", True)])
    assert "on /dev/" in json.dumps(report)
    code, _, steps, said = drill(volume, "--command", "echo all is lost; exit 3")
    assert (code, steps) == (1, [*GOOD[:2], ("command", False)])
    assert "it ended with 3: all is lost" in said
    _, _, _, said = drill(volume, "--command", "false")
    assert "it ended with 1: it said nothing." in said


def test_a_mirror_that_cannot_be_opened_fails_and_is_on_record(lab: Lab) -> None:
    volume = backed_up(lab, file_system(lab, 8 * MIB, *EXT4))
    wrong = lab.home / "wrong"
    wrong.write_bytes(b"wrong")
    lab.lockstep("drill", "vol", "--key-file", wrong).failed(1, "No key slot")
    row = json.loads(lab.lockstep("audit", "vol", "--json").ok().splitlines()[-1])
    assert (row["event"], row["details"]["passed"]) == ("drill", False)
    assert_clean(volume)


def test_a_mirror_that_is_away_does_not_keep_the_next_one_from_being_drilled(lab: Lab) -> None:
    volume, second = backed_up(lab, file_system(lab, 8 * MIB, *EXT4)), lab.home / "second"
    lab.lockstep("mirror", "add", "vol", second, "--key-file", lab.key, environment=lab.quick_format()).ok()
    Volume(lab, "vol", volume.target, second, None).copy_by_hand()
    volume.mirror.unlink()
    done = lab.lockstep("drill", "vol", "--key-file", lab.key, "--json")
    done.failed(1, f"{volume.mirror} cannot be read")
    away, tried = json.loads(done.out)["mirrors"]
    assert (away["mirror"], away["passed"], tried["mirror"], tried["passed"]) == (
        *(str(volume.mirror), False),
        *(str(second), True),
    )
    assert f"{volume.mirror} cannot be read" in away["error"]
    rows = [json.loads(line)["details"] for line in lab.lockstep("audit", "vol", "--json").ok().splitlines()[-2:]]
    assert [(row["mirror"], row["passed"]) for row in rows] == [(str(volume.mirror), False), (str(second), True)]
    assert_clean(volume)


def test_the_mirror_is_followed_while_the_passphrase_is_typed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, states = backed_up(lab, file_system(lab, 8 * MIB, *EXT4)), lab.home / "states"
    with volume.served() as served:
        read = options._content

        def late(key_file: str) -> bytes:
            states.write_text(served.mirror_state())
            return read(key_file)

        monkeypatch.setattr(options, "_content", late)
        lab.lockstep("drill", "vol", "--key-file", lab.key).ok()
        assert states.read_text() == "in-sync"


def test_there_must_be_a_mirror(lab: Lab) -> None:
    lab.lockstep("create", "alone", "--target", lab.disk("alone", MIB)).ok()
    lab.lockstep("drill", "alone", "--key-file", lab.key).failed(1, "has no mirror", "`lockstep mirror add alone PATH`")


def test_what_was_not_tried_to_the_end_has_not_passed(lab: Lab) -> None:
    """Nobody reads what it says after the first step."""
    volume = backed_up(lab, file_system(lab, 8 * MIB, *EXT4))
    command = [sys.executable, "-m", "lockstep", "--state-dir", str(lab.state), "drill", "vol", "--key-file"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*command, str(lab.key)], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "Standard output cannot be written" in done.stderr) == (1, True)
    assert_clean(volume)
    row = json.loads(lab.lockstep("audit", "vol", "--json").ok().splitlines()[-1])
    assert (row["event"], row["details"]["passed"]) == ("drill", False)
    assert row["reason"].endswith("it was not finished")
    assert [(step["step"], step["passed"]) for step in row["details"]["steps"]] == [("open", True)]


@pytest.fixture
def state_disk(lab: Lab) -> Iterator[Path]:
    """The state directory, on a small disk of its own."""
    lab.state.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4m,nr_inodes=64", "tmpfs", str(lab.state))
    yield lab.state
    run("umount", "-l", str(lab.state))


def files_that_fit(directory: Path) -> list[Path]:
    """Make empty files until there is no room for another one."""
    made: list[Path] = []
    with contextlib.suppress(OSError):
        while True:
            path = directory / f"junk {len(made)}"
            path.touch()
            made.append(path)
    return made


def test_a_state_directory_that_takes_nothing_is_named(lab: Lab, state_disk: Path) -> None:
    volume = backed_up(lab, file_system(lab, 8 * MIB, *EXT4))
    command = ("drill", "vol", "--key-file", lab.key)
    junk = files_that_fit(state_disk)
    lab.lockstep(*command).failed(1, "state directory", "No space left")
    ended = 1
    while ended:  # with room for its directory, then its mount point too, its overlay, a row of the audit trail
        junk.pop().unlink()
        done = lab.lockstep(*command)
        ended = done.code
        if ended:
            done.failed(1)
        assert_clean(volume)
    run("mount", "-o", "remount,ro", str(state_disk))
    lab.lockstep(*command).failed(1, "state directory", "Read-only")
    run("mount", "-o", "remount,rw", str(state_disk))
    lab.lockstep(*command).ok()
    assert_clean(volume)


def test_an_overlay_that_has_no_room_is_not_the_mirrors_fault(lab: Lab, state_disk: Path) -> None:
    """Nor has a command passed that did not look whether what it wrote was taken."""
    volume = backed_up(lab, file_system(lab, 8 * MIB, *EXT4))
    for ends in ("conv=fsync", "conv=fsync; true"):
        command = f"dd if=/dev/urandom of=$LOCKSTEP_DEVICE bs=1M count=8 {ends}"
        done = lab.lockstep("drill", "vol", "--key-file", lab.key, "--command", command)
        overlay = state_disk / "run" / ".drill-vol" / "overlay"
        said = done.failed(1, str(DrillOverlayFailed(volume="vol", overlay=overlay, reason="No space left on device")))
        assert "make a new mirror" not in said
        assert_clean(volume)
        row = json.loads(lab.lockstep("audit", "vol", "--json").ok().splitlines()[-1])
        assert (row["event"], row["details"]["passed"]) == ("drill", False)
    lab.lockstep("drill", "vol", "--key-file", lab.key).ok()


# Stands in mount's place: somebody goes into what was mounted, and stays there.
_VISITED_MOUNT = """#!/bin/sh
"{real}" "$@" || exit
for where; do :; done
cd "$where"
sleep 600 > /dev/null 2>&1 &
echo $! > "{visitor}"
"""


def test_whoever_stays_in_a_file_system_is_not_the_mirrors_fault(lab: Lab) -> None:
    volume = backed_up(lab, file_system(lab, 8 * MIB, *EXT4))
    program, visitor = lab.home / "visited" / "mount", lab.home / "visitor"
    program.parent.mkdir()
    program.write_text(_VISITED_MOUNT.format(real=shutil.which("mount"), visitor=visitor))
    program.chmod(0o755)
    path = {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    try:
        said = lab.lockstep("drill", "vol", "--key-file", lab.key, environment=path).failed(
            1, "could not be taken away", "busy"
        )
        assert "make a new mirror" not in said
    finally:
        os.kill(int(visitor.read_text()), signal.SIGKILL)
    code, _, steps, _ = drill(volume)  # which clears up first
    assert (code, steps) == (0, GOOD)


class Waiting:
    """A drill whose command copies the device to `seen`, and then waits for leave."""

    def __init__(self, lab: Lab) -> None:
        self.seen, self._begun, self._leave = lab.home / "seen", lab.home / "begun", lab.home / "leave"
        for mark in (self._begun, self._leave):
            mark.unlink(missing_ok=True)
        command = f"cd {lab.home}; cat $LOCKSTEP_DEVICE > seen; touch begun; until [ -e leave ]; do sleep 0.02; done"
        arguments = ["drill", "vol", "--key-file", str(lab.key), "--json", "--command", command]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lockstep", "--state-dir", str(lab.state), *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: self._begun.exists() or self.process.poll() is not None, "the command to run")
        assert self.process.poll() is None

    def end(self) -> dict[str, Any]:
        self._leave.touch()
        report = json.loads(self.process.communicate(timeout=60)[0])
        assert self.process.returncode == (0 if report["passed"] else 1)
        return dict(report["mirrors"][0])


def write(served: Served, pattern: int) -> bytes:
    run("qemu-io", "-f", "raw", "-c", f"write -P {pattern} 1M 64k", "-c", "flush", served.uri)
    return bytes([pattern]) * 65536


def test_a_served_volume_is_drilled_as_it_was_at_one_moment(lab: Lab) -> None:
    volume = backed_up(lab, file_system(lab, 8 * MIB, *EXT4))
    with volume.served() as served:
        before = volume.target.read_bytes()
        waiting = Waiting(lab)
        written = write(served, 1)
        assert volume.target.read_bytes()[MIB : MIB + 65536] == written
        assert served.mirror_state() == "degraded"
        assert "it is being drilled" in served.mirror()["error"]
        token = read_header(str(volume.mirror)).token
        assert token is not None
        assert token.state == "aside"
        opened = lab.home / "restored"
        assert "as it was" in volume.restore(opened).ok()  # should the target be lost now
        assert opened.read_bytes() == before
        report = waiting.end()
        assert [(step["step"], step["passed"]) for step in report["steps"]][-2:] == [
            ("command", True),
            ("return", True),
        ]
        assert waiting.seen.read_bytes() == before
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be in sync")
        volume.assert_equal_disks()
        # The checks of a file system, and nothing more to copy than what was written.
        steps = lab.lockstep("drill", "vol", "--key-file", lab.key).ok().splitlines()
        assert [step.split()[:2] for step in steps] == [[name, "ok"] for name, _ in [*GOOD, ("return", True)]]
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be in sync")
    volume.assert_equal_disks()
    assert_clean(volume)


def test_whoever_dies_in_a_drill_loses_nothing(lab: Lab) -> None:
    volume = backed_up(lab, file_system(lab, 8 * MIB, *EXT4))
    with volume.served() as served:
        waiting = Waiting(lab)
        write(served, 2)
        waiting.process.kill()
        waiting.process.communicate()
        wait_until(lambda: served.mirror_state() == "in-sync", "the server to take the mirror back by itself", 60)
        volume.assert_equal_disks()
        waiting = Waiting(lab)  # which clears up after the first
        write(served, 3)
        served.kill()
        report = waiting.end()
        assert (report["passed"], report["steps"][-1]["detail"]) == (True, "its server has ended meanwhile")
    with volume.served():
        pass
    volume.assert_equal_disks()
    assert_clean(volume)


def test_a_mirror_that_is_incomplete_stays_with_its_server(lab: Lab) -> None:
    image = file_system(lab, 8 * MIB, *EXT4)
    volume = lab.volume("vol", 8 * MIB, content=image.read_bytes())
    lab.lockstep("revoke", "vol", pwd.getpwuid(os.getuid()).pw_name).ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: served.mirror_state() == "behind", "that nobody may update the mirror")
        lab.lockstep("drill", "vol", "--key-file", lab.key).failed(1, "not drilled", "lockstep status")
        assert served.mirror_state() == "behind"
    said = lab.lockstep("drill", "vol", "--key-file", lab.key).failed(1, "not drilled", "lockstep status")
    assert "--incomplete" not in said, "it has no such option"


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_an_interrupted_drill_leaves_nothing_behind(lab: Lab) -> None:
    """After a kill -9, the next one clears up."""
    volume = backed_up(lab, file_system(lab, 8 * MIB, *EXT4))
    mark = lab.home / "mark"
    command = f"cd {lab.home}; mount $LOCKSTEP_DEVICE content && umount content; echo $$ > mark; exec sleep 600"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
        mark.write_text("")
        arguments = ["drill", "vol", "--key-file", str(lab.key), "--command", command]
        process = subprocess.Popen(
            [sys.executable, "-m", "lockstep", "--state-dir", str(lab.state), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # in the background of a shell, which `make test` may be, it would be ignored
        wait_until(lambda: bool(mark.read_text()), "the command to run")
        lab.lockstep("drill", "vol", "--key-file", lab.key).failed(1, "under way already")
        process.send_signal(number)
        code, pid = process.wait(60), int(mark.read_text())
        if number == signal.SIGKILL:
            os.kill(pid, signal.SIGKILL)
        else:
            assert code == 130
            assert_clean(volume)
            row = json.loads(lab.lockstep("audit", "vol", "--json").ok().splitlines()[-1])
            assert (row["event"], row["details"]["passed"]) == ("drill", False)
        wait_until(functools.partial(is_gone, pid), "the command to end")
    code, _, steps, _ = drill(volume)
    assert (code, steps) == (0, GOOD)
