"""A mirror that is slower than the cache in front of it is followed at its own rate, and not dropped as one that hangs.

Its disk is a loop device over nbdkit, which takes so many bytes a second, or so many writes: the kernel takes all of it
at once, as it does for a hard disk, and whoever flushes waits.
"""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from lockstep.volume.backlog import FIRST_BYTES, LEAST_BYTES, MOST_BYTES, SCATTERED_BYTES, Backlog
from tests.lab import MIB, Clients, Lab, Storage, Volume, needs, wait_until

SIZE_BYTES: Final = 256 * MIB
RATE_BYTES_S: Final = 64 * MIB
SLACK_S: Final = 5.0  # what a busy machine may add
TIMEOUT_S: Final = 2.5  # to write out all of it takes 4 s; a backlog, 1 s

needs_slow_disk = needs("nbdkit", "nbdfuse", "fusermount3", "losetup", "/dev/fuse", root=True)


RATE: Final = (0, "--filter=rate", f"rate={8 * RATE_BYTES_S}", "burstiness=0.2")
SEEKS: Final = (3, "--filter=noparallel", "serialize=requests")  # a hard disk's, more or less


@pytest.fixture
def how(request: pytest.FixtureRequest) -> tuple[int, str, *tuple[str, ...]]:
    """What makes the mirror slow: how many ms each write takes, and a filter of nbdkit's with its options."""
    return getattr(request, "param", RATE)


@pytest.fixture
def slow(lab: Lab, how: tuple[int, str, *tuple[str, ...]]) -> Iterator[Storage]:
    place = lab.home / "storage"
    delay_ms, way, *options = how
    plugin = (way, "file", str(place / "image"), *options)
    storage = Storage(place, SIZE_BYTES + 16 * MIB, write_delay_ms=delay_ms, plugin=plugin)
    yield storage
    storage.close()


@pytest.fixture
def volume(lab: Lab, slow: Storage, loop: Callable[..., str]) -> Volume:
    target = lab.disk("target", SIZE_BYTES)
    mirror = Path(loop(slow.path))
    disks = ["--target", target, "--mirror", mirror, "--key-file", lab.key]
    lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
    return Volume(lab, "vol", target, mirror, None)


