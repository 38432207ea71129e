from array import array
from collections.abc import Callable
from typing import final

from typing_extensions import Buffer

from lockstep._work import Job

LIBRARY: str  # with its version

@final
class Xts:
    """AES-XTS with one key and one sector size. Safe to share between threads.

    `key` has 32 (AES-128) or 64 bytes (AES-256) with different halves; `sector_bytes` is 512, 1024,
    2048 or 4096. Anything else is a ValueError.
    """

    def __new__(cls, key: Buffer, sector_bytes: int) -> Xts: ...
    def encrypt_into(self, first_iv: int, src: Buffer, dst: Buffer, /) -> None:
        """Encrypt the sectors in `src` into `dst`, which may be the same memory or overlap it.

        `first_iv` is the first sector's position in 512-byte units from the start of the data segment
        (dm-crypt's plain64), also when sectors are longer. Both buffers are C-contiguous and have the
        same length, a multiple of the sector size.

        ValueError for lengths and positions out of range, BufferError or TypeError for memory that
        cannot be read or written: nothing is written then. OSError when libgcrypt fails: the
        content of `dst` is undefined then.
        """

    def encrypt_run(
        self, fd: int, data_offset: int, first_iv: int, data: Buffer, run: array[int], count: int, flags: int, /
    ) -> int:
        """Encrypt the first `count` writes of a run (lockstep/disk/runs.py), and write each to `fd` at its offset.

        Offsets count from `data_offset` in the file, and from position `first_iv`. Returns how many, from the front,
        were written whole; one that fails, or cannot be encrypted, ends it. ValueError, and nothing is written, for
        writes that are no whole sectors or lie outside of `data`.
        """

    def encrypt_job(
        self,
        fd: int,
        data_offset: int,
        first_iv: int,
        data: Buffer,
        run: array[int],
        count: int,
        flags: int,
        rest: Callable[[int], None],
        in_turn: bool,
        /,
    ) -> Job:
        """Return `encrypt_run` as a job (lockstep/work.py): a thread that carries it out does not need the interpreter.

        A write that fails fails the job, with its OSError. One that is cut short is left to `rest`, which is given how
        many were written whole. `data` and `run` are not to be changed meanwhile. Errors as for `encrypt_run`, at once.
        """

    def decrypt_job(
        self, fd: int, offset: int, first_iv: int, into: Buffer, from_medium: bool, rest: Callable[[], None], /
    ) -> Job:
        """Return a job that fills `into` with sectors of the file `fd`, read at `offset`, and decrypts them there.

        `from_medium` has the page cache forget them before. A read that fails fails the job, with its OSError. One that
        is cut short is left to `rest`, which does all of it. Errors as for `decrypt_into`.
        """

    def decrypt_into(self, first_iv: int, src: Buffer, dst: Buffer, /) -> None:
        """The inverse of `encrypt_into`, with the same rules."""
