"""Memory for requests too large, or too slow, to stay in a connection's own receive buffer.

Pools serve all connections, so that the sum is bounded however many clients send 32 MiB writes at once, and no
connection may hold more than a share of any. There are three for payloads. Small and large blocks for what waits for a
client, to send the rest of a payload or to take a reply, are apart: who needs one may wait until those before it in the
queue were served, or cut off because they stalled. Writes that have arrived whole wait for nobody but the disks, and
have a pool of their own: no number of clients that stall delays them. A fourth is for the receive buffers of who sends
much at once; nobody waits for one.

A request takes its whole payload before its first byte is received: no set of half-received requests can then wait
for each other. Freed blocks are kept for reuse, since the page faults of fresh memory cost as much as encrypting it.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Final

from lockstep.buffers import page_aligned
from lockstep.nbd.wire import MAX_PAYLOAD_BYTES

DEFAULT_LIMIT_BYTES: Final = 8 * MAX_PAYLOAD_BYTES
DEFAULT_SHARE_BYTES: Final = 2 * MAX_PAYLOAD_BYTES
SMALL_BLOCK_BYTES: Final = 1 << 20
SMALL_LIMIT_BYTES: Final = 64 << 20
SMALL_SHARE_BYTES: Final = 8 << 20
KEEP_BYTES: Final = 32 << 20
SMALLEST_BYTES: Final = 64 << 10


def block_bytes(length: int) -> int:
    """Return the size of the block that `length` bytes get."""
    return max(SMALLEST_BYTES, 1 << (length - 1).bit_length())


class Block:
    """A piece of memory, and the pool that it goes back to."""

    __slots__ = ("memory", "pool")

    def __init__(self, memory: memoryview, pool: "PayloadPool") -> None:
        self.memory = memory
        self.pool = pool


class PayloadPool:
    """At most `limit_bytes` of blocks, `share_bytes` for one connection; the loop's thread alone may call it."""

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES, share_bytes: int = DEFAULT_SHARE_BYTES) -> None:
        self.share_bytes = share_bytes
        self._limit_bytes = max(limit_bytes, MAX_PAYLOAD_BYTES)
        self._used_bytes = 0
        self._kept_bytes = 0
        self._kept: dict[int, list[Block]] = {}
        self._waiting: deque[Callable[[], None]] = deque()

    @property
    def contended(self) -> bool:
        """Whether somebody waits for memory that others hold."""
        return bool(self._waiting)

    def take(self, length: int, *, beyond: bool = False) -> Block | None:
        """Return a block of at least `length` bytes, at most MAX_PAYLOAD_BYTES; None when there is no room now.

        `beyond` takes it all the same.
        """
        size = block_bytes(length)
        if self._used_bytes + size > self._limit_bytes and not beyond:
            return None
        kept = self._kept.get(size)
        if kept:
            block = kept.pop()
            self._kept_bytes -= size
        else:
            block = Block(page_aligned(size), self)
        self._used_bytes += size
        return block

    def give(self, block: Block) -> None:
        """Hand back a block that `take` returned; those who wait are told, in the order in which they came."""
        size = len(block.memory)
        self._used_bytes -= size
        if self._kept_bytes + size <= KEEP_BYTES:
            self._kept.setdefault(size, []).append(block)
            self._kept_bytes += size
        waiting, self._waiting = self._waiting, deque()
        for retry in waiting:
            retry()

    def wait(self, retry: Callable[[], None]) -> None:
        """Have `retry` called once, when there may be room again."""
        self._waiting.append(retry)

    def forget(self, retry: Callable[[], None]) -> None:
        """Cancel a `wait`."""
        if retry in self._waiting:
            self._waiting.remove(retry)


class Share:
    """What one connection holds of the pools. `retry` is called when it may be given what it was refused."""

    def __init__(self, retry: Callable[[], None]) -> None:
        self._held_bytes: defaultdict[PayloadPool, int] = defaultdict(int)
        self._retry = retry
        self._awaited: PayloadPool | None = None  # where there is no room: others hold it
        self._sated = False  # holds its share

    @property
    def refused(self) -> bool:
        """Whether it was refused a block, and there is no more room since."""
        return self._sated or self._awaited is not None

    def take(self, pool: PayloadPool, length: int, *, beyond: bool = False) -> Block | None:
        """Like `PayloadPool.take`, and not more than a connection may have; `beyond` takes it all the same."""
        held = self._held_bytes[pool]
        if held and held + block_bytes(length) > pool.share_bytes and not beyond:
            self._sated = True
            return None
        block = pool.take(length, beyond=beyond)
        if block is not None:
            self._held_bytes[pool] += len(block.memory)
        elif self._awaited is None:
            self._awaited = pool
            pool.wait(self._has_room)
        return block

    def give(self, block: Block) -> None:
        """Hand a block back. Whoever calls this serves on afterwards, so being sated ends here."""
        self._held_bytes[block.pool] -= len(block.memory)
        self._sated = False
        block.pool.give(block)

    def forget(self) -> None:
        """Wait for room no more."""
        if self._awaited is not None:
            self._awaited.forget(self._has_room)

    def _has_room(self) -> None:
        self._awaited = None
        self._retry()
