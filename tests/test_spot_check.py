"""P3, P4, P11: a target that is not the disk that it was is not served as if it were, nor copied over its mirror."""

import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lockstep.crypto import luks
from lockstep.crypto.unlock import Unlock
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.mirror import open_mirror
from lockstep.disk.plain import PlainDisk
from lockstep.disk.probe import inspect
from lockstep.volume.regions import region_bytes_for
from lockstep.volume.spot_check import SpotCheck, spot_check
from tests.lab import MIB, PASSPHRASE, Lab, Volume, needs, wait_until, write

pytestmark = needs("qemu-io")

SIZE_BYTES = 16 * MIB


def noise(seed: int, size_bytes: int = SIZE_BYTES) -> bytes:
    """A disk's content, one for each seed."""
    return random.Random(seed).randbytes(size_bytes)


@pytest.fixture
def volume(lab: Lab) -> Volume:
    """A volume in sync, whose server was killed: nothing but its mirror tells what the target is."""
    volume = lab.volume("vol", SIZE_BYTES, content=noise(1))
    with volume.served() as served:
        served.kill()
    return volume


def exchange(volume: Volume, content: bytes) -> Path:
    """Give the target's name to another disk; returns where the target is now."""
    elsewhere = volume.target.rename(volume.target.with_name("elsewhere"))
    volume.target.write_bytes(content)
    return elsewhere


def refusal(volume: Volume) -> str:
    """What a server says that refuses."""
    return volume.lab.lockstep("serve", "vol", "--key-file", volume.lab.key).failed(1, "does not seem to be the disk")


# --- at the start -----------------------------------------------------------------------------------------


def test_another_disk_under_the_targets_name_is_refused_and_both_are_left_alone(volume: Volume) -> None:
    target = exchange(volume, noise(2))
    before = volume.mirror.read_bytes()
    refusal(volume)
    assert volume.target.read_bytes() == noise(2)
    assert volume.mirror.read_bytes() == before
    target.rename(volume.target)
    with volume.served() as served:
        assert served.log.read_text().count("copying") == 1  # when it was made
    volume.assert_equal_disks()


def test_a_blank_disk_under_the_targets_name_is_refused(volume: Volume) -> None:
    exchange(volume, bytes(SIZE_BYTES))
    refusal(volume)


def test_a_target_that_was_made_anew_after_an_orderly_stop_is_not_copied_over_its_mirror(lab: Lab) -> None:
    """The file says that it was written, so all of it would be copied: an empty disk over the only copy."""
    volume = lab.volume("vol", SIZE_BYTES, content=noise(1))
    with volume.served():
        pass
    exchange(volume, bytes(SIZE_BYTES))
    refusal(volume)
    repair = ["verify", "vol", "--repair", "--key-file", lab.key]
    lab.lockstep(*repair).failed(1, "does not seem to be the disk", "lockstep sync vol --all")
    assert volume.decrypted() == noise(1)
    lab.lockstep("sync", "vol", "--all").ok()
    with volume.served():
        pass
    volume.assert_equal_disks()


def test_a_whole_mirror_of_which_nothing_is_known_is_not_overwritten_with_a_blank_disk(lab: Lab) -> None:
    """The machine's disk and the target died together, say: the state directory is of yesterday, or in part."""
    volume = lab.volume("vol", SIZE_BYTES, content=noise(1))
    with volume.served():
        pass
    yesterday = shutil.copytree(lab.state, lab.home / "yesterday")
    with volume.served():
        pass
    target = exchange(volume, bytes(SIZE_BYTES))
    (intent,) = lab.state.rglob("*.intent")
    intent.unlink()
    refusal(volume)
    shutil.rmtree(lab.state)
    yesterday.rename(lab.state)
    refusal(volume)
    assert volume.decrypted() == noise(1)
    target.rename(volume.target)
    with volume.served():
        pass
    volume.assert_equal_disks()


