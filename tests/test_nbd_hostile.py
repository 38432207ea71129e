"""Hostile and broken clients against the real server: an error or a closed connection, and nothing else happens.

After each test the server must answer a new client as ever, must not have logged a traceback, and both disks must
be equal wherever something was written.
"""

import contextlib
import functools
import hashlib
import http.client
import itertools
import json
import os
import random
import resource
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep.nbd import connection, payload, replies, server
from lockstep.service import serve
from tests import nbd_client as nbd
from tests.forks import ForkLab
from tests.lab import MIB, PATIENCE_S, Served, Volume, is_root, wait_until
from tests.nbd_client import Client, pack_info, pack_option, pack_request

SIZE = 34 * MIB + 333
LARGEST = 32 * MIB
POOL_CLIENTS = payload.DEFAULT_LIMIT_BYTES // LARGEST  # so many of the largest payloads fill the pool
PLENTY_OF_DESCRIPTORS = 2 * server.MAX_CONNECTIONS + 500
SO_SNDBUFFORCE = 32  # socket(7); the socket module does not name it
# What no request takes, however busy the machine, unless it waits for somebody who stalls; and what is usual then.
STALLED_S = 0.8 * connection.CONTENDED_STALL_S
NORMAL_S = 0.25


class Site:
    """The server under attack."""

    def __init__(self, served: Served, volume: Volume) -> None:
        self.served = served
        self.volume = volume
        self.pid = served.process.pid

    def client(self, *, structured: bool = True) -> Client:
        return Client(self.served.socket, PATIENCE_S).go("vol", structured=structured)

    def knock(self) -> Client:
        """Connect and say nothing."""
        return Client(self.served.socket, PATIENCE_S)

    def clients(self) -> int:
        """How many connections the server has that finished their handshake."""
        with contextlib.closing(http.client.HTTPConnection("localhost")) as channel:
            channel.sock = socket.socket(socket.AF_UNIX)
            channel.sock.connect(str(self.volume.lab.state / "run" / "vol.control"))
            channel.request("GET", "/v1/status")
            return len(json.load(channel.getresponse())["clients"])

    def all_gone(self) -> None:
        wait_until(lambda: self.clients() == 0, "the server to notice that all clients are gone")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def fingerprint(self) -> str:
        """All bytes of both files: what a client must not be able to change by breaking off."""
        digest = hashlib.blake2b()
        for path in (self.volume.target, self.volume.mirror):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def is_well(self) -> None:
        with self.client() as client:
            data = os.urandom(8192)
            client.write(SIZE - 9000, data, nbd.FUA)
            assert client.read(SIZE - 9000, 8192) == data
            assert client.call(nbd.FLUSH).error == 0
            client.disconnect()
        assert self.served.process.poll() is None
        log = self.served.log.read_text()
        assert "Traceback" not in log, log
        assert "did not expect" not in log, log


def mirror_header(volume: Volume) -> bytes:
    with volume.mirror.open("rb") as mirror:
        return mirror.read(MIB)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = PLENTY_OF_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, PLENTY_OF_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    lab = ForkLab(tmp_path_factory.mktemp("hostile"))
    volume = lab.volume("vol", SIZE, content=random.Random(1).randbytes(4 * MIB))
    try:
        with volume.served() as served:
            # The server's own last write to the mirror's header: from here on it changes for nobody but clients.
            wait_until(lambda: b'"in-sync"' in mirror_header(volume), "the mirror's token to say that it is in sync")
            yield Site(served, volume)
            # Without descriptors there is no audit trail, and so the mirror falls behind for a while.
            wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be in sync")
        volume.assert_equal_disks()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def site(running: Site) -> Iterator[Site]:
    yield running
    running.is_well()
    running.all_gone()


def assert_not_delayed(*calls: Callable[[], object], rounds: int = 40) -> None:
    """None of these calls, in many rounds, waits for somebody who stalls, and most are answered at once."""
    took_s = []
    for _ in range(rounds):
        for call in calls:
            began_s = time.monotonic()
            call()
            took_s.append(time.monotonic() - began_s)
    assert max(took_s) < STALLED_S
    assert statistics.median(took_s) < NORMAL_S


