"""A target that died is replaced: the volume goes on at once, on a new disk that is filled from the mirror meanwhile.

Where a test must catch the server in the middle, the mirror is slow meanwhile (nbdkit's rate filter).
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep.crypto import luks
from lockstep.errors import (
    FillingImpossible,
    LockstepError,
    MirrorIncomplete,
    MirrorMissed,
    MirrorsAlike,
    MirrorStale,
    MirrorTaken,
    NoMirror,
    OutputExists,
    OutputTooSmall,
    StillServed,
    TargetGone,
    TargetStillThere,
    TargetUnfinished,
    TargetUnprepared,
    WrongPassphrase,
)
from lockstep.nbd.identity import account
from lockstep.registry.audit import SERVER
from lockstep.registry.store import Registry
from lockstep.service import control_client
from lockstep.service.trail import LOST
from tests.forks import ForkLab, become_lockstep
from tests.lab import (
    MIB,
    PATIENCE_S,
    Lab,
    Pace,
    Result,
    Served,
    Storage,
    Volume,
    is_root,
    libnbd,
    needs,
    run,
    wait_until,
    write,
)
from tests.test_mirror_faults import Plugged
from tests.test_mirror_set import add, in_sync
from tests.test_service_refusals import assert_error, everything_below

SIZE_BYTES = 16 * MIB + 1536
HEADER_BYTES = 16 * MIB
SLOW_BYTES_S = MIB  # of a mirror, for as long as what is being filled from it must not be complete
KILLS = int(os.environ.get("REPLACE_KILLS", "3"))
needs_nbdkit = needs("nbdkit", "nbdfuse", "fusermount3", "/dev/fuse", root=True)


def noise(size_bytes: int = SIZE_BYTES) -> bytes:
    return random.Random(size_bytes).randbytes(size_bytes)


def replaced(volume: Volume, path: Path, *options: object, key: Path | None = None) -> Result:
    command = ["replace-target", volume.name, path, "--key-file", key or volume.lab.key, *options]
    return volume.lab.lockstep(*command)


def on(volume: Volume, path: Path) -> Volume:
    """The same volume, with its new target."""
    return Volume(volume.lab, volume.name, path, volume.mirror, volume.header)


@contextlib.contextmanager
def slow_volume(lab: Lab, content: bytes | None = None) -> Iterator[tuple[Volume, Pace]]:
    """A volume in sync, whose target is gone, and whose mirror can be slowed."""
    target, pace = lab.disk("target", SIZE_BYTES, noise() if content is None else content), Pace(lab.home / "pace")
    storage = Storage(lab.home / "slow", SIZE_BYTES + HEADER_BYTES, pace=pace)
    try:
        disks = ["--target", target, "--mirror", storage.path, "--key-file", lab.key]
        lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
        volume = Volume(lab, "vol", target, storage.path, None)
        with volume.served():
            pass
        target.unlink()
        yield volume, pace
    finally:
        storage.close()


def restoring(served: Served) -> dict[str, Any] | None:
    restore = served.now()["target"]["restore"]
    assert restore is None or isinstance(restore, dict)
    return restore


def await_restored(served: Served) -> None:
    wait_until(lambda: restoring(served) is None, "the new target to have everything")


def connected(served: Served) -> Any:
    handle = libnbd().NBD()
    handle.connect_uri(served.uri)
    return handle


@needs_nbdkit
def test_a_file_system_is_used_while_its_target_comes_back(lab: Lab) -> None:
    image, new = lab.disk("image", 16 * MIB), lab.home / "new"
    run("mkfs.ext4", "-q", "-F", "-d", str(Path(__file__).parent), str(image))
    content = image.read_bytes().ljust(SIZE_BYTES, b"\0")
    with slow_volume(lab, content) as (volume, pace):
        gone = TargetGone(path=volume.target, volume="vol")
        assert "lockstep replace-target vol NEWDISK" in gone.advice
        assert_error(lab.lockstep("serve", "vol", "--key-file", lab.key), gone)
        assert "lockstep serve vol" in replaced(volume, new).ok()
        (before,) = lab_status(volume)["mirrors"]
        assert before["state"] == "in-sync"
        volume = on(volume, new)
        pace.slow(SLOW_BYTES_S)
        with volume.served() as served:
            seen = restoring(served)
            assert seen is not None
            assert seen["total_bytes"] == SIZE_BYTES
            assert 0 <= seen["done_bytes"] < SIZE_BYTES
            assert "being restored" in lab.lockstep("status", "vol").ok()
            handle = connected(served)
            assert handle.pread(100_000, SIZE_BYTES - 100_000) == content[-100_000:]
            handle.pwrite(b"written meanwhile", SIZE_BYTES - 20)
            handle.zero(70_000, 16 * MIB - 70_000)
            handle.flush()
            assert handle.pread(17, SIZE_BYTES - 20) == b"written meanwhile"
            later = restoring(served)
            assert later is not None, "it ended before clients could be at work"
            assert later["done_bytes"] >= seen["done_bytes"]
            pace.let_go()
            assert handle.pread(15 * MIB, 0) == content[: 15 * MIB]
            handle.shutdown()
            await_restored(served)
            assert served.mirror_state() == "in-sync"
        expected = bytearray(content)
        expected[16 * MIB - 70_000 : 16 * MIB] = bytes(70_000)
        expected[SIZE_BYTES - 20 : SIZE_BYTES - 3] = b"written meanwhile"
        assert new.read_bytes() == expected
        assert new.stat().st_mode & 0o777 == 0o600
        volume.assert_equal_disks()
        shown = lab.home / "shown"
        shown.write_bytes(content[: 16 * MIB])  # what the clients saw first
        run("e2fsck", "-f", "-n", str(shown))
        with volume.served() as served:
            assert restoring(served) is None
        events = lab.lockstep("audit", "vol", "--json").ok()
        assert events.count('"target-replaced"') == events.count('"target-filled"') == 1
        assert not list((lab.state / "filling").iterdir())


def lab_status(volume: Volume) -> dict[str, Any]:
    return Served.status(_Resting(volume))


class _Resting(Served):
    """Nobody serves the volume; just to ask for its status."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume


