"""Two commands on one volume: who gets its lock works on the volume as it is then, not as it was a moment before."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lockstep.cli import options
from lockstep.crypto import luks
from lockstep.errors import DiskBusy, VolumeUnknown
from lockstep.nbd.identity import account
from lockstep.service import control_client
from lockstep.service.state import State
from tests.forks import ForkLab
from tests.lab import MIB, Lab, Served, wait_until, write
from tests.test_service_refusals import assert_error

SIZE_BYTES = 4 * MIB


@pytest.fixture
def between(lab: ForkLab, monkeypatch: pytest.MonkeyPatch) -> list[list[object]]:
    """Commands that run from beginning to end just before the next one gets the volume's lock."""
    commands: list[list[object]] = []
    get_lock = State.volume_lock

    @contextlib.contextmanager
    def overtaken(state: State, name: str) -> Iterator[bool]:
        while commands:
            Lab.lockstep(lab, *commands.pop(0), environment=lab.quick_format()).ok()
        with get_lock(state, name) as mine:
            yield mine

    monkeypatch.setattr(State, "volume_lock", overtaken)
    return commands


def test_a_target_that_was_just_replaced_is_not_taken_for_the_truth(lab: Lab, between: list[list[object]]) -> None:
    volume = lab.volume("vol", SIZE_BYTES, content=b"good" * 1000)
    with volume.served():
        pass
    good = volume.target.read_bytes()
    volume.target.write_bytes(b"lost" * (SIZE_BYTES // 4))
    new = lab.home / "new"
    between.append(["replace-target", "vol", new, "--key-file", lab.key, "--incomplete"])
    lab.lockstep("verify", "vol", "--repair", "--key-file", lab.key)
    assert volume.decrypted() == good
    with volume.served():
        pass
    assert new.read_bytes() == good


def test_a_volume_that_was_just_removed_gets_no_header(lab: Lab, between: list[list[object]]) -> None:
    volume, backup = lab.volume("vol", SIZE_BYTES), lab.home / "backup"
    lab.lockstep("header", "backup", "vol", backup).ok()
    mirror = volume.mirror.read_bytes()
    between.append(["remove", "vol"])
    assert_error(lab.lockstep("header", "restore", "vol", backup), VolumeUnknown(volume="vol", near=(), hint=""))
    assert volume.mirror.read_bytes() == mirror


def test_a_command_that_has_the_volume_is_not_called_a_server(lab: Lab) -> None:
    lab.volume("vol", SIZE_BYTES)
    with State(str(lab.state)).volume_lock("vol"):  # as `verify` has it, for hours
        for command in (("serve", "vol", "--key-file", lab.key), ("remove", "vol")):
            lab.lockstep(*command).failed(1, "another command is at work on it", "lockstep verify vol")


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What happens while a command waits for its passphrase."""
    events: list[Callable[[], object]] = []
    read = options._content

    def late(key_file: str) -> bytes:
        while events:
            events.pop(0)()
        return read(key_file)

    monkeypatch.setattr(options, "_content", late)
    return events


def test_a_new_target_keeps_the_mirror_that_it_is_filled_from(lab: Lab, meanwhile: list[Callable[[], object]]) -> None:
    volume, new = lab.volume("vol", SIZE_BYTES, content=b"good" * 1000), lab.home / "new"
    with volume.served():
        pass
    good = volume.target.read_bytes()
    volume.target.unlink()
    replace = ("replace-target", "vol", new, "--key-file", lab.key)
    meanwhile.append(lambda: Lab.lockstep(lab, *replace).ok())
    lab.lockstep("key", "rekey", "vol", "--key-file", lab.key).failed(1, "still being filled")
    with volume.served():
        pass
    assert new.read_bytes() == good


def test_a_disk_that_has_just_taken_the_mirrors_place_keeps_its_keys(
    lab: Lab, meanwhile: list[Callable[[], object]]
) -> None:
    volume, other = lab.volume("vol", SIZE_BYTES), lab.volume("other", SIZE_BYTES)
    before = other.mirror.read_bytes()
    meanwhile.append(lambda: os.replace(other.mirror, volume.mirror))
    add = ("key", "add", "vol", "--key-file", lab.key, "--recovery")
    lab.lockstep(*add, environment=lab.quick_format()).failed(1, "is not the mirror of vol")
    assert volume.mirror.read_bytes() == before


# Stands in cryptsetup's place: to write a token takes as long as there is a file, and fails while there is another.
_SLOW_TOKEN = """#!/bin/sh
while [ "$1" = token ] && [ -e "{hold}" ]; do sleep 0.05; done
if [ "$1" = token ] && [ -e "{hold}.failing" ]; then echo "Device write failed." >&2; exit 1; fi
exec "{real}" "$@"
"""


def slow_token(lab: Lab) -> Path:
    """Have tokens written by that; returns the file that they wait for."""
    program, hold = lab.home / "slow" / "cryptsetup", lab.home / "hold"
    program.parent.mkdir()
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    program.write_text(_SLOW_TOKEN.format(hold=hold, real=shutil.which("cryptsetup", path=search)))
    program.chmod(0o755)
    lab.environment["PATH"] = f"{program.parent}:{search}"
    return hold


@pytest.mark.parametrize("header", ["hangs", "fails"])
def test_a_mirror_whose_header_cannot_be_written_keeps_no_server_from_starting(lab: Lab, header: str) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    with volume.served():
        pass
    hold = slow_token(lab)
    trouble = hold if header == "hangs" else hold.with_suffix(".failing")
    trouble.touch()
    with volume.served("--mirror-timeout", "1", in_sync=False) as served:
        assert served.mirror_state() == "degraded"
        write(served, "write -P 9 1M 64k")
        trouble.unlink()
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be back")
    volume.assert_equal_disks()


def test_a_mirror_is_not_let_go_while_its_server_is_just_claiming_it(lab: Lab) -> None:
    """Its header would be written once more while somebody else has it."""
    volume = lab.volume("vol", SIZE_BYTES)
    hold = slow_token(lab)
    control, uuid = str(lab.state / "run" / "vol.control"), luks.read_uuid(str(volume.mirror))
    hold.touch()
    served = Served(volume)
    try:
        wait_until(lambda: os.path.exists(control), "the control socket")
        lab.lockstep("attach", "vol").failed(1, "it lets nobody in")
        with pytest.raises(DiskBusy):
            control_client.ask(control, "vol", "POST", "/v1/aside", mirror=uuid, **{"for": "rekey"})
        hold.unlink()
        served.await_ready()
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be in sync")
        served.stop()
    finally:
        served.kill()
    volume.assert_equal_disks()


# A server that takes its time over one step.
_SLOW = """
import asyncio, os, signal, sys
from lockstep.cli.main import main
from lockstep.service.mirror_session import MirrorSession
step = MirrorSession.{step}
async def slow(session, *arguments):
    if {stopping}:
        os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(3)
    return await step(session, *arguments)
MirrorSession.{step} = slow
main()
"""


@contextlib.contextmanager
def slow_server(lab: Lab, step: str, *, stopping: bool) -> Iterator["subprocess.Popen[bytes]"]:
    arguments = ("--state-dir", lab.state, "serve", "vol", "--key-file", lab.key)
    program = _SLOW.format(step=step, stopping=stopping)
    server = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE)
    assert server.stdout is not None
    with server.stdout as ready:
        try:
            assert ready.readline().startswith(b"ready")
            yield server
        finally:
            if not stopping:  # else it is at it, and ends at once if it is told a second time
                server.terminate()
            assert server.wait(60) == 0


def test_what_is_released_while_the_server_ends_is_on_record(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    with volume.served():
        pass
    with slow_server(lab, "release_held", stopping=True):
        lab.lockstep("sync", "vol", "--include-held")
    rows = map(json.loads, lab.lockstep("audit", "vol", "--json").ok().splitlines())
    assert [row["reason"] for row in rows if row["event"] == "sync"] == [
        f"{account(os.geteuid())} had the mirrors brought in sync, 0 held bytes included"
    ]


@pytest.mark.parametrize(
    ("step", "command"),
    [("step_aside", ("key", "rekey", "vol")), ("release_held", ("sync", "vol", "--include-held"))],
    ids=["rekey", "sync"],
)
def test_a_server_that_waits_for_its_mirror_is_waited_for(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, step: str, command: tuple[str, ...]
) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    with volume.served():
        pass
    monkeypatch.setattr(control_client.ask, "__defaults__", (1.0,))
    monkeypatch.setattr(control_client, "ANSWER_TIMEOUT_S", 1.0)
    key = ("--key-file", lab.key) if "rekey" in command else ()
    with slow_server(lab, step, stopping=False):
        lab.lockstep(*command, *key, environment=lab.quick_format()).ok()
