"""The handshake phase without I/O: bytes in, bytes out, and in the end an agreement.

    client            server
                 <--  greeting                      (FIXED_NEWSTYLE, NO_ZEROES)
    client flags -->                                 state FLAGS
    option       -->                                 state OPTIONS, repeated
                 <--  replies, the last one ACK or an error
    GO / EXPORT_NAME / ABORT                         state AGREED or ENDED
    STARTTLS                                         state STARTTLS, and after TLS options again

With TLS (FORCEDTLS in the specification), nothing but STARTTLS and ABORT is answered before TLS is established, and of
what was said before, the client flags alone count afterwards.

An export is asked for by its name, or by NAME@USER: on behalf of a user, for those who may.

An option that the server does not know, or whose data is malformed, gets the protocol's error reply and the
talk goes on; what breaks the framing (bad magic, unknown client flags, data longer than any valid option) ends
it, since nothing after it can be trusted. So do too many options. Not handled here: time. A client that never finishes
is the transport's business.

Source: doc/proto.md, "Handshake phase", "TLS versions", "Option types", "Metadata querying".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from lockstep.nbd import wire
from lockstep.nbd.identity import is_user_name
from lockstep.nbd.wire import Info, Option, Rep

# The longest valid option is a meta-context query: a name and some queries, all of them strings.
MAX_OPTION_BYTES: Final = 64 << 10
# Several times what any client asks. Nobody else is served while options are answered, and who asks for ever need not
# have shown who it is.
MAX_OPTIONS: Final = 64


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
    on_behalf_of: str | None = None  # the user that was asked for as NAME@USER


class Security(Enum):
    """What TLS means for a handshake."""

    NONE = auto()  # this server has no TLS, or not here
    AWAITED = auto()
    ESTABLISHED = auto()


class State(Enum):
    """Where the handshake stands; AGREED, ENDED and STARTTLS are final."""

    FLAGS = auto()
    OPTIONS = auto()
    AGREED = auto()
    ENDED = auto()
    STARTTLS = auto()


class _Refused(Exception):
    """An option gets an error reply; ERR_INVALID where its data is not laid out as the specification says."""

    def __init__(self, why: str, kind: Rep = Rep.ERR_INVALID) -> None:
        super().__init__(why)
        self.kind = kind


class Negotiation:
    """One client's handshake.

    Call `greeting()` once, then `receive()` with whatever bytes have arrived, as often as some arrive. It
    returns how many of them it took and what to send. Look at `state` after each call: AGREED hands over to
    the transmission phase, with `agreement` set, and leaves the bytes that follow untouched; ENDED means close
    the connection after sending, with the reason in `ended_because` when it was the client's fault; STARTTLS
    means establish TLS after sending, with nothing received before, and go on with `inside_tls()`.
    """

    def __init__(
        self,
        exports: Mapping[str, ExportInfo],
        default: str,
        security: Security = Security.NONE,
        *,
        for_others: bool = False,
    ) -> None:
        """Offer `exports` by name; the empty name stands for `default`; `for_others` allows NAME@USER."""
        self.state = State.FLAGS
        self.agreement: Agreement | None = None
        self.ended_because: str | None = None
        self._exports = exports
        self._default = default
        self._security = security
        self._for_others = for_others
        self._options = 0
        self._no_zeroes = False
        self._structured = False
        self._allocation_of: tuple[str, str | None] | None = None  # the export, and on behalf of whom

    def inside_tls(self) -> "Negotiation":
        """Return the handshake that follows once TLS is established."""
        fresh = Negotiation(self._exports, self._default, Security.ESTABLISHED)
        fresh.state, fresh._no_zeroes = State.OPTIONS, self._no_zeroes
        return fresh

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
        self._options += 1
        if self._options > MAX_OPTIONS:
            return self._end(len(view), f"more than {MAX_OPTIONS} options")
        data = bytes(view[wire.OPTION.size : used])
        answers = _ANSWERS_BEFORE_TLS if self._security is Security.AWAITED else _ANSWERS
        answer = answers.get(option, Negotiation._unknown)
        try:
            return used, answer(self, option, data)
        except _Refused as refused:
            return used, _reply(option, refused.kind, str(refused).encode())

    # Answers to options: the bytes to send.

    def _unknown(self, _option: int, _data: bytes) -> bytes:
        if self._security is Security.AWAITED:
            raise _Refused("TLS is required here: begin with STARTTLS", Rep.ERR_TLS_REQD)
        raise _Refused("Lockstep does not know this option", Rep.ERR_UNSUP)

    def _start_tls(self, option: int, data: bytes) -> bytes:
        _must_be_empty(data)
        if self._security is Security.ESTABLISHED:
            raise _Refused("TLS is established already")
        if self._security is Security.NONE:
            raise _Refused("there is no TLS here", Rep.ERR_POLICY)
        self.state = State.STARTTLS
        return _reply(option, Rep.ACK)

    def _export_name(self, _option: int, data: bytes) -> bytes:
        # This option has no error reply: "the server MUST terminate the session".
        if self._security is Security.AWAITED:
            return self._end(0, "it asked for an export before TLS")[1]
        try:
            export, user = self._find(data)
        except _Refused as refused:
            return self._end(0, str(refused))[1]
        self._agree(export.name, user)
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
            raise _Refused("the number of information requests does not match the option's length")
        export, user = self._find(name)
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
            self._agree(export.name, user)
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
            raise _Refused("meta contexts need structured replies, which were not negotiated")
        name, rest = _string(data)
        queries = _queries(rest)
        export, user = self._find(name)
        if selecting:
            found = wire.BASE_ALLOCATION in queries
        else:
            found = not queries or bool({b"base:", wire.BASE_ALLOCATION} & set(queries))
        if not found:
            return _reply(option, Rep.ACK)
        if selecting:
            self._allocation_of = export.name, user
        context = wire.U32.pack(wire.BASE_ALLOCATION_ID if selecting else 0) + wire.BASE_ALLOCATION
        return _reply(option, Rep.META_CONTEXT, context) + _reply(option, Rep.ACK)

    def _find(self, wanted: bytes) -> tuple[ExportInfo, str | None]:
        """Return the export of this name, and the user on whose behalf it is asked for, if it says NAME@USER."""
        try:
            name, at, user = wanted.decode().partition("@")
        except UnicodeDecodeError:
            raise _Refused("the export name is not UTF-8", Rep.ERR_UNKNOWN) from None
        if at and not self._for_others:
            raise _Refused("only root on this machine may act on behalf of a user", Rep.ERR_POLICY)
        if at and not is_user_name(user):
            raise _Refused("what follows the @ cannot be a user")
        export = self._exports.get(name or self._default)
        if export is None:
            raise _Refused("no export has this name", Rep.ERR_UNKNOWN)
        return export, user if at else None

    def _transmission_flags(self, export: ExportInfo) -> int:
        return export.flags | (wire.SEND_DF if self._structured else 0)

    def _agree(self, name: str, user: str | None) -> None:
        self.state = State.AGREED
        self.agreement = Agreement(name, self._structured, self._allocation_of == (name, user), user)

    def _end(self, used: int, because: str) -> tuple[int, bytes]:
        self.state = State.ENDED
        self.ended_because = because
        return used, b""


_STEPS: Final[dict[State, Callable[[Negotiation, memoryview], tuple[int, bytes] | None]]] = {
    State.FLAGS: Negotiation._flags,
    State.OPTIONS: Negotiation._option,
}

_Answer = Callable[[Negotiation, int, bytes], bytes]

_ANSWERS: Final[dict[int, _Answer]] = {
    Option.EXPORT_NAME: Negotiation._export_name,
    Option.ABORT: Negotiation._abort,
    Option.LIST: Negotiation._list,
    Option.STARTTLS: Negotiation._start_tls,
    Option.INFO: Negotiation._info,
    Option.GO: Negotiation._info,
    Option.STRUCTURED_REPLY: Negotiation._structured_reply,
    Option.LIST_META_CONTEXT: Negotiation._meta_context,
    Option.SET_META_CONTEXT: Negotiation._meta_context,
}

_ANSWERS_BEFORE_TLS: Final[dict[int, _Answer]] = {
    option: _ANSWERS[option] for option in (Option.EXPORT_NAME, Option.ABORT, Option.STARTTLS)
}


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return wire.OPTION_REPLY.pack(wire.REPLY_MAGIC, option, kind, len(data)) + data


def _must_be_empty(data: bytes) -> None:
    if data:
        raise _Refused("this option takes no data")


def _string(data: bytes | memoryview) -> tuple[bytes, memoryview]:
    """Split a 32-bit length and so many bytes from the front: (string, rest)."""
    data = memoryview(data)  # so that what follows is not copied for each of thousands of strings
    if len(data) < 4:
        raise _Refused("the option ends within a length")
    end = 4 + int(wire.U32.unpack_from(data)[0])
    if end > len(data):
        raise _Refused("a string is longer than the option's data")
    return bytes(data[4:end]), data[end:]


def _queries(data: memoryview) -> list[bytes]:
    if len(data) < 4:
        raise _Refused("the option ends within the number of queries")
    (count,) = wire.U32.unpack_from(data)
    rest = data[4:]
    queries = []
    for _ in range(count):
        query, rest = _string(rest)
        queries.append(query)
    if rest:
        raise _Refused("data follows the last query")
    return queries