class Writer:
    """A client that writes blocks, each with a number, and reads some back, until its server dies."""

    BLOCK_BYTES = 3000

    def __init__(self, content: bytearray, seed: int) -> None:
        self.content = content
        self.doubtful: tuple[int, bytes] | None = None
        self.written = 0
        self.wrong: str | None = None
        self._chance = random.Random(seed)

    def work(self, handle: Any) -> None:
        """Write one block after the other; what is not answered may be there or not."""
        length = self.BLOCK_BYTES
        with contextlib.suppress(libnbd().Error):
            while True:
                at = self._chance.randrange(SIZE_BYTES - length)
                if handle.pread(length, at) != self.content[at : at + length]:
                    self.wrong = f"what was read at {at} is not what was written there"
                    return
                data = self._chance.randbytes(length)
                self.doubtful = (at, data)
                handle.pwrite(data, at)
                self.content[at : at + length] = data
                self.doubtful = None
                self.written += 1

    def resolve(self, served: Served) -> None:
        """See what became of the write that was not answered; each byte is one of the two."""
        if self.doubtful is not None:
            at, data = self.doubtful
            handle = connected(served)
            found = handle.pread(len(data), at)
            handle.shutdown()
            former = self.content[at : at + len(data)]
            assert all(f in (a, b) for f, a, b in zip(found, former, data, strict=True))
            self.content[at : at + len(data)] = found
            self.doubtful = None


@needs_nbdkit
def test_kill_9_at_any_moment_resumes_and_loses_nothing(lab: Lab) -> None:
    """In the long form (`make replace-kills`) target after target dies."""
    chance, seed = random.Random(), random.randrange(1 << 30)
    writer, done = Writer(bytearray(noise()), seed), SIZE_BYTES
    with slow_volume(lab) as (volume, pace):
        pace.slow(8 * MIB)  # so that it takes about as long as a server lives
        for number in range(KILLS):
            if done == SIZE_BYTES:
                volume, done = on(volume, lab.home / f"new{number}"), 0
                replaced(volume, volume.target).ok()
            with volume.served(in_sync=False) as served:
                writer.resolve(served)
                before = restoring(served)
                assert before is None or before["done_bytes"] >= done, f"what was there is missing again, seed {seed}"
                thread = threading.Thread(target=writer.work, args=(connected(served),))
                thread.start()
                time.sleep(chance.random())  # the moment of death is what varies
                served.kill()
                thread.join(PATIENCE_S)
                assert writer.wrong is None, f"{writer.wrong}, seed {seed}"
            at_rest = lab_status(volume)["target"]["restore"]
            done = at_rest["done_bytes"] if at_rest else SIZE_BYTES
            if done == SIZE_BYTES or number == KILLS - 1:
                with volume.served(in_sync=False) as served:
                    writer.resolve(served)
                    await_restored(served)
                    wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be in sync")
                assert volume.target.read_bytes() == writer.content, f"seed {seed}"
                volume.assert_equal_disks()
                volume.target.unlink()
        assert writer.written > 0


