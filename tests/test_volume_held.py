"""What is held reaches the target, never the mirror, until it is released; and the record of it survives everything.

The disks, the cipher and the records are the real ones; the gate is a table that the test changes.
"""

import asyncio
import errno
import json
import os
import random
import tempfile
import time
import timeit
import uuid
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.crypto.cipher import XtsCipher
from lockstep.crypto.luks import Segment
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.plain import PlainDisk
from lockstep.disk.probe import inspect
from lockstep.disk.runs import run_of
from lockstep.volume.gate import Ruling
from lockstep.volume.held import NO_RIGHT, OUTSIDE_WINDOW, UNKNOWN_USER, HeldRecord
from lockstep.volume.intent import Identity, IntentBitmap
from lockstep.volume.link import MirrorLink
from lockstep.volume.pages import PAGE_BYTES
from lockstep.volume.regions import RegionMap, positions
from lockstep.volume.resync import Resync
from lockstep.volume.workers import Workers
from lockstep.volume.write_path import WritePath

REGION = 64 << 10
SIZE = 5 * REGION + 1536  # the last region is short
COUNT = 6
IDENTITY = Identity(str(uuid.UUID(int=1)), str(uuid.UUID(int=2)), SIZE)
KEY = bytes(range(64))
EVERYTHING = b"\1" * COUNT


class Table:
    """A gate: what each user's ruling is, and what was denied."""

    def __init__(self) -> None:
        self.rulings: dict[str, Ruling] = {}
        self.denials: list[tuple[str, Ruling, int]] = []
        self.open = True

    def __call__(self, user: str) -> Ruling:
        return self.rulings.get(user, Ruling.UPDATE)

    def anyone(self) -> bool:
        return self.open

    def denied(self, user: str, ruling: Ruling, length: int) -> None:
        self.denials.append((user, ruling, length))


class Silent:
    """Keeps nothing on the mirror about itself."""

    async def announce(self, state: str) -> None:
        pass

    async def advance(self) -> None:
        pass

    async def disown(self) -> None:
        raise AssertionError(self)


