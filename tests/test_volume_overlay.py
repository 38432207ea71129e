"""The overlay: one sees what was written, also after a reopening and after a power cut between any two writes.

The mirror is never written, and the file tells a thief nothing.
"""

import errno
import os
import random
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockstep.crypto.cipher import XtsCipher
from lockstep.crypto.luks import CIPHER, Segment
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.transfer import write_all
from lockstep.errors import DiskFailed, DiskLocked, NotADisk, OverlayDamaged, OverlayOfAnother, OverlayUnfit
from lockstep.volume import overlay as module
from lockstep.volume.overlay import Base, Overlay, OverlayFile, cluster_bytes, read_any

KEY = random.Random(1).randbytes(64)
UUID = str(uuid.UUID(int=7))
SECTOR = 512


class Scene:
    """A mirror of `size_bytes` of noise, and an overlay over it that can be opened again and again."""

    def __init__(self, home: Path, size_bytes: int, sector_bytes: int = SECTOR) -> None:
        self.sectors_bytes = -(-size_bytes // sector_bytes) * sector_bytes
        self.content = random.Random(size_bytes).randbytes(size_bytes).ljust(self.sectors_bytes, b"\0")
        self.base = Base(UUID, 5, size_bytes)
        self.mirror_path, self.path = home / "mirror", home / "overlay"
        self.sector_bytes = sector_bytes
        disk = self._mirror(os.O_RDWR | os.O_CREAT)
        disk.write(0, memoryview(self.content))
        disk.close()
        self.ciphertext = self.mirror_path.read_bytes()
        OverlayFile.make(str(self.path), self.base)

    def _mirror(self, flags: int) -> EncryptedDisk:
        segment = Segment(0, self.sector_bytes, 0, CIPHER, None)
        fd = os.open(self.mirror_path, flags | os.O_CLOEXEC, 0o600)
        return EncryptedDisk(fd, segment, XtsCipher(KEY, self.sector_bytes), self.sectors_bytes)

    def open(self, path: Path | None = None) -> Overlay:
        file = OverlayFile.claim(str(path or self.path), self.base)
        file.unlock(bytearray(KEY))
        self.mirror = self._mirror(os.O_RDONLY)  # a write to it fails
        return Overlay(self.mirror, file)

    def close(self, overlay: Overlay) -> None:
        overlay.close()
        self.mirror.close()

    def seen(self, overlay: Overlay) -> bytes:
        data = bytearray(self.base.size_bytes)
        read_any(overlay, 0, memoryview(data))
        return bytes(data)


SIZE_BYTES = 5 * 4096 + 1000  # the last cluster and the last sector are short

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "zero", "allocate", "trim", "flush", "reopen"]),
        st.integers(0, SIZE_BYTES - 1),
        st.integers(1, SIZE_BYTES),
    ),
    max_size=25,
)


