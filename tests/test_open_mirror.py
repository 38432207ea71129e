"""`lockstep open`: a mirror in use without its target, also for writing; `lockstep commit` makes a disk of the two."""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from array import array
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lockstep.crypto import luks
from lockstep.service.opening import OpenedExport
from lockstep.volume.workers import Workers
from tests.forks import ForkLab
from tests.lab import (
    MIB,
    PASSPHRASE,
    PATIENCE_S,
    Clients,
    Lab,
    OpenMirror,
    Result,
    Storage,
    Volume,
    libnbd,
    needs,
    opened,
    run,
    wait_until,
)
from tests.test_mirror_set import add

SIZE_BYTES = 8 * MIB + 700  # no multiple of anything
CONTENT = random.Random(4).randbytes(3 * MIB)

needs_devices = needs("nbdfuse", "fusermount3", "losetup", "mount", "mkfs.ext4", "/dev/fuse", root=True)


class Made:
    """Mirrors in sync, made once: every test works on copies, without a registry."""

    def __init__(self, home: Path) -> None:
        self.lab = ForkLab(home)
        inline = self.lab.volume("vol", SIZE_BYTES, content=CONTENT)
        detached = self.lab.volume("detached", SIZE_BYTES, "--sector-size", 4096, content=CONTENT, header=True)
        files = self.lab.disk("files", 8 * MIB)
        run("mkfs.ext4", "-q", "-F", str(files))
        ext4 = self.lab.volume("ext4", 8 * MIB, content=files.read_bytes())
        self.volumes = {"inline": inline, "detached": detached, "ext4": ext4}
        for volume in self.volumes.values():
            volume.copy_by_hand()

    def copy(self, lab: Lab, name: str) -> Volume:
        """A mirror as it is, elsewhere."""
        made = self.volumes[name]
        assert made.mirror.exists()
        for path in filter(None, (made.target, made.mirror, made.header)):
            shutil.copyfile(path, lab.home / path.name)
        header = made.header and lab.home / made.header.name
        return Volume(lab, made.name, lab.home / made.target.name, lab.home / made.mirror.name, header)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_all(uri: str) -> bytes:
    handle: Any = libnbd().NBD()
    handle.connect_uri(uri)
    size_bytes = handle.get_size()
    data = b"".join(bytes(handle.pread(min(MIB, size_bytes - at), at)) for at in range(0, size_bytes, MIB))
    handle.shutdown()
    return data


# --- read-only ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["inline", "detached"])
def test_it_serves_the_target_without_the_target_and_without_a_registry(made: Made, lab: Lab, which: str) -> None:
    volume = made.copy(lab, which)
    expected = volume.target.read_bytes()
    volume.target.unlink()
    before = digest(volume.mirror)
    with opened(volume) as (_, uri), opened(volume) as (_, second):
        assert re.fullmatch(r"nbd\+unix:///\w+\?socket=.+/(vol|detached)-1/\1\.sock", uri)
        assert uri != second
        assert read_all(uri) == read_all(second) == expected
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, second)
        handle = libnbd().NBD()
        handle.connect_uri(uri)
        assert handle.is_read_only()
        handle.set_strict_mode(0)
        for offset, length in ((0, 1), (1, 511), (511, 2), (4095, 4098), (SIZE_BYTES - 1, 1), (100, 300_000)):
            assert handle.pread(length, offset) == expected[offset : offset + length]
        for change, arguments in ((handle.pwrite, (b"x" * 512, 0)), (handle.zero, (512, 0)), (handle.trim, (512, 0))):
            with pytest.raises(libnbd().Error, match="Operation not permitted"):
                change(*arguments)
        handle.flush()
        handle.shutdown()
    assert digest(volume.mirror) == before
    assert not lab.state.exists()
    assert not list((lab.home / "lockstep-open").iterdir())


