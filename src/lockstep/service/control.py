"""The control interface of a served volume: HTTP on a unix socket, for root and the owner of the state directory.

GET  /v1/status    the volume as `status --json` prints it
POST /v1/sync      {"include_held": bool, "compare": bool, "everything": bool}: have what differs copied, if wanted what
                   is held too, if wanted only where a comparison shows it, and if wanted what counts as equal as well
POST /v1/mirrors   look at once for mirrors that are away
POST /v1/aside     {"mirror": LUKS UUID, "for": "rekey" or "drill"}: stop following that mirror, in order
POST /v1/verify    {"repair": bool}: begin to compare the mirrors with the target
GET  /v1/verify    what the last one found; while one is under way, answered when it ends, or within PROGRESS_S with how
                   far it is, without the mismatches
DELETE /v1/verify  end it early

The socket's mode lets only its owner connect; the peer is checked all the same. An error is {"error": its class,
"data": its fields}, so that the client can raise it again. What is wanted is `true`, and nothing else is.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, Protocol

from aiohttp import web

from lockstep.errors import LockstepError, SocketUnusable
from lockstep.nbd.identity import Peer, peer_of
from lockstep.registry.audit import Actor
from lockstep.service.borrowing import DRILL, REKEY

PROGRESS_S: Final = 0.2
STALL_S: Final = 5.0  # for a peer to send all of a request, and at the end to take an answer


class Commands(Protocol):
    """What may be asked of a served volume."""

    def describe(self) -> dict[str, Any]:
        """Return the volume as `status --json` prints it."""

    async def sync(self, actor: Actor, *, include_held: bool, compare: bool, everything: bool) -> None:
        """Have what differs copied, or with `everything` all. Raises MayNotRelease, TargetUnfinished."""

    def look_for_mirrors(self, actor: Actor) -> None:
        """Look at once for mirrors that are away."""

    async def let_go(self, luks_uuid: str, purpose: str) -> None:
        """Stop following a mirror, in order, for another command. Raises DiskBusy, MirrorNotDrilled."""

    def verify(self, actor: Actor, *, repair: bool) -> None:
        """Begin to compare. Raises AlreadyVerifying."""

    async def stop_verifying(self) -> None:
        """End a comparison early."""

    async def verified(self, patience_s: float) -> dict[str, Any]:
        """Return what the last comparison found; one that is under way, when it ends, or else how far it is by then."""


@contextlib.asynccontextmanager
async def control_interface(
    path: str, commands: Commands, require_manager: Callable[[int, str], None]
) -> AsyncIterator[None]:
    """Answer on the socket at `path`, whose volume's lock the caller holds.

    `require_manager` is given a peer's uid and what it is about to do, and raises NotManager. At the end, what is being
    carried out is waited for, and no peer that stalls. Raises SocketUnusable.
    """
    under_way: set[asyncio.Future[web.StreamResponse]] = set()

    @web.middleware
    async def guarded(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        assert request.transport is not None
        request["peer"] = peer = peer_of(request.transport.get_extra_info("socket"), tls=False)
        assert peer.uid is not None
        try:
            require_manager(peer.uid, "manage the volume")
            async with asyncio.timeout(STALL_S):
                await request.read()
            command = asyncio.ensure_future(handler(request))
            under_way.add(command)
            command.add_done_callback(under_way.discard)
            return await command
        except LockstepError as error:
            return web.json_response({"error": type(error).__name__, "data": error.data}, status=409)

    async def answer_status(_request: web.Request) -> web.Response:
        return web.json_response(commands.describe())

    async def answer_sync(request: web.Request) -> web.Response:
        asked = await _asked(request)
        how = {each: asked.get(each) is True for each in ("include_held", "compare", "everything")}
        await commands.sync(_actor(request), **how)
        return web.json_response({})

    async def look_for_mirrors(request: web.Request) -> web.Response:
        commands.look_for_mirrors(_actor(request))
        return web.json_response({})

    async def let_go(request: web.Request) -> web.Response:
        asked = await _asked(request)
        await commands.let_go(str(asked.get("mirror")), DRILL if asked.get("for") == DRILL else REKEY)
        return web.json_response({})

    async def begin_verify(request: web.Request) -> web.Response:
        commands.verify(_actor(request), repair=(await _asked(request)).get("repair") is True)
        return web.json_response({})

    async def answer_verify(_request: web.Request) -> web.Response:
        return web.json_response(await commands.verified(PROGRESS_S))

    async def end_verify(_request: web.Request) -> web.Response:
        await commands.stop_verifying()
        return web.json_response(await commands.verified(0))

    application = web.Application(middlewares=[guarded])
    application.router.add_get("/v1/status", answer_status)
    application.router.add_post("/v1/sync", answer_sync)
    application.router.add_post("/v1/mirrors", look_for_mirrors)
    application.router.add_post("/v1/aside", let_go)
    application.router.add_post("/v1/verify", begin_verify)
    application.router.add_get("/v1/verify", answer_verify)
    application.router.add_delete("/v1/verify", end_verify)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=STALL_S)
    await runner.setup()
    await _listen(runner, path)
    try:
        yield
    finally:
        await _stop(runner, under_way)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


async def _listen(runner: web.AppRunner, path: str) -> None:
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


async def _stop(runner: web.AppRunner, under_way: set[asyncio.Future[web.StreamResponse]]) -> None:
    for site in list(runner.sites):
        await site.stop()
    if under_way:
        await asyncio.wait(under_way)
    await runner.cleanup()


async def _asked(request: web.Request) -> dict[str, Any]:
    """Return the body; who sends what is no JSON object is told so. Of what can be wanted, `true` alone wants it."""
    with contextlib.suppress(ValueError):
        asked = await request.json()
        if isinstance(asked, dict):
            return asked
    raise web.HTTPBadRequest(text="the body is no JSON object")


def _actor(request: web.Request) -> Actor:
    peer: Peer = request["peer"]
    return Actor(peer.user, peer.origin)
