"""How fast `lockstep restore` is beside what it consists of: `python -m benchmarks.restore --help`.

In each round, in turn: the mirror read from end to end, as much decrypted in memory, as much written to a new file and
synced, each by one thread; and the restore, from its first byte to its result, synced too. The mirror is full of noise:
nothing can be skipped. The reach is a ratio to the slowest of the three, of the same run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lockstep.buffers import page_aligned
from lockstep.crypto.cipher import XtsCipher

CHUNK_BYTES = 1 << 20
HEADER_BYTES = 16 << 20
REACH = 0.7
PARTS = ("read", "xts", "write")


def main() -> int:
    """Measure in each directory, print ratios; 1 where a reach was missed under --check."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restore", description=__doc__)
    parser.add_argument("--dir", type=Path, action="append", help="where the disks live; may be repeated")
    parser.add_argument("--mib", type=int, default=1024, help="size of the disk in MiB (default: 1024)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--sectors", type=int, action="append", help="encryption sector (default: 512 and 4096)")
    parser.add_argument("--check", action="store_true", help=f"exit 1 unless every ratio is at least {REACH}")
    options = parser.parse_args()
    reached = True
    for directory in options.dir or [Path("/dev/shm"), Path("/var/tmp")]:
        for sector_bytes in options.sectors or [512, 4096]:
            with tempfile.TemporaryDirectory(prefix="lockstep-bench-", dir=directory) as scratch:
                ratio = _measure(Path(scratch), options.mib * CHUNK_BYTES, sector_bytes, options.rounds)
            print(f"    {ratio:.2f}x the slowest part; reach {REACH}x: {'PASS' if ratio >= REACH else 'short'}")
            reached = reached and ratio >= REACH
    return 1 if options.check and not reached else 0


def _measure(home: Path, size_bytes: int, sector_bytes: int, rounds: int) -> float:
    mirror, key, output = home / "mirror", home / "key", home / "output"
    _make_mirror(home, mirror, key, size_bytes, sector_bytes)
    parts: dict[str, Callable[[], float]] = {
        "read": lambda: _timed(lambda: _read(mirror)),
        "xts": lambda: _timed(lambda: _decrypt(size_bytes, sector_bytes)),
        "write": lambda: _timed(lambda: _write(output, size_bytes)),
        "restore": lambda: _restore(mirror, key, output),
    }
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, run in parts.items():
            output.unlink(missing_ok=True)
            os.sync()
            taken[name].append(run())
    medians = {name: statistics.median(times) for name, times in taken.items()}
    slowest = max(PARTS, key=lambda name: medians[name])
    rates = "  ".join(f"{name} {size_bytes / (1 << 20) / medians[name]:.0f}" for name in parts)
    print(f"{home.parent}, {size_bytes >> 20} MiB, {sector_bytes}-byte sectors, MiB/s: {rates}; slowest: {slowest}")
    return medians[slowest] / medians["restore"]


def _make_mirror(home: Path, mirror: Path, key: Path, size_bytes: int, sector_bytes: int) -> None:
    target = home / "target"
    target.touch()
    os.truncate(target, size_bytes)
    key.write_text("benchmark")
    disks = ["--target", str(target), "--mirror", str(mirror), "--sector-size", str(sector_bytes)]
    _lockstep(home, "create", "bench", *disks, "--key-file", str(key), "--iter-time", "100")
    with mirror.open("rb+") as file:
        file.seek(HEADER_BYTES)
        for _ in range(size_bytes // CHUNK_BYTES):
            file.write(os.urandom(CHUNK_BYTES))


def _command(home: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "lockstep", "--state-dir", str(home / "state"), *arguments]


def _lockstep(home: Path, *arguments: str) -> None:
    subprocess.run(_command(home, *arguments), check=True, stdout=subprocess.DEVNULL)


def _timed(work: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def _forget(path: Path) -> None:
    """Have the file read from its disk, not from memory; in RAM there is no difference."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _read(path: Path) -> None:
    _forget(path)
    buffer = page_aligned(CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _decrypt(size_bytes: int, sector_bytes: int) -> None:
    cipher, buffer = XtsCipher(os.urandom(64), sector_bytes), page_aligned(CHUNK_BYTES)
    for number in range(size_bytes // CHUNK_BYTES):
        cipher.decrypt_into(number * CHUNK_BYTES // 512, buffer, buffer)


def _write(path: Path, size_bytes: int) -> None:
    chunk = os.urandom(CHUNK_BYTES)
    with path.open("wb", buffering=0) as file:
        for _ in range(size_bytes // CHUNK_BYTES):
            file.write(chunk)
        os.fdatasync(file.fileno())


def _restore(mirror: Path, key: Path, output: Path) -> float:
    """Seconds from the first progress line, when the key is known, to the result; no registry knows the mirror."""
    _forget(mirror)
    command = _command(mirror.parent / "elsewhere", "restore", str(mirror), str(output), "--key-file", str(key))
    with subprocess.Popen([*command, "--incomplete", "--json"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        began_s = ended_s = 0.0
        for line in process.stdout:
            now_s = time.perf_counter()
            began_s = began_s or now_s
            if "restored_bytes" in json.loads(line):
                ended_s = now_s
    if process.returncode:
        raise SystemExit(f"the restore ended with {process.returncode}")
    return ended_s - began_s


if __name__ == "__main__":
    sys.exit(main())
