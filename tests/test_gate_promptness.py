"""D6: what the registry says is in effect within a second, however long the disks keep everybody waiting."""

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock, Mock

import pytest

from lockstep.errors import MayNotRelease, StateDirUnusable
from lockstep.registry.access import Grant
from lockstep.registry.audit import Actor
from lockstep.registry.store import Registry
from lockstep.service.background import Background
from lockstep.service.clients import Clients
from lockstep.service.gate import VolumeGate
from lockstep.service.state import State
from lockstep.service.trail import Trail
from lockstep.service.verification import Verification
from lockstep.service.volume_session import VolumeSession
from lockstep.volume.gate import Ruling
from lockstep.volume.workers import Workers

ROOT = Actor("root", "a test")


def background_of(
    registry: Registry, gate: VolumeGate, clerks: Workers, **session_has: object
) -> tuple[Background, Trail]:
    """The background work of a volume without mirrors, and its audit trail, without a server."""
    disks = SimpleNamespace(writes=SimpleNamespace(mirrors=()), mirrors=(), **session_has)
    session, trail = cast(VolumeSession, disks), Trail(registry, "vol", gate, clerks.run)
    clients, verification = Clients(gate, trail), Verification(session, trail)
    return Background(session, gate, clients, trail, verification, registry, clerks.run, tuple), trail


def test_a_grant_is_taken_away_though_all_threads_of_the_target_wait_for_it(tmp_path: Path) -> None:
    registry = State(str(tmp_path / "state")).registry()
    record = registry.add_volume("vol", target_path="/target", size_bytes=512, sector_bytes=512, actor=ROOT)
    registry.grant("vol", Grant("eve", (), "UTC"), actor=ROOT)
    gate, go = VolumeGate("vol", "hold", registry.grants("vol")), threading.Event()

    async def look() -> None:
        workers, clerks = Workers("worker", 1), Workers("clerk", 1)
        waiting = workers.begin(go.wait)
        background, _trail = background_of(registry, gate, clerks, record=record, workers=workers)
        assert gate("eve") is Ruling.UPDATE
        registry.revoke("vol", "eve", actor=ROOT)
        await asyncio.wait_for(background._look(), 10)
        assert gate("eve") is Ruling.UNTIL_RELEASED
        go.set()
        await waiting
        workers.close()
        clerks.close()

    with registry:
        asyncio.run(look())


def test_who_reads_the_grants_longer_does_not_bring_back_what_was_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = State(str(tmp_path / "state")).registry()
    record = registry.add_volume("vol", target_path="/target", size_bytes=512, sector_bytes=512, actor=ROOT)
    registry.grant("vol", Grant("eve", (), "UTC"), actor=ROOT)
    gate, has_read, go = VolumeGate("vol", "hold", registry.grants("vol")), threading.Event(), threading.Event()
    read = registry.grants

    def read_slowly(name: str) -> tuple[Grant, ...]:
        found = read(name)
        if not has_read.is_set():
            has_read.set()
            assert go.wait(10)
        return found

    monkeypatch.setattr(registry, "grants", read_slowly)

    async def look() -> None:
        clerks = Workers("clerk", 2)
        background, _trail = background_of(registry, gate, clerks, record=record)
        looking = asyncio.create_task(background._look())
        await asyncio.to_thread(has_read.wait, 10)
        registry.revoke("vol", "eve", actor=ROOT)
        released = background.sync(Actor("eve", "a test"), include_held=True, compare=False, everything=False)
        syncing = asyncio.create_task(released)
        await asyncio.wait([syncing], timeout=0.5)  # who was first is still reading
        go.set()
        with pytest.raises(MayNotRelease):
            await syncing
        await looking
        assert gate("eve") is Ruling.UNTIL_RELEASED
        clerks.close()

    with registry:
        asyncio.run(look())


def test_whatever_keeps_the_audit_trail_from_being_written_holds_the_mirrors_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lockstep.service.trail.RETRY_S", 0.01)
    registry = State(str(tmp_path / "state")).registry()
    registry.add_volume("vol", target_path="/target", size_bytes=512, sector_bytes=512, actor=ROOT)
    gate, real, failing = VolumeGate("vol", "hold", registry.grants("vol")), registry.audit, [True]

    def audit(*row: Any, **details: Any) -> None:
        if failing:
            raise ZeroDivisionError("nobody thought of this")
        real(*row, **details)

    monkeypatch.setattr(registry, "audit", audit)

    async def write() -> None:
        clerks = Workers("clerk", 1)
        trail = Trail(registry, "vol", gate, clerks.run)
        task = asyncio.create_task(trail.run())
        trail.note("odd", ROOT, "something happened")
        while gate("root") is not Ruling.FALL_BEHIND:
            await asyncio.sleep(0.01)
        failing.clear()
        while gate("root") is not Ruling.UPDATE:
            await asyncio.sleep(0.01)
        task.cancel()
        clerks.close()

    with registry:
        asyncio.run(asyncio.wait_for(write(), 10))
        assert [row.event for row in registry.audit_rows()] == ["volume-added", "odd"]


