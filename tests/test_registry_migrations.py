"""The schema: revisions and models agree, migrating twice is nothing, and what is not ours is left alone."""

import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from lockstep.errors import RegistryDamaged, RegistryTooNew
from lockstep.registry import schema
from lockstep.registry.models import METADATA
from lockstep.registry.store import Registry


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


def _open_and_close(file: Path) -> None:
    Registry.open(f"sqlite:///{file}").close()


def _execute(file: Path, statement: str) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(file)) as connection, connection:
        return connection.execute(statement).fetchall()


def _statements(file: Path) -> set[str]:
    """Every CREATE statement but Alembic's, with its words in alphabetical order."""
    rows = _execute(file, "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'alembic_version'")
    rows = [(re.sub(r"[()',\s]+", " ", sql),) for (sql,) in rows]  # a column that is added later has no line of its own
    return {" ".join(sorted(sql.split())) for (sql,) in rows}


def test_the_migrated_schema_is_the_models(file: Path, tmp_path: Path) -> None:
    _open_and_close(file)
    with create_engine(f"sqlite:///{file}", poolclass=NullPool).connect() as connection:
        migrated = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(migrated, METADATA) == []
    # compare_metadata does not look at CHECK constraints and ON DELETE: the statements themselves do.
    made = tmp_path / "made.db"
    METADATA.create_all(create_engine(f"sqlite:///{made}", poolclass=NullPool))
    assert _statements(file) == _statements(made)


def test_the_program_knows_the_newest_revision() -> None:
    config = Config()
    config.set_main_option("script_location", "lockstep.registry:migrations")
    assert ScriptDirectory.from_config(config).get_heads() == [schema.REVISION]


def test_opening_again_changes_nothing(file: Path) -> None:
    _open_and_close(file)
    before = file.read_bytes()
    _open_and_close(file)
    assert file.read_bytes() == before


def test_opening_an_existing_registry_does_not_import_alembic(file: Path) -> None:
    _open_and_close(file)
    script = (
        "import sys; from lockstep.registry.store import Registry; "
        f"Registry.open('sqlite:///{file}').close(); sys.exit('alembic' in sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_a_migration_that_breaks_off_leaves_a_fresh_registry(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("alembic.runtime.migration.HeadMaintainer.update_to_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _open_and_close(file)
    assert _statements(file) == set()
    _open_and_close(file)
    assert _statements(file) != set()


def test_a_newer_schema_is_refused_and_left_alone(file: Path) -> None:
    _open_and_close(file)
    _execute(file, "UPDATE alembic_version SET version_num = '9999'")
    before = file.read_bytes()
    with pytest.raises(RegistryTooNew) as caught:
        _open_and_close(file)
    assert caught.value.data == {"registry": str(file), "found": "9999", "known": schema.REVISION}
    assert "Upgrade" in caught.value.advice
    assert file.read_bytes() == before


def test_another_programs_database_is_refused_and_left_alone(file: Path) -> None:
    _execute(file, "CREATE TABLE bookmarks (url TEXT)")
    before = file.read_bytes()
    with pytest.raises(RegistryDamaged, match="another program's tables"):
        _open_and_close(file)
    assert file.read_bytes() == before


def test_a_registry_without_its_tables_is_damaged(file: Path) -> None:
    _open_and_close(file)
    _execute(file, "DROP TABLE mirrors")
    _execute(file, "DROP TABLE volumes")
    with Registry.open(f"sqlite:///{file}") as registry, pytest.raises(RegistryDamaged, match="no such table"):
        registry.volumes()
