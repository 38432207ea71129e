"""The control interface of a served volume: HTTP on a unix socket that its owner alone may connect to.

GET /v1/status    the volume as `status --json` prints it
"""

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import web

from lockstep.errors import SocketUnusable


@contextlib.asynccontextmanager
async def control_interface(path: str, describe: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
    """Answer on the socket at `path`, whose volume's lock the caller holds. Raises SocketUnusable."""

    async def answer_status(_request: web.Request) -> web.Response:
        return web.json_response(describe())

    application = web.Application()
    application.router.add_get("/v1/status", answer_status)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    previous = os.umask(0o177)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of a server that died: whoever holds the lock is the only one
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
