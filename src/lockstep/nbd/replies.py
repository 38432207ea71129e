"""What goes back to one client: gathered, sent together, and kept until the socket has taken it.

The socket is asked once for all that was gathered. What it does not take at once pauses the connection, which serves
nothing more until then: so what waits here is one batch of replies, and blocks that count against the client's share.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from lockstep.nbd import wire
from lockstep.nbd.payload import Block, Share
from lockstep.nbd.transmission import error_reply

# Replies leave after this much data has moved, in either direction: what has arrived together is answered together,
# since a client that is woken up costs as much as a write of 4 KiB.
REPLY_BATCH_BYTES: Final = 256 << 10


class Replies:
    """The replies to one client. `transport` is None when there is nobody any more to send them to."""

    def __init__(self, share: Share, clock_s: Callable[[], float]) -> None:
        """`clock_s` is the one by which clients stall."""
        self.transport: asyncio.Transport | None = None
        self.structured = False
        self.header_bytes = wire.SIMPLE_REPLY.size  # what precedes the data of a read
        self.batch_bytes = 0  # moved, in either direction, since replies were last sent
        self.writable = True  # the client takes them
        self._share = share
        self._clock_s = clock_s
        self._gathered: list[bytes | bytearray] = []
        self._undrained: list[Block] = []  # whose data the socket has not taken yet
        self._undrained_bytes = 0  # of these
        self._undrained_since_s = 0.0

    def agree(self, *, structured: bool) -> None:
        """Have reads answered in the form that was negotiated."""
        self.structured = structured
        self.header_bytes = (wire.OFFSET_DATA if structured else wire.SIMPLE_REPLY).size

    def add(self, reply: bytes | bytearray) -> None:
        """Have this sent with the next `send`."""
        self._gathered.append(reply)

    def refuse(self, command: int, cookie: int, error: int) -> None:
        """Have the client told of an error."""
        self.add(error_reply(command, cookie, error, structured=self.structured))

    def send(self, data: memoryview | None = None) -> None:
        """Send what has been gathered, then `data`; one system call."""
        gathered, self._gathered, self.batch_bytes = self._gathered, [], 0
        if self.transport is None:
            return
        if data is not None:
            self.transport.writelines([*gathered, data])
        elif len(gathered) == 1:
            self.transport.write(gathered[0])
        elif gathered:
            self.transport.write(b"".join(gathered))

    def send_block(self, block: Block, length: int) -> None:
        """Send what has been gathered, and so much of a block, which is handed back when the socket has taken it."""
        self.send(block.memory[:length])
        if self.writable or self.transport is None:
            self._share.give(block)
        else:
            if not self._undrained:
                self._undrained_since_s, self._undrained_bytes = self._clock_s(), 0
            self._undrained.append(block)
            self._undrained_bytes += length

    def drained(self) -> None:
        """The socket has taken everything, or there is none any more."""
        self.writable = True
        blocks, self._undrained = self._undrained, []
        for block in blocks:
            self._share.give(block)

    def holding(self) -> tuple[bool, float, int]:
        """Whether they hold memory that others wait for, since when, and how much the client has taken since then."""
        if self.transport is None or not self._undrained:
            return False, 0.0, 0
        left = self.transport.get_write_buffer_size()
        contended = any(block.pool.contended for block in self._undrained)
        return contended, self._undrained_since_s, max(0, self._undrained_bytes - left)
