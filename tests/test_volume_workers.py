"""Threads for what may block: what nobody waits for is done when there is time, once, and never when it is over."""

import _thread
import asyncio
import functools
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from lockstep.volume import workers as threads
from lockstep.volume.workers import Workers

PATIENCE_S = 10


def test_a_hint_is_carried_out_unless_one_is_being_carried_out() -> None:
    done: list[str] = []
    go_on = threading.Event()

    def first() -> None:
        done.append("first")
        go_on.wait(PATIENCE_S)

    async def main() -> None:
        workers = Workers("hinted", 2)
        workers.hint(first)
        workers.hint(functools.partial(done.append, "at the same time"))
        assert not workers.at_rest
        go_on.set()
        while not workers.at_rest:
            await asyncio.sleep(0.001)
        workers.hint(functools.partial(done.append, "afterwards"))
        while not workers.at_rest:
            await asyncio.sleep(0.001)
        workers.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    assert done == ["first", "afterwards"]


def test_a_hint_is_nothing_to_threads_that_were_told_to_end() -> None:
    async def main() -> None:
        for workers in (Workers("closed", 1), Workers("given-up", 1, 1)):
            (workers.give_up if workers.patience_s else workers.close)()
            workers.hint(lambda: None)
            assert workers.at_rest

    asyncio.run(main())


def test_a_hint_that_fails_is_nobodys_failure() -> None:
    def fail() -> None:
        raise OSError

    async def main() -> None:
        workers = Workers("failing", 1)
        workers.hint(fail)
        while not workers.at_rest:
            await asyncio.sleep(0.001)
        assert await workers.run(int) == 0
        workers.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_time_in_which_the_process_stood_still_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is moved by hand: a pause makes the look at it late, and a silent disk does not."""
    now_s = 1000.0
    monkeypatch.setattr(threads, "time", SimpleNamespace(monotonic=lambda: now_s))
    go_on = threading.Event()

    async def main() -> None:
        nonlocal now_s
        workers = Workers("paused", 1, 10)
        silent = workers.begin(go_on.wait)

        def look(after_s: float) -> None:
            nonlocal now_s
            now_s += after_s
            assert workers._timer is not None
            workers._timer.cancel()
            workers._check()

        for _ in range(5):
            look(after_s=1)
        look(after_s=1000)  # a second of it is the disk's
        for _ in range(3):
            look(after_s=1)
            assert not silent.done(), "a disk was given up that could not be heard"
        look(after_s=1)
        with pytest.raises(TimeoutError):
            await silent

    try:
        asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    finally:
        go_on.set()


def test_threads_that_were_started_end_where_the_system_gives_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Event] = []
    start = _thread.start_new_thread

    def start_two(work: Callable[[], None], arguments: tuple[()]) -> int:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(ended := threading.Event())

        def serve() -> None:
            work()
            ended.set()

        return start(serve, arguments)

    monkeypatch.setattr(_thread, "start_new_thread", start_two)
    with pytest.raises(OSError, match="no thread for scarce"):
        Workers("scarce", 3)
    assert len(started) == 2
    assert all(ended.wait(PATIENCE_S) for ended in started)


@pytest.mark.timeout(PATIENCE_S)
def test_a_thread_that_ends_before_it_has_begun_holds_up_nobody_but_who_asks_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There was no memory for its first step, of which nobody is told."""
    monkeypatch.setattr(_thread, "start_new_thread", lambda *_: 0)
    monkeypatch.setattr(threading, "_start_new_thread", lambda *_: 0, raising=False)  # as Python 3.11 and 3.12 call it

    async def main() -> None:
        workers = Workers("stillborn", 1, 0.1)
        with pytest.raises(TimeoutError):
            await workers.run(int)
        assert workers.at_rest

    asyncio.run(main())
