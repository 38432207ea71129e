"""The process whose disks lose power: serves a lab's volume again and again, in one interpreter, and is its client.

`python -m tests.crash_host LAB`, under recorder.c. Each line of standard input is a run, as JSON; each is answered by
one line. A run is the real `lockstep.service.serve.serve`, with a script as the client of its socket; what the script
does, and what it is answered, is noted in the recorder's log. Only the intervals of the background work are shorter
than in real life, so that a run of a second sees many of them; and a new target is filled slowly, in many steps. Or a
run is a command, in a process of its own, which copies in small pieces, each of them on record.
"""

import asyncio
import gc
import json
import logging
import mmap
import os
import random
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from aiohttp import web_app

from lockstep.crypto.unlock import Unlock
from lockstep.service import background, control_client
from lockstep.service.serve import Listen, Options, serve
from lockstep.service.state import State
from lockstep.volume import filling, restore
from lockstep.volume.pace import Pace
from tests import nbd_client
from tests.forks import become_lockstep
from tests.lab import PASSPHRASE
from tests.nbd_client import Client
from tests.recording import pack_mark

NAME: Final = "vol"
PERMITTED: Final = "root"
BARRED: Final = "mallory"
GRAIN_BYTES: Final = 4096  # requests that are in flight at once share no unit of this size
PATIENCE_S: Final = 60.0

INTERVALS: Final = {"TIDY_INTERVAL_S": 0.06, "TOKEN_INTERVAL_S": 0.05, "WATCH_INTERVAL_S": 0.05, "FIRST_RETURN_S": 0.05}

FILL_REST_S: Final = 0.004
COPYING: Final = {"PIECE_BYTES": 128 << 10, "CHECKPOINT_S": 0.0}

SHAPES: Final = (
    (4, lambda chance: (512 * chance.randint(1, 16), 512)),  # length, alignment
    (3, lambda chance: (chance.randint(1, 3000), 1)),
    (2, lambda chance: (4096 * chance.randint(1, 4), 4096)),
    (1, lambda chance: (chance.randint(1, 300 << 10), chance.choice((1, 512)))),
)


def content(seed: int, number: int, length: int) -> bytes:
    """Return what request `number` of a run writes."""
    return random.Random(f"{seed}/{number}").randbytes(length)


