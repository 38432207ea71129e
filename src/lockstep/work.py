"""Jobs for threads, and the queue between these and an event loop.

A job is called, once, by the thread that takes it. Native ones need no interpreter for that: see `_work.pyx`, which has
all of this and is used where it was built.
"""

import os
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any


class _Job:
    """`future` is for whoever asked; the queue only carries it."""

    future: Any = None

    def __call__(self) -> Any:
        """Carry it out here and now."""
        raise NotImplementedError


Ended = tuple[Any, Any, BaseException | None]
"""The `future` of a job, what it returned, and what it raised."""


class _Call(_Job):
    """A call of Python, as a job."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        self._work = work
        self._arguments = arguments

    def __call__(self) -> Any:
        """Make the call."""
        return self._work(*self._arguments)


class _Queue:
    """From the thread of one event loop to those that `serve`, and back; `fd` becomes readable when a job has ended."""

    def __init__(self) -> None:
        """Raises OSError when too many files are open."""
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._done: deque[Ended] = deque()

    def __del__(self) -> None:
        os.close(self.fd)

    def put(self, job: _Job) -> None:
        """Have a thread carry it out; the one that came to rest last, where it is done natively."""
        self._jobs.put(job)

    def done(self) -> list[Ended]:
        """Return what became of the jobs that have ended since the last call."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return []
        return [self._done.popleft() for _ in range(len(self._done))]

    def give_up(self) -> int:
        """Forget the jobs that no thread has begun, and return how many.

        Native ones that one has begun end after their next system call, with ECANCELED if that was not the last.
        """
        dropped = 0
        while True:
            try:
                dropped += self._jobs.get_nowait() is not None
            except Empty:
                return dropped

    def close(self) -> None:
        """Have the threads return from `serve` when there is nothing left to do."""
        self._jobs.put(None)

    def serve(self) -> None:
        """Carry out jobs: what each thread does."""
        while (job := self._jobs.get()) is not None:
            try:
                ended: Ended = job.future, job(), None
            except BaseException as failure:  # noqa: BLE001 (it is for who asked)
                ended = job.future, None, failure
            self._done.append(ended)
            os.eventfd_write(self.fd, 1)
            del job, ended
        self._jobs.put(None)  # for the next one


try:
    from lockstep import _work as _native
except ImportError:
    Job: Any = _Job
    Call: Any = _Call
    Queue: Any = _Queue
else:
    Job, Call, Queue = _native.Job, _native.Call, _native.Queue
