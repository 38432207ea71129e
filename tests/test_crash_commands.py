"""Commands that make a disk of a mirror, under power cuts: what they leave is told from a whole disk, and gone on with.

They run under recorder.c, as in test_crash_explorer.py, and the power is cut at moments chosen at random. Then they are
repeated as one would; what they make must be what the mirror holds.
"""

import contextlib
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.crash_explorer import SIZE_BYTES, Explorer, Image, Run
from tests.lab import Lab, needs, opened, run
from tests.recording import Record

pytestmark = [needs("gcc", "qemu-io"), pytest.mark.timeout(600)]

CUTS: Final = 5  # of each command
OLD: Final = random.Random(3).randbytes(SIZE_BYTES)
UNFINISHED: Final = {"restore": ".restoring", "commit": ".committing"}


class Commands(Explorer):
    """A volume in sync, and what commands make of its mirror; each run of a command is recorded."""

    def __init__(self, lab: Lab, library: Path) -> None:
        super().__init__(lab, library)
        self.output = str(lab.home / "output")
        self.registry_path = lab.state / "registry.db"
        self.serve(script="recovery")

    def serve(self, **asked: object) -> dict[str, Any]:
        """A command must succeed."""
        answer = super().serve(**asked)
        assert answer.get("code", 0) == 0, answer
        return answer

    def command(self, start: Image, *arguments: object) -> Run:
        """Run one, beginning with these files."""
        given = [*map(str, arguments), "--key-file", str(self.lab.key)]
        return self._run(start, 0, script="command", arguments=given)

    def cuts(self, of: Run, count: int = CUTS) -> Iterator[tuple[str, Image]]:
        """Cut the power while it ran, and say when that was."""
        for at, image in self._images(of, count, random.Random(len(of.log))):
            yield f"after record {at} of {len(of.log)}", image

    def _recorded(self, path: Path) -> bool:
        return "bin" not in path.parts

    def _is_data(self, record: Record) -> bool:
        return record.path.startswith(self.output) and record.length > 4096


@pytest.mark.parametrize("old", [b"", OLD], ids=["new", "overwritten"])
def test_a_restore_is_resumed_after_any_power_cut(lab: Lab, recorder: Path, old: bytes) -> None:
    with Commands(lab, recorder) as commands:
        restore = ["restore", commands.mirror.path, commands.output]
        expected, record = commands.volume.target.read_bytes(), f"{commands.output}.restoring"

        def again(image: Image, when: str) -> Run:
            found, begun = image.files.get(commands.output, b""), record in image.files
            assert begun or found in (b"", old, expected), f"{when}: the output is not whole, and nothing says so"
            ended = commands.command(image, *restore, "--resume" if begun or not found else "--force")
            assert ended.after.files[commands.output] == expected, when
            assert record not in ended.after.files, when
            return ended

        start = commands.image()
        if old:
            start.files[commands.output] = old
        first = commands.command(start, *restore, *(["--force"] if old else []))
        for number, (when, image) in enumerate(commands.cuts(first)):
            for then, left in commands.cuts(again(image, when), number % 2):
                again(left, f"{when}, then {then}")


@pytest.mark.parametrize("old", [b"", OLD], ids=["new", "overwritten"])
def test_a_commit_is_repeated_after_any_power_cut(lab: Lab, recorder: Path, old: bytes) -> None:
    with Commands(lab, recorder) as commands:
        overlay, volume = lab.home / "overlay", commands.volume
        with opened(volume, "--writable", "--overlay", overlay) as (_, uri):
            run("qemu-io", "-f", "raw", "-c", "write -P 9 700 300k", "-c", "discard 1M 512k", uri)
        expected = bytearray(volume.target.read_bytes())
        expected[700 : 700 + (300 << 10)] = b"\x09" * (300 << 10)
        expected[1 << 20 : 3 << 19] = bytes(512 << 10)
        commit = ["commit", volume.mirror, overlay, commands.output]
        start = commands.image()
        if old:
            start.files[commands.output] = old
        for when, image in commands.cuts(commands.command(start, *commit, *(["--force"] if old else []))):
            assert image.files.get(commands.output) in (None, old, expected), f"{when}: the output is not whole"
            again = commands.command(image, *commit, "--force")
            assert again.after.files[commands.output] == expected, when
            assert f"{commands.output}.committing" not in again.after.files, when


def test_a_target_is_replaced_after_any_power_cut(lab: Lab, recorder: Path) -> None:
    """The registry is not recorded; what follows its transaction are changes of the records and of the mirror."""
    with Commands(lab, recorder) as commands:
        target, expected = commands.target_path, commands.volume.target.read_bytes()
        replace = ["replace-target", commands.volume.name, target]
        before = commands.registry_path.read_bytes()
        commands.volume.target.unlink()
        start = commands.image()
        generation = commands.mirror.token(start.files)["generation"]
        first = commands.command(start, *replace)
        with contextlib.closing(sqlite3.connect(commands.registry_path)) as database, database:
            database.execute("UPDATE mirrors SET generation = ?", [int(generation)])  # which is noted later
        after = commands.registry_path.read_bytes()
        for when, image in commands.cuts(first):
            assert commands.mirror.token(image.files)["state"] == "in-sync", when
            assert commands.mirror.data(image.files, SIZE_BYTES) == expected, when
            untouched = all(image.files.get(path) == start.files[path] for path in start.files)
            named = target in image.files  # not before the transaction: a blank file would be taken for the old target
            for registry in (before, after) if untouched and not named else (after,):
                commands.registry_path.write_bytes(registry)
                if registry is before or not any(path.endswith(".missing") for path in image.files):
                    image = commands.command(image, *replace, "--force").after
                recovered = commands._run(image, 0, script="recovery").after
                assert recovered.files[target] == expected, when
                assert commands.mirror.data(recovered.files, SIZE_BYTES) == expected, when
