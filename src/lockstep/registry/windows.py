"""Weekly windows: when a grant holds.

    "mon-fri 22:00-06:00"    from Monday to Friday at 22:00, each until 06:00 of the day after
    "sat,sun 00:00-24:00"    the whole weekend
    "daily 01:30-03:00"

Days are `mon` ... `sun`, a range of them (which may pass Sunday: `fri-mon`), several with commas, or `daily`. An end
at or before the start is on the day after; a window belongs to the day on which it begins.

A window is open at an instant exactly when the wall clock of its time zone shows a time inside it: the start belongs to
it, the end does not. So a window that lies in the hour that a clock change skips does not open on that day, and one in
the hour that is repeated opens twice, or is longer by that hour. In a time zone that this machine does not know, as its
tzdata is older than that of who wrote it down, no clock shows anything: its windows are closed.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from lockstep.errors import TimezoneUnknown, WindowInvalid

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES: Final = 24 * 60
WEEK_MINUTES: Final = 7 * DAY_MINUTES

# A clock change can swallow a window; the same window a week later is the next change then.
_HORIZON_DAYS: Final = 16
_WINDOW: Final = re.compile(r"(\S+)\s+(\d\d):(\d\d)-(\d\d):(\d\d)")


@dataclass(frozen=True)
class Window:
    """Open on each of `days` (0 is Monday) from minute `start` of the day for `minutes`, at most a day."""

    days: tuple[int, ...]
    start: int
    minutes: int

    def contains(self, minute_of_week: int) -> bool:
        """Whether it is open when the wall clock shows this minute, counted from Monday 00:00."""
        return any((minute_of_week - day * DAY_MINUTES - self.start) % WEEK_MINUTES < self.minutes for day in self.days)

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        end = self.start + self.minutes
        end = end if end == DAY_MINUTES else end % DAY_MINUTES
        return f"{_named(self.days)} {_clock(self.start)}-{_clock(end)}"


def parse(text: str) -> Window:
    """Read a window. Raises WindowInvalid."""
    match = _WINDOW.fullmatch(text.strip().lower())
    if match is None:
        raise WindowInvalid(window=text, reason="it is not DAYS HH:MM-HH:MM")
    days = tuple(sorted(_days(match[1], text)))
    start = _minute(match[2], match[3], text)
    end = _minute(match[4], match[5], text)
    if start == DAY_MINUTES:
        raise WindowInvalid(window=text, reason="a day begins at 00:00; 24:00 is its end")
    if start == end:
        raise WindowInvalid(window=text, reason="it ends when it begins; a whole day is 00:00-24:00")
    return Window(days, start, (end - start) % DAY_MINUTES or DAY_MINUTES)


@functools.lru_cache(maxsize=64)
def zone(name: str) -> ZoneInfo:
    """Return a time zone by its IANA name. Raises TimezoneUnknown."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise TimezoneUnknown(timezone=name) from error


def forget_zones() -> None:
    """Have each time zone read again: its rules may have changed, and this machine's tzdata with them."""
    zone.cache_clear()
    ZoneInfo.clear_cache()


def is_known(timezone: str) -> bool:
    """Whether this machine knows a time zone."""
    try:
        zone(timezone)
    except TimezoneUnknown:
        return False
    return True


def is_open(windows: tuple[Window, ...], timezone: str, at_s: float) -> bool:
    """Whether one of `windows` is open at `at_s`, seconds since 1970; no windows means always."""
    if not windows:
        return True
    if not is_known(timezone):
        return False
    wall = datetime.fromtimestamp(at_s, zone(timezone))
    minute = wall.weekday() * DAY_MINUTES + wall.hour * 60 + wall.minute
    return any(window.contains(minute) for window in windows)


def next_change(windows: tuple[Window, ...], timezone: str, after_s: float) -> float | None:
    """Return when `is_open` next becomes another answer, in seconds since 1970; None if it never does."""
    if not windows or _whole_week(windows) or not is_known(timezone):
        return None
    now = is_open(windows, timezone, after_s)
    for candidates in _days_of_candidates(windows, zone(timezone), after_s):
        for at_s in sorted(candidates):
            if at_s > after_s and is_open(windows, timezone, at_s) is not now:
                return at_s
    return None


