"""P1 to P9: whatever the order in which clients, mirrors, records and the power come and go, no promise is broken.

INTERLEAVINGS is how many scenes are played (`make interleavings`); their seeds begin at INTERLEAVINGS_SEED.
"""

import os
from pathlib import Path

import pytest

from tests.interleavings import played

SCENES = 160
TASKS = 4


@pytest.mark.parametrize("part", range(TASKS))
def test_no_interleaving_breaks_a_promise(tmp_path: Path, part: int) -> None:
    scenes = int(os.environ.get("INTERLEAVINGS", SCENES))
    first = int(os.environ.get("INTERLEAVINGS_SEED", 0))
    for seed in range(first + part, first + scenes, TASKS):
        home = tmp_path / str(seed)
        home.mkdir()
        played(seed, home)


def test_a_seed_gives_the_same_scene_again(tmp_path: Path) -> None:
    histories = []
    for name in ("once", "again"):
        home = tmp_path / name
        home.mkdir()
        scene = played(7, home)
        histories.append((scene.history, bytes(scene.target.medium.now), scene.fate.now_s))
    assert histories[0] == histories[1]
