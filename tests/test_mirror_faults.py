"""P5: a mirror that fails never fails a client; what it missed, and no more, is copied when it is back."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.crypto import luks
from lockstep.service import control_client
from lockstep.volume.link import WHOLE
from tests.lab import MIB, PATIENCE_S, Lab, Served, Volume, needs, run, wait_until, write

SIZE_BYTES = 32 * MIB
REGION_BYTES = 64 << 10


def copied_bytes(served: Served) -> int:
    """What this start of the server has copied."""
    lines = [line for line in served.log.read_text().splitlines() if " bytes to mirror " in line]
    return int(lines[-1].split("copying ")[1].split()[0]) if lines else 0


class Plugged:
    """A file shown by nbdkit, with the filters and options given, as the file that the volume takes for its mirror."""

    def __init__(self, path: Path, held: Path, *options: str) -> None:
        self.path = path
        self.point = path.with_name("plug")
        self.nbdkit = ("nbdkit", "--exit-with-parent", "file", str(held), *options)

    def __enter__(self) -> None:
        # One that was pulled has left its mount point behind.
        subprocess.run(["fusermount3", "-u", "-z", self.point], capture_output=True, check=False)
        self.point.mkdir(exist_ok=True)
        self.fuse = subprocess.Popen(["nbdfuse", f"{self.point}/disk", "[", *self.nbdkit, "]"])
        wait_until((self.point / "disk").exists, "nbdfuse to show the disk")
        self.path.unlink(missing_ok=True)
        self.path.symlink_to(self.point / "disk")

    def __exit__(self, *_: object) -> None:
        subprocess.run(["fusermount3", "-u", "-z", self.point], capture_output=True, check=False)
        self.fuse.wait()

    def pull(self) -> None:
        """Kill it without a word."""
        self.fuse.kill()
        self.fuse.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that has room for a header and half a mirror."""
    point = tmp_path / "small"
    point.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES // 2 + 16 * MIB}", "tmpfs", str(point))
    yield point
    run("umount", "-l", str(point))


@needs("fusermount3", "nbdfuse", "nbdkit", "qemu-io", "/dev/fuse", root=True)
def test_a_mirror_that_is_pulled_and_put_back_misses_nothing(lab: Lab, tmp_path: Path) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    held = tmp_path / "held.img"
    shutil.move(volume.mirror, held)
    plug = Plugged(volume.mirror, held)
    with plug, volume.served() as served:
        write(served, "write -P 1 0 1M")
        plug.pull()
        write(served, "write -P 2 4M 64k", "write -P 3 100 9", "write -z 8M 64k", "discard 12M 64k")
        (mirror,) = served.status()["mirrors"]
        assert mirror["state"] == "degraded"
        assert "writing the mirror failed" in mirror["error"]
        assert REGION_BYTES <= mirror["dirty_bytes"] <= 8 * MIB
    volume_log = served.log.read_text()
    assert volume_log.count("is degraded") == 1, "said once, and said"
    served.log.write_text("")
    # It is away when the server starts, and then put back.
    with contextlib.ExitStack() as plugs, volume.served(in_sync=False) as served:
        (mirror,) = served.status()["mirrors"]
        assert mirror["state"] == "degraded"
        assert "away" in mirror["error"]
        assert not volume.mirror.exists(), "a missing mirror is never made by serving"
        write(served, "write -P 4 16M 64k")
        plugs.enter_context(plug)
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be back")
        assert 0 < copied_bytes(served) <= 8 * MIB
        # And pulled and put back once more, under the server.
        plug.pull()
        write(served, "write -P 5 20M 64k")
        assert served.mirror_state() == "degraded"
        plugs.enter_context(plug)
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be back again")
        assert 0 < copied_bytes(served) <= 8 * MIB
        write(served, "write -P 6 24M 64k")
        served.stop()
    volume.mirror.unlink()
    shutil.move(held, volume.mirror)
    volume.assert_equal_disks()