@pytest.mark.parametrize("away", [False, True], ids=["there", "away"])
def test_a_target_file_that_was_put_back_does_not_take_its_mirror_along(lab: Lab, away: bool) -> None:
    """From a snapshot, say, with its times: what was written since is on the mirror alone."""
    volume = lab.volume("vol", SIZE_BYTES, content=noise(1))
    with volume.served():
        pass
    yesterday, elsewhere = lab.home / "yesterday", lab.home / "elsewhere"
    shutil.copy2(volume.target, yesterday)
    with volume.served() as served:
        write(served, "write -P 7 1M 64k", "write -P 8 0 64k")
    today = volume.decrypted()
    yesterday.rename(volume.target)
    if away:
        volume.mirror.rename(elsewhere)
        with volume.served(in_sync=False) as served:
            served.kill()
    with volume.served(in_sync=False) as served:
        if away:
            elsewhere.rename(volume.mirror)
        wait_until(lambda: "of an earlier day" in str(served.mirror()["error"]), "the mirror to be looked at")
    assert volume.decrypted() == today
    lab.lockstep("sync", "vol", "--all").ok()
    with volume.served():
        pass
    volume.assert_equal_disks()


@pytest.mark.parametrize("away", [False, True], ids=["there", "away"])
def test_a_machine_that_was_rolled_back_does_not_take_its_mirror_along(lab: Lab, away: bool) -> None:
    """State directory and target are of yesterday, and fit each other; what came since is on the mirror alone."""
    volume = lab.volume("vol", SIZE_BYTES, content=noise(1))
    with volume.served():
        pass
    state = shutil.copytree(lab.state, lab.home / "yesterday")
    target = lab.home / "yesterday.target"
    shutil.copy2(volume.target, target)
    with volume.served() as served:
        write(served, "write -P 7 1M 64k", "write -P 8 0 64k")
    today = volume.decrypted()
    shutil.rmtree(lab.state)
    state.rename(lab.state)
    target.rename(volume.target)
    elsewhere = lab.home / "elsewhere"
    if away:
        volume.mirror.rename(elsewhere)
    for _ in range(2):
        with volume.served(in_sync=False) as served:
            if elsewhere.exists():
                elsewhere.rename(volume.mirror)
            wait_until(lambda: "of an earlier day" in str(served.mirror()["error"]), "the mirror to be looked at")
    assert volume.decrypted() == today
    lab.lockstep("sync", "vol", "--all").ok()
    with volume.served():
        pass
    volume.assert_equal_disks()


def test_a_target_that_was_restored_in_part_is_refused(volume: Volume) -> None:
    exchange(volume, noise(1)[: 15 * MIB] + bytes(MIB))
    refusal(volume)


def test_what_the_refusal_advises_where_the_target_is_right(volume: Volume) -> None:
    exchange(volume, noise(2))
    refusal(volume)
    said = volume.lab.lockstep("sync", "vol", "--all").ok()
    assert "the next server copies all of it" in said
    with volume.served() as served:
        assert served.log.read_text().count(f"copying {SIZE_BYTES} bytes") == 2  # and when it was made
    volume.assert_equal_disks()


def test_verify_shows_what_differs_of_what_is_refused_and_copies_nothing(volume: Volume) -> None:
    exchange(volume, noise(2))
    verify = ["verify", "vol", "--key-file", volume.lab.key]
    volume.lab.lockstep(*verify).failed(3, "differ")
    volume.lab.lockstep(*verify, "--repair").failed(1, "does not seem to be the disk")
    assert volume.decrypted() == noise(1)


