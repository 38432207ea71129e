"""Is the registry's schema the one that this program knows, and if not, make it so.

Every command asks, so the answer must be cheap: one look at Alembic's version table. Alembic itself takes
longer to import than most commands take to run; it is imported only where there is something to migrate.
"""

from sqlalchemy import Connection, inspect, text

from lockstep.errors import RegistryDamaged, RegistryNotUnicode, RegistryTooNew

REVISION = "0005"
"""The newest revision in migrations/versions."""

_VERSION_TABLE = "alembic_version"


def found_revision(connection: Connection) -> str | None:
    """Return the revision of the registry's schema; None where no schema is yet."""
    if not inspect(connection).has_table(_VERSION_TABLE):
        return None
    found: str | None = connection.scalar(text(f"SELECT version_num FROM {_VERSION_TABLE}"))  # noqa: S608 - a constant
    return found


def bring_up_to_date(connection: Connection, registry: str) -> None:
    """Migrate to REVISION inside the caller's write transaction, which all other openers wait for.

    Does nothing where another opener was quicker. Raises RegistryTooNew for a revision that this
    program does not know, RegistryDamaged for a database that is somebody else's, RegistryNotUnicode.
    """
    found = found_revision(connection)
    if found == REVISION:
        return
    if found is None and inspect(connection).get_table_names():
        raise RegistryDamaged(registry=registry, reason="it holds another program's tables")
    if found is None and connection.dialect.name == "postgresql":
        encoding = connection.scalar(text("SHOW server_encoding"))
        if encoding != "UTF8":  # a name that it has no letters for would keep the audit trail from being written
            raise RegistryNotUnicode(registry=registry, encoding=encoding)

    from alembic import command  # noqa: PLC0415 - see the head of this file
    from alembic.config import Config  # noqa: PLC0415
    from alembic.script import ScriptDirectory  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", "lockstep.registry:migrations")
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise RegistryTooNew(registry=registry, found=found, known=REVISION)
    command.upgrade(config, REVISION)
