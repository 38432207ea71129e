"""Windows and verdicts against an independent calculation: minute by minute on the wall clock, weeks of it."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.errors import TimezoneUnknown, WindowInvalid
from lockstep.registry import windows
from lockstep.registry.access import ANYBODY, Grant, decide
from lockstep.registry.windows import DAYS, Window, parse

ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "America/St_Johns"]
# Each zone's clock changes within three weeks of one of these (2026), or never.
STARTS = [datetime(2026, month, day, tzinfo=UTC) for month, day in ((2, 25), (3, 22), (10, 18), (10, 26), (7, 1))]


@st.composite
def some_windows(draw: st.DrawFn) -> tuple[Window, ...]:
    found = []
    for _ in range(draw(st.integers(1, 3))):
        days = draw(st.sets(st.integers(0, 6), min_size=1))
        start = draw(st.integers(0, 1439) | st.sampled_from([0, 60, 90, 120, 150, 180, 1380]))
        minutes = draw(st.integers(1, 1440) | st.sampled_from([30, 60, 1440]))
        found.append(Window(tuple(sorted(days)), start if minutes < 1440 else 0, minutes))
    return tuple(found)


def shown_inside(window: Window, wall: datetime) -> bool:
    """Whether the wall clock shows a time inside a window, by its dates: an opening today, or yesterday."""
    for back in (0, 1):
        day = wall.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None) - timedelta(days=back)
        opens = day + timedelta(minutes=window.start)
        if day.weekday() in window.days and opens <= wall.replace(tzinfo=None) < opens + timedelta(
            minutes=window.minutes
        ):
            return True
    return False


@settings(max_examples=60, deadline=None)
@given(
    found=some_windows(),
    zone=st.sampled_from(ZONES),
    start=st.sampled_from(STARTS),
    offset_s=st.integers(0, 14 * 86400) | st.floats(0, 14 * 86400),
)
def test_a_window_and_its_next_change_are_those_of_the_wall_clock(
    found: tuple[Window, ...], zone: str, start: datetime, offset_s: float
) -> None:
    tz = ZoneInfo(zone)
    now_s = start.timestamp() + offset_s

    def is_open(at_s: float) -> bool:
        return any(shown_inside(window, datetime.fromtimestamp(at_s, tz)) for window in found)

    now = is_open(now_s)
    assert windows.is_open(found, zone, now_s) is now
    expected = None
    minute = now_s // 60 * 60
    for number in range(1, 9 * 1440):
        if is_open(minute + 60 * number) is not now:
            expected = minute + 60 * number
            break
    change = windows.next_change(found, zone, now_s)
    if expected is None:
        assert change is None or change > minute + 9 * 86400
    else:
        assert change == expected


@settings(max_examples=60, deadline=None)
@given(
    grants=st.lists(st.tuples(some_windows(), st.sampled_from(ZONES)), min_size=1, max_size=3),
    step_s=st.integers(0, 10**6),
)
def test_joined_grants_allow_what_one_of_them_allows(grants: list[tuple[tuple[Window, ...], str]], step_s: int) -> None:
    held = [Grant(user, *each) for user, each in zip(["ada", ANYBODY, "ada"], grants, strict=False)]
    now_s = STARTS[1].timestamp() + step_s
    verdict = decide("ada", "vm1", held, now_s)
    assert verdict.allowed is any(grant.is_open(now_s) for grant in held)
    if verdict.until_s is not None:
        after = decide("ada", "vm1", held, verdict.until_s)
        assert after.kind != verdict.kind
        between_s = random.Random(step_s).uniform(now_s, verdict.until_s - 1e-3)
        assert decide("ada", "vm1", held, between_s).kind == verdict.kind


@given(some_windows())
def test_what_is_printed_is_read_again(found: tuple[Window, ...]) -> None:
    for window in found:
        assert parse(str(window)) == window


@pytest.mark.parametrize(
    ("text", "days", "start", "minutes"),
    [
        ("mon-fri 22:00-06:00", (0, 1, 2, 3, 4), 1320, 480),
        ("sat,sun 00:00-24:00", (5, 6), 0, 1440),
        ("fri-mon 01:30-03:00", (0, 4, 5, 6), 90, 90),
        (" Daily  23:59-00:00 ", tuple(range(7)), 1439, 1),
    ],
)
def test_parse(text: str, days: tuple[int, ...], start: int, minutes: int) -> None:
    assert parse(text) == Window(days, start, minutes)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is not DAYS HH:MM-HH:MM"),
        ("mon 8:00-9:00", "it is not DAYS HH:MM-HH:MM"),
        ("mon 08:00-25:00", "25:00 is not a time of day"),
        ("mon 08:60-09:00", "08:60 is not a time of day"),
        ("mon 24:00-09:00", "24:00 is its end"),
        ("mon 08:00-08:00", "a whole day is 00:00-24:00"),
        ("someday 08:00-09:00", "'someday' is neither a day"),
        ("mon-someday 08:00-09:00", "'mon-someday' is neither a day"),
        ("mon,,tue 08:00-09:00", "'' is neither a day"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, reason: str) -> None:
    with pytest.raises(WindowInvalid) as refused:
        parse(text)
    assert reason in str(refused.value)


@pytest.mark.parametrize("name", ["Europe/Atlantis", "", "../../etc/passwd", "\0"])
def test_an_unknown_time_zone(name: str) -> None:
    with pytest.raises(TimezoneUnknown):
        windows.zone(name)


@pytest.mark.parametrize(
    ("text", "zone", "utc", "is_open"),
    [
        ("sun 02:00-03:00", "Europe/Berlin", "2026-03-29T01:00", False),  # 02:00 does not exist: 03:00 is shown
        ("sun 02:30-03:30", "Europe/Berlin", "2026-03-29T01:15", True),  # 03:15
        ("sun 02:00-03:00", "Europe/Berlin", "2026-10-25T00:30", True),  # 02:30, for the first time
        ("sun 02:00-03:00", "Europe/Berlin", "2026-10-25T01:30", True),  # 02:30, for the second
        ("sun 02:00-03:00", "Europe/Berlin", "2026-10-25T02:00", False),
        ("sat 22:00-02:30", "Europe/Berlin", "2026-10-25T00:45", False),  # 02:45: closed ...
        ("sat 22:00-02:30", "Europe/Berlin", "2026-10-25T01:15", True),  # ... and open again at 02:15
        ("mon 00:00-24:00", "Australia/Lord_Howe", "2026-10-05T12:59", True),
        ("mon 00:00-24:00", "Australia/Lord_Howe", "2026-10-05T13:00", False),
    ],
)
def test_clock_changes(text: str, zone: str, utc: str, is_open: bool) -> None:
    at_s = datetime.fromisoformat(utc).replace(tzinfo=UTC).timestamp()
    assert windows.is_open((parse(text),), zone, at_s) is is_open


def test_a_window_that_a_clock_change_swallows_opens_a_week_later() -> None:
    night = (parse("sun 02:00-03:00"),)
    after_s = datetime(2026, 3, 28, tzinfo=UTC).timestamp()
    assert windows.next_change(night, "Europe/Berlin", after_s) == datetime(2026, 4, 5, tzinfo=UTC).timestamp()


def test_who_has_no_grant_has_no_right_and_who_has_no_window_always() -> None:
    everybody = Grant(ANYBODY, (), "UTC")
    assert decide("ada", "vm1", [], 0).kind == "no-right"
    assert decide("ada", "vm1", [Grant("bob", (), "UTC")], 0).kind == "no-right"
    assert decide("ada", "vm1", [everybody], 0) == decide("ada", "vm1", [Grant("ada", (), "UTC")], 0)
    assert decide("ada", "vm1", [everybody], 0).until_s is None
    week = tuple(parse(f"{day} 00:00-24:00") for day in DAYS)
    assert decide("ada", "vm1", [Grant("ada", week, "Europe/Berlin")], 1e9).until_s is None


def test_windows_beside_a_right_that_always_holds_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server asks on its loop, for each user and each second: half a thousand changes took it a second."""
    hours = tuple(parse(f"daily {hour:02}:00-{hour:02}:30") for hour in range(24))
    grants = [Grant("ada", hours, "Europe/Berlin"), Grant(ANYBODY, (), "UTC")]
    looks = []
    search = windows._days_of_candidates

    def counted(found: tuple[Window, ...], tz: ZoneInfo, after_s: float) -> Iterator[set[float]]:
        looks.append(after_s)
        return search(found, tz, after_s)

    monkeypatch.setattr(windows, "_days_of_candidates", counted)
    for now_s in (1e9, 1e9 + 1800):  # outside ada's windows and inside
        assert decide("ada", "vm1", grants, now_s).until_s is None
        assert decide("ada", "vm1", grants[::-1], now_s).until_s is None
    assert len(looks) <= 4


def test_a_verdict_says_why_and_until_when() -> None:
    nights = Grant("ada", (parse("mon-fri 22:00-06:00"),), "Europe/Berlin")
    noon_s = datetime(2026, 11, 24, 11, tzinfo=UTC).timestamp()
    closed = decide("ada", "vm1", [nights], noon_s)
    assert closed.reason == (
        "ada may update the mirrors of vm1, but not at this time, and then from Tue 24 Nov 22:00 (Europe/Berlin) on"
    )
    assert closed.until_s is not None
    night = decide("ada", "vm1", [nights], closed.until_s)
    assert night.reason == "ada may update the mirrors of vm1 until Wed 25 Nov 06:00 (Europe/Berlin)"
    assert decide("mallory", "vm1", [nights], noon_s).reason == "mallory has no right to update the mirrors of vm1"
