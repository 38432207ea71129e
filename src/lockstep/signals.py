"""The signals that end a command in order: for `main`, and for those that have an end of their own."""

import signal


def ending() -> tuple[signal.Signals, ...]:
    """Ctrl-C, SIGTERM, and SIGHUP, which a terminal sends when it is closed; not where `nohup` has had that ignored."""
    always = (signal.SIGINT, signal.SIGTERM)
    return always if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*always, signal.SIGHUP)
