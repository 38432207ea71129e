"""P2, P3, P4, P9 under power cuts: hundreds of states that the disks may be left in, and what must hold in each.

`make torture` goes on with new histories for an hour. What is enumerated, and what is not: docs/architecture.md.
"""

import dataclasses
import random
from pathlib import Path
from typing import Final

import pytest

from tests.crash_explorer import SHAPES, Broken, Explorer, Run, Shape
from tests.lab import Lab, needs
from tests.recording import SYNC, SYNCED, Record

pytestmark = [needs("gcc"), pytest.mark.timeout(600)]

HISTORIES: Final = 60  # of each shape
REQUESTS: Final = (6, 40)  # of a history: at least, and at most
LOOKS: Final = 2
RECOVERED: Final = 6  # one in so many histories is recovered from as well


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[0])
def test_no_power_cut_breaks_a_promise(lab: Lab, recorder: Path, shape: Shape) -> None:
    _name, options, header = shape
    with Explorer(lab, recorder, *options, header=header) as explorer:
        image = explorer.image()
        for seed in range(HISTORIES):
            requests = random.Random(seed).randint(*REQUESTS)
            image = explorer.explore(image, seed, requests, LOOKS, int(seed % RECOVERED == 0))
        assert explorer.looks >= HISTORIES * LOOKS
        assert explorer.recoveries >= HISTORIES // RECOVERED


def unsynced(run: Run, suffix: str) -> Run:
    """A run as it would have been recorded, had it not synced some of its files."""

    def without(record: Record) -> list[Record]:
        if not record.path.endswith(suffix):
            return [record]
        return [] if record.kind in (SYNC, SYNCED) else [dataclasses.replace(record, durable=False)]

    return dataclasses.replace(run, log=[left for record in run.log for left in without(record)])


def examine_all(explorer: Explorer, runs: list[Run]) -> None:
    for run in runs:
        explorer.examine(run, 120, 0)


def test_syncs_that_are_missing_are_noticed(lab: Lab, recorder: Path) -> None:
    """The explorer can fail: what it is given here is a real history, from which syncs were taken away."""
    with Explorer(lab, recorder, header=True) as explorer:
        image = explorer.image()
        runs = [explorer.record(image, 201, 70)]
        runs.append(explorer.record(runs[0].after, 202, 70))
        for run in runs:
            explorer.examine(run, 40, 0)
        for suffix, complaint in (
            (".intent", "differs, and is not marked"),
            (".target", "the target has lost what was flushed"),
            (".mirror", "the mirror alone"),
        ):
            with pytest.raises(Broken, match=complaint):
                examine_all(explorer, [unsynced(run, suffix) for run in runs])
