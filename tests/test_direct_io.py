"""`serve --direct`: the same promises past the page cache, on block devices, and what it refuses."""

import contextlib
import os
import random
import re
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep.disk import direct
from lockstep.disk.direct import DirectFile, copy_from
from lockstep.disk.runs import WORDS
from lockstep.errors import DirectImpossible
from tests.lab import MIB, Clients, Lab, Served, Storage, Volume, needs, run, wait_until
from tests.test_service_refusals import assert_error, everything_below

SIZE_BYTES = 8 * MIB
HEADER_BYTES = 16 * MIB
ROUNDS = 60

needs_devices = needs("losetup", "/dev/loop-control", root=True)
needs_slow_disk = needs("nbdkit", "nbdfuse", "fusermount3", "/dev/fuse", root=True)


def volume_of(lab: Lab, target: str | Path, mirror: str | Path, *options: object) -> Volume:
    disks = ["--target", target, "--mirror", mirror, "--key-file", lab.key]
    lab.lockstep("create", "vol", *disks, *options, environment=lab.quick_format()).ok()
    return Volume(lab, "vol", Path(target), Path(mirror), None)


def opened_direct(served: Served) -> set[str]:
    """The files that the server has open for direct I/O."""
    found, process = set(), Path(f"/proc/{served.process.pid}")
    for fd in os.listdir(process / "fd"):
        with contextlib.suppress(FileNotFoundError):  # it is closed meanwhile
            flags = re.search(r"flags:\s+(\d+)", (process / "fdinfo" / fd).read_text())
            if flags and int(flags[1], 8) & os.O_DIRECT:
                found.add(os.readlink(process / "fd" / fd))
    return found


@needs_devices
@pytest.mark.parametrize(("sector_bytes", "block_bytes"), [(512, 512), (4096, 512), (4096, 4096)])
def test_whatever_is_written_both_devices_are_equal(
    lab: Lab, loop: Callable[..., str], sector_bytes: int, block_bytes: int
) -> None:
    """Of any alignment, and overlapping while under way: what lands last is the server's choice, but on both alike."""
    options = (f"--sector-size={block_bytes}", "--direct-io=off")
    target, mirror = (
        loop(lab.disk(name, SIZE_BYTES + extra), *options) for name, extra in (("target", 0), ("mirror", HEADER_BYTES))
    )
    volume = volume_of(lab, target, mirror, "--sector-size", sector_bytes)
    chance, model = random.Random(), bytearray(SIZE_BYTES)
    with volume.served("--direct") as served:
        assert opened_direct(served) == {target, mirror}
        assert served.status()["target"]["direct"]
        assert f"{target} (direct I/O)" in lab.lockstep("status").ok()
        clients = Clients(served.uri, 3)
        for number in range(ROUNDS):
            overlapping = number % 2
            for who in range(3):
                for _ in range(chance.choice([1, 8, 40])):
                    length = chance.choice([512, 4096, 4096, 8192, 1, 700, 70_000, 300_000])
                    at = chance.randrange(SIZE_BYTES - length)
                    if chance.random() < 0.7:
                        at, length = at // 4096 * 4096, max(1, length // 4096) * 4096
                    flags = chance.choice([0, 0, 0, clients.nbd.CMD_FLAG_FUA])
                    if chance.random() < 0.1:
                        clients.zero(who, at, length, flags)
                        model[at : at + length] = bytes(length)
                    else:
                        data = chance.randbytes(length)
                        clients.write(who, at, data, flags)
                        model[at : at + length] = data
                    if not overlapping:
                        clients.finish()
            clients.finish()
            if overlapping:
                model[:] = clients.handles[0].pread(SIZE_BYTES, 0)
        at = chance.randrange(SIZE_BYTES - 100_000)
        assert clients.handles[0].pread(99_999, at) == model[at : at + 99_999]
        clients.close()
    behind = Volume(lab, "vol", lab.home / "target", lab.home / "mirror", None)
    assert behind.target.read_bytes() == model
    behind.assert_equal_disks()


