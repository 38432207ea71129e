"""The audit trail: every change is in it, and whatever is done to it is noticed."""

import hashlib
import json
import random
import re
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import GrantUnknown, RegistryDamaged, VolumeUnknown
from lockstep.registry import audit, store
from lockstep.registry.access import Grant
from lockstep.registry.audit import Actor, AuditRecord
from lockstep.registry.store import Registry
from lockstep.registry.windows import parse
from tests.lab import MIB, Lab

ADA = Actor("ada", "a test")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


@pytest.fixture
def registry(file: Path) -> Iterator[Registry]:
    with Registry.open(f"sqlite:///{file}") as opened:
        opened.add_volume("vm1", target_path="/t", size_bytes=1, sector_bytes=512, actor=ADA)
        yield opened


def test_who_creates_a_volume_is_granted_it_and_nobody_else(registry: Registry) -> None:
    assert registry.grants("vm1") == (Grant("ada", (), "UTC"),)


def test_a_grant_is_replaced_and_revoked(registry: Registry) -> None:
    nights = Grant("bob", (parse("mon-fri 22:00-06:00"), parse("sat 00:00-24:00")), "Europe/Berlin")
    registry.grant("vm1", Grant("bob", (), "UTC"), actor=ADA)
    registry.grant("vm1", nights, actor=ADA)
    assert registry.grants("vm1") == (Grant("ada", (), "UTC"), nights)
    registry.revoke("vm1", "ada", actor=ADA)
    assert registry.grants("vm1") == (nights,)
    with pytest.raises(GrantUnknown):
        registry.revoke("vm1", "ada", actor=ADA)
    with pytest.raises(VolumeUnknown):
        registry.grants("vm2")


def test_every_change_of_the_registry_is_in_the_trail(registry: Registry) -> None:
    registry.add_mirror("vm1", path="/m", luks_uuid="u", actor=ADA)
    registry.grant("vm1", Grant("bob", (parse("daily 01:00-02:00"),), "UTC"), actor=ADA)
    registry.revoke("vm1", "bob", actor=ADA)
    registry.set_on_denied("vm1", "refuse", actor=Actor("root", "command line"))
    registry.remove_mirror("vm1", "/m", actor=ADA)
    registry.remove_volume("vm1", actor=ADA)
    rows = registry.audit_rows(volume="vm1")
    events = ["volume-added", "mirror-added", "granted", "revoked", "on-denied", "mirror-removed", "volume-removed"]
    assert [row.event for row in rows] == events
    assert [row.number for row in rows] == list(range(1, 8))
    assert rows[2].details == {"grantee": "bob", "windows": ["daily 01:00-02:00"], "timezone": "UTC"}
    assert [row.event for row in registry.audit_rows(user="root")] == ["on-denied"]
    middle_s = rows[3].at_us / 1e6
    assert [row.event for row in registry.audit_rows(since_s=middle_s)] == events[3:]
    assert [row.event for row in registry.audit_rows(until_s=middle_s)] == events[:3]
    found = registry.check_audit()
    assert (found.rows, found.reason, found.head) == (7, None, rows[-1].hash)


def test_what_no_database_can_hold_is_escaped(registry: Registry) -> None:
    registry.audit(
        "odd",
        actor=Actor("b\udcffb", "x\0y"),
        volume="vm1",
        reason="\ud800",
        details={"a": "\0", "b": [1, None, "c\udcff"]},
    )
    row = registry.audit_rows()[-1]
    assert (row.user, row.origin, row.reason) == ("b\\udcffb", "x\\0y", "\\ud800")
    assert row.details == {"a": "\\0", "b": [1, None, "c\\udcff"]}
    assert registry.check_audit().reason is None
    assert registry.audit_rows(user="b\udcffb") == (row,)


