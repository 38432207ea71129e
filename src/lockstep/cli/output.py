"""How things are said: errors, sizes, moments, JSON. One state, printed for people or for programs."""

import json
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import typer

from lockstep.errors import LockstepError

EARLIER = "It is the disk as it was when the mirror froze, or its server let it go: it lacks what was written since."
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def report_error(error: LockstepError) -> None:
    """Print what happened, the likely cause and the next step, on standard error."""
    typer.echo(visible(f"lockstep: {error}"), err=True)
    if error.cause:
        typer.echo(visible(f"  Likely cause: {error.likely_cause}"), err=True)
    if error.next_step:
        typer.echo(visible(f"  Next step:    {error.advice}"), err=True)


def visible(text: str) -> str:
    """Return text with nothing in it that a terminal would obey: names and headers come from somebody else."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_json(value: Any, *, err: bool = False) -> None:
    """Print one JSON document on one line; with `err` on standard error, where data has standard output."""
    typer.echo(json.dumps(value), err=err)


def human_bytes(count: float) -> str:
    """Return a size for people: 256.0 MiB."""
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def human_moment(at_s: float, timezone: str | None = None) -> str:
    """Return a moment for people, on the clock of a time zone or this machine's: 2026-11-24 22:00:00."""
    return f"{datetime.fromtimestamp(at_s, ZoneInfo(timezone) if timezone else None):%Y-%m-%d %H:%M:%S}"


def human_seconds(count: float) -> str:
    """Return a duration for people: 45 s, 3 min 20 s, 2 h 5 min."""
    minutes, seconds = divmod(round(count), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
