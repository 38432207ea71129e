"""How long the server bears with a client that holds what others need: the real transport, with short patience.

`tests.test_nbd_hostile` shows the same with the real constants; here each lasts a fraction of a second, so that more
of the ways in which a client can be slow are worth their time.
"""

import asyncio
import contextlib
import functools
import math
import os
import pwd
import ssl
import threading
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from fuzz.bodies import Choices, MemoryExport

from lockstep.nbd import connection, server
from lockstep.nbd.connection import MAX_PENDING
from lockstep.nbd.deferred import CLEAR_PIECE_BYTES, MAX_CLEARS
from lockstep.nbd.payload import PayloadPool
from lockstep.nbd.server import NbdServer
from lockstep.service.certificates import load_terms, make_authority, make_client
from tests import nbd_client as nbd
from tests.lab import MIB, wait_until
from tests.nbd_client import Client, pack_option, pack_request

STALL_S = 0.6
PATROL_S = 0.05
HANDSHAKE_S = 0.6
# What the rules leave at most, and more for a machine that others use too.
SOON_S = STALL_S + PATROL_S + 5.0
POOL_BYTES = 64 * MIB
LARGE_BYTES = 2 * MIB + 1  # more than the small blocks have


class Served:
    """A server on a loop of its own, in a thread of its own."""

    def __init__(self, path: str, tls: ssl.SSLContext | None = None) -> None:
        self.path = path
        self.port = 0
        self.seen: list[tuple[int, str, str] | int] = []
        self.places = server.MAX_CONNECTIONS
        self._tls = tls
        self.export = MemoryExport(4 * MIB, Choices(b""))  # without choices it is fast and never fails
        self.pool: PayloadPool
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
        self.pool = PayloadPool(POOL_BYTES)
        made = NbdServer(self.export, self.pool, self.places, watcher=self)
        await made.listen_unix(self.path)
        if self._tls is not None:
            self.port = (await made.listen_tcp("127.0.0.1", 0, self._tls))[1]
        await made.accept()
        self._ready.set()
        await self._stop.wait()
        await made.drain()

    def connected(self, connection_id: int, user: str, origin: str) -> None:
        self.seen.append((connection_id, user, origin))

    def disconnected(self, connection_id: int) -> None:
        self.seen.append(connection_id)

    def client(self) -> Client:
        return Client(self.path, 20.0).go("")

    def stand_still(self, time_s: float) -> None:
        """Have the server do nothing for so long."""
        self._loop.call_soon_threadsafe(time.sleep, time_s)

    def hold(self) -> Client:
        """Return a client that holds a block of 4 MiB of the pool, and sends no more."""
        client = self.client()
        client.send(pack_request(nbd.WRITE, 1, 0, LARGE_BYTES) + b"\xee" * 300_000)
        return client


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tls") / "tls"
    make_authority(str(directory))
    make_client(str(directory), "alice")
    return directory


@pytest.fixture
def context(tls: Path) -> ssl.SSLContext:
    """What alice brings."""
    context = ssl.create_default_context(cafile=str(tls / "ca-cert.pem"))
    alice = tls / "clients" / "alice"
    context.load_cert_chain(alice / "client-cert.pem", alice / "client-key.pem")
    return context