# --- bad magic, garbage ---


def test_a_bad_request_magic_closes_the_connection(site: Site) -> None:
    for magic in (0, 0x25609514, 0x67446698, 0xFFFFFFFF):
        with site.client() as client:
            client.send(pack_request(nbd.READ, 1, 0, 512, magic=magic))
            assert client.assert_closed() == b""


def test_a_bad_magic_behind_requests_in_flight(site: Site) -> None:
    before = site.fingerprint()
    with site.client() as client:
        reads = b"".join(pack_request(nbd.READ, n, 0, MIB) for n in range(20))
        client.send(reads + b"\xff" * 4096)
        client.assert_closed()
    site.all_gone()
    assert site.fingerprint() == before


def test_a_bad_option_magic_and_bad_flags_close_the_connection(site: Site) -> None:
    for words in (
        b"\0\0\0\3" + b"IHAVENOT" + bytes(8),
        b"\0\0\0\7",
        b"\xff\xff\xff\xff",
        b"\0\0\0\3" + nbd.IHAVEOPT + struct.pack(">II", nbd.OPT_INFO, 2**32 - 1),
        b"\0\0\0\3" + pack_option(nbd.OPT_EXPORT_NAME, b"nobody"),
    ):
        with site.knock() as client:
            client.send(words)
            client.receive(18)
            assert client.assert_closed() == b""


@pytest.mark.parametrize("handshaken", [False, True])
def test_garbage_floods(site: Site, handshaken: bool) -> None:
    before = site.fingerprint()
    dice = random.Random(7)
    for _ in range(20):
        with site.client() if handshaken else site.knock() as client, contextlib.suppress(ConnectionError):
            for _ in range(8):
                client.send(dice.randbytes(128 << 10))
            client.socket.shutdown(socket.SHUT_WR)
            client.assert_closed()
    site.all_gone()
    assert site.fingerprint() == before


def test_a_handshake_that_is_all_questions_keeps_nobody_waiting(site: Site) -> None:
    """Over TLS they would come from somebody who has not shown a certificate yet."""
    question = pack_option(nbd.OPT_INFO, pack_info(b"vol", nbd.INFO_NAME, nbd.INFO_DESCRIPTION))
    with site.knock() as client, site.client() as other:
        client.greet()
        with contextlib.suppress(ConnectionError):
            while True:
                client.send(question * 3000)
        assert "more than 64 options" in site.served.log.read_text()
        assert other.read(0, 10) == site.volume.target.read_bytes()[:10]


# --- writes that break off ---


def half_close(client: Client) -> None:
    client.socket.shutdown(socket.SHUT_WR)
    client.assert_closed()


