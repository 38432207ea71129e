"""Work on a volume that nobody serves: verify it, by the same means as its server would."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from lockstep.crypto.cipher import self_test
from lockstep.crypto.unlock import Unlock
from lockstep.errors import AlreadyServed, LockstepError, RegistryError
from lockstep.registry.audit import Actor
from lockstep.registry.store import Registry
from lockstep.service.background import GRANTS_INTERVAL_S
from lockstep.service.gate import VolumeGate
from lockstep.service.managing import manager, unserved
from lockstep.service.memory import protect_memory
from lockstep.service.state import State
from lockstep.service.verification import MOST_MISMATCHES, of_comparison, sentence
from lockstep.service.volume_session import VolumeSession, open_volume
from lockstep.volume.link import MirrorLink
from lockstep.volume.verify import Comparison, Verify
from lockstep.volume.workers import Workers

log = logging.getLogger(__name__)

WORKERS = 4
PROGRESS_S = 0.2


def verify_at_rest(
    state: State,
    name: str,
    unlock: Unlock,
    *,
    repair: bool,
    on_progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Compare the mirrors of a volume with its target, and return what was found of each, and how it stands then.

    Nothing is changed, unless `repair`: then what differs is copied, if somebody may update the mirrors now.
    `on_progress` is given bytes done and bytes in all. Raises AlreadyServed, TargetUnlike for a repair, and whatever
    opening the volume raises.
    """
    protect_memory()
    self_test()
    actor = manager(state, f"verify {name}")
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(state.registry())
        volume = stack.enter_context(unserved(state, registry, name))
        if volume is None:
            raise AlreadyServed(volume=name)
        gate = VolumeGate(name, volume.on_denied, registry.grants(name))
        workers = Workers("lockstep-worker", WORKERS)
        stack.callback(workers.close)
        session = stack.enter_context(open_volume(state, volume, unlock, gate, workers))
        if repair:
            session.require_like()
        follow = functools.partial(_follow_grants, registry, name, gate)
        found = asyncio.run(_verify(session, follow, repair=repair, on_progress=on_progress))
        results = []
        for link, comparison in found.items():
            stands = {"state": link.state, "dirty_bytes": link.regions.dirty_bytes}
            results.append(of_comparison(link.path, comparison) | stands)
            _note(registry, actor, name, link.path, comparison)
        return results


def _note(registry: Registry, actor: Actor, name: str, path: str, comparison: Comparison) -> None:
    """Put it into the audit trail. What took hours to find is told also where that takes no row."""
    details = of_comparison(path, comparison, MOST_MISMATCHES)
    try:
        registry.audit("verify", actor=actor, volume=name, reason=sentence(path, comparison), details=details)
    except RegistryError as error:
        log.warning("the comparison of mirror %s is not in the audit trail: %s", path, error)


async def _follow_grants(registry: Registry, name: str, gate: VolumeGate) -> None:
    """Go by what the registry says, also hours later; while it cannot be read, by what it said."""
    while True:
        await asyncio.sleep(GRANTS_INTERVAL_S)
        with contextlib.suppress(LockstepError):
            grants = await asyncio.to_thread(registry.grants, name)
            gate.update((await asyncio.to_thread(registry.volume, name)).on_denied, grants)


async def _verify(
    session: VolumeSession,
    follow_grants: Callable[[], Coroutine[Any, Any, None]],
    *,
    repair: bool,
    on_progress: Callable[[int, int], None],
) -> dict[MirrorLink, Comparison]:
    following = asyncio.create_task(follow_grants())
    if repair:
        await session.claim()
    found = {}
    for mirror, resync in zip(session.mirrors, session.resyncs, strict=True):
        verify = Verify(session.writes, mirror.link, session.workers, repair=repair)
        found[mirror.link] = verify.found
        comparing = asyncio.ensure_future(verify.run())
        while not (await asyncio.wait([comparing], timeout=PROGRESS_S))[0]:
            on_progress(verify.found.done_bytes, verify.found.total_bytes)
        await comparing
        if repair:
            await resync.copy()
    following.cancel()
    if repair:
        await session.retire()
    return found