def test_a_mounted_device_is_served_without_its_mirror_until_all_is_copied(lab: Lab, loop: Callable[..., str]) -> None:
    """A block device does not say when it was written."""
    volume = lab.volume("vol", SIZE_BYTES, content=noise(1))
    target = volume.target
    device = loop(target)
    lab.lockstep("remove", "vol").ok()
    disks = ["--target", device, "--mirror", volume.mirror, "--key-file", lab.key, "--iter-time", "10", "--force"]
    lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
    with volume.served():
        pass
    with open(device, "r+b") as behind:  # as a mount does, to the superblock
        behind.seek(1024)
        behind.write(bytes(1024))
        os.fsync(behind.fileno())
    with volume.served(in_sync=False) as served:
        assert served.mirror_state() == "degraded"
        assert "lockstep sync vol --all" in served.mirror()["error"]
        assert "may not be the whole disk" in lab.lockstep("status", "vol").ok()  # it is: that of the last closing
        write(served, "write -P 7 1M 64k")
        lab.lockstep("sync", "vol", "--all", "--wait").ok()
        assert served.mirror_state() == "in-sync"
    volume.assert_equal_disks()


def test_a_mirror_that_alone_differs_is_set_aside(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES, content=noise(1))
    second = lab.home / "second"
    quick = ["--key-file", lab.key, "--iter-time", "10"]
    lab.lockstep("mirror", "add", "vol", second, *quick, environment=lab.quick_format()).ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: all(each["state"] == "in-sync" for each in served.now()["mirrors"]), "both in sync")
    with second.open("r+b") as behind:
        behind.seek(16 * MIB)
        behind.write(noise(3))
    with volume.served(in_sync=False) as served:
        mine, others = served.now()["mirrors"]
        assert mine["state"] == "in-sync"
        assert others["state"] == "degraded"
        assert "places where the two were equal" in others["error"]


def test_two_targets_whose_names_were_exchanged_are_told_apart(volume: Volume) -> None:
    other = volume.lab.volume("other", SIZE_BYTES, content=noise(4))
    with other.served():
        pass
    kept = exchange(volume, b"")
    other.target.rename(volume.target)
    kept.rename(other.target)
    refusal(volume)
    volume.lab.lockstep("set", "vol", f"target={volume.mirror}").failed(1, "mirror")
    volume.lab.lockstep("set", "vol", f"target={other.target}").failed(1, "target")
    for name, there in (("one", other.target), ("two", volume.target)):
        there.with_name(name).symlink_to(there)
    volume.lab.lockstep("set", "vol", f"target={there.with_name('one')}").ok()
    volume.lab.lockstep("set", "other", f"target={there.with_name('two')}").ok()
    for each, there in ((volume, other.target), (other, volume.target)):
        with each.served() as served:
            assert served.mirror_state() == "in-sync"
            volume.lab.lockstep("set", each.name, f"target={there}").failed(1, "is being served")
        Volume(volume.lab, each.name, there, each.mirror, None).assert_equal_disks()


def test_what_is_advised_where_the_target_is_a_copy_of_what_it_was(volume: Volume) -> None:
    """Some hundred places do not tell of a few bytes."""
    copy = exchange(volume, noise(1))
    with copy.open("r+b") as behind:
        behind.seek(5 * MIB)
        behind.write(bytes(4096))
    said = volume.lab.lockstep("set", "vol", f"target={copy}").ok()
    advised = "lockstep sync vol --all --checksum"
    assert advised in said
    volume.lab.lockstep(*advised.split()[1:]).ok()
    with volume.served():
        pass
    Volume(volume.lab, "vol", copy, volume.mirror, None).assert_equal_disks()


def test_a_mirror_that_hangs_when_it_is_compared_does_not_keep_the_target_from_being_served(volume: Volume) -> None:
    program = (
        "import threading, lockstep.cli.main as cli, lockstep.service.mirror_session as session\n"
        "session.OPENING_PATIENCE_S, session.spot_check = 0.2, lambda *_, **__: threading.Event().wait()\n"
        "cli.main()"
    )
    with volume.served(program=program, in_sync=False) as served:
        assert "it did not answer for 0.2 s" in served.mirror()["error"]
        write(served, "write -P 7 1M 64k")
    with volume.served():
        pass
    volume.assert_equal_disks()


