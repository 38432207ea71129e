"""The registry: what it keeps, what it refuses, and what it says when it cannot work."""

import os
import re
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection

from lockstep import errors
from lockstep.registry import store
from lockstep.registry.audit import Actor
from lockstep.registry.store import MirrorRecord, OnDenied, Registry, VolumeRecord, check_name

ADA = Actor("ada", "a test")
UUIDS = [f"00000000-0000-4000-8000-{number:012}" for number in range(4)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


@pytest.fixture
def registry(file: Path) -> Iterator[Registry]:
    with Registry.open(f"sqlite:///{file}") as opened:
        yield opened


def _add(registry: Registry, name: str, target: str, on_denied: OnDenied = "hold") -> VolumeRecord:
    return registry.add_volume(
        name, target_path=target, size_bytes=1 << 44, sector_bytes=512, on_denied=on_denied, actor=ADA
    )


@pytest.fixture
def vm1(registry: Registry) -> VolumeRecord:
    """A volume with a plain mirror and one with a detached header."""
    _add(registry, "vm1", "/disks/t1")
    registry.add_mirror("vm1", path="/disks/m1", luks_uuid=UUIDS[1], actor=ADA)
    registry.add_mirror("vm1", path="/disks/m2", luks_uuid=UUIDS[2], header_path="/disks/h2", actor=ADA)
    return registry.volume("vm1")


def _refused(kind: type[errors.LockstepError], exit_code: int, words: str, call: Callable[[], object]) -> None:
    """Check class, exit code and text together; the three sentences must be complete."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert caught.value.exit_code == exit_code
    assert words in str(caught.value)
    assert caught.value.likely_cause
    assert caught.value.advice


# What it keeps


def test_a_volume_comes_back_as_it_was_added(registry: Registry, file: Path) -> None:
    before = datetime.now(UTC)
    added = _add(registry, "vm1", "/disks/t1", on_denied="refuse")
    assert (added.name, added.target_path, added.size_bytes, added.sector_bytes, added.on_denied, added.mirrors) == (
        "vm1",
        "/disks/t1",
        1 << 44,
        512,
        "refuse",
        (),
    )
    assert added.created_at.utcoffset() == timedelta(0)
    assert before <= added.created_at <= datetime.now(UTC)
    with Registry.open(f"sqlite:///{file}") as other:
        assert other.volume("vm1") == added
        assert other.volumes() == (added,)


def test_mirrors_come_back_oldest_first(registry: Registry, vm1: VolumeRecord) -> None:
    assert [(m.path, m.header_path, m.luks_uuid, m.generation, m.volume_id) for m in vm1.mirrors] == [
        ("/disks/m1", None, UUIDS[1], 0, vm1.id),
        ("/disks/m2", "/disks/h2", UUIDS[2], 0, vm1.id),
    ]
    assert registry.mirrors_of(vm1.id) == vm1.mirrors


def test_a_target_without_a_mirror_has_none(registry: Registry) -> None:
    assert registry.mirrors_of(_add(registry, "bare", "/disks/t").id) == ()
    assert registry.mirrors_of("nobody's id") == ()


def test_volumes_are_sorted_by_name(registry: Registry) -> None:
    for name in ("b", "a.1", "B", "a-1", "10", "9"):
        _add(registry, name, f"/disks/{name}")
    assert [volume.name for volume in registry.volumes()] == ["10", "9", "B", "a-1", "a.1", "b"]


def test_records_are_frozen(vm1: VolumeRecord) -> None:
    with pytest.raises(FrozenInstanceError):
        vm1.name = "other"  # type: ignore[misc]
    assert isinstance(vm1.mirrors[0], MirrorRecord)


def test_the_generation_is_kept(registry: Registry, vm1: VolumeRecord) -> None:
    registry.set_generation(vm1.mirrors[1].id, (1 << 63) - 1)
    assert [mirror.generation for mirror in registry.mirrors_of(vm1.id)] == [0, (1 << 63) - 1]


def test_removing_a_volume_removes_its_mirrors_and_frees_every_name(registry: Registry, vm1: VolumeRecord) -> None:
    registry.remove_volume("vm1", actor=ADA)
    assert registry.volumes() == ()
    assert registry.mirrors_of(vm1.id) == ()
    again = _add(registry, "vm1", "/disks/m1")
    registry.add_mirror("vm1", path="/disks/t1", header_path="/disks/m2", luks_uuid=UUIDS[1], actor=ADA)
    assert again.id != vm1.id


def test_removing_a_mirror_leaves_the_others(registry: Registry, vm1: VolumeRecord) -> None:
    registry.remove_mirror("vm1", "/disks/m1", actor=ADA)
    assert registry.volume("vm1").mirrors == vm1.mirrors[1:]


# What it refuses


@pytest.mark.parametrize(
    ("kind", "words", "name", "target"),
    [
        (errors.VolumeExists, "There already is a volume vm1", "vm1", "/disks/new"),
        (errors.TargetTaken, "/disks/t1 already is the target of the volume vm1", "new", "/disks/t1"),
        (errors.MirrorTaken, "/disks/m2 already is a mirror of the volume vm1", "new", "/disks/m2"),
        (errors.HeaderTaken, "/disks/h2 already is the header of a mirror of the volume vm1", "new", "/disks/h2"),
    ],
)
def test_a_volume_is_refused_when_taken(
    registry: Registry, vm1: VolumeRecord, kind: type[errors.RegistryError], words: str, name: str, target: str
) -> None:
    _refused(kind, 1, words, lambda: _add(registry, name, target))
    assert registry.volumes() == (vm1,)


@pytest.mark.parametrize(
    ("kind", "words", "path", "header"),
    [
        (errors.MirrorTaken, "/disks/m1 already is a mirror of the volume vm1", "/disks/m1", None),
        (errors.MirrorTaken, "/disks/m1 already is a mirror of the volume vm1", "/disks/new", "/disks/m1"),
        (errors.TargetTaken, "/disks/t1 already is the target of the volume vm1", "/disks/t1", None),
        (errors.TargetTaken, "/disks/t2 already is the target of the volume vm2", "/disks/t2", None),
        (errors.TargetTaken, "/disks/t1 already is the target", "/disks/new", "/disks/t1"),
        (errors.HeaderTaken, "/disks/h2 already is the header", "/disks/h2", None),
        (errors.HeaderTaken, "/disks/h2 already is the header", "/disks/new", "/disks/h2"),
        (errors.LuksUuidTaken, "which /disks/m1 is registered with", "/disks/new", None),
    ],
)
def test_a_mirror_is_refused_when_taken(
    registry: Registry,
    vm1: VolumeRecord,
    kind: type[errors.RegistryError],
    words: str,
    path: str,
    header: str | None,
) -> None:
    vm2 = _add(registry, "vm2", "/disks/t2")
    uuid = UUIDS[1] if kind is errors.LuksUuidTaken else UUIDS[3]
    _refused(
        kind, 1, words, lambda: registry.add_mirror("vm2", path=path, luks_uuid=uuid, header_path=header, actor=ADA)
    )
    assert registry.volumes() == (vm1, vm2)


def test_the_constraints_are_the_referee_when_another_was_quicker(
    registry: Registry, vm1: VolumeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer without our lock got in between check and insert: the first check sees nothing yet."""
    check = store._refuse_taken
    blind_checks = iter([True])

    def blind_once(connection: Connection, *paths: str) -> None:
        if not next(blind_checks, False):
            check(connection, *paths)

    monkeypatch.setattr(store, "_refuse_taken", blind_once)
    _refused(errors.TargetTaken, 1, "the volume vm1", lambda: _add(registry, "new", "/disks/t1"))
    assert registry.volumes() == (vm1,)


def test_a_constraint_that_no_check_explains_is_damage(registry: Registry) -> None:
    wrong = cast("OnDenied", "whatever")
    _refused(errors.RegistryDamaged, 1, "ck_volumes_on_denied", lambda: _add(registry, "vm1", "/t", on_denied=wrong))
    assert registry.volumes() == ()


@pytest.mark.parametrize("path", ["", "disks/t", "./t", "/disks/\0", "/disks/\n", "/disks/\udc80"])
def test_a_path_that_cannot_be_kept_is_a_usage_error(registry: Registry, vm1: VolumeRecord, path: str) -> None:
    kind = errors.RegistryPathInvalid
    _refused(kind, 2, "cannot be registered", lambda: _add(registry, "new", path))
    _refused(
        kind, 2, "cannot be registered", lambda: registry.add_mirror("vm1", path=path, luks_uuid=UUIDS[3], actor=ADA)
    )
    _refused(
        kind,
        2,
        "cannot be registered",
        lambda: registry.add_mirror("vm1", path="/disks/new", header_path=path, luks_uuid=UUIDS[3], actor=ADA),
    )
    assert registry.volumes() == (vm1,)


def test_a_mirror_is_not_its_own_header(registry: Registry, vm1: VolumeRecord) -> None:
    _refused(
        errors.RegistryPathInvalid,
        2,
        "as the mirror and as its header",
        lambda: registry.add_mirror("vm1", path="/disks/new", header_path="/disks/new", luks_uuid=UUIDS[3], actor=ADA),
    )


def test_an_unknown_volume_lists_near_names(registry: Registry, vm1: VolumeRecord) -> None:
    _add(registry, "database", "/disks/t2")
    with pytest.raises(errors.VolumeUnknown, match=r"no volume databse\. Did you mean database\?$") as caught:
        registry.volume("databse")
    assert caught.value.data["near"] == ("database",)
    with pytest.raises(errors.VolumeUnknown, match=r"no volume zzz\.$") as caught:
        registry.volume("zzz")
    assert caught.value.data["near"] == ()


def test_what_is_not_there_cannot_be_changed(registry: Registry, vm1: VolumeRecord) -> None:
    _add(registry, "vm2", "/disks/t2")
    _refused(errors.VolumeUnknown, 1, "no volume x", lambda: registry.remove_volume("x", actor=ADA))
    _refused(errors.VolumeUnknown, 1, "no volume x", lambda: registry.remove_mirror("x", "/disks/m1", actor=ADA))
    _refused(
        errors.VolumeUnknown, 1, "no volume x", lambda: registry.add_mirror("x", path="/m", luks_uuid="u", actor=ADA)
    )
    _refused(errors.MirrorUnknown, 1, "/disks/m1", lambda: registry.remove_mirror("vm2", "/disks/m1", actor=ADA))
    _refused(errors.MirrorUnknown, 1, "No mirror 17 is", lambda: registry.set_generation("17", 1))
    assert registry.volume("vm1") == vm1


# Names

_NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=_NAMES)
def test_every_valid_name_comes_back(registry: Registry, name: str) -> None:
    _add(registry, name, f"/disks/{name}")
    assert registry.volume(name).name == name
    registry.remove_volume(name, actor=ADA)


