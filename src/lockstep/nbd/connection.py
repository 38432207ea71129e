"""One client's connection: a socket on one side, an `Export` on the other.

What makes it fast, on one event loop:

- The kernel receives straight into the connection's buffer (BufferedProtocol), and every complete request in
  it is served before control goes back to the loop; their replies leave in one system call.
- Plain reads and writes are taken by runs (frames.py): as many as have arrived. What can be done at once of a run
  costs a few calls for all of it: no task, no future, no log line.
- Before the loop goes to sleep, it looks for a short while whether the client asks again (busy_poll.py).
- Only what can block becomes a task, a whole run one task. Its payload moves to a block of the shared pool, because the
  receive buffer is about to be reused.

What keeps it safe from its clients:

- Nothing of a write reaches the export before its payload has arrived whole, so that a connection cut in
  the middle changes no disk.
- A connection stops being read while its replies are not taken, while it has MAX_PENDING slow requests under
  way, or while it waits for pool memory. So its memory is bounded: one receive buffer, one batch of replies,
  and what it holds of the pool.
- A client that stalls is left alone (it may be a VM that somebody paused), unless it stalls within the handshake,
  or holds pool memory for which others wait.

Source of what must be answered how: doc/proto.md of the NBD reference implementation.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import time
from array import array
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, Final, Protocol, cast

from lockstep.buffers import page_aligned
from lockstep.nbd import wire
from lockstep.nbd.frames import (
    WORDS,
    cookie_of,
    end_of,
    find_reads,
    find_writes,
    new_run,
    pack_data_headers,
    pack_replies,
    rebase,
    rest_of,
    run_of,
)
from lockstep.nbd.identity import peer_of
from lockstep.nbd.negotiation import Agreement, ExportInfo, Negotiation, Security, State
from lockstep.nbd.payload import Block, PayloadPool, block_bytes
from lockstep.nbd.tls import Securable, TlsTransport
from lockstep.nbd.transmission import (
    data_header,
    empty_read,
    error_reply,
    refusal,
    simple_reply,
    status_reply,
    wire_error,
)

log = logging.getLogger(__name__)

RECEIVE_BYTES: Final = 256 << 10  # half of it: the longest payload that needs no pool block of its own
BULK_RECEIVE_BYTES: Final = 1 << 20  # of who fills that, and so has to be woken up, and go on, for each of its parts
# Replies leave after this much data has moved, in either direction: what has arrived together is answered together,
# since a client that is woken up costs as much as a write of 4 KiB.
REPLY_BATCH_BYTES: Final = 256 << 10
INLINE_READ_BYTES: Final = 128 << 10  # a longer copy would delay other clients
SLOW_READ_BYTES: Final = 64 << 10  # more of them together would all wait for the slowest
SOCKET_BUFFER_BYTES: Final = 1 << 20
MAX_PENDING: Final = 64
MAX_STATUS_EXTENTS: Final = 512
CONTENDED_STALL_S: Final = 5.0
SLOWEST_BYTES_S: Final = 1 << 20  # who sends a payload more slowly counts as stalled

_SO_SNDBUFFORCE: Final = 32  # socket(7); the socket module does not name it


class Export(Protocol):
    """What the transport needs of a disk. Offsets and lengths are bytes and lie within `info.size_bytes`.

    Failures are OSErrors, whose errno the client gets. `user` is who the connection belongs to.
    """

    info: ExportInfo

    def read_run(self, into: bytearray, run: "array[int]", count: int) -> int:
        """Carry out as many reads of a run (frames.py) as can be at once; return how many, from the front."""

    def write_run(self, user: str, data: memoryview, run: "array[int]", count: int) -> int:
        """Carry out as many writes of a run (frames.py) as can be at once; return how many, from the front."""

    def half_done(self) -> bool:
        """Whether what `write_run` did not carry out may be begun, and so has to be given to `write`."""

    def read(self, into: memoryview, run: "array[int]", count: int) -> Awaitable[None]:
        """Carry out the first `count` reads of a run, before what is returned ends."""

    def write(self, user: str, data: memoryview, run: "array[int]", count: int, *, durable: bool) -> Awaitable[None]:
        """Carry out the first `count` writes of a run, before what is returned ends; `durable` is FUA."""

    async def zero(self, user: str, offset: int, length: int, *, durable: bool, allocate: bool, fast: bool) -> None:
        """Write zeroes; `allocate` is NO_HOLE; `fast` fails with ENOTSUP unless it beats a plain write."""

    async def trim(self, user: str, offset: int, length: int, *, durable: bool) -> None:
        """Give up the content."""

    def flush(self) -> Awaitable[None]:
        """Make every write that was answered so far durable, before what is returned ends."""

    async def cache(self, offset: int, length: int) -> None:
        """Prepare for reads."""

    async def allocation(self, offset: int, length: int, limit: int) -> Sequence[tuple[int, int]]:
        """Return at most `limit` pairs (length in bytes, NBD STATE_ flags) from `offset` on, not past `length`."""


class Host(Protocol):
    """What a connection needs of the server that it belongs to."""

    export: Export
    pools: tuple[PayloadPool, ...]
    arrived: PayloadPool  # for writes that have arrived whole, which wait for the disks alone
    receiving: PayloadPool  # for receive buffers of who sends much at once
    loop: asyncio.AbstractEventLoop
    now_s: float

    def pool_for(self, length: int) -> PayloadPool:
        """Return the pool for what waits for a client: to send `length` bytes, or to take them."""

    def admit(self, connection: "Connection") -> bool:
        """Count a new connection in, unless there are too many."""

    def dismiss(self, connection: "Connection") -> None:
        """Count a closed connection out."""

    def entered(self, connection: "Connection") -> None:
        """Note that a connection has finished its handshake."""

    def idle(self) -> None:
        """Everything that a connection asked is answered, and it may ask more."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task of the server's."""