@needs_nbdkit
def test_a_new_target_that_is_exchanged_while_it_is_filled_is_refused(lab: Lab) -> None:
    """What it had would not be filled once more: it would be blank there, and called in sync."""
    with slow_volume(lab) as (volume, pace):
        pace.slow(8 * MIB)
        volume = on(volume, lab.home / "new")
        replaced(volume, volume.target).ok()
        with volume.served(in_sync=False) as served:
            wait_until(lambda: (restoring(served) or {"done_bytes": 0})["done_bytes"] > 8 * MIB, "half of it")
            write(served, "write -P 7 5M 64k")  # which has it on record as well
            served.kill()
        pace.let_go()
        died = volume.target.rename(lab.home / "died")
        volume.target.write_bytes(bytes(SIZE_BYTES))
        lab.lockstep("serve", "vol", "--key-file", lab.key).failed(1, "does not seem to be the disk")
        died.rename(volume.target)
        with volume.served(in_sync=False) as served:
            await_restored(served)
            wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be in sync")
        expected = bytearray(noise())
        expected[5 * MIB : 5 * MIB + (64 << 10)] = b"\7" * (64 << 10)
        assert volume.target.read_bytes() == expected
        volume.assert_equal_disks()


def plugged(
    lab: Lab, plugs: contextlib.ExitStack, target: Path, mirror: Path, held: Path
) -> tuple[Plugged, Pace, Volume]:
    """A volume that has been in sync, with a mirror that can be slowed, and pulled."""
    pace = Pace(lab.home / "pace")
    plug = Plugged(mirror, held, *pace.options)
    plugs.enter_context(plug)
    volume = Volume(lab, "vol", target, mirror, None)
    disks = ["--target", target, "--mirror", mirror, "--key-file", lab.key]
    lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
    with volume.served():
        pass
    return plug, pace, volume


@needs_nbdkit
def test_the_mirror_that_a_new_target_is_filled_from_is_not_drilled(lab: Lab) -> None:
    """Its clients would get errors, for as long as the drill takes, where they read what the target lacks."""
    with slow_volume(lab) as (volume, pace):
        replaced(volume, lab.home / "new").ok()
        pace.slow(SLOW_BYTES_S)
        with on(volume, lab.home / "new").served() as served:
            assert restoring(served) is not None
            if is_root():
                drill = lab.lockstep("drill", "vol", "--key-file", lab.key, "--command", "true")
                drill.failed(1, "is still being filled from the mirror")
            aside = {"mirror": served.mirror()["uuid"], "for": "drill"}
            with pytest.raises(TargetUnfinished):
                control_client.ask(f"{lab.state}/run/vol.control", "vol", "POST", "/v1/aside", **aside)
            handle = connected(served)
            assert handle.pread(100_000, SIZE_BYTES - 100_000) == noise()[-100_000:]
            handle.shutdown()


@needs_nbdkit
def test_the_mirror_dies_meanwhile_and_comes_back(lab: Lab) -> None:
    """What is there goes on; what is missing is an error, for readers and writers, and nothing is made up."""
    content, new = noise(), lab.home / "new"
    target = lab.disk("target", SIZE_BYTES, content)
    mirror, held = lab.home / "mirror", lab.disk("held", SIZE_BYTES + HEADER_BYTES)
    nbd = libnbd()
    with contextlib.ExitStack() as plugs:
        plug, pace, volume = plugged(lab, plugs, target, mirror, held)
        target.unlink()
        replaced(volume, new).ok()
        volume = on(volume, new)
        pace.slow(SLOW_BYTES_S)
        with volume.served() as served:
            handle = connected(served)
            handle.pwrite(b"first", 0)
            plug.pull()
            last = SIZE_BYTES - 5
            for _ in range(2):
                with pytest.raises(nbd.Error):
                    handle.pwrite(b"never", last)
                with pytest.raises(nbd.Error):
                    handle.pread(5, last)
            handle.pwrite(b"alone", 0)
            handle.flush()
            assert handle.pread(5, 0) == b"alone"
            restore = restoring(served)
            assert restore is not None
            assert "cannot be read" in restore["error"]
            assert served.mirror_state() == "degraded"
            served.kill()  # and the server as well: what was written to the new target alone must survive that
            reason = f"it is away: There is no disk at {mirror}."
            mirror.unlink()
            missing_mirror = FillingImpossible(path=new, volume="vol", mirror=mirror, reason=reason)
            assert_error(lab.lockstep("serve", "vol", "--key-file", lab.key), missing_mirror)
        pace.let_go()
        plugs.enter_context(plug)
        with volume.served(in_sync=False) as served:
            handle = connected(served)
            assert handle.pread(5, 0) == b"alone"
            assert handle.pread(5, last) == content[-5:]
            handle.shutdown()
            await_restored(served)
            wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be in sync")
    assert new.read_bytes() == b"alone" + content[5:]
    Volume(lab, "vol", new, held, None).assert_equal_disks()


