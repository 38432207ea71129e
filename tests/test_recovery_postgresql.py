"""PostgreSQL loses its disk under load; it starts from the opened mirror with every transaction that it acknowledged.

PG_RECOVERY_SECONDS is how long it works before that (`make recovery` gives it a minute).
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import ForkLab
from tests.lab import MIB, Lab, needs, opened, run, wait_until
from tests.postgres import BIN, PROGRAMS, Postgres
from tests.test_recovery_instant import destroyed, mounted

pytestmark = [
    needs("nbdfuse", "fusermount3", "losetup", "mount", "mkfs.ext4", "runuser", "/dev/fuse", root=True),
    needs(*(str(BIN / program) for program in (*PROGRAMS, "pgbench", "pg_amcheck"))),
]

SECONDS = float(os.environ.get("PG_RECOVERY_SECONDS", "2"))
CLIENTS = 4

# pgbench's own transaction, and in its history who wrote the row.
SCRIPT = r"""
\set aid random(1, 100000)
\set bid 1
\set tid random(1, 10)
\set delta random(-5000, 5000)
BEGIN;
UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid;
UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = :bid;
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime, filler)
    VALUES (:tid, :bid, :aid, :delta, CURRENT_TIMESTAMP, :client_id);
END;
"""


@pytest.fixture
def lab() -> Iterator[ForkLab]:
    """Where the postgres account may enter; pytest's own directories are closed to it."""
    with tempfile.TemporaryDirectory(prefix="lockstep-pg-") as directory:
        os.chmod(directory, 0o711)
        yield ForkLab(Path(directory))


@pytest.fixture
def home(lab: ForkLab) -> Path:
    """A directory of the postgres account's own."""
    home = lab.home / "home"
    home.mkdir(mode=0o700)
    shutil.chown(home, "postgres")
    return home


def acknowledged(home: Path) -> Counter[str]:
    """Client -> how many of its transactions pgbench has an answer to, according to its log of each."""
    lines = [line.split() for log in home.glob("ack.*") for line in log.read_text().splitlines()]
    return Counter(line[0] for line in lines)


def test_every_acknowledged_transaction_is_there(lab: Lab, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volume, dead = lab.volume("vol", 256 * MIB), lab.home / "dead"
    (home / "script").write_text(SCRIPT)
    with volume.served() as served:
        device = lab.lockstep("attach", "vol").ok().strip()
        run("mkfs.ext4", "-q", "-F", device)
        dead.mkdir()
        run("mount", device, str(dead))
        (dead / "data").mkdir(mode=0o700)
        shutil.chown(dead / "data", "postgres")
        first = Postgres(dead / "data", home / "first")
        first.run("initdb", "-D", str(first.data), "--wal-segsize=4", "--auth=trust")
        first.start()
        first.run("pgbench", *first.client, "-i", "-q", "postgres")
        command = ["pgbench", *first.client, "-n", "-c", str(CLIENTS), "-T", "600", "-f", str(home / "script"), "-l"]
        bench = subprocess.Popen(
            ["runuser", "-u", "postgres", "--", str(BIN / command[0]), *command[1:], "--log-prefix=ack", "postgres"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=home,
        )
        try:
            wait_until(lambda: int(first.ask("SELECT count(*) FROM pgbench_history")[0][0]) > 50, "pgbench to work")
            time.sleep(SECONDS)  # under load for that long
            with destroyed(served, dead):
                assert bench.wait(60) != 0  # PostgreSQL panics: it cannot write its log any more
                first.kill()
                began_s = time.monotonic()
                with opened(volume, "--writable", "--overlay", lab.home / "overlay", "--attach") as (process, _):
                    process.line("overlay")
                    with mounted(process.line("device"), lab.home / "mnt") as mount:
                        second = Postgres(mount / "data", home / "second")
                        (second.data / "postmaster.pid").unlink(missing_ok=True)
                        try:
                            second.start()
                            took_s = time.monotonic() - began_s
                            count = assert_recovered(second, home)
                            second.run("pg_ctl", "stop", "-m", "fast", "-w", "-D", str(second.data))
                        finally:
                            second.kill()
        finally:
            bench.kill()
            bench.wait()
            first.kill()
    with capsys.disabled():
        print(f"\n{count} transactions acknowledged; from the command to PostgreSQL at work: {took_s:.2f} s")


def assert_recovered(server: Postgres, home: Path) -> int:
    """Hold PostgreSQL to what it has acknowledged; returns how many transactions that are."""
    acked = acknowledged(home)
    rows = {
        client.strip(): int(count)
        for client, count in server.ask("SELECT filler, count(*) FROM pgbench_history GROUP BY filler")
    }
    assert sum(acked.values()) > 50
    for client, count in acked.items():  # one more may have been under way
        assert rows[client] in (count, count + 1), f"client {client}: {count} acknowledged, {rows[client]} there"
    (sums,) = server.ask(
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(bbalance) FROM pgbench_branches),"
        " (SELECT sum(tbalance) FROM pgbench_tellers), (SELECT sum(delta) FROM pgbench_history)"
    )
    assert len(set(sums)) == 1, sums
    server.ask("CREATE EXTENSION amcheck")
    server.run("pg_amcheck", *server.client, "--heapallindexed", "--all")
    return sum(acked.values())
