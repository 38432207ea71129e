"""Waiting for the next request without going to sleep, while clients ask again as soon as they are answered.

Who asks one thing at a time, and waits for it, has two wake-ups in each round: its own, and the server's. That of a
processor that has gone idle takes longer than a write to memory, above all in a virtual machine, and costs as much of
its time as looking again and again does. QEMU's event loop does the same (`poll-max-ns`).
"""

import contextlib
import os
import select
import time
from typing import Final

LONGEST_S: Final = 60e-6  # a client wakes up in less, though it be in a virtual machine
# After one wait in vain, so many are left out: to a client that thinks before it asks, this costs next to nothing.
SKIPPED: Final = 31


class BusyPoll:
    """Watches sockets, by their descriptors. One thread may call it."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        # Where there is one processor, the client could not ask meanwhile.
        self._skip = 0 if len(os.sched_getaffinity(0)) > 1 else float("inf")

    def watch(self, fd: int) -> None:
        """Let `wait` end when something arrives at this socket; one for which there is no room is done without."""
        with contextlib.suppress(OSError):
            self._epoll.register(fd, select.EPOLLIN)

    def forget(self, fd: int) -> None:
        """Undo `watch`; a socket that has been closed is forgotten already."""
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)

    def wait(self) -> None:
        """Wait until something has arrived, LONGEST_S seconds at most; if it came to nothing lately, not at all."""
        if self._skip:
            self._skip -= 1
            return
        until_s = time.perf_counter() + LONGEST_S
        while not self._epoll.poll(0, 1):
            if time.perf_counter() > until_s:
                self._skip = SKIPPED
                return
