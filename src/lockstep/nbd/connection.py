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
import logging
import socket
import ssl
from typing import Final, Protocol, cast

from lockstep.buffers import page_aligned
from lockstep.nbd import deferred, wire
from lockstep.nbd.deferred import Deferred
from lockstep.nbd.frames import (
    end_of,
    find_reads,
    find_writes,
    new_run,
    pack_data_headers,
    pack_replies,
    rebase,
    rest_of,
)
from lockstep.nbd.identity import NAMELESS, peer_of
from lockstep.nbd.negotiation import Agreement, Negotiation, Security, State
from lockstep.nbd.payload import Block, PayloadPool, Share
from lockstep.nbd.replies import REPLY_BATCH_BYTES, Replies
from lockstep.nbd.tls import Securable, TlsTransport
from lockstep.nbd.transmission import empty_read, refusal, simple_reply

log = logging.getLogger(__name__)

RECEIVE_BYTES: Final = 256 << 10  # half of it: the longest payload that needs no pool block of its own
BULK_RECEIVE_BYTES: Final = 1 << 20  # of who fills that, and so has to be woken up, and go on, for each of its parts
INLINE_READ_BYTES: Final = 128 << 10  # a longer copy would delay other clients
SOCKET_BUFFER_BYTES: Final = 1 << 20
MAX_PENDING: Final = 64
CONTENDED_STALL_S: Final = 5.0
SLOWEST_BYTES_S: Final = 1 << 20  # who sends a payload, or takes replies, more slowly counts as stalled

_SO_SNDBUFFORCE: Final = 32  # socket(7); the socket module does not name it


class Host(deferred.Host, Protocol):
    """What a connection needs of the server that it belongs to."""

    receiving: PayloadPool  # for receive buffers of who sends much at once
    loop: asyncio.AbstractEventLoop

    def admit(self, connection: "Connection") -> bool:
        """Count a new connection in, unless there are too many."""

    def dismiss(self, connection: "Connection") -> None:
        """Count a closed connection out, and its place once nothing that it asked is under way; then it calls again."""

    def entered(self, connection: "Connection") -> None:
        """Note that a connection has finished its handshake."""

    def clock_s(self) -> float:
        """The clock by which clients stall."""

    def idle(self) -> None:
        """Everything that a connection asked is answered, and it may ask more."""


