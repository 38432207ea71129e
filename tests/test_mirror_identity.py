"""D2, P3, P4: a mirror is the one that was opened, as it was left, and where somebody would look for it."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.crypto import luks
from tests.lab import MIB, Lab, Served, Volume, is_root, needs, run, wait_until, write

pytestmark = needs("qemu-io")

SIZE_BYTES = 16 * MIB


def older_copy(volume: Volume) -> Path:
    """A copy of the mirror as it was before the last write."""
    old = volume.mirror.with_name("old")
    with volume.served() as served:
        write(served, "write -P 1 0 1M")
    shutil.copyfile(volume.mirror, old)
    with volume.served() as served:
        write(served, "write -P 2 4M 1M")
    return old


def state_of(volume: Volume) -> str:
    """What the mirror says of itself."""
    token = luks.read_header(str(volume.mirror)).token
    assert token is not None
    return token.state


def await_degraded(served: Served, why: str) -> None:
    """Wait for the server to see what has become of the mirror."""
    wait_until(lambda: why in (served.mirror()["error"] or ""), f"the mirror to be degraded: {why}")


def test_an_older_copy_that_takes_the_mirrors_place_is_copied_to_as_a_whole(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    old = older_copy(volume)
    with volume.served() as served:
        write(served, "write -P 3 8M 1M")
        old.rename(volume.mirror)
        await_degraded(served, "leads to another file by now")
        write(served, "write -P 4 9M 1M")
        wait_until(lambda: served.mirror_state() == "in-sync", "the copy to be brought in sync")
        assert f"copying {SIZE_BYTES} bytes" in served.log.read_text()
    volume.assert_equal_disks()


def test_an_older_copy_with_little_in_common_is_set_aside_and_keeps_no_target_from_being_served(lab: Lab) -> None:
    """Nobody but the administrator knows which of the two is of the right day; the clients' disk is there."""
    volume = lab.volume("vol", SIZE_BYTES, content=os.urandom(SIZE_BYTES))
    old = older_copy(volume)
    with volume.served() as served:
        write(served, "write -P 3 0 16M")
    old.rename(volume.mirror)
    with volume.served(in_sync=False) as served:
        await_degraded(served, "another disk than before")
        write(served, "write -P 4 0 1M")
        served.stop()
    lab.lockstep("sync", "vol", "--all").ok()
    with volume.served():
        pass
    volume.assert_equal_disks()


def test_an_older_copy_that_is_followed_is_the_newer_one_from_then_on(lab: Lab) -> None:
    """Else `replace-target` would take the one that was left behind, and refuse the one that is in sync."""
    volume = lab.volume("vol", SIZE_BYTES)
    old, left_behind = older_copy(volume), volume.mirror.with_name("left-behind")
    for _ in range(3):
        with volume.served():
            pass
    with volume.served() as served:
        volume.mirror.rename(left_behind)
        old.rename(volume.mirror)
        await_degraded(served, "leads to another file by now")
        wait_until(lambda: served.mirror_state() == "in-sync", "the copy to be brought in sync")
        served.stop()
    volume.target.unlink()
    newer = volume.mirror.rename(lab.home / "newer")
    left_behind.rename(volume.mirror)
    lab.lockstep("replace-target", "vol", lab.home / "new", "--key-file", lab.key).failed(1, "older copy")
    newer.rename(volume.mirror)
    lab.lockstep("replace-target", "vol", lab.home / "new", "--key-file", lab.key).ok()


def test_an_older_copy_that_is_not_noticed_before_the_end_is_not_vouched_for(lab: Lab) -> None:
    """The path is looked at each second; a server that stops before that must not give it the new generation."""
    volume = lab.volume("vol", SIZE_BYTES)
    old = older_copy(volume)
    with volume.served() as served:
        write(served, "write -P 3 8M 1M")
        old.rename(volume.mirror)
        served.stop()
    with volume.served() as served:
        assert f"copying {SIZE_BYTES} bytes" in served.log.read_text()
    volume.assert_equal_disks()


@pytest.mark.parametrize("which", ["mirror", "header"])
def test_a_copy_of_the_mirror_as_it_is_served_is_not_vouched_for(lab: Lab, which: str) -> None:
    """It has the generation that the server gave, and lacks what was written since it was made."""
    volume = lab.volume("vol", SIZE_BYTES, header=which == "header")
    copy = volume.mirror.with_name("copy")
    with volume.served() as served:
        write(served, "write -P 3 8M 1M")
        shutil.copyfile(volume.mirror, copy)
        write(served, "write -P 4 9M 1M")
        copy.rename(volume.mirror)
        served.stop()
    with volume.served():
        pass
    volume.assert_equal_disks()


@pytest.mark.skipif(not is_root(), reason="root acts on behalf of users here")
def test_an_older_copy_of_a_frozen_mirror_is_not_called_frozen_after_a_crash(lab: Lab) -> None:
    """It has what was written before and after, and lacks what is held: it never was the disk, at no moment."""
    volume = lab.volume("vol", SIZE_BYTES)
    old = older_copy(volume)

    def says(state: str) -> None:
        wait_until(lambda: state_of(volume) == state, f"the mirror to say that it is {state}")

    with volume.served() as served:
        run("qemu-io", "-f", "raw", "-c", "write -P 5 8M 1M", served.uri.replace("///vol", "///vol%40mallory"))
        says("frozen")
        old.rename(volume.mirror)
        await_degraded(served, "leads to another file by now")
        wait_until(lambda: served.mirror_state() == "behind", "the copy to have all but what is held")
        write(served, "write -P 6 12M 1M")
        says("behind")
        served.kill()
    with volume.served(in_sync=False) as served:
        assert not served.mirror()["consistent"]
    volume.restore(lab.home / "output").failed(1, "incomplete")


