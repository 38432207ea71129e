"""The data of a mirror whose re-keying is not finished, as a disk of plaintext that is only read.

What has which key is in lockstep/crypto/reencryption.py. In the zone that was being written, each block is the old
ciphertext or the new one; with a journal, the old ciphertext is in the header.
"""

import hashlib
import os
from typing import Final

from lockstep.crypto.cipher import XtsCipher
from lockstep.crypto.reencryption import CHECKSUM, Unfinished, Zone
from lockstep.disk.transfer import read_all

_HASH_BYTES: Final = 32


class HalfRekeyedDisk:
    """`size_bytes` of plaintext in the volume open as `fd`; `header_fd` is where its header is."""

    def __init__(
        self, fd: int, header_fd: int, unfinished: Unfinished, old: XtsCipher, new: XtsCipher, size_bytes: int
    ) -> None:
        """Take over both descriptors."""
        self.size_bytes = size_bytes
        self.sector_bytes = unfinished.segment.sector_bytes
        self._fd, self._header_fd = fd, header_fd
        self._data_offset = unfinished.segment.offset_bytes
        self._first_iv = unfinished.segment.iv_offset
        self._renewed = unfinished.renewed
        self._zone = unfinished.zone
        self._old, self._new = old, new

    def close(self) -> None:
        """Close the descriptors, which also gives up the locks."""
        os.close(self._fd)
        os.close(self._header_fd)

    def read(self, offset: int, into: memoryview) -> None:
        """Read and decrypt, filling `into`: whole sectors."""
        zone = self._zone
        while into:
            end = offset + len(into)
            if zone is not None and zone.start <= offset < zone.end:
                piece = into[: min(end, zone.end) - offset]
                self._read_zone(zone, offset, piece)
            else:
                limits = [each for extent in self._renewed for each in extent] + ([zone.start] if zone else [])
                piece = into[: min(end, *(limit for limit in limits if limit > offset), end) - offset]
                read_all(self._fd, piece, self._data_offset + offset)
                self._decrypt(offset, piece, new=any(start <= offset < end for start, end in self._renewed))
            offset, into = offset + len(piece), into[len(piece) :]

    def forget_cache(self, offset: int, length: int) -> None:
        """Have the range read from the medium next time; 0 bytes mean up to the end."""
        os.posix_fadvise(self._fd, self._data_offset + offset, length, os.POSIX_FADV_DONTNEED)

    def _read_zone(self, zone: Zone, offset: int, into: memoryview) -> None:
        if zone.resilience != CHECKSUM:
            read_all(self._header_fd, into, zone.area_offset + offset - zone.start)
            self._decrypt(offset, into, new=False)
            return
        block = zone.block_bytes
        first, last = (offset - zone.start) // block, (offset + len(into) - 1 - zone.start) // block + 1
        start = zone.start + first * block
        blocks = memoryview(bytearray(min(zone.start + last * block, zone.end) - start))
        read_all(self._fd, blocks, self._data_offset + start)
        hashes = memoryview(bytearray((last - first) * _HASH_BYTES))
        read_all(self._header_fd, hashes, zone.area_offset + first * _HASH_BYTES)
        for number in range(last - first):
            one = blocks[number * block : (number + 1) * block]
            is_old = hashlib.sha256(one).digest() == hashes[number * _HASH_BYTES : (number + 1) * _HASH_BYTES]
            self._decrypt(start + number * block, one, new=not is_old)
        into[:] = blocks[offset - start : offset - start + len(into)]

    def _decrypt(self, offset: int, data: memoryview, *, new: bool) -> None:
        (self._new if new else self._old).decrypt_into(self._first_iv + (offset >> 9), data, data)
