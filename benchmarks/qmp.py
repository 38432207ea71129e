"""The few words of QEMU's machine protocol that a benchmark needs: JSON lines over a unix socket."""

import json
import socket
from collections import deque
from pathlib import Path
from typing import Any

from benchmarks.processes import BenchmarkError


class Qmp:
    """One monitor connection. Events that arrive between replies are kept until somebody waits for them."""

    def __init__(self, path: Path, timeout_s: float = 300) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rw")
        self._events: deque[dict[str, Any]] = deque()
        self._read()  # the greeting
        self.command("qmp_capabilities")

    def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Send a command and return its result."""
        json.dump({"execute": name, "arguments": arguments or {}}, self._stream)
        self._stream.flush()
        while True:
            message = self._read()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise BenchmarkError(f"QMP {name}: {message['error']['desc']}")
            self._events.append(message)

    def await_event(self, *names: str) -> dict[str, Any]:
        """Return the first event of one of these names, seen already or still to come; others are dropped."""
        while True:
            event = self._events.popleft() if self._events else self._read()
            if event.get("event") in names:
                return event

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()
        self._socket.close()

    def _read(self) -> dict[str, Any]:
        try:
            line = self._stream.readline()
        except TimeoutError:
            raise BenchmarkError("QEMU was silent on its monitor for too long") from None
        if not line:
            raise BenchmarkError("QEMU closed its monitor")
        message: dict[str, Any] = json.loads(line)
        return message
