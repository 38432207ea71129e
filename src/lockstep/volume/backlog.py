"""How much a mirror may have cached, and not written out, before whoever writes more has to wait.

A flush waits for all of it; and a mirror that does not end a flush within its patience counts as one that hangs. A page
cache takes gigabytes, which a hard disk writes out in minutes. So a mirror begins to write out when it has a little,
and whoever writes more waits when it has twice that. It is followed at its own rate, and not dropped for its cache.

A mirror that was seen to be quick may have more, so that it takes a burst as its cache does.
"""

import time
from typing import Final

LEAST_BYTES: Final = 32 << 20
MOST_BYTES: Final = 1 << 30
QUICK: Final = 0.05  # of the patience: with the limit doubled, and reached twice over, a flush takes four times that


class Backlog:
    """Counts what one mirror was given, in bytes, and what of it was flushed."""

    def __init__(self, patience_s: float | None, *, may_grow: bool = True) -> None:
        """Nothing is cached. Unless it `may_grow`, the limit stays at LEAST_BYTES."""
        self.taken = 0
        self._flushed = 0
        self._since_s = time.monotonic()  # when the last flush began
        self._limit = LEAST_BYTES
        self._quick_s = QUICK * patience_s if patience_s else float("inf")
        self._may_grow = may_grow

    @property
    def large(self) -> bool:
        """Whether it is time to write out."""
        return self.taken - self._flushed >= self._limit

    @property
    def full(self) -> bool:
        """Whether whoever writes more has to wait."""
        return self.taken - self._flushed >= 2 * self._limit

    def flushed(self, taken: int, began_s: float) -> None:
        """Note that a flush has ended that began when so much was `taken`, at that time of the monotonic clock.

        What was not only flushed, but taken as well, in a moment, does not tell of a cache that somebody had emptied.
        """
        quick = time.monotonic() - self._since_s < self._quick_s
        if self._may_grow and quick and taken - self._flushed >= self._limit:
            self._limit = min(2 * self._limit, MOST_BYTES)
        self._flushed, self._since_s = max(self._flushed, taken), began_s
