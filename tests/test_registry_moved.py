"""The registry of a state directory is moved to a PostgreSQL database of its own, and back."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.pool import NullPool

from lockstep import errors
from lockstep.registry import windows
from lockstep.registry.access import Grant
from lockstep.registry.audit import Actor
from lockstep.registry.store import Registry
from lockstep.service.registry_place import RegistryPlace
from tests.lab import MIB, Lab, Volume, needs, wait_until, write
from tests.postgres import BIN, PROGRAMS, Postgres, fresh_server
from tests.test_registry_lost import is_unaccounted
from tests.test_service_refusals import assert_error, everything_below
from tests.test_state_owner import NOBODY, give_away, owners

pytestmark = needs("runuser", *(str(BIN / program) for program in PROGRAMS), root=True)

ADA = Actor("ada", "a test")


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with fresh_server() as running:
        yield running


@pytest.fixture
def url(server: Postgres) -> str:
    """An empty database."""
    (count,) = server.ask("SELECT count(*) FROM pg_database")[0]
    server.ask(f"CREATE DATABASE fleet{count}")
    return server.url(f"fleet{count}")


def in_file(lab: Lab, url: str) -> Path:
    file = lab.home / "url"
    file.write_text(f"{url}\n")
    return file


def move(lab: Lab, url: str) -> str:
    return lab.lockstep("registry", "move", "--url-file", in_file(lab, url)).ok()


def rows_of(lab: Lab) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lab.lockstep("audit", "--json").ok().splitlines()]


def known(lab: Lab) -> list[str]:
    """What commands say of the registry's content."""
    return [lab.lockstep(*command, "--json").ok() for command in (("list",), ("grants",), ("mirror", "list", "vol"))]


def work_on(volume: Volume, pattern: int) -> None:
    with volume.served() as served:
        write(served, f"write -P {pattern} 0 64k", "flush")
        assert served.mirror_state() == "in-sync"
    volume.assert_equal_disks()


def test_everything_goes_along_and_a_volume_lives_on_there(lab: Lab, url: str) -> None:
    volume = lab.volume("vol", MIB)
    work_on(volume, 1)
    lab.lockstep("grant", "vol", "bob", "--window", "mon-fri 22:00-06:00", "--timezone", "Europe/Berlin").ok()
    before, rows = known(lab), rows_of(lab)
    assert "/fleet" in move(lab, url)
    assert known(lab) == before
    assert rows_of(lab)[:-1] == rows
    assert rows_of(lab)[-1]["event"] == "registry-moved"
    assert not (lab.state / "registry.db").exists()
    work_on(volume, 2)
    lab.lockstep("revoke", "vol", "bob").ok()
    lab.lockstep("audit", "--check").ok()
    assert (lab.state / "registry.url").stat().st_mode & 0o777 == 0o600
    before, rows = known(lab), rows_of(lab)
    assert "registry.db now" in lab.lockstep("registry", "move").ok()
    assert known(lab) == before
    assert rows_of(lab)[:-1] == rows
    assert rows_of(lab)[-1]["details"]["to"] == str(lab.state / "registry.db")
    assert not (lab.state / "registry.url").exists()
    work_on(volume, 3)
    lab.lockstep("audit", "--check").ok()
    assert "already" in lab.lockstep("registry", "move").ok()


def test_what_is_served_goes_on_while_the_database_is_down(lab: Lab) -> None:
    volume = lab.volume("vol", MIB)
    with fresh_server() as server:
        move(lab, server.url())
        with volume.served() as served:
            server.run("pg_ctl", "stop", "-m", "immediate", "-D", str(server.data))
            lab.lockstep("grants", "vol").failed(1, "does not serve us")
            write(served, "write -P 7 0 64k")  # its client is worth a row
            wait_until(lambda: is_unaccounted(served), "the server to miss the audit trail")
            write(served, "write -P 8 64k 64k")
            assert volume.target.read_bytes()[: 128 << 10] == b"\7" * (64 << 10) + b"\10" * (64 << 10)
            server.start()
            wait_until(lambda: not is_unaccounted(served) and served.mirror_state() == "in-sync", "all to be well")
            lab.lockstep("revoke", "vol", "root").ok()
            wait_until(lambda: '"revoked"' in lab.lockstep("audit", "vol", "--json").ok(), "the revocation")
        volume.assert_equal_disks()
        lab.lockstep("audit", "--check").ok()
        assert sum(row["event"] == "connect" for row in rows_of(lab)) >= 2


