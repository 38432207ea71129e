"""Commands without the time that Python takes to start."""

import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from typing import IO, NoReturn

from alembic import command, config, script

from lockstep.cli.main import _COMMANDS, main
from tests.lab import Lab, Result, wait_until

# What the program imports when it is needed: its commands, and Alembic, when a registry is made.
READY_IN_MEMORY = (
    *(importlib.import_module(f"lockstep.cli.{file}") for file in dict.fromkeys(_COMMANDS.values())),
    *(command, config, script),
)


class ForkLab(Lab):
    """A lab whose commands are forks of this process, which has imported everything: 20 ms each instead of 800.

    It is the real `main` in a process of its own, with its own standard streams. The servers are started afresh, and so
    are commands whose environment the interpreter must find at its start (`Clock`).
    """

    def lockstep(
        self, *arguments: object, stdin: bytes | None = None, environment: dict[str, str] | None = None
    ) -> Result:
        """Like `Lab.lockstep`."""
        if self.environment:
            return super().lockstep(*arguments, stdin=stdin, environment=environment)
        with contextlib.ExitStack() as files:
            streams: list[IO[bytes]] = [files.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            streams[0].write(stdin or b"")
            streams[0].seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", DeprecationWarning
                )  # of threads: pytest-xdist has one, which only reads
                pid = os.fork()
            if not pid:
                os.environ.update(environment or {})
                become_lockstep(["--state-dir", str(self.state), *map(str, arguments)], streams)
            code = _wait_for(pid)
            for stream in streams:
                stream.seek(0)
            said = (stream.read() for stream in streams[1:])
            return Result(subprocess.CompletedProcess(["lockstep"], code, *said))


def become_lockstep(arguments: list[str], streams: list[IO[bytes]]) -> NoReturn:
    code = 99
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream.fileno(), number)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate("rww"))
        sys.argv = ["lockstep", *arguments]
        logging.root.handlers.clear()
        warnings.simplefilter("always")  # told, and found by `assert_error`; as exceptions they can hang a closing loop
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:  # noqa: BLE001 - what the interpreter does at its end
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait_for(pid: int) -> int:
    ended: list[int] = []

    def has_ended() -> bool:
        found, how = os.waitpid(pid, os.WNOHANG)
        if found:
            ended.append(os.waitstatus_to_exitcode(how))
        return bool(found)

    try:
        wait_until(has_ended, "a command to end")
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return ended[0]