def test_a_name_for_which_a_row_has_no_room_keeps_no_row_from_being_written(registry: Registry) -> None:
    name = "somebody" * 30
    registry.audit("connect", actor=Actor(name, "x"), volume="vm1", reason=f"{name} connected", details={})
    row = registry.audit_rows()[-1]
    assert (row.user, row.reason) == (name[:64], f"{name} connected")
    assert registry.check_audit().reason is None
    assert registry.audit_rows(user=name) == (row,)


def fill(registry: Registry) -> str:
    """Write ten rows more; return the head in the middle."""
    for number in range(10):
        registry.audit("test", actor=ADA, volume="vm1", reason=f"reason {number}", details={"n": number})
        if number == 4:
            middle = registry.check_audit().head
    return middle


def tamper(file: Path, *statements: str) -> None:
    """Change the file as somebody would who can write it and knows SQL."""
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("DROP TRIGGER audit_keeps_rows")
        connection.execute("DROP TRIGGER audit_keeps_content")
        for statement in statements:
            connection.execute(statement)


@pytest.mark.parametrize(
    "column", ["at_us", "volume", "event", "user", "origin", "reason", "details", "previous", "hash"]
)
def test_an_altered_row_is_found(registry: Registry, file: Path, column: str) -> None:
    fill(registry)
    value = "1" if column == "at_us" else "'{\"n\": 77}'"
    tamper(file, f'UPDATE audit SET "{column}" = {value} WHERE number = 6')
    found = registry.check_audit()
    assert found.reason is not None
    assert found.bad_number == 6


@pytest.mark.parametrize("value", ["x'00ff'", "'soon'", "9e18", "9000000000000000000", "-62135596800000001"])
@pytest.mark.parametrize("column", ["at_us", "reason", "details", "hash"])
def test_what_no_row_ever_was_is_found_and_can_be_read(registry: Registry, file: Path, column: str, value: str) -> None:
    fill(registry)
    tamper(file, f'UPDATE audit SET "{column}" = {value} WHERE number = 6')
    assert registry.check_audit().bad_number == 6
    rows = registry.audit_rows()
    assert [row.number for row in rows] == [*range(1, 12)]
    assert json.dumps([row.to_json() for row in rows])
    assert all("luks_uuid" not in dict(row.details) for row in rows), "which is looked for at each start"


def test_text_that_is_none_is_damage(registry: Registry, file: Path) -> None:
    fill(registry)
    tamper(file, "UPDATE audit SET reason = cast(x'ff' AS TEXT) WHERE number = 6")
    with pytest.raises(RegistryDamaged):
        registry.check_audit()


@pytest.mark.parametrize(
    "statements",
    [
        ["DELETE FROM audit WHERE number = 6"],
        ["DELETE FROM audit WHERE number = 6", "UPDATE audit SET number = number - 1 WHERE number > 6"],
        ["UPDATE audit SET number = 99 WHERE number = 6", "UPDATE audit SET number = 6 WHERE number = 7"],
        ["DELETE FROM audit WHERE number = 11"],
        ["DELETE FROM audit"],
        ["UPDATE audit SET number = 12 WHERE number = 11", "UPDATE audit_head SET number = 12"],
    ],
    ids=["removed", "removed and closed up", "moved", "the last removed", "all removed", "renumbered"],
)
def test_rows_that_are_gone_moved_or_put_in_are_found(registry: Registry, file: Path, statements: list[str]) -> None:
    fill(registry)
    tamper(file, *statements)
    assert registry.check_audit().reason is not None


def test_a_tail_that_was_cut_off_with_care_is_found_by_an_earlier_head(registry: Registry, file: Path) -> None:
    middle = fill(registry)
    head = registry.check_audit().head
    tamper(
        file,
        "DELETE FROM audit WHERE number > 8",
        "UPDATE audit_head SET number = 8, hash = (SELECT hash FROM audit WHERE number = 8)",
    )
    assert registry.check_audit().reason is None
    assert registry.check_audit(middle).reason is None
    found = registry.check_audit(head)
    assert found.reason is not None
    assert head in found.reason


