"""What is drawn on a terminal: tables, and bars of progress.

Rich is imported here and not in `output.py`, because to import it takes longer than `serve` and `open` may spend on it.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column, Table
from rich.text import Text

from lockstep.cli.output import print_json, visible

_PIPE_COLUMNS = 10_000


def console() -> Console:
    """Return a console for standard output; what reads from a pipe gets whole paths, however long."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


def plain(text: str, style: str = "") -> Text:
    """Return text that somebody else chose, with nothing in it that a terminal would obey."""
    return Text(visible(text), style)


class Listing(Table):
    """A table without lines, whose cells are shown as they are: what looks like markup in a path is part of it.

    On a narrow terminal they are folded, and nothing is left out.
    """

    def __init__(self, *columns: str, show_header: bool = True) -> None:
        folded = (Column(each, overflow="fold") for each in columns)
        super().__init__(*folded, box=None, pad_edge=False, show_header=show_header)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row; a string is plain text."""
        super().add_row(*(plain(cell) if isinstance(cell, str) else cell for cell in cells), **options)


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