class HalfBroken:
    """Fails to read its first sector at once, and the second one when it is told to."""

    sector_bytes = 512

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def read(self, offset: int, into: memoryview) -> None:
        if offset:
            self.begun.set()
            self.go.wait(PATIENCE_S)
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_reads_that_came_together_are_over_together_though_one_fails_earlier() -> None:
    """They are tried again one by one, in the same memory: what is still read there would be decrypted twice."""
    disk = HalfBroken()
    view: Any = SimpleNamespace(name="vol", size_bytes=1024, overlay=None, disk=disk)

    async def main() -> None:
        with contextlib.closing(Workers("reader", 2)) as workers:
            run = array("Q", (0, 512, 0, 0, 512, 512, 512, 0))
            export = OpenedExport(view, workers)
            reading = asyncio.ensure_future(export.read(memoryview(bytearray(1024)), run, 2))
            while not disk.begun.is_set():
                await asyncio.sleep(0.001)
            for _ in range(20):
                await workers.run(int)  # after the one that fails at once, by the same thread
            assert not reading.done()
            disk.go.set()
            with pytest.raises(OSError, match=r"Input/output error"):
                await reading

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


@needs("nbdkit", "nbdfuse", "fusermount3", "/dev/fuse", root=True)
def test_a_mirror_that_hangs_does_not_keep_it_from_ending(made: Made, lab: Lab) -> None:
    volume = made.copy(lab, "inline")
    storage = Storage(lab.home / "storage", volume.mirror.stat().st_size)
    try:
        shutil.copyfile(volume.mirror, storage.image)
        volume.mirror = storage.path
        with opened(volume) as (process, uri), storage.stopped():
            client = Clients(uri, 1)
            client.handles[0].aio_pread(client.nbd.Buffer(4096), 4 * MIB)
            threads = Path(f"/proc/{process.process.pid}/task")
            waiting = re.compile("folio|request_wait|fuse")  # for a page of the file, or for FUSE's answer
            wait_until(
                lambda: any(waiting.search(each.read_text()) for each in threads.glob("*/wchan")), "the read to hang"
            )
            process.stop()
            assert not Path(uri.partition("?socket=")[2]).exists()
            assert "did not answer" in process.log.read_text()
    finally:
        storage.close()


def test_a_closed_terminal_ends_it_in_order(made: Made, lab: Lab) -> None:
    with opened(made.copy(lab, "inline")) as (process, uri):
        process.stop(signal.SIGHUP)
        assert not Path(uri.partition("?socket=")[2]).exists()


def test_a_huge_mirror_is_open_within_a_second(lab: Lab) -> None:
    """1 TiB, sparse. What python takes to start, and the key derivation, are beside the point: the best of three."""
    size_bytes = 1 << 40
    mirror = lab.disk("mirror", size_bytes + luks.INLINE_DATA_OFFSET_BYTES)
    volume = Volume(lab, "huge", lab.home / "none", mirror, None)
    options = ["--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", f"--offset={16 * MIB // 512}", "--sector-size=512"]
    run("cryptsetup", "luksFormat", "-q", "-c", luks.CIPHER, "-s", "512", *options, str(mirror), "-d", str(lab.key))
    luks.write_token(str(mirror), luks.Token(str(uuid.uuid4()), "huge", size_bytes, 1, "in-sync"), token_id=None)
    took_s = []
    for number in range(3):
        began_s = time.monotonic()
        with opened(volume, "--writable", "--overlay", lab.home / f"overlay{number}") as (process, uri):
            took_s.append(time.monotonic() - began_s)
            assert process.line("overlay") == str(lab.home / f"overlay{number}")
            run("qemu-io", "-f", "raw", "-c", f"write -P 7 {size_bytes - MIB} 64k", "-c", "flush", uri)
    print(f"from the command to ready, 1 TiB with an overlay: {', '.join(f'{each:.2f}' for each in took_s)} s")
    assert min(took_s) < 2.0  # this machine is shared


