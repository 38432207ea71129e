"""TLS between a socket and a connection that has said STARTTLS.

    socket  <->  raw transport  <->  TlsTransport  <->  Connection
                     ciphertext                plaintext

Why not the event loop's own (`loop.start_tls`, read in uvloop 0.23):

- It encrypts whatever is written at once and keeps the ciphertext, however long. A client that asks for 32 MiB and
  does not read would cost twice that beyond the payload pool, and a thousand of them a thousand times as much.
- It counts what the socket has not taken as sent, so the connection would hand a block back too early to be bounded.
- It ends the connection at the client's close_notify ("returning true from eof_received() has no effect"), and the
  answers to what is under way are lost. Our connections answer first.

So here plaintext stays where it is until the socket takes it: at most one piece of ciphertext exists. What is received
is decrypted straight into the connection's buffers, and not received while the connection does not read. Cryptography,
the protocol of TLS and the verification of certificates are OpenSSL's (ssl.SSLObject).

Not handled here: time. A client that stalls in the TLS handshake is still in the NBD handshake, which has its limit.
"""

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from lockstep.nbd.identity import common_name

TLS_BUFFER_BYTES: Final = 64 << 10  # four records: received, or encrypted, at a time
TURN_BYTES: Final = 1 << 20  # encrypted in one turn of the loop, so that one reader does not delay the others

_NOT_OURS: Final = "its certificate is not signed by the certificate authority of the TLS directory"
# openssl/x509_vfy.h: X509_V_ERR_...
_REASONS: Final = {
    2: _NOT_OURS,
    7: _NOT_OURS,
    9: "its certificate is not valid yet",
    10: "its certificate has expired",
    18: _NOT_OURS,
    19: _NOT_OURS,
    20: _NOT_OURS,
    21: _NOT_OURS,
    26: "its certificate is not one for clients",
}


class Securable(asyncio.BufferedProtocol):
    """A connection that TLS can be put below."""

    def get_buffer(self, sizehint: int) -> memoryview:
        """Say where the next bytes go; there is room as long as reading is not paused."""
        raise NotImplementedError

    def secured(self, user: str) -> None:
        """TLS is established, with a client whose certificate names `user`."""
        raise NotImplementedError

    def abort(self, because: str) -> None:
        """Close at once, and log why."""
        raise NotImplementedError


