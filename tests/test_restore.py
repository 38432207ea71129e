"""`lockstep restore`: the target comes back from the mirror alone, exactly; and nothing else is ever overwritten.

The mirrors are made once; every test works on them without changing them (which is itself checked), or on copies.
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lockstep.errors import (
    DiskBusy,
    DiskLocked,
    DiskMissing,
    EmptyPassphrase,
    HeaderDamaged,
    HeaderUnreadable,
    LockstepError,
    MirrorIncomplete,
    MirrorTruncated,
    NotADisk,
    NotLuks2,
    NoToken,
    OutputExists,
    OutputIsMirror,
    OutputTooSmall,
    PassphraseMissing,
    WrongPassphrase,
)
from tests.forks import ForkLab
from tests.lab import MIB, Result, run, wait_until
from tests.test_service_refusals import assert_error, everything_below, holder, mounted, overwrite, read_only

needs_devices = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="needs root and loop devices"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

SIZE_BYTES = 8 * MIB + 1  # no multiple of anything
DATA_BYTES = 1 * MIB


def content(size_bytes: int) -> bytes:
    """A megabyte of noise, a long run of zeroes, and a last byte that must not be forgotten."""
    return random.Random(size_bytes).randbytes(DATA_BYTES).ljust(size_bytes - 1, b"\0") + b"!"


class Scene:
    """Two mirrors in sync, inline and with a detached header; nothing of them is being served."""

    def __init__(self, home: Path) -> None:
        self.lab = ForkLab(home)
        self.inline = self.lab.volume("inline", SIZE_BYTES, content=content(SIZE_BYTES))
        self.detached = self.lab.volume("detached", 3_000_001, content=content(3_000_001), header=True)
        for volume in (self.inline, self.detached):
            with volume.served():
                pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("mirrors"))


@pytest.fixture
def scene(made: Scene) -> Iterator[Scene]:
    """The mirrors, which no test may change."""
    before = everything_below(made.lab.home)
    yield made
    assert everything_below(made.lab.home) == before


class Elsewhere(ForkLab):
    """Another machine: a passphrase, and a state directory that must not even come into being."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.state = home / "no state"

    def restore(self, mirror: object, output: object, *options: object, key: object = None) -> Result:
        return self.lockstep("restore", mirror, output, "--key-file", key or self.key, *options)

    def refuses(self, error: LockstepError, mirror: object, output: Path, *options: object, key: object = None) -> None:
        before = everything_below(self.home)
        assert_error(self.restore(mirror, output, *options, key=key), error)
        assert everything_below(self.home) == before


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Elsewhere]:
    lab = Elsewhere(tmp_path)
    yield lab
    assert not lab.state.exists()


# --- what comes back --------------------------------------------------------------------------------------


def test_the_target_comes_back_exactly_and_sparse(scene: Scene, there: Elsewhere, tmp_path: Path) -> None:
    output = tmp_path / "output"
    said = there.restore(scene.inline.mirror, output).ok()
    assert re.fullmatch(r"Restored 8\.0 MiB of inline to \S+/output \(.+/s\)\.\n", said)
    assert output.read_bytes() == content(SIZE_BYTES) == scene.inline.target.read_bytes()
    made = output.stat()
    assert made.st_size == SIZE_BYTES
    assert made.st_mode & 0o777 == 0o600
    assert made.st_blocks * 512 < SIZE_BYTES // 2, "the zeroes take space"


@pytest.mark.parametrize("size_bytes", [1, 513, MIB])
def test_odd_sizes(tmp_path: Path, size_bytes: int) -> None:
    lab = ForkLab(tmp_path)
    volume = lab.volume("odd", size_bytes, content=random.Random(size_bytes).randbytes(size_bytes))
    with volume.served():
        pass
    output = tmp_path / "output"
    volume.restore(output).ok()
    assert output.read_bytes() == volume.target.read_bytes()


def test_from_a_copy_taken_elsewhere(scene: Scene, there: Elsewhere, tmp_path: Path) -> None:
    """No state directory, no target, no write access to the copy: a mirror and a passphrase are enough."""
    copy, header, output = tmp_path / "copy", tmp_path / "header", tmp_path / "output"
    shutil.copyfile(scene.inline.mirror, copy)
    there.restore(copy, output).ok()
    assert output.read_bytes() == content(SIZE_BYTES)
    assert scene.detached.header is not None
    shutil.copyfile(scene.detached.mirror, copy)
    shutil.copyfile(scene.detached.header, header)
    output.unlink()
    there.restore(copy, output, "--header", header).ok()
    assert output.read_bytes() == content(3_000_001)


