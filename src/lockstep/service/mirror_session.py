"""One mirror for as long as its volume is served: claimed at the start, kept true meanwhile, closed at the end.

The header's token and the local intent bitmap carry a generation. It grows whenever a server claims or retires the
mirror, by a step that nobody can guess: so the two agree only if nothing else happened to the mirror since, and two
copies of one mirror that went different ways never come to the same generation.

    start   bitmap of the token's generation?  the marked regions are dirty; else all are; but what is held is held
    claim   bitmap: generation g, following h, dirty regions;  token: h;  bitmap: settled
    serve   token: state, whenever it changes; "in-sync" only after a flush
            before marks are cleared, and before the mirror freezes: a new generation, in the same three steps
    aside   to be re-keyed: with a new generation, so that no header with the old key is ever taken for its own
    return  of a mirror that failed, was away, or was re-keyed: as at the start, with a new generation: the one that it
            was is never taken for it, and what was begun from it meanwhile, an overlay or half a restore, fits it no
            more
    retire  the same as claim, after both disks were flushed; only what differs is still marked when it is settled

A power cut between any two of these leaves a pair that still fits. A mirror that was swapped, copied back or written
elsewhere has another generation, and everything is copied; unless it is whole, and the target is a stranger to it, or
the mirror is newer than the bitmap and differs at all (spot_check.py): it may be the only copy. While a mirror is away
the bitmap keeps the generation that the mirror was last given, so that it fits when the mirror is back.

The header is written by one thread of its own, by way of cryptsetup, and only where it is the one that was left. A
mirror whose header does not answer, or cannot say what it has to, is dropped like one whose data does not.
"""

import asyncio
import errno
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from lockstep.crypto import luks
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.plain import PlainDisk
from lockstep.disk.transfer import SHORTER
from lockstep.errors import (
    DiskBusy,
    DiskChanged,
    LockstepError,
    MirrorNotDrilled,
    TargetUnfinished,
)
from lockstep.registry.store import MirrorRecord, VolumeRecord
from lockstep.service.borrowing import DRILL, REKEY
from lockstep.service.mirror_opening import OPENING_PATIENCE_S, MirrorOpener, Opened
from lockstep.service.state import State
from lockstep.volume import intent
from lockstep.volume.held import HeldRecord
from lockstep.volume.intent import IntentBitmap
from lockstep.volume.link import BEHIND, DEGRADED, FROZEN, IN_SYNC, SYNCING, WHOLE, MirrorLink
from lockstep.volume.pages import union
from lockstep.volume.regions import RegionMap
from lockstep.volume.spot_check import SpotCheck, spot_check
from lockstep.volume.workers import Workers
from lockstep.volume.write_path import WritePath

log = logging.getLogger(__name__)

MIRROR_THREADS: Final = 8
REST_INTERVAL_S: Final = 0.02
NOT_RECORDED: Final = "what was written meanwhile could not be recorded in the state directory"
_ASIDE: Final = {
    DRILL: "it is being drilled; what is written meanwhile is copied afterwards",
    REKEY: "it is being re-keyed, or that is not finished: lockstep key rekey {volume}",
}


