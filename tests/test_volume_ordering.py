"""Overlapping writes in flight reach both disks in one order (P7): thousands of them over the same few sectors.

Small aligned writes are carried out on the server's loop, all others by its threads; only a mix of both, from
several connections, can put one order on the target and another on the mirror.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Final

import pytest

from tests.lab import MIB, Clients, Lab, Storage, Volume, needs

CONNECTIONS: Final = 4
ROUNDS: Final = 6
REQUESTS: Final = 700
SIZE_BYTES: Final = 2 * MIB
ARENA_BYTES: Final = 24 << 10  # so small that nearly everything overlaps

needs_slow_mirror = needs("nbdkit", "nbdfuse", "fusermount3", "/dev/fuse", root=True)


def begin_random(clients: Clients, chance: random.Random, stamp: bytes) -> None:
    """Begin one request somewhere in the arena; every write carries its own bytes."""
    who = chance.randrange(CONNECTIONS)
    offset = chance.randrange(ARENA_BYTES)
    kind = chance.random()
    if kind < 0.55:  # small and aligned to every sector size: on the loop
        length = 4096 * chance.randint(1, 2)
        clients.write(who, offset // 4096 * 4096, stamp * (length // len(stamp)))
    elif kind < 0.75:  # unaligned: merged by a thread
        clients.write(who, offset, (stamp * 400)[: chance.randint(1, 3000)])
    elif kind < 0.83:  # aligned and durable: by a thread
        clients.write(who, offset // 4096 * 4096, stamp * (4096 // len(stamp)), clients.nbd.CMD_FLAG_FUA)
    elif kind < 0.90:  # too large for the loop
        clients.write(who, offset, stamp * ((160 << 10) // len(stamp)))
    elif kind < 0.95:
        clients.zero(who, offset, chance.randint(1, 12_000))
    elif kind < 0.98:
        clients.trim(who, offset, chance.randint(1, 12_000))
    else:
        clients.flush(who)


@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_thousands_of_overlapping_writes_leave_both_disks_equal(lab: Lab, sector_bytes: int) -> None:
    volume = lab.volume("vol", MIB // 2, "--sector-size", sector_bytes)
    chance = random.Random()
    with volume.served() as served:
        clients = Clients(served.uri, CONNECTIONS)
        for number in range(ROUNDS):
            for request in range(REQUESTS):
                begin_random(clients, chance, b"%07d " % (number * REQUESTS + request))
            clients.finish()
            volume.assert_equal_disks()
        clients.close()


@pytest.fixture
def slow_mirror(lab: Lab) -> Iterator[Storage]:
    """A disk on which each write takes so long that others come meanwhile."""
    storage = Storage(lab.home / "slow", SIZE_BYTES + 16 * MIB, write_delay_ms=8)
    yield storage
    storage.close()


@pytest.fixture
def slow_volume(lab: Lab, slow_mirror: Storage) -> Volume:
    target = lab.disk("target", SIZE_BYTES)
    disks = ["--target", target, "--mirror", slow_mirror.path, "--sector-size", 4096, "--key-file", lab.key]
    lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
    return Volume(lab, "vol", target, slow_mirror.path, None)


@needs_slow_mirror
def test_neighbours_in_one_sector_do_not_lose_each_others_bytes(slow_volume: Volume) -> None:
    """Each is merged with what the target holds round it, so one that reads too early loses the others."""
    chance = random.Random()
    expected = chance.randbytes(2 * 4096)
    with slow_volume.served() as served:
        clients = Clients(served.uri, CONNECTIONS)
        for _ in range(2):
            clients.write(0, 0, bytes(len(expected)))
            clients.finish()
            cuts = sorted({0, len(expected), *(chance.randrange(len(expected)) for _ in range(50))})
            pieces = list(itertools.pairwise(cuts))
            chance.shuffle(pieces)
            for start, end in pieces:
                clients.write(chance.randrange(CONNECTIONS), start, expected[start:end])
            clients.finish()
            assert slow_volume.target.read_bytes()[: len(expected)] == expected
            slow_volume.assert_equal_disks()
        clients.close()


@needs_slow_mirror
def test_a_small_write_waits_for_the_large_one_under_it(slow_volume: Volume, slow_mirror: Storage) -> None:
    """The large one is on its way to the mirror, and not yet on the target, when the small ones come."""
    with slow_volume.served() as served:
        clients = Clients(served.uri, 2)
        for round_ in range(4):
            before = len(slow_mirror.events())
            clients.write(0, 0, bytes([10 + round_]) * SIZE_BYTES)
            while not any(event.startswith("...Write") for event in slow_mirror.events()[before:]):
                clients.handles[0].poll(5)  # its payload is still being sent
            assert clients.under_way == 1, "the large write was over before a small one could come"
            for number in range(8):
                clients.write(1, number * 4096, bytes([100 + round_]) * 4096)
            clients.finish()
            slow_volume.assert_equal_disks()
        clients.close()
