"""Mirrors that are added, adopted and removed, and volumes that have several."""

import contextlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import (
    HeaderIsCopy,
    LuksUuidTaken,
    MirrorKeysDiffer,
    MirrorOfAnotherVolume,
    MirrorsHoldBack,
    MirrorTaken,
    MirrorTooSmall,
    MirrorUnknown,
    MirrorUnlike,
    NotLuks2,
    StillServed,
    TargetGone,
    TargetTaken,
    WrongPassphrase,
)
from lockstep.nbd.identity import account
from tests.forks import ForkLab
from tests.lab import MIB, Lab, Result, Served, Storage, Volume, needs, run, wait_until
from tests.test_mirror_faults import Plugged
from tests.test_service_refusals import assert_error, everything_below

SIZE_BYTES = 8 * MIB + 1024
HEADER_BYTES = 16 * MIB
needs_nbdkit = needs("nbdkit", "nbdfuse", "fusermount3", "/dev/fuse", root=True)


def noise(size_bytes: int = SIZE_BYTES) -> bytes:
    return random.Random(size_bytes).randbytes(size_bytes)


def bare(lab: Lab, name: str = "vol") -> Volume:
    """A volume without a mirror; its first one will be `NAME.mirror`."""
    target = lab.disk(f"{name}.target", SIZE_BYTES, noise())
    lab.lockstep("create", name, "--target", target).ok()
    return Volume(lab, name, target, lab.home / f"{name}.mirror", None)


def add(volume: Volume, path: Path, *options: object, key: Path | None = None) -> Result:
    command = ["mirror", "add", volume.name, path, "--key-file", key or volume.lab.key, *options]
    return volume.lab.lockstep(*command, environment=volume.lab.quick_format())


def copy_of(volume: Volume, path: Path) -> Volume:
    """The same volume with another of its mirrors, to compare that."""
    return Volume(volume.lab, volume.name, volume.target, path, None)


def listed(volume: Volume) -> list[dict[str, Any]]:
    mirrors = json.loads(volume.lab.lockstep("mirror", "list", volume.name, "--json").ok())["mirrors"]
    assert isinstance(mirrors, list)
    return mirrors


def in_sync(served: Served) -> bool:
    return all(mirror["state"] == "in-sync" for mirror in served.now()["mirrors"])


def test_a_volume_gets_its_first_mirror_and_one_more_and_loses_one(lab: Lab) -> None:
    volume, second = bare(lab), lab.home / "second"
    assert listed(volume) == []
    assert "LUKS UUID" in add(volume, volume.mirror, "--iter-time", "10").ok()
    added = json.loads(add(volume, second, "--header", lab.home / "second.header", "--json").ok())
    assert added == {"mirror": str(second), "header": f"{second}.header", "uuid": added["uuid"], "state": None}
    assert second.stat().st_size == SIZE_BYTES, "a detached header needs no room"
    assert [(each["path"], each["state"], each["dirty_bytes"]) for each in listed(volume)] == [
        (str(volume.mirror), "behind", SIZE_BYTES),
        (str(second), "behind", SIZE_BYTES),
    ]
    with volume.served(in_sync=False) as served:
        wait_until(lambda: in_sync(served), "both mirrors to be in sync")
        run("qemu-io", "-f", "raw", "-c", "write -P 7 1000 5000", "-c", "flush", served.uri)
        assert_error(
            lab.lockstep("mirror", "remove", "vol", second), StillServed(volume="vol", action="parted from a mirror")
        )
    assert "in-sync" in lab.lockstep("mirror", "list", "vol").ok()
    volume.assert_equal_disks()
    Volume(lab, "vol", volume.target, second, lab.home / "second.header").assert_equal_disks()
    before = second.read_bytes()
    assert "still holds its copy" in lab.lockstep("mirror", "remove", "vol", second).ok()
    assert second.read_bytes() == before
    assert [each["path"] for each in listed(volume)] == [str(volume.mirror)]
    assert not list((lab.state / "intent").glob(f"{added['uuid']}*")), "nothing is kept of a mirror that is forgotten"
    events = [json.loads(line)["event"] for line in lab.lockstep("audit", "vol", "--json").ok().splitlines()]
    assert (events.count("mirror-added"), events.count("mirror-removed")) == (2, 1)
    error = MirrorUnknown(mirror=second, where=" with the volume vol")
    assert_error(lab.lockstep("mirror", "remove", "vol", second), error)


