"""What real programs get: a database on an attached volume, qemu-img, cold disks, and disks past the page cache.

All of it on a real file system. The database compares an attached Lockstep with nbdkit without a mirror, attached in
the same way, by the same code.
"""

import argparse
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.fio import measure
from benchmarks.peers import Peer
from benchmarks.processes import BenchmarkError, run, wait_for
from benchmarks.results import Cell, Results
from benchmarks.stage import file_system, in_turn, note, peers_up, prove, real_directory, say, settle
from benchmarks.workloads import COLD_LOADS, DIRECT_LOADS, PGBENCH
from lockstep.service import attach as attaching

ACCOUNT = "postgres"
SCALE_MIB = 16  # what one unit of pgbench's scale takes, roughly
CLIENTS = 8
QEMU_IMG: tuple[tuple[str, list[str], int], ...] = (
    ("qemu-img 4k write", ["-w"], 4 << 10),
    ("qemu-img 4k read", [], 4 << 10),
    ("qemu-img 64k write", ["-w"], 64 << 10),
)
QEMU_IMG_DEPTH = 32
SECTOR_BYTES = 512
UNMOUNT_S = 60
DISK_BYTES_LEAST = 512 << 20


def user_programs() -> dict[str, str]:
    """What is needed beyond the peers' own programs."""
    if os.geteuid() != 0:
        raise BenchmarkError("a file system is mounted for this: it needs root")
    if _postgres_programs() is None:
        raise BenchmarkError("not installed: initdb (Debian package postgresql)")
    return {
        "fincore": "util-linux-extra",
        "qemu-img": "qemu-utils",
        "nbdfuse": "libnbd-bin",
        "mkfs.ext4": "e2fsprogs",
        "runuser": "util-linux",
    }


def measure_users(results: Results, options: argparse.Namespace) -> None:
    """The database first, then the rest on disks of their own."""
    directory = real_directory(options.disk_dir)
    results.settings["disk_dir"] = f"{directory} ({file_system(directory)})"
    options.size = max(options.size, DISK_BYTES_LEAST)
    _measure_database(results, options, directory)
    _measure_disks(results, options, directory)
    if "lockstep" in options.kinds:
        _measure_direct(results, options, directory)


# --- pgbench ---


def _measure_database(results: Results, options: argparse.Namespace, directory: Path) -> None:
    kinds = [kind for kind in options.kinds if kind != "qemu"]
    with peers_up(options, directory, kinds) as peers:
        with ExitStack() as stack:
            databases = {peer.name: stack.enter_context(Database(peer)) for peer in peers}
            for number in range(options.rounds):
                for peer in in_turn(peers, number):
                    settle(peers)
                    tps = databases[peer.name].transactions_s(5 * options.timing.run_s)
                    note(results, Cell(PGBENCH, peer.name, number, "tps", {"tps": tps}))
        prove(results, peers, directory)


