"""An interrupted restore: nothing is taken away, and `--resume` goes on there, or says why it cannot.

The commands are forks of this process (ForkLab). Some of them have the calls that change a disk counted, and are killed
in front of the n-th. So every moment of a restore can be hit.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from lockstep.disk import encrypted, transfer
from lockstep.errors import (
    DiskLocked,
    LockstepError,
    NothingToResume,
    OutputExists,
    RestoreRecordInvalid,
    RestoreUnfinished,
    ResumeUnfit,
    TargetHalfRestored,
)
from lockstep.volume import restore as copying
from lockstep.volume.restore import PIECE_BYTES, RUN_BYTES
from lockstep.volume.restore_record import RestoreRecord
from tests.forks import ForkLab, become_lockstep
from tests.lab import MIB, Result, Storage, needs, run, wait_until
from tests.test_restore import Elsewhere
from tests.test_service_refusals import assert_error, everything_below, holder, mounted

needs_devices = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="needs root and loop devices"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

SIZE_BYTES = 7 * MIB + 777
KILLS = int(os.environ.get("RESTORE_KILLS", "20"))  # `make restore-kills` has many more
COUNTED = ("pwrite", "fdatasync", "fsync", "replace", "unlink", "ftruncate")


@functools.cache
def content() -> bytes:
    """Noise with a hole of some pieces, one of a run, and one that begins within a run."""
    data = bytearray(random.Random(5).randbytes(SIZE_BYTES))
    for start, end in ((2 * MIB, 5 * MIB), (RUN_BYTES, 2 * RUN_BYTES), (6 * MIB + 100, 6 * MIB + 3 * RUN_BYTES)):
        data[start:end] = bytes(end - start)
    return bytes(data)


class There(Elsewhere):
    """Another machine, with a mirror on it, and ways to interrupt a restore."""

    def __init__(self, home: Path, mirror: Path) -> None:
        super().__init__(home)
        self.mirror, self.output = mirror, home / "output"
        self.record = home / "output.restoring"

    def done_bytes(self) -> int:
        record = RestoreRecord.load(str(self.record))
        assert record is not None
        return record.done_bytes

    def killed(self, before: int | Callable[[str], bool], *options: object, in_step: bool = False) -> bool:
        """Be killed in front of the n-th call that changes something, or a chosen one; False if it ended."""

        def see(number: int, name: str, _arguments: object) -> None:
            if number == before if isinstance(before, int) else before(name):
                os.kill(os.getpid(), signal.SIGKILL)

        arguments = ["restore", self.mirror, self.output, "--key-file", self.key, *options]
        with tempfile.TemporaryFile() as stream:
            pid = os.fork()
            if not pid:
                _watch_calls(see)
                if in_step:
                    vars(copying)["ThreadPoolExecutor"] = InStep
                become_lockstep([*map(str, arguments)], [stream] * 3)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            stream.seek(0)
            assert code in (0, -signal.SIGKILL), stream.read()
        return code != 0

    def interrupt(self, at_least: int = 3 * MIB, *options: object) -> None:
        """Leave a restore behind that has come so far."""
        assert self.killed(lambda _name: self.record.exists() and self.done_bytes() >= at_least, *options, in_step=True)

    def resume(self, *options: object) -> Result:
        return self.restore(self.mirror, self.output, "--resume", *options)

    def assert_whole(self) -> None:
        assert self.output.read_bytes() == content()
        assert not self.record.exists()


class InStep(ThreadPoolExecutor):
    """Has the copy wait for each checkpoint, so that there is one after each piece."""

    def submit(self, *arguments: Any, **named: Any) -> Any:
        future = super().submit(*arguments, **named)
        if self._thread_name_prefix == "lockstep-checkpoint":
            wait([future])
        return future


def _watch_calls(see: Callable[..., Any], wrote: Callable[[int, int], object] | None = None) -> None:
    """Have every call of os that changes something seen before it is made: (number, name, arguments).

    `wrote` is given offset and length of what was written, afterwards.
    """
    copying.CHECKPOINT_S = 0.0  # type: ignore[misc]
    count = 0

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            see(count, name, arguments)
            result = call(*arguments, **named)
            if name == "pwrite" and wrote is not None:
                wrote(arguments[2], len(arguments[1]))
            return result

        return seen

    for name in COUNTED:
        setattr(os, name, watched(name, getattr(os, name)))


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    volume = ForkLab(tmp_path_factory.mktemp("mirror")).volume("vol", SIZE_BYTES, content=content())
    with volume.served():
        pass
    return volume.mirror


@pytest.fixture
def there(mirror: Path, tmp_path: Path) -> Iterator[There]:
    before = everything_below(mirror.parent)
    yield There(tmp_path, mirror)
    assert everything_below(mirror.parent) == before


# --- interrupted, at any moment ---------------------------------------------------------------------------


def test_killed_at_random_moments_and_resumed_until_it_ends(there: There) -> None:
    """Each attempt is killed in front of another call, early or late; the last one is let through."""
    chosen, kills, ends = random.Random(), 0, 0
    seed = chosen.randrange(1 << 32)
    chosen.seed(seed)
    while kills < KILLS or not ends:
        if there.killed(chosen.choice((1, 2, 3, 4, 5, 8, 12, 20, 30)) + chosen.randrange(4), "--resume"):
            kills += 1
            if there.record.exists() or not there.output.exists() or not there.output.stat().st_size:
                continue  # what has no record, but content, was killed after its end
        assert there.output.read_bytes() == content(), f"seed {seed}"
        assert not there.record.exists()
        ends += 1
        there.output.unlink()
    print(f"killed {kills} times on the way to {ends} whole outputs (seed {seed})")


def test_killed_in_front_of_each_of_the_first_calls(there: There) -> None:
    for before in range(1, 13):
        assert there.killed(before)
        there.resume().ok()
        there.assert_whole()
        there.output.unlink()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_in_the_middle(there: There, number: signal.Signals) -> None:
    """It is held there by a pipe for its progress that nobody empties."""
    read_end, write_end = os.pipe()
    capacity = fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write_end, b"\n" * (capacity - 250))
    command = ["restore", there.mirror, there.output, "--key-file", there.key, "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "lockstep", *map(str, command)], stdout=write_end, stderr=subprocess.PIPE
    ) as process:
        os.close(write_end)
        try:
            wait_until(lambda: "pipe" in Path(f"/proc/{process.pid}/wchan").read_text(), "the pipe to be full")
            wait_until(lambda: there.done_bytes() > 0, "something to be on record")
            process.send_signal(number)
            code = process.wait(60)
        finally:
            os.close(read_end)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert there.output.stat().st_size == SIZE_BYTES
    assert 0 < there.done_bytes() < SIZE_BYTES
    assert "Traceback" not in said
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 130
        assert "--resume" in said
    lines = [json.loads(line) for line in there.resume("--json").ok().splitlines()]
    assert lines[0]["done_bytes"] == lines[-1]["resumed_bytes"] > 0
    there.assert_whole()


@needs("nbdkit", "nbdfuse", "fusermount3", "/dev/fuse", root=True)
def test_who_insists_ends_it_while_the_mirror_hangs(there: There, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "storage", there.mirror.stat().st_size, read_delay_ms=100)
    try:
        shutil.copyfile(there.mirror, storage.image)
        command = ["restore", storage.path, there.output, "--key-file", there.key]
        with subprocess.Popen(
            [sys.executable, "-m", "lockstep", *map(str, command)], stderr=subprocess.PIPE, text=True
        ) as process:
            wait_until(there.record.exists, "the restore to begin")
            with storage.stopped():
                for _ in range(6):
                    process.send_signal(signal.SIGTERM)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(2)
                        break
                assert process.poll() == 130
            assert process.stderr is not None
            said = process.stderr.read()
        assert "--resume" in said
        assert "Traceback" not in said
    finally:
        storage.close()
    there.resume().ok()
    there.assert_whole()


@needs_root
def test_a_full_disk(there: There, tmp_path: Path) -> None:
    point = tmp_path / "small"
    point.mkdir()
    there.output, there.record = point / "output", point / "output.restoring"
    with mounted("-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(point)):
        said = there.restore(there.mirror, there.output).failed(1, "No space left on device", "--resume")
        # Of the two pieces that were under way at once, the second may have taken the room of the first.
        stopped = rf"Restoring {there.mirror} to {there.output} stopped after (0|{MIB}) of {SIZE_BYTES} bytes"
        assert re.search(stopped, said), said
        there.resume().failed(1, "No space left on device")
        run("mount", "-o", "remount,size=16m", str(point))
        there.resume().ok()
        there.assert_whole()


@needs_root
def test_a_disk_without_room_for_the_record_is_left_as_it_was(there: There, tmp_path: Path) -> None:
    point = tmp_path / "small"
    point.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=4k", "tmpfs", str(point)):
        (point / "other").write_bytes(bytes(4096))
        there.restore(there.mirror, point / "output").failed(1, "No space left on device", "takes no more files")
        assert os.listdir(point) == ["other"]


@needs_devices
def test_onto_a_device(there: There, tmp_path: Path, loop: Callable[..., str]) -> None:
    """Zeroes have to be written there, also by the attempt that resumes."""
    image = there.disk("image", 8 * MIB, b"\xee" * 8 * MIB)
    there.output, there.record = Path(loop(image)), tmp_path / "record"
    options = ("--record", there.record)
    for more, at_least in (("--force", MIB), ("--resume", 3 * MIB)):
        there.interrupt(at_least, *options, more)
    assert there.done_bytes() == 3 * MIB
    there.resume(*options).ok()
    run("losetup", "-d", str(there.output))
    assert image.read_bytes() == content().ljust(8 * MIB, b"\xee")
    assert not there.record.exists()


def test_a_comparison_that_was_interrupted(there: There) -> None:
    """The copy was complete then, and is not done again."""
    assert there.killed(lambda name: name == "unlink", "--verify")
    assert there.done_bytes() == SIZE_BYTES
    result = json.loads(there.resume("--verify", "--json").ok().splitlines()[-1])
    assert result["resumed_bytes"] == SIZE_BYTES
    assert result["verified"]
    there.assert_whole()


# --- what is durable when ---------------------------------------------------------------------------------


def test_the_record_says_only_what_is_durable(there: There, tmp_path: Path) -> None:
    """It is there before the output changes. It counts a byte when the byte was written before a sync began."""
    log = tmp_path / "calls"
    arguments = ["restore", there.mirror, there.output, "--key-file", there.key]
    pid = os.fork()
    if not pid:
        calls = log.open("a", buffering=1)

        def see(_number: int, name: str, details: tuple[Any, ...]) -> None:
            value = json.loads(Path(details[0]).read_text())["done_bytes"] if name == "replace" else 0
            calls.write(json.dumps([name, value, 0]) + "\n")

        _watch_calls(see, lambda offset, length: calls.write(json.dumps(["wrote", offset, length]) + "\n"))
        become_lockstep([*map(str, arguments)], [calls] * 3)  # type: ignore[list-item]
    assert os.waitpid(pid, 0)[1] == 0, log.read_text()
    made: list[tuple[str, int, int]] = [json.loads(line) for line in log.read_text().splitlines() if line[0] == "["]
    names = [str(name) for name, _, _ in made]
    assert names.index("replace") < names.index("ftruncate") < names.index("pwrite")
    written: dict[int, int] = {}  # where a write began -> where it ended; threads write at once
    durable = recorded = 0
    for name, value, length in made:
        if name == "wrote":
            written[value] = value + length
        elif name == "fdatasync":  # its begin: what was written before is durable at its end, before the replace
            durable = max(durable, _next_data(durable))
            while durable in written:
                durable = _next_data(written[durable])
        elif name == "replace":
            assert value <= durable
            recorded = value
    assert recorded == SIZE_BYTES
    assert names.count("replace") >= 3
    assert names[-2:] == ["unlink", "fsync"]


def _next_data(position: int) -> int:
    """Where the next byte that is written lies: zeroes up to there need no sync."""
    data = content()
    while position < len(data) and not any(data[position : position + RUN_BYTES]):
        position += RUN_BYTES
    return position


# --- refusals: nothing has changed ------------------------------------------------------------------------


def refuses(there: There, error: LockstepError, *options: object, mirror: Path | None = None) -> None:
    there.refuses(error, mirror or there.mirror, there.output, *options)


def test_what_a_failed_flush_has_lost_is_not_on_record(there: There) -> None:
    """The kernel tells of it once; another flush succeeds, and what was lost is nowhere."""
    flushes, recorded = 0, there.home / "recorded"

    def see(_number: int, name: str, _arguments: object) -> None:
        nonlocal flushes
        flushes += name == "fdatasync"
        if flushes == 3 and not recorded.exists():
            recorded.write_text(str(there.done_bytes()))
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with tempfile.TemporaryFile() as stream:
        pid = os.fork()
        if not pid:
            _watch_calls(see)
            vars(copying)["ThreadPoolExecutor"] = InStep
            arguments = ["restore", there.mirror, there.output, "--key-file", there.key]
            become_lockstep([*map(str, arguments)], [stream] * 3)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        stream.seek(0)
        assert (code, b"Input/output error" in stream.read()) == (1, True)
    assert 0 < there.done_bytes() == int(recorded.read_text())
    there.resume().ok()
    there.assert_whole()


def test_a_mirror_that_cannot_be_read_in_one_place(there: There) -> None:
    """A copy of what can be read is gone on with, and all but that place comes back."""
    bad, size = 3 * MIB + 512, 512
    with tempfile.TemporaryFile() as stream:
        pid = os.fork()
        if not pid:

            def read_all(fd: int, into: memoryview, offset: int) -> None:
                if offset <= 16 * MIB + bad < offset + len(into):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                transfer.read_all(fd, into, offset)

            vars(encrypted)["read_all"] = read_all
            become_lockstep(
                ["restore", str(there.mirror), str(there.output), "--key-file", str(there.key)], [stream] * 3
            )
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
        stream.seek(0)
        assert b"ddrescue" in stream.read()
    copy = there.home / "copy"
    shutil.copyfile(there.mirror, copy)
    with copy.open("r+b") as file:
        file.seek(16 * MIB + bad)
        file.write(bytes(size))
    assert "of it were there already" in there.restore(copy, there.output, "--resume").ok()
    restored = there.output.read_bytes()
    assert restored[:bad] + content()[bad : bad + size] + restored[bad + size :] == content()


def test_an_unfinished_output_is_not_overwritten_by_accident(there: There) -> None:
    there.interrupt()
    error = RestoreUnfinished(path=there.output, record=there.record, done_bytes=there.done_bytes(), length=SIZE_BYTES)
    assert "--resume" in error.advice
    refuses(there, error)
    there.restore(there.mirror, there.output, "--force").ok()
    there.assert_whole()


def test_resuming_what_was_never_begun(there: There) -> None:
    there.output.write_bytes(b"something else")
    refuses(there, NothingToResume(path=there.output, record=there.record), "--resume")
    there.output.write_bytes(b"")
    there.resume().ok()
    there.assert_whole()
    there.output.unlink()
    there.resume().ok()
    there.assert_whole()


def test_resuming_another_restore(there: There) -> None:
    there.interrupt()

    def unfit(reason: str) -> ResumeUnfit:
        return ResumeUnfit(path=there.output, record=there.record, reason=reason)

    reason = f"it was begun for another range, {SIZE_BYTES} bytes at 0"
    refuses(there, unfit(reason), "--resume", "--offset", MIB)
    copy = there.home / "copy"
    shutil.copyfile(there.mirror, copy)
    token = json.loads(run("cryptsetup", "token", "export", "--token-id=0", str(copy)))
    token["generation"] = str(int(token["generation"]) + 1)
    run("cryptsetup", "token", "remove", "--token-id=0", str(copy))
    run("cryptsetup", "token", "import", "--token-id=0", str(copy), stdin=json.dumps(token).encode())
    reason = "the mirror was served since it was begun, and may hold newer data"
    refuses(there, unfit(reason), "--resume", mirror=copy)
    run("cryptsetup", "luksUUID", "--batch-mode", f"--uuid={uuid.uuid4()}", str(copy))
    refuses(there, unfit("it was begun from another mirror"), "--resume", mirror=copy)
    there.resume().ok()
    there.assert_whole()


def test_an_output_that_changed_since(there: There) -> None:
    there.interrupt()
    there.output.rename(there.home / "kept")

    def unfit(reason: str) -> ResumeUnfit:
        return ResumeUnfit(path=there.output, record=there.record, reason=reason)

    there.disk("output", SIZE_BYTES)
    refuses(there, unfit("it does not hold what was restored to it, at byte 0"), "--resume")
    there.disk("output", SIZE_BYTES - 1)
    refuses(there, unfit(f"it has {SIZE_BYTES - 1} bytes now, and had {SIZE_BYTES}"), "--resume")
    shutil.copyfile(there.home / "kept", there.output)
    with there.output.open("rb+") as file:
        file.seek(PIECE_BYTES + 4096)
        file.write(b"\0")
    refuses(there, unfit(f"it does not hold what was restored to it, at byte {PIECE_BYTES + 4096}"), "--resume")
    (there.home / "kept").replace(there.output)
    there.resume().ok()
    there.assert_whole()


@needs_devices
def test_a_device_that_may_have_changed_its_name(there: There, tmp_path: Path, loop: Callable[..., str]) -> None:
    """A record with nothing done tells nothing of a device, so what is on it counts."""
    image = there.disk("image", 8 * MIB, b"\xee" * 8 * MIB)
    there.output, there.record = Path(loop(image)), tmp_path / "record"
    assert there.killed(5, "--force", "--record", there.record)
    assert there.done_bytes() == 0
    error = OutputExists(path=there.output, found="it holds data of an unknown kind")
    refuses(there, error, "--resume", "--record", there.record)
    there.resume("--force", "--record", there.record).ok()


def test_records_that_are_none(there: There) -> None:
    def invalid(reason: str) -> RestoreRecordInvalid:
        return RestoreRecordInvalid(path=there.record, reason=reason)

    damages = (b"", b"\xff" * 99, b"[]", b'{"type": "lockstep-restore"}', b"[" * 60000)
    for damaged, options in zip(damages, ((), ("--resume",), ("--force",), (), ("--resume",)), strict=True):
        there.record.write_bytes(damaged)
        refuses(there, invalid("its content makes no sense"), *options)
    there.record.unlink()
    there.interrupt()
    whole = json.loads(there.record.read_text())
    for wrong in ({"done_bytes": SIZE_BYTES + 1}, {"done_bytes": -1}, {"witness": SIZE_BYTES}, {"length": True}):
        there.record.write_text(json.dumps(whole | wrong))
        refuses(there, invalid("its content makes no sense"), "--resume")
    there.record.write_text(json.dumps(whole | {"version": 2}))
    refuses(there, invalid("it is not one, or one of a later version"), "--resume")
    there.record.write_text(json.dumps(whole))
    error = RestoreRecordInvalid(path=there.output, reason="it is the output")
    refuses(there, error, "--resume", "--record", there.output)
    there.resume().ok()


def test_a_record_never_overwrites_a_mirror(there: There) -> None:
    copy = there.home / "copy"
    shutil.copyfile(there.mirror, copy)
    error = RestoreRecordInvalid(path=copy, reason="its content makes no sense")
    refuses(there, error, "--record", copy, mirror=copy)


def test_a_record_overwrites_nothing_on_its_way(there: There) -> None:
    """Whatever is called like the record, with something behind it, is another's: the output, the mirror, a note."""
    copy, note = there.home / "mirror.new", there.home / "note.new"
    shutil.copyfile(there.mirror, copy)
    note.write_text("keep")
    for output, record in (("one", "mirror"), ("output.new", "output"), ("other", "note")):
        there.restore(copy, there.home / output, "--record", there.home / record).ok()
        assert (there.home / output).read_bytes() == content()
    assert note.read_text() == "keep"
    assert copy.read_bytes() == there.mirror.read_bytes()


