"""`lockstep demo`: it proves what it says, and it leaves nothing behind, however it ends."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import Lab, loop_devices, wait_until

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0
    or not os.path.exists("/dev/fuse")
    or not os.path.exists("/dev/loop-control")
    or any(shutil.which(tool) is None for tool in ("nbdfuse", "mkfs.ext4", "cryptsetup")),
    reason="the demo needs root, /dev/fuse, loop devices, nbdfuse, e2fsprogs, cryptsetup",
)

PROVEN = ("written", "encrypted", "distinct", "restored", "compared")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for the demo's own, with a name that is found in what it leaves behind; short, for its sockets."""
    directory = Path(tempfile.mkdtemp(prefix="demo-test-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def environment(place: Path, tmp_path: Path) -> dict[str, str]:
    """Temporary files go to `place`, and passphrases cost no seconds."""
    return {**os.environ, **Lab(tmp_path).quick_format(), "TMPDIR": str(place)}


def start(environment: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "lockstep", "demo"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def leftovers(place: Path) -> list[str]:
    """Whatever is still there of it: files, mounts, loop devices, processes."""
    name = str(place)
    found = [str(path) for path in place.iterdir()]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if name in line]
    found += [f"{device} over {path}" for device, path in loop_devices().items() if name in path]
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            arguments = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if os.fsencode(name) in arguments:
            found.append(f"process {process}: {arguments!r}")
    return found


def test_it_proves_what_it_says_and_cleans_up(place: Path, environment: dict[str, str]) -> None:
    with start(environment) as demo:
        output, errors = demo.communicate(timeout=150)
    assert demo.returncode == 0, (output, errors)
    assert errors == ""
    summary = output.partition("What was shown")[2]
    for word in PROVEN:
        assert f"\n  {word}  " in summary
    assert "ext4" in output
    assert "crypto_LUKS" in output
    needles = re.search(r"of (\d+) pieces of the files, (\d+) are found in the target, 0 in the mirror", output)
    assert needles is not None
    assert int(needles[1]) == int(needles[2]) > 10
    assert leftovers(place) == []


@pytest.mark.parametrize(
    ("moment", "everybody"),
    [
        pytest.param("$ lockstep attach", True, id="ctrl-c while it attaches"),
        pytest.param("Copying the Python standard library", False, id="a signal while it copies files"),
    ],
)
def test_an_interrupted_demo_leaves_nothing(
    place: Path, environment: dict[str, str], moment: str, everybody: bool
) -> None:
    with start(environment) as demo:
        try:
            assert demo.stdout is not None
            while moment not in (line := demo.stdout.readline()):
                assert line, demo.stderr.read() if demo.stderr else ""
            assert leftovers(place), "there is nothing yet that it could leave behind"
            if everybody:  # as the terminal does
                os.killpg(demo.pid, signal.SIGINT)
            else:
                demo.send_signal(signal.SIGINT)
            output, errors = demo.communicate(timeout=60)
        finally:
            if demo.poll() is None:
                demo.kill()
    assert demo.returncode == 130, (output, errors)
    assert "What was shown" not in output
    assert "Traceback" not in errors
    wait_until(lambda: leftovers(place) == [], f"nothing to be left: {leftovers(place)}")
