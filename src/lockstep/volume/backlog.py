"""How much a mirror may have cached, and not written out, before whoever writes more has to wait.

A flush waits for all of it; and a mirror that does not end a flush within its patience counts as one that hangs. A page
cache takes gigabytes, which a hard disk writes out in minutes. So a mirror begins to write out when it has a little,
and whoever writes more waits when it has twice that. It is followed at its own rate, and not dropped for its cache.

How little, depends on the disk and is found out: it may have more while a flush of all that it may have is over in a
moment, and less when that takes long. One that did not answer in time was given too much: when it is back it has less,
and no more than that again.

What is scattered takes a hard disk longest, and it may come after much that was not, and was quick. So each write
counts for as much as a disk could have written while it looked for the place.
"""

import time
from typing import Final

LEAST_BYTES: Final = 1 << 20
FIRST_BYTES: Final = 4 << 20
MOST_BYTES: Final = 1 << 30
SCATTERED_BYTES: Final = 64 << 10
QUICK: Final = 0.025  # of the patience: with the limit doubled, and reached twice over, a flush takes four times that
SLOW: Final = 0.1  # of the patience: to update the header is half a dozen flushes and reads, each behind what is cached


class Backlog:
    """Counts what one mirror was given, in bytes as above, and what of it was flushed."""

    def __init__(self, patience_s: float | None, timeouts: int = 0) -> None:
        """Nothing is cached. `timeouts` is how often the mirror did not answer in time."""
        self.taken = 0  # at any time, altogether
        self._flushed = 0
        self._since_s = time.monotonic()  # when the last flush began
        self._most = max(LEAST_BYTES, FIRST_BYTES >> 2 * (timeouts - 1)) if timeouts else MOST_BYTES
        self._limit = min(FIRST_BYTES, self._most)
        self._patience_s = patience_s or float("inf")

    def take(self, length: int, count: int) -> None:
        """Note so many writes, of so many bytes together."""
        self.taken += max(length, count * SCATTERED_BYTES)

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

        Only a flush of all that the mirror may have tells of it. And what was flushed in a moment, but taken over a
        long time, tells of a cache that somebody had emptied.
        """
        now_s = time.monotonic()
        if taken - self._flushed >= self._limit:
            if now_s - self._since_s < QUICK * self._patience_s:
                self._limit = min(2 * self._limit, self._most)
            elif now_s - began_s > SLOW * self._patience_s:
                self._limit = max(self._limit // 2, LEAST_BYTES)
        self._flushed, self._since_s = max(self._flushed, taken), began_s
