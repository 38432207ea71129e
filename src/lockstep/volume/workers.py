"""Threads for what may block: one set for the target and the records, and one for each mirror.

A mirror has threads of its own so that one that hangs holds up nobody but itself. Whoever waits for such a set waits at
most `patience_s`: then everything that it was asked fails with ETIMEDOUT, and nothing that it was asked and has not
begun is begun any more. What hangs goes on hanging, in its thread, until the disk answers or the process ends; only
when the set is at rest is it certain that it does nothing more to the disk.

The threads are daemons: a process ends though one of them hangs. concurrent.futures would wait for them.

Each has a queue of its own, and the loop's thread says who does what: the one that came to rest last, whose memory is
still in the processor's cache. With one queue for all, every call wakes a second thread, in vain.
"""

import asyncio
import errno
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, TypeVar

Result = TypeVar("Result")

_CHECKS: Final = 10  # in one patience: it is exceeded by a tenth at most

Work = tuple["asyncio.Future[Any]", Callable[..., Any], tuple[Any, ...]]
Desk = SimpleQueue[Work | None]
"""Where one thread takes what it is to do; None is the end of it."""


class Workers:
    """`count` threads. Calls come from the thread of one event loop."""

    def __init__(self, name: str, count: int, patience_s: float | None = None) -> None:
        """Without `patience_s`, who waits may wait for ever."""
        self.patience_s = patience_s
        self._idle: list[Desk] = [SimpleQueue() for _ in range(count)]
        self._waiting: deque[Work] = deque()  # for a thread
        self._loop: asyncio.AbstractEventLoop
        self._under_way: dict[asyncio.Future[Any], float] = {}  # since when, in s of the monotonic clock; in order
        self._begun = 0  # calls that no thread has ended, also those that nobody waits for any more
        self._given_up = False
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        for number, desk in enumerate(self._idle):
            threading.Thread(target=self._work, args=(desk,), name=f"{name}-{number}", daemon=True).start()

    def begin(self, work: Callable[..., Result], *args: Any) -> "asyncio.Future[Result]":
        """Have a thread do it. The future gets what it returns or raises, or TimeoutError when patience is over."""
        self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = self._loop.create_future()
        if self._given_up:
            future.set_exception(self._silence())
            return future
        self._begun += 1
        if self.patience_s is not None:
            self._under_way[future] = time.monotonic()
            if self._timer is None:
                self._timer = self._loop.call_later(self.patience_s / _CHECKS, self._check)
        if self._idle:
            self._idle.pop().put((future, work, args))
        else:
            self._waiting.append((future, work, args))
        return future

    async def run(self, work: Callable[..., Result], *args: Any) -> Result:
        """Have a thread do it, and wait; what it raises is raised here."""
        return await self.begin(work, *args)

    @property
    def at_rest(self) -> bool:
        """Whether no thread is at work."""
        return not self._begun

    def give_up(self) -> None:
        """Have whoever waits get TimeoutError, and begin nothing more."""
        self._given_up = True
        for future in self._under_way:
            if not future.done():
                future.set_exception(self._silence())
        self._under_way.clear()
        self._begun -= len(self._waiting)
        self._waiting.clear()
        self.close()

    def close(self) -> None:
        """Have the threads end after what they were asked; nothing may be asked afterwards."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._closed = True
        while self._idle:
            self._idle.pop().put(None)

    def _silence(self) -> TimeoutError:
        return TimeoutError(errno.ETIMEDOUT, f"it did not answer for {self.patience_s:g} s")

    def _check(self) -> None:
        """Look at the one who waits longest."""
        assert self.patience_s is not None
        self._timer = None
        oldest_s = next(iter(self._under_way.values()), None)
        if oldest_s is None:
            return
        if time.monotonic() - oldest_s >= self.patience_s:
            self.give_up()
        else:
            self._timer = self._loop.call_later(self.patience_s / _CHECKS, self._check)

    def _settle(self, desk: Desk, future: "asyncio.Future[Any]", result: Any, failure: BaseException | None) -> None:
        if self._waiting:
            desk.put(self._waiting.popleft())
        elif self._closed:
            desk.put(None)
        else:
            self._idle.append(desk)
        self._begun -= 1
        self._under_way.pop(future, None)
        if future.done():  # nobody waits for it any more
            return
        if failure is None:
            future.set_result(result)
        else:
            future.set_exception(failure)

    def _work(self, desk: Desk) -> None:
        """What each thread does."""
        while (asked := desk.get()) is not None:
            future, work, args = asked
            result: Any = None
            failure: BaseException | None = None
            if self._given_up:
                failure = self._silence()
            else:
                try:
                    result = work(*args)
                except BaseException as error:  # noqa: BLE001 (it is for who waits)
                    failure = error
            try:
                self._loop.call_soon_threadsafe(self._settle, desk, future, result, failure)
            except RuntimeError:  # the loop is closed: the process is about to end
                return
            del asked, future, work, args, result, failure
