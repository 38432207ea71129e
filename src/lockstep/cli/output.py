"""How things look: errors, sizes, JSON, progress. One state, printed for people or for programs."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, Self
from zoneinfo import ZoneInfo

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from lockstep.errors import LockstepError

_PIPE_COLUMNS = 10_000
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def report_error(error: LockstepError) -> None:
    """Print what happened, the likely cause and the next step, on standard error."""
    typer.echo(f"lockstep: {error}", err=True)
    if error.cause:
        typer.echo(f"  Likely cause: {error.likely_cause}", err=True)
    if error.next_step:
        typer.echo(f"  Next step:    {error.advice}", err=True)


def console() -> Console:
    """Return a console for standard output; what reads from a pipe gets whole paths, however long."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


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


def plain(text: str) -> Text:
    """Return text that somebody else chose, with nothing in it that a terminal would obey."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def human_seconds(count: float) -> str:
    """Return a duration for people: 45 s, 3 min 20 s, 2 h 5 min."""
    minutes, seconds = divmod(round(count), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


class ProgressBars:
    """Is told (phase, bytes done, bytes in all): a bar for each phase on a terminal, JSON lines if asked for."""

    def __init__(self, names: dict[str, str], *, as_json: bool, err: bool = False) -> None:
        """`names`: phase -> how the bar is called; `err` sends JSON to standard error, where bars always are."""
        self._names = names
        self._as_json = as_json
        self._err = err
        self._phase: str | None = None
        self._show: Callable[[int, int], None] = lambda _done, _total: None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show how far a phase is."""
        if phase != self._phase:
            self._phase = phase
            self._stack.close()
            if self._as_json:
                self._show = self._json_lines(phase)
            elif sys.stderr.isatty():
                self._show = self._stack.enter_context(_bar(self._names[phase], done, total))
        self._show(done, total)

    def _json_lines(self, phase: str) -> Callable[[int, int], None]:
        """Report whole percents, so that a pipe is not flooded."""
        last = -1

        def report(done: int, total: int) -> None:
            nonlocal last
            percent = 100 * done // total if total else 100
            if percent != last:
                last = percent
                print_json({"phase": phase, "done_bytes": done, "total_bytes": total}, err=self._err)

        return report


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that is told (bytes done, bytes in all): a bar on a terminal, else nothing."""
    with ProgressBars({what: what}, as_json=False) as bars:
        yield functools.partial(bars, what)


@contextlib.contextmanager
def _bar(what: str, done: int, total: int) -> Iterator[Callable[[int, int], None]]:
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, completed=done, total=total)  # what was there already has no speed
        yield lambda done, total: progress.update(task, completed=done, total=total)