@needs("qemu-io", root=True)
def test_a_mirror_whose_file_system_is_full_is_dropped_and_the_target_goes_on(lab: Lab, small_disk: Path) -> None:
    target = lab.disk("target", SIZE_BYTES)
    mirror = small_disk / "mirror"
    disks = ["--target", target, "--mirror", mirror, "--key-file", lab.key, "--iter-time", "10"]
    lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
    volume = Volume(lab, "vol", target, mirror, None)
    with volume.served(in_sync=False) as served:
        write(served, "write -P 1 0 4M", "write -P 2 28M 1M")
        (described,) = served.status()["mirrors"]
        assert described["state"] in ("degraded", "syncing")
        write(served, f"write -P 3 0 {SIZE_BYTES}")
        (described,) = served.status()["mirrors"]
        assert described["state"] == "degraded"
        assert "No space left on device" in described["error"]
        write(served, "read -P 3 0 32M")
    assert target.read_bytes() == b"\3" * SIZE_BYTES
    volume.restore(lab.home / "out").failed(1, "--incomplete")
    with volume.served(in_sync=False) as served:
        wait_until(lambda: served.mirror_state() == "degraded", "the mirror to be full again")
        run("mount", "-o", f"remount,size={SIZE_BYTES + 32 * MIB}", str(small_disk))
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to come back by itself")
    volume.assert_equal_disks()


def replaceable_cryptsetup(lab: Lab, tmp_path: Path) -> tuple[Path, str]:
    """A link that servers take for cryptsetup, and where it leads."""
    real = str(shutil.which("cryptsetup", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"))
    program = tmp_path / "replaced" / "cryptsetup"
    program.parent.mkdir()
    program.symlink_to(real)
    lab.environment["PATH"] = f"{program.parent}:{os.environ['PATH']}"
    return program, real


@needs("qemu-io")
@pytest.mark.parametrize("broken", ["#!/nowhere\n", "#!/bin/sh\nexit 1\n"], ids=["not started", "fails"])
def test_a_mirror_whose_header_cannot_be_written_is_not_written_to_while_it_says_that_it_is_whole(
    lab: Lab, tmp_path: Path, broken: str
) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    program, real = replaceable_cryptsetup(lab, tmp_path)
    with volume.served() as served:
        lab.lockstep("revoke", "vol", "root").ok()

        def frozen() -> bool:
            write(served, "write -P 1 0 64k")
            return served.mirror()["frozen_since"] is not None and b'"frozen"' in volume.mirror.read_bytes()[:MIB]

        wait_until(frozen, "the mirror to be frozen, and to say so")
        before = volume.decrypted()
        program.unlink()
        program.write_text(broken)
        program.chmod(0o755)
        volume.grant("root")
        lab.lockstep("sync", "vol", "--include-held").ok()
        wait_until(lambda: served.mirror_state() == "degraded", "the mirror to be dropped")
        write(served, "write -P 2 4M 64k")
        assert "updating the header of the mirror failed" in served.mirror()["error"]
        assert volume.decrypted() == before
        program.unlink()
        program.symlink_to(real)
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to come back")
    volume.assert_equal_disks()


@needs("qemu-io")
def test_a_mirror_that_is_opened_in_vain_again_and_again_costs_no_more_each_time(lab: Lab, tmp_path: Path) -> None:
    volume, away = lab.volume("vol", SIZE_BYTES), tmp_path / "away"
    program, real = replaceable_cryptsetup(lab, tmp_path)
    with volume.served() as served:
        tasks = Path(f"/proc/{served.process.pid}/task")
        volume.mirror.rename(away)
        wait_until(lambda: served.mirror_state() == "degraded", "the mirror to be missed")
        write(served, "write -P 1 0 64k")
        program.unlink()
        tried = tmp_path / "tried"
        program.write_text(f'#!/bin/sh\n[ "$1" != token ] || {{ echo >> {tried}; exit 1; }}\nexec {real} "$@"\n')
        program.chmod(0o755)
        away.rename(volume.mirror)

        def attempts() -> int:
            lab.lockstep("sync", "vol").ok()
            return len(tried.read_text()) if tried.exists() else 0

        wait_until(lambda: attempts() >= 1, "the first attempt")
        before = len(list(tasks.iterdir()))
        wait_until(lambda: attempts() >= 4, "some more")
        assert len(list(tasks.iterdir())) <= before + 2
        program.unlink()
        program.symlink_to(real)
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to come back")
    volume.assert_equal_disks()


def test_a_mirror_that_is_looked_for_while_no_file_can_be_opened_comes_back_when_one_can(lab: Lab) -> None:
    volume = lab.volume("vol", 16 * MIB)
    away = volume.mirror.with_name("away")
    with volume.served() as served:
        pid = served.process.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, limits[1]))
        volume.mirror.rename(away)
        wait_until(lambda: "cannot be followed again yet" in served.log.read_text(), "the server to look for it")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        away.rename(volume.mirror)
        lab.lockstep("sync", "vol").ok()
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to come back", patience_s=15)


