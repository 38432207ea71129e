"""Kill -9 of the real server while somebody writes, and the next start: what it copies, and how the disks end.

What may be copied is read from the intent bitmap that the dead server has left; what is copied, from the next server's
log. The writer is fio, which verifies what it reads back meanwhile, or a file system, whose files must be there
afterwards if they were synced.
"""

import contextlib
import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.lab import Lab, Served, Volume, run, wait_until

REGION_BYTES: Final = 64 << 10
_MARKS_AT: Final = 512 + 4  # the bits of the first page, which is the only one up to 254 MiB


def marks(lab: Lab) -> bytes:
    """The bits of the only bitmap of a lab."""
    bitmap = next((lab.state / "intent").glob("*.intent"))
    return bitmap.read_bytes()[_MARKS_AT:1024]


def marked_bytes(lab: Lab) -> int:
    """How much of the disk the bitmap says may differ."""
    return sum(byte.bit_count() for byte in marks(lab)) * REGION_BYTES


def copied_bytes(served: Served) -> int:
    """What this server's log says that it copied at its start."""
    lines = [line for line in served.log.read_text().splitlines() if " bytes to mirror " in line]
    return int(lines[-1].split("copying ")[1].split()[0]) if lines else 0


def assert_recovers(volume: Volume, most_bytes: int) -> int:
    """Start again after a crash: copies at most so much, and the disks end equal. Returns what was copied."""
    log = volume.lab.home / f"{volume.name}.log"
    log.write_text("")
    with volume.served() as served:
        copied = copied_bytes(served)
        assert copied <= most_bytes, f"{copied} bytes were copied, {most_bytes} could differ"
    volume.assert_equal_disks()
    return copied


def start_fio(served: Served, said: Path, seed: int, span_bytes: int) -> "subprocess.Popen[bytes]":
    """Write at random within the first `span_bytes`, many at a time, until killed; half of it is verified meanwhile.

    What fio verifies it must write in blocks of one size: it gets confused by its own overlapping ones.
    """
    common = {
        "ioengine": "nbd",
        "uri": served.uri,
        "rw": "randwrite",
        "iodepth": 16,
        "size": span_bytes // 2,
        "randseed": seed,
        "time_based": 1,
        "runtime": 600,
        "thread": 1,
        "fsync": 50,
    }
    verified = {"name": "verified", "bs": 4096, "verify": "crc32c", "verify_backlog": 64, "verify_fatal": 1}
    ragged = {"name": "ragged", "bsrange": "512-128k", "bs_unaligned": 1, "norandommap": 1, "offset": span_bytes // 2}
    options = [*common.items(), *verified.items(), *ragged.items()]
    with said.open("wb") as output:
        arguments = [f"--{name}={value}" for name, value in options]
        return subprocess.Popen(["fio", *arguments], stdout=output, stderr=output, cwd=served.volume.lab.home)


def kill_under_fio(volume: Volume, chance: random.Random, span_bytes: int) -> int:
    """Kill the server at a random moment of fio's work within the first `span_bytes`; returns what was copied then."""
    said = volume.lab.home / "fio.out"
    with volume.served() as served:
        before = volume.target.read_bytes()
        writer = start_fio(served, said, chance.getrandbits(31), span_bytes)
        try:
            wait_until(lambda: volume.target.read_bytes() != before, "fio to have written")
            time.sleep(chance.random())  # the moment of death is what varies
            assert writer.poll() is None, said.read_text()
            served.kill()
        finally:
            writer.kill()
            writer.wait()
    assert not re.search("verify: |verify failed", said.read_text(errors="replace")), said.read_text(errors="replace")
    marked = marked_bytes(volume.lab)
    assert marked <= span_bytes + 16 * REGION_BYTES, f"{marked} bytes are marked, {span_bytes} were written to"
    return assert_recovers(volume, marked)


class Scribbler:
    """Writes files and syncs them, until it cannot; what was synced must be there for ever after."""

    def __init__(self, directory: Path, chance: random.Random) -> None:
        self.synced: dict[str, bytes] = {}
        self._directory = directory
        self._chance = chance
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        """Wait for the end, which comes when the device is gone."""
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            for number in range(100_000):
                name = f"file{number % 50}"
                data = self._chance.randbytes(self._chance.randint(1, 60_000))
                self.synced.pop(name, None)  # until it is synced again, old and new are both right
                with (self._directory / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                self.synced[name] = data


@contextlib.contextmanager
def mounted(device: Path | str, where: Path, *options: str) -> Iterator[Path]:
    """A file system; unmounted in the end even when its device is gone."""
    where.mkdir(exist_ok=True)
    run("mount", *options, str(device), str(where))
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], capture_output=True, check=False)


def kill_under_file_system(volume: Volume, chance: random.Random) -> int:
    """Kill the server at a random moment of a file system's life; returns what was copied then.

    Makes the file system if there is none. Afterwards it is sound, on the target and on the mirror, which are equal,
    and has every file that was synced.
    """
    with volume.served() as served:
        device = volume.lab.lockstep("attach", volume.name).ok().strip()
        try:
            if "TYPE=ext4" not in run("blkid", "--probe", "--output", "export", device, check=False):
                run("mkfs.ext4", "-q", "-F", device)
            with mounted(device, volume.lab.home / "mnt") as directory:
                scribbler = Scribbler(directory, chance)
                try:
                    wait_until(lambda: len(scribbler.synced) > 3, "files to have been synced")
                    time.sleep(chance.random())
                finally:
                    served.kill()
                    scribbler.join()
        finally:
            volume.lab.lockstep("detach", volume.name)
    copied = assert_recovers(volume, marked_bytes(volume.lab))
    image = volume.lab.home / "image"
    shutil.copyfile(volume.target, image)
    with mounted(image, volume.lab.home / "mnt", "-o", "loop") as directory:  # which replays the journal
        lost = [name for name, data in scribbler.synced.items() if (directory / name).read_bytes() != data]
        assert not lost, f"{len(lost)} of {len(scribbler.synced)} synced files are lost or have changed: {lost}"
        run("umount", str(directory))
    run("e2fsck", "-fn", str(image))
    return copied
