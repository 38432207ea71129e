"""Interleavings of the real write path, mirror links, records and resync, in an order that a seed decides.

A scene is a target and one or two mirrors in memory, the real records in files, and clients, faults and background work
as tasks. Nothing here waits for real: time is counted (`Turns`), and threads are a list of jobs (`Hands`), each carried
out at one random moment and answered at another. So every await can be the place where others run, and a seed gives the
same scene again.

What every byte should be is known from the requests alone. The disks are made of cells of eight bytes, and each write
has content of its own: its number and the cell's. So

    during it    a region that counts as clean, and that nobody is writing to, is equal; a client's write is handed to
                 a mirror only while its user may update it
    barred       what a user wrote who might not update the mirror is on no mirror before its region was released
    a power cut  every flushed write is on the target; regions that are neither marked nor held are equal; a mirror
                 whose token says that it is whole has every write that was flushed by then; what is held stays held
    the end      everything ends, the mirrors come in sync, the disks are equal, each cell is what some order of the
                 writes leaves, and nothing is left: no turn, no mark, nobody on record

Each disk has a cache: what was not flushed may be lost in a power cut, each 512 bytes in any version since, and so may
a mirror lose it when it fails. What is not here: a target that is being filled, the header's own format, threads that
run at the same time within one job.
"""

import asyncio
import contextlib
import contextvars
import errno
import functools
import gc
import itertools
import logging
import math
import os
import random
import selectors
import shutil
import uuid
import weakref
from array import array
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast
from unittest import mock

from lockstep.crypto import luks
from lockstep.crypto.luks import Token
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.plain import PlainDisk
from lockstep.disk.runs import WORDS, places, requests
from lockstep.errors import DiskUnreadable, LockstepError
from lockstep.service import mirror_session
from lockstep.service.borrowing import DRILL
from lockstep.service.mirror_session import MirrorSession
from lockstep.volume import backlog, link, pace, regions, resync, write_path
from lockstep.volume.gate import UPDATE, Gate, Ruling
from lockstep.volume.held import NO_RIGHT, HeldRecord
from lockstep.volume.intent import Identity, IntentBitmap
from lockstep.volume.link import ASIDE, FROZEN, IN_SYNC, MirrorLink
from lockstep.volume.pages import PagedBits
from lockstep.volume.resync import Resync
from lockstep.volume.workers import Workers
from lockstep.volume.write_path import WritePath

CELL: Final = 8
SECTOR: Final = 512
REGION_BYTES: Final = 4096
PATIENCE_S: Final = 5.0
LONG_S: Final = 300.0  # of counted time: whoever takes longer hangs
NEVER: Final = math.inf
BARRING: Final = frozenset({Ruling.UNTIL_WINDOW, Ruling.UNTIL_RELEASED, Ruling.REFUSE})
USERS: Final = ("ada", "bob", "eve")


def _copied_or_frozen(mirror: MirrorLink) -> bool:
    """One that is frozen waits for the release, whatever else differs."""
    return mirror.held.frozen_since_s is not None or not mirror.regions.dirty_bytes


class Broken(AssertionError):
    """A promise was broken."""


# --- time and threads ---


