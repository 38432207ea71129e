"""The transmission phase without I/O: is a request valid, and what do replies look like.

A request is gated once, by `refusal`, before anything else looks at it; below that its offset, length and flags are
facts. Reads are answered in the form that was negotiated, everything else with a simple reply in both
forms, which "Structured reply message" allows for requests without payload in the reply.

Source: doc/proto.md, "Transmission phase", "Request types", "Error values".
"""

import errno
from collections.abc import Iterable, Sequence
from typing import Final

from lockstep.nbd import wire
from lockstep.nbd.negotiation import Agreement, ExportInfo

# "Error values" asks for the first two; a disk that may not be written is the nearest to a refused permission.
_ALIASES: Final = {
    errno.EDQUOT: wire.ENOSPC,
    errno.EFBIG: wire.ENOSPC,
    errno.EACCES: wire.EPERM,
    errno.EROFS: wire.EPERM,
}


def refusal(command: int, flags: int, offset: int, length: int, export: ExportInfo, agreement: Agreement) -> int:
    """Return the error that a request gets without being carried out, or 0 when it is valid."""
    if command == wire.CMD_DISC:
        return 0  # whatever its fields: "There is no reply to an NBD_CMD_DISC" that could carry an error
    rules = wire.COMMANDS.get(command)
    if rules is None:
        return wire.EINVAL
    _name, known_flags, writes, reserved_range, limit_bytes, beyond_end = rules
    if flags & ~known_flags:
        return wire.EINVAL
    if writes and export.flags & wire.READ_ONLY:
        return wire.EPERM
    if reserved_range:
        return wire.EINVAL if offset or length else 0
    if length > limit_bytes:
        return wire.EOVERFLOW if command == wire.CMD_READ else wire.EINVAL
    if offset + length > export.size_bytes:
        return beyond_end
    if command == wire.CMD_BLOCK_STATUS and not (agreement.allocation and length):
        return wire.EINVAL
    if flags & wire.FLAG_DF and not agreement.structured:
        return wire.EINVAL
    # "MUST fail quickly" unless faster than a write: with a mirror it never is, and few targets tell beforehand.
    return wire.ENOTSUP if flags & wire.FLAG_FAST_ZERO else 0


def wire_error(number: int | None) -> int:
    """Map an errno to one that the protocol allows: EIO for whatever it has no name for."""
    if number in wire.WIRE_ERRORS:
        return number
    return _ALIASES.get(number or 0, wire.EIO)


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """Any outcome without data, or the header of a successful read."""
    return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, cookie)


def data_header(cookie: int, offset: int, length: int, *, structured: bool) -> bytes:
    """What precedes the `length` bytes of a successful read; nothing follows them."""
    if not structured:
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie)
    return wire.OFFSET_DATA.pack(
        wire.STRUCTURED_REPLY_MAGIC, wire.CHUNK_DONE, wire.CHUNK_OFFSET_DATA, cookie, length + 8, offset
    )


def empty_read(cookie: int, *, structured: bool) -> bytes:
    """A read of no bytes succeeded: a data chunk "MUST describe at least one byte", so there is none."""
    if not structured:
        return simple_reply(cookie)
    return wire.CHUNK.pack(wire.STRUCTURED_REPLY_MAGIC, wire.CHUNK_DONE, wire.CHUNK_NONE, cookie, 0)


def error_reply(command: int, cookie: int, error: int, *, structured: bool) -> bytes:
    """A failed request; a read and a status query must fail in the form in which they would have succeeded."""
    if structured and command in (wire.CMD_READ, wire.CMD_BLOCK_STATUS):
        return wire.ERROR_CHUNK.pack(
            wire.STRUCTURED_REPLY_MAGIC, wire.CHUNK_DONE, wire.CHUNK_ERROR, cookie, 6, error, 0
        )
    return simple_reply(cookie, error)


def status_reply(cookie: int, extents: Sequence[tuple[int, int]]) -> bytes:
    """Block status: `extents` are (length in bytes, STATE_ flags), in order from the request's offset."""
    return wire.STATUS_CHUNK.pack(
        wire.STRUCTURED_REPLY_MAGIC,
        wire.CHUNK_DONE,
        wire.CHUNK_BLOCK_STATUS,
        cookie,
        4 + wire.STATUS_EXTENT.size * len(extents),
        wire.BASE_ALLOCATION_ID,
    ) + b"".join(_pack_extents(extents))


def _pack_extents(extents: Iterable[tuple[int, int]]) -> Iterable[bytes]:
    return (wire.STATUS_EXTENT.pack(length, flags) for length, flags in extents)
