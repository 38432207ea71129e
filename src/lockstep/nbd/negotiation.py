"""The handshake phase without I/O: bytes in, bytes out, and in the end an agreement.

    client            server
                 <--  greeting                      (FIXED_NEWSTYLE, NO_ZEROES)
    client flags -->                                 state FLAGS
    option       -->                                 state OPTIONS, repeated
                 <--  replies, the last one ACK or an error
    GO / EXPORT_NAME / ABORT                         state AGREED or ENDED

An option that the server does not know, or whose data is malformed, gets the protocol's error reply and the
talk goes on; what breaks the framing (bad magic, unknown client flags, data longer than any valid option) ends
it, since nothing after it can be trusted. Not handled here: time. A client that never finishes is the
transport's business.

Source: doc/proto.md, "Handshake phase", "Option types", "Metadata querying".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from lockstep.nbd import wire
from lockstep.nbd.wire import Info, Option, Rep

# The longest valid option is a meta-context query: a name and some queries, all of them strings.
MAX_OPTION_BYTES: Final = 64 << 10


@dataclass(frozen=True)
class ExportInfo:
    """What a client is told of an export: size in bytes, transmission flags, a line for humans."""

    name: str
    size_bytes: int
    flags: int
    description: str = ""


@dataclass(frozen=True)
class Agreement:
    """What the transmission phase needs to know of the handshake."""

    export: str
    structured: bool
    allocation: bool  # base:allocation was selected for this export


class State(Enum):
    """Where the handshake stands; AGREED and ENDED are final."""

    FLAGS = auto()
    OPTIONS = auto()
    AGREED = auto()
    ENDED = auto()


class _Malformed(Exception):
    """The data of an option does not have the layout that the specification gives it."""


class Negotiation:
    """One client's handshake.

    Call `greeting()` once, then `receive()` with whatever bytes have arrived, as often as some arrive. It
    returns how many of them it took and what to send. Look at `state` after each call: AGREED hands over to
    the transmission phase, with `agreement` set, and leaves the bytes that follow untouched; ENDED means close
    the connection after sending, with the reason in `ended_because` when it was the client's fault.
    """

    def __init__(self, exports: Mapping[str, ExportInfo], default: str) -> None:
        """Offer `exports` by name; the empty name stands for `default`."""
        self.state = State.FLAGS
        self.agreement: Agreement | None = None
        self.ended_because: str | None = None
        self._exports = exports
        self._default = default
        self._no_zeroes = False
        self._structured = False
        self._allocation_of: str | None = None

    @staticmethod
    def greeting() -> bytes:
        """The server's first words."""
        return wire.GREETING.pack(wire.NBDMAGIC, wire.IHAVEOPT, wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES)

    def receive(self, data: bytes | bytearray | memoryview) -> tuple[int, bytes]:
        """Take complete messages from the front of `data`; return (bytes taken, bytes to send)."""
        taken = 0
        out: list[bytes] = []
        view = memoryview(data)
        while self.state in _STEPS:
            step = _STEPS[self.state](self, view[taken:])
            if step is None:
                break
            used, reply = step
            taken += used
            out.append(reply)
        return taken, b"".join(out)

    # Each step takes one message from the front, or returns None until it has arrived whole.

    def _flags(self, view: memoryview) -> tuple[int, bytes] | None:
        if len(view) < wire.CLIENT_FLAGS.size:
            return None
        (flags,) = wire.CLIENT_FLAGS.unpack_from(view)
        if flags & ~(wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES):
            return self._end(len(view), f"unknown client flags {flags:#x}")
        self._no_zeroes = bool(flags & wire.FLAG_NO_ZEROES)
        self.state = State.OPTIONS
        return wire.CLIENT_FLAGS.size, b""

    def _option(self, view: memoryview) -> tuple[int, bytes] | None:
        if len(view) < wire.OPTION.size:
            return None
        magic, option, length = wire.OPTION.unpack_from(view)
        if magic != wire.IHAVEOPT:
            return self._end(len(view), "bad option magic")
        if length > MAX_OPTION_BYTES:
            return self._end(len(view), f"option {option} with {length} bytes of data")
        used = wire.OPTION.size + length
        if len(view) < used:
            return None
        data = bytes(view[wire.OPTION.size : used])
        answer = _ANSWERS.get(option)
        if answer is None:
            return used, _reply(option, Rep.ERR_UNSUP, b"Lockstep does not know this option")
        try:
            return used, answer(self, option, data)
        except _Malformed as error:
            return used, _reply(option, Rep.ERR_INVALID, str(error).encode())

    # Answers to options: the bytes to send.

    def _export_name(self, _option: int, data: bytes) -> bytes:
        export = self._find(data)
        if export is None:
            # This option has no error reply: "the server MUST terminate the session".
            return self._end(0, "unknown export name")[1]
        self._agree(export.name)
        answer = wire.EXPORT_NAME_REPLY.pack(export.size_bytes, self._transmission_flags(export))
        return answer if self._no_zeroes else answer + bytes(124)

    def _abort(self, option: int, _data: bytes) -> bytes:
        self.state = State.ENDED
        return _reply(option, Rep.ACK)

    def _list(self, option: int, data: bytes) -> bytes:
        _must_be_empty(data)
        names = (name.encode() for name in self._exports)
        rows = (_reply(option, Rep.SERVER, wire.U32.pack(len(name)) + name) for name in names)
        return b"".join(rows) + _reply(option, Rep.ACK)

    def _info(self, option: int, data: bytes) -> bytes:
        name, rest = _string(data)
        if len(rest) < 2 or len(rest) != 2 + 2 * wire.U16.unpack_from(rest)[0]:
            raise _Malformed("the number of information requests does not match the option's length")
        export = self._find(name)
        if export is None:
            return _reply(option, Rep.ERR_UNKNOWN, b"no export has this name")
        flags = self._transmission_flags(export)
        asked = {kind for (kind,) in wire.U16.iter_unpack(rest[2:])}
        infos = [wire.INFO_EXPORT.pack(Info.EXPORT, export.size_bytes, flags)]
        infos.append(
            wire.INFO_BLOCK_SIZE.pack(
                Info.BLOCK_SIZE, wire.MIN_BLOCK_BYTES, wire.PREFERRED_BLOCK_BYTES, wire.MAX_PAYLOAD_BYTES
            )
        )
        for kind, text in ((Info.NAME, export.name), (Info.DESCRIPTION, export.description)):
            if kind in asked and text:
                infos.append(wire.U16.pack(kind) + text.encode())
        if option == Option.GO:
            self._agree(export.name)
        return b"".join(_reply(option, Rep.INFO, info) for info in infos) + _reply(option, Rep.ACK)

    def _structured_reply(self, option: int, data: bytes) -> bytes:
        _must_be_empty(data)
        self._structured = True
        return _reply(option, Rep.ACK)

    def _meta_context(self, option: int, data: bytes) -> bytes:
        selecting = option == Option.SET_META_CONTEXT
        if selecting:
            self._allocation_of = None  # "replaces all previously-set ... (including when this command fails)"
        if not self._structured:
            raise _Malformed("meta contexts need structured replies, which were not negotiated")
        name, rest = _string(data)
        queries = _queries(rest)
        export = self._find(name)
        if export is None:
            return _reply(option, Rep.ERR_UNKNOWN, b"no export has this name")
        if selecting:
            found = wire.BASE_ALLOCATION in queries
        else:
            found = not queries or bool({b"base:", wire.BASE_ALLOCATION} & set(queries))
        if not found:
            return _reply(option, Rep.ACK)
        if selecting:
            self._allocation_of = export.name
        context = wire.U32.pack(wire.BASE_ALLOCATION_ID if selecting else 0) + wire.BASE_ALLOCATION
        return _reply(option, Rep.META_CONTEXT, context) + _reply(option, Rep.ACK)

    def _find(self, name: bytes) -> ExportInfo | None:
        if not name:
            return self._exports.get(self._default)
        try:
            return self._exports.get(name.decode())
        except UnicodeDecodeError:
            return None

    def _transmission_flags(self, export: ExportInfo) -> int:
        return export.flags | (wire.SEND_DF if self._structured else 0)

    def _agree(self, name: str) -> None:
        self.state = State.AGREED
        self.agreement = Agreement(name, self._structured, self._allocation_of == name)

    def _end(self, used: int, because: str) -> tuple[int, bytes]:
        self.state = State.ENDED
        self.ended_because = because
        return used, b""