@needs_slow_disk
def test_a_mirror_slower_than_its_cache_is_followed(volume: Volume) -> None:
    with volume.served("--mirror-timeout", TIMEOUT_S) as served:
        clients = Clients(served.uri, 1)
        flushes = []
        for piece in range(0, SIZE_BYTES, 64 * MIB):
            for offset in range(piece, piece + 64 * MIB, MIB):
                clients.write(0, offset, offset.to_bytes(8, "little") * (MIB // 8))
            clients.finish()
            began_s = time.monotonic()
            clients.flush(0)
            clients.finish()
            flushes.append(time.monotonic() - began_s)
        clients.close()
        assert served.mirror_state() == "in-sync"
        assert max(flushes) < TIMEOUT_S
    assert not re.search("degraded|behind", served.log.read_text()), served.log.read_text()
    volume.assert_equal_disks()


@needs_slow_disk
@pytest.mark.parametrize("how", [SEEKS], indirect=True)
def test_scattered_writes_after_much_that_was_not(volume: Volume) -> None:
    """A hard disk takes the copy in a moment, and then each small write as long as it looks for the place."""
    with volume.served("--mirror-timeout", TIMEOUT_S) as served:
        wait_until(lambda: served.mirror_state() == "in-sync", "the copy to end")
        clients = Clients(served.uri, 1)
        for number in range(2000):
            clients.write(0, number * 7919 % (SIZE_BYTES // 4096) * 4096, number.to_bytes(8, "little") * 512)
        clients.flush(0)
        clients.finish()
        clients.close()
        assert served.mirror_state() == "in-sync"
    assert not re.search("degraded|behind", served.log.read_text()), served.log.read_text()
    volume.assert_equal_disks()


@needs_slow_disk
def test_one_that_hangs_with_a_full_cache_holds_clients_up_once(volume: Volume, slow: Storage) -> None:
    with volume.served("--mirror-timeout", TIMEOUT_S) as served:
        clients = Clients(served.uri, 1)
        took = []
        with slow.stopped():
            for offset in range(0, SIZE_BYTES, 16 * MIB):
                began_s = time.monotonic()
                clients.write(0, offset, offset.to_bytes(8, "little") * (2 * MIB))
                clients.finish()
                took.append(time.monotonic() - began_s)
            assert served.mirror_state() == "degraded"
            assert "flushing the mirror failed: it did not answer" in served.log.read_text()
        held_up = [each for each in took if each > 0.8 * TIMEOUT_S]
        assert len(held_up) == 1
        assert held_up[0] < TIMEOUT_S + SLACK_S
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be back")
        clients.close()
    volume.assert_equal_disks()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("lockstep.volume.backlog.time.monotonic", lambda: now[0])
    return now


def flush(cached: Backlog, clock: list[float], length: int, took_s: float) -> None:
    """Take so much, and flush it, within that time."""
    cached.take(length, 1)
    began_s = clock[0]
    clock[0] += took_s
    cached.flushed(cached.taken, began_s)


def limit_of(cached: Backlog) -> int:
    """How much it takes before it is time to write out."""
    taken = cached.taken
    while not cached.large:
        cached.take(MIB, 1)
    limit, cached.taken = cached.taken - taken, taken
    return limit


def test_whoever_writes_more_waits_until_it_is_flushed(clock: list[float]) -> None:
    cached = Backlog(10.0)
    cached.take(FIRST_BYTES - 1, 1)
    assert not cached.large
    cached.taken += 1
    assert cached.large
    assert not cached.full
    began = cached.taken
    cached.take(FIRST_BYTES, 1)
    assert cached.full
    clock[0] += 0.5
    cached.flushed(began, clock[0])
    assert cached.large, "what came since the flush began is not flushed"
    assert not cached.full
    cached.flushed(began - 1, clock[0])  # one that began earlier, and ended later
    assert not cached.full


def test_what_is_scattered_counts_for_more(clock: list[float]) -> None:
    cached = Backlog(10.0)
    cached.take(4096 * (FIRST_BYTES // SCATTERED_BYTES - 1), FIRST_BYTES // SCATTERED_BYTES - 1)
    assert not cached.large
    cached.take(512, 1)
    assert cached.large


def test_a_quick_mirror_may_have_more_and_a_slow_one_less(clock: list[float]) -> None:
    cached = Backlog(10.0)
    for _ in range(3):
        flush(cached, clock, limit_of(cached), took_s=0.1)
    assert limit_of(cached) == 8 * FIRST_BYTES
    flush(cached, clock, 8 * FIRST_BYTES, took_s=0.3)  # neither
    flush(cached, clock, FIRST_BYTES, took_s=0.1)  # too little to tell
    flush(cached, clock, FIRST_BYTES, took_s=2.0)
    assert limit_of(cached) == 8 * FIRST_BYTES
    for _ in range(20):
        flush(cached, clock, MOST_BYTES, took_s=0.1)
    assert limit_of(cached) == MOST_BYTES
    flush(cached, clock, MOST_BYTES, took_s=1.1)
    assert limit_of(cached) == MOST_BYTES // 2
    for _ in range(20):
        flush(cached, clock, MOST_BYTES, took_s=1.1)
    assert limit_of(cached) == LEAST_BYTES


def test_a_cache_that_was_emptied_by_others_is_not_quick(clock: list[float]) -> None:
    """The kernel writes out by itself what is half a minute old: then the flush is quick, and the disk may be slow."""
    cached = Backlog(10.0)
    clock[0] += 30.0
    flush(cached, clock, FIRST_BYTES, took_s=0.01)
    assert limit_of(cached) == FIRST_BYTES


def test_one_that_did_not_answer_is_given_less_each_time(clock: list[float]) -> None:
    for timeouts, most in ((1, FIRST_BYTES), (2, LEAST_BYTES), (3, LEAST_BYTES), (1000, LEAST_BYTES)):
        cached = Backlog(10.0, timeouts)
        flush(cached, clock, FIRST_BYTES, took_s=0.01)
        assert limit_of(cached) == most