@needs_nbdkit
def test_of_two_mirrors_one_fails_and_comes_back_and_each_gives_everything_back(lab: Lab) -> None:
    volume, second, held = bare(lab), lab.home / "second", lab.disk("held", SIZE_BYTES + HEADER_BYTES)
    plug = Plugged(second, held)
    with plug:
        add(volume, volume.mirror).ok()
        add(volume, second).ok()
    with contextlib.ExitStack() as plugs, volume.served(in_sync=False) as served:
        plugs.enter_context(plug)
        wait_until(lambda: in_sync(served), "both mirrors to be in sync")
        plug.pull()
        run("qemu-io", "-f", "raw", "-c", "write -P 5 3M 100000", "-c", "flush", served.uri)
        states = [mirror["state"] for mirror in served.now()["mirrors"]]
        assert states == ["in-sync", "degraded"]
        plugs.enter_context(plug)
        assert "is a mirror of vol already: " in add(volume, second).ok()
        wait_until(lambda: in_sync(served), "the second mirror to be back")
        assert "already: in-sync." in add(volume, second).ok()
        other = StillServed(volume="vol", action="given another mirror")
        assert_error(add(volume, lab.home / "third"), other)
        served.stop()
    for mirror in (volume.mirror, held):
        copy_of(volume, mirror).assert_equal_disks()
        output = lab.home / f"{mirror.name}.output"
        lab.lockstep("restore", mirror, output, "--key-file", lab.key).ok()
        assert output.read_bytes() == volume.target.read_bytes()


@needs_nbdkit
def test_of_an_adopted_mirror_only_what_differs_is_written(lab: Lab) -> None:
    volume = bare(lab)
    storage = Storage(lab.home / "slow", SIZE_BYTES + HEADER_BYTES)
    try:
        add(volume, storage.path).ok()
        with volume.served():
            pass
        lab.lockstep("mirror", "remove", "vol", storage.path).ok()
        with volume.target.open("r+b") as target:  # while it is no mirror: one sector, and the last one
            target.write(b"differs")
            target.seek(SIZE_BYTES - 1)
            target.write(b"!")
        before = len(storage.written())
        add(volume, storage.path, "--adopt").ok()
        with volume.served(in_sync=False) as served:
            served.kill()  # what is not in sync when the server dies is compared by the next one
        with volume.served():
            data = [extent for extent in storage.written()[before:] if extent[0] >= HEADER_BYTES]
        assert 0 < sum(length for _, length in data) <= 2 * MIB, data
        copy_of(volume, storage.path).assert_equal_disks()
        before = len(storage.written())
        with volume.served():  # and from then on it is a mirror like any other
            assert not [extent for extent in storage.written()[before:] if extent[0] >= HEADER_BYTES]
    finally:
        storage.close()


def test_a_luks_volume_of_others_is_adopted(lab: Lab) -> None:
    """One that cryptsetup made, with larger sectors, no token, and noise as its content."""
    volume, path = bare(lab), lab.home / "other"
    lab.disk("other", HEADER_BYTES + 9 * MIB)
    cheap = ["--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--batch-mode", "--key-size=512"]
    run("cryptsetup", "luksFormat", *cheap, "--sector-size=4096", f"--key-file={lab.key}", str(path))
    add(volume, path, "--adopt").ok()
    volume = copy_of(volume, path)
    with volume.served() as served:
        run("qemu-io", "-f", "raw", "-c", "write -P 5 777 5", "-c", "flush", served.uri)
    volume.assert_equal_disks()


