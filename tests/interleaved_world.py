"""The world in which scenes (tests/interleavings.py) are played: disks, threads, time, and what a state directory has.

Nothing in it waits for real: time is counted (`Turns`), and threads are a list of jobs (`Hands`), each carried out at
one random moment and answered at another. So every await can be the place where others run, and a seed (`Fate`) gives
the same scene again.

Each disk has a cache: what was not flushed may be lost in a power cut, each 512 bytes in any version since, and so may
a mirror lose it when it fails, and the target when its flush does. The records are real files; the power can also be
cut between any two durable steps of what one thread does (`Fate.cut_within`).

What is not here: the header's own format, two threads at the same time within one step of a job.
"""

import asyncio
import contextlib
import contextvars
import errno
import functools
import itertools
import math
import random
import selectors
import uuid
import weakref
from array import array
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, TypeVar, cast

from lockstep.crypto import luks
from lockstep.crypto.luks import Token
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.plain import PlainDisk
from lockstep.disk.probe import Disk
from lockstep.disk.runs import places, requests
from lockstep.errors import DiskUnreadable, MirrorBorrowed
from lockstep.service.mirror_opening import Away, MirrorOpener, Opened
from lockstep.service.mirror_session import MirrorSession
from lockstep.service.registry_place import told
from lockstep.volume.filling import NewTarget
from lockstep.volume.gate import UPDATE, Ruling
from lockstep.volume.link import IN_SYNC
from lockstep.volume.workers import Workers

CELL: Final = 8
SECTOR: Final = 512
REGION_BYTES: Final = 4096
PATIENCE_S: Final = 5.0
NEVER: Final = math.inf
BARRING: Final = (Ruling.UNTIL_WINDOW, Ruling.UNTIL_RELEASED, Ruling.REFUSE)
USERS: Final = ("ada", "bob", "eve")
SPOILT: Final = 0xBAD00000  # in place of a request's number: what nobody wrote


class Broken(AssertionError):
    """A promise was broken."""


class PowerCut(BaseException):
    """The power is cut within what a thread does."""


# --- time and threads ---


