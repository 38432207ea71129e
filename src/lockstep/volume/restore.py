"""Restore: a mirror's data, decrypted, onto an output. One piece is written while the next is read and decrypted.

An output that was just made reads as zeroes, so runs of zeroes are left out of it and it stays sparse.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.plain import PlainDisk

PIECE_BYTES: Final = 1 << 20
_ZEROES: Final = bytes(PIECE_BYTES)


def copy_out(
    mirror: EncryptedDisk, output: PlainDisk, size_bytes: int, *, blank: bool, on_progress: Callable[[int], None]
) -> None:
    """Write `size_bytes` of the mirror's data to `output` and make them durable.

    `blank` says that the output reads as zeroes everywhere; `on_progress` is given the bytes done so far.
    """
    on_progress(0)
    buffers = [memoryview(bytearray(PIECE_BYTES)) for _ in range(2)]
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1, "lockstep-restore") as writer:
        for turn, offset in enumerate(range(0, size_bytes, PIECE_BYTES)):
            count = min(PIECE_BYTES, size_bytes - offset)
            sectors = -(-count // mirror.sector_bytes) * mirror.sector_bytes
            piece = buffers[turn % 2][:sectors]
            mirror.read(offset, piece)
            if writing is not None:
                writing.result()
                on_progress(offset)
            writing = (
                None if blank and piece == _ZEROES[:sectors] else writer.submit(output.write, offset, piece[:count])
            )
        if writing is not None:
            writing.result()
    output.flush()
    on_progress(size_bytes)
