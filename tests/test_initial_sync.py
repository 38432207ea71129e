"""The first copy of a target that holds data: online, visible, resumable, and never called done too early.

Where a test must catch the server in the middle, the mirror lies on a slow disk (nbdkit's delay filter), so that
it is the copy that waits and not the test.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.lab import MIB, PATIENCE_S, Clients, Lab, Served, Storage, Volume, needs, wait_until

SIZE_BYTES: Final = 12 * MIB + 12_345
DATA_OFFSET_BYTES: Final = 16 * MIB
IN_SYNC: Final = "in-sync"


def random_content(size_bytes: int = SIZE_BYTES) -> bytes:
    return random.Random(size_bytes).randbytes(size_bytes)


@contextlib.contextmanager
def slow_volume(lab: Lab, delay_ms: int = 4) -> Iterator[Volume]:
    """A volume full of data whose mirror takes its time."""
    target = lab.disk("target", SIZE_BYTES, random_content())
    storage = Storage(lab.home / "slow", -(-SIZE_BYTES // 4096) * 4096 + DATA_OFFSET_BYTES, write_delay_ms=delay_ms)
    try:
        disks = ["--target", target, "--mirror", storage.path, "--key-file", lab.key]
        lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
        yield Volume(lab, "vol", target, storage.path, None)
    finally:
        storage.close()


needs_slow_mirror = needs("nbdkit", "nbdfuse", "fusermount3", "/dev/fuse", root=True)


@contextlib.contextmanager
def started(volume: Volume) -> Iterator[Served]:
    """A server that clients may connect to, whatever its mirror's state; killed in the end if it still runs."""
    served = Served(volume)
    try:
        served.await_ready()
        yield served
    finally:
        served.kill()


def await_progress(served: Served, at_least: float) -> dict[str, Any]:
    """Wait until that part of the copy is done, but not all; the mirror's status then."""
    seen: list[dict[str, Any]] = []

    def far_enough() -> bool:
        seen.append(served.mirror())
        sync = seen[-1]["sync"]
        assert sync is not None, f"the copy ended before it could be seen: {seen[-1]}"
        return bool(sync["done_bytes"] >= at_least * sync["total_bytes"])

    wait_until(far_enough, f"{at_least:.0%} of the copy")
    return seen[-1]


def test_clients_write_while_the_target_is_copied(lab: Lab) -> None:
    size_bytes = 48 * MIB
    content = bytearray(random_content(size_bytes))
    volume = lab.volume("vol", size_bytes, content=bytes(content))
    chance = random.Random()
    during = 0
    with volume.served(in_sync=False) as served:
        clients = Clients(served.uri, 4)
        deadline_s = time.monotonic() + PATIENCE_S
        while (state := served.mirror_state()) != IN_SYNC or during == 0:
            assert state == "syncing"
            assert time.monotonic() < deadline_s, "the copy does not come to an end while clients write"
            for who in range(4):  # each in its own quarter, so that the model knows who was last
                quarter = size_bytes // 4
                for kind in range(24):
                    start = chance.randrange(quarter - (256 << 10))
                    length = chance.choice([4096, 4096, 4096, 1000, 200 << 10])
                    if length == 4096:
                        start = start // 4096 * 4096
                    at = who * quarter + start
                    if kind == 23:
                        clients.zero(who, at, length)
                        content[at : at + length] = bytes(length)
                    else:
                        data = chance.randbytes(length)
                        clients.write(who, at, data)
                        content[at : at + length] = data
                    clients.finish()
                    during += 1
        clients.flush(0)
        clients.finish()
        clients.close()
    assert volume.target.read_bytes() == content
    volume.assert_equal_disks()


@needs_slow_mirror
def test_status_shows_how_far_the_copy_is(lab: Lab) -> None:
    with slow_volume(lab, delay_ms=120) as volume, started(volume) as served:
        first = await_progress(served, 0.01)
        assert first["state"] == "syncing"
        assert first["consistent"] is False
        assert 0 < first["dirty_bytes"] <= SIZE_BYTES
        shown = volume.lab.lockstep("status", "vol").ok()
        later = await_progress(served, 0.5)
        for mirror in (first, later):
            sync = mirror["sync"]
            assert sync.keys() == {"done_bytes", "total_bytes", "rate_bytes_s", "eta_s"}
            assert sync["total_bytes"] == SIZE_BYTES
            assert sync["done_bytes"] + mirror["dirty_bytes"] == SIZE_BYTES, mirror
        assert first["sync"]["done_bytes"] < later["sync"]["done_bytes"] < SIZE_BYTES
        assert later["sync"]["rate_bytes_s"] > 0
        left_bytes = SIZE_BYTES - later["sync"]["done_bytes"]
        assert later["sync"]["eta_s"] == pytest.approx(left_bytes / later["sync"]["rate_bytes_s"], rel=0.05, abs=0.1)
        assert re.search(r"syncing", shown), shown
        assert re.search(r"\d+ %", shown), shown
        states = ["syncing"]
        while states[-1] == "syncing":
            states.append(served.mirror_state())
        assert states[-1] == IN_SYNC
        last = served.mirror()
        assert (last["sync"], last["dirty_bytes"], last["consistent"]) == (None, 0, True)


