"""Standard output as the place where data goes: a pipe, mostly. It takes bytes in order, once, and gives none back."""

import errno
import os
import select
from typing import Final

_ZEROES: Final = bytes(1 << 20)
_NOT_SYNCED: Final = frozenset({errno.EINVAL, errno.EROFS, errno.ENOTSUP})  # fsync(2): pipes, sockets and the like


class Stream:
    """A descriptor that is written from its position on. Failures are OSErrors."""

    in_order = True

    def __init__(self, fd: int) -> None:
        """Use `fd`, which stays open."""
        self._fd = fd
        self._position = 0
        self._writable = select.poll()
        self._writable.register(fd, select.POLLOUT)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data`, which must follow on what was written."""
        assert offset == self._position
        self._position += len(data)
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # whoever shares the pipe may have made it so
                self._writable.poll()

    def zero(self, offset: int, length: int) -> None:
        """Write zeroes."""
        for position in range(offset, offset + length, len(_ZEROES)):
            self.write(position, memoryview(_ZEROES)[: min(len(_ZEROES), offset + length - position)])

    def flush(self) -> None:
        """Make what was written durable, if it is a file or a disk."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            if error.errno not in _NOT_SYNCED:
                raise
