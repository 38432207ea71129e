"""Acknowledged means on both disks (P1), and flushed means durable on both (P2).

Target and mirror lie on nbdkit, shown as files by nbdfuse: every write and every fdatasync of the server appears in
one of nbdkit's logs, and a disk that is stopped (SIGSTOP) shows whether the server waits for it.
"""

import contextlib
import ctypes
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.forks import ForkLab
from tests.lab import MIB, Clients, Lab, Served, Storage, Volume, needs, run, wait_until

pytestmark = needs("nbdkit", "nbdfuse", "fusermount3", "/dev/fuse", root=True)

SIZE_BYTES: Final = 4 * MIB
DATA_OFFSET_BYTES: Final = 16 * MIB  # where a mirror with an inline header keeps its data
SILENCE_S: Final = 0.3
BY_ITSELF_S: Final = 20.0  # the kernel writes out what is 30 s old
_SYS_CACHESTAT: Final = 451  # linux 6.5, mm/filemap.c


@dataclass
class Stage:
    """A served volume on two disks of record, and a client."""

    target: Storage
    mirror: Storage
    volume: Volume
    served: Served
    clients: Clients


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    lab = ForkLab(tmp_path_factory.mktemp("durability"))
    with contextlib.ExitStack() as stack:
        target = Storage(lab.home / "target", SIZE_BYTES)
        stack.callback(target.close)
        mirror = Storage(lab.home / "mirror", SIZE_BYTES + DATA_OFFSET_BYTES)
        stack.callback(mirror.close)
        disks = ["--target", target.path, "--mirror", mirror.path, "--key-file", lab.key]
        lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
        volume = Volume(lab, "vol", target.path, mirror.path, None)
        served = stack.enter_context(volume.served())
        # The token says so a moment later, and its writes would look like ours.
        wait_until(lambda: "in-sync" in token_of(mirror.image), "the token to say that the mirror is in sync")
        clients = Clients(served.uri, 2)
        stack.callback(clients.close)
        yield Stage(target, mirror, volume, served, clients)


def token_of(image: Path) -> str:
    return run("cryptsetup", "token", "export", "--token-id", "0", str(image), check=False)


def stays_silent(clients: Clients) -> bool:
    """Whether no reply comes, for as long as is reasonable to wait for nothing."""
    before = clients.under_way
    deadline_s = time.monotonic() + SILENCE_S
    while time.monotonic() < deadline_s:
        for handle in clients.handles:
            handle.poll(20)
        if clients.under_way != before:
            return False
    return True


def test_a_flush_has_reached_both_disks_when_it_is_answered(stage: Stage) -> None:
    for number in range(20):
        before = len(stage.target.events()), len(stage.mirror.events())
        stage.clients.write(0, 4096 * number, b"x" * 4096)
        stage.clients.finish()
        stage.clients.flush(1)  # one connection's flush covers what another was answered
        stage.clients.finish()
        assert stage.target.durable_since(before[0]), stage.target.events()[before[0] :]
        assert stage.mirror.durable_since(before[1]), stage.mirror.events()[before[1] :]


@pytest.mark.parametrize(
    ("offset", "length"), [(4096, 4096), (5, 3), (8192, 200 << 10)], ids=["aligned", "within-a-sector", "large"]
)
def test_a_durable_write_has_reached_both_disks_when_it_is_answered(stage: Stage, offset: int, length: int) -> None:
    for _ in range(5):
        before = len(stage.target.events()), len(stage.mirror.events())
        stage.clients.write(0, offset, b"x" * length, stage.clients.nbd.CMD_FLAG_FUA)
        stage.clients.finish()
        assert stage.target.durable_since(before[0]), stage.target.events()[before[0] :]
        assert stage.mirror.durable_since(before[1]), stage.mirror.events()[before[1] :]


