"""Requests that are counted by the hundred thousand: runs of plain reads or writes, each found and answered at once.

A run is an array('Q') with four numbers for each request: offset and length in bytes, where its data begins in the
buffer, and the cookie in the byte order of the wire. The buffer of writes is what was received; that of reads is what
will be sent, headers and data in turn.

These are the inner loops, in Python; `_frames.pyx` has the same natively and is used where it was built.
"""

import sys
from array import array
from struct import Struct
from typing import TYPE_CHECKING, Final

from lockstep.nbd import wire

if TYPE_CHECKING:
    from typing_extensions import Buffer

WORDS: Final = 4
MAX_WRITES: Final = 64

_PLAIN_WRITE: Final = wire.REQUEST_MAGIC << 32 | wire.CMD_WRITE
_unpack: Final = Struct(">Q8sQI").unpack_from  # magic, flags and type at one look; cookie, offset, length
_PLAIN_READ: Final = wire.REQUEST_MAGIC << 32 | wire.CMD_READ
_pack_reply: Final = Struct(">II8s").pack
_pack_simple_into: Final = Struct(">II8s").pack_into
_pack_data_into: Final = Struct(">IHH8sIQ").pack_into


def new_run() -> "array[int]":
    """Return a run with room for MAX_WRITES writes."""
    return array("Q", bytes(8 * WORDS * MAX_WRITES))


def run_of(offset: int, length: int) -> "array[int]":
    """Return a run of one write, whose payload is at the beginning of its buffer."""
    return array("Q", (offset, length, 0, 0))


def rest_of(run: "array[int]", first: int, count: int) -> "array[int]":
    """Return the writes from `first` up to `count` as a run of their own."""
    return run[WORDS * first : WORDS * count]


def end_of(run: "array[int]", count: int) -> int:
    """Return where the payload of the last of `count` writes ends in the buffer."""
    last = WORDS * (count - 1)
    return run[last + 1] + run[last + 2]


def rebase(run: "array[int]", count: int, by: int) -> None:
    """The buffer's content has moved `by` bytes."""
    for at in range(2, WORDS * count, WORDS):
        run[at] += by


def cookie_of(run: "array[int]", at: int) -> int:
    """Return the cookie of a write, as a number."""
    return int.from_bytes(run[WORDS * at + 3].to_bytes(8, sys.byteorder), "big")


def _find_writes(buffer: "Buffer", start: int, end: int, enough: int, writable_bytes: int, run: "array[int]", /) -> int:
    """Put the plain writes at the front of buffer[start:end] into `run`; return how many there are.

    It ends before a request that is anything else, that has not arrived whole, or that reaches beyond
    `writable_bytes`; when `run` is full; and when `enough` bytes have been looked at.
    """
    found, at = 0, start
    while found < len(run) // WORDS and end - at >= wire.REQUEST_BYTES and at - start < enough:
        kind, cookie, offset, length = _unpack(buffer, at)
        position = at + wire.REQUEST_BYTES
        if kind != _PLAIN_WRITE or not 0 < length <= end - position or offset + length > writable_bytes:
            break
        numbers = (offset, length, position, int.from_bytes(cookie, sys.byteorder))
        run[WORDS * found : WORDS * (found + 1)] = array("Q", numbers)
        at = position + length
        found += 1
    return found


def _pack_replies(run: "array[int]", count: int, /) -> bytes:
    """Return the replies to the first `count` writes, all of which succeeded."""
    cookies = (run[WORDS * at + 3].to_bytes(8, sys.byteorder) for at in range(count))
    return b"".join(_pack_reply(wire.SIMPLE_REPLY_MAGIC, 0, cookie) for cookie in cookies)


def _find_reads(
    buffer: "Buffer",
    start: int,
    end: int,
    enough: int,
    longest: int,
    size_bytes: int,
    header_bytes: int,
    run: "array[int]",
    /,
) -> int:
    """Put the plain reads at the front of buffer[start:end] into `run`; return how many there are.

    It ends before a request that is anything else, that reaches beyond `size_bytes`, or that asks for more than
    `longest` bytes; when `run` is full; and when the replies, each after a header, come to `enough` bytes.
    """
    found, at, position = 0, start, header_bytes
    while found < len(run) // WORDS and end - at >= wire.REQUEST_BYTES and position < enough:
        kind, cookie, offset, length = _unpack(buffer, at)
        if kind != _PLAIN_READ or not 0 < length <= longest or offset + length > size_bytes:
            break
        numbers = (offset, length, position, int.from_bytes(cookie, sys.byteorder))
        run[WORDS * found : WORDS * (found + 1)] = array("Q", numbers)
        at += wire.REQUEST_BYTES
        position += length + header_bytes
        found += 1
    return found


def _pack_data_headers(replies: bytearray | memoryview, run: "array[int]", count: int, structured: bool, /) -> None:
    """Put the header before the data of each of the first `count` reads, all of which succeeded."""
    for at in range(count):
        offset, length, position, cookie = run[WORDS * at : WORDS * (at + 1)]
        name = cookie.to_bytes(8, sys.byteorder)
        if structured:
            kind = (wire.STRUCTURED_REPLY_MAGIC, wire.CHUNK_DONE, wire.CHUNK_OFFSET_DATA)
            _pack_data_into(replies, position - wire.OFFSET_DATA.size, *kind, name, length + 8, offset)
        else:
            _pack_simple_into(replies, position - wire.SIMPLE_REPLY.size, wire.SIMPLE_REPLY_MAGIC, 0, name)


try:
    from lockstep.nbd import _frames as _native
except ImportError:
    find_writes = _find_writes
    pack_replies = _pack_replies
    find_reads = _find_reads
    pack_data_headers = _pack_data_headers
else:
    find_writes = _native.find_writes
    pack_replies = _native.pack_replies
    find_reads = _native.find_reads
    pack_data_headers = _native.pack_data_headers
