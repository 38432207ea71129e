"""`lockstep restore` of a part, into a pipe, sparsely, and with what was written read back."""

import errno
import functools
import json
import os
import pty
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from lockstep.disk.encrypted import EncryptedDisk
from lockstep.errors import (
    LockstepError,
    MirrorIncomplete,
    OutputDiffers,
    OutputIsMirror,
    OutputTooSmall,
    RangeInvalid,
    StreamCannot,
    StreamIsTerminal,
    StreamStopped,
    WrongPassphrase,
)
from lockstep.volume.restore import PIECE_BYTES, RUN_BYTES, Extent, Progress, Sink, copy_out
from tests.forks import ForkLab
from tests.lab import MIB, Result, Storage, needs, run, wait_until
from tests.test_restore import Elsewhere
from tests.test_service_refusals import assert_error, everything_below

needs_devices = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="needs root and loop devices"
)

SIZE_BYTES = 5 * MIB + 4099


@functools.cache
def content() -> bytes:
    """Noise, with runs of zeroes of several lengths in it."""
    data = bytearray(random.Random(7).randbytes(SIZE_BYTES))
    for start, length in ((0, RUN_BYTES), (MIB + 5, RUN_BYTES), (3 * MIB, MIB), (5 * MIB - RUN_BYTES, RUN_BYTES)):
        data[start : start + length] = bytes(length)
    return bytes(data)


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of the same disk, with each of the two usual encryption sectors."""
    lab = ForkLab(tmp_path_factory.mktemp("mirrors"))
    made = []
    for sector_bytes in (512, 4096):
        volume = lab.volume(f"of-{sector_bytes}", SIZE_BYTES, "--sector-size", sector_bytes, content=content())
        with volume.served():
            pass
        made.append(volume.mirror)
    return made


@pytest.fixture
def there(mirrors: list[Path], tmp_path: Path) -> Iterator[Elsewhere]:
    before = everything_below(mirrors[0].parent)
    yield Elsewhere(tmp_path)
    assert everything_below(mirrors[0].parent) == before


@pytest.fixture
def mirror(mirrors: list[Path]) -> Path:
    return mirrors[0]


# --- a range ----------------------------------------------------------------------------------------------

RANGES = (
    (0, 1),
    (SIZE_BYTES - 1, 1),
    (511, 2),
    (MIB - 1, PIECE_BYTES + 2),
    (4095, 3 * MIB),
    (2 * MIB, None),
    (3 * MIB + 1, 70000),
    (4 * MIB + 77, SIZE_BYTES - 4 * MIB - 77),
)


@pytest.mark.parametrize("which", [0, 1], ids=["512", "4096"])
def test_ranges_of_any_alignment(mirrors: list[Path], there: Elsewhere, tmp_path: Path, which: int) -> None:
    output = tmp_path / "output"
    for offset, length in RANGES[which::2]:
        options = ["--offset", offset, *(["--length", length] if length else [])]
        last = there.restore(mirrors[which], output, "--force", "--json", *options).ok().splitlines()[-1]
        expected = content()[offset : offset + length if length else None]
        assert output.read_bytes() == expected
        assert json.loads(last)["restored_bytes"] == len(expected)
        assert json.loads(last)["offset"] == offset


def test_sizes_have_units(mirror: Path, there: Elsewhere, tmp_path: Path) -> None:
    there.restore(mirror, tmp_path / "output", "--offset", "1M", "--length", "64K", "--verify").ok()
    assert (tmp_path / "output").read_bytes() == content()[MIB : MIB + (64 << 10)]
    refused = there.restore(mirror, tmp_path / "never", "--offset", "a lot")
    assert refused.code == 2
    assert "'a lot' is not a size" in refused.err


def test_ranges_that_are_not_there(mirror: Path, there: Elsewhere, tmp_path: Path) -> None:
    for offset, length in ((SIZE_BYTES, 0), (SIZE_BYTES - 1, 2), (0, 0), (1 << 70, 1)):
        error = RangeInvalid(offset=offset, length=length, size_bytes=SIZE_BYTES)
        there.refuses(error, mirror, tmp_path / "output", "--offset", offset, "--length", length)
    error = RangeInvalid(offset=SIZE_BYTES + 1, length=-1, size_bytes=SIZE_BYTES)
    there.refuses(error, mirror, tmp_path / "output", "--offset", SIZE_BYTES + 1)


@needs_devices
def test_a_range_needs_a_device_of_its_own_size_only(
    mirror: Path, there: Elsewhere, tmp_path: Path, loop: Callable[..., str]
) -> None:
    device = Path(loop(there.disk("image", MIB)))
    options = ("--offset", "512", "--length", MIB + 1)
    there.refuses(OutputTooSmall(path=device, size_bytes=MIB, needed_bytes=MIB + 1), mirror, device, *options)
    there.restore(mirror, device, "--offset", "512", "--length", "1M").ok()
    run("losetup", "-d", str(device))
    assert (tmp_path / "image").read_bytes() == content()[512 : 512 + MIB]


# --- into a pipe ------------------------------------------------------------------------------------------


def test_into_a_pipe(mirror: Path, there: Elsewhere) -> None:
    command = [sys.executable, "-m", "lockstep", "restore", str(mirror), "-", "--key-file", "-"]
    for options, expected in (([], content()), (["--offset", "77", "--length", "2M"], content()[77 : 77 + 2 * MIB])):
        done = subprocess.run([*command, *options], input=there.key.read_bytes(), capture_output=True, check=True)
        assert done.stdout == expected
        assert done.stderr.decode().startswith("Restored ")
        assert done.stderr.decode().count("\n") == 1


def test_into_a_pipe_that_somebody_has_made_non_blocking(mirror: Path, there: Elsewhere) -> None:
    """A program that shares it may do so; the restore waits all the same."""
    command = [sys.executable, "-m", "lockstep", "restore", str(mirror), "-", "--key-file", str(there.key)]
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with subprocess.Popen(command, stdout=write_end, stderr=subprocess.PIPE) as process, open(read_end, "rb") as pipe:
        os.close(write_end)
        waits = Path(f"/proc/{process.pid}/wchan")
        wait_until(lambda: process.poll() is not None or "poll" in waits.read_text(), "the pipe to be full")
        assert pipe.read() == content()
    assert process.returncode == 0


def test_into_a_pipe_with_progress_for_programs(mirror: Path, there: Elsewhere) -> None:
    command = [sys.executable, "-m", "lockstep", "restore", str(mirror), "-", "--key-file", str(there.key), "--json"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout == content()
    *progress, result = [json.loads(line) for line in done.stderr.splitlines()]
    assert [progress[0]["done_bytes"], progress[-1]["done_bytes"]] == [0, SIZE_BYTES]
    assert result["output"] == "-"
    assert result["restored_bytes"] == SIZE_BYTES


def test_into_a_file_that_the_shell_opened(mirror: Path, there: Elsewhere, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert into(there, mirror, output).code == 0
    assert output.read_bytes() == content()


def into(there: Elsewhere, mirror: Path, output: Path, mode: str = "wb") -> Result:
    command = [sys.executable, "-m", "lockstep", "restore", str(mirror), "-", "--key-file", str(there.key)]
    with output.open(mode) as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, check=False)
    done.stdout = b""
    return Result(done)


@needs_devices
def test_the_shell_opened_the_mirror(mirror: Path, there: Elsewhere, tmp_path: Path, loop: Callable[..., str]) -> None:
    copy = tmp_path / "copy"
    shutil.copyfile(mirror, copy)
    device = Path(loop(copy))
    before = copy.read_bytes()
    for output, how in ((copy, "the same file"), (device, f"/proc/self/fd/1 is a loop device over {copy}")):
        assert_error(into(there, copy, output, "r+b"), OutputIsMirror(path="-", mirror=copy, how=how))
    assert copy.read_bytes() == before


def test_a_reader_that_goes_away(mirror: Path, there: Elsewhere) -> None:
    command = [sys.executable, "-m", "lockstep", "restore", str(mirror), "-", "--key-file", str(there.key)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(100) == content()[:100]
        process.stdout.close()
        _, said = process.communicate(timeout=60)
    error = StreamStopped(mirror=mirror, reason="Broken pipe")
    assert said.decode().startswith(f"lockstep: {error}\n")
    assert process.returncode == 1


def test_what_a_pipe_cannot_be(mirror: Path, there: Elsewhere) -> None:
    def refused(error: LockstepError, *options: object) -> None:
        result = there.restore(mirror, "-", *options)
        assert_error(result, error)
        assert not result.out

    refused(StreamCannot(option="--resume"), "--resume")
    refused(StreamCannot(option="--verify"), "--verify")
    refused(StreamCannot(option="--record"), "--record", there.home / "record")
    refused(WrongPassphrase(path=mirror), "--key-file", there.disk("wrong", 9, b"not this"))
    shutil.copyfile(mirror, there.home / "copy")
    run("truncate", "--size=-1", str(there.home / "copy"))
    assert there.restore(there.home / "copy", "-").failed(1, "truncated")


def test_a_terminal_gets_no_data(mirror: Path, there: Elsewhere) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lockstep", "restore", str(mirror), "-", "--key-file", str(there.key)]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, check=False)
    os.close(theirs)
    os.close(ours)
    assert done.stderr.decode().startswith(f"lockstep: {StreamIsTerminal()}\n")
    assert done.returncode == StreamIsTerminal.exit_code


# --- sparse -----------------------------------------------------------------------------------------------


def holes(path: Path) -> int:
    return path.stat().st_size - path.stat().st_blocks * 512


def test_zero_runs_are_holes(mirror: Path, there: Elsewhere, tmp_path: Path) -> None:
    output = there.disk("output", 9 * MIB, b"\xee" * 9 * MIB)
    for name in ("output", "new"):
        there.restore(mirror, tmp_path / name, "--force").ok()
        assert (tmp_path / name).read_bytes() == content()
        assert holes(tmp_path / name) > MIB + 2 * RUN_BYTES - 8192
    assert output.stat().st_size == SIZE_BYTES


@needs_devices
def test_zeroes_on_a_device_are_cleared(
    mirror: Path, there: Elsewhere, tmp_path: Path, loop: Callable[..., str]
) -> None:
    """They take no space where the device can punch holes, and are zeroes in any case."""
    image = there.disk("image", SIZE_BYTES + 509, b"\xee" * (SIZE_BYTES + 509))
    device = loop(image)
    there.restore(mirror, device, "--force", "--verify").ok()
    run("losetup", "-d", device)
    assert image.read_bytes() == content().ljust(SIZE_BYTES + 509, b"\xee")
    assert holes(image) >= MIB


# --- compared ---------------------------------------------------------------------------------------------


def test_what_was_written_is_compared(mirror: Path, there: Elsewhere, tmp_path: Path) -> None:
    lines = there.restore(mirror, tmp_path / "output", "--verify", "--json").ok().splitlines()
    *progress, result = [json.loads(line) for line in lines]
    phases = [each["phase"] for each in progress]
    assert phases == sorted(phases)  # copy, then verify
    for phase in ("copy", "verify"):
        done = [each["done_bytes"] for each in progress if each["phase"] == phase]
        assert [done[0], done[-1]] == [0, SIZE_BYTES]
    assert result["verified"] is True
    said = there.restore(mirror, tmp_path / "other", "--verify").ok()
    assert said.endswith("It was read back, and equals the mirror.\n")


@needs_devices
@needs("nbdkit", "nbdfuse")
def test_a_disk_that_forgets_is_found_out(
    mirror: Path, there: Elsewhere, tmp_path: Path, loop: Callable[..., str]
) -> None:
    """The page cache has what was written; the disk below it, nothing but zeroes."""
    storage = Storage(tmp_path / "storage", 8 * MIB, plugin=("null", f"size={8 * MIB}"))
    try:
        device = Path(loop(storage.path, "--direct-io=on"))
        differing = {at: None for at in range(0, SIZE_BYTES, 512) if any(content()[at : at + 512])}
        error = OutputDiffers(
            path=device,
            mirror=mirror,
            count_bytes=sum(min(512, SIZE_BYTES - at) for at in differing),
            offset=next(iter(differing)),
        )
        assert_error(there.restore(mirror, device, "--verify"), error)
        assert not Path(f"{device}.restoring").exists()
        run("losetup", "-d", str(device))
    finally:
        storage.close()


def test_a_mirror_that_is_incomplete_is_not_piped(there: Elsewhere, tmp_path: Path) -> None:
    fresh = ForkLab(tmp_path).volume("fresh", MIB, content=b"x" * MIB)
    shutil.rmtree(tmp_path / "state")
    assert_error(there.restore(fresh.mirror, "-"), MirrorIncomplete(path=fresh.mirror, state="syncing"))


def test_a_copy_for_which_there_is_no_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_size: int) -> memoryview:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    def copy() -> None:
        with pytest.raises(OSError, match="Cannot allocate memory"):
            copy_out(Mock(EncryptedDisk), sink, Extent(0, MIB), Progress(), on_progress=lambda _done: None)
        ended.set()

    monkeypatch.setattr("lockstep.volume.restore.page_aligned", none)
    sink, ended = Mock(Sink, in_order=False), threading.Event()
    threading.Thread(target=copy, daemon=True).start()
    assert ended.wait(20)
