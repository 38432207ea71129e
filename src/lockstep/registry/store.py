"""Question 1 of the method: does this target have a mirror? `Registry` is all that others use.

What holds here
- Every method is one transaction; an error means that nothing was changed.
- One writer at a time: each writing transaction first takes the registry's lock (SQLite: BEGIN IMMEDIATE;
  PostgreSQL: an advisory lock), so what it checks is still true when it inserts. The unique constraints stand
  behind that for writers who do not take the lock. Migrating is such a transaction as well: of many who open
  a fresh registry at once, one migrates and the others find it done.
- One disk has one role: no path is the target, the mirror or the header of two things. Paths are compared as text;
  two names of one disk are told apart by the LUKS UUID (mirrors) and by the locks on the open disks.
- Who waits longer than LOCK_TIMEOUT_S for another gets RegistryBusy.
- A registry that was moved takes nothing more: who waited for the lock meanwhile gets an error, and has changed
  nothing. A file is no longer where it was then; a database on a server loses its owner, the state directory.

How the SQLite file is kept
- Rollback journal, not WAL: the file is a few pages, written a few times a day, and between writes it is one
  file that can be copied, sits on any file system, and is read without a writable -shm beside it.
- synchronous=EXTRA: what was committed stays committed after a power cut, the journal's removal included.
- A connection lives for one transaction. So a file that was put back from a backup is seen at once, and a file
  that is gone is an error: connections never create it. Creating it is `mknod`, which opens nothing: to close
  a second descriptor of the file would drop the locks that SQLite holds on it in this process.
"""

import json
import os
import re
import sqlite3
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast
from urllib.parse import quote

from sqlalchemy import (
    Column,
    Connection,
    Delete,
    Engine,
    Row,
    Update,
    create_engine,
    delete,
    insert,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

from lockstep.errors import (
    GrantUnknown,
    HeaderTaken,
    LuksUuidTaken,
    MirrorTaken,
    MirrorUnknown,
    RegistryBusy,
    RegistryDamaged,
    RegistryDriverMissing,
    RegistryElsewhere,
    RegistryError,
    RegistryNotEmpty,
    RegistryPathInvalid,
    RegistryUnreachable,
    RegistryUnreadable,
    RegistryUrlInvalid,
    TargetTaken,
    VolumeExists,
    VolumeNameInvalid,
    VolumeUnknown,
    WindowInvalid,
)
from lockstep.registry import audit, schema, windows
from lockstep.registry.access import Grant
from lockstep.registry.audit import Actor, AuditCheck, AuditRecord
from lockstep.registry.models import AUDIT, AUDIT_HEAD, GRANTS, MIRRORS, OWNER, USER_CHARS, VOLUMES
from lockstep.registry.windows import Schedule

LOCK_TIMEOUT_S = 10.0
"""How long an operation waits for another process's."""

OnDenied = Literal["hold", "refuse"]

Record = TypeVar("Record", "VolumeRecord", "MirrorRecord")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_WRITERS_LOCK = 0x6C6F636B
"""PostgreSQL's advisory locks are numbers of a database: this is "lock" in ASCII, and beside it stands the schema."""

_PIECE_ROWS = 5000  # of the audit trail, read in a fraction of a second

_SQLITE_SCHEME = "sqlite:///"
_POSTGRESQL_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")

_LATEST_US = 253_370_764_800_000_000  # the end of the year 9998, in every time zone a moment that there is

_CONNECT_OPTIONS = {"connect_timeout": "10", "tcp_user_timeout": "10000", "client_encoding": "utf8"}
"""libpq's, in s and ms, where the URL does not say otherwise: a dead server is an error, not a hang."""

# (dialect, does it write) -> the statements that open a transaction.
_OPENING: dict[tuple[str, bool], tuple[str, ...]] = {
    ("sqlite", False): ("BEGIN",),
    ("sqlite", True): ("BEGIN IMMEDIATE",),
    ("postgresql", False): ("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY",),
    ("postgresql", True): (
        f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_S * 1000:.0f}",
        f"SELECT pg_advisory_xact_lock({_WRITERS_LOCK}, hashtext(current_schema()))",
    ),
}