def test_writes_of_a_run_that_overlap_land_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are under way together may land in any order: here it is the reverse one."""

    def write_together(fd: int, flags: int, data: memoryview, run: "array[int]", count: int) -> int:
        for at in reversed(range(count)):
            offset, length, position = run[WORDS * at : WORDS * at + 3]
            os.pwritev(fd, [data[position : position + length]], offset, flags)
        together.append(count)
        return count

    monkeypatch.setattr(direct, "write_together", write_together)
    chance, model, together = random.Random(), bytearray(64 << 10), list[int]()
    with tempfile.TemporaryFile() as file:
        file.write(model)
        file.flush()
        disk = DirectFile(file.fileno(), 512)
        for _ in range(200):
            run, data = array("Q"), memoryview(chance.randbytes(40 * 4096))
            for number in range(40):
                length = 512 * chance.randrange(1, 9)
                offset = 512 * chance.randrange((len(model) - length) // 512 + 1)
                run.extend((offset, length, number * 4096, 0))
                model[offset : offset + length] = data[number * 4096 : number * 4096 + length]
            assert disk.write_run(run, 40, copy_from(data)) == 40
        assert os.pread(file.fileno(), len(model), 0) == model
    assert max(together) > 1


@needs_slow_disk
def test_writes_that_arrive_together_are_under_way_together(lab: Lab) -> None:
    delay_ms = 40
    storage = Storage(lab.home / "slow", MIB + HEADER_BYTES, write_delay_ms=delay_ms)
    try:
        volume = volume_of(lab, lab.disk("target", MIB), storage.path, "--sector-size", 4096)
        with volume.served() as served:  # so that what is timed below waits for no copy
            served.stop()
        with volume.served("--direct") as served:
            clients = Clients(served.uri, 1)
            clients.write(0, 0, bytes(4096))  # marks its regions
            clients.finish()
            begun_s = time.monotonic()
            for number in range(32):
                clients.write(0, number * 4096, bytes([number]) * 4096)
            clients.finish()
            took_s = time.monotonic() - begun_s
            clients.close()
        assert took_s < 32 * delay_ms / 1000 / 2, "one after the other they take twice as long"
        volume.assert_equal_disks()
    finally:
        storage.close()


@needs_devices
def test_what_direct_io_cannot_do_is_refused_and_nothing_is_changed(lab: Lab, loop: Callable[..., str]) -> None:
    odd = lab.volume("odd", SIZE_BYTES + 100)
    with odd.served():
        pass
    before = everything_below(lab.home)
    refused = lab.lockstep("serve", "odd", "--key-file", lab.key, "--direct").failed(1)
    assert f"cannot be used with direct I/O: its size is {SIZE_BYTES + 100} bytes" in refused
    assert "without --direct" in refused
    assert everything_below(lab.home) == before
    mirror = loop(lab.disk("mirror", SIZE_BYTES + HEADER_BYTES), "--sector-size=4096")
    volume = volume_of(lab, lab.disk("target", SIZE_BYTES), mirror, "--sector-size", 512)
    reason = "its sector is 512 bytes, which is no multiple of its blocks of 4096"
    refusal = DirectImpossible(path=mirror, reason=reason)
    assert_error(lab.lockstep("serve", "vol", "--key-file", lab.key, "--direct"), refusal)
    with volume.served() as served:
        run("qemu-io", "-f", "raw", "-c", "write -P 5 3M 100000", served.uri)
    Volume(lab, "vol", volume.target, lab.home / "mirror", None).assert_equal_disks()
    assert odd.target.stat().st_size == SIZE_BYTES + 100


@needs_devices
def test_a_full_mirror_is_dropped_and_a_restart_copies_what_it_missed(lab: Lab, tmp_path: Path) -> None:
    point = tmp_path / "small"
    point.mkdir()
    image = lab.disk("image", 48 * MIB)
    run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", str(image))
    run("mount", "-o", "loop", str(image), str(point))
    try:
        size_bytes = 24 * MIB
        volume = volume_of(lab, lab.disk("target", size_bytes), point / "mirror")
        filler = point / "filler"
        with volume.served("--direct", in_sync=False) as served:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(MIB)):
                    pass
            run("qemu-io", "-f", "raw", "-c", f"write -P 3 0 {size_bytes}", "-c", "flush", served.uri)
            wait_until(lambda: served.mirror_state() in ("degraded", "in-sync"), "the mirror to be full or in sync")
        filler.unlink()
        with volume.served("--direct"):
            pass
        assert volume.target.read_bytes() == b"\3" * size_bytes
        volume.assert_equal_disks()
    finally:
        run("umount", "-l", str(point))
