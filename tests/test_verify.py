"""Verify says where target and mirror differ, and never that they do when they do not, however busy the clients are."""

import asyncio
import contextlib
import errno
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from lockstep.crypto.unlock import Unlock
from lockstep.nbd.identity import account
from lockstep.registry import windows
from lockstep.registry.audit import SERVER
from lockstep.registry.windows import Schedule
from lockstep.service import control_client
from lockstep.service.background import GRANTS_INTERVAL_S
from lockstep.service.maintenance import verify_at_rest
from lockstep.service.state import State
from lockstep.service.verification import Verification
from lockstep.service.volume_session import VolumeSession
from lockstep.volume.verify import Comparison, Verify
from tests.lab import MIB, Clock, Lab, Served, Volume, needs, run, wait_until, write

SIZE_BYTES = 16 * MIB
DATA_OFFSET_BYTES = 16 * MIB  # where a mirror with an inline header keeps its data


def damage(volume: Volume, *offsets: int) -> None:
    """Change one byte of the mirror at each of these offsets of the target's."""
    with volume.mirror.open("rb+") as mirror:
        for offset in offsets:
            mirror.seek(DATA_OFFSET_BYTES + offset)
            byte = mirror.read(1)
            mirror.seek(DATA_OFFSET_BYTES + offset)
            mirror.write(bytes([byte[0] ^ 1]))


def verify(volume: Volume, *options: object, code: int = 0) -> dict[str, Any]:
    done = volume.lab.lockstep("verify", volume.name, "--key-file", volume.lab.key, "--json", *options)
    assert done.code == code, (done.code, done.err)
    found = json.loads(done.out)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def volume(lab: Lab) -> Volume:
    return lab.volume("vol", SIZE_BYTES, content=random.Random(1).randbytes(SIZE_BYTES))


@pytest.mark.parametrize("served", [True, False], ids=["served", "at-rest"])
def test_differences_are_listed_joined_repaired_and_remembered(volume: Volume, served: bool) -> None:
    offsets = (5, 512, 1024 + 7, 3 * MIB, SIZE_BYTES - 1)

    def examine() -> None:
        assert verify(volume)["mismatches"] == []
        damage(volume, *offsets)
        found = verify(volume, code=3)
        assert found["compared_bytes"] == SIZE_BYTES
        assert found["mismatches"] == [
            {"offset": 0, "length": 1536},
            {"offset": 3 * MIB, "length": 512},
            {"offset": SIZE_BYTES - 512, "length": 512},
        ]
        assert found["repaired_bytes"] == 0
        assert verify(volume, "--repair")["repaired_bytes"] == 2560
        assert verify(volume)["mismatches"] == []

    if served:
        with volume.served():
            examine()
    else:
        with volume.served():
            pass
        examine()
    volume.assert_equal_disks()
    rows = [json.loads(row) for row in volume.lab.lockstep("verify", "vol", "--history", "--json").ok().splitlines()]
    assert [row["details"]["differing_bytes"] for row in rows] == [0, 2560, 2560, 0]
    assert "2560 bytes differ, in 3 places" in volume.lab.lockstep("verify", "vol", "--history").ok()


