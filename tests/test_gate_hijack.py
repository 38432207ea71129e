"""A hijacked account: without the right it overwrites the whole target with noise. The mirror still has the data."""

import json
import random
from pathlib import Path

import pytest

from tests.lab import MIB, Lab, Served, Volume, is_root, run, wait_until

pytestmark = pytest.mark.skipif(not is_root(), reason="root acts on behalf of users here")

SIZE = 4 * MIB


def overwrite(served: Served, user: str, path: Path) -> None:
    """Copy a file over the whole disk, as this user."""
    uri = served.uri.replace("///vol", f"///vol%40{user}")
    run("nbdcopy", "--flush", str(path), uri)


def test_what_a_hijacked_account_writes_never_reaches_the_mirror_by_itself(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE)
    good, noise = lab.home / "good", lab.home / "noise"
    good.write_bytes(random.Random(1).randbytes(SIZE))
    noise.write_bytes(random.Random(2).randbytes(SIZE))
    volume.grant("alice")

    with volume.served() as served:
        overwrite(served, "alice", good)
        volume.assert_equal_disks()
        overwrite(served, "mallory", noise)
        status = served.mirror()
        assert (status["state"], status["held_bytes"], status["consistent"]) == ("behind", SIZE, True)
        assert [each["user"] for each in status["held"]] == ["mallory"]
        wait_until(lambda: "denied" in what_mallory_did(lab), "the trail to tell of it")
        served.kill()
    keeps(volume, good, "a crash")

    with volume.served(in_sync=False) as served:
        wait_until(lambda: served.mirror()["state"] == "behind", "the restarted server to leave it alone")
        lab.lockstep("sync", "vol", "--wait").failed(3, "is behind")
        volume.grant("mallory")  # a right that is given afterwards does not release what came before
        wait_until(lambda: "mallory" in lab.lockstep("whocan", "vol").ok(), "the grant")
        served.stop()
    keeps(volume, good, "a restart, a sync and a grant")

    for record in (lab.state / "held").iterdir():
        record.unlink()
    lab.lockstep("revoke", "vol", "mallory").ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: served.mirror()["held_bytes"] == SIZE, "all of the disk to wait for a release")
        served.stop()
    keeps(volume, good, "the loss of the records")

    assert "denied" in what_mallory_did(lab)
    assert volume.target.read_bytes() == noise.read_bytes()


def test_a_mirror_that_was_away_is_not_in_sync_when_the_record_of_what_is_held_is_lost(lab: Lab) -> None:
    """It cannot tell of anything that is held; but a mirror that was served has such a record."""
    volume = lab.volume("vol", SIZE)
    noise, away = lab.home / "noise", volume.mirror.with_suffix(".away")
    noise.write_bytes(random.Random(2).randbytes(SIZE))
    with volume.served() as served:
        volume.mirror.rename(away)
        wait_until(lambda: served.mirror_state() == "degraded", "the mirror to be missed")
        overwrite(served, "mallory", noise)
        served.kill()
    for record in (lab.state / "held").iterdir():
        record.unlink()
    assert "something is held" in lab.lockstep("mirror", "add", "vol", lab.home / "other", "--key-file", lab.key).err
    with volume.served(in_sync=False) as served:
        assert served.mirror()["held_bytes"] == SIZE
        away.rename(volume.mirror)
        lab.lockstep("sync", "vol", "--wait").failed(3, "is behind")
        served.stop()
    assert not any(volume.decrypted())


def test_a_frozen_mirror_stays_frozen_where_the_target_is_changed_while_nobody_serves_it(lab: Lab) -> None:
    """As by somebody who looks at what the account has done: a mount replays the journal."""
    good = random.Random(1).randbytes(SIZE)
    volume = lab.volume("vol", SIZE, content=good)
    volume.grant("alice")
    with volume.served() as served:
        uri = served.uri.replace("vol?", "vol%40mallory?")
        run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", "-c", "flush", uri)
    with volume.target.open("r+b") as target:
        target.seek(2 * MIB)
        target.write(bytes(4096))
    assert json.loads(lab.lockstep("status", "vol", "--json").ok())["volumes"][0]["mirrors"][0]["consistent"]
    with volume.served(in_sync=False) as served:
        lab.lockstep("sync", "vol", "--wait").failed(3, "is behind")
        assert served.mirror()["consistent"]
    output = lab.home / "output"
    assert "frozen" in volume.restore(output, "--json").ok()
    assert output.read_bytes() == good
    with volume.served(in_sync=False) as served:
        lab.lockstep("sync", "vol", "--include-held", "--wait").ok()
    volume.assert_equal_disks()


def test_a_frozen_mirror_of_which_all_is_to_be_copied_is_not_the_disk_of_any_moment(lab: Lab) -> None:
    """Somebody has found that it is wrong; but what is held stays away from it all the same."""
    volume = lab.volume("vol", SIZE, content=random.Random(1).randbytes(SIZE))
    noise = lab.home / "noise"
    noise.write_bytes(random.Random(2).randbytes(64 << 10))
    before = volume.target.read_bytes()
    with volume.served() as served:
        overwrite(served, "mallory", noise)
        assert served.mirror()["consistent"]
        with volume.mirror.open("r+b") as rotten:
            rotten.seek(18 * MIB)
            rotten.write(bytes(MIB))
        lab.lockstep("sync", "vol", "--all", "--wait").failed(3, "65536 bytes of it are held")
        mirror = served.mirror()
        assert (mirror["consistent"], mirror["dirty_bytes"], mirror["held_bytes"]) == (False, 0, 64 << 10)
    assert volume.decrypted() == before


def what_mallory_did(lab: Lab) -> set[str]:
    rows = lab.lockstep("audit", "vol", "--user", "mallory", "--json").ok().splitlines()
    return {json.loads(row)["event"] for row in rows}


def keeps(volume: Volume, good: Path, after: str) -> None:
    """A restore from the mirror gives the data from before."""
    output = volume.lab.home / "output"
    output.unlink(missing_ok=True)
    incomplete = ["--incomplete"] if "records" in after else []
    said = volume.restore(output, *incomplete).ok()
    assert output.read_bytes() == good.read_bytes(), f"the mirror has lost the data after {after}"
    assert incomplete or "frozen" in said or "froze" in said
    last = json.loads(volume.lab.lockstep("audit", "vol", "--json").ok().splitlines()[-1])
    assert (last["event"], last["user"]) == ("restore", "root")
