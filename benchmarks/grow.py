"""Cost against size: volumes, regions that differ, connections; start-up, memory; memory under a hostile client.

Each series changes one thing. Its first point is what the others are compared with: within 10 % it is flat.

A terabyte is not copied for this. The volumes are sparse, and the records are written beforehand as a server would
have left them: with nothing marked, the mirror counts as in sync; with every tenth region marked, a crash is
recovered from. So nothing is shown here of what is on the mirror, and no start compares it with the target. What is
loaded is the last GiB of the volume, filled beforehand, so that neither file system has to find space meanwhile.
"""

import argparse
import contextlib
import os
import socket
import time
from collections.abc import Iterator

from benchmarks.client import READ, WRITE, RawClient
from benchmarks.fio import measure
from benchmarks.peers import Lockstep, Peer
from benchmarks.processes import BenchmarkError
from benchmarks.results import Cell, Results
from benchmarks.sparse import UNCHECKED, write_records
from benchmarks.stage import in_turn, note, peers_up, require_space, scratch_directory, settle
from benchmarks.workloads import Workload
from lockstep.crypto.luks import read_header
from lockstep.nbd.payload import DEFAULT_LIMIT_BYTES, SMALL_LIMIT_BYTES
from lockstep.volume.regions import region_bytes_for

GIB = 1 << 30
LOADED_BYTES = GIB
FLAT = 0.10

