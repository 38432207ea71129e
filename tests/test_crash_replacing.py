"""A new target under power cuts, while it is filled from the mirror and clients are at work.

As in test_crash_explorer.py, but each region of the volume is on one of two disks: where the record says that it is
missing, it is what the mirror has, and else what the target has.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.crash_explorer import (
    PAGE_BYTES,
    REGION_BYTES,
    SHAPES,
    SIZE_BYTES,
    Broken,
    Explorer,
    Image,
    Run,
    Shape,
    _content,
    _sound,
)
from tests.lab import Lab, needs
from tests.recording import Disks
from tests.test_crash_explorer import unsynced

pytestmark = [needs("gcc"), pytest.mark.timeout(600)]

HISTORIES: Final = int(os.environ.get("REPLACE_HISTORIES", "4"))  # of each shape
REQUESTS: Final = (6, 40)
LOOKS: Final = 4
TARGET_FAULT: Final = 2


class Replaced(Explorer):
    """The volume has just been given a new target: noise, wherever it is not filled."""

    faults = (*Explorer.faults, TARGET_FAULT, TARGET_FAULT)
    unflushed = "lockstep.errors.DiskFailed: Flushing"

    def __init__(self, lab: Lab, library: Path, *options: object, header: bool = False) -> None:
        super().__init__(lab, library, *options, header=header)
        self.registry_path = lab.state / "registry.db"
        self.serve(script="recovery")
        self.volume.target.unlink()
        replace = ["replace-target", self.volume.name, self.target_path, "--key-file", str(lab.key)]
        answer = self.serve(script="command", arguments=replace)
        assert answer["code"] == 0, answer
        self.volume.target.write_bytes(random.Random(2).randbytes(SIZE_BYTES))
        self.filling = self.registry_path.read_bytes()
        self.begun = self.image()
        self.put(self.begun)
        self.serve(script="recovery")
        self.filled = self.registry_path.read_bytes()

    def put(self, image: Image) -> None:
        """As it is, with the registry of that time, whose transactions are durable when they end."""
        super().put(image)
        if hasattr(self, "filled"):
            self.registry_path.write_bytes(self.filling if _content(image.files, ".missing") else self.filled)

    def missing(self, files: dict[str, bytes]) -> list[int]:
        """Which regions are."""
        record = _content(files, ".missing")
        if not record:
            return []
        pages = [record[at : at + PAGE_BYTES] for at in range(0, len(record), PAGE_BYTES)]
        if len(pages) != 2 or not all(map(_sound, pages)):
            raise Broken("the record of what is missing is damaged")
        bits = int.from_bytes(pages[1][4:], "little")
        return [region for region in range(-(-SIZE_BYTES // REGION_BYTES)) if bits >> region & 1]

    def content(self, files: dict[str, bytes]) -> bytes:
        """What clients see."""
        content, data = bytearray(files[self.target_path]), self.mirror.data(files, SIZE_BYTES)
        if len(content) != SIZE_BYTES:
            raise Broken(f"the target has {len(content)} bytes")
        for region in self.missing(files):
            part = slice(region * REGION_BYTES, (region + 1) * REGION_BYTES)
            content[part] = data[part]
        return bytes(content)

    def _images(self, run: Run, count: int, chance: random.Random) -> Iterator[tuple[int, Image]]:
        """One more: what a server has left that ended in order, or because the target could not be flushed."""
        yield from super()._images(run, count, chance)
        disks = Disks(run.start.files, run.inodes)
        for record in run.log:
            disks.take(record)
        yield len(run.log), Image(disks.cut(chance), run.after.written_ns)

    def replaceable(self, image: Image) -> bool:
        """A target is filled from the mirror as it was left."""
        missing = self.missing(image.files)
        if missing and not self._fits(image) and not image.silent:
            raise Broken("the target cannot be filled from the mirror any more")
        return not missing


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[0])
def test_no_power_cut_breaks_a_promise_while_a_target_is_filled(lab: Lab, recorder: Path, shape: Shape) -> None:
    _name, options, header = shape
    with Replaced(lab, recorder, *options, header=header) as explorer:
        partly = 0
        for seed in range(HISTORIES):
            left = explorer.explore(explorer.begun, seed, random.Random(seed).randint(*REQUESTS), LOOKS, seed % 2)
            partly += 0 < len(explorer.missing(left.files)) < SIZE_BYTES // REGION_BYTES
            if seed % 3 == 0:  # and once more, from what that has left
                explorer.explore(left, HISTORIES + seed, REQUESTS[0], LOOKS, 0)
        assert partly
        # It can fail: a real history, from which the syncs of the target were taken away.
        run = explorer.record(explorer.begun, 1, REQUESTS[1])
        with pytest.raises(Broken, match=r"the target has (lost what was flushed|something else)"):
            explorer.examine(unsynced(run, ".target"), 60, 0)
