"""Who a connection to the unix socket belongs to, who may connect at all, and on whose behalf root attaches."""

import asyncio
import contextlib
import grp
import json
import os
import pwd
import resource
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.bodies import Choices, MemoryExport

from lockstep.errors import ActingNeedsRoot
from lockstep.nbd.identity import account, is_user_name
from lockstep.nbd.server import NbdServer
from lockstep.service.attach import require_right_to_act_for
from tests import nbd_client as nbd
from tests.forks import ForkLab
from tests.lab import MIB, Lab, Result, Served, Volume, run, wait_until
from tests.nbd_client import Client, pack_option

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another account needs root")
needs_devices = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse") or not os.path.exists("/dev/loop-control"),
    reason="needs root, /dev/fuse and loop devices",
)
NOBODY = "nobody"


@pytest.fixture
def open_lab() -> Iterator[Lab]:
    """A lab whose directory other accounts can enter, which pytest's own do not allow."""
    home = Path(tempfile.mkdtemp(prefix="lockstep-identity-"))
    home.chmod(0o755)
    yield ForkLab(home)
    shutil.rmtree(home)


@pytest.fixture
def volume(open_lab: Lab) -> Volume:
    return open_lab.volume("vol", 16 * MIB)


def as_account(name: str, *command: str, groups: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    account = pwd.getpwnam(name)
    more = ",".join(str(grp.getgrnam(group).gr_gid) for group in groups)
    supplementary = [f"--groups={more}"] if more else ["--clear-groups"]
    switch = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", *supplementary]
    return subprocess.run([*switch, *command], capture_output=True, text=True, check=False, timeout=60)


def users(served: Served) -> list[str]:
    return [client["user"] for client in served.status()["clients"]]


# --- the group of the socket ------------------------------------------------------------------------------


def test_without_a_group_the_socket_is_its_owners_alone(volume: Volume) -> None:
    with volume.served() as served:
        assert stat.S_IMODE(os.stat(served.socket).st_mode) == 0o600


@needs_root
def test_members_of_the_group_may_connect_and_are_themselves(open_lab: Lab, volume: Volume) -> None:
    socket = open_lab.home / "sock"
    volume.grant("nobody")
    with volume.served("--socket", socket, "--socket-group", "nogroup") as served:
        found = socket.stat()
        assert (stat.S_IMODE(found.st_mode), grp.getgrgid(found.st_gid).gr_name) == (0o660, "nogroup")
        assert "closed to the group" not in served.log.read_text()
        member = as_account(NOBODY, "qemu-io", "-f", "raw", "-c", "write -P 5 0 4k", served.uri)
        assert "wrote 4096/4096" in member.stdout, member
        assert "nobody connected (unix socket, pid " in served.log.read_text()
        stranger = as_account("daemon", "nbdinfo", "--size", served.uri)
        assert stranger.returncode != 0
        assert "Permission denied" in stranger.stderr
    volume.assert_equal_disks()


@needs_root
def test_a_group_that_cannot_reach_the_socket_is_warned_of(volume: Volume) -> None:
    with volume.served("--socket-group", "nogroup") as served:
        assert f"{volume.lab.state} is closed to the group" in served.log.read_text()


def test_a_socket_that_cannot_be_given_to_the_group_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, user: int, group: int) -> None:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600, "nobody else may connect before the group is set"
        raise PermissionError(1, "Operation not permitted")

    async def listen() -> None:
        server = NbdServer(MemoryExport(MIB, Choices(b"")))
        with pytest.raises(PermissionError):
            await server.listen_unix(str(tmp_path / "sock"), 0)
        await server.drain()

    monkeypatch.setattr(os, "chown", refuse)
    asyncio.run(listen())
    assert not (tmp_path / "sock").exists()


def test_who_cannot_be_looked_up_for_want_of_descriptors_is_taken_for_nobody_else(volume: Volume) -> None:
    with volume.served() as served, contextlib.ExitStack() as clients:
        pid = served.process.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        for spare in range(4):
            used = len(os.listdir(f"/proc/{pid}/fd"))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + spare, limits[1]))
            for _ in range(3):
                client = clients.enter_context(Client(served.socket))
                with contextlib.suppress(EOFError, ConnectionError):
                    client.go("vol")
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            assert set(users(served)) <= {account(os.geteuid())}
        clients.enter_context(Client(served.socket).go("vol"))
        assert set(users(served)) == {account(os.geteuid())}


# --- on behalf of another ---------------------------------------------------------------------------------