class _Job:
    """What a thread was asked."""

    def __init__(
        self, future: "asyncio.Future[Any] | None", work: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        self.future = future
        self.work = work
        self.arguments = arguments
        self.ended = False
        self.value: Any = None
        self.failure: BaseException | None = None

    def carry_out(self) -> None:
        self.ended = True
        try:
            self.value = self.work(*self.arguments)
        except Exception as failure:  # noqa: BLE001 (it is for who asked)
            self.failure = failure


class Fate:
    """Decides what happens next: all of it by one seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now_s = 1000.0
        self.hands: list[Hands] = []
        self.futures: weakref.WeakSet[asyncio.Future[Any]] = weakref.WeakSet()
        self.violations: list[str] = []
        self.eager = self.chance.choice((0.2, 0.5, 0.8))
        self.blocks: Callable[[_Job], OSError | None] = lambda _: None
        self._ticks = itertools.count(1)

    def tick(self) -> int:
        """A moment: later ones are larger."""
        return next(self._ticks)

    def often(self, probability: float) -> bool:
        return self.chance.random() < probability

    def violated(self, what: str) -> None:
        self.violations.append(what)

    def turn(self, timeout_s: float | None) -> None:
        """The loop has come round; `timeout_s` is how long it would wait, None if for ever."""
        if self.violations:
            raise Broken(self.violations[0])
        if timeout_s is not None and timeout_s <= 0:
            while self.often(self.eager) and self.step():
                pass
            return
        may_wait = timeout_s is not None and timeout_s <= PATIENCE_S and self.often(0.1)
        if not may_wait and self.step():
            return
        if timeout_s is None:
            raise Broken("everybody waits, and nothing will ever happen")
        self.now_s += timeout_s

    def step(self) -> bool:
        """One thing that threads do; False if there is none."""
        steps = [step for hands in self.hands for step in hands.steps()]
        if not steps:
            return False
        self.chance.choice(steps)()
        return True

    @property
    def at_rest(self) -> bool:
        return not any(hands.jobs for hands in self.hands)


class Hands:
    """In place of `Workers`: the same promises, and every order that those allow."""

    def __init__(self, fate: Fate, name: str, count: int, patience_s: float | None = None) -> None:
        self.name = name
        self.patience_s = patience_s
        self.jobs: list[_Job] = []
        self.stuck = False
        self._fate = fate
        self._count = count
        self._given_up = self._closed = self._at_hint = False
        fate.hands.append(self)

    def begin(self, work: Callable[..., Any], *arguments: Any) -> "asyncio.Future[Any]":
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._given_up:
            future.set_exception(self._silence())
            return future
        if self._closed:
            self._fate.violated(f"{self.name} was asked after it was closed")
        self._fate.futures.add(future)
        self.jobs.append(_Job(future, work, arguments))
        return future

    def hint(self, work: Callable[[], None]) -> None:
        if not (self._at_hint or self._closed):
            self._at_hint = True
            self.jobs.append(_Job(None, work, ()))

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await self.begin(work, *arguments)

    @property
    def at_rest(self) -> bool:
        return not self.jobs

    def give_up(self) -> None:
        self._given_up = True
        for job in self.jobs:
            if job.future is not None and not job.future.done() and self.patience_s is not None:
                job.future.set_exception(self._silence())
        self.jobs = [job for at, job in enumerate(self.jobs) if job.ended or at < self._count]
        self.close()

    def close(self) -> None:
        self._closed = True

    def _silence(self) -> TimeoutError:
        return TimeoutError(errno.ETIMEDOUT, "it did not answer")

    def steps(self) -> list[Callable[[], None]]:
        if self.stuck and not self._given_up:
            return [self._hang] if self.jobs else []
        begun = self.jobs[: self._count]
        if self.stuck:  # what hangs goes on hanging
            return [self._loosen] if begun else []
        return [functools.partial(self._answer if job.ended else self._carry_out, job) for job in begun]

    def _hang(self) -> None:
        if self._fate.often(0.1) and any(job.future is not None for job in self.jobs):
            self.give_up()

    def _loosen(self) -> None:
        self.stuck = not self._fate.often(0.05)

    def _carry_out(self, job: _Job) -> None:
        failure = self._fate.blocks(job)
        if failure is None:
            job.carry_out()
        else:
            job.ended, job.failure = True, failure

    def _answer(self, job: _Job) -> None:
        self.jobs.remove(job)
        if job.future is None:
            self._at_hint = False
        elif not job.future.done():
            if job.failure is None:
                job.future.set_result(job.value)
            else:
                job.future.set_exception(job.failure)


class _Selector(selectors.SelectSelector):
    fate: Fate

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.fate.turn(timeout)
        return []


class Turns(asyncio.SelectorEventLoop):
    """A loop whose time is counted."""

    def __init__(self, fate: Fate) -> None:
        self._fate = fate
        selector = _Selector()
        selector.fate = fate
        super().__init__(selector)

    def time(self) -> float:
        return self._fate.now_s


# --- disks ---


class Medium:
    """A disk with a cache."""

    def __init__(self, content: bytes) -> None:
        self.now = bytearray(content)
        self.flushed = bytearray(content)
        self._cached: dict[int, list[bytes]] = {}  # sector -> versions since the flush

    def write(self, offset: int, data: bytes, *, durable: bool = False) -> None:
        assert offset + len(data) <= len(self.now)
        self.now[offset : offset + len(data)] = data
        for sector in range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)):
            at = sector * SECTOR
            version = bytes(self.now[at : at + SECTOR])
            if durable:
                self.flushed[at : at + SECTOR] = version
                self._cached.pop(sector, None)
            else:
                self._cached.setdefault(sector, []).append(version)

    def flush(self) -> None:
        self.flushed[:] = self.now
        self._cached.clear()

    def cut(self, chance: random.Random) -> None:
        """Lose what the cache does not give back: all, nothing, or some sectors."""
        how = chance.random()
        self.now[:] = self.flushed
        for sector, versions in self._cached.items():
            kept = versions if how < 0.3 else versions[: chance.randrange(len(versions) + 1)] if how < 0.7 else []
            if kept:
                self.now[sector * SECTOR : (sector + 1) * SECTOR] = kept[-1]
        self.flush()


class Target:
    """In place of `PlainDisk`."""

    cached = True
    block_bytes = 1

    def __init__(self, fate: Fate, content: bytes) -> None:
        self.disk = SimpleNamespace(is_block=False, path="/target")
        self.size_bytes = len(content)
        self.medium = Medium(content)
        self.prompt = True
        self.fails: set[str] = set()  # what it fails once
        self.trouble = False  # it has failed, and not everybody may know yet
        self.lost: Callable[[], None] = lambda: None  # called when it has lost what it had cached
        self._fate = fate
        blocks = range(0, self.size_bytes, REGION_BYTES)
        self._hole = [not any(content[at : at + REGION_BYTES]) for at in blocks]

    def written_ns(self) -> int:
        return 0

    def _fail(self, doing: str) -> bool:
        if doing not in self.fails:
            return False
        self.fails.discard(doing)
        self.trouble = True
        return True

    def _write(self, offset: int, data: bytes, *, durable: bool = False) -> None:
        for block in range(offset // REGION_BYTES, -(-(offset + len(data)) // REGION_BYTES)):
            self._hole[block] = False
        self.medium.write(offset, data, durable=durable)

    def read(self, offset: int, into: memoryview) -> None:
        if self._fail("read"):
            raise OSError(errno.EIO, "bad sector")
        data = self.medium.now[offset : offset + len(into)]
        into[:] = data.ljust(len(into), b"\0")

    def read_job(self, into: memoryview, run: "array[int]", count: int) -> Callable[[], None]:
        def job() -> None:
            for offset, length, position in requests(run, 0, count):
                self.read(offset, into[position : position + length])

        return job

    def write_run(self, data: memoryview, run: "array[int]", count: int) -> int:
        done = count if self._fate.often(0.9) else self._fate.chance.randrange(count + 1)
        for offset, length, position in requests(run, 0, done):
            self._write(offset, bytes(data[position : position + length]))
        return done

    def write_job(self, data: memoryview, run: "array[int]", count: int, durable: bool = False) -> Callable[[], None]:
        def job() -> None:
            for offset, length, position in requests(run, 0, count):
                if self._fail("write"):
                    half = self._fate.chance.randrange(length // CELL + 1) * CELL
                    self._write(offset, bytes(data[position : position + half]))
                    raise OSError(errno.EIO, "the target is broken")
                self._write(offset, bytes(data[position : position + length]), durable=durable)

        return job

    def zero(self, offset: int, length: int, *, allocate: bool) -> None:
        if self._fail("write"):
            raise OSError(errno.EIO, "the target is broken")
        self._write(offset, bytes(length))
        if not allocate:
            for block in range(-(-offset // REGION_BYTES), (offset + length) // REGION_BYTES):
                self._hole[block] = True

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        end = offset + length
        while offset < end:
            stop = min(end, (offset // REGION_BYTES + 1) * REGION_BYTES)
            yield offset, stop - offset, not self._hole[offset // REGION_BYTES]
            offset = stop

    def flush(self) -> None:
        if self._fail("flush"):
            self.medium.cut(self._fate.chance)
            self.lost()
            raise OSError(errno.EIO, "the target is broken")
        self.medium.flush()

    def flush_job(self) -> Callable[[], None]:
        return self.flush

    def write_back_job(self) -> Callable[[], None] | None:
        return lambda: None


class Platter:
    """What a mirror is made of: it outlives whoever has it open."""

    def __init__(self, content: bytes, token: Token) -> None:
        self.medium = Medium(content)
        self.token = token
        self.gone = False
        self.silenced = False  # it could not say of itself what it should
        self.fails: set[str] = set()  # what it fails once


class Mirror:
    """In place of `EncryptedDisk`: a mirror while it is open."""

    cached = True

    def __init__(self, scene: "Scene", platter: Platter, sector_bytes: int) -> None:
        self.sector_bytes = sector_bytes
        self.failed = self.closed = False
        self._scene = scene
        self._chance = scene.fate.chance
        self._platter = platter

    @property
    def prompt(self) -> bool:
        return self._scene.prompt

    def _fail(self, doing: str) -> bool:
        if self.closed:
            self._scene.fate.violated(f"{doing} a mirror that was closed")
        lost = doing == "flushing" and self._lossy  # what is lost is not told to one caller alone
        if not lost and not self._platter.gone and doing not in self._platter.fails:
            return False
        self._platter.fails.discard(doing)
        self.failed = True
        if self._chance.random() < 0.5:
            self._platter.medium.cut(self._chance)
            self._lossy = True
        return True

    def _check(self, offset: int, length: int) -> None:
        behind = offset + length > len(self._platter.medium.now)
        if (offset | length) % self.sector_bytes or not length or behind:
            self._scene.fate.violated(f"the mirror was given ({offset}, {length}), no whole sectors, or behind its end")

    def _check_right(self) -> None:
        request = REQUEST.get()
        if request is not None and request.kind == "write" and self._scene.gate(request.user) is not UPDATE:
            self._scene.fate.violated(f"{request}: the mirror is given what {request.user} may not update now")

    def write_run(self, data: memoryview, run: "array[int]", count: int) -> int:
        self._check_right()
        if self._platter.gone or "writing" in self._platter.fails:
            return 0
        done = count if self._chance.random() < 0.9 else self._chance.randrange(count + 1)
        for offset, length, position in requests(run, 0, done):
            self._check(offset, length)
            self._platter.medium.write(offset, bytes(data[position : position + length]))
        return done

    def write_job(self, data: memoryview, run: "array[int]", count: int, durable: bool = False) -> Callable[[], None]:
        self._check_right()
        for place in places(run, count):
            self._check(*place)

        def job() -> None:
            for offset, length, position in requests(run, 0, count):
                self._write(offset, bytes(data[position : position + length]), durable=durable)

        return job

    def _write(self, offset: int, data: bytes, *, durable: bool = False) -> None:
        failed = self._fail("writing")
        if failed or self._stopped:
            data = data[: self._chance.randrange(len(data) // SECTOR + 1) * SECTOR]
        self._platter.medium.write(offset, data, durable=durable and not failed)
        if failed:
            raise OSError(errno.EIO, "the mirror is broken")

    def zero(self, offset: int, length: int) -> None:
        self._check(offset, length)
        self._write(offset, bytes(length))

    def read(self, offset: int, into: memoryview) -> None:
        if self._fail("reading"):
            raise OSError(errno.EIO, "the mirror is broken")
        into[:] = self._platter.medium.now[offset : offset + len(into)]

    def read_job(self, offset: int, into: memoryview, *, from_medium: bool = False) -> Callable[[], None]:
        self._check(offset, len(into))
        return functools.partial(self.read, offset, into)

    def _flush(self) -> None:
        if self._fail("flushing"):
            raise OSError(errno.EIO, "the mirror is broken")
        self._platter.medium.flush()

    def flush_job(self) -> Callable[[], None]:
        return self._flush

    def write_back_job(self) -> Callable[[], None] | None:
        return lambda: None

    def forget_cache(self, offset: int, length: int) -> None: ...

    _stopped = _lossy = False

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        self.closed = True

    def left(self, path: str) -> bool:
        return False

    def cut_short(self) -> bool:
        return False


class Session(MirrorSession):
    """The real one, but for how its disk is opened."""

    scene: "Scene"
    platter: Platter

    @classmethod
    def of(cls, scene: "Scene", number: int) -> "Session":
        session = cls.__new__(cls)
        session.scene, session.platter = scene, scene.platters[number]
        state = SimpleNamespace(
            path=str(scene.home),
            intent=lambda uuid: str(scene.home / f"{uuid}.intent"),
            held=lambda uuid: str(scene.home / uuid),
        )
        volume = SimpleNamespace(id=scene.volume_id, name="vol", size_bytes=scene.size_bytes)
        uuid_ = scene.uuids[number]
        mirror = SimpleNamespace(luks_uuid=uuid_, path=f"/{uuid_}", header_path=None, generation=1)
        session.__init__(  # type: ignore[misc]
            cast(Any, state),
            cast(Any, volume),
            cast(Any, mirror),
            cast(PlainDisk, scene.target),
            cast(Any, None),
            cast(Workers, scene.workers),
            PATIENCE_S,
        )
        return session

    def _open_unless_away(self) -> tuple[luks.Header | None, EncryptedDisk | None, str]:
        if self.platter.gone:
            return None, None, "it is away"
        return *self._open(), ""

    def _open(self) -> tuple[luks.Header, EncryptedDisk]:
        if self.platter.gone:
            raise DiskUnreadable(path=self.mirror.path, reason="it is gone")
        header = cast(luks.Header, SimpleNamespace(token=self.platter.token, token_id=0))
        return header, cast(EncryptedDisk, Mirror(self.scene, self.platter, self.scene.mirror_sector))


class Headers:
    """In place of `lockstep.crypto.luks`, as far as a session uses it."""

    def __init__(self, scene: "Scene") -> None:
        self._scene = scene
        self.Token = Token

    def _platter(self, path: str) -> Platter:
        platter = self._scene.platters[self._scene.uuids.index(path[1:])]
        if platter.gone or "header" in platter.fails:
            platter.fails.discard("header")
            platter.silenced = True
            raise DiskUnreadable(path=path, reason="it is broken")
        return platter

    def read_header(self, path: str) -> Any:
        return SimpleNamespace(token=self._platter(path).token, token_id=0, uuid=path[1:])

    def write_token(self, path: str, token: Token, *, token_id: int | None) -> None:
        platter = self._platter(path)
        platter.token, platter.silenced = token, False


# --- requests ---


class Request:
    """What a client asked."""

    def __init__(self, number: int, kind: str, user: str, extents: list[tuple[int, int]]) -> None:
        self.number = number
        self.kind = kind
        self.user = user
        self.extents = extents  # (offset, length)
        self.begins: float = 0
        self.ends: float = NEVER  # when it was answered, if it was carried out
        self.durable = False
        self.over = False
        self.lost = False  # the target may have lost it, and said so
        self.rulings: set[Ruling] = set()  # of its user, meanwhile

    def __str__(self) -> str:
        return f"{self.kind} {self.number} by {self.user} at {self.extents}"

    def content(self, offset: int, length: int) -> bytes:
        first = offset // CELL
        if self.kind != "write":
            return bytes(length)
        return array("Q", (self.number << 32 | cell for cell in range(first, first + length // CELL))).tobytes()

    def regions(self) -> set[int]:
        return {
            region
            for offset, length in self.extents
            for region in range(offset // REGION_BYTES, (offset + length - 1) // REGION_BYTES + 1)
        }


REQUEST: contextvars.ContextVar[Request | None] = contextvars.ContextVar("request", default=None)


class Doorkeeper:
    """The gate."""

    def __init__(self, scene: "Scene") -> None:
        self._scene = scene
        self.rulings = dict.fromkeys(USERS, UPDATE)

    def __call__(self, user: str) -> Ruling:
        return self.rulings[user]

    def anyone(self) -> bool:
        return UPDATE in self.rulings.values()

    def denied(self, *_: object) -> None: ...

    def change(self, user: str, ruling: Ruling) -> None:
        self.rulings[user] = ruling
        for request in self._scene.under_way:
            if request.user == user:
                request.rulings.add(ruling)
                if ruling not in BARRING:
                    self._scene.barred.pop(request.number, None)


class Scene:
    """Everything from one seed."""

    def __init__(self, seed: int, home: Path) -> None:
        self.fate = Fate(seed)
        self.chance = chance = self.fate.chance
        self.base_home = home
        self.size_bytes = REGION_BYTES * chance.choice((20, 40)) + chance.choice((0, 3 * SECTOR + 104))
        self.mirror_sector = chance.choice((512, 512, 4096))
        whole = -(-self.size_bytes // self.mirror_sector) * self.mirror_sector
        self.volume_id = str(uuid.UUID(int=chance.getrandbits(128)))
        self.uuids = [str(uuid.UUID(int=chance.getrandbits(128))) for _ in range(chance.choice((1, 1, 2)))]
        tokens = Token(self.volume_id, "vol", self.size_bytes, 1, IN_SYNC)
        self.platters = [Platter(bytes(whole), tokens) for _ in self.uuids]
        self.target = Target(self.fate, bytes(self.size_bytes))
        self.prompt = chance.random() < 0.7
        self.trusts_target = chance.random() < 0.7  # it does not fail
        self.spots = [chance.randrange(self.size_bytes // CELL) * CELL for _ in range(4)]
        self.numbers = itertools.count(1)
        self.epoch = 0
        self.requests: dict[int, Request] = {}  # of all times
        self.barred: dict[int, set[int]] = {}  # number of a request -> regions in which it is not the mirror's
        self.history: list[str] = []
        self.unobserved: list[str] = []
        self.gate = Doorkeeper(self)
        self.coming_back: set[int] = set()  # mirrors that somebody opens or closes
        self.aside_since: dict[int, float] = {}  # of mirrors: what was answered by then is on it
        self.expect_held: dict[int, set[int]] = {}  # like `barred`, when the power was cut
        self.abandoned = False  # what is left of tasks is nobody's business

    # --- one life of a server ---

    def start(self, *, anew: bool = False) -> None:
        """Begin to serve what the disks and the records say."""
        self.epoch += 1
        self.gate = Doorkeeper(self)
        self.recent: list[Request] = []  # of this life
        self.under_way: list[Request] = []
        self.base = bytes(self.target.medium.now)
        self.bases = [bytes(platter.medium.now) for platter in self.platters]
        self.flushed_before: float = 0  # what was answered by then is durable
        self.still_since: dict[int, float] = {}  # of mirrors: what was answered by then is on it, and nothing else
        self.releasing: list[tuple[int, bytes]] = []
        self.full: set[str] = set()
        self.excused = False  # something but a mirror has failed
        self.fate.blocks = self._blocks
        self.workers = Hands(self.fate, "target", 16)
        self.target.prompt = self.prompt
        self.target.lost = self._lose
        if anew:
            for number in range(len(self.uuids)):
                self._first_records(number)
        self.sessions = [Session.of(self, number) for number in range(len(self.uuids))]
        self.links: list[MirrorLink] = [session.link for session in self.sessions]
        sector = max(each.sector_bytes for each in self.links)
        workers, gate = cast(Workers, self.workers), cast(Gate, self.gate)
        self.path = WritePath(cast(PlainDisk, self.target), tuple(self.links), gate, sector, workers)
        self.resyncs = [Resync(self.path, each, gate, workers) for each in self.links]
        for number, each in enumerate(self.links):
            self._watch(number, each)

    def _lose(self) -> None:
        """The target has lost something, so nothing that was asked by now need be there any more."""
        for request in self.recent:
            request.lost, request.ends = True, NEVER

    def _first_records(self, number: int) -> None:
        identity = Identity(self.volume_id, self.uuids[number], self.size_bytes)
        bitmap = IntentBitmap(str(self.home / f"{self.uuids[number]}.intent"), identity, self.workers.run)
        bitmap.claim(1, 1, bytes(-(-self.size_bytes // REGION_BYTES)))
        bitmap.close()

    @property
    def home(self) -> Path:
        home = self.base_home / str(self.epoch)
        home.mkdir(exist_ok=True)
        return home

    def _watch(self, number: int, mirror: MirrorLink) -> None:
        """Note when a mirror comes to stand still, and what is released from it."""
        real_hold, real_release = mirror.held.hold, mirror.release
        if mirror.held.frozen_since_s is not None:
            self.still_since[number] = -1

        async def hold(start: int, end: int, user: str, kind: str, *, equal: bool) -> None:
            if equal:
                self.still_since[number] = self.fate.tick()
            await real_hold(start, end, user, kind, equal=equal)

        async def release(released: bytes) -> None:
            self._check_release(number, mirror, released)
            entry = number, released
            self.releasing.append(entry)
            try:
                await real_release(released)
            finally:
                self.releasing.remove(entry)
                self._unbar(released)

        mirror.held.hold = hold  # type: ignore[method-assign]
        mirror.release = release  # type: ignore[method-assign, assignment]

    def _check_release(self, number: int, mirror: MirrorLink, released: bytes) -> None:
        if asyncio.current_task() is not self.tasks[number]:
            return
        for each, barred in self.barred.items():
            request = self.requests[each]
            there = request.rulings == {Ruling.UNTIL_RELEASED} and request.ends < NEVER
            if there and any(released[region] for region in barred):
                self.fate.violated(f"what {request} holds is released by itself")

    def _unbar(self, released: bytes) -> None:
        for number, barred in list(self.barred.items()):
            barred.difference_update(region for region in list(barred) if released[region])
            if not barred:
                del self.barred[number]

    def _blocks(self, job: _Job) -> OSError | None:
        """Whether a record cannot be written now."""
        owner = getattr(job.work, "__self__", None)
        if isinstance(owner, PagedBits):
            kind = "intent" if owner._path.endswith(".intent") else "held"
        else:
            kind = {IntentBitmap: "intent", HeldRecord: "held"}.get(type(owner), "")
        if kind not in self.full:
            return None
        self.excused = True
        if isinstance(owner, PagedBits) and self.fate.often(0.5):
            self._half(owner, job)
        return OSError(errno.ENOSPC, "no space left")

    def _half(self, owner: PagedBits, job: _Job) -> None:
        (pages,) = job.arguments
        for page, content in pages.items():
            if self.fate.often(0.5):
                os.pwrite(owner._fd, content, 512 * (1 + page))

    # --- what happens ---

    async def play(self) -> None:
        """All of it."""
        lives = self.chance.choice((1, 2, 3))
        for life in range(lives):
            self.start(anew=life == 0)
            self._check_marks("at the start")
            self._check_held()
            for session in self.sessions:
                session.claim()
            self.tasks = [asyncio.ensure_future(each.run()) for each in self.resyncs]
            await self._busy()
            if life < lives - 1:
                await self._power_cut()
            else:
                await self._settle()

    async def _busy(self) -> None:
        doing: set[asyncio.Task[None]] = set()
        for _ in range(self.chance.randrange(10, 70)):
            doing = {task for task in doing if not task.done()}
            if len(doing) < 8:
                doing.add(asyncio.ensure_future(self._something()))
            for _ in range(self.chance.choice((0, 1, 3, 10, 30))):
                await asyncio.sleep(0)
                if self.fate.often(0.1):
                    self._look()
            if self.fate.often(0.05):
                await asyncio.sleep(1)
            for task in self.tasks:
                if task.done():
                    task.result()
                    raise Broken("a resync has ended")
        self.doing = doing

    def _something(self) -> Coroutine[Any, Any, None]:
        kinds: dict[Callable[[], Coroutine[Any, Any, None]], float] = {
            self._write: 40,
            self._zero: 8,
            self._flush: 10,
            self._tidy: 5,
            self._change_ruling: 9,
            self._release: 4,
            self._announce: 4,
            self._mirror_fault: 5,
            self._heal: 8,
            self._fill_up: 2,
            self._make_room: 3,
            self._target_fault: 0 if self.trusts_target else 2,
            self._step_aside: 1,
        }
        return self.chance.choices(list(kinds), list(kinds.values()))[0]()

    def _place(self, aligned: bool) -> tuple[int, int]:
        unit = self.mirror_sector if aligned else CELL
        length = self.chance.choice((unit, SECTOR, 4096, self.chance.randrange(1, 12 << 10)))
        length = max(unit, length // unit * unit)
        spot = self.chance.choice(self.spots) + self.chance.randrange(-4096, 4096)
        if self.fate.often(0.3):
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

    async def _write(self) -> None:
        aligned = self.fate.often(0.6)
        extents = [self._place(aligned) for _ in range(self.chance.choice((1, 1, 1, 3)))]
        request = Request(next(self.numbers), "write", self.chance.choice(USERS), extents)
        run, position = array("Q"), 0
        for offset, length in extents:
            run.extend((offset, length, position, 0))
            position += length
        data = memoryview(bytearray(b"".join(request.content(*extent) for extent in extents)))
        count, done = len(extents), 0
        request.durable = self.fate.often(0.15)
        with self._asked(request):
            if not request.durable and self.fate.often(0.7):
                done = self.path.write_run(request.user, data, run, count)
            if done < count:
                rest = run[WORDS * done :]
                await self.path.write(request.user, data, rest, count - done, durable=request.durable)

    async def _zero(self) -> None:
        request = Request(next(self.numbers), "zero", self.chance.choice(USERS), [self._place(self.fate.often(0.4))])
        ((offset, length),) = request.extents
        durable, trim, allocate = self.fate.often(0.1), self.fate.often(0.5), self.fate.often(0.5)
        with self._asked(request):
            if trim:
                await self.path.trim(request.user, offset, length, durable=durable)
            else:
                await self.path.zero(request.user, offset, length, durable=durable, allocate=allocate, fast=False)

    async def _flush(self) -> None:
        self.history.append("flush")
        begins = self.fate.tick()
        try:
            await self.path.flush()
        except OSError as failure:
            if not self.excused:
                self.fate.violated(f"a flush failed, though only mirrors did: {failure}")
        else:
            self.flushed_before = max(self.flushed_before, begins)

    async def _tidy(self) -> None:
        self.history.append("tidy")
        with contextlib.suppress(OSError):
            await self.path.tidy()

    async def _change_ruling(self) -> None:
        weights = (4, 2, 2, 1, 1)
        rulings = (UPDATE, Ruling.UNTIL_WINDOW, Ruling.UNTIL_RELEASED, Ruling.REFUSE, Ruling.FALL_BEHIND)
        user, (ruling,) = self.chance.choice(USERS), self.chance.choices(rulings, weights)
        self.history.append(f"{user}: {ruling.name}")
        self.gate.change(user, ruling)

    async def _release(self) -> None:
        """`lockstep sync`."""
        include_held = self.gate.anyone() and self.fate.often(0.6)
        self.history.append(f"sync, held included: {include_held}")
        self.path.durability_lost = None
        for each in self.links:
            each.target_error = None
            if include_held:
                with contextlib.suppress(OSError):
                    await each.release(each.held.regions())
        for resyncing in self.resyncs:
            resyncing.wake()

    async def _announce(self) -> None:
        for each in self.links:
            await each.announce()

    async def _mirror_fault(self) -> None:
        number = self.chance.randrange(len(self.platters))
        platter, fault = self.platters[number], self.chance.choice(("gone", "stuck", "once", "once"))
        if fault == "once":
            fault = self.chance.choice(("writing", "flushing", "reading", "header"))
            platter.fails.add(fault)
        elif fault == "gone":
            platter.gone = True
        else:
            threads = self.links[number]._workers if self.fate.often(0.8) else self.sessions[number]._scribe
            if threads is not None:
                cast(Hands, threads).stuck = True
        self.history.append(f"mirror {number}: {fault}")

    async def _heal(self) -> None:
        number = self.chance.randrange(len(self.platters))
        self.history.append(f"mirror {number} comes back")
        await self._come_back(number)

    async def _come_back(self, number: int) -> None:
        """As `Background` does, one attempt at a time."""
        session = self.sessions[number]
        self.platters[number].gone = False
        if session.link.error is None or number in self.coming_back:
            return
        self.coming_back.add(number)
        try:
            if await session.come_back():
                self.aside_since.pop(number, None)
                self.resyncs[number].wake()
        except OSError:
            pass
        finally:
            self.coming_back.discard(number)

    async def _fill_up(self) -> None:
        self.full.add(self.chance.choice(("intent", "held")))
        self.history.append(f"full: {self.full}")

    async def _make_room(self) -> None:
        self.full.clear()
        self.history.append("there is room")

    async def _target_fault(self) -> None:
        fault = self.chance.choice(("write", "flush", "read"))
        self.excused = True
        self.target.fails.add(fault)
        self.history.append(f"target: {fault}")

    async def _step_aside(self) -> None:
        number = self.chance.randrange(len(self.sessions))
        self.history.append(f"mirror {number} steps aside")
        link, real = self.links[number], self.links[number].step_aside

        def step_aside(reason: str) -> None:
            self.aside_since[number] = self.fate.tick()
            real(reason)

        if link.error is None and number not in self.coming_back:
            link.step_aside = step_aside  # type: ignore[method-assign]
            self.coming_back.add(number)
            try:
                with contextlib.suppress(LockstepError, OSError):
                    await self.sessions[number].step_aside(self.path, DRILL)
            finally:
                self.coming_back.discard(number)
                del link.step_aside

    # --- looks ---

    def _look(self) -> None:
        """Whatever is clean, and left alone, is equal."""
        if self.target.trouble:
            if not self.under_way and self.fate.at_rest:
                self.target.trouble = False
            return
        half = self.path._half_done
        for number, mirror in enumerate(self.links):
            disk = cast(Mirror | None, mirror._disk)
            if disk is None or (disk.failed and mirror.error is None):
                continue
            target, copy = self.target.medium.now, self.platters[number].medium.now
            if copy[: len(target)] == target:
                continue
            for region in range(-(-self.size_bytes // REGION_BYTES)):
                at, end = region * REGION_BYTES, min((region + 1) * REGION_BYTES, self.size_bytes)
                if target[at:end] == copy[at:end] or not mirror.regions.clean(region):
                    continue
                if self.path.ranges.free(at, end) and not any(a < end and at < a + n for a, n in half):
                    raise Broken(
                        f"region {region} of mirror {number} counts as clean, and differs: {self._told(number)}"
                    )
        if self.fate.often(0.02):
            self._look_for_barred()

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
            if one != other and each.regions.clean(cell * CELL // REGION_BYTES)
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

    def _check_marks(self, when: str) -> None:
        """What is not known to differ is equal; to be asked when a start has read the records."""
        target = self.target.medium.now
        for number, mirror in enumerate(self.links):
            copy = self.platters[number].medium.now
            if mirror.error is not None:  # whether the records are about it is found out when it is there
                continue
            for region in range(-(-self.size_bytes // REGION_BYTES)):
                at, end = region * REGION_BYTES, min((region + 1) * REGION_BYTES, self.size_bytes)
                if mirror.regions.clean(region) and target[at:end] != copy[at:end]:
                    raise Broken(f"{when}, region {region} of mirror {number} differs, and is neither marked nor held")

    def _check_content(
        self, what: str, content: bytes | bytearray, flushed_before: float, *, before: float = NEVER, base: bytes
    ) -> None:
        """Each cell has what some order of the requests leaves, if all that ended by `flushed_before` are there.

        Without those that began after `before`.
        """
        least = [0.0] * (self.size_bytes // CELL)
        zeroed = [-1.0] * len(least)
        for request in self.recent:
            there = request.ends < flushed_before or (request.durable and request.ends < before)
            for offset, length in request.extents:
                part = slice(offset // CELL, (offset + length) // CELL)
                if there:
                    least[part] = [max(each, request.begins) for each in least[part]]
                if request.kind != "write" and request.begins < before:
                    zeroed[part] = [max(each, request.ends) for each in zeroed[part]]
        was, cells = memoryview(base).cast("Q"), memoryview(content)[: self.size_bytes].cast("Q")
        for cell, value in enumerate(cells):
            there = value == was[cell] and not least[cell]
            if not there and (value or zeroed[cell] < max(least[cell], 0.5)):
                self._check_cell(what, cell, value, least[cell], before)

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
        for hands in self.fate.hands:
            for job in list(hands.jobs[: hands._count]):
                if not job.ended and self.fate.often(0.4):
                    self._interrupt(job)
        old = self.home
        self.target.medium.cut(self.chance)
        for platter in self.platters:
            platter.medium.cut(self.chance)
        for _, released in self.releasing:
            self._unbar(released)
        self._check_after_cut()
        kept = [file for file in old.iterdir() if not file.name.endswith(".new")]
        later = self.base_home / str(self.epoch + 1)
        later.mkdir()
        for file in kept:
            shutil.copy(file, later)
        content = bytes(self.target.medium.now)
        platters = [Platter(bytes(each.medium.now), each.token) for each in self.platters]
        await self._abandon()
        self.target = Target(self.fate, content)
        self.platters = platters
        for platter in platters:
            platter.gone = platter.silenced = self.fate.often(0.1)
        self.expect_held = dict(self.barred)  # what is held stays held, says `_check_held` when the next life begins

    def _interrupt(self, job: _Job) -> None:
        owner = getattr(job.work, "__self__", None)
        if isinstance(owner, PagedBits):
            self._half(owner, job)
        elif self._blocks(job) is None:
            job.carry_out()

    def _check_after_cut(self) -> None:
        target = self.target.medium.now
        self._check_content("after a power cut the target", target, self.flushed_before, base=self.base)
        self._look_for_barred()
        for number, platter in enumerate(self.platters):
            what, state = f"after a power cut mirror {number}, {platter.token.state},", platter.token.state
            copy = platter.medium.now
            header_hangs = cast(Hands, self.sessions[number]._scribe)._given_up
            if platter.silenced or self.links[number].silent or header_hangs:
                continue
            if state == IN_SYNC or (state == ASIDE and number not in self.aside_since):
                self._check_content(what, copy, self.flushed_before, base=self.base)
            elif state == FROZEN:
                since = self.still_since.get(number, -1)
                if since < 0:
                    if copy != self.bases[number]:
                        raise Broken(f"{what} was changed while it was frozen")
                else:
                    self._check_content(what, copy, since, before=since, base=self.base)
            elif state == ASIDE:
                since = self.aside_since[number]
                self._check_content(what, copy, since, before=since, base=self.base)

    async def _abandon(self) -> None:
        """The process is no more."""
        self.abandoned = True
        for hands in self.fate.hands:
            hands.stuck = False
        for future in self.fate.futures:
            future.add_done_callback(lambda future: future.cancelled() or future.exception())
        while await self._cancel_all():
            pass
        self.fate.hands.clear()
        self._close()
        self.under_way.clear()
        self.coming_back = set()
        self.aside_since = {}
        del self.path, self.sessions, self.links, self.resyncs, self.tasks, self.doing, self.workers
        gc.collect()
        self.unobserved.clear()
        self.abandoned = False

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

    async def _settle(self) -> None:
        self.history.append("all is well again")
        self._repair()
        await self._in_time(asyncio.gather(*self.doing), "a request")
        self._repair()  # what went wrong last
        for user in USERS:
            self.gate.change(user, UPDATE)
        self.path.durability_lost = None
        for each in self.links:
            each.target_error = None
        if self.fate.often(0.5):
            await self._in_time(self._in_sync(_copied_or_frozen), "a resync")
            self._look_for_barred()
            self._look()
        for each in self.links:
            await self._in_time(each.release(each.held.regions()), "a release")
        await self._in_time(self._in_sync(lambda each: each.state == IN_SYNC and not each.held.writers), "a resync")
        await self._in_time(self._announce(), "an announcement")
        await self._check_end()
        for _ in range(2):
            await self._in_time(self.path.tidy(), "tidying")
        for resyncing in self.resyncs:
            resyncing.stop()
        await self._in_time(asyncio.gather(*self.tasks), "a resync")
        for each in self.links:
            if each._writing_out is not None:
                await each._writing_out
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
        self.target.fails.clear()
        for platter in self.platters:
            platter.gone = False
            platter.fails.clear()
        for hands in self.fate.hands:
            hands.stuck = False

    async def _in_sync(self, enough: Callable[[MirrorLink], bool]) -> None:
        while True:
            for number, each in enumerate(self.links):
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
            if any(each.intent.marked()):
                raise Broken(f"mirror {number} still has marks")
            if each.regions.dirty_bytes or each.regions.held_bytes:
                raise Broken(f"mirror {number} still has regions that differ")

    async def _retire(self) -> None:
        """Stop in order, and see what the next start would make of it."""
        for session in self.sessions:
            await self._in_time(session.retire(), "stopping")
        self._close()
        self.sessions = [Session.of(self, number) for number in range(len(self.uuids))]
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


def played(seed: int, home: Path) -> Scene:
    """Play the scene of a seed; raises Broken."""
    scene = Scene(seed, home)
    clock = SimpleNamespace(monotonic=lambda: scene.fate.now_s, time=lambda: scene.fate.now_s)
    small = {
        (regions, "SMALLEST_REGION_BYTES"): REGION_BYTES,
        (pace, "PIECE_BYTES"): 8 << 10,
        (pace, "LARGEST_PIECE_BYTES"): 16 << 10,
        (pace, "GENTLE_PIECE_BYTES"): 4 << 10,
        (resync, "LARGEST_PIECE_BYTES"): 16 << 10,
        (write_path, "CLEAR_PIECE_BYTES"): 8 << 10,
        (backlog, "LEAST_BYTES"): 8 << 10,
        (backlog, "FIRST_BYTES"): 32 << 10,
        (backlog, "SCATTERED_BYTES"): 1 << 10,
        (mirror_session, "Workers"): functools.partial(Hands, scene.fate),
        (mirror_session, "luks"): Headers(scene),
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
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, disabled)
        stack.callback(loop.close)
        try:
            loop.run_until_complete(scene.play())
        except AssertionError as failure:
            scene.abandoned = True
            raise Broken(f"seed {seed}: {failure}\n" + "\n".join(scene.history[-40:])) from failure
        finally:
            scene.abandoned = scene.abandoned or bool(asyncio.all_tasks(loop))
            for task in asyncio.all_tasks(loop):
                task.cancel()
        gc.collect()
        if scene.unobserved:
            raise Broken(f"seed {seed}: nobody has seen {scene.unobserved[0]}")
    return scene