@pytest.mark.skipif(not is_root(), reason="root acts on behalf of users here")
def test_a_copy_from_before_the_mirror_froze_is_not_called_frozen(lab: Lab) -> None:
    """It was made while the mirror was served, and lacks what was written until that froze: it was the disk before."""
    volume = lab.volume("vol", SIZE_BYTES)
    copy = volume.mirror.with_name("copy")
    with volume.served() as served:
        write(served, "write -P 3 8M 1M")
        shutil.copyfile(volume.mirror, copy)
        write(served, "write -P 4 8M 1M")
        run("qemu-io", "-f", "raw", "-c", "write -P 5 4M 1M", served.uri.replace("///vol", "///vol%40mallory"))
        wait_until(lambda: state_of(volume) == "frozen", "the mirror to say that it is frozen")
        copy.rename(volume.mirror)
        await_degraded(served, "leads to another file by now")
        wait_until(lambda: served.mirror_state() == "behind", "the copy to be followed, with all but what is held")
        assert not served.mirror()["consistent"]
        assert not served.mirror()["dirty_bytes"]
    assert volume.decrypted()[8 * MIB : 9 * MIB] == b"\x04" * MIB
    volume.restore(lab.home / "output").failed(1, "incomplete")


def test_what_was_written_over_the_mirror_is_found_when_its_header_is_due(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    old = older_copy(volume)
    with volume.served() as served:
        write(served, "write -P 3 8M 1M")
        with volume.mirror.open("r+b") as mirror:
            mirror.write(old.read_bytes())
    with volume.served():
        pass
    volume.assert_equal_disks()


def test_another_volumes_mirror_is_not_given_this_ones_token(lab: Lab) -> None:
    volume, other = lab.volume("vol", SIZE_BYTES), lab.volume("other", SIZE_BYTES)
    before = other.mirror.read_bytes()
    aside = volume.mirror.with_name("aside")
    with volume.served() as served:
        write(served, "write -P 3 8M 1M")
        volume.mirror.rename(aside)
        other.mirror.rename(volume.mirror)
        await_degraded(served, "leads to another file by now")
        write(served, "write -P 4 9M 1M")
    assert volume.mirror.read_bytes() == before
    volume.mirror.rename(other.mirror)
    aside.rename(volume.mirror)
    with volume.served():
        pass
    volume.assert_equal_disks()


@pytest.mark.parametrize("which", ["mirror", "header"])
def test_a_mirror_that_nobody_could_find_is_not_called_in_sync(lab: Lab, which: str) -> None:
    volume = lab.volume("vol", SIZE_BYTES, header=which == "header")
    lost = volume.header if which == "header" else volume.mirror
    assert lost is not None
    aside = lost.with_name("aside")
    with volume.served() as served:
        write(served, "write -P 3 8M 1M")
        lost.rename(aside)
        await_degraded(served, "leads to another file by now, or to none")
        write(served, "write -P 4 9M 1M")
        aside.rename(lost)
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be back")
    volume.assert_equal_disks()


def test_what_keeps_a_mirror_from_coming_back_is_told(lab: Lab) -> None:
    volume, new = lab.volume("vol", SIZE_BYTES), lab.home / "new"
    new.write_bytes(b"another passphrase")
    with volume.served() as served:
        keys = ("--key-file", lab.key, "--new-key-file", new, "--iter-time", "10")
        lab.lockstep("key", "change", "vol", *keys, environment=lab.quick_format()).ok()
        away = volume.mirror.rename(volume.mirror.with_name("away"))
        await_degraded(served, "leads to another file by now")
        away.rename(volume.mirror)
        await_degraded(served, "No key slot of")


def test_a_target_whose_path_leads_elsewhere_is_reported(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    aside = volume.target.with_name("aside")
    with volume.served() as served:
        volume.target.rename(aside)
        wait_until(lambda: served.now()["target"]["error"] is not None, "the target to be missed")
        assert "Put the right one back" in served.now()["target"]["error"]
        aside.rename(volume.target)
        wait_until(lambda: served.now()["target"]["error"] is None, "the target to be found again")


def test_what_a_mirror_says_of_itself_is_nothing_that_a_terminal_obeys(lab: Lab) -> None:
    """Its token is not authenticated."""
    volume = lab.volume("vol", MIB)
    volume.copy_by_hand()
    header = luks.read_header(str(volume.mirror))
    assert header.token is not None
    token = replace(header.token, volume_name="\x1b]0;owned\x07")
    luks.write_token(str(volume.mirror), token, token_id=header.token_id)
    assert "Restored 1.0 MiB of \\x1b]0;owned\\x07 to" in volume.restore(lab.home / "output").ok()
    luks.write_token(str(volume.mirror), replace(token, volume_id="another"), token_id=header.token_id)
    lab.lockstep("serve", "vol", "--key-file", lab.key).failed(1, "the volume \\x1b]0;owned\\x07.")


def test_what_a_header_says_is_no_line_of_the_log(lab: Lab) -> None:
    volume, other = lab.volume("vol", MIB), lab.volume("other", MIB)
    header = luks.read_header(str(other.mirror))
    assert header.token is not None
    forged = replace(header.token, volume_name="x\n\x1b[31mforged")
    luks.write_token(str(other.mirror), forged, token_id=header.token_id)
    with volume.served() as served:
        os.replace(other.mirror, volume.mirror)
        wait_until(lambda: "forged" in served.log.read_text(), "the server to meet the other mirror")
    assert "the volume x\\n\\x1b[31mforged" in served.log.read_text()