@given(
    name=st.one_of(st.text(), st.builds("{}{}".format, _NAMES, st.sampled_from(["\n", " ", "/", "\0", "é", "x" * 64])))
)
def test_every_other_name_is_a_usage_error(name: str) -> None:
    if re.match(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z", name):
        assert check_name(name) == name
    else:
        _refused(errors.VolumeNameInvalid, 2, "cannot be the name", lambda: check_name(name))


def test_an_invalid_name_adds_nothing(registry: Registry) -> None:
    _refused(errors.VolumeNameInvalid, 2, "'../x'", lambda: _add(registry, "../x", "/disks/t"))
    assert registry.volumes() == ()


# The file


def test_the_file_is_private_whatever_the_umask(file: Path) -> None:
    umask = os.umask(0)
    try:
        Registry.open(f"sqlite:///{file}").close()
    finally:
        os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == [file.name]


def test_the_path_in_the_url_is_literal(tmp_path: Path) -> None:
    file = tmp_path / "a b#c?mode=ro%41é.db"
    Registry.open(f"sqlite:///{file}").close()
    assert os.listdir(tmp_path) == [file.name]


def test_a_missing_directory_is_not_created(tmp_path: Path) -> None:
    _refused(
        errors.RegistryUnreadable, 1, "No such file", lambda: Registry.open(f"sqlite:///{tmp_path}/none/registry.db")
    )
    assert os.listdir(tmp_path) == []


def test_a_directory_is_not_a_registry(tmp_path: Path) -> None:
    _refused(errors.RegistryUnreadable, 1, "unable to open", lambda: Registry.open(f"sqlite:///{tmp_path}"))


def test_a_file_that_is_no_database_is_damaged_and_left_alone(file: Path) -> None:
    file.write_bytes(b"not a database " * 1000)
    before = file.read_bytes()
    _refused(errors.RegistryDamaged, 1, "not a database", lambda: Registry.open(f"sqlite:///{file}"))
    assert file.read_bytes() == before


def test_a_torn_file_is_damaged(file: Path) -> None:
    Registry.open(f"sqlite:///{file}").close()
    with file.open("r+b") as raw:
        raw.truncate(5000)
    _refused(errors.RegistryDamaged, 1, "malformed", lambda: Registry.open(f"sqlite:///{file}"))


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE grants SET windows = '[\"mon 2'",
        "UPDATE grants SET windows = '7'",
        "UPDATE grants SET windows = '[\"mon 22:0-06:00\"]'",
        "UPDATE volumes SET scrub_window = 'x', scrub_timezone = 'UTC'",
        "UPDATE volumes SET created_at = 'x'",
    ],
)
def test_a_row_that_makes_no_sense_is_damage(registry: Registry, file: Path, change: str) -> None:
    _add(registry, "vm1", "/disks/t1")
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(change)
    read = (lambda: registry.grants("vm1")) if "grants" in change else registry.volumes
    _refused(errors.RegistryDamaged, 1, "makes no sense", read)