# What the database calls a failure -> what it is to the user; anything else is the default beside it.
_SQLITE_FAILURES: dict[int, type[RegistryError]] = {
    sqlite3.SQLITE_BUSY: RegistryBusy,
    sqlite3.SQLITE_LOCKED: RegistryBusy,
    sqlite3.SQLITE_ERROR: RegistryDamaged,  # a table or column is missing
    sqlite3.SQLITE_CORRUPT: RegistryDamaged,
    sqlite3.SQLITE_NOTADB: RegistryDamaged,
    sqlite3.SQLITE_CONSTRAINT: RegistryDamaged,  # that no check of ours explains
}
_POSTGRESQL_FAILURES: dict[str, type[RegistryError]] = {
    "55P03": RegistryBusy,  # lock_not_available
    "42P01": RegistryDamaged,  # undefined_table
    "42703": RegistryDamaged,  # undefined_column
    "42P07": RegistryDamaged,  # duplicate_table
    "23505": RegistryDamaged,  # unique_violation that no check of ours explains
    "23514": RegistryDamaged,  # check_violation
}


@dataclass(frozen=True, slots=True)
class MirrorRecord:
    """A registered mirror. `generation` is the last that was seen on it; `header_path` is None for an inline header.

    `compare`: it may hold a copy already; cleared at the end of a server under which it came in sync.
    """

    id: str
    volume_id: str
    path: str
    header_path: str | None
    luks_uuid: str
    generation: int
    created_at: datetime
    compare: bool = False


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """A registered volume with its mirrors, oldest first. `sector_bytes` is the target's logical block size.

    `filled_from` is the id of the mirror from which a new target is still being filled; else None.
    """

    id: str
    name: str
    target_path: str
    size_bytes: int
    sector_bytes: int
    on_denied: OnDenied
    scrub: Schedule | None
    created_at: datetime
    mirrors: tuple[MirrorRecord, ...]
    filled_from: str | None = None

    @property
    def source(self) -> MirrorRecord | None:
        """The mirror from which a new target is still being filled; else None."""
        return next((mirror for mirror in self.mirrors if mirror.id == self.filled_from), None)


