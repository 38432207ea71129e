"""A PostgreSQL server for tests."""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.lab import run, wait_until

HOMES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
BIN = HOMES[-1] if HOMES else Path("/usr/lib/postgresql/bin")
PROGRAMS = ("initdb", "pg_ctl", "psql")


class Postgres:
    """A server of the postgres account's, on a data directory, reached by a socket in a directory of its own."""

    def __init__(self, data: Path, home: Path) -> None:
        self.data, self.home = data, home
        self.log = home / "log"
        self.pid = 0
        home.mkdir(mode=0o700)
        shutil.chown(home, "postgres")

    def run(self, program: str, *arguments: str) -> str:
        return run("runuser", "-u", "postgres", "--", str(BIN / program), *arguments)

    def url(self, database: str = "postgres") -> str:
        """The URL of a database, as a registry has it."""
        return f"postgresql://postgres@/{database}?host={self.home}"

    @property
    def client(self) -> tuple[str, ...]:
        return "-h", str(self.home), "-U", "postgres"

    def start(self) -> None:
        options = f"-k {self.home} -c listen_addresses='' -c shared_buffers=16MB -c max_wal_size=32MB"
        try:
            self.run("pg_ctl", "start", "-w", "-D", str(self.data), "-l", str(self.log), "-o", options)
        except AssertionError as error:
            raise AssertionError(self.log.read_text()[-3000:]) from error
        self.pid = int((self.data / "postmaster.pid").read_text().split()[0])

    def kill(self) -> None:
        """Kill the postmaster; the others follow it by themselves. Wait for that."""
        with contextlib.suppress(ProcessLookupError):
            if self.pid:
                os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: not self.processes(), "every process of PostgreSQL to end")

    def processes(self) -> list[str]:
        """Those that work in the data directory."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/cwd") == str(self.data):
                    found.append(pid)
        return found

    def ask(self, query: str, database: str = "postgres") -> list[list[str]]:
        said = self.run("psql", *self.client, "-X", "-A", "-t", "-c", query, database)
        return [line.split("|") for line in said.splitlines()]


@contextlib.contextmanager
def fresh_server() -> Iterator[Postgres]:
    """A server that runs, with nothing in it yet, and goes away with its data."""
    with tempfile.TemporaryDirectory(prefix="lockstep-pg-") as directory:
        os.chmod(directory, 0o711)
        data = Path(directory) / "data"
        data.mkdir(mode=0o700)
        shutil.chown(data, "postgres")
        server = Postgres(data, Path(directory) / "home")
        server.run("initdb", "-D", str(data), "--auth=trust", "--no-sync")
        try:
            server.start()
            yield server
        finally:
            server.kill()
