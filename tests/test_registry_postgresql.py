"""The same registry on PostgreSQL."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Barrier

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from lockstep import errors
from lockstep.registry import store
from lockstep.registry.audit import Actor
from lockstep.registry.models import METADATA
from lockstep.registry.store import Registry
from tests import test_registry_audit as on_sqlite
from tests.lab import needs
from tests.postgres import BIN, PROGRAMS, fresh_server

pytestmark = needs("runuser", *(str(BIN / program) for program in PROGRAMS), root=True)

ADA = Actor("ada", "a test")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The database of a server that runs for these tests."""
    with fresh_server() as server:
        yield server.url()


@pytest.fixture
def fresh(url: str) -> Iterator[None]:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    yield
    with engine.connect() as connection:
        migrated = MigrationContext.configure(connection)
        assert compare_metadata(migrated, METADATA) == []


@pytest.fixture
def registry(url: str, fresh: None) -> Iterator[Registry]:
    with Registry.open(url) as opened:
        yield opened


def _at_once(count: int, call: Callable[[int], object]) -> list[object]:
    barrier = Barrier(count)

    def run(number: int) -> object:
        barrier.wait()
        try:
            return call(number)
        except errors.LockstepError as error:
            return type(error)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_it_keeps_volumes_and_mirrors(registry: Registry) -> None:
    added = registry.add_volume("b", target_path="/t1", size_bytes=1 << 44, sector_bytes=512, actor=ADA)
    registry.add_volume("B", target_path="/t2", size_bytes=1, sector_bytes=4096, on_denied="refuse", actor=ADA)
    mirror = registry.add_mirror("b", path="/m", header_path="/h", luks_uuid="u", actor=ADA)
    registry.set_generation(mirror.id, 1 << 40)
    assert [volume.name for volume in registry.volumes()] == ["B", "b"]
    assert registry.volume("b").created_at == added.created_at
    assert added.created_at.utcoffset() == timedelta(0)
    assert abs(registry.volume("b").created_at - datetime.now(UTC)) < timedelta(minutes=5)
    assert [kept.generation for kept in registry.mirrors_of(added.id)] == [1 << 40]
    with pytest.raises(errors.MirrorTaken):
        registry.add_volume("c", target_path="/m", size_bytes=1, sector_bytes=512, actor=ADA)
    registry.remove_volume("b", actor=ADA)
    assert registry.mirrors_of(added.id) == ()


@pytest.mark.parametrize(
    "holds",
    [
        on_sqlite.test_who_creates_a_volume_is_granted_it_and_nobody_else,
        on_sqlite.test_a_grant_is_replaced_and_revoked,
        on_sqlite.test_every_change_of_the_registry_is_in_the_trail,
        on_sqlite.test_what_no_database_can_hold_is_escaped,
        on_sqlite.test_a_name_for_which_a_row_has_no_room_keeps_no_row_from_being_written,
    ],
)
def test_grants_and_the_audit_trail(registry: Registry, holds: Callable[[Registry], None]) -> None:
    registry.add_volume("vm1", target_path="/t", size_bytes=1, sector_bytes=512, actor=ADA)
    holds(registry)


@pytest.mark.parametrize("change", ["DELETE FROM audit", "UPDATE audit SET reason = ''", "TRUNCATE audit"])
def test_the_audit_trail_is_append_only(url: str, registry: Registry, change: str) -> None:
    registry.add_volume("vm1", target_path="/t", size_bytes=1, sector_bytes=512, actor=ADA)
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
    with pytest.raises(DBAPIError, match="append-only"), engine.begin() as connection:
        connection.execute(text(change))
    assert registry.check_audit().rows == 1


def test_constraints_are_the_referee(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.add_volume("a", target_path="/t", size_bytes=1, sector_bytes=512, actor=ADA)
    monkeypatch.setattr(store, "_refuse_taken", lambda *_: None)
    with pytest.raises(errors.RegistryDamaged, match="uq_volumes_target_path"):
        registry.add_volume("b", target_path="/t", size_bytes=1, sector_bytes=512, actor=ADA)


def test_a_fresh_registry_opened_by_many_at_once(url: str, fresh: None) -> None:
    def reopen(_: int) -> object:
        with Registry.open(url) as opened:
            return opened.volumes()

    assert _at_once(8, reopen) == [()] * 8


def test_target_here_and_mirror_there_at_once_have_one_winner(registry: Registry) -> None:
    registry.add_volume("a", target_path="/t", size_bytes=1, sector_bytes=512, actor=ADA)

    def add(number: int) -> object:
        if number % 2:
            return bool(registry.add_mirror("a", path="/x", luks_uuid=f"u{number}", actor=ADA))
        return bool(registry.add_volume(f"v{number}", target_path="/x", size_bytes=1, sector_bytes=512, actor=ADA))

    outcomes = _at_once(6, add)
    assert outcomes.count(True) == 1
    assert set(outcomes) - {True} <= {errors.TargetTaken, errors.MirrorTaken}


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_hold_every_name_is_refused_at_first(url: str, encoding: str) -> None:
    """Else the first client with such a name would keep the audit trail from being written."""
    engine = create_engine(
        make_url(url).set(drivername="postgresql+psycopg"), poolclass=NullPool, isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {encoding} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"))
    with pytest.raises(errors.RegistryNotUnicode) as caught:
        Registry.open(url.replace("/postgres?", f"/{encoding.lower()}?"))
    assert caught.value.data["encoding"] == encoding


def test_a_server_that_does_not_answer_or_refuses_is_unreachable_and_no_password_shows(url: str) -> None:
    for wrong in (
        make_url(url).set(host="127.0.0.1", port=1, password="secret", query={}),
        make_url(url).set(database="no-such-database"),
    ):
        with pytest.raises(errors.RegistryUnreachable) as caught:
            Registry.open(wrong.render_as_string(hide_password=False))
        assert "secret" not in f"{caught.value} {caught.value.data}"


def test_a_locked_registry_says_so(url: str, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = store._OPENING["postgresql", True]
    monkeypatch.setitem(store._OPENING, ("postgresql", True), ("SET LOCAL lock_timeout = 50", *opening[1:]))
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
    with engine.begin() as holder:
        holder.execute(text(opening[1]))
        with pytest.raises(errors.RegistryBusy):
            registry.remove_volume("x", actor=ADA)
    with pytest.raises(errors.VolumeUnknown):
        registry.remove_volume("x", actor=ADA)