class Stage:
    """A volume of one mirror that is equal to its target, without a server."""

    def __init__(self, directory: Path, sector_bytes: int = 512) -> None:
        self.directory = directory
        self.sector_bytes = sector_bytes
        self.gate = Table()
        self.workers = Workers("stage", 4)
        self.cipher = XtsCipher(KEY, sector_bytes)
        content = random.Random(1).randbytes(SIZE)
        (directory / "target").write_bytes(content)
        padded = content.ljust(-(-SIZE // sector_bytes) * sector_bytes, b"\0")
        encrypted = bytearray(padded)
        self.cipher.encrypt_into(0, padded, encrypted)
        (directory / "mirror").write_bytes(encrypted)
        self.start(bytes(COUNT))

    def start(self, dirty: bytes) -> None:
        """Open everything, as at the start of a server."""
        self.target = PlainDisk.claim(inspect(str(self.directory / "target")))
        fd = os.open(self.directory / "mirror", os.O_RDWR)
        segment = Segment(0, self.sector_bytes, 0, "aes-xts-plain64", None)
        self.mirror = EncryptedDisk(fd, segment, self.cipher, SIZE)
        intent = IntentBitmap(str(self.directory / "intent"), IDENTITY, self.workers.run)
        intent.claim(1, 1, dirty)
        self.held = HeldRecord(str(self.directory / "record"), IDENTITY, self.workers.run, expected=False)
        self.held.claim()
        regions = RegionMap(SIZE, dirty, self.held.regions())
        self.link = MirrorLink("mirror", "uuid", regions, intent, self.held, Silent())
        self.link.admit(self.mirror, Workers("mirror", 2, 30))
        self.path = WritePath(self.target, (self.link,), self.gate, self.sector_bytes, self.workers)
        self.resync = Resync(self.path, self.link, self.gate, self.workers)

    def crash(self) -> None:
        """End as a killed server does: the records are what they are on disk, and all marks count."""
        dirty = self.link.intent.marked()
        self.close()
        self.start(dirty)

    def close(self) -> None:
        self.link.close()
        self.link.intent.close()
        self.held.close()
        self.target.close()

    async def write(self, user: str, offset: int, data: bytes) -> None:
        run = run_of(offset, len(data))
        if not self.path.write_run(user, memoryview(data), run, 1):
            await self.path.write(user, memoryview(data), run, 1, durable=False)

    async def catch_up(self) -> None:
        """One look of the resync."""
        await self.resync._release_what_may_be()
        await self.resync.copy()

    def on_target(self) -> bytes:
        return (self.directory / "target").read_bytes()

    def on_mirror(self) -> bytes:
        plain = bytearray(-(-SIZE // self.sector_bytes) * self.sector_bytes)
        self.cipher.decrypt_into(0, (self.directory / "mirror").read_bytes()[: len(plain)], plain)
        return bytes(plain[:SIZE])


def play(scene: Callable[[Stage], Awaitable[None]], sector_bytes: int = 512) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        stage = Stage(Path(directory), sector_bytes)
        try:
            asyncio.run(asyncio.wait_for(scene(stage), 60))
        finally:
            stage.close()
            stage.workers.close()


USERS = {"alice": Ruling.UPDATE, "bob": Ruling.UNTIL_WINDOW, "mallory": Ruling.UNTIL_RELEASED}
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "zero", "trim", "crash", "tidy"]),
        st.sampled_from(sorted(USERS)),
        st.integers(0, SIZE - 1) | st.integers(0, SIZE // 4096 - 1).map(lambda sector: sector * 4096),
        st.integers(1, 3 * REGION) | st.sampled_from([1, 512, 4096]),
    ),
    max_size=14,
)


@settings(max_examples=80, deadline=None)
@given(steps=STEPS, sector_bytes=st.sampled_from([512, 4096]), seed=st.integers())
def test_the_mirror_is_what_permitted_updates_made_of_it_and_the_target_what_all_did(
    steps: list[tuple[str, str, int, int]], sector_bytes: int, seed: int
) -> None:
    noise = random.Random(seed)

    async def scene(stage: Stage) -> None:
        stage.gate.rulings = dict(USERS)
        target, mirror = bytearray(stage.on_target()), bytearray(stage.on_target())
        held: dict[str, set[int]] = {"bob": set(), "mallory": set()}
        for what, user, offset, length in steps:
            end = min(SIZE, offset + length)
            if what == "crash":
                stage.crash()
                continue
            if what == "tidy":
                await stage.path.tidy()
                continue
            data = noise.randbytes(end - offset) if what == "write" else bytes(end - offset)
            if what == "write":
                await stage.write(user, offset, data)
            elif what == "zero":
                await stage.path.zero(user, offset, len(data), durable=False, allocate=True)
            else:
                await stage.path.trim(user, offset, len(data), durable=False)
            target[offset:end] = data
            if user == "alice":
                mirror[offset:end] = data
            else:
                sectors = range(offset // sector_bytes * sector_bytes // REGION, (end - 1) // REGION + 1)
                held[user] |= set(sectors)
            assert stage.on_target() == target
            assert stage.on_mirror() == mirror
        assert stage.link.regions.held_bytes == sum(
            min(REGION, SIZE - region * REGION) for region in held["bob"] | held["mallory"]
        )

        await stage.catch_up()  # bob's window is closed, and mallory has no right: what they wrote stays away
        assert stage.on_mirror() == mirror
        stage.gate.rulings["bob"] = Ruling.UPDATE
        await stage.catch_up()
        for region in held["bob"] - held["mallory"]:
            mirror[region * REGION : (region + 1) * REGION] = target[region * REGION : (region + 1) * REGION]
        assert stage.on_mirror() == mirror
        stage.crash()
        await stage.catch_up()
        assert stage.on_mirror() == mirror, "a crash has carried over what is held"
        await stage.link.release(stage.held.regions)
        await stage.catch_up()
        assert stage.on_mirror() == target == stage.on_target()
        assert stage.link.state == "in-sync"
        assert not stage.held.writers
        stage.crash()
        assert not stage.link.regions.held_bytes

    play(scene, sector_bytes)


def test_a_mirror_is_frozen_from_the_first_held_write_to_the_next_update() -> None:
    async def scene(stage: Stage) -> None:
        stage.gate.rulings = {"bob": Ruling.UNTIL_WINDOW}
        await stage.write("alice", 0, bytes(4096))
        assert stage.link.state == "in-sync"
        assert stage.link.consistent
        before = stage.on_mirror()
        await stage.write("bob", 0, b"b" * 4096)
        await stage.write("bob", REGION + 7, b"b" * 100)
        assert (stage.link.state, stage.link.consistent, stage.link.token_state) == ("behind", True, "frozen")
        since = stage.held.frozen_since_s
        assert since is not None
        stage.crash()
        await stage.catch_up()
        assert stage.held.frozen_since_s == since
        assert (stage.link.state, stage.link.consistent) == ("behind", True)
        assert stage.on_mirror() == before
        await stage.write("alice", 3 * REGION, b"a" * 4096)
        assert (stage.link.state, stage.link.consistent, stage.link.token_state) == ("behind", False, "behind")
        stage.crash()
        assert stage.held.frozen_since_s is None

    play(scene)


@pytest.mark.parametrize("written", [True, False])
def test_a_mirror_is_in_sync_until_it_has_its_new_generation_and_freezes_with_that_alone(written: bool) -> None:
    """Until then it is whole, and a kill must not leave it saying that it is not; without, a copy of it would pass."""

    async def scene(stage: Stage) -> None:
        before: list[tuple[str, float | None]] = []

        async def advance() -> None:
            before.append((stage.link.token_state, stage.held.frozen_since_s))
            if not written:
                raise OSError(errno.EIO, "its header cannot be written")

        stage.link._keeper.advance = advance  # type: ignore[method-assign]
        stage.gate.rulings = {"bob": Ruling.UNTIL_WINDOW}
        await stage.write("bob", 0, b"b" * 4096)
        await stage.write("bob", REGION, b"b" * 4096)
        assert before == [("in-sync", None)]
        assert stage.link.token_state == ("frozen" if written else "behind")
        assert stage.held.regions()[:3] == b"\1\1\0"

    play(scene)


def test_a_mirror_whose_record_says_frozen_is_so_until_the_record_says_otherwise() -> None:
    """The file system had no room for where it was held. The mirror may be written next, which no crash must hide."""

    async def scene(stage: Stage) -> None:
        mark = stage.held._pages.mark

        async def full(numbers: range) -> None:
            while 0 in numbers:
                if stage.held.regions()[1]:  # the other is under way
                    raise OSError(28, "No space left on device")
                await asyncio.sleep(0)
            await mark(numbers)

        stage.held._pages.mark = full  # type: ignore[method-assign, assignment]
        outcomes = await asyncio.gather(
            stage.held.hold(0, REGION, "bob", OUTSIDE_WINDOW, equal=True),
            stage.held.hold(REGION, 2 * REGION, "bob", OUTSIDE_WINDOW, equal=False),
            return_exceptions=True,
        )
        assert [type(each) for each in outcomes] == [OSError, type(None)]
        await stage.held.thaw()
        stage.crash()
        assert list(positions(stage.held.regions())) == [1]
        assert stage.held.frozen_since_s is None

    play(scene)


def test_of_two_who_thaw_a_mirror_the_one_that_fails_does_not_spoil_it_for_the_other() -> None:
    """One for a write, the other because another copy of the mirror has come back."""

    async def scene(stage: Stage) -> None:
        stage.gate.rulings = {"bob": Ruling.UNTIL_WINDOW}
        await stage.write("bob", 0, b"b" * 4096)
        real, first = stage.held._in_worker, asyncio.Event()

        async def full(*_: object) -> None:
            stage.held._in_worker = real
            await first.wait()
            raise OSError(28, "No space left on device")

        stage.held._in_worker = full
        thaws = [asyncio.ensure_future(stage.held.thaw())]
        while stage.held._in_worker is full:
            await asyncio.sleep(0)
        thaws.append(asyncio.ensure_future(stage.held.thaw()))
        await asyncio.sleep(0)
        first.set()
        outcomes = await asyncio.gather(*thaws, return_exceptions=True)
        assert [type(each) for each in outcomes] == [OSError, type(None)]
        stage.crash()
        assert stage.held.frozen_since_s is None

    play(scene)


def test_nothing_is_copied_while_nobody_may_update_the_mirror() -> None:
    async def scene(stage: Stage) -> None:
        stage.link.regions.mark(0, SIZE)
        await stage.path._in_worker(stage.target.write, 5, memoryview(b"changed"))
        before = stage.on_mirror()
        stage.gate.open = False
        await stage.catch_up()
        assert stage.on_mirror() == before
        assert stage.link.state == "behind"
        stage.gate.open = True
        await stage.catch_up()
        assert stage.on_mirror() == stage.on_target()
        assert stage.link.state == "in-sync"

    play(scene)


@pytest.mark.parametrize(
    ("user", "meanwhile"), [("mallory", Ruling.UPDATE), ("bob", Ruling.UNTIL_WINDOW)], ids=["no-right", "closing"]
)
def test_what_is_written_while_a_release_is_put_on_record_is_not_released_with_it(user: str, meanwhile: Ruling) -> None:
    """Bob's window opens; before his region is marked, mallory writes there as well, or the window closes again."""

    async def scene(stage: Stage) -> None:
        stage.gate.rulings = {"bob": Ruling.UNTIL_WINDOW, "mallory": Ruling.UNTIL_RELEASED}
        await stage.write("bob", REGION, b"b" * 4096)
        real, before = stage.link.intent.mark, stage.on_mirror()

        async def mark(extents: list[tuple[int, int]]) -> None:
            await real(extents)
            stage.gate.rulings["bob"] = meanwhile
            await stage.write(user, REGION, b"noise")

        stage.gate.rulings["bob"] = Ruling.UPDATE
        stage.link.intent.mark = mark  # type: ignore[method-assign, assignment]
        await stage.catch_up()
        assert stage.on_target()[REGION:].startswith(b"noise")
        assert stage.on_mirror() == before
        assert list(positions(stage.held.regions())) == [1]

    play(scene)


def test_who_loses_the_right_while_a_release_is_put_on_record_releases_nothing() -> None:
    async def scene(stage: Stage) -> None:
        stage.gate.rulings = {"mallory": Ruling.UNTIL_RELEASED}
        await stage.write("mallory", 0, b"noise")
        before, asked = stage.on_mirror(), iter([stage.held.regions()])

        def which() -> bytes:
            for answer in asked:
                return answer
            raise PermissionError

        with pytest.raises(PermissionError):
            await stage.link.release(which)
        await stage.catch_up()
        assert stage.on_mirror() == before
        assert stage.link.regions.held_bytes == REGION

    play(scene)


def test_a_window_that_closes_while_the_target_is_read_counts_for_what_is_copied() -> None:
    async def scene(stage: Stage) -> None:
        before, real = stage.on_mirror(), stage.target.read_job
        stage.link.regions.mark(0, SIZE)
        await stage.path._in_worker(stage.target.write, 5, memoryview(b"changed"))

        def read_job(into: memoryview, run: "array[int]", count: int) -> Callable[[], None]:
            stage.gate.open = False  # it takes the disk a while
            return real(into, run, count)

        stage.target.read_job = read_job  # type: ignore[method-assign]
        await stage.catch_up()
        assert stage.on_mirror() == before
        assert stage.link.regions.dirty_bytes == SIZE
        assert stage.link.state == "behind"

    play(scene)


@pytest.mark.parametrize("failed", ["mirror", "target"])
def test_a_frozen_mirror_stays_so_when_a_window_opens_while_nothing_can_be_copied(failed: str) -> None:
    """The window opens and closes while the mirror is away, or while the target fails: nothing has been written."""

    async def scene(stage: Stage) -> None:
        stage.gate.rulings = {"bob": Ruling.UNTIL_WINDOW}
        await stage.write("bob", 0, b"b" * 4096)
        if failed == "mirror":
            stage.link.drop("reading", OSError(5, "Input/output error"))
        else:
            stage.link.target_failed(OSError(5, "Input/output error"), (REGION, 512))
        stage.gate.rulings["bob"] = Ruling.UPDATE
        await stage.catch_up()
        stage.gate.rulings["bob"] = Ruling.UNTIL_WINDOW
        stage.link.error = None
        assert (stage.link.token_state, stage.link.consistent) == ("frozen", True)
        assert stage.link.regions.held_bytes == REGION
        stage.link.target_error = None
        stage.gate.rulings["bob"] = Ruling.UPDATE
        await stage.catch_up()
        assert not stage.link.regions.held_bytes

    play(scene)


def test_what_is_refused_changes_nothing() -> None:
    async def scene(stage: Stage) -> None:
        stage.gate.rulings = {"mallory": Ruling.REFUSE}
        before = stage.on_target(), stage.on_mirror()
        for update in (
            stage.write("mallory", 0, bytes(4096)),
            stage.write("mallory", 3, b"x"),
            stage.path.zero("mallory", 0, SIZE, durable=True, allocate=True),
            stage.path.trim("mallory", 0, SIZE, durable=False),
        ):
            with pytest.raises(PermissionError):
                await update
        assert (stage.on_target(), stage.on_mirror()) == before
        assert stage.link.state == "in-sync"
        assert not stage.held.writers

    play(scene)


def test_a_ruling_that_changes_while_it_is_recorded_counts_as_it_is_then() -> None:
    async def scene(stage: Stage) -> None:
        rulings = iter([Ruling.UPDATE, Ruling.UNTIL_RELEASED])
        stage.gate.__class__ = type(
            "Closing", (Table,), {"__call__": lambda _self, _user: next(rulings, Ruling.UNTIL_RELEASED)}
        )
        before = stage.on_mirror()
        await stage.path.write("alice", memoryview(b"late"), run_of(0, 4), 1, durable=False)
        assert stage.on_mirror() == before
        assert stage.on_target()[:4] == b"late"
        assert stage.held.users(NO_RIGHT) == ["alice"]

    play(scene)


def test_what_cannot_be_recorded_as_held_does_not_reach_the_target() -> None:
    async def scene(stage: Stage) -> None:
        stage.gate.rulings = {"mallory": Ruling.UNTIL_RELEASED}
        stage.held._pages._fd, real = 1 << 20, stage.held._pages._fd  # no such descriptor
        before = stage.on_target()
        with pytest.raises(OSError, match="Bad file descriptor"):
            await stage.write("mallory", 0, b"noise")
        assert stage.on_target() == before
        stage.held._pages._fd = real

    play(scene)


def test_updates_that_fall_behind_are_copied_afterwards() -> None:
    async def scene(stage: Stage) -> None:
        stage.gate.rulings = {"alice": Ruling.FALL_BEHIND}
        before = stage.on_mirror()
        await stage.write("alice", 100, b"later")
        assert stage.on_mirror() == before
        assert stage.link.regions.dirty_bytes == REGION
        stage.crash()
        await stage.catch_up()
        assert stage.on_mirror() == stage.on_target() != before

    play(scene)


def record(directory: Path, *, expected: bool = False) -> HeldRecord:
    async def in_place(work: Callable[..., None], *arguments: object) -> None:
        work(*arguments)

    return HeldRecord(str(directory / "record"), IDENTITY, in_place, expected=expected)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A directory with a record: bob holds region 1, mallory region 3, and the mirror is frozen."""
    held = record(tmp_path)
    held.claim()

    async def hold() -> None:
        await held.hold(REGION, REGION + 1, "bob", OUTSIDE_WINDOW, equal=True)
        await held.hold(3 * REGION, 4 * REGION, "mallory", NO_RIGHT, equal=False)

    asyncio.run(hold())
    held.close()
    return tmp_path


def test_a_record_says_who_holds_what_since_when(kept: Path) -> None:
    held = record(kept, expected=True)
    assert held.regions(OUTSIDE_WINDOW) == bytes([0, 1, 0, 0, 0, 0])
    assert held.regions(NO_RIGHT) == bytes([0, 0, 0, 1, 0, 0])
    assert held.users(OUTSIDE_WINDOW) == ["bob"]
    assert held.users(NO_RIGHT) == ["mallory"]
    assert held.frozen_since_s == held.writers["bob", OUTSIDE_WINDOW]


@pytest.mark.parametrize("damage", ["missing", "foreign", "cut", "header", "unreadable"])
def test_without_its_bits_everything_waits_for_a_release(kept: Path, damage: str) -> None:
    path = kept / "record.held"
    content = path.read_bytes()
    path.unlink()
    if damage == "foreign":
        HeldRecord(
            str(kept / "record"),
            Identity(IDENTITY.luks_uuid, IDENTITY.volume_id, SIZE),
            asyncio.to_thread,
            expected=False,
        ).claim()
    elif damage == "cut":
        path.write_bytes(content[: PAGE_BYTES // 2])
    elif damage == "header":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "unreadable":
        path.mkdir()
    held = record(kept, expected=True)
    assert held.regions(NO_RIGHT) == EVERYTHING
    assert held.users(NO_RIGHT)
    assert held.frozen_since_s is None


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"writers": 1}', '{"writers": [{"user": "bob"}], "frozen_since": 1}']
)
def test_without_its_writers_what_is_held_waits_for_a_release(kept: Path, content: str | None) -> None:
    path = kept / "record.writers"
    path.unlink()
    if content is not None:
        path.write_text(content)
    held = record(kept)
    assert held.regions(NO_RIGHT) == bytes([0, 1, 0, 1, 0, 0])
    assert held.users(NO_RIGHT) == [UNKNOWN_USER]
    assert held.frozen_since_s is None


def test_what_nobody_held_in_that_way_waits_for_a_release(kept: Path) -> None:
    """A page may be written though that fails: for whose window it waits is not on record, and none releases it."""
    writer = {"user": "eve", "kind": NO_RIGHT, "since": 1}
    (kept / "record.writers").write_text(json.dumps({"frozen_since": None, "writers": [writer]}))
    held = record(kept)
    assert held.regions(NO_RIGHT) == bytes([0, 1, 0, 1, 0, 0])
    assert set(held.users(NO_RIGHT)) == {UNKNOWN_USER, "eve"}
    held.claim()
    assert not held.only_outside_window()


def test_a_damaged_page_is_held_until_a_release(kept: Path) -> None:
    path = kept / "record.held"
    content = bytearray(path.read_bytes())
    content[PAGE_BYTES + 9] ^= 1
    path.write_bytes(content)
    held = record(kept)
    assert held.regions(NO_RIGHT) == EVERYTHING
    assert UNKNOWN_USER in held.users(NO_RIGHT)


def test_a_mirror_that_tells_of_a_record_which_is_gone_is_given_nothing(tmp_path: Path) -> None:
    assert record(tmp_path, expected=True).regions(NO_RIGHT) == EVERYTHING
    assert record(tmp_path, expected=False).regions() == bytes(COUNT)


def test_writers_are_on_record_before_their_bits(tmp_path: Path) -> None:
    held = record(tmp_path)
    held.claim()
    content = (tmp_path / "record.held").read_bytes()
    asyncio.run(held.hold(0, 1, "bob", OUTSIDE_WINDOW, equal=True))
    (tmp_path / "record.held").write_bytes(content)  # as after a crash between the two
    assert json.loads((tmp_path / "record.writers").read_text())["writers"][0]["user"] == "bob"
    after = record(tmp_path)
    assert not after.writers, "nothing was written to the target yet"
    assert not any(after.regions())


def test_to_see_that_nothing_may_be_released_takes_no_time_whatever_the_size_of_the_disk(tmp_path: Path) -> None:
    """While it is looked at, nobody is served."""

    async def look_s() -> float:
        workers = Workers("records", 1)
        held = HeldRecord(str(tmp_path / "record"), replace(IDENTITY, size_bytes=64 << 30), workers.run, expected=False)
        held.claim()
        for region in (0, 1, 999_999):
            for user, kind in (("bob", OUTSIDE_WINDOW), ("mallory", NO_RIGHT)):
                await held.hold(region * REGION, region * REGION + 1, user, kind, equal=False)
        assert not held.only_outside_window()
        took_s = min(timeit.repeat(held.only_outside_window, number=1, repeat=7))
        await held.hold(7 * REGION, 7 * REGION + 1, "bob", OUTSIDE_WINDOW, equal=False)
        assert positions(held.only_outside_window()) == [7]
        held.close()
        workers.close()
        return took_s

    assert asyncio.run(look_s()) < 0.01


def test_a_million_regions_are_forgotten_without_holding_the_loop_up(tmp_path: Path) -> None:
    async def forgotten_s() -> float:
        workers = Workers("records", 1)
        held = HeldRecord(str(tmp_path / "record"), replace(IDENTITY, size_bytes=64 << 30), workers.run, expected=False)
        held.claim()
        await held.hold(0, 64 << 30, "mallory", NO_RIGHT, equal=False)
        began_s = time.perf_counter()
        forgetting = asyncio.ensure_future(held.forget(held.regions()))
        await asyncio.sleep(0)
        took_s = time.perf_counter() - began_s
        await forgetting
        assert 1 not in held.regions()
        held.close()
        workers.close()
        return took_s

    assert asyncio.run(forgotten_s()) < 0.3
