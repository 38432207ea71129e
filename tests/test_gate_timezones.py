"""Time zones that this machine does not know, its tzdata being older than another's, or whose name it cannot tell."""

import importlib.resources
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfoNotFoundError

import pytest
import tzlocal

from lockstep.cli import granting
from lockstep.errors import LockstepError, TimezoneNameless
from lockstep.registry import windows
from lockstep.registry.access import ANYBODY, Grant, decide
from lockstep.registry.windows import Schedule, parse
from tests.lab import MIB, Lab, needs, run, wait_until
from tests.nbd_client import Client
from tests.test_nbd_identity import users

ZONE = "Land/Newly_Named"


def rules(zone: str) -> bytes:
    return importlib.resources.files("tzdata").joinpath("zoneinfo", zone).read_bytes()


def elsewhere(lab: Lab, *arguments: str) -> None:
    """Run a command as on a machine that knows the zone."""
    zone = lab.home / "zoneinfo" / ZONE
    zone.parent.mkdir(parents=True, exist_ok=True)
    zone.write_bytes(rules("UTC"))
    environment = {"PYTHONTZPATH": str(lab.home / "zoneinfo")}
    Lab.lockstep(lab, *arguments, "--timezone", ZONE, environment=environment).ok()  # a process of its own


def test_nothing_is_open_in_a_zone_that_nobody_knows() -> None:
    nights, week = (parse("daily 22:00-06:00"),), (parse("daily 00:00-24:00"),)
    for found in (nights, week):
        ada = Grant("ada", found, ZONE)
        closed = decide("ada", "vm1", [ada], 0)
        assert (closed.kind, closed.until_s) == ("outside-window", None)
        assert ZONE in closed.reason
        assert "tzdata" in closed.reason
    everybody = Grant(ANYBODY, nights, "Europe/Berlin")
    joined = decide("ada", "vm1", [ada, everybody], 12 * 3600)
    assert joined.until_s == windows.next_change(nights, "Europe/Berlin", 12 * 3600)
    assert "22:00 (Europe/Berlin)" in joined.reason
    assert decide("ada", "vm1", [ada, everybody], 23 * 3600).allowed
    assert decide("ada", "vm1", [Grant("ada", (), ZONE)], 0).allowed, "without a window no clock is asked"
    assert Schedule(nights[0], ZONE).open_until(23 * 3600) is None


@needs("qemu-io", root=True)
def test_a_volume_is_served_although_a_grant_has_a_zone_that_is_not_known(lab: Lab) -> None:
    volume = lab.volume("vol", 2 * MIB, content=b"before")
    elsewhere(lab, "grant", "vol", "alice", "--window", "daily 00:00-24:00")
    elsewhere(lab, "set", "vol", "scrub=sun 03:00-06:00")
    assert f"{ZONE} (unknown here)" in lab.lockstep("grants", "vol").ok()
    listed = json.loads(lab.lockstep("grants", "vol", "--json").ok())["grants"]
    (row,) = [row for row in listed if row["user"] == "alice"]
    assert (row["allowed_now"], row["next_change"]) == (False, None)
    assert ZONE in lab.lockstep("whocan", "vol").ok()
    with volume.served() as served:  # the first copy goes to its end
        alices = served.uri.replace("///vol?", "///vol%40alice?")
        assert "wrote 4096/4096" in run("qemu-io", "-f", "raw", "-c", "write -P 7 64k 4k", alices)
        assert [each["kind"] for each in served.mirror()["held"]] == ["outside-window"]
        assert users(served) == []
        lab.lockstep("grant", "vol", "alice", "--window", "daily 00:00-24:00", "--timezone", "UTC").ok()
        wait_until(lambda: served.mirror_state() == "in-sync", "what was held to be copied")
        log = served.log.read_text()
        assert log.count(f"does not know the time zone {ZONE}") == 1
        assert "Traceback" not in log
    volume.assert_equal_disks()


def test_a_clock_whose_zone_has_no_name_is_not_taken_for_another(lab: Lab) -> None:
    lab.volume("vol", MIB)
    machine = {"TZ": "LAB-0:17"}  # a name is looked for in /etc, which says something else
    for command in (
        ("grant", "vol", "alice", "--window", "daily 01:00-03:00"),
        ("set", "vol", "scrub=sun 01:00-03:00"),
    ):
        Lab.lockstep(lab, *command, environment=machine).failed(2, *told(TimezoneNameless()))
        Lab.lockstep(lab, *command, "--timezone", "Europe/Berlin", environment=machine).ok()
    Lab.lockstep(lab, "grant", "vol", "bob", environment=machine).ok()
    Lab.lockstep(lab, "set", "vol", "scrub=off", environment=machine).ok()


@pytest.mark.parametrize("found", [None, "Land/Newly_Named", ZoneInfoNotFoundError("conflicting time zones")])
def test_a_machine_whose_zone_cannot_be_told(found: str | Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """/etc/localtime is a copy; it names what tzdata does not have; it and another file name two zones."""

    def look() -> str | None:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(tzlocal, "get_localzone_name", look)
    with pytest.raises(TimezoneNameless):
        granting._zone(None)
    assert granting._zone("Europe/Berlin") == "Europe/Berlin"


def told(error: LockstepError) -> tuple[str, ...]:
    return str(error), error.likely_cause, error.advice


@needs("/", root=True)
def test_a_server_goes_by_the_rules_that_a_zone_has_now(lab: Lab) -> None:
    """A country changes its clocks, and the tzdata of the machine is updated while it serves."""
    volume = lab.volume("vol", MIB)
    begins, ends = (datetime.now(UTC) + timedelta(hours=hours) for hours in (11, 13))
    elsewhere(lab, "grant", "vol", "alice", "--window", f"daily {begins:%H:%M}-{ends:%H:%M}")
    hurried = lab.home / "site"
    hurried.mkdir()
    (hurried / "sitecustomize.py").write_text(
        "from lockstep.service import background\nbackground.ZONES_INTERVAL_S = 0.2"
    )
    lab.environment["PYTHONPATH"] = os.pathsep.join([str(hurried), *sys.path])
    lab.environment["PYTHONTZPATH"] = str(lab.home / "zoneinfo")
    with volume.served() as served, Client(served.socket).go("vol@alice"):
        (client,) = served.now()["clients"]
        assert client["verdict"] == "denied"
        (lab.home / "zoneinfo" / ZONE).write_bytes(rules("Etc/GMT-12"))
        wait_until(lambda: served.now()["clients"][0]["verdict"] == "allowed", "the new rules to be in effect")
