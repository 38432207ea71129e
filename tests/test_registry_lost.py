"""A registry that is deleted while its volumes are served: nobody takes the state directory for a new one."""

import json
import time
from pathlib import Path

import pytest

from lockstep.errors import RegistryLost
from tests.lab import MIB, Lab, Served, needs, wait_until, write


def lost(lab: Lab, found: str) -> tuple[str, ...]:
    error = RegistryLost(registry=lab.state / "registry.db", path=lab.state, found=found)
    return str(error), error.likely_cause, error.advice


def mark_of(lab: Lab, kind: str) -> str:
    (found,) = (path for path in (lab.state / kind).iterdir())
    return f"{kind}/{found.name}"


COMMANDS = (
    ("list",),
    ("status",),
    ("grants",),
    ("audit",),
    ("grant", "vol", "alice"),
    ("serve", "vol", "--key-file", "/dev/null"),
)


def test_what_is_served_goes_on_and_what_happens_is_on_record_when_the_registry_is_back(lab: Lab) -> None:
    volume = lab.volume("vol", MIB)
    registry, aside = lab.state / "registry.db", lab.home / "aside"
    with volume.served() as served:
        registry.rename(aside)
        mark = mark_of(lab, "held") if list((lab.state / "held").iterdir()) else mark_of(lab, "intent")
        create = ("create", "vol", "--target", lab.disk("another", MIB))
        for command in (*COMMANDS, create, ("attach", "vol")):
            lab.lockstep(*command).failed(1, *lost(lab, mark))
        assert "is not attached" in lab.lockstep("detach", "vol").ok()
        write(served, "write -P 7 0 64k")  # its client is worth a row
        wait_until(lambda: is_unaccounted(served), "the server to miss the audit trail")
        write(served, "write -P 8 64k 64k")
        assert volume.target.read_bytes()[: 128 << 10] == b"\7" * (64 << 10) + b"\10" * (64 << 10)
        assert not registry.exists(), "neither a command nor the server has made another one"
        aside.rename(registry)
        wait_until(lambda: not is_unaccounted(served) and served.mirror_state() == "in-sync", "all to be well again")
    assert not aside.exists()
    volume.assert_equal_disks()
    rows = [json.loads(line) for line in lab.lockstep("audit", "vol", "--json").ok().splitlines()]
    assert sum(row["event"] == "connect" for row in rows) >= 2
    lab.lockstep("audit", "--check").ok()


def test_what_waited_for_the_registry_has_the_time_at_which_it_happened(lab: Lab) -> None:
    volume = lab.volume("vol", MIB)
    registry, aside = lab.state / "registry.db", lab.home / "aside"
    with volume.served() as served:
        registry.rename(aside)
        began_s = time.time()
        write(served, "write -P 7 0 64k")
        ended_s = time.time()
        wait_until(lambda: is_unaccounted(served), "the server to miss the audit trail")
        wait_until(lambda: time.time() > ended_s + 2, "some time to pass")
        aside.rename(registry)
        wait_until(lambda: not is_unaccounted(served), "the rows to be written")
    rows = [json.loads(line) for line in lab.lockstep("audit", "vol", "--json").ok().splitlines()]
    came = [row["at"] / 1e6 for row in rows if row["event"] == "connect"]
    assert began_s <= came[-1] <= ended_s
    lab.lockstep("audit", "--check").ok()


def is_unaccounted(served: Served) -> bool:
    return "the audit trail cannot be written" in (served.mirror()["error"] or "")


def test_a_server_that_ends_without_the_registry_makes_none(lab: Lab) -> None:
    with lab.volume("vol", MIB).served():
        (lab.state / "registry.db").unlink()
    assert not (lab.state / "registry.db").exists()


@pytest.mark.parametrize("emptied", [False, True])
def test_the_advice_can_be_followed(lab: Lab, emptied: bool) -> None:
    volume = lab.volume("vol", MIB, content=b"content" * 512)
    with volume.served():
        pass
    (lab.state / "registry.db").unlink()
    if emptied:
        (lab.state / "registry.db").touch()
    lab.lockstep("list").failed(1, "was used before")
    lab.state.rename(lab.home / "away")
    lab.lockstep("create", "vol", "--target", volume.target).ok()
    lab.lockstep("mirror", "add", "vol", volume.mirror, "--adopt", "--key-file", lab.key).ok()
    with volume.served():
        pass
    volume.assert_equal_disks()


def test_the_advice_does_not_lose_the_mirror_where_the_target_is_lost_as_well(lab: Lab) -> None:
    volume = lab.volume("vol", MIB, content=b"content" * 512)
    with volume.served():
        pass
    content = volume.target.read_bytes()
    volume.target.unlink()
    (lab.state / "registry.db").unlink()
    said = lab.lockstep("serve", "vol", "--key-file", lab.key).failed(1, "was used before")
    assert "If a target is lost as well, first `lockstep restore MIRROR PATH`" in said
    lab.state.rename(lab.home / "away")
    said = lab.lockstep("create", "vol", "--target", volume.target).failed(1, "There is no disk")
    assert f"comes back from its mirror: `lockstep restore MIRROR {volume.target}`" in said
    lab.lockstep("restore", volume.mirror, volume.target, "--key-file", lab.key).ok()
    lab.lockstep("create", "vol", "--target", volume.target).ok()
    lab.lockstep("mirror", "add", "vol", volume.mirror, "--adopt", "--key-file", lab.key).ok()
    with volume.served():
        pass
    assert volume.target.read_bytes() == content
    volume.assert_equal_disks()


@pytest.mark.parametrize("prepared", ["", "run", "tls/server-key.pem", "run/other.sock", "header"])
def test_a_new_state_directory_takes_no_ceremony(lab: Lab, prepared: str) -> None:
    """Whatever else is kept there: `tls init`, a header, a directory that systemd has made, another server's socket."""
    place = lab.state / prepared
    place.parent.mkdir(parents=True, exist_ok=True)
    if Path(prepared).suffix:
        place.touch()
    else:
        place.mkdir(exist_ok=True)
    assert "There are no volumes" in lab.lockstep("list").ok()


def test_volumes_that_were_all_removed_leave_a_registry_behind(lab: Lab) -> None:
    volume = lab.volume("vol", MIB)
    with volume.served():
        pass
    lab.lockstep("remove", "vol").ok()
    assert "There are no volumes" in lab.lockstep("list").ok()
    lab.lockstep("create", "again", "--target", volume.target).ok()


@needs("nbdfuse", "losetup", "/dev/fuse", root=True)
def test_a_device_is_let_go_whatever_the_registry_is(lab: Lab) -> None:
    volume, registry = lab.volume("vol", MIB), lab.state / "registry.db"
    with volume.served():
        device = lab.lockstep("attach", "vol").ok().strip()
        sound = registry.read_bytes()
        registry.write_bytes(b"no database" * 1000)
        lab.lockstep("list").failed(1, "is not a sound registry")
        assert lab.lockstep("detach", "vol").ok() == f"Detached {device}.\n"
        registry.write_bytes(sound)
