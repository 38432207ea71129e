"""Direct I/O: a file or a block device past the page cache, in whole blocks and from memory that begins with a page.

What is asked may begin and end anywhere: it goes through a piece of memory that each thread keeps for this, and where
it is no whole blocks, what surrounds it is read first. So whoever writes must have the blocks to himself.

Nothing here is prompt: each write waits for the disk, and a flag such as RWF_NOWAIT does not change that.
"""

import os
import threading
from array import array
from collections.abc import Callable
from typing import Final, Self

from lockstep.buffers import page_aligned
from lockstep.disk.runs import WORDS, read_together, write_together
from lockstep.disk.transfer import is_direct, read_all, write_all
from lockstep.errors import DirectImpossible

Fill = Callable[[int, int, memoryview], None]
"""Puts into a piece of memory what belongs at an offset, and lies at a position of the data of a run."""

SCRATCH_BYTES: Final = 1 << 20
_BLOCK_SIZES: Final = (512, 1024, 2048, 4096)


def copy_from(data: memoryview) -> Fill:
    """Return what puts the data of a run there as it is."""

    def fill(_offset: int, position: int, into: memoryview) -> None:
        into[:] = data[position : position + len(into)]

    return fill


def require_direct(fd: int, path: str, **multiples: int) -> None:
    """Raise DirectImpossible if the file takes no blocks by direct I/O of which all of these are multiples."""
    try:
        direct = DirectFile.of(fd)
    except OSError as error:
        raise DirectImpossible(path=path, reason=error.strerror or str(error)) from error
    assert direct is not None
    for what, size_bytes in multiples.items():
        if size_bytes % direct.block_bytes:
            reason = f"its {what} is {size_bytes} bytes, which is no multiple of its blocks of {direct.block_bytes}"
            raise DirectImpossible(path=path, reason=reason)


class DirectFile:
    """A descriptor that was opened with O_DIRECT. Offsets and lengths are bytes; failures are OSErrors."""

    def __init__(self, fd: int, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._fd = fd
        self._of_thread = threading.local()

    @classmethod
    def of(cls, fd: int) -> Self | None:
        """Return the file if `fd` is one for direct I/O; None if it goes through the page cache.

        Raises OSError when the file takes no blocks of up to 4096 bytes.
        """
        if not is_direct(fd):
            return None
        block = page_aligned(_BLOCK_SIZES[-1])
        for size in _BLOCK_SIZES:
            try:
                os.preadv(fd, (block[:size],), size)
            except OSError as error:
                failure = error
            else:
                return cls(fd, size)
        raise failure

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into`."""
        while into:
            lead, whole = self._blocks(offset, len(into))
            self._fetch(whole, offset - lead)
            length = min(len(into), len(whole) - lead)
            into[:length] = whole[lead : lead + length]
            offset, into = offset + length, into[length:]

    def read_run(self, into: memoryview, run: "array[int]", count: int) -> int:
        """Read a run, as much of it together as fits; return how many of its reads, from the front.

        It ends before one that is no whole blocks, or too long, or that the disk did not give whole.
        """
        scratch, used, together = self._scratch, 0, array("Q")
        for at in range(count):
            offset, length = run[WORDS * at : WORDS * at + 2]
            if (offset | length) % self.block_bytes or used + length > SCRATCH_BYTES:
                break
            together.extend((offset, length, used, 0))
            used += length
        done = read_together(self._fd, scratch, together, len(together) // WORDS)
        for at in range(done):
            (length, position), start = run[WORDS * at + 1 : WORDS * at + 3], together[WORDS * at + 2]
            into[position : position + length] = scratch[start : start + length]
        return done

    def write(self, offset: int, data: memoryview | bytes, *, durable: bool = False) -> None:
        """Write all of `data`, together with what surrounds it in its first and in its last block."""
        data, block = memoryview(data), self.block_bytes
        while data:
            lead, whole = self._blocks(offset, len(data))
            start, length = offset - lead, min(len(data), len(whole) - lead)
            if lead:
                self._fetch(whole[:block], start)
            if (lead + length) % block and (len(whole) > block or not lead):
                self._fetch(whole[-block:], start + len(whole) - block)
            whole[lead : lead + length] = data[:length]
            write_all(self._fd, whole, start, durable=durable)
            offset, data = offset + length, data[length:]

    def write_filled(self, offset: int, length: int, fill: Callable[[memoryview], None], *, durable: bool) -> None:
        """Write whole blocks, at most SCRATCH_BYTES of them, that `fill` puts into memory."""
        whole = self._scratch[:length]
        fill(whole)
        write_all(self._fd, whole, offset, durable=durable)

    def write_run(
        self,
        run: "array[int]",
        count: int,
        fill: Fill,
        *,
        base: int = 0,
        durable: bool = False,
    ) -> int:
        """Write a run, as much at a time as fits; return how many of its writes, from the front.

        It ends before one that is no whole blocks, or too long. `base` is where offset 0 lies in the file.
        """
        flags = os.RWF_DSYNC if durable else 0
        done = 0
        while done < count:
            together = self._gather(run, done, count, fill, base)
            number = len(together) // WORDS
            if not number:
                break
            taken = write_together(self._fd, flags, self._scratch, together, number)
            done += taken
            if taken < number:
                break
        return done

    def _gather(self, run: "array[int]", at: int, count: int, fill: Fill, base: int) -> "array[int]":
        """Put into memory the writes that go together: none overlaps another, since they may land in any order."""
        block, used, blocks = self.block_bytes, 0, set[int]()
        together = array("Q")
        for number in range(at, count):
            offset, length, position = run[WORDS * number : WORDS * number + 3]
            theirs = range(offset // block, (offset + length) // block)
            if (offset | length) % block or used + length > SCRATCH_BYTES or not blocks.isdisjoint(theirs):
                break
            blocks.update(theirs)
            fill(offset, position, self._scratch[used : used + length])
            together.extend((base + offset, length, used, 0))
            used += length
        return together

    def _fetch(self, whole: memoryview, offset: int) -> None:
        read_all(self._fd, whole, offset, block_bytes=self.block_bytes)

    def _blocks(self, offset: int, length: int) -> tuple[int, memoryview]:
        """Return how far `offset` lies in its block, and memory for whole blocks from there, as far as it goes."""
        lead = offset % self.block_bytes
        return lead, self._scratch[: min(SCRATCH_BYTES, lead + length + -(lead + length) % self.block_bytes)]

    @property
    def _scratch(self) -> memoryview:
        try:
            return self._of_thread.scratch  # type: ignore[no-any-return]
        except AttributeError:
            self._of_thread.scratch = page_aligned(SCRATCH_BYTES)
            return self._of_thread.scratch  # type: ignore[no-any-return]
