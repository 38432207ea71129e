"""P1 to P9: whatever the order in which clients, mirrors, records and the power come and go, no promise is broken.

INTERLEAVINGS is how many scenes are played (`make interleavings`); their seeds begin at INTERLEAVINGS_SEED.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lockstep.disk.runs import run_of
from lockstep.service.mirror_session import MirrorSession
from lockstep.volume import intent
from lockstep.volume.gate import UPDATE, Ruling
from lockstep.volume.held import NO_RIGHT
from lockstep.volume.intent import Identity
from lockstep.volume.link import DEGRADED, FROZEN, IN_SYNC, SYNCING
from lockstep.volume.regions import positions
from tests.interleaved_world import USERS, Job
from tests.interleavings import Scene, in_scene, played

SCENES = 160
TASKS = 4


@pytest.mark.parametrize("part", range(TASKS))
def test_no_interleaving_breaks_a_promise(tmp_path: Path, part: int) -> None:
    scenes = int(os.environ.get("INTERLEAVINGS", SCENES))
    first = int(os.environ.get("INTERLEAVINGS_SEED", 0))
    for seed in range(first + part, first + scenes, TASKS):
        home = tmp_path / str(seed)
        home.mkdir()
        played(seed, home)


def test_a_seed_gives_the_same_scene_again(tmp_path: Path) -> None:
    histories = []
    for name in ("once", "again"):
        home = tmp_path / name
        home.mkdir()
        scene = played(7, home)
        histories.append((scene.history, bytes(scene.target.medium.now), scene.fate.now_s))
    assert histories[0] == histories[1]


def _at_work(home: Path, what: Callable[[Scene], Awaitable[None]]) -> None:
    """Have something happen to a volume that has just been claimed."""

    async def happen() -> None:
        scene.start(anew=True)
        await scene.volume.claim()
        scene._repair()
        for user in USERS:
            scene.gate.change(user, UPDATE)
        await what(scene)
        scene._close()

    scene = Scene(0, home)
    in_scene(scene, happen())


def test_a_mirror_that_misses_something_by_the_end_of_its_flush_does_not_say_that_it_is_in_sync(tmp_path: Path) -> None:
    """What it misses is durable by then, and it has said so: with the state that was still on it."""

    async def overtaken(scene: Scene) -> None:
        link, platter = scene.links[0], scene.platters[0]
        real = link.flush

        async def flush() -> bool:
            flushed = await real()
            scene.gate.change("ada", Ruling.FALL_BEHIND)
            data = memoryview(bytes(512))
            await scene.path.write("ada", data, run_of(0, len(data)), 1, durable=True)
            return flushed

        await link.announce(SYNCING)
        link.flush = flush  # type: ignore[method-assign]
        await link.announce(IN_SYNC)
        assert link.regions.dirty_bytes
        assert platter.token.state == SYNCING

    _at_work(tmp_path, overtaken)


def test_a_mirror_says_how_it_stands_though_its_header_was_written_while_it_came_back(tmp_path: Path) -> None:
    """What was read before that is not what it says."""

    async def returning(scene: Scene) -> None:
        session, link, platter = scene.sessions[0], scene.links[0], scene.platters[0]
        link.drop("writing", OSError("gone"))
        real = session._opener._open

        def read_first() -> Any:
            opened = real()
            session._write_state(DEGRADED)  # by the thread of the header, which had been told before
            return opened

        session._opener._open = read_first  # type: ignore[method-assign]
        while not await session.come_back():
            await asyncio.sleep(0)
        await scene.volume.resyncs[0].copy()
        await link.announce()
        assert (link.state, platter.token.state) == (IN_SYNC, IN_SYNC)

    _at_work(tmp_path, returning)


async def _said_on_return(session: MirrorSession) -> list[str]:
    """Have a mirror come back; the states that are written on it until then, in order."""
    said, real = list[str](), session._write_token

    def write_token(generation: int, state: str) -> None:
        real(generation, state)
        said.append(state)

    session._write_token = write_token  # type: ignore[method-assign]
    while not await session.come_back():
        await asyncio.sleep(0)
    return said


def test_an_older_copy_says_that_it_misses_something_before_it_is_the_newest(tmp_path: Path) -> None:
    """Else, after a power cut between the two, it would be the newest that is whole."""

    async def returning(scene: Scene) -> None:
        session, link = scene.sessions[0], scene.links[0]
        scene._take_image(0)
        await session.advance()
        link.drop("writing", OSError("gone"))
        while not session._at_rest:
            await asyncio.sleep(0)
        scene._put_image(0)
        assert await _said_on_return(session) == [SYNCING, SYNCING]

    _at_work(tmp_path, returning)


def test_a_frozen_mirror_that_comes_back_says_that_it_is_frozen_before_it_is_the_newest(tmp_path: Path) -> None:
    """Of what was answered meanwhile it has nothing that is held: who restores from it has to know."""

    async def returning(scene: Scene) -> None:
        session, link, platter = scene.sessions[0], scene.links[0], scene.platters[0]
        scene.gate.change("ada", Ruling.UNTIL_RELEASED)
        await scene.path.write("ada", memoryview(bytes(512)), run_of(0, 512), 1, durable=False)
        before, platter.gone = platter.token, True
        link.drop("writing", OSError("gone"))
        while not session._at_rest:
            await asyncio.sleep(0)
        assert platter.token == before, "it could say nothing while it was away"
        assert before.state == IN_SYNC
        platter.gone = False
        assert await _said_on_return(session) == [FROZEN, FROZEN]

    _at_work(tmp_path, returning)


def test_marks_stay_where_a_mirror_is_dropped_while_it_is_closed(tmp_path: Path) -> None:
    """It keeps its generation, so a copy of it from before fits the bitmap as well."""

    async def dropped(scene: Scene) -> None:
        session, link = scene.sessions[0], scene.links[0]
        await scene.path.write("ada", memoryview(bytes(512)), run_of(0, 512), 1, durable=True)
        real = session._retire

        def retire(marked: bytes, written_ns: int) -> None:
            link.drop("closing", TimeoutError("it did not answer"))
            real(marked, written_ns)

        session._retire = retire  # type: ignore[method-assign]
        await session.retire()
        identity = Identity(scene.volume_id, link.uuid, scene.size_bytes)
        found = intent.load(scene.state.intent(link.uuid), identity, scene.platters[0].token.generation, None)
        assert found.fits
        assert found.marked[0]

    _at_work(tmp_path, dropped)


def test_a_generation_whose_writing_failed_late_may_be_the_one_that_the_mirror_has(tmp_path: Path) -> None:
    """The first copy of a header counts, though the second one could not be written: it is no other mirror for that."""

    async def failing(scene: Scene) -> None:
        session, link, platter = scene.sessions[0], scene.links[0], scene.platters[0]
        identity = Identity(scene.volume_id, link.uuid, scene.size_bytes)
        for fault in ("second header", "header"):
            platter.fails.add(fault)
            with pytest.raises(OSError, match="broken"):
                await session.advance()
            found = intent.load(scene.state.intent(link.uuid), identity, platter.token.generation, None)
            assert found.fits, "the power may be cut at this moment"
        await session.advance()
        assert (link.error, session.generation) == (None, platter.token.generation)

    _at_work(tmp_path, failing)


async def _disowned_within(scene: Scene, awaited: Callable[[], Awaitable[object]]) -> None:
    """Have something written that cannot be put on record while the mirror is given a new generation."""
    session = scene.sessions[0]
    real = session._ask_scribe

    def blocks(job: Job) -> OSError | None:
        return OSError("no space left") if job.work.__name__ in ("_write_pages", "discard") else None

    async def ask_scribe(work: Callable[..., None], *args: int | str | None) -> None:
        if work == session._write_generation and not scene.doing:
            scene.fate.blocks = blocks
            data = memoryview(bytes(512))
            writing = asyncio.ensure_future(scene.path.write("ada", data, run_of(0, 512), 1, durable=False))
            await asyncio.wait([writing], timeout=60)
            scene.doing.add(writing)
        await real(work, *args)

    session._ask_scribe = ask_scribe  # type: ignore[method-assign]
    await awaited()
    await asyncio.gather(*scene.doing)
    scene.fate.blocks = lambda _: None


@pytest.mark.parametrize("when", ["it comes back", "marks are cleared"])
def test_a_bitmap_that_could_not_be_taken_away_fits_no_more_until_it_has_every_mark(tmp_path: Path, when: str) -> None:
    async def disowned(scene: Scene) -> None:
        session, link, platter = scene.sessions[0], scene.links[0], scene.platters[0]

        async def come_back() -> None:
            while not await session.come_back():
                await asyncio.sleep(0)

        if when == "it comes back":
            link.drop("writing", OSError("gone"))
            await _disowned_within(scene, come_back)
            await session.advance()  # as before marks are cleared
        else:
            await _disowned_within(scene, lambda: asyncio.gather(session.advance(), return_exceptions=True))
        identity = Identity(scene.volume_id, link.uuid, scene.size_bytes)
        found = intent.load(scene.state.intent(link.uuid), identity, platter.token.generation, None)
        assert found.marked[0]

    _at_work(tmp_path, disowned)


def test_a_bitmap_that_lacks_something_is_not_made_to_fit_when_the_mirror_is_let_go(tmp_path: Path) -> None:
    """As for a re-keying, which gives it a new generation: after a crash, what is not marked counted as equal."""

    async def disowned(scene: Scene) -> None:
        session, link, platter = scene.sessions[0], scene.links[0], scene.platters[0]

        def blocks(job: Job) -> OSError | None:
            return OSError("no space left") if job.work.__name__ in ("_write_pages", "discard") else None

        scene.fate.blocks = blocks
        await scene.path.write("ada", memoryview(bytes(512)), run_of(0, 512), 1, durable=False)
        scene.fate.blocks = lambda _: None
        with pytest.raises(OSError, match="could not be recorded"):
            await session.advance()
        identity = Identity(scene.volume_id, link.uuid, scene.size_bytes)
        assert not intent.load(scene.state.intent(link.uuid), identity, platter.token.generation, None).fits

    _at_work(tmp_path, disowned)


def test_what_was_copied_is_held_no_more_though_the_rest_was_held_again_before_its_turn(tmp_path: Path) -> None:
    """Else it is held for ever, by a window that is open: the copy never came to its end."""

    async def interrupted(scene: Scene) -> None:
        link, resync, path = scene.links[0], scene.volume.resyncs[0], scene.path
        step = link.regions.region_bytes

        async def write(user: str, region: int) -> None:
            await path.write(user, memoryview(bytes(8)), run_of(region * step, 8), 1, durable=False)

        scene.tasks = [asyncio.ensure_future(asyncio.sleep(0)) for _ in scene.links]  # the background is played here
        scene.gate.change("ada", Ruling.UNTIL_WINDOW)
        await write("ada", 0)
        await write("ada", 1)
        scene.gate.change("ada", UPDATE)
        await link.release(link.held.regions)
        take, finish = link.regions.begin_copy, link.regions.finish_copy
        copied: list[int] = []

        def finish_copy(taken: Sequence[tuple[int, int]], *, equal: bool) -> None:
            finish(taken, equal=equal)
            copied.extend(offset // step for offset, _ in taken)
            for user in USERS:
                scene.gate.change(user, Ruling.UNTIL_RELEASED)

        link.regions.begin_copy = lambda limit_bytes: take(min(step, limit_bytes))  # type: ignore[method-assign]
        link.regions.finish_copy = finish_copy  # type: ignore[method-assign]
        resync._gently = True  # with one hand
        await resync.copy()
        assert copied == [0]
        await write("eve", 1)
        assert not link.regions.dirty_bytes
        scene.gate.change("ada", UPDATE)
        await resync.copy()
        assert positions(link.held.regions()) == [1]
        assert link.held.users(NO_RIGHT) == ["eve"]

    _at_work(tmp_path, interrupted)
