"""What goes on beside the clients' requests: mirrors come in sync, tokens stay true, grants are read."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, Final

from lockstep.errors import LockstepError, MayNotRelease
from lockstep.registry.audit import Actor
from lockstep.registry.store import Registry
from lockstep.service.clients import Clients
from lockstep.service.gate import VolumeGate
from lockstep.service.trail import Trail
from lockstep.volume.gate import UPDATE
from lockstep.volume.link import MirrorLink
from lockstep.volume.resync import Resync
from lockstep.volume.write_path import WritePath

log = logging.getLogger(__name__)

GRANTS_INTERVAL_S: Final = 0.5  # so that a grant takes effect within a second, the time to read it included
TOKEN_INTERVAL_S: Final = 1.0
TIDY_INTERVAL_S: Final = 30.0
WARNING_INTERVAL_S: Final = 86400.0
SETTLE_S: Final = 10.0

SERVER: Final = Actor("lockstep", "server")


class Background:
    """The tasks of one served volume."""

    def __init__(
        self,
        volume_name: str,
        path: WritePath,
        resyncs: tuple[Resync, ...],
        gate: VolumeGate,
        clients: Clients,
        trail: Trail,
        registry: Registry,
        warnings: Callable[[], Iterable[str]],
        in_worker: Callable[..., Awaitable[None]],
    ) -> None:
        self._volume_name = volume_name
        self._path = path
        self._resyncs = resyncs
        self._gate = gate
        self._clients = clients
        self._trail = trail
        self._registry = registry
        self._warnings = warnings
        self._in_worker = in_worker
        self._stopping = asyncio.Event()
        self._states: dict[MirrorLink, str] = {}
        self._blind = False  # the registry could not be read when last tried

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run everything until the block ends; then each task stops after the step that it is at."""
        writing = asyncio.create_task(self._trail.run())
        self._trail.note("serve", SERVER, f"the volume {self._volume_name} is being served")
        work = [
            self._repeat(self._announce, TOKEN_INTERVAL_S),
            self._repeat(self._path.tidy, TIDY_INTERVAL_S),
            self._repeat(self._look, GRANTS_INTERVAL_S),
            self._repeat(self._warn, WARNING_INTERVAL_S),
            *(resync.run() for resync in self._resyncs),
        ]
        tasks = [asyncio.create_task(_reported(each)) for each in work]
        try:
            yield
        finally:
            self._stopping.set()
            for resync in self._resyncs:
                resync.stop()
            await asyncio.gather(*tasks)
            self._note_states()
            self._trail.note("stop", SERVER, f"the volume {self._volume_name} is not being served any more")
            await self._trail.settle(SETTLE_S)
            writing.cancel()

    async def sync(self, actor: Actor, *, include_held: bool) -> None:
        """Have everything copied that may be; with `include_held` also what is held, if `actor` may update the mirrors.

        Raises MayNotRelease.
        """
        if include_held and self._gate(actor.user) is not UPDATE:
            reason = self._trail.error or self._gate.verdict(actor.user).reason
            raise MayNotRelease(user=actor.user, volume=self._volume_name, reason=reason)
        released = 0
        for link in self._path.mirrors:
            link.target_error = None  # somebody looked at the target, and says that it is right
            if include_held:
                released += link.regions.held_bytes
                await link.release(link.held.regions())
        held = f", {released} held bytes included" if include_held else ""
        self._trail.note("sync", actor, f"{actor.user} had the mirrors brought in sync{held}", released_bytes=released)
        for resync in self._resyncs:
            resync.wake()

    async def _announce(self) -> None:
        for link in self._path.mirrors:
            await link.announce()

    async def _warn(self) -> None:
        for sentence in self._warnings():
            log.warning(sentence)

    async def _look(self) -> None:
        """See what has changed: in the registry, for the clients, with the mirrors."""
        await self._in_worker(self._read_grants)
        self._clients.look()
        self._note_states()

    def _read_grants(self) -> None:
        try:
            volume, grants = self._registry.volume(self._volume_name), self._registry.grants(self._volume_name)
        except LockstepError as failure:
            if not self._blind:
                log.warning("the registry cannot be read, the grants stay what they were: %s", failure)
            self._blind = True
            return
        self._blind = False
        self._gate.update(volume.on_denied, grants)

    def _note_states(self) -> None:
        for link in self._path.mirrors:
            state = link.state
            if self._states.get(link) != state:
                self._states[link] = state
                because = f": {link.error or link.target_error}" if link.error or link.target_error else ""
                self._trail.note(
                    "mirror",
                    SERVER,
                    f"mirror {link.path} is {state}{because}",
                    state=state,
                    dirty_bytes=link.regions.dirty_bytes,
                    held_bytes=link.regions.held_bytes,
                )

    async def _repeat(self, work: Callable[[], Awaitable[None]], interval_s: float) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(OSError):  # of a disk: whoever met it has said so, and the state shows it
                await work()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), interval_s)


async def _reported(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:
        log.exception("a background task failed; the mirror stays as far behind as it is")