class Job:
    """What a thread was asked: all of it at one moment, or in steps where it is a generator."""

    def __init__(
        self, future: "asyncio.Future[Any] | None", work: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        self.future = future
        self.work = work
        self.arguments = arguments
        self.ended = False
        self.value: Any = None
        self.failure: BaseException | None = None
        self.steps: Iterator[None] | None = None  # those that are left, once it has begun
        self.due = 0  # after how many steps of all threads it is likely to go on

    def carry_out(self) -> None:
        """One step."""
        try:
            if self.steps is None:
                self.value = self.work(*self.arguments)
                self.steps = self.value if isinstance(self.value, Generator) else iter(())
            next(self.steps)
        except StopIteration:
            self.ended = True
        except (Exception, PowerCut) as failure:  # noqa: BLE001 (it is for who asked)
            self.ended, self.failure = True, failure


class Fate:
    """Decides what happens next: all of it by one seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now_s = 1000.0
        self.hands: list[Hands] = []
        self.futures: weakref.WeakSet[asyncio.Future[Any]] = weakref.WeakSet()
        self.violations: list[str] = []
        self.eager = self.chance.choice((0.2, 0.5, 0.8))
        self.blocks: Callable[[Job], OSError | None] = lambda _: None
        self.over = False  # the process is no more: no thread does anything
        self._ticks = itertools.count(1)
        self._steps = 0
        self._steps_left: int | None = None

    def tick(self) -> int:
        """A moment: later ones are larger."""
        return next(self._ticks)

    def often(self, probability: float) -> bool:
        return self.chance.random() < probability

    @contextlib.contextmanager
    def cut_within(self, steps: int | None) -> Iterator[None]:
        """Have the power cut after so many durable steps, if any; PowerCut comes out of what was at work then."""
        self._steps_left = steps
        try:
            yield
        finally:
            self._steps_left = None

    def durable_step(self) -> None:
        """Something is about to become durable."""
        if self._steps_left is not None:
            self._steps_left -= 1
            if self._steps_left < 0:
                raise PowerCut

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
        self._steps += 1
        steps = [step for hands in self.hands for step in hands.steps(self._steps)]
        if not steps:
            steps = [step for hands in self.hands for step in hands.steps(NEVER)]
        if not steps:
            return False
        self.chance.choice(steps)()
        return True

    def due(self) -> int:
        """When a job is likely to be carried out: some linger."""
        return self._steps + self.chance.choice((0, 50, 200)) if self.often(0.05) else 0

    @property
    def at_rest(self) -> bool:
        return not any(hands.jobs for hands in self.hands)


class Hands:
    """In place of `Workers`: the same promises, and every order that those allow."""

    def __init__(self, fate: Fate, name: str, count: int, patience_s: float | None = None) -> None:
        self.name = name
        self.patience_s = patience_s
        self.jobs: list[Job] = []
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
        self.jobs.append(job := Job(future, work, arguments))
        job.due = self._fate.due()
        return future

    def hint(self, work: Callable[[], None]) -> None:
        if not (self._at_hint or self._closed):
            self._at_hint = True
            self.jobs.append(Job(None, work, ()))

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

    def steps(self, due: float) -> list[Callable[[], None]]:
        """What its threads may do next, of the jobs that are due by then."""
        if self.stuck and not self._given_up:
            return [self._hang] if self.jobs else []
        begun = self.jobs[: self._count]
        if self.stuck:  # what hangs goes on hanging
            return [self._loosen] if begun else []
        ready = (job for job in begun if job.due <= due)
        return [functools.partial(self._answer if job.ended else self._carry_out, job) for job in ready]

    def _hang(self) -> None:
        if self._fate.often(0.1) and any(job.future is not None for job in self.jobs):
            self.give_up()

    def _loosen(self) -> None:
        self.stuck = not self._fate.often(0.05)

    def _carry_out(self, job: Job) -> None:
        failure = self._fate.blocks(job) if job.steps is None else None
        if self._fate.over:
            job.ended, job.failure = True, OSError(errno.EIO, "the power is off")
        elif failure is None:
            job.carry_out()
        else:
            job.ended, job.failure = True, failure

    def _answer(self, job: Job) -> None:
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

    def create_future(self) -> "asyncio.Future[Any]":
        future = super().create_future()
        self._fate.futures.add(future)
        return future


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


def parts_of(chance: random.Random, offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """What is written at once of some data, and where: all of it, or one part after the other."""
    at = chance.randrange(len(data) // SECTOR + 1) * SECTOR if chance.random() < 0.3 else 0
    return ((offset + start, part) for start, part in ((0, data[:at]), (at, data[at:])) if part)


class Target(PlainDisk):
    """A target in memory."""

    def __init__(self, fate: Fate, content: bytes, *, prompt: bool, block_bytes: int) -> None:
        """`block_bytes` is more than one where it is written past the page cache."""
        self.disk = cast(Disk, SimpleNamespace(is_block=False, path="/target"))
        self.size_bytes = len(content)
        self.medium = Medium(content)
        self.fails: set[str] = set()  # what it fails once
        self.trouble = False  # it has failed, and not everybody may know yet
        self.troubles = 0  # how often it has
        self.lost: Callable[[], None] = lambda: None  # called when it has lost what it had cached
        self._fate = fate
        self._prompt = prompt
        self._block_bytes = block_bytes
        sectors = range(0, self.size_bytes, SECTOR)
        self._hole = bytearray(not any(content[at : at + SECTOR]) for at in sectors)

    @property
    def prompt(self) -> bool:
        return self._prompt

    @property
    def cached(self) -> bool:
        return self._block_bytes == 1

    @property
    def block_bytes(self) -> int:
        return self._block_bytes

    def written_ns(self) -> int:
        return 0

    def _fail(self, doing: str) -> bool:
        if doing not in self.fails:
            return False
        self.fails.discard(doing)
        self.trouble = True
        self.troubles += 1
        return True

    def _write(self, offset: int, data: bytes, *, durable: bool = False) -> None:
        sectors = slice(offset // SECTOR, -(-(offset + len(data)) // SECTOR))
        self._hole[sectors] = bytes(sectors.stop - sectors.start)
        self.medium.write(offset, data, durable=durable)

    def read(self, offset: int, into: memoryview) -> None:
        if self._fail("read"):
            raise OSError(errno.EIO, "bad sector")
        data = self.medium.now[offset : offset + len(into)]
        into[:] = data.ljust(len(into), b"\0")

    def read_run(self, into: bytearray, run: "array[int]", count: int) -> int:
        if self.fails or self._fate.often(0.2):  # it is not in the page cache
            return 0
        for offset, length, position in requests(run, 0, count):
            self.read(offset, memoryview(into)[position : position + length])
        return count

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
        def job() -> Iterator[None]:
            for offset, length, position in requests(run, 0, count):
                yield from self._write_in_steps(offset, bytes(data[position : position + length]), durable=durable)

        return cast(Callable[[], None], job)

    def _write_in_steps(self, offset: int, data: bytes, *, durable: bool) -> Iterator[None]:
        """As whole blocks, with what surrounds it; or else it may be torn."""
        start = offset // self._block_bytes * self._block_bytes
        end = -(-(offset + len(data)) // self._block_bytes) * self._block_bytes
        if end - start > len(data):
            whole = self.medium.now[start:end]
            yield
            whole[offset - start : offset - start + len(data)] = data
            self.write(start, bytes(whole), durable=durable)
            return
        for at, part in parts_of(self._fate.chance, offset, data):
            self.write(at, part, durable=durable)
            yield

    def write(self, offset: int, data: memoryview | bytes, *, durable: bool = False) -> None:
        if self._fail("write"):
            self._write(offset, bytes(data[: self._fate.chance.randrange(len(data) // CELL + 1) * CELL]))
            raise OSError(errno.EIO, "the target is broken")
        self._write(offset, bytes(data), durable=durable)

    def zero(self, offset: int, length: int, *, allocate: bool) -> None:
        if self._fail("write"):
            raise OSError(errno.EIO, "the target is broken")
        self._write(offset, bytes(length))
        if not allocate:
            first, after = -(-offset // SECTOR), (offset + length) // SECTOR
            self._hole[first:after] = b"\1" * max(0, after - first)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        end = offset + length
        while offset < end:
            hole = self._hole[offset // SECTOR]
            after = self._hole.find(1 - hole, offset // SECTOR)
            stop = min(end, after * SECTOR) if after >= 0 else end
            yield offset, stop - offset, not hole
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


class Replacement(NewTarget, Target):
    """A new target, which is filled from a mirror."""


AnyTarget = TypeVar("AnyTarget", bound=Target)


class Platter:
    """What a mirror is made of: it outlives whoever has it open."""

    def __init__(self, content: bytes, token: Token) -> None:
        self.medium = Medium(content)
        self.token = token
        self.gone = False
        self.silenced = False  # it could not say of itself what it should
        self.older = False  # it was put back from an image of it, and has not been in sync since
        self.borrowed = False  # a command has it
        self.rekeyed = False  # it has another key since a server had it
        self.losses = 0  # how often it has lost what it had cached
        self.fails: set[str] = set()  # what it fails once


class Mirror:
    """In place of `EncryptedDisk`: a mirror while it is open."""

    def __init__(self, world: "World", number: int) -> None:
        self.sector_bytes = world.mirror_sectors[number]
        self.cached = not world.direct
        self.failed = self.closed = False
        self._world, self._number = world, number
        self._chance = world.fate.chance
        self._platter = world.platters[number]

    @property
    def prompt(self) -> bool:
        return self._world.prompt

    def _fail(self, doing: str) -> bool:
        if self.closed:
            self._world.fate.violated(f"{doing} a mirror that was closed")
        lost = doing == "flushing" and self._lossy  # what is lost is not told to one caller alone
        if not lost and not self._platter.gone and doing not in self._platter.fails:
            return False
        self._platter.fails.discard(doing)
        self.failed = True
        if self._chance.random() < 0.5:
            self._platter.medium.cut(self._chance)
            self._platter.losses += 1
            self._lossy = True
        return True

    def _check(self, offset: int, length: int) -> None:
        behind = offset + length > len(self._platter.medium.now)
        if (offset | length) % self.sector_bytes or not length or behind:
            self._world.fate.violated(f"the mirror was given ({offset}, {length}), no whole sectors, or behind its end")

    def _check_right(self) -> None:
        request = REQUEST.get()
        if request is not None and request.kind == "write" and self._world.gate(request.user) is not UPDATE:
            self._world.fate.violated(f"{request}: the mirror is given what {request.user} may not update now")

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

        def job() -> Iterator[None]:
            for offset, length, position in requests(run, 0, count):
                encrypted = bytes(data[position : position + length])
                if self._stopped:
                    raise OSError(errno.ECANCELED, "it was given up")
                for part in parts_of(self._chance, offset, encrypted):
                    self._write(*part, durable=durable)
                    yield

        return cast(Callable[[], None], job)

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
        return self._world.platters[self._number] is not self._platter

    def cut_short(self) -> bool:
        return False


class Opener(MirrorOpener):
    """How a platter comes to be open."""

    def __init__(self, world: "World", number: int) -> None:
        mirror = cast(Any, world.register.mirror(number))
        super().__init__(cast(Any, world.state), cast(Any, world.record), mirror, cast(Any, None))
        self._world, self._number = world, number
        self._opened: Platter | None = None

    @property
    def _platter(self) -> Platter:
        return self._world.platters[self._number]  # by now: another may have been put in its place

    def first(self, patience_s: float) -> Opened | Away:
        if self._platter.borrowed:
            return Away("it is being re-keyed")
        return Away("it is away") if self._platter.gone else self._open()

    def _open(self) -> Opened:
        if self._platter.gone:
            raise DiskUnreadable(path=self._mirror.path, reason="it is gone")
        if self._platter.borrowed:
            raise MirrorBorrowed(path=self._mirror.path)
        self._opened = self._platter
        header = cast(luks.Header, SimpleNamespace(token=self._platter.token, token_id=0))
        return Opened(header, cast(EncryptedDisk, Mirror(self._world, self._number)))

    def header_left(self) -> bool:
        return self._platter is not self._opened


def session_of(world: "World", number: int) -> MirrorSession:
    """The real one, of the real path."""
    mirror, opener = cast(Any, world.register.mirror(number)), Opener(world, number)
    state, record, workers = cast(Any, world.state), cast(Any, world.record), cast(Workers, world.workers)
    return MirrorSession(state, record, mirror, world.target, opener, workers, PATIENCE_S)


class Headers:
    """In place of `lockstep.crypto.luks`, as far as a session uses it."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.Token = Token

    def _platter(self, path: str) -> Platter:
        platter = self._world.platters[self._world.uuids.index(path[1:])]
        if platter.gone or "header" in platter.fails:
            platter.fails.discard("header")
            platter.silenced = True
            raise DiskUnreadable(path=path, reason="it is broken")
        return platter

    def read_header(self, path: str) -> Any:
        return SimpleNamespace(token=self._platter(path).token, token_id=0, uuid=path[1:])

    def write_token(self, path: str, token: Token, *, token_id: int | None) -> None:
        self._world.fate.durable_step()
        platter = self._platter(path)
        platter.token, platter.silenced = token, False
        platter.older = platter.older and token.state != IN_SYNC
        if "second header" in platter.fails:  # the first copy of it is written, and counts
            platter.fails.discard("second header")
            raise DiskUnreadable(path=path, reason="it is broken")


# --- what is on record ---


class StateDir:
    """In place of `State`: where the records are in this life."""

    def __init__(self, world: "World") -> None:
        self._world = world

    @property
    def path(self) -> str:
        return str(self._world.home)

    def told(self) -> contextlib.AbstractContextManager[None]:
        return told(self.path)

    def intent(self, luks_uuid: str) -> str:
        return f"{self.path}/{luks_uuid}.intent"

    def held(self, luks_uuid: str) -> str:
        return f"{self.path}/{luks_uuid}"

    def missing(self, volume_id: str) -> str:
        return f"{self.path}/{volume_id}.missing"

    def records(self, luks_uuid: str) -> tuple[str, ...]:
        return self.intent(luks_uuid), f"{self.held(luks_uuid)}.held", f"{self.held(luks_uuid)}.writers"

    def borrowing_lock_path(self, luks_uuid: str) -> str:
        return f"{self.path}/{luks_uuid}.borrowed"

    @contextlib.contextmanager
    def registry(self) -> "Iterator[Register]":
        yield self._world.register


class Register:
    """In place of the registry."""

    def __init__(self, world: "World") -> None:
        self.filled_from: str | None = None
        self.replacements = 0
        self.generations = dict.fromkeys(world.uuids, 1)
        self._compare: dict[str, bool] = dict.fromkeys(world.uuids, False)
        self._world = world

    def mirror(self, number: int) -> Any:
        """Of mirrors, the id is the LUKS UUID here."""
        uuid_ = self._world.uuids[number]
        return SimpleNamespace(
            id=uuid_,
            luks_uuid=uuid_,
            path=f"/{uuid_}",
            header_path=None,
            generation=self.generations[uuid_],
            compare=self._compare[uuid_],
        )

    def set_generation(self, mirror_id: str, generation: int, *, compare: bool | None = None) -> None:
        self._world.fate.durable_step()
        self.generations[mirror_id] = generation
        self._compare[mirror_id] = self._compare[mirror_id] if compare is None else compare

    def replace_target(self, mirror_id: str) -> None:
        self._world.fate.durable_step()
        self.filled_from = mirror_id
        self.replacements += 1
        self._compare = {each: each != mirror_id for each in self._compare}

    def target_filled(self, name: str, *, actor: object) -> None:
        self._world.fate.durable_step()
        self.filled_from = None


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

    def __init__(self, world: "World") -> None:
        self._world = world
        self.rulings = dict.fromkeys(USERS, UPDATE)

    def __call__(self, user: str) -> Ruling:
        return self.rulings[user]

    def anyone(self) -> bool:
        return UPDATE in self.rulings.values()

    def denied(self, *_: object) -> None: ...

    def change(self, user: str, ruling: Ruling) -> None:
        self.rulings[user] = ruling
        for request in self._world.under_way:
            if request.user == user:
                request.rulings.add(ruling)
                if ruling not in BARRING:
                    self._world.barred.pop(request.number, None)


class World:
    """What there is when a scene begins, and outlives the server."""

    def __init__(self, seed: int, home: Path) -> None:
        self.seed = seed
        self.fate = Fate(seed)
        self.chance = chance = self.fate.chance
        self.base_home = home
        self.epoch = 0
        self.block_bytes = chance.choice((1, 1, 1, 1, 512, 4096))
        self.direct = self.block_bytes > 1
        self.size_bytes = REGION_BYTES * chance.choice((1, 20, 20, 40, 40))
        self.size_bytes += chance.choice((0, 0, CELL, 3 * SECTOR + 104))
        self.size_bytes -= self.size_bytes % self.block_bytes
        self.volume_id = str(uuid.UUID(int=chance.getrandbits(128)))
        self.uuids = [str(uuid.UUID(int=chance.getrandbits(128))) for _ in range(chance.choice((1, 1, 1, 2, 2, 3)))]
        self.mirror_sectors = [chance.choice((512, 512, 4096)) for _ in self.uuids]
        self.sector_bytes = max(self.block_bytes, *self.mirror_sectors)
        self.state = StateDir(self)
        self.register = Register(self)
        token = Token(self.volume_id, "vol", self.size_bytes, 1, IN_SYNC)
        wholes = (-(-self.size_bytes // sector) * sector for sector in self.mirror_sectors)
        self.platters = [Platter(bytes(whole), token) for whole in wholes]
        self.prompt = not self.direct and chance.random() < 0.7
        self.workers = Hands(self.fate, "target", 16)
        self.target = self.target_of(Target, bytes(self.size_bytes))
        self.gate = Doorkeeper(self)
        self.under_way: list[Request] = []
        self.barred: dict[int, set[int]] = {}  # number of a request -> regions in which it is not the mirror's

    def target_of(self, kind: type[AnyTarget], content: bytes) -> AnyTarget:
        """A target that holds this."""
        return kind(self.fate, content, prompt=self.prompt, block_bytes=self.block_bytes)

    @property
    def home(self) -> Path:
        home = self.base_home / str(self.epoch)
        home.mkdir(exist_ok=True)
        return home

    @property
    def record(self) -> Any:
        """What the registry has of the volume."""
        return SimpleNamespace(
            id=self.volume_id,
            name="vol",
            size_bytes=self.size_bytes,
            target_path="/target",
            filled_from=self.register.filled_from,
            mirrors=[self.register.mirror(number) for number in range(len(self.uuids))],
        )
