"""What the transport needs of a disk."""

from array import array
from collections.abc import Awaitable, Sequence
from typing import Protocol

from lockstep.nbd.negotiation import ExportInfo


class Export(Protocol):
    """What the transport needs of a disk. Offsets and lengths are bytes and lie within `info.size_bytes`.

    Failures are OSErrors, whose errno the client gets. `user` is who the connection belongs to.
    """

    info: ExportInfo

    def read_run(self, into: bytearray, run: "array[int]", count: int) -> int:
        """Carry out as many reads of a run (frames.py) as can be at once; return how many, from the front."""

    def write_run(self, user: str, data: memoryview, run: "array[int]", count: int) -> int:
        """Carry out as many writes of a run (frames.py) as can be at once; return how many, from the front."""

    def half_done(self) -> bool:
        """Whether what `write_run` did not carry out may be begun, and so has to be given to `write` at once."""

    def read(self, into: memoryview, run: "array[int]", count: int) -> Awaitable[None]:
        """Carry out the first `count` reads of a run, before what is returned ends."""

    def write(self, user: str, data: memoryview, run: "array[int]", count: int, *, durable: bool) -> Awaitable[None]:
        """Carry out the first `count` writes of a run, before what is returned ends; `durable` is FUA."""

    async def zero(self, user: str, offset: int, length: int, *, durable: bool, allocate: bool) -> None:
        """Write zeroes; `allocate` is NO_HOLE."""

    async def trim(self, user: str, offset: int, length: int, *, durable: bool) -> None:
        """Give up the content."""

    def flush(self) -> Awaitable[None]:
        """Make every write that was answered so far durable, before what is returned ends."""

    async def cache(self, offset: int, length: int) -> None:
        """Prepare for reads."""

    async def allocation(self, offset: int, length: int, limit: int) -> Sequence[tuple[int, int]]:
        """Return at most `limit` pairs (length in bytes, NBD STATE_ flags) from `offset` on, not past `length`."""
