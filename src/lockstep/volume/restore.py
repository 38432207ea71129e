"""Restore: a range of a mirror's data, decrypted, onto an output; and the comparison of the two.

The range is cut into pieces. Each is read, decrypted and written by one thread, in whose processor's cache it stays
meanwhile; a pipe alone is written by the caller's thread. That one takes the pieces in order, so "done" is one number:
everything before it was written. Some of what follows it may be, too: it is what will be written there again. Ctrl-C
meets the caller's thread, which is never behind a lock.

Zero runs (`RUN_BYTES`, aligned) are left out of an output that reads as zeroes anyway, so that it stays sparse;
elsewhere they are cleared, which is a hole where the disk can do that.

A `checkpoint` makes done durable. It is taken by a thread of its own while the copy goes on: it flushes the output
*after* it was told how far the copy is, and only then lets the record say so.
"""

import contextlib
import functools
import heapq
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from lockstep.buffers import page_aligned
from lockstep.disk.plain import PlainDisk
from lockstep.disk.runs import same

PIECE_BYTES: Final = 1 << 20
RUN_BYTES: Final = 64 << 10
THREADS: Final = max(2, min(8, os.cpu_count() or 1))
CHECKPOINT_S: Final = 2.0
_BLOCK_BYTES: Final = 512  # the unit in which differences are reported
_ZEROES: Final = bytes(RUN_BYTES)
_BUFFER_BYTES: Final = PIECE_BYTES + 2 * 4096  # a piece, and the sectors at its ends

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Extent:
    """A range of the disk."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """Where it ends, exclusively."""
        return self.offset + self.length


class Source(Protocol):
    """Where the data comes from: a mirror, or what one sees through its overlay."""

    sector_bytes: int

    def read(self, offset: int, into: memoryview, /) -> None:
        """Fill `into`; whole sectors."""


class Sink(Protocol):
    """Where restored data goes; offsets count from the start of the output."""

    in_order: bool
    """Whether offsets must ascend; else any thread may write anywhere."""

    def write(self, offset: int, data: memoryview, /) -> None:
        """Take data."""

    def zero(self, offset: int, length: int, /) -> None:
        """Read as zeroes there from now on."""


class DiskSink:
    """A file or a block device. `blank` says that it reads as zeroes wherever nothing was written."""

    in_order = False

    def __init__(self, disk: PlainDisk, *, blank: bool) -> None:
        self.write = disk.write
        self._disk = disk
        self._blank = blank

    def zero(self, offset: int, length: int) -> None:
        """Clear the range, unless it is clear."""
        if not self._blank:
            self._disk.zero(offset, length, allocate=False)


@dataclass
class Progress:
    """How far a copy is; `witness` is the last piece that was not all zeroes, as an offset in the output."""

    done_bytes: int = 0
    witness: int | None = None


def copy_out(
    mirror: Source,
    sink: Sink,
    extent: Extent,
    progress: Progress,
    *,
    on_progress: Callable[[int], None],
    checkpoint: Callable[[int, int | None], None] | None = None,
) -> None:
    """Write what `progress` lacks of the mirror's `extent` to `sink`, and keep `progress` true, also on failure.

    `on_progress` is given the bytes done so far; `checkpoint` as much and the witness, in a thread of its own. The end
    is not flushed.
    """
    on_progress(progress.done_bytes)
    rest = Extent(extent.offset + progress.done_bytes, extent.length - progress.done_bytes)
    recording: Future[None] | None = None
    next_s = 0.0  # the first piece is recorded at once: from then on the record vouches for the output

    def put(piece: Extent, data: memoryview) -> bool:
        return _put(sink, piece.offset - extent.offset, data)

    def carry(piece: Extent, buffer: memoryview) -> bool:
        return put(piece, _decrypted(mirror, piece, buffer))

    def in_order() -> Generator[tuple[Extent, bool], None, None]:
        with contextlib.closing(_ahead(functools.partial(_decrypted, mirror), _pieces(rest))) as decrypted:
            for piece, data in decrypted:
                yield piece, put(piece, data)

    with (
        ThreadPoolExecutor(1, "lockstep-checkpoint") as recorder,
        contextlib.closing(in_order() if sink.in_order else _spread(carry, _pieces(rest))) as carried,
    ):
        for piece, found in carried:
            at = piece.offset - extent.offset
            if found:
                progress.witness = at
            progress.done_bytes = at + piece.length
            on_progress(progress.done_bytes)
            if checkpoint is None or time.monotonic() < next_s or not (recording is None or recording.done()):
                continue
            if recording is not None:
                recording.result()
            recording = recorder.submit(checkpoint, progress.done_bytes, progress.witness)
            next_s = time.monotonic() + CHECKPOINT_S
    if recording is not None:
        recording.result()


def differences(
    mirror: Source,
    output: PlainDisk,
    extent: Extent,
    pieces: Iterable[Extent] | None = None,
    *,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> Iterator[Extent]:
    """Yield where an output, which starts at `extent`, differs from the mirror: whole blocks, in the disk's offsets.

    Only in `pieces` of the extent, if they are given.
    """

    def compare(piece: Extent, buffer: memoryview) -> list[Extent]:
        expected = _decrypted(mirror, piece, buffer)
        found = page_aligned(piece.length)
        output.read(piece.offset - extent.offset, found)
        return [] if same(found, expected) else _differing(piece.offset, expected, found)

    done = 0
    with contextlib.closing(_spread(compare, _pieces(extent) if pieces is None else pieces)) as compared:
        for piece, found in compared:
            yield from found
            done += piece.length
            on_progress(done)


def samples(extent: Extent, progress: Progress, count: int = 16) -> list[Extent]:
    """Pieces of what is done that tell whether an output is the one that was written: witness, ends, some more."""
    steps = max(1, -(-progress.done_bytes // PIECE_BYTES))
    chosen = {step * PIECE_BYTES for step in range(0, steps, max(1, steps // count))} | {(steps - 1) * PIECE_BYTES}
    if progress.witness is not None:
        chosen.add(progress.witness)
    return [
        Extent(extent.offset + at, min(PIECE_BYTES, progress.done_bytes - at))
        for at in sorted(chosen)
        if at < progress.done_bytes
    ]


def _pieces(extent: Extent) -> Iterator[Extent]:
    for offset in range(extent.offset, extent.end, PIECE_BYTES):
        yield Extent(offset, min(PIECE_BYTES, extent.end - offset))


def _spread(
    work: Callable[[Extent, memoryview], _Result], pieces: Iterable[Extent]
) -> Generator[tuple[Extent, _Result], None, None]:
    """Do `work` for each piece, several at a time, each thread with a buffer of its own; yield the results in order.

    The threads take the next piece by themselves: they do not wait for who takes the results, as `_ahead` does.
    """
    todo, taking = enumerate(pieces), threading.Lock()
    done: queue.SimpleQueue[tuple[int, Extent, _Result] | BaseException | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def run() -> None:
        try:
            buffer = page_aligned(_BUFFER_BYTES)
            while not stopped.is_set():
                with taking:
                    found = next(todo, None)
                if found is None:
                    break
                done.put((*found, work(found[1], buffer)))
        except BaseException as error:  # noqa: BLE001 - raised where the results are taken
            stopped.set()
            done.put(error)
        done.put(None)

    threads = [threading.Thread(target=run, name=f"lockstep-restore-{number}") for number in range(THREADS)]
    try:
        for thread in threads:
            thread.start()
        yield from _sorted(done, len(threads))
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def _sorted(
    done: "queue.SimpleQueue[tuple[int, Extent, _Result] | BaseException | None]", sources: int
) -> Iterator[tuple[Extent, _Result]]:
    """Yield numbered results in order, as soon as that can be, until each source has said None.

    If one failed, those that the others were at are yielded as well, before that is raised.
    """
    early: list[tuple[int, Extent, _Result]] = []
    following, failure = 0, None
    while sources:
        match done.get():
            case None:
                sources -= 1
            case BaseException() as error:
                failure = failure or error
            case result:
                heapq.heappush(early, result)
        while early and early[0][0] == following:
            _, piece, found = heapq.heappop(early)
            yield piece, found
            following += 1
    if failure is not None:
        raise failure


def _ahead(
    work: Callable[[Extent, memoryview], _Result], pieces: Iterable[Extent]
) -> Generator[tuple[Extent, _Result], None, None]:
    """Do `work` for each piece, several at a time, each with a buffer of its own; yield the results in order.

    A result may use its buffer until the next one is asked for.
    """
    buffers = deque(page_aligned(_BUFFER_BYTES) for _ in range(THREADS + 1))
    under_way: deque[tuple[Extent, memoryview, Future[_Result]]] = deque()
    pool = ThreadPoolExecutor(THREADS, "lockstep-restore")
    try:
        for piece in pieces:
            buffer = buffers.popleft()
            under_way.append((piece, buffer, pool.submit(work, piece, buffer)))
            if not buffers:
                first, buffer, future = under_way.popleft()
                yield first, future.result()
                buffers.append(buffer)
        for piece, _, future in under_way:
            yield piece, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decrypted(mirror: Source, piece: Extent, buffer: memoryview) -> memoryview:
    """Read a piece of any alignment: the whole sectors round it are decrypted."""
    sector = mirror.sector_bytes
    start = piece.offset - piece.offset % sector
    length = -(-piece.end // sector) * sector - start
    mirror.read(start, buffer[:length])
    return buffer[piece.offset - start : piece.end - start]


def _put(sink: Sink, at: int, data: memoryview) -> bool:
    """Give the piece at `at` to the sink in its runs; return whether it has data that is not zero."""
    found = False
    for start, end, zeroes in _runs(at, data):
        if zeroes:
            sink.zero(at + start, end - start)
        else:
            sink.write(at + start, data[start:end])
            found = True
    return found


def _runs(at: int, data: memoryview) -> Iterator[tuple[int, int, bool]]:
    """Split a piece at `at` into (start, end, whether it is zeroes), which change at multiples of RUN_BYTES."""
    begin, kind, position = 0, None, 0
    while position < len(data):
        end = min(len(data), position + RUN_BYTES - (at + position) % RUN_BYTES)
        zeroes = not data[position] and data[position:end].tobytes() == _ZEROES[: end - position]
        if kind is not None and zeroes != kind:
            yield begin, position, kind
            begin = position
        kind, position = zeroes, end
    if kind is not None:
        yield begin, len(data), kind


def _differing(offset: int, expected: memoryview, found: memoryview) -> list[Extent]:
    """Return the blocks that differ, adjacent ones joined."""
    differing: list[Extent] = []
    for start in range(0, len(expected), _BLOCK_BYTES):
        block = slice(start, start + _BLOCK_BYTES)
        if expected[block].tobytes() == found[block].tobytes():
            continue
        length = min(_BLOCK_BYTES, len(expected) - start)
        if differing and differing[-1].end == offset + start:
            differing[-1] = Extent(differing[-1].offset, differing[-1].length + length)
        else:
            differing.append(Extent(offset + start, length))
    return differing
