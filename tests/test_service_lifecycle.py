"""A volume's life as its user sees it: started, used, stopped, killed, hung, attached, listed, removed.

The servers are real processes. What they were doing when a signal came is arranged with SIGSTOP and SIGCONT, not with
luck: a stopped server finds its signal and its clients' requests together when it goes on.
"""

import contextlib
import filecmp
import json
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import (
    DetachRefused,
    LockstepError,
    MirrorIncomplete,
    NotServed,
    ServerSilent,
    StillAttached,
    StillServed,
    VolumeUnknown,
)
from lockstep.service.control_client import ANSWER_TIMEOUT_S, ask_status
from tests.lab import MIB, Lab, Result, Served, Volume, loop_devices, opened, run, wait_until
from tests.test_service_refusals import assert_error, everything_below, mounted

needs_attach = pytest.mark.skipif(
    os.geteuid() != 0
    or not os.path.exists("/dev/fuse")
    or not os.path.exists("/dev/loop-control")
    or any(shutil.which(tool) is None for tool in ("nbdfuse", "fusermount3", "losetup")),
    reason="attaching needs root, /dev/fuse, loop devices, nbdfuse",
)

SLOT_BYTES = 64 << 10
LENGTHS = (4096, 3, 65536, 513)


# --- a client of a few lines ------------------------------------------------------------------------------


class Client:
    """An NBD client that can stop halfway (doc/proto.md: fixed newstyle, EXPORT_NAME)."""

    def __init__(self, path: str, *, handshake: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        if handshake:
            assert self.receive(16)[:16] == b"NBDMAGICIHAVEOPT"
            self.receive(2)
            self.socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))  # the default export
            self.receive(10)

    def close(self) -> None:
        self.socket.close()

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            assert more, "the server closed the connection"
            data += more
        return data

    @staticmethod
    def request(command: int, cookie: int, offset: int, length: int, payload: bytes = b"") -> bytes:
        return struct.pack(">IHHQQI", 0x25609513, 0, command, cookie, offset, length) + payload

    def replies(self) -> Iterator[tuple[int, int]]:
        """(cookie, error) of every simple reply until the connection ends; it must end between two replies."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while more := self.socket.recv(65536):
                data += more
        assert len(data) % 16 == 0
        for magic, error, cookie in struct.iter_unpack(">IIQ", data):
            assert magic == 0x67446698
            yield cookie, error


def slot(number: int) -> tuple[int, bytes]:
    """Where the write with this number goes, and what it carries."""
    length = LENGTHS[number % len(LENGTHS)]
    offset = number * SLOT_BYTES
    if length < SLOT_BYTES:
        offset += number % 7
    return offset, struct.pack("<I", number + 1).ljust(8, b"w") * (length // 8) or b"abc"


def at_rest(lab: Lab, name: str = "vol") -> dict[str, Any]:
    (volume,) = json.loads(lab.lockstep("status", name, "--json").ok())["volumes"]
    assert isinstance(volume, dict)
    return volume


def sockets(lab: Lab) -> list[str]:
    return [path.name for path in (lab.state / "run").iterdir() if path.is_socket()]


def stopped(process: "subprocess.Popen[str]") -> None:
    """SIGSTOP, and wait until it stands still."""
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rsplit(")")[-1].split()[0] == "T", "it to stop")


# --- stopping in order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains(lab: Lab, number: signal.Signals) -> None:
    """What was answered is on both disks; what was not is either there whole or not at all; the end is in order."""
    volume = lab.volume()
    slots = 16 * MIB // SLOT_BYTES
    with volume.served() as server, contextlib.closing(Client(server.socket)) as client:
        for cookie in range(16):
            offset, data = slot(cookie)
            client.socket.sendall(Client.request(1, cookie, offset, len(data), data))
        answered = {struct.unpack(">IIQ", client.receive(16))[2] for _ in range(16)}
        assert answered == set(range(16))
        stopped(server.process)
        client.socket.setblocking(False)
        rest = b"".join(Client.request(1, n, slot(n)[0], len(slot(n)[1]), slot(n)[1]) for n in range(16, slots))
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < len(rest):
                sent += client.socket.send(rest[sent : sent + 65536])
        assert sent > 100_000, "nothing was in flight"
        client.socket.settimeout(60)
        server.process.send_signal(number)
        server.process.send_signal(signal.SIGCONT)
        later = dict(client.replies())
        assert set(later.values()) <= {0}
        assert server.process.wait(60) == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text()
    assert sockets(lab) == []
    volume.assert_equal_disks()
    target = volume.target.read_bytes()
    for cookie in range(slots):
        offset, data = slot(cookie)
        found = target[offset : offset + len(data)]
        assert found == data or (cookie not in answered | later.keys() and not any(found)), f"write {cookie} is torn"
    described = at_rest(lab)["mirrors"][0]
    assert (described["state"], described["dirty_bytes"]) == ("in-sync", 0)


def test_told_again_and_again_it_still_ends_in_order(lab: Lab) -> None:
    volume = lab.volume("vol", MIB)
    with volume.served() as server:
        while server.process.poll() is None:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                server.process.send_signal(number)
            time.sleep(0.003)
        assert server.process.returncode == 0
    assert at_rest(lab)["mirrors"][0]["state"] == "in-sync"


_HANGING = """
import asyncio
from lockstep.cli.main import main
from lockstep.service.mirror_session import MirrorSession
MirrorSession.claim = lambda session: asyncio.Event().wait()
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_before_it_is_ready_it_ends_though_its_mirror_hangs(lab: Lab, number: signal.Signals) -> None:
    server = Served(lab.volume("vol", MIB), program=_HANGING)
    try:
        wait_until(lambda: len(sockets(lab)) == 2, "the sockets of the server")
        server.process.send_signal(number)
        assert server.process.wait(20) == 130
        assert sockets(lab) == []
        assert "Traceback" not in server.log.read_text()
    finally:
        server.kill()