def change(overlay: Overlay, model: bytearray, action: tuple[str, int, int], fill: bytes) -> None:
    """Carry out one action, and do the same to the model."""
    kind, offset, length = action
    length = min(length, SIZE_BYTES - offset)
    end = offset + length
    if kind == "write":
        data = (fill * length)[:length]
        overlay.write(offset, memoryview(data))
        model[offset:end] = data
    elif kind in ("zero", "allocate"):
        overlay.zero(offset, length, allocate=kind == "allocate")
        model[offset:end] = bytes(length)
    elif kind == "trim":
        overlay.trim(offset, length)
        whole = slice(-(-offset // 4096) * 4096, end // 4096 * 4096)
        if whole.start < whole.stop:
            model[whole] = bytes(whole.stop - whole.start)
    else:
        overlay.flush()


@pytest.mark.parametrize("sector_bytes", [512, 4096])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_one_sees_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, sector_bytes: int, actions: list[tuple[str, int, int]]
) -> None:
    scene = Scene(tmp_path_factory.mktemp("scene"), SIZE_BYTES, sector_bytes)
    overlay = scene.open()
    model = bytearray(scene.content[:SIZE_BYTES])
    chance = random.Random(len(actions))
    for number, action in enumerate(actions):
        if action[0] == "reopen":
            scene.close(overlay)
            overlay = scene.open()
        else:
            change(overlay, model, action, b"%03d " % number)
        offset = chance.randrange(SIZE_BYTES)
        piece = memoryview(bytearray(chance.randint(1, SIZE_BYTES - offset)))
        read_any(overlay, offset, piece)
        assert piece == model[offset : offset + len(piece)]
    assert scene.seen(overlay) == model
    known = b"".join((b"\0" if zeroes else b"?") * count for count, zeroes in overlay.zeroes(0, SIZE_BYTES))
    assert len(known) == SIZE_BYTES
    assert all(model[at] == 0 for at in range(SIZE_BYTES) if known[at] == 0)
    cached = memoryview(bytearray(sector_bytes))
    if overlay.read_cached(sector_bytes, cached):
        assert cached == model[sector_bytes : 2 * sector_bytes]
    scene.close(overlay)
    assert scene.mirror_path.read_bytes() == scene.ciphertext


class PowerCuts:
    """What a disk may hold after a power cut: all that was synced, and any of the sectors that were written since."""

    def __init__(self, overlay: Overlay, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = path
        self._synced = path.read_bytes()
        self._pending: list[tuple[int, bytes]] = []
        self._base = overlay._data._base
        disk: Any = overlay._data
        write, flush = disk.write, disk.flush

        def noted_write(offset: int, data: memoryview) -> None:
            write(offset, data)
            self._note(self._base + offset, len(data))

        def noted_write_all(fd: int, data: bytes, offset: int) -> None:
            write_all(fd, data, offset)
            self._note(offset, len(data))

        def noted_flush() -> None:
            flush()
            self._synced, self._pending = path.read_bytes(), []

        disk.write, disk.flush = noted_write, noted_flush
        monkeypatch.setattr(module, "write_all", noted_write_all)

    def _note(self, offset: int, length: int) -> None:
        content = self._path.read_bytes()
        for at in range(offset, offset + length, 512):
            self._pending.append((at, content[at : at + 512]))

    def images(self, chance: random.Random, count: int) -> Iterator[bytes]:
        for _ in range(count):
            image, share = bytearray(self._synced), chance.random()
            for at, content in self._pending:
                if chance.random() < share:
                    image[at : at + 512] = content
            yield bytes(image)


@pytest.mark.parametrize("seed", range(25))
def test_a_flush_that_was_answered_survives_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Each sector is what it was at the last flush, or what it was written to be since."""
    scene, chance = Scene(tmp_path, SIZE_BYTES), random.Random(seed)
    overlay = scene.open()
    cuts = PowerCuts(overlay, scene.path, monkeypatch)
    model = bytearray(scene.content[:SIZE_BYTES])
    possible = [{bytes(model[at : at + SECTOR])} for at in range(0, SIZE_BYTES, SECTOR)]
    during_flush: list[bytes] = []
    sync = overlay._sync

    def cut_before_and_after_sync() -> None:
        during_flush.extend(cuts.images(chance, 2))
        sync()
        during_flush.extend(cuts.images(chance, 2))

    monkeypatch.setattr(overlay, "_sync", cut_before_and_after_sync)
    for number in range(12):
        kind = chance.choice(["write", "write", "write", "zero", "trim", "allocate", "flush"])
        change(overlay, model, (kind, chance.randrange(SIZE_BYTES), chance.randint(1, 9000)), b"%03d " % number)
        for at, versions in enumerate(possible):
            versions.add(bytes(model[at * SECTOR : (at + 1) * SECTOR]))
        images, during_flush[:] = [*during_flush, *cuts.images(chance, 3)], []
        if kind == "flush":
            for each in images[:-3]:  # cut while the flush was under way
                assert_possible(scene, each, possible)
            possible = [{bytes(model[at : at + SECTOR])} for at in range(0, SIZE_BYTES, SECTOR)]
            images = images[-3:]
        for image in images:
            assert_possible(scene, image, possible)


def assert_possible(scene: Scene, image: bytes, possible: list[set[bytes]]) -> None:
    path = scene.path.with_name("after")
    path.write_bytes(image)
    open_now = scene.mirror
    after = scene.open(path)
    seen = scene.seen(after)
    scene.close(after)
    scene.mirror = open_now
    for at, versions in enumerate(possible):
        assert seen[at * SECTOR : (at + 1) * SECTOR] in versions, f"sector {at} is none of its versions"


def test_after_a_failed_sync_no_flush_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, SIZE_BYTES)
    overlay = scene.open()
    overlay.write(0, memoryview(b"x" * 4096))

    def fail() -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(overlay._data, "flush", fail)
        with pytest.raises(OSError, match="Input/output error"):
            overlay.flush()
    with pytest.raises(OSError, match="Input/output error"):
        overlay.flush()
    with pytest.raises(OSError, match="Input/output error"):
        overlay.close()
    assert scene.seen(scene.open()) == scene.content[:SIZE_BYTES]


@pytest.mark.parametrize("where", ["data", "map"])
def test_a_failed_flush_is_the_overlays_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A drill asks: what a program makes of a disk that lost something says nothing of the mirror."""
    overlay = Scene(tmp_path, SIZE_BYTES).open()
    overlay.write(0, memoryview(b"x" * 4096))

    def fail(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if where == "data":
            patched.setattr(overlay._data, "flush", fail)
        else:
            patched.setattr(module, "write_all", fail)
        with pytest.raises(OSError, match="No space left"):
            overlay.flush()
    assert overlay.failure is not None


def test_the_file_tells_a_thief_nothing(tmp_path: Path) -> None:
    """Neither plaintext, nor the mirror's ciphertext of it, nor another overlay's."""
    scene, other = Scene(tmp_path, 64 << 10), tmp_path / "other"
    OverlayFile.make(str(other), scene.base)
    for path in (scene.path, other):
        overlay = scene.open(path)
        overlay.write(0, memoryview(scene.content))
        scene.close(overlay)

    def sectors(content: bytes) -> set[bytes]:
        return {content[at : at + 16] for at in range(0, len(content), 16)} - {bytes(16)}

    plain, mirror = sectors(scene.content), sectors(scene.ciphertext)
    first, second = (sectors(path.read_bytes()[module.DATA_ALIGNMENT_BYTES :]) for path in (scene.path, other))
    assert len(first) == len(second) == len(plain)
    assert not (first & plain | first & mirror | first & second)


def test_it_takes_the_space_of_what_was_written_and_opens_at_once(tmp_path: Path) -> None:
    size_bytes = 1 << 40
    path, base = tmp_path / "large", Base(UUID, 5, size_bytes)
    OverlayFile.make(str(path), base)
    assert path.stat().st_blocks * 512 <= 64 << 10
    assert path.stat().st_size > size_bytes
    file = OverlayFile.claim(str(path), base)
    assert len(file.states) == size_bytes // cluster_bytes(size_bytes) <= module.CLUSTERS_WANTED
    os.close(file.fd)


def test_the_cluster_is_as_small_as_the_map_allows() -> None:
    sizes = {1: 4 << 10, 64 << 30: 4 << 10, (64 << 30) + 1: 8 << 10, 16 << 40: 1 << 20, 64 << 40: 1 << 20}
    assert {size: cluster_bytes(size) for size in sizes} == sizes


# --- what is no overlay of this mirror ----------------------------------------------------------------------


def damage(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize(
    ("spoil", "error", "fragment"),
    [
        (lambda path: path.write_bytes(b""), OverlayUnfit, "something else"),
        (lambda path: path.write_bytes(os.urandom(4096)), OverlayUnfit, "something else"),
        (lambda path: damage(path, 100, b"\1"), OverlayDamaged, "checksum"),
        (lambda path: damage(path, 600, b"\1"), OverlayDamaged, "page 0"),
    ],
)
def test_what_is_damaged_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object], error: type[Exception], fragment: str
) -> None:
    scene = Scene(tmp_path, SIZE_BYTES)
    spoil(scene.path)
    before = scene.path.read_bytes()
    with pytest.raises(error) as told:
        scene.open()
    assert fragment in str(told.value)
    assert scene.path.read_bytes() == before


@pytest.mark.parametrize(
    ("base", "fragment"),
    [
        (Base(str(uuid.UUID(int=8)), 5, SIZE_BYTES), "over the mirror 00000000-0000-0000-0000-000000000007"),
        (Base(UUID, 6, SIZE_BYTES), "re-keyed since"),
    ],
)
def test_another_mirror_or_another_generation_of_it_is_refused(tmp_path: Path, base: Base, fragment: str) -> None:
    scene = Scene(tmp_path, SIZE_BYTES)
    with pytest.raises(OverlayOfAnother) as told:
        OverlayFile.claim(str(scene.path), base)
    assert fragment in str(told.value)
    with pytest.raises(OverlayDamaged):
        OverlayFile.claim(str(scene.path), Base(UUID, 5, SIZE_BYTES + 1))


def test_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(module, "VERSION", 2)
        scene = Scene(tmp_path, SIZE_BYTES)
    with pytest.raises(OverlayUnfit) as told:
        scene.open()
    assert "version 2" in str(told.value)


def test_it_has_one_user(tmp_path: Path) -> None:
    scene = Scene(tmp_path, SIZE_BYTES)
    overlay = scene.open()
    with pytest.raises(DiskLocked):
        OverlayFile.claim(str(scene.path), scene.base)
    scene.close(overlay)
    scene.close(scene.open())


def test_it_is_a_file_of_its_own(tmp_path: Path) -> None:
    scene = Scene(tmp_path, SIZE_BYTES)
    with pytest.raises(DiskFailed):
        OverlayFile.make(str(scene.path), scene.base)
    with pytest.raises(NotADisk):
        OverlayFile.claim(str(tmp_path), scene.base)
