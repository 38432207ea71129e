"""Requests that may block: each is a task, or a whole run of plain reads or writes one.

Their payload lies in a block of a pool, which goes back when the disk has done with it, or the socket has taken it.
However a request ends, its client gets one answer, and the connection goes on.
"""

import asyncio
import logging
from array import array
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Protocol

from lockstep.nbd import wire
from lockstep.nbd.export import Export
from lockstep.nbd.frames import (
    WORDS,
    cookie_of,
    end_of,
    pack_data_headers,
    pack_replies,
    rebase,
    rest_of,
    run_of,
)
from lockstep.nbd.payload import Block, PayloadPool, Share
from lockstep.nbd.replies import REPLY_BATCH_BYTES, Replies
from lockstep.nbd.transmission import data_header, simple_reply, status_reply, wire_error

log = logging.getLogger(__name__)

SLOW_READ_BYTES: Final = 64 << 10  # more of them together would all wait for the slowest
MAX_STATUS_EXTENTS: Final = 512
# Zeroes and discards have no payload that would bound how many there are, and each may be of 4 GiB. Those of one
# connection that overlap would only wait for each other's turn, and every later one counts all that are before it.
MAX_CLEARS: Final = 4
CLEAR_PIECE_BYTES: Final = 8 << 20  # after each of them it is seen whether anybody still waits


class Host(Protocol):
    """What slow requests need of the server."""

    export: Export
    arrived: PayloadPool  # for writes that have arrived whole, which wait for the disks alone

    def pool_for(self, length: int) -> PayloadPool:
        """Return the pool for what waits for a client: to send `length` bytes, or to take them."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task of the server's."""


class _Gathered:
    """Writes of one stretch of a buffer, and the block that their payload is to move to."""

    __slots__ = ("block", "buffer", "end", "run", "start")

    def __init__(self, block: Block, buffer: memoryview, start: int) -> None:
        self.block = block
        self.buffer = buffer
        self.start = self.end = start
        self.run = array("Q")

    def add(self, run: "array[int]", count: int, end: int) -> None:
        rebase(run, count, -self.start)
        self.run.extend(run[: WORDS * count])
        self.end = end