@needs_nbdkit
def test_an_older_copy_of_the_mirror_fills_nothing(lab: Lab) -> None:
    content, new = noise(), lab.home / "new"
    target = lab.disk("target", SIZE_BYTES, content)
    mirror, held = lab.home / "mirror", lab.disk("held", SIZE_BYTES + HEADER_BYTES)
    with contextlib.ExitStack() as plugs:
        plug, pace, volume = plugged(lab, plugs, target, mirror, held)
        older, right = shutil.copyfile(held, lab.home / "older"), lab.home / "right"
        with volume.served() as served:
            handle = connected(served)
            handle.pwrite(b"newer", SIZE_BYTES - 5)
            handle.shutdown()
        target.unlink()
        replaced(volume, new).ok()
        volume = on(volume, new)
        pace.slow(SLOW_BYTES_S)
        with volume.served(in_sync=False) as served:
            plug.pull()
            pace.let_go()
            held.rename(right)
            older.rename(held)
            plugs.enter_context(plug)
            wait_until(lambda: "as it was left" in (served.mirror()["error"] or ""), "the copy to be refused")
            handle = connected(served)
            with pytest.raises(libnbd().Error):
                handle.pread(5, SIZE_BYTES - 5)
            plug.pull()
            right.rename(held)
            plugs.enter_context(plug)
            await_restored(served)
            assert handle.pread(5, SIZE_BYTES - 5) == b"newer"
            handle.shutdown()
    assert new.read_bytes() == content[:-5] + b"newer"


# A server whose mirror has a bad sector for as long as a file is there.
_BAD_SECTOR = """
import errno, os
from lockstep.cli.main import main
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.volume import filling
filling.RETRY_PLACES_S = 0.2
job = EncryptedDisk.read_job
def read_job(disk, offset, into, **options):
    def fail():
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    if offset <= {bad} < offset + len(into) and os.path.exists("{file}"):
        return fail
    return job(disk, offset, into, **options)
EncryptedDisk.read_job = read_job
main()
"""


def test_a_mirror_with_a_bad_sector_gives_everything_else(tmp_path: Path) -> None:
    """It was given up at each attempt, with all that was missing: it came back for less and less of the time."""
    lab, content, region_bytes = ForkLab(tmp_path), noise(), 64 << 10
    volume, new, bad, file = lab.volume("vol", SIZE_BYTES, content=content), tmp_path / "new", 3 * MIB, tmp_path / "bad"
    volume.copy_by_hand()
    volume.target.unlink()
    replaced(volume, new).ok()
    file.touch()
    program = _BAD_SECTOR.format(bad=bad, file=file)
    with on(volume, new).served(in_sync=False, program=program) as served:
        left = SIZE_BYTES - region_bytes
        wait_until(lambda: (restoring(served) or {})["done_bytes"] == left, "everything else to be there")
        assert "cannot be read in places" in str((restoring(served) or {})["error"])
        assert served.mirror_state() == "in-sync"
        handle = connected(served)
        assert handle.pread(512, bad + 512) == content[bad + 512 : bad + 1024]
        with pytest.raises(libnbd().Error):
            handle.pread(512, bad)
        with pytest.raises(libnbd().Error):
            handle.pwrite(b"never", bad + 512)
        handle.pwrite(b"there", bad - 5)
        handle.shutdown()
        assert served.mirror_state() == "in-sync"
        file.unlink()
        await_restored(served)
    assert new.read_bytes() == content[: bad - 5] + b"there" + content[bad:]


@needs(root=True)
def test_a_new_target_whose_file_system_is_full_is_named_so_and_filled_when_there_is_room(lab: Lab) -> None:
    content, room = noise(), lab.home / "room"
    volume = lab.volume("vol", SIZE_BYTES, content=content)
    with volume.served():
        pass
    volume.target.unlink()
    room.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(room))
    try:
        replaced(volume, room / "new").ok()
        with on(volume, room / "new").served(in_sync=False) as served:
            full = "the file system of the new target is full"
            wait_until(lambda: full in str((restoring(served) or {})["error"]), "the new target to be full")
            handle = connected(served)
            assert handle.pread(5, SIZE_BYTES - 5) == content[-5:]
            with pytest.raises(libnbd().Error, match="No space left"):
                handle.pwrite(b"never", SIZE_BYTES - 5)
            handle.shutdown()
            said = served.log.read_text()
            assert f"{full}. What is missing is read from the mirror, and cannot be written. Make room there." in said
            assert (
                f"({full}): the mirror {volume.mirror} answered. Reads that the target has failed so far: 1. Make"
                in said
            )
            assert "Replace it" not in said
            run("mount", "-o", "remount,size=40m", str(room))
            await_restored(served)
        assert (room / "new").read_bytes() == content
    finally:
        run("umount", str(room))