class Registry:
    """The volumes and their mirrors. Threads may share one; every method may raise the errors of `open`."""

    def __init__(self, engine: Engine, label: str) -> None:
        self._engine = engine
        self._owner_id: str | None = None
        self.label = label
        """What it is called in messages: its path, or its URL without secrets."""

    @classmethod
    def open(cls, url: str) -> Self:
        """Open the registry and bring its schema up to date.

        `url` is `sqlite:///PATH`, PATH being literal (nothing in it is escaped; the file is created with mode 0600,
        its directory is not), or `postgresql://[USER[:PASSWORD]@]HOST[:PORT]/DATABASE[?libpq options]`.

        Raises RegistryUrlInvalid, RegistryDriverMissing, RegistryUnreadable (file), RegistryUnreachable (server),
        RegistryBusy, RegistryDamaged, RegistryTooNew, RegistryNotUnicode.
        """
        registry = cls(*(_sqlite(url) if url.startswith("sqlite:") else _postgresql(url)))
        try:
            with registry._transaction() as connection:
                found = schema.found_revision(connection)
            if found != schema.REVISION:
                with registry._transaction(write=True) as connection:
                    schema.bring_up_to_date(connection, registry.label)
        except BaseException:
            registry.close()
            raise
        return registry

    def close(self) -> None:
        """Give back every connection. Closing twice is allowed."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def owned(self) -> bool:
        """Whether it belongs to a state directory already."""
        with self._transaction() as connection:
            return _owner(connection) is not None

    def belong_to(self, state_id: str, place: str) -> None:
        """Have it belong to the state directory with this UUID, which is at `place`, from now on.

        Raises RegistryElsewhere where it belongs to another, here and at every change that comes later.
        """
        with self._transaction() as connection:
            found = _owner(connection)
        if found is None:
            with self._transaction(write=True) as connection:
                if _owner(connection) is None:  # else somebody was quicker
                    connection.execute(insert(OWNER).values(id=1, state_id=state_id, place=place))
                found = _owner(connection)
        self._owner_id = state_id
        self._require_ours(found)

    def move(self, other: "Registry", label: str, settle: Callable[[], None], *, actor: Actor) -> None:
        """Copy everything to an empty registry, and have that be the one from now on, which is called `label` then.

        `settle` is called once all of it is durable there, and before anybody can change anything here again. It has
        others find the new one. Where it fails, this one goes on. Raises RegistryNotEmpty.
        """
        with self._transaction(write=True) as here:
            with other._transaction(write=True) as there:
                if there.scalar(select(VOLUMES.c.id)) or there.scalar(select(AUDIT.c.number)):
                    raise RegistryNotEmpty(registry=other.label)
                for table in (VOLUMES, MIRRORS, GRANTS, AUDIT, AUDIT_HEAD):
                    for rows in here.execute(select(table)).mappings().partitions(1000):
                        there.execute(insert(table), [dict(row) for row in rows])
                reason = f"{actor.user} moved the registry from {self.label} to {label}"
                _append(there, "registry-moved", actor, "", reason, {"from": self.label, "to": label})
            settle()
            if self._owner_id is not None:
                here.execute(delete(OWNER))

    def volumes(self) -> tuple[VolumeRecord, ...]:
        """All volumes, by name."""
        with self._transaction() as connection:
            rows = connection.execute(select(VOLUMES)).all()
            records = [_volume_record(row, _mirrors(connection, row.id)) for row in rows]
            return tuple(sorted(records, key=lambda volume: volume.name))  # here: each database collates in its own way

    def volume(self, name: str) -> VolumeRecord:
        """Return one volume. Raises VolumeUnknown, which knows similar names."""
        with self._transaction() as connection:
            row = _find(connection, name)
            return _volume_record(row, _mirrors(connection, row.id))

    def mirrors_of(self, volume_id: str) -> tuple[MirrorRecord, ...]:
        """Step 502: the target's mirrors, oldest first. None of them (step 505): the target is written alone."""
        with self._transaction() as connection:
            return _mirrors(connection, volume_id)

    def add_volume(
        self,
        name: str,
        *,
        target_path: str,
        size_bytes: int,
        sector_bytes: int,
        on_denied: OnDenied = "hold",
        actor: Actor,
    ) -> VolumeRecord:
        """Register a target, without mirrors yet, and grant it to `actor`, to nobody else.

        Raises VolumeNameInvalid, RegistryPathInvalid, VolumeExists, TargetTaken, MirrorTaken, HeaderTaken.
        """
        check_name(name)
        _check_path(target_path)

        def add(connection: Connection) -> VolumeRecord:
            if connection.scalar(select(VOLUMES.c.id).where(VOLUMES.c.name == name)):
                raise VolumeExists(volume=name)
            _refuse_taken(connection, target_path)
            values = _new() | {
                "name": name,
                "target_path": target_path,
                "size_bytes": size_bytes,
                "sector_bytes": sector_bytes,
                "on_denied": on_denied,
            }
            connection.execute(insert(VOLUMES).values(values))
            _grant_to(connection, values["id"], actor.user, (), "UTC")
            reason = f"{actor.user} created the volume {name}, and was granted it"
            _append(connection, "volume-added", actor, name, reason, {"target": target_path, "on_denied": on_denied})
            return VolumeRecord(**values, scrub=None, mirrors=())

        return self._insert(add)

    def remove_volume(self, name: str, *, actor: Actor) -> None:
        """Forget a volume, its mirrors and its grants; not its audit trail, and no disk. Raises VolumeUnknown."""
        with self._transaction(write=True) as connection:
            connection.execute(delete(VOLUMES).where(VOLUMES.c.id == _find(connection, name).id))
            _append(connection, "volume-removed", actor, name, f"{actor.user} removed the volume {name}", {})

    def add_mirror(
        self,
        name: str,
        *,
        path: str,
        luks_uuid: str,
        header_path: str | None = None,
        generation: int = 0,
        compare: bool = False,
        actor: Actor,
    ) -> MirrorRecord:
        """Register a mirror of the volume `name`; `compare` says that it may hold a copy already.

        Raises VolumeUnknown, RegistryPathInvalid, TargetTaken, MirrorTaken, HeaderTaken, LuksUuidTaken.
        """
        paths = [path] if header_path is None else [path, header_path]
        for each in paths:
            _check_path(each)
        if path == header_path:
            raise RegistryPathInvalid(path=path, reason="it is given as the mirror and as its header")

        def add(connection: Connection) -> MirrorRecord:
            volume = _find(connection, name)
            _refuse_taken(connection, *paths)
            if twin := connection.scalar(select(MIRRORS.c.path).where(MIRRORS.c.luks_uuid == luks_uuid)):
                raise LuksUuidTaken(path=path, luks_uuid=luks_uuid, registered=twin)
            values = _new() | {
                "volume_id": volume.id,
                "path": path,
                "header_path": header_path,
                "luks_uuid": luks_uuid,
                "generation": generation,
                "compare": compare,
            }
            connection.execute(insert(MIRRORS).values(values))
            reason = f"{actor.user} gave the volume {name} the {'adopted ' if compare else ''}mirror {path}"
            _append(connection, "mirror-added", actor, name, reason, {"path": path, "luks_uuid": luks_uuid})
            return MirrorRecord(**values)

        return self._insert(add)

    def remove_mirror(self, name: str, path: str, *, actor: Actor) -> None:
        """Forget one mirror; the disk is not touched. Raises VolumeUnknown, MirrorUnknown."""
        with self._transaction(write=True) as connection:
            volume = _find(connection, name)
            if not _hit(connection, delete(MIRRORS).where(MIRRORS.c.volume_id == volume.id, MIRRORS.c.path == path)):
                raise MirrorUnknown(mirror=path, where=f" with the volume {name}")
            reason = f"{actor.user} took the mirror {path} from the volume {name}"
            _append(connection, "mirror-removed", actor, name, reason, {"path": path})

    def replace_target(self, name: str, path: str, mirror_id: str, *, actor: Actor) -> None:
        """Have a volume filled anew at `path` from one of its mirrors; the others are compared with that.

        Raises VolumeUnknown, RegistryPathInvalid, TargetTaken, MirrorTaken, HeaderTaken.
        """
        _check_path(path)
        with self._transaction(write=True) as connection:
            volume = _find(connection, name)
            former = volume.target_path
            _set_target(connection, volume, path, filled_from=mirror_id)
            others = MIRRORS.c.id != mirror_id
            connection.execute(update(MIRRORS).where(MIRRORS.c.volume_id == volume.id).values(compare=others))
            source = connection.execute(select(MIRRORS.c.path).where(MIRRORS.c.id == mirror_id)).scalar_one()
            reason = f"{actor.user} had the target {former} replaced by {path}, filled from the mirror {source}"
            details = {"path": path, "former": former, "mirror": source}
            _append(connection, "target-replaced", actor, name, reason, details)

    def move_target(self, name: str, path: str, *, actor: Actor) -> None:
        """Have a volume look for its target at `path`.

        Raises VolumeUnknown, RegistryPathInvalid, TargetTaken, MirrorTaken, HeaderTaken.
        """
        _check_path(path)
        with self._transaction(write=True) as connection:
            volume = _find(connection, name)
            former = volume.target_path
            _set_target(connection, volume, path)
            reason = f"{actor.user} set target={path}"
            _append(connection, "target-moved", actor, name, reason, {"path": path, "former": former})

    def target_filled(self, name: str, *, actor: Actor) -> None:
        """Note that a new target holds everything. Raises VolumeUnknown."""
        with self._transaction(write=True) as connection:
            volume = _find(connection, name)
            _set(connection, volume, filled_from=None)
            reason = f"the new target {volume.target_path} of the volume {name} holds everything"
            _append(connection, "target-filled", actor, name, reason, {"path": volume.target_path})

    def set_on_denied(self, name: str, policy: OnDenied, *, actor: Actor) -> None:
        """Say what becomes of updates that are denied. Raises VolumeUnknown."""
        with self._transaction(write=True) as connection:
            _set(connection, _find(connection, name), on_denied=policy)
            reason = f"{actor.user} set on-denied={policy}"
            _append(connection, "on-denied", actor, name, reason, {"on_denied": policy})

    def set_scrub(self, name: str, schedule: Schedule | None, *, actor: Actor) -> None:
        """Say when the mirrors are scrubbed; None is never. Raises VolumeUnknown."""
        with self._transaction(write=True) as connection:
            window, timezone = (str(schedule.window), schedule.timezone) if schedule else (None, None)
            _set(connection, _find(connection, name), scrub_window=window, scrub_timezone=timezone)
            reason = f"{actor.user} set scrub={schedule or 'off'}"
            _append(connection, "scrub-schedule", actor, name, reason, {"scrub": str(schedule) if schedule else None})

    # --- who may update the mirrors ---

    def grants(self, name: str) -> tuple[Grant, ...]:
        """All grants of a volume, by user. Raises VolumeUnknown."""
        with self._transaction() as connection:
            rows = connection.execute(select(GRANTS).where(GRANTS.c.volume_id == _find(connection, name).id))
            return tuple(sorted(map(_grant, rows), key=lambda grant: grant.user))

    def grant(self, name: str, grant: Grant, *, actor: Actor) -> None:
        """Give a user, or everybody, the right to update the mirrors, in place of the old. Raises VolumeUnknown."""
        texts = [str(window) for window in grant.windows]
        with self._transaction(write=True) as connection:
            volume = _find(connection, name)
            connection.execute(delete(GRANTS).where(GRANTS.c.volume_id == volume.id, GRANTS.c.user == grant.user))
            _grant_to(connection, volume.id, grant.user, texts, grant.timezone)
            when = f" {', '.join(texts)} ({grant.timezone})" if texts else ""
            reason = f"{actor.user} granted {grant.user} the mirrors of {name}{when}"
            details = {"grantee": grant.user, "windows": texts, "timezone": grant.timezone}
            _append(connection, "granted", actor, name, reason, details)

    def revoke(self, name: str, user: str, *, actor: Actor) -> None:
        """Take a user's right away, or everybody's. Raises VolumeUnknown, GrantUnknown."""
        with self._transaction(write=True) as connection:
            volume = _find(connection, name)
            if not _hit(
                connection, delete(GRANTS).where(GRANTS.c.volume_id == volume.id, GRANTS.c.user == _text(user))
            ):
                raise GrantUnknown(user=user, volume=name)
            reason = f"{actor.user} took the mirrors of {name} from {user}"
            _append(connection, "revoked", actor, name, reason, {"grantee": user})

    # --- the audit trail ---

    def audit(
        self,
        event: str,
        *,
        actor: Actor,
        volume: str,
        reason: str,
        details: Mapping[str, Any],
        at_us: int | None = None,
    ) -> None:
        """Append a row to the audit trail, durably. `at_us` is when it happened, in microseconds; by default now."""
        with self._transaction(write=True) as connection:
            _append(connection, event, actor, volume, reason, details, at_us)

    def audit_rows(
        self,
        *,
        volume: str | None = None,
        user: str | None = None,
        since_s: float | None = None,
        until_s: float | None = None,
        events: Collection[str] | None = None,
    ) -> tuple[AuditRecord, ...]:
        """The rows of the audit trail, oldest first; times in seconds since 1970, the second one excluded."""
        query = select(AUDIT).order_by(AUDIT.c.number)
        if volume is not None:
            query = query.where(AUDIT.c.volume == _text(volume))
        if user is not None:
            query = query.where(AUDIT.c.user == _user(user))
        if since_s is not None:
            query = query.where(AUDIT.c.at_us >= round(since_s * 1e6))
        if until_s is not None:
            query = query.where(AUDIT.c.at_us < round(until_s * 1e6))
        if events is not None:
            query = query.where(AUDIT.c.event.in_(events))
        with self._transaction() as connection:
            found = connection.execute(query).all()
        return tuple(map(_audit_record, found))  # not within it: see `check_audit`

    def check_audit(self, head: str | None = None) -> AuditCheck:
        """Prove that the audit trail is whole; `head`, a hash noted earlier, must still be in it.

        It is read a piece at a time: who writes to a SQLite file waits for who reads it, and a server that has waited
        too long to write the trail lets its mirrors fall behind.
        """
        last = (0, audit.FIRST)

        def rows() -> Iterator[AuditRecord]:
            nonlocal last
            query = piece = select(AUDIT).order_by(AUDIT.c.number).limit(_PIECE_ROWS)
            while True:
                with self._transaction() as connection:
                    found = connection.execute(query).all()
                    last = _audit_head(connection) or (0, audit.FIRST)
                yield from map(_audit_record, found)
                if len(found) < _PIECE_ROWS:
                    return
                query = piece.where(AUDIT.c.number > found[-1].number)

        return audit.check(rows(), lambda: last, head)

    def set_generation(self, mirror_id: str, generation: int, *, compare: bool | None = None) -> None:
        """Keep the generation that was last seen on a mirror, and `compare` if given, durably. Raises MirrorUnknown."""
        values: dict[str, Any] = {"generation": generation} | ({} if compare is None else {"compare": compare})
        with self._transaction(write=True) as connection:
            if not _hit(connection, update(MIRRORS).where(MIRRORS.c.id == mirror_id).values(**values)):
                raise MirrorUnknown(mirror=mirror_id, where="")

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[Connection]:
        """One transaction: committed at the end, rolled back on an error; the database's errors in our words."""
        try:
            with self._engine.begin() as connection:
                for statement in _OPENING[self._engine.dialect.name, write]:
                    connection.execute(text(statement))
                if write:
                    self._require_not_moved(connection)
                yield connection
        except DBAPIError as error:
            raise _in_our_words(error, self.label) from error
        except (ValueError, TypeError, WindowInvalid) as error:  # a row that no program of ours has written
            raise RegistryDamaged(registry=self.label, reason=f"it holds what makes no sense ({error})") from error

    def _require_not_moved(self, connection: Connection) -> None:
        if self._owner_id is not None:
            self._require_ours(_owner(connection))
        elif self._engine.dialect.name == "sqlite" and not os.path.exists(self.label):
            raise RegistryUnreadable(registry=self.label, reason="it was moved away")

    def _require_ours(self, owner: Row[Any] | None) -> None:
        if owner is None or owner.state_id != self._owner_id:
            place = owner.place if owner else "no state directory any more"
            raise RegistryElsewhere(registry=self.label, place=place)

    def _insert(self, work: Callable[[Connection], Record]) -> Record:
        """Do what inserts a row, and return its record.

        A constraint that rejects what the checks let through means that somebody without our lock was quicker, or
        damage. So it is done once more: the checks then see the other's row and name it, or the error comes again.
        """

        def once() -> Record:
            with self._transaction(write=True) as connection:
                return work(connection)

        try:
            return once()
        except RegistryDamaged:
            return once()


