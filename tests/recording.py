"""What recorder.c has recorded, and what a power cut leaves of it: a model of disks that keep only what was synced.

Rules of the model, which are those that POSIX and a disk leave to a program:

1. A file's content is in sectors of 512 bytes, each written whole or not at all. A change to a sector makes a new
   version of it. A sync of the file makes durable, for each sector, the version of the last change that had ended when
   the sync began. A durable write does so for its own sectors.
2. After the cut each sector is its durable version or any later one, whatever became of its neighbours: so any subset
   of the un-synced changes is lost, and one change may be torn at each 512 bytes. So may one that was under way.
3. A change or a sync that failed may have left anything of it on the medium. No later sync of the file makes durable
   what a failed sync should have: the kernel has forgotten that it is to be written.
4. A file's size is durable as its content is, and independently of it: it may grow without its data, which is zeroes.
5. Names are made, replaced and removed in order. A sync of the directory makes durable what was done before it; after
   the cut a beginning of what came later is there. A name says nothing of the content.
"""

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from typing import Any, Final

SECTOR_BYTES: Final = 512
NEVER: Final = 1 << 62

# What becomes of a file's changes that are not durable: either one of these, or those since a time are lost.
SCATTERED: Final = -2  # each sector for itself
LOST: Final = -1
KEPT: Final = NEVER

