"""The control interface of a served volume: HTTP on a unix socket that its owner alone may connect to.

GET /v1/status    the volume as `status --json` prints it
"""

import contextlib
import http.client
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from aiohttp import web

from lockstep.errors import NotServed, ServerSilent, SocketUnusable

ANSWER_TIMEOUT_S: Final = 10.0


@contextlib.asynccontextmanager
async def control_interface(path: str, describe: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
    """Answer on the socket at `path`, whose volume's lock the caller holds. Raises SocketUnusable."""

    async def answer_status(_request: web.Request) -> web.Response:
        return web.json_response(describe())

    application = web.Application()
    application.router.add_get("/v1/status", answer_status)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # of a server that died: whoever holds the lock is the only one
    previous = os.umask(0o177)
    try:
        await web.UnixSite(runner, path).start()
    except OSError as error:
        await runner.cleanup()
        raise SocketUnusable(path=path, reason=error.strerror or str(error)) from error
    finally:
        os.umask(previous)
    try:
        yield
    finally:
        await runner.cleanup()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


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