def check_name(name: str) -> str:
    """Return `name` if a volume may be called so. Raises VolumeNameInvalid."""
    if not _NAME.fullmatch(name):
        raise VolumeNameInvalid(volume=name)
    return name


def _check_path(path: str) -> None:
    """Refuse what no disk's path can be, or what no database's text can hold."""
    if not os.path.isabs(path):
        raise RegistryPathInvalid(path=path, reason="it is not absolute")
    if not path.isprintable():
        raise RegistryPathInvalid(path=path, reason="it holds bytes that are not printable text")


def _new() -> dict[str, Any]:
    """What every new row has."""
    return {"id": str(uuid.uuid4()), "created_at": datetime.now(UTC)}


def _find(connection: Connection, name: str) -> Row[Any]:
    if volume := connection.execute(select(VOLUMES).where(VOLUMES.c.name == _text(name))).first():
        return volume
    near = get_close_matches(name, connection.scalars(select(VOLUMES.c.name)))
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise VolumeUnknown(volume=name, near=tuple(near), hint=hint)


def _set(connection: Connection, volume: Row[Any], **values: object) -> None:
    connection.execute(update(VOLUMES).where(VOLUMES.c.id == volume.id).values(**values))


def _set_target(connection: Connection, volume: Row[Any], path: str, **values: object) -> None:
    """Have the volume's target be at `path`, unless something else is."""
    if path != volume.target_path:
        _refuse_taken(connection, path)
    _set(connection, volume, target_path=path, **values)


