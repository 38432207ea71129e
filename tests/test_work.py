"""The queue between an event loop and threads, the native one and its Python twin."""

import errno
import os
import select
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from lockstep import work
from lockstep.crypto.cipher import XtsCipher
from tests.lab import wait_until

native_work = pytest.importorskip("lockstep._work", reason="the native loops were not built")
native_runs = pytest.importorskip("lockstep.disk._runs", reason="the native loops were not built")

PATIENCE_S = 20.0
ENOUGH = 200
NEVER_S = 1000.0


class Kind(NamedTuple):
    queue: Callable[[], Any]
    call: Callable[..., Any]


@pytest.fixture(params=["native", "python"])
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param == "native":
        return Kind(native_work.Queue, native_work.Call)
    return Kind(work._Queue, work._Call)


class Crew:
    """A queue with threads."""

    def __init__(self, queue: Any, count: int) -> None:
        self.queue = queue
        self.threads = [threading.Thread(target=queue.serve, daemon=True) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def ended(self, count: int) -> list[work.Ended]:
        """What became of so many jobs, as it becomes known."""
        found: list[work.Ended] = []
        while len(found) < count:
            assert select.select([self.queue.fd], [], [], PATIENCE_S)[0], "no job ended"
            found += self.queue.done()
        return found

    def join(self) -> None:
        for thread in self.threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def as_job(job: Any, future: Any) -> Any:
    job.future = future
    return job


def test_every_job_is_carried_out_once_and_its_outcome_comes_back(kind: Kind) -> None:
    crew = Crew(kind.queue(), 3)
    seen: list[int] = []
    failure = ValueError("thirteen")

    def work_on(number: int) -> int:
        seen.append(number)
        if number == 13:
            raise failure
        return 2 * number

    for number in range(ENOUGH):
        crew.queue.put(as_job(kind.call(work_on, number), number))
    ended = sorted(crew.ended(ENOUGH), key=lambda each: each[0])
    assert sorted(seen) == list(range(ENOUGH))
    assert ended == [(n, None, failure) if n == 13 else (n, 2 * n, None) for n in range(ENOUGH)]
    assert crew.queue.done() == []
    crew.queue.close()
    crew.join()


def test_what_was_not_begun_is_given_up_and_what_was_comes_back(kind: Kind) -> None:
    crew = Crew(kind.queue(), 1)
    begun, go_on = threading.Event(), threading.Event()

    def hang() -> bool:
        begun.set()
        return go_on.wait(PATIENCE_S)

    crew.queue.put(as_job(kind.call(hang), "hangs"))
    assert begun.wait(PATIENCE_S)
    for _ in range(5):
        crew.queue.put(as_job(kind.call(os.abort), "never"))
    assert crew.queue.give_up() == 5
    crew.queue.close()
    assert crew.queue.done() == []
    go_on.set()
    assert crew.ended(1) == [("hangs", True, None)]
    crew.join()


def test_what_is_given_up_at_once_is_not_begun(kind: Kind) -> None:
    for _ in range(ENOUGH):
        crew = Crew(kind.queue(), 1)
        begun: list[int] = []
        crew.queue.put(as_job(kind.call(begun.append, 1), "first"))
        crew.ended(1)
        crew.queue.put(as_job(kind.call(begun.append, 2), "never"))
        if not crew.queue.give_up():  # a thread had it already
            ((_future, _value, failure),) = crew.ended(1)
            assert isinstance(failure, OSError)
        crew.queue.close()
        crew.join()
        assert begun == [1]


def test_threads_that_are_closed_do_first_what_they_were_asked(kind: Kind) -> None:
    queue = kind.queue()
    for number in range(ENOUGH):
        queue.put(as_job(kind.call(int), number))
    queue.close()
    crew = Crew(queue, 2)
    crew.join()
    assert len(crew.ended(ENOUGH)) == ENOUGH


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile(dir="/dev/shm") as made:
        yield made.fileno()


def test_native_jobs_need_no_interpreter(file: int) -> None:
    """They end while one thread has the GIL and never gives it up; a call of Python does not even begin."""
    crew = Crew(native_work.Queue(), 2)
    data, run = os.urandom(8192), array("Q", (0, 4096, 4096, 0, 4096, 4096, 0, 0))
    cipher = XtsCipher(os.urandom(64), 512)
    mirror = os.memfd_create("mirror")
    into = bytearray(8192)
    crew.queue.put(as_job(native_work.Call(int), "warm"))
    crew.ended(1)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(NEVER_S)
    try:
        crew.queue.put(as_job(native_runs.write_job(file, 0, data, run, 2, None, False), "write"))
        crew.queue.put(as_job(cipher.encrypt_job(mirror, 0, 0, data, run, 2, 0, None, False), "encrypt"))  # type: ignore[misc, arg-type]
        ended = list[work.Ended]()
        until_s = time.monotonic() + PATIENCE_S
        while len(ended) < 2 and time.monotonic() < until_s:
            ended += crew.queue.done()
        crew.queue.put(as_job(native_runs.fetch_job(file, into, run, 2, None), "fetch"))
        while len(ended) < 3 and time.monotonic() < until_s:
            ended += crew.queue.done()
    finally:
        sys.setswitchinterval(interval_s)
    assert sorted(ended, key=str) == [("encrypt", None, None), ("fetch", None, None), ("write", None, None)]
    assert into == data
    crew.queue.close()
    crew.join()


def test_a_native_run_ends_between_two_writes_when_the_queue_gives_up(file: int) -> None:
    crew = Crew(native_work.Queue(), 1)
    count, left = 2000, list[int]()
    run = array("Q", [word for at in range(count) for word in (at << 20, 1 << 20, 0, 0)])  # takes half a second
    crew.queue.put(as_job(native_runs.write_job(file, 0, bytes(1 << 20), run, count, left.append, False), "run"))
    wait_until(lambda: os.fstat(file).st_size > 0, "the run to begin")
    assert crew.queue.give_up() == 0
    crew.queue.close()
    ((_future, _value, failure),) = crew.ended(1)
    assert isinstance(failure, OSError)
    assert failure.errno == errno.ECANCELED
    crew.join()
    assert os.fstat(file).st_size < count << 20
    assert not left


def test_native_jobs_that_take_turns_are_carried_out_in_the_order_in_which_they_were_put(file: int) -> None:
    crew = Crew(native_work.Queue(), 4)
    run = array("Q", (0, 4096, 0, 0) * 20)
    for _ in range(20):
        contents = [os.urandom(4096) for _ in range(30)]
        for content in contents:
            crew.queue.put(as_job(native_runs.write_job(file, 0, content, run, 20, None, True), "write"))
        crew.ended(len(contents))
        assert os.pread(file, 4096, 0) == contents[-1]
    crew.queue.close()
    crew.join()