def test_durable_zeroes_have_reached_both_disks_when_they_are_answered(stage: Stage) -> None:
    nbd = stage.clients.nbd
    for flags in (nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE):
        before = len(stage.target.events()), len(stage.mirror.events())
        stage.clients.zero(0, 1000, 9000, flags)
        stage.clients.finish()
        assert stage.target.durable_since(before[0]), stage.target.events()[before[0] :]
        assert stage.mirror.durable_since(before[1]), stage.mirror.events()[before[1] :]


@pytest.mark.parametrize("waits_for", ["target", "mirror"])
def test_no_answer_comes_before_the_slower_disk_is_done(stage: Stage, waits_for: str) -> None:
    clients = stage.clients
    slow, quick = (stage.target, stage.mirror) if waits_for == "target" else (stage.mirror, stage.target)
    clients.write(0, 0, b"a" * 4096)
    clients.finish()

    with slow.stopped():
        before = len(quick.events())
        clients.flush(0)
        wait_until(lambda: quick.durable_since(before), "the quick disk to be flushed")
        assert stays_silent(clients), "a flush was answered although a disk had not"
    clients.finish()

    for offset, length, flags in ((8192, 4096, 0), (9, 5, 0), (4096, 200 << 10, 0), (0, 512, clients.nbd.CMD_FLAG_FUA)):
        with slow.stopped():
            clients.write(0, offset, b"b" * length, flags)
            assert stays_silent(clients), f"a write of {length} bytes was answered although a disk had not taken it"
        clients.finish()
    assert stage.served.mirror_state() == "in-sync"
    stage.volume.assert_equal_disks()


def test_a_thousand_writes_are_in_both_files_as_soon_as_they_are_answered(lab: Lab) -> None:
    """Without a flush: what another process sees of both files right after the reply."""
    block = 4096
    volume = lab.volume("vol", 1000 * block)
    chance = random.Random(4)
    seen = []
    with volume.served() as served, volume.target.open("rb", 0) as target, volume.mirror.open("rb", 0) as mirror:
        clients = Clients(served.uri, 4)
        for number in range(1000):
            at = number * block
            start = at + chance.choice([0, 0, 1, 511, 512, 700])
            data = chance.randbytes(chance.choice([1, 512, 1000, 3000, at + block - start]))
            clients.write(number % 4, start, data, clients.nbd.CMD_FLAG_FUA if number % 50 == 0 else 0)
            clients.finish()
            target.seek(start)
            assert target.read(len(data)) == data
            mirror.seek(DATA_OFFSET_BYTES + at)
            seen.append(mirror.read(block))
        clients.close()
    # Each block was written once, so what was seen then is what is there now, which decrypts to the target.
    with volume.mirror.open("rb") as mirror:
        mirror.seek(DATA_OFFSET_BYTES)
        for number, then in enumerate(seen):
            assert mirror.read(block) == then, f"block {number} came to the mirror after the reply"
    volume.assert_equal_disks()


def dirty_bytes(path: Path) -> int:
    """How much of a file waits in the page cache to be written."""
    numbers, everything = (ctypes.c_uint64 * 5)(), (ctypes.c_uint64 * 2)(0, 0)
    with path.open("rb") as file:
        failed = ctypes.CDLL(None, use_errno=True).syscall(_SYS_CACHESTAT, file.fileno(), everything, numbers, 0)
    assert not failed, "this test needs cachestat(2)"
    return 4096 * numbers[1]


def test_between_flushes_that_come_often_both_disks_write_already() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as home:  # a file system that has to write
        volume = ForkLab(Path(home)).volume("vol", SIZE_BYTES)
        with volume.served() as served:
            wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be in sync")
            clients = Clients(served.uri, 1)
            clients.write(0, 0, b"x" * 65536)
            clients.flush(0)
            clients.finish()
            clients.write(0, 65536, b"y" * 65536)
            clients.finish()
            disks = volume.target, volume.mirror
            wait_until(lambda: not any(map(dirty_bytes, disks)), "both disks to be written", BY_ITSELF_S)
            clients.close()
        volume.assert_equal_disks()
