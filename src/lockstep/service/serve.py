"""The life of one served volume: open everything, serve until told to stop, close in order.

    open      volume lock, target, mirrors: whatever can be refused is refused here, and nothing has changed
    claim     tokens and intent bitmaps are given a new generation, which no other server has
    serve     NBD and control sockets; mirrors that are behind are brought in sync meanwhile
    stop      no new requests; those under way are answered; resyncs end after the piece they are at
    retire    flush both disks; only what differs stays marked

Whatever ends the process before `retire` leaves its marks: the next start copies the marked regions.
"""

import asyncio
import contextlib
import errno
import functools
import ipaddress
import logging
import os
import resource
import signal
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import uvloop

from lockstep.crypto.cipher import self_test
from lockstep.disk.plain import PlainDisk
from lockstep.disk.probe import inspect, users_of
from lockstep.errors import (
    AddressInvalid,
    AddressUnusable,
    AlreadyServed,
    DiskBusy,
    DiskFailed,
    LockstepError,
    SocketUnusable,
    TargetResized,
)
from lockstep.nbd.server import NbdServer
from lockstep.registry import access
from lockstep.registry.store import VolumeRecord
from lockstep.service import status
from lockstep.service.control import control_interface
from lockstep.service.export import VolumeExport
from lockstep.service.mirror_session import MirrorSession
from lockstep.service.secrecy import protect_memory
from lockstep.service.state import State
from lockstep.volume.resync import Resync
from lockstep.volume.write_path import WritePath

log = logging.getLogger(__name__)

WORKERS: Final = 16
TOKEN_INTERVAL_S: Final = 1.0
TIDY_INTERVAL_S: Final = 30.0
VERDICT_AGE_S: Final = 1.0


@dataclass(frozen=True)
class Listen:
    """Where clients connect: a unix socket, and if wanted a loopback TCP address."""

    socket: str
    tcp: tuple[str, int] | None = None


@dataclass(frozen=True)
class _OpenVolume:
    record: VolumeRecord
    target: PlainDisk
    mirrors: tuple[MirrorSession, ...]


def serve(
    state: State,
    name: str,
    passphrase: Callable[[], bytes],
    listen: Listen,
    on_ready: Callable[[list[str]], None],
) -> None:
    """Serve a volume until SIGTERM or SIGINT.

    `passphrase` is asked once, if there is a mirror; `on_ready` is given the URIs when clients may connect.
    Raises whatever keeps it from starting, or from stopping in order.
    """
    protect_memory()
    _raise_limits()
    self_test()
    with state.registry() as registry:
        volume = registry.volume(name)
    with state.volume_lock(name) as mine:
        if not mine:
            raise AlreadyServed(volume=name)
        with (
            ThreadPoolExecutor(WORKERS, "lockstep-worker") as workers,
            _opened(state, volume, passphrase, workers) as opened,
        ):
            uvloop.run(_serve(state, opened, listen, on_ready, workers))


def parse_tcp(address: str) -> tuple[str, int]:
    """Split HOST:PORT. Raises AddressInvalid unless the host is a loopback address."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isdecimal() or int(port) > 65535:
        raise AddressInvalid(address=address, reason="it is not HOST:PORT")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise AddressInvalid(address=address, reason="it is not a loopback address")
    return host, int(port)


# --- open ---


@contextlib.contextmanager
def _opened(
    state: State, volume: VolumeRecord, passphrase: Callable[[], bytes], workers: Executor
) -> Iterator[_OpenVolume]:
    with contextlib.ExitStack() as stack:
        target = _open_target(volume)
        stack.callback(target.close)
        mirrors = []
        for mirror in volume.mirrors:
            session = MirrorSession(state, volume, mirror, target, passphrase(), workers)
            stack.callback(session.close)
            mirrors.append(session)
        yield _OpenVolume(volume, target, tuple(mirrors))


def _open_target(volume: VolumeRecord) -> PlainDisk:
    disk = inspect(volume.target_path)
    if disk.size_bytes != volume.size_bytes:
        raise TargetResized(
            path=disk.path, volume=volume.name, size_bytes=disk.size_bytes, expected_bytes=volume.size_bytes
        )
    users = users_of(disk)
    if users:
        raise DiskBusy(path=disk.path, users=" and ".join(users))
    return PlainDisk.claim(disk)


def _raise_limits() -> None:
    """Have descriptors for every connection."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# --- serve ---


