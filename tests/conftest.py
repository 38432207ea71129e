"""Fixtures for all tests."""

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.crash_explorer import build_recorder
from tests.forks import ForkLab
from tests.lab import Lab, loop_devices, run

# How long an example takes says more about the machine than about us.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Take away what a killed run left mounted and without its server: mkfs.btrfs fails beside a mount like that."""
    if hasattr(session.config, "workerinput"):
        return
    for line in Path("/proc/self/mounts").read_text().splitlines():
        place = line.split()[1]
        if place.startswith(f"{tempfile.gettempdir()}/lockstep-"):
            _unmount_if_dead(place)


def _unmount_if_dead(place: str) -> None:
    try:
        os.stat(place)
    except OSError as failure:
        if failure.errno == errno.ENOTCONN:
            subprocess.run(["umount", "--lazy", place], capture_output=True, check=False)


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Like pytest's, but short: the address of a Unix socket has 107 bytes. It is kept if the test fails."""
    path = Path(tempfile.mkdtemp(prefix="lockstep-"))
    failed_before = request.session.testsfailed
    yield path
    if request.session.testsfailed == failed_before:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A fresh directory to run the real thing in."""
    return ForkLab(tmp_path)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recorder.c, to be preloaded."""
    return build_recorder(tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def loop() -> Iterator[Callable[..., str]]:
    """Make loop devices over files, with `losetup`'s options; they are gone when the test ends."""
    devices: dict[str, str] = {}

    def make(path: Path | str, *options: str) -> str:
        device = run("losetup", "--find", "--show", *options, str(path)).strip()
        devices[device] = str(path)
        return device

    yield make
    for device, path in reversed(devices.items()):
        if loop_devices().get(device, "").startswith(path):  # else the test ended it, and it may be another's by now
            subprocess.run(["losetup", "-d", device], capture_output=True, check=False)