@needs_root
def test_root_connects_on_behalf_of_a_user(volume: Volume) -> None:
    with volume.served() as served:
        with Client(served.socket).go("vol@alice") as client:
            client.write(0, b"from alice")
            assert users(served) == ["alice"]
            assert "alice connected (unix socket, pid " in served.log.read_text()
        with Client(served.socket).go("vol"):
            wait_until(lambda: users(served) == ["root"], "alice to be gone")
        with Client(served.socket) as client:
            client.greet()
            client.send(pack_option(nbd.OPT_EXPORT_NAME, b"vol@bob"))
            assert len(client.receive(10)) == 10
            wait_until(lambda: users(served) == ["bob"], "bob to be there")
        assert "alice" not in run("nbdinfo", "--list", served.uri)
        assert run("nbdinfo", "--size", served.uri.replace("/vol?", "/vol%40alice?")).strip() == str(16 * MIB)
    assert volume.target.read_bytes()[:10] == b"from alice"
    rows = [json.loads(line) for line in volume.lab.lockstep("audit", "vol", "--json").ok().splitlines()]
    came = {row["user"]: row["origin"] for row in rows if row["event"] == "connect"}
    assert came["alice"].endswith(", root on behalf of alice"), "it was not alice who came"
    assert came["bob"].endswith(", root on behalf of bob")
    assert "behalf" not in came["root"]


PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
from tests import nbd_client as nbd
with nbd.Client(sys.argv[2]) as client:
    client.greet()
    assert client.option(nbd.OPT_STRUCTURED_REPLY) == [(nbd.REP_ACK, b"")]
    for option in (nbd.OPT_INFO, nbd.OPT_GO):
        print(option, hex(client.option(option, nbd.pack_info(b"vol@root"))[-1][0]))
    for option in (nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT):
        print(option, hex(client.option(option, nbd.pack_queries(b"vol@root", b"base:allocation"))[-1][0]))
    client.send(nbd.pack_option(nbd.OPT_EXPORT_NAME, b"vol@root"))
    print("closed", client.assert_closed())
"""


@needs_root
def test_nobody_else_acts_on_behalf_of_anybody(open_lab: Lab, volume: Volume) -> None:
    tree = open_lab.home / "tree" / "tests"
    tree.mkdir(parents=True)
    (tree / "__init__.py").touch()
    shutil.copy(Path(nbd.__file__), tree)
    probe = open_lab.home / "probe.py"
    probe.write_text(PROBE)
    socket = open_lab.home / "sock"
    with volume.served("--socket", socket, "--socket-group", "nogroup") as served:
        done = as_account(NOBODY, "/usr/bin/python3", str(probe), str(tree.parent), str(socket))
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines == ["6 0x80000002", "7 0x80000002", "9 0x80000002", "10 0x80000002", "closed b''"]
        assert "only root on this machine may act on behalf of a user" in served.log.read_text()


@needs_devices
def test_attach_on_behalf_of_a_user(volume: Volume) -> None:
    lab = volume.lab

    def lockstep(*arguments: object) -> Result:
        return lab.lockstep(*arguments)

    with volume.served() as served, contextlib.ExitStack() as undo:
        undo.callback(lockstep, "detach", "vol")
        device = lockstep("attach", "vol", "--user", "alice").ok().strip()
        assert users(served) == ["alice"]
        assert lockstep("attach", "vol", "--user", "alice").ok().strip() == device
        lockstep("attach", "vol").failed(1, "on behalf of alice", "lockstep detach vol")
        lockstep("attach", "vol", "--user", "bob").failed(1, "on behalf of alice")
        with open(device, "r+b", buffering=0) as disk:
            disk.write(b"a" * 4096)
            os.fsync(disk.fileno())
        lockstep("detach", "vol").ok()
        assert volume.target.read_bytes()[:4096] == b"a" * 4096
        lockstep("attach", "vol").ok()
        wait_until(lambda: users(served) == ["root"], "root itself to be attached")
        lockstep("detach", "vol").ok()
        lockstep("attach", "vol", "--user", "*").failed(2, "cannot be the name of a user")


def test_only_root_attaches_on_behalf_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ActingNeedsRoot) as told:
        require_right_to_act_for("alice")
    assert told.value.exit_code == 4


@pytest.mark.parametrize("name", ["alice", "Zoë", "alice@example.org", "a b", "x" * 64, "EXAMPLE\\alice", "nbd/host"])
def test_a_name_of_a_user(name: str) -> None:
    assert is_user_name(name)


@pytest.mark.parametrize("name", ["", "*", " a", "a ", "a\tb", "a\n", "\x7f", "x" * 65, "\u2028", "a\u200bb"])
def test_no_name_of_a_user(name: str) -> None:
    assert not is_user_name(name)