def _mirrors(connection: Connection, volume_id: str) -> tuple[MirrorRecord, ...]:
    rows = select(MIRRORS).where(MIRRORS.c.volume_id == volume_id).order_by(MIRRORS.c.created_at, MIRRORS.c.path)
    return tuple(MirrorRecord(**row) for row in connection.execute(rows).mappings())


def _grant_to(connection: Connection, volume_id: str, user: str, texts: Sequence[str], timezone: str) -> None:
    values = {"volume_id": volume_id, "user": user, "windows": json.dumps(texts), "timezone": timezone}
    connection.execute(insert(GRANTS).values(_new() | values))


_ROLES: tuple[tuple[Column[Any], type[RegistryError]], ...] = (
    (VOLUMES.c.target_path, TargetTaken),
    (MIRRORS.c.path, MirrorTaken),
    (MIRRORS.c.header_path, HeaderTaken),
)


def _refuse_taken(connection: Connection, *paths: str) -> None:
    """Refuse a disk that already has a role, in this volume or another."""
    for role, error in _ROLES:
        held = select(role, VOLUMES.c.name).select_from(VOLUMES.outerjoin(MIRRORS)).where(role.in_(paths))
        if taken := connection.execute(held).first():
            raise error(path=taken[0], volume=taken[1])


