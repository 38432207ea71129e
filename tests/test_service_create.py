"""`lockstep create`: what it refuses to touch, what it makes, and what a failure leaves behind: nothing.

Every refusal is compared as a whole (class, sentences, exit code), nothing on any disk may have changed, and the
registry must not know the volume afterwards. Outside referees: cryptsetup's luksDump, blkid, the kernel.
"""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import stat
import struct
import subprocess
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import (
    DiskBusy,
    DiskLocked,
    DiskMissing,
    EmptyPassphrase,
    HeaderExists,
    HeaderIsDisk,
    HeaderTaken,
    KeyFileUnreadable,
    LockstepError,
    MirrorHoldsData,
    MirrorIsTarget,
    MirrorMissing,
    MirrorTaken,
    MirrorTooSmall,
    NotADisk,
    RegistryPathInvalid,
    SectorSizeInvalid,
    TargetEmpty,
    TargetTaken,
    VolumeExists,
    VolumeNameInvalid,
)
from tests.forks import ForkLab
from tests.lab import MIB, PASSPHRASE, Result, Volume, run
from tests.test_service_refusals import assert_error, everything_below, holder, mounted, used_by_qemu

SIZE_BYTES = 2 * MIB
HEADER_BYTES = 16 * MIB

needs_devices = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="needs root and loop devices"
)


class Bench(ForkLab):
    """A lab with a target of 2 MiB."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.target = self.disk("target", SIZE_BYTES, b"the target's content".ljust(512) * 8)
        self.mirror = home / "mirror"

    def create(self, *options: object, name: str = "vol", target: object = None, key: object = None) -> Result:
        arguments = ["create", name, "--target", target or self.target, "--key-file", key or self.key, *options]
        return self.lockstep(*arguments, "--iter-time", "10", environment=self.quick_format())

    def mirrored(self, *options: object, mirror: object = None, **more: Any) -> Result:
        return self.create("--mirror", mirror or self.mirror, *options, **more)

    def names(self) -> list[str]:
        """What the registry knows, read past Lockstep."""
        if not (self.state / "registry.db").exists():
            return []
        with contextlib.closing(sqlite3.connect(self.state / "registry.db")) as registry:
            return sorted(name for (name,) in registry.execute("SELECT name FROM volumes"))

    @contextlib.contextmanager
    def nothing_changes(self) -> Iterator[None]:
        """Neither a disk, nor what the registry knows, nor which files there are."""
        self.quick_format()
        names, before = self.names(), self._disks()
        yield
        assert self.names() == names
        after = self._disks()
        assert after.keys() == before.keys()
        assert after == before

    def _disks(self) -> dict[str, tuple[object, ...]]:
        return {path: seen for path, seen in everything_below(self.home).items() if path.partition("/")[0] != "state"}

    def refuses(self, error: LockstepError, *options: object, mirror: object = None, **more: Any) -> None:
        with self.nothing_changes():
            assert_error(self.mirrored(*options, mirror=mirror, **more), error)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def dumped(path: object) -> dict[str, Any]:
    """What cryptsetup says is in the header."""
    described: dict[str, Any] = json.loads(run("cryptsetup", "luksDump", "--dump-json-metadata", str(path)))
    return described


def segment(path: object) -> tuple[int, int]:
    """(offset, sector size) of the data, in bytes, as cryptsetup sees it."""
    (only,) = dumped(path)["segments"].values()
    return int(only["offset"]), int(only["sector_size"])


def is_luks(path: object) -> bool:
    return subprocess.run(["cryptsetup", "isLuks", str(path)], check=False).returncode == 0


def fake_program(bench: Bench, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Have this in cryptsetup's place; {real} is where the true one is."""
    directory = bench.home / "bin"
    bench.quick_format()
    real = directory / "cryptsetup.quick"
    (directory / "cryptsetup").rename(real)
    (directory / "cryptsetup").write_text(f"#!/bin/sh\n{script.format(real=real)}\n")
    (directory / "cryptsetup").chmod(0o755)


# --- what it makes ----------------------------------------------------------------------------------------


