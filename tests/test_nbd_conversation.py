"""Whole conversations with the real server: every command, every flag, pipelines, ends, and other people's clients.

All tests of this file talk to one server and write to places of their own; what they wrote is kept in a model of
the disk, to which the target and the decrypted mirror are compared.
"""

import itertools
import json
import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dissect.fve.luks import LUKS

from tests import nbd_client as nbd
from tests.forks import ForkLab
from tests.lab import MIB, PASSPHRASE, Served, Volume, run
from tests.nbd_client import Client, Request

# Not a whole number of sectors: whatever rounds, rounds wrongly here.
SIZE = 88 * MIB + 333
SCRATCH = 0  # 36 MiB where the largest requests go
CELLS = 36 * MIB  # from here on, each test takes places of its own


class World:
    """The server, and what its disk should hold."""

    def __init__(self, served: Served, volume: Volume) -> None:
        self.served = served
        self.volume = volume
        self.tcp = served.next_uri()
        self.model = bytearray(SIZE)
        self._next_cell = CELLS
        self._mirror = volume.mirror.open("rb", buffering=0)
        self._luks = LUKS(self._mirror)
        self._luks.unlock_with_passphrase(PASSPHRASE.decode())

    def close(self) -> None:
        self._mirror.close()

    def client(self, *, structured: bool = True, allocation: bool = True) -> Client:
        return Client(self.served.socket).go("vol", structured=structured, allocation=allocation)

    def place(self, length: int = 64 << 10) -> int:
        """Return the offset of so many bytes that nobody else writes."""
        place = self._next_cell
        self._next_cell += -(-length // 4096) * 4096
        assert self._next_cell <= SIZE - MIB, "the disk of these tests is too small"
        return place

    def write(self, client: Client, offset: int, data: bytes, flags: int = 0) -> None:
        client.write(offset, data, flags)
        self.model[offset : offset + len(data)] = data

    def check(self) -> None:
        """The target holds what the model says, to the byte."""
        target = self.volume.target.read_bytes()
        assert len(target) == SIZE
        if target != self.model:
            first = next(i for i, (a, b) in enumerate(zip(target, self.model, strict=True)) if a != b)
            raise AssertionError(f"the target differs from what was written, first at byte {first}")

    def mirrored(self, offset: int, length: int) -> bytes:
        """Decrypt a part of the mirror, as an independent LUKS2 reader sees it."""
        stream = self._luks.open()
        stream.seek(offset)
        data: bytes = stream.read(length)
        return data

    def check_both(self, offset: int, length: int) -> None:
        """Both disks hold what the model says of this range, and the target of some sectors round it too."""
        start, end = max(0, offset - 8192), min(SIZE, offset + length + 8192)
        with self.volume.target.open("rb") as target:
            target.seek(start)
            assert target.read(end - start) == self.model[start:end]
        # Decrypting in Python is slow: of long ranges some pieces, and everything at the end of this file's tests.
        step = max(length // 16, 4096)
        for at in range(offset, offset + length, step):
            piece = min(4096 if length > 256 << 10 else step, offset + length - at)
            assert self.mirrored(at, piece) == self.model[at : at + piece]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    lab = ForkLab(tmp_path_factory.mktemp("conversation"))
    volume = lab.volume("vol", SIZE)
    volume.grant("anonymous")
    with volume.served("--tcp", "127.0.0.1:0") as served:
        made = World(served, volume)
        yield made
        made.check()
        made.close()
    volume.assert_equal_disks()
    assert "Traceback" not in served.log.read_text()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A volume without a mirror."""
    lab = ForkLab(tmp_path_factory.mktemp("bare"))
    target = lab.disk("bare.target", 4 * MIB, os.urandom(MIB))
    lab.lockstep("create", "bare", "--target", target).ok()
    with Volume(lab, "bare", target, lab.home / "no mirror", None).served(in_sync=False) as served:
        yield served


FORMS = pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])


# --- reads and writes ---


@FORMS
@pytest.mark.parametrize(
    ("shift", "length"),
    [
        (0, 512),
        (0, 4096),
        (1, 1),
        (511, 2),
        (513, 4095),
        (100, 65536),
        (0, 128 << 10),
        (0, (128 << 10) + 512),
        (7, MIB),
    ],
)
def test_what_is_written_is_read(world: World, structured: bool, shift: int, length: int) -> None:
    place = world.place(length + 1024) + shift
    with world.client(structured=structured) as client:
        world.write(client, place, os.urandom(length))
        reply = client.call(nbd.READ, place, length)
        assert reply.error == 0
        assert reply.data == world.model[place : place + length]
        assert reply.chunks == (1 if structured else 0)
    world.check_both(place, length)


@FORMS
def test_the_last_bytes_of_the_disk(world: World, structured: bool) -> None:
    with world.client(structured=structured) as client:
        assert client.size == SIZE
        world.write(client, SIZE - 1, os.urandom(1))
        world.write(client, SIZE - 700, os.urandom(600))
        assert client.read(SIZE - 5000, 5000) == world.model[-5000:]
    world.check_both(SIZE - 1024, 1024)


def test_dont_fragment(world: World) -> None:
    with world.client() as client:
        assert client.flags & nbd.SEND_DF
        reply = client.call(nbd.READ, SCRATCH, MIB, nbd.DF)
        assert (reply.error, reply.chunks) == (0, 1)
        assert reply.data == world.model[:MIB]


def test_dont_fragment_needs_structured_replies(world: World) -> None:
    with world.client(structured=False) as client:
        assert not client.flags & nbd.SEND_DF
        assert client.call(nbd.READ, 0, 512, nbd.DF).error == nbd.EINVAL
        assert client.read(0, 512) == world.model[:512]


@FORMS
def test_exactly_the_largest_payload(world: World, structured: bool) -> None:
    data = random.Random(structured).randbytes(32 * MIB)
    with world.client(structured=structured) as client:
        world.write(client, SCRATCH + 4096, data)
        assert client.read(SCRATCH + 4096, 32 * MIB) == data
    world.check()
    assert world.mirrored(SCRATCH + 4096 + 31 * MIB, MIB) == data[-MIB:]


@FORMS
def test_more_than_the_largest_payload_is_refused_and_skipped(world: World, structured: bool) -> None:
    with world.client(structured=structured) as client:
        assert client.call(nbd.READ, SCRATCH, 32 * MIB + 1).error == nbd.EOVERFLOW
        assert client.call(nbd.WRITE, SCRATCH, payload=b"\xee" * (32 * MIB + 1)).error == nbd.EINVAL
        assert client.read(SCRATCH, 512) == world.model[:512]
    world.check()


@FORMS
@pytest.mark.parametrize("command", [nbd.READ, nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES, nbd.CACHE])
@pytest.mark.parametrize("flags", [0, nbd.FUA])
def test_requests_of_no_bytes_succeed_and_change_nothing(
    world: World, structured: bool, command: int, flags: int
) -> None:
    with world.client(structured=structured) as client:
        for offset in (0, 5, 512, SIZE - 1, SIZE):
            reply = client.call(command, offset, 0, flags)
            assert (reply.error, reply.data) == (0, b"")
        assert client.call(command, SIZE + 1, 0, flags).error in (nbd.EINVAL, nbd.ENOSPC)
    world.check_both(0, 1024)


def test_fua_on_everything(world: World) -> None:
    place = world.place()
    data = os.urandom(4096)
    with world.client() as client:
        world.write(client, place, data, nbd.FUA)
        assert client.read(place, 4096, nbd.FUA) == data
        world.write(client, place + 5, b"odd", nbd.FUA)
        for command in (nbd.CACHE, nbd.BLOCK_STATUS, nbd.WRITE_ZEROES, nbd.TRIM):
            assert client.call(command, place, 4096, nbd.FUA).error == 0
        assert client.call(nbd.FLUSH, flags=nbd.FUA).error == 0
        world.model[place : place + 4096] = client.read(place, 4096)  # after a trim it may be anything
        client.send(client.request(nbd.DISC, flags=nbd.FUA).wire())
        assert client.assert_closed() == b""
    world.check_both(place, 4096)


# --- status ---


def test_block_status_tells_data_from_holes(world: World) -> None:
    place = world.place(3 * MIB)
    with world.client() as client:
        world.write(client, place + MIB, b"\x01" * MIB)
        reply = client.call(nbd.BLOCK_STATUS, place, 3 * MIB)
        assert reply.error == 0
        assert reply.extents == [(MIB, 3), (MIB, 0), (MIB, 3)]
        reply = client.call(nbd.BLOCK_STATUS, place, 3 * MIB, nbd.REQ_ONE)
        assert reply.extents == [(MIB, 3)]
        reply = client.call(nbd.BLOCK_STATUS, place + MIB + 5, 7, nbd.REQ_ONE)
        assert reply.extents == [(7, 0)]
        reply = client.call(nbd.BLOCK_STATUS, 0, SIZE)
        assert reply.error == 0
        assert sum(length for length, _ in reply.extents) == SIZE


@pytest.mark.parametrize(("structured", "allocation"), [(True, False), (False, False)])
def test_block_status_without_a_context_is_invalid(world: World, structured: bool, allocation: bool) -> None:
    with world.client(structured=structured, allocation=allocation) as client:
        assert client.call(nbd.BLOCK_STATUS, 0, 512).error == nbd.EINVAL
        assert client.read(0, 512) == world.model[:512]


def test_block_status_of_nothing_and_beyond_is_invalid(world: World) -> None:
    with world.client() as client:
        for offset, length in ((0, 0), (SIZE, 1), (SIZE - 1, 2), (2**64 - 1, 1)):
            assert client.call(nbd.BLOCK_STATUS, offset, length).error == nbd.EINVAL
        assert client.call(nbd.BLOCK_STATUS, SIZE - 1, 1).extents[0][0] == 1


# --- zeroes, trim, cache, flush ---


@pytest.mark.parametrize("flags", [0, nbd.NO_HOLE, nbd.FUA, nbd.NO_HOLE | nbd.FUA])
@pytest.mark.parametrize(("shift", "length"), [(0, 64 << 10), (100, 20000), (700, 3), (512, 1536), (511, 514)])
def test_write_zeroes(world: World, flags: int, shift: int, length: int) -> None:
    place = world.place()
    with world.client() as client:
        world.write(client, place, b"\xff" * (64 << 10))
        assert client.call(nbd.WRITE_ZEROES, place + shift, length, flags).error == 0
        world.model[place + shift : place + shift + length] = bytes(length)
        assert client.read(place, 64 << 10) == world.model[place : place + (64 << 10)]
    world.check_both(place, 64 << 10)


def test_write_zeroes_without_a_hole_takes_the_space(world: World) -> None:
    place = world.place(2 * MIB)
    with world.client() as client:
        before = world.volume.target.stat().st_blocks
        assert client.call(nbd.WRITE_ZEROES, place, 2 * MIB, nbd.NO_HOLE | nbd.FUA).error == 0
        assert world.volume.target.stat().st_blocks - before >= 2 * MIB // 512
    world.check_both(place, 2 * MIB)


@pytest.mark.parametrize("flags", [nbd.FAST_ZERO, nbd.FAST_ZERO | nbd.NO_HOLE, nbd.FAST_ZERO | nbd.FUA])
def test_fast_zeroes_are_not_supported_and_change_nothing(world: World, bare: Served, flags: int) -> None:
    place = world.place()
    with world.client() as client:
        assert client.flags & nbd.SEND_FAST_ZERO
        world.write(client, place, b"\xff" * 8192)
        assert client.call(nbd.WRITE_ZEROES, place, 8192, flags).error == nbd.ENOTSUP
        assert client.read(place, 8192) == b"\xff" * 8192
    world.check_both(place, 8192)
    with Client(bare.socket).go("bare") as client:  # without a mirror: a target does not tell beforehand what is fast
        client.write(0, b"\xff" * 8192)
        assert client.call(nbd.WRITE_ZEROES, 0, 8192, flags).error == nbd.ENOTSUP
        assert client.read(0, 8192) == b"\xff" * 8192


@pytest.mark.parametrize(("shift", "length"), [(0, 64 << 10), (100, 20000), (700, 3)])
def test_trim_leaves_both_disks_equal(world: World, shift: int, length: int) -> None:
    place = world.place()
    with world.client() as client:
        world.write(client, place, b"\xff" * (64 << 10))
        assert client.call(nbd.TRIM, place + shift, length).error == 0
        # "a client MUST NOT make any assumptions about the contents": what was trimmed, and nothing else, may change.
        world.model[place + shift : place + shift + length] = client.read(place + shift, length)
        assert client.read(place, 64 << 10) == world.model[place : place + (64 << 10)]
    world.check_both(place, 64 << 10)


def test_commands_without_payload_are_not_limited_to_the_largest_payload(world: World) -> None:
    with world.client() as client:
        assert client.call(nbd.CACHE, 0, SIZE).error == 0
        assert client.call(nbd.BLOCK_STATUS, 0, SIZE).error == 0
        for command in (nbd.WRITE_ZEROES, nbd.TRIM):
            assert client.call(command, SCRATCH, 34 * MIB).error == 0
            world.model[SCRATCH : SCRATCH + 34 * MIB] = client.read(0, 32 * MIB) + client.read(32 * MIB, 2 * MIB)
    assert not any(world.model[SCRATCH : SCRATCH + 34 * MIB])
    world.check()


def test_cache_and_flush(world: World) -> None:
    with world.client() as client:
        assert client.call(nbd.CACHE, 0, 4 * MIB).error == 0
        assert client.call(nbd.CACHE, SIZE - 1, 1).error == 0
        assert client.call(nbd.FLUSH).error == 0
        for offset, length in ((1, 0), (0, 1), (2**64 - 1, 2**32 - 1)):
            assert client.call(nbd.FLUSH, offset, length).error == nbd.EINVAL
        assert client.call(nbd.FLUSH).error == 0


# --- refusals ---


@FORMS
def test_unknown_commands_and_flags_are_invalid(world: World, structured: bool) -> None:
    with world.client(structured=structured) as client:
        for command in (8, 9, 255, 0xFFFF):
            assert client.call(command, 0, 512).error == nbd.EINVAL
        for command in (nbd.READ, nbd.FLUSH, nbd.TRIM, nbd.CACHE, nbd.WRITE_ZEROES, nbd.BLOCK_STATUS):
            length = 0 if command == nbd.FLUSH else 512
            assert client.call(command, 0, length, 1 << 5).error == nbd.EINVAL
        assert client.call(nbd.WRITE, 0, payload=b"\xee" * 512, flags=nbd.NO_HOLE).error == nbd.EINVAL
        assert client.read(0, 512) == world.model[:512]
    world.check()


@FORMS
@pytest.mark.parametrize("command", [nbd.READ, nbd.WRITE, nbd.WRITE_ZEROES, nbd.TRIM, nbd.CACHE])
def test_beyond_the_end(world: World, structured: bool, command: int) -> None:
    """The right error, an unchanged disk, and a connection that goes on right after a refused write's payload."""
    error = nbd.ENOSPC if command in (nbd.WRITE, nbd.WRITE_ZEROES) else nbd.EINVAL
    with world.client(structured=structured) as client:
        ranges = [(SIZE, 1), (SIZE - 1, 2), (SIZE - 512, 4096), (SIZE + 1, 300_000), (2**63, 512), (2**64 - 512, 512)]
        for offset, length in ranges:
            payload = b"\xee" * length if command == nbd.WRITE else b""
            refused = client.request(command, offset, length, payload=payload)
            read = client.request(nbd.READ, SIZE - 512, 512)
            client.send(refused.wire() + read.wire())
            assert client.reply(refused).error == error, (offset, length)
            assert client.reply(read).data == world.model[-512:]
    world.check_both(SIZE - 1024, 1024)


# --- pipelines, in one piece and in many ---


def whole(data: bytes) -> Iterator[bytes]:
    yield data


def byte_by_byte(data: bytes) -> Iterator[bytes]:
    for at in range(len(data)):
        yield data[at : at + 1]


def anywhere(data: bytes) -> Iterator[bytes]:
    dice = random.Random(len(data))
    edges = [0, *sorted(dice.randrange(len(data)) for _ in range(200)), len(data)]
    for start, end in itertools.pairwise(edges):
        yield data[start:end]


CUTS = pytest.mark.parametrize("cut", [whole, byte_by_byte, anywhere])


class Pipeline:
    """Mixed requests, each at a place of its own, so that whatever order they are served in has one outcome."""

    def __init__(self, world: World, client: Client, count: int, seed: int) -> None:
        self.world = world
        self.client = client
        self.requests: list[Request] = []
        self._expected: list[tuple[int, bytes | None]] = []
        self._dice = random.Random(seed)
        self._start = self._place = world.place(count * 8192)
        # Something to read, and to clear.
        world.write(client, self._place, self._dice.randbytes(count * 8192))
        for _ in range(count):
            self._add()
            self._place += 8192

    def wire(self) -> bytes:
        return b"".join(request.wire() for request in self.requests)

    def check(self) -> None:
        replies = self.client.replies()
        assert len(replies) == len(self.requests)
        for request, (error, data) in zip(self.requests, self._expected, strict=True):
            reply = replies[request.cookie]
            assert reply.error == error, request
            if data is not None:
                assert reply.data == data, request
        self.world.check_both(self._start, self._place - self._start)

    def _add(self) -> None:
        shift, length = self._dice.choice([(0, 4096), (0, 512), (3, 5), (510, 700), (1024, 1), (0, 8192)])
        offset = self._place + shift
        was = bytes(self.world.model[offset : offset + length])
        flags = self._dice.choice([0, 0, nbd.FUA])
        kind = self._dice.choice(["read", "read", "write", "write", "write", "zero", "cache", "flush", "status", "bad"])
        if kind == "read":
            self._request(0, was, nbd.READ, offset, length, flags)
        elif kind == "write":
            data = self._dice.randbytes(length)
            self._request(0, b"", nbd.WRITE, offset, length, flags, data)
            self.world.model[offset : offset + length] = data
        elif kind == "zero":
            self._request(0, b"", nbd.WRITE_ZEROES, offset, length, flags)
            self.world.model[offset : offset + length] = bytes(length)
        elif kind == "cache":
            self._request(0, b"", nbd.CACHE, offset, length)
        elif kind == "flush":
            self._request(0, b"", nbd.FLUSH)
        elif kind == "status":
            self._request(0, None, nbd.BLOCK_STATUS, offset, length)
        else:
            self._request(nbd.ENOSPC, b"", nbd.WRITE, SIZE + offset, length, flags, b"\xee" * length)

    def _request(self, error: int, data: bytes | None, *args: Any) -> None:
        self.requests.append(self.client.request(*args))
        self._expected.append((error, data))


def send_in_background(client: Client, pieces: Iterator[bytes], *, then_shut: bool = False) -> threading.Thread:
    """Send while the replies are taken: a client that only sends is, rightly, not read any more."""

    def send() -> None:
        for piece in pieces:
            client.send(piece)
        if then_shut:
            client.socket.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@CUTS
def test_a_pipeline_of_mixed_requests(world: World, cut: Any) -> None:
    with world.client() as client:
        pipeline = Pipeline(world, client, 60 if cut is byte_by_byte else 400, seed=1)
        thread = send_in_background(client, cut(pipeline.wire()))
        pipeline.check()
        thread.join()
        client.disconnect()


def test_pipelines_of_several_connections(world: World) -> None:
    with world.client() as one, world.client() as two, world.client() as three:
        pipelines = [Pipeline(world, client, 100, seed) for seed, client in enumerate((one, two, three), 10)]
        threads = [send_in_background(p.client, anywhere(p.wire())) for p in pipelines]
        for client in (one, two, three):
            # A connection may write what another reads after its reply, whatever is still in flight elsewhere.
            assert len(client.parser.pending) == 100
        for thread in threads:
            thread.join()
        for pipeline in pipelines:
            pipeline.check()


@CUTS
def test_large_payloads_in_a_pipeline(world: World, cut: Any) -> None:
    """Payloads longer than the receive buffer go another way than small ones; here they alternate."""
    length = 300_000 if cut is not byte_by_byte else 140_000
    with world.client() as client:
        place = SCRATCH
        requests = []
        for step in range(4 if cut is not byte_by_byte else 1):
            data = random.Random(step).randbytes(length)
            requests.append(client.request(nbd.WRITE, place + 3, payload=data))
            world.model[place + 3 : place + 3 + length] = data
            requests.append(client.request(nbd.WRITE, SIZE - 1, payload=data))  # refused, and skipped
            requests.append(client.request(nbd.WRITE, place + MIB - 512, payload=data[:512]))
            world.model[place + MIB - 512 : place + MIB] = data[:512]
            place += MIB
        thread = send_in_background(client, cut(b"".join(request.wire() for request in requests)))
        replies = client.replies()
        thread.join()
        errors = [replies[request.cookie].error for request in requests]
        assert errors == [0, nbd.ENOSPC, 0] * (len(requests) // 3)
    world.check_both(SCRATCH, 4 * MIB)


# --- ends ---


@CUTS
@pytest.mark.parametrize("end", ["disc", "half-close", "half-close within a request"])
def test_an_end_with_requests_in_flight_answers_them_first(world: World, cut: Any, end: str) -> None:
    with world.client() as client:
        pipeline = Pipeline(world, client, 30 if cut is byte_by_byte else 200, seed=3)
        data = pipeline.wire()
        if end == "disc":
            data += client.request(nbd.DISC).wire()
        elif end == "half-close within a request":
            # A whole header and most of a payload: it must change nothing.
            data += nbd.pack_request(nbd.WRITE, 1, world.place(), 4096) + b"\xee" * 4000
        thread = send_in_background(client, cut(data), then_shut=end != "disc")
        pipeline.check()
        thread.join()
        assert client.assert_closed() == b""
    world.check()


def test_nothing_after_a_disc_is_carried_out(world: World) -> None:
    place = world.place()
    with world.client() as client:
        disc = client.request(nbd.DISC).wire()
        client.send(disc + nbd.pack_request(nbd.WRITE, 1, place, 512) + b"\xee" * 512)
        assert client.assert_closed() == b""
    world.check()


def test_a_disc_is_never_answered_whatever_its_fields(world: World) -> None:
    for flags, offset, length in ((0xFFFF, 0, 0), (0, 2**64 - 1, 0), (0, 0, 2**32 - 1)):
        with world.client() as client:
            client.send(nbd.pack_request(nbd.DISC, 1, offset, length, flags))
            assert client.assert_closed() == b""


def test_an_aborted_handshake(world: World) -> None:
    with Client(world.served.socket) as client:
        client.greet()
        assert client.option(nbd.OPT_ABORT) == [(nbd.REP_ACK, b"")]
        assert client.assert_closed() == b""


@CUTS
def test_a_handshake_in_one_piece_with_the_first_requests(world: World, cut: Any) -> None:
    with Client(world.served.socket) as client:
        client.parser = nbd.ReplyParser(structured=True)
        handshake = b"\0\0\0\3" + nbd.pack_option(nbd.OPT_STRUCTURED_REPLY)
        handshake += nbd.pack_option(nbd.OPT_GO, nbd.pack_info(b""))
        requests = [client.request(nbd.READ, n * 1000, 900) for n in range(20)]
        for piece in cut(handshake + b"".join(request.wire() for request in requests)):
            client.send(piece)
        client.receive(18)
        assert client.option_reply(nbd.OPT_STRUCTURED_REPLY) == (nbd.REP_ACK, b"")
        while client.option_reply(nbd.OPT_GO) != (nbd.REP_ACK, b""):
            pass
        replies = client.replies()
        for request in requests:
            assert replies[request.cookie].data == world.model[request.offset : request.offset + 900]


# --- other people's clients ---


def uris(world: World) -> dict[str, str]:
    tcp, _, _ = world.tcp.rpartition("/")
    return {
        "unix": world.served.uri,
        "unix, default export": world.served.uri.replace("///vol?", "///?"),
        "tcp": world.tcp,
        "tcp, default export": tcp,
    }


WHERE = pytest.mark.parametrize("where", ["unix", "unix, default export", "tcp", "tcp, default export"])


@WHERE
def test_nbdinfo(world: World, where: str) -> None:
    info = json.loads(run("nbdinfo", "--json", uris(world)[where]))
    assert info["protocol"] == "newstyle-fixed"
    assert info["structured"] is True
    (export,) = info["exports"]
    assert export["export-size"] == SIZE
    assert "base:allocation" in export["contexts"]
    for feature in ("flush", "fua", "trim", "zero", "multi_conn", "cache", "df"):
        assert export[f"can_{feature}"] is True, feature
    assert export["is_read_only"] is False
    assert export["description"] == "Lockstep volume vol"
    sizes = (export["block_size_minimum"], export["block_size_preferred"], export["block_size_maximum"])
    assert sizes == (1, 4096, 32 * MIB)


def test_nbdinfo_lists_the_export(world: World) -> None:
    listed = json.loads(run("nbdinfo", "--list", "--json", uris(world)["unix, default export"]))
    (export,) = listed["exports"]
    assert export["export-name"] == "vol"
    assert export["export-size"] == SIZE


@WHERE
def test_nbdinfo_maps_data_and_holes(world: World, where: str) -> None:
    place = world.place(3 * MIB)
    with world.client() as client:
        world.write(client, place + MIB, b"\x01" * MIB)
    extents = json.loads(run("nbdinfo", "--map", "--json", uris(world)[where]))
    assert sum(extent["length"] for extent in extents) == SIZE
    for start, kind in ((place, 3), (place + MIB, 0), (place + 2 * MIB, 3)):
        (found,) = (e for e in extents if e["offset"] <= start + 4096 < e["offset"] + e["length"])
        assert found["type"] == kind


@WHERE
def test_qemu_img(world: World, tmp_path: Path, where: str) -> None:
    uri = uris(world)[where]
    info = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", uri))
    assert abs(info["virtual-size"] - SIZE) < 512  # QEMU counts in sectors
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri))
    assert abs(sum(extent["length"] for extent in extents) - SIZE) < 512
    copy = tmp_path / "copy"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(copy))
    assert copy.read_bytes()[:SIZE] == world.model


def test_tcp_is_the_same_disk(world: World) -> None:
    place = world.place()
    host, port = world.tcp.removeprefix("nbd://").partition("/")[0].split(":")
    with Client((host, int(port))).go("") as over_tcp, world.client() as over_unix:
        world.write(over_tcp, place, b"by TCP")
        assert over_unix.read(place, 6) == b"by TCP"
        over_tcp.disconnect()
    world.check_both(place, 512)


def test_the_socket_belongs_to_its_owner(world: World) -> None:
    assert Path(world.served.socket).stat().st_mode & 0o077 == 0