WRITES = Workload("4k-randwrite-qd32", "randwrite", 4 << 10, 32)
VOLUME_SIZES = {"volume 1 GiB": GIB, "volume 64 GiB": 64 * GIB, "volume 1 TiB": 1024 * GIB}
MARKED_PERCENT = {"differs 0 %": 0, "differs 10 %": 10, "differs 50 %": 50}
MARKED_SIZE = 64 * GIB  # large enough for the copy to outlast the measurement
CONNECTIONS = {
    f"connections {number}": Workload(f"connections {number}", "randwrite", 4 << 10, 64 // number, connections=number)
    for number in (1, 4, 16, 64)
}

HOSTILE_CONNECTIONS = 100
HOSTILE_BYTES = 32 << 20
HOSTILE_S = 10.0


def measure_growth(results: Results, options: argparse.Namespace) -> None:
    """All series, then what they say."""
    for number in range(options.rounds):
        _sizes(results, options, number)
        _marked(results, options, number)
    _connections(results, options)
    _hostile(results, options)
    for series in (VOLUME_SIZES, MARKED_PERCENT, CONNECTIONS):
        results.notes += flatness(results, list(series))


def flatness(results: Results, series: list[str]) -> list[str]:
    """A sentence for each point after the first: how its IOPS compare with the first's."""
    sentences = []
    for peer in results.peers:
        known = {row: spread.median for row in series if (spread := results.of(peer, row, "iops"))}
        if series[0] not in known:
            continue
        for row in [row for row in series[1:] if row in known]:
            ratio = known[row] / known[series[0]]
            verdict = "flat" if abs(ratio - 1) <= FLAT else "not flat"
            sentences.append(f"{peer}: {row} gives {ratio:.2f}x of {series[0]}: {verdict}")
    return sentences


# --- the series ---


def _sizes(results: Results, options: argparse.Namespace, number: int) -> None:
    for row in in_turn(list(VOLUME_SIZES), number):
        with _sparse(options, VOLUME_SIZES[row], 0) as lockstep:
            began_s = time.monotonic()
            lockstep.serve()
            start_s = time.monotonic() - began_s
            _require_marked(lockstep, 0)
            note(results, Cell(f"start-up, {row}", lockstep.name, number, "s", {"s": start_s}))
            _load(results, options, lockstep, number, row)
            _now, most = lockstep.server.memory_bytes()
            note(results, Cell(f"memory, {row}", lockstep.name, number, "bytes", {"bytes": most}))


def _marked(results: Results, options: argparse.Namespace, number: int) -> None:
    for row in in_turn(list(MARKED_PERCENT), number):
        with _sparse(options, MARKED_SIZE, MARKED_PERCENT[row]) as lockstep:
            lockstep.serve()
            _require_marked(lockstep, MARKED_PERCENT[row])
            _load(results, options, lockstep, number, row)
            if MARKED_PERCENT[row] and not lockstep.mirror_status()["dirty_bytes"]:
                results.notes.append(f"{row}, round {number + 1}: the copy ended before the measurement did")


def _connections(results: Results, options: argparse.Namespace) -> None:
    """The same 64 requests in flight, over more and more connections; nbdkit shows what this costs the client."""
    with peers_up(options, options.dir, ["lockstep", "nbdkit"]) as peers:
        for number in range(options.rounds):
            for index, (row, workload) in enumerate(CONNECTIONS.items()):
                for peer in in_turn(peers, number + index):
                    settle(peers)
                    note(results, *measure(peer, number, options.timing, workload, row=row))


def _load(results: Results, options: argparse.Namespace, lockstep: Lockstep, number: int, row: str) -> None:
    span = (lockstep.size_bytes - LOADED_BYTES, LOADED_BYTES)
    note(results, *measure(lockstep, number, options.timing, WRITES, row=row, span=span))


class _Unchecked(Lockstep):
    """Lockstep without the spot check of a start."""

    def _command(self, *arguments: str) -> list[str]:
        *program, _module, _name = super()._command()
        return [*program, "-c", UNCHECKED, *arguments]


@contextlib.contextmanager
def _sparse(options: argparse.Namespace, size_bytes: int, marked_percent: int) -> Iterator[Lockstep]:
    """A volume that is not served yet; the last GiB of it is filled, and so many of its regions are marked."""
    with scratch_directory(options.dir) as scratch, contextlib.ExitStack() as stack:
        lockstep = _Unchecked(scratch, size_bytes, options.sectors[0])
        # What is copied to the mirror during a measurement takes space as well.
        require_space(scratch, 3 * LOADED_BYTES + (12 * GIB if marked_percent else 0))
        with lockstep.target.open("wb") as target:
            target.truncate(size_bytes)
        lockstep.create(preallocated=False)
        for disk, offset in ((lockstep.target, 0), (lockstep.mirror, lockstep.mirror.stat().st_size - size_bytes)):
            with disk.open("rb+") as file:
                os.posix_fallocate(file.fileno(), offset + size_bytes - LOADED_BYTES, LOADED_BYTES)
        _mark(lockstep, marked_percent)
        stack.callback(lockstep.kill)
        yield lockstep


def _require_marked(lockstep: Lockstep, percent: int) -> None:
    """Raise unless the server believes the bitmap: else it would copy the whole terabyte."""
    dirty_bytes = int(lockstep.mirror_status()["dirty_bytes"])
    if dirty_bytes > lockstep.size_bytes * percent // 100:
        raise BenchmarkError(f"{dirty_bytes >> 20} MiB of {lockstep.name} differ, where {percent} % should")


def _mark(lockstep: Lockstep, percent: int) -> None:
    """Write the records: so many regions marked, spread evenly over all but what is loaded, and nothing held."""
    region_bytes = region_bytes_for(lockstep.size_bytes)
    loaded_from = (lockstep.size_bytes - LOADED_BYTES) // region_bytes
    count = -(-lockstep.size_bytes // region_bytes)
    marked = bytes(percent and region < loaded_from and region * percent % 100 < percent for region in range(count))
    write_records(lockstep.state, read_header(str(lockstep.mirror)), marked)


# --- a client that asks for much and takes nothing ---


def _hostile(results: Results, options: argparse.Namespace) -> None:
    """The most memory that the server takes while 100 connections send 32 MiB requests and read no replies."""
    allowed = (DEFAULT_LIMIT_BYTES + SMALL_LIMIT_BYTES) >> 20
    for kind, row in ((READ, "100 x 32 MiB reads, unread"), (WRITE, "100 x 32 MiB writes, unread")):
        with peers_up(options, options.dir, ["lockstep"]) as peers:
            for peer in peers:
                idle, _ = peer.server.memory_bytes()
                _press(peer, kind)
                _now, most = peer.server.memory_bytes()
                note(results, Cell(f"memory, {row}", peer.name, 0, "bytes", {"bytes": most, "idle_bytes": idle}))
                grown = f"from {idle >> 20} to at most {most >> 20} MiB; its pools allow {allowed} more"
                results.notes.append(f"{peer.name}: {row}: {grown}")


def _press(peer: Peer, kind: int) -> None:
    """Send what the sockets take, for a while; then see that an orderly client is still answered."""
    payload = bytes(HOSTILE_BYTES)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(RawClient(peer.uri))) for _ in range(HOSTILE_CONNECTIONS)]
        pending = {}
        for number, client in enumerate(clients):
            client.socket.setblocking(False)
            offset = number * HOSTILE_BYTES % (peer.size_bytes - HOSTILE_BYTES)
            request = client.request(kind, offset, HOSTILE_BYTES)
            pending[client] = memoryview(request * 64 if kind == READ else request + payload)
        deadline = time.monotonic() + HOSTILE_S
        while time.monotonic() < deadline:
            for client, data in pending.items():
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    pending[client] = data[client.socket.send(data) :] if data else data
            time.sleep(0.01)
        orderly = stack.enter_context(contextlib.closing(RawClient(peer.uri)))
        orderly.write(0, bytes(4096))
        for client in clients:
            with contextlib.suppress(OSError):
                client.socket.shutdown(socket.SHUT_RDWR)