async def _serve(
    state: State,
    opened: _OpenVolume,
    listen: Listen,
    on_ready: Callable[[list[str]], None],
    workers: Executor,
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    volume = opened.record
    links = tuple(session.link for session in opened.mirrors)
    sector_bytes = max((session.disk.sector_bytes for session in opened.mirrors), default=1)
    path = WritePath(opened.target, links, _Gate(volume.name), sector_bytes, workers)
    server = NbdServer(VolumeExport(volume.name, path, workers))
    async with _listening(server, listen, volume.name) as uris:
        describe = functools.partial(_describe, opened, server, uris[0])
        async with control_interface(state.control(volume.name), describe):
            await _in_worker(workers, _claim, state, opened)
            await server.accept()
            async with _background(opened, path, workers):
                on_ready(uris)
                await stop.wait()
                log.info("stopping")
                await server.drain()
    await _in_worker(workers, _retire, state, opened)


class _Gate:
    """Step 602, as the write path asks it: a verdict that is never older than VERDICT_AGE_S."""

    def __init__(self, volume_name: str) -> None:
        self._volume_name = volume_name
        self._verdicts: dict[str, tuple[float, bool]] = {}

    def __call__(self, user: str) -> bool:
        """Whether `user` may update the mirrors now."""
        now_s = time.monotonic()
        known = self._verdicts.get(user)
        if known is None or now_s - known[0] > VERDICT_AGE_S:
            known = self._verdicts[user] = (now_s, access.decide(user, self._volume_name, time.time()).allowed)
        return known[1]


def _describe(opened: _OpenVolume, server: NbdServer, uri: str) -> dict[str, Any]:
    now_s = time.time()
    clients = [
        {"user": user, "verdict": "allowed" if access.decide(user, opened.record.name, now_s).allowed else "denied"}
        for user in server.clients()
    ]
    mirrors = [status.of_link(session.link) for session in opened.mirrors]
    return status.of_volume(opened.record, mirrors, uri=uri if server.accepting else None, clients=clients)


@contextlib.asynccontextmanager
async def _listening(server: NbdServer, listen: Listen, name: str) -> AsyncIterator[list[str]]:
    """Claim the sockets; nobody is let in before the server accepts."""
    _clear_stale_socket(listen.socket)
    uris = [f"nbd+unix:///{name}?socket={quote(listen.socket)}"]
    try:
        await server.listen_unix(listen.socket)
    except OSError as error:
        raise SocketUnusable(path=listen.socket, reason=error.strerror or str(error)) from error
    try:
        if listen.tcp is not None:
            host, port = listen.tcp
            try:
                port = await server.listen_tcp(host, port)
            except OSError as error:
                raise AddressUnusable(address=f"{host}:{port}", reason=error.strerror or str(error)) from error
            uris.append(f"nbd://{f'[{host}]' if ':' in host else host}:{port}/{name}")
        yield uris
    finally:
        await server.drain()  # also where it never came to serving
        with contextlib.suppress(FileNotFoundError):
            os.unlink(listen.socket)


def _clear_stale_socket(path: str) -> None:
    """Remove the socket of a server that died. Raises SocketUnusable when it is alive, or not a socket."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise SocketUnusable(path=path, reason="something that is not a socket has that name")
    except FileNotFoundError:
        return
    except OSError as error:
        raise SocketUnusable(path=path, reason=error.strerror) from error
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code != errno.ECONNREFUSED:
        raise SocketUnusable(path=path, reason="another program is listening on it")
    os.unlink(path)


@contextlib.asynccontextmanager
async def _background(opened: _OpenVolume, path: WritePath, workers: Executor) -> AsyncIterator[None]:
    """Bring the mirrors in sync and keep their tokens true; at the end each stops after the step that it is at."""
    stopping = asyncio.Event()
    resyncs = [Resync(path, session.link, session.disk, workers) for session in opened.mirrors]

    async def announce_states() -> None:
        for session in opened.mirrors:
            await session.link.announce()

    work = [
        _repeat(announce_states, TOKEN_INTERVAL_S, stopping),
        _repeat(path.tidy, TIDY_INTERVAL_S, stopping),
        *(resync.run() for resync in resyncs),
    ]
    tasks = [asyncio.create_task(_reported(each)) for each in work]
    try:
        yield
    finally:
        stopping.set()
        for resync in resyncs:
            resync.stop()
        await asyncio.gather(*tasks)


async def _reported(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:
        log.exception("a background task failed; the mirror stays as far behind as it is")


async def _repeat(work: Callable[[], Awaitable[None]], interval_s: float, stopping: asyncio.Event) -> None:
    while not stopping.is_set():
        with contextlib.suppress(OSError):  # of a disk: whoever met it has said so, and the state shows it
            await work()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), interval_s)


# --- claim and retire ---


def _claim(state: State, opened: _OpenVolume) -> None:
    for session in opened.mirrors:
        session.claim()
    _note_generations(state, opened)


def _retire(state: State, opened: _OpenVolume) -> None:
    try:
        opened.target.flush()
    except OSError as error:
        raise DiskFailed(path=opened.record.target_path, doing="Flushing", reason=error.strerror) from error
    for session in opened.mirrors:
        try:
            session.retire()
        except LockstepError as error:
            log.error("mirror %s was not closed, the next start copies what it misses: %s", session.mirror.path, error)
    _note_generations(state, opened)


def _note_generations(state: State, opened: _OpenVolume) -> None:
    """Remember what was written last; a registry out of reach is no reason not to serve, or not to stop."""
    try:
        with state.registry() as registry:
            for session in opened.mirrors:
                registry.set_generation(session.mirror.id, session.generation)
    except LockstepError as error:
        log.warning("the registry could not be updated: %s", error)


async def _in_worker(workers: Executor, work: Callable[..., None], *args: object) -> None:
    await asyncio.get_running_loop().run_in_executor(workers, work, *args)
