"""The registry's tables: volumes (a target each), their mirrors, who may update these, and the audit trail.

A change here needs a revision in migrations/versions and the new `schema.REVISION`; a test compares the two.
Rules that span both tables (one disk has one role) are the store's: no portable constraint can express them.
"""

import uuid
from datetime import UTC, datetime

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    ForeignKey,
    MetaData,
    String,
    UniqueConstraint,
    event,
    false,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator


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


def _new_id() -> str:
    return str(uuid.uuid4())


def _now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """All tables. Constraints are named by rule, so that a later migration can name them on any database."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime}  # noqa: RUF012 - SQLAlchemy's own declaration


class Volume(Base):
    """A target that Lockstep serves. `filled_from` is the mirror that a new target is still being filled from."""

    __tablename__ = "volumes"
    __table_args__ = (CheckConstraint("on_denied IN ('hold', 'refuse')", name="on_denied"),)

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=_new_id)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    target_path: Mapped[str] = mapped_column(unique=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sector_bytes: Mapped[int]
    on_denied: Mapped[str] = mapped_column(String(8))
    scrub_window: Mapped[str | None]
    scrub_timezone: Mapped[str | None]
    filled_from: Mapped[str | None] = mapped_column(String(36))
    created_at: Mapped[datetime] = mapped_column(default=_now)

    mirrors: Mapped[list["Mirror"]] = relationship(
        order_by=lambda: (Mirror.created_at, Mirror.path), lazy="selectin", passive_deletes=True
    )


class Mirror(Base):
    """A disk that receives a volume's ciphertext. `generation` is the last one that was seen on it.

    `compare`: it may hold a copy already, so what differs is found by comparing.
    """

    __tablename__ = "mirrors"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=_new_id)
    volume_id: Mapped[str] = mapped_column(ForeignKey("volumes.id", ondelete="CASCADE"), index=True)
    path: Mapped[str] = mapped_column(unique=True)
    header_path: Mapped[str | None]
    luks_uuid: Mapped[str] = mapped_column(String(40), unique=True)
    generation: Mapped[int] = mapped_column(BigInteger)
    compare: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    created_at: Mapped[datetime] = mapped_column(default=_now)


class Grant(Base):
    """A user's right to update a volume's mirrors. `windows` is a JSON list of texts; none means always."""

    __tablename__ = "grants"
    __table_args__ = (UniqueConstraint("volume_id", "user"),)

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=_new_id)
    volume_id: Mapped[str] = mapped_column(ForeignKey("volumes.id", ondelete="CASCADE"))
    user: Mapped[str] = mapped_column(String(64))
    windows: Mapped[str]
    timezone: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(default=_now)


class AuditRow(Base):
    """A row of the audit trail; `audit.py` has its form. Triggers refuse to change or to delete one."""

    __tablename__ = "audit"

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    at_us: Mapped[int] = mapped_column(BigInteger)
    volume: Mapped[str] = mapped_column(String(64), index=True)
    event: Mapped[str] = mapped_column(String(32))
    user: Mapped[str] = mapped_column(String(64))
    origin: Mapped[str]
    reason: Mapped[str]
    details: Mapped[str]
    previous: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))


class AuditHead(Base):
    """The number and the hash of the trail's last row: one row, whose id is 1."""

    __tablename__ = "audit_head"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(BigInteger)
    hash: Mapped[str] = mapped_column(String(64))


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
        event.listen(AuditRow.__table__, "after_create", DDL(_statement).execute_if(dialect=_dialect))  # type: ignore[no-untyped-call]
