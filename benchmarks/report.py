"""From cells to what is read: medians, ratios, reach; as tables on the terminal and as JSON."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.fio import Cell
from benchmarks.workloads import REACHES, WORKLOADS, Reach, Workload

try:
    import rich.console
    import rich.table

    has_rich = True
except ImportError:
    has_rich = False


class Spread(NamedTuple):
    """A figure and the least and greatest value that a round gave it."""

    median: float
    least: float
    greatest: float


@dataclass
class Results:
    """Everything a run found out."""

    machine: dict[str, object]
    versions: dict[str, str | None]
    settings: dict[str, object]
    peers: list[str]
    cells: list[Cell] = field(default_factory=list)
    proofs: dict[str, str] = field(default_factory=dict)

    @property
    def locksteps(self) -> list[str]:
        """The peers that are the product."""
        return [peer for peer in self.peers if peer.startswith("lockstep")]

    def of(self, peer: str, workload: str, figure: str) -> Spread:
        """One figure of one peer under one workload, over all rounds."""
        values = [getattr(cell, figure) for cell in self.cells if (cell.peer, cell.workload) == (peer, workload)]
        return Spread(median(values), min(values), max(values))

    def ratio(self, peer: str, other: str, workload: str) -> Spread:
        """IOPS of `peer` per IOPS of `other`: of the medians; the spread is that of the rounds' own ratios."""
        iops = {(cell.peer, cell.round): cell.iops for cell in self.cells if cell.workload == workload}
        by_round = [iops[peer, number] / iops[other, number] for name, number in iops if name == peer]
        medians = self.of(peer, workload, "iops").median / self.of(other, workload, "iops").median
        return Spread(medians, min(by_round), max(by_round))

    def judged(self) -> list[tuple[Reach, str, Spread | None]]:
        """Each reach row for each Lockstep measured; None where one of the two was not."""
        return [
            (reach, name, self.ratio(name, reach.peer, reach.workload) if measured else None)
            for name in self.locksteps or ["lockstep"]
            for reach in REACHES
            for measured in [{name, reach.peer} <= set(self.peers)]
        ]

    def all_reached(self) -> bool:
        """True if every reach row was measured and met."""
        return all(ratio is not None and ratio.median >= reach.minimum for reach, _, ratio in self.judged())


def write_json(results: Results, path: Path) -> None:
    """Everything raw, and what the tables show."""
    judged = [
        {**asdict(reach), "lockstep": name, "ratio": ratio._asdict() if ratio else None}
        for reach, name, ratio in results.judged()
    ]
    medians = {
        workload.name: {peer: results.of(peer, workload.name, "iops")._asdict() for peer in results.peers}
        for workload in WORKLOADS
    }
    document = {"format": 1, **asdict(results), "iops": medians, "reach": judged}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def show(results: Results) -> None:
    """Print the tables."""
    others = [peer for peer in results.peers if peer not in results.locksteps]
    pairs = [(peer, other) for peer in results.locksteps for other in others]
    _print_table(
        "Throughput: median (least-greatest round)",
        ["workload", *results.peers],
        [[workload.name, *(_throughput(results, peer, workload) for peer in results.peers)] for workload in WORKLOADS],
    )
    if pairs:
        _print_table(
            "Ratio: of the medians (least-greatest round)",
            ["workload", *(f"{peer} / {other}" for peer, other in pairs)],
            [
                [workload.name, *(_ratio(results.ratio(*pair, workload.name)) for pair in pairs)]
                for workload in WORKLOADS
            ],
        )
    _print_table(
        "Completion latency mean / p99 in us; server CPU seconds per GiB; fio's share of a core",
        ["workload", *results.peers],
        [[workload.name, *(_costs(results, peer, workload.name) for peer in results.peers)] for workload in WORKLOADS],
    )
    _print_table(
        "Reach",
        ["workload", "ratio", "at least", "is", ""],
        [
            [
                reach.workload,
                f"{name} / {reach.peer}",
                f"{reach.minimum:g}x",
                _ratio(ratio) if ratio else "not measured",
                "" if ratio is None else "PASS" if ratio.median >= reach.minimum else "short",
            ]
            for reach, name, ratio in results.judged()
        ],
    )
    for peer, proof in results.proofs.items():
        print(f"{peer}: {proof}")
    print("; ".join(f"{name}: {value}" for name, value in {**results.machine, **results.versions}.items()))


def _throughput(results: Results, peer: str, workload: Workload) -> str:
    if workload.in_bandwidth:
        rates = results.of(peer, workload.name, "bandwidth_bytes_s")
        return "{:.2f} ({:.2f}-{:.2f}) GB/s".format(*(rate / 1e9 for rate in rates))
    return "{:.1f}k ({:.1f}-{:.1f})".format(*(iops / 1e3 for iops in results.of(peer, workload.name, "iops")))


def _ratio(ratio: Spread) -> str:
    return "{:.2f}x ({:.2f}-{:.2f})".format(*ratio)


def _costs(results: Results, peer: str, workload: str) -> str:
    mean_us, p99_us, cpu, client = (
        results.of(peer, workload, figure).median
        for figure in ("latency_mean_us", "latency_p99_us", "server_cpu_s_per_gib", "client_cpu")
    )
    return f"{mean_us:.0f} / {p99_us:.0f}; {cpu:.2f}; {client:.0%}"


def _print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if has_rich:
        table = rich.table.Table(*heads, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        # A pipe has no width of its own, and a table folded into 80 columns is not readable.
        rich.console.Console(width=None if sys.stdout.isatty() else 240).print(table)
        return
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    print(f"\n{title}")
    for line in (heads, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
