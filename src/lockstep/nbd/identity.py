"""Who is at the other end of a connection, and what may be the name of a user.

    unix socket     the account of the connecting process, which the kernel vouches for (SO_PEERCRED)
    TLS             the common name of the client's certificate, which the certificate authority vouches for
    plain TCP       `anonymous`

One space of names: the account `alice` and the certificate of `alice` are the same user. On a unix socket, root may act
on behalf of any user, by the export name VOLUME@USER.
"""

import contextlib
import os
import pwd
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final

MAX_USER_CHARS: Final = 64  # ub-common-name of RFC 5280, appendix A.1
ANONYMOUS: Final = "anonymous"
NAMELESS: Final = "a client without a name yet"  # as logs call who has not shown a certificate

_UCRED: Final = Struct("3i")  # unix(7): pid, uid, gid


@dataclass(frozen=True)
class Peer:
    """The other end: its user, where it is (for the audit trail), and on a unix socket the id of its account."""

    user: str
    origin: str
    uid: int | None = None

    @property
    def is_root(self) -> bool:
        """Whether it may act on behalf of others."""
        return self.uid == 0


def is_user_name(text: str) -> bool:
    """Whether this can be a user: 1 to 64 printable characters, no space at either end, and not `*`, everybody."""
    return 0 < len(text) <= MAX_USER_CHARS and text.isprintable() and text == text.strip() and text != "*"


def peer_of(sock: socket.socket, *, tls: bool) -> Peer:
    """Return who is at the other end of a connected socket, as far as the socket knows; `tls` will tell the user.

    Raises OSError as `account` does.
    """
    if tls:
        return Peer(NAMELESS, f"tls {_remote_address(sock)}")
    if sock.family != socket.AF_UNIX:
        return Peer(ANONYMOUS, f"tcp {_remote_address(sock)}")
    pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(account(uid), f"unix socket, pid {pid}", uid)


def common_name(certificate: Mapping[str, Any]) -> str | None:
    """Return the user of a verified certificate (as `getpeercert` returns it); None if it names none, or several."""
    names = [value for rdn in certificate.get("subject", ()) for kind, value in rdn if kind == "commonName"]
    return names[0] if len(names) == 1 and is_user_name(names[0]) else None


def account(uid: int) -> str:
    """Return the name of an account; its number where it has none.

    Raises OSError where there is no descriptor left to look it up with, which otherwise is as if it had none.
    """
    for _ in range(2):
        with contextlib.suppress(KeyError):
            return pwd.getpwuid(uid).pw_name
        os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))
    return str(uid)


def _remote_address(sock: socket.socket) -> str:
    try:
        host, port = sock.getpeername()[:2]
    except OSError:  # ENOTCONN
        return "that is gone already"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
