"""A stage: peers that are up together, with equal disks in one directory, and are loaded in turn.

Round by round, row by row, in an order that rotates: what drifts on the machine drifts for all of them, and no one is
always first.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from benchmarks.fio import measure
from benchmarks.peers import LUKS_HEADER_BYTES, Bare, Lockstep, Nbdkit, Peer, Qemu
from benchmarks.processes import BenchmarkError, run
from benchmarks.results import Cell, Results
from benchmarks.workloads import Workload

KINDS: dict[str, type[Peer]] = {"lockstep": Lockstep, "bare": Bare, "nbdkit": Nbdkit, "qemu": Qemu}
CHUNK_BYTES = 1 << 20
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")

T = TypeVar("T")


def load_all(results: Results, options: argparse.Namespace, directory: Path, workloads: Sequence[Workload]) -> None:
    """Load every peer with every workload, each alone; then have the peers prove what they were measured at."""
    with peers_up(options, directory, options.kinds) as peers:
        for number in range(options.rounds):
            for index, workload in enumerate(workloads):
                for peer in in_turn(peers, number + index):
                    settle(peers)
                    note(results, *measure(peer, number, options.timing, workload))
            for peer in peers:
                peer.await_in_sync()
        prove(results, peers, directory)


def prove(results: Results, peers: Sequence[Peer], directory: Path) -> None:
    """Note what each peer shows; a difference raises."""
    for peer in peers:
        results.proofs[f"{peer.name} in {directory}"] = peer.prove()


@contextmanager
def peers_up(options: argparse.Namespace, directory: Path, kinds: Sequence[str]) -> Iterator[list[Peer]]:
    """Peers with disks of `options.size`, their servers running, their mirrors in sync."""
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_directory(directory))
        peers = _peers(kinds, options.sectors, options.size, scratch)
        _make_targets(peers, options.size)
        for peer in peers:
            say(f"starting {peer.name} in {directory}")
            stack.enter_context(peer)
        for peer in peers:
            peer.await_in_sync()
        yield peers


@contextmanager
def scratch_directory(directory: Path) -> Iterator[Path]:
    """A place for disks, gone afterwards. Others may pass through it: a database server has an account of its own."""
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-", dir=directory) as scratch:
        Path(scratch).chmod(0o711)
        yield Path(scratch)


def in_turn(them: Sequence[T], number: int) -> list[T]:
    """All of them, another one first each time."""
    first = number % len(them)
    return [*them[first:], *them[:first]]


def settle(peers: Sequence[Peer], limit_s: float = 10) -> None:
    """Wait until no server works off what the last cell left behind: that would be charged to the next peer."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        before_s = sum(peer.server.cpu_s() for peer in peers)
        time.sleep(0.2)
        if sum(peer.server.cpu_s() for peer in peers) - before_s < 0.02:
            return
    say(f"the servers were still busy after {limit_s:g} s without load")


def note(results: Results, *cells: Cell) -> None:
    """Keep cells, and show that something happens."""
    for cell in cells:
        results.cells.append(cell)
        say(f"round {cell.round + 1}  {cell.row:40} {cell.peer:14} {cell.headline} {cell.figures[cell.headline]:,.4g}")


def say(line: str) -> None:
    """Progress is no result: it goes to stderr."""
    print(line, file=sys.stderr, flush=True)


# --- where disks live ---


def real_directory(given: Path | None) -> Path:
    """Where a flush means something: `given`, or the first usual place on a real file system."""
    places = [given] if given else [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    for place in places:
        if file_system(place) not in MEMORY_FILE_SYSTEMS:
            return place
    where = " and ".join(f"{place} ({file_system(place)})" for place in places)
    raise BenchmarkError(f"a flush costs nothing in memory: {where}. Give --disk-dir on a real file system.")


def file_system(place: Path) -> str:
    """The type of the file system that a directory is on."""
    return run(["findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(place)]).strip()


def _peers(kinds: Sequence[str], sectors: Sequence[int], size_bytes: int, scratch: Path) -> list[Peer]:
    peers: list[Peer] = []
    for kind in kinds:
        if kind == "lockstep":
            peers += [Lockstep(scratch / f"lockstep-{size}", size_bytes, size) for size in sectors]
        elif kind == "direct":
            peers.append(Lockstep(scratch / kind, size_bytes, sectors[0], direct=True))
        elif kind == "bare":
            peers += [Bare(scratch / f"bare-{size}", size_bytes, size) for size in sectors]
        elif kind == "nbdkit":
            peers.append(Nbdkit(scratch / kind, size_bytes))
        else:
            peers.append(Qemu(scratch / kind, size_bytes, direct=kind == "qemu-direct"))
    return peers


def _make_targets(peers: Sequence[Peer], size_bytes: int) -> None:
    """Write the same random bytes to every target: no hole to fill, no zero to skip, nothing alike to compress."""
    disks = sum(1 + peer.mirrors for peer in peers) + 1  # one more for what is restored
    require_space(peers[0].home.parent, disks * (size_bytes + LUKS_HEADER_BYTES))
    for peer in peers:
        peer.home.mkdir()
    first, *others = (peer.target for peer in peers)
    make_random(first, size_bytes)
    for other in others:
        shutil.copyfile(first, other)


def make_random(path: Path, size_bytes: int) -> None:
    """A file of random bytes."""
    with path.open("wb") as file:
        for _ in range(size_bytes // CHUNK_BYTES):
            file.write(os.urandom(CHUNK_BYTES))


def require_space(place: Path, needed_bytes: int) -> None:
    """Refuse to begin what would end with a full disk."""
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise BenchmarkError(f"needs {needed_bytes >> 20} MiB in {place.parent}, {free_bytes >> 20} are free")
