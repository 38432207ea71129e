"""P1, P3: whatever goes wrong between the disks, what differs is marked. The real paths, with faults put in by hand."""

import asyncio
import errno
import os
import threading
import time
import uuid
from array import array
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from lockstep.crypto.cipher import XtsCipher
from lockstep.crypto.luks import CIPHER, Segment
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.plain import PlainDisk
from lockstep.disk.probe import inspect
from lockstep.disk.runs import WORDS, run_of
from lockstep.volume import missing
from lockstep.volume.backlog import FIRST_BYTES
from lockstep.volume.filling import Filling, NewTarget
from lockstep.volume.gate import UPDATE, Gate, Ruling
from lockstep.volume.held import NO_RIGHT, OUTSIDE_WINDOW, HeldRecord
from lockstep.volume.intent import Identity, IntentBitmap
from lockstep.volume.link import BEHIND, DEGRADED, FROZEN, IN_SYNC, SYNCING, WHOLE, Keeper, MirrorLink
from lockstep.volume.missing import Pair
from lockstep.volume.read_path import ReadPath
from lockstep.volume.regions import RegionMap, positions
from lockstep.volume.resync import Resync
from lockstep.volume.verify import Verify
from lockstep.volume.workers import Workers
from lockstep.volume.write_path import WritePath
from tests.lab import MIB, wait_until

SIZE_BYTES = 4 * MIB
REGION_BYTES = 64 << 10
DATA = b"N" * REGION_BYTES


class Desk:
    """Keeps what the mirror's header would say."""

    def __init__(self) -> None:
        self.says = IN_SYNC

    async def announce(self, state: str) -> None:
        self.says = state

    async def advance(self) -> None: ...
    async def disown(self) -> None: ...


class Doorkeeper:
    """Lets pass what `ruling` says."""

    ruling = UPDATE

    def __call__(self, user: str) -> Ruling:
        return self.ruling

    def anyone(self) -> bool:
        return True

    def denied(self, *_: object) -> None: ...


