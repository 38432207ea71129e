"""Step 602: may this user update this volume's mirrors, and may they now? A pure decision."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from lockstep.registry import windows
from lockstep.registry.windows import Window

ANYBODY: Final = "*"
_MOST_CHANGES: Final = 1000

Kind = Literal["allowed", "outside-window", "no-right"]


@dataclass(frozen=True)
class Grant:
    """A user's right to update a volume's mirrors, or everybody's: in these windows, or always if there are none."""

    user: str
    windows: tuple[Window, ...]
    timezone: str

    @property
    def timezone_known(self) -> bool:
        """Whether this machine can tell when its windows are open; until then they are closed."""
        return not self.windows or windows.is_known(self.timezone)

    def is_open(self, at_s: float) -> bool:
        """Whether it holds at `at_s`, seconds since 1970."""
        return windows.is_open(self.windows, self.timezone, at_s)

    def next_change(self, after_s: float) -> float | None:
        """When it next begins or ceases to hold, in seconds since 1970; None if never."""
        return windows.next_change(self.windows, self.timezone, after_s)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer, a sentence that says why, and when it changes (seconds since 1970; None: it does not by itself)."""

    kind: Kind
    reason: str
    until_s: float | None

    @property
    def allowed(self) -> bool:
        """Whether the mirrors may be updated."""
        return self.kind == "allowed"


def decide(user: str, volume_name: str, grants: Sequence[Grant], now_s: float) -> Verdict:
    """Decide for the moment `now_s`, seconds since 1970. All grants of the user's, and of everybody's, join."""
    mine = [grant for grant in grants if grant.user in (user, ANYBODY)]
    if not mine:
        return Verdict("no-right", f"{user} has no right to update the mirrors of {volume_name}", None)
    now_open = any(grant.is_open(now_s) for grant in mine)
    until_s = _next_change(mine, now_s, now_open)
    who = f"{user} may update the mirrors of {volume_name}"
    if now_open:
        return Verdict("allowed", who if until_s is None else f"{who} until {_moment(until_s, mine)}", until_s)
    when = "" if until_s is None else f", and then from {_moment(until_s, mine)} on"
    for unknown in (grant.timezone for grant in mine if not grant.timezone_known):
        when += f"; this machine does not know the time zone {unknown}: update its tzdata, or grant in another zone"
    return Verdict("outside-window", f"{who}, but not at this time{when}", until_s)


def _next_change(grants: Sequence[Grant], now_s: float, now_open: bool) -> float | None:
    """When the grants together give another answer: where windows meet, one ends and nothing changes."""
    if any(grant.is_open(now_s) and grant.next_change(now_s) is None for grant in grants):
        return None  # that one stays open whatever the others do, of which each change would be looked at
    at_s = now_s
    for _ in range(_MOST_CHANGES):
        changes = [change for grant in grants if (change := grant.next_change(at_s)) is not None]
        if not changes:
            return None
        at_s = min(changes)
        if any(grant.is_open(at_s) for grant in grants) is not now_open or at_s > now_s + 16 * 86400:
            break
    return at_s if any(grant.is_open(at_s) for grant in grants) is not now_open else None


def _moment(at_s: float, grants: Sequence[Grant]) -> str:
    """A moment as the wall clock of the grants shows it."""
    timezone = next((grant.timezone for grant in grants if grant.windows and grant.timezone_known), "UTC")
    return f"{datetime.fromtimestamp(at_s, windows.zone(timezone)):%a %d %b %H:%M} ({timezone})"