class Deferred:
    """The requests of one connection that are under way: `pending` of them. `ended` is called as some end."""

    def __init__(self, host: Host, share: Share, replies: Replies, ended: Callable[[], None]) -> None:
        self.pending = 0
        self._host = host
        self._export = host.export
        self._share = share
        self._replies = replies
        self._ended = ended
        self._gathered: _Gathered | None = None
        self._clears = asyncio.Semaphore(MAX_CLEARS)

    # --- runs ---

    def gather(self, user: str, buffer: memoryview, start: int, end: int, run: "array[int]", count: int) -> bool:
        """Take a run of plain writes, the first at `start`, though reads come between them and the ones before.

        False when there is no memory for it now. The buffer, in which more has arrived up to `end`, must not change
        before `begin_gathered`.
        """
        run_end = end_of(run, count)
        if self._gathered is not None and run_end - self._gathered.start > len(self._gathered.block.memory):
            self.begin_gathered(user)
        if self._gathered is None:
            wanted = max(run_end - start, min(end - start, REPLY_BATCH_BYTES))
            block = self._share.take(self._host.arrived, wanted)
            if block is None and self._export.half_done():  # once: nothing more is served before there is room
                block = self._share.take(self._host.arrived, run_end - start, beyond=True)
            if block is None:
                return False
            self._gathered = _Gathered(block, buffer, start)
        self._gathered.add(run, count, run_end)
        self.pending += count
        if run_end - self._gathered.start >= REPLY_BATCH_BYTES:
            self.begin_gathered(user)
        return True

    def begin_gathered(self, user: str) -> None:
        """Begin with the writes that were gathered, if any: their payload leaves the buffer."""
        gathered, self._gathered = self._gathered, None
        if gathered is None:
            return
        block, run, count = gathered.block, gathered.run, len(gathered.run) // WORDS
        block.memory[: gathered.end - gathered.start] = gathered.buffer[gathered.start : gathered.end]
        begun = self._begin(self._export.write, user, block.memory, run, count, durable=False)
        self._host.spawn(self._ending(count, self._write_run(begun, user, run, count, block)))

    def read_run(self, run: "array[int]", count: int) -> int:
        """Carry out reads of a run, which leaves room for the header of each; how many: 0 when there is no memory."""
        while count > 1 and end_of(run, count) > SLOW_READ_BYTES:
            count = (count + 1) // 2
        block = self._share.take(self._host.pool_for(end_of(run, count)), end_of(run, count))
        if block is None:
            return 0
        begun = self._begin(self._export.read, block.memory, run, count)
        self._defer(count, self._read_run(begun, run, count, block))
        return count

    # --- one by one ---

    def write(self, user: str, flags: int, cookie: int, offset: int, length: int, block: Block) -> None:
        """Carry out a write whose payload is at the beginning of a block."""
        run, durable = run_of(offset, length), bool(flags & wire.FLAG_FUA)
        begun = self._begin(self._export.write, user, block.memory, run, 1, durable=durable)
        self._defer(1, self._write(begun, cookie, block))

    def read(self, cookie: int, offset: int, length: int, block: Block) -> None:
        """Carry out a read into a block."""
        begun = self._begin(self._export.read, block.memory[:length], run_of(offset, length), 1)
        self._defer(1, self._read(begun, cookie, offset, length, block))

    def other(self, user: str, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        """Carry out any other command."""
        if command == wire.CMD_BLOCK_STATUS:
            limit = 1 if flags & wire.FLAG_REQ_ONE else MAX_STATUS_EXTENTS
            self._defer(1, self._status(cookie, offset, length, limit))
            return
        begun: Awaitable[None]
        if command == wire.CMD_FLUSH:
            begun = self._begin(self._export.flush)
        elif command == wire.CMD_CACHE:
            begun = self._begin(self._export.cache, offset, length)
        else:
            begun = self._clear(user, command, flags, offset, length)
        self._defer(1, self._answer(begun, command, cookie))

    async def _clear(self, user: str, command: int, flags: int, offset: int, length: int) -> None:
        """Zero, or give up, a range piece by piece, as long as there is somebody to be answered."""
        end, durable = offset + length, bool(flags & wire.FLAG_FUA)
        async with self._clears:
            while offset < end:
                if self._replies.transport is None:
                    raise OSError(wire.ESHUTDOWN, "who asked is gone")
                stop = min(end, (offset // CLEAR_PIECE_BYTES + 1) * CLEAR_PIECE_BYTES)
                count, last = stop - offset, durable and stop == end  # which makes those before it durable as well
                if command == wire.CMD_TRIM:
                    await self._export.trim(user, offset, count, durable=last)
                else:
                    allocate = bool(flags & wire.FLAG_NO_HOLE)
                    await self._export.zero(user, offset, count, durable=last, allocate=allocate)
                offset = stop

    # --- as tasks ---

    @staticmethod
    def _begin(ask: Callable[..., Awaitable[None]], *args: Any, **options: Any) -> Awaitable[None]:
        """Have the export begin now, before the task does; what cannot even be begun fails like what fails later."""
        try:
            return ask(*args, **options)
        except Exception as failure:  # noqa: BLE001 (it is raised where it is waited for)
            return _raise(failure)

    def _defer(self, count: int, work: Coroutine[Any, Any, None]) -> None:
        self.pending += count
        self._host.spawn(self._ending(count, work))

    async def _ending(self, count: int, work: Awaitable[None]) -> None:
        try:
            await work
        finally:
            self.pending -= count
            self._ended()

    async def _answer(self, begun: Awaitable[None], command: int, cookie: int) -> None:
        error = await _error_of(begun)
        if error:
            self._replies.refuse(command, cookie, error)
        else:
            self._replies.add(simple_reply(cookie))

    async def _status(self, cookie: int, offset: int, length: int, limit: int) -> None:
        found: list[tuple[int, int]] = []
        error = await _error_of(self._collect(found, offset, length, limit))
        if error:
            self._replies.refuse(wire.CMD_BLOCK_STATUS, cookie, error)
        else:
            self._replies.add(status_reply(cookie, found))

    async def _collect(self, found: list[tuple[int, int]], offset: int, length: int, limit: int) -> None:
        found.extend(await self._export.allocation(offset, length, limit))

    async def _write(self, begun: Awaitable[None], cookie: int, block: Block) -> None:
        try:
            await self._answer(begun, wire.CMD_WRITE, cookie)
        finally:
            self._share.give(block)

    async def _write_run(self, begun: Awaitable[None], user: str, run: "array[int]", count: int, block: Block) -> None:
        """Wait for a run; if it fails, carry out its writes one by one, so that each gets an answer of its own."""
        try:
            error = await _error_of(begun)
            if not error:
                self._replies.add(pack_replies(run, count))
                return
            for at in range(count):
                if count > 1 and error != wire.EPERM:  # that is about who writes, not about where
                    again = self._begin(
                        self._export.write, user, block.memory, rest_of(run, at, at + 1), 1, durable=False
                    )
                    await self._answer(again, wire.CMD_WRITE, cookie_of(run, at))
                else:
                    self._replies.refuse(wire.CMD_WRITE, cookie_of(run, at), error)
        finally:
            self._share.give(block)

    async def _read(self, begun: Awaitable[None], cookie: int, offset: int, length: int, block: Block) -> None:
        error = await _error_of(begun)
        if error:
            self._share.give(block)
            self._replies.refuse(wire.CMD_READ, cookie, error)
        else:
            self._replies.add(data_header(cookie, offset, length, structured=self._replies.structured))
            self._replies.send_block(block, length)

    async def _read_run(self, begun: Awaitable[None], run: "array[int]", count: int, block: Block) -> None:
        """Wait for a run; if it fails, carry out its reads one by one, so that each gets an answer of its own."""
        error = await _error_of(begun)
        if not error:
            pack_data_headers(block.memory, run, count, self._replies.structured)
            self._replies.send_block(block, end_of(run, count))
            return
        try:
            for at in range(count):
                alone = rest_of(run, at, at + 1)
                if count > 1:
                    error = await _error_of(self._begin(self._export.read, block.memory, alone, 1))
                self._answer_read(alone, block.memory, error)
        finally:
            self._share.give(block)

    def _answer_read(self, run: "array[int]", memory: memoryview, error: int) -> None:
        """Answer one read of a run."""
        if error:
            self._replies.refuse(wire.CMD_READ, cookie_of(run, 0), error)
            return
        _offset, length, position = run[:3]
        reply = bytearray(memory[: position + length])
        pack_data_headers(reply, run, 1, self._replies.structured)
        self._replies.add(reply[position - self._replies.header_bytes :])


async def _error_of(work: Awaitable[None]) -> int:
    """Wait for what was begun; return 0, or the error that the client gets."""
    try:
        await work
    except OSError as failure:
        return wire_error(failure.errno)
    except MemoryError:
        return wire.ENOMEM
    except Exception:
        log.exception("a request failed in a way that Lockstep did not expect")
        return wire.EIO
    return 0


async def _raise(failure: Exception) -> None:
    raise failure
