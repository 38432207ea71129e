"""A referee: the client's side of the NBD protocol, written from the specification and from nothing else.

It shares no number and no layout with the server that it judges. `Client` talks over a socket and can break every
rule; `ReplyParser` checks that what comes back keeps every rule that the specification gives to servers;
`permitted_errors` says which errors a request may get.

Source: doc/proto.md of the NBD reference implementation. All integers are big-endian.
"""

import _ssl
import contextlib
import ctypes
import socket
import ssl
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self, cast

# --- handshake ---

NBDMAGIC = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9

C_FIXED_NEWSTYLE = 1
C_NO_ZEROES = 2

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_PEEK_EXPORT = 4
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10
OPT_EXTENDED_HEADERS = 11

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERR_UNSUP = 2**31 + 1
REP_ERR_POLICY = 2**31 + 2
REP_ERR_INVALID = 2**31 + 3
REP_ERR_TLS_REQD = 2**31 + 5
REP_ERR_UNKNOWN = 2**31 + 6

INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3

# --- transmission ---

HAS_FLAGS = 1
READ_ONLY = 2
SEND_FLUSH = 4
SEND_FUA = 8
SEND_TRIM = 32
SEND_WRITE_ZEROES = 64
SEND_DF = 128
CAN_MULTI_CONN = 256
SEND_CACHE = 1024
SEND_FAST_ZERO = 2048

READ = 0
WRITE = 1
DISC = 2
FLUSH = 3
TRIM = 4
CACHE = 5
WRITE_ZEROES = 6
BLOCK_STATUS = 7

FUA = 1
NO_HOLE = 2
DF = 4
REQ_ONE = 8
FAST_ZERO = 16

EPERM = 1
EIO = 5
ENOMEM = 12
EINVAL = 22
ENOSPC = 28
EOVERFLOW = 75
ENOTSUP = 95
ESHUTDOWN = 108
ERRORS = frozenset({EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN})

REQUEST_BYTES = 28
MAX_PAYLOAD_BYTES = 2**25

_KNOWN_FLAGS = {
    READ: FUA | DF,
    WRITE: FUA,
    DISC: FUA,
    FLUSH: FUA,
    TRIM: FUA,
    CACHE: FUA,
    WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
    BLOCK_STATUS: FUA | REQ_ONE,
}


class RuleBroken(AssertionError):
    """The server sent something that the specification forbids."""


def permitted_errors(
    command: int,
    flags: int,
    offset: int,
    length: int,
    *,
    size: int,
    read_only: bool = False,
    structured: bool = True,
    allocation: bool = True,
) -> frozenset[int]:
    """Return the errors that a request may get by what is wrong with it, or {0} when nothing is.

    "Error values" and the entries of "Request types". A request with several faults may get any of their errors.
    Not from the specification, which leaves it open: that lengths of zero succeed, that commands without payload have
    no limit but the end of the export, and that no zeroes are fast; but a block status of no bytes has no valid answer.
    """
    if command not in _KNOWN_FLAGS:
        return frozenset({EINVAL})
    if command == DISC:
        return frozenset({0})  # it has no reply that could carry an error
    beyond = command != FLUSH and offset + length > size
    writes = command in (WRITE, TRIM, WRITE_ZEROES)
    faults = {
        EINVAL: (
            flags & ~_KNOWN_FLAGS[command]
            or (flags & DF and not structured)
            or (command == FLUSH and (offset or length))
            or (command == WRITE and length > MAX_PAYLOAD_BYTES)
            or (command == BLOCK_STATUS and not (structured and allocation and length))
            or (beyond and command not in (WRITE, WRITE_ZEROES))
        ),
        ENOSPC: beyond and command in (WRITE, WRITE_ZEROES),
        EPERM: read_only and writes,
        EOVERFLOW: command == READ and length > MAX_PAYLOAD_BYTES,
        ENOTSUP: command == WRITE_ZEROES and flags & FAST_ZERO,
    }
    return frozenset(error for error, there in faults.items() if there) or frozenset({0})


@dataclass(frozen=True)
class Request:
    """One request as a client sends it."""

    command: int
    cookie: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    payload: bytes = b""

    def wire(self) -> bytes:
        """Return its bytes."""
        return pack_request(self.command, self.cookie, self.offset, self.length, self.flags) + self.payload