_RECORD: Final = Struct("<IHBBQQqQ")  # struct record of recorder.c
WRITE, ZERO, TRUNCATE, CREATE, ENDED = b"WZTCw"
SYNC, SYNCED = b"Ss"
RENAME, UNLINK, LINK, MARK = b"RULM"


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the log; `offset` is the result in the second record of a pair."""

    kind: int
    durable: bool
    id: int
    inode: int
    offset: int
    length: int
    path: str
    data: bytes

    def mark(self) -> dict[str, Any]:
        """What the host noted here."""
        noted = json.loads(self.data)
        assert isinstance(noted, dict)
        return noted


def read_log(path: Path) -> list[Record]:
    """Read a whole log."""
    content, at, records = path.read_bytes(), 0, []
    while at < len(content):
        size, path_bytes, kind, durable, number, inode, offset, length = _RECORD.unpack_from(content, at)
        names = at + _RECORD.size
        name = os.fsdecode(content[names : names + path_bytes]).removesuffix(" (deleted)")
        data = content[names + path_bytes : at + size]
        records.append(Record(kind, bool(durable), number, inode, offset, length, name, data))
        at += size
    return records


def pack_mark(**noted: object) -> bytes:
    """Return a record that says something, in the order of the others."""
    data = json.dumps(noted).encode()
    return _RECORD.pack(_RECORD.size + len(data), 0, MARK, 0, 0, 0, 0, 0) + data


@dataclass(slots=True)
class _Change:
    """A change that is not durable yet. Times are positions in the log."""

    began: int
    ended: int = NEVER
    failed: bool = False
    pieces: set[int] = field(default_factory=set)  # the sectors it touches


class _File:
    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)  # what is durable; beyond `size` there are zeroes
        self.size = len(content)
        self.sectors: dict[int, list[tuple[_Change, int, bytes]]] = {}  # later versions: where in the sector, what
        self.sizes: list[tuple[_Change, int, bool]] = []  # later sizes; whether it is exact, or a least one

    def change(self, change: _Change, offset: int, data: bytes) -> None:
        end = offset + len(data)
        if end > len(self.content):
            self.content.extend(bytes(-(-end // SECTOR_BYTES) * SECTOR_BYTES - len(self.content)))
        self.sizes.append((change, end, False))
        at = offset
        while at < end:
            sector, low = divmod(at, SECTOR_BYTES)
            count = min(SECTOR_BYTES - low, end - at)
            self.sectors.setdefault(sector, []).append((change, low, data[at - offset : at - offset + count]))
            change.pieces.add(sector)
            at += count

    def truncate(self, change: _Change, size: int) -> None:
        if size < len(self.content):
            self.change(change, size, bytes(len(self.content) - size))
            self.sizes.pop()
        self.sizes.append((change, size, True))

    def sync(self, began: int, only: _Change | None = None) -> None:
        """Make durable what had ended when a sync began; or just one change."""

        def covered(change: _Change) -> bool:
            return change.ended < began and not change.failed if only is None else change is only

        for sector in list(self.sectors) if only is None else only.pieces:
            versions = self.sectors.get(sector, [])
            last = max((at for at, (change, _, _) in enumerate(versions) if covered(change)), default=-1)
            self._apply(self.content, sector, versions[: last + 1])
            if last + 1 == len(versions):
                self.sectors.pop(sector, None)
            else:
                self.sectors[sector] = versions[last + 1 :]
        last = max((at for at, (change, _, _) in enumerate(self.sizes) if covered(change)), default=-1)
        self.size = self._grown(self.sizes[: last + 1])
        del self.sizes[: last + 1]

    def sync_failed(self, began: int) -> None:
        for versions in self.sectors.values():
            for change, _, _ in versions:
                change.failed |= change.ended < began

    def left(self, chance: random.Random, until: int) -> bytes:
        """Return what may be left; `until` is a time, SCATTERED, LOST or KEPT."""
        content = bytearray(self.content)
        for sector, versions in self.sectors.items():
            if until == SCATTERED:
                count = chance.randint(0, len(versions))
            else:
                count = sum(change.began <= until for change, _, _ in versions)
            self._apply(content, sector, versions[:count])
        if until == SCATTERED:
            count = chance.randint(0, len(self.sizes))
        else:
            count = sum(change.began <= until for change, _, _ in self.sizes)
        size = self._grown(self.sizes[:count])
        del content[size:]
        return bytes(content).ljust(size, b"\0")

    def _grown(self, sizes: list[tuple[_Change, int, bool]]) -> int:
        size = self.size
        for _, value, exact in sizes:
            size = value if exact else max(size, value)
        return size

    @staticmethod
    def _apply(content: bytearray, sector: int, versions: list[tuple[_Change, int, bytes]]) -> None:
        for _, low, data in versions:
            at = sector * SECTOR_BYTES + low
            content[at : at + len(data)] = data


class _Directory:
    def __init__(self) -> None:
        self.entries: dict[str, _File] = {}  # what is durable
        self.changes: list[tuple[int, dict[str, _File | None]]] = []  # later: when, and what names mean from then on

    def after(self, count: int) -> dict[str, _File]:
        entries: dict[str, _File | None] = dict(self.entries)
        for _, names in self.changes[:count]:
            entries |= names
        return {name: file for name, file in entries.items() if file is not None}

    def now(self) -> dict[str, _File]:
        return self.after(len(self.changes))

    def sync(self, began: int) -> None:
        count = sum(when < began for when, _ in self.changes)
        self.entries = self.after(count)
        del self.changes[:count]


class Disks:
    """All files below a directory, as their media have them at one moment of a log."""

    def __init__(self, base: dict[str, bytes], inodes: dict[int, str]) -> None:
        """Begin with the files of `base`, by path, all durable; `inodes` says which numbers their files have."""
        self.time = -1
        self.failed = False  # something did, so what is there now is not known
        self._directories: dict[str, _Directory] = {}
        self._inodes: dict[int, _File] = {}
        self._changes: dict[int, tuple[_File, _Change]] = {}  # under way, by id
        self._syncs: dict[int, int] = {}  # id -> when it began
        files = {path: _File(content) for path, content in base.items()}
        for path, file in files.items():
            self._directory(path).entries[os.path.basename(path)] = file
        for inode, path in inodes.items():
            self._inodes[inode] = files[path]

    def take(self, record: Record) -> None:
        """Go on by one record."""
        self.time += 1
        if record.kind == MARK:
            return
        if record.kind in (WRITE, ZERO, TRUNCATE, CREATE):
            self._begin(record)
        elif record.kind == ENDED:
            file, change = self._changes.pop(record.id)
            change.ended = self.time
            change.failed = record.offset < 0
            self.failed |= change.failed
            if record.durable and not change.failed:
                file.sync(self.time, change)
        elif record.kind == SYNC:
            self._syncs[record.id] = self.time
        elif record.kind == SYNCED:
            self._synced(record)
        else:
            self._rename(record)

    def cut(self, chance: random.Random) -> dict[str, bytes]:
        """What may be there after a power cut now: the content of each file, by path."""
        left: dict[str, bytes] = {}
        done: dict[int, bytes] = {}
        for path, directory in self._directories.items():
            for name, file in directory.after(chance.randint(0, len(directory.changes))).items():
                if id(file) not in done:
                    done[id(file)] = file.left(chance, self._fate(chance))
                left[f"{path}/{name}"] = done[id(file)]
        return left

    def whole(self) -> dict[str, bytes]:
        """What is there without a power cut."""
        return {
            f"{path}/{name}": file.left(random.Random(), KEPT)
            for path, directory in self._directories.items()
            for name, file in directory.now().items()
        }

    def _fate(self, chance: random.Random) -> int:
        how = chance.random()
        if how < 0.4:
            return SCATTERED
        if how < 0.6:
            return LOST
        return KEPT if how < 0.8 else chance.randint(max(0, self.time - 100), self.time)

    def _begin(self, record: Record) -> None:
        change = _Change(self.time)
        if record.kind == CREATE:
            file = self._inodes[record.inode] = _File()
            self._directory(record.path).changes.append((self.time, {os.path.basename(record.path): file}))
        else:
            file = self._inodes[record.inode]
        if record.kind == WRITE:
            file.change(change, record.offset, record.data)
        elif record.kind == ZERO:
            file.change(change, record.offset, bytes(record.length))
        elif record.kind == TRUNCATE:
            file.truncate(change, record.offset)
        self._changes[record.id] = file, change

    def _synced(self, record: Record) -> None:
        began = self._syncs.pop(record.id)
        file = self._inodes.get(record.inode)
        if file is not None:
            if record.offset < 0:
                file.sync_failed(began)
            else:
                file.sync(began)
        elif record.offset >= 0:
            self._directory(f"{record.path}/").sync(began)

    def _rename(self, record: Record) -> None:
        old, _, new = record.path.partition("\0")
        directory = self._directory(old)
        names: dict[str, _File | None] = {}
        if record.kind in (RENAME, LINK):
            assert os.path.dirname(old) == os.path.dirname(new), "a move between directories is not modelled"
            names[os.path.basename(new)] = directory.now()[os.path.basename(old)]
        if record.kind in (RENAME, UNLINK):
            names[os.path.basename(old)] = None
        directory.changes.append((self.time, names))

    def _directory(self, path: str) -> _Directory:
        return self._directories.setdefault(os.path.dirname(path), _Directory())


def files_below(root: Path) -> Iterator[Path]:
    """All regular files that recorder.c records."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink() and "/run/" not in str(path) and "/registry.db" not in str(path):
            yield path


def put_back(files: dict[str, bytes]) -> None:
    """Write files, sparse where there are zeroes; one that exists keeps its inode."""
    for name, content in files.items():
        fd = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.truncate(fd, len(content))
            for at in range(0, len(content), 4096):
                block = content[at : at + 4096]
                if block.count(0) != len(block):
                    os.pwrite(fd, block, at)
        finally:
            os.close(fd)