def server_context(certificate: str, key: str, authority: str) -> ssl.SSLContext:
    """Return the terms on which clients are let in: TLS 1.2 at least, and a client certificate of the authority.

    The arguments are PEM files. Sessions are not resumed: each connection shows its certificate. Raises OSError, of
    which ssl.SSLError is one.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    context.load_cert_chain(certificate, key, password="")  # an encrypted key fails, instead of asking the terminal
    context.load_verify_locations(authority)
    return context


class TlsTransport(asyncio.Transport, asyncio.BufferedProtocol):
    """A transport for the connection above, and a protocol for the transport below."""

    def __init__(self, raw: asyncio.Transport, connection: Securable, context: ssl.SSLContext) -> None:
        """Take over `raw`, whose marks must be zero, and wait for the client to begin the TLS handshake."""
        super().__init__()
        self._raw = raw
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._received = memoryview(bytearray(TLS_BUFFER_BYTES))
        self._backlog: deque[memoryview] = deque()  # plaintext that is still to be encrypted
        self._handshaking = True
        self._reading = True
        self._ended = False  # the client sends no more
        self._closing = False
        self._taken = not raw.get_write_buffer_size()  # the socket took all that was given to it
        self._stalled = not self._taken  # the connection was told to pause
        raw.set_protocol(self)

    # --- what the transport below calls ---

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 (of the overridden method)
        """Say where ciphertext goes."""
        return self._received

    def buffer_updated(self, nbytes: int) -> None:
        """Take ciphertext."""
        self._incoming.write(self._received[:nbytes])
        if self._handshaking:
            self._shake_hands()
        else:
            self._deliver()

    def eof_received(self) -> bool:
        """The client closed its side, with or without the TLS message that says so."""
        if not self._ended:
            self._ended = True
            self._connection.eof_received()
        return True

    def pause_writing(self) -> None:
        """The socket does not take all."""
        self._taken = False

    def resume_writing(self) -> None:
        """It took all."""
        self._taken = True
        self._pump()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone."""
        self._closing = True
        self._backlog.clear()
        self._connection.connection_lost(exc)
        self._connection = Securable()  # nobody: their memory goes now, and not when the collector finds the cycle

    # --- what the connection above calls ---

    def write(self, data: Any) -> None:
        """Send; pauses the connection, and refers to `data`, until the socket took it."""
        self.writelines((data,))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """Send several pieces one after the other."""
        self._backlog.extend(map(memoryview, list_of_data))
        if not self._stalled:
            self._pump()

    def pause_reading(self) -> None:
        """Hand on no more plaintext."""
        self._reading = False
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        """Hand on plaintext again, first of all what has arrived; not from within this call."""
        self._reading = True
        self._loop.call_soon(self._read_on)

    def close(self) -> None:
        """Send what is written, say goodbye, close."""
        self._closing = True
        if not self._backlog:
            self._say_goodbye()

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        self._raw.abort()

    def get_write_buffer_size(self) -> int:
        """Return how much the socket has not taken yet."""
        return sum(map(len, self._backlog)) + self._raw.get_write_buffer_size()

    def is_closing(self) -> bool:
        """Whether nothing more will be received."""
        return self._closing

    # --- receiving ---

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send()
            return
        except ssl.SSLError as error:
            self._break_off(_reason(error))
            return
        self._handshaking = False
        self._send()
        user = common_name(self._tls.getpeercert() or {})
        if user is None:
            self._connection.abort("its certificate has no common name that could be a user's")
            return
        self._connection.secured(user)
        self._deliver()

    def _break_off(self, reason: str) -> None:
        self._send()  # the alert that tells the client
        self._connection.abort(reason)

    def _read_on(self) -> None:
        self._deliver()
        if self._reading and not self._closing:
            self._raw.resume_reading()

    def _deliver(self) -> None:
        """Hand on what has arrived, as long as it is wanted."""
        while self._reading and not self._closing and self._holds_input():
            buffer = self._connection.get_buffer(-1)
            assert len(buffer) > 0, "a connection that reads has room"
            try:
                count = self._decrypt_into(buffer)
            except ssl.SSLError as error:
                self._break_off(_reason(error))
                return
            if self._outgoing.pending > TLS_BUFFER_BYTES:  # OpenSSL's answers, which leave with the next reply
                self._connection.abort("it asks for new TLS keys again and again, and for nothing else")
                return
            if count:
                self._connection.buffer_updated(count)
            if count < len(buffer):
                break
        if self._ended and self._reading:  # not before all that came with it is taken
            self._connection.eof_received()

    def _decrypt_into(self, buffer: memoryview) -> int:
        """Fill the buffer as far as what has arrived goes; notes the client's close_notify."""
        filled = 0
        with contextlib.suppress(ssl.SSLWantReadError):  # of a record a part has arrived
            while filled < len(buffer) and self._holds_input():
                count = int(self._tls.read(len(buffer) - filled, buffer[filled:]))
                if not count:
                    self._ended = True
                    break
                filled += count
        return filled

    def _holds_input(self) -> bool:
        return not self._ended and bool(self._incoming.pending or self._tls.pending())

    # --- sending ---

    def _pump(self) -> None:
        """Encrypt and send what the socket takes in this turn of the loop; tell the connection how it stands."""
        if self._raw.is_closing():
            return
        left = TURN_BYTES
        while self._backlog and self._taken and left > 0:
            left -= self._encrypt_piece()
            self._send()
        if self._backlog and self._taken:
            self._loop.call_soon(self._pump)
        self._tell()
        if self._closing and not self._backlog:
            self._say_goodbye()

    def _encrypt_piece(self) -> int:
        """Encrypt about TLS_BUFFER_BYTES; return how many bytes of plaintext those were."""
        count = 0
        while self._backlog and self._outgoing.pending < TLS_BUFFER_BYTES:
            data = self._backlog.popleft()
            written = self._tls.write(data[: TLS_BUFFER_BYTES - self._outgoing.pending])
            if written < len(data):
                self._backlog.appendleft(data[written:])
            count += written
        return count

    def _send(self) -> None:
        if self._outgoing.pending:
            self._raw.write(self._outgoing.read())

    def _tell(self) -> None:
        stalled = bool(self._backlog) or not self._taken
        if stalled != self._stalled:
            self._stalled = stalled
            (self._connection.pause_writing if stalled else self._connection.resume_writing)()

    def _say_goodbye(self) -> None:
        if self._raw.is_closing():
            return
        if not self._handshaking:
            with contextlib.suppress(ssl.SSLError):  # SSLWantReadError: the client's own goodbye is not awaited
                self._tls.unwrap()
            self._send()
        self._raw.close()


def _reason(error: ssl.SSLError) -> str:
    """Say why a client was not let in, or what broke."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _REASONS.get(error.verify_code, f"its certificate is not accepted: {error.verify_message}")
    if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "it has no certificate"
    what = (error.reason or "unknown error").lower().replace("_", " ")
    return f"it broke TLS off ({what})" if " alert " in f" {what} " else f"TLS failed ({what})"