class Connection(Securable):
    """One client, from its first byte to its last. `user` is who it belongs to, `origin` where it comes from.

    Received bytes lie in `_buffer[_start:_end]`. While a large payload is received, they go to `_block` instead.
    """

    def __init__(self, server: Host, tls: ssl.SSLContext | None = None) -> None:
        """Serve the export of `server`; with `tls`, to nobody before TLS is established on those terms."""
        self.user, self.origin = NAMELESS, "unknown yet"
        self.fd = -1  # of its socket
        self.since_s = server.clock_s()
        self._server = server
        self._export = server.export
        self._transport: asyncio.Transport
        info = server.export.info
        self._writable_bytes = 0 if info.flags & wire.READ_ONLY else info.size_bytes
        self._tls = tls
        self._negotiation: Negotiation | None = None
        self._agreement = Agreement("", structured=False, allocation=False)
        self._share = Share(self._retry)
        self._replies = Replies(self._share, server.clock_s)
        self._deferred = Deferred(server, self._share, self._replies, self._advance)
        self._buffer: memoryview  # from `connection_made` on: uvloop accepts nobody any more where this here fails
        self._bulk: Block | None = None  # whose memory the buffer is
        self._start = self._end = 0
        self._skip = 0  # bytes of a refused payload that are still to be thrown away
        self._block: Block | None = None
        self._block_request = (0, 0, 0, 0)  # flags, cookie, offset, length
        self._block_filled = 0
        self._block_since_s = 0.0
        self._run = new_run()
        self._reading = True
        self._ending = False  # no further request is read
        self._lost = False

    # --- what the event loop calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self._transport = self._replies.transport = cast(asyncio.Transport, transport)
        if not self._server.admit(self):
            self._transport.abort()
            return
        # Zero marks: whatever the socket does not take at once pauses us, and draining resumes us.
        self._transport.set_write_buffer_limits(high=0, low=0)
        sock = transport.get_extra_info("socket")
        _tune(sock)
        self.fd = sock.fileno()
        try:
            peer = peer_of(sock, tls=self._tls is not None)
            self.user, self.origin = peer.user, peer.origin
            self._buffer = page_aligned(RECEIVE_BYTES)
        except OSError as failure:
            self.abort(f"it cannot be let in now: {failure.strerror or failure}")
            return
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
        with contextlib.suppress(OSError):
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
        self._replies.writable = False

    def resume_writing(self) -> None:
        """It took them all."""
        self._replies.drained()
        if self._negotiation is None:
            self._advance()
        elif not self._ending:
            self._negotiate(self._negotiation)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client; what is under way is carried out all the same, but for zeroes not begun yet."""
        if exc is not None:
            log.info("connection of %s (%s) lost: %s", self.user, self.origin, exc)
        self._lost = self._ending = True
        self._share.forget()
        if self._block is not None:
            self._share.give(self._block)
            self._block = None
        if self._bulk is not None:
            self._server.receiving.give(self._bulk)
        self._buffer = memoryview(b"")  # its memory goes now, and not when the collector finds the cycle
        self._replies.transport = None
        self._replies.drained()
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
        contended, since_s, moved_bytes = self._replies.holding()
        if self._block is not None:
            contended, since_s, moved_bytes = self._block.pool.contended, self._block_since_s, self._block_filled
        return contended and now_s - since_s > CONTENDED_STALL_S + moved_bytes / SLOWEST_BYTES_S

    @property
    def busy(self) -> bool:
        """Whether something that it asked is under way."""
        return self._deferred.pending > 0

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
            self._replies.agree(structured=self._agreement.structured)
            if (other := negotiation.agreement.on_behalf_of) is not None:
                self.origin += f", {self.user} on behalf of {other}"
                self.user = other
            self._negotiation = None
            self._server.entered(self)
            self._advance()
        else:
            self._read_while(self._replies.writable)  # who does not take the answers gets to ask no more

    def _start_tls(self, negotiation: Negotiation) -> None:
        """Put TLS below this connection; from here on, every byte comes from inside.

        What was sent in plain text must not be taken as if it did.
        """
        assert self._tls is not None
        if self._start != self._end:
            self.abort("it sent more in plain text after STARTTLS")
            return
        self._negotiation = negotiation.inside_tls()
        self._transport = self._replies.transport = TlsTransport(self._transport, self, self._tls)

    def _blame(self, because: str) -> None:
        log.warning("closing the connection of %s (%s): %s", self.user, self.origin, because)

    # --- requests ---

    def _advance(self) -> None:
        """Serve every complete request that has arrived, as long as the client takes the replies."""
        replies = self._replies
        try:
            while self._may_serve() and (self._serve_writes() or self._serve_reads() or self._serve_next()):
                if replies.batch_bytes >= REPLY_BATCH_BYTES:
                    replies.send()
                if self._start == self._end:
                    break
        except (OSError, MemoryError):  # where a task serves on, nobody else would notice
            self.abort("there is no memory for what it asks")
        finally:
            self._deferred.begin_gathered(self.user)
            replies.send()
        if self._ending:
            self._finish()
            return
        self._read_while(self._may_serve())
        if self._reading and not self._deferred.pending:
            self._server.idle()

    def _read_while(self, wanted: bool) -> None:
        if wanted != self._reading:
            self._reading = wanted
            (self._transport.resume_reading if wanted else self._transport.pause_reading)()

    def _may_serve(self) -> bool:
        return (
            self._replies.writable
            and not self._share.refused
            and not self._ending
            and self._deferred.pending < MAX_PENDING
        )

    def _retry(self) -> None:
        """There is room in a pool where there was none."""
        if not self._lost:
            self._server.loop.call_soon(self._advance)

    def _serve_writes(self) -> bool:
        """Serve the run of plain writes at the front; False when there is none, or it must wait."""
        run, start, replies = self._run, self._start, self._replies
        enough = REPLY_BATCH_BYTES - replies.batch_bytes
        count = find_writes(self._buffer, start, self._end, enough, self._writable_bytes, run)
        if not count:
            return False
        done = self._export.write_run(self.user, self._buffer, run, count)
        if done:
            replies.add(pack_replies(run, done))
            self._start = end_of(run, done)
            replies.batch_bytes += self._start - start
            if done == count:
                return True
        rest = rest_of(run, done, count)
        if not self._deferred.gather(self.user, self._buffer, self._start, self._end, rest, count - done):
            return done > 0
        self._start = end_of(run, count)
        return True

    def _serve_reads(self) -> bool:
        """Serve the run of plain reads at the front; False when there is none, or it must wait."""
        run, replies = self._run, self._replies
        header_bytes = replies.header_bytes
        enough, size_bytes = REPLY_BATCH_BYTES - replies.batch_bytes, self._export.info.size_bytes
        where = self._buffer, self._start, self._end
        count = find_reads(*where, enough, INLINE_READ_BYTES, size_bytes, header_bytes, run)
        if not count:
            return False
        data = bytearray(end_of(run, count))
        done = self._export.read_run(data, run, count)
        if done:
            del data[end_of(run, done) :]
            pack_data_headers(data, run, done, replies.structured)
            replies.add(data)
            replies.batch_bytes += len(data)
        begun = 0
        if done < count:
            rest = rest_of(run, done, count)
            rebase(rest, count - done, header_bytes - rest[2])
            begun = self._deferred.read_run(rest, count - done)
        self._start += (done + begun) * wire.REQUEST_BYTES
        return done + begun > 0

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
            self._replies.refuse(command, cookie, error)
        elif command == wire.CMD_READ:
            self._serve_read(cookie, offset, length)
        elif command == wire.CMD_DISC:
            self._ending = True
        else:
            self._deferred.other(self.user, command, flags, cookie, offset, length)
        return True

    def _serve_write(self, error: int, flags: int, cookie: int, offset: int, length: int) -> bool:
        """Serve the write whose header is at the front of the buffer."""
        data = self._start + wire.REQUEST_BYTES
        if error:
            self._start = data
            self._skip = length
            self._skip_payload()
            self._replies.refuse(wire.CMD_WRITE, cookie, error)
            return True
        end = data + length
        if end > self._end:
            if wire.REQUEST_BYTES + length > RECEIVE_BYTES // 2:
                return self._start_block(flags, cookie, offset, length)
            return False
        if not length:
            self._start = data
            self._replies.add(simple_reply(cookie))
            return True
        block = self._share.take(self._server.arrived, length)
        if block is None:
            return False
        block.memory[:length] = self._buffer[data:end]
        self._start = end
        self._deferred.write(self.user, flags, cookie, offset, length, block)
        return True

    def _serve_read(self, cookie: int, offset: int, length: int) -> None:
        if not length:
            self._replies.add(empty_read(cookie, structured=self._replies.structured))
            return
        block = self._share.take(self._server.pool_for(length), length)
        if block is None:
            self._start -= wire.REQUEST_BYTES  # asked again when there is room
            return
        self._deferred.read(cookie, offset, length, block)

    def _skip_payload(self) -> None:
        skipped = min(self._skip, self._end - self._start)
        self._start += skipped
        self._skip -= skipped

    # --- payloads that are received straight into a block ---

    def _start_block(self, flags: int, cookie: int, offset: int, length: int) -> bool:
        """Have the rest of this write's payload received straight into a block; always False: not here yet."""
        block = self._share.take(self._server.pool_for(length), length)
        if block is not None:
            data = self._start + wire.REQUEST_BYTES
            self._block_filled = self._end - data
            block.memory[: self._block_filled] = self._buffer[data : self._end]
            self._start = self._end = 0
            self._block = block
            self._block_since_s = self._server.clock_s()
            self._block_request = (flags, cookie, offset, length)
        return False

    def _finish_block(self) -> None:
        assert self._block is not None
        block, self._block = self._block, None
        flags, cookie, offset, length = self._block_request
        self._deferred.write(self.user, flags, cookie, offset, length, block)

    def _finish(self) -> None:
        """Read nothing more; close as soon as everything under way has been answered."""
        self._ending = True
        if self._lost:
            self._server.dismiss(self)
            return
        if self._reading:
            self._reading = False
            self._transport.pause_reading()
        if not self._deferred.pending:
            self._replies.send()
            self._transport.close()


def _tune(sock: socket.socket) -> None:
    """Small replies leave at once; a whole batch of them fits into the socket."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with contextlib.suppress(OSError):  # past the system's limit is for root alone, and only a matter of speed
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SOCKET_BUFFER_BYTES)
