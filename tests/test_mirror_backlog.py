"""A mirror that is slower than the cache in front of it is followed at its own rate, and not dropped as one that hangs.

Its disk is a loop device over nbdkit, which takes so many bytes a second: the kernel takes all of it at once, as it
does for a hard disk, and whoever flushes waits.
"""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from lockstep.volume.backlog import LEAST_BYTES, MOST_BYTES, Backlog
from tests.lab import MIB, Clients, Lab, Storage, Volume, needs, wait_until

SIZE_BYTES: Final = 256 * MIB
RATE_BYTES_S: Final = 64 * MIB
SLACK_S: Final = 5.0  # what a busy machine may add
TIMEOUT_S: Final = 2.5  # to write out all of it takes 4 s; a backlog, 1 s

needs_slow_disk = needs("nbdkit", "nbdfuse", "fusermount3", "losetup", "/dev/fuse", root=True)


@pytest.fixture
def slow(lab: Lab) -> Iterator[Storage]:
    place = lab.home / "storage"
    rate = (f"rate={8 * RATE_BYTES_S}", "burstiness=0.2")
    storage = Storage(place, SIZE_BYTES + 16 * MIB, plugin=("--filter=rate", "file", str(place / "image"), *rate))
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


def flush(cached: Backlog, clock: list[float], count: int, took_s: float) -> None:
    """Take so much, and flush it, within that time."""
    cached.taken += count
    began_s = clock[0]
    clock[0] += took_s
    cached.flushed(cached.taken, began_s)


def limit_of(cached: Backlog) -> int:
    """How much it takes before it is time to write out."""
    taken = cached.taken
    while not cached.large:
        cached.taken += MIB
    limit, cached.taken = cached.taken - taken, taken
    return limit


def test_whoever_writes_more_waits_until_it_is_flushed(clock: list[float]) -> None:
    cached = Backlog(10.0, may_grow=False)
    cached.taken += LEAST_BYTES - 1
    assert not cached.large
    cached.taken += 1
    assert cached.large
    assert not cached.full
    began = cached.taken
    cached.taken += LEAST_BYTES
    assert cached.full
    cached.flushed(began, clock[0])
    assert cached.large, "what came since the flush began is not flushed"
    assert not cached.full
    cached.flushed(began - 1, clock[0])  # one that began earlier, and ended later
    assert not cached.full


def test_a_quick_mirror_may_have_more(clock: list[float]) -> None:
    cached = Backlog(10.0)
    for _ in range(3):
        flush(cached, clock, limit_of(cached), took_s=0.1)
    assert limit_of(cached) == 8 * LEAST_BYTES
    flush(cached, clock, 8 * LEAST_BYTES, took_s=0.6)  # slower than a twentieth of its patience
    flush(cached, clock, LEAST_BYTES, took_s=0.1)  # too little to tell
    assert limit_of(cached) == 8 * LEAST_BYTES
    for _ in range(20):
        flush(cached, clock, MOST_BYTES, took_s=0.1)
    assert limit_of(cached) == MOST_BYTES


def test_a_cache_that_was_emptied_by_others_is_not_quick(clock: list[float]) -> None:
    """The kernel writes out by itself what is half a minute old: then the flush is quick, and the disk may be slow."""
    cached = Backlog(10.0)
    clock[0] += 30.0
    flush(cached, clock, LEAST_BYTES, took_s=0.01)
    assert limit_of(cached) == LEAST_BYTES


def test_one_that_did_not_answer_once_is_given_little(clock: list[float]) -> None:
    cached = Backlog(10.0, may_grow=False)
    flush(cached, clock, LEAST_BYTES, took_s=0.01)
    assert limit_of(cached) == LEAST_BYTES
