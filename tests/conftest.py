"""Fixtures for all tests."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import Lab, run


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A fresh directory to run the real thing in."""
    return Lab(tmp_path)


@pytest.fixture
def loop() -> Iterator[Callable[..., str]]:
    """Make loop devices over files, with `losetup`'s options; they are gone when the test ends."""
    devices: list[str] = []

    def make(path: Path, *options: str) -> str:
        devices.append(run("losetup", "--find", "--show", *options, str(path)).strip())
        return devices[-1]

    yield make
    for device in reversed(devices):
        subprocess.run(["losetup", "-d", device], capture_output=True, check=False)
