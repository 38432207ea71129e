"""The data segment of a LUKS2 volume, as a disk of plaintext: the mirror.

What is written is encrypted on its way (step 102/503) and lands at the same offset, counted from the start of
the segment (step 103/504). Offsets and lengths are multiples of the encryption sector; merging a smaller
write with what surrounds it is the caller's business, who knows the target. Every method may be called from any
thread. Failures are OSErrors.
"""

import errno
import functools
import os
from array import array
from collections.abc import Callable
from typing import Final

from lockstep.crypto.cipher import XtsCipher
from lockstep.crypto.luks import Segment
from lockstep.disk.direct import Fill
from lockstep.disk.file import DiskFile
from lockstep.disk.runs import WORDS, requests
from lockstep.disk.transfer import read_all

# One piece is encrypted and written while it is still in the processor's cache.
PIECE_BYTES: Final = 256 << 10
_ZEROES: Final = bytes(PIECE_BYTES)


class EncryptedDisk(DiskFile):
    """`size_bytes` of plaintext, a multiple of the sector, at `segment` of the volume open as `fd`."""

    def __init__(self, fd: int, segment: Segment, cipher: XtsCipher, size_bytes: int) -> None:
        """Take over `fd`; it must allow whatever will be asked (reading, writing)."""
        super().__init__(fd, segment.offset_bytes)
        self.size_bytes = size_bytes
        self.sector_bytes = segment.sector_bytes
        self._first_iv = segment.iv_offset
        self._stopped = False
        self._encrypt_into = cipher.encrypt_into
        self._encrypt_run = cipher.encrypt_run
        self._encrypt_job = cipher.encrypt_job
        self._decrypt_into = cipher.decrypt_into
        self._decrypt_job = cipher.decrypt_job

    def stop(self) -> None:
        """Have what is under way in other threads end at its next system call, with an OSError."""
        self._stopped = True

    def write_run(self, data: memoryview, run: "array[int]", count: int) -> int:
        """Encrypt and write a run of whole sectors without ever waiting; return how many writes, from the front.

        Only on a prompt disk.
        """
        flags = self._promptness.flags
        assert flags is not None
        return self._encrypt_run(self._fd, self._base, self._first_iv, data, run, count, flags)

    def write_job(self, data: memoryview, run: "array[int]", count: int, durable: bool = False) -> Callable[[], None]:
        """Return what a thread does to encrypt and write a run of whole sectors."""
        rest = functools.partial(self._write_each, data, run, count, durable)
        if self._direct is not None:
            return functools.partial(self._write_direct, data, run, count, durable)
        if self._promptness.unknown or self._encrypt_job is None:
            return functools.partial(rest, 0)  # which looks between two pieces whether it is given up
        where, flags = (self._fd, self._base, self._first_iv), os.RWF_DSYNC if durable else 0
        # The kernel lets the next one in while the medium is waited for; and long ones are encrypted meanwhile.
        in_turn = self._in_turn and not durable and sum(run[1 : WORDS * count : WORDS]) <= PIECE_BYTES
        return self._encrypt_job(*where, data, run, count, flags, rest, in_turn)

    def _write_direct(self, data: memoryview, run: "array[int]", count: int, durable: bool) -> None:
        assert self._direct is not None
        done = 0
        if not self._stopped:
            fill, base = self._encrypt_from(data), self._base
            done = self._direct.write_run(run, count, fill, base=base, durable=durable)
        self._write_each(data, run, count, durable, done)

    def _write_each(self, data: memoryview, run: "array[int]", count: int, durable: bool, done: int) -> None:
        """Write what is left of a run: where it ended, the write itself tells why."""
        for offset, length, position in requests(run, done, count):
            self.write(offset, data[position : position + length], durable)

    def write(self, offset: int, data: memoryview, durable: bool = False) -> None:
        """Encrypt `data` and write the ciphertext at `offset`."""
        while data:
            written = self._write_piece(offset, data[:PIECE_BYTES], durable)
            # After a short write (a full disk, or a signal) the next one says which.
            written -= written % self.sector_bytes
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            offset, data = offset + written, data[written:]

    def _write_piece(self, offset: int, piece: memoryview, durable: bool) -> int:
        """Encrypt a piece and write it; return how much of it, which without direct I/O may be less than all."""
        at, iv = self._base + offset, self._first_iv + (offset >> 9)
        if self._direct is not None:
            self._direct.write_filled(at, len(piece), lambda into: self._encrypt(iv, piece, into), durable=durable)
            return len(piece)
        encrypted = bytearray(len(piece))
        self._encrypt(iv, piece, encrypted)
        if self._promptness.unknown:
            self._promptness.learn(lambda prompt: os.pwritev(self._fd, (encrypted,), at, prompt))
        return os.pwritev(self._fd, (encrypted,), at, os.RWF_DSYNC if durable else 0)

    def _encrypt(self, iv: int, data: memoryview, into: memoryview | bytearray) -> None:
        self._encrypt_into(iv, data, into)
        if self._stopped:  # the data may have been another's by then
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))

    def _encrypt_from(self, data: memoryview) -> Fill:
        def fill(offset: int, position: int, into: memoryview) -> None:
            self._encrypt(self._first_iv + (offset >> 9), data[position : position + len(into)], into)

        return fill

    def zero(self, offset: int, length: int) -> None:
        """Write the ciphertext of zeroes: a hole would decrypt to noise."""
        for position in range(offset, offset + length, PIECE_BYTES):
            self.write(position, memoryview(_ZEROES)[: min(PIECE_BYTES, offset + length - position)])

    def read(self, offset: int, into: memoryview) -> None:
        """Read and decrypt, filling `into`."""
        if self._direct is None:
            read_all(self._fd, into, self._base + offset)
        else:
            self._direct.read(self._base + offset, into)
        self._decrypt_into(self._first_iv + (offset >> 9), into, into)

    def read_job(self, offset: int, into: memoryview, *, from_medium: bool = False) -> Callable[[], None]:
        """Return what a thread does to read; `from_medium` has it read what was flushed, not what is cached."""
        rest = functools.partial(self.read, offset, into)
        if self._direct is not None:
            return rest
        at, iv = self._base + offset, self._first_iv + (offset >> 9)
        return self._decrypt_job(self._fd, at, iv, into, from_medium, rest)

    def read_cached(self, offset: int, into: memoryview) -> bool:
        """Like `read`, or return False where that would wait for the medium, or needs more than whole sectors."""
        if self._nowait is None or (offset | len(into)) % self.sector_bytes:
            return False
        try:
            if os.preadv(self._fd, (into,), self._base + offset, self._nowait) != len(into):
                return False
        except BlockingIOError:
            return False
        self._decrypt_into(self._first_iv + (offset >> 9), into, into)
        return True
