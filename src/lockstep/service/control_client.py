"""Asking a served volume through its control socket: apart from the server's side, which needs a web framework."""

import contextlib
import http.client
import json
import os
import socket
from typing import Any, Final

from lockstep import errors
from lockstep.errors import NotManager, NotServed, ServerSilent
from lockstep.nbd.identity import account

ANSWER_TIMEOUT_S: Final = 10.0
_LONGEST_PATH: Final = 107  # unix(7): nobody can listen on a longer one


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, patience_s: float | None) -> None:
        super().__init__("localhost", timeout=patience_s)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask_status(path: str, volume: str) -> dict[str, Any]:
    """Ask the server behind the control socket at `path` how its volume stands; errors as for `ask`."""
    return ask(path, volume, "GET", "/v1/status")


def ask_patiently(path: str, volume: str, method: str, resource: str, **body: object) -> dict[str, Any]:
    """Like `ask`, for what takes as long as the server waits for a disk, which is its own affair (`--mirror-timeout`).

    Whether it answers at all is known before.
    """
    ask_status(path, volume)
    return ask(path, volume, method, resource, None, **body)


def ask(
    path: str,
    volume: str,
    method: str,
    resource: str,
    patience_s: float | None = ANSWER_TIMEOUT_S,
    /,
    **body: object,
) -> dict[str, Any]:
    """Have the server behind the control socket at `path` answer; `body` is sent as JSON.

    Raises NotServed, NotManager, ServerSilent when it hangs, and the error that it answers with.
    """
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise NotServed(volume=volume)
    with contextlib.closing(_UnixConnection(path, patience_s)) as connection:
        try:
            connection.request(method, resource, json.dumps(body) if body else None)
            answer = connection.getresponse()
            content = json.load(answer)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotServed(volume=volume) from error
        except PermissionError as error:
            action = f"ask the server of {volume}"
            raise NotManager(user=account(os.geteuid()), action=action, path=path) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerSilent(volume=volume, reason=str(error) or type(error).__name__) from error
    if answer.status == http.HTTPStatus.CONFLICT and isinstance(kind := getattr(errors, content["error"], None), type):
        raise kind(**content["data"])
    if answer.status != http.HTTPStatus.OK or not isinstance(content, dict):
        raise ServerSilent(volume=volume, reason=f"HTTP status {answer.status}")
    return content