@dataclass(frozen=True)
class Schedule:
    """A weekly window in a time zone, in which something is done."""

    window: Window
    timezone: str

    def open_until(self, at_s: float) -> float | None:
        """Return when the window that is open at `at_s` closes, both in seconds since 1970; None when none is open."""
        if not is_open((self.window,), self.timezone, at_s):
            return None
        return next_change((self.window,), self.timezone, at_s) or at_s + WEEK_MINUTES * 60

    def __str__(self) -> str:
        """Return it for people."""
        return f"{self.window} {self.timezone}"


def _days_of_candidates(windows: tuple[Window, ...], tz: ZoneInfo, after_s: float) -> Iterator[set[float]]:
    """For each day from the one before `after_s`: the instants at which something may change.

    That is when the wall clock shows the start or the end of a window, which in a repeated hour it does twice, and when
    the clock itself changes. Near midnight the days' instants may overlap: they are yielded once all are known.
    """
    marks = {minute for window in windows for minute in (window.start, (window.start + window.minutes) % DAY_MINUTES)}
    today = datetime.fromtimestamp(after_s, tz).replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    pending: set[float] = set()
    for number in range(-1, _HORIZON_DAYS):
        day = today + timedelta(days=number)
        for minute in marks:
            wall = day + timedelta(minutes=minute)
            pending |= {wall.replace(tzinfo=tz, fold=fold).timestamp() for fold in (0, 1)}
        pending |= _clock_changes(day, tz)
        settled_s = (day - timedelta(hours=6)).replace(tzinfo=tz).timestamp()
        yield {at_s for at_s in pending if at_s < settled_s}
        pending = {at_s for at_s in pending if at_s >= settled_s}
    yield pending


def _clock_changes(day: datetime, tz: ZoneInfo) -> set[float]:
    """The instants at which the zone's offset changes, near a day of the wall clock."""
    found = set()
    start = int(day.replace(tzinfo=UTC).timestamp()) - 12 * 3600
    for quarter in range(start, start + 48 * 3600, 6 * 3600):
        low, high = quarter, quarter + 6 * 3600
        if _offset(low, tz) == _offset(high, tz):
            continue
        while high - low > 1:
            middle = (low + high) // 2
            if _offset(middle, tz) == _offset(low, tz):
                low = middle
            else:
                high = middle
        found.add(float(high))
    return found


def _offset(at_s: int, tz: ZoneInfo) -> timedelta | None:
    return datetime.fromtimestamp(at_s, tz).utcoffset()


@functools.lru_cache(maxsize=256)
def _whole_week(windows: tuple[Window, ...]) -> bool:
    return all(any(window.contains(minute) for window in windows) for minute in range(WEEK_MINUTES))


def _days(text: str, window: str) -> set[int]:
    if text == "daily":
        return set(range(len(DAYS)))
    days: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if first not in DAYS or (dash and last not in DAYS):
            raise WindowInvalid(window=window, reason=f"{part!r} is neither a day (mon, tue, ...) nor a range of days")
        start, end = DAYS.index(first), DAYS.index(last if dash else first)
        days |= {(start + step) % len(DAYS) for step in range((end - start) % len(DAYS) + 1)}
    return days


def _named(days: tuple[int, ...]) -> str:
    """The inverse: runs of three days and more as a range."""
    if len(days) == len(DAYS):
        return "daily"
    parts: list[str] = []
    for _, run in itertools.groupby(enumerate(days), key=lambda numbered: numbered[1] - numbered[0]):
        names = [DAYS[day] for _, day in run]
        parts += [f"{names[0]}-{names[-1]}"] if len(names) > 2 else names
    return ",".join(parts)


def _minute(hours: str, minutes: str, window: str) -> int:
    minute = int(hours) * 60 + int(minutes)
    if int(minutes) > 59 or minute > DAY_MINUTES:
        raise WindowInvalid(window=window, reason=f"{hours}:{minutes} is not a time of day")
    return minute


def _clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"
