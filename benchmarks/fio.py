"""One fio, one or several loads at once, and what the server spent on it."""

import json
from dataclasses import dataclass
from typing import Any

from benchmarks.peers import Peer
from benchmarks.processes import BenchmarkError, run
from benchmarks.results import Cell
from benchmarks.workloads import Workload

GIB = 1 << 30


@dataclass(frozen=True)
class Timing:
    """Seconds before fio counts, and seconds it counts."""

    ramp_s: float
    run_s: float


def measure(
    peer: Peer, round_number: int, timing: Timing, *loads: Workload, row: str = "", span: tuple[int, int] | None = None
) -> list[Cell]:
    """Load the peer with all `loads` at once; a cell for each. `span`: offset and length of the part that is loaded.

    fio does not count the bytes of its ramp but the server spends CPU on them, so the CPU is taken as spread evenly
    over ramp and run. It is charged to the loads by their bytes.
    """
    cpu_before_s = peer.server.cpu_s()
    jobs = _fio(peer, timing, loads, span or (0, peer.size_bytes))
    cpu_s = (peer.server.cpu_s() - cpu_before_s) * timing.run_s / (timing.run_s + timing.ramp_s)
    moved_bytes = sum(job[way]["io_bytes"] for job in jobs for way in ("read", "write"))
    cells = []
    for load, job in zip(loads, jobs, strict=True):
        others = [other.name for other in loads if other is not load]
        name = row or (f"{load.name} beside {' and '.join(others)}" if others else load.name)
        figures = _figures(job, name, peer.name) | {"server_cpu_s_per_gib": cpu_s / (moved_bytes / GIB)}
        figures["client_cpu"] = load.connections * (job["usr_cpu"] + job["sys_cpu"]) / 100
        headline = "mean_us" if load.rate_iops else load.headline
        cells.append(Cell(name, peer.name, round_number, headline, figures))
    return cells


def _figures(job: dict[str, Any], name: str, peer: str) -> dict[str, float]:
    """Reads and writes together; of the two 99th percentiles, the worse."""
    ways = [job[way] for way in ("read", "write") if job[way]["total_ios"]]
    if not ways:
        raise BenchmarkError(f"fio moved no data: {name} on {peer}")
    total = sum(way["total_ios"] for way in ways)
    return {
        "iops": sum(way["iops"] for way in ways),
        "bytes_s": sum(way["bw_bytes"] for way in ways),
        "mean_us": sum(way["clat_ns"]["mean"] * way["total_ios"] for way in ways) / total / 1e3,
        "p99_us": max(way["clat_ns"]["percentile"]["99.000000"] for way in ways) / 1e3,
    }


def _fio(peer: Peer, timing: Timing, loads: tuple[Workload, ...], span: tuple[int, int]) -> list[dict[str, Any]]:
    offset, length = span
    common: dict[str, object] = {
        "ioengine": "nbd",
        "uri": peer.uri,
        "offset": offset,
        "size": length,
        "time_based": 1,
        "ramp_time": f"{timing.ramp_s * 1000:.0f}ms",
        "runtime": f"{timing.run_s * 1000:.0f}ms",
        "norandommap": 1,
        "randrepeat": 0,
        "thread": 1,
        "group_reporting": 1,
        "output-format": "json",
    }
    words = []
    for load in loads:
        own: dict[str, object] = {
            "name": load.name.replace("/", "-"),
            "new_group": 1,
            "rw": load.pattern,
            "bs": load.block_bytes,
            "iodepth": load.depth,
            "numjobs": load.connections,
            "rwmixread": load.reads_percent,
            "fsync": load.fsync_writes,
            "rate_iops": load.rate_iops,
        }
        words += [f"--{name}={value}" for name, value in {**own, **common}.items() if value != 0]
    printed = run(["fio", *words], cwd=peer.home)
    jobs: list[dict[str, Any]] = json.loads(printed[printed.index("{") :])["jobs"]  # the engine chats before the JSON
    for load, job in zip(loads, jobs, strict=True):
        if job["error"]:
            raise BenchmarkError(f"fio met error {job['error']}: {load.name} on {peer.name}")
    return jobs


def check_engine() -> None:
    """A fio that was built without libnbd lists no such engine."""
    if "nbd" not in run(["fio", "--enghelp"]).split():
        raise BenchmarkError("this fio has no nbd engine; the one in the Debian package fio has")