_STEPS: Final[dict[State, Callable[[Negotiation, memoryview], tuple[int, bytes] | None]]] = {
    State.FLAGS: Negotiation._flags,
    State.OPTIONS: Negotiation._option,
}

_ANSWERS: Final[dict[int, Callable[[Negotiation, int, bytes], bytes]]] = {
    Option.EXPORT_NAME: Negotiation._export_name,
    Option.ABORT: Negotiation._abort,
    Option.LIST: Negotiation._list,
    Option.INFO: Negotiation._info,
    Option.GO: Negotiation._info,
    Option.STRUCTURED_REPLY: Negotiation._structured_reply,
    Option.LIST_META_CONTEXT: Negotiation._meta_context,
    Option.SET_META_CONTEXT: Negotiation._meta_context,
}


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return wire.OPTION_REPLY.pack(wire.REPLY_MAGIC, option, kind, len(data)) + data


def _must_be_empty(data: bytes) -> None:
    if data:
        raise _Malformed("this option takes no data")


def _string(data: bytes) -> tuple[bytes, bytes]:
    """Split a 32-bit length and so many bytes from the front: (string, rest)."""
    if len(data) < 4:
        raise _Malformed("the option ends within a length")
    end = 4 + int(wire.U32.unpack_from(data)[0])
    if end > len(data):
        raise _Malformed("a string is longer than the option's data")
    return data[4:end], data[end:]


def _queries(data: bytes) -> list[bytes]:
    if len(data) < 4:
        raise _Malformed("the option ends within the number of queries")
    (count,) = wire.U32.unpack_from(data)
    rest = data[4:]
    queries = []
    for _ in range(count):
        query, rest = _string(rest)
        queries.append(query)
    if rest:
        raise _Malformed("data follows the last query")
    return queries