@pytest.mark.parametrize("leave", [Client.close, half_close])
def test_a_write_that_breaks_off_changes_no_byte(site: Site, leave: Callable[[Client], Any]) -> None:
    before = site.fingerprint()
    for length, flags in itertools.product([512, 4096, 100_000, 300_000, LARGEST], [0, nbd.FUA]):
        for sent in {0, 1, 300, length // 2, length - 1}:
            with site.client() as client:
                client.send(pack_request(nbd.WRITE, 1, 4096, length, flags) + b"\xee" * min(sent, length - 1))
                leave(client)
    with site.client() as client:
        client.send(pack_request(nbd.WRITE, 1, 4096, 512)[:27])  # not even a whole header
        leave(client)
    site.all_gone()
    assert site.fingerprint() == before


# --- clients that stall ---


def test_stalled_clients_delay_nobody_and_may_go_on_later(site: Site) -> None:
    """They may be virtual machines that somebody paused."""
    with contextlib.ExitStack() as open_clients:
        for words in (
            b"",
            b"\0\0",
            b"\0\0\0\3",
            b"\0\0\0\3IHAVE",
            b"\0\0\0\3" + pack_option(7, b"\0\0\0\3vol\0\0")[:-1],
        ):
            open_clients.enter_context(site.knock()).send(words)
        stalled: list[tuple[Client, nbd.Request, int]] = []
        # One less than would fill the pool.
        for length in (512, 4096, 100_000, 300_000, *[LARGEST] * (POOL_CLIENTS - 1)):
            client = open_clients.enter_context(site.client())
            request = client.request(nbd.WRITE, MIB, payload=b"\xa5" * length)
            client.send(request.wire()[: length // 2])
            stalled.append((client, request, length // 2))
        cut_in_header = open_clients.enter_context(site.client())
        cut_in_header.send(pack_request(nbd.READ, 1, 0, 512)[:13])
        with site.client() as other:
            aligned = functools.partial(other.write, 0, b"\x5a" * 4096)
            odd_and_durable = functools.partial(other.write, 4096 + 5, b"odd", nbd.FUA)
            read = functools.partial(other.read, 0, 16 << 10)
            assert_not_delayed(aligned, odd_and_durable, read)
        for client, request, sent in stalled:
            client.send(request.wire()[sent:])
            assert client.reply(request).error == 0
        cut_in_header.send(pack_request(nbd.READ, 1, 0, 512)[13:])
        cut_in_header.receive(28 + 512)


def fill_the_pool(site: Site, clients: contextlib.ExitStack) -> list[Client]:
    """Let clients begin the largest writes until no memory is left for anybody."""
    holders = []
    for _ in range(POOL_CLIENTS):
        client = clients.enter_context(site.client())
        client.send(pack_request(nbd.WRITE, 1, 0, LARGEST) + b"\xee" * 300_000)
        holders.append(client)
    return holders


def test_who_stalls_with_memory_that_others_need_is_cut_off(site: Site) -> None:
    before = site.fingerprint()
    with contextlib.ExitStack() as clients:
        holders = fill_the_pool(site, clients)
        # Long enough a write that it needs a block of its own, and to the same place that the holders mean.
        waiting, other = clients.enter_context(site.client()), clients.enter_context(site.client())
        request = waiting.request(nbd.WRITE, 0, payload=site.volume.target.read_bytes()[: 2 * MIB])
        began_s = time.monotonic()
        waiting.send(request.wire()[: 28 + 1000])
        read = functools.partial(other.read, 0, 4096)
        assert_not_delayed(read)  # who needs no memory of the pool does not wait
        waiting.send(request.wire()[28 + 1000 :])
        assert waiting.reply(request).error == 0
        took_s = time.monotonic() - began_s
        assert took_s < connection.CONTENDED_STALL_S + 2 * server.PATROL_S + 2 * STALLED_S
        cut = [select.select([client.socket], [], [], 0)[0] != [] for client in holders]
        assert any(cut), "nobody was cut off, so where did the memory come from?"
    site.all_gone()
    assert site.fingerprint() == before


def test_who_never_reads_cannot_make_the_server_grow(site: Site) -> None:
    """Sixteen clients ask for the largest reads again and again and take no reply.

    What each may cost: its receive buffer, a batch of replies gathered and joined, and its tasks. What all may cost
    together: the pool, and what the pool keeps for reuse.
    """
    count = 16
    each = connection.RECEIVE_BYTES + 2 * (replies.REPLY_BATCH_BYTES + connection.INLINE_READ_BYTES) + MIB // 4
    together = payload.DEFAULT_LIMIT_BYTES + payload.KEEP_BYTES
    bound = site.served.resident_bytes() + together + count * each + 16 * MIB
    largest = b"".join(pack_request(nbd.READ, n, n, LARGEST) for n in range(connection.MAX_PENDING))
    small = b"".join(pack_request(nbd.READ, n, 0, 64 << 10) for n in range(1000))
    peak = 0

    def peak_grows() -> None:
        nonlocal peak
        peak = max(peak, site.served.resident_bytes())
        assert peak < bound, f"{peak >> 20} MiB resident, {bound >> 20} MiB are explained"

    with contextlib.ExitStack() as clients:
        greedy = [clients.enter_context(site.client(structured=n % 2 == 0)) for n in range(count)]
        for n, client in enumerate(greedy):
            client.send(largest if n % 4 else small)
            peak_grows()
        other = clients.enter_context(site.client())
        read = functools.partial(other.read, 0, 4096)

        def somebody_was_cut_off() -> bool:
            peak_grows()
            assert_not_delayed(read)
            poll = select.poll()
            for client in greedy:
                poll.register(client.socket, 0)  # hang-ups alone
            return bool(poll.poll(0))

        wait_until(somebody_was_cut_off, "the server to take its memory back")
        peak_grows()
    site.all_gone()
    peak_grows()


# --- many clients ---


def test_three_hundred_clients_at_work(site: Site) -> None:
    with contextlib.ExitStack() as clients:
        crowd = [clients.enter_context(site.client(structured=n % 2 == 0)) for n in range(300)]
        data = [os.urandom(4096) for _ in crowd]
        for n, client in enumerate(crowd):
            offset = MIB + n * 8192
            requests = [
                client.request(nbd.WRITE, offset, payload=data[n]),
                client.request(nbd.WRITE, offset + 4096 + 3, payload=b"odd", flags=nbd.FUA),
                client.request(nbd.WRITE_ZEROES, offset + 6000, 1000),
                client.request(nbd.READ, 0, 4096),
            ]
            client.send(b"".join(request.wire() for request in requests))
        for n, client in enumerate(crowd):
            assert all(reply.error == 0 for reply in client.replies().values())
            # Each sees what its neighbour wrote: one disk, however many connections.
            neighbour = (n - 1) % n if n else 0
            assert client.read(MIB + neighbour * 8192, 4096) == data[neighbour]


def test_a_crowd_that_does_not_end_its_handshakes_keeps_nobody_out(site: Site) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < server.MAX_CONNECTIONS + 200:
        pytest.skip("this user may not open enough files")
    with contextlib.ExitStack() as clients:
        early = clients.enter_context(site.client())
        crowd = [clients.enter_context(site.knock()) for _ in range(1100)]
        for client in crowd[-server.MAX_CONNECTIONS + 1 :]:
            client.greet()
        for client in crowd[: -server.MAX_CONNECTIONS + 1]:  # they have been there for longest, and said nothing
            client.assert_closed()
        early.write(MIB, b"still here", nbd.FUA)
        assert early.read(MIB, 10) == b"still here"
        last = crowd[-1]
        assert last.option(nbd.OPT_GO, pack_info(b""))[-1] == (nbd.REP_ACK, b"")
        last.write(MIB, b"and me too")
        assert clients.enter_context(site.client()).read(MIB, 10) == b"and me too"


@pytest.mark.skipif(not is_root(), reason="only root may have so much sent at once")
def test_the_buffers_of_those_who_send_much_at_once_are_bounded(site: Site) -> None:
    """Who sends more at once than a receive buffer takes gets a larger one until it goes, unless too many have one."""
    count, written = 300, os.urandom(64 << 10)
    each = connection.RECEIVE_BYTES + MIB // 8
    before = site.served.resident_bytes()
    bound = before + payload.SMALL_LIMIT_BYTES + 2 * payload.KEEP_BYTES + count * each
    assert bound < before + count * connection.BULK_RECEIVE_BYTES
    most = []
    for _ in range(2):
        with contextlib.ExitStack() as clients:
            for _ in range(count):
                client = clients.enter_context(site.client())
                client.socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 8 * MIB)
                os.kill(site.pid, signal.SIGSTOP)
                try:
                    for n in range(16):
                        client.send(client.request(nbd.WRITE, MIB + n * len(written), payload=written).wire())
                finally:
                    os.kill(site.pid, signal.SIGCONT)
                assert [reply.error for reply in client.replies().values()] == [0] * 16
            most.append(site.served.resident_bytes())
            assert before + payload.SMALL_LIMIT_BYTES < most[-1] < bound
            assert client.read(MIB + 15 * len(written), len(written)) == written
        site.all_gone()
    assert most[1] > most[0] - 16 * MIB, "those of the first crowd are still taken"


needs_root = pytest.mark.skipif(not is_root(), reason="only root may count the descriptors of a protected process")


@needs_root
def test_no_descriptor_is_left_behind(site: Site) -> None:
    site.all_gone()
    before = site.descriptors()
    for n in range(120):
        with site.knock() as client:
            if n % 6 == 0:
                continue
            client.greet()
            if n % 6 == 1:
                client.send(nbd.IHAVEOPT)
        with site.client() as client:
            if n % 6 == 2:
                client.send(b"\0" * 28)
            elif n % 6 == 3:
                client.send(pack_request(nbd.WRITE, 1, 0, LARGEST) + bytes(200_000))
            elif n % 6 == 4:
                client.send(b"".join(pack_request(nbd.READ, k, 0, MIB) for k in range(20)))
            elif n % 6 == 5:
                client.disconnect()
    wait_until(lambda: site.descriptors() <= before, "the descriptors of dropped connections to be closed")


@needs_root
def test_a_server_without_free_descriptors_recovers(site: Site) -> None:
    """Its limit may be lower than the number of connections it would admit: 1024 is usual."""
    soft, hard = resource.prlimit(site.pid, resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as clients:
        early = clients.enter_context(site.client())
        # How many are free below the limit nobody can count: those of clients that left may not be closed yet. But
        # no more can be admitted than the limit says, so of so many and twenty more at least twenty are refused.
        limit = site.descriptors() + 10
        resource.prlimit(site.pid, resource.RLIMIT_NOFILE, (limit, hard))
        try:
            refused = 0
            for _ in range(limit + 20):
                client = clients.enter_context(site.knock())
                try:
                    client.greet()
                except (EOFError, ConnectionError):
                    refused += 1
            assert refused >= 20
            early.write(MIB, b"still here", nbd.FUA)
            assert early.read(MIB, 10) == b"still here"
        finally:
            resource.prlimit(site.pid, resource.RLIMIT_NOFILE, (soft, hard))
        with site.client() as late:
            assert late.read(MIB, 10) == b"still here"


def test_however_few_descriptors_there_are_some_are_left_for_its_own_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else who says nothing, over TLS from anywhere, keeps the grants from being read and commands from being heard."""
    volume = ForkLab(tmp_path).volume("vol", MIB)
    limited = tmp_path / "limited"
    limit = serve.OWN_DESCRIPTORS + 40
    limited.write_text(f'#!/bin/sh\nulimit -n {limit}\nexec "{sys.executable}" "$@"\n')
    limited.chmod(0o755)
    with monkeypatch.context() as patched, contextlib.ExitStack() as stack:
        patched.setattr(sys, "executable", str(limited))
        served = stack.enter_context(volume.served())
        for _ in range(2 * limit):
            stack.enter_context(Client(served.socket, PATIENCE_S))
        client = stack.enter_context(Client(served.socket, PATIENCE_S).go("vol"))
        (found,) = served.now()["clients"]
        assert found["verdict"] == "allowed"
        volume.lab.lockstep("revoke", "vol", found["user"]).ok()
        wait_until(lambda: served.now()["clients"][0]["verdict"] != "allowed", "the server to know of it")
        client.write(0, b"in spite of all", nbd.FUA)


# --- clients that die ---


def holds(check: Callable[[], None]) -> bool:
    try:
        check()
    except AssertionError:
        return False
    return True


WRITER = """
import sys
from tests.nbd_client import Client, WRITE, READ
client = Client(sys.argv[1]).go("vol")
print("at work", flush=True)
while True:
    requests = [client.request(WRITE, int(sys.argv[2]) + 9001 * n, payload=bytes([n + 1]) * 9000) for n in range(50)]
    requests.append(client.request(WRITE, int(sys.argv[2]) + 500_000, payload=b"x" * 400_000, flags=1))
    client.send(b"".join(request.wire() for request in requests))
    client.replies()
"""


def test_killed_clients(site: Site) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, site.served.socket, str(16 * MIB + n * 300_000)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        for n in range(3)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"at work\n"
    with site.client() as client:
        # Their writes arrive while they are killed: each has filled its place at least once.
        wait_until(lambda: client.read(16 * MIB + 2 * 300_000 + 800_000, 4) == b"xxxx", "the writers to write")
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        writer.wait(PATIENCE_S)
        assert writer.stdout is not None
        writer.stdout.close()
    site.all_gone()
    # What had arrived whole is still being carried out; the disks are equal as soon as that is done.
    wait_until(lambda: holds(site.volume.assert_equal_disks), "both disks to be equal")
    site.volume.assert_equal_disks()