def test_refusals_change_nothing(tmp_path: Path) -> None:
    lab = ForkLab(tmp_path)
    volume, other = bare(lab), bare(lab, "other")
    add(volume, volume.mirror).ok()
    add(other, other.mirror).ok()
    wrong, twin, small, plain = (tmp_path / name for name in ("wrong", "twin", "small", "plain"))
    wrong.write_bytes(b"another one")
    shutil.copyfile(volume.mirror, twin)
    shutil.copyfile(other.mirror, small)
    run("cryptsetup", "luksUUID", "--batch-mode", "--uuid=0c5a3d4e-8d6b-4a5e-9a3c-4b1f3d2e1a00", str(small))
    run("cryptsetup", "token", "remove", "--token-id=0", str(small))
    with small.open("r+b") as file:
        file.truncate(HEADER_BYTES + MIB)
    lab.disk("plain", HEADER_BYTES + SIZE_BYTES)
    uuid = listed(volume)[0]["uuid"]
    needed = HEADER_BYTES + SIZE_BYTES

    def refused(result: Result, error: Any) -> None:
        assert_error(result, error)
        assert everything_below(tmp_path) == before

    before = everything_below(tmp_path)
    refused(add(volume, volume.mirror), MirrorTaken(path=volume.mirror, volume="vol"))
    refused(add(volume, other.mirror, "--adopt"), MirrorTaken(path=other.mirror, volume="other"))
    refused(add(volume, volume.target, "--force"), TargetTaken(path=volume.target, volume="vol"))
    refused(add(volume, plain, "--adopt"), NotLuks2(path=plain))
    refused(
        add(volume, tmp_path / "new", key=wrong),
        MirrorKeysDiffer(path=tmp_path / "new", other=volume.mirror, volume="vol"),
    )
    refused(
        add(volume, small, "--adopt"),
        MirrorTooSmall(
            path=small,
            size_bytes=HEADER_BYTES + MIB,
            needed_bytes=needed,
            short_bytes=needed - HEADER_BYTES - MIB,
            advice="Give a larger disk.",
        ),
    )
    assert add(volume, small, "--adopt", "--iter-time", "10").code == 2
    refused(add(volume, twin, "--adopt"), LuksUuidTaken(path=twin, luks_uuid=uuid, registered=volume.mirror))
    lab.lockstep("mirror", "remove", "vol", volume.mirror).ok()
    assert_error(add(volume, volume.mirror, "--adopt", key=wrong), WrongPassphrase(path=volume.mirror))
    lab.lockstep("mirror", "remove", "other", other.mirror).ok()
    owner = "the volume other, which is registered here"
    error_of_another = MirrorOfAnotherVolume(path=other.mirror, volume="vol", owner=owner)
    assert_error(add(volume, other.mirror, "--adopt"), error_of_another)
    assert listed(volume) == []


def test_the_only_copy_is_not_adopted_by_an_empty_target(lab: Lab) -> None:
    """State directory and target are lost, and the volume is made anew before anything is restored."""
    volume = bare(lab)
    add(volume, volume.mirror).ok()
    with volume.served():
        pass
    shutil.rmtree(lab.state)
    volume.target.write_bytes(bytes(SIZE_BYTES))
    lab.lockstep("create", "vol", "--target", volume.target).ok()
    error = MirrorUnlike(path=volume.mirror, target=volume.target, volume="vol")
    assert_error(add(volume, volume.mirror, "--adopt"), error)
    volume.restore(volume.target, "--force").ok()
    add(volume, volume.mirror, "--adopt").ok()
    with volume.served():
        assert volume.target.read_bytes() == noise()
    lab.lockstep("mirror", "remove", "vol", volume.mirror).ok()
    volume.target.write_bytes(bytes(SIZE_BYTES))
    add(volume, volume.mirror, "--adopt", "--force").ok()


def test_a_copy_of_its_header_is_not_adopted_beside_the_mirrors_own(lab: Lab) -> None:
    """That one would call the mirror in sync for ever, whatever becomes of it."""
    volume, copy = bare(lab), lab.home / "copy"
    add(volume, volume.mirror).ok()
    run("cryptsetup", "luksHeaderBackup", str(volume.mirror), "--header-backup-file", str(copy))
    lab.lockstep("mirror", "remove", "vol", volume.mirror).ok()
    options = ("--adopt", "--header", copy)
    assert_error(add(volume, volume.mirror, *options), HeaderIsCopy(path=volume.mirror, header=copy))
    assert listed(volume) == []
    with volume.mirror.open("r+b") as file:
        file.write(bytes(MIB))
    add(volume, volume.mirror, *options).ok()


def test_a_copy_of_a_mirror_that_is_offered_costs_that_mirror_nothing(lab: Lab) -> None:
    volume, twin = bare(lab), lab.home / "twin"
    add(volume, volume.mirror).ok()
    with volume.served():
        pass
    shutil.copyfile(volume.mirror, twin)
    error = LuksUuidTaken(path=twin, luks_uuid=listed(volume)[0]["uuid"], registered=volume.mirror)
    assert_error(add(volume, twin, "--adopt"), error)
    with volume.served() as served:
        assert served.log.read_text().count("copying") == 1, "all of the mirror was copied once more"