def test_opening_and_serving_keep_out_of_each_others_way(lab: Lab) -> None:
    """One writer or many readers; an overlay fits the mirror until it is served again; the audit trail tells."""
    volume = lab.volume("vol", MIB, content=CONTENT[:MIB])
    lab.lockstep("open", volume.mirror, "--key-file", lab.key).failed(1, "state syncing", "--incomplete")
    with volume.served():
        lab.lockstep("open", volume.mirror, "--key-file", lab.key).failed(1, "vol.mirror is locked by")
    overlay = lab.home / "overlay"
    with opened(volume, "--writable", "--overlay", overlay):
        lab.lockstep("serve", "vol", "--key-file", lab.key).failed(1, "vol.mirror is locked by")
        wait_until(lambda: "opened the mirror" in lab.lockstep("audit", "vol", "--json").ok(), "the row")
    row = json.loads(lab.lockstep("audit", "vol", "--json").ok().splitlines()[-1])
    assert (row["event"], row["details"]) == ("open", {"mirror": str(volume.mirror), "overlay": str(overlay)})
    with volume.served():
        pass
    for command in (
        ("open", volume.mirror, "--writable", "--overlay", overlay),
        ("commit", volume.mirror, overlay, "x"),
    ):
        lab.lockstep(*command, "--key-file", lab.key).failed(1, "does not fit this mirror", "written or re-keyed since")


def test_what_cannot_be_opened_leaves_nothing_behind(made: Made, lab: Lab) -> None:
    volume = made.copy(lab, "inline")
    overlay, wrong = lab.home / "overlay", lab.home / "wrong"
    wrong.write_bytes(b"wrong")
    lab.lockstep("open", volume.mirror, "--key-file", wrong, "--writable", "--overlay", overlay).failed(1, "passphrase")
    assert not overlay.exists()
    lab.lockstep("open", volume.mirror, "--key-file", lab.key, "--overlay", overlay).failed(2, "--writable")
    lab.lockstep("open", volume.mirror, "--key-file", lab.key, "--writable", "--overlay", lab.key).failed(
        1, "cannot be the overlay"
    )
    lab.lockstep("open", volume.mirror, "--key-file", lab.key, "--writable", "--overlay", volume.mirror).failed(1)
    lab.lockstep("open", volume.mirror, "--key-file", lab.key, "--socket", lab.key).failed(1, "not a socket")
    assert lab.key.read_bytes() == PASSPHRASE
    os.truncate(volume.mirror, 20 * MIB)
    lab.lockstep("open", volume.mirror, "--key-file", lab.key, "--writable", "--overlay", overlay).failed(
        1, "truncated"
    )
    assert not overlay.exists()


# --- with an overlay ----------------------------------------------------------------------------------------


def test_writes_land_in_the_overlay_alone_and_outlive_a_kill(made: Made, lab: Lab) -> None:
    volume = made.copy(lab, "inline")
    overlay, mirror = lab.home / "overlay", digest(volume.mirror)
    expected = bytearray(volume.target.read_bytes())
    chance = random.Random(5)
    for number in range(2):
        process = OpenMirror(volume, "--writable", "--overlay", overlay)
        uri = process.line("ready")
        assert read_all(uri) == expected
        clients = Clients(uri, 2)
        for request in range(60):
            offset = chance.randrange(SIZE_BYTES)
            length = min(chance.choice([1, 512, 3000, 4096, 100_000]), SIZE_BYTES - offset)
            fill = bytes([request + 1]) * length
            kind = chance.random()
            if kind < 0.8:
                clients.write(0, offset, fill)
            else:
                fill = bytes(length)
                clients.zero(0, offset, length)
            expected[offset : offset + length] = fill
            clients.finish()
        clients.flush(number % 2)  # of either connection
        clients.finish()
        process.kill()  # -9
    with opened(volume, "--writable", "--overlay", overlay) as (_, uri):
        assert read_all(uri) == expected
    assert digest(volume.mirror) == mirror
    with opened(volume) as (_, uri):
        assert read_all(uri) == volume.target.read_bytes()


@needs("fio")
def test_fio_reads_back_what_it_wrote(made: Made, lab: Lab) -> None:
    volume = made.copy(lab, "inline")
    with opened(volume, "--writable", "--overlay", lab.home / "overlay") as (_, uri):
        shape = [
            "--rw=randwrite",
            "--bsrange=512-64k",
            "--bs_unaligned=1",
            "--iodepth=16",
            "--size=8m",
            "--io_size=24m",
        ]
        run(
            "fio",
            "--name=job",
            "--ioengine=nbd",
            f"--uri={uri}",
            *shape,
            "--verify=crc32c",
            "--verify_state_save=0",
            "--thread",
        )


