"""The unix socket that a server is about to claim."""

import errno
import os
import socket
import stat

from lockstep.errors import SocketUnusable


def clear_stale_socket(path: str) -> None:
    """Remove the socket of a server that died. Raises SocketUnusable when it is alive, or not a socket."""
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
    if code != errno.ECONNREFUSED:
        raise SocketUnusable(path=path, reason="another program is listening on it")
    os.unlink(path)