def test_a_target_that_died_is_not_told_to_be_made_anew_empty(lab: Lab) -> None:
    volume, former, new = bare(lab), lab.home / "former", lab.home / "new"
    add(volume, volume.mirror).ok()
    with volume.served():
        pass
    content = volume.target.read_bytes()
    volume.target.unlink()
    gone = TargetGone(path=volume.target, volume="vol")
    assert_error(add(volume, lab.home / "second"), gone)
    lab.lockstep("mirror", "remove", "vol", volume.mirror).ok()
    volume.mirror.rename(former)
    for refused in (
        add(volume, former, "--adopt"),
        lab.lockstep("serve", "vol", "--key-file", lab.key),
    ):
        assert_error(refused, gone)
        assert "truncate" not in refused.err
    assert "restore MIRROR NEWDISK" in gone.advice
    assert "`lockstep commit` that instead" in gone.advice, "what an overlay has would be lost"
    lab.lockstep("restore", former, new, "--key-file", lab.key).ok()
    lab.lockstep("remove", "vol").ok()
    lab.lockstep("create", "vol", "--target", new).ok()
    add(volume, former, "--adopt").ok()
    with Volume(lab, "vol", new, former, None).served() as served:
        assert served.mirror()["state"] == "in-sync"
    assert new.read_bytes() == content


def test_a_mirror_that_another_state_directory_adopted_is_told_from_its_volume_of_that_name(lab: Lab) -> None:
    volume, lost = lab.volume("vol", MIB), lab.home / "lost"
    with volume.served():
        pass
    lab.state.rename(lost)
    lab.lockstep("create", "vol", "--target", volume.target).ok()
    add(volume, volume.mirror, "--adopt").ok()
    shutil.rmtree(lab.state)
    lost.rename(lab.state)
    error = MirrorOfAnotherVolume(path=volume.mirror, volume="vol", owner="another volume of that name")
    assert_error(lab.lockstep("serve", "vol", "--key-file", lab.key), error)
    assert f"`lockstep mirror remove NAME {volume.mirror}`" in error.advice
    lab.lockstep("mirror", "remove", "vol", volume.mirror).ok()
    add(volume, volume.mirror, "--adopt").ok()
    with volume.served():
        pass


def test_no_mirror_is_added_where_something_is_held(lab: Lab) -> None:
    volume = bare(lab)
    add(volume, volume.mirror).ok()
    with volume.served():
        pass
    lab.lockstep("revoke", "vol", account(os.geteuid())).ok()
    with volume.served() as served:
        run("qemu-io", "-f", "raw", "-c", "write -P 5 0 64k", served.uri)
        assert served.mirror()["held_bytes"] > 0
    held_back = MirrorsHoldBack(volume="vol", mirror=volume.mirror)
    assert_error(add(volume, lab.home / "second"), held_back)
    assert not (lab.home / "second").exists()
    volume.mirror.unlink()
    way_out = f"lockstep mirror remove vol {volume.mirror}"
    assert f"`{way_out}`" in held_back.advice
    lab.lockstep(*way_out.split()[1:]).ok()
    add(volume, lab.home / "second").ok()


@pytest.mark.parametrize("detached", [False, True], ids=["inline", "detached"])
@pytest.mark.parametrize("command", ["luksFormat", "token"])
def test_a_mirror_that_was_only_half_added_is_told_how_to_go_on(lab: Lab, command: str, *, detached: bool) -> None:
    volume, second = lab.volume("vol", MIB), lab.home / "second"
    program = lab.home / "killing" / "cryptsetup"
    program.parent.mkdir()
    quick = lab.quick_format()
    program.write_text(
        f'#!/bin/sh\n[ "$1" = {command} ] && kill -9 $PPID && exit 1\nexec "{lab.home}/bin/cryptsetup" "$@"\n'
    )
    program.chmod(0o755)
    header = ("--header", lab.home / "second.header") if detached else ()
    add = ("mirror", "add", "vol", second, "--key-file", lab.key, *header)
    assert lab.lockstep(*add, environment={"PATH": f"{program.parent}:{quick['PATH']}"}).code == -9
    again = f"lockstep mirror remove vol {second}"
    lab.lockstep(*add, environment=quick).failed(1, again)
    said = lab.lockstep("verify", "vol", "--key-file", lab.key).failed(1, "was killed", "with --force")
    assert f"`{again.replace('vol', 'NAME')}`" in said.replace("NAME MIRROR`", f"NAME {second}`"), said
    error = listed(volume)[-1]["error"]
    assert "no LUKS2 header" in error or "no lockstep token" in error, error
    lab.lockstep(*again.split()[1:]).ok()
    lab.lockstep(*add, "--force", environment=quick).ok()
    with volume.served(in_sync=False):
        pass
