"""The unix socket that a server is about to claim."""

import errno
import os
import socket
import stat

from lockstep.errors import SocketUnusable


def clear_stale_socket(path: str, *, ours: bool = False) -> None:
    """Remove the socket of a server that died. Raises SocketUnusable when it is alive, or not a socket.

    `ours` is one where nobody listens who has not the lock that the caller has: also what another account left behind,
    which may not be asked, is of a server that died.
    """
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise SocketUnusable(path=path, reason="something that is not a socket has that name")
    except FileNotFoundError:
        return
    except OSError as error:
        raise SocketUnusable(path=path, reason=error.strerror) from error
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code == errno.EACCES and not ours:
        raise SocketUnusable(path=path, reason="it is another account's, as of a server that was killed")
    if code not in (errno.ECONNREFUSED, errno.EACCES):
        listening = code in (0, errno.EAGAIN)
        raise SocketUnusable(path=path, reason="another program is listening on it" if listening else os.strerror(code))
    try:
        os.unlink(path)
    except OSError as error:
        raise SocketUnusable(path=path, reason=error.strerror) from error