def test_what_was_given_up_is_known_to_be_zeroes(made: Made, lab: Lab) -> None:
    volume = made.copy(lab, "inline")
    with opened(volume, "--writable", "--overlay", lab.home / "overlay") as (_, uri):
        run("qemu-io", "-f", "raw", "-c", "discard 1M 1M", "-c", "write -z -u 3M 64k", uri)
        mapped = json.loads(run("nbdinfo", "--map", "--json", uri))
        assert [(row["offset"], row["length"]) for row in mapped if row["type"] == 3] == [
            (MIB, MIB),
            (3 * MIB, 64 << 10),
        ]
        seen = read_all(uri)
        assert not any(seen[MIB : 2 * MIB])
        assert seen[:MIB] == CONTENT[:MIB]


def test_without_a_name_the_overlay_is_where_one_is(made: Made, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = made.copy(lab, "inline")
    monkeypatch.chdir(lab.home)
    with opened(volume, "--writable") as (process, _):
        assert process.line("overlay") == str(lab.home / "vol.overlay")
    assert (lab.home / "vol.overlay").stat().st_mode & 0o777 == 0o600


def test_a_commit_that_is_killed_leaves_nothing_that_looks_whole(made: Made, lab: Lab) -> None:
    """It is held there by a pipe for its progress that nobody empties."""
    volume, overlay, output = made.copy(lab, "inline"), lab.home / "overlay", lab.home / "output"
    with opened(volume, "--writable", "--overlay", overlay):
        pass
    command = ["commit", volume.mirror, overlay, output, "--key-file", lab.key]
    read_end, write_end = os.pipe()
    os.write(write_end, b"\n" * (fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096) - 250))
    program = [sys.executable, "-m", "lockstep", *map(str, command), "--json"]
    with subprocess.Popen(program, stdout=write_end) as process:
        os.close(write_end)
        wait_until(lambda: "pipe" in Path(f"/proc/{process.pid}/wchan").read_text(), "the pipe to be full")
        process.kill()
    os.close(read_end)
    unfinished = lab.home / "output.committing"
    assert (unfinished.exists(), output.exists()) == (True, False)
    lab.lockstep(*command).failed(1, str(unfinished), "a commit that was killed", "--force")
    lab.lockstep(*command, "--force").ok()
    assert (unfinished.exists(), output.exists()) == (False, True)
    assert output.read_bytes() == volume.target.read_bytes()


@needs("prlimit")
@pytest.mark.parametrize("by_link", [False, True])
def test_a_file_that_a_failed_commit_was_overwriting_does_not_look_whole(made: Made, lab: Lab, by_link: bool) -> None:
    """It may be the target's own name: half of it would be copied to the mirror by the next start."""
    volume, overlay = made.copy(lab, "inline"), lab.home / "overlay"
    with opened(volume, "--writable", "--overlay", overlay):
        pass
    output = lab.disk("output", SIZE_BYTES, b"\xee" * SIZE_BYTES)
    link = lab.home / "link"
    link.symlink_to(output)
    command = ["commit", volume.mirror, overlay, link if by_link else output, "--key-file", lab.key]
    lab.lockstep(*command).failed(1, "the file exists already")
    limited = ["prlimit", f"--fsize={SIZE_BYTES - MIB}", sys.executable, "-m", "lockstep", *command, "--force"]
    Result(subprocess.run([*map(str, limited)], capture_output=True, check=False)).failed(1, "File too large")
    assert not output.exists()
    lab.lockstep(*command).failed(1, f"{output}.committing", "a commit that was killed")
    lab.lockstep(*command, "--force").ok()
    assert output.read_bytes() == volume.target.read_bytes()
    lab.lockstep(*command, "--force").ok()
    assert not Path(f"{output}.committing").exists()
    assert link.is_symlink()