def test_nohup_keeps_it_when_its_terminal_is_closed(lab: Lab) -> None:
    lab.volume("vol", MIB)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Volume(lab, "vol", lab.home / "vol.target", lab.home / "vol.mirror", None).served() as server:
            server.process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
            assert server.mirror_state() == "in-sync"
            assert server.process.poll() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_idle_and_stubborn_clients_do_not_keep_it_from_stopping(lab: Lab) -> None:
    volume = lab.volume()
    with volume.served() as server, contextlib.ExitStack() as clients:
        idle, deaf, shy = (
            clients.enter_context(contextlib.closing(Client(server.socket, handshake=handshake)))
            for handshake in (True, True, False)
        )
        deaf.socket.sendall(b"".join(Client.request(0, n, 0, 8 * MIB) for n in range(32)))  # and never reads
        half = Client.request(1, 99, 0, 8 * MIB, b"half")
        idle.socket.sendall(half)  # the rest of this write never comes
        wait_until(lambda: len(server.status()["clients"]) == 2, "two clients to be known")
        assert shy.receive(8) == b"NBDMAGIC"
        server.process.terminate()
        assert server.process.wait(30) == 0
    assert sockets(lab) == []
    volume.assert_equal_disks()
    assert volume.target.read_bytes()[:4] != b"half"


_IMPATIENT = """
from lockstep.cli.main import main
from lockstep.service import control
control.STALL_S = 0.3
main()
"""


@pytest.mark.parametrize(
    "said",
    [b"POST /v1/sync HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{", bytes(100_000)],
    ids=["half a request", "what has an answer that nobody takes"],
)
def test_who_stalls_at_the_control_socket_does_not_keep_it_from_stopping(lab: Lab, said: bytes) -> None:
    volume = lab.volume("vol", MIB)
    with volume.served(program=_IMPATIENT) as server, socket.socket(socket.AF_UNIX) as manager:
        manager.connect(str(lab.state / "run" / "vol.control"))
        manager.sendall(said)
        server.process.terminate()
        assert server.process.wait(20) == 0


