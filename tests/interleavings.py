"""Interleavings of the real write path, mirror links, records and resync, in an order that a seed decides.

A scene is a target and up to three mirrors in memory, the real records in files (tests/interleaved_world.py), and
clients, faults and background work as tasks. There are several kinds of them, with another share of what happens in
each (`KINDS`):

    any         all that can happen, a little of everything
    records     what is held and what is marked cannot be recorded, for a moment or for long, while grants change
    filling     the target is lost, and a new one is filled from a mirror while it is served; older copies of mirrors
    copies      copies take the place of mirrors that are open, or that were re-keyed meanwhile
    comparing   reads and `verify`; a mirror may have lost or changed something by itself

What every byte should be is known from the requests alone. The disks are made of cells of eight bytes, and each write
has content of its own: its number and the cell's. So

    during it    a region that counts as clean, and that nobody is writing to, is equal; a client's write is handed to
                 a mirror only while its user may update it; a read returns what some order of the writes leaves
    barred       what a user wrote who might not update the mirror is on no mirror before its region was released; what
                 was refused is nowhere
    frozen       a mirror that stands still is the disk as it was at one moment
    filling      what the new target lacks stays on the mirror as it was; nothing is taken from an older copy of it
    comparing    a difference is found where a mirror was spoilt, and nowhere else
    a power cut  every flushed write is on the target; regions that are neither marked nor held are equal; a mirror
                 whose token says that it is whole has every write that was flushed by then; what is held stays held;
                 what is as it was left is not copied as a whole
    the end      everything ends, the mirrors come in sync, the disks are equal, each cell is what some order of the
                 writes leaves, and nothing is left: no turn, no mark, nobody on record
"""

import asyncio
import contextlib
import errno
import functools
import gc
import itertools
import logging
import os
import shutil
from array import array
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast
from unittest import mock

from lockstep.crypto.luks import Token
from lockstep.disk.runs import WORDS, run_of
from lockstep.errors import FillingImpossible, LockstepError
from lockstep.service import mirror_opening, mirror_session, mirror_set, replacing
from lockstep.service.background import Background
from lockstep.service.borrowing import DRILL, REKEY
from lockstep.service.mirror_session import MirrorSession
from lockstep.service.volume_session import VolumeSession, pair_of
from lockstep.volume import backlog, filling, intent, link, missing, pace, regions, resync, verify, write_path
from lockstep.volume.gate import UPDATE, Gate, Ruling
from lockstep.volume.held import NO_RIGHT, HeldRecord
from lockstep.volume.intent import Identity, IntentBitmap
from lockstep.volume.link import ASIDE, FROZEN, IN_SYNC, WHOLE, MirrorLink
from lockstep.volume.missing import Pair
from lockstep.volume.pages import PagedBits
from lockstep.volume.spot_check import SpotCheck
from lockstep.volume.verify import Verify
from lockstep.volume.workers import Workers
from tests.interleaved_world import (
    BARRING,
    CELL,
    NEVER,
    REGION_BYTES,
    REQUEST,
    SECTOR,
    SPOILT,
    USERS,
    Broken,
    Doorkeeper,
    Hands,
    Headers,
    Job,
    Mirror,
    Platter,
    PowerCut,
    Replacement,
    Request,
    Target,
    Turns,
    World,
    session_of,
)

LONG_S: Final = 300.0  # of counted time: whoever takes longer hangs
CALM: Final = 4  # looks, between which the loop turns


def _copied_or_frozen(mirror: MirrorLink) -> bool:
    """One that is frozen waits for the release, whatever else differs; but what waits for windows alone is over."""
    if 1 in mirror.held.only_outside_window():
        return False
    return mirror.held.frozen_since_s is not None or not mirror.regions.dirty_bytes


