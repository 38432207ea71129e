from array import array

from typing_extensions import Buffer

def find_writes(buffer: Buffer, start: int, end: int, enough: int, writable_bytes: int, run: array[int], /) -> int: ...
def pack_replies(run: array[int], count: int, /) -> bytes: ...
def find_reads(
    buffer: Buffer,
    start: int,
    end: int,
    enough: int,
    longest: int,
    size_bytes: int,
    header_bytes: int,
    run: array[int],
    /,
) -> int: ...
def pack_data_headers(replies: bytearray | memoryview, run: array[int], count: int, structured: bool, /) -> None: ...
