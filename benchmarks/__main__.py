"""Run the benchmark: `python -m benchmarks --help`.

All servers are up for the whole run and are loaded in turn: round by round, workload by workload, the peers in an
order that rotates. What drifts on the machine then drifts for all of them, and no one is always first.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.fio import Timing, check_engine, measure
from benchmarks.machine import machine, versions
from benchmarks.peers import LUKS_HEADER_BYTES, Lockstep, Nbdkit, Peer, Qemu
from benchmarks.processes import BenchmarkError, require
from benchmarks.report import Results, show, write_json
from benchmarks.workloads import WORKLOADS

KINDS: dict[str, type[Peer]] = {"lockstep": Lockstep, "nbdkit": Nbdkit, "qemu": Qemu}
SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
CHUNK_BYTES = 1 << 20


def main() -> int:
    """Parse, run, report; 0 when it ran, 1 when it could not, or was short under --check."""
    options = _options()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        results = _run(options)
    except BenchmarkError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    write_json(results, options.json)
    show(results)
    return 1 if options.check and not results.all_reached() else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--peers", type=_kinds, default=list(KINDS), help=f"which of {','.join(KINDS)} (default: all)")
    parser.add_argument(
        "--sectors",
        type=_sectors,
        default=[512],
        help="encryption sectors of lockstep; each is a peer: 512, 4096 or 512,4096 (default: 512)",
    )
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where the disks live (default: /dev/shm)")
    parser.add_argument("--size", type=_size, help="of each target (default: 512M; 128M when quick)")
    parser.add_argument("--rounds", type=int, help="(default: 5; 1 when quick)")
    parser.add_argument("--seconds", type=float, help="counted per cell (default: 3; 1 when quick)")
    parser.add_argument("--quick", action="store_true", help="a look in under a minute, not a result")
    parser.add_argument("--check", action="store_true", help="exit 1 unless every reach row is measured and met")
    default = Path(__file__).parent / "results" / "latest.json"
    parser.add_argument("--json", type=Path, default=default, help="(default: benchmarks/results/latest.json)")
    options = parser.parse_args()
    size_bytes, rounds, seconds = (128 << 20, 1, 1.0) if options.quick else (512 << 20, 5, 3.0)
    options.size = options.size or size_bytes
    options.rounds = options.rounds or rounds
    options.seconds = options.seconds or seconds
    return options


def _kinds(text: str) -> list[str]:
    words = text.split(",")
    if unknown := set(words) - set(KINDS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
    return [kind for kind in KINDS if kind in words]


def _sectors(text: str) -> list[int]:
    words = text.split(",")
    if not set(words) <= {"512", "1024", "2048", "4096"}:
        raise argparse.ArgumentTypeError(f"{text} is no list of LUKS2 sector sizes; write 512, 4096 or 512,4096")
    return sorted({int(word) for word in words})


def _size(text: str) -> int:
    digits = text.rstrip("KMG")
    if not digits.isdigit() or len(text) - len(digits) > 1 or not int(digits):
        raise argparse.ArgumentTypeError(f"{text} is no size; write 65536K, 512M or 2G")
    size_bytes = int(digits) * SUFFIXES.get(text[len(digits) :], 1)
    if size_bytes % CHUNK_BYTES:
        raise argparse.ArgumentTypeError("the size must be whole MiB, so that every workload fits")
    return size_bytes


def _run(options: argparse.Namespace) -> Results:
    _check_programs(options.peers)
    timing = Timing(ramp_s=0.5 if options.seconds >= 2 else 0.25, run_s=options.seconds)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lockstep-bench-", dir=options.dir)))
        peers = _peers(options, scratch)
        _make_targets(peers, options.size)
        settings = {"size_bytes": options.size, "rounds": options.rounds, "dir": str(options.dir), **vars(timing)}
        results = Results(machine(), versions(), settings, [peer.name for peer in peers])
        for peer in peers:
            _say(f"starting {peer.name}")
            stack.enter_context(peer)
        for peer in peers:
            peer.await_in_sync()
        for number in range(options.rounds):
            _round(number, peers, timing, results)
        for peer in peers:
            results.proofs[peer.name] = peer.prove()
    return results


def _round(number: int, peers: Sequence[Peer], timing: Timing, results: Results) -> None:
    for index, workload in enumerate(WORKLOADS):
        first = (number + index) % len(peers)
        for peer in [*peers[first:], *peers[:first]]:
            _settle(peers)
            cell = measure(workload, peer, number, timing)
            results.cells.append(cell)
            _say(f"round {number + 1}  {workload.name:20} {peer.name:14} {cell.iops:10,.0f} IOPS")
    for peer in peers:
        peer.await_in_sync()


def _settle(peers: Sequence[Peer], limit_s: float = 10) -> None:
    """Wait until no server works off what the last cell left behind: that would be charged to the next peer."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        before_s = sum(peer.server.cpu_s() for peer in peers)
        time.sleep(0.2)
        if sum(peer.server.cpu_s() for peer in peers) - before_s < 0.02:
            return
    _say(f"the servers were still busy after {limit_s:g} s without load")


def _check_programs(kinds: Sequence[str]) -> None:
    programs = {"fio": "fio"}
    for kind in kinds:
        programs |= KINDS[kind].programs
    require(programs)
    check_engine()
    if "lockstep" in kinds and importlib.util.find_spec("lockstep") is None:
        raise BenchmarkError("this Python has no lockstep: `pip install -e .` in the project's directory")


def _peers(options: argparse.Namespace, scratch: Path) -> list[Peer]:
    peers: list[Peer] = []
    for kind in options.peers:
        if kind == "lockstep":
            peers += [Lockstep(scratch / f"lockstep-{size}", options.size, size) for size in options.sectors]
        elif kind == "nbdkit":
            peers.append(Nbdkit(scratch / kind, options.size))
        else:
            peers.append(Qemu(scratch / kind, options.size))
    return peers


def _make_targets(peers: Sequence[Peer], size_bytes: int) -> None:
    """Write the same random bytes to every target: no hole to fill, no zero to skip, nothing alike to compress."""
    disks = sum(1 + peer.mirrors for peer in peers) + 1  # one more for what is restored
    needed = disks * (size_bytes + LUKS_HEADER_BYTES)
    free = shutil.disk_usage(peers[0].home.parent).free
    if free < needed:
        raise BenchmarkError(f"needs {needed >> 20} MiB, {free >> 20} are free; choose --size or --dir")
    for peer in peers:
        peer.home.mkdir()
    first, *others = (peer.target for peer in peers)
    with first.open("wb") as target:
        for _ in range(size_bytes // CHUNK_BYTES):
            target.write(os.urandom(CHUNK_BYTES))
    for other in others:
        shutil.copyfile(first, other)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