def pack_request(
    command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0, magic: int = 0x25609513
) -> bytes:
    """Return the bytes of a request's header."""
    return struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length)


@dataclass
class Reply:
    """The whole answer to one request."""

    request: Request
    error: int = 0
    data: bytes = b""
    extents: list[tuple[int, int]] = field(default_factory=list)  # (bytes, status flags)
    chunks: int = 0  # zero: it was a simple reply


class ReplyParser:
    """Splits what a server sends during the transmission phase into replies, and checks each rule on the way."""

    def __init__(self, *, structured: bool, contexts: Iterable[int] = ()) -> None:
        """Judge a server with which `structured` replies and these metadata `contexts` were negotiated."""
        self.structured = structured
        self.contexts = frozenset(contexts)
        self.pending: dict[int, Request] = {}
        self._partial: dict[int, _Partial] = {}
        self._received = bytearray()

    def expect(self, request: Request) -> None:
        """Note that a request is on its way; a DISC has no reply."""
        if request.command != DISC:
            assert request.cookie not in self.pending, "this test's fault: a cookie that is in flight"
            self.pending[request.cookie] = request

    def feed(self, data: bytes) -> list[Reply]:
        """Take what has arrived; return the replies that it completes."""
        self._received += data
        replies = []
        while (step := self._next()) is not None:
            used, reply = step
            del self._received[:used]
            if reply is not None:
                del self.pending[reply.request.cookie]
                self._partial.pop(reply.request.cookie, None)
                replies.append(reply)
        return replies

    def assert_between_replies(self) -> None:
        """Nothing is left over of a reply."""
        if self._received or self._partial:
            raise RuleBroken(f"the stream ends within a reply: {bytes(self._received[:40])!r}")

    def _next(self) -> tuple[int, Reply | None] | None:
        if len(self._received) < 4:
            return None
        magic = int.from_bytes(self._received[:4], "big")
        if magic == 0x67446698:
            return self._simple()
        if magic == 0x668E33EF:
            return self._chunk()
        raise RuleBroken(f"no reply begins with {magic:#x}")

    def _of(self, cookie: int) -> Request:
        if cookie not in self.pending:
            raise RuleBroken(f"a reply to cookie {cookie:#x}, which is not in flight")
        return self.pending[cookie]

    def _simple(self) -> tuple[int, Reply | None] | None:
        if len(self._received) < 16:
            return None
        error, cookie = struct.unpack_from(">IQ", self._received, 4)
        request = self._of(cookie)
        if self.structured and request.command == READ:
            raise RuleBroken('"MUST NOT use a simple reply for NBD_CMD_READ"')
        if request.command == BLOCK_STATUS and not error:
            raise RuleBroken("block status succeeded without a status chunk")
        if cookie in self._partial:
            raise RuleBroken("a simple reply in the middle of a structured one")
        _check_error(error, request)
        length = request.length if request.command == READ and not error else 0
        if len(self._received) < 16 + length:
            return None
        return 16 + length, Reply(request, error, bytes(self._received[16 : 16 + length]))

    def _chunk(self) -> tuple[int, Reply | None] | None:
        if len(self._received) < 20:
            return None
        flags, kind, cookie, length = struct.unpack_from(">HHQI", self._received, 4)
        request = self._of(cookie)
        if not self.structured:
            raise RuleBroken("a structured reply that was not negotiated")
        if flags & ~1:
            raise RuleBroken(f"reply flags {flags:#x}")
        if length > MAX_PAYLOAD_BYTES + 8:
            raise RuleBroken(f"a chunk of {length} bytes")
        if len(self._received) < 20 + length:
            return None
        partial = self._partial.setdefault(cookie, _Partial(request, self.contexts))
        partial.add(kind, bytes(self._received[20 : 20 + length]), done=bool(flags & 1))
        return 20 + length, partial.finished() if flags & 1 else None


