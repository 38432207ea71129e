"""One cell: one fio, one connection, one workload, and what the server spent on it."""

import json
from dataclasses import dataclass
from typing import Any

from benchmarks.peers import Peer
from benchmarks.processes import BenchmarkError, run
from benchmarks.workloads import Workload

GIB = 1 << 30


@dataclass(frozen=True)
class Timing:
    """Seconds before fio counts, and seconds it counts."""

    ramp_s: float
    run_s: float


@dataclass(frozen=True)
class Cell:
    """One measurement. `client_cpu` is fio's own share of one core: near 1, fio is what was measured."""

    workload: str
    peer: str
    round: int
    iops: float
    bandwidth_bytes_s: float
    latency_mean_us: float
    latency_p99_us: float
    server_cpu_s_per_gib: float
    client_cpu: float


def measure(workload: Workload, peer: Peer, round_number: int, timing: Timing) -> Cell:
    """Load the peer with fio.

    fio does not count the bytes of its ramp but the server spends CPU on them, so the CPU is taken as spread evenly
    over ramp and run.
    """
    cpu_before_s = peer.server.cpu_s()
    job = _fio(workload, peer, timing)
    cpu_s = (peer.server.cpu_s() - cpu_before_s) * timing.run_s / (timing.run_s + timing.ramp_s)
    counted = job["read" if "read" in workload.pattern else "write"]
    if not counted["io_bytes"]:
        raise BenchmarkError(f"fio moved no data: {workload.name} on {peer.name}")
    return Cell(
        workload=workload.name,
        peer=peer.name,
        round=round_number,
        iops=counted["iops"],
        bandwidth_bytes_s=counted["bw_bytes"],
        latency_mean_us=counted["clat_ns"]["mean"] / 1e3,
        latency_p99_us=counted["clat_ns"]["percentile"]["99.000000"] / 1e3,
        server_cpu_s_per_gib=cpu_s / (counted["io_bytes"] / GIB),
        client_cpu=(job["usr_cpu"] + job["sys_cpu"]) / 100,
    )


def _fio(workload: Workload, peer: Peer, timing: Timing) -> dict[str, Any]:
    options: dict[str, object] = {
        "name": workload.name,
        "ioengine": "nbd",
        "uri": peer.uri,
        "rw": workload.pattern,
        "bs": workload.block_bytes,
        "iodepth": workload.depth,
        "size": peer.size_bytes,
        "time_based": 1,
        "ramp_time": f"{timing.ramp_s * 1000:.0f}ms",
        "runtime": f"{timing.run_s * 1000:.0f}ms",
        "norandommap": 1,
        "thread": 1,
        "output-format": "json",
    }
    printed = run(["fio", *(f"--{name}={value}" for name, value in options.items())], cwd=peer.home)
    job: dict[str, Any] = json.loads(printed[printed.index("{") :])["jobs"][0]  # the engine chats before the JSON
    if job["error"]:
        raise BenchmarkError(f"fio met error {job['error']}: {workload.name} on {peer.name}")
    return job


def check_engine() -> None:
    """A fio that was built without libnbd lists no such engine."""
    if "nbd" not in run(["fio", "--enghelp"]).split():
        raise BenchmarkError("this fio has no nbd engine; the one in the Debian package fio has")
