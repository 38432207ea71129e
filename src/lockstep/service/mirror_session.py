"""One mirror for as long as its volume is served: claimed at the start, kept true meanwhile, closed at the end.

The header's token and the local intent bitmap carry a generation. It grows whenever a server claims or retires the
mirror, by a step that nobody can guess: so the two agree only if nothing else happened to the mirror since, and two
copies of one mirror that went different ways never come to the same generation.

    start   bitmap of the token's generation?  the marked regions are dirty; else all are; but what is held is held
    claim   bitmap: generation g, following h, dirty regions;  token: h;  bitmap: settled
    serve   token: state, whenever it changes; "in-sync" only after a flush
            before marks are cleared: a new generation, in the same three steps
    retire  the same as claim, after both disks were flushed: only what differs is still marked

A power cut between any two of these leaves a pair that still fits. A mirror that was swapped, copied back or written
elsewhere has another generation, and everything is copied.
"""

import asyncio
import contextlib
import errno
import logging
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from typing import Final

from lockstep.crypto import luks
from lockstep.disk.mirror import open_mirror
from lockstep.disk.plain import PlainDisk
from lockstep.errors import LockstepError, MirrorOfAnotherVolume, NoToken, StateDirUnusable
from lockstep.registry.store import MirrorRecord, VolumeRecord
from lockstep.service.state import State
from lockstep.volume import intent
from lockstep.volume.held import HeldRecord
from lockstep.volume.intent import IntentBitmap
from lockstep.volume.link import BEHIND, FROZEN, IN_SYNC, MirrorLink
from lockstep.volume.regions import RegionMap

log = logging.getLogger(__name__)

ANNOUNCE_S: Final = 10.0


class MirrorSession:
    """A mirror, unlocked and locked against others; `link` is what the write path follows."""

    def __init__(
        self,
        state: State,
        volume: VolumeRecord,
        mirror: MirrorRecord,
        target: PlainDisk,
        passphrase: bytes,
        workers: Executor,
    ) -> None:
        """Open the mirror; nothing is changed yet.

        Raises MirrorOfAnotherVolume, NoToken, and whatever `open_mirror` does.
        """
        self.mirror = mirror
        self._target = target
        self._token_lock = threading.Lock()  # cryptsetup runs in worker threads
        self._workers = workers
        self._header_path = mirror.header_path or mirror.path
        header = luks.read_header(self._header_path)
        self._token = _checked_token(volume, mirror, header)
        self._token_id = header.token_id
        self.disk = open_mirror(mirror.path, mirror.header_path, header, passphrase, volume.size_bytes, writable=True)
        path = state.intent(mirror.luks_uuid)
        identity = intent.Identity(volume.id, mirror.luks_uuid, volume.size_bytes)
        self._state_dir = state.path
        self._intent = IntentBitmap(path, identity, self._in_worker)
        loaded = intent.load(path, identity, self._token.generation, target.written_ns())
        tells = self._token.state in (BEHIND, FROZEN)
        self._held = HeldRecord(state.held(mirror.luks_uuid), identity, self._in_worker, expected=tells)
        if not loaded.fits:
            self._held.frozen_since_s = None  # it is another mirror than the one that was frozen
        regions = RegionMap(volume.size_bytes, loaded.marked, self._held.regions())
        self.link = MirrorLink(mirror.path, mirror.luks_uuid, self.disk, regions, self._intent, self._held, self)

    @property
    def generation(self) -> int:
        """The generation that the token carries now."""
        return self._token.generation

    def claim(self) -> None:
        """From here on this server alone says what differs. Raises StateDirUnusable and what the token may."""
        self._claim(self.link.regions.dirty(), written_ns=0)

    async def announce(self, state: str) -> None:
        """Have the token say the state, if that has changed; a mirror that cannot be written is left.

        Waits at most ANNOUNCE_S: a mirror that hangs must not hold up its target's clients.
        """
        if self._token.state != state:
            writing = asyncio.ensure_future(self._in_worker(self._write_state, state))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(writing), ANNOUNCE_S)

    def retire(self) -> None:
        """Close in order: the target has been flushed and nobody writes any more. Raises as `claim` does."""
        self.link.flush()
        dirty = self.link.regions.dirty()
        marked = dirty if self.link.error is None else _either(dirty, self._intent.marked())
        self._claim(marked, self._target.written_ns())

    def close(self) -> None:
        """Close the disk, which gives up its lock."""
        self._intent.close()
        self._held.close()
        self.link.close()

    def _claim(self, marked: bytes, written_ns: int) -> None:
        try:
            self._held.claim()
            following = self._following()
            self._intent.claim(self._token.generation, following, marked)
            self._write_token(following, self.link.token_state)
            self._intent.settle(self._token.generation, written_ns)
        except OSError as error:
            raise StateDirUnusable(path=self._state_dir, reason=error.strerror or str(error)) from error

    def _write_state(self, state: str) -> None:
        if state == IN_SYNC:
            self.link.flush()
        try:
            self._write_token(self._token.generation, state)
        except LockstepError as error:
            self._token = replace(self._token, state=state)  # once is enough to say it
            log.warning("the header of mirror %s could not be updated: %s", self.mirror.path, error)

    async def advance(self) -> None:
        """Give mirror and bitmap a new generation: copies of the mirror from before are none of it."""
        following = self._following()
        await self._in_worker(self._intent.advance, self._token.generation, following)
        try:
            await self._in_worker(self._write_token, following, self._token.state)
        except LockstepError as error:
            raise OSError(errno.EIO, str(error)) from error
        await self._in_worker(self._intent.settle, self._token.generation)

    async def disown(self) -> None:
        """Have the next start copy everything: without a bitmap, or else with a generation that it does not fit."""
        try:
            await self._in_worker(self._intent.discard)
        except OSError as failure:
            try:
                await self._in_worker(self._write_token, self._following(), self.link.token_state)
            except LockstepError as error:
                raise OSError(failure.errno, f"neither the bitmap nor the mirror can be written: {error}") from error
            self._intent.ignore()

    async def _in_worker(self, work: Callable[..., None], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._workers, work, *args)

    def _following(self) -> int:
        return self._token.generation + 1 + secrets.randbits(31)

    def _write_token(self, generation: int, state: str) -> None:
        with self._token_lock:
            token = replace(self._token, generation=generation, state=state)
            luks.write_token(self._header_path, token, token_id=self._token_id)
            self._token = token


def _either(one: bytes, other: bytes) -> bytes:
    return bytes(a | b for a, b in zip(one, other, strict=True))


def _checked_token(volume: VolumeRecord, mirror: MirrorRecord, header: luks.Header) -> luks.Token:
    """Return the token of a mirror that is the one that the registry means."""
    token = header.token
    if token is None:
        raise NoToken(path=mirror.path)
    if token.volume_id != volume.id:
        raise MirrorOfAnotherVolume(path=mirror.path, volume=volume.name, owner=f"the volume {token.volume_name}")
    if header.uuid != mirror.luks_uuid:
        owner = f"another mirror of {volume.name} (LUKS UUID {header.uuid})"
        raise MirrorOfAnotherVolume(path=mirror.path, volume=volume.name, owner=owner)
    if token.generation < mirror.generation:
        log.warning(
            "mirror %s is an older copy of itself: its generation is %d, and %d was seen before",
            mirror.path,
            token.generation,
            mirror.generation,
        )
    return token
