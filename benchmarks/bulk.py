"""The rates of Lockstep's copies of a whole disk, beside those of the steps that a copy cannot do without.

The steps are a sequential read, encryption, and a sequential write, in pieces of 1 MiB, each alone and in one thread;
the rate of the slowest is the measure. A restore makes a new file, so that is what it is measured by. All of it happens
in one round, one after the other.
"""

import argparse
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.client import RawClient
from benchmarks.peers import LUKS_HEADER_BYTES, Lockstep
from benchmarks.processes import POLL_S, BenchmarkError
from benchmarks.results import Cell, Results
from benchmarks.stage import in_turn, make_random, note, require_space, scratch_directory
from lockstep.buffers import page_aligned
from lockstep.crypto.cipher import XtsCipher

PIECE_BYTES = 1 << 20
LOOK_S = 0.025  # each look costs the server a millisecond


def measure_copies(results: Results, options: argparse.Namespace) -> None:
    """Initial sync, resync, verify and restore, for each sector size."""
    size_bytes: int = options.bulk_size
    with scratch_directory(options.dir) as scratch:
        require_space(scratch, 3 * (size_bytes + LUKS_HEADER_BYTES))
        target = scratch / "target"
        make_random(target, size_bytes)
        for number in range(options.bulk_rounds):
            for sector_bytes in in_turn(options.sectors, number):
                home = scratch / f"lockstep-{sector_bytes}"
                home.mkdir()
                lockstep = Lockstep(home, size_bytes, sector_bytes)
                lockstep.target = target
                try:
                    _measure(results, lockstep, number)
                finally:
                    lockstep.kill()
                    shutil.rmtree(home)


def _measure(results: Results, lockstep: Lockstep, number: int) -> None:
    floors = {
        "read_bytes_s": _rate(lockstep.size_bytes, _read, lockstep.target),
        "xts_bytes_s": _rate(lockstep.size_bytes, _encrypt, lockstep.size_bytes, lockstep.sector_bytes),
        "write_bytes_s": _write_rate(lockstep, made=True),
    }

    def rate(row: str, bytes_s: float | None, steps: dict[str, float] = floors) -> None:
        if bytes_s is None:
            results.notes.append(f"{row} was over before it could be measured: choose a larger --bulk-size")
            return
        figures = {"bytes_s": bytes_s, "share": bytes_s / min(steps.values()), **steps}
        note(results, Cell(row, lockstep.name, number, "bytes_s", figures))

    lockstep.create()
    _write_all(lockstep.mirror, LUKS_HEADER_BYTES, lockstep.size_bytes)  # its memory is the machine's from here on
    lockstep.serve()
    rate("initial-sync", _copied(lockstep))
    _make_half_dirty(lockstep)
    lockstep.server.kill()
    lockstep.serve()
    rate("resync", _copied(lockstep))
    start_up_s = min(_seconds(lockstep.lockstep, "list") for _ in range(3))
    rate("verify", lockstep.size_bytes / (_seconds(_verify, lockstep) - start_up_s))
    lockstep.stop()
    anew = {"write_bytes_s": _write_rate(lockstep, made=False)}
    rate("restore", _second(_restored, lockstep), floors | anew)


def _copied(lockstep: Lockstep) -> float | None:
    """Bytes per second of a copy that has just begun, between the first and the last look at it that found it busy.

    None if there were not enough of these. The flush and the token that follow are not in it: they cost
    as much after a small copy as after a large one.
    """
    looks: list[tuple[float, int]] = []
    while dirty_bytes := int(lockstep.mirror_status()["dirty_bytes"]):
        looks.append((time.monotonic(), dirty_bytes))
        time.sleep(LOOK_S)
    lockstep.await_in_sync()
    if len(looks) < 3:
        return None
    (began_s, first_bytes), (ended_s, last_bytes) = looks[0], looks[-1]
    return (first_bytes - last_bytes) / (ended_s - began_s)


def _restored(lockstep: Lockstep) -> float:
    """Bytes per second of a restore, from the first byte of its output to the end of the command."""
    output = lockstep.home / "restored"
    with ThreadPoolExecutor(1) as worker:
        work = worker.submit(lockstep.restore, output)
        while not work.done() and not (output.exists() and output.stat().st_blocks):
            time.sleep(POLL_S)
        began_s = time.monotonic()
        work.result()
    rate = lockstep.size_bytes / (time.monotonic() - began_s)
    output.unlink()
    return rate


def _make_half_dirty(lockstep: Lockstep) -> None:
    """Write to every other MiB, so that the server that is killed next leaves a good half of the disk to be copied."""
    with contextlib.closing(RawClient(lockstep.uri)) as client:
        for offset in range(0, lockstep.size_bytes, 2 << 20):
            client.write(offset, os.urandom(4096))


def _verify(lockstep: Lockstep) -> None:
    said = json.loads(lockstep.lockstep("verify", lockstep.name, "--json"))
    if said["mismatches"] or said["compared_bytes"] != lockstep.size_bytes:
        raise BenchmarkError(f"{lockstep.name}: verify compared {said['compared_bytes']} bytes: {said['mismatches']}")


def _read(path: Path) -> None:
    piece = page_aligned(PIECE_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass


def _encrypt(size_bytes: int, sector_bytes: int) -> None:
    cipher = XtsCipher(os.urandom(64), sector_bytes)
    plain, secret = page_aligned(PIECE_BYTES), page_aligned(PIECE_BYTES)
    for offset in range(0, size_bytes, PIECE_BYTES):
        cipher.encrypt_into(offset // 512, plain, secret)


def _second(measure: Callable[..., float], *arguments: object) -> float:
    """Measure twice: at the first attempt a virtual machine gets memory from its host, which is nobody's rate."""
    measure(*arguments)
    return measure(*arguments)


def _write_rate(lockstep: Lockstep, *, made: bool) -> float:
    size_bytes, path = lockstep.size_bytes, lockstep.home / "written"
    return _second(lambda: _rate(size_bytes, _writer(path, size_bytes, made=made)))


def _writer(path: Path, size_bytes: int, *, made: bool) -> Callable[[], None]:
    """A function that writes a new file, or one whose space is there already, as the mirror's is; and flushes it."""
    with path.open("wb") as file:
        if made:
            os.posix_fallocate(file.fileno(), 0, size_bytes)

    def write() -> None:
        _write_all(path, 0, size_bytes)
        path.unlink()

    return write


def _write_all(path: Path, offset: int, length: int) -> None:
    piece = os.urandom(PIECE_BYTES)
    with path.open("rb+", buffering=0) as file:
        file.seek(offset)
        for _ in range(length // PIECE_BYTES):
            file.write(piece)
        os.fsync(file.fileno())


def _rate(size_bytes: int, step: Callable[..., None], *arguments: object) -> float:
    return size_bytes / _seconds(step, *arguments)


def _seconds(step: Callable[..., object], *arguments: object) -> float:
    began_s = time.monotonic()
    step(*arguments)
    return time.monotonic() - began_s