def _hit(connection: Connection, statement: Delete | Update) -> bool:
    """Execute, and say whether there was a row to change."""
    return connection.execute(statement).rowcount > 0


def _owner(connection: Connection) -> Row[Any] | None:
    return connection.execute(select(OWNER)).first()


def _audit_head(connection: Connection) -> tuple[int, str] | None:
    row = connection.execute(select(AUDIT_HEAD)).first()
    return (row.number, row.hash) if row else None


def _append(
    connection: Connection,
    event: str,
    actor: Actor,
    volume: str,
    reason: str,
    details: Mapping[str, Any],
    at_us: int | None = None,
) -> None:
    """Add a row to the audit trail, in the transaction of what it tells of."""
    head = _audit_head(connection)
    number, previous = head or (0, audit.FIRST)
    record = AuditRecord(
        number=number + 1,
        at_us=time.time_ns() // 1000 if at_us is None else at_us,
        volume=volume,
        event=event,
        user=_user(actor.user),
        origin=_text(actor.origin),
        reason=_text(reason),
        details=_storable(json.loads(json.dumps(details))),
        previous=previous,
        hash="",
    )
    sealed = replace(record, hash=audit.hash_of(record.members()))
    columns = sealed.members() | {"at_us": sealed.at_us, "details": json.dumps(sealed.details), "hash": sealed.hash}
    del columns["at"]
    connection.execute(insert(AUDIT).values(columns))
    following = {"id": 1, "number": sealed.number, "hash": sealed.hash}
    connection.execute((update if head else insert)(AUDIT_HEAD).values(following))


