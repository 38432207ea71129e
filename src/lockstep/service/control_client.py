"""Asking a served volume through its control socket: apart from the server's side, which needs a web framework."""

import contextlib
import http.client
import json
import os
import socket
from typing import Any, Final

from lockstep.errors import NotServed, ServerSilent

ANSWER_TIMEOUT_S: Final = 10.0
_LONGEST_PATH: Final = 107  # unix(7): nobody can listen on a longer one


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=ANSWER_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ANSWER_TIMEOUT_S)
        self.sock.connect(self._path)


def ask_status(path: str, volume: str) -> dict[str, Any]:
    """Ask the server behind the control socket at `path`. Raises NotServed, or ServerSilent when it hangs."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise NotServed(volume=volume)
    with contextlib.closing(_UnixConnection(path)) as connection:
        try:
            connection.request("GET", "/v1/status")
            answer = connection.getresponse()
            described = json.load(answer)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotServed(volume=volume) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerSilent(volume=volume, reason=str(error) or type(error).__name__) from error
    if answer.status != http.HTTPStatus.OK or not isinstance(described, dict):
        raise ServerSilent(volume=volume, reason=f"HTTP status {answer.status}")
    return described