def test_a_frozen_mirror_gives_back_its_moment_and_others_are_compared(lab: Lab) -> None:
    content, new = noise(), lab.home / "new"
    volume = lab.volume("vol", SIZE_BYTES, content=content)
    second = lab.home / "second"
    add(volume, second).ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: in_sync(served), "both mirrors to be in sync")
    me = account(os.geteuid())
    lab.lockstep("revoke", "vol", me).ok()
    with volume.served(in_sync=False) as served:
        run("qemu-io", "-f", "raw", "-c", "write -P 5 0 64k", served.uri)
    there = TargetStillThere(path=volume.target, volume="vol", mirror=volume.mirror)
    assert_error(replaced(volume, new), there)
    volume.target.unlink()
    assert "and is lost" in replaced(volume, new, "--mirror", second).ok()
    lab.lockstep("grant", "vol", me).ok()
    unfinished = TargetUnfinished(path=new, volume="vol", mirror=second)
    assert_error(lab.lockstep("mirror", "remove", "vol", second), unfinished)
    with volume.served(in_sync=False) as served:
        await_restored(served)
        wait_until(lambda: in_sync(served), "both mirrors to be in sync")
    assert new.read_bytes() == content
    for mirror in (volume.mirror, second):
        Volume(lab, "vol", new, mirror, None).assert_equal_disks()


def test_the_mirror_that_lacks_least_is_taken_whatever_they_say_of_themselves(tmp_path: Path) -> None:
    """One that vanished while the volume was served says `in-sync` still, and the other would be given its content."""
    lab = ForkLab(tmp_path)
    volume, second, new, away = lab.volume("vol", 4 * MIB, content=noise(4 * MIB)), *map(tmp_path.joinpath, "snw")
    add(volume, second).ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: in_sync(served), "both mirrors to be in sync")
        volume.mirror.rename(away)
        wait_until(lambda: "degraded" in {each["state"] for each in served.now()["mirrors"]}, "the first to be dropped")
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "-c", "flush", served.uri)
    written = volume.target.read_bytes()
    volume.target.unlink()
    away.rename(volume.mirror)
    second.rename(away)
    missed = MirrorMissed(path=second, volume="vol", other=volume.mirror, reason="")
    replaced(volume, new).failed(1, f"The mirror {second} of vol has what {volume.mirror} lacks", missed.advice)
    away.rename(second)
    intent = lab.state / "intent"
    intent.rename(tmp_path / "intent")  # so that the records tell nothing
    with Registry.open(f"sqlite:///{lab.state}/registry.db") as registry:  # nor does the trail
        registry.audit(LOST, actor=SERVER, volume="vol", reason="", details={})
    assert_error(replaced(volume, new), MirrorsAlike(volume="vol", mirrors=f"{volume.mirror}, {second}"))
    assert not new.exists()
    intent.rmdir()
    (tmp_path / "intent").rename(intent)
    assert f"all of it still on {second}" in replaced(volume, new).ok()
    assert Volume(lab, "vol", new, second, None).decrypted() == written


def test_the_mirror_that_was_followed_last_is_taken_after_a_crash(tmp_path: Path) -> None:
    """What was written lately is marked for both, and both say that they are in sync; the trail knows which is not."""
    lab = ForkLab(tmp_path)
    volume, second, new, away = lab.volume("vol", 4 * MIB, content=noise(4 * MIB)), *map(tmp_path.joinpath, "snw")
    add(volume, second).ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: in_sync(served), "both mirrors to be in sync")
        run("qemu-io", "-f", "raw", "-c", "write -P 6 0 1M", "-c", "flush", served.uri)
        volume.mirror.rename(away)
        lost = f"mirror {volume.mirror} is degraded"
        wait_until(lambda: lost in lab.lockstep("audit", "vol").ok(), "the first to be dropped, on record")
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "-c", "flush", served.uri)
        served.kill()
    written = volume.target.read_bytes()
    volume.target.unlink()
    away.rename(volume.mirror)
    second.rename(away)
    missed = MirrorMissed(path=second, volume="vol", other=volume.mirror, reason="")
    replaced(volume, new).failed(1, f"The mirror {second} of vol has what {volume.mirror} lacks", missed.advice)
    away.rename(second)
    assert f"all of it still on {second}" in replaced(volume, new).ok()
    assert Volume(lab, "vol", new, second, None).decrypted() == written


