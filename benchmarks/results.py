"""What a run found out: cells, their medians, ratios, and what these are judged by."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from benchmarks.workloads import Reach

BARE = "bare"
"""The peers, one for each sector size, that do the work of a mirror and nothing else."""


def compared(peer: str, lockstep: str) -> str:
    """With whom a Lockstep is compared: among the bare ones, with the one of the same sectors."""
    return lockstep.replace("lockstep", BARE) if peer == BARE else peer


class Spread(NamedTuple):
    """A figure and the least and greatest value that a round gave it."""

    median: float
    least: float
    greatest: float

    @classmethod
    def over(cls, values: Iterable[float]) -> "Spread":
        """Of the values of the rounds."""
        rounds = list(values)
        return cls(median(rounds), min(rounds), max(rounds))


@dataclass(frozen=True)
class Cell:
    """One measurement: `headline` is the figure that stands for it."""

    row: str
    peer: str
    round: int
    headline: str
    figures: dict[str, float]


class Judged(NamedTuple):
    """One reach row for one Lockstep; `value` is None where it was not measured."""

    reach: Reach
    lockstep: str
    value: Spread | None

    @property
    def what(self) -> str:
        """What was compared with what."""
        of = f" {self.reach.figure}" if self.reach.figure == "p99_us" else ""
        return f"{self.lockstep} / {self.reach.peer or 'slowest step'}{of}"

    @property
    def bound(self) -> str:
        """The bound, as it is read."""
        return f"{'<=' if self.reach.at_most else '>='} {self.reach.bound_for(self.lockstep):g}x"

    @property
    def verdict(self) -> str:
        """PASS, short, or not measured."""
        if self.value is None:
            return "not measured"
        return "PASS" if self.reach.met(self.lockstep, self.value.median) else "short"


@dataclass
class Results:
    """Everything a run found out."""

    title: str
    machine: dict[str, object]
    versions: dict[str, str | None]
    settings: dict[str, object]
    reaches: tuple[Reach, ...]
    cells: list[Cell] = field(default_factory=list)
    proofs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[str]:
        """What was measured, in its order."""
        return list(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def peers(self) -> list[str]:
        """Who was measured, in a fixed order."""
        return sorted({cell.peer for cell in self.cells}, key=lambda peer: (not peer.startswith("lockstep"), peer))

    @property
    def locksteps(self) -> list[str]:
        """The peers that are the product."""
        return [peer for peer in self.peers if peer.startswith("lockstep")]

    def pairs(self) -> list[tuple[str, str]]:
        """Each peer that is the product, with each that it is compared with: of the bare ones, its own sectors'."""
        others = [peer for peer in self.peers if peer not in self.locksteps]
        pairs = [(ours, other) for ours in self.locksteps for other in others]
        return [pair for pair in pairs if not pair[1].startswith(BARE) or pair[1] == compared(BARE, pair[0])]

    def headline(self, row: str) -> str:
        """The figure that stands for a row."""
        return next(cell.headline for cell in self.cells if cell.row == row)

    def of(self, peer: str, row: str, figure: str) -> Spread | None:
        """One figure of one peer in one row, over all rounds; None where it was not measured."""
        values = self._by_round(peer, row, figure).values()
        return Spread.over(values) if values else None

    def ratio(self, peer: str, other: str, row: str, figure: str) -> Spread | None:
        """A figure of `peer` as a multiple of that of `other`: of the medians; the spread is that of the rounds."""
        ours, theirs = self._by_round(peer, row, figure), self._by_round(other, row, figure)
        by_round = [ours[number] / theirs[number] for number in ours if theirs.get(number)]
        if not by_round:
            return None
        return Spread(median(ours.values()) / median(theirs.values()), min(by_round), max(by_round))

    def judged(self) -> list[Judged]:
        """Each reach row for each Lockstep measured."""
        return [
            Judged(reach, name, self._value(reach, name))
            for name in self.locksteps or ["lockstep"]
            for reach in self.reaches
        ]

    def all_reached(self) -> bool:
        """True if every reach row was measured and met."""
        return all(each.verdict == "PASS" for each in self.judged())

    def _value(self, reach: Reach, name: str) -> Spread | None:
        if reach.peer is None:
            return self.of(name, reach.row, reach.figure)
        return self.ratio(name, compared(reach.peer, name), reach.row, reach.figure)

    def _by_round(self, peer: str, row: str, figure: str) -> dict[int, float]:
        return {
            cell.round: cell.figures[figure]
            for cell in self.cells
            if (cell.peer, cell.row) == (peer, row) and figure in cell.figures
        }