class _Partial:
    """A structured reply of which more chunks are to come."""

    def __init__(self, request: Request, contexts: frozenset[int]) -> None:
        self._request = request
        self._contexts = contexts
        self._error = 0
        self._data = bytearray()  # grows when content comes: what is refused may have asked for 4 GiB
        self._covered: list[tuple[int, int]] = []  # [start, end) of the request's range
        self._status: dict[int, list[tuple[int, int]]] = {}
        self._chunks = 0

    def add(self, kind: int, payload: bytes, *, done: bool) -> None:
        self._chunks += 1
        if kind == 0:
            if payload or not done:
                raise RuleBroken("a NONE chunk is empty and the last one")
        elif kind == 1:
            if len(payload) < 9:
                raise RuleBroken("a data chunk describes at least one byte")
            self._content(int.from_bytes(payload[:8], "big"), payload[8:])
        elif kind == 2:
            if len(payload) != 12 or not any(payload[8:]):
                raise RuleBroken("a hole chunk has an offset and a size that is not zero")
            self._content(int.from_bytes(payload[:8], "big"), bytes(int.from_bytes(payload[8:], "big")))
        elif kind == 5:
            self._block_status(payload)
        elif kind in (2**15 + 1, 2**15 + 2):
            self._failed(kind, payload)
        else:
            raise RuleBroken(f"chunk type {kind}")

    def finished(self) -> Reply:
        request = self._request
        if not self._error:
            if request.command == READ:
                at = 0
                for start, end in sorted(self._covered):
                    if start != at:
                        raise RuleBroken(f"bytes {at} to {start} of a read are missing")
                    at = end
                if at != request.length:
                    raise RuleBroken(f"a read of {request.length} bytes got {at}")
            if request.command == BLOCK_STATUS and self._status.keys() != self._contexts:
                raise RuleBroken("block status needs one chunk for each selected context")
        extents = next(iter(self._status.values()), [])
        return Reply(request, self._error, bytes(self._data), extents, self._chunks)

    def _content(self, offset: int, data: bytes) -> None:
        request = self._request
        start = offset - request.offset
        end = start + len(data)
        if request.command != READ or start < 0 or end > request.length:
            raise RuleBroken("content outside what was asked for")
        if any(start < e and s < end for s, e in self._covered):
            raise RuleBroken("content chunks overlap")
        if request.flags & DF and self._covered:
            raise RuleBroken("a second content chunk in spite of DF")
        self._covered.append((start, end))
        self._data.extend(bytes(max(0, end - len(self._data))))
        self._data[start:end] = data

    def _block_status(self, payload: bytes) -> None:
        request = self._request
        if request.command != BLOCK_STATUS or len(payload) < 12 or len(payload) % 8 != 4:
            raise RuleBroken("a status chunk is 4 + n * 8 bytes long and answers a status query")
        context = int.from_bytes(payload[:4], "big")
        if context not in self._contexts or context in self._status:
            raise RuleBroken(f"context {context} was not selected, or comes twice")
        extents = list(struct.iter_unpack(">II", payload[4:]))
        lengths = [length for length, _ in extents]
        if 0 in lengths:
            raise RuleBroken("an extent of no bytes")
        if sum(lengths[:-1]) >= request.length:
            raise RuleBroken("extents after the end of what was asked for")
        if request.flags & REQ_ONE and (len(lengths) != 1 or lengths[0] > request.length):
            raise RuleBroken("more than one extent, or a longer one, in spite of REQ_ONE")
        self._status[context] = [(length, flags) for length, flags in extents]

    def _failed(self, kind: int, payload: bytes) -> None:
        fixed = 6 if kind == 2**15 + 1 else 14
        if len(payload) < fixed:
            raise RuleBroken("an error chunk is too short")
        error, message = struct.unpack_from(">IH", payload)
        if not error or message > len(payload) - fixed or message > 4096:
            raise RuleBroken("an error chunk without error, or with a message longer than the chunk")
        _check_error(error, self._request)
        self._error = error


def _check_error(error: int, request: Request) -> None:
    if error and error not in ERRORS:
        raise RuleBroken(f"error {error} is not one of the protocol's")
    if error == ENOTSUP and not (request.command == WRITE_ZEROES and request.flags & FAST_ZERO):
        raise RuleBroken("ENOTSUP is for fast zeroes alone")
    if error == EOVERFLOW and (request.command == WRITE or request.length <= MAX_PAYLOAD_BYTES):
        raise RuleBroken("EOVERFLOW is for lengths beyond the maximum, and not for writes")


