"""P12: whatever an export fails with, however little memory there is: clients are answered or cut off, others served.

The real server on a real socket; the export fails as the test says.
"""

import asyncio
import errno
import gc
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from fuzz.bodies import Choices, MemoryExport

from lockstep.buffers import page_aligned
from lockstep.nbd import connection, payload
from lockstep.nbd.server import NbdServer
from tests import nbd_client as nbd
from tests.lab import MIB, wait_until
from tests.nbd_client import Client

PATIENCE_S = 20.0
PIECE = 4096


class Failing(MemoryExport):
    """Does nothing at once, unless told so; reads and writes fail with what is in `failing`, one after the other."""

    def __init__(self) -> None:
        super().__init__(4 * MIB, Choices(b""))
        self.failing: list[Exception] = []
        self.at_once = False
        self.begun = threading.Event()
        self.go = threading.Event()
        self.go.set()

    def read_run(self, into: bytearray, run: "array[int]", count: int) -> int:
        return 0

    def write_run(self, user: str, data: memoryview, run: "array[int]", count: int) -> int:
        return super().write_run(user, data, run, count) if self.at_once else 0

    async def read(self, into: memoryview, run: "array[int]", count: int) -> None:
        if self.failing:
            raise self.failing.pop(0)
        await super().read(into, run, count)

    async def write(self, user: str, data: memoryview, run: "array[int]", count: int, *, durable: bool) -> None:
        self.begun.set()
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        if self.failing:
            raise self.failing.pop(0)
        await super().write(user, data, run, count, durable=durable)


class Served:
    """A server on a loop of its own, in a thread of its own."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.export = Failing()
        self.server: NbdServer
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.server = NbdServer(self.export)
        await self.server.listen_unix(self.path)
        await self.server.accept()
        self._ready.set()
        await self._stop.wait()
        await self.server.drain()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server does not stop"
        pools = (self.server._small, self.server._large, self.server.arrived)
        assert [pool._used_bytes for pool in pools] == [0] * 3, "memory is left behind"

    def client(self) -> Client:
        return Client(self.path, PATIENCE_S).go("")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(str(tmp_path / "sock"))
    yield made
    made.stop()


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is set, there is no memory for anybody."""
    scarce = threading.Event()

    def make(size_bytes: int) -> memoryview:
        if scarce.is_set():
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return page_aligned(size_bytes)

    for module in (connection, payload):
        monkeypatch.setattr(module, "page_aligned", make)
    return scarce


def test_who_cannot_be_given_a_buffer_does_not_keep_others_from_connecting(
    served: Served, scarce: threading.Event
) -> None:
    scarce.set()
    with Client(served.path, PATIENCE_S) as client:
        assert client.assert_closed() == b""
    scarce.clear()
    with served.client() as client:
        assert client.read(0, PIECE) == bytes(PIECE)


def test_who_cannot_be_served_on_for_want_of_memory_is_cut_off_and_not_left_to_wait(
    served: Served, scarce: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_PENDING", 1)
    served.export.go.clear()
    with served.client() as client:
        # The second waits for the first, and needs a larger block.
        requests = [client.request(nbd.WRITE, 0, 0, *how) for how in ((nbd.FUA, bytes(PIECE)), (0, bytes(100_000)))]
        client.send(b"".join(request.wire() for request in requests))
        assert served.export.begun.wait(PATIENCE_S)
        scarce.set()
        served.export.go.set()
        client.assert_closed()
    scarce.clear()
    with served.client() as client:
        client.write(0, bytes(PIECE))


def test_who_sends_much_does_without_a_larger_buffer_where_there_is_no_memory_for_it(
    served: Served, scarce: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "RECEIVE_BYTES", 64 << 10)  # which a socket fills
    served.export.at_once = True
    with served.client() as client:
        scarce.set()
        requests = [client.request(nbd.WRITE, 0, payload=bytes(PIECE)) for _ in range(500)]
        client.send(b"".join(request.wire() for request in requests))
        assert {reply.error for reply in client.replies().values()} == {0}
    scarce.clear()


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Memory that is found in cycles only stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def shared_pieces() -> int:
    """How many pieces of memory of `page_aligned` there are."""
    return Path("/proc/self/maps").read_text().count("/dev/zero")


@pytest.mark.usefixtures("without_collector")
def test_the_memory_of_who_has_left_goes_with_them(served: Served) -> None:
    before = shared_pieces()
    for _ in range(5):
        with served.client():
            assert shared_pieces() > before
    wait_until(lambda: not served.server.clients(), "all to be gone")
    assert shared_pieces() == before
