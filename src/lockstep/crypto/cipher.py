"""The sector cipher of the mirror: AES-XTS with dm-crypt's plain64 positions.

Two implementations of one interface, `Xts` in `_xts.pyi`: the native kernel over libgcrypt, and a twin
on the `cryptography` package that is used where the kernel was not built. Same checks, same errors,
same bytes; the twin takes some 40 times longer. XTS hides data, it does not protect it from change: whoever
can write the mirror can turn sectors into noise or put back older ones without being noticed here.
"""

from __future__ import annotations

import hashlib
import operator
import os
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from lockstep.errors import CipherSelfTestFailed

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    from typing_extensions import Buffer

SECTOR_BYTES: Final = (512, 1024, 2048, 4096)
IV_UNIT_BYTES: Final = 512  # positions count these, whatever the sector size (plain64 in dm-crypt's docs)
POSITION_LIMIT: Final = 2**64


class FallbackXts:
    """The kernel's twin on the `cryptography` package. For arguments and errors see `_xts.pyi`."""

    def __init__(self, key: Buffer, sector_bytes: int) -> None:
        if sector_bytes not in SECTOR_BYTES:
            raise ValueError("sector_bytes must be 512, 1024, 2048 or 4096")
        key_bytes = _readable(key).tobytes()
        half = len(key_bytes) // 2
        if len(key_bytes) not in (32, 64):
            raise ValueError("an XTS key has 32 or 64 bytes")
        if key_bytes[:half] == key_bytes[half:]:
            raise ValueError("the two halves of an XTS key must differ")
        self._sector_bytes = sector_bytes
        self._key = algorithms.AES(key_bytes)

    def __reduce__(self) -> str:
        raise TypeError("a key does not leave its process")

    def encrypt_into(self, first_iv: int, src: Buffer, dst: Buffer, /) -> None:
        """Encrypt the sectors in `src` into `dst`."""
        self._crypt(first_iv, src, dst, encrypt=True)

    def encrypt_run(
        self, fd: int, data_offset: int, first_iv: int, data: Buffer, run: array[int], count: int, flags: int, /
    ) -> int:
        """Encrypt the first `count` writes of a run, and write each to `fd`; return how many were written whole."""
        view = _readable(data)
        writes = [tuple(run[4 * at : 4 * at + 3]) for at in range(count)]
        for offset, length, position in writes:
            if (offset | length) % self._sector_bytes:
                raise ValueError("the length must be a multiple of the sector size")
            if position + length > len(view):
                raise ValueError("the data lies outside of the buffer")
        for at, (offset, length, position) in enumerate(writes):
            encrypted = bytearray(length)
            self.encrypt_into(first_iv + offset // 512, view[position : position + length], encrypted)
            try:
                if os.pwritev(fd, (encrypted,), data_offset + offset, flags) != length:
                    return at
            except OSError:
                return at
        return count

    def decrypt_job(
        self, fd: int, offset: int, first_iv: int, into: Buffer, from_medium: bool, rest: Callable[[], None], /
    ) -> Callable[[], None]:
        """Return what a thread does to read and decrypt sectors; where a read is cut short, `rest` does it."""

        def job() -> None:
            if from_medium:
                os.posix_fadvise(fd, offset, len(_readable(into)), os.POSIX_FADV_DONTNEED)
            if os.preadv(fd, (into,), offset) != len(_readable(into)):
                rest()
            else:
                self.decrypt_into(first_iv, into, into)

        return job

    def decrypt_into(self, first_iv: int, src: Buffer, dst: Buffer, /) -> None:
        """Decrypt the sectors in `src` into `dst`."""
        self._crypt(first_iv, src, dst, encrypt=False)

    def _crypt(self, first_iv: int, src: Buffer, dst: Buffer, *, encrypt: bool) -> None:
        source, target = _readable(src), _readable(dst)
        if target.readonly:
            raise BufferError("dst is not writable")
        if len(source) != len(target):
            raise ValueError("src and dst must have the same length")
        if len(source) % self._sector_bytes:
            raise ValueError("the length must be a multiple of the sector size")
        position = operator.index(first_iv)
        if not 0 <= position < POSITION_LIMIT:
            raise ValueError("first_iv must be between 0 and 2**64 - 1")
        if source and position + (len(source) - self._sector_bytes) // IV_UNIT_BYTES >= POSITION_LIMIT:
            raise ValueError("the last sector's position does not fit in 64 bits")
        done = []
        for start in range(0, len(source), self._sector_bytes):
            tweak = (position + start // IV_UNIT_BYTES).to_bytes(16, "little")
            cipher = Cipher(self._key, modes.XTS(tweak))
            context = cipher.encryptor() if encrypt else cipher.decryptor()
            done.append(context.update(source[start : start + self._sector_bytes]))
        # Written only at the end, because the two buffers may overlap.
        target[:] = b"".join(done)


def _readable(data: Buffer) -> memoryview:
    """The bytes of a C-contiguous buffer; BufferError if it is not, TypeError if it is no buffer."""
    view = memoryview(data)
    if not view.c_contiguous:
        raise BufferError("the buffer is not C-contiguous")
    return view.cast("B")


try:
    from lockstep.crypto._xts import LIBRARY
    from lockstep.crypto._xts import Xts as _Implementation

    KERNEL: str = LIBRARY
except ImportError:
    _Implementation = FallbackXts  # type: ignore[misc, assignment]
    KERNEL = "cryptography"
"""What encrypts in this process: "libgcrypt 1.10.1", say (the native kernel), or "cryptography" (its slower twin)."""


class XtsCipher:
    """AES-XTS with one key and one sector size, by the fastest implementation there is. Thread-safe.

    `key`: 32 or 64 bytes with different halves; `sector_bytes`: 512, 1024, 2048 or 4096; else ValueError.
    It is read here only: the caller may wipe it afterwards. For its methods see `_xts.pyi`.
    """

    __slots__ = (
        "decrypt_into",
        "decrypt_job",
        "encrypt_into",
        "encrypt_job",
        "encrypt_run",
        "sector_bytes",
    )

    encrypt_into: Callable[[int, Buffer, Buffer], None]
    encrypt_run: Callable[[int, int, int, Buffer, array[int], int, int], int]
    # None where nothing native does it: then each piece has to be asked for (disk/encrypted.py).
    encrypt_job: (
        Callable[[int, int, int, Buffer, array[int], int, int, Callable[[int], None], bool], Callable[[], None]] | None
    )
    decrypt_into: Callable[[int, Buffer, Buffer], None]
    decrypt_job: Callable[[int, int, int, Buffer, bool, Callable[[], None]], Callable[[], None]]
    sector_bytes: int

    def __init__(self, key: Buffer, sector_bytes: int) -> None:
        implementation = _Implementation(key, sector_bytes)
        # Bound here rather than wrapped: a Python frame per call would cost as much as a sector.
        self.encrypt_into = implementation.encrypt_into
        self.encrypt_run = implementation.encrypt_run
        self.encrypt_job = getattr(implementation, "encrypt_job", None)
        self.decrypt_into = implementation.decrypt_into
        self.decrypt_job = implementation.decrypt_job
        self.sector_bytes = sector_bytes


_AES_128_KEY = "27182818284590452353602874713526 31415926535897932384626433832795"
_AES_256_KEY = (
    "2718281828459045235360287471352662497757247093699959574966967627"
    "3141592653589793238462643383279502884197169399375105820974944592"
)
# Name, key, sector size, position of the first sector, length, SHA-256 of the expected ciphertext.
# The plaintext is always 00 01 .. ff, repeated. The tests compare the two published answers in full, and
# compute the third from AES alone: no standard publishes plain64 with 4096-byte sectors.
_KNOWN_ANSWERS: Final = (
    ("IEEE 1619 vector 4", _AES_128_KEY, 512, 0x00, 512,
     "ebee4d64dd2395bb2d6a2d37a0a48ecb2bf4913cfc99d27c2214f2f4144715ea"),
    ("IEEE 1619 vector 10", _AES_256_KEY, 512, 0xFF, 512,
     "e97e974fa393af794f7a4684395814cf820de60a01eaec677d87b452e316b364"),
    ("two 4096-byte sectors", _AES_256_KEY, 4096, 0xFF, 8192,
     "384f76310e9a2aeb5ce0828b5b71bce5ef45d32b21bc7ad50ed708231957ca94"),
)  # fmt: skip


def self_test() -> None:
    """Check known answers, both directions, with what encrypts in this process; well below 5 ms.

    CipherSelfTestFailed when an answer is wrong: nothing may be encrypted then.
    """
    for case, key, sector_bytes, first_iv, length, expected_sha256 in _KNOWN_ANSWERS:
        plain = bytes(range(256)) * (length // 256)
        data = bytearray(plain)
        cipher = XtsCipher(bytes.fromhex(key), sector_bytes)
        cipher.encrypt_into(first_iv, data, data)
        if hashlib.sha256(data).hexdigest() != expected_sha256:
            raise CipherSelfTestFailed(kernel=KERNEL, case=case)
        cipher.decrypt_into(first_iv, data, data)
        if data != plain:
            raise CipherSelfTestFailed(kernel=KERNEL, case=f"the way back from {case}")
