"""How a mirror's disk comes to be open: at the start of a server, and again and again while it is away.

Both look at the disk in threads that nobody waits for too long: one that hangs must keep neither its volume from being
served, nor the server from its end. What is opened after patience is over is closed at once.
"""

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lockstep.crypto import luks
from lockstep.crypto.unlock import Unlock
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.mirror import open_mirror
from lockstep.disk.probe import inspect, leads_elsewhere, node_of
from lockstep.errors import DiskMissing, DiskUnreadable, LockstepError, MirrorBorrowed, RekeyUnfinished
from lockstep.registry.store import MirrorRecord, VolumeRecord
from lockstep.service.mirrors import header_path, identified
from lockstep.service.state import State
from lockstep.volume.workers import Workers

log = logging.getLogger(__name__)

OPENING_PATIENCE_S: Final = 60.0  # argon2id takes seconds


@dataclass
class Opened:
    """A mirror that is there: its header as it was read, and its disk, unlocked and locked against others."""

    header: luks.Header
    disk: EncryptedDisk
    unfit: str | None = None
    """Why it cannot be followed again before something is done about it."""


@dataclass
class Away:
    """A mirror that is not there, or not to be had."""

    reason: str


class MirrorOpener:
    """Opens one mirror of a volume, for writing. One attempt at a time."""

    def __init__(
        self, state: State, volume: VolumeRecord, mirror: MirrorRecord, unlock: Unlock, *, direct: bool = False
    ) -> None:
        self.header_path = header_path(mirror)
        self._header_node = (0, 0)  # what was found there
        self._state = state
        self._volume = volume
        self._mirror = mirror
        self._unlock = unlock
        self._direct = direct
        self._worker = Workers("lockstep-opener", 0)
        self._looking = threading.Thread()
        self._former: EncryptedDisk | None = None  # as it was open before: open, it is locked against ourselves
        self._awaited: list[Opened] | None = None  # where the attempt puts it that somebody waits for

    @property
    def at_rest(self) -> bool:
        """Whether no attempt is under way, also none that nobody waits for any more."""
        return self._worker.at_rest and not self._looking.is_alive()

    def header_left(self) -> bool:
        """Whether the header's path leads elsewhere since it was opened. Blocks."""
        return leads_elsewhere(self.header_path, self._header_node)

    def first(self, patience_s: float) -> Opened | Away:
        """Open it, unless it is away. Raises MirrorOfAnotherVolume, NoToken, and what `open_mirror` does."""
        path = self._mirror.path
        if not self.in_time(self._look_at, patience_s):
            log.error("mirror %s does not answer, the target goes on alone", path)
            return Away(f"it did not answer for {patience_s:g} s")
        try:
            inspect(path)
        except (DiskMissing, DiskUnreadable) as failure:
            log.error("mirror %s is away, the target goes on alone: %s", path, failure)
            return Away(f"it is away: {failure}")
        try:
            return self._open()
        except (MirrorBorrowed, RekeyUnfinished) as failure:
            log.error("mirror %s is not followed, the target goes on alone: %s", path, failure)
            return Away(str(failure))

    async def again(self, let_go: Callable[[], EncryptedDisk | None], unfit: Callable[[Opened], str | None]) -> Opened:
        """Close the disk as it was open before, if `let_go` gives one, and open it; `unfit` then looks at it.

        It is not let go before there is a thread that closes it; one that comes to nothing leaves that to the next.
        Raises as `first` does, and OSError.
        """
        self._awaited = opened = list[Opened]()
        try:
            self._worker = Workers("lockstep-opener", 1, OPENING_PATIENCE_S)
            self._former = let_go() or self._former
            await self._worker.run(self._reopen, unfit, opened)
            return opened.pop()
        except BaseException:
            self._awaited = None
            _close_left(opened)  # it may have come at the last moment
            raise
        finally:
            self._worker.close()

    def _reopen(self, unfit: Callable[[Opened], str | None], opened: list[Opened]) -> None:
        if self._former is not None:
            with contextlib.suppress(OSError):  # whatever it says at the end, it is closed
                self._former.close()
            self._former = None
        found = self._open()
        try:
            found.unfit = unfit(found)
        except BaseException:
            found.disk.close()
            raise
        opened.append(found)
        if self._awaited is not opened:
            _close_left(opened)

    def _open(self) -> Opened:
        mirror, size_bytes = self._mirror, self._volume.size_bytes
        with self._state.borrowing_lock(mirror.luks_uuid, shared=True) as free:
            if free is None:
                raise MirrorBorrowed(path=mirror.path)
            header = luks.read_header(self.header_path)
            self._header_node = node_of(self.header_path)
            _require_token(self._volume, mirror, header)
            where = (mirror.path, mirror.header_path, header)
            disk = open_mirror(*where, self._unlock, size_bytes, writable=True, direct=self._direct)
            return Opened(header, disk)

    def in_time(self, look: Callable[[], None], patience_s: float) -> bool:
        """Whether `look` ends in time, before there is a loop; else it goes on, and the opener is not at rest."""
        self._looking = threading.Thread(target=look, name="lockstep-look", daemon=True)
        self._looking.start()
        self._looking.join(patience_s)
        return not self._looking.is_alive()

    def _look_at(self) -> None:
        with contextlib.suppress(LockstepError):
            inspect(self._mirror.path)
            luks.read_uuid(self.header_path)


def _close_left(opened: list[Opened]) -> None:
    """Close the disk that was opened, unless another thread has taken it out."""
    with contextlib.suppress(IndexError):
        opened.pop().disk.close()


def _require_token(volume: VolumeRecord, mirror: MirrorRecord, header: luks.Header) -> None:
    """Refuse a mirror that is not the one that the registry means."""
    token = identified(volume, mirror, header)
    if token.generation < mirror.generation:
        log.warning(
            "mirror %s is an older copy of itself: its generation is %d, and %d was seen before",
            mirror.path,
            token.generation,
            mirror.generation,
        )
