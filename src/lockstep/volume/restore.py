"""Restore: a range of a mirror's data, decrypted, onto an output; and the comparison of the two.

The range is cut into pieces. Threads read and decrypt the next few while the caller's thread takes them in order and
writes them, so reading, decrypting and writing go on at once, and "done" is one number: everything before it was
written. Ctrl-C meets the caller's thread, which is never behind a lock.

Zero runs (`RUN_BYTES`, aligned) are left out of an output that reads as zeroes anyway, so that it stays sparse;
elsewhere they are cleared, which is a hole where the disk can do that.

A `checkpoint` makes done durable. It is taken by a thread of its own while the copy goes on: it flushes the output
*after* it was told how far the copy is, and only then lets the record say so.
"""

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from lockstep.disk.plain import PlainDisk

PIECE_BYTES: Final = 1 << 20
RUN_BYTES: Final = 64 << 10
READERS: Final = 3
CHECKPOINT_S: Final = 2.0
_BLOCK_BYTES: Final = 512  # the unit in which differences are reported
_ZEROES: Final = bytes(RUN_BYTES)

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

    def write(self, offset: int, data: memoryview, /) -> None:
        """Take data; offsets ascend."""

    def zero(self, offset: int, length: int, /) -> None:
        """Read as zeroes there from now on."""


class DiskSink:
    """A file or a block device. `blank` says that it reads as zeroes wherever nothing was written."""

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
    with (
        ThreadPoolExecutor(1, "lockstep-checkpoint") as recorder,
        contextlib.closing(_ahead(functools.partial(_decrypted, mirror), _pieces(rest))) as decrypted,
    ):
        for piece, data in decrypted:
            at = piece.offset - extent.offset
            if _put(sink, at, data):
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

    def compare(piece: Extent, buffer: bytearray) -> list[Extent]:
        expected = _decrypted(mirror, piece, buffer)
        found = bytearray(piece.length)
        output.read(piece.offset - extent.offset, memoryview(found))
        return [] if found == expected.tobytes() else _differing(piece.offset, expected, memoryview(found))

    done = 0
    with contextlib.closing(_ahead(compare, _pieces(extent) if pieces is None else pieces)) as compared:
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


def _ahead(
    work: Callable[[Extent, bytearray], _Result], pieces: Iterable[Extent]
) -> Generator[tuple[Extent, _Result], None, None]:
    """Do `work` for each piece, several at a time, each with a buffer of its own; yield the results in order.

    A result may use its buffer until the next one is asked for.
    """
    buffers = deque(bytearray(PIECE_BYTES + 2 * 4096) for _ in range(READERS + 1))
    under_way: deque[tuple[Extent, bytearray, Future[_Result]]] = deque()
    pool = ThreadPoolExecutor(READERS, "lockstep-restore")
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


def _decrypted(mirror: Source, piece: Extent, buffer: bytearray) -> memoryview:
    """Read a piece of any alignment: the whole sectors round it are decrypted."""
    sector = mirror.sector_bytes
    start = piece.offset - piece.offset % sector
    length = -(-piece.end // sector) * sector - start
    view = memoryview(buffer)
    mirror.read(start, view[:length])
    return view[piece.offset - start : piece.end - start]


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
