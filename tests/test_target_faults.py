"""P6: what the target cannot read, the mirror answers; what the target cannot write is not called equal."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lockstep.disk.plain import PlainDisk
from lockstep.disk.probe import inspect
from tests.lab import MIB, Clients, Lab, Volume, libnbd, loop_devices, needs, run, wait_until

pytestmark = needs("nbdkit", "nbdfuse", "fusermount3", "/dev/fuse", "qemu-io", root=True)

SIZE_BYTES = 8 * MIB


class Faulty:
    """A disk that fails what its switches say, once they are on."""

    def __init__(self, home: Path, content: bytes) -> None:
        home.mkdir()
        self.image, self.disk = home / "image", home / "mnt" / "disk"
        self.image.write_bytes(content)
        self.disk.parent.mkdir()
        self.reads, self.writes = home / "reads", home / "writes"
        socket = home / "socket"
        filters = [f"error-pread-file={self.reads}", f"error-pwrite-file={self.writes}"]
        rates = ["error-pread-rate=1", "error-pwrite-rate=1"]
        self._nbdkit = subprocess.Popen(
            ["nbdkit", "-f", "-U", socket, "--filter=error", "file", self.image, *filters, *rates]
        )
        wait_until(socket.exists, "nbdkit to listen")
        self._fuse = subprocess.Popen(["nbdfuse", self.disk, "--unix", socket])
        wait_until(self.disk.exists, "nbdfuse to show the disk")

    def close(self) -> None:
        subprocess.run(["fusermount3", "-u", "-z", self.disk.parent], capture_output=True, check=False)
        self._fuse.wait()
        self._nbdkit.terminate()
        self._nbdkit.wait()

    @contextmanager
    def failing(self, switch: Path) -> Iterator[None]:
        """Fail meanwhile, also what the page cache would answer."""
        with self.disk.open("rb") as disk:
            os.fsync(disk.fileno())
            os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        switch.touch()
        try:
            yield
        finally:
            switch.unlink()


@pytest.fixture
def target(lab: Lab) -> Iterator[Faulty]:
    target = Faulty(lab.home / "faulty", random.Random(2).randbytes(SIZE_BYTES))
    yield target
    target.close()


@pytest.fixture
def volume(lab: Lab, target: Faulty) -> Volume:
    disks = ["--target", target.disk, "--mirror", lab.home / "mirror", "--key-file", lab.key]
    lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
    return Volume(lab, "vol", target.disk, lab.home / "mirror", None)


def test_reads_that_the_target_fails_are_served_from_the_mirror_and_reported(
    lab: Lab, volume: Volume, target: Faulty
) -> None:
    expected = target.image.read_bytes()
    with volume.served() as served:
        with target.failing(target.reads):
            out = lab.home / "out"
            run("nbdcopy", served.uri, str(out))
            assert out.read_bytes() == expected
            run("qemu-io", "-f", "raw", "-c", "read 1001 77", served.uri)
            status = served.status()
            assert "of the target at offset" in status["target"]["error"]
            assert "of the target at offset" in " ".join(lab.lockstep("status", "vol").ok().split())
            assert "vol" not in status["target"]["error"] or str(volume.mirror) in status["target"]["error"]
        assert "Reads that the target has failed so far" in served.log.read_text()
        assert served.mirror_state() == "in-sync"


def test_without_an_equal_mirror_the_client_gets_the_error(lab: Lab, volume: Volume, target: Faulty) -> None:
    lab.lockstep("revoke", "vol", "root").ok()
    with volume.served(in_sync=False) as served:
        run("qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", served.uri)  # not given to the mirror
        with target.failing(target.reads):
            said = run("qemu-io", "-f", "raw", "-c", "read 0 4k", served.uri, check=False)
            assert "Input/output error" in said


def test_of_reads_that_come_together_each_gets_an_answer_of_its_own(lab: Lab, volume: Volume, target: Faulty) -> None:
    expected, nbd = target.image.read_bytes(), libnbd()
    with volume.served():
        pass
    lab.lockstep("revoke", "vol", "root").ok()
    with volume.served(in_sync=False) as served:
        run("qemu-io", "-f", "raw", "-c", "write -P 1 2M 64k", served.uri)  # not given to the mirror
        handle = nbd.NBD()
        handle.connect_uri(served.uri)
        with target.failing(target.reads):
            reads = []
            for at in range(MIB, 3 * MIB, MIB // 16):
                buffer = nbd.Buffer(4096)
                reads.append((at, buffer, handle.aio_pread(buffer, at)))
            while handle.aio_in_flight():
                handle.poll(-1)
            for at, buffer, cookie in reads:
                if at == 2 * MIB:
                    with pytest.raises(nbd.Error, match="Input/output error"):
                        handle.aio_command_completed(cookie)
                else:
                    assert handle.aio_command_completed(cookie)
                    assert buffer.to_bytearray() == expected[at : at + 4096]
        handle.shutdown()


def test_a_write_that_the_target_fails_is_an_error_and_leaves_its_region_different(
    volume: Volume, target: Faulty
) -> None:
    with volume.served() as served:
        with target.failing(target.writes):
            said = run("qemu-io", "-f", "raw", "-c", "write -P 9 1M 4k", served.uri, check=False)
            assert "Input/output error" in said
            mirror = served.mirror()
            assert mirror["state"] == "behind"
            assert mirror["dirty_bytes"] == 64 << 10
            assert "the target failed" in mirror["error"]
        run("qemu-io", "-f", "raw", "-c", "write -P 8 1M 4k", served.uri)
        assert served.mirror_state() == "behind", "a failing target does not overwrite the better copy by itself"
        volume.lab.lockstep("sync", "vol", "--wait").ok()
    volume.assert_equal_disks()


@pytest.mark.parametrize("options", [[], ["--direct"]], ids=["cached", "direct"])
def test_what_a_truncated_target_lacks_comes_from_the_mirror_and_is_no_zeroes(lab: Lab, options: list[str]) -> None:
    volume = lab.volume("vol", SIZE_BYTES + 4096, content=random.Random(3).randbytes(SIZE_BYTES + 4096))
    expected, allocated = volume.target.read_bytes(), list[int]()
    with volume.served(*options) as served:
        handle = libnbd().NBD()
        handle.add_meta_context("base:allocation")
        handle.connect_uri(served.uri)
        os.truncate(volume.target, 2 * MIB + 77)
        for offset, length in (
            (0, 4096),
            (2 * MIB, 4096),
            (2 * MIB + 70, 9),
            (5 * MIB + 1, 100_000),
            (SIZE_BYTES, 4096),
        ):
            assert handle.pread(length, offset) == expected[offset : offset + length], offset
        handle.block_status(SIZE_BYTES, 0, lambda _context, _offset, entries, _error: allocated.extend(entries[1::2]))
        assert not any(allocated), "it tells of holes, which clients need not read"
        error = served.now()["target"]["error"]
        assert "shorter than it was" in error or "was cut short" in error, "it sees that itself as well"
        assert served.mirror_state() == "in-sync"
        os.truncate(volume.mirror, volume.mirror.stat().st_size // 2)  # within the data
        with pytest.raises(libnbd().Error, match="Input/output error"):
            handle.pread(4096, 7 * MIB)
        assert served.mirror_state() != "in-sync"
        handle.shutdown()


@pytest.mark.parametrize("options", [[], ["--direct"]], ids=["cached", "direct"])
def test_a_truncated_target_is_spoken_of_and_does_not_grow_over_what_was_lost(lab: Lab, options: list[str]) -> None:
    volume = lab.volume("vol", SIZE_BYTES, content=random.Random(4).randbytes(SIZE_BYTES))
    expected, end = bytearray(volume.target.read_bytes()), 2 * MIB
    with volume.served(*options) as served:
        handle = libnbd().NBD()
        handle.connect_uri(served.uri)
        handle.pwrite(b"w" * 4096, 7 * MIB)  # what comes next there is recorded already, and could be written at once
        expected[7 * MIB : 7 * MIB + 4096] = b"w" * 4096
        os.truncate(volume.target, end)
        wait_until(lambda: "was cut short" in (served.now()["target"]["error"] or ""), "the server to see it")
        assert "was cut short" in " ".join(lab.lockstep("status", "vol").ok().split())
        assert handle.pread(4096, 6 * MIB) == expected[6 * MIB : 6 * MIB + 4096]
        assert served.mirror_state() == "in-sync"
        for offset in (7 * MIB, SIZE_BYTES - 4096, end - 2048):
            assert error_of(handle.pwrite, b"n" * 4096, offset) == "EIO"
        for flags in (0, libnbd().CMD_FLAG_NO_HOLE):
            assert error_of(handle.zero, 4096, 5 * MIB, flags) == "EIO"
        assert volume.target.stat().st_size == end
        mirror = served.mirror()
        assert mirror["state"] == "behind"
        assert "it is shorter than it was" in mirror["error"]
        handle.pwrite(b"i" * 4096, MIB)  # within
        expected[MIB : MIB + 4096] = b"i" * 4096
        handle.flush()
        assert handle.pread(4096, 6 * MIB) == expected[6 * MIB : 6 * MIB + 4096], "of the rest the mirror knows"
        handle.shutdown()
    assert volume.target.read_bytes() == expected[:end]
    lab.lockstep("serve", "vol", "--key-file", lab.key).failed(1, "The file was truncated")
    output = lab.home / "output"
    volume.restore(output, "--incomplete").ok()
    assert output.read_bytes()[6 * MIB : 7 * MIB] == expected[6 * MIB : 7 * MIB]


def test_a_truncated_mirror_is_not_called_in_sync(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    with volume.served() as served:
        whole = volume.mirror.stat().st_size
        os.truncate(volume.mirror, whole - MIB)
        wait_until(lambda: served.mirror_state() == "degraded", "the server to see it")
        assert "it is shorter than it was" in served.mirror()["error"]


def error_of(request: Callable[..., object], *arguments: object) -> object:
    try:
        request(*arguments)
    except libnbd().Error as error:
        return error.errno
    return None


@pytest.fixture
def cached(lab: Lab, target: Faulty, loop: Callable[..., str]) -> Volume:
    """A volume whose target takes everything, and fails when it is to be written out."""
    device = loop(target.disk)
    disks = ["--target", device, "--mirror", lab.home / "mirror", "--key-file", lab.key]
    lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
    return Volume(lab, "vol", target.image, lab.home / "mirror", None)


def lose_a_write(loser: Any, target: Faulty, request: Callable[..., object], *arguments: object) -> object:
    """Have the target lose what `loser` wrote and was answered; return the error of the request that comes upon it."""
    loser.pwrite(b"o" * 4096, MIB)
    loser.flush()
    with target.failing(target.writes):
        loser.pwrite(b"n" * 4096, MIB)
        return error_of(request, *arguments)


def test_a_flush_that_failed_for_one_succeeds_for_nobody_until_somebody_has_looked(
    lab: Lab, cached: Volume, target: Faulty
) -> None:
    with cached.served() as served:
        clients = Clients(served.uri, 2)
        one, other = clients.handles
        assert lose_a_write(other, target, one.flush) == "EIO"
        assert error_of(other.flush) == "EIO", "it was told that its write is durable, which is lost"
        assert error_of(one.pwrite, b"f" * 4096, 2 * MIB, clients.nbd.CMD_FLAG_FUA) == "EIO"
        assert served.mirror_state() == "behind"
        assert "every flush fails from here on" in served.log.read_text()
        assert "every flush fails from here on" in served.status()["target"]["error"]
        assert "every flush fails from here on" in " ".join(lab.lockstep("status", "vol").ok().split())
        lab.lockstep("sync", "vol", "--wait").ok()
        assert served.status()["target"]["error"] is None
        other.pwrite(b"n" * 4096, MIB)
        other.flush()
        clients.close()
    cached.assert_equal_disks()


def test_a_durable_write_that_fails_may_tell_of_the_writes_of_others(lab: Lab, cached: Volume, target: Faulty) -> None:
    with cached.served() as served:
        clients = Clients(served.uri, 2)
        one, other = clients.handles
        assert lose_a_write(other, target, one.pwrite, b"f" * 4096, 3 * MIB, clients.nbd.CMD_FLAG_FUA) == "EIO"
        assert error_of(other.flush) == "EIO"
        device = next(device for device, shown in loop_devices().items() if shown == str(target.disk))
        run("blockdev", "--flushbufs", device)
        lab.lockstep("sync", "vol", "--wait").ok()
        lab.lockstep("verify", "vol").ok()
        clients.close()
    cached.assert_equal_disks()


def test_a_durable_write_that_the_disk_has_no_room_for_is_nobody_elses_loss(lab: Lab) -> None:
    room = lab.home / "room"
    room.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(room))
    try:
        volume = Volume(lab, "vol", room / "target", lab.home / "mirror", None)
        volume.target.touch()
        os.truncate(volume.target, SIZE_BYTES)
        disks = ["--target", volume.target, "--mirror", volume.mirror, "--key-file", lab.key]
        lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
        with volume.served() as served:
            nbd = libnbd()
            handle = nbd.NBD()
            handle.connect_uri(served.uri)
            with pytest.raises(nbd.Error, match="No space left"):
                handle.pwrite(b"x" * (4 << 20), 0, nbd.CMD_FLAG_FUA)
            handle.flush()
            handle.shutdown()
    finally:
        run("umount", str(room))


def test_a_target_that_was_cut_short_and_made_long_again_is_not_called_whole(tmp_path: Path) -> None:
    path = tmp_path / "target"
    path.write_bytes(b"t" * MIB)
    with closing(PlainDisk.claim(inspect(str(path)))) as target:
        assert not target.cut_short()
        os.truncate(path, MIB // 2)
        assert target.cut_short()
        target.keep_short()
        os.truncate(path, MIB)
        assert target.cut_short()
