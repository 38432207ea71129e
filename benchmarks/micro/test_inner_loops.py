"""The inner loops of a small write, each alone: what arrives, may it, is it marked, encrypt.

One call of what is measured does `BATCH` of them where one alone would be lost in the clock.
"""

import asyncio
import os
import socket
from array import array
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lockstep.crypto.cipher import FallbackXts, XtsCipher
from lockstep.nbd import wire
from lockstep.nbd.connection import Connection
from lockstep.nbd.negotiation import ExportInfo
from lockstep.nbd.server import NbdServer
from lockstep.registry import windows
from lockstep.registry.access import Grant
from lockstep.service.gate import VolumeGate
from lockstep.volume.gate import UPDATE, Ruling
from lockstep.volume.intent import Identity, IntentBitmap

BATCH = 64
GIB = 1 << 30
UUID = "00000000-0000-4000-8000-000000000000"


@pytest.mark.parametrize("sector_bytes", [512, 4096])
@pytest.mark.parametrize("length", [4 << 10, 64 << 10, 1 << 20])
def test_xts_kernel(benchmark: Any, sector_bytes: int, length: int) -> None:
    plain, secret = os.urandom(length), bytearray(length)
    benchmark(XtsCipher(os.urandom(64), sector_bytes).encrypt_into, 8, plain, secret)
    assert secret != plain


def test_xts_pure_twin(benchmark: Any) -> None:
    plain, secret = os.urandom(4096), bytearray(4096)
    benchmark(FallbackXts(os.urandom(64), 4096).encrypt_into, 8, plain, secret)
    assert secret != plain


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
def test_intent_covers(benchmark: Any, tmp_path: Path, marked: bool) -> None:
    identity = Identity(UUID, UUID, GIB)
    with closing(IntentBitmap(str(tmp_path / "bitmap"), identity, asyncio.to_thread)) as bitmap:
        bitmap.claim(1, 1, bytes([marked]) * (GIB >> 16))

        run = array("Q", [word for at in range(BATCH) for word in (at << 20, 4096, at << 12, 0)])
        assert benchmark(bitmap.covers_run, run, BATCH) == (BATCH if marked else 0)


@pytest.mark.parametrize("when", ["always", "in a window"])
def test_gate(benchmark: Any, when: str) -> None:
    spans = (windows.parse("mon-sun 00:00-24:00"),) if when == "in a window" else ()
    gate = VolumeGate("vol", "hold", [Grant("alice", spans, "Europe/Berlin")])

    def batch() -> list[Ruling]:
        return [gate("alice") for _ in range(BATCH)]

    assert benchmark(batch) == [UPDATE] * BATCH


def test_gate_decides_afresh(benchmark: Any) -> None:
    gate = VolumeGate("vol", "hold", [Grant("alice", (windows.parse("mon-sun 00:00-24:00"),), "Europe/Berlin")])
    assert benchmark(gate.verdict, "alice").allowed


# --- the wire ---


class _Export:
    """A disk that takes everything at once."""

    info = ExportInfo("vol", GIB, wire.HAS_FLAGS)
    taken = 0

    def write_run(self, user: str, data: memoryview, run: "array[int]", count: int) -> int:
        self.taken += count
        return count

    def half_done(self) -> bool:
        return False

    def read_run(self, into: bytearray, run: "array[int]", count: int) -> int:
        self.taken += count
        return count


class _Transport(asyncio.Transport):
    """A client that takes every reply."""

    def write(self, data: Any) -> None:
        """Take it."""

    def writelines(self, list_of_data: Any) -> None:
        """Take them."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """There is no buffer."""


@pytest.fixture
def connected() -> Iterator[tuple[Connection, _Export]]:
    export: Any = _Export()
    ours, theirs = socket.socketpair()

    async def connect() -> Connection:
        connection = Connection(NbdServer(export))
        connection.connection_made(_Transport({"socket": ours}))
        feed(connection, wire.CLIENT_FLAGS.pack(3) + wire.OPTION.pack(wire.IHAVEOPT, wire.Option.EXPORT_NAME, 0))
        return connection

    with ours, theirs, asyncio.Runner() as runner:
        connection = runner.run(connect())
        assert not connection.negotiating
        yield connection, export


def feed(connection: Connection, data: bytes) -> None:
    """Have bytes arrive, as large as the connection's buffer takes them."""
    view = memoryview(data)
    while view:
        into = connection.get_buffer(len(view))
        count = min(len(into), len(view))
        into[:count] = view[:count]
        connection.buffer_updated(count)
        view = view[count:]


@pytest.mark.parametrize("command", [wire.CMD_READ, wire.CMD_WRITE], ids=["read", "write"])
def test_parse_and_answer(benchmark: Any, connected: tuple[Connection, _Export], command: int) -> None:
    connection, export = connected
    payload = bytes(4096 if command == wire.CMD_WRITE else 0)
    requests = b"".join(
        wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, command, number, number << 12, 4096) + payload
        for number in range(BATCH)
    )
    feed(connection, requests)
    assert export.taken == BATCH
    benchmark(feed, connection, requests)