@needs_root
def test_from_a_read_only_medium_with_a_damaged_header(scene: Scene, there: Elsewhere, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copyfile(scene.inline.mirror, copy)
    overwrite(copy, 4096, b"\xff" * 512)
    with read_only(copy):
        before = hashlib.sha256(copy.read_bytes()).digest()
        there.restore(copy, tmp_path / "output").ok()
        assert hashlib.sha256(copy.read_bytes()).digest() == before
    assert (tmp_path / "output").read_bytes() == content(SIZE_BYTES)


def test_either_copy_of_the_header_is_enough(scene: Scene, there: Elsewhere, tmp_path: Path) -> None:
    for number, damage in enumerate((0, 4096, 0x4000, 0x5000)):
        copy, output = tmp_path / "copy", tmp_path / f"output{number}"
        shutil.copyfile(scene.inline.mirror, copy)
        overwrite(copy, damage, b"\xff" * 512)
        there.restore(copy, output).ok()
        assert output.read_bytes() == content(SIZE_BYTES)


@needs_devices
def test_to_a_device(scene: Scene, there: Elsewhere, tmp_path: Path, loop: Callable[..., str]) -> None:
    image = there.disk("image", 9 * MIB)
    device = loop(image)
    there.restore(scene.inline.mirror, device).ok()
    run("losetup", "-d", device)
    assert image.read_bytes() == content(SIZE_BYTES).ljust(9 * MIB, b"\0")

    # With --force over old data, zeroes are written as well: what is not written would be seen again.
    image.write_bytes(b"\xee" * 9 * MIB)
    device = loop(image)
    there.restore(scene.inline.mirror, device, "--force").ok()
    run("losetup", "-d", device)
    assert image.read_bytes() == content(SIZE_BYTES).ljust(9 * MIB, b"\xee")


def test_with_force_over_a_longer_file(scene: Scene, there: Elsewhere, tmp_path: Path) -> None:
    output = there.disk("output", 9 * MIB, b"\xee" * 9 * MIB)
    there.restore(scene.inline.mirror, output, "--force").ok()
    assert output.read_bytes() == content(SIZE_BYTES)


def test_progress_for_programs(scene: Scene, there: Elsewhere, tmp_path: Path) -> None:
    output = tmp_path / "output"
    lines = [json.loads(line) for line in there.restore(scene.inline.mirror, output, "--json").ok().splitlines()]
    *progress, result = lines
    assert result == {
        "restored_bytes": SIZE_BYTES,
        "volume": "inline",
        "output": str(output),
        "frozen": False,
        "offset": 0,
        "resumed_bytes": 0,
        "verified": False,
    }
    done = [each["done_bytes"] for each in progress]
    assert done == sorted(set(done))
    assert done[-1] == SIZE_BYTES
    expected = {"phase": "copy", "total_bytes": SIZE_BYTES}
    assert all(each == expected | {"done_bytes": each["done_bytes"]} for each in progress)


def test_a_mirror_that_is_incomplete(there: Elsewhere, tmp_path: Path) -> None:
    fresh = ForkLab(tmp_path).volume("fresh", MIB, content=b"x" * MIB)
    shutil.rmtree(tmp_path / "state")
    output = tmp_path / "output"
    there.refuses(MirrorIncomplete(path=fresh.mirror, state="syncing"), fresh.mirror, output)
    there.restore(fresh.mirror, output, "--incomplete").ok()
    assert output.stat().st_size == MIB


# --- refused outputs --------------------------------------------------------------------------------------


def test_an_output_that_exists(scene: Scene, there: Elsewhere, tmp_path: Path) -> None:
    for size_bytes in (0, SIZE_BYTES):
        output = there.disk("output", size_bytes)
        there.refuses(OutputExists(path=output, found="the file exists already"), scene.inline.mirror, output)
    (tmp_path / "directory").mkdir()
    there.refuses(
        NotADisk(path=tmp_path / "directory", kind="directory"), scene.inline.mirror, tmp_path / "directory", "--force"
    )
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    there.refuses(DiskMissing(path=dangling), scene.inline.mirror, dangling)


def test_an_output_that_cannot_be_made(scene: Scene, there: Elsewhere, tmp_path: Path) -> None:
    result = there.restore(scene.inline.mirror, tmp_path / "nowhere" / "output")
    result.failed(1, f"{tmp_path}/nowhere/output", f"there is no directory {tmp_path}/nowhere.")


@needs_devices
def test_an_output_device_that_holds_something_or_is_in_use(
    scene: Scene, there: Elsewhere, tmp_path: Path, loop: Callable[..., str]
) -> None:
    image = there.disk("image", 16 * MIB)
    device = Path(loop(image))
    run("mkfs.ext4", "-q", str(device))
    run("sync", str(device))
    there.refuses(OutputExists(path=device, found="ext4 file system"), scene.inline.mirror, device)
    point = tmp_path / "point"
    point.mkdir()
    with mounted(str(device), str(point)):
        run("sync", str(device))
        for force in ([], ["--force"]):
            busy = DiskBusy(path=device, users=f"mounted at {point}")
            assert_error(there.restore(scene.inline.mirror, device, *force), busy)
    there.refuses(DiskBusy(path=image, users=f"backing file of {device}"), scene.inline.mirror, image, "--force")
    run("wipefs", "--all", "--quiet", str(device))
    overwrite(image, 16 * MIB - 1, b"x")
    run("blockdev", "--flushbufs", str(device))
    error = OutputExists(path=device, found="it holds data of an unknown kind")
    there.refuses(error, scene.inline.mirror, device)


@needs_devices
def test_an_output_device_that_is_too_small(scene: Scene, there: Elsewhere, loop: Callable[..., str]) -> None:
    device = Path(loop(there.disk("image", 8 * MIB)))
    for force in ([], ["--force"]):
        error = OutputTooSmall(path=device, size_bytes=8 * MIB, needed_bytes=SIZE_BYTES)
        there.refuses(error, scene.inline.mirror, device, *force)


@needs_devices
def test_the_output_is_the_mirror(scene: Scene, there: Elsewhere, tmp_path: Path, loop: Callable[..., str]) -> None:
    mirror, header = tmp_path / "mirror", tmp_path / "header"
    shutil.copyfile(scene.detached.mirror, mirror)
    assert scene.detached.header is not None
    shutil.copyfile(scene.detached.header, header)
    symbolic, hard = tmp_path / "symbolic", tmp_path / "hard"
    symbolic.symlink_to(mirror)
    hard.hardlink_to(mirror)
    options = ("--header", header, "--force")
    for output in (mirror, symbolic, hard):
        there.refuses(OutputIsMirror(path=output, mirror=mirror, how="the same file"), mirror, output, *options)
    there.refuses(OutputIsMirror(path=header, mirror=header, how="the same file"), mirror, header, *options)
    device = Path(loop(mirror))
    how = f"{device} is a loop device over {mirror}"
    there.refuses(OutputIsMirror(path=device, mirror=mirror, how=how), mirror, device, *options)
    there.refuses(OutputIsMirror(path=mirror, mirror=device, how=how), device, mirror, *options)


def test_the_output_is_another_volumes_or_the_state_directorys(tmp_path: Path) -> None:
    lab = ForkLab(tmp_path)
    volume = lab.volume(size_bytes=2 * MIB, content=content(2 * MIB))
    other = lab.volume("other", 2 * MIB, header=True)
    assert other.header is not None
    volume.copy_by_hand()
    overlay = lab.disk("overlay", 0)
    linked = tmp_path / "linked"
    linked.symlink_to(other.mirror)
    kept = {path: path.read_bytes() for path in (other.mirror, other.header, lab.state / "registry.db")}
    for output, taken in ((linked, "a mirror"), (other.mirror, "a mirror"), (other.header, "the header of a mirror")):
        volume.restore(output, "--force").failed(1, f"already is {taken} of the volume other")
        commit = lab.lockstep("commit", volume.mirror, overlay, output, "--key-file", lab.key, "--force")
        commit.failed(1, f"already is {taken} of the volume other")
    for output in (lab.state / "registry.db", lab.state / "new", tmp_path / "state" / "run" / ".." / "new"):
        volume.restore(output, "--force").failed(1, "lies in the state directory")
    assert {path: path.read_bytes() for path in kept} == kept
    volume.target.write_bytes(bytes(2 * MIB))
    volume.restore(volume.target, "--force").ok()
    assert volume.target.read_bytes() == content(2 * MIB), "onto its own target it may be restored"
    (lab.state / "registry.db").write_bytes(b"no registry")
    volume.restore(tmp_path / "output").ok()


# --- refused mirrors --------------------------------------------------------------------------------------


def test_wrong_empty_and_missing_passphrases(scene: Scene, there: Elsewhere, tmp_path: Path) -> None:
    wrong, output, mirror = tmp_path / "wrong", tmp_path / "output", scene.inline.mirror
    wrong.write_bytes(b"not this one")
    there.refuses(WrongPassphrase(path=mirror), mirror, output, key=wrong)
    there.refuses(EmptyPassphrase(), mirror, output, key="/dev/null")
    assert_error(there.lockstep("restore", mirror, output), PassphraseMissing(what=f"the mirror {mirror}"))


def test_a_mirror_that_is_being_served(scene: Scene, there: Elsewhere, tmp_path: Path) -> None:
    volume = there.volume("busy", MIB)  # with a state directory of its own
    with volume.served() as server:
        wait_until(lambda: '"state":"in-sync"' in token_of(volume.mirror), "the header to say in-sync")
        before = volume.mirror.stat().st_mtime_ns
        result = there.restore(volume.mirror, tmp_path / "output")
        assert_error(result, DiskLocked(path=volume.mirror, holder=holder(server.process)))
        assert volume.mirror.stat().st_mtime_ns == before
        assert not (tmp_path / "output").exists()
    there.restore(volume.mirror, tmp_path / "output").ok()
    shutil.rmtree(there.state)


def token_of(mirror: Path) -> str:
    return run("cryptsetup", "token", "export", "--token-id=0", str(mirror)).replace(" ", "")


def test_a_header_that_is_missing(scene: Scene, there: Elsewhere, tmp_path: Path) -> None:
    mirror, output, nowhere = scene.detached.mirror, tmp_path / "output", tmp_path / "nowhere"
    error = NotLuks2(path=mirror)
    assert "--header" in error.advice
    there.refuses(error, mirror, output)
    error_of_the_path = HeaderUnreadable(path=nowhere, reason="No such file or directory")
    there.refuses(error_of_the_path, mirror, output, "--header", nowhere)


def test_mirrors_that_are_damaged_or_none(scene: Scene, there: Elsewhere, tmp_path: Path) -> None:
    copy, output = tmp_path / "copy", tmp_path / "output"
    there.refuses(HeaderUnreadable(path=copy, reason="No such file or directory"), copy, output)

    shutil.copyfile(scene.inline.mirror, copy)
    overwrite(copy, 4096, b"\xff" * 512)
    overwrite(copy, 0x5000, b"\xff" * 512)
    there.refuses(HeaderDamaged(path=copy, reason="no copy of it has the right checksum"), copy, output)

    shutil.copyfile(scene.inline.mirror, copy)
    whole = copy.stat().st_size
    os.truncate(copy, whole - 1)
    there.refuses(MirrorTruncated(path=copy, size_bytes=whole - 1, needed_bytes=whole), copy, output)

    shutil.copyfile(scene.inline.mirror, copy)
    run("cryptsetup", "token", "remove", "--token-id=0", str(copy))
    there.refuses(NoToken(path=copy), copy, output)

    copy.write_bytes(bytes(MIB))
    there.refuses(NotLuks2(path=copy), copy, output)


def test_a_volume_can_be_restored_by_its_own_passphrase_only(tmp_path: Path, scene: Scene, there: Elsewhere) -> None:
    """A second passphrase that cryptsetup added opens it; one that was removed does not."""
    copy, second = tmp_path / "copy", tmp_path / "second"
    shutil.copyfile(scene.inline.mirror, copy)
    second.write_bytes(b"another one")
    cheap = ["--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--batch-mode"]
    run("cryptsetup", "luksAddKey", *cheap, f"--key-file={there.key}", str(copy), str(second))
    there.restore(copy, tmp_path / "output", key=second).ok()
    run("cryptsetup", "luksRemoveKey", "--batch-mode", str(copy), str(there.key))
    there.refuses(WrongPassphrase(path=copy), copy, tmp_path / "never")