class Scene(World):
    """Everything from one seed."""

    def __init__(self, seed: int, home: Path) -> None:
        super().__init__(seed, home)
        chance = self.chance
        self.kind = chance.choice(tuple(KINDS))
        self.trusts_target = self.kind == "comparing" or chance.random() < 0.6  # it does not fail
        spots = 1 if self.kind == "records" else 4
        self.spots = [chance.randrange(self.size_bytes // CELL) * CELL for _ in range(spots)]
        self.numbers = itertools.count(1)
        self.requests: dict[int, Request] = {}  # of all times
        self.history: list[str] = []
        self.unobserved: list[str] = []
        self.coming_back: set[int] = set()  # mirrors that somebody opens or closes
        self.aside_since: dict[int, float] = {}  # of mirrors: what was answered by then is on it
        self.expect_held: dict[int, set[int]] = {}  # like `barred`, when the power was cut
        self.sessions: list[MirrorSession] = []
        self.images: list[tuple[int, bytes, Token]] = []  # of mirrors, from some time
        self.replaced_by: dict[int, Platter] = {}  # mirrors in whose place an image was put
        self.spoilt: dict[int, set[int]] = {number: set() for number in range(len(self.uuids))}  # cells, ever
        self.abandoned = False  # what is left of tasks is nobody's business
        self.disowned: set[int] = set()
        self.unfit: set[int] = set()  # mirrors that their bitmaps need not fit until they are claimed
        self.written_since: set[int] = set()  # mirrors that were written after they had come to stand still

    # --- one life of a server ---

    def start(self, *, anew: bool = False) -> None:
        """Begin to serve what the disks and the records say."""
        self.gate = Doorkeeper(self)
        self.recent: list[Request] = []  # of this life
        self.under_way.clear()
        self.flushed_before: float = 0  # what was answered by then is durable
        # When mirrors came to stand still: (that began, it was over). What was answered by the one is on them.
        self.still_since: dict[int, tuple[float, float]] = {}
        self.verifying: set[int] = set()
        self.full: set[str] = set()
        flaky = {"records": ("intent", "held"), "filling": ("missing",)}.get(self.kind, ())
        self.flaky = {kind: self.chance.choice((0, 0.02, 0.2)) for kind in flaky}  # how often a record fails
        self.calm = 0  # how many looks in a row nobody was at work, since the target was in trouble
        self.near_end = False  # the most is found out when something has just begun
        self.excused = self.claimed = False  # excused: something but a mirror has failed
        self.untold: set[int] = set()  # mirrors that say what they said before this life, as long as nothing is durable
        self.fate.blocks = self._blocks
        self.tasks: list[asyncio.Task[None]] = []
        self.doing: set[asyncio.Task[None]] = set()
        self.filling: asyncio.Task[None] | None = None
        if anew:
            self.workers = Hands(self.fate, "target", 16)
            for number in range(len(self.uuids)):
                self._first_records(number)
            if self.kind == "filling" and self.fate.often(0.7):
                self._replace_target()
                self._renew_target()
        while True:
            try:
                self._open()
                break
            except FillingImpossible as reason:
                self._close()
                self._see_to_source(reason)
        self.links: list[MirrorLink] = [session.link for session in self.sessions]
        self.path, self.resyncs = self.volume.writes, self.volume.resyncs
        for number, each in enumerate(self.links):
            self._check_recognised(number, each)
        self.written_since.clear()
        self.base = bytes(self._content())
        self.bases = [bytes(platter.medium.now) for platter in self.platters]
        self.aside_since.update((at, -1) for at, each in enumerate(self.platters) if each.borrowed)
        self.excused = self.path.filling is not None and self.links[self.source].error is not None
        for number, each in enumerate(self.links):
            self._watch(number, each)
        for user in USERS if self.kind == "records" else ():
            self.gate.rulings[user] = self.chance.choice((UPDATE, Ruling.UNTIL_WINDOW, Ruling.UNTIL_RELEASED))

    def _open(self) -> None:
        self.fate.hands.clear()
        self.workers = Hands(self.fate, "target", 16)
        self.target.lost = self._lose
        self.sessions = [session_of(self, number) for number in range(len(self.uuids))]
        mirrors, gate, workers = tuple(self.sessions), cast(Gate, self.gate), cast(Workers, self.workers)
        self.volume = VolumeSession(cast(Any, self.state), self.record, self.target, mirrors, gate, workers)
        if isinstance(self.target, Replacement) and self.target.left_bytes and self.source in self.replaced_by:
            self._check_image(self.source)
        self.replaced_by.clear()

    @property
    def source(self) -> int:
        """The mirror from which a new target is filled."""
        assert self.register.filled_from is not None
        return self.uuids.index(self.register.filled_from)

    def _lose(self) -> None:
        """The target has lost something, so nothing that was asked by now need be there any more."""
        for request in self.recent:
            request.lost, request.ends = True, NEVER

    def _first_records(self, number: int) -> None:
        identity = Identity(self.volume_id, self.uuids[number], self.size_bytes)
        bitmap = IntentBitmap(str(self.home / f"{self.uuids[number]}.intent"), identity, self.workers.run)
        bitmap.claim(1, 1, bytes(-(-self.size_bytes // REGION_BYTES)))
        bitmap.close()
        held = HeldRecord(str(self.home / self.uuids[number]), identity, self.workers.run, expected=False)
        held.claim()
        held.close()

    def _check_recognised(self, number: int, mirror: MirrorLink) -> None:
        """After a start: what the records say of a mirror as a whole."""
        if mirror.error is not None:
            return
        if number in self.written_since and mirror.held.frozen_since_s is not None:
            raise Broken(f"mirror {number} counts as frozen, and was written since")
        changed = self.platters[number].older or number in self.unfit or self.kind == "filling"
        if not (mirror.as_left or changed):
            raise Broken(f"all of mirror {number} is to be copied, though it is as it was left")

    def _watch(self, number: int, mirror: MirrorLink) -> None:
        """Note when a mirror comes to stand still, and what is released from it."""
        real_hold, real_record, real_release = mirror.hold, mirror.held.hold, mirror.regions.release
        if mirror.held.frozen_since_s is not None:
            self.still_since[number] = -1, -1
        began: dict[asyncio.Task[Any] | None, float] = {}

        async def hold(start: int, end: int, user: str, kind: str) -> None:
            began[asyncio.current_task()] = self.fate.tick()
            await real_hold(start, end, user, kind)

        async def record(start: int, end: int, user: str, kind: str, *, equal: bool) -> None:
            if equal:
                self.still_since[number] = began[asyncio.current_task()], self.fate.tick()
            await real_record(start, end, user, kind, equal=equal)

        def release(released: bytes) -> None:
            real_release(released)
            self._unbar(released, by_itself=asyncio.current_task() is self.tasks[number])

        mirror.hold, mirror.held.hold = hold, record  # type: ignore[method-assign]
        mirror.regions.release = release  # type: ignore[method-assign, assignment]

    def _unbar(self, released: bytes, *, by_itself: bool) -> None:
        for number, barred in list(self.barred.items()):
            request = self.requests[number]
            if by_itself and request.rulings == {Ruling.UNTIL_RELEASED}:
                if request.ends < NEVER and any(released[region] for region in barred):
                    self.fate.violated(f"what {request} holds is released by itself")
                continue
            barred.difference_update(region for region in list(barred) if released[region])
            if not barred:
                del self.barred[number]

    def _blocks(self, job: Job) -> OSError | None:
        """Whether a record cannot be written now."""
        owner = getattr(job.work, "__self__", None)
        if isinstance(owner, PagedBits):
            kind = owner._path.rpartition(".")[2]  # intent, held, or missing
        else:
            kind = {IntentBitmap: "intent", HeldRecord: "held"}.get(type(owner), "")
        if kind not in self.full and not self.fate.often(self.flaky.get(kind, 0)):
            return None
        self.excused = True
        if isinstance(owner, PagedBits) and self.fate.often(0.5):
            self._half(owner, job)
        return OSError(errno.ENOSPC, "no space left")

    def _half(self, owner: PagedBits, job: Job) -> None:
        (pages,) = job.arguments
        for page, content in pages.items():
            if self.fate.often(0.5):
                os.pwrite(owner._fd, content, 512 * (1 + page))

    # --- what happens ---

    async def play(self) -> None:
        """All of it."""
        lives = self.chance.choice((2, 3, 4, 5))
        for life in range(lives):
            self.start(anew=life == 0)
            self.history.append(f"life {life} begins")
            self._check_marks("at the start")
            self._check_held()
            if not await self._claims(surely=life == lives - 1):
                await self._power_cut()
                continue
            self.tasks = [asyncio.ensure_future(each.run()) for each in self.resyncs]
            self.filling = asyncio.ensure_future(_background_of(self.volume)._fill())
            await self._busy()
            if life == lives - 1:
                await self._settle()
            elif self.fate.often(0.25):
                await self._stop_in_order()
            else:
                await self._power_cut()

    async def _claims(self, *, surely: bool) -> bool:
        """Whether the power lasts until the mirrors are claimed."""
        steps = self.chance.randrange(12) if not surely and self.fate.often(0.1) else None
        if self.fate.often(0.1):
            await self._mirror_fault()
        before = [each.token.generation for each in self.platters]
        try:
            with self.fate.cut_within(steps):
                await self._in_time(self.volume.claim(), "claiming")
        except PowerCut:
            return False
        self.claimed = True
        self.untold = {at for at, each in enumerate(self.platters) if each.token.generation == before[at]}
        for number, mirror in enumerate(self.links):
            if mirror.error is None:
                self.platters[number].rekeyed = False
                self.unfit.discard(number)
                self.disowned.discard(number)
        return True

    async def _busy(self) -> None:
        doing: set[asyncio.Task[None]] = set()
        if self.kind == "records" and self.fate.often(0.7):
            doing.add(asyncio.ensure_future(self._contend()))  # while the mirrors are in sync yet
        for _ in range(self.chance.randrange(5, self.chance.choice((20, 40, 70)))):
            doing = {task for task in doing if not task.done() or task.result()}
            if len(doing) < 10:
                doing.add(asyncio.ensure_future(self._something()))
            for _ in range(self.chance.choice((0, 1, 3, 10, 30))):
                await asyncio.sleep(0)
                if self.fate.often(0.1):
                    self._look()
            if self.fate.often(0.05):
                await asyncio.sleep(1)
            self._check_background()
            dull = self.near_end or (self.kind == "filling" and self.path.filling is None)
            if dull and self.fate.often(0.1):
                break
        self.doing = doing

    def _check_background(self) -> None:
        for task in self.tasks:
            if task.done():
                task.result()
                raise Broken("a resync has ended")
        if self.filling is not None and self.filling.done():
            self.filling.result()
            if self.register.filled_from is not None:
                raise Broken("nobody fills the new target any more")

    def _something(self) -> Coroutine[Any, Any, None]:
        shares = {**SHARES, **KINDS[self.kind]}
        if self.trusts_target:
            shares["target_fault"] = 0
        (what,) = self.chance.choices(list(shares), list(shares.values()))
        return cast(Callable[[], Coroutine[Any, Any, None]], getattr(self, f"_{what}"))()

    def _place(self, aligned: bool) -> tuple[int, int]:
        unit = self.sector_bytes if aligned else self.chance.choice((CELL, CELL, SECTOR))
        length = self.chance.choice((unit, SECTOR, 4096, self.chance.randrange(1, 12 << 10)))
        length = max(unit, length // unit * unit)
        spot = self.chance.choice(self.spots) + self.chance.randrange(-4096, 4096)
        if self.fate.often(0.1 if self.kind == "records" else 0.3):
            spot = self.chance.randrange(self.size_bytes)
        offset = max(0, min(spot // unit * unit, (self.size_bytes - length) // unit * unit))
        return offset, min(length, self.size_bytes - offset)

    @contextlib.contextmanager
    def _asked(self, request: Request) -> Iterator[None]:
        self.history.append(str(request))
        self.requests[request.number] = request
        self.recent.append(request)
        self.under_way.append(request)
        ruling = self.gate(request.user)
        request.rulings.add(ruling)
        if ruling in BARRING and request.kind == "write":
            self.barred[request.number] = request.regions()
        request.begins = self.fate.tick()
        REQUEST.set(request)
        try:
            yield
            request.ends = NEVER if request.lost else self.fate.tick()
        except PermissionError:
            if Ruling.REFUSE not in request.rulings:
                self.fate.violated(f"{request} was refused")
        except OSError as failure:
            if not self.excused:
                self.fate.violated(f"{request} failed, though only mirrors did: {failure}")
        finally:
            request.over = True
            self.under_way.remove(request)

    async def _write(
        self, user: str | None = None, extents: list[tuple[int, int]] | None = None, *, durable: bool = False
    ) -> None:
        aligned = self.fate.often(0.6)
        extents = extents or [self._place(aligned) for _ in range(self.chance.choice((1, 1, 1, 3)))]
        request = Request(next(self.numbers), "write", user or self.chance.choice(USERS), extents)
        run, position = array("Q"), 0
        for offset, length in extents:
            run.extend((offset, length, position, 0))
            position += length
        data = memoryview(bytearray(b"".join(request.content(*extent) for extent in extents)))
        count, done = len(extents), 0
        request.durable = durable or self.fate.often(0.15)
        with self._asked(request), _reused(data):
            if not request.durable and self.fate.often(0.7):
                done = self.path.write_run(request.user, data, run, count)
            if done < count:
                if self.fate.often(0.3 if self.path.half_done() else 0.05):  # a window closes
                    self.gate.change(request.user, self.chance.choice(BARRING))
                begun = self.path.write(request.user, data, run[WORDS * done :], count - done, durable=request.durable)
                with self._durability(request.durable):
                    await asyncio.ensure_future(begun)

    @contextlib.contextmanager
    def _durability(self, asked: bool = True) -> Iterator[None]:
        """Nothing counts as durable while the target may have lost something, and nobody has looked."""
        lost = self.path.durability_lost
        yield
        if asked and lost is not None and lost is self.path.durability_lost:
            self.fate.violated("something counts as durable, though the target has lost something")

    async def _zero(self) -> None:
        request = Request(next(self.numbers), "zero", self.chance.choice(USERS), [self._place(self.fate.often(0.4))])
        ((offset, length),) = request.extents
        durable, trim, allocate = self.fate.often(0.1), self.fate.often(0.5), self.fate.often(0.5)
        request.durable = durable
        with self._asked(request):
            if trim:
                await self.path.trim(request.user, offset, length, durable=durable)
            else:
                await self.path.zero(request.user, offset, length, durable=durable, allocate=allocate)

    async def _flush(self) -> None:
        self.history.append("flush")
        begins = self.fate.tick()
        try:
            with self._durability():
                await self.path.flush()
        except OSError as failure:
            if not self.excused:
                self.fate.violated(f"a flush failed, though only mirrors did: {failure}")
        else:
            self.flushed_before = max(self.flushed_before, begins)

    async def _read(self) -> None:
        offset, length = self._place(aligned=False)
        self.history.append(f"read ({offset}, {length})")
        begins, troubles, run = self.fate.tick(), self.target.troubles, run_of(offset, length)
        into = bytearray(length)
        if not (self.fate.often(0.5) and self.volume.reads.read_run(into, run, 1)):
            try:
                await self.volume.reads.read(memoryview(into), run, 1)
            except OSError as failure:
                if not self.excused:
                    self.fate.violated(f"a read failed, though only mirrors did: {failure}")
                return
        if self.path.filling is not None and (self.target.trouble or self.target.troubles > troubles):
            return  # what it lost is missing again, and nobody may know yet
        ends = self.fate.tick()
        self._check_content("a read", into, begins, durable_before=begins, before=ends, base=self.base, at=offset)

    async def _tidy(self) -> None:
        self.history.append("tidy")
        with contextlib.suppress(OSError):
            await self.path.tidy()

    async def _change_ruling(self) -> None:
        weights = (4, 2, 2, 1, 2)
        rulings = (UPDATE, Ruling.UNTIL_WINDOW, Ruling.UNTIL_RELEASED, Ruling.REFUSE, Ruling.FALL_BEHIND)
        user, (ruling,) = self.chance.choice(USERS), self.chance.choices(rulings, weights)
        self.history.append(f"{user}: {ruling.name}")
        self.gate.change(user, ruling)

    async def _contend(self) -> None:
        """Two who may not update the mirror write to one region, and what they do is hard to put on record."""
        self.near_end = True
        region = self.chance.choice(self.spots) // REGION_BYTES * REGION_BYTES
        flaky, self.flaky = self.flaky, {**self.flaky, "held": 0.4}
        doing: list[Coroutine[Any, Any, None]] = [self._announce()]
        for user in self.chance.sample(USERS, 2):
            self.gate.change(user, self.chance.choice((Ruling.UNTIL_WINDOW, Ruling.UNTIL_RELEASED)))
            sectors = (REGION_BYTES if self.fate.often(0.8) else 3 * REGION_BYTES) // SECTOR
            offset = min(region + self.chance.randrange(sectors) * SECTOR, self.size_bytes // SECTOR * SECTOR - SECTOR)
            doing.append(self._write(user, [(offset, SECTOR)]))
        self.chance.shuffle(doing)
        await asyncio.gather(*doing)
        self.flaky = flaky

    async def _freeze(self) -> None:
        """Windows close behind what was written, and the mirror comes to stand still; one user may go on."""
        self.near_end = True
        first, second, third = self.chance.sample(USERS, 3)
        self.gate.change(first, UPDATE)
        self.gate.change(third, UPDATE)
        await self._write(first)
        for user in (first, second):
            self.gate.change(user, self.chance.choice((Ruling.UNTIL_WINDOW, Ruling.UNTIL_RELEASED)))

        async def others() -> None:
            await self._write(second)
            if self.fate.often(0.5):
                await self._write(third)

        await asyncio.gather(self._write(first), others())
        await self._announce()

    async def _blink(self) -> None:
        """A mirror fails, and is back at once."""
        number = self.chance.randrange(len(self.platters))
        self.platters[number].fails.add(self.chance.choice(("writing", "flushing", "reading")))
        self.history.append(f"mirror {number} fails for a moment")
        self._miss_source(number)
        for _ in range(20):
            for _ in range(self.chance.randrange(10)):
                await asyncio.sleep(0)
            await self._come_back(number)

    async def _release(self) -> None:
        """`lockstep sync`."""
        include_held = self.gate.anyone() and self.fate.often(0.6)
        self.history.append(f"sync, held included: {include_held}")
        self.near_end = self.near_end or self.kind == "records"
        self.path.durability_lost = None
        for each in self.links:
            each.target_error = None
            if include_held:
                with contextlib.suppress(OSError):
                    await each.release(each.held.regions)
        for resyncing in self.resyncs:
            resyncing.wake()

    async def _announce(self) -> None:
        """What `Background` does each second."""
        for session in self.sessions:
            await session.look()
            await session.link.announce()

    async def _mirror_fault(self) -> None:
        number = self.chance.randrange(len(self.platters))
        platter, fault = self.platters[number], self.chance.choice(("gone", "stuck", "once", "once"))
        if fault == "once":
            fault = self.chance.choice(("writing", "flushing", "reading", "header", "second header"))
            platter.fails.add(fault)
        elif fault == "gone":
            platter.gone = True
        else:
            threads = self.links[number]._workers if self.fate.often(0.8) else self.sessions[number]._scribe
            if threads is not None:
                cast(Hands, threads).stuck = True
        self.history.append(f"mirror {number}: {fault}")
        self._miss_source(number)

    def _miss_source(self, number: int) -> None:
        """What a new target lacks cannot be had without its mirror."""
        self.excused = self.excused or self.links[number].is_source

    async def _heal(self) -> None:
        number = self.chance.randrange(len(self.platters))
        self.history.append(f"mirror {number} comes back")
        await self._come_back(number)

    async def _come_back(self, number: int) -> None:
        """As `Background` does, one attempt at a time."""
        session = self.sessions[number]
        self.platters[number].gone = False
        self.platters[number].borrowed = self.platters[number].borrowed and self.fate.often(0.5)
        if session.link.error is None or number in self.coming_back:
            return
        self.coming_back.add(number)
        try:
            if session._at_rest and not self._was_disowned(number) and self.fate.often(0.3):
                self._put_image(number)
            if session._disowned:  # until its bitmap is there again
                self.disowned.add(number)
            if await session.come_back():
                if self.target_lacks_something and number == self.source and number in self.replaced_by:
                    self._check_image(number)
                self.replaced_by.pop(number, None)
                self.aside_since.pop(number, None)
                self.platters[number].rekeyed = False
                self.unfit.discard(number)
                self.disowned.discard(number)
                self.untold.discard(number)
                self.resyncs[number].wake()
            else:
                self._put_back(number, disowned=session._disowned)
        except OSError:
            self._put_back(number, disowned=session._disowned)
        finally:
            self.coming_back.discard(number)

    async def _fill_up(self) -> None:
        kind = self.chance.choice(("intent", "held", "held") + ("missing",) * (self.path.filling is not None))
        self.full.add(kind)
        self.history.append(f"full: {self.full}")
        if self.fate.often(0.5):
            for _ in range(self.chance.randrange(40)):
                await asyncio.sleep(0)
            self.full.discard(kind)
            self.history.append(f"full: {self.full}")

    async def _make_room(self) -> None:
        self.full.clear()
        self.history.append("there is room")

    async def _target_fault(self) -> None:
        fault = self.chance.choice(("write", "flush", "read"))
        self.excused = True
        self.target.fails.add(fault)
        self.history.append(f"target: {fault}")
        if fault == "flush" and self.fate.often(0.7):
            await self._flush()
            await self._write(durable=True)
        elif fault == "read":
            await self._read()

    async def _step_aside(self) -> None:
        number, purpose = self.chance.randrange(len(self.sessions)), self.chance.choice((DRILL, REKEY))
        self.history.append(f"mirror {number} steps aside, for a {purpose}")
        link, real = self.links[number], self.links[number].step_aside

        def step_aside(reason: str) -> None:
            self.aside_since[number] = self.fate.tick()
            real(reason)

        if link.error is None and number not in self.coming_back:
            self._miss_source(number)
            self.near_end = self.near_end or self.fate.often(0.5)
            if self.fate.often(0.5):
                self._take_image(number)
            link.step_aside = step_aside  # type: ignore[method-assign]
            self.coming_back.add(number)
            try:
                with contextlib.suppress(LockstepError, OSError):
                    await self.sessions[number].step_aside(self.path, purpose)
                    if purpose == REKEY:
                        self._rekey(number)
            finally:
                self.coming_back.discard(number)
                del link.step_aside

    def _rekey(self, number: int) -> None:
        """A mirror is given another key: what a header from before makes of it is noise."""
        platter = self.platters[number]
        platter.borrowed = platter.rekeyed = True
        if number in self.replaced_by:  # that is a copy of it, and the others have the key that it had
            return
        noise = self.chance.randbytes(len(platter.medium.now))
        self.images = [(at, noise if at == number else content, token) for at, content, token in self.images]

    def _was_disowned(self, number: int) -> bool:
        """Whether the bitmap of a mirror may have stayed, and fit an older copy: the mirror got another generation."""
        return number in self.disowned or self.sessions[number]._disowned

    # --- images of mirrors ---

    async def _image(self) -> None:
        """Somebody makes a copy of a mirror."""
        self._take_image(self.chance.randrange(len(self.platters)))

    def _take_image(self, number: int) -> None:
        platter = self.platters[number]
        if not (platter.gone or platter.older or platter.borrowed):
            self.history.append(f"mirror {number} is copied")
            self.images.append((number, bytes(platter.medium.now), platter.token))

    async def _swap(self) -> None:
        """A copy takes the place of a mirror while that is open."""
        number = self.chance.randrange(len(self.platters))
        if self.fate.often(0.7):
            self._take_image(number)
        for _ in range(self.chance.randrange(40)):
            await asyncio.sleep(0)
        if self.links[number].error is None and not self._was_disowned(number):
            self._miss_source(number)
            self._put_image(number)
            self.near_end = self.near_end or self.fate.often(0.3)

    def _put_image(self, number: int) -> None:
        """An older copy of a mirror is found where it should be."""
        images = [image for image in self.images if image[0] == number]
        if not images or number in self.replaced_by or self.platters[number].rekeyed:
            return
        _, content, token = images[-1] if self.fate.often(0.5) else self.chance.choice(images)
        self.history.append(f"mirror {number} is replaced by an older copy")
        self.replaced_by[number] = self.platters[number]
        self.platters[number] = Platter(content, token)
        self.platters[number].silenced = self.platters[number].older = True

    def _put_back(self, number: int, *, disowned: bool) -> None:
        """Put the right one back, unless the copy is followed in its place.

        Of a mirror that is `disowned` the bitmap may have stayed: then it is the other one that got a new generation.
        """
        if number not in self.replaced_by:
            return
        often = 0.8 if self.target_lacks_something else 0.2
        right, copy = (each[number].token.generation for each in (self.replaced_by, self.platters))
        filled_from_copy = self.target_lacks_something and number == self.source and copy > right
        if disowned or filled_from_copy:
            often = right > copy
        if self.fate.often(often):
            self.history.append(f"mirror {number} is put back")
            self.platters[number] = self.replaced_by.pop(number)
            self.platters[number].silenced = True  # what it should have said of itself was told the copy, or nobody
            self.unfit.add(number)

    # --- a new target ---

    @property
    def target_lacks_something(self) -> bool:
        return isinstance(self.target, Replacement) and 1 in self.target.missing

    def _content(self, lacks: bytes | bytearray | None = None) -> bytearray:
        """What the volume holds: the target, and where that lacks something, as known or `lacks` says, its mirror."""
        content = bytearray(self.target.medium.now)
        if lacks is None:
            lacks = self.target.missing if isinstance(self.target, Replacement) else b""
        for region in regions.positions(lacks):
            source = self.replaced_by.get(self.source, self.platters[self.source])
            part = slice(region * REGION_BYTES, min((region + 1) * REGION_BYTES, self.size_bytes))
            content[part] = source.medium.now[part]
        return content

    def _check_image(self, number: int) -> None:
        """An older copy was taken for the mirror that has what the new target lacks: is it the same there?"""
        was, now = self.replaced_by[number].medium.now, self.platters[number].medium.now
        for region in regions.positions(cast(Replacement, self.target).missing):
            part = slice(region * REGION_BYTES, (region + 1) * REGION_BYTES)
            if was[part] != now[part]:
                raise Broken(f"the new target would be filled from an older copy of mirror {number}: region {region}")

    def _see_to_source(self, reason: FillingImpossible) -> None:
        """Why the new target cannot be filled from its mirror, and what is done about it."""
        number = self.source
        self.history.append(f"{reason}")
        platter = self.platters[number]
        if platter.gone or platter.borrowed:
            platter.gone = platter.borrowed = False
        elif number in self.replaced_by:
            self._put_back(number, disowned=False)
        else:
            raise Broken(f"the new target cannot be filled any more: {reason}")

    def _replace_target(self) -> bool:
        """`lockstep replace-target`; whether there is a mirror that is whole. The power may be cut on the way."""
        sources = [
            at
            for at, each in enumerate(self.platters)
            if each.token.state in WHOLE
            and not (each.silenced or each.older or each.borrowed or at in self.replaced_by)
        ]
        if not sources:
            return False
        number = self.chance.choice(sources)
        content = bytes(self.platters[number].medium.now[: self.size_bytes])
        self.images.extend((at, bytes(each.medium.now), each.token) for at, each in enumerate(self.platters))
        token, mirror = self.platters[number].token, self.register.mirror(number)
        if token.generation < mirror.generation:
            raise Broken(f"mirror {number} counts as older than it is")
        self.history.append(f"the target is lost, and replaced from mirror {number}, {token.state}")
        while True:
            replacements = self.register.replacements
            try:
                with self.fate.cut_within(self.chance.randrange(30) if self.fate.often(0.3) else None):
                    self._carry_out_replacement(number)
                break
            except PowerCut:
                begun = self.register.replacements > replacements
                lacks = self._lacking() if begun else None
                if lacks is not None and 0 in lacks:
                    raise Broken("a new target would be served that nobody has prepared") from None
                if lacks is not None:
                    break
        fresh = self.chance.choice((bytes(self.size_bytes), self.chance.randbytes(self.size_bytes)))
        self.target = self.target_of(Target, fresh)  # `_renew_target` makes a new target of it
        if self.platters[number].medium.now[: self.size_bytes] != content:
            raise Broken("the mirror was changed, from which the new target is to be filled")
        self.barred, self.expect_held = {}, {}
        return True

    def _carry_out_replacement(self, number: int) -> None:
        state, volume, platter = cast(Any, self.state), self.record, self.platters[number]
        mirror = volume.mirrors[number]
        replacing._forget_earlier(state, volume)
        self.register.replace_target(mirror.id)
        header = cast(Any, SimpleNamespace(token=platter.token, token_id=0, uuid=mirror.luks_uuid))
        source = replacing._Source(mirror, header, platter.token)
        self.register.set_generation(mirror.id, replacing._take_for_true(state, volume, source))
        for other in volume.mirrors:
            if other.id != mirror.id:
                replacing._have_compared(state, volume, other)
        pair = Pair(volume.id, mirror.id, volume.size_bytes)
        path = self.state.missing(volume.id)
        missing.record(path, pair, b"\1" * pair.regions, asyncio.to_thread).close()

    def _lacking(self) -> bytearray | None:
        """What the record says is missing."""
        return missing.load(self.state.missing(self.volume_id), pair_of(self.record))

    def _renew_target(self) -> None:
        """The target as the next server finds it."""
        content = bytes(self.target.medium.now)
        if self.register.filled_from is None:
            self.target = self.target_of(Target, content)
            return
        lacks = self._lacking()
        if lacks is None:
            raise Broken("nobody knows any more what the new target lacks")
        target = self.target_of(Replacement, content)
        target.missing, self.target = lacks, target

    # --- comparing ---

    async def _spoil(self) -> None:
        """A mirror changes something by itself."""
        number, region = (
            self.chance.randrange(len(self.platters)),
            self.chance.randrange(self.size_bytes // REGION_BYTES),
        )
        at, mirror, platter = region * REGION_BYTES, self.links[number], self.platters[number]
        well = mirror.error is None and not platter.gone and not platter.fails and number not in self.replaced_by
        if well and self._left_alone(number, region):
            cell = at // CELL + self.chance.randrange(REGION_BYTES // CELL)
            self.history.append(f"mirror {number} is spoilt in cell {cell} (region {region})")
            platter.medium.write(cell * CELL, (SPOILT << 32 | cell).to_bytes(CELL, "little"), durable=True)
            self.spoilt[number].add(cell)

    def _still_spoilt(self, number: int) -> set[int]:
        cells = memoryview(self.platters[number].medium.now).cast("Q")
        return {cell for cell in self.spoilt[number] if cells[cell] >> 32 == SPOILT}

    def _mended(self, number: int, content: bytes | bytearray) -> bytearray:
        """What a mirror holds, with this in place of what it has changed by itself."""
        copy = self.platters[number].medium.now
        if spoilt := self._still_spoilt(number):
            copy = bytearray(copy)
            for cell in spoilt:
                copy[cell * CELL : (cell + 1) * CELL] = content[cell * CELL : (cell + 1) * CELL]
        return copy

    def _left_alone(self, number: int, region: int) -> bool:
        """Whether a region of a mirror counts as clean, and nobody is writing there."""
        at, end = region * REGION_BYTES, min((region + 1) * REGION_BYTES, self.size_bytes)
        half = any(a < end and at < a + n for a, n in self.path._half_done)
        return self.links[number].regions.equal(at, 1) and self.path.ranges.free(at, end) and not half

    async def _verify(self) -> None:
        number = self.chance.randrange(len(self.platters))
        if number not in self.verifying and number not in self.replaced_by:
            self.verifying.add(number)
            try:
                await self._verify_one(number, repair=self.fate.often(0.5))
            finally:
                self.verifying.discard(number)

    async def _verify_one(self, number: int, *, repair: bool) -> None:
        self.history.append(f"mirror {number} is compared{', and repaired' * repair}")
        mirror, platter, before = self.links[number], self.platters[number], self._still_spoilt(number)
        disk, troubles, losses = cast(Mirror | None, mirror._disk), self.target.troubles, platter.losses
        lossy = self.target.trouble or (disk is not None and disk.failed)
        comparison = Verify(self.path, mirror, cast(Workers, self.workers), repair=repair)
        await comparison.run()
        found = comparison.found
        self.history.append(f"mirror {number} was compared: {found}")
        lossy = lossy or self.target.troubles > troubles or platter.losses > losses
        where = {at // SECTOR for offset, length in found.mismatches for at in range(offset, offset + length, SECTOR)}
        if not lossy:
            sector = self.mirror_sectors[number]
            step = sector // SECTOR
            known = {cell * CELL // sector * step + at for cell in self.spoilt[number] for at in range(step)}
            if where - known:
                self.fate.violated(f"verify says that mirror {number} differs, and it does not: {found}")
        if found.error is None and platter is self.platters[number]:
            for cell in before & self._still_spoilt(number):
                if cell * CELL // SECTOR not in where and self._left_alone(number, cell * CELL // REGION_BYTES):
                    self.fate.violated(f"verify passes over cell {cell} of mirror {number}, which differs: {found}")

    # --- looks ---

    def _look(self) -> None:
        """Whatever is clean, and left alone, is equal."""
        if self.target.trouble:
            self.calm = self.calm + 1 if not self.under_way and self.fate.at_rest else 0
            if self.calm == CALM:  # everybody who waited for the target has gone on by now
                self.target.trouble, self.calm = False, 0
            return
        content = self._content()
        for number, mirror in enumerate(self.links):
            disk = cast(Mirror | None, mirror._disk)
            if disk is None or (disk.failed and mirror.error is None) or number in self.replaced_by:
                continue
            copy = self._mended(number, content)
            if copy[: len(content)] == content:
                continue
            for region in range(-(-self.size_bytes // REGION_BYTES)):
                at, end = region * REGION_BYTES, min((region + 1) * REGION_BYTES, self.size_bytes)
                if content[at:end] != copy[at:end] and self._left_alone(number, region):
                    raise Broken(
                        f"region {region} of mirror {number} counts as clean, and differs: {self._told(number)}"
                    )
        self._look_at_source()
        if self.fate.often(0.02):
            self._look_for_barred()
            self._look_at_frozen()

    def _look_at_frozen(self) -> None:
        """One that is frozen is the disk as it was at one moment: what it has, came after all that was over by then."""
        for number, each in enumerate(self.links):
            began, since = self.still_since.get(number, (-1, -1))
            disk, frozen = cast(Mirror | None, each._disk), each.held.frozen_since_s is not None and each.consistent
            if disk is None or disk.failed or not frozen or since < 0 or number in self.replaced_by:
                continue
            copy = self.platters[number].medium.now
            there = {self.requests.get(value >> 32) for value in memoryview(copy).cast("Q")}
            newest = max((request.begins for request in there if request in self.recent and request), default=0)
            what, spoilt = f"mirror {number}, which is frozen,", self._still_spoilt(number)
            self._check_content(what, copy, max(began, newest), before=since, base=self.base, but=spoilt)

    def _look_at_source(self) -> None:
        """Nobody writes where the new target lacks something."""
        if self.target_lacks_something and self.source not in self.replaced_by:
            content = self.platters[self.source].medium.now
            for region in regions.positions(cast(Replacement, self.target).missing):
                part = slice(region * REGION_BYTES, min((region + 1) * REGION_BYTES, self.size_bytes))
                if content[part] != self.base[part]:
                    raise Broken(f"the mirror was changed in region {region}, which the new target lacks")

    def _told(self, number: int) -> str:
        """How a mirror stands, for who looks for the reason."""
        each, platter = self.links[number], self.platters[number]
        differ = [
            f"{cell}: {one >> 32}/{other >> 32}"
            for cell, (one, other) in enumerate(
                zip(
                    memoryview(self.target.medium.now).cast("Q"), memoryview(platter.medium.now).cast("Q"), strict=False
                )
            )
            if one != other and each.regions.equal(cell * CELL, 1)
        ]
        cells = f"{differ[:3]}...{differ[-1:]}"
        return f"{each.state} ({each.error}), token {platter.token.state}, target/mirror in cell {cells}"

    def _look_for_barred(self) -> None:
        wanted = {number for number, barred in self.barred.items() if barred}
        if not wanted:
            return
        for at, platter in enumerate(self.platters):
            for cell, value in enumerate(memoryview(platter.medium.now).cast("Q")):
                number = value >> 32
                if number in wanted and cell * CELL // REGION_BYTES in self.barred[number]:
                    raise Broken(f"mirror {at} has what it must not have: {self.requests[number]}")
        refused = {number for number in wanted if self.requests[number].rulings == {Ruling.REFUSE}}
        for value in memoryview(self.target.medium.now).cast("Q") if refused else ():
            if value >> 32 in refused:
                raise Broken(f"the target has what was refused: {self.requests[value >> 32]}")

    def _check_marks(self, when: str) -> None:
        """What is not known to differ is equal; to be asked when a start has read the records."""
        target = self._content()
        for number, mirror in enumerate(self.links):
            copy = self._mended(number, target)
            if mirror.error is not None:  # whether the records are about it is found out when it is there
                continue
            for region in range(-(-self.size_bytes // REGION_BYTES)):
                at, end = region * REGION_BYTES, min((region + 1) * REGION_BYTES, self.size_bytes)
                if mirror.regions.equal(at, 1) and target[at:end] != copy[at:end]:
                    raise Broken(f"{when}, region {region} of mirror {number} differs, and is neither marked nor held")

    def check_return(self, number: int, differing: bytes, *, accounted: bool) -> SpotCheck:
        """In place of a spot check: of a mirror that comes back, and is no copy, all is equal that is not marked."""
        target = self._content()
        copy = self._mended(number, target)
        if accounted and self.path.filling is None and not self.platters[number].older:
            for region, differs in enumerate(differing):
                at, end = region * REGION_BYTES, min((region + 1) * REGION_BYTES, self.size_bytes)
                if not differs and target[at:end] != copy[at:end]:
                    self.fate.violated(f"region {region} of mirror {number}, which is back, differs, and is not marked")
        return SpotCheck(0, ())

    def _check_content(
        self,
        what: str,
        content: bytes | bytearray,
        flushed_before: float,
        *,
        durable_before: float | None = None,
        before: float = NEVER,
        base: bytes,
        at: int = 0,
        but: Container[int] = (),
    ) -> None:
        """Each cell from `at` on has what some order of the requests leaves.

        All that ended by `flushed_before` are there, and those with FUA that did by `durable_before`, which is `before`
        if it is not given; none that began after `before`. Nothing is said of the cells in `but`.
        """
        durable_before = before if durable_before is None else durable_before
        cells, first = memoryview(content)[: self.size_bytes].cast("Q"), at // CELL
        least = [0.0] * len(cells)
        zeroed = [-1.0] * len(cells)
        for request in self.recent:
            there = request.ends < flushed_before or (request.durable and request.ends < durable_before)
            for offset, length in request.extents:
                part = slice(max(0, offset // CELL - first), max(0, (offset + length) // CELL - first))
                if there:
                    least[part] = [max(each, request.begins) for each in least[part]]
                if request.kind != "write" and request.begins < before:
                    zeroed[part] = [max(each, request.ends) for each in zeroed[part]]
        was = memoryview(base).cast("Q")[first:]
        for cell, value in enumerate(cells):
            there = (value == was[cell] and not least[cell]) or first + cell in but
            if not there and (value or zeroed[cell] < max(least[cell], 0.5)):
                self._check_cell(what, first + cell, value, least[cell], before)

    def _check_cell(self, what: str, cell: int, value: int, least: float, before: float) -> None:
        where = f"cell {cell} (region {cell * CELL // REGION_BYTES})"
        request = self.requests.get(value >> 32)
        if request is None or request not in self.recent:
            raise Broken(f"{what} has {value:#x} in {where}: something was lost")
        inside = any(at <= cell * CELL < at + length for at, length in request.extents)
        if value & 0xFFFFFFFF != cell or not inside:
            raise Broken(f"{what} has {request} in {where}, where it does not belong")
        if request.ends < least or request.begins > before:
            raise Broken(f"{what} has {request} in {where}, which is not what should be there")

    # --- ends ---

    async def _power_cut(self) -> None:
        self.history.append("power cut")
        self._look()
        self._look_at_frozen()
        for hands in self.fate.hands:
            for job in list(hands.jobs[: hands._count]):
                if not job.ended and self.fate.often(0.4):
                    self._interrupt(job)
        self.target.medium.cut(self.chance)
        for platter in (*self.platters, *self.replaced_by.values()):
            platter.medium.cut(self.chance)
        self._check_after_cut()
        self.expect_held = dict(self.barred)  # what is held stays held, says `_check_held` when the next life begins
        old = self.home
        kept = [file for file in old.iterdir() if not file.name.endswith(".new")]
        later = self.base_home / str(self.epoch + 1)
        later.mkdir()
        for file in kept:
            shutil.copy(file, later)
        await self._abandon()
        self._turn_over()

    def _turn_over(self) -> None:
        """What becomes of the disks before the next server begins."""
        self.epoch += 1
        for number in list(self.replaced_by):
            self._put_back(number, disowned=number in self.disowned)
        for number, each in enumerate(self.platters):
            platter = self.platters[number] = Platter(bytes(each.medium.now), each.token)
            platter.silenced = each.silenced or each.borrowed  # whose header is others' now
            platter.older, platter.borrowed, platter.rekeyed = each.older, each.borrowed, each.rekeyed
        if self.kind == "filling" and self.fate.often(0.7):
            self._replace_target()
        self._renew_target()
        for number in range(len(self.platters)):
            if self.fate.often(0.1):
                self.platters[number].gone = self.platters[number].silenced = True
            elif self.kind == "filling" and number not in self.disowned and self.fate.often(0.3):
                self._put_image(number)

    def _interrupt(self, job: Job) -> None:
        owner = getattr(job.work, "__self__", None)
        if isinstance(owner, PagedBits):
            self._half(owner, job)
        elif job.steps is not None or self._blocks(job) is None:
            steps = self.chance.choice((None, self.chance.randrange(6)))
            with contextlib.suppress(PowerCut), self.fate.cut_within(steps):
                job.carry_out()
                while not job.ended and self.fate.often(0.5):
                    job.carry_out()

    def _check_after_cut(self) -> None:
        lacks = self._lacking() if self.register.filled_from is not None else b""
        if lacks is None:
            raise Broken("nobody knows any more what the new target lacks")
        content = self._content(lacks)
        self._check_content("after a power cut the target", content, self.flushed_before, base=self.base)
        self._look_for_barred()
        for number in range(len(self.platters)):
            try:
                self._check_still(number)
            except Broken:
                if number not in self.replaced_by:
                    self.written_since.add(number)
            self._check_mirror_after_cut(number)

    def _check_mirror_after_cut(self, number: int) -> None:
        platter, session = self.platters[number], self.sessions[number]
        what, state = f"after a power cut mirror {number}, {platter.token.state},", platter.token.state
        unchanged = self._mended(number, self.bases[number]) == self.bases[number]
        if not self.claimed:
            if not unchanged:
                raise Broken(f"{what} was changed before it was claimed")
            return
        if platter.silenced or platter.older or number in self.replaced_by:
            return
        aside = state == ASIDE and number in self.aside_since
        if (session.link.silent and not aside) or cast(Hands, session._scribe)._given_up:
            return
        if state in WHOLE:
            self._check_whole(number, what, aside=aside, unchanged=unchanged)

    def _check_whole(self, number: int, what: str, *, aside: bool, unchanged: bool) -> None:
        """A mirror that says that it is whole is so."""
        platter = self.platters[number]
        if number in self.untold and not self._anything_durable():
            if not unchanged:
                raise Broken(f"{what} was changed before it was told")
            return
        if platter.token.state == FROZEN:
            self._check_still(number)
            return
        least, most = self.flushed_before, NEVER
        if aside:
            least = most = self.aside_since[number]
        if least >= 0:
            copy, spoilt = platter.medium.now, self._still_spoilt(number)
            self._check_content(what, copy, least, before=most, base=self.base, but=spoilt)
        elif not unchanged:
            raise Broken(f"{what} was changed while others had it")

    def _anything_durable(self) -> bool:
        """Whether something was answered as durable in this life."""
        return bool(self.flushed_before) or any(each.durable and each.ends < NEVER for each in self.recent)

    def _check_still(self, number: int) -> None:
        """After a power cut: a mirror is as it was when it came to stand still."""
        copy, spoilt = self.platters[number].medium.now, self._still_spoilt(number)
        began, since = self.still_since.get(number, (-1, -1))
        if since >= 0:
            what = f"after a power cut mirror {number}, frozen,"
            self._check_content(what, copy, began, before=since, base=self.base, but=spoilt)
        elif self._mended(number, self.bases[number]) != self.bases[number]:
            raise Broken(f"after a power cut mirror {number} was changed while it was frozen")

    async def _abandon(self) -> None:
        """The process is no more."""
        self.abandoned = self.fate.over = True
        for hands in self.fate.hands:
            hands.stuck = False
        for future in self.fate.futures:
            future.add_done_callback(lambda future: future.cancelled() or future.exception())
        while await self._cancel_all():
            pass
        await asyncio.sleep(0)  # who has waited for them is told
        self.fate.hands.clear()
        self._close()
        self.under_way.clear()
        self.coming_back = set()
        self.aside_since = {}
        # Of these the bitmap may have stayed, which fits an older copy: the mirror itself got another generation.
        self.disowned |= {number for number, session in enumerate(self.sessions) if session._disowned}
        self.unfit |= self.disowned
        self.sessions = []
        del self.volume, self.path, self.links, self.resyncs, self.tasks, self.doing
        self.filling = None
        gc.collect()
        self.unobserved.clear()
        self.abandoned = self.fate.over = False

    async def _cancel_all(self) -> bool:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        tasks.sort(key=lambda task: int(task.get_name().rpartition("-")[2]))  # a set has an order of its own
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1)  # one whose time is over at this moment takes no notice
        return bool(tasks)

    def _close(self) -> None:
        for session in self.sessions:
            session._intent.close()
            session._held.close()
        volume = getattr(self, "volume", None)  # there is none when it could not be opened
        if volume is not None and volume.filling is not None:
            volume.filling.close()

    async def _stop_in_order(self) -> None:
        """The server is stopped, and the volume served again."""
        self.history.append("stop")
        await self._end_background()
        self.expect_held = dict(self.barred)
        with contextlib.suppress(LockstepError):
            await self._in_time(self.volume.retire(), "stopping")
        for hands in self.fate.hands:
            hands.stuck = False
        while self.fate.step():
            pass
        later = self.base_home / str(self.epoch + 1)
        later.mkdir()
        for file in self.home.iterdir():
            shutil.copy(file, later)
        await self._abandon()
        self._turn_over()

    async def _end_background(self) -> None:
        await self._in_time(asyncio.gather(*self.doing), "a request")
        if self.path.filling is not None:
            self.path.filling.stop()
        for resyncing in self.resyncs:
            resyncing.stop()
        await self._in_time(asyncio.gather(*self.tasks), "a resync")
        for each in self.links:
            if each._writing_out is not None:
                await each._writing_out

    async def _settle(self) -> None:
        self.history.append("all is well again")
        self._repair()
        await self._in_time(asyncio.gather(*self.doing), "a request")
        self._repair()  # what went wrong last
        for user in USERS:
            self.gate.change(user, UPDATE)
        self.path.durability_lost = None
        if self.fate.often(0.8):
            await self._in_time(self._in_sync(_copied_or_frozen), "a resync")
            self._look_for_barred()
            self._look()
        assert self.filling is not None
        filling = self.filling
        await self._in_time(self._in_sync(lambda _: filling.done()), "the filling of the new target")
        for each in self.links:
            await self._in_time(each.release(each.held.regions), "a release")
        await self._in_time(self._in_sync(lambda each: each.state == IN_SYNC and not each.held.writers), "a resync")
        if any(self._still_spoilt(number) for number in range(len(self.links))):
            for number in range(len(self.links)):
                await self._in_time(self._verify_one(number, repair=True), "a comparison")
            await self._in_time(self._in_sync(lambda each: each.state == IN_SYNC), "a resync")
        await self._in_time(self._announce(), "an announcement")
        await self._check_end()
        for _ in range(3):  # what could not be marked before is marked by the first, and cleared by the third
            await self._in_time(self.path.tidy(), "tidying")
        await self._end_background()
        self._check_accounts()
        await self._retire()

    async def _check_end(self) -> None:
        begins = self.fate.tick()
        await self._in_time(self.path.flush(), "a flush")
        self._check_content("at the end the target", self.target.medium.now, begins, base=self.base)
        for number, platter in enumerate(self.platters):
            if platter.medium.now[: self.size_bytes] != self.target.medium.now:
                raise Broken(f"at the end mirror {number} is in sync, and differs: {self._told(number)}")
            if any(platter.medium.now[self.size_bytes :]):
                raise Broken(f"at the end mirror {number} has something behind the end")
            if platter.token.state != IN_SYNC:
                raise Broken(f"at the end mirror {number} says that it is {platter.token.state}")

    def _repair(self) -> None:
        self.full.clear()
        self.flaky = {}
        self.target.fails.clear()
        for platter in self.platters:
            platter.gone = platter.borrowed = False
            platter.fails.clear()
        self.images.clear()
        for hands in self.fate.hands:
            hands.stuck = False

    async def _in_sync(self, enough: Callable[[MirrorLink], bool]) -> None:
        while True:
            for number, each in enumerate(self.links):
                await self.sessions[number].look()
                each.target_error = None  # somebody has looked after it
                if each.error is not None:
                    await self._come_back(number)
            if all(each.error is None and each.sync is None and enough(each) for each in self.links):
                return
            for resyncing in self.resyncs:
                resyncing.wake()
            await asyncio.sleep(0.5)

    async def _in_time(self, what: Awaitable[Any], name: str) -> None:
        try:
            await asyncio.wait_for(what, LONG_S)
        except TimeoutError:
            raise Broken(f"{name} does not end") from None

    def _check_accounts(self) -> None:
        if self.path.ranges._turns:
            raise Broken("somebody has the turn for ever")
        if self.path.half_done():
            raise Broken("something is half done for ever")
        for _ in range(1000):
            if not self.fate.step():
                break
        for number, each in enumerate(self.links):
            if any(each.held.regions()) or each.held.writers or each.held.frozen_since_s is not None:
                raise Broken(f"mirror {number} still has on record what is held, by {each.held.writers}")
            if any(each.intent._durable):  # what could not be marked may still be about to be
                raise Broken(f"mirror {number} still has marks")
            if each.regions.dirty_bytes or each.regions.held_bytes:
                raise Broken(f"mirror {number} still has regions that differ")

    async def _retire(self) -> None:
        """Stop in order, and see what the next start would make of it."""
        await self._in_time(self.volume.retire(), "stopping")
        self._close()
        self._renew_target()
        self._open()
        for number, session in enumerate(self.sessions):
            if not session.link.as_left or session.link.state != IN_SYNC:
                raise Broken(f"after an orderly end mirror {number} is {session.link.state}")
        self._close()

    def _check_held(self) -> None:
        """After a start: what was barred, and is on the target, is held."""
        cells = memoryview(self.target.medium.now).cast("Q")
        for number, barred in self.expect_held.items():
            request = self.requests[number]
            for offset, length in request.extents:
                for cell in range(offset // CELL, (offset + length) // CELL):
                    region = cell * CELL // REGION_BYTES
                    if cells[cell] >> 32 != number or region not in barred:
                        continue
                    for at, each in enumerate(self.links):
                        only = NO_RIGHT if request.rulings == {Ruling.UNTIL_RELEASED} else None
                        if not each.held.regions(only)[region]:
                            raise Broken(f"after a power cut mirror {at} does not hold {request}, region {region}")
        self.expect_held = {}


SHARES: Final[dict[str, float]] = {
    "write": 40,
    "zero": 8,
    "read": 6,
    "flush": 10,
    "tidy": 5,
    "change_ruling": 9,
    "release": 4,
    "announce": 6,
    "mirror_fault": 5,
    "heal": 8,
    "fill_up": 2,
    "make_room": 3,
    "target_fault": 2,
    "step_aside": 1,
    "contend": 1,
    "freeze": 1,
    "blink": 2,
    "verify": 1,
    "image": 1,
    "swap": 0.5,
    "spoil": 0,
}
"""How often something happens, next to the others."""

KINDS: Final[dict[str, dict[str, float]]] = {
    "any": {},
    "records": {
        "change_ruling": 12,
        "contend": 16,
        "freeze": 6,
        "release": 12,
        "flush": 4,
        "tidy": 3,
        "announce": 8,
        "fill_up": 6,
        "image": 0,
        "verify": 0,
    },
    "filling": {"read": 14, "flush": 12, "blink": 5, "heal": 14, "image": 4, "fill_up": 3, "target_fault": 6},
    "copies": {"swap": 8, "step_aside": 5, "image": 2, "announce": 10, "tidy": 12, "heal": 12, "fill_up": 1},
    "comparing": {"read": 25, "verify": 14, "spoil": 16, "blink": 14, "heal": 16, "fill_up": 1, "image": 0},
}
"""What is different in each kind of scene."""


@contextlib.contextmanager
def _reused(data: memoryview) -> Iterator[None]:
    """Once a request is answered its memory is another's: what still reads it then, reads what nobody wrote there."""
    try:
        yield
    finally:
        data[:] = b"\xba" * len(data)


def _background_of(volume: VolumeSession) -> Background:
    nobody = cast(Any, None)
    return Background(volume, nobody, nobody, nobody, nobody, nobody, nobody, nobody)


def _counting(scene: Scene, real: Callable[..., None]) -> Callable[..., None]:
    def step(*arguments: Any) -> None:
        scene.fate.durable_step()
        real(*arguments)

    return step


def played(seed: int, home: Path) -> Scene:
    """Play the scene of a seed; raises Broken."""
    scene = Scene(seed, home)
    in_scene(scene, scene.play())
    return scene


def in_scene(scene: Scene, what: Coroutine[Any, Any, None]) -> None:
    """Have something happen in the scene's world; raises Broken."""
    gc.freeze()  # so that what is collected is this scene's
    clock = SimpleNamespace(monotonic=lambda: scene.fate.now_s, time=lambda: scene.fate.now_s)
    small = {
        (regions, "SMALLEST_REGION_BYTES"): REGION_BYTES,
        (pace, "PIECE_BYTES"): 8 << 10,
        (pace, "LARGEST_PIECE_BYTES"): 16 << 10,
        (pace, "GENTLE_PIECE_BYTES"): 4 << 10,
        (resync, "LARGEST_PIECE_BYTES"): 16 << 10,
        (verify, "LARGEST_PIECE_BYTES"): 16 << 10,
        (verify, "UNCACHE_BYTES"): 32 << 10,
        (filling, "PIECE_BYTES"): 8 << 10,
        (filling, "SETTLE_BYTES"): 24 << 10,
        (os, "fsync"): _counting(scene, lambda _: None),  # what was not synced is not lost here
        (os, "fdatasync"): _counting(scene, lambda _: None),
        (os, "replace"): _counting(scene, os.replace),
        (os, "unlink"): _counting(scene, os.unlink),
        (write_path, "CLEAR_PIECE_BYTES"): 8 << 10,
        (intent, "GROUP_REGIONS"): 2,
        (intent, "_GROUP_SHIFT"): 1,
        (intent, "_WHOLE_GROUP"): (b"\0\0", b"\1\1"),
        (backlog, "LEAST_BYTES"): 8 << 10,
        (backlog, "FIRST_BYTES"): 32 << 10,
        (backlog, "SCATTERED_BYTES"): 1 << 10,
        (mirror_session, "Workers"): functools.partial(Hands, scene.fate),
        (mirror_session, "spot_check"): lambda _, mirror, differing, _doubted, *, accounted: scene.check_return(
            mirror._number, differing(), accounted=accounted
        ),
        (mirror_opening, "Workers"): functools.partial(Hands, scene.fate),
        **{(module, "luks"): Headers(scene) for module in (mirror_session, mirror_set, replacing)},
        **{(module, "time"): clock for module in (pace, resync, backlog, link, mirror_session)},
    }
    loop = Turns(scene.fate)

    def observe(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not scene.abandoned:
            scene.unobserved.append(f"{context['message']}: {context.get('exception')!r}")

    loop.set_exception_handler(observe)
    disabled = logging.root.manager.disable
    with contextlib.ExitStack() as stack:
        for (module, name), value in small.items():
            stack.enter_context(mock.patch.object(module, name, value))
        stack.callback(gc.unfreeze)
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, disabled)
        stack.callback(loop.close)
        try:
            loop.run_until_complete(what)
        except Exception as failure:
            scene.abandoned = True
            raise Broken(f"seed {scene.seed}: {failure!r}\n" + "\n".join(scene.history[-40:])) from failure
        finally:
            scene.abandoned = scene.abandoned or bool(asyncio.all_tasks(loop))
            for task in asyncio.all_tasks(loop):
                task.cancel()
        gc.collect()
        if scene.unobserved:
            raise Broken(f"seed {scene.seed}: nobody has seen {scene.unobserved[0]}")