def test_the_records_of_an_earlier_day_do_not_tell_which_mirror_has_everything(tmp_path: Path) -> None:
    """The machine was rolled back, with one of its mirrors; the other one is of today."""
    lab = ForkLab(tmp_path)
    volume, second, new = lab.volume("vol", 4 * MIB, content=noise(4 * MIB)), *map(tmp_path.joinpath, "sn")
    add(volume, second).ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: in_sync(served), "both mirrors to be in sync")
    state = shutil.copytree(lab.state, tmp_path / "yesterday")
    mirror = tmp_path / "yesterday.mirror"
    shutil.copy2(volume.mirror, mirror)
    with volume.served(in_sync=False) as served:
        wait_until(lambda: in_sync(served), "both mirrors to be in sync")
        write(served, "write -P 7 0 1M")
    written = volume.target.read_bytes()
    volume.target.unlink()
    shutil.rmtree(lab.state)
    state.rename(lab.state)
    mirror.rename(volume.mirror)
    assert_error(replaced(volume, new), MirrorsAlike(volume="vol", mirrors=f"{volume.mirror}, {second}"))
    replaced(volume, new, "--mirror", second).ok()
    assert Volume(lab, "vol", new, second, None).decrypted() == written


def test_a_mirror_of_a_blank_disk_is_not_taken_where_the_one_that_it_is_unlike_was_set_aside(tmp_path: Path) -> None:
    """The last copy would be overwritten with nothing."""
    lab = ForkLab(tmp_path)
    content = noise(4 * MIB)
    volume, second, new = lab.volume("vol", 4 * MIB, content=content), *map(tmp_path.joinpath, "sn")
    with volume.served() as served:
        served.stop()
    volume.target.write_bytes(bytes(4 * MIB))
    away = volume.mirror.rename(tmp_path / "away")
    add(volume, second).ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: served.now()["mirrors"][1]["state"] == "in-sync", "the second mirror to be in sync")
        away.rename(volume.mirror)
        wait_until(
            lambda: "another disk" in (served.now()["mirrors"][0]["error"] or ""), "the first one to be set aside"
        )
        served.stop()
    volume.target.unlink()
    assert_error(replaced(volume, new), MirrorsAlike(volume="vol", mirrors=f"{volume.mirror}, {second}"))
    replaced(volume, new, "--mirror", volume.mirror).ok()
    assert Volume(lab, "vol", new, volume.mirror, None).decrypted() == content


def test_an_older_copy_that_was_set_aside_is_not_taken_for_the_mirror(tmp_path: Path) -> None:
    """Nor where it was seen last: the registry remembers the newest generation."""
    lab = ForkLab(tmp_path)
    volume, second, new = lab.volume("vol", 4 * MIB, content=noise(4 * MIB)), *map(tmp_path.joinpath, "sn")
    add(volume, second).ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: in_sync(served), "both mirrors to be in sync")
        served.stop()
    older = shutil.copyfile(second, tmp_path / "older")
    with volume.served(in_sync=False) as served:
        wait_until(lambda: in_sync(served), "both mirrors to be in sync")
        write(served, "write -P 7 0 3M")
    os.replace(older, second)
    for record in (lab.state / "intent").iterdir():
        record.unlink()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: served.now()["mirrors"][0]["state"] == "in-sync", "the first mirror to be in sync")
        assert "another disk" in served.now()["mirrors"][1]["error"]
    volume.target.unlink()
    for record in (lab.state / "intent").iterdir():
        record.unlink()
    replaced(volume, new, "--mirror", second).failed(1, "is an older copy")


def test_a_copy_of_the_mirror_from_while_the_last_server_ran_is_not_taken_for_it(tmp_path: Path) -> None:
    """The registry knows the generation that the server began with; the bitmap knows the one that it came to."""
    lab = ForkLab(tmp_path)
    volume, new, away = lab.volume("vol", 4 * MIB, content=noise(4 * MIB)), tmp_path / "new", tmp_path / "away"

    def generation() -> int:
        token = luks.read_header(str(volume.mirror)).token
        assert token is not None
        return token.generation

    began = generation()
    with volume.served() as served:
        older = shutil.copyfile(volume.mirror, tmp_path / "older")
        volume.mirror.rename(away)
        wait_until(lambda: served.mirror_state() == "degraded", "the mirror to be dropped")
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", served.uri)
        away.rename(volume.mirror)
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be back")
        served.kill()
    seen = generation()
    volume.target.unlink()
    os.replace(older, volume.mirror)
    assert began < generation() < seen
    replaced(volume, new).failed(MirrorStale.exit_code, "an older copy of itself", f"and {seen} was seen before")


