"""What is measured and what should be reached, as tables."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """One column of load: fio's pattern, block size and number of requests in flight."""

    name: str
    pattern: str
    block_bytes: int
    depth: int

    @property
    def in_bandwidth(self) -> bool:
        """Large requests are read as bytes per second, small ones as requests per second."""
        return self.block_bytes >= 1 << 20


@dataclass(frozen=True)
class Reach:
    """Every measured Lockstep should do at least `minimum` times the IOPS of `peer` under `workload`."""

    peer: str
    workload: str
    minimum: float


WORKLOADS = (
    Workload("4k-randwrite-qd1", "randwrite", 4 << 10, 1),
    Workload("4k-randwrite-qd32", "randwrite", 4 << 10, 32),
    Workload("64k-randwrite-qd16", "randwrite", 64 << 10, 16),
    Workload("1m-write-qd8", "write", 1 << 20, 8),
    Workload("4k-randread-qd32", "randread", 4 << 10, 32),
)

REACHES = (
    Reach("qemu", "4k-randwrite-qd1", 1.3),
    Reach("qemu", "4k-randwrite-qd32", 3.0),
    Reach("qemu", "64k-randwrite-qd16", 2.0),
    Reach("qemu", "1m-write-qd8", 2.0),
    Reach("nbdkit", "4k-randwrite-qd32", 0.7),
)