def _text(text: str) -> str:
    """What every database can hold: a path may have bytes that are no UTF-8, or a NUL in a name that somebody sent."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _user(name: str) -> str:
    """As much of a user's name as a row has room for; the reason has all of it.

    An account's may be longer, where a directory service gives them, and PostgreSQL would not take the row, ever.
    """
    return _text(name)[:USER_CHARS]


def _storable(value: Any) -> Any:
    """The same for all text in what JSON can hold, names of members included."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return {_text(name): _storable(each) for name, each in value.items()}
    return [_storable(each) for each in value] if isinstance(value, list) else value


def _audit_record(row: Row[Any]) -> AuditRecord:
    """A row as it is, though somebody altered it by hand to what it never was: the check has to say so."""
    try:
        details = json.loads(row.details)
    except (ValueError, TypeError):
        details = None
    if not isinstance(details, dict):  # so who looks for something in it finds nothing
        details = {"altered": str(row.details)}
    names = ("volume", "event", "user", "origin", "reason", "previous", "hash")
    texts = {name: str(getattr(row, name)) for name in names}
    at_us = row.at_us if isinstance(row.at_us, int) and 0 <= row.at_us < _LATEST_US else 0
    return AuditRecord(number=row.number, at_us=at_us, details=details, **texts)


def _grant(row: Row[Any]) -> Grant:
    return Grant(row.user, tuple(map(windows.parse, json.loads(row.windows))), row.timezone)


