"""That the server looks for the next request before it sleeps: not for long, not in vain again and again."""

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.nbd import busy_poll
from lockstep.nbd.busy_poll import BusyPoll
from tests.test_nbd_patience import Served

WAIT_S = 0.5
FOR_EVER_S = 60.0

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(autouse=True)
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})


def seconds(poll: BusyPoll) -> float:
    began_s = time.perf_counter()
    poll.wait()
    return time.perf_counter() - began_s


def watching(ours: socket.socket) -> BusyPoll:
    poll = BusyPoll()
    poll.watch(ours.fileno())
    return poll


def test_it_ends_when_something_arrives(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_poll, "LONGEST_S", FOR_EVER_S)
    ours, theirs = pair
    poll = watching(ours)
    later = threading.Timer(0.05, theirs.send, (b"a request",))
    later.start()
    assert 0.04 < seconds(poll) < FOR_EVER_S / 2
    later.join()


def test_after_one_wait_in_vain_there_is_none_for_a_while(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_poll, "LONGEST_S", WAIT_S)
    poll = watching(pair[0])
    assert seconds(poll) >= WAIT_S
    assert sum(seconds(poll) for _ in range(busy_poll.SKIPPED)) < WAIT_S
    assert seconds(poll) >= WAIT_S


def test_waits_that_are_worth_it_go_on(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_poll, "LONGEST_S", WAIT_S)
    ours, theirs = pair
    poll = watching(ours)
    for _ in range(100):
        theirs.send(b"x")
        poll.wait()
        assert ours.recv(1) == b"x"
    assert seconds(poll) >= WAIT_S


def test_with_one_processor_it_never_waits(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_poll, "LONGEST_S", FOR_EVER_S)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    poll = watching(pair[0])
    assert sum(seconds(poll) for _ in range(100)) < FOR_EVER_S / 2


def test_a_socket_may_be_closed_before_it_is_forgotten(pair: Pair) -> None:
    ours, _theirs = pair
    poll, fd = watching(ours), ours.fileno()
    ours.close()
    poll.forget(fd)
    poll.wait()


def test_who_asks_while_it_waits_for_another_is_answered_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(str(tmp_path / "sock"))
    served.start()
    try:
        with served.client() as one, served.client() as other:
            monkeypatch.setattr(busy_poll, "LONGEST_S", FOR_EVER_S)
            began_s = time.perf_counter()
            for _ in range(busy_poll.SKIPPED):  # each asks once while the server is sure to wait
                for client in (one, other):
                    client.read(0, 4096)
            assert time.perf_counter() - began_s < FOR_EVER_S / 2
    finally:
        served.stop()


class Full:
    """An epoll for which the user has no more watches (`max_user_watches`)."""

    def register(self, *_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def unregister(self, _fd: int) -> None:
        raise OSError(errno.ENOENT, "No such file or directory")

    def poll(self, *_: int) -> list[tuple[int, int]]:
        return []


def test_who_cannot_be_watched_is_served_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "epoll", Full)
    served = Served(str(tmp_path / "sock"))
    served.start()
    try:
        with served.client() as client:
            assert client.read(0, 4096) == bytes(4096)
    finally:
        served.stop()
    assert len(served.seen) == 2
