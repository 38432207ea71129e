"""What goes on beside the clients' requests: mirrors come in sync and come back, tokens stay true, grants are read."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, Final

from lockstep.errors import LockstepError, MayNotRelease
from lockstep.registry import windows
from lockstep.registry.access import Grant
from lockstep.registry.audit import SERVER, Actor
from lockstep.registry.store import Registry, VolumeRecord
from lockstep.service.answers import in_time
from lockstep.service.clients import Clients
from lockstep.service.gate import VolumeGate
from lockstep.service.mirror_session import MirrorSession
from lockstep.service.trail import MIRROR, SERVED, Trail
from lockstep.service.verification import Verification
from lockstep.service.volume_session import VolumeSession
from lockstep.volume.gate import UPDATE
from lockstep.volume.link import MirrorLink
from lockstep.volume.resync import Resync

log = logging.getLogger(__name__)

GRANTS_INTERVAL_S: Final = 0.5  # so that a grant takes effect within a second, the time to read it included
TOKEN_INTERVAL_S: Final = 1.0
TIDY_INTERVAL_S: Final = 30.0
WARNING_INTERVAL_S: Final = 86400.0
ZONES_INTERVAL_S: Final = 3600.0  # for a time zone whose rules have changed
WATCH_INTERVAL_S: Final = 1.0
FIRST_RETURN_S: Final = 1.0
LAST_RETURN_S: Final = 60.0
STEADY_S: Final = 60.0  # a mirror that has been followed so long again is given a fresh start


class Background:
    """The tasks of one served volume."""

    def __init__(
        self,
        session: VolumeSession,
        gate: VolumeGate,
        clients: Clients,
        trail: Trail,
        verification: Verification,
        registry: Registry,
        in_clerk: Callable[..., Awaitable[Any]],
        warnings: Callable[[], Iterable[str]],
    ) -> None:
        """`in_clerk` runs a function that asks the registry; it must not have to wait for the disks."""
        self._session = session
        self._volume_name = session.record.name
        self._path = session.writes
        self._gate = gate
        self._clients = clients
        self._trail = trail
        self._verification = verification
        self._registry = registry
        self._in_clerk = in_clerk
        self._warnings = warnings
        self._stopping = asyncio.Event()
        # For each mirror, whether somebody wants it to be looked for now, if it is away.
        self._sought = {mirror: asyncio.Event() for mirror in session.mirrors}
        self._trying: set[MirrorSession] = set()
        self._states: dict[MirrorLink, str] = {}
        self._blind = False  # the registry could not be read when last tried
        self._reading = asyncio.Lock()
        self._asked: asyncio.Future[tuple[VolumeRecord, tuple[Grant, ...]]] | None = None  # of the registry, last
        self._unknown_zones: set[str] = set()  # of which the log has told

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run everything until the block ends; then each task stops after the step that it is at."""
        self._trail.note(SERVED, SERVER, f"the volume {self._volume_name} is being served")
        work = [
            self._repeat(self._announce, TOKEN_INTERVAL_S),
            self._repeat(self._session.look_after_target, TOKEN_INTERVAL_S),
            self._repeat(self._path.tidy, TIDY_INTERVAL_S),
            self._repeat(self._look, GRANTS_INTERVAL_S),
            self._repeat(self._warn, WARNING_INTERVAL_S),
            self._repeat(self._forget_zones, ZONES_INTERVAL_S),
            self._fill(),
            *(resync.run() for resync in self._session.resyncs),
            *(self._bring_back(*pair) for pair in zip(self._session.mirrors, self._session.resyncs, strict=True)),
        ]
        tasks = [asyncio.create_task(_reported(each)) for each in work]
        try:
            yield
        finally:
            self._stopping.set()
            self._seek()
            if self._session.filling is not None:
                self._session.filling.stop()
            for resync in self._session.resyncs:
                resync.stop()
            await self._verification.close()
            await asyncio.gather(*tasks)
            self._clients.look()
            self._note_states()
            self._trail.note("stop", SERVER, f"the volume {self._volume_name} is not being served any more")

    async def sync(self, actor: Actor, *, include_held: bool, compare: bool, everything: bool) -> None:
        """Have what differs copied, as far as it may be.

        With `include_held` also what is held, if `actor` may update the mirrors; with `everything` also what counts as
        equal. `compare` leaves alone what is equal already. Mirrors that are away are looked for at once.

        Raises MayNotRelease; StateDirUnusable or DiskBusy where what is held from a mirror stays held, or what counts
        as equal does; and TargetUnfinished where the target is being filled from one.
        """
        if include_held:
            await self._read_grants()  # who has just lost the right releases nothing
            self._require_release(actor)
        released, failure = 0, None
        self._path.durability_lost = None  # somebody looked at the target, and says that it is right
        for mirror in self._session.mirrors:
            mirror.link.target_error = None
            try:
                if everything:
                    await mirror.mark_all()
                if include_held:
                    released += await mirror.release_held(functools.partial(self._require_release, actor))
            except LockstepError as error:  # the others are brought in sync all the same
                failure = error
        all_of_it = ", with everything copied anew" if everything else ""
        held = f", {released} held bytes included" if include_held else ""
        reason = f"{actor.user} had the mirrors brought in sync{all_of_it}{held}"
        self._trail.note("sync", actor, reason, released_bytes=released)
        self._seek()
        for resync in self._session.resyncs:
            resync.compare = compare or resync.compare  # an adopted mirror goes on being compared
            resync.wake()
        if failure is not None:
            raise failure

    def _require_release(self, actor: Actor) -> None:
        if self._gate(actor.user) is not UPDATE:
            reason = self._trail.error or self._gate.verdict(actor.user).reason
            raise MayNotRelease(user=actor.user, volume=self._volume_name, reason=reason)

    def look_for_mirrors(self, actor: Actor) -> None:
        """Look at once for mirrors that are away."""
        self._trail.note("mirrors-sought", actor, f"{actor.user} had mirrors that are away looked for")
        self._seek()

    def seeks(self, mirror: MirrorSession) -> bool:
        """Whether a mirror that is away is being looked for, or is about to be."""
        return self._sought[mirror].is_set() or mirror in self._trying

    def _seek(self) -> None:
        for sought in self._sought.values():
            sought.set()

    async def _fill(self) -> None:
        """Fill a new target, if that is what it is; from the end on it is one like any other."""
        filling = self._session.filling
        if filling is None:
            return
        log.info("filling the new target: %d bytes", filling.left_bytes)
        await filling.run()
        noting: asyncio.Future[None] | None = None
        while filling.over and self._session.filling is not None:
            try:
                await self._path.flush()
                noting = noting or asyncio.ensure_future(self._session.workers.run(self._session.note_filled))
                await in_time(noting)
            except (LockstepError, OSError) as failure:
                noting = None if noting is None or noting.done() else noting
                log.warning("the new target has everything, but that could not be noted yet: %s", failure)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), WATCH_INTERVAL_S)
                if self._stopping.is_set():
                    return
            else:
                self._session.end_filling()
                log.info("the new target has everything")

    async def _bring_back(self, session: MirrorSession, resync: Resync) -> None:
        """Follow a mirror again that failed or was away, as soon as it can be opened.

        The longer it is away, and the more often it fails, the longer the time between attempts.
        """
        link, sought, delay_s, back_s = session.link, self._sought[session], FIRST_RETURN_S, 0.0
        while not self._stopping.is_set():
            away = link.error is not None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(sought.wait(), delay_s if away else WATCH_INTERVAL_S)
            now = sought.is_set()
            sought.clear()  # before the attempt: who asks during it may know of what it has not seen
            if self._stopping.is_set():
                return
            if link.error is None:
                if time.monotonic() - back_s > STEADY_S:
                    delay_s = FIRST_RETURN_S
            elif not (away or now):
                pass  # it failed just now
            elif await self._comes_back(session):
                back_s = time.monotonic()
                delay_s = min(delay_s * 2, LAST_RETURN_S)
                resync.wake()
            else:
                delay_s = min(delay_s * 2, LAST_RETURN_S)

    async def _comes_back(self, session: MirrorSession) -> bool:
        self._trying.add(session)
        try:
            return await session.come_back()
        except Exception:
            log.exception("mirror %s cannot be followed again yet", session.mirror.path)
            return False
        finally:
            self._trying.discard(session)

    async def _announce(self) -> None:
        for session in self._session.mirrors:
            await session.look()
            await session.link.announce()

    async def _warn(self) -> None:
        for sentence in self._warnings():
            log.warning(sentence)

    async def _forget_zones(self) -> None:
        windows.forget_zones()

    async def _look(self) -> None:
        """See what has changed: in the registry, for the clients, with the mirrors."""
        await self._read_grants()
        self._clients.look()
        self._verification.look()
        self._note_states()

    async def _read_grants(self) -> None:
        """Go by what the registry says now: one reader after the other, or what was read first could be the last."""
        async with self._reading:
            try:
                volume, grants = await self._ask()
            except (LockstepError, TimeoutError) as failure:
                if not self._blind:
                    log.warning("the registry cannot be read, the grants stay what they were: %s", failure)
                self._blind = True
                return
            self._blind = False
            self._gate.update(volume.on_denied, grants)
            self._verification.schedule = volume.scrub
            self._tell_of_unknown_zones({each.timezone for each in (*grants, volume.scrub) if each is not None})

    async def _ask(self) -> tuple[VolumeRecord, tuple[Grant, ...]]:
        if self._asked is not None and not self._asked.done():
            raise TimeoutError("the registry does not answer")
        self._asked = asyncio.ensure_future(self._in_clerk(self._registered))
        return await in_time(self._asked)

    def _registered(self) -> tuple[VolumeRecord, tuple[Grant, ...]]:
        return self._registry.volume(self._volume_name), self._registry.grants(self._volume_name)

    def _tell_of_unknown_zones(self, zones: set[str]) -> None:
        found = {zone for zone in zones if not windows.is_known(zone)}
        for zone in sorted(found - self._unknown_zones):
            log.warning(
                "this machine does not know the time zone %s: windows in it stay closed, of grants and of scrubs. "
                "Update its tzdata, or set them anew in another zone",
                zone,
            )
        self._unknown_zones = found

    def _note_states(self) -> None:
        for link in self._path.mirrors:
            state = link.state
            if self._states.get(link) != state:
                self._states[link] = state
                because = f": {link.error or link.target_error}" if link.error or link.target_error else ""
                self._trail.note(
                    MIRROR,
                    SERVER,
                    f"mirror {link.path} is {state}{because}",
                    luks_uuid=link.uuid,
                    state=state,
                    dirty_bytes=link.regions.dirty_bytes,
                    held_bytes=link.regions.held_bytes,
                )

    async def _repeat(self, work: Callable[[], Awaitable[None]], interval_s: float) -> None:
        while not self._stopping.is_set():
            try:
                await work()
            except OSError:  # of a disk: whoever met it has said so, and the state shows it
                pass
            except Exception:
                log.exception("something in the background failed, and is tried again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), interval_s)


async def _reported(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:
        log.exception("a background task failed; the mirror stays as far behind as it is")