def test_an_overlay_is_committed_before_a_header_is_put_back(made: Made, lab: Lab) -> None:
    """With the backup as the header; afterwards the error does not say that the mirror was written, for it was not."""
    volume = made.copy(lab, "inline")
    overlay, backup = lab.home / "overlay", lab.home / "backup"
    run("cryptsetup", "luksHeaderBackup", str(volume.mirror), "--header-backup-file", str(backup))
    with opened(volume, "--writable", "--overlay", overlay) as (_, uri):
        run("qemu-io", "-f", "raw", "-c", "write -P 9 0 5000", uri)
    with volume.mirror.open("r+b") as file:
        file.write(bytes(MIB))
    commit = ("commit", volume.mirror, overlay, "--key-file", lab.key)
    lab.lockstep(*commit, lab.home / "output", "--header", backup).ok()
    assert (lab.home / "output").read_bytes() == b"\x09" * 5000 + volume.target.read_bytes()[5000:]
    header = luks.read_header(str(backup))
    assert header.token is not None
    run("cryptsetup", "luksHeaderRestore", str(volume.mirror), "--batch-mode", "--header-backup-file", str(backup))
    renewed = replace(header.token, generation=header.token.generation + 1)  # as `lockstep header restore` does
    luks.write_token(str(volume.mirror), renewed, token_id=header.token_id)
    for options in ((), ("--header", backup)):
        refused = lab.lockstep(*commit, lab.home / "another", *options)
        refused.failed(1, "does not fit this mirror", "or its header was put back")
    assert not (lab.home / "another").exists()


def test_an_overlay_does_not_fit_a_mirror_that_its_server_has_taken_back(tmp_path: Path) -> None:
    """What the server wrote since is under it: the two would be of different moments."""
    lab = ForkLab(tmp_path)
    volume, overlay = lab.volume("vol", SIZE_BYTES, content=CONTENT), tmp_path / "overlay"
    away = Volume(lab, "vol", volume.target, tmp_path / "away", None)
    with volume.served() as served:
        volume.mirror.rename(away.mirror)
        wait_until(lambda: "cannot be followed again yet" in served.log.read_text(), "the mirror to be let go")
        with opened(away, "--writable", "--overlay", overlay) as (_, uri):
            run("qemu-io", "-f", "raw", "-c", "write -P 9 0 5000", uri)
        away.mirror.rename(volume.mirror)
        lab.lockstep("sync", "vol", "--wait").ok()
        run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", served.uri)
        served.kill()
    commit = lab.lockstep("commit", volume.mirror, overlay, tmp_path / "output", "--key-file", lab.key)
    commit.failed(1, "does not fit this mirror", "the mirror was written")


def test_no_target_is_replaced_while_somebody_writes_over_one_of_the_mirrors(tmp_path: Path) -> None:
    """Also if another one fills it: this one would get another generation, which the overlay does not fit."""
    lab = ForkLab(tmp_path)
    volume, second = lab.volume("vol", SIZE_BYTES, content=CONTENT), tmp_path / "second"
    volume.copy_by_hand()
    add(volume, second).ok()
    shutil.move(volume.target, tmp_path / "target")
    two, overlay, new = Volume(lab, "vol", volume.target, second, None), tmp_path / "overlay", tmp_path / "new"
    replace_target = ("replace-target", "vol", new, "--mirror", volume.mirror, "--key-file", lab.key)
    with opened(two, "--writable", "--overlay", overlay, "--incomplete"):
        lab.lockstep(*replace_target).failed(1, f"{second} is locked by")
        assert not new.exists()
    lab.lockstep("commit", second, overlay, tmp_path / "out", "--key-file", lab.key, "--incomplete").ok()
    lab.lockstep(*replace_target).ok()


# --- commit -------------------------------------------------------------------------------------------------


