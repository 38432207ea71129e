"""What the fuzzers do with their bytes; the test suite does the same with bytes of its own, for a short while.

Two invariants, as sentences:

- Handshake: whatever bytes arrive, in whatever pieces, there is no exception, the output is bounded, the state ends
  in AGREED or ENDED or waits for more, and it never takes more than it was given. Where TLS is required nothing is
  agreed before, and nobody acts on behalf of another who may not.
- Transmission: whatever requests arrive, in whatever pieces, however slow the disk is and the client reads, every
  reply is well-formed and the right one, the disk holds what the answered requests say and nothing else, no request
  is left without an answer while the connection lives, and no memory of the pool is left behind when it ends.
"""

import asyncio
import errno
import logging
import os
import socket
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

from tests import nbd_client as nbd
from tests.nbd_client import Reply, ReplyParser, Request, pack_info, pack_option, pack_queries, pack_request

from lockstep.nbd import connection, server
from lockstep.nbd.connection import Connection
from lockstep.nbd.negotiation import MAX_OPTION_BYTES, Agreement, ExportInfo, Negotiation, Security, State
from lockstep.nbd.payload import Block, PayloadPool
from lockstep.nbd.server import NbdServer

# The export and the transport have the methods that others prescribe, with arguments that a model does not need.

T = TypeVar("T")

# --- the handshake ---

EXPORTS: Final = {
    "vol": ExportInfo("vol", 0x1_2345_6789, nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA, "a line for humans"),
    "größe": ExportInfo("größe", 1, nbd.HAS_FLAGS | nbd.READ_ONLY),
}


