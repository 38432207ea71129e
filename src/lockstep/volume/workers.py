"""Threads for what may block: one set for the target and the records, and one for each mirror.

A mirror has threads of its own so that one that hangs holds up nobody but itself. Whoever waits for such a set waits at
most `patience_s`: then everything that it was asked fails with ETIMEDOUT, and nothing that it was asked and has not
begun is begun any more. What hangs goes on hanging, in its thread, until the disk answers or the process ends; only
when the set is at rest is it certain that it does nothing more to the disk.

Time in which this process itself stood still (SIGSTOP, a virtual machine that is paused) does not count: no answer
could be taken meanwhile.

A process ends though one of the threads hangs. concurrent.futures would wait for them.
"""

import _thread
import asyncio
import errno
import os
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from lockstep.work import Call, Job, Queue

Result = TypeVar("Result")

_CHECKS: Final = 10  # in one patience: it is exceeded by a tenth at most


class Workers:
    """`count` threads. Calls come from the thread of one event loop."""

    def __init__(self, name: str, count: int, patience_s: float | None = None) -> None:
        """Without `patience_s`, who waits may wait for ever. Raises OSError where the system gives no threads.

        threading.Thread would wait for each to have begun: for ever, where there is no memory for its first step.
        """
        self.patience_s = patience_s
        self._queue = Queue()
        self._loop: asyncio.AbstractEventLoop | None = None  # that listens to the queue
        self._under_way: dict[asyncio.Future[Any], float] = {}  # since when, in s of the monotonic clock; in order
        self._begun = 0  # jobs that no thread has ended, also those that nobody waits for any more
        self._at_hint = False
        self._given_up = self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0  # when it should fire
        try:
            for _ in range(count):
                _thread.start_new_thread(self._queue.serve, ())
        except (RuntimeError, MemoryError) as failure:
            self.close()  # those that were started
            raise OSError(errno.EAGAIN, f"the system gives no thread for {name}") from failure

    def begin(self, work: Callable[..., Result], *args: Any) -> "asyncio.Future[Result]":
        """Have a thread do it, natively if it is such a job.

        The future gets what it returns or raises, or TimeoutError when patience is over.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        if self._given_up:
            future.set_exception(self._silence())
            return future
        if self.patience_s is not None:
            self._under_way[future] = time.monotonic()
            if self._timer is None:
                self._look_later(loop, self.patience_s / _CHECKS)
        self._put(loop, future, work, *args)
        return future

    def hint(self, work: Callable[[], None]) -> None:
        """Have a thread do what nobody waits for, unless one still does what was hinted at last."""
        if not (self._at_hint or self._closed):
            self._at_hint = True
            self._put(asyncio.get_running_loop(), None, work)

    def _put(
        self,
        loop: asyncio.AbstractEventLoop,
        future: "asyncio.Future[Result] | None",
        work: Callable[..., Result],
        *args: Any,
    ) -> None:
        job = work if isinstance(work, Job) else Call(work, *args)
        job.future = future
        if self._loop is not loop:
            self._loop = loop
            loop.add_reader(self._queue.fd, self._collect)
        self._begun += 1
        self._queue.put(job)

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
        self._begun -= self._queue.give_up()
        self.close()

    def close(self) -> None:
        """Have the threads end after what they were asked; nothing may be asked afterwards."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._closed = True
        self._queue.close()
        self._forget_if_over()

    def _forget_if_over(self) -> None:
        """Listen to the queue no longer when it will say nothing more."""
        if self._closed and not self._begun and self._loop is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._queue.fd)
            self._loop = None

    def _silence(self) -> TimeoutError:
        return TimeoutError(errno.ETIMEDOUT, f"it did not answer for {self.patience_s:g} s")

    def _look_later(self, loop: asyncio.AbstractEventLoop, in_s: float) -> None:
        self._due_s = time.monotonic() + in_s
        self._timer = loop.call_later(in_s, self._check)

    def _check(self) -> None:
        """Look at the one who waits longest; but when this look itself comes late, let them wait that much longer."""
        assert self.patience_s is not None
        assert self._loop is not None
        self._timer = None
        if not self._under_way:
            return
        now_s, step_s = time.monotonic(), self.patience_s / _CHECKS
        late_s = now_s - self._due_s
        if late_s > step_s:
            self._under_way = {each: min(since_s + late_s, now_s) for each, since_s in self._under_way.items()}
        if now_s - next(iter(self._under_way.values())) >= self.patience_s:
            self.give_up()
            return
        self._look_later(self._loop, step_s)

    def _collect(self) -> None:
        """Pass on what has ended."""
        for future, value, failure in self._queue.done():
            self._begun -= 1
            if future is None:
                self._at_hint = False
                continue
            self._under_way.pop(future, None)
            if future.done():  # nobody waits for it any more
                continue
            if failure is None:
                future.set_result(value)
            elif isinstance(failure, MemoryError):  # of a thread; whoever waits knows what to do about a disk's errors
                future.set_exception(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
            else:
                future.set_exception(failure)
        self._forget_if_over()