def test_a_registry_that_does_not_answer_is_one_that_cannot_be_written_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A database whose disk hangs takes the question, and says nothing. Neither the mirrors nor the end go by that."""
    monkeypatch.setattr("lockstep.service.answers.ANSWER_S", 0.05)
    registry = State(str(tmp_path / "state")).registry()
    record = registry.add_volume("vol", target_path="/target", size_bytes=512, sector_bytes=512, actor=ROOT)
    gate, answers, asked = VolumeGate("vol", "hold", registry.grants("vol")), threading.Event(), []

    def hangs(name: str) -> None:
        real = getattr(registry, name)

        def call(*arguments: Any, **details: Any) -> Any:
            asked.append(name)
            assert answers.wait(10)
            return real(*arguments, **details)

        monkeypatch.setattr(registry, name, call)

    async def serve() -> None:
        clerks = Workers("clerk", 2)
        background, trail = background_of(registry, gate, clerks, record=record)
        async with trail.written():
            trail.note("odd", ROOT, "something happened")
            while gate("root") is not Ruling.FALL_BEHIND:
                await asyncio.sleep(0.01)
            for _ in range(3):
                await background._look()
            assert sorted(asked) == ["audit", "grants"], "it is asked again though it has not answered"
            assert trail.error == "the audit trail cannot be written: the registry does not answer"
            answers.set()
            while gate("root") is not Ruling.UNTIL_RELEASED:
                await asyncio.sleep(0.01)
                await background._look()
        clerks.close()

    with registry:
        registry.revoke("vol", "root", actor=ROOT)
        hangs("grants")
        hangs("audit")
        asyncio.run(asyncio.wait_for(serve(), 10))
        assert [row.event for row in registry.audit_rows()] == ["volume-added", "revoked", "odd"]
    assert "the registry cannot be read, the grants stay what they were: the registry does not answer" in caplog.text


def test_what_one_mirror_cannot_release_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    registry = State(str(tmp_path / "state")).registry()
    record = registry.add_volume("vol", target_path="/target", size_bytes=512, sector_bytes=512, actor=ROOT)
    gate = VolumeGate("vol", "hold", registry.grants("vol"))
    full = StateDirUnusable(path="/state", reason="No space left on device")

    async def release() -> None:
        clerks = Workers("clerk", 1)
        first, second = Mock(release_held=AsyncMock(side_effect=full)), Mock(release_held=AsyncMock(return_value=4096))
        resync = SimpleNamespace(compare=False, wake=Mock())
        session = SimpleNamespace(record=record, writes=SimpleNamespace(), mirrors=(first, second), resyncs=[resync])
        trail = Trail(registry, "vol", gate, clerks.run)
        background = Background(
            cast(VolumeSession, session),
            gate,
            Clients(gate, trail),
            trail,
            Verification(cast(VolumeSession, session), trail),
            registry,
            clerks.run,
            tuple,
        )
        with pytest.raises(StateDirUnusable):
            await background.sync(ROOT, include_held=True, compare=False, everything=False)
        second.release_held.assert_awaited_once()
        resync.wake.assert_called_once()
        writing = asyncio.create_task(trail.run())
        await trail.settle(10)
        writing.cancel()
        clerks.close()

    with registry:
        asyncio.run(release())
        (row,) = registry.audit_rows(events=["sync"])
        assert row.details["released_bytes"] == 4096


def test_what_was_denied_after_its_connection_had_ended_is_counted_too() -> None:
    notes: list[tuple[str, dict[str, Any]]] = []
    trail = cast(Trail, SimpleNamespace(note=lambda event, _actor, _reason, **details: notes.append((event, details))))
    gate = VolumeGate("vol", "hold", ())
    clients = Clients(gate, trail)
    clients.connected(1, "eve", "a test")
    gate.denied("eve", Ruling.UNTIL_RELEASED, 512)
    clients.disconnected(1)
    gate.denied("eve", Ruling.UNTIL_RELEASED, 4096)  # was under way when the client was killed
    clients.look()
    clients.look()
    totals = [(details["updates"], details["bytes"]) for event, details in notes if event == "denied-total"]
    assert totals == [(1, 512), (1, 4096)]
    assert [event for event, _details in notes].count("denied") == 2