class MirrorSession:
    """A mirror, unlocked and locked against others as long as it is there; `link` is what the write path follows."""

    def __init__(
        self,
        state: State,
        volume: VolumeRecord,
        mirror: MirrorRecord,
        target: PlainDisk,
        opener: MirrorOpener,
        workers: Workers,
        patience_s: float,
    ) -> None:
        """Open the mirror, unless it is away; nothing is changed yet. Raises as `MirrorOpener.first` does."""
        self.mirror = mirror
        self._volume = volume
        self._target = target
        self._opener = opener
        self._patience_s = patience_s
        self._state = state
        self._in_worker = workers.run
        self._scribe = Workers("lockstep-header", 1, patience_s)
        self._last_failure = ""
        self._claimed = False  # until then nothing of it is changed, whatever is done with the volume
        self._disowned = False
        self._unsaid: str | None = None  # what could not be written to the header of a mirror that was dropped
        self._advancing = asyncio.Lock()  # two at once would give the bitmap a generation, and the mirror another
        found = opener.first(patience_s)
        header = found.header if isinstance(found, Opened) else None
        token = header.token if header else None
        path = state.intent(mirror.luks_uuid)
        identity = intent.Identity(volume.id, mirror.luks_uuid, volume.size_bytes)
        loaded = intent.load(path, identity, token.generation if token else None, target.written_ns())
        # What the mirror's token may say for the bitmap to fit it.
        known = loaded.generations[0] if loaded.generations else mirror.generation
        generation = token.generation if token else known
        self._generations = loaded.named
        self._newest = max(mirror.generation, *self._generations, generation)
        self._token = token or luks.Token(volume.id, volume.name, volume.size_bytes, generation, DEGRADED)
        self._token_id = header.token_id if header else None
        self._intent = IntentBitmap(path, identity, workers.run)
        tells = token is not None and token.state in (BEHIND, FROZEN)
        expected = tells or loaded.of_mirror
        self._held = HeldRecord(state.held(mirror.luks_uuid), identity, workers.run, expected=expected)
        if not loaded.of_mirror:
            self._held.frozen_since_s = None  # it is another mirror than the one that was frozen
        self._changed = loaded.changed or intent.WRITTEN
        # If the bitmap does not fit, where the two are known to have differed; until the mirror is followed.
        self._unaccounted = None if loaded.fits else union(loaded.left or bytes(identity.regions), self._held.regions())
        regions = RegionMap(volume.size_bytes, loaded.marked, self._held.regions())
        self.link = MirrorLink(mirror.path, mirror.luks_uuid, regions, self._intent, self._held, self)
        self.link.as_left = loaded.fits
        self._found = found.disk if isinstance(found, Opened) else None  # as it was opened first
        self._doubted: tuple[int, ...] = ()  # where it differed from the target when the two were compared last
        if isinstance(found, Opened):
            self.link.admit(found.disk, self._new_workers())
        else:
            self.link.stay_away(found.reason)

    @property
    def generation(self) -> int:
        """The newest generation that the token was known to carry."""
        return max(self.mirror.generation, self._token.generation)

    @property
    def older(self) -> bool:
        """Whether it is an older copy of itself: another generation of it was seen before."""
        return self._token.generation < self._newest

    # --- start and end ---

    def check(self) -> SpotCheck:
        """Compare the mirror with the target in some places, before it is claimed. Blocks; drops one that hangs."""
        disk, found = self._found, [SpotCheck(0, ())]
        if disk is None:
            return found[0]
        if not self._opener.in_time(lambda: found.append(self._spot_check(disk, self._token)), OPENING_PATIENCE_S):
            failure = TimeoutError(errno.ETIMEDOUT, f"it did not answer for {OPENING_PATIENCE_S:g} s")
            self.link.drop("comparing", failure)
        return found[-1]

    def follow_if_like(self, check: SpotCheck) -> None:
        """Let the mirror be as it is, and the target go on alone, if the two do not belong together."""
        if unlike := self._unlike(check):
            self.link.step_aside(unlike)

    async def claim(self) -> None:
        """From here on this server alone says what differs. Raises StateDirUnusable.

        A mirror that cannot be told, or does not answer, is dropped: it has the generation that the records know.
        """
        if self.link.error is None:
            self._unaccounted = None
        with self._state.told():
            await self._in_worker(self._claim_records, self.link.regions.dirty(), 0)
        if self.link.error is None:
            try:
                await self.advance(self.link.token_state)
            except OSError as failure:
                self.link.drop("claiming", failure)
        self._claimed = True

    async def retire(self) -> None:
        """Close in order: the target has been flushed and nobody writes any more.

        Raises StateDirUnusable and what the token may.
        """
        await self.link.flush()
        try:
            await self._scribe.run(self._retire, self.link.regions.dirty(), self._target.written_ns())
        except TimeoutError as failure:
            self.link.drop("closing", failure)

    def close(self) -> None:
        """Close the disk, which gives up its lock, unless it hangs: then that is left to the process's end."""
        self._intent.close()
        self._held.close()
        self._scribe.close()
        self.link.close()

    def _claim_records(self, marked: bytes, written_ns: int) -> None:
        """Write the records anew; the mirror has the generation that it has.

        What was not accounted for stays so, until the mirror is back and was compared.
        """
        self._held.claim()
        known = marked if self._unaccounted is None else self._unaccounted
        self._intent.claim(*self._generations, union(known, self._intent.marked()), self._written_ns or written_ns)

    def _retire(self, marked: bytes, written_ns: int) -> None:
        with self._state.told():
            if self.link.error is not None:  # it cannot be given another; nor by now, if it was dropped meanwhile
                self._claim_records(marked, written_ns)
                return
            self._held.claim()
            self._see_generation()
            following = self._following()
            kept = union(marked, self._intent.marked())  # a copy of the mirror from before still fits
            self._intent.claim(self._token.generation, following, kept)
            self._write_token(following, self.link.token_state)
            self._intent.claim(following, following, marked, written_ns)
            self._generations = (following, following)

    # --- what the mirror says of itself ---

    async def announce(self, state: str) -> None:
        """Have the token say the state, if that has changed; a mirror that cannot be written is left.

        One that does not answer is dropped, and after that not asked any more.
        """
        said = self._token.state == state and self._scribe.at_rest  # nor is another about to be said
        if not self._claimed or said or self.link.silent or self._token_id is None or self._unsaid == state:
            return
        if state == IN_SYNC and not (await self.link.flush() and self.link.equal):  # it was until a moment ago
            return
        try:
            await self._scribe.run(self._write_state, state)
        except LockstepError as failure:
            self._unsaid = state
            log.warning("the header of mirror %s could not be updated: %s", self.mirror.path, failure)
            self.link.drop("updating the header of", _as_disk_error(failure))
        except TimeoutError as failure:
            self.link.drop("updating the header of", failure)

    async def look(self) -> None:
        """Drop the mirror that is not all there, or where nobody would find it: a path of it leads elsewhere by now."""
        if self.link.error is not None:
            return
        try:
            lost = await self._scribe.run(self._lost)
        except TimeoutError as failure:
            self.link.drop("looking after", failure)
            return
        if lost is not None:
            self.link.drop("looking after", lost)

    def _lost(self) -> OSError | None:
        if self.link.cut_short():
            return OSError(errno.EIO, SHORTER)
        left = self._left()
        return OSError(errno.ESTALE, f"{left} leads to another file by now, or to none") if left else None

    def _left(self) -> str | None:
        """The path of it that leads elsewhere since it was opened, if one does."""
        if self.link.left():
            return self.mirror.path
        return self._opener.header_path if self._opener.header_left() else None

    async def advance(self, state: str | None = None) -> None:
        """Give mirror and bitmap a new generation: copies of the mirror from before are none of it.

        The mirror says the `state` with it; without, the one that it says by then. Raises OSError, also of a mirror
        that was disowned: the bitmap lacks something, and must not fit it.
        """
        async with self._advancing:
            if self._disowned:
                raise OSError(errno.ENOSPC, NOT_RECORDED)
            await self._ask_scribe(self._see_generation)
            generation, following = self._token.generation, self._following()
            await self._in_worker(self._intent.advance, generation, following, self._written_ns)
            self._generations = (generation, following)
            await self._ask_scribe(self._write_generation, following, state)
            await self._in_worker(self._intent.settle, following, self._written_ns)
            self._generations, self._last_failure = (following, following), ""

    @property
    def _written_ns(self) -> int:
        return 0 if self._unaccounted is None else self._changed

    async def _ask_scribe(self, work: Callable[..., None], *args: int | str | None) -> None:
        """Have something done about the header. Raises OSError; a mirror that is another one by now is dropped."""
        try:
            await self._scribe.run(work, *args)
        except LockstepError as error:
            failure = _as_disk_error(error)
            if isinstance(error, DiskChanged):
                self.link.drop("looking after", failure)
            if self.link.error is None and str(error) != self._last_failure:
                self._last_failure = str(error)
                log.warning("the header of mirror %s could not be updated, its marks stay: %s", self.mirror.path, error)
            raise failure from error
        except TimeoutError as failure:
            self.link.drop("updating the header of", failure)
            raise

    async def disown(self) -> None:
        """Have the next start copy everything: without a bitmap, or else with a generation that it does not fit."""
        self._disowned = True  # at once: a mirror that is coming back is not followed then
        async with self._advancing:  # a generation that is under way would be one that the bitmap fits
            try:
                await self._in_worker(self._intent.discard)
            except OSError as failure:
                try:
                    await self._scribe.run(self._write_token, self._following(), self.link.token_state)
                except (LockstepError, TimeoutError) as error:
                    said = f"neither the bitmap nor the mirror can be written: {error}"
                    raise OSError(failure.errno, said) from error
                self._intent.ignore()

    def _write_state(self, state: str) -> None:
        if self._token.state != state:
            self._write_token(self._token.generation, state)

    def _see_generation(self) -> None:
        """See which generation the header has: of one that could not be written its first copy may be, and counts."""
        now, soon = self._generations
        if now != soon:
            self._token = self._require_same_mirror()

    def _write_generation(self, generation: int, state: str | None) -> None:
        self._write_token(generation, state or self._token.state)  # by now: a state may have been waiting to be written

    def _following(self) -> int:
        """Return a new generation, above every one that was ever seen: else an older copy would look like the newer."""
        self._newest = max(self._newest, self._token.generation) + 1 + secrets.randbits(31)
        return self._newest

    def _write_token(self, generation: int, state: str) -> None:
        self._require_same_mirror()
        token = replace(self._token, generation=generation, state=state)
        luks.write_token(self._opener.header_path, token, token_id=self._token_id)
        self._token = token

    def _require_same_mirror(self) -> luks.Token:
        """Return what the header says; DiskChanged unless the paths lead to the mirror as it was opened, and left.

        A copy of it would be given a generation that vouches for what it does not hold.
        """
        if left := self._left():
            raise DiskChanged(path=left)
        found = luks.read_header(self._opener.header_path)
        known = (self._token.generation, *self._generations)
        if found.uuid != self.mirror.luks_uuid or found.token is None or found.token.generation not in known:
            raise DiskChanged(path=self._opener.header_path)
        return found.token

    async def release_held(self, require_right: Callable[[], None]) -> int:
        """Have everything that is held copied; return how much that is, in bytes.

        Raises what `require_right` does at the moment of the release, StateDirUnusable, and DiskBusy while the mirror
        is just being claimed.
        """
        self._require_claimed()
        held_bytes = self.link.regions.held_bytes

        def held() -> bytes:
            require_right()
            return self.link.held.regions()

        with self._state.told():
            await self.link.release(held)
        return held_bytes

    async def mark_all(self) -> None:
        """Have all of it copied, but for what is held.

        Raises StateDirUnusable, TargetUnfinished if the target is being filled from it, and DiskBusy while it is just
        being claimed.
        """
        self._require_claimed()
        self._require_no_source()
        with self._state.told():
            await self.link.doubt()

    def _require_no_source(self) -> None:
        if self.link.is_source:
            volume = self._volume
            raise TargetUnfinished(path=volume.target_path, volume=volume.name, mirror=self.mirror.path)

    def _require_claimed(self) -> None:
        if not self._claimed:
            raise DiskBusy(path=self.mirror.path, users="in use by its server, which is just starting")

    # --- being away, and coming back ---

    async def step_aside(self, path: WritePath, purpose: str) -> None:
        """Let another command have the mirror: from here on nobody here has it open, and it says that it is aside.

        Raises DiskBusy if it does not answer, or is just being claimed; TargetUnfinished if the target is being filled
        from it; and MirrorNotDrilled if it could not be used, where that is the purpose.
        """
        self._require_claimed()
        self._require_no_source()  # its clients could not read what the target lacks
        if purpose == DRILL and not self.link.consistent:
            raise MirrorNotDrilled(path=self.mirror.path, state=self.link.state)
        left_as = await path.part_from(self.link, _ASIDE[purpose].format(volume=self._volume.name))
        try:
            await self._come_to_rest()
            if self._token_id is not None:
                await self._scribe.run(self._write_state, left_as)
                if purpose == REKEY:  # a copy of its header from before would fit, and open noise
                    await self.advance()
        except TimeoutError:
            self.link.stay_away("it did not answer when it was to be let go")
            raise DiskBusy(path=self.mirror.path, users="in use by its server, which waits for it") from None
        except (LockstepError, OSError) as failure:  # it can be used all the same, whatever it says
            log.warning("the header of mirror %s could not be updated: %s", self.mirror.path, failure)
        disk = self.link.let_go()
        if disk is not None:
            disk.close()

    async def _come_to_rest(self) -> None:
        """Wait until everything that the mirror was asked has ended. Raises TimeoutError when patience is over."""
        deadline_s = time.monotonic() + self._patience_s
        while not self._at_rest:
            if time.monotonic() > deadline_s:
                raise TimeoutError(errno.ETIMEDOUT, f"it did not end what it was asked for {self._patience_s:g} s")
            await asyncio.sleep(REST_INTERVAL_S)

    async def come_back(self) -> bool:
        """Follow the mirror again, if it can be opened; what it misses is dirty then. False, and it was logged, if not.

        Not before everything that it was asked has ended: nothing from before may reach it afterwards.
        """
        if self.link.error is None or not self._at_rest:
            return False
        former = self._token
        try:
            opened = await self._opener.again(self.link.let_go, self._unfit)
        except (LockstepError, OSError) as failure:
            self._tell_once(failure)
            return False
        if opened.unfit is not None:
            if opened.unfit != self.link.error:
                log.error("mirror %s is not followed again: %s", self.mirror.path, opened.unfit)
            self.link.stay_away(opened.unfit)
            opened.disk.close()
            return False
        try:
            await self._come_to_rest()
            await self._take_back(opened.header, written_since=self._token is not former)
            workers = self._new_workers()  # last: nobody ends their threads where something else fails
        except BaseException as failure:
            opened.disk.close()
            if not isinstance(failure, LockstepError | OSError):
                raise
            self._tell_once(failure)
            return False
        self._last_failure, self._unsaid = "", None
        self.link.admit(opened.disk, workers)
        log.info("mirror %s is back; %d bytes are to be copied", self.mirror.path, self.link.regions.dirty_bytes)
        return True

    def _tell_once(self, failure: LockstepError | OSError) -> None:
        reason = (isinstance(failure, OSError) and failure.strerror) or str(failure)
        self.link.hindrance = reason
        if reason != self._last_failure:
            self._last_failure = reason
            log.warning("mirror %s cannot be followed again yet: %s", self.mirror.path, reason)

    def _unfit(self, opened: Opened) -> str | None:
        """Why a mirror that is open again cannot be followed; None if it can. Blocks."""
        assert opened.header.token is not None
        if opened.disk.sector_bytes > self.link.sector_bytes:
            return "it has larger sectors than before: serve the volume anew"
        as_left = opened.header.token.generation in self._generations
        if self.link.is_source:
            return None if as_left else "it is not as it was left, and the new target lacks what that one has"
        if self._disowned:
            return None  # everything counts as different
        return self._unlike(self._spot_check(opened.disk, opened.header.token))

    def _spot_check(self, disk: EncryptedDisk, token: luks.Token) -> SpotCheck:
        """Compare the two in some places, and where they differed before, unless they are known to differ there.

        Nothing tells where a mirror of another generation differs, and it need never have been equal if it is not
        whole. One that is newer than the records should not differ at all, nor be overwritten by itself: they were put
        back from an earlier day, and so was the target perhaps.
        """
        as_left = token.generation in self._generations
        newer = 0 < max(self._generations) < token.generation
        if not as_left and token.state not in WHOLE:
            return SpotCheck(0, ())

        def differing() -> bytes:
            known = self._unaccounted
            known = self.link.regions.differing() if known is None else union(known, self._held.regions())
            return union(union(known, self._intent.marked()), self._target.missing or bytes(len(known)))

        doubted = [place for place in self._doubted if self.link.regions.equal(place, 1)]
        older = self._unaccounted is not None and self._changed == intent.PUT_BACK  # the target
        accounted = newer or older or (as_left and self._unaccounted is None)
        check = spot_check(self._target, disk, differing, doubted, accounted=accounted)
        self._doubted = check.places
        return check

    def _unlike(self, check: SpotCheck) -> str | None:
        """What a spot check says against following the mirror."""
        if not check.unlike:
            return None
        return (
            "it differs from the target in places where the two were equal: one of them is another disk than before, is"
            " of an earlier day, or was changed while nobody served it. If the target is right, have all of it copied:"
            f" lockstep sync {self._volume.name} --all"
        )

    async def _take_back(self, header: luks.Header, *, written_since: bool) -> None:
        """Have it on record, and on the mirror, how the two fit. Raises LockstepError, OSError.

        `written_since`: what the header says was written after it was read.
        """
        assert header.token is not None
        if not written_since:
            self._token = header.token
        self._token_id = header.token_id
        former, self._scribe = self._scribe, Workers("lockstep-header", 1, self._patience_s)
        former.close()
        await self._recognise(header.token.generation)
        await self._own_up()  # first: an older copy that says that it is whole must not be the newest
        await self.advance()
        await self._own_up()  # of what was written meanwhile
        if self._disowned:
            raise OSError(errno.ENOSPC, NOT_RECORDED)

    async def _recognise(self, generation: int) -> None:
        """See whether it is the mirror that the bitmap tells of; if not, everything differs. Raises OSError."""
        if not self._disowned and generation in self._generations:
            if self._unaccounted is not None:  # all of it differs, which the bitmap does not say yet
                await self._intent.mark([(0, self._volume.size_bytes)])
                self._unaccounted = None
            return
        self.link.regions.mark_all()
        await self._held.thaw()  # it is not the one that was frozen; after a crash, the bitmap says that it fits
        if self._disowned:
            self._disowned = False  # first: it may be anew while that is written
            try:
                await self._in_worker(self._intent.claim, generation, generation, self._intent.marked())
            except BaseException:
                self._disowned = True
                raise
        else:
            if self._generations != intent.NO_MIRROR:
                log.warning("mirror %s is not as it was left: all of it is copied", self.mirror.path)
            await self._intent.mark([(0, self._volume.size_bytes)])  # before the bitmap says that it fits
            await self._in_worker(self._intent.settle, generation)
        self._generations, self._unaccounted = (generation, generation), None

    async def _own_up(self) -> None:
        """Have a mirror that misses something say so before anything is written to it.

        Raises LockstepError, TimeoutError.
        """
        if not self.link.equal and self._token.state in WHOLE:
            frozen = self._held.frozen_since_s is not None
            await self._scribe.run(self._write_state, FROZEN if frozen else SYNCING)

    @property
    def _at_rest(self) -> bool:
        """Whether nothing that was asked of the mirror, or of its header, is still under way."""
        return self.link.at_rest and self._scribe.at_rest and self._opener.at_rest

    def _new_workers(self) -> Workers:
        return Workers("lockstep-mirror", MIRROR_THREADS, self._patience_s)


def _as_disk_error(error: LockstepError) -> OSError:
    """The same, for those who deal with what a disk fails."""
    return OSError(errno.EIO, str(error).removesuffix("."))
