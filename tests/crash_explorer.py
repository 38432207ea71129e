"""Power cuts: after every one that the recorded disks allow, nothing that was promised is lost.

A history is a run of the real server with random requests (crash_host.py), recorded (recorder.c). Then, for moments of
it chosen at random, and for what the disks may have kept at that moment (recording.py):

    target    each sector has what the last flushed request to it wrote, or something later
    bitmap    it fits the mirror, so that there is no full copy; and every region in which the two differ is marked, or
              held; also when the mirror is an older copy of itself, which the bitmap may fit as well
    mirror    what was barred from it is not there; and if its token says `in-sync` or `frozen`, then it alone, without
              target, bitmap or anything else, gives back every flushed request: up to now, or up to the first held one
    recovery  the next start is served, brings the mirror in sync, changes no byte of the target, and ends with
              decrypt(mirror) == target, every byte. So it does with an older copy of the mirror, with and without
              the bitmap, and when the power is cut during the recovery itself

Which content is right is known from the requests alone, as in Crucible's tests: every request has content of its own,
so for each sector there is a list of the versions it has had, and after a cut any version since the last answered flush
is as good as the other. Requests that overlap are never in flight at once here.

What is read here is read without the product's code: the token, the intent bitmap and the record of what is held as
docs/formats.md has them, the data by AES-XTS with the volume key that dissect.fve has found.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from dissect.fve.luks import LUKS

from tests import crash_host
from tests.lab import MIB, PASSPHRASE, Lab, Volume, run
from tests.recording import (
    MARK,
    NEVER,
    SECTOR_BYTES,
    Disks,
    Record,
    files_below,
    put_back,
    read_log,
)

SIZE_BYTES: Final = 2 * MIB + 3 * SECTOR_BYTES + 100  # the last sector is not whole
REGION_BYTES: Final = 64 << 10
PAGE_BYTES: Final = 512
Shape = tuple[str, tuple[object, ...], bool]  # name, options of `create`, detached header
SHAPES: Final[tuple[Shape, ...]] = (
    ("inline", (), False),
    ("detached", ("--sector-size", 4096), True),
)
SYNC_US: Final = 300
DAMAGED: Final[dict[str, Any]] = {"state": "damaged", "generation": "0"}  # for a token, where no header is sound
HOST_PATIENCE_S: Final = 120.0


@dataclass
class Request:
    """A request of the history; times are positions in the log, NEVER for an answer that did not come, or an error."""

    number: int
    kind: str
    offset: int
    length: int
    durable: bool
    held: bool
    begins: int
    ends: int = NEVER


@dataclass
class Image:
    """The files of a lab at one moment, by path, and when the target was last written."""

    files: dict[str, bytes]
    written_ns: int
    # Of sectors whose content was open at the cut that made this image: what the mirror may have as well.
    open: dict[int, list[bytes]] = field(default_factory=dict)
    silent: bool = False  # the mirror's header could not be written, so it need not say that it misses something


@dataclass
class Run:
    """What was recorded of one run of the server."""

    seed: int
    start: Image
    inodes: dict[int, str]  # of the files of `start`
    log: list[Record]
    after: Image


class Broken(AssertionError):
    """A promise was not kept after a power cut."""


class Mirror:
    """A mirror read by strangers: `key` is the volume key."""

    def __init__(self, volume: Volume) -> None:
        self.path, self.header_path = str(volume.mirror), str(volume.header or volume.mirror)
        with open(self.header_path, "rb") as file:
            luks = LUKS(file)
            luks.unlock_with_passphrase(PASSPHRASE.decode())
            segment = luks.find_segment(luks._active_keyslot_id)
            self.offset, self.sector, self.tweak = segment.offset, int(segment.sector_size), segment.iv_tweak
            self._key = algorithms.AES(bytes(luks._active_volume_key))
        self._known: dict[tuple[int, bytes], bytes] = {}

    def data(self, files: dict[str, bytes], length: int) -> bytes:
        """Decrypt it, as far as the target reaches."""
        content = files[self.path]
        if len(self._known) > 400_000:
            self._known.clear()
        at = self.offset
        parts = []
        for number in range(-(-length // self.sector)):
            ciphertext = content[at : at + self.sector]
            at += self.sector
            plain = self._known.get((number, ciphertext))
            if plain is None:
                position = number * (self.sector // SECTOR_BYTES) + self.tweak
                context = Cipher(self._key, modes.XTS(position.to_bytes(16, "little"))).decryptor()
                plain = self._known[number, ciphertext] = context.update(ciphertext)
            parts.append(plain)
        return b"".join(parts)[:length]

    def token(self, files: dict[str, bytes]) -> dict[str, Any]:
        """The token of the newer sound copy of the header (LUKS2 On-Disk Format, section 2), or DAMAGED."""
        content = files[self.header_path]
        found: dict[int, dict[str, Any]] = {}
        for at, magic in ((0, b"LUKS\xba\xbe"), (0x4000, b"SKUL\xba\xbe")):
            size, sequence = struct.unpack_from(">QQ", content, at + 8)
            if content[at : at + 6] != magic or not 4096 <= size <= 4 * MIB:
                continue
            area = bytearray(content[at : at + size])
            checksum, area[448:512] = bytes(area[448:512]), bytes(64)
            if checksum.startswith(hashlib.sha256(area).digest()):
                found[sequence] = json.loads(area[4096:].partition(b"\0")[0])
        if not found:
            return DAMAGED
        tokens = found[max(found)]["tokens"].values()
        (token,) = (each for each in tokens if each["type"] == "lockstep")
        assert isinstance(token, dict)
        return token


class Expected:
    """What each sector may hold, by the requests of a history that began with `base`."""

    def __init__(self, seed: int, base: bytes, log: list[Record]) -> None:
        self.base = base.ljust(-(-len(base) // SECTOR_BYTES) * SECTOR_BYTES, b"\0")
        self.requests: list[Request] = []
        self.flushes: list[Request] = []
        self.faults: list[tuple[int, int]] = []  # when, and which bits of recorder.c's faults from then on
        by_number: dict[int, Request] = {}
        for at, record in enumerate(log):
            if record.kind == MARK:
                noted = record.mark()
                if "begins" in noted:
                    made = Request(
                        noted["begins"],
                        noted["kind"],
                        noted["offset"],
                        noted["length"],
                        noted["fua"],
                        noted["held"],
                        at,
                    )
                    by_number[made.number] = made
                    (self.flushes if made.kind == "flush" else self.requests).append(made)
                elif "ends" in noted and not noted["error"]:
                    by_number[noted["ends"]].ends = at
                elif "fault" in noted:
                    self.faults.append((at, noted["fault"]))
        self.target = self._versions(seed, self.requests)
        self.mirror = self._versions(seed, [each for each in self.requests if not each.held])
        self.first_held = min((each.begins for each in self.requests if each.held), default=NEVER)

    def _versions(self, seed: int, requests: list[Request]) -> dict[int, list[tuple[Request | None, bytes]]]:
        versions: dict[int, list[tuple[Request | None, bytes]]] = {}
        for each in requests:
            write = each.kind == "write"
            data = crash_host.content(seed, each.number, each.length) if write else bytes(each.length)
            at, end = each.offset, each.offset + each.length
            while at < end:
                sector, low = divmod(at, SECTOR_BYTES)
                count = min(SECTOR_BYTES - low, end - at)
                start = sector * SECTOR_BYTES
                known = versions.setdefault(sector, [(None, self.base[start : start + SECTOR_BYTES])])
                before, piece = known[-1][1], data[at - each.offset : at - each.offset + count]
                known.append((each, before[:low] + piece + before[low + count :]))
                at += count
        return versions

    def flushed(self, cut: int) -> int:
        """Requests that ended before this time are covered by an answered flush."""
        return max((each.begins for each in self.flushes if each.ends <= cut), default=-1)

    @staticmethod
    def settled(known: list[tuple[Request | None, bytes]], flushed: int, cut: int) -> int:
        """The index of the last version that must not be lost."""
        return max(
            at
            for at, (each, _) in enumerate(known)
            if each is None or each.ends < flushed or (each.durable and each.ends <= cut)
        )


class Explorer:
    """A lab with one volume, the process that serves it, and what is known of its disks."""

    faults: tuple[int, ...] = (1, 17, 4)  # of recorder.c: that histories may meet
    unflushed = "no error at all"  # with which a server may end

    def __init__(self, lab: Lab, library: Path, *options: object, header: bool = False) -> None:
        self.lab = lab
        base = random.Random(1).randbytes(MIB)
        self.volume = lab.volume(crash_host.NAME, SIZE_BYTES, *options, content=base, header=header)
        self.mirror = Mirror(self.volume)
        self.target_path = str(self.volume.target)
        self.log = lab.home.with_suffix(".log")  # beside what is recorded
        self.looks = self.recoveries = 0
        faults = lab.home.with_suffix(".faults")
        faults.write_bytes(b"\0")
        self.host = subprocess.Popen(
            [sys.executable, "-m", "tests.crash_host", str(lab.home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={
                **os.environ,
                "LD_PRELOAD": str(library),
                "LAB_RECORD_ROOT": str(lab.home),
                "LAB_RECORD_LOG": str(self.log),
                "LAB_RECORD_FAULTS": str(faults),
                "LAB_RECORD_SYNC_US": str(SYNC_US),
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the host."""
        assert self.host.stdin is not None
        assert self.host.stdout is not None
        self.host.stdin.close()
        self.host.wait(HOST_PATIENCE_S)
        self.host.stdout.close()

    # --- runs ---

    def image(self) -> Image:
        """The lab's files as they are."""
        files = {str(path): path.read_bytes() for path in files_below(self.lab.home) if self._recorded(path)}
        return Image(files, os.stat(self.target_path).st_mtime_ns if self.target_path in files else 0)

    def _recorded(self, path: Path) -> bool:
        return path.parent.parent == self.lab.state or str(path) in (
            self.target_path,
            self.mirror.path,
            self.mirror.header_path,
        )

    def put(self, image: Image) -> None:
        """Make the lab's files what they are in the image."""
        current = {str(path) for path in files_below(self.lab.home) if self._recorded(path)}
        for path in current - set(image.files):
            os.unlink(path)
        put_back(image.files)
        if self.target_path in image.files:
            os.utime(self.target_path, ns=(image.written_ns, image.written_ns))

    def serve(self, **asked: object) -> dict[str, Any]:
        """Have the host serve once."""
        assert self.host.stdin is not None
        assert self.host.stdout is not None
        print(json.dumps(asked), file=self.host.stdin, flush=True)
        line = self.host.stdout.readline()
        assert line, f"the host has died: exit code {self.host.poll()}"
        answer = json.loads(line)
        if "error" in answer and self.unflushed not in answer["error"]:
            raise Broken(f"{answer['error']}\n" + "\n".join(answer["log"]))
        assert isinstance(answer, dict)
        return answer

    def explore(self, start: Image, seed: int, requests: int, looks: int, recoveries: int) -> Image:
        """Record a history, and examine it. Returns an image to go on from: after one of the cuts, or after the end."""
        return self.examine(self.record(start, seed, requests), looks, recoveries)

    def record(self, start: Image, seed: int, requests: int) -> Run:
        """Have the host serve a history."""
        return self._run(start, seed, script="history", seed=seed, requests=requests, faults=self.faults)

    def examine(self, run: Run, looks: int, recoveries: int) -> Image:
        """Cut the power of a history: `looks` times to look at the disks, of which `recoveries` to start again."""
        chance = random.Random(f"cuts of {run.seed}")
        expected = Expected(run.seed, self.content(run.start.files), run.log)
        recovered = set(chance.sample(range(looks), recoveries))
        older, going_on = [run.start], run.after
        for number, (cut, image) in enumerate(self._images(run, looks, chance)):
            with self._told(f"seed {run.seed}, look {number}, after record {cut} of {len(run.log)}", run, image):
                self._look(run.start, expected, image, cut)
                if self.mirror.token(image.files) is DAMAGED:
                    continue
                other = chance.choice(older)
                self._look_at_marks(self._with_mirror_of(image, other), "; the mirror is an older copy of itself")
                if number in recovered:
                    self._recover(image, other, chance)
                    going_on = image
            older = [*older[-3:], image]
        run.after.silent = self._silenced(expected, len(run.log))
        return going_on if chance.random() < 0.6 else run.after

    def replaceable(self, image: Image) -> bool:
        """Whether the next start may find an older copy of the mirror, or no bitmap."""
        return True

    def _run(self, start: Image, for_seed: int, **asked: object) -> Run:
        self.put(start)
        inodes = {os.stat(path).st_ino: path for path in start.files}
        self.serve(**asked)
        return Run(for_seed, start, inodes, read_log(self.log), self.image())

    def _images(self, run: Run, count: int, chance: random.Random) -> Iterator[tuple[int, Image]]:
        """Cut the power at `count` moments: every second one is one at which something else than data is written."""
        rare = [at for at, record in enumerate(run.log) if not self._is_data(record)]
        moments = sorted(chance.choice(rare) if each % 2 else chance.randrange(len(run.log)) for each in range(count))
        disks, written_ns = Disks(run.start.files, run.inodes), run.start.written_ns
        for at, record in enumerate(run.log):
            disks.take(record)
            if record.path == self.target_path:
                written_ns = run.after.written_ns
            while moments and moments[0] == at:
                moments.pop(0)
                yield at, Image(disks.cut(chance), written_ns)
        there = run.after.files
        if not disks.failed and (whole := disks.whole()) != there:
            differ = [path for path in {*whole, *there} if whole.get(path) != there.get(path)]
            raise AssertionError(f"the recorder has missed changes of {', '.join(differ)}")

    def _is_data(self, record: Record) -> bool:
        if record.kind == MARK:
            return "begins" in record.mark()
        return record.path == self.target_path or (record.path == self.mirror.path and record.offset >= 16 * MIB)

    @contextlib.contextmanager
    def _told(self, which: str, run: Run, image: Image) -> Iterator[None]:
        """Say which cut it was, and keep what was left by it."""
        self.looks += 1
        try:
            yield
        except AssertionError as failure:
            kept = self.lab.home.with_suffix(".failed")
            kept.write_bytes(pickle.dumps((which, run, image)))
            raise Broken(f"{which}: {failure} (kept in {kept})") from failure

    def content(self, files: dict[str, bytes]) -> bytes:
        """What clients see."""
        return files[self.target_path]

    # --- promises ---

    def _look(self, start: Image, expected: Expected, image: Image, cut: int) -> None:
        """Check the disks as the cut has left them."""
        files, flushed = image.files, expected.flushed(cut)
        after_cut: dict[int, list[bytes]] = {}
        for sector, known in expected.target.items():
            begun = [each for each in known if each[0] is None or each[0].begins <= cut]
            after_cut[sector] = [data for _, data in begun[expected.settled(begun, flushed, cut) :]]
        _compare("the target", _padded(self.content(files)), expected.base, after_cut, {})
        image.open = {**start.open, **after_cut}
        image.silent = self._silenced(expected, cut)

        token = self.mirror.token(files)
        data = _padded(self.mirror.data(files, SIZE_BYTES))
        if token is DAMAGED and not image.silent:
            raise Broken("no copy of the mirror's header is sound")
        if self._fits(start) and not any(when <= cut for when, _ in expected.faults) and not self._fits(image):
            raise Broken("the bitmap does not fit the mirror any more, so everything will be copied")
        self._look_at_marks(image)
        self._look_for_what_is_barred(expected, data)
        as_before = token["generation"] == self.mirror.token(start.files)["generation"]
        if token["state"] not in ("in-sync", "frozen") or image.silent or (start.silent and as_before):
            return
        before = start.open if as_before else {}
        if token["state"] == "frozen":
            there = _padded(self.mirror.data(start.files, SIZE_BYTES))
            before = {at: [*before.get(at, []), _sector(there, at)] for at in range(len(there) // SECTOR_BYTES)}
            if expected.first_held <= cut:
                flushed = max(flushed, expected.first_held)
        on_mirror = {}
        for sector, known in expected.target.items():
            choices = [] if token["state"] == "frozen" else after_cut[sector]
            lost = any(each and each.held and each.ends < flushed and content not in choices for each, content in known)
            begun = [
                each for each in expected.mirror.get(sector, known[:1]) if each[0] is None or each[0].begins <= cut
            ]
            first = expected.settled(begun, flushed, cut)
            if token["state"] == "frozen" or not lost:
                choices = choices + [content for _, content in begun[first:]]
            if begun[first][0] is None:
                choices = choices + before.get(sector, [])
            on_mirror[sector] = choices
        _compare(f"the mirror alone, {token['state']},", data, expected.base, on_mirror, before)

    def _silenced(self, expected: Expected, cut: int) -> bool:
        """Whether the disk that has the mirror's header has failed before."""
        bit = 1 if self.mirror.header_path == self.mirror.path else 16
        return any(when <= cut and faults & bit for when, faults in expected.faults)

    def _with_mirror_of(self, image: Image, other: Image) -> Image:
        theirs = {path: other.files[path] for path in (self.mirror.path, self.mirror.header_path)}
        return dataclasses.replace(image, files={**image.files, **theirs})

    def _look_at_marks(self, image: Image, where: str = "") -> None:
        if not self._fits(image):
            return
        marked, held = self._bits(image.files, ".intent"), self._bits(image.files, ".held")
        target, data = self.content(image.files), self.mirror.data(image.files, SIZE_BYTES)
        for region in range(-(-SIZE_BYTES // REGION_BYTES)):
            part = slice(region * REGION_BYTES, min((region + 1) * REGION_BYTES, SIZE_BYTES))
            if not marked[region] and not held[region] and target[part] != data[part]:
                raise Broken(f"region {region} differs, and is not marked{where}")

    def _fits(self, image: Image) -> bool:
        """Whether there is a bitmap of the mirror as it is; if not, everything counts as marked."""
        header = _content(image.files, ".intent")[:PAGE_BYTES]
        if not _sound(header):
            return False
        given, following, written_ns = struct.unpack_from("<QQQ", header, 56)
        generation = int(self.mirror.token(image.files)["generation"])
        return generation in (given, following) and written_ns in (0, image.written_ns)

    def _bits(self, files: dict[str, bytes], suffix: str) -> list[bool]:
        """The bits for each region, of all kinds together; all are set on a page that is damaged."""
        content = _content(files, suffix)
        pages = [content[at : at + PAGE_BYTES] for at in range(PAGE_BYTES, len(content), PAGE_BYTES)]
        bits = [int.from_bytes(page[4:], "little") if _sound(page) else -1 for page in pages or [b""]]
        return [any(each >> region & 1 for each in bits) for region in range(-(-SIZE_BYTES // REGION_BYTES))]

    def _look_for_what_is_barred(self, expected: Expected, data: bytes) -> None:
        for sector, known in expected.target.items():
            first = next(
                (at for at, (each, _) in enumerate(known) if each and each.held and each.kind == "write"), None
            )
            found = _sector(data, sector)
            if first is None or not any(found):  # zeroes may be anybody's
                continue
            allowed = [content for _, content in expected.mirror.get(sector, known[:1])]
            if found not in allowed and found in [content for _, content in known[first:]]:
                raise Broken(f"sector {sector} of the mirror has what was barred from it")

    def _recover(self, image: Image, older: Image, chance: random.Random, *, again: bool = True) -> None:
        """Start after the cut, as it is or with something lost; and cut the power once more meanwhile."""
        self.recoveries += 1
        how = chance.random() if self.replaceable(image) else 1.0
        begun = self._with_mirror_of(image, older) if how < 0.2 else image
        if 0.1 < how < 0.3:
            files = {path: content for path, content in begun.files.items() if not path.endswith(".intent")}
            begun = dataclasses.replace(begun, files=files)
        run = self._run(begun, 0, script="recovery")
        target, data = run.after.files[self.target_path], self.mirror.data(run.after.files, SIZE_BYTES)
        before = self.content(image.files)
        if target != before:
            raise Broken(f"the recovery has changed the target, sector {_first_difference(target, before)}")
        if data != target:
            lost = "" if how >= 0.3 else ", with an older mirror or without the bitmap"
            raise Broken(f"after the recovery{lost} the disks differ, sector {_first_difference(data, target)}")
        if again and how >= 0.3 and chance.random() < 0.15:
            nothing = Expected(0, before, [])
            for cut, left in self._images(run, 2, chance):
                with self._told(f"then, after record {cut} of {len(run.log)} of the recovery", run, left):
                    self._look(begun, nothing, left, cut)
                    self._recover(left, image, chance, again=False)


def _compare(
    whose: str, content: bytes, base: bytes, choices: dict[int, list[bytes]], others: dict[int, list[bytes]]
) -> None:
    """Each sector must have one of its `choices`; one without has what `base` has, or one of `others`."""
    rest = bytearray(content)
    for sector, allowed in choices.items():
        if _sector(content, sector) not in allowed:
            raise Broken(f"{whose} has lost what was flushed: sector {sector}, {len(allowed)} versions would do")
        at = sector * SECTOR_BYTES
        rest[at : at + SECTOR_BYTES] = base[at : at + SECTOR_BYTES]
    if rest != base:
        for sector in range(len(base) // SECTOR_BYTES):
            found = _sector(rest, sector)
            if found != _sector(base, sector) and found not in others.get(sector, []):
                raise Broken(f"{whose} has something else where nothing was written: sector {sector}")


def _sector(content: bytes | bytearray, sector: int) -> bytes:
    return bytes(content[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES])


def _padded(content: bytes) -> bytes:
    return content.ljust(-(-len(content) // SECTOR_BYTES) * SECTOR_BYTES, b"\0")


def _content(files: dict[str, bytes], suffix: str) -> bytes:
    """The one file with this suffix; nothing if there is none."""
    return next((content for path, content in files.items() if path.endswith(suffix)), b"")


def _sound(page: bytes) -> bool:
    return len(page) == PAGE_BYTES and zlib.crc32(page[4:]) == int.from_bytes(page[:4], "little")


def _first_difference(one: bytes, other: bytes) -> int:
    return (
        next(
            at
            for at in range(0, len(one), SECTOR_BYTES)
            if one[at : at + SECTOR_BYTES] != other[at : at + SECTOR_BYTES]
        )
        // SECTOR_BYTES
    )


def build_recorder(home: Path) -> Path:
    """Compile recorder.c."""
    library = home / "recorder.so"
    source = Path(__file__).with_name("recorder.c")
    run("gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(source))
    return library
