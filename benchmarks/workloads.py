"""What is measured and what should be reached, as tables."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """One kind of load: fio's pattern, block size, requests in flight on each connection, and connections."""

    name: str
    pattern: str
    block_bytes: int
    depth: int
    connections: int = 1
    reads_percent: int = 50  # of a mixed pattern
    fsync_writes: int = 0  # a flush after so many writes; 0: none
    rate_iops: int = 0  # no more than this many requests a second; 0: as many as it can

    @property
    def headline(self) -> str:
        """The figure that stands for it: large requests are read as bytes per second, small ones as requests."""
        return "bytes_s" if self.block_bytes >= 1 << 20 else "iops"


@dataclass(frozen=True)
class Reach:
    """What every measured Lockstep should do: a figure of `row`, as a multiple of that of `peer`.

    Without a peer the figure itself is judged. `at_512` is the bound for 512-byte sectors where it differs.
    """

    peer: str | None
    row: str
    bound: float
    figure: str = "iops"
    at_512: float | None = None
    at_most: bool = False

    def bound_for(self, lockstep: str) -> float:
        """The bound for a Lockstep, by its name."""
        return self.at_512 if self.at_512 is not None and lockstep == "lockstep-512" else self.bound

    def met(self, lockstep: str, value: float) -> bool:
        """Whether a value is on the right side of the bound."""
        bound = self.bound_for(lockstep)
        return value <= bound if self.at_most else value >= bound


def _writes(peer: str, row: str, bound: float) -> Reach:
    """A row of writes: encrypting sectors of 512 bytes costs more, and may cost 10 %."""
    return Reach(peer, row, bound, at_512=round(0.9 * bound, 3))


# In RAM: everything but software is free.
WORKLOADS = (
    Workload("4k-randwrite-qd1", "randwrite", 4 << 10, 1),
    Workload("4k-randwrite-qd32", "randwrite", 4 << 10, 32),
    Workload("64k-randwrite-qd16", "randwrite", 64 << 10, 16),
    Workload("1m-write-qd8", "write", 1 << 20, 8),
    Workload("4k-randread-qd32", "randread", 4 << 10, 32),
    Workload("4k-randwrite-4x-qd8", "randwrite", 4 << 10, 8, connections=4),
)

# On a real file system, because of the flushes.
DISK_WORKLOADS = (Workload("8k-mixed-fsync-qd16", "randrw", 8 << 10, 16, reads_percent=70, fsync_writes=32),)

# Lockstep's copies of a whole disk. `share` is the rate as a part of that of the slowest step alone.
BULK_ROWS = ("initial-sync", "resync", "verify", "restore")

REACHES = (
    _writes("qemu", "4k-randwrite-qd32", 5.0),
    _writes("qemu", "4k-randwrite-qd1", 1.7),
    _writes("qemu", "64k-randwrite-qd16", 3.0),
    _writes("qemu", "1m-write-qd8", 3.0),
    Reach("qemu", "4k-randread-qd32", 3.0),
    _writes("qemu", "4k-randwrite-4x-qd8", 5.0),
    Reach("qemu", "8k-mixed-fsync-qd16", 1.0),
    _writes("nbdkit", "4k-randwrite-qd32", 0.8),
    _writes("nbdkit", "4k-randwrite-qd1", 0.75),
    _writes("nbdkit", "64k-randwrite-qd16", 0.65),
    _writes("nbdkit", "1m-write-qd8", 0.6),
    Reach("nbdkit", "4k-randread-qd32", 1.5),
    _writes("nbdkit", "4k-randwrite-4x-qd8", 0.8),
    Reach("nbdkit", "8k-mixed-fsync-qd16", 0.5),
    Reach("nbdkit", "4k-randwrite-qd32", 1.5, figure="p99_us", at_most=True),
    Reach("nbdkit", "4k-randread-qd32", 1.5, figure="p99_us", at_most=True),
    *(Reach(None, row, 0.7, figure="share") for row in BULK_ROWS),
)

# --- real users (`--users`), on a real file system ---

PGBENCH = "pgbench"

# Through the page cache and past it (`serve --direct`).
DIRECT_LOADS = (*WORKLOADS[1:2], *WORKLOADS[3:4], *DISK_WORKLOADS)
USER_REACHES = (Reach("nbdkit", PGBENCH, 0.9, figure="tps"),)

# Each cold, alone and beside the other: does one delay the other?
COLD_READ = Workload("cold-4k-randread-qd32", "randread", 4 << 10, 32)
SERIAL_COLD_READ = Workload("cold-4k-randread-qd1", "randread", 4 << 10, 1)
STEADY_READ = Workload("cold-4k-randread-100/s", "randread", 4 << 10, 4, rate_iops=100)
STEADY_WRITE = Workload("4k-randwrite-500/s", "randwrite", 4 << 10, 4, rate_iops=500)
FULL_WRITE = Workload("4k-randwrite-qd32", "randwrite", 4 << 10, 32)
COLD_LOADS: tuple[tuple[Workload, ...], ...] = (
    (SERIAL_COLD_READ,),
    (COLD_READ,),
    (STEADY_READ,),
    (STEADY_READ, FULL_WRITE),
    (STEADY_WRITE,),
    (STEADY_WRITE, COLD_READ),
)