def test_what_root_moves_stays_the_owners(lab: Lab, url: str) -> None:
    lab.lockstep("list").ok()
    give_away(lab)
    move(lab, url)
    assert set(owners(lab)) >= {"id", "registry.url", "registry.db.moved"}
    assert set(owners(lab).values()) == {NOBODY}
    lab.lockstep("registry", "move").ok()
    assert set(owners(lab).values()) == {NOBODY}


def test_a_database_belongs_to_one_state_directory(lab: Lab, url: str, tmp_path: Path) -> None:
    lab.volume("vol", MIB)
    move(lab, url)
    label = lab.lockstep("registry", "show", "--json").ok()
    name = json.loads(label)["registry"]
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    command = ("registry", "move", "--url-file", in_file(lab, url), "--state-dir", other)
    lab.lockstep(*command).failed(1, f"it belongs to {lab.state} on ")
    (other / "registry.url").write_text(url)
    for line in ("list", "audit", "serve vol"):
        lab.lockstep(*line.split(), "--state-dir", other).failed(1, f"it belongs to {lab.state} on ")
    (lab.state / "id").rename(tmp_path / "id")
    lab.lockstep("list").failed(1, f"it belongs to {lab.state} on ", "put the file `id` back")
    (lab.state / "id").unlink()
    (tmp_path / "id").rename(lab.state / "id")
    assert json.loads(lab.lockstep("list", "--json").ok())
    assert name in lab.lockstep("registry", "show").ok()


def test_a_new_state_directory_can_begin_with_a_database(lab: Lab, url: str) -> None:
    lab.state.mkdir(mode=0o700, exist_ok=True)
    (lab.state / "registry.url").write_text(url)
    volume = lab.volume("vol", MIB)
    assert not (lab.state / "registry.db").exists()
    work_on(volume, 5)
    assert "already" in move(lab, url)


def test_a_url_written_beside_a_registry_does_not_hide_it(lab: Lab, url: str) -> None:
    lab.volume("vol", MIB)
    by_hand = lab.state / "registry.url"
    by_hand.write_text(url)
    lab.lockstep("list").failed(1, f"is empty, and {lab.state}/registry.db is not", f"Remove {by_hand}")
    by_hand.unlink()
    move(lab, url)
    assert '"vol"' in lab.lockstep("list", "--json").ok()


def test_a_database_that_was_emptied_is_said_to_be_lost(lab: Lab, server: Postgres, url: str) -> None:
    volume = lab.volume("vol", MIB)
    move(lab, url)
    work_on(volume, 1)
    database = url.partition("?")[0].rpartition("/")[2]
    server.ask(f"DROP DATABASE {database}")
    server.ask(f"CREATE DATABASE {database}")
    for command in (("list",), ("serve", "vol")):
        lab.lockstep(*command).failed(1, "is gone or empty, but")


def test_the_trail_can_be_out_of_reach_of_the_machine(lab: Lab, server: Postgres, url: str) -> None:
    """As docs/operations.md says: the role in the URL can add rows, and neither change nor remove any."""
    volume = lab.volume("vol", MIB)
    database = url.partition("?")[0].rpartition("/")[2]
    server.ask("CREATE ROLE lockstep LOGIN")
    server.ask("CREATE ROLE auditor")
    server.ask(f"ALTER DATABASE {database} OWNER TO auditor")
    server.ask("GRANT CREATE ON SCHEMA public TO lockstep", database)
    url = url.replace("//postgres@", "//lockstep@")
    move(lab, url)
    for statement in ("ALTER TABLE audit OWNER TO auditor", "GRANT SELECT, INSERT ON audit TO lockstep"):
        server.ask(statement, database)
    work_on(volume, 1)
    lab.lockstep("grant", "vol", "bob").ok()
    lab.lockstep("audit", "--check").ok()
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
    for forbidden in ("DELETE FROM audit", "DROP TRIGGER audit_keeps_rows ON audit", "DROP TABLE audit"):
        with pytest.raises(ProgrammingError, match=r"permission denied|must be owner"), engine.begin() as connection:
            connection.execute(text(forbidden))