# --- when a mirror comes back -----------------------------------------------------------------------------


def test_a_mirror_that_was_away_is_not_overwritten_with_another_disk(volume: Volume) -> None:
    exchange(volume, noise(2))
    away = volume.mirror.rename(volume.mirror.with_name("away"))
    before = away.read_bytes()
    with volume.served(in_sync=False) as served:
        write(served, "write -P 7 1M 64k")
        away.rename(volume.mirror)
        wait_until(lambda: "places where the two were equal" in served.mirror()["error"], "the mirror to be looked at")
    assert volume.mirror.read_bytes() == before


@pytest.mark.parametrize("then", ["back", "killed", "stopped"])
@pytest.mark.parametrize("known", ["a target that was written since", "nothing"])
def test_a_mirror_that_is_away_when_the_target_is_made_anew_is_not_overwritten(lab: Lab, then: str, known: str) -> None:
    """After an orderly stop: all of it is to be copied, and there is no mirror to compare at the start."""
    volume = lab.volume("vol", SIZE_BYTES, content=noise(1))
    with volume.served():
        pass
    if known == "nothing":
        (intent,) = lab.state.rglob("*.intent")
        intent.unlink()
    exchange(volume, bytes(SIZE_BYTES))
    away = volume.mirror.rename(volume.mirror.with_name("away"))
    with volume.served(in_sync=False) as served:
        write(served, "write -P 7 1M 64k")
        if then == "back":
            away.rename(volume.mirror)
            wait_until(lambda: "places where the two were equal" in served.mirror()["error"], "the mirror to be seen")
        elif then == "killed":
            served.kill()
    if then != "back":
        away.rename(volume.mirror)
        refusal(volume)
    assert volume.decrypted() == noise(1)
    lab.lockstep("sync", "vol", "--all").ok()
    with volume.served():
        pass
    volume.assert_equal_disks()


def test_a_mirror_that_is_away_when_the_target_file_is_written_is_given_all_of_it(lab: Lab) -> None:
    """And another that is away when it is to be copied to for the first time."""
    volume = lab.volume("vol", SIZE_BYTES, content=noise(1))
    for content in (noise(1), noise(1)[: 7 * MIB] + noise(2, MIB) + noise(1)[8 * MIB :]):
        volume.target.write_bytes(content)
        away = volume.mirror.rename(volume.mirror.with_name("away"))
        for _ in range(2):
            with volume.served(in_sync=False) as served:
                write(served, "write -P 7 1M 64k")
        with volume.served(in_sync=False) as served:
            away.rename(volume.mirror)
            wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be back")
        volume.assert_equal_disks()


def test_a_mirror_that_was_found_to_differ_is_not_taken_back_because_other_places_are_looked_at(volume: Volume) -> None:
    place = 5 * MIB
    with volume.target.open("r+b") as behind:
        behind.seek(place)
        behind.write(bytes(4096))
    program = (
        "import lockstep.cli.main as cli, lockstep.volume.spot_check as check\n"
        "ends = range(0, 65536, 4096)\n"
        f"places = iter([(*ends, {place})])\n"
        "check._pieces = lambda *_: next(places, ends)\n"
        "cli.main()"
    )
    with volume.served(program=program, in_sync=False) as served:
        write(served, f"write -P 7 {place + (64 << 10)} 64k")  # which marks that place as well
        volume.lab.lockstep("sync", "vol").ok()
        wait_until(lambda: not served.mirror()["sought"], "the mirror to be looked at again")
        assert "places where the two were equal" in served.mirror()["error"]
        volume.lab.lockstep("sync", "vol", "--all", "--wait").ok()
    volume.assert_equal_disks()


def test_a_mirror_comes_back_though_clients_write_all_the_time(volume: Volume) -> None:
    away = volume.mirror.rename(volume.mirror.with_name("away"))
    with volume.served(in_sync=False) as served:
        write(served, "write -P 7 0 128k", "write -P 8 5M 3M")
        away.rename(volume.mirror)
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be back")
    volume.assert_equal_disks()