class World:
    """A target and mirrors, all of zeroes and equal; the first MiB is in the hot set."""

    def __init__(self, home: Path, mirrors: int = 1, patience_s: float = 5.0) -> None:
        self.workers = Workers("target", 4)
        self.target = PlainDisk.claim(inspect(_image(home / "target")))
        self.gate = Doorkeeper()
        self.desk = Desk()  # of all mirrors
        self.disks: list[EncryptedDisk] = []
        self.links: list[MirrorLink] = []
        for number in range(mirrors):
            self._add_mirror(home, number, patience_s)
        self.path = WritePath(self.target, tuple(self.links), cast(Gate, self.gate), 512, self.workers)
        self.reads = ReadPath(self.path, self.workers)

    def _add_mirror(self, home: Path, number: int, patience_s: float) -> None:
        path, unmarked = _image(home / f"mirror{number}"), bytes(-(-SIZE_BYTES // REGION_BYTES))
        segment = Segment(offset_bytes=0, sector_bytes=512, iv_offset=0, cipher=CIPHER, length_bytes=None)
        disk = EncryptedDisk(os.open(path, os.O_RDWR), segment, XtsCipher(bytearray(range(64)), 512), SIZE_BYTES)
        disk.zero(0, SIZE_BYTES)
        identity = Identity(str(uuid.uuid4()), str(uuid.uuid4()), SIZE_BYTES)
        intent = IntentBitmap(f"{path}.intent", identity, self.workers.run)
        intent.claim(1, 1, unmarked)
        held = HeldRecord(path, identity, self.workers.run, expected=False)
        held.claim()
        regions = RegionMap(SIZE_BYTES, unmarked, bytes(len(unmarked)))
        link = MirrorLink(path, identity.luks_uuid, regions, intent, held, cast(Keeper, self.desk))
        link.admit(disk, Workers(f"mirror{number}", 4, patience_s))
        self.disks.append(disk)
        self.links.append(link)

    async def write(self, offset: int, data: bytes = DATA) -> None:
        await self.write_to(self.path, offset, data)

    async def write_to(self, path: WritePath, offset: int, data: bytes) -> None:
        await path.write("someone", memoryview(data), run_of(offset, len(data)), 1, durable=False)

    async def zero(self, offset: int, length: int) -> None:
        await self.path.zero("someone", offset, length, durable=False, allocate=False)

    async def comes_back(self) -> None:
        """Have the first mirror, which was dropped, followed again as soon as it is at rest."""
        link, disk = self.links[0], self.disks[0]
        while not link.at_rest:
            await asyncio.sleep(0.01)
        assert link.let_go() is disk
        disk._stopped = False
        link.admit(disk, Workers("again", 4, 5.0))

    def differing(self, number: int = 0) -> set[int]:
        """Which regions differ, read from both disks."""
        target, mirror = memoryview(bytearray(SIZE_BYTES)), memoryview(bytearray(SIZE_BYTES))
        self.target.read(0, target)
        self.disks[number].read(0, mirror)
        starts = range(0, SIZE_BYTES, REGION_BYTES)
        return {at // REGION_BYTES for at in starts if target[at : at + REGION_BYTES] != mirror[at : at + REGION_BYTES]}

    def assert_marked(self, number: int = 0) -> None:
        """Whatever differs is known to differ, and is on record."""
        link = self.links[number]
        for region in self.differing(number):
            assert not link.regions.equal(region * REGION_BYTES, 1), region
            assert link.intent.marked()[region], region


def _image(path: Path) -> str:
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
    return str(path)


def played(scene: Callable[[World], Awaitable[None]], home: Path, **how: Any) -> None:
    async def play() -> None:
        world = World(home, **how)
        await world.write(0)
        await scene(world)

    asyncio.run(asyncio.wait_for(play(), 30))


def failing(failure: BaseException) -> Callable[..., Callable[..., None]]:
    def job(*_: object) -> None:
        raise failure

    return lambda *_, **__: job


def test_what_only_the_mirror_took_at_once_is_marked_when_it_is_refused_afterwards(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        for disk in (world.target, *world.disks):
            disk._promptness.flags = 0
        world.target.write_run = lambda *_: 0  # type: ignore[method-assign]
        data, run = memoryview(b"Z" * len(DATA)), run_of(0, len(DATA))
        assert world.path.write_run("someone", data, run, 1) == 0
        assert world.path.half_done()
        world.gate.ruling = Ruling.REFUSE
        with pytest.raises(PermissionError):
            await world.path.write("someone", data, run, 1, durable=False)
        assert world.differing() == {0}
        world.assert_marked()
        assert not world.path.half_done()

    played(scene, tmp_path)


def test_what_only_the_mirror_took_at_once_is_marked_where_nobody_has_the_rest_carried_out(tmp_path: Path) -> None:
    """There may be no memory for it, and the connection is closed."""

    async def scene(world: World) -> None:
        for disk in (world.target, *world.disks):
            disk._promptness.flags = 0
        world.target.write_run = lambda *_: 0  # type: ignore[method-assign]
        assert world.path.write_run("someone", memoryview(b"Z" * len(DATA)), run_of(0, len(DATA)), 1) == 0
        await asyncio.sleep(0)
        assert world.differing() == {0}
        world.assert_marked()
        assert not world.path.half_done()

    played(scene, tmp_path)


def test_what_only_the_mirror_took_at_once_is_marked_where_the_target_could_not_even_be_asked(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        for disk in (world.target, *world.disks):
            disk._promptness.flags = 0

        def write_run(data: memoryview, run: "array[int]", count: int) -> int:
            raise MemoryError

        world.target.write_run = write_run  # type: ignore[method-assign]
        with pytest.raises(MemoryError):
            world.path.write_run("someone", memoryview(b"Z" * len(DATA)), run_of(0, len(DATA)), 1)
        await asyncio.sleep(0)
        assert world.differing() == {0}
        world.assert_marked()

    played(scene, tmp_path)


UPDATES: Final[dict[str, Callable[[World], Awaitable[None]]]] = {
    "write": lambda world: world.write(100, b"never the mirror's"),
    "zero": lambda world: world.zero(100, 5000),
}


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_a_right_that_ends_while_what_surrounds_an_update_is_read_counts(
    tmp_path: Path, update: Callable[[World], Awaitable[None]]
) -> None:
    async def scene(world: World) -> None:
        reading, go, real = threading.Event(), threading.Event(), world.target.read

        def read(offset: int, into: memoryview) -> None:
            reading.set()
            go.wait()
            real(offset, into)

        world.target.read = read  # type: ignore[method-assign]
        writing = asyncio.ensure_future(update(world))
        while not reading.is_set():
            await asyncio.sleep(0.01)
        world.gate.ruling = Ruling.UNTIL_RELEASED
        go.set()
        await writing
        del world.target.read
        assert world.differing() == {0}
        assert world.links[0].regions.held(0, 1)
        mirror = memoryview(bytearray(512))
        world.disks[0].read(0, mirror)
        assert bytes(mirror) == DATA[:512]

    played(scene, tmp_path)


def test_zeroes_whose_edge_cannot_be_read_change_nothing(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        world.target.read = failing(OSError(errno.EIO, "bad sector"))()  # type: ignore[method-assign]
        with pytest.raises(OSError, match="bad sector"):
            await world.zero(0, len(DATA) - 100)
        del world.target.read
        assert world.differing() == set()
        held = memoryview(bytearray(len(DATA)))
        world.target.read(0, held)
        assert bytes(held) == DATA
        assert world.links[0].state == IN_SYNC

    played(scene, tmp_path)


@pytest.mark.parametrize("failure", [MemoryError(), OSError(errno.EIO, "broken")], ids=["memory", "disk"])
def test_a_thread_of_the_mirror_that_fails_does_not_let_go_of_what_the_target_still_writes(
    tmp_path: Path, failure: Exception
) -> None:
    async def scene(world: World) -> None:
        world.disks[0].write_job = failing(failure)  # type: ignore[method-assign]
        go, real = threading.Event(), world.target.write_job
        world.target.write_job = lambda *a, **k: lambda: (go.wait(), real(*a, **k)())[1]  # type: ignore[method-assign]
        writing = asyncio.ensure_future(world.write(0, b"Z" * REGION_BYTES))
        while world.links[0].error is None:
            await asyncio.sleep(0.01)
        assert not writing.done(), "the target has its data still to be given"
        go.set()
        await writing
        assert world.differing() == {0}
        world.assert_marked()

    played(scene, tmp_path)


def test_a_mirror_that_cannot_even_begin_is_dropped_and_the_write_goes_on(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        def refuse(*_: object, **__: object) -> Callable[[], None]:
            raise OSError(errno.EIO, "libgcrypt has no context")

        world.disks[1].write_job = refuse  # type: ignore[method-assign]
        await world.write(0, b"Z" * REGION_BYTES)
        assert (world.differing(0), world.differing(1)) == (set(), {0})
        assert world.links[0].state == IN_SYNC
        world.assert_marked(1)

    played(scene, tmp_path, mirrors=2)


def test_marks_stay_where_the_mirror_failed_and_came_back_while_they_were_to_be_cleared(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        (link,), (disk,) = world.links, world.disks
        link.intent.idle()  # nobody has written for a while
        real, slow, go = disk.flush_job, world.target.flush_job, threading.Event()

        def lost() -> None:
            disk.zero(0, REGION_BYTES)  # what its cache has lost
            raise OSError(errno.EIO, "lost")

        disk.flush_job = lambda: lost  # type: ignore[method-assign]
        world.target.flush_job = lambda: lambda: (go.wait(), slow()())[1]  # type: ignore[method-assign]
        tidying = asyncio.ensure_future(world.path.tidy())
        while not link.error:
            await asyncio.sleep(0.01)
        disk.flush_job = real  # type: ignore[method-assign]
        await world.comes_back()
        go.set()
        await tidying
        assert world.differing() == {0}
        world.assert_marked()

    played(scene, tmp_path)


def test_marks_stay_where_the_target_lost_something_while_they_were_to_be_cleared(tmp_path: Path) -> None:
    """Though somebody has looked after the target by then, and has the mirror brought in sync."""

    async def scene(world: World) -> None:
        (link,) = world.links
        link.intent.idle()  # nobody has written for a while

        async def advance() -> None:
            world.target.flush_job = failing(OSError(errno.EIO, "lost"))  # type: ignore[method-assign]
            with pytest.raises(OSError, match="lost"):
                await world.path.flush()
            world.target.zero(0, REGION_BYTES, allocate=False)
            world.path.durability_lost = link.target_error = None

        link._keeper = cast(Keeper, SimpleNamespace(advance=advance, announce=world.desk.announce))
        await world.path.tidy()
        assert world.differing() == {0}
        world.assert_marked()

    played(scene, tmp_path)


def test_a_mirror_whose_header_cannot_be_written_keeps_no_others_marks(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        broken, well = world.links

        async def advance() -> None:
            raise OSError(errno.EIO, "bad sector")

        broken._keeper = cast(Keeper, SimpleNamespace(advance=advance))
        await world.path.tidy()  # from now on nobody has written
        with pytest.raises(OSError, match="bad sector"):
            await world.path.tidy()
        assert (broken.error, 1 in broken.intent.marked(), 1 in well.intent.marked()) == (None, True, False)

    played(scene, tmp_path, mirrors=2)


def test_what_is_written_at_once_while_the_mirror_is_away_is_copied_when_it_is_back(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        world.target._promptness.flags = 0
        (link,) = world.links
        link.drop("writing", OSError(errno.EIO, "gone"))
        await world.write(2 * MIB)  # which has a whole group of regions on record
        beside = run_of(2 * MIB + REGION_BYTES, REGION_BYTES)
        assert world.path.write_run("someone", memoryview(DATA), beside, 1) == 1
        await world.comes_back()
        world.assert_marked()
        await Resync(world.path, link, cast(Gate, world.gate), world.workers).copy()
        assert (link.state, world.differing()) == (IN_SYNC, set())

    played(scene, tmp_path)


def test_a_mirror_that_answers_too_late_does_not_spoil_what_another_gave(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        world.target.read_job = failing(OSError(errno.EIO, "bad sector"))  # type: ignore[method-assign]
        late, came, given = threading.Event(), threading.Event(), world.disks[1].read_job

        def hanging(_offset: int, into: memoryview, **_: object) -> Callable[[], None]:
            def job() -> None:
                late.wait()
                into[:] = b"?" * len(into)
                came.set()

            return job

        def prompt(*arguments: Any, **how: Any) -> Callable[[], None]:
            real = given(*arguments, **how)

            def job() -> None:
                real()
                late.set()
                came.wait()

            return job

        world.disks[0].read_job = hanging  # type: ignore[method-assign, assignment]
        world.disks[1].read_job = prompt  # type: ignore[method-assign]
        into = memoryview(bytearray(len(DATA)))
        await world.reads.read(into, run_of(0, len(DATA)), 1)
        assert bytes(into) == DATA
        wait_until(came.is_set, "the mirror that was given up to answer")

    played(scene, tmp_path, mirrors=2, patience_s=0.3)


def test_nothing_is_asked_of_a_mirror_behind_its_end_where_another_has_larger_sectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block device may end there."""
    monkeypatch.setattr("tests.test_volume_mishaps.SIZE_BYTES", size_bytes := SIZE_BYTES + 1024)

    async def scene(world: World) -> None:
        (link,), path = (
            world.links,
            WritePath(world.target, tuple(world.links), cast(Gate, world.gate), 4096, world.workers),
        )
        data = memoryview(b"Z" * 100)
        for ruling in (UPDATE, Ruling.UNTIL_RELEASED, UPDATE):  # where something is held, the mirror is read
            world.gate.ruling = ruling
            await path.write("someone", data, run_of(size_bytes - 150, 100), 1, durable=False)
            await path.zero("someone", size_bytes - 20, 20, durable=False, allocate=False)
        assert (link.error, os.stat(link.path).st_size) == (None, size_bytes)
        await link.release(link.held.regions)
        await Resync(path, link, cast(Gate, world.gate), world.workers).copy()
        assert (link.state, world.differing()) == (IN_SYNC, set())
        world.target.read_job = failing(OSError(errno.EIO, "bad sector"))  # type: ignore[method-assign]
        into = memoryview(bytearray(100))
        await ReadPath(path, world.workers).read(into, run_of(size_bytes - 150, 100), 1)
        assert into == data

    played(scene, tmp_path)


def said_at_each_write(world: World) -> list[str]:
    """What the mirror says of itself whenever a write to it begins."""
    said: list[str] = []
    real = world.disks[0].write_job

    def write_job(*arguments: Any, **how: Any) -> Callable[[], None]:
        said.append(world.desk.says)
        return real(*arguments, **how)

    world.disks[0].write_job = write_job  # type: ignore[method-assign]
    return said


def test_a_frozen_mirror_says_that_it_is_so_no_more_before_it_is_written(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        (link,), said = world.links, said_at_each_write(world)
        await link.hold(0, REGION_BYTES, "bob", NO_RIGHT)
        await link.announce()
        assert (world.desk.says, link.consistent) == (FROZEN, True)
        await asyncio.gather(*(world.write(number * MIB) for number in range(1, 4)))
        assert said == [BEHIND] * 3
        assert not link.consistent

    played(scene, tmp_path)


def test_a_mirror_does_not_say_that_it_is_frozen_before_that_is_on_record(tmp_path: Path) -> None:
    """It may fail to come on record, and then whoever waits for it writes to the mirror."""

    async def scene(world: World) -> None:
        (link,) = world.links
        world.gate.ruling = Ruling.UNTIL_RELEASED
        asked, fail = asyncio.Event(), asyncio.Event()

        async def full(*_: object) -> None:
            asked.set()
            await fail.wait()
            raise OSError(errno.ENOSPC, "full")

        link.held._in_worker = full
        writing = asyncio.ensure_future(world.write(0, b"H" * 512))
        await asked.wait()
        await link.announce()
        world.gate.ruling = UPDATE
        permitted = asyncio.ensure_future(world.write(REGION_BYTES))
        await asyncio.sleep(0.01)
        said = said_at_each_write(world)
        fail.set()
        with pytest.raises(OSError, match="full"):
            await writing
        await permitted
        assert said
        assert not set(said) & set(WHOLE), said

    played(scene, tmp_path)


def test_a_mirror_that_is_being_copied_to_says_so_first(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        (link,), said = world.links, said_at_each_write(world)
        link.regions.mark(0, MIB)
        await link.intent.mark([(0, MIB)])
        await Resync(world.path, link, cast(Gate, world.gate), world.workers).copy()
        assert said
        assert set(said) == {SYNCING}
        assert (world.desk.says, link.state) == (IN_SYNC, IN_SYNC)

    played(scene, tmp_path)


def test_nothing_that_the_mirror_misses_is_durable_before_it_says_so(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        world.gate.ruling = Ruling.FALL_BEHIND
        await world.write(0, b"Z" * REGION_BYTES)
        await world.path.flush()
        assert world.differing() == {0}
        assert world.desk.says not in WHOLE

    played(scene, tmp_path)


def test_what_cannot_be_put_on_record_holds_nothing(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        (link,) = world.links
        world.gate.ruling = Ruling.UNTIL_RELEASED
        for fault in ("_write_writers", "_pages"):
            full = failing(OSError(errno.ENOSPC, "full"))()
            owner, name = (link.held, fault) if fault == "_write_writers" else (link.held._pages, "_write_pages")
            setattr(owner, name, full)
            with pytest.raises(OSError, match="full"):
                await world.write(0, b"Z" * REGION_BYTES)
            delattr(owner, name)
            assert (world.differing(), link.regions.held_bytes, link.held.writers) == (set(), 0, {})
            assert link.held.frozen_since_s is None
            await Resync(world.path, link, cast(Gate, world.gate), world.workers).copy()
            assert link.state == IN_SYNC
        await world.write(0, b"Z" * REGION_BYTES)
        assert world.differing() == {0}
        assert link.regions.held(0, 1)
        assert link.held.regions()[0]

    played(scene, tmp_path)


def filled(world: World, home: Path) -> tuple[NewTarget, WritePath, Filling, Callable[[], bytearray | None]]:
    """A new target, which lacks everything, how it is written and filled, and what its record says."""
    record, pair = str(home / "missing"), Pair(str(uuid.uuid4()), str(uuid.uuid4()), SIZE_BYTES)
    target = NewTarget.claim(inspect(_image(home / "new")))
    target.missing = bytearray(b"\1" * pair.regions)
    path = WritePath(target, tuple(world.links), cast(Gate, world.gate), 512, world.workers)
    filling = path.filling = Filling(target, world.links[0], path.ranges, world.workers, path.flush)
    filling.record_in(missing.record(record, pair, target.missing, world.workers.run))
    return target, path, filling, lambda: missing.load(record, pair)


def test_a_new_target_is_written_nowhere_that_the_record_calls_missing(tmp_path: Path) -> None:
    """Not even when everything is there: a crash would bring back what the mirror had before it failed."""

    async def scene(world: World) -> None:
        target, path, filling, on_record = filled(world, tmp_path)
        await filling.fetch(0, SIZE_BYTES)
        target._promptness.flags = 0
        world.links[0].drop("writing", OSError(errno.EIO, "gone"))
        data, run = memoryview(b"Z" * REGION_BYTES), run_of(0, REGION_BYTES)
        if not path.write_run("someone", data, run, 1):
            await path.write("someone", data, run, 1, durable=False)
        await path.flush()
        left = on_record()
        assert left is not None
        assert not left[0]

    played(scene, tmp_path)


def test_a_new_target_that_fails_a_flush_lacks_again_what_was_copied_since(tmp_path: Path) -> None:
    """Nor is that flush the filling's alone: the kernel tells of what it lost once, and clients have written too."""

    async def scene(world: World) -> None:
        target, path, filling, on_record = filled(world, tmp_path)
        await filling.fetch(0, REGION_BYTES)
        real = target.flush_job
        target.flush_job = failing(OSError(errno.EIO, "bad sector"))  # type: ignore[method-assign]
        with pytest.raises(OSError, match="durable"):
            await filling.settle()
        target.flush_job = real  # type: ignore[method-assign]
        target.zero(0, REGION_BYTES, allocate=True)  # it was never on the medium, and is not in memory any more
        await filling.settle()
        left = on_record()
        assert left is not None
        assert left[0]
        with pytest.raises(OSError, match="bad sector"):
            await path.flush()
        into = memoryview(bytearray(REGION_BYTES))
        await ReadPath(path, world.workers).read(into, run_of(0, REGION_BYTES), 1)
        assert into == DATA
        path.durability_lost = None  # somebody has looked after it
        await world.write_to(path, 0, b"W" * 512)
        assert not (on_record() or b"\1")[0]

    played(scene, tmp_path)


def test_a_mirror_that_a_new_target_needs_is_not_disowned(tmp_path: Path) -> None:
    """It could not be filled from it after a crash, whatever had been written to it meanwhile."""

    async def scene(world: World) -> None:
        _target, path, filling, _on_record = filled(world, tmp_path)
        (link,) = world.links
        link.is_source = True
        await world.write_to(path, 0, b"W" * 512)
        pages, disowned = link.intent._pages, []
        world.desk.disown = lambda: disowned.append(1)  # type: ignore[method-assign, assignment, return-value]
        pages._write_pages = failing(OSError(errno.ENOSPC, "full"))()  # type: ignore[method-assign]
        with pytest.raises(OSError, match="full"):
            await world.write_to(path, SIZE_BYTES - 512, b"W" * 512)
        assert link.error is None
        assert not disowned
        del pages._write_pages
        await world.write_to(path, SIZE_BYTES - 512, b"W" * 512)
        assert filling.error is None

    played(scene, tmp_path)


def test_a_mirror_is_not_overwritten_with_what_a_new_target_may_still_lose(tmp_path: Path) -> None:
    """What it was filled with is gone where it fails the flush; until that is known, it reads as something else."""

    async def scene(world: World) -> None:
        target, path, filling, _on_record = filled(world, tmp_path)
        (link,), real = world.links, filling.fetch
        link.regions.mark(0, REGION_BYTES)

        async def fetch(offset: int, length: int) -> None:
            await real(offset, length)
            target.zero(0, REGION_BYTES, allocate=True)

        filling.fetch = fetch  # type: ignore[method-assign]
        target.flush_job = failing(OSError(errno.EIO, "bad sector"))  # type: ignore[method-assign]
        await Resync(path, link, cast(Gate, world.gate), world.workers).copy()
        mirrored = memoryview(bytearray(REGION_BYTES))
        world.disks[0].read(0, mirrored)
        assert mirrored == DATA

    played(scene, tmp_path)


def test_who_fills_a_new_target_waits_for_what_a_client_has_put_on_record(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        target, _path, filling, on_record = filled(world, tmp_path)
        await filling.fetch(0, SIZE_BYTES)
        flushing, go, real, looks = threading.Event(), threading.Event(), target.flush_job, iter(range(1000))
        looking = filling._copy_missing

        def flush() -> None:
            flushing.set()
            go.wait()
            real()()

        target.flush_job = lambda: flush  # type: ignore[method-assign]
        filling._copy_missing = lambda number: (next(looks), looking(number))[1]  # type: ignore[method-assign]
        writing = asyncio.ensure_future(filling.secure([(0, 512)]))
        while not flushing.is_set():
            await asyncio.sleep(0.01)
        running = asyncio.ensure_future(filling.run())
        await asyncio.sleep(0.1)
        go.set()
        await asyncio.gather(writing, running)
        assert next(looks) <= 6, "it does not keep the loop busy meanwhile"
        assert not any(on_record() or b"\1")

    played(scene, tmp_path)


@pytest.mark.parametrize("which", ["mirror", "target"])
def test_what_was_released_stays_marked_until_both_disks_have_it(tmp_path: Path, which: str) -> None:
    """Whichever of the two then loses what it had cached."""

    async def scene(world: World) -> None:
        (link,), (disk,) = world.links, world.disks
        world.gate.ruling = Ruling.UNTIL_RELEASED
        await world.write(2 * MIB)
        world.gate.ruling = UPDATE
        await link.release(link.held.regions)
        real = disk.flush_job
        if which == "mirror":

            def lost() -> None:
                disk.zero(2 * MIB, REGION_BYTES)
                raise OSError(errno.EIO, "lost")

            disk.flush_job = lambda: lost  # type: ignore[method-assign]
        await Resync(world.path, link, cast(Gate, world.gate), world.workers).copy()
        if which == "mirror":
            disk.flush_job = real  # type: ignore[method-assign]
            await world.comes_back()
            world.assert_marked()
        else:
            world.target.zero(2 * MIB, REGION_BYTES, allocate=True)
            assert not any(link.held.regions())
            assert link.intent.marked()[2 * MIB // REGION_BYTES]
        assert world.differing() == {2 * MIB // REGION_BYTES}

    played(scene, tmp_path)


@pytest.mark.parametrize("fault", ["_write_writers", "_pages"])
def test_what_was_released_is_forgotten_as_soon_as_the_record_can_be_written(tmp_path: Path, fault: str) -> None:
    async def scene(world: World) -> None:
        (link,), resync = world.links, Resync(world.path, world.links[0], cast(Gate, world.gate), world.workers)
        world.gate.ruling = Ruling.UNTIL_RELEASED
        await world.write(0)
        world.gate.ruling = UPDATE
        await link.release(link.held.regions)
        owner, name = (link.held, fault) if fault == "_write_writers" else (link.held._pages, "_write_pages")
        setattr(owner, name, failing(OSError(errno.ENOSPC, "full"))())
        await resync.copy()
        delattr(owner, name)
        await resync.copy()
        assert (link.state, link.held.writers) == (IN_SYNC, {})
        again = HeldRecord(link.held._path, link.held._identity, world.workers.run, expected=False)
        assert (any(again.regions()), again._read_writers(), again.writers) == (False, True, {})

    played(scene, tmp_path)


def test_what_cannot_be_put_on_record_is_not_held_beside_what_is(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        (link,) = world.links
        world.gate.ruling = Ruling.UNTIL_RELEASED
        await world.write(0)
        link.held._pages._write_pages = failing(OSError(errno.ENOSPC, "full"))()  # type: ignore[method-assign]
        with pytest.raises(OSError, match="full"):
            await world.write(0, DATA + DATA)
        del link.held._pages._write_pages
        assert link.regions.held_bytes == REGION_BYTES
        await link.release(link.held.regions)
        await Resync(world.path, link, cast(Gate, world.gate), world.workers).copy()
        assert link.state == IN_SYNC

    played(scene, tmp_path)


def test_who_cannot_be_put_on_record_lets_nothing_go_that_another_holds_by_now(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        (link,) = world.links
        await link.hold(MIB, MIB + 512, "bob", NO_RIGHT)
        writing, go = threading.Event(), threading.Event()

        def fail(_: object) -> None:
            writing.set()
            go.wait()
            raise OSError(errno.ENOSPC, "full")

        link.held._write_writers = fail  # type: ignore[assignment,method-assign]
        ada = asyncio.ensure_future(link.hold(0, 512, "ada", NO_RIGHT))
        while not writing.is_set():
            await asyncio.sleep(0.01)
        await link.hold(1024, 2048, "bob", NO_RIGHT)
        go.set()
        with pytest.raises(OSError, match="full"):
            await ada
        assert link.regions.held(0, 1)

    played(scene, tmp_path)


def test_who_cannot_be_put_on_record_beside_others_holds_nothing_back(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        (link,) = world.links
        await link.hold(MIB, MIB + 512, "bob", OUTSIDE_WINDOW)
        link.held._write_writers = failing(OSError(errno.ENOSPC, "full"))()  # type: ignore[method-assign]
        with pytest.raises(OSError, match="full"):
            await link.hold(0, 512, "eve", OUTSIDE_WINDOW)
        del link.held._write_writers
        assert link.held.users(OUTSIDE_WINDOW) == ["bob"]
        await link.release(link.held.regions)
        await Resync(world.path, link, cast(Gate, world.gate), world.workers).copy()
        assert (link.state, link.held.writers) == (IN_SYNC, {})

    played(scene, tmp_path)


def test_who_cannot_be_put_on_record_together_hold_nothing_back(tmp_path: Path) -> None:
    """Each saw what the other was about to hold, when it failed."""

    async def scene(world: World) -> None:
        (link,) = world.links
        world.gate.ruling = Ruling.UNTIL_WINDOW
        link.regions.mark(SIZE_BYTES - 1, 1)  # so it is not frozen, and neither waits for the other
        link.held._pages._write_pages = failing(OSError(errno.ENOSPC, "full"))()  # type: ignore[method-assign]
        data, runs = memoryview(DATA), [run_of(at * REGION_BYTES, REGION_BYTES) for at in range(2)]
        writes = [world.path.write(user, data, run, 1, durable=False) for user, run in zip("ab", runs, strict=True)]
        failures = await asyncio.gather(*writes, return_exceptions=True)
        assert [type(failure) for failure in failures] == [OSError, OSError]
        assert (link.held.writers, link.held.users(OUTSIDE_WINDOW)) == ({}, [])

    played(scene, tmp_path)


def test_who_begins_to_hold_while_the_last_region_is_forgotten_is_not_forgotten(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        held = world.links[0].held
        await held.hold(0, REGION_BYTES, "bob", OUTSIDE_WINDOW, equal=False)
        real, go = held._in_worker, asyncio.Event()

        async def slowly(work: Callable[..., None], *arguments: object) -> None:
            if work == held._write_writers:
                await go.wait()
            await real(work, *arguments)

        held._in_worker = slowly
        holding = asyncio.ensure_future(held.hold(MIB, MIB + 1, "eve", OUTSIDE_WINDOW, equal=False))
        await asyncio.sleep(0)
        forgetting = asyncio.ensure_future(held.forget(b"\1".ljust(SIZE_BYTES // REGION_BYTES, b"\0")))
        while any(held.regions()):
            await asyncio.sleep(0.01)
        go.set()
        await asyncio.gather(holding, forgetting)
        assert held.users(OUTSIDE_WINDOW) == ["eve"]
        again = HeldRecord(held._path, held._identity, real, expected=False)
        assert again.users(OUTSIDE_WINDOW) == ["eve"]

    played(scene, tmp_path)


def test_a_mirror_that_is_too_slow_for_large_pieces_is_copied_to_in_small_ones(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        (link,), (disk,) = world.links, world.disks
        real = disk.write_job

        def write_job(data: memoryview, run: "array[int]", count: int, durable: bool = False) -> Callable[[], None]:
            large = sum(run[1 : WORDS * count : WORDS]) > 128 << 10
            return (lambda: time.sleep(1.0)) if large else real(data, run, count, durable)

        disk.write_job = write_job  # type: ignore[method-assign]
        resync = Resync(world.path, link, cast(Gate, world.gate), world.workers)
        link.regions.mark_all()
        await resync.copy()
        assert link.error is not None
        await world.comes_back()
        await resync.copy()
        assert link.state == IN_SYNC
        assert world.differing() == set()

    played(scene, tmp_path, patience_s=0.3)


def test_a_comparison_during_which_the_mirror_fails_and_comes_back_says_so(tmp_path: Path) -> None:
    """What it could not read meanwhile it has not compared."""

    async def scene(world: World) -> None:
        (link,), (disk,), real = world.links, world.disks, world.disks[0].read_job
        disk.write(SIZE_BYTES - REGION_BYTES, memoryview(b"X" * 512))

        def read_job(*arguments: Any, **how: Any) -> Callable[[], None]:
            link.drop("reading", OSError(errno.EIO, "bad sector"))
            disk.read_job = real  # type: ignore[method-assign]
            return real(*arguments, **how)

        disk.read_job = read_job  # type: ignore[method-assign]
        verify, forget = Verify(world.path, link, world.workers, repair=False), link.forget_cache

        async def forget_cache() -> None:
            await world.comes_back()
            await forget()

        link.forget_cache = forget_cache  # type: ignore[method-assign]
        await verify.run()
        assert not verify.found.mismatches
        assert link.error is None
        assert "is back" in (verify.found.error or "")
        link.forget_cache = forget  # type: ignore[method-assign]
        await verify.run()

    played(scene, tmp_path)


def test_a_comparison_leaves_out_no_more_than_what_differs_by_then(tmp_path: Path) -> None:
    """Not all of the piece in which it lies."""

    async def scene(world: World) -> None:
        (link,), (disk,) = world.links, world.disks
        disk.write(3 * REGION_BYTES, memoryview(b"X" * 512))
        verify = Verify(world.path, link, world.workers, repair=False)
        turn = world.path.ranges.take([(0, SIZE_BYTES)])
        running = asyncio.ensure_future(verify.run())
        while len(world.path.ranges._turns) == 1:
            await asyncio.sleep(0.01)
        link.regions.mark(2 * REGION_BYTES, 1)
        world.path.ranges.end(turn)
        await running
        assert verify.found.mismatches == [(3 * REGION_BYTES, 512)]
        assert verify.found.left_out_bytes == REGION_BYTES
        assert verify.found.compared_bytes == SIZE_BYTES - REGION_BYTES

    played(scene, tmp_path)


def test_a_comparison_that_the_target_ends_says_so(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        world.target.flush_job = failing(OSError(errno.EIO, "bad sector"))  # type: ignore[method-assign]
        verify = Verify(world.path, world.links[0], world.workers, repair=False)
        await verify.run()
        assert verify.found.error == "bad sector"
        assert not verify.over

    played(scene, tmp_path)


@pytest.mark.parametrize(
    ("failure", "says"), [(MemoryError(), "memory"), (RuntimeError(), "did not expect")], ids=["memory", "unforeseen"]
)
def test_a_comparison_that_nobody_could_go_on_with_says_so(tmp_path: Path, failure: Exception, says: str) -> None:
    """It has found no difference, and not that there is none."""

    async def scene(world: World) -> None:
        world.target.read_job = failing(failure)  # type: ignore[method-assign]
        verify = Verify(world.path, world.links[0], world.workers, repair=False)
        await verify.run()
        assert says in (verify.found.error or "")
        assert not verify.found.mismatches

    played(scene, tmp_path)


def test_what_could_not_be_put_on_record_is_not_on_record_because_others_are(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        (link,) = world.links
        pages, full = link.held._pages, failing(OSError(errno.ENOSPC, "full"))()
        real, writing, go = pages._write_pages, threading.Event(), threading.Event()
        world.gate.ruling = Ruling.UNTIL_RELEASED
        pages._write_pages = full  # type: ignore[method-assign]
        with pytest.raises(OSError, match="full"):
            await world.write(0, b"Z" * REGION_BYTES)

        def slowly(changed: dict[int, bytes]) -> None:
            writing.set()
            go.wait()
            real(changed)

        pages._write_pages = slowly  # type: ignore[assignment, method-assign]
        others = asyncio.ensure_future(world.write(MIB))
        while not writing.is_set():
            await asyncio.sleep(0.01)
        pages._write_pages = full  # type: ignore[method-assign]
        again = asyncio.ensure_future(world.write(0, b"Z" * REGION_BYTES))
        await asyncio.sleep(0.01)
        go.set()
        await others
        with pytest.raises(OSError, match="full"):
            await again
        with pytest.raises(OSError, match="full"):
            await world.write(0, b"Z" * REGION_BYTES)
        on_record = HeldRecord(link.held._path, link.held._identity, world.workers.run, expected=False).regions()
        assert world.differing() == {region for region, held in enumerate(on_record) if held}

    played(scene, tmp_path)


def test_what_the_target_did_not_give_is_not_copied_though_somebody_has_it_copied_again(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        (link,) = world.links
        world.gate.ruling = Ruling.FALL_BEHIND
        for offset in (0, MIB, 2 * MIB):
            await world.write(offset, b"Z" * REGION_BYTES)
        world.gate.ruling = UPDATE
        world.target.read_job = failing(OSError(errno.EIO, "bad sector"))  # type: ignore[method-assign]
        resync = Resync(world.path, link, cast(Gate, world.gate), world.workers)
        async with world.path._tidying:  # which takes as long as the header does
            copying = asyncio.ensure_future(resync.copy())
            while link.target_error is None:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            del world.target.read_job
            link.target_error = None  # lockstep sync
        await copying
        assert link.state != IN_SYNC or world.differing() == set()
        world.assert_marked()
        await resync.copy()
        assert (link.state, world.differing()) == (IN_SYNC, set())

    played(scene, tmp_path)


def test_a_copy_for_which_there_is_no_memory_goes_on_when_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(world: World) -> None:
        (link,), resync = world.links, Resync(world.path, world.links[0], cast(Gate, world.gate), world.workers)
        tried = 0

        def none(_size: int) -> memoryview:
            nonlocal tried
            tried += 1
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        link.regions.mark(0, MIB)
        with monkeypatch.context() as scarce:
            scarce.setattr("lockstep.volume.resync.page_aligned", none)
            running = asyncio.ensure_future(resync.run())
            while not tried:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.01)
            assert (link.state, link.sync) == (SYNCING, None)
        while link.state != IN_SYNC:
            await asyncio.sleep(0.01)
        resync.stop()
        await running

    played(scene, tmp_path)


def test_a_flush_is_not_answered_before_one_beside_it_has_said_what_was_lost(tmp_path: Path) -> None:
    """The kernel tells one of them only."""

    async def scene(world: World) -> None:
        (link,), (disk,) = world.links, world.disks
        asked, told, go = 0, threading.Event(), threading.Event()

        def lost() -> None:
            told.set()
            go.wait()
            raise OSError(errno.EIO, "lost")

        def flush_job() -> Callable[[], None]:
            nonlocal asked
            asked += 1
            return lost if asked == 1 else lambda: None

        disk.flush_job = flush_job  # type: ignore[method-assign]
        beside = asyncio.ensure_future(link.flush())
        while not told.is_set():
            await asyncio.sleep(0.01)
        flushing = asyncio.ensure_future(world.path.flush())
        await asyncio.sleep(0.1)
        assert not flushing.done()
        go.set()
        await flushing
        assert (await beside, link.state) == (False, DEGRADED)

    played(scene, tmp_path)


@pytest.mark.parametrize("told", ["write", "flush"])
def test_nothing_is_answered_as_durable_before_what_the_target_failed_beside_it_is_known(
    tmp_path: Path, told: str
) -> None:
    """The kernel tells one of a flush and a durable write only, and that one may be waiting for a slow mirror then."""

    async def scene(world: World) -> None:
        (disk,), failed, go = world.disks, threading.Event(), threading.Event()
        target_job, mirror_write, mirror_flush = world.target.write_job, disk.write_job, disk.flush_job

        def lost() -> None:
            failed.set()
            raise OSError(errno.EIO, "lost")

        def slowly(job: Callable[[], object], by: str) -> Callable[[], None]:
            return cast(Callable[[], None], lambda: (by == told and go.wait(), job())[1])

        def write(data: memoryview, run: "array[int]", count: int, durable: bool = False) -> Callable[[], None]:
            return lost if durable and told == "write" else target_job(data, run, count, durable)

        def copy(data: memoryview, run: "array[int]", count: int, durable: bool = False) -> Callable[[], None]:
            return slowly(mirror_write(data, run, count, durable), "write")

        async def durable_write() -> None:
            data = memoryview(DATA)
            await world.path.write("someone", data, run_of(0, len(data)), 1, durable=True)

        async def flush() -> None:
            await world.path.flush()

        world.target.write_job, disk.write_job = write, copy  # type: ignore[method-assign]
        disk.flush_job = lambda: slowly(mirror_flush(), "flush")  # type: ignore[method-assign]
        if told == "flush":
            world.target.flush_job = lambda: lost  # type: ignore[method-assign]
        first, beside = (durable_write, flush) if told == "write" else (flush, durable_write)
        telling = asyncio.ensure_future(first())
        await asyncio.to_thread(failed.wait)
        asking = asyncio.ensure_future(beside())
        await asyncio.wait([asking], timeout=0.1)
        go.set()
        for each in (telling, asking):
            with pytest.raises(OSError, match="lost"):
                await each

    played(scene, tmp_path)


def test_a_flush_that_failed_just_when_the_mirror_had_flushed_keeps_no_later_one_waiting(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        (link,), loop = world.links, asyncio.get_running_loop()
        real, copy, target = world.path._in_worker, loop.create_future(), loop.create_future()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(link, "begin_flush", lambda: copy)
            patch.setattr(world.path, "_in_worker", lambda _: target)
            flushing = asyncio.ensure_future(world.path.flush())
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # it waits for the mirror
            copy.set_result(None)
            target.set_exception(OSError(errno.EIO, "lost"))
            with pytest.raises(OSError, match="lost"):
                await flushing
        assert world.path._in_worker == real
        world.path.durability_lost = None  # somebody has looked
        await asyncio.wait_for(world.path.flush(), 5)

    played(scene, tmp_path)


@pytest.mark.parametrize("update", ["write", "zero"])
def test_what_waited_for_room_does_not_come_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: str
) -> None:
    monkeypatch.setattr("tests.test_volume_mishaps.SIZE_BYTES", 64 * MIB)

    async def scene(world: World) -> None:
        (link,), (disk,) = world.links, world.disks
        disk._promptness.cached, backlog, most = True, link._backlog, 0
        world.target.write(0, b"Z" * (64 * MIB))  # so that there is something to be zeroed
        real, flush = disk.write, disk.flush_job()

        def write(*arguments: Any) -> None:
            nonlocal most
            most = max(most, backlog.taken - backlog._flushed)
            real(*arguments)

        def slowly() -> None:
            time.sleep(0.4)
            flush()

        disk.write = write  # type: ignore[assignment, method-assign]
        disk.write_job = lambda data, run, count, durable=False: lambda: write(run[0], data)  # type: ignore[method-assign]
        disk.flush_job = lambda: slowly  # type: ignore[method-assign]
        data = b"Y" * MIB
        updates = (
            (world.write(at, data) if update == "write" else world.zero(at, MIB)) for at in range(0, 64 * MIB, MIB)
        )
        await asyncio.gather(*updates)
        assert link.state == IN_SYNC
        assert most <= 3 * FIRST_BYTES

    played(scene, tmp_path)


@pytest.mark.parametrize("update", ["write", "zero"])
def test_a_mirror_that_is_back_is_not_given_what_was_merged_while_it_was_away(tmp_path: Path, update: str) -> None:
    async def scene(world: World) -> None:
        (link,), (disk,) = world.links, world.disks
        world.gate.ruling = Ruling.UNTIL_RELEASED
        await world.write(0, b"Z" * REGION_BYTES)
        world.gate.ruling = UPDATE
        await link._thaw()
        link.drop("reading", OSError(errno.EIO, "gone"))
        async with link._freezing:  # until it is on record
            updating = asyncio.ensure_future(world.write(100, b"Y" * 10) if update == "write" else world.zero(100, 10))
            await asyncio.sleep(0.1)
            await world.comes_back()
        await updating
        mirror = memoryview(bytearray(512))
        disk.read(0, mirror)
        assert bytes(mirror) == DATA[:512]
        await link.release(link.held.regions)
        await Resync(world.path, link, cast(Gate, world.gate), world.workers).copy()
        assert (link.state, world.differing()) == (IN_SYNC, set())

    played(scene, tmp_path)


def test_marks_of_a_million_regions_are_cleared_without_holding_the_loop_up(tmp_path: Path) -> None:
    """As after the first copy of a disk of 64 GiB."""
    size_bytes = 64 << 30

    async def scene(world: World) -> None:
        (link,), count = world.links, size_bytes // REGION_BYTES
        identity = Identity(str(uuid.uuid4()), str(uuid.uuid4()), size_bytes)
        link.intent = IntentBitmap(str(tmp_path / "intent"), identity, world.workers.run)
        link.intent.claim(1, 1, b"\1" * count)
        link.regions = RegionMap(size_bytes, bytes(count))
        link.regions.mark(MIB, MIB)
        tidying, longest_s, last_s = asyncio.ensure_future(world.path.tidy()), 0.0, time.perf_counter()
        async with world.path.ranges.hold([(size_bytes - 512, size_bytes)]):
            while not tidying.done():
                await asyncio.sleep(0.001)
                longest_s, last_s = max(longest_s, time.perf_counter() - last_s), time.perf_counter()
        assert longest_s < 0.3
        assert positions(link.intent.marked()) == [*range(16, 32), count - 1]

    played(scene, tmp_path)