def _schedule(row: Row[Any]) -> Schedule | None:
    if row.scrub_window is None or row.scrub_timezone is None:
        return None
    return Schedule(windows.parse(row.scrub_window), row.scrub_timezone)


def _volume_record(row: Row[Any], mirrors: tuple[MirrorRecord, ...]) -> VolumeRecord:
    return VolumeRecord(
        id=row.id,
        name=row.name,
        target_path=row.target_path,
        size_bytes=row.size_bytes,
        sector_bytes=row.sector_bytes,
        on_denied=cast("OnDenied", row.on_denied),
        scrub=_schedule(row),
        created_at=row.created_at,
        mirrors=mirrors,
        filled_from=row.filled_from,
    )


def _sqlite(url: str) -> tuple[Engine, str]:
    """Return the engine for a file, which exists from here on, and the file's path for messages."""
    given = url.removeprefix(_SQLITE_SCHEME)
    if given in ("", url) or "\0" in given:
        raise RegistryUrlInvalid(reason=f"after {_SQLITE_SCHEME} it names no file")
    path = os.path.abspath(given)
    try:
        os.mknod(path, 0o600)
    except FileExistsError:
        pass
    except OSError as error:
        raise RegistryUnreadable(registry=path, reason=error.strerror) from error

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{quote(os.fsencode(path))}?mode=rw",
            uri=True,
            timeout=LOCK_TIMEOUT_S,
            isolation_level=None,  # the transactions are ours, see _OPENING
            check_same_thread=False,
        )
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = EXTRA")
        except BaseException:
            connection.close()
            raise
        return connection

    return create_engine(_SQLITE_SCHEME, creator=connect, poolclass=NullPool), path


def _postgresql(url: str) -> tuple[Engine, str]:
    """Return the engine for a server's database, and its URL without secrets for messages."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise RegistryUrlInvalid(reason="it is not a URL") from None  # the cause would quote it, password and all
    if parsed.drivername not in _POSTGRESQL_SCHEMES:
        raise RegistryUrlInvalid(reason=f"{parsed.drivername} is not postgresql")
    options = {name: value for name, value in _CONNECT_OPTIONS.items() if name not in parsed.query}
    try:
        engine = create_engine(parsed.set(drivername="postgresql+psycopg"), connect_args=options, pool_pre_ping=True)
    except ImportError as error:
        raise RegistryDriverMissing(reason=str(error)) from error
    return engine, parsed.set(query={}).render_as_string()


def _in_our_words(error: DBAPIError, label: str) -> RegistryError:
    """The database's error as a row of the catalogue."""
    reason = " ".join(str(error.orig).split())
    if isinstance(error.orig, sqlite3.Error):
        code = getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # the primary result code
        return _SQLITE_FAILURES.get(code, RegistryUnreadable)(registry=label, reason=reason)
    state = getattr(error.orig, "sqlstate", None)
    return _POSTGRESQL_FAILURES.get(state or "", RegistryUnreachable)(registry=label, reason=reason)