def test_a_stop_during_the_first_copy(lab: Lab) -> None:
    """What is copied by then stays copied; what is not is known, and the mirror does not pass for a copy."""
    volume = lab.volume("vol", 256 * MIB)
    with volume.served(in_sync=False) as server:

        def is_under_way() -> bool:
            sync = ask_status(f"{lab.state}/run/vol.control", "vol")["mirrors"][0]["sync"]
            return bool(sync is None or sync["done_bytes"])

        wait_until(is_under_way, "the copy to be under way")
        server.stop()
    described = at_rest(lab)["mirrors"][0]
    assert described["state"] == "behind"
    assert not described["consistent"]
    assert 0 < described["dirty_bytes"] < 256 * MIB
    assert_error(volume.restore(lab.home / "output"), MirrorIncomplete(path=volume.mirror, state="syncing"))
    assert not (lab.home / "output").exists()
    with volume.served() as server:
        assert f"copying {described['dirty_bytes']} bytes" in server.log.read_text()
    volume.restore(lab.home / "output").ok()
    assert filecmp.cmp(volume.target, lab.home / "output", shallow=False)


def test_a_killed_server_is_followed_by_one_that_repairs(lab: Lab) -> None:
    volume = lab.volume()
    with volume.served() as server, contextlib.closing(Client(server.socket)) as client:
        client.socket.sendall(Client.request(1, 0, 5, 1 * MIB, b"k" * MIB) + Client.request(3, 1, 0, 0))
        client.receive(32)
        for number in range(64):
            offset, data = slot(number + 32)
            client.socket.sendall(Client.request(1, number, offset, len(data), data))
        server.kill()
    assert sorted(sockets(lab)) == ["vol.control", "vol.sock"]
    described = at_rest(lab)
    assert not described["serving"]
    assert described["uri"] is None
    assert described["mirrors"][0]["state"] == "behind"
    assert volume.target.read_bytes()[5 : 5 + MIB] == b"k" * MIB, "what was flushed is there"
    with volume.served():
        pass
    volume.assert_equal_disks()
    assert sockets(lab) == []


def test_what_status_calls_in_sync_can_be_restored_at_that_moment(lab: Lab) -> None:
    """P4: the target is destroyed, and the server with it, while the mirror is in sync."""
    volume = lab.volume("vol", 4 * MIB, content=b"all of it".ljust(512) * 100)
    with volume.served() as server:
        server.kill()
    content = volume.target.read_bytes()
    volume.target.unlink()
    output = lab.home / "output"
    volume.restore(output).ok()
    assert output.read_bytes() == content


# --- status and list --------------------------------------------------------------------------------------

# DESIGN section 5, as types.
NUMBER = (int, float)
SYNC = {"done_bytes": int, "total_bytes": int, "rate_bytes_s": NUMBER, "eta_s": (*NUMBER, type(None))}
CLIENT = {"user": str, "verdict": str, "reason": str, "until": (*NUMBER, type(None))}
MIRROR = {
    "path": str,
    "uuid": str,
    "state": str,
    "dirty_bytes": int,
    "held_bytes": int,
    "consistent": bool,
    "sync": (dict, type(None)),
    "sought": bool,
    "error": (str, type(None)),
    "held": list,
    "frozen_since": (*NUMBER, type(None)),
    "header": (str, type(None)),
    "header_backup": (str, type(None)),
}
TARGET = {
    "path": str,
    "direct": bool,
    "error": (str, type(None)),
    "restore": (dict, type(None)),
}
VOLUME = {
    "name": str,
    "size_bytes": int,
    "target": dict,
    "serving": bool,
    "uri": (str, type(None)),
    "clients": list,
    "mirrors": list,
}


def conforms(value: dict[str, Any], shape: dict[str, Any]) -> None:
    assert list(value) == list(shape)
    for key, kind in shape.items():
        assert isinstance(value[key], kind), (key, value[key])
        assert kind in (bool,) or not isinstance(value[key], bool), (key, value[key])