_SCARCE = """
import pkgutil
from lockstep.cli.main import main
place = pkgutil.resolve_name("{place}")
step, times = place.{step}, []
def scarce(*arguments, **options):
    times.append(None)
    if len(times) == {fails}:
        raise MemoryError
    return step(*arguments, **options)
place.{step} = scarce
main()
"""


@pytest.mark.parametrize(
    ("place", "step", "fails"),
    [
        ("lockstep.service.mirror_opening:MirrorOpener", "_reopen", 1),
        ("lockstep.disk.file", "writes_take_turns", 3),  # after the target's and the mirror's, as they were at first
        ("lockstep.service.mirror_session:MirrorSession", "_take_back", 1),
    ],
    ids=["closing it as it was", "opening it", "taking it back"],
)
def test_a_mirror_that_returns_while_there_is_no_memory_comes_back_later(
    lab: Lab, place: str, step: str, fails: int
) -> None:
    volume = lab.volume("vol", MIB)
    away = volume.mirror.with_name("away")
    with volume.served(program=_SCARCE.format(place=place, step=step, fails=fails)) as served:
        volume.mirror.rename(away)
        wait_until(lambda: served.mirror_state() == "degraded", "the mirror to be missed")
        away.rename(volume.mirror)
        lab.lockstep("sync", "vol").ok()
        wait_until(lambda: "cannot be followed again yet" in served.log.read_text(), "memory to be short")
        lab.lockstep("sync", "vol").ok()
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to come back", patience_s=15)
    assert "locked by another" not in served.log.read_text()
    volume.assert_equal_disks()


_RETURNING = """
import asyncio, os, signal
from lockstep.cli.main import main
from lockstep.service.mirror_session import MirrorSession
from lockstep.volume.link import MirrorLink
advance, admit = MirrorSession.advance, MirrorLink.admit
async def slow(session, *arguments):
    await advance(session, *arguments)
    if session.link.error:
        print("returning", flush=True)
        while not os.path.exists("{go}"):
            await asyncio.sleep(0.01)
def killed(link, *arguments):
    if link.admissions:
        os.kill(os.getpid(), signal.SIGKILL)
    admit(link, *arguments)
MirrorSession.advance, MirrorLink.admit = slow, killed
main()
"""


@needs("qemu-io")
def test_a_mirror_does_not_say_that_it_is_whole_though_it_misses_nothing_until_just_before_it_is_followed(
    lab: Lab,
) -> None:
    volume, go = lab.volume("vol", MIB), lab.home / "go"
    with volume.served():
        pass
    with volume.served(program=_RETURNING.format(go=go)) as served:
        assert served.process.stdout is not None
        asked = {"mirror": served.mirror()["uuid"], "for": "drill"}
        control_client.ask(str(lab.state / "run" / "vol.control"), "vol", "POST", "/v1/aside", **asked)
        assert served.process.stdout.readline() == "returning\n"
        write(served, "write -P 7 0 64k")
        go.touch()
        assert served.process.wait(PATIENCE_S) == -signal.SIGKILL
    token = luks.read_header(str(volume.mirror)).token
    assert token is not None
    assert token.state not in WHOLE
