"""The control interface of a served volume: HTTP on a unix socket, for root and the owner of the state directory.

GET  /v1/status    the volume as `status --json` prints it
POST /v1/sync      {"include_held": bool}: have what differs copied; with true, what is held too

The socket's mode lets only its owner connect; the peer is checked all the same. An error is {"error": its class,
"data": its fields}, so that the client can raise it again.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from aiohttp import web

from lockstep.errors import LockstepError, SocketUnusable
from lockstep.nbd.identity import Peer, peer_of
from lockstep.registry.audit import Actor


class Commands(Protocol):
    """What may be asked of a served volume."""

    def describe(self) -> dict[str, Any]:
        """Return the volume as `status --json` prints it."""

    async def sync(self, actor: Actor, *, include_held: bool) -> None:
        """Have what differs copied. Raises MayNotRelease."""


@contextlib.asynccontextmanager
async def control_interface(
    path: str, commands: Commands, require_manager: Callable[[int, str], None]
) -> AsyncIterator[None]:
    """Answer on the socket at `path`, whose volume's lock the caller holds.

    `require_manager` is given a peer's uid and what it is about to do, and raises NotManager. Raises SocketUnusable.
    """

    @web.middleware
    async def guarded(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        assert request.transport is not None
        request["peer"] = peer = peer_of(request.transport.get_extra_info("socket"), tls=False)
        assert peer.uid is not None
        try:
            require_manager(peer.uid, "manage the volume")
            return await handler(request)
        except LockstepError as error:
            return web.json_response({"error": type(error).__name__, "data": error.data}, status=409)

    async def answer_status(_request: web.Request) -> web.Response:
        return web.json_response(commands.describe())

    async def answer_sync(request: web.Request) -> web.Response:
        peer: Peer = request["peer"]
        asked = await request.json()
        await commands.sync(Actor(peer.user, peer.origin), include_held=bool(asked.get("include_held")))
        return web.json_response({})

    application = web.Application(middlewares=[guarded])
    application.router.add_get("/v1/status", answer_status)
    application.router.add_post("/v1/sync", answer_sync)
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