# --- handshake helpers ---


def pack_option(option: int, data: bytes = b"", magic: bytes = IHAVEOPT) -> bytes:
    """Return the bytes of an option."""
    return magic + struct.pack(">II", option, len(data)) + data


def pack_string(text: bytes) -> bytes:
    """Return a 32-bit length, and the string."""
    return struct.pack(">I", len(text)) + text


def pack_info(name: bytes, *asked: int) -> bytes:
    """Return the data of INFO and GO."""
    return pack_string(name) + struct.pack(f">H{len(asked)}H", len(asked), *asked)


def pack_queries(name: bytes, *queries: bytes) -> bytes:
    """Return the data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return pack_string(name) + struct.pack(">I", len(queries)) + b"".join(map(pack_string, queries))


class TlsSocket:
    """The client's side of TLS over a socket, with a half-close of its own, which Python's SSLSocket does not have."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        """Do the TLS handshake with a server that has a certificate for 127.0.0.1."""
        self._socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="127.0.0.1")
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._receive()
        self._flush()

    def sendall(self, data: bytes) -> None:
        for at in range(0, len(data), 1 << 16):
            self._tls.write(data[at : at + (1 << 16)])
            self._flush()

    def hold_back(self, data: bytes) -> None:
        """Send this together with what is sent next."""
        self._tls.write(data)

    def recv(self, length: int) -> bytes:
        while True:
            try:
                return self._tls.read(length)
            except ssl.SSLWantReadError:
                self._receive()
            except ssl.SSLZeroReturnError:
                return b""

    def end(self) -> None:
        """Send close_notify, and read on."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        self._flush()

    def ask_for_new_keys(self, times: int) -> None:
        """Send KeyUpdate with update_requested (RFC 8446, 4.6.3), which the ssl module does not offer."""
        openssl = ctypes.CDLL(_ssl.__file__)
        # The second pointer of CPython's PySSLSocket.
        place = id(vars(self._tls)["_sslobj"]) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
        connection = ctypes.c_void_p.from_address(place)
        for _ in range(times):
            assert openssl.SSL_key_update(connection, 1) == 1
            assert openssl.SSL_do_handshake(connection) == 1
            self._flush()

    def settimeout(self, timeout_s: float) -> None:
        self._socket.settimeout(timeout_s)

    def close(self) -> None:
        self._socket.close()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._socket.sendall(self._outgoing.read())

    def _receive(self) -> None:
        data = self._socket.recv(1 << 18)
        if not data:
            raise ConnectionAbortedError("the server closed the connection below TLS, without a close_notify")
        self._incoming.write(data)