def test_a_missing_mirror_is_made_exactly_large_enough_and_private(bench: Bench) -> None:
    bench.mirrored().ok()
    made = bench.mirror.stat()
    assert made.st_size == SIZE_BYTES + HEADER_BYTES
    assert stat.S_IMODE(made.st_mode) == 0o600
    assert segment(bench.mirror) == (HEADER_BYTES, 512)
    assert bench.target.read_bytes()[:20] == b"the target's content"
    run("cryptsetup", "open", "--test-passphrase", "--key-file", str(bench.key), str(bench.mirror))
    run("cryptsetup", "open", "--test-passphrase", "--key-file=-", str(bench.mirror), stdin=PASSPHRASE)
    (token,) = dumped(bench.mirror)["tokens"].values()
    assert (token["type"], token["volume_name"], token["target_size_bytes"]) == ("lockstep", "vol", str(SIZE_BYTES))
    assert token["state"] == "syncing", "an empty mirror is not a copy yet"


@pytest.mark.parametrize("size_bytes", [1, 511, 512, 3_000_001])
def test_the_mirror_of_an_odd_target_is_rounded_up_to_the_sector(bench: Bench, size_bytes: int) -> None:
    target = bench.disk("odd", size_bytes)
    bench.mirrored(target=target).ok()
    assert bench.mirror.stat().st_size == HEADER_BYTES + -(-size_bytes // 512) * 512


def test_a_detached_header_takes_nothing_from_the_mirror(bench: Bench) -> None:
    header = bench.home / "header"
    said = bench.mirrored("--header", header).ok()
    assert str(header) in said
    assert "Make one, on another" in said
    assert bench.mirror.stat().st_size == SIZE_BYTES
    assert stat.S_IMODE(header.stat().st_mode) == 0o600
    assert segment(header) == (0, 512)
    assert not is_luks(bench.mirror)


def test_what_is_created_is_reported_for_programs(bench: Bench) -> None:
    described = json.loads(bench.mirrored("--json", "--on-denied", "refuse").ok())
    assert described["name"] == "vol"
    assert described["size_bytes"] == SIZE_BYTES
    assert described["target"] == {"path": str(bench.target)}
    assert described["on_denied"] == "refuse"
    (mirror,) = described["mirrors"]
    assert mirror["path"] == str(bench.mirror)
    assert mirror["header"] is None
    assert run("cryptsetup", "luksUUID", str(bench.mirror)).strip() == mirror["uuid"] == str(uuid.UUID(mirror["uuid"]))
    assert json.loads(bench.lockstep("list", "--json").ok()) == {"volumes": [described]}


def test_without_a_mirror_the_target_is_served_alone(bench: Bench) -> None:
    bench.lockstep("create", "vol", "--target", bench.target).ok()
    assert "none: writes go to the target alone" in bench.lockstep("status", "vol").ok()
    assert "none" in bench.lockstep("list").ok()
    command = [sys.executable, "-m", "lockstep", "--state-dir", str(bench.state), "serve", "vol"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            uri = server.stdout.readline().removeprefix("ready ").strip()
            run("qemu-io", "-f", "raw", "-c", "write -P 7 1 3", "-c", "flush", uri)
            (volume,) = json.loads(bench.lockstep("status", "--json").ok())["volumes"]
            assert volume["serving"]
            assert volume["mirrors"] == []
        finally:
            server.terminate()
        assert server.wait(60) == 0
    assert bench.target.read_bytes()[1:4] == b"\7\7\7"


@pytest.mark.parametrize(("given", "sector_bytes"), [("1024", 1024), ("2K", 2048), ("4096", 4096)])
def test_a_chosen_sector_size(bench: Bench, given: str, sector_bytes: int) -> None:
    bench.mirrored("--sector-size", given).ok()
    assert segment(bench.mirror)[1] == sector_bytes


@needs_devices
@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_the_encryption_sector_follows_the_target(bench: Bench, loop: Callable[..., str], sector_bytes: int) -> None:
    """Else the opened mirror would have another block size than the target, and stock tools would not find their way.

    The mirror's own sector does not matter: each target gets a mirror on a device of the other kind.
    """
    target = loop(bench.target, f"--sector-size={sector_bytes}")
    other = loop(bench.disk("device", SIZE_BYTES + HEADER_BYTES), f"--sector-size={4096 + 512 - sector_bytes}")
    assert int(run("blockdev", "--getss", target)) == sector_bytes
    bench.mirrored(target=target).ok()
    assert segment(bench.mirror)[1] == sector_bytes
    bench.lockstep("remove", "vol").ok()
    bench.mirrored("--force", target=target, mirror=other).ok()
    assert segment(other)[1] == sector_bytes


def gpt(size_bytes: int) -> bytes:
    """A GPT with one partition, for sectors of 512 bytes (UEFI specification, section 5)."""
    sectors = size_bytes // 512
    linux, disk = (uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4").bytes_le, uuid.uuid4().bytes_le)
    entry = linux + uuid.uuid4().bytes_le + struct.pack("<QQQ", 34, sectors - 34, 0)
    entries = entry.ljust(128 * 128, b"\0")

    def header(own: int, other: int, first_entry: int) -> bytes:
        def pack(checksum: int) -> bytes:
            fields = (b"EFI PART", 0x10000, 92, checksum, 0, own, other, 34, sectors - 34, disk)
            return struct.pack("<8sIIIIQQQQ16s", *fields) + struct.pack(
                "<QIII", first_entry, 128, 128, zlib.crc32(entries)
            )

        return pack(zlib.crc32(pack(0))).ljust(512, b"\0")

    protective = bytes(446) + struct.pack("<B3sB3sII", 0, b"", 0xEE, b"", 1, sectors - 1) + bytes(48) + b"\x55\xaa"
    front = protective + header(1, sectors - 1, 2) + entries
    back = entries + header(sectors - 1, 1, sectors - 33)
    return front + bytes(size_bytes - len(front) - len(back)) + back


def test_a_partitioned_target_of_512_byte_sectors_gets_a_mirror_of_512_byte_sectors(bench: Bench) -> None:
    bench.target.write_bytes(gpt(SIZE_BYTES))
    assert run("blkid", "-p", "-s", "PTTYPE", "-o", "value", str(bench.target)).strip() == "gpt"
    bench.mirrored().ok()
    assert segment(bench.mirror)[1] == 512


# --- names, options, passphrases --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".hidden", "a/b", "../up", "a b", "x" * 65, "nul\x01"])
def test_an_invalid_name(bench: Bench, name: str) -> None:
    error = VolumeNameInvalid(volume=name)
    assert error.exit_code == 2
    bench.refuses(error, name=name)


@pytest.mark.parametrize("time_ms", ["0", "20001", "9999999999999"])
def test_a_passphrase_that_costs_nothing_or_more_than_anybody_waits_for(bench: Bench, time_ms: str) -> None:
    with bench.nothing_changes():
        result = bench.lockstep("create", "vol", "--target", bench.target, "--mirror", "m", "--iter-time", time_ms)
        assert (result.code, "1<=x<=20000" in result.err) == (2, True), result.err


def test_options_that_contradict_each_other(bench: Bench) -> None:
    for option, value in (("--header", "h"), ("--sector-size", "512"), ("--key-file", bench.key)):
        with bench.nothing_changes():
            result = bench.lockstep("create", "vol", "--target", bench.target, option, value)
            assert_error(result, MirrorMissing(option=option))
            assert result.code == 2


@pytest.mark.parametrize("size", [0, 1, 513, 8192])
def test_a_sector_size_that_luks2_does_not_know(bench: Bench, size: int) -> None:
    error = SectorSizeInvalid(sector_bytes=size, allowed="512, 1024, 2048, 4096")
    assert error.exit_code == 2
    bench.refuses(error, "--sector-size", size)


def test_a_passphrase_that_is_empty_or_missing(bench: Bench) -> None:
    bench.refuses(EmptyPassphrase(), key="/dev/null")
    bench.refuses(EmptyPassphrase(), key="-")
    nowhere = bench.home / "nowhere"
    bench.refuses(KeyFileUnreadable(path=nowhere, reason="No such file or directory"), key=nowhere)


# --- targets ----------------------------------------------------------------------------------------------


def test_a_target_that_is_none(bench: Bench) -> None:
    nowhere, empty = bench.home / "nowhere", bench.disk("empty", 0)
    bench.refuses(DiskMissing(path=nowhere), target=nowhere)
    bench.refuses(TargetEmpty(path=empty), target=empty)
    bench.refuses(NotADisk(path=bench.home, kind="directory"), target=bench.home)
    bench.refuses(NotADisk(path="/dev/null", kind="character device"), target="/dev/null")


def test_a_name_or_a_target_that_is_taken(bench: Bench) -> None:
    bench.mirrored().ok()
    another, second = bench.home / "another mirror", bench.disk("second", SIZE_BYTES)
    bench.refuses(VolumeExists(volume="vol"), target=second, mirror=another)
    bench.refuses(TargetTaken(path=bench.target, volume="vol"), name="other", mirror=another)
    bench.refuses(MirrorTaken(path=bench.mirror, volume="vol"), name="other", target=bench.mirror, mirror=another)


def test_a_target_that_is_taken_under_another_name(bench: Bench) -> None:
    """Two volumes on one disk could not be served together, and would each believe that its mirror is in sync."""
    bench.mirrored().ok()
    for link in (bench.home / "symbolic", bench.home / "hard"):
        (link.symlink_to if link.name == "symbolic" else link.hardlink_to)(bench.target)
        with bench.nothing_changes():
            result = bench.mirrored(name="other", target=link, mirror=bench.home / "another mirror")
            result.failed(1, "already is the target of the volume vol", TargetTaken.cause)


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_the_disk_of_another_volume_is_never_formatted(bench: Bench, force: list[str]) -> None:
    """Not even with --force: the registry knows better than the signatures on the disk."""
    header = bench.home / "header"
    bench.mirrored("--header", header).ok()
    large = bench.disk("large", SIZE_BYTES + HEADER_BYTES)  # blank, as a new disk is
    bench.create("--mirror", bench.home / "its mirror", name="large", target=large).ok()
    second = bench.disk("second", SIZE_BYTES)
    more = {"name": "other", "target": second}
    bench.refuses(TargetTaken(path=large, volume="large"), *force, mirror=large, **more)
    if force:
        bench.refuses(MirrorTaken(path=bench.mirror, volume="vol"), *force, mirror=bench.mirror, **more)
        mirror = bench.home / "another mirror"
        bench.refuses(HeaderTaken(path=header, volume="vol"), "--header", header, *force, mirror=mirror, **more)


# --- the mirror is something else -------------------------------------------------------------------------


@needs_devices
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_the_mirror_is_the_target(bench: Bench, loop: Callable[..., str], force: list[str]) -> None:
    symbolic, hard = bench.home / "symbolic", bench.home / "hard"
    symbolic.symlink_to(bench.target)
    hard.hardlink_to(bench.target)
    for path in (bench.target, symbolic, hard):
        bench.refuses(MirrorIsTarget(path=path, target=bench.target, how="the same file"), *force, mirror=path)
        error = HeaderIsDisk(path=path, disk=bench.target, how="the same file")
        bench.refuses(error, "--header", path, *force, mirror=bench.home / "free")
    device = loop(bench.target)
    how = f"{device} is a loop device over {bench.target}"
    bench.refuses(MirrorIsTarget(path=device, target=bench.target, how=how), *force, mirror=device)
    bench.refuses(MirrorIsTarget(path=bench.target, target=device, how=how), *force, target=device, mirror=bench.target)


@needs_devices
def test_a_loop_device_over_what_another_server_has_is_as_locked_as_its_file(
    bench: Bench, loop: Callable[..., str]
) -> None:
    """The other one has another state directory: neither registry knows of the other's volumes."""
    bench.mirrored().ok()
    volume = Volume(bench, "vol", bench.target, bench.mirror, None)
    elsewhere, made = ("--state-dir", bench.home / "elsewhere"), ("--force", "--key-file", bench.key)
    with volume.served():
        pass
    copy = shutil.copy(bench.mirror, bench.home / "copy")
    with volume.served() as served:
        mirror, target, who = loop(bench.mirror), loop(bench.target), f"process {served.process.pid}"
        disks = ["--target", bench.disk("other", SIZE_BYTES), "--mirror", mirror]
        bench.lockstep(*elsewhere, "create", "twin", "--target", target).ok()
        tries = [
            bench.lockstep(*elsewhere, "create", "vol", *disks, *made, environment=bench.quick_format()),
            bench.lockstep(*elsewhere, "restore", copy, target, *made),
            bench.lockstep(*elsewhere, "serve", "twin"),
        ]
        for path, tried in zip((mirror, target, target), tries, strict=True):
            tried.failed(1, f"{path} is locked by", who)
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 4k", served.uri)
    volume.assert_equal_disks()


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_the_header_is_the_target_or_the_mirror(bench: Bench, force: list[str]) -> None:
    """A header is written over the first 16 MiB of whatever it is given."""
    mirror = bench.disk("mirror", SIZE_BYTES)
    symbolic = bench.home / "symbolic"
    symbolic.symlink_to(bench.target)
    for path in (bench.target, symbolic, mirror):
        with bench.nothing_changes():
            result = bench.mirrored("--header", path, *force)
            assert result.code in (1, 2), result.err
            assert result.err.startswith("lockstep: "), result.err
            assert "Traceback" not in result.err
    mirror.unlink()
    with bench.nothing_changes():
        result = bench.mirrored("--header", mirror, *force)
        error = RegistryPathInvalid(path=str(mirror), reason="it is given as the mirror and as its header")
        assert_error(result, error)


def _with_data(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512] + b"x" * 512)


CONTENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "ext4": (lambda path: run("mkfs.ext4", "-q", "-F", str(path)), "ext4 file system"),
    "swap": (lambda path: run("mkswap", "-q", str(path)), "swap space"),
    "gpt": (lambda path: path.write_bytes(gpt(path.stat().st_size)), "gpt partition table"),
    "luks": (
        lambda path: run(
            "cryptsetup",
            "luksFormat",
            "--batch-mode",
            "--pbkdf=pbkdf2",
            "--pbkdf-force-iterations=1000",
            "--key-file=-",
            str(path),
            stdin=b"theirs",
        ),
        "crypto_LUKS",
    ),
    "data at the end": (_with_data, "data of an unknown kind"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_mirror_that_holds_something(bench: Bench, kind: str) -> None:
    fill, found = CONTENTS[kind]
    mirror = bench.disk("mirror", SIZE_BYTES + HEADER_BYTES)
    fill(mirror)
    with bench.nothing_changes():
        result = bench.mirrored()
        said = result.failed(1, f"{mirror} is not empty: it holds ", MirrorHoldsData.cause, MirrorHoldsData.next_step)
        assert found in said
    bench.mirrored("--force").ok()
    assert run("wipefs", "--noheadings", "--output", "TYPE", str(mirror)).split() == ["crypto_LUKS"] * 2
    run("cryptsetup", "open", "--test-passphrase", "--key-file", str(bench.key), str(mirror))


@needs_devices
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_mirror_that_is_in_use(bench: Bench, loop: Callable[..., str], tmp_path: Path, force: list[str]) -> None:
    image = bench.disk("image", SIZE_BYTES + HEADER_BYTES)
    device = loop(image)
    point = tmp_path / "point"
    point.mkdir()
    bench.refuses(DiskBusy(path=image, users=f"backing file of {device}"), *force, mirror=image)

    claimed = os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    bench.refuses(DiskBusy(path=device, users="another program has claimed it"), *force, mirror=device)
    os.close(claimed)

    run("mkswap", "-q", device)
    run("sync", device)
    run("swapon", device)
    try:
        # The kernel may swap out to it meanwhile: that the image stays as it is cannot be asked for.
        assert_error(bench.mirrored(*force, mirror=device), DiskBusy(path=device, users="swap space"))
    finally:
        run("swapoff", device)

    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
    with mounted(device, str(point)):
        run("mount", "-o", "remount,ro", str(point))  # else the file system writes by itself, sooner or later
        run("sync", device)
        bench.refuses(DiskBusy(path=device, users=f"mounted at {point}"), *force, mirror=device)
        run("mount", "-o", "remount,rw", str(point))
        inside = point / "a mirror on the target's own file system"
        how = f"{inside} is stored in the file system on {device}"
        inside.touch()
        error = MirrorIsTarget(path=inside, target=device, how=how)
        assert_error(bench.mirrored(*force, target=device, mirror=inside), error)
        assert bench.names() == []


def test_a_mirror_that_qemu_uses(bench: Bench, tmp_path: Path) -> None:
    mirror = bench.disk("mirror", SIZE_BYTES + HEADER_BYTES)
    with used_by_qemu(mirror, tmp_path, writable=True) as qemu:
        bench.refuses(DiskLocked(path=mirror, holder=holder(qemu)), "--force")


# --- sizes ------------------------------------------------------------------------------------------------


def too_small(path: Path, has: int, needs: int, advice: str) -> MirrorTooSmall:
    return MirrorTooSmall(path=path, size_bytes=has, needed_bytes=needs, short_bytes=needs - has, advice=advice)


def test_a_mirror_that_is_too_small(bench: Bench) -> None:
    needs = SIZE_BYTES + HEADER_BYTES
    larger = "Give a larger disk."
    offer = "Give a larger disk, or keep the LUKS2 header in a file of its own with --header FILE."
    for size_bytes, advice in ((needs - 1, offer), (SIZE_BYTES, offer), (SIZE_BYTES - 1, larger), (0, larger)):
        mirror = bench.disk("mirror", size_bytes)
        bench.refuses(too_small(mirror, size_bytes, needs, advice))
    error = too_small(bench.mirror, 0, needs, larger)
    assert f"{needs} bytes are needed" in str(error) or f"{needs} are needed" in str(error)


def test_with_a_header_of_its_own_the_targets_size_is_enough_and_one_byte_less_is_not(bench: Bench) -> None:
    header = bench.home / "header"
    mirror = bench.disk("mirror", SIZE_BYTES - 1)
    bench.refuses(too_small(mirror, SIZE_BYTES - 1, SIZE_BYTES, "Give a larger disk."), "--header", header)
    bench.disk("mirror", SIZE_BYTES)
    bench.mirrored("--header", header).ok()


def test_exactly_enough_with_an_inline_header(bench: Bench) -> None:
    bench.disk("mirror", SIZE_BYTES + HEADER_BYTES)
    bench.mirrored().ok()


# --- headers ----------------------------------------------------------------------------------------------


def test_a_header_file_that_exists(bench: Bench) -> None:
    header = bench.disk("header", HEADER_BYTES, b"perhaps another mirror's")
    bench.refuses(HeaderExists(path=header), "--header", header)
    dangling = bench.home / "dangling"
    dangling.symlink_to(bench.home / "nowhere")
    with bench.nothing_changes():  # the file that it leads to is not made either
        bench.mirrored("--header", dangling).failed(1, str(dangling))
    bench.mirrored("--header", header, "--force").ok()
    assert is_luks(header)


def test_a_header_or_a_mirror_in_a_directory_that_is_not_there(bench: Bench) -> None:
    nowhere = bench.home / "nowhere" / "file"
    with bench.nothing_changes():
        bench.mirrored("--header", nowhere).failed(1, str(nowhere), "No such file or directory")
    with bench.nothing_changes():
        bench.mirrored(mirror=nowhere).failed(1, str(nowhere), f"there is no directory {nowhere.parent}")


# --- what a failure leaves behind -------------------------------------------------------------------------


@pytest.mark.parametrize("header", [[], ["--header", "HEADER"]])
@pytest.mark.parametrize("command", ["luksFormat", "token"])
def test_what_was_made_is_removed_when_a_later_step_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, command: str, header: list[str]
) -> None:
    options = [bench.home / "header" if option == "HEADER" else option for option in header]
    fake_program(bench, monkeypatch, f'[ "$1" = {command} ] && echo "it went wrong" >&2 && exit 4; exec {{real}} "$@"')
    with bench.nothing_changes():
        bench.mirrored(*options).failed(1, "it went wrong", "exit code was 4")
    assert not bench.mirror.exists()
    assert not (bench.home / "header").exists()


def test_a_path_that_cannot_be_registered(bench: Bench) -> None:
    """Found before anything is formatted."""
    strange = f"{bench.home}/mirror\x07"
    bench.refuses(
        RegistryPathInvalid(path=strange, reason="it holds bytes that are not printable text"), mirror=strange
    )


def test_an_interrupted_create_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while cryptsetup measures the machine: it reaches the whole process group, as from a terminal."""
    marker = bench.home / "running"
    fake_program(bench, monkeypatch, f'[ "$1" = luksFormat ] && : > "{marker}" && exec sleep 60; exec {{real}} "$@"')
    command = ["create", "vol", "--target", bench.target, "--mirror", bench.mirror, "--key-file", bench.key]
    with subprocess.Popen(
        [sys.executable, "-m", "lockstep", "--state-dir", str(bench.state), *map(str, command)],
        env={**os.environ, **bench.quick_format()},
        start_new_session=True,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            from tests.lab import wait_until  # noqa: PLC0415

            wait_until(marker.exists, "cryptsetup to run")
            os.killpg(process.pid, 2)
            assert process.wait(60) == 130
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert not bench.mirror.exists()
    assert bench.names() == []


def test_a_failed_create_can_be_repeated(bench: Bench) -> None:
    small = bench.disk("mirror", SIZE_BYTES)
    bench.mirrored().failed(1, "too small")
    small.unlink()
    bench.mirrored().ok()
    assert bench.names() == ["vol"]
    assert re.fullmatch(r"[0-9a-f-]{36}", run("cryptsetup", "luksUUID", str(bench.mirror)).strip())