def test_refusals_change_nothing(lab: Lab, server: Postgres, url: str) -> None:
    volume = lab.volume("vol", MIB)
    taken = lab.home / "another"
    lab.lockstep("grants", "--state-dir", taken).ok()
    server.ask("CREATE DATABASE taken")
    lab.lockstep("registry", "move", "--url-file", in_file(lab, server.url("taken")), "--state-dir", taken).ok()
    with volume.served():
        served = errors.StillServed(volume="vol", action="taken along to another registry")
        assert_error(lab.lockstep("registry", "move", "--url-file", in_file(lab, url)), served)
    before = everything_below(lab.state)
    for wrong, error, said in (
        ("", errors.RegistryUrlInvalid, "not a URL"),
        ("mysql://u:hidden@h/d", errors.RegistryUrlInvalid, "mysql is not postgresql"),
        ("sqlite:////tmp/x", errors.RegistryUrlInvalid, "its place in the state directory"),
        ("postgresql://u:hidden@127.0.0.1:1/d", errors.RegistryUnreachable, "does not serve us"),
    ):
        result = lab.lockstep("registry", "move", "--url-file", in_file(lab, wrong))
        result.failed(error.exit_code, said)
        assert "hidden" not in result.err
        assert "Write sqlite" not in result.err, "which is refused as well"
    lab.lockstep("registry", "move", "--url-file", lab.home / "none").failed(2, "No such file")
    assert everything_below(lab.state) == before
    lab.lockstep("registry", "move", "--url-file", in_file(lab, server.url("taken"))).failed(1, "belongs to")
    assert '"vol"' in lab.lockstep("list", "--json").ok()


def test_a_move_that_fails_leaves_the_registry_where_it_was(
    lab: Lab, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.volume("vol", MIB)
    place = RegistryPlace(str(lab.state))
    with monkeypatch.context() as broken, place.open() as registry:
        broken.setattr("os.fsync", _fail)
        with pytest.raises(errors.StateDirUnusable):
            place.move_to_database(registry, url, actor=ADA)
    assert '"vol"' in lab.lockstep("list", "--json").ok()
    assert not [path for path in lab.state.iterdir() if path.name.startswith((".lockstep", "registry.url"))]
    move(lab, url)
    assert '"vol"' in lab.lockstep("list", "--json").ok()


def _fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("there_and_back", [False, True], ids=["file", "database"])
def test_who_waits_meanwhile_has_changed_nothing_and_knows_it(
    lab: Lab, url: str, monkeypatch: pytest.MonkeyPatch, *, there_and_back: bool
) -> None:
    """A grant that was about to be given goes to neither registry, and is not said to be given."""
    lab.volume("vol", MIB)
    if there_and_back:
        move(lab, url)
    place, outcome = RegistryPlace(str(lab.state)), []
    with contextlib.ExitStack() as stack:
        registry, waiting = stack.enter_context(place.open()), stack.enter_context(place.open())
        begun = threading.Event()
        event.listen(waiting._engine, "engine_connect", lambda _: begun.set())

        def grant() -> None:
            try:
                waiting.grant("vol", Grant("eve", (windows.parse("mon 00:00-01:00"),), "UTC"), actor=ADA)
            except errors.RegistryError as error:
                outcome.append(error)

        thread = threading.Thread(target=grant)

        def wait_for_lock() -> None:
            thread.start()
            begun.wait()

        _when_settling(monkeypatch, wait_for_lock)
        if there_and_back:
            place.move_to_file(registry, actor=ADA)
        else:
            place.move_to_database(registry, url, actor=ADA)
        thread.join()
    (error,) = outcome
    assert isinstance(error, errors.RegistryElsewhere if there_and_back else errors.RegistryUnreadable)
    assert "eve" not in lab.lockstep("grants", "vol", "--json").ok()


def _when_settling(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    move = Registry.move

    def moved(self: Registry, other: Registry, label: str, settle: Callable[[], None], *, actor: Actor) -> None:
        def settle_later() -> None:
            do()
            settle()

        move(self, other, label, settle_later, actor=actor)

    monkeypatch.setattr(Registry, "move", moved)