class _Gathered:
    """Writes of one stretch of the receive buffer, and the block that their payload is to move to."""

    __slots__ = ("block", "end", "run", "start")

    def __init__(self, block: Block, start: int) -> None:
        self.block = block
        self.start = self.end = start
        self.run = array("Q")

    def add(self, run: "array[int]", count: int, end: int) -> None:
        rebase(run, count, -self.start)
        self.run.extend(run[: WORDS * count])
        self.end = end


class Connection(Securable):
    """One client, from its first byte to its last. `user` is who it belongs to, `origin` where it comes from.

    Received bytes lie in `_buffer[_start:_end]`. While a large payload is received, they go to `_block` instead.
    """

    def __init__(self, server: Host, tls: ssl.SSLContext | None = None) -> None:
        """Serve the export of `server`; with `tls`, to nobody before TLS is established on those terms."""
        self.user = self.origin = ""
        self.fd = -1  # of its socket
        self.since_s = time.monotonic()
        self._server = server
        self._export = server.export
        self._held_bytes = dict.fromkeys(server.pools, 0)
        self._transport: asyncio.Transport
        info = server.export.info
        self._writable_bytes = 0 if info.flags & wire.READ_ONLY else info.size_bytes
        self._tls = tls
        self._negotiation: Negotiation | None = None
        self._agreement = Agreement("", structured=False, allocation=False)
        self._buffer = page_aligned(RECEIVE_BYTES)
        self._bulk: Block | None = None  # whose memory the buffer is
        self._start = self._end = 0
        self._skip = 0  # bytes of a refused payload that are still to be thrown away
        self._block: Block | None = None
        self._block_request = (0, 0, 0, 0)  # flags, cookie, offset, length
        self._block_filled = 0
        self._block_since_s = 0.0
        self._run = new_run()
        self._gathered: _Gathered | None = None
        self._out: list[bytes | bytearray] = []
        self._batch_bytes = 0  # moved since replies were last sent
        self._undrained: list[Block] = []  # pool blocks whose data the socket has not taken yet
        self._undrained_since_s = 0.0
        self._pending = 0
        self._reading = True
        self._writable = True
        self._waiting = False  # for pool memory that others hold
        self._sated = False  # holds its share of pool memory
        self._ending = False  # no further request is read
        self._lost = False

    # --- what the event loop calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self._transport = cast(asyncio.Transport, transport)
        if not self._server.admit(self):
            self._transport.abort()
            return
        # Zero marks: whatever the socket does not take at once pauses us, and draining resumes us.
        self._transport.set_write_buffer_limits(high=0, low=0)
        sock = transport.get_extra_info("socket")
        _tune(sock)
        self.fd = sock.fileno()
        peer = peer_of(sock, tls=self._tls is not None)
        self.user, self.origin = peer.user, peer.origin
        security = Security.AWAITED if self._tls else Security.NONE
        info = self._export.info
        self._negotiation = Negotiation({info.name: info}, info.name, security, for_others=peer.is_root)
        self._transport.write(Negotiation.greeting())

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 (the kernel's hint; our buffers are what they are)
        """Say where the next bytes go."""
        if self._block is not None:
            return self._block.memory[self._block_filled : self._block_request[3]]
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._buffer) - self._end < len(self._buffer) // 4:
            length = self._end - self._start
            self._buffer[:length] = self._buffer[self._start : self._end]
            self._start, self._end = 0, length
        return self._buffer[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take what has arrived."""
        if self._block is not None:
            self._block_filled += nbytes
            if self._block_filled == self._block_request[3]:
                self._finish_block()
                self._advance()
            return
        self._end += nbytes
        if self._skip:
            self._skip_payload()
        if self._negotiation is not None:
            self._negotiate(self._negotiation)
            return
        if self._end == len(self._buffer) and self._bulk is None:
            self._enlarge_buffer()
        self._advance()

    def _enlarge_buffer(self) -> None:
        """Have more room for what this client sends at once, if there is memory for it."""
        self._bulk = self._server.receiving.take(BULK_RECEIVE_BYTES)
        if self._bulk is not None:
            self._bulk.memory[: self._end] = self._buffer
            self._buffer = self._bulk.memory

    def eof_received(self) -> bool:
        """The client sends no more; answer what is under way, then close."""
        self._finish()
        return True

    def pause_writing(self) -> None:
        """The client does not take its replies."""
        self._writable = False

    def resume_writing(self) -> None:
        """It took them all."""
        self._writable = True
        self._release_undrained()
        if self._negotiation is None:
            self._advance()
        elif not self._ending:
            self._negotiate(self._negotiation)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client; what is under way is carried out all the same."""
        if exc is not None:
            log.info("connection of %s (%s) lost: %s", self.user, self.origin, exc)
        self._lost = self._ending = True
        for pool in self._server.pools:
            pool.forget(self._retry)
        if self._block is not None:
            self._give_block(self._block)
            self._block = None
        if self._bulk is not None:
            self._server.receiving.give(self._bulk)
        self._release_undrained()
        self._server.dismiss(self)

    # --- what the server asks ---

    def drain(self) -> None:
        """Read no further request; answer what is under way, then close."""
        self._finish()

    def abort(self, because: str) -> None:
        """Close at once."""
        self._blame(because)
        self._ending = True
        self._transport.abort()

    def overdue(self, now_s: float) -> bool:
        """Whether it holds memory for which others wait, longer than it takes to send and read, however slowly."""
        if self._block is not None:
            allowed_s = CONTENDED_STALL_S + self._block_filled / SLOWEST_BYTES_S
            return self._block.pool.contended and now_s - self._block_since_s > allowed_s
        wanted = any(block.pool.contended for block in self._undrained)
        return wanted and now_s - self._undrained_since_s > CONTENDED_STALL_S

    @property
    def negotiating(self) -> bool:
        """Whether the handshake is unfinished."""
        return self._negotiation is not None

    # --- handshake ---

    def secured(self, user: str) -> None:
        """TLS is established, and `user` at the other end."""
        self.user = user

    def _negotiate(self, negotiation: Negotiation) -> None:
        used, reply = negotiation.receive(self._buffer[self._start : self._end])
        self._start += used
        if reply:
            self._transport.write(reply)
        if negotiation.state is State.STARTTLS:
            self._start_tls(negotiation)
        elif negotiation.state is State.ENDED:
            if negotiation.ended_because:
                self._blame(negotiation.ended_because)
            self._ending = True
            self._transport.close()
        elif negotiation.agreement is not None:
            self._agreement = negotiation.agreement
            self.user = negotiation.agreement.on_behalf_of or self.user
            self._negotiation = None
            self._server.entered(self)
            self._advance()
        else:
            self._read_while(self._writable)  # who does not take the answers gets to ask no more

    def _start_tls(self, negotiation: Negotiation) -> None:
        """Put TLS below this connection; from here on, every byte comes from inside.

        What was sent in plain text must not be taken as if it did.
        """
        assert self._tls is not None
        if self._start != self._end:
            self.abort("it sent more in plain text after STARTTLS")
            return
        self._negotiation = negotiation.inside_tls()
        self._transport = TlsTransport(self._transport, self, self._tls)

    def _blame(self, because: str) -> None:
        log.warning("closing the connection of %s (%s): %s", self.user, self.origin, because)

    # --- requests ---

    def _advance(self) -> None:
        """Serve every complete request that has arrived, as long as the client takes the replies."""
        try:
            while self._may_serve() and (self._serve_writes() or self._serve_reads() or self._serve_next()):
                if self._batch_bytes >= REPLY_BATCH_BYTES:
                    self._send_replies()
                if self._start == self._end:
                    break
        finally:
            if self._gathered is not None:
                self._begin_gathered(self._gathered)
            self._send_replies()
        if self._ending:
            self._finish()
            return
        self._read_while(self._may_serve())
        if self._reading and not self._pending:
            self._server.idle()

    def _read_while(self, wanted: bool) -> None:
        if wanted != self._reading:
            self._reading = wanted
            (self._transport.resume_reading if wanted else self._transport.pause_reading)()

    def _may_serve(self) -> bool:
        return (
            self._writable
            and not self._waiting
            and not self._sated
            and not self._ending
            and self._pending < MAX_PENDING
        )

    def _serve_writes(self) -> bool:
        """Serve the run of plain writes at the front; False when there is none, or it must wait."""
        run, start = self._run, self._start
        enough = REPLY_BATCH_BYTES - self._batch_bytes
        count = find_writes(self._buffer, start, self._end, enough, self._writable_bytes, run)
        if not count:
            return False
        done = self._export.write_run(self.user, self._buffer, run, count)
        if done:
            self._out.append(pack_replies(run, done))
            self._start = end_of(run, done)
            self._batch_bytes += self._start - start
        return done == count or self._gather(rest_of(run, done, count), count - done) or done > 0

    def _gather(self, run: "array[int]", count: int) -> bool:
        """Have writes that may block carried out, with others that have arrived, though reads come between them.

        False when there is no memory for it now.
        """
        end = end_of(run, count)
        if self._gathered is not None and end - self._gathered.start > len(self._gathered.block.memory):
            self._begin_gathered(self._gathered)
        if self._gathered is None:
            wanted = max(end - self._start, min(self._end - self._start, REPLY_BATCH_BYTES))
            block = self._take_block(self._server.arrived, wanted)
            if block is None and self._export.half_done():  # once: nothing more is served before there is room
                block = self._take_block(self._server.arrived, end - self._start, beyond=True)
            if block is None:
                return False
            self._gathered = _Gathered(block, self._start)
        self._gathered.add(run, count, end)
        self._start = end
        self._pending += count
        if end - self._gathered.start >= REPLY_BATCH_BYTES:
            self._begin_gathered(self._gathered)
        return True

    def _begin_gathered(self, gathered: _Gathered) -> None:
        """Begin with the writes that were gathered: their payload leaves the buffer, which is about to be reused."""
        self._gathered = None
        start, end, block = gathered.start, gathered.end, gathered.block
        block.memory[: end - start] = self._buffer[start:end]
        run, count = gathered.run, len(gathered.run) // WORDS
        begun = self._export.write(self.user, block.memory, run, count, durable=False)
        self._server.spawn(self._write_run(begun, run, count, block))

    def _serve_reads(self) -> bool:
        """Serve the run of plain reads at the front; False when there is none, or it must wait."""
        run, structured = self._run, self._agreement.structured
        header_bytes = self._header_bytes
        enough, size_bytes = REPLY_BATCH_BYTES - self._batch_bytes, self._export.info.size_bytes
        where = self._buffer, self._start, self._end
        count = find_reads(*where, enough, INLINE_READ_BYTES, size_bytes, header_bytes, run)
        if not count:
            return False
        replies = bytearray(end_of(run, count))
        done = self._export.read_run(replies, run, count)
        if done:
            del replies[end_of(run, done) :]
            pack_data_headers(replies, run, done, structured)
            self._reply(replies)
            self._start += done * wire.REQUEST_BYTES
            self._batch_bytes += len(replies)
        if done == count:
            return True
        rest = rest_of(run, done, count)
        rebase(rest, count - done, header_bytes - rest[2])
        return self._begin_reads(rest, count - done) or done > 0

    @property
    def _header_bytes(self) -> int:
        """What precedes the data of a read."""
        return (wire.OFFSET_DATA if self._agreement.structured else wire.SIMPLE_REPLY).size

    def _begin_reads(self, run: "array[int]", count: int) -> bool:
        """Have reads that may block carried out, some of a run; False when there is no memory for it now."""
        while count > 1 and end_of(run, count) > SLOW_READ_BYTES:
            count = (count + 1) // 2
        block = self._take_block_for(end_of(run, count))
        if block is None:
            return False
        self._start += count * wire.REQUEST_BYTES
        self._pending += count
        self._server.spawn(self._read_run(self._export.read(block.memory, run, count), run, count, block))
        return True

    def _serve_next(self) -> bool:
        """Serve one request; False when it has not arrived whole, or must wait."""
        start = self._start
        if self._skip or self._end - start < wire.REQUEST_BYTES:
            return False
        magic, flags, command, cookie, offset, length = wire.REQUEST.unpack_from(self._buffer, start)
        if magic != wire.REQUEST_MAGIC:
            self.abort("bad request magic")
            return False
        error = refusal(command, flags, offset, length, self._export.info, self._agreement)
        if command == wire.CMD_WRITE:
            return self._serve_write(error, flags, cookie, offset, length)
        self._start = start + wire.REQUEST_BYTES
        if error:
            self._refuse(command, cookie, error)
        elif command == wire.CMD_READ:
            self._serve_read(cookie, offset, length)
        elif command == wire.CMD_DISC:
            self._ending = True
        else:
            self._begin(command, cookie, self._other(command, flags, cookie, offset, length))
        return True

    def _serve_write(self, error: int, flags: int, cookie: int, offset: int, length: int) -> bool:
        """Serve the write whose header is at the front of the buffer."""
        data = self._start + wire.REQUEST_BYTES
        if error:
            self._start = data
            self._skip = length
            self._skip_payload()
            self._refuse(wire.CMD_WRITE, cookie, error)
            return True
        end = data + length
        if end > self._end:
            if wire.REQUEST_BYTES + length > RECEIVE_BYTES // 2:
                return self._start_block(flags, cookie, offset, length)
            return False
        if not length:
            self._start = data
            self._reply(simple_reply(cookie))
            return True
        block = self._take_block(self._server.arrived, length)
        if block is None:
            return False
        block.memory[:length] = self._buffer[data:end]
        self._start = end
        self._begin(wire.CMD_WRITE, cookie, self._write(flags, cookie, offset, block, length))
        return True

    def _serve_read(self, cookie: int, offset: int, length: int) -> None:
        if not length:
            self._reply(empty_read(cookie, structured=self._agreement.structured))
            return
        block = self._take_block_for(length)
        if block is None:
            self._start -= wire.REQUEST_BYTES  # asked again when there is room
            return
        self._begin(wire.CMD_READ, cookie, self._read(cookie, offset, block, length))

    def _skip_payload(self) -> None:
        skipped = min(self._skip, self._end - self._start)
        self._start += skipped
        self._skip -= skipped

    # --- payloads that need a block of the pool ---

    def _take_block_for(self, length: int) -> Block | None:
        """Like `_take_block`, for what waits for the client."""
        return self._take_block(self._server.pool_for(length), length)

    def _take_block(self, pool: PayloadPool, length: int, *, beyond: bool = False) -> Block | None:
        """Return a block; or None, and nothing is served before there is room. `beyond` takes it all the same."""
        held = self._held_bytes[pool]
        if held and held + block_bytes(length) > pool.share_bytes and not beyond:
            self._sated = True
            return None
        block = pool.take(length, beyond=beyond)
        if block is not None:
            self._held_bytes[pool] += len(block.memory)
        elif not self._waiting:
            self._waiting = True
            pool.wait(self._retry)
        return block

    def _give_block(self, block: Block) -> None:
        """Hand a block back. Whoever calls this serves on afterwards, so being sated ends here."""
        self._held_bytes[block.pool] -= len(block.memory)
        self._sated = False
        block.pool.give(block)

    def _retry(self) -> None:
        self._waiting = False
        if not self._lost:
            self._server.loop.call_soon(self._advance)

    def _start_block(self, flags: int, cookie: int, offset: int, length: int) -> bool:
        """Have the rest of this write's payload received straight into a block; always False: not here yet."""
        block = self._take_block_for(length)
        if block is not None:
            data = self._start + wire.REQUEST_BYTES
            self._block_filled = self._end - data
            block.memory[: self._block_filled] = self._buffer[data : self._end]
            self._start = self._end = 0
            self._block = block
            self._block_since_s = self._server.now_s
            self._block_request = (flags, cookie, offset, length)
        return False

    def _finish_block(self) -> None:
        assert self._block is not None
        block, self._block = self._block, None
        flags, cookie, offset, length = self._block_request
        self._begin(wire.CMD_WRITE, cookie, self._write(flags, cookie, offset, block, length))

    def _release_undrained(self) -> None:
        blocks, self._undrained = self._undrained, []
        for block in blocks:
            self._give_block(block)

    # --- requests that may block: a task each ---

    def _begin(self, command: int, cookie: int, work: Coroutine[Any, Any, None]) -> None:
        self._pending += 1
        self._server.spawn(self._carry_out(command, cookie, work))

    async def _carry_out(self, command: int, cookie: int, work: Awaitable[None]) -> None:
        try:
            await work
        except OSError as failure:
            self._refuse(command, cookie, wire_error(failure.errno))
        except MemoryError:
            self._refuse(command, cookie, wire.ENOMEM)
        except Exception:
            log.exception("%s failed in a way that Lockstep did not expect", wire.COMMANDS[command].name)
            self._refuse(command, cookie, wire.EIO)
        finally:
            self._pending -= 1
            self._advance()

    def _write(self, flags: int, cookie: int, offset: int, block: Block, length: int) -> Coroutine[Any, Any, None]:
        durable = bool(flags & wire.FLAG_FUA)
        begun = self._export.write(self.user, block.memory, run_of(offset, length), 1, durable=durable)
        return self._written(begun, cookie, block)

    async def _written(self, begun: Awaitable[None], cookie: int, block: Block) -> None:
        try:
            await begun
        finally:
            self._give_block(block)
        self._reply(simple_reply(cookie))

    async def _write_run(self, begun: Awaitable[None], run: "array[int]", count: int, block: Block) -> None:
        """Wait for a run; if it fails, carry out its writes one by one, so that each gets an answer of its own."""
        try:
            await begun
            self._reply(pack_replies(run, count))
        except OSError as failure:
            for at in range(count):
                error = wire_error(failure.errno)
                if count > 1 and failure.errno != errno.EPERM:  # that is about who writes, not about where
                    error = await self._error_of(rest_of(run, at, at + 1), block.memory)
                self._refuse(wire.CMD_WRITE, cookie_of(run, at), error)
        except Exception:
            log.exception("a run of writes failed in a way that Lockstep did not expect")
            for at in range(count):
                self._refuse(wire.CMD_WRITE, cookie_of(run, at), wire.EIO)
        finally:
            self._give_block(block)
            self._pending -= count
            self._advance()

    async def _error_of(self, run: "array[int]", data: memoryview) -> int:
        """Carry out one write, and return its error, or 0."""
        try:
            await self._export.write(self.user, data, run, 1, durable=False)
        except OSError as failure:
            return wire_error(failure.errno)
        return 0

    async def _read_run(self, begun: Awaitable[None], run: "array[int]", count: int, block: Block) -> None:
        """Wait for a run; if it fails, carry out its reads one by one, so that each gets an answer of its own."""
        try:
            await begun
        except OSError as failure:
            for at in range(count):
                await self._read_alone(rest_of(run, at, at + 1), block.memory, failure if count == 1 else None)
            self._give_block(block)
        except Exception:
            log.exception("a run of reads failed in a way that Lockstep did not expect")
            for at in range(count):
                self._refuse(wire.CMD_READ, cookie_of(run, at), wire.EIO)
            self._give_block(block)
        else:
            pack_data_headers(block.memory, run, count, self._agreement.structured)
            self._send_block(block, end_of(run, count))
        finally:
            self._pending -= count
            self._advance()

    async def _read_alone(self, run: "array[int]", memory: memoryview, failure: OSError | None) -> None:
        """Answer one read of a run that failed: with that failure, or else with what comes of another attempt."""
        _offset, length, position = run[:3]
        try:
            if failure is not None:
                raise failure
            await self._export.read(memory, run, 1)
        except OSError as error:
            self._refuse(wire.CMD_READ, cookie_of(run, 0), wire_error(error.errno))
        else:
            reply = bytearray(memory[: position + length])
            pack_data_headers(reply, run, 1, self._agreement.structured)
            self._reply(reply[position - self._header_bytes :])

    def _read(self, cookie: int, offset: int, block: Block, length: int) -> Coroutine[Any, Any, None]:
        begun = self._export.read(block.memory[:length], run_of(offset, length), 1)
        return self._answer_read(begun, cookie, offset, block, length)

    async def _answer_read(self, begun: Awaitable[None], cookie: int, offset: int, block: Block, length: int) -> None:
        try:
            await begun
        except BaseException:
            self._give_block(block)
            raise
        self._reply(data_header(cookie, offset, length, structured=self._agreement.structured))
        self._send_block(block, length)

    def _send_block(self, block: Block, length: int) -> None:
        """Send what has been gathered, and so much of a block, which is handed back when the socket has taken it."""
        self._send_replies(block.memory[:length])
        if self._writable or self._lost:
            self._give_block(block)
        else:
            if not self._undrained:
                self._undrained_since_s = self._server.now_s
            self._undrained.append(block)

    def _other(self, command: int, flags: int, cookie: int, offset: int, length: int) -> Coroutine[Any, Any, None]:
        export = self._export
        durable = bool(flags & wire.FLAG_FUA)
        if command == wire.CMD_BLOCK_STATUS:
            return self._status(cookie, offset, length, 1 if flags & wire.FLAG_REQ_ONE else MAX_STATUS_EXTENTS)
        if command == wire.CMD_FLUSH:
            begun = export.flush()
        elif command == wire.CMD_TRIM:
            begun = export.trim(self.user, offset, length, durable=durable)
        elif command == wire.CMD_WRITE_ZEROES:
            allocate, fast = bool(flags & wire.FLAG_NO_HOLE), bool(flags & wire.FLAG_FAST_ZERO)
            begun = export.zero(self.user, offset, length, durable=durable, allocate=allocate, fast=fast)
        else:
            assert command == wire.CMD_CACHE
            begun = export.cache(offset, length)
        return self._answered(begun, cookie)

    async def _answered(self, begun: Awaitable[None], cookie: int) -> None:
        await begun
        self._reply(simple_reply(cookie))

    async def _status(self, cookie: int, offset: int, length: int, limit: int) -> None:
        self._reply(status_reply(cookie, await self._export.allocation(offset, length, limit)))

    # --- replies ---

    def _reply(self, data: bytes | bytearray) -> None:
        self._out.append(data)

    def _refuse(self, command: int, cookie: int, error: int) -> None:
        self._reply(error_reply(command, cookie, error, structured=self._agreement.structured))

    def _send_replies(self, data: memoryview | None = None) -> None:
        """Send what has been gathered, then `data`; one system call."""
        out, self._out, self._batch_bytes = self._out, [], 0
        if self._lost:
            return
        if data is not None:
            self._transport.writelines([*out, data])
        elif len(out) == 1:
            self._transport.write(out[0])
        elif out:
            self._transport.write(b"".join(out))

    def _finish(self) -> None:
        """Read nothing more; close as soon as everything under way has been answered."""
        self._ending = True
        if self._lost:
            return
        if self._reading:
            self._reading = False
            self._transport.pause_reading()
        if not self._pending:
            self._send_replies()
            self._transport.close()


def _tune(sock: socket.socket) -> None:
    """Small replies leave at once; a whole batch of them fits into the socket."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with contextlib.suppress(OSError):  # past the system's limit is for root alone, and only a matter of speed
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SOCKET_BUFFER_BYTES)