def converse(
    pieces: Sequence[bytes], security: Security = Security.NONE, *, for_others: bool = False
) -> tuple[bytes, int, State, Agreement | None]:
    """Feed pieces as a transport would; return (what was said, bytes taken, how it ended, what was agreed).

    Once TLS begins, what follows is taken to come from inside.
    """
    negotiation = Negotiation(EXPORTS, "vol", security, for_others=for_others)
    said, taken_in_all, unread = b"", 0, b""
    waiting = deque(pieces)
    while waiting:
        unread += waiting.popleft()
        taken, answer = negotiation.receive(unread)
        assert 0 <= taken <= len(unread)
        # Every option costs 16 bytes at least; its answer cannot be longer than two names, a line and five headers.
        assert len(answer) <= 300 * (1 + taken // 16)
        unread = unread[taken:]
        said, taken_in_all = said + answer, taken_in_all + taken
        if negotiation.state is State.STARTTLS:
            assert security is Security.AWAITED
            negotiation = negotiation.inside_tls()
            waiting.appendleft(b"")  # what was cut off with the rest is not awaited
            security = Security.ESTABLISHED
        if negotiation.state in (State.AGREED, State.ENDED):
            assert negotiation.receive(b"".join(pieces)) == (0, b""), "a final state takes and says nothing"
    if negotiation.state is State.OPTIONS:
        assert len(unread) < 16 + MAX_OPTION_BYTES, "it waits for a message that is longer than any"
    assert (negotiation.agreement is not None) == (negotiation.state is State.AGREED)
    assert negotiation.agreement is None or security is not Security.AWAITED, "an agreement before TLS"
    assert for_others or negotiation.agreement is None or negotiation.agreement.on_behalf_of is None
    # What breaks the framing is thrown away with all that follows it, and how much that is depends on the cuts.
    counted = taken_in_all if negotiation.ended_because is None else 0
    return said, counted, negotiation.state, negotiation.agreement


def negotiate(data: bytes) -> None:
    """Cut a talk in two ways, by a number in its first byte; the outcome must be the same."""
    talk = data[1:]
    step = 1 + data[0] if data else 1
    pieces = [talk[at : at + step] for at in range(0, len(talk), step)]
    for security in (Security.NONE, Security.AWAITED):
        assert converse(pieces, security) == converse([talk], security)
    assert converse(pieces, for_others=True) == converse([talk], for_others=True)


# --- the transmission phase ---


class Choices:
    """Decisions read from the fuzzer's bytes; when they are used up, every decision is zero."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def exhausted(self) -> bool:
        return self._at >= len(self._data)

    def number(self, limit: int) -> int:
        """Return one of 0..limit-1, from one, two or four bytes."""
        width = 1 if limit <= 1 << 8 else 2 if limit <= 1 << 16 else 4
        piece = self._data[self._at : self._at + width]
        self._at += width
        return int.from_bytes(piece, "little") % limit

    def one_of(self, options: Sequence[T]) -> T:
        return options[self.number(len(options))]


class MemoryExport:
    """An export whose disk is a bytearray: sometimes slow, sometimes failing, at once or later, as the choices say."""

    FAILURES = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.ENODEV, errno.ETIMEDOUT, errno.ENOMEM)

    def __init__(self, size: int, choices: Choices) -> None:
        flags = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES
        self.info = ExportInfo("vol", size, flags | nbd.SEND_FAST_ZERO | nbd.SEND_CACHE)
        self.content = bytearray(size)
        self.failures = 0
        self._choices = choices

    def read_run(self, into: bytearray, run: "array[int]", count: int) -> int:
        done = self._choices.number(count + 1) if self._slow() else count
        for at in range(done):
            offset, length, position = run[4 * at : 4 * at + 3]
            self._check(offset, length)
            into[position : position + length] = self.content[offset : offset + length]
        return done

    def write_run(self, user: str, data: memoryview, run: "array[int]", count: int) -> int:
        done = self._choices.number(count + 1) if self._slow() else count
        self._take(data, run, done)
        return done

    def half_done(self) -> bool:
        return False

    def read(self, into: memoryview, run: "array[int]", count: int) -> Awaitable[None]:
        self._may_fail()
        return self._read(into, run, count)

    async def _read(self, into: memoryview, run: "array[int]", count: int) -> None:
        for at in range(0, 4 * count, 4):
            offset, length, position = run[at : at + 3]
            await self._work(offset, length)
            into[position : position + length] = self.content[offset : offset + length]

    def write(self, user: str, data: memoryview, run: "array[int]", count: int, *, durable: bool) -> Awaitable[None]:
        self._may_fail()
        return self._write(data, run, count)

    async def _write(self, data: memoryview, run: "array[int]", count: int) -> None:
        await self._work(0, 0)
        self._take(data, run, count)

    def _take(self, data: memoryview, run: "array[int]", count: int) -> None:
        for at in range(count):
            offset, length, position = run[4 * at : 4 * at + 3]
            self._check(offset, length)
            self.content[offset : offset + length] = data[position : position + length]

    async def zero(self, user: str, offset: int, length: int, *, durable: bool, allocate: bool) -> None:
        await self._work(offset, length)
        self.content[offset : offset + length] = bytes(length)

    async def trim(self, user: str, offset: int, length: int, *, durable: bool) -> None:
        await self.zero(user, offset, length, durable=durable, allocate=False)

    def flush(self) -> Awaitable[None]:
        self._may_fail()
        return self._work(0, 0)

    async def cache(self, offset: int, length: int) -> None:
        await self._work(offset, length)

    async def allocation(self, offset: int, length: int, limit: int) -> Sequence[tuple[int, int]]:
        await self._work(offset, length)
        if limit == 1 or length == 1:
            return [(length, 0)]
        return [(length // 2, 0), (length - length // 2, 3)]

    def _check(self, offset: int, length: int) -> None:
        """What the transport promises to every export."""
        assert 0 <= offset <= offset + length <= len(self.content)

    def _slow(self) -> bool:
        return self._choices.number(3) == 1

    def _may_fail(self) -> None:
        if self._choices.number(16) == 1:
            self.failures += 1
            number = self._choices.one_of(self.FAILURES)
            raise MemoryError if number == errno.ENOMEM else OSError(number, os.strerror(number))

    async def _work(self, offset: int, length: int) -> None:
        self._check(offset, length)
        for _ in range(self._choices.number(4)):
            await asyncio.sleep(0)
        self._may_fail()


class FakeTransport(asyncio.Transport):
    """A socket whose other end takes what is written only when it likes.

    What it has not taken is kept as it was handed over, without a copy: if the server used that memory again too
    early, the referee would see other bytes.
    """

    def __init__(self, protocol: Connection, sock: socket.socket, choices: Choices) -> None:
        super().__init__({"socket": sock})
        self.reading = True
        self.closed = False
        self.lost = False
        self._losing = False  # `connection_lost` comes with the next turn of the loop
        self.taken = bytearray()
        self._protocol = protocol
        self._choices = choices
        self._kept: deque[Any] = deque()

    def drain(self) -> None:
        """Take everything."""
        if self._kept and not self.lost:
            self.taken += b"".join(self._kept)
            self._kept.clear()
            if not self.closed:
                self._protocol.resume_writing()
        self._lose_when_empty()

    def lose(self) -> None:
        """The connection breaks."""
        self.closed = True
        self._kept.clear()
        self._lose_when_empty()

    def write(self, data: Any) -> None:
        assert not self.lost, "written after connection_lost"
        if self.closed:
            return
        if not self._kept and self._choices.number(4) != 1:
            self.taken += data
            return
        paused_before = bool(self._kept)
        self._kept.append(data)
        if not paused_before:
            self._protocol.pause_writing()

    def writelines(self, list_of_data: Any) -> None:
        for data in list_of_data:
            self.write(data)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = not self.closed  # real transports ignore it while they close

    def close(self) -> None:
        self.closed = True
        self._lose_when_empty()

    def abort(self) -> None:
        self.lose()

    def is_closing(self) -> bool:
        return self.closed

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def _lose_when_empty(self) -> None:
        if self.closed and not self._kept and not self._losing:
            self._losing = True
            asyncio.get_running_loop().call_soon(self._lose)

    def _lose(self) -> None:
        self.lost = True
        self._protocol.connection_lost(None)


class _Unexpected(logging.Handler):
    """Anything that the server calls unexpected."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record.getMessage())


SIZE: Final = 300_007
# Room for one large payload or a few small ones, so that requests wait for memory all the time.
POOL_BYTES: Final = 512 << 10
LENGTHS: Final = (1, 512, 4096, 100, 0, 513, 20_000, 65_536, 3, 8192, 4096, 700, 512, 131_072, 140_000, 290_000)
PATIENCE: Final = 5000


class _ScribblingPool(PayloadPool):
    """A small pool that spoils what is given back: whoever still needs it shows other bytes than the right ones."""

    def __init__(self) -> None:
        super().__init__()
        self._limit_bytes = POOL_BYTES

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def give(self, block: Block) -> None:
        block.memory[:] = b"\xdd" * len(block.memory)
        super().give(block)


class Talk:
    """One client that speaks to one connection, and what it should find on the disk."""

    def __init__(self, choices: Choices, nbd_server: NbdServer, export: MemoryExport, sock: socket.socket) -> None:
        self.choices = choices
        self.export = export
        self.model = bytearray(SIZE)
        self.structured = bool(choices.number(2))
        self.allocation = self.structured and bool(choices.number(2))
        self.parser = ReplyParser(structured=self.structured, contexts=[1] if self.allocation else [])
        self.connection = Connection(nbd_server)
        self.transport = FakeTransport(self.connection, sock, choices)
        self.stream = bytearray()
        self.errors = 0
        self._cookie = 0
        self._judged = 0  # bytes of what the transport has taken

    async def run(self) -> None:
        self.connection.connection_made(self.transport)
        await self._handshake()
        while not self.choices.exhausted:
            if not await self._step():
                break
        if not self.transport.closed:
            await self._settle()
            self.transport.lose()
        await self._until(lambda: self.transport.lost, "the connection to close")

    def check(self) -> None:
        """Judge the disk, when everything has come to rest."""
        for request in self.parser.pending.values():
            # No reply was received: it may have been carried out, or not.
            self._settle_by_looking(request)
        assert self.export.content == self.model
        assert self.errors <= self.export.failures

    # --- what the client does ---

    async def _handshake(self) -> None:
        words = b"\0\0\0\3"
        if self.structured:
            words += pack_option(nbd.OPT_STRUCTURED_REPLY)
        if self.allocation:
            words += pack_option(nbd.OPT_SET_META_CONTEXT, pack_queries(b"", b"base:allocation"))
        self.stream += words + pack_option(nbd.OPT_GO, pack_info(b"vol"))
        end = nbd.OPTION_REPLY_MAGIC.to_bytes(8, "big") + b"\0\0\0\7\0\0\0\1\0\0\0\0"
        await self._until(lambda: self.transport.taken.endswith(end), "the end of the handshake")
        self._judged = len(self.transport.taken)

    async def _step(self) -> bool:
        """Do one thing; False when it was the last."""
        kind = self.choices.number(60)
        if kind < 48:
            await self._request(self._valid(kind % 16))
        elif kind < 50:
            await self._request(self._arbitrary())
        elif kind == 50:
            await self._settle()
        elif kind < 53:
            self.transport.drain()
        elif kind < 55:
            await asyncio.sleep(0)
        elif kind < 57:
            self._deliver()
        else:
            await self._end(kind)
            return False
        return True

    def _valid(self, kind: int) -> Request:
        command = (nbd.READ, nbd.WRITE, nbd.WRITE, nbd.READ, nbd.WRITE_ZEROES, nbd.TRIM, nbd.FLUSH, nbd.CACHE)[kind % 8]
        if kind == 15:
            command = nbd.BLOCK_STATUS
        if command == nbd.FLUSH:
            return self._made(command, 0, 0, nbd.FUA * self.choices.number(2))
        length = self.choices.one_of(LENGTHS)
        offset = self.choices.number(SIZE - length + 1)
        known = {nbd.READ: nbd.DF, nbd.WRITE_ZEROES: nbd.NO_HOLE | nbd.FAST_ZERO, nbd.BLOCK_STATUS: nbd.REQ_ONE}
        flags = self.choices.number(32) & (nbd.FUA | known.get(command, 0))
        return self._made(command, offset, length, flags)

    def _arbitrary(self) -> Request:
        """Any fields at all, in a frame that is whole."""
        command = self.choices.number(10)
        offset = self.choices.one_of((0, 5, SIZE - 1, SIZE, SIZE + 1, 2**63, 2**64 - 1))
        length = self.choices.one_of((0, 1, 512, 140_000, 400_000, 2**25 + 1, 2**32 - 1))
        flags = self.choices.number(1 << 16)
        if command == nbd.WRITE:
            length = min(length, 400_000)  # its payload must be sent
        if command == nbd.DISC:
            command = 11
        return self._made(command, offset, length, flags)

    async def _end(self, kind: int) -> None:
        if kind == 57:
            how = self.choices.number(3)
            if how == 0:
                self.stream += pack_request(nbd.DISC, 0)
            elif how == 1:
                # A write that breaks off, within its header or its payload.
                self.stream += (pack_request(nbd.WRITE, 0, 0, 300_000) + b"\xee" * 1000)[: self.choices.number(1024)]
            await self._until(lambda: not self.stream, "everything to be read")
            if how:
                await self._until(lambda: self.transport.reading, "the server to read on")
                self.connection.eof_received()
            await self._until(lambda: self.transport.lost, "the server to close")
            self._judge()
            assert not self.parser.pending, "an orderly end, and a request without an answer"
        elif kind == 58:
            self.stream += pack_request(nbd.READ, 1, magic=0x25609514) + b"\xee" * 50
            await self._until(lambda: self.transport.lost, "the server to close after a bad magic")
        else:
            self._deliver()
            self.transport.lose()

    # --- how it does it ---

    def _made(self, command: int, offset: int, length: int, flags: int) -> Request:
        self._cookie += 1
        payload = bytes([1 + self._cookie % 255]) * length if command == nbd.WRITE else b""
        return Request(command, self._cookie << 40, offset, length, flags, payload)

    async def _request(self, request: Request) -> None:
        if any(_conflict(request, other) for other in self.parser.pending.values()):
            await self._settle()  # requests that overlap in flight have more than one right outcome
        if self.transport.closed:
            return
        self.parser.expect(request)
        self.stream += request.wire()
        self._deliver()

    def _deliver(self) -> None:
        """Let some of what was sent arrive."""
        for _ in range(1 + self.choices.number(8)):
            if not self.stream or not self.transport.reading or self.transport.closed:
                return
            buffer = self.connection.get_buffer(-1)
            assert len(buffer) > 0, "the server reads, and has no room to read into"
            some = self.choices.one_of((1 << 20, 1, 27, 28, 29, 5000, 65_536, 200_000))
            count = min(len(buffer), len(self.stream), some)
            buffer[:count] = self.stream[:count]
            del self.stream[:count]
            buffer.release()
            self.connection.buffer_updated(count)
        self._judge()

    async def _settle(self) -> None:
        await self._until(lambda: not self.parser.pending and not self.stream, "all requests to be answered")
        self.parser.assert_between_replies()

    async def _until(self, holds: Callable[[], bool], what: str) -> None:
        for _ in range(PATIENCE):
            self._judge()
            if holds():
                return
            self._deliver()
            self.transport.drain()
            await asyncio.sleep(0)
        raise AssertionError(f"waited in vain for {what}")

    def _judge(self) -> None:
        """Hand what the client has taken to the referee, and follow the disk's content."""
        if not self._judged:
            return  # still the handshake
        fresh = bytes(self.transport.taken[self._judged :])
        self._judged += len(fresh)
        for reply in self.parser.feed(fresh):
            self._judge_reply(reply)

    def _judge_reply(self, reply: Reply) -> None:
        request = reply.request
        permitted = nbd.permitted_errors(
            request.command,
            request.flags,
            request.offset,
            request.length,
            size=SIZE,
            structured=self.structured,
            allocation=self.allocation,
        )
        if permitted != {0}:
            assert reply.error in permitted, (request, reply.error)
        elif reply.error:
            self.errors += 1
        elif request.command == nbd.READ:
            assert reply.data == self.model[request.offset : request.offset + request.length], request
        elif request.command in _CHANGES:
            self.model[request.offset : request.offset + request.length] = _content_after(request)

    def _settle_by_looking(self, request: Request) -> None:
        if request.command in _CHANGES and request.offset + request.length <= SIZE:
            found = self.export.content[request.offset : request.offset + request.length]
            if found == _content_after(request):
                self.model[request.offset : request.offset + request.length] = found


_CHANGES: Final = (nbd.WRITE, nbd.WRITE_ZEROES, nbd.TRIM)


def _content_after(request: Request) -> bytes:
    return request.payload if request.command == nbd.WRITE else bytes(request.length)


def _conflict(one: Request, other: Request) -> bool:
    changes = one.command in _CHANGES or other.command in _CHANGES
    return changes and one.offset < other.offset + other.length and other.offset < one.offset + one.length


def connect(data: bytes) -> None:
    """Hold one conversation, every turn of which the bytes decide."""
    asyncio.run(_connect(Choices(data)))


async def _connect(choices: Choices) -> None:
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failures.append(context))
    unexpected = _Unexpected()
    for module in (server, connection):
        module.log.addHandler(unexpected)
    ours, theirs = socket.socketpair()
    try:
        export = MemoryExport(SIZE, choices)
        pool = _ScribblingPool()
        nbd_server = NbdServer(export, pool)
        talk = Talk(choices, nbd_server, export, ours)
        await talk.run()
        await nbd_server.drain()
        talk.check()
        assert not failures, failures
        assert not unexpected.records, unexpected.records
        assert pool.used_bytes == 0, "memory of the pool was left behind"
        assert not pool.contended, "somebody who is gone still waits for memory"
    finally:
        for module in (server, connection):
            module.log.removeHandler(unexpected)
        ours.close()
        theirs.close()
