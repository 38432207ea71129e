"""A client in the raw: what fio would not do. Old-style negotiation by name, then requests as they come."""

import socket
from struct import Struct
from urllib.parse import unquote, urlsplit

from benchmarks.processes import BenchmarkError

READ, WRITE = 0, 1

_OPTION = Struct(">IQII")  # client flags (fixed newstyle, no zeroes), IHAVEOPT, EXPORT_NAME, length of the name
_REQUEST = Struct(">IHHQQI")
_REPLY = Struct(">IIQ")
_GREETING_BYTES, _EXPORT_BYTES = 18, 10


class RawClient:
    """One connection to the export at `uri`, whose path is the export's name."""

    def __init__(self, uri: str, timeout_s: float = 60) -> None:
        parts = urlsplit(uri)
        name = unquote(parts.path.lstrip("/")).encode()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout_s)
        self.socket.connect(unquote(parts.query.removeprefix("socket=")))
        self._receive(_GREETING_BYTES)
        self.socket.sendall(_OPTION.pack(3, 0x49484156454F5054, 1, len(name)) + name)
        self._receive(_EXPORT_BYTES)

    def request(self, kind: int, offset: int, length: int) -> bytes:
        """The header of a request."""
        return _REQUEST.pack(0x25609513, 0, kind, 0, offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Write, and wait for the answer."""
        self.socket.sendall(self.request(WRITE, offset, len(data)) + data)
        _magic, error, _cookie = _REPLY.unpack(self._receive(_REPLY.size))
        if error:
            raise BenchmarkError(f"a write at {offset} was answered with error {error}")

    def _receive(self, length: int) -> bytes:
        received = b""
        while len(received) < length:
            part = self.socket.recv(length - len(received))
            if not part:
                raise BenchmarkError("the server closed the connection")
            received += part
        return received

    def close(self) -> None:
        """Leave without a word."""
        self.socket.close()