class Database:
    """PostgreSQL as Debian has it, with its own settings, on ext4 on an attached peer."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.run_dir = str(peer.home / "run")
        self.mount = peer.home / "mount"
        self.data = self.mount / "data"
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            say(f"a database on {self.peer.name}")
            self._attach(undo)
            self._begin(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._undo.close()

    def transactions_s(self, seconds: float) -> float:
        """Transactions per second of pgbench's own mix, after a checkpoint."""
        self._postgres("psql", *self._where, "--command=CHECKPOINT", ACCOUNT)
        load = [f"--client={CLIENTS}", "--jobs=2", f"--time={seconds:.0f}", "--no-vacuum"]
        said = self._postgres("pgbench", *self._where, *load, ACCOUNT)
        found = re.search(r"^tps = ([\d.]+)", said, re.MULTILINE)
        if not found:
            raise BenchmarkError(f"pgbench on {self.peer.name} said no TPS: {said}")
        return float(found[1])

    def _attach(self, undo: ExitStack) -> None:
        name = self.peer.name
        socket = str(self.peer.home / "socket")
        device = attaching.attach(socket, name, self.run_dir, SECTOR_BYTES).device
        undo.callback(attaching.detach, self.run_dir, name)
        run(["mkfs.ext4", "-q", "-F", device])
        self.mount.mkdir(exist_ok=True)
        run(["mount", device, str(self.mount)])
        undo.callback(wait_for, self._unmounted, UNMOUNT_S, f"{self.mount} not to be in use")

    def _begin(self, undo: ExitStack) -> None:
        self.peer.home.chmod(0o711)
        shutil.chown(self.mount, ACCOUNT)
        self._postgres("initdb", "--auth=trust", "-D", str(self.data))
        options = f"-c listen_addresses='' -c unix_socket_directories={self.mount}"
        # Its log goes to the volume as well: pg_ctl's output would keep our pipe open for as long as the server runs.
        start = ["-D", str(self.data), "-l", str(self.mount / "log"), "-o", options, "-w", "-t", "120", "start"]
        undo.callback(self._end)  # first, for a start that is broken off may have started it
        self._postgres("pg_ctl", *start)
        scale = max(1, self.peer.size_bytes // 4 // (SCALE_MIB << 20))
        self._postgres("pgbench", *self._where, "--initialize", "--quiet", f"--scale={scale}", ACCOUNT)

    def _end(self) -> None:
        if (self.data / "postmaster.pid").exists():
            self._postgres("pg_ctl", "-D", str(self.data), "-m", "fast", "-w", "stop")

    def _unmounted(self) -> bool:
        """Whether it could be unmounted now; programs that were killed may still be ending."""
        try:
            run(["umount", str(self.mount)])
        except BenchmarkError:
            return False
        return True

    @property
    def _where(self) -> list[str]:
        return [f"--host={self.mount}"]

    def _postgres(self, program: str, *arguments: str) -> str:
        programs = _postgres_programs()
        assert programs is not None
        return run(["runuser", "-u", ACCOUNT, "--", str(programs / program), *arguments], cwd=Path("/"))


def _postgres_programs() -> Path | None:
    """Debian keeps the programs of each version in a place of their own, off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


# --- qemu-img, and cold caches ---


def _measure_disks(results: Results, options: argparse.Namespace, directory: Path) -> None:
    kinds = [kind for kind in options.kinds if kind != "bare"]
    with peers_up(options, directory, kinds) as peers:
        for number in range(options.rounds):
            for index, (row, words, block_bytes) in enumerate(QEMU_IMG):
                for peer in in_turn(peers, number + index):
                    settle(peers)
                    iops = _qemu_img(peer, words, block_bytes)
                    note(results, Cell(row, peer.name, number, "iops", {"iops": iops}))
            for index, loads in enumerate(COLD_LOADS):
                for peer in in_turn(peers, number + index):
                    settle(peers)
                    _forget(peers)
                    note(results, *measure(peer, number, options.timing, *loads))
            for peer in peers:
                peer.await_in_sync()
        prove(results, peers, directory)


def _qemu_img(peer: Peer, words: list[str], block_bytes: int) -> float:
    """Requests per second of QEMU's own block layer as the client: sequential, over half of the disk."""
    count = peer.size_bytes // 2 // block_bytes
    load = ["-f", "raw", *words, "-c", str(count), "-d", str(QEMU_IMG_DEPTH), "-s", str(block_bytes), peer.uri]
    said = run(["qemu-img", "bench", *load])
    found = re.search(r"completed in ([\d.]+) seconds", said)
    if not found:
        raise BenchmarkError(f"qemu-img bench on {peer.name} said no time: {said}")
    return count / float(found[1])


def _measure_direct(results: Results, options: argparse.Namespace, directory: Path) -> None:
    """Each load through the page cache and past it, and what of the two disks is in it afterwards."""
    kinds = ["lockstep", "direct", *(["qemu-direct"] if "qemu" in options.kinds else [])]
    with peers_up(options, directory, kinds) as peers:
        for number in range(options.rounds):
            for index, load in enumerate(DIRECT_LOADS):
                for peer in in_turn(peers, number + index):
                    settle(peers)
                    _forget(peers)
                    note(results, *measure(peer, number, options.timing, load, row=f"disk, {load.name}"))
                    cached = {"bytes": float(_cached_bytes(peer))}
                    note(results, Cell(f"page cache after {load.name}", peer.name, number, "bytes", cached))
            for peer in peers:
                peer.await_in_sync()
        prove(results, peers, directory)


def _cached_bytes(peer: Peer) -> int:
    """How much of a peer's two disks is in the page cache."""
    files = [str(disk) for disk in (peer.target, peer.mirror)]
    return sum(map(int, run(["fincore", "--bytes", "--noheadings", "--output=RES", *files]).split()))


def _forget(peers: Sequence[Peer]) -> None:
    """Have the kernel forget what it has cached of the disks: written back first, for only that can be forgotten."""
    for disk in [disk for peer in peers for disk in (peer.target, peer.mirror) if disk.exists()]:
        fd = os.open(disk, os.O_RDWR)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
