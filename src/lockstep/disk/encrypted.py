"""The data segment of a LUKS2 volume, as a disk of plaintext: the mirror.

What is written is encrypted on its way (step 102/503) and lands at the same offset, counted from the start of
the segment (step 103/504). Offsets and lengths are multiples of the encryption sector; merging a smaller
write with what surrounds it is the caller's business, who knows the target. Every method may be called from any
thread. Failures are OSErrors.
"""

import errno
import os
from typing import Final

from lockstep.crypto.cipher import XtsCipher
from lockstep.crypto.luks import Segment
from lockstep.disk.plain import read_all

# One piece is encrypted and written while it is still in the processor's cache.
PIECE_BYTES: Final = 256 << 10
_ZEROES: Final = bytes(PIECE_BYTES)


class EncryptedDisk:
    """`size_bytes` of plaintext, a multiple of the sector, at `segment` of the volume open as `fd`."""

    def __init__(self, fd: int, segment: Segment, cipher: XtsCipher, size_bytes: int) -> None:
        """Take over `fd`; it must allow whatever will be asked (reading, writing)."""
        self.size_bytes = size_bytes
        self.sector_bytes = segment.sector_bytes
        self._fd = fd
        self._data_offset = segment.offset_bytes
        self._first_iv = segment.iv_offset
        self._encrypt_to = cipher.encrypt_to
        self._decrypt_into = cipher.decrypt_into

    def close(self) -> None:
        """Close the descriptor, which also gives up its locks."""
        os.close(self._fd)

    def write(self, offset: int, data: memoryview, durable: bool = False) -> None:
        """Encrypt `data` and write the ciphertext at `offset`."""
        flags = os.RWF_DSYNC if durable else 0
        at, iv, length = self._data_offset + offset, self._first_iv + (offset >> 9), len(data)
        if length > PIECE_BYTES or self._encrypt_to(self._fd, at, iv, data, flags) != length:
            self._write_pieces(offset, data, flags)

    def _write_pieces(self, offset: int, data: memoryview, flags: int) -> None:
        while data:
            at, iv = self._data_offset + offset, self._first_iv + (offset >> 9)
            written = self._encrypt_to(self._fd, at, iv, data[:PIECE_BYTES], flags)
            written -= (
                written % self.sector_bytes
            )  # after a short write: a full disk or a signal; the next one says which
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            offset, data = offset + written, data[written:]

    def zero(self, offset: int, length: int) -> None:
        """Write the ciphertext of zeroes: a hole would decrypt to noise."""
        for position in range(offset, offset + length, PIECE_BYTES):
            self.write(position, memoryview(_ZEROES)[: min(PIECE_BYTES, offset + length - position)])

    def read(self, offset: int, into: memoryview) -> None:
        """Read and decrypt, filling `into`."""
        read_all(self._fd, into, self._data_offset + offset)
        self._decrypt_into(self._first_iv + (offset >> 9), into, into)

    def flush(self) -> None:
        """Make every completed write durable."""
        os.fdatasync(self._fd)