class Client:
    """A connection. Each wait has a limit, so that a server that hangs fails the test instead of stopping it."""

    def __init__(self, address: str | tuple[str, int], patience_s: float = 30.0) -> None:
        """Connect to a unix socket's path, or to (host, port), and say nothing yet."""
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.plain = self.socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self.socket.connect(address)  # with a timeout it would fail at once while many wait to be let in
            self.socket.settimeout(patience_s)
        except BaseException:
            self.socket.close()
            raise
        self.size = 0
        self.flags = 0
        self.parser = ReplyParser(structured=False)
        self._cookie = 0x0123_4567_0000_0000  # high bits too: a cookie is opaque
        self._replies: dict[int, Reply] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection without a word."""
        self.socket.close()

    # --- raw ---

    def send(self, data: bytes) -> None:
        """Send bytes of any kind."""
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        """Return exactly so many bytes. Raises EOFError when the server closes before."""
        data = bytearray()
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            if not piece:
                raise EOFError(f"the server closed the connection after {len(data)} of {length} bytes")
            data += piece
        return bytes(data)

    def assert_closed(self) -> bytes:
        """Return what is still to come before the server closes, as it must."""
        data = bytearray()
        try:
            while piece := self.socket.recv(1 << 16):
                data += piece
        except ConnectionError:  # closed with bytes of ours unread
            pass
        return bytes(data)

    # --- handshake ---

    def greet(self, flags: int = C_FIXED_NEWSTYLE | C_NO_ZEROES) -> None:
        """Check the server's first words, and answer."""
        magic, options, offered = struct.unpack(">8s8sH", self.receive(18))
        if (magic, options, offered) != (NBDMAGIC, IHAVEOPT, 3):
            raise RuleBroken(f"greeting {magic!r} {options!r} {offered:#x}")
        self.send(struct.pack(">I", flags))

    def start_tls(self, context: ssl.SSLContext) -> Self:
        """Greet, say STARTTLS, and go on inside."""
        self.greet()
        assert self.option(OPT_STARTTLS) == [(REP_ACK, b"")]
        self.tls = TlsSocket(self.plain, context)
        self.socket = cast(socket.socket, self.tls)  # it has what is used here
        return self

    def option_reply(self, option: int) -> tuple[int, bytes]:
        """Return the next (type, data)."""
        magic, echoed, kind, length = struct.unpack(">QIII", self.receive(20))
        if magic != OPTION_REPLY_MAGIC or echoed != option:
            raise RuleBroken(f"option reply {magic:#x} to option {echoed}, not {option}")
        return kind, self.receive(length)

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return its replies up to the one that concludes it."""
        self.send(pack_option(option, data))
        replies = [self.option_reply(option)]
        while replies[-1][0] != REP_ACK and not replies[-1][0] >> 31:
            replies.append(self.option_reply(option))
        return replies

    def go(self, name: str = "", *, structured: bool = True, allocation: bool = True) -> Self:
        """Do the whole handshake, or what is left of it inside TLS."""
        if self.socket is self.plain:
            self.greet()
        contexts: list[int] = []
        if structured:
            assert self.option(OPT_STRUCTURED_REPLY) == [(REP_ACK, b"")]
            if allocation:
                replies = self.option(OPT_SET_META_CONTEXT, pack_queries(name.encode(), b"base:allocation"))
                assert [kind for kind, _ in replies] == [REP_META_CONTEXT, REP_ACK], replies
                assert replies[0][1][4:] == b"base:allocation"
                contexts.append(int.from_bytes(replies[0][1][:4], "big"))
        *infos, end = self.option(OPT_GO, pack_info(name.encode(), INFO_BLOCK_SIZE))
        assert end == (REP_ACK, b""), end
        (export,) = (data for _, data in infos if data[:2] == b"\0\0")
        self.size, self.flags = struct.unpack(">QH", export[2:])
        self.parser = ReplyParser(structured=structured, contexts=contexts)
        return self

    # --- transmission ---

    def request(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> Request:
        """Make the next request, and expect its reply; sending it is up to the caller."""
        self._cookie += 1
        length = length or len(payload)
        made = Request(command, self._cookie, offset, length, flags, payload)
        self.parser.expect(made)
        return made

    def reply(self, request: Request) -> Reply:
        """Wait for the reply to one request; keep others for later."""
        while request.cookie not in self._replies:
            self._take()
        return self._replies.pop(request.cookie)

    def replies(self) -> Mapping[int, Reply]:
        """Wait until no request is in flight; return the replies by cookie."""
        while self.parser.pending:
            self._take()
        self.parser.assert_between_replies()
        replies, self._replies = self._replies, {}
        return replies

    def arrived(self) -> list[Reply]:
        """Wait for the server to send something; return the replies that are whole by now."""
        self._take()
        replies, self._replies = self._replies, {}
        return list(replies.values())

    def call(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> Reply:
        """Send one request, and wait for its reply."""
        request = self.request(command, offset, length, flags, payload)
        self.send(request.wire())
        return self.reply(request)

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        """Read, which must succeed."""
        reply = self.call(READ, offset, length, flags)
        assert reply.error == 0, reply.error
        return reply.data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """Write, which must succeed."""
        assert (error := self.call(WRITE, offset, payload=data, flags=flags).error) == 0, error

    def disconnect(self) -> None:
        """Say goodbye; the server must close, and must not answer."""
        self.send(self.request(DISC).wire())
        assert self.assert_closed() == b""
        self.close()

    def _take(self) -> None:
        data = self.socket.recv(1 << 20)
        if not data:
            raise EOFError(f"the server closed the connection with {len(self.parser.pending)} requests in flight")
        for reply in self.parser.feed(data):
            self._replies[reply.request.cookie] = reply