def test_differences_are_joined_in_whatever_order_they_are_found() -> None:
    chosen = random.Random(7)
    for _ in range(200):
        found, differing = Comparison(1 << 20), set[int]()
        for _ in range(30):
            offset, length = chosen.randrange(100), chosen.randrange(1, 6)
            found.differ(offset, length)
            differing.update(range(offset, offset + length))
            starts = sorted(at for at in differing if at - 1 not in differing)
            ends = sorted(at + 1 for at in differing if at + 1 not in differing)
            assert found.mismatches == [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def test_a_mirror_with_many_differences_does_not_hold_up_the_clients() -> None:
    """They are noted where requests are served: each must take no longer than the first."""
    found, began_s = Comparison(1 << 40), time.monotonic()
    for number in range(20_000):
        found.differ(number * 8192, 4096)
    assert time.monotonic() - began_s < 5


def test_the_audit_trail_keeps_the_first_of_many_differences(volume: Volume) -> None:
    with volume.served():
        pass
    damage(volume, *range(0, 300 * 1024, 1024))
    assert len(verify(volume, code=3)["mismatches"]) == 300
    (row,) = volume.lab.lockstep("verify", "vol", "--history", "--json").ok().splitlines()
    assert len(json.loads(row)["details"]["mismatches"]) == 100


def test_many_differences_are_not_listed_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits asks five times a second how far it is, and the list is made where requests are served."""

    async def compare() -> None:
        session = SimpleNamespace(mirrors=[Mock(link=Mock(path="/mirror"))], resyncs=[], writes=None, workers=None)
        verification = Verification(cast(VolumeSession, session), Mock())
        verification.begin(SERVER, repair=False)
        await verification.wait(0)
        (mirror,) = verification.describe()["mirrors"]
        assert not mirror["mismatches"]
        assert mirror["differing_bytes"] == 20_000 * 4096
        await verification.stop()
        assert len(verification.describe()["mirrors"][0]["mismatches"]) == 20_000

    monkeypatch.setattr("lockstep.service.verification.Verify", _Comparing)
    asyncio.run(compare())


class _Comparing:
    """A comparison that has found much, and goes on until it is stopped."""

    def __init__(self, *_: object, **__: object) -> None:
        self.found = Comparison(1 << 40)
        self.found.mismatches = [(number * 8192, 4096) for number in range(20_000)]
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        await self._stopping.wait()

    def stop(self) -> None:
        self._stopping.set()


def test_what_was_found_is_told_though_the_audit_trail_takes_no_row(volume: Volume) -> None:
    with volume.served():
        pass
    damage(volume, 3 * MIB)
    registry = volume.lab.state / "registry.db"
    with contextlib.closing(sqlite3.connect(registry)) as connection:
        connection.execute("CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    done = volume.lab.lockstep("verify", "vol", "--key-file", volume.lab.key)
    assert done.code == 3, done.err
    assert f"offset {3 * MIB}, 512 bytes" in done.out
    assert "is not in the audit trail: " in done.err
    assert "disk is full" in done.err


def test_what_a_person_reads(volume: Volume) -> None:
    with volume.served():
        damage(volume, 7 * MIB)
        done = volume.lab.lockstep("verify", "vol")
        assert "1.0 KiB" not in done.out
        assert f"offset {7 * MIB}, 512 bytes" in done.out
        done.failed(3, "differs from its target in 1 places, 512 bytes", "lockstep verify vol --repair")


def test_a_mirror_that_is_away_is_not_said_to_be_equal(volume: Volume) -> None:
    with volume.served() as served:
        volume.mirror.rename(volume.lab.home / "away")
        wait_until(lambda: served.mirror_state() == "degraded", "the mirror to be missed")
        done = volume.lab.lockstep("verify", "vol")
        done.failed(1, "was not compared to the end")
        assert "compared 0 B, and not to the end" in done.out
    with volume.served(in_sync=False):
        for command, code in (("verify", 1), ("sync", 3)):
            said = volume.lab.lockstep(command, "vol", *(["--wait"] if command == "sync" else [])).failed(code, "away")
            assert ".." not in said


@pytest.mark.parametrize("served", [True, False], ids=["served", "at-rest"])
def test_a_mirror_that_is_away_does_not_hide_that_another_differs(volume: Volume, served: bool) -> None:
    lab, second = volume.lab, volume.lab.home / "second"
    key = ("--key-file", lab.key)
    lab.lockstep("mirror", "add", "vol", second, *key, environment=lab.quick_format()).ok()
    with volume.served(in_sync=False):
        lab.lockstep("sync", "vol", "--wait").ok()
    volume.mirror.rename(lab.home / "away")
    with volume.served(in_sync=False) if served else contextlib.nullcontext():
        damage(Volume(lab, "vol", volume.target, second, None), MIB)
        done = lab.lockstep("verify", "vol", *key)
    assert (done.code, f"{second} differs from its target in 1 places" in done.err) == (3, True)
    assert f"{volume.mirror}: compared 0 B, and not to the end" in done.out


def test_a_mirror_that_was_never_copied_is_not_said_to_be_equal(volume: Volume) -> None:
    done = volume.lab.lockstep("verify", "vol", "--key-file", volume.lab.key)
    done.failed(1, "all of it is known to differ")
    assert "no difference" not in done.out


@pytest.mark.parametrize("served", [True, False], ids=["served", "at-rest"])
def test_what_nobody_may_copy_is_not_said_to_be_repaired(volume: Volume, served: bool) -> None:
    with volume.served():
        pass
    volume.lab.lockstep("revoke", "vol", "root").ok()
    with volume.served() if served else contextlib.nullcontext():
        damage(volume, 5)
        done = volume.lab.lockstep("verify", "vol", "--repair", "--key-file", volume.lab.key)
    done.failed(3, "is behind: what differs is marked")
    assert "were copied" not in done.out
    volume.grant("root")
    with volume.served():
        assert verify(volume)["left_out_bytes"] == 0
    volume.assert_equal_disks()


def test_the_end_of_its_server_is_told_as_that(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to ask for a passphrase."""
    with volume.served() as served:

        def ask(path: str, name: str, method: str, resource: str, **body: object) -> dict[str, Any]:
            if method == "GET":
                os.kill(served.process.pid, signal.SIGKILL)
                wait_until(lambda: gone(path), "its end")
            return control_client.ask(path, name, method, resource, **body)

        monkeypatch.setattr("lockstep.cli.verifying.ask", ask)
        volume.lab.lockstep("verify", "vol").failed(1, "The volume vol is not being served")


def gone(control: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(control) == errno.ECONNREFUSED


def test_a_mirror_that_was_just_connected_again_is_waited_for(volume: Volume) -> None:
    away = volume.lab.home / "away"
    with volume.served() as served:
        volume.mirror.rename(away)
        wait_until(lambda: served.mirror_state() == "degraded", "the mirror to be missed")
        away.rename(volume.mirror)
        volume.lab.lockstep("sync", "vol", "--wait").ok()
        assert not served.mirror()["sought"]


def test_there_must_be_a_mirror(lab: Lab) -> None:
    lab.lockstep("create", "vol", "--target", lab.disk("target", MIB)).ok()
    lab.lockstep("verify", "vol", "--key-file", lab.key).failed(1, "The volume vol has no mirror.")
    with Volume(lab, "vol", lab.home / "target", lab.home / "none", None).served(in_sync=False):
        lab.lockstep("verify", "vol").failed(1, "The volume vol has no mirror.")
        lab.lockstep("sync", "vol", "--wait").failed(1, "The volume vol has no mirror.")
        assert "no mirror" in lab.lockstep("sync", "vol").ok()


def test_verify_changes_nothing_unless_it_repairs(volume: Volume) -> None:
    with volume.served():
        pass
    damage(volume, 100)
    before = volume.mirror.read_bytes(), volume.target.read_bytes()
    verify(volume, code=3)
    assert (volume.mirror.read_bytes(), volume.target.read_bytes()) == before


def test_a_mirror_that_gives_back_its_disk_after_a_crash_still_does_when_it_was_verified(volume: Volume) -> None:
    """Nothing was copied to it, so it is what it was; and the target may be lost before the next start."""
    with volume.served() as served:
        write(served, "write -P 1 8M 64k")
        served.kill()
    before = volume.mirror.read_bytes()
    assert verify(volume)["left_out_bytes"] > 0
    assert volume.mirror.read_bytes() == before
    volume.restore(volume.lab.home / "output").ok()


def test_what_is_known_to_differ_is_no_finding(volume: Volume) -> None:
    volume.lab.lockstep("revoke", "vol", "root").ok()
    volume.lab.lockstep("grant", "vol", "nobody").ok()
    with volume.served() as served:
        run("qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", served.uri)
        found = verify(volume)
        assert found["mismatches"] == []
        assert found["compared_bytes"] == SIZE_BYTES - (64 << 10)
        assert found["left_out_bytes"] == 64 << 10


@needs("fio")
def test_a_busy_volume_gives_no_false_alarm(lab: Lab) -> None:
    """Writes of any size and alignment, from several connections, while everything is compared again and again."""
    volume = lab.volume("vol", SIZE_BYTES)
    with volume.served() as served:
        load = ["--rw=randwrite", "--bsrange=1k-96k", "--blockalign=512", "--iodepth=16", "--numjobs=3"]
        where = ["--ioengine=nbd", f"--uri={served.uri}", f"--size={SIZE_BYTES}", "--time_based", "--runtime=60"]
        writers = subprocess.Popen(["fio", "--name=w", *load, *where], stdout=subprocess.DEVNULL)
        try:
            for _ in range(4):
                found = verify(volume)
                assert found["mismatches"] == []
                assert found["compared_bytes"] == SIZE_BYTES
            assert writers.poll() is None, "the writers ended before the comparisons did"
        finally:
            writers.terminate()
            writers.wait()
    volume.assert_equal_disks()


@needs("gcc")
def test_a_scrub_begins_by_itself_in_its_window_and_repairs_nothing(lab: Lab) -> None:
    clock = Clock(lab, datetime(2026, 6, 6, 12, 0, tzinfo=UTC))  # a Saturday
    volume = lab.volume("vol", 4 * MIB)
    lab.lockstep("set", "vol", "scrub=sun 03:00-04:00", "--timezone", "UTC").ok()
    with volume.served() as served:
        damage(volume, 4096)

        def scrubs() -> list[str]:
            return lab.lockstep("verify", "vol", "--history").ok().splitlines()

        assert "never compared" in scrubs()[0]
        clock.set(datetime(2026, 6, 7, 3, 0, 1, tzinfo=UTC))
        wait_until(lambda: "scrub by lockstep" in scrubs()[0], "the scrub to be over")
        assert "512 bytes differ, in 1 places" in scrubs()[0]
        assert served.mirror_state() == "in-sync"
        clock.set(datetime(2026, 6, 7, 3, 10, tzinfo=UTC))
        assert verify(volume, code=3)["mismatches"] == [{"offset": 4096, "length": 512}]
        assert len(scrubs()) == 2, "once in a window"
    lab.lockstep("set", "vol", "scrub=off").ok()
    lab.lockstep("set", "vol", "scrub=whenever").failed(2, "whenever")


@needs("gcc")
def test_a_scrub_while_the_clock_was_wrong_is_not_the_last_one_for_a_year(lab: Lab) -> None:
    clock = Clock(lab, datetime(2027, 6, 5, 12, 0, tzinfo=UTC))  # a Saturday
    volume = lab.volume("vol", 4 * MIB)
    lab.lockstep("set", "vol", "scrub=sun 03:00-04:00", "--timezone", "UTC").ok()
    with volume.served():

        def scrubs() -> int:
            return lab.lockstep("verify", "vol", "--history").ok().count("scrub by lockstep")

        clock.set(datetime(2027, 6, 6, 3, 0, 1, tzinfo=UTC))
        wait_until(lambda: scrubs() == 1, "a scrub in what the clock takes for its window")
        clock.set(datetime(2026, 6, 7, 3, 0, 1, tzinfo=UTC))
        wait_until(lambda: scrubs() == 2, "a scrub in its window", patience_s=20)


def test_two_at_a_time_are_one_too_many(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    with volume.served() as served:
        while not begin(served):
            pass


def begin(served: Served) -> bool:
    """Begin two comparisons at once; whether the second was refused, as it is unless the first was that quick."""
    done = [subprocess.Popen(command(served.volume), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [each.communicate()[1] for each in done]
    return any("are being compared already" in each for each in said)


def command(volume: Volume) -> list[str]:
    program = sys.executable
    return [program, "-m", "lockstep", "--state-dir", str(volume.lab.state), "verify", volume.name]


def test_what_lies_behind_the_volume_on_a_device_that_has_grown_is_not_compared(
    lab: Lab, loop: Callable[..., str]
) -> None:
    size_bytes = 8 * MIB + 512  # the last sector of the mirror is filled up with zeroes
    image = lab.disk("target", size_bytes)
    device = loop(image)
    disks = ["--target", device, "--mirror", lab.home / "mirror", "--key-file", lab.key, "--sector-size", 4096]
    lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
    with image.open("r+b") as file:
        file.seek(size_bytes)
        file.write(b"foreign" * 2000)
        file.truncate(size_bytes + MIB)
    run("losetup", "--set-capacity", device)
    volume = Volume(lab, "vol", image, lab.home / "mirror", None)
    with volume.served() as served:
        run("qemu-io", "-f", "raw", "-c", f"write -P 5 {size_bytes - 300} 100", served.uri)
        lab.lockstep("verify", "vol").ok()


def test_one_that_was_ended_early_is_not_the_last(volume: Volume) -> None:
    with volume.served() as served:
        control = str(volume.lab.state / "run" / "vol.control")
        control_client.ask(control, "vol", "DELETE", "/v1/verify")  # what Ctrl-C does
        assert verify(volume)["compared_bytes"] == SIZE_BYTES
        served.stop()


def test_a_scrub_that_begins_right_afterwards_is_not_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first look at nothing would be reported as the whole disk, with no difference."""
    go_on = asyncio.Event()

    class Comparing:
        def __init__(self, *_: object, **__: object) -> None:
            self.found, self.over = Comparison(1024), False

        async def run(self, may_go_on: Callable[[], bool] | None = None) -> None:
            if may_go_on is not None:
                await go_on.wait()
            self.found.done_bytes = self.found.compared_bytes = 1024
            self.found.differ(512, 512)
            self.over = True

        def stop(self) -> None:
            go_on.set()

    async def compare() -> None:
        session = SimpleNamespace(mirrors=[Mock(link=Mock(path="/mirror"))], resyncs=[], writes=None, workers=None)
        verification = Verification(cast(VolumeSession, session), Mock())
        verification.schedule = Schedule(windows.parse("daily 00:00-24:00"), "UTC")
        verification.begin(SERVER, repair=False)
        await verification.wait(10)
        verification.look()
        assert verification.running
        await verification.wait(0)
        found = verification.describe()
        await verification.close()
        assert not found["running"]
        assert found["mirrors"][0]["mismatches"] == [{"offset": 512, "length": 512}]

    monkeypatch.setattr("lockstep.service.verification.Verify", Comparing)
    asyncio.run(compare())


def test_a_repair_at_rest_goes_by_the_grants_of_its_end(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take hours; here the grant is taken away while it compares."""
    with volume.served():
        pass
    damage(volume, 512)
    before = volume.mirror.read_bytes()[DATA_OFFSET_BYTES:]
    compare = Verify.run

    async def compare_slowly(self: Verify, *rest: Any) -> None:
        await compare(self, *rest)
        await asyncio.to_thread(volume.lab.lockstep("revoke", volume.name, account(os.geteuid())).ok)
        await asyncio.sleep(3 * GRANTS_INTERVAL_S)

    monkeypatch.setattr(Verify, "run", compare_slowly)
    monkeypatch.setattr("lockstep.service.maintenance.protect_memory", lambda: None)  # of the tests themselves
    unlock = Unlock(volume.lab.key.read_bytes)
    verify_at_rest(State(str(volume.lab.state)), volume.name, unlock, repair=True, on_progress=lambda _done, _all: None)
    assert volume.mirror.read_bytes()[DATA_OFFSET_BYTES:] == before