@pytest.fixture
def served(tmp_path: Path, tls: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    for module in (connection, server):
        monkeypatch.setattr(module, "CONTENDED_STALL_S", STALL_S)
    monkeypatch.setattr(server, "PATROL_S", PATROL_S)
    made = Served(str(tmp_path / "sock"), load_terms(str(tls)).context)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def short_handshakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for who means to be cut off: on a busy machine it is less than an honest handshake takes."""
    monkeypatch.setattr(server, "HANDSHAKE_S", HANDSHAKE_S)


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
        clients.enter_context(served.client()).write(0, b"y" * 4096, nbd.FUA)
        assert not any(map(is_closed, holders)), "small requests have memory of their own"
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


def test_who_could_not_be_heard_since_the_server_stood_still_is_not_cut_off(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONTENDED_STALL_S", 1.5)
    with contextlib.ExitStack() as clients:
        holders = fill(served, clients)
        holders.append(clients.enter_context(served.hold()))
        wait_until(lambda: served.pool.contended, "one more to wait for memory")
        served.stand_still(2.0)
        for holder in holders:
            holder.send(b"\xee" * (LARGE_BYTES - 300_000))
        for holder in holders:
            assert holder.receive(16)[4:8] == bytes(4), "each write is answered, and without an error"
    assert served.export.content[:LARGE_BYTES] == b"\xee" * LARGE_BYTES


def test_a_queue_of_greedy_clients_does_not_come_before_everybody(served: Served) -> None:
    """Each asks for more than the pool has and reads nothing; a small durable write must not wait for all of them."""
    with contextlib.ExitStack() as clients:
        for _ in range(math.ceil(2 * SOON_S / STALL_S)):
            greedy = clients.enter_context(served.client())
            greedy.send(b"".join(pack_request(nbd.READ, n, 0, 4 * MIB) for n in range(40)))
        other = clients.enter_context(served.client())
        began_s = time.monotonic()
        other.write(0, b"w" * 4096, nbd.FUA)
        assert time.monotonic() - began_s < SOON_S


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_who_takes_its_replies_slowly_is_not_cut_off(served: Served, context: ssl.SSLContext, secure: bool) -> None:
    """It holds all the memory that others wait for, for longer than a client may that takes nothing."""
    with contextlib.ExitStack() as clients:
        reader = Client(("127.0.0.1", served.port)).start_tls(context).go("") if secure else served.client()
        clients.enter_context(reader)
        reader.send(b"".join(reader.request(nbd.READ, 0, 4 * MIB).wire() for _ in range(POOL_BYTES // (4 * MIB))))
        taken = sum(len(reply.data) for reply in reader.arrived())
        waiting = clients.enter_context(served.client())
        request = waiting.request(nbd.READ, 0, LARGE_BYTES)
        waiting.send(request.wire())
        began_s = time.monotonic()
        while reader.parser.pending:
            taken += sum(len(reply.data) for reply in reader.arrived())
            time.sleep(max(0, 2 * STALL_S * taken / POOL_BYTES - (time.monotonic() - began_s)))  # its pace
        assert time.monotonic() - began_s > 1.5 * STALL_S
        assert waiting.reply(request).error == 0


def test_a_write_that_has_arrived_waits_for_nobody_who_takes_no_replies(served: Served) -> None:
    """Eight fill the memory for small replies, and are cut off after a while; then the next eight do so."""
    with contextlib.ExitStack() as clients:
        holder = clients.enter_context(served.hold())
        hogs = [clients.enter_context(served.client()) for _ in range(8 * math.ceil(2 * SOON_S / STALL_S))]
        for hog in hogs:
            hog.send(b"".join(pack_request(nbd.READ, n, 0, MIB) for n in range(40)))
        other = clients.enter_context(served.client())
        began_s = time.monotonic()
        for _ in range(20):
            other.write(0, b"w" * 4096, nbd.FUA)
        assert time.monotonic() - began_s < SOON_S
        wait_until(lambda: any(isinstance(said, int) for said in served.seen), "the server to take its memory back")
        assert not is_closed(holder), "for its memory nobody waits"


def test_where_nobody_is_in_a_handshake_one_too_many_is_refused(tmp_path: Path) -> None:
    served = Served(str(tmp_path / "sock"))
    served.places = 3
    served.start()
    try:
        with contextlib.ExitStack() as clients:
            silent = clients.enter_context(Client(served.path, 10.0))
            silent.greet()
            others = [clients.enter_context(served.client()) for _ in range(3)]
            assert silent.assert_closed() == b""
            assert clients.enter_context(Client(served.path, 10.0)).assert_closed() == b""
            for other in others:
                other.write(0, b"as ever")
            others.pop().disconnect()
            wait_until(lambda: any(isinstance(said, int) for said in served.seen), "the server to know that one left")
            clients.enter_context(served.client()).write(0, b"as ever")
    finally:
        served.stop()


@pytest.mark.usefixtures("short_handshakes")
def test_a_handshake_that_does_not_end_is_ended(served: Served) -> None:
    with contextlib.ExitStack() as clients:
        silent = []
        for words in (b"", b"\0\0\0", b"\0\0\0\3", b"\0\0\0\3" + pack_option(nbd.OPT_LIST) + b"IHAVE"):
            silent.append(clients.enter_context(Client(served.path, 10.0)))
            silent[-1].send(words)
        for client in silent:
            client.assert_closed()


@pytest.mark.usefixtures("short_handshakes")
def test_a_handshake_that_drips_is_ended(served: Served) -> None:
    """Otherwise a byte now and then would keep one of the limited places for ever."""
    with Client(served.path, 10.0) as client:
        client.send(b"\0\0\0\3")
        client.receive(18)
        deadline_s = time.monotonic() + HANDSHAKE_S + SOON_S
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


# --- the same, over TLS -----------------------------------------------------------------------------------


def client_hello(context: ssl.SSLContext) -> bytes:
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


@pytest.mark.usefixtures("short_handshakes")
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0], ids=["nothing", "half a hello", "a hello"])
def test_a_tls_handshake_that_stalls_is_ended(served: Served, context: ssl.SSLContext, part: float) -> None:
    with Client(("127.0.0.1", served.port), 10.0) as client:
        client.greet()
        assert client.option(nbd.OPT_STARTTLS) == [(nbd.REP_ACK, b"")]
        hello = client_hello(context)
        began_s = time.monotonic()
        client.send(hello[: int(len(hello) * part)])
        client.assert_closed()
        assert time.monotonic() - began_s < HANDSHAKE_S + SOON_S
    assert served.seen == []


def test_who_stalls_inside_tls_while_others_wait_is_cut_off(served: Served, context: ssl.SSLContext) -> None:
    with contextlib.ExitStack() as clients:
        holders = []
        for n in range(POOL_BYTES // (4 * MIB)):
            holder = clients.enter_context(Client(("127.0.0.1", served.port), 20.0)).start_tls(context).go("")
            if n % 2:
                holder.send(pack_request(nbd.WRITE, 1, 0, LARGE_BYTES) + b"\xee" * 300_000)
            else:
                holder.send(b"".join(pack_request(nbd.READ, cookie, 0, LARGE_BYTES) for cookie in range(8)))
            holders.append(holder)
        began_s = time.monotonic()
        clients.enter_context(served.client()).write(0, b"y" * LARGE_BYTES, nbd.FUA)
        assert time.monotonic() - began_s < SOON_S


def test_a_tls_client_that_takes_nothing_does_not_keep_the_server_from_stopping(
    served: Served, context: ssl.SSLContext
) -> None:
    with Client(("127.0.0.1", served.port), 20.0) as client:
        client.start_tls(context).go("")
        client.send(b"".join(pack_request(nbd.READ, n, 0, 4 * MIB) for n in range(8)))
        wait_until(lambda: len(served.seen) == 1, "the server to know the client")
        served.stop()


def test_the_watcher_hears_of_those_who_finish_their_handshake(served: Served, context: ssl.SSLContext) -> None:
    with Client(served.path) as quitter:
        quitter.greet()
        quitter.option(nbd.OPT_ABORT)
    with served.client(), Client(("127.0.0.1", served.port)) as other:
        other.start_tls(context).go("")
        port = other.plain.getsockname()[1]
        wait_until(lambda: len(served.seen) == 2, "two to be seen")
        account = pwd.getpwuid(os.geteuid()).pw_name
        assert served.seen[0] == (1, account, f"unix socket, pid {os.getpid()}")
        assert served.seen[1] == (2, "alice", f"tls 127.0.0.1:{port}")
    wait_until(lambda: len(served.seen) == 4, "both to be gone")
    assert sorted(served.seen[2:], key=str) == [1, 2]


class Unforeseen(MemoryExport):
    """A disk that fails as nobody thought it could: at once, or while it is waited for."""

    def __init__(self, size: int) -> None:
        super().__init__(size, Choices(b""))
        self.at_once = False

    def read_run(self, into: bytearray, run: "array[int]", count: int) -> int:
        return 0

    def write_run(self, user: str, data: memoryview, run: "array[int]", count: int) -> int:
        return 0

    def read(self, into: memoryview, run: "array[int]", count: int) -> Awaitable[None]:
        return self._fail()

    def write(self, user: str, data: memoryview, run: "array[int]", count: int, *, durable: bool) -> Awaitable[None]:
        return self._fail()

    def flush(self) -> Awaitable[None]:
        return self._fail()

    def _fail(self) -> Awaitable[None]:
        if self.at_once:
            raise RuntimeError("unforeseen")
        return self._fail_later()

    async def _fail_later(self) -> None:
        await asyncio.sleep(0)
        raise RuntimeError("unforeseen")


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "later"])
def test_each_request_of_a_disk_that_fails_as_nobody_foresaw_is_answered(served: Served, at_once: bool) -> None:
    served.stop()
    export = Unforeseen(4 * MIB)
    export.at_once = at_once
    served = Served(served.path + "2")
    served.export = export
    served.start()
    try:
        with served.client() as client:
            for _ in range(200):  # more than there would be memory for, if any of it stayed away
                asked = []
                for length in (4096, 4096, MIB):
                    asked += [client.request(nbd.WRITE, payload=b"\xee" * length), client.request(nbd.READ, 0, length)]
                client.send(b"".join(each.wire() for each in (*asked, client.request(nbd.FLUSH))))
                assert [reply.error for reply in client.replies().values()] == [nbd.EIO] * 7
    finally:
        served.stop()


class Slow(MemoryExport):
    """A disk that zeroes, and flushes, when it is allowed to."""

    def __init__(self, size: int) -> None:
        super().__init__(size, Choices(b""))
        self.cleared: list[int] = []
        self.flushing = 0
        self.allowed = asyncio.Event()

    async def zero(self, user: str, offset: int, length: int, *, durable: bool, allocate: bool) -> None:
        self.cleared.append(length)
        await self.allowed.wait()

    async def flush(self) -> None:
        self.flushing += 1
        await self.allowed.wait()

    def allow(self, served: Served) -> None:
        if served._thread.is_alive():
            served._loop.call_soon_threadsafe(self.allowed.set)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[Served, Slow]]:
    served = Served(str(tmp_path / "slow"))
    served.export = export = Slow(64 * MIB)
    served.places = 2
    served.start()
    yield served, export
    export.allow(served)
    served.stop()


def test_zeroes_of_one_client_are_few_at_a_time_and_end_with_it(slow: tuple[Served, Slow]) -> None:
    """Else a client without a payload to bound it has any amount of work done, and a stop waits for all of it."""
    served, export = slow
    with served.client() as client:
        asked = [client.request(nbd.WRITE_ZEROES, 0, 64 * MIB) for _ in range(MAX_PENDING - 1)]
        client.send(b"".join(each.wire() for each in asked))
        wait_until(lambda: len(export.cleared) >= MAX_CLEARS, "the first of them to begin")
        client.send(client.request(nbd.READ, 0, 4096).wire())
        client.arrived()  # whatever was to begin has begun
        assert export.cleared == [CLEAR_PIECE_BYTES] * MAX_CLEARS
        client.send(pack_request(nbd.READ, 1, 0, 4096, magic=0))  # by which the server loses it
        client.assert_closed()
    wait_until(lambda: 1 in served.seen, "the server to know that it left")
    export.allow(served)
    served.stop()
    assert export.cleared == [CLEAR_PIECE_BYTES] * MAX_CLEARS


def test_zeroes_come_to_their_end_in_pieces(slow: tuple[Served, Slow]) -> None:
    served, export = slow
    export.allow(served)
    with served.client() as client:
        assert client.call(nbd.WRITE_ZEROES, CLEAR_PIECE_BYTES - 1, CLEAR_PIECE_BYTES + 2).error == 0
    assert export.cleared == [1, CLEAR_PIECE_BYTES, 1]


def _is(what: Callable[[], int], wanted: int) -> bool:
    return what() == wanted


def test_who_left_work_behind_keeps_a_place_until_that_is_done(slow: tuple[Served, Slow]) -> None:
    """Else who comes and goes has any number of requests under way."""
    served, export = slow
    for _ in range(served.places):
        with served.client() as client:
            begun = export.flushing
            client.send(client.request(nbd.FLUSH).wire())
            wait_until(functools.partial(_is, lambda: export.flushing, begun + 1), "the flush to begin")
            seen = len(served.seen)  # by now the server knows that it came
            client.send(pack_request(nbd.READ, 1, 0, 4096, magic=0))
            client.assert_closed()
        wait_until(functools.partial(_is, lambda: len(served.seen), seen + 1), "the server to know that it left")
    with Client(served.path, 10.0) as refused:
        assert refused.assert_closed() == b""
    export.allow(served)

    def is_let_in() -> bool:
        with contextlib.suppress(EOFError, ConnectionError), Client(served.path, 10.0) as client:
            client.go("")
            return True
        return False

    wait_until(is_let_in, "there to be places again")