def status_conforms(text: str) -> list[dict[str, Any]]:
    document = json.loads(text)
    assert text.count("\n") == 1
    assert list(document) == ["volumes"]
    volumes: list[dict[str, Any]] = document["volumes"]
    for volume in volumes:
        conforms(volume, VOLUME)
        conforms(volume["target"], TARGET)
        assert volume["serving"] == (volume["uri"] is not None)
        for client in volume["clients"]:
            conforms(client, CLIENT)
        for mirror in volume["mirrors"]:
            conforms(mirror, MIRROR)
            assert mirror["state"] in ("in-sync", "syncing", "behind", "degraded")
            if mirror["sync"] is not None:
                conforms(mirror["sync"], SYNC)
    return volumes


def test_status_json_is_what_the_contract_says(lab: Lab) -> None:
    assert status_conforms(lab.lockstep("status", "--json").ok()) == []
    volume = lab.volume("vol", 128 * MIB)
    lab.lockstep("create", "alone", "--target", lab.disk("alone", MIB)).ok()

    alone, fresh = status_conforms(lab.lockstep("status", "--json").ok())
    assert (alone["name"], alone["mirrors"], alone["serving"]) == ("alone", [], False)
    assert fresh["mirrors"][0]["state"] == "behind"
    assert fresh["mirrors"][0]["dirty_bytes"] == 128 * MIB

    with volume.served(in_sync=False) as server:
        stopped(server.process)  # while it copies; it answers when it goes on, not much later
        control = f"{lab.state}/run/vol.control"
        command = [sys.executable, "-m", "lockstep", "--state-dir", str(lab.state), "status", "vol", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
            wait_until(lambda: Path("/proc/net/unix").read_text().count(control) > 1, "status to connect")
            server.process.send_signal(signal.SIGCONT)
            output = asking.communicate(timeout=60)[0]
        (syncing,) = status_conforms(output)
        assert syncing["mirrors"][0]["state"] == "syncing"
        sync = syncing["mirrors"][0]["sync"]
        assert 0 <= sync["done_bytes"] <= sync["total_bytes"] == 128 * MIB
        wait_until(lambda: server.mirror_state() == "in-sync", "the copy to end")
        with contextlib.closing(Client(server.socket)):
            (served,) = status_conforms(lab.lockstep("status", "vol", "--json").ok())
        assert served["uri"] == server.uri == f"nbd+unix:///vol?socket={lab.state}/run/vol.sock"
        (client,) = served["clients"]
        assert (client["user"], client["verdict"], client["until"]) == ("root", "allowed", None)
        assert (served["mirrors"][0]["sync"], served["mirrors"][0]["dirty_bytes"]) == (None, 0)
        text = lab.lockstep("status", "vol").ok()
        assert server.uri in text
        assert "in-sync" in text
    (closed,) = status_conforms(lab.lockstep("status", "vol", "--json").ok())
    assert (closed["mirrors"][0]["state"], closed["mirrors"][0]["consistent"]) == ("in-sync", True)
    assert run("cryptsetup", "luksUUID", str(volume.mirror)).strip() == closed["mirrors"][0]["uuid"]


def test_who_watches_through_a_pipe_is_shown_every_second(lab: Lab) -> None:
    lab.lockstep("create", "vol", "--target", lab.disk("target", MIB)).ok()
    command = [sys.executable, "-m", "lockstep", "--state-dir", str(lab.state), "status", "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        shown = (line for line in watching.stdout if line.startswith("vol "))
        assert next(shown) == next(shown)
        watching.terminate()
        assert watching.wait(60) == 130


@pytest.mark.parametrize("header", [False, True])
def test_a_mirror_whose_data_is_not_there_is_not_called_in_sync(lab: Lab, header: bool) -> None:
    volume = lab.volume("vol", MIB, header=header)
    with volume.served():
        pass

    def described() -> dict[str, Any]:
        (mirror,) = json.loads(lab.lockstep("status", "vol", "--json").ok())["volumes"][0]["mirrors"]
        return dict(mirror)

    assert (described()["state"], described()["error"]) == ("in-sync", None)
    os.truncate(volume.mirror, volume.mirror.stat().st_size - 1)
    assert (described()["state"], described()["consistent"]) == ("behind", False)
    assert described()["error"]
    volume.mirror.unlink()
    assert described()["state"] == "behind"


def test_a_whole_mirror_is_called_so_when_its_target_is_gone(lab: Lab) -> None:
    volume = lab.volume("vol", MIB, content=os.urandom(MIB))
    with volume.served():
        pass
    content = volume.target.read_bytes()
    volume.target.unlink()
    (found,) = status_conforms(lab.lockstep("status", "vol", "--json").ok())
    assert found["target"]["error"] == f"There is no disk at {volume.target}."
    (mirror,) = found["mirrors"]
    assert (mirror["state"], mirror["consistent"], mirror["dirty_bytes"]) == ("in-sync", True, 0)
    assert "There is no disk at" in lab.lockstep("status").ok()
    volume.target.write_bytes(content)
    (mirror,) = at_rest(lab)["mirrors"]
    assert mirror["state"] == "behind", "what has that name now may be anything"


def test_a_hung_server_is_named_within_its_time(lab: Lab) -> None:
    volume = lab.volume("vol", MIB)
    other = lab.volume("other", MIB)
    with volume.served() as server, other.served() as healthy:
        stopped(server.process)
        try:
            began_s = time.monotonic()
            result = lab.lockstep("status", "vol")
            took_s = time.monotonic() - began_s
            assert_error(result, ServerSilent(volume="vol", reason="timed out"))
            assert ANSWER_TIMEOUT_S - 1 < took_s < ANSWER_TIMEOUT_S + 15
            assert "vol" in lab.lockstep("list").ok(), "the registry does not hang with it"
            assert healthy.mirror_state() == "in-sync"
            assert_error(lab.lockstep("remove", "vol"), StillServed(volume="vol", action="removed"))
        finally:
            server.process.send_signal(signal.SIGCONT)
        assert server.mirror_state() == "in-sync"


@pytest.mark.parametrize("mirrored", [True, False])
def test_a_server_that_gives_no_answer_is_told_among_all_volumes(lab: Lab, mirrored: bool) -> None:
    if mirrored:
        lab.volume("vol", MIB)
    else:
        lab.lockstep("create", "vol", "--target", lab.disk("target", MIB)).ok()
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(lab.state / "run" / "vol.control"))
        control.listen()
        answering = threading.Thread(target=lambda: control.accept()[0].close())
        answering.start()
        (found,) = status_conforms(lab.lockstep("status", "--json").ok())
        answering.join()
    described = found["mirrors"][0] if mirrored else found["target"]
    assert "The server of vol runs but does not answer" in described["error"]


def test_list_and_remove(lab: Lab) -> None:
    assert "There are no volumes" in lab.lockstep("list").ok()
    assert json.loads(lab.lockstep("list", "--json").ok()) == {"volumes": []}
    volume = lab.volume("vol", MIB, header=True)
    assert_error(lab.lockstep("remove", "vo"), VolumeUnknown(volume="vo", near=("vol",), hint=" Did you mean vol?"))
    (listed,) = json.loads(lab.lockstep("list", "--json").ok())["volumes"]
    conforms(listed, {"name": str, "id": str, "size_bytes": int, "target": dict, "on_denied": str, "mirrors": list})
    (mirror,) = listed["mirrors"]
    conforms(mirror, {"path": str, "header": str, "uuid": str})
    for fragment in ("vol", "1.0 MiB", str(volume.target), str(volume.mirror)):
        assert fragment in lab.lockstep("list").ok()
    with volume.served() as server:
        assert_error(lab.lockstep("remove", "vol"), StillServed(volume="vol", action="removed"))
        assert server.mirror_state() == "in-sync"
    before = {name: seen for name, seen in everything_below(lab.home).items() if not name.startswith("state/")}
    said = lab.lockstep("remove", "vol").ok()
    assert str(volume.target) in said
    assert "lockstep restore" in said
    after = {name: seen for name, seen in everything_below(lab.home).items() if not name.startswith("state/")}
    assert after == before
    known = [path.suffix for path in lab.state.rglob("*") if mirror["uuid"] in path.name]
    assert known == [".borrowed"], "what was known of its mirror, but for an empty lock"
    assert json.loads(lab.lockstep("list", "--json").ok()) == {"volumes": []}
    assert_error(lab.lockstep("remove", "vol"), VolumeUnknown(volume="vol", near=(), hint=""))
    output = lab.home / "output"
    volume.restore(output).ok()
    assert output.read_bytes() == volume.target.read_bytes()


# --- where the state directory is -------------------------------------------------------------------------


def test_the_state_directory_is_where_the_nearest_word_says(lab: Lab, tmp_path: Path) -> None:
    for place in ("before", "after", "environment"):
        lab.state = tmp_path / place
        lab.lockstep("create", place, "--target", lab.disk(f"{place}.target", MIB)).ok()

    def names(before: list[str], after: list[str], environment: str | None) -> list[str]:
        surroundings = {key: value for key, value in os.environ.items() if key != "LOCKSTEP_STATE_DIR"}
        if environment is not None:
            surroundings["LOCKSTEP_STATE_DIR"] = environment
        done = subprocess.run(
            [sys.executable, "-m", "lockstep", *before, "list", "--json", *after],
            capture_output=True,
            check=True,
            env=surroundings,
            cwd=tmp_path,
        )
        return [volume["name"] for volume in json.loads(done.stdout)["volumes"]]

    assert names([], [], "environment") == ["environment"], "a relative path counts from the current directory"
    assert names(["--state-dir", "before"], [], str(tmp_path / "environment")) == ["before"]
    assert names([], [f"--state-dir={tmp_path / 'after'}"], str(tmp_path / "environment")) == ["after"]
    assert names(["--state-dir", "before"], ["--state-dir", "after"], None) == ["after"]


def test_a_relative_socket_is_announced_so_that_everybody_finds_it(lab: Lab, tmp_path: Path) -> None:
    lab.lockstep("create", "vol", "--target", lab.disk("target", MIB)).ok()
    command = [sys.executable, "-m", "lockstep", "--state-dir", str(lab.state), "serve", "vol", "--socket", "here"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == f"ready nbd+unix:///vol?socket={tmp_path / 'here'}\n"
            assert at_rest(lab)["uri"] == f"nbd+unix:///vol?socket={tmp_path / 'here'}"
        finally:
            server.terminate()


def test_a_state_directory_with_blanks_in_its_name(lab: Lab) -> None:
    """An NBD URI is a URI: what libnbd and QEMU cannot read as one is not ready for clients."""
    lab.state = lab.home / "50% off & on"
    lab.lockstep("create", "vol", "--target", lab.disk("target", MIB)).ok()
    volume = Volume(lab, "vol", lab.home / "target", lab.home / "none", None)
    with volume.served(in_sync=False) as server:
        run("nbdinfo", server.uri)
        run("qemu-io", "-f", "raw", "-c", "read 0 512", server.uri)


def test_ready_names_every_address(lab: Lab) -> None:
    lab.lockstep("create", "vol", "--target", lab.disk("target", MIB)).ok()
    volume = Volume(lab, "vol", lab.home / "target", lab.home / "none", None)
    with volume.served("--tcp", "127.0.0.1:0", in_sync=False) as server:
        uri = server.next_uri()
        assert uri.startswith("nbd://127.0.0.1:")
        assert uri.endswith("/vol")
        assert '"export-size": 1048576' in run("nbdinfo", "--json", uri)


# --- attach and detach ------------------------------------------------------------------------------------


@pytest.fixture
def attachable(lab: Lab) -> Iterator[tuple[Volume, Served]]:
    volume = lab.volume()
    with volume.served() as server:
        yield volume, server
        subprocess.run(["umount", "-q", str(lab.home / "point")], check=False)
        result = lab.lockstep("detach", "vol")
        assert result.code == 0, result.err
        assert str(lab.state) not in run("losetup", "--list", "--noheadings", "--output", "BACK-FILE")
        assert str(lab.state) not in Path("/proc/self/mountinfo").read_text()


@needs_attach
def test_attach_and_detach(lab: Lab, attachable: tuple[Volume, Served]) -> None:
    volume, server = attachable
    device = lab.lockstep("attach", "vol").ok().strip()
    assert stat.S_ISBLK(os.stat(device).st_mode)
    assert int(run("blockdev", "--getsize64", device)) == 16 * MIB
    assert lab.lockstep("attach", "vol").ok().strip() == device, "attaching what is attached is a no-op"
    assert [client["user"] for client in server.status()["clients"]] == ["root"]

    point = lab.home / "point"
    point.mkdir()
    run("mkfs.ext4", "-q", device)
    with mounted(device, str(point)):
        (point / "file").write_bytes(b"through the whole stack" * 1000)
        refused(lab.lockstep("detach", "vol"), DetachRefused(device=device, export="vol", users=f"mounted at {point}"))
        assert (point / "file").exists()
        assert lab.lockstep("attach", "vol").ok().strip() == device
    assert lab.lockstep("detach", "vol").ok() == f"Detached {device}.\n"
    again = lab.lockstep("detach", "vol")
    assert (again.code, again.out) == (0, "vol is not attached.\n")
    device = lab.lockstep("attach", "vol").ok().strip()
    run("losetup", "--detach", device)
    wait_until(lambda: device not in loop_devices(), "the device to go")
    assert lab.lockstep("detach", "vol").ok() == "Detached what was left of vol.\n"
    assert b"through the whole stack" * 10 in volume.target.read_bytes()
    assert b"through the whole stack" not in volume.mirror.read_bytes()
    server.stop()
    volume.assert_equal_disks()


def refused(result: Result, error: LockstepError) -> None:
    assert_error(result, error)


@needs_attach
@pytest.mark.parametrize("name", ["a\udcff b", "a\u00a0\n%25"])
def test_a_state_directory_whose_name_is_odd(lab: Lab, name: str) -> None:
    lab.state = lab.home / name
    volume = lab.volume("vol", MIB)
    with volume.served() as server:
        assert '"export-size": 1048576' in run("nbdinfo", "--json", server.uri)
        device = lab.lockstep("attach", "vol").ok().strip()
        assert lab.lockstep("attach", "vol").ok().strip() == device, "attaching what is attached is a no-op"
        assert lab.lockstep("detach", "vol").ok() == f"Detached {device}.\n"
    with opened(volume, "--socket", f"{lab.state}.sock") as (_mirror, uri):
        assert '"export-size": 1048576' in run("nbdinfo", "--json", uri)


@needs_attach
def test_an_attached_volume_is_not_removed(lab: Lab, attachable: tuple[Volume, Served]) -> None:
    volume, server = attachable
    device = lab.lockstep("attach", "vol").ok().strip()
    refused(lab.lockstep("remove", "vol"), StillServed(volume="vol", action="removed"))
    server.stop()
    refused(lab.lockstep("remove", "vol"), StillAttached(volume="vol", device=device))
    result = lab.lockstep("detach", "vol")
    assert result.code in (0, 1), result.err  # the server is gone: whether there was anything left to flush is open
    assert not any(path.startswith(str(lab.state)) for path in loop_devices().values())
    lab.lockstep("remove", "vol").ok()
    lab.lockstep("create", "vol", "--target", volume.target).ok()  # for the end of the fixture
    volume.assert_equal_disks()


def test_what_is_not_served_cannot_be_attached(lab: Lab) -> None:
    lab.lockstep("create", "vol", "--target", lab.disk("target", MIB)).ok()
    refused(lab.lockstep("attach", "vol"), NotServed(volume="vol"))
    refused(lab.lockstep("attach", "vo"), VolumeUnknown(volume="vo", near=("vol",), hint=" Did you mean vol?"))
    refused(lab.lockstep("detach", "vo"), VolumeUnknown(volume="vo", near=("vol",), hint=" Did you mean vol?"))
    assert lab.lockstep("detach", "vol").ok() == "vol is not attached.\n"
