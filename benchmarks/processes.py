"""Programs and servers: finding them, running them, waiting for them, counting their CPU, ending them."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

POLL_S = 0.01
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class BenchmarkError(Exception):
    """The run cannot go on, or its figures would mean nothing; the text says why."""


def require(programs: Mapping[str, str]) -> None:
    """Refuse to start unless every program (name -> its Debian package) is installed."""
    missing = [f"{name} (Debian package {package})" for name, package in programs.items() if not shutil.which(name)]
    if missing:
        raise BenchmarkError(f"not installed: {', '.join(missing)}. Install it, or choose other --peers.")


def run(command: list[str], cwd: Path | None = None) -> str:
    """Run a program to its end and return what it printed."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            output, error = process.communicate()
        except BaseException:
            kill_all(process)  # its children as well, which would keep files and mounts busy
            raise
    if process.returncode != 0:
        raise BenchmarkError(f"exit code {process.returncode} from: {' '.join(command)}\n{(error or output).strip()}")
    return output


def kill_all(process: "subprocess.Popen[Any]") -> None:
    """End a process that has a session of its own, and its children, whatever their state."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], T | None], timeout_s: float, what: str) -> T:
    """Return the first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise BenchmarkError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(POLL_S)
    return value


class Server:
    """A server in the foreground, its output in `log`. It has a session of its own: Ctrl-C is ours to handle."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def await_ready(self, ready: Callable[[], T | None], timeout_s: float = 60) -> T:
        """Wait until `ready` gives a true value, but not for a server that has already ended."""

        def ready_or_dead() -> T | None:
            if self._process.poll() is not None:
                raise BenchmarkError(f"the server ended too early:\n{self._last_words()}")
            return ready()

        return wait_for(ready_or_dead, timeout_s, f"{self.log.stem} to become ready")

    def cpu_s(self) -> float:
        """CPU seconds spent so far by the server, its descendants and the children they have reaped."""
        return sum(_cpu_ticks(pid) for pid in _tree(self._process.pid)) / TICKS_PER_S

    def memory_bytes(self) -> tuple[int, int]:
        """Resident memory now, and the most it ever was; of the server without its children."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
        now, most = (int(sizes[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
        return now, most

    def terminate(self) -> None:
        """Ask for an end with SIGTERM."""
        self._process.terminate()

    def await_end(self, timeout_s: float = 120) -> None:
        """Wait for an end already asked for; anything but exit code 0 is an error."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"{self.log.stem} did not end within {timeout_s:g} s") from None
        if code != 0:
            raise BenchmarkError(f"the server ended badly:\n{self._last_words()}")

    def kill(self) -> None:
        """End the server and its children, whatever their state."""
        kill_all(self._process)

    def _last_words(self) -> str:
        code = self._process.returncode
        return f"{self.log.stem}: exit code {code}: {self.log.read_text(errors='replace')[-2000:].strip()}"


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                yield from _tree(int(child))


def _cpu_ticks(pid: int) -> int:
    """Sum utime, stime, cutime, cstime: fields 14 to 17 of proc(5)'s stat; field 2, a name, may hold spaces."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0  # it has just ended: its parent's cutime has it, or will
    return sum(int(field) for field in stat.rpartition(")")[2].split()[11:15])
