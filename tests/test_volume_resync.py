"""A resync at its two delicate moments: a client writes where it is copying, and its last region is copied.

Disks are byte arrays here, so that a test can stop one in the middle of a read.
"""

import asyncio
import functools
import threading
import uuid
from array import array
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import pytest

from lockstep.disk.runs import run_of
from lockstep.volume.gate import Ruling
from lockstep.volume.held import HeldRecord
from lockstep.volume.intent import Identity
from lockstep.volume.link import MirrorLink
from lockstep.volume.regions import RegionMap
from lockstep.volume.resync import Resync
from lockstep.volume.workers import Workers
from lockstep.volume.write_path import WritePath

SIZE_BYTES: Final = 64 << 10
SECTOR_BYTES: Final = 512
IDENTITY: Final = Identity(str(uuid.UUID(int=1)), str(uuid.UUID(int=2)), SIZE_BYTES)


class Disk:
    """Memory that can be stopped after it was read, and remembers in which state its mirror was flushed."""

    sector_bytes = SECTOR_BYTES
    size_bytes = SIZE_BYTES

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.was_read = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.link: MirrorLink | None = None
        self.states: list[str] = []

    def read(self, offset: int, into: memoryview) -> None:
        into[:] = self.content[offset : offset + len(into)]
        self.was_read.set()
        assert self.go_on.wait(10)

    def read_job(self, into: memoryview, run: "array[int]", count: int) -> Callable[[], None]:
        def job() -> None:
            for at in range(count):
                offset, length, position = run[4 * at : 4 * at + 3]
                self.read(offset, into[position : position + length])

        return job

    prompt = True
    cached = False

    def write_back_job(self) -> None:
        return None

    def write_run(self, data: memoryview, run: "array[int]", count: int) -> int:
        self.write_all(data, run, count)
        return count

    def write_job(self, data: memoryview, run: "array[int]", count: int, durable: bool = False) -> Callable[[], None]:
        return lambda: self.write_all(data, run, count)

    def write_all(self, data: memoryview, run: "array[int]", count: int) -> None:
        for at in range(count):
            offset, length, position = run[4 * at : 4 * at + 3]
            self.content[offset : offset + length] = data[position : position + length]

    def stop(self) -> None:
        pass

    def flush_job(self) -> Callable[[], None]:
        return self.flush

    def flush(self) -> None:
        if self.link is not None:
            self.states.append(self.link.state)


class AllMarked:
    """An intent bitmap in which nothing needs to be marked any more."""

    def covers_run(self, run: "array[int]", count: int) -> int:
        return count

    async def mark(self, extents: Iterable[tuple[int, int]]) -> None:
        pass

    def idle(self) -> list[int]:
        return []

    def marked(self) -> bytes:
        return b"\1"


class Silent:
    """Keeps nothing about the mirror: there is nothing to clear here, and nothing fails."""

    async def announce(self, state: str) -> None:
        pass

    async def advance(self) -> None:
        raise AssertionError(self)

    async def disown(self) -> None:
        raise AssertionError(self)


class Open:
    """A gate through which everybody may go."""

    def __call__(self, user: str) -> Ruling:
        return Ruling.UPDATE

    def anyone(self) -> bool:
        return True

    def denied(self, user: str, ruling: Ruling, length: int) -> None:
        raise AssertionError(user)


class Stage:
    """A target, a mirror that differs all over, and what joins them."""

    def __init__(self, workers: Workers) -> None:
        self.target, self.mirror = Disk(b"t" * SIZE_BYTES), Disk(b"m" * SIZE_BYTES)
        mirror: Any = self.mirror
        target: Any = self.target
        intent: Any = AllMarked()
        held = HeldRecord("/nowhere/record", IDENTITY, asyncio.to_thread, expected=False)
        self.link = MirrorLink("mirror", "uuid", RegionMap(SIZE_BYTES, b"\1"), intent, held, Silent())
        self.link.admit(mirror, Workers("mirror", 2, 30))
        self.mirror.link = self.link
        self.path = WritePath(target, (self.link,), Open(), SECTOR_BYTES, workers)
        self.resync = Resync(self.path, self.link, Open(), workers)


def play(scene: Callable[[Stage], Awaitable[None]]) -> Stage:
    async def on_stage() -> Stage:
        stage = Stage(Workers("stage", 4))
        try:
            await asyncio.wait_for(scene(stage), 10)
        finally:
            stage.target.go_on.set()
        return stage

    return asyncio.run(on_stage())


@pytest.mark.parametrize(("offset", "length"), [(4096, 4096), (777, 5)], ids=["on-the-loop", "by-a-worker"])
def test_a_late_copy_never_overwrites_what_a_client_wrote_meanwhile(offset: int, length: int) -> None:
    async def scene(stage: Stage) -> None:
        stage.target.go_on.clear()
        copying = asyncio.create_task(stage.resync.copy())
        await asyncio.to_thread(stage.target.was_read.wait, 10)
        # The copy has read the old data, and has not written it to the mirror yet.
        data, run = memoryview(b"c" * length), run_of(offset, length)
        writing = None
        if not stage.path.write_run("user", data, run, 1):
            writing = asyncio.create_task(stage.path.write("user", data, run, 1, durable=False))
        for _ in range(5):
            await asyncio.sleep(0)
        stage.target.go_on.set()
        await copying
        if writing is not None:
            await writing

    stage = play(scene)
    assert stage.target.content[offset : offset + length] == b"c" * length
    assert stage.mirror.content == stage.target.content


def test_a_mirror_is_called_in_sync_only_when_its_copy_is_durable() -> None:
    async def scene(stage: Stage) -> None:
        await stage.resync.copy()

    stage = play(scene)
    assert stage.mirror.states[0] == "syncing"
    assert stage.link.state == "in-sync"
    assert stage.mirror.content == stage.target.content


def test_a_mirror_that_came_back_is_not_dropped_for_what_its_former_self_was_asked() -> None:
    async def scene(stage: Stage) -> None:
        mirror: Any = stage.mirror
        stage.mirror.go_on.clear()
        asked = stage.link._ask(lambda disk: functools.partial(disk.read, 0, memoryview(bytearray(512))))
        await asyncio.to_thread(stage.mirror.was_read.wait, 10)
        stage.link.drop("writing", TimeoutError("it did not answer"))
        stage.mirror.go_on.set()
        while not stage.link.at_rest:
            await asyncio.sleep(0.001)
        stage.link.let_go()
        stage.link.admit(mirror, Workers("mirror", 2, 30))
        assert not await stage.link._succeeds("reading", asked)
        assert stage.link.error is None

    play(scene)
