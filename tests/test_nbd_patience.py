"""How long the server bears with a client that holds what others need: the real transport, with short patience.

`tests.test_nbd_hostile` shows the same with the real constants; here each lasts a fraction of a second, so that more
of the ways in which a client can be slow are worth their time.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from fuzz.bodies import Choices, MemoryExport

from lockstep.nbd import connection, server
from lockstep.nbd.payload import PayloadPool
from lockstep.nbd.server import NbdServer
from tests import nbd_client as nbd
from tests.lab import MIB
from tests.nbd_client import Client, pack_option, pack_request

STALL_S = 0.6
PATROL_S = 0.05
HANDSHAKE_S = 0.6
# What the rules leave at most, and as much again for a machine that others use too.
SOON_S = 2 * (STALL_S + PATROL_S) + 1.0
POOL_BYTES = 64 * MIB
LARGE_BYTES = 2 * MIB + 1  # more than the small blocks have


class Served:
    """A server on a loop of its own, in a thread of its own."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.export = MemoryExport(4 * MIB, Choices(b""))  # without choices it is fast and never fails
        self._ready = threading.Event()
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=lambda: uvloop.run(self._serve()))

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        """Stop in order; a second time, nothing."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server does not stop"

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        made = NbdServer(self.export, PayloadPool(POOL_BYTES))
        await made.listen_unix(self.path)
        await made.accept()
        self._ready.set()
        await self._stop.wait()
        await made.drain()

    def client(self) -> Client:
        return Client(self.path, 20.0).go("")

    def hold(self) -> Client:
        """Return a client that holds a block of 4 MiB of the pool, and sends no more."""
        client = self.client()
        client.send(pack_request(nbd.WRITE, 1, 0, LARGE_BYTES) + b"\xee" * 300_000)
        return client


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    for module in (connection, server):
        monkeypatch.setattr(module, "CONTENDED_STALL_S", STALL_S)
    monkeypatch.setattr(server, "PATROL_S", PATROL_S)
    monkeypatch.setattr(server, "HANDSHAKE_S", HANDSHAKE_S)
    made = Served(str(tmp_path / "sock"))
    made.start()
    yield made
    made.stop()


def fill(served: Served, clients: contextlib.ExitStack) -> list[Client]:
    """Let clients take all the memory that there is."""
    return [clients.enter_context(served.hold()) for _ in range(POOL_BYTES // (4 * MIB))]


def is_closed(client: Client) -> bool:
    client.socket.setblocking(False)
    try:
        return client.socket.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_who_stalls_while_nobody_waits_is_left_alone(served: Served) -> None:
    with contextlib.ExitStack() as clients:
        holder, other = clients.enter_context(served.hold()), clients.enter_context(served.client())
        until_s = time.monotonic() + 2 * STALL_S
        while time.monotonic() < until_s:
            other.write(0, b"x" * 4096, nbd.FUA)
        assert not is_closed(holder)


def test_who_stalls_while_others_wait_is_cut_off(served: Served) -> None:
    with contextlib.ExitStack() as clients:
        holders = fill(served, clients)
        began_s = time.monotonic()
        clients.enter_context(served.client()).write(0, b"y" * 4096, nbd.FUA)
        assert time.monotonic() - began_s < STALL_S, "small requests have memory of their own"
        assert not any(map(is_closed, holders))
        began_s = time.monotonic()
        clients.enter_context(served.client()).write(0, b"y" * LARGE_BYTES, nbd.FUA)
        assert time.monotonic() - began_s < SOON_S
        assert any(map(is_closed, holders))
    assert served.export.content[:LARGE_BYTES] == b"y" * LARGE_BYTES


def test_who_drips_while_others_wait_is_cut_off_too(served: Served) -> None:
    """A byte now and then holds the memory just as long as none does."""
    with contextlib.ExitStack() as clients:
        holders = fill(served, clients)
        waiting = clients.enter_context(served.client())
        request = waiting.request(nbd.WRITE, 0, payload=b"z" * LARGE_BYTES, flags=nbd.FUA)
        began_s = time.monotonic()
        waiting.send(request.wire())
        waiting.socket.settimeout(STALL_S / 10)
        while True:
            assert time.monotonic() - began_s < SOON_S, "a write waits as long as others drip"
            for holder in holders:
                with contextlib.suppress(OSError):  # cut off by now, as it should be
                    holder.send(b"\xee")
            with contextlib.suppress(TimeoutError):
                assert waiting.reply(request).error == 0
                break


def test_a_queue_of_greedy_clients_does_not_come_before_everybody(served: Served) -> None:
    """Each asks for more than the pool has and reads nothing; a small durable write must not wait for all of them."""
    with contextlib.ExitStack() as clients:
        for _ in range(6):
            greedy = clients.enter_context(served.client())
            greedy.send(b"".join(pack_request(nbd.READ, n, 0, 4 * MIB) for n in range(40)))
        other = clients.enter_context(served.client())
        began_s = time.monotonic()
        other.write(0, b"w" * 4096, nbd.FUA)
        assert time.monotonic() - began_s < SOON_S


def test_a_handshake_that_does_not_end_is_ended(served: Served) -> None:
    with contextlib.ExitStack() as clients:
        silent = []
        for words in (b"", b"\0\0\0", b"\0\0\0\3", b"\0\0\0\3" + pack_option(nbd.OPT_LIST) + b"IHAVE"):
            silent.append(clients.enter_context(Client(served.path, 10.0)))
            silent[-1].send(words)
        for client in silent:
            client.assert_closed()


def test_a_handshake_that_drips_is_ended(served: Served) -> None:
    """Otherwise a byte now and then would keep one of the limited places for ever."""
    with Client(served.path, 10.0) as client:
        client.send(b"\0\0\0\3")
        client.receive(18)
        deadline_s = time.monotonic() + 5 * HANDSHAKE_S
        words = iter(pack_option(77, bytes(60_000)))
        client.socket.settimeout(HANDSHAKE_S / 50)  # the pace of the dripping
        with contextlib.suppress(ConnectionError):
            while True:
                assert time.monotonic() < deadline_s, "the handshake goes on as long as something drips"
                client.send(bytes([next(words)]))
                with contextlib.suppress(TimeoutError):
                    assert client.socket.recv(1) == b""
                    break


def test_a_client_that_takes_nothing_does_not_keep_the_server_from_stopping(served: Served) -> None:
    with contextlib.ExitStack() as clients:
        for _ in range(3):
            clients.enter_context(served.client()).send(
                b"".join(pack_request(nbd.READ, n, 0, 4 * MIB) for n in range(8))
            )
        clients.enter_context(served.hold())
        served.stop()