def test_a_record_elsewhere_leaves_the_outputs_name_durable(there: There) -> None:
    """The sync of the record's directory says nothing of the output's."""
    elsewhere, log = there.home / "elsewhere", there.home / "log"
    elsewhere.mkdir()

    def see(_number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if name in ("fsync", "unlink"):
            what = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else arguments[0]
            with log.open("a") as file:
                file.write(f"{name} {what}\n")

    with tempfile.TemporaryFile() as stream:
        pid = os.fork()
        if not pid:
            _watch_calls(see)
            arguments = ["restore", there.mirror, there.output, "--record", elsewhere / "record"]
            become_lockstep([*map(str, arguments), "--key-file", str(there.key)], [stream] * 3)
        assert os.waitpid(pid, 0)[1] == 0
    said = log.read_text().splitlines()
    assert said.index(f"fsync {there.home}") < said.index(f"unlink {elsewhere}/record")


def test_a_record_that_cannot_be_made_leaves_no_output(there: There) -> None:
    record = there.home / "nowhere" / "record"
    error = RestoreRecordInvalid(path=record, reason="No such file or directory")
    refuses(there, error, "--record", record)


def test_a_target_that_is_half_restored_is_not_served(tmp_path: Path) -> None:
    """What it lacks would be copied to the mirror, which alone has it: after a power cut at once, by systemd."""
    volume = ForkLab(tmp_path).volume("vol", SIZE_BYTES, content=content())
    volume.copy_by_hand()
    volume.target.unlink()
    there = There(tmp_path, volume.mirror)
    there.output, there.record = volume.target, Path(f"{volume.target}.restoring")
    there.interrupt()
    unfinished = TargetHalfRestored(path=volume.target, volume="vol", record=there.record)
    before = volume.mirror.read_bytes()
    assert_error(volume.lab.lockstep("serve", "vol", "--key-file", there.key), unfinished)
    assert volume.mirror.read_bytes() == before
    volume.lab.lockstep("replace-target", "vol", volume.target, "--key-file", there.key, "--force").ok()
    assert not there.record.exists()
    with volume.served(in_sync=False):
        pass


@pytest.mark.parametrize("by_link", [False, True])
def test_a_target_that_is_half_restored_by_its_other_name_is_not_served_either(tmp_path: Path, by_link: bool) -> None:
    """Nor is it said to be better than the mirror, nor still half restored when it is being filled."""
    lab, real, link = ForkLab(tmp_path), tmp_path / "vol.target", tmp_path / "link"
    volume = lab.volume("vol", SIZE_BYTES, content=content())
    volume.copy_by_hand()
    if by_link:
        link.symlink_to(volume.target)
    else:
        real = volume.target.rename(tmp_path / "real")
        volume.target.symlink_to(real)
    there = There(tmp_path, volume.mirror)
    there.output, there.record = link if by_link else real, Path(f"{real}.restoring")
    there.interrupt(3 * MIB, "--force")
    unfinished = TargetHalfRestored(path=volume.target, volume="vol", record=there.record)
    assert_error(lab.lockstep("serve", "vol", "--key-file", there.key), unfinished)
    lab.lockstep("replace-target", "vol", volume.target, "--key-file", there.key, "--force").ok()
    assert not there.record.exists()


def test_a_new_target_that_was_half_restored_meanwhile_is_not_served(tmp_path: Path) -> None:
    """What it had been filled with is gone, and the record of what it lacks does not know that."""
    lab = ForkLab(tmp_path)
    volume = lab.volume("vol", SIZE_BYTES, content=content())
    volume.copy_by_hand()
    volume.target.unlink()
    lab.lockstep("replace-target", "vol", volume.target, "--key-file", lab.key).ok()
    there = There(tmp_path, volume.mirror)
    there.output, there.record = volume.target, Path(f"{volume.target}.restoring")
    there.interrupt(3 * MIB, "--force")
    unfinished = TargetHalfRestored(path=volume.target, volume="vol", record=there.record)
    assert_error(lab.lockstep("serve", "vol", "--key-file", there.key), unfinished)
    there.resume().ok()
    with volume.served():
        pass
    assert volume.target.read_bytes() == content()


def test_two_at_a_time(there: There) -> None:
    there.interrupt()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write_end, b"\n" * 4096)
    os.set_blocking(write_end, True)
    command = ["restore", there.mirror, there.output, "--key-file", there.key, "--json", "--resume"]
    with subprocess.Popen([sys.executable, "-m", "lockstep", *map(str, command)], stdout=write_end) as first:
        os.close(write_end)
        wait_until(lambda: "pipe" in Path(f"/proc/{first.pid}/wchan").read_text(), "the pipe to be full")
        assert_error(there.resume(), DiskLocked(path=there.output, holder=holder(first)))
        with open(read_end, "rb") as progress:
            progress.read()
        assert first.wait(60) == 0
    there.assert_whole()
