"""The signals that end a command in order: for `main`, and for those that have an end of their own."""

import signal
from collections.abc import Callable


def ending() -> tuple[signal.Signals, ...]:
    """Ctrl-C, SIGTERM, and SIGHUP, which a terminal sends when it is closed; not where `nohup` has had that ignored."""
    always = (signal.SIGINT, signal.SIGTERM)
    return always if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*always, signal.SIGHUP)


def on_each(then: Callable[[], object]) -> None:
    """Call `then` for each of them. An event loop's own handlers go with the loop: one more signal then kills."""
    for number in ending():
        signal.signal(number, lambda _number, _frame: then())


def ignore() -> None:
    """Go on ending in order, whoever says so again; programs that are started from here on do, too."""
    for number in ending():
        signal.signal(number, signal.SIG_IGN)
