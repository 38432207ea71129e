"""The audit trail: who did what to which volume, when, from where and why; each row is sealed to the one before.

The hash of a row is SHA-256 over its canonical form: the JSON object of its members `number`, `at`, `volume`, `event`,
`user`, `origin`, `reason`, `details` and `previous` (the hash of the row before; 64 zeroes for the first), with sorted
keys, no white space and no escapes beyond JSON's own, in UTF-8. `at` is the time in microseconds since 1970.

So a row cannot be changed, taken out, put in or moved without all later hashes changing. Rows at the end can: who notes
the last hash elsewhere, as `audit --check` prints it, can tell that later with `audit --check --head HASH`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

FIRST: Final = "0" * 64
"""What stands for the hash of the row before the first."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts, and from where: `command line`, `unix socket, pid 4711`, `tls 192.0.2.7:50412`."""

    user: str
    origin: str


SERVER: Final = Actor("lockstep", "server")
"""The server of a volume, of its own accord."""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """A row. `at_us` is in microseconds since 1970; `volume` is a name, and empty for what concerns no volume."""

    number: int
    at_us: int
    volume: str
    event: str
    user: str
    origin: str
    reason: str
    details: Mapping[str, Any]
    previous: str
    hash: str

    @property
    def at(self) -> datetime:
        """The time, in UTC."""
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=self.at_us)

    def to_json(self) -> dict[str, Any]:
        """The row as plain data, as `audit --json` prints it: the members, a readable time and the hash."""
        return self.members() | {"time": self.at.isoformat(timespec="microseconds"), "hash": self.hash}

    def members(self) -> dict[str, Any]:
        """What the hash is computed over."""
        names = ("number", "volume", "event", "user", "origin", "reason", "details", "previous")
        return {name: getattr(self, name) for name in names} | {"at": self.at_us}


@dataclass(frozen=True, slots=True)
class AuditCheck:
    """What a check has found: how many rows, the last hash, and if something is wrong, at which row and what."""

    rows: int
    head: str
    bad_number: int | None = None
    reason: str | None = None


def hash_of(members: Mapping[str, Any]) -> str:
    """Return the hash of a row's members, `hash` left out."""
    canonical = json.dumps(members, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def check(rows: Iterable[AuditRecord], last: Callable[[], tuple[int, str]], head: str | None) -> AuditCheck:
    """Check all rows, in the order of their numbers.

    `last` returns the number and the hash of the last row as the registry kept them beside the trail when that was read
    to its end; `head` is a hash that was noted earlier, which must still be in it.
    """
    number, previous = 0, FIRST
    seen_head = head in (None, FIRST)
    for row in rows:
        number += 1
        if row.number != number:
            return AuditCheck(number - 1, previous, number, f"row {number} is missing")
        if row.previous != previous:
            return AuditCheck(number - 1, previous, number, f"row {number} does not follow the row before it")
        if row.hash != hash_of(row.members()):
            return AuditCheck(number - 1, previous, number, f"row {number} was altered")
        previous = row.hash
        seen_head = seen_head or previous == head
    if last() != (number, previous):
        return AuditCheck(number, previous, number + 1, f"rows {number + 1} to {last()[0]} are missing")
    if not seen_head:
        return AuditCheck(number, previous, number + 1, f"no row has the hash {head}: rows at the end were removed")
    return AuditCheck(number, previous)