def test_a_command_that_is_killed_leaves_no_blank_file_under_the_name_of_the_old_target(tmp_path: Path) -> None:
    """It was taken for the target by the next start, and copied over the mirror."""
    lab = ForkLab(tmp_path)
    volume = lab.volume("vol", 4 * MIB, content=noise(4 * MIB))
    volume.copy_by_hand()
    volume.target.unlink()
    with tempfile.TemporaryFile() as stream:
        pid = os.fork()
        if not pid:
            Registry.replace_target = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
            command = ["--state-dir", lab.state, "replace-target", "vol", volume.target, "--key-file", lab.key]
            become_lockstep([*map(str, command)], [stream] * 3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert_error(lab.lockstep("serve", "vol", "--key-file", lab.key), TargetGone(path=volume.target, volume="vol"))
    replaced(volume, volume.target).ok()
    assert volume.target.stat().st_size == 4 * MIB


def test_a_new_disk_with_the_name_of_the_old_one_is_taken_for_a_new_one(tmp_path: Path) -> None:
    """What the dead one was being given is marked; to serve first, as for the old one, would copy the blank one."""
    lab, content = ForkLab(tmp_path), noise(4 * MIB)
    volume = lab.volume("vol", 4 * MIB, content=content)
    with volume.served() as served:
        run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 1M", served.uri)
        served.kill()
    os.truncate(volume.target, 0)
    os.truncate(volume.target, 4 * MIB)
    replaced(volume, volume.target).ok()
    with volume.served(in_sync=False) as served:
        await_restored(served)
    assert volume.target.read_bytes() == content[:MIB] + b"\x07" * MIB + content[2 * MIB :]


@needs("/dev/loop-control", root=True)
def test_a_larger_device_is_used_as_far_as_the_target_was_long(lab: Lab, loop: Callable[..., str]) -> None:
    content = noise()
    volume = lab.volume("vol", SIZE_BYTES, "--sector-size", "4096", content=content)
    with volume.served():
        pass
    image = lab.disk("image", SIZE_BYTES + MIB - 1536, b"\xee" * (SIZE_BYTES + MIB - 1536))
    device = Path(loop(image))
    volume.target.unlink()
    data = OutputExists(path=device, found="it holds data of an unknown kind")
    assert_error(replaced(volume, device), data)
    replaced(volume, device, "--force").ok()
    for text in (b"the last bytes", b"and once more "):
        with volume.served() as served:
            handle = connected(served)
            assert handle.get_size() == SIZE_BYTES
            handle.pwrite(text, SIZE_BYTES - len(text))
            handle.shutdown()
            await_restored(served)
    run("losetup", "-d", str(device))
    expected = content[: -len(text)] + text
    assert image.read_bytes() == expected.ljust(SIZE_BYTES + MIB - 1536, b"\xee"), "what lies behind was written"
    volume.restore(lab.home / "out").ok()
    assert (lab.home / "out").read_bytes() == expected
    output = lab.home / "padded"  # what the last sector has behind the end is zeroes still
    output.write_bytes(expected)
    Volume(lab, "vol", output, volume.mirror, None).assert_equal_disks()


@needs("prlimit")
def test_a_new_file_that_cannot_be_so_large_is_not_left_behind(lab: Lab) -> None:
    volume, new = lab.volume("vol", 4 * MIB, content=noise(4 * MIB)), lab.home / "new"
    with volume.served():
        pass
    volume.target.unlink()
    command = ["replace-target", "vol", new, "--key-file", lab.key]
    limited = ["prlimit", f"--fsize={2 * MIB}", sys.executable, "-m", "lockstep", "--state-dir", lab.state, *command]
    done = subprocess.run([*map(str, limited)], capture_output=True, check=False)
    Result(done).failed(1, "File too large")
    assert not new.exists()
    lab.lockstep(*command).ok()


@needs("strace")
def test_what_is_known_by_the_old_target_is_forgotten_for_good(lab: Lab) -> None:
    """A bitmap that a power cut brought back would fit a mirror that is away, and vouch for what it does not hold."""
    volume, second = lab.volume("vol", SIZE_BYTES), lab.home / "second"
    add = ["mirror", "add", "vol", second, "--key-file", lab.key]
    lab.lockstep(*add, environment=lab.quick_format()).ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: {each["state"] for each in served.now()["mirrors"]} == {"in-sync"}, "both to be in sync")
    volume.target.unlink()
    second.unlink()
    trace = lab.home / "trace"
    command = ["replace-target", "vol", str(lab.home / "new"), "--key-file", str(lab.key)]
    strace = ["strace", "-f", "-y", "-e", "trace=unlink,unlinkat,fsync", "-e", "signal=none", "-o", str(trace)]
    run(*strace, sys.executable, "-m", "lockstep", "--state-dir", str(lab.state), *command)
    lines = trace.read_text().splitlines()
    for directory in ("intent", "held"):
        removed = [at for at, line in enumerate(lines) if "unlink" in line and f"/state/{directory}/" in line]
        synced = [at for at, line in enumerate(lines) if "fsync(" in line and f"/state/{directory}>" in line]
        assert removed
        assert max(removed) < max(synced, default=0)