def test_sync_all_is_refused_while_a_new_target_is_filled(volume: Volume) -> None:
    volume.target.unlink()
    volume.lab.lockstep("replace-target", "vol", volume.target, "--key-file", volume.lab.key).ok()
    volume.lab.lockstep("sync", "vol", "--all").failed(1, "still being filled")


# --- the check itself -------------------------------------------------------------------------------------


@pytest.fixture
def disks(volume: Volume) -> tuple[PlainDisk, EncryptedDisk]:
    """The two, open."""
    target = PlainDisk.claim(inspect(str(volume.target)))
    header = luks.read_header(str(volume.mirror))
    mirror = open_mirror(str(volume.mirror), None, header, Unlock(lambda: PASSPHRASE), SIZE_BYTES, writable=True)
    return target, mirror


def marks(*regions: int) -> bytes:
    """A map of the regions in which they may differ."""
    found = bytearray(SIZE_BYTES // region_bytes_for(SIZE_BYTES))
    for region in regions:
        found[region] = 1
    return bytes(found)


def test_what_is_marked_is_not_compared(disks: tuple[PlainDisk, EncryptedDisk]) -> None:
    target, mirror = disks
    target.write(0, bytes(4096))
    assert spot_check(target, mirror, lambda: marks(0)).differing == 0
    assert spot_check(target, mirror, marks).differing == 1
    assert spot_check(target, mirror, lambda: b"\1" * len(marks())) == SpotCheck(0, ())


def test_what_is_written_meanwhile_is_not_held_against_it(disks: tuple[PlainDisk, EncryptedDisk]) -> None:
    target, mirror = disks
    target.write(0, bytes(4096))
    asked = iter([marks(), marks(0)])
    assert spot_check(target, mirror, lambda: next(asked)).differing == 0


def test_what_differed_before_does_so_until_it_is_seen_to_be_equal(disks: tuple[PlainDisk, EncryptedDisk]) -> None:
    target, mirror = disks
    place, everything = 5 * MIB, b"\1" * len(marks())
    assert spot_check(target, mirror, lambda: everything, [place]) == SpotCheck(1, ())
    target.write(place, bytes(4096))
    assert spot_check(target, mirror, lambda: everything, [place]) == SpotCheck(1, (place,))
    os.ftruncate(target._fd, place)  # it cannot be read
    assert spot_check(target, mirror, marks, [place]) == SpotCheck(1, (place,))


def test_pieces_that_hold_nothing_tell_nothing(disks: tuple[PlainDisk, EncryptedDisk]) -> None:
    target, mirror = disks
    target.write(0, bytes(SIZE_BYTES))
    mirror.zero(0, SIZE_BYTES)
    assert spot_check(target, mirror, marks) == SpotCheck(0, ())
    target.write(8192, b"x" * 4096)
    assert spot_check(target, mirror, marks) == SpotCheck(1, (8192,))


def test_a_disk_that_cannot_be_read_ends_it(
    disks: tuple[PlainDisk, EncryptedDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, mirror = disks
    left = iter([None, None])

    def read(offset: int, into: memoryview) -> None:
        if next(left, False) is False:
            raise OSError(5, "a bad sector")
        EncryptedDisk.read(mirror, offset, into)

    monkeypatch.setattr(mirror, "read", read)
    assert spot_check(target, mirror, marks) == SpotCheck(2, ())


def test_a_disk_that_is_too_slow_ends_it(
    disks: tuple[PlainDisk, EncryptedDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, mirror = disks
    now_s = itertools.count(0, 2)
    monkeypatch.setattr("lockstep.volume.spot_check.time", SimpleNamespace(monotonic=lambda: next(now_s)))
    assert spot_check(target, mirror, marks) == SpotCheck(2, ())
