"""Runs of small writes, or reads: several whose data lies in one buffer, carried out by one loop.

A run is an array('Q') with four numbers for each request: offset and length in bytes, where its data begins in the
buffer, and a cookie that is the wire's business. What serves a run takes as many as can be taken, from the front, and
returns how many; why it stopped is for whoever handles the next one alone to find out.

These are the inner loops, in Python; `_runs.pyx` has the same natively and is used where it was built.
"""

import os
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing_extensions import Buffer

WORDS: Final = 4


def run_of(offset: int, length: int) -> "array[int]":
    """Return a run of one write, whose data is at the beginning of its buffer."""
    return array("Q", (offset, length, 0, 0))


def requests(run: "array[int]", first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Offset, length and position of each request from `first` up to `count`."""
    words = run[WORDS * first : WORDS * count]
    return zip(words[::WORDS], words[1::WORDS], words[2::WORDS], strict=True)


def places(run: "array[int]", count: int) -> list[tuple[int, int]]:
    """Offset and length of the first `count` requests."""
    return [(offset, length) for offset, length, _position in requests(run, 0, count)]


def _aligned(run: "array[int]", count: int, mask: int, /) -> int:
    """How many writes, from the front, begin and end on a multiple of `mask` + 1 bytes."""
    return next((at for at in range(count) if (run[WORDS * at] | run[WORDS * at + 1]) & mask), count)


def _apart(run: "array[int]", count: int, others: "array[int]", /) -> int:
    """How many requests, from the front, touch none of `others`: pairs of numbers, [start, end) each, in bytes."""
    bounds = list(zip(others[::2], others[1::2], strict=True))
    for at, (offset, length) in enumerate(places(run, count)):
        if any(offset < end and start < offset + length for start, end in bounds):
            return at
    return count


def _covered(
    run: "array[int]", count: int, marks: bytearray, touched: bytearray, region_shift: int, group_shift: int, /
) -> int:
    """How many writes, from the front, lie in regions that are all marked; who is asked about is noted in `touched`."""
    for at in range(count):
        offset, length = run[WORDS * at], run[WORDS * at + 1]
        first, last = offset >> region_shift, (offset + length - 1) >> region_shift
        if last >= len(marks) or last >> group_shift >= len(touched):
            raise ValueError("the write lies outside of the disk")
        for group in range(first >> group_shift, (last >> group_shift) + 1):
            touched[group] = 1
        if 0 in marks[first : last + 1]:
            return at
    return count


def _write_run(fd: int, flags: int, data: "Buffer", run: "array[int]", count: int, /) -> int:
    """How many writes, from the front, the file `fd` took whole; `flags` are those of pwritev2(2)."""
    view = memoryview(data)
    for at in range(count):
        offset, length, position = run[WORDS * at : WORDS * at + 3]
        try:
            if os.pwritev(fd, (view[position : position + length],), offset, flags) != length:
                return at
        except OSError:
            return at
    return count


def _write_together(fd: int, flags: int, data: "Buffer", run: "array[int]", count: int, /) -> int:
    """Like `_write_run`, with all writes under way together if the kernel can: for direct I/O, where each waits.

    No two of them may overlap. This one does it one after the other.
    """
    return _write_run(fd, flags, data, run, count)


def _read_together(fd: int, into: "Buffer", run: "array[int]", count: int, /) -> int:
    """Like `_read_run`, with all reads under way together if the kernel can: for direct I/O."""
    return _read_run(fd, 0, into, run, count)


def _read_run(fd: int, flags: int, into: "Buffer", run: "array[int]", count: int, /) -> int:
    """How many reads, from the front, the file `fd` gave whole; `flags` are those of preadv2(2)."""
    view = memoryview(into)
    for at in range(count):
        offset, length, position = run[WORDS * at : WORDS * at + 3]
        try:
            if os.preadv(fd, (view[position : position + length],), offset, flags) != length:
                return at
        except OSError:
            return at
    return count


def _write_job(
    fd: int,
    flags: int,
    data: "Buffer",
    run: "array[int]",
    count: int,
    rest: Callable[[int], None],
    in_turn: bool,  # noqa: ARG001 (for the native queue)
    /,
) -> Callable[[], None]:
    """Return what a thread does to write a run (lockstep/work.py). A write that fails fails it, with its OSError.

    One that is cut short is left to `rest`, which is given how many were written whole. Neither the data nor the run
    may be changed meanwhile. `in_turn` spares threads waiting for each other within the kernel: the native queue has
    such jobs carried out by one, without a pause between two.
    """
    view = memoryview(data)
    return lambda: _moved(os.pwritev, fd, flags, view, run, count, rest)


def _fetch_job(
    fd: int, into: "Buffer", run: "array[int]", count: int, rest: Callable[[int], None], /
) -> Callable[[], None]:
    """Like `_write_job`, to read: the medium is asked for all of it before the first is waited for."""
    view = memoryview(into)

    def job() -> None:
        for at in range(count):
            os.posix_fadvise(fd, run[WORDS * at], run[WORDS * at + 1], os.POSIX_FADV_WILLNEED)
        _moved(os.preadv, fd, 0, view, run, count, rest)

    return job


def _flush_job(fd: int, /) -> Callable[[], None]:
    """Return what a thread does to make durable what was written to a file."""
    return lambda: os.fdatasync(fd)


def _write_back_job(fd: int, /) -> Callable[[], None]:  # noqa: ARG001 (for the native one)
    """Return what a thread does to have the kernel begin to write out what it has cached of a file.

    It makes nothing durable, and takes no error from the flush, which reports them all (fs/sync.c: only who waits for
    writing to end is told of its errors). This one leaves everything to the flush.
    """
    return lambda: None


def _moved(
    call: Callable[..., int],
    fd: int,
    flags: int,
    view: memoryview,
    run: "array[int]",
    count: int,
    rest: Callable[[int], None],
) -> None:
    for at in range(count):
        offset, length, position = run[WORDS * at : WORDS * at + 3]
        if call(fd, (view[position : position + length],), offset, flags) != length:
            rest(at)
            return


def _same(one: "Buffer", other: "Buffer", /) -> bool:
    """Whether two buffers hold the same bytes; memoryviews, asked themselves, compare number by number."""
    return bytearray(one) == other


try:
    from lockstep.disk import _runs as _native
except ImportError:
    aligned = _aligned
    apart = _apart
    covered = _covered
    write_run = _write_run
    write_together = _write_together
    read_together = _read_together
    read_run = _read_run
    write_job = _write_job
    fetch_job = _fetch_job
    flush_job = _flush_job
    write_back_job = _write_back_job
    same = _same
else:
    aligned = _native.aligned
    apart = _native.apart
    covered = _native.covered
    write_run = _native.write_run
    write_together = _native.write_together
    read_together = _native.read_together
    read_run = _native.read_run
    write_job = _native.write_job
    fetch_job = _native.fetch_job
    flush_job = _native.flush_job
    write_back_job = _native.write_back_job
    same = _native.same