def test_refusals_change_nothing(tmp_path: Path) -> None:
    lab = ForkLab(tmp_path)
    volume, bare, new = lab.volume("vol", 4 * MIB, content=noise(4 * MIB)), lab.disk("bare", MIB), tmp_path / "new"
    lab.lockstep("create", "alone", "--target", bare).ok()
    small, full, wrong = lab.disk("small", MIB), lab.disk("full", 4 * MIB, noise(4 * MIB)), tmp_path / "wrong"
    wrong.write_bytes(b"another one")

    def everything() -> dict[str, tuple[object, ...]]:
        found = everything_below(tmp_path).items()
        return {path: seen for path, seen in found if not path.startswith("state/run/")}  # locks are not removed

    def refused(error: LockstepError, path: Path, *options: object, key: Path | None = None) -> None:
        before = everything()
        assert_error(replaced(volume, path, *options, key=key), error)
        assert everything() == before

    refused(MirrorIncomplete(path=volume.mirror, state="syncing"), new)
    assert_error(lab.lockstep("replace-target", "alone", new, "--key-file", lab.key), NoMirror(volume="alone"))
    with volume.served() as served:
        assert_error(replaced(volume, new), StillServed(volume="vol", action="given another target"))
        run("qemu-io", "-f", "raw", "-c", f"write -s {full} 0 64k", served.uri)
        served.kill()
    lab.lockstep("list").ok()  # whoever opens the registry next takes back what the server was just writing to it
    refused(TargetStillThere(path=volume.target, volume="vol", mirror=volume.mirror), new)
    older = volume.mirror.read_bytes()
    with volume.served():
        pass
    newest = volume.mirror.read_bytes()
    refused(MirrorTaken(path=volume.mirror, volume="vol"), volume.mirror, "--force")
    refused(OutputTooSmall(path=small, size_bytes=MIB, needed_bytes=4 * MIB), small, "--force")
    refused(OutputExists(path=full, found="it holds data of an unknown kind"), full)
    refused(OutputExists(path=volume.target, found="it holds data of an unknown kind"), volume.target)
    refused(WrongPassphrase(path=volume.mirror), new, key=wrong)
    volume.mirror.write_bytes(older)
    volume.target.unlink()
    replaced(volume, new).failed(MirrorStale.exit_code, "an older copy of itself")
    volume.mirror.write_bytes(newest)
    # From here on it is replaced; but what an interrupted command did not come to is not made up.
    replaced(volume, new).ok()
    record = next((lab.state / "filling").iterdir())
    sound = record.read_bytes()
    for damaged in (b"", sound[:50], b"\0" * len(sound), sound[:-1] + b"\xff"):
        record.write_bytes(damaged)
        serve = lab.lockstep("serve", "vol", "--key-file", lab.key)
        assert_error(serve, TargetUnprepared(path=new, volume="vol"))
    # An earlier record would fit as well, and says that regions are there: it is not used for another disk.
    record.write_bytes(sound)
    broken = tmp_path / "broken" / "cryptsetup"
    broken.parent.mkdir()
    broken.write_text(
        f'#!/bin/sh\n[ "$1" != token ] && PATH="{os.environ["PATH"]}:/usr/sbin:/sbin" exec cryptsetup "$@"\n'
    )
    broken.chmod(0o755)
    third = lab.home / "third"
    path = {"PATH": f"{broken.parent}:{os.environ['PATH']}"}
    lab.lockstep("replace-target", "vol", third, "--key-file", lab.key, environment=path).failed(1, "cryptsetup")
    serve = lab.lockstep("serve", "vol", "--key-file", lab.key)
    assert_error(serve, TargetUnprepared(path=third, volume="vol"))
    replaced(volume, new).ok()
    changed = volume.mirror.read_bytes()
    volume.mirror.write_bytes(newest)  # not as it was left
    reason = "it, or the new target, was changed since, or its intent bitmap is gone"
    other = FillingImpossible(path=new, volume="vol", mirror=volume.mirror, reason=reason)
    assert_error(lab.lockstep("serve", "vol", "--key-file", lab.key), other)
    volume.mirror.write_bytes(changed)
    with on(volume, new).served() as served:
        await_restored(served)
    assert new.read_bytes() == noise(4 * MIB)
    on(volume, new).assert_equal_disks()


def test_who_removes_the_volume_meanwhile_is_told_that_the_new_target_is_not_whole(tmp_path: Path) -> None:
    """A volume that is made of it anew would copy what it lacks to a mirror that is adopted."""
    lab = ForkLab(tmp_path)
    volume, new = lab.volume("vol", 4 * MIB, content=noise(4 * MIB)), tmp_path / "new"
    volume.copy_by_hand()
    volume.target.unlink()
    replaced(volume, new).ok()
    said = lab.lockstep("remove", "vol").ok()
    assert f"{new} does not have everything: what it lacks is on {volume.mirror} alone." in said
