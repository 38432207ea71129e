"""The long form of the crash tests: goes on with new seeds until the time is over, and stops at the first failure.

`python -m tests.torture [--seconds N] [--seed N] [--home DIRECTORY]`, or `make torture`. Needs root to mount things.
The seed of a history gives the same requests and the same choices again; how they interleave is the machine's. So
what was recorded of a failure is kept in a file: `--show FILE` prints it, and unpacks what is left of the disks.
"""

import argparse
import itertools
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tests.crash_explorer import SHAPES, Explorer, build_recorder
from tests.kill_loop import kill_under_file_system, kill_under_fio
from tests.lab import MIB, Lab

REQUESTS: Final = 120
LOOKS: Final = 150
RECOVERIES: Final = 20
SIZE_BYTES: Final = 64 * MIB
EXPLORED: Final = 3  # histories of each shape for each pair of kills


class Torture:
    """Everything that is tortured, in one directory."""

    def __init__(self, home: Path, seed: int, say: Callable[[str], None]) -> None:
        self._home = home
        self._seeds = itertools.count(seed)
        self._say = say
        self._kills = 0

    def run(self, deadline_s: float) -> None:
        """Go on until then, in s of the monotonic clock; the history that is under way is finished."""
        recorder = build_recorder(self._home)
        explorers = [Explorer(self._lab(name), recorder, *options, header=header) for name, options, header in SHAPES]
        try:
            images = [explorer.image() for explorer in explorers]
            for kill in self._killers():
                for at, explorer in enumerate(explorers):
                    for _ in range(EXPLORED):
                        seed = next(self._seeds)
                        images[at] = explorer.explore(images[at], seed, REQUESTS, LOOKS, RECOVERIES)
                        self._say(f"history {seed}: {explorer.looks} cuts, {explorer.recoveries} recoveries so far")
                        if time.monotonic() > deadline_s:
                            return
                kill()
        finally:
            for explorer in explorers:
                explorer.close()

    def _killers(self) -> Iterator[Callable[[], None]]:
        under_fio = self._lab("fio").volume("vol", SIZE_BYTES)
        under_ext4 = self._lab("ext4").volume("vol", SIZE_BYTES)
        while True:
            seed = next(self._seeds)

            def kill(seed: int = seed) -> None:
                chance = random.Random(seed)
                for _ in range(4):
                    copied = kill_under_fio(under_fio, chance, 8 * MIB), kill_under_file_system(under_ext4, chance)
                    self._kills += 2
                    self._say(f"kills {seed}: {copied[0]} and {copied[1]} bytes copied, {self._kills} kills so far")

            yield kill

    def _lab(self, name: str) -> Lab:
        home = self._home / name
        home.mkdir()
        return Lab(home)


def show(file: Path, home: Path) -> None:
    """Print what the disks were told before a failure, and unpack what the power cut has left of them."""
    which, run, image = pickle.loads(file.read_bytes())
    print(which)
    for at, record in enumerate(run.log):
        print(at, chr(record.kind), record.id, record.offset, record.length, record.path.replace("\0", " -> "))
    for path, content in image.files.items():
        kept = home / Path(path).name
        kept.write_bytes(content)
        print(f"after the cut, {path} was {kept}")


def main() -> int:
    """Return an exit code."""
    parser = argparse.ArgumentParser(prog="tests.torture", description="Crash tests with new seeds for a long time.")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--home", type=Path, default=None, help="where the disks lie; a new directory otherwise")
    parser.add_argument("--show", type=Path, help="a file that was kept of a failure")
    options = parser.parse_args()
    home = options.home or Path(tempfile.mkdtemp(prefix="lockstep-torture-"))
    if options.show:
        show(options.show, home)
        return 0
    started_s = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - started_s:7.0f} s  {what}", flush=True)

    say(f"seed {options.seed}, in {home}")
    try:
        Torture(home, options.seed, say).run(started_s + options.seconds)
    except AssertionError as failure:
        say(f"FAILED: {failure}")
        say(f"the disks are left in {home}")
        return 1
    say("nothing failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
