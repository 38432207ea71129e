"""A state directory of an account other than root's, in which root works too: as attach and drill demand of it."""

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

from lockstep.crypto import luks
from tests.lab import MIB, Lab, needs, write

NOBODY = pwd.getpwnam("nobody").pw_uid


def give_away(lab: Lab) -> None:
    for path in (lab.state, *lab.state.rglob("*")):
        os.chown(path, NOBODY, -1)


def owners(lab: Lab) -> dict[str, int]:
    return {str(path.relative_to(lab.state)): path.stat().st_uid for path in lab.state.rglob("*")}


@needs("qemu-io", root=True)
def test_what_root_makes_is_the_owners(lab: Lab) -> None:
    volume = lab.volume("vol", MIB)
    with volume.served():
        give_away(lab)
    assert set(owners(lab).values()) == {NOBODY}
    for lock in (lab.state / "run").iterdir():
        lock.unlink()
    lab.lockstep("verify", "vol", "--repair", "--key-file", lab.key).ok()
    found = owners(lab)
    assert {Path(name).suffix for name in found} >= {".lock", ".borrowed", ".intent"}
    assert set(found.values()) == {NOBODY}
    with volume.served() as served:
        write(served, "write -P 7 0 64k")
    new = lab.home / "new"
    new.write_bytes(b"another")
    key = ("--key-file", lab.key, "--new-key-file", new, "--iter-time", "10")
    lab.lockstep("key", "add", "vol", *key, environment=lab.quick_format()).ok()
    assert set(owners(lab).values()) == {NOBODY}


@needs("/", root=True)
def test_a_state_directory_that_root_is_the_first_to_use_is_its_owners(lab: Lab) -> None:
    lab.state.mkdir(mode=0o700)
    os.chown(lab.state, NOBODY, -1)
    lab.lockstep("list").ok()
    assert set(owners(lab)) == {"registry.db", "run", "intent", "held", "filling"}
    assert set(owners(lab).values()) == {NOBODY}


_LOCKED = """
import sqlite3, subprocess, sys
from lockstep.service.state import State

state = State(sys.argv[1])
registry = state.registry_place.path
connection = sqlite3.connect(registry, isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
with state.borrowing_lock("of-a-mirror"):
    pass
other = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')"
done = subprocess.run([sys.executable, "-c", other, registry], capture_output=True, check=False)
assert b"database is locked" in done.stderr, (done.returncode, done.stderr)
"""


@needs("/", root=True)
def test_what_is_handed_over_keeps_the_locks_on_the_registry(lab: Lab) -> None:
    """As when a server of root's looks for its mirror while another thread of it writes the audit trail."""
    lab.lockstep("list").ok()
    give_away(lab)
    done = subprocess.run([sys.executable, "-c", _LOCKED, str(lab.state)], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


@needs("/", root=True)
def test_a_file_that_the_owner_linked_here_is_not_given_to_them(lab: Lab) -> None:
    volume = lab.volume("vol", MIB)
    shadow, absent = lab.home / "shadow", lab.home / "absent"
    shadow.write_bytes(b"root's own")
    with volume.served():
        give_away(lab)
    (lab.state / "held" / "one.held").symlink_to(shadow)
    os.link(shadow, lab.state / "held" / "two.held")
    lab.lockstep("verify", "vol", "--key-file", lab.key).ok()
    assert (shadow.stat().st_uid, shadow.read_bytes()) == (0, b"root's own")
    keys = lab.state / "run" / f"{luks.read_uuid(str(volume.mirror))}.keys"
    keys.unlink(missing_ok=True)
    keys.symlink_to(absent)
    lab.lockstep("key", "remove", "vol", "--key-file", lab.key).failed(1, str(lab.state), "cannot be used")
    assert not absent.exists()


_AS_NOBODY = """
import os, sqlalchemy.dialects.sqlite
from lockstep.cli import serving, status  # what is imported later may be out of nobody's reach
from lockstep.cli.main import main
os.setgroups([])
os.setgid({gid})
os.setuid({uid})
main()
"""


@needs("qemu-io", root=True)
def test_a_server_of_roots_that_was_killed_does_not_keep_the_owner_out() -> None:
    with tempfile.TemporaryDirectory() as home:  # that others can reach
        os.chmod(home, 0o755)
        lab = Lab(Path(home))
        volume = lab.volume("vol", MIB)
        for path in (lab.home, *lab.home.rglob("*")):
            os.chown(path, NOBODY, -1)
        program = _AS_NOBODY.format(uid=NOBODY, gid=pwd.getpwnam("nobody").pw_gid)

        with volume.served() as served:
            command = [sys.executable, "-c", program, "--state-dir", str(lab.state), "status", "vol"]
            asked = subprocess.run(command, capture_output=True, check=False, timeout=60, text=True)
            assert served.uri in asked.stdout, asked.stderr
            served.kill()
        with volume.served(program=program) as served:
            write(served, "write -P 7 0 64k")
        volume.assert_equal_disks()
