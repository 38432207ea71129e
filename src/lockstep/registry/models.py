"""The registry's tables: volumes (a target each), their mirrors, who may update these, and the audit trail.

A change here needs a revision in migrations/versions and the new `schema.REVISION`; a test compares the two.
Rules that span both tables (one disk has one role) are the store's: no portable constraint can express them. These are
tables and not mapped classes, because SQLAlchemy's mapper takes longer to import than most commands take to run.
"""

from datetime import UTC, datetime

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    event,
    false,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

USER_CHARS = 64


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, aware and in UTC on the Python side. SQLite drops the zone, PostgreSQL answers in the session's."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """To the database: always UTC, so that what SQLite keeps without a zone is unambiguous."""
        if value is not None and value.tzinfo is None:
            raise ValueError("a moment in the registry needs a time zone")
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """From the database: a moment without a zone is UTC."""
        return value and (value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC))


METADATA = MetaData(
    naming_convention={  # constraints are named by rule, so that a later migration can name them on any database
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

VOLUMES = Table(
    "volumes",
    METADATA,
    Column("id", String(36), primary_key=True),
    Column("name", String(64), unique=True, nullable=False),
    Column("target_path", String, unique=True, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sector_bytes", Integer, nullable=False),
    Column("on_denied", String(8), nullable=False),
    Column("scrub_window", String),
    Column("scrub_timezone", String),
    Column("filled_from", String(36)),
    Column("created_at", UtcDateTime, nullable=False),
    CheckConstraint("on_denied IN ('hold', 'refuse')", name="on_denied"),
)
"""A target that Lockstep serves. `filled_from` is the mirror that a new target is still being filled from."""

MIRRORS = Table(
    "mirrors",
    METADATA,
    Column("id", String(36), primary_key=True),
    Column("volume_id", String(36), ForeignKey("volumes.id", ondelete="CASCADE"), index=True, nullable=False),
    Column("path", String, unique=True, nullable=False),
    Column("header_path", String),
    Column("luks_uuid", String(40), unique=True, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("compare", Boolean, server_default=false(), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)
"""A disk that receives a volume's ciphertext. `generation` is the last one that was seen on it.

`compare`: it may hold a copy already, so what differs is found by comparing.
"""

GRANTS = Table(
    "grants",
    METADATA,
    Column("id", String(36), primary_key=True),
    Column("volume_id", String(36), ForeignKey("volumes.id", ondelete="CASCADE"), nullable=False),
    Column("user", String(USER_CHARS), nullable=False),
    Column("windows", String, nullable=False),
    Column("timezone", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("volume_id", "user"),
)
"""A user's right to update a volume's mirrors. `windows` is a JSON list of texts; none means always."""

AUDIT = Table(
    "audit",
    METADATA,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("at_us", BigInteger, nullable=False),
    Column("volume", String(64), index=True, nullable=False),
    Column("event", String(32), nullable=False),
    Column("user", String(USER_CHARS), nullable=False),
    Column("origin", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("details", String, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
)
"""A row of the audit trail; `audit.py` has its form. Triggers refuse to change or to delete one."""

AUDIT_HEAD = Table(
    "audit_head",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),
    Column("hash", String(64), nullable=False),
)
"""The number and the hash of the trail's last row: one row, whose id is 1."""

OWNER = Table(
    "owner",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("state_id", String(36), nullable=False),
    Column("place", String, nullable=False),
)
"""The state directory that a database belongs to, and where that is: one row, whose id is 1; none in a file."""

AUDIT_TRIGGERS = {
    "sqlite": (
        "CREATE TRIGGER audit_keeps_rows BEFORE DELETE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END",
        "CREATE TRIGGER audit_keeps_content BEFORE UPDATE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END",
        "CREATE TRIGGER audit_keeps_numbers BEFORE INSERT ON audit "
        "WHEN EXISTS (SELECT 1 FROM audit WHERE number = NEW.number) "
        "BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END",
    ),
    "postgresql": (
        "CREATE FUNCTION audit_refuse() RETURNS trigger AS "
        "$$ BEGIN RAISE EXCEPTION 'the audit trail is append-only'; END $$ LANGUAGE plpgsql",
        "CREATE TRIGGER audit_keeps_rows BEFORE DELETE OR UPDATE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()",
    ),
}
for _dialect, _statements in AUDIT_TRIGGERS.items():
    for _statement in _statements:
        event.listen(AUDIT, "after_create", DDL(_statement).execute_if(dialect=_dialect))  # type: ignore[no-untyped-call]