@needs_slow_mirror
def test_a_copy_that_was_stopped_goes_on_where_it_was(lab: Lab) -> None:
    with slow_volume(lab) as volume:
        with started(volume) as served:
            clients = Clients(served.uri, 1)
            first = await_progress(served, 0.3)
            for at in (5, 100_000, SIZE_BYTES // 2 - 1, SIZE_BYTES - 70_000):  # copied already, and not yet
                clients.write(0, at, b"during the first run" * 200)
            clients.flush(0)
            clients.finish()
            clients.close()
            served.stop()
        (at_rest,) = served.status()["mirrors"]
        assert at_rest["state"] == "behind"
        assert 0 < at_rest["dirty_bytes"] <= first["dirty_bytes"]
        refused = volume.restore(lab.home / "early").failed(1, "syncing")
        assert "--incomplete" in refused
        assert not (lab.home / "early").exists()

        with started(volume) as served:
            second = await_progress(served, 0)
            assert second["sync"]["total_bytes"] == at_rest["dirty_bytes"] < first["sync"]["total_bytes"]
            wait_until(lambda: served.mirror_state() == IN_SYNC, "the mirror to be in sync")
            served.stop()
        volume.assert_equal_disks()
        volume.restore(lab.home / "restored").ok()
        assert (lab.home / "restored").read_bytes() == volume.target.read_bytes()


@needs_slow_mirror
def test_a_copy_that_was_killed_ends_equal_and_cannot_be_restored_before(lab: Lab) -> None:
    with slow_volume(lab) as volume:
        with started(volume) as served:
            clients = Clients(served.uri, 1)
            await_progress(served, 0.3)
            clients.write(0, 7, b"written before the crash" * 300)
            clients.finish()
            served.process.send_signal(signal.SIGKILL)
            served.process.wait(PATIENCE_S)
        assert served.status()["mirrors"][0]["state"] == "behind"
        volume.restore(lab.home / "early").failed(1, "--incomplete")
        assert not (lab.home / "early").exists()
        volume.restore(lab.home / "rescued", "--incomplete").ok()
        assert (lab.home / "rescued").stat().st_size == SIZE_BYTES

        with started(volume) as served:
            total_bytes = await_progress(served, 0)["sync"]["total_bytes"]
            assert SIZE_BYTES // 3 < total_bytes <= SIZE_BYTES, "a part that was not copied yet is called equal"
            wait_until(lambda: served.mirror_state() == IN_SYNC, "the mirror to be in sync")
            served.stop()
        volume.assert_equal_disks()
        volume.restore(lab.home / "restored").ok()
        assert (lab.home / "restored").read_bytes() == volume.target.read_bytes()


def test_after_a_clean_stop_in_sync_nothing_is_copied(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES, content=random_content(), header=True)
    with volume.served():
        pass
    assert served_is_equal_at_rest(volume)
    untouched = volume.mirror.stat().st_mtime_ns
    with started(volume) as served:
        mirror = served.mirror()
        assert (mirror["state"], mirror["dirty_bytes"], mirror["sync"]) == (IN_SYNC, 0, None)
        served.stop()
    assert volume.mirror.stat().st_mtime_ns == untouched, "a mirror that was in sync has been written"
    assert served_is_equal_at_rest(volume)


def served_is_equal_at_rest(volume: Volume) -> bool:
    """Whether the status of a volume that nobody serves calls its mirror in sync; then it must be."""
    (mirror,) = Served.status(_Resting(volume))["mirrors"]
    if mirror["state"] == IN_SYNC:
        volume.assert_equal_disks()
    return bool(mirror["state"] == IN_SYNC)


class _Resting(Served):
    """Nobody serves the volume; just to ask for its status."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume


def write_and_stop(volume: Volume, text: bytes) -> None:
    """Serve until in sync, write something, and stop in order."""
    with volume.served() as served:
        clients = Clients(served.uri, 1)
        for at in range(0, SIZE_BYTES - MIB, MIB):
            clients.write(0, at, text)
        clients.finish()
        clients.close()


def keep(volume: Volume, name: str) -> Path:
    """A copy of the mirror as it is, header and all."""
    return Path(shutil.copy(volume.mirror, volume.lab.home / name))


def test_a_mirror_restored_from_an_older_copy_of_itself_is_copied_anew(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES, content=random_content())
    write_and_stop(volume, b"first " * 1000)
    older = keep(volume, "older")
    write_and_stop(volume, b"second " * 1000)
    shutil.copy(older, volume.mirror)
    assert not served_is_equal_at_rest(volume)
    with volume.served():
        volume.assert_equal_disks()
    assert served_is_equal_at_rest(volume)


def test_two_copies_of_one_mirror_that_went_different_ways_are_told_apart(lab: Lab) -> None:
    """Both came from the same older copy, by the same number of steps; only the second holds what the target holds."""
    volume = lab.volume("vol", SIZE_BYTES, content=random_content())
    write_and_stop(volume, b"both " * 1000)
    older = keep(volume, "older")
    write_and_stop(volume, b"forgotten " * 1000)
    shutil.copy(older, volume.mirror)
    write_and_stop(volume, b"only the first " * 1000)
    first = keep(volume, "first")
    shutil.copy(older, volume.mirror)
    write_and_stop(volume, b"only the second " * 1000)
    assert served_is_equal_at_rest(volume)
    shutil.copy(first, volume.mirror)
    served_is_equal_at_rest(volume)
    with volume.served():
        volume.assert_equal_disks()


def test_another_disk_in_the_mirrors_place_is_refused(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES, content=random_content())
    other = lab.volume("other", SIZE_BYTES)
    write_and_stop(volume, b"mine " * 1000)
    right, before = keep(volume, "right"), volume.target.read_bytes()
    shutil.copy(other.mirror, volume.mirror)
    assert not served_is_equal_at_rest(volume)
    intruder = volume.mirror.read_bytes()
    lab.lockstep("serve", "vol", "--key-file", lab.key).failed(1, "other")
    assert volume.mirror.read_bytes() == intruder
    with volume.mirror.open("r+b") as file:
        file.write(bytes(DATA_OFFSET_BYTES))
    assert not served_is_equal_at_rest(volume)
    lab.lockstep("serve", "vol", "--key-file", lab.key).failed(1, "LUKS2")
    assert volume.target.read_bytes() == before
    shutil.copy(right, volume.mirror)  # the right one again, exactly as it was left
    with started(volume) as served:
        assert served.mirror()["state"] == IN_SYNC
        volume.assert_equal_disks()
        served.stop()


def test_a_stop_while_the_header_is_being_updated_is_still_a_stop_in_order(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is rewritten when the state changes; a stop at that very moment must wait for it, as must Ctrl-C."""
    volume = lab.volume("vol", SIZE_BYTES, content=random_content())
    importing, go_on = lab.home / "importing", lab.home / "go-on"
    program = lab.home / "slow-bin" / "cryptsetup"
    program.parent.mkdir()
    real = shutil.which("cryptsetup", path="/usr/sbin:/sbin:/usr/bin:/usr/local/sbin")
    assert real is not None
    program.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = token ] && [ -e "{lab.home}/slow" ]; then ps -o pgid= -p $$ > "{importing}.new"; '
        f'mv "{importing}.new" "{importing}"; '
        f'while [ ! -e "{go_on}" ]; do sleep 0.01; done; fi\nexec "{real}" "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/sbin:/usr/bin:/sbin:/bin")
    with started(volume) as served:
        (lab.home / "slow").touch()  # from now on; the start is over
        wait_until(importing.exists, "the server to note in the header that the mirror is in sync")
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in served.log.read_text(), "the server to take notice")
        assert int(importing.read_text()) != os.getpgid(served.process.pid)
        go_on.touch()
        assert served.process.wait(PATIENCE_S) == 0, served.log.read_text()
    assert served_is_equal_at_rest(volume), served.log.read_text()
    with started(volume) as served:
        assert served.mirror()["state"] == IN_SYNC
        served.stop()
    volume.assert_equal_disks()