def test_the_database_refuses_to_change_or_delete_a_row(registry: Registry, file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        for statement in (
            "DELETE FROM audit",
            "UPDATE audit SET user = 'eve'",
            "REPLACE INTO audit SELECT * FROM audit",
        ):
            with pytest.raises(sqlite3.DatabaseError, match=r"append-only|UNIQUE"):
                connection.execute(statement)


_MANY = """
WITH RECURSIVE counted(number) AS (SELECT 2 UNION ALL SELECT number + 1 FROM counted WHERE number < 5000)
INSERT INTO audit SELECT number, number, 'vm1', 'connect', 'bob', 'unix socket, pid ' || number,
    'bob came' || char(10) || number, '{}', '', '' FROM counted
"""


def test_who_reads_a_long_trail_keeps_no_server_from_writing_it(
    registry: Registry, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for longer than a piece of it takes: a server that cannot write updates no mirror."""
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.executescript(_MANY)
    added = 0

    def record_of(row: Any) -> AuditRecord:
        nonlocal added
        if added < 3:
            added += 1
            with closing(sqlite3.connect(file, timeout=0)) as connection, connection:
                connection.execute("UPDATE audit_head SET number = number + 1")
        return audit_record(row)

    audit_record = store._audit_record
    monkeypatch.setattr(store, "_audit_record", record_of)
    for read in (registry.audit_rows, registry.check_audit):
        added = 0
        read()
        assert added > 0


def test_a_trail_of_many_pieces_is_checked_to_its_end(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_PIECE_ROWS", 3)
    for number in range(2, 11):
        registry.grant("vm1", Grant(f"user {number}", (), "UTC"), actor=ADA)
        found = registry.check_audit()
        assert (found.rows, found.reason) == (number, None)
        assert found.head == registry.audit_rows()[-1].hash


def test_a_long_trail_is_listed_row_by_row(lab: Lab) -> None:
    lab.lockstep("create", "vm1", "--target", lab.disk("target", MIB)).ok()
    with closing(sqlite3.connect(lab.state / "registry.db")) as connection, connection:
        connection.execute(_MANY)
    took_s = []
    for options in ((), ("--json",)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        said = lab.lockstep("audit", *options).ok().splitlines()
        took_s.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
        assert len(said) == 5000 + (not options)
    assert took_s[0] < 2 * took_s[1]
    names, *rows = lab.lockstep("audit").ok().splitlines()
    assert names.split("  ")[0] == "Time"
    for row in rows[1:]:
        columns = re.split("  +", row)
        assert columns[1:4] == ["vm1", "bob", "connect"]
        assert columns[5] == "bob came\\n" + columns[4].removeprefix("unix socket, pid ")


def test_rows_that_many_write_at_once_have_no_gap(registry: Registry, file: Path) -> None:
    script = """
import sys
from lockstep.registry.audit import Actor
from lockstep.registry.store import Registry
with Registry.open("sqlite:///" + sys.argv[1]) as registry:
    for number in range(25):
        registry.audit("test", actor=Actor("p" + sys.argv[2], "x"), volume="vm1", reason="r", details={"n": number})
"""
    children = [subprocess.Popen([sys.executable, "-c", script, str(file), str(number)]) for number in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    found = registry.check_audit()
    assert (found.rows, found.reason) == (76, None)


def test_the_hash_is_the_one_that_is_documented() -> None:
    members = {
        "number": 1,
        "at": 5,
        "volume": "v",
        "event": "e",
        "user": "ü",
        "origin": "o",
        "reason": "r",
        "details": {"b": 1, "a": 2},
        "previous": audit.FIRST,
    }
    shuffled = dict(random.Random(1).sample(list(members.items()), len(members)))
    text = (
        '{"at":5,"details":{"a":2,"b":1},"event":"e","number":1,"origin":"o","previous":"' + "0" * 64 + '",'
        '"reason":"r","user":"ü","volume":"v"}'
    )
    assert audit.hash_of(shuffled) == hashlib.sha256(text.encode()).hexdigest()
    assert json.loads(text) == members
