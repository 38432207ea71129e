"""Requests that are counted by the hundred thousand: runs of plain writes, found and answered by one loop each.

A run is an array('Q') with four numbers for each write: offset and length in bytes, where its payload begins in the
buffer, and the cookie in the byte order of the wire.

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
_pack_reply: Final = Struct(">II8s").pack


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


try:
    from lockstep.nbd import _frames as _native
except ImportError:
    find_writes = _find_writes
    pack_replies = _pack_replies
else:
    find_writes = _native.find_writes
    pack_replies = _native.pack_replies