def test_commit_makes_the_new_target(made: Made, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = made.copy(lab, "inline")
    overlay, output = lab.home / "overlay", lab.home / "new"
    expected = bytearray(volume.target.read_bytes())
    monkeypatch.chdir(lab.home)
    commit = ("commit", volume.mirror, overlay, output.name, "--key-file", lab.key)
    with opened(volume, "--writable", "--overlay", overlay) as (_, uri):
        run("qemu-io", "-f", "raw", "-c", "write -P 9 4097 5000", "-c", "discard 1M 1M", uri)
        lab.lockstep(*commit).failed(1, "overlay is locked by")
        assert not output.exists()
    expected[4097:9097] = b"\x09" * 5000
    expected[MIB : 2 * MIB] = bytes(MIB)
    before = digest(volume.mirror), digest(overlay)
    said = [json.loads(line) for line in lab.lockstep(*commit, "--json").ok().splitlines()]
    assert said[-1] == {"committed_bytes": SIZE_BYTES, "volume": "vol", "output": "new"}
    assert output.read_bytes() == expected
    assert output.stat().st_blocks * 512 < SIZE_BYTES // 2, "the zeroes take space"
    assert (digest(volume.mirror), digest(overlay)) == before
    lab.lockstep(*commit).failed(1, "is not empty")
    lab.lockstep(*commit, "--force").ok()
    for same in (volume.mirror, overlay):
        lab.lockstep("commit", volume.mirror, overlay, same, "--force", "--key-file", lab.key).failed(
            1, "it is the storage of"
        )
    missing = lab.lockstep("commit", volume.mirror, lab.home / "none", lab.home / "x", "--key-file", lab.key)
    missing.failed(1, "no overlay")
    assert output.read_bytes() == expected


@pytest.mark.parametrize("there", [True, False], ids=["overwritten", "made"])
def test_the_mirror_is_not_called_equal_to_a_target_that_was_committed(lab: Lab, there: bool) -> None:
    """Nor does a file say when it was written, after a crash: what was written over the mirror was nowhere else."""
    volume, overlay = lab.volume("vol", SIZE_BYTES, content=CONTENT), lab.home / "overlay"
    with volume.served() as served:
        served.kill()
    with opened(volume, "--writable", "--overlay", overlay) as (_, uri):
        run("qemu-io", "-f", "raw", "-c", f"write -P 7 {SIZE_BYTES // 2 + 4096} 4k", "-c", "flush", uri)
    if not there:
        volume.target.unlink()
    lab.lockstep("commit", volume.mirror, overlay, volume.target, "--force", "--key-file", lab.key).ok()
    committed = volume.target.read_bytes()
    with volume.served():
        pass
    assert volume.target.read_bytes() == committed
    volume.assert_equal_disks()


# --- as a block device --------------------------------------------------------------------------------------


def assert_nothing_is_left(lab: Lab) -> None:
    """Neither a loop device nor a mount point of this lab's."""
    assert str(lab.home) not in run("losetup", "--list", "--noheadings", "--output", "BACK-FILE")
    assert str(lab.home) not in Path("/proc/self/mountinfo").read_text()


@needs_devices
def test_attached_read_only_it_is_a_read_only_device(made: Made, lab: Lab) -> None:
    volume = made.copy(lab, "ext4")
    mount = lab.home / "mnt"
    mount.mkdir()
    with opened(volume, "--attach") as (process, _):
        device = process.line("device")
        assert run("blockdev", "--getro", device) == "1\n"
        run("mount", "-o", "ro", device, str(mount))
        try:
            assert (mount / "lost+found").is_dir()
        finally:
            run("umount", str(mount))
    assert_nothing_is_left(lab)


@needs_devices
def test_a_device_that_is_mounted_is_not_pulled_away(made: Made, lab: Lab) -> None:
    volume = made.copy(lab, "ext4")
    mount = lab.home / "mnt"
    mount.mkdir()
    with opened(volume, "--writable", "--overlay", lab.home / "overlay", "--attach") as (process, _):
        process.line("overlay")
        run("mount", process.line("device"), str(mount))
        try:
            (mount / "file").write_bytes(b"unsynced")
            process.process.terminate()
            wait_until(lambda: f"in use: mounted at {mount}" in process.log.read_text(), "the refusal")
            assert (mount / "file").read_bytes() == b"unsynced"
        finally:
            run("umount", str(mount))
    with opened(volume, "--writable", "--overlay", lab.home / "overlay") as (_, uri):
        copy = lab.home / "copy"
        copy.write_bytes(read_all(uri))
    assert run("debugfs", "-R", "cat /file", str(copy)).startswith("unsynced")


@needs_devices
def test_the_device_of_a_killed_one_is_replaced_by_the_next(made: Made, lab: Lab) -> None:
    volume = made.copy(lab, "inline")
    first = OpenMirror(volume, "--attach")
    first.line("ready")
    first.line("device")
    first.kill()
    with opened(volume, "--attach") as (process, _):
        device = Path(process.line("device"))
        assert device.read_bytes() == volume.target.read_bytes()[: SIZE_BYTES // 512 * 512]
    assert_nothing_is_left(lab)