def test_a_file_that_vanishes_is_an_error_and_one_that_is_put_back_is_seen(registry: Registry, file: Path) -> None:
    backup = file.read_bytes()
    _add(registry, "vm1", "/disks/t1")
    file.unlink()
    _refused(errors.RegistryUnreadable, 1, "unable to open", registry.volumes)
    assert not file.exists()
    file.write_bytes(backup)
    assert registry.volumes() == ()


def test_a_locked_registry_says_so(registry: Registry, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.01)
    with closing(sqlite3.connect(file, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        _refused(errors.RegistryBusy, 1, "database is locked", registry.volumes)
        _refused(errors.RegistryBusy, 1, "database is locked", lambda: Registry.open(f"sqlite:///{file}"))
        holder.execute("ROLLBACK")
    assert registry.volumes() == ()


@pytest.mark.parametrize(
    "url",
    ["", "sqlite:", "sqlite://", "sqlite:///", "/var/lib/x", "mysql://u:secret@h/d", "postgresql://u:secret@h:port/d"],
)
def test_a_url_that_is_not_understood_is_a_usage_error_without_its_password(url: str) -> None:
    _refused(errors.RegistryUrlInvalid, 2, "not understood", lambda: Registry.open(url))
    with pytest.raises(errors.RegistryUrlInvalid) as caught:
        Registry.open(url)
    assert "secret" not in f"{caught.value} {caught.value.data} {caught.value.advice}"


def test_postgresql_without_its_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(errors.RegistryDriverMissing) as caught:
        Registry.open("postgresql://user:secret@localhost/lockstep")
    assert "pip install" in caught.value.advice


# Several processes

_GATE = (
    "import sys; from lockstep.registry.store import Registry; from lockstep.registry.audit import Actor; "
    "ADA = Actor('ada', 'a test'); print('ready', flush=True); sys.stdin.readline()\n"
)


def _at_once(count: int, script: str, *arguments: str) -> list[str]:
    """Run `script` in `count` processes that start it together; return their outputs. None may fail or warn."""
    command = [sys.executable, "-W", "error", "-c", _GATE + script, *arguments]
    children = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(count)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    outputs = [child.communicate()[0].strip() for child in children]
    assert [child.returncode for child in children] == [0] * count
    return outputs


def test_a_fresh_registry_opened_by_many_at_once(file: Path) -> None:
    script = "with Registry.open(sys.argv[1]) as registry: print(registry.volumes())"
    for _ in range(3):
        assert _at_once(8, script, f"sqlite:///{file}") == ["()"] * 8
        file.unlink()


def test_many_add_one_name_and_one_wins(registry: Registry, file: Path) -> None:
    script = """
from lockstep.errors import LockstepError
with Registry.open(sys.argv[1]) as registry:
    try:
        path = "/t" + sys.argv[2]
        print(registry.add_volume("vm1", target_path=path, size_bytes=1, sector_bytes=512, actor=ADA).target_path)
    except LockstepError as error:
        print(type(error).__name__)
"""
    outputs = _at_once(6, script, f"sqlite:///{file}")
    (winner,) = (output for output in outputs if output != "VolumeExists")
    assert registry.volume("vm1").target_path == winner


def test_many_add_different_names_and_all_win(registry: Registry, file: Path) -> None:
    script = """
with Registry.open(sys.argv[1]) as registry:
    for number in range(10):
        name = f"vm{sys.argv[2]}-{number}"
        registry.add_volume(name, target_path="/" + name, size_bytes=1, sector_bytes=512, actor=ADA)
"""
    _at_once(4, script, f"sqlite:///{file}")
    assert len(registry.volumes()) == 40


def test_target_here_and_mirror_there_at_once_have_one_winner(registry: Registry, file: Path) -> None:
    """No constraint spans both tables: here the lock is the referee."""
    _add(registry, "vm1", "/disks/t1")
    script = """
from lockstep.errors import LockstepError
with Registry.open(sys.argv[1]) as registry:
    try:
        if int(sys.argv[2]) % 2:
            registry.add_mirror("vm1", path="/disks/x", luks_uuid="uuid" + sys.argv[2], actor=ADA)
        else:
            registry.add_volume("vm" + sys.argv[2], target_path="/disks/x", size_bytes=1, sector_bytes=512, actor=ADA)
        print("won")
    except LockstepError as error:
        print(type(error).__name__)
"""
    outputs = _at_once(4, script, f"sqlite:///{file}")
    assert outputs.count("won") == 1
    assert set(outputs) - {"won"} in ({"TargetTaken"}, {"MirrorTaken"})
