"""The write-intent bitmap: whatever it lets through is marked on disk, whenever the power goes."""

import asyncio
import errno
import os
import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.volume import pages
from lockstep.volume.intent import Identity, IntentBitmap, load
from lockstep.volume.pages import PAGE_BYTES
from lockstep.volume.regions import region_bytes_for

SIZE_BYTES = 700 << 20  # 11200 regions: three pages
REGION_BYTES = region_bytes_for(SIZE_BYTES)
COUNT = SIZE_BYTES // REGION_BYTES
IDENTITY = Identity(str(uuid.UUID(int=1)), str(uuid.UUID(int=2)), SIZE_BYTES)


class Medium:
    """What the bitmap's file would hold after a power cut: what was synced, and any part of what was not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.synced = b""
        self.unsynced: list[tuple[int, bytes]] = []

    def sync(self) -> None:
        """Everything written so far is safe."""
        self.synced = self.path.read_bytes()
        self.unsynced = []

    def after_power_cut(self, lost: Callable[[int], bool]) -> bytes:
        """The content when the unsynced writes for whose number `lost` is true never happened."""
        content = bytearray(self.synced)
        for number, (offset, data) in enumerate(self.unsynced):
            if not lost(number):
                content[offset : offset + len(data)] = data
        return bytes(content)


async def in_place(work: Callable[..., None], *arguments: object) -> None:
    """Stand in for a worker thread; others get a turn before and after, as they would."""
    await asyncio.sleep(0)
    work(*arguments)
    await asyncio.sleep(0)


def fresh(directory: Path, marked: bytes = bytes(COUNT)) -> tuple[IntentBitmap, Path]:
    """A claimed bitmap for generation 1."""
    path = directory / "bitmap"
    bitmap = IntentBitmap(str(path), IDENTITY, in_place)
    bitmap.claim(0, 1, marked)
    bitmap.settle(1)
    return bitmap, path


spans = st.tuples(st.integers(0, SIZE_BYTES - 1), st.integers(1, 40 << 20)).map(
    lambda span: (span[0], min(SIZE_BYTES, span[0] + span[1]))
)
steps = st.lists(
    st.one_of(spans.map(lambda span: ("mark", span)), st.just(("tidy", (0, 0))), st.just(("look", (0, 0)))), max_size=12
)


@given(steps=steps, lost=st.integers(0, 2**16 - 1))
def test_whatever_is_let_through_is_marked_after_a_power_cut(
    steps: list[tuple[str, tuple[int, int]]], lost: int
) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        bitmap, path = fresh(Path(directory))
        medium = Medium(path)
        medium.sync()
        write = pages._write

        def recording_write(fd: int, data: bytes, offset: int) -> None:
            medium.unsynced.append((offset, data))
            write(fd, data, offset)

        patch.setattr(pages, "_write", recording_write)
        patch.setattr(os, "fdatasync", lambda _fd: medium.sync())
        let_through: dict[tuple[int, int], None] = {}

        def look() -> None:
            """The invariant, at any moment."""
            path.with_name("cut").write_bytes(medium.after_power_cut(lambda number: bool(lost >> number % 16 & 1)))
            marked = load(str(path.with_name("cut")), IDENTITY, 1, 0).marked
            for start, end in let_through:
                assert 0 not in marked[start // REGION_BYTES : -(-end // REGION_BYTES)]

        async def mark(span: tuple[int, int]) -> None:
            await bitmap.mark([span])
            let_through[span] = None  # it is being written from here on
            look()

        async def play() -> None:
            under_way: list[asyncio.Task[None]] = []
            for what, span in steps:
                if what == "mark":
                    under_way.append(asyncio.create_task(mark(span)))
                elif what == "tidy":
                    await asyncio.gather(*under_way)
                    let_through.clear()  # all of it was written, and both disks were flushed
                    bitmap.idle()
                    await bitmap.clear(bitmap.idle())
                await asyncio.sleep(0)
                look()
            await asyncio.gather(*under_way)
            look()

        asyncio.run(play())
        bitmap.close()


@given(regions=st.sets(st.integers(0, COUNT - 1)))
def test_marks_survive_a_restart(regions: set[int]) -> None:
    marked = bytes(region in regions for region in range(COUNT))
    with tempfile.TemporaryDirectory() as directory:
        bitmap, path = fresh(Path(directory), marked)
        assert load(str(path), IDENTITY, 1, 0).marked == marked == bitmap.marked()
        bitmap.close()


def test_only_a_bitmap_of_the_same_mirror_and_generation_counts(tmp_path: Path) -> None:
    bitmap, path = fresh(tmp_path)
    bitmap.close()
    everything = b"\1" * COUNT
    assert load(str(path), IDENTITY, 1, 0).marked == bytes(COUNT)
    for generation in (0, 2, 3):
        assert load(str(path), IDENTITY, generation, 0).marked == everything
    other = str(uuid.UUID(int=9))
    for identity in (
        Identity(other, IDENTITY.luks_uuid, SIZE_BYTES),
        Identity(IDENTITY.volume_id, other, SIZE_BYTES),
        Identity(IDENTITY.volume_id, IDENTITY.luks_uuid, SIZE_BYTES - REGION_BYTES),
    ):
        assert set(load(str(path), identity, 1, 0).marked) == {1}
    assert load(str(tmp_path / "none"), IDENTITY, 1, 0).marked == everything


def test_a_claim_cut_off_before_or_after_the_token_fits_both_generations(tmp_path: Path) -> None:
    bitmap, path = fresh(tmp_path)
    bitmap.claim(1, 2, bytes(COUNT))
    bitmap.close()
    for generation, fits in ((0, False), (1, True), (2, True), (3, False)):
        assert (load(str(path), IDENTITY, generation, 0).marked == bytes(COUNT)) is fits


@given(position=st.integers(0, PAGE_BYTES * 4 - 1), flip=st.integers(1, 255))
def test_a_damaged_byte_marks_its_whole_page(position: int, flip: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        bitmap, path = fresh(Path(directory))
        bitmap.close()
        content = bytearray(path.read_bytes())
        content[position] ^= flip
        path.write_bytes(content)
        marked = load(str(path), IDENTITY, 1, 0).marked
        page = position // PAGE_BYTES - 1
        if page < 0:
            assert set(marked) == {1}
        else:
            start = page * pages.PAGE_BITS
            assert set(marked[start : start + pages.PAGE_BITS]) == {1}
            assert sum(marked) == len(marked[start : start + pages.PAGE_BITS])


def test_a_target_written_since_an_orderly_end_is_noticed(tmp_path: Path) -> None:
    bitmap, path = fresh(tmp_path)
    bitmap.claim(1, 1, bytes(COUNT), written_ns=5)
    bitmap.close()
    assert load(str(path), IDENTITY, 1, 5).marked == bytes(COUNT)
    assert load(str(path), IDENTITY, 1, 6).marked == b"\1" * COUNT


def test_a_mark_that_cannot_be_written_is_an_error_and_lets_nothing_through(tmp_path: Path) -> None:
    bitmap, _path = fresh(tmp_path)
    bitmap._pages._fd, real = 1 << 20, bitmap._pages._fd  # no such descriptor
    with pytest.raises(OSError, match="Bad file descriptor"):
        asyncio.run(bitmap.mark([(0, 1)]))
    assert not bitmap.covers(0, 1)
    bitmap._pages._fd = real
    bitmap.close()


def test_steady_work_in_a_hot_set_writes_nothing(tmp_path: Path) -> None:
    bitmap, path = fresh(tmp_path)

    async def play() -> None:
        await bitmap.mark([(0, 8 << 20)])
        before = path.stat().st_mtime_ns
        for round_ in range(1000):
            assert bitmap.covers(round_ * 4096, round_ * 4096 + 4096)
            if round_ % 100 == 99:
                bitmap.idle()
                bitmap.covers(0, 8 << 20)
                await bitmap.clear(bitmap.idle())
                bitmap.covers(0, 8 << 20)
        assert path.stat().st_mtime_ns == before

    asyncio.run(play())
    bitmap.close()


def test_a_mark_is_told_what_the_medium_failed_though_the_header_is_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells one sync of a file what it could not write out, and the next one that all is well."""
    begun, told = threading.Event(), threading.Event()

    def fdatasync(_fd: int) -> None:
        first = not begun.is_set()
        begun.set()
        if first:
            told.wait(0.2)  # for another who syncs meanwhile
        if not told.is_set():
            told.set()
            raise OSError(errno.EIO, "the medium failed")

    async def marking() -> None:
        bitmap = IntentBitmap(str(tmp_path / "bitmap"), IDENTITY, asyncio.to_thread)
        bitmap.claim(1, 1, bytes(COUNT))
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        mark = asyncio.create_task(bitmap.mark([(0, 1)]))
        await asyncio.to_thread(begun.wait)
        advance = asyncio.create_task(asyncio.to_thread(bitmap.advance, 1, 2))
        with pytest.raises(OSError, match="the medium failed"):
            await mark
        assert not bitmap.covers(0, 1)
        await advance
        bitmap.close()

    asyncio.run(marking())