class Host:
    """One lab."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.state = State(str(home / "state"))
        self.log_path = os.environ["LAB_RECORD_LOG"]
        self.log_fd = os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        with open(os.environ["LAB_RECORD_FAULTS"], "r+b") as file:
            self.faults = mmap.mmap(file.fileno(), 1)

    def mark(self, **noted: object) -> None:
        """Note something in the log of the disks."""
        os.write(self.log_fd, pack_mark(**noted))

    def run(self, script: Callable[["Host"], object]) -> dict[str, Any]:
        """Serve until the script is over, and stop in order."""
        os.ftruncate(self.log_fd, 0)
        result: dict[str, Any] = {}

        def act() -> None:
            try:
                result["result"] = script(self)
            except BaseException:  # noqa: BLE001 - told to whoever asked for the run
                result["error"] = traceback.format_exc()
            self.faults[0] = 0
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=act)
        try:
            serve(
                self.state,
                NAME,
                Unlock(lambda: PASSPHRASE),
                Listen(self.state.socket(NAME)),
                lambda _uris: thread.start(),
                Options(),
            )
        except BaseException:  # noqa: BLE001 - told to whoever asked for the run
            result["error"] = traceback.format_exc()
        if thread.ident is not None:
            thread.join()
        # A process serves once; this one would run out of descriptors. aiohttp remembers its applications for ever.
        web_app._cached_build_middleware.cache_clear()
        gc.collect()
        return result

    def command(self, arguments: list[str]) -> dict[str, Any]:
        """Run a command to its end."""
        os.ftruncate(self.log_fd, 0)
        with tempfile.TemporaryFile() as stream:
            pid = os.fork()
            if not pid:
                become_lockstep(["--state-dir", self.state.path, *arguments], [stream] * 3)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            stream.seek(0)
            return {"code": code, "said": stream.read().decode()}

    def ask(self, method: str, resource: str, **body: object) -> dict[str, Any]:
        """Use the control interface."""
        return control_client.ask(self.state.control(NAME), NAME, method, resource, **body)

    def mirror(self) -> dict[str, Any]:
        """What the status says of the mirror."""
        (mirror,) = self.ask("GET", "/v1/status")["mirrors"]
        assert isinstance(mirror, dict)
        return mirror

    def await_state(self, *wanted: str) -> str:
        """Wait until the mirror is in one of these states."""
        deadline_s = time.monotonic() + PATIENCE_S
        while (mirror := self.mirror())["state"] not in wanted:
            assert time.monotonic() < deadline_s, f"in vain for {wanted}: {mirror}"
            time.sleep(0.003)
        return str(mirror["state"])


class Recovery:
    """The next start: everything is brought in sync, what is held included, and a new target is filled."""

    def __call__(self, host: Host) -> dict[str, Any]:
        """Return the states that were seen."""
        first = host.await_state("in-sync", "behind", "degraded")
        if first == "degraded":  # an older copy of it, perhaps, that has little in common with the target
            assert "another disk than before" in (host.mirror()["error"] or ""), host.mirror()
        if first != "in-sync":
            host.ask("POST", "/v1/sync", include_held=True, everything=first == "degraded")
            host.await_state("in-sync")
        deadline_s = time.monotonic() + PATIENCE_S
        while (restore := host.ask("GET", "/v1/status")["target"]["restore"]) is not None:
            assert time.monotonic() < deadline_s, f"in vain for the new target: {restore}"
            time.sleep(0.003)
        return {"first": first}


class History:
    """Random requests of several clients, some at a time."""

    def __init__(self, seed: int, requests: int, faults: list[int]) -> None:
        """Of `faults`, bits of recorder.c's, there may be one meanwhile."""
        self.seed = seed
        self.requests = requests
        self.faults = faults

    def __call__(self, host: Host) -> None:
        chance = random.Random(self.seed)
        self.host = host
        self.chance = chance
        self.number = 0
        self.clients = [Client(host.state.socket(NAME)).go(NAME, allocation=False) for _ in range(2)]
        self.barred = Client(host.state.socket(NAME)).go(f"{NAME}@{BARRED}", allocation=False)
        self.size = self.clients[0].size
        self.in_flight: dict[int, tuple[int, int, int]] = {}  # cookie -> number, first grain, grain after
        held_from = chance.choice((self.requests // 2, self.requests + 1, self.requests + 1))
        fault, fault_at = chance.choice(self.faults), chance.choice((self.requests // 3, self.requests + 1))
        fault_ends = fault_at + chance.randint(5, self.requests)  # then the mirror comes back, if there is time
        depth, hot = chance.choice((1, 3, 8)), chance.randrange(self.size)
        if chance.random() < 0.7:
            host.await_state("in-sync", "behind")
        for step in range(self.requests):
            if step in (fault_at, fault_ends):
                host.faults[0] = fault if step == fault_at else 0
                host.mark(fault=host.faults[0])
            if chance.random() < 0.05:
                hot, depth = chance.randrange(self.size), chance.choice((1, 3, 8))
                time.sleep(chance.random() / 5)  # so that marks grow old somewhere else: what varies is the moment
            user = BARRED if step >= held_from and chance.random() < 0.3 else PERMITTED
            self._request(user, hot)
            while len(self.in_flight) >= depth:
                self._take()
        while self.in_flight:
            self._take()
        for client in (*self.clients, self.barred):
            client.disconnect()

    def _request(self, user: str, hot: int) -> None:
        chance = self.chance
        kind = chance.choices(("write", "zero", "trim", "flush"), (70, 6, 6, 18))[0]
        if kind == "flush":
            self._send(user, nbd_client.FLUSH, kind, 0, 0, 0)
            return
        length, alignment = chance.choices([shape for _, shape in SHAPES], [weight for weight, _ in SHAPES])[0](chance)
        if kind != "write" and chance.random() < 0.5:
            length = chance.randint(1, 256 << 10)
        near = hot + int(chance.gauss(0, 64 << 10)) if chance.random() < 0.7 else chance.randrange(self.size)
        offset = max(0, min(near, self.size - length)) // alignment * alignment
        first, after = offset // GRAIN_BYTES, -(-(offset + length) // GRAIN_BYTES)
        while any(first < end and start < after for _, start, end in self.in_flight.values()):
            self._take()
        flags = nbd_client.FUA if chance.random() < 0.1 else 0
        if kind == "zero" and chance.random() < 0.5:
            flags |= nbd_client.NO_HOLE
        commands = {"write": nbd_client.WRITE, "zero": nbd_client.WRITE_ZEROES, "trim": nbd_client.TRIM}
        self._send(user, commands[kind], kind, offset, length, flags)

    def _send(self, user: str, command: int, kind: str, offset: int, length: int, flags: int) -> None:
        self.number += 1
        client = self.barred if user == BARRED else self.chance.choice(self.clients)
        payload = content(self.seed, self.number, length) if kind == "write" else b""
        request = client.request(command, offset, length, flags, payload)
        first, after = offset // GRAIN_BYTES, -(-(offset + length) // GRAIN_BYTES)
        self.in_flight[request.cookie + self._base(client)] = self.number, first, after
        self.host.mark(
            begins=self.number,
            kind=kind,
            offset=offset,
            length=length,
            fua=bool(flags & nbd_client.FUA),
            held=user == BARRED,
        )
        client.send(request.wire())

    def _base(self, client: Client) -> int:
        return ((*self.clients, self.barred).index(client)) << 64

    def _take(self) -> None:
        """Wait for replies, and note them."""
        everybody = {client.socket: client for client in (*self.clients, self.barred)}
        ready, _, _ = select.select(list(everybody), [], [], PATIENCE_S)
        assert ready, f"no reply to {self.in_flight}"
        for sock in ready:
            client = everybody[sock]
            for reply in client.arrived():
                number, _, _ = self.in_flight.pop(reply.request.cookie + self._base(client))
                self.host.mark(ends=number, error=reply.error)


class SlowPace(Pace):
    """Rests after each piece."""

    async def rest(self, count: int) -> None:
        """As `Pace.rest`."""
        await super().rest(count)
        await asyncio.sleep(FILL_REST_S)


def main() -> None:
    """Answer each run on standard output."""
    slow = {"HANDS": 2, "PIECE_BYTES": 32 << 10, "SETTLE_BYTES": 256 << 10, "RETRY_S": 0.02, "Pace": SlowPace}
    for module, changed in ((background, INTERVALS), (filling, slow), (restore, COPYING)):
        for name, value in changed.items():
            assert hasattr(module, name), f"there is no {name} any more"
            setattr(module, name, value)
    host = Host(Path(sys.argv[1]))
    for line in sys.stdin:
        asked = json.loads(line)
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]  # noqa: B023
        logging.root.handlers, logging.root.level = [handler], logging.INFO
        if asked["script"] == "command":
            answer = host.command(asked["arguments"])
        elif asked["script"] == "recovery":
            answer = host.run(Recovery())
        else:
            answer = host.run(History(asked["seed"], asked["requests"], asked["faults"]))
        print(json.dumps({**answer, "log": said}), flush=True)


if __name__ == "__main__":
    main()
