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
import grp
import ipaddress
import logging
import os
import resource
import signal
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
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
    GroupUnknown,
    LockstepError,
    SocketUnusable,
    TargetResized,
    TlsRequired,
)
from lockstep.nbd.server import NbdServer
from lockstep.registry.audit import Actor
from lockstep.registry.store import Registry, VolumeRecord
from lockstep.service import status
from lockstep.service.background import Background
from lockstep.service.certificates import Terms
from lockstep.service.clients import Clients
from lockstep.service.control import control_interface
from lockstep.service.export import VolumeExport
from lockstep.service.gate import VolumeGate
from lockstep.service.mirror_session import MirrorSession
from lockstep.service.secrecy import protect_memory
from lockstep.service.state import State
from lockstep.service.trail import Trail
from lockstep.volume.resync import Resync
from lockstep.volume.write_path import WritePath

log = logging.getLogger(__name__)

WORKERS: Final = 16


@dataclass(frozen=True)
class Listen:
    """Where clients connect: a unix socket, and if wanted a TCP address; without TLS terms a loopback one."""

    socket: str
    tcp: tuple[str, int] | None = None
    tls: Terms | None = None
    group: int | None = None  # whose members may connect to the unix socket too


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
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(state.registry())
        volume = registry.volume(name)
        if not stack.enter_context(state.volume_lock(name)):
            raise AlreadyServed(volume=name)
        workers = stack.enter_context(ThreadPoolExecutor(WORKERS, "lockstep-worker"))
        opened = stack.enter_context(_opened(state, volume, passphrase, workers))
        uvloop.run(_serve(state, registry, opened, listen, on_ready, workers))


def parse_tcp(address: str, *, tls: bool = False) -> tuple[str, int]:
    """Split HOST:PORT. Raises AddressInvalid; and TlsRequired where the host is no loopback address, without TLS."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise AddressInvalid(address=address, reason="it is not HOST:PORT")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not tls:
        raise TlsRequired(address=address)
    return host, int(port)


def group_id(name: str) -> int:
    """Return the id of a group. Raises GroupUnknown."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise GroupUnknown(group=name) from error


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
    registry: Registry,
    opened: _OpenVolume,
    listen: Listen,
    on_ready: Callable[[list[str]], None],
    workers: Executor,
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    in_worker = functools.partial(_in_worker, workers)
    volume = opened.record
    gate = VolumeGate(volume.name, volume.on_denied, registry.grants(volume.name))
    trail = Trail(registry, volume.name, gate, in_worker)
    clients = Clients(gate, trail)
    sector_bytes = max((session.disk.sector_bytes for session in opened.mirrors), default=1)
    path = WritePath(opened.target, tuple(session.link for session in opened.mirrors), gate, sector_bytes, workers)
    resyncs = tuple(Resync(path, session.link, session.disk, gate, workers) for session in opened.mirrors)
    warnings = listen.tls.warnings if listen.tls else tuple
    background = Background(volume.name, path, resyncs, gate, clients, trail, registry, warnings, in_worker)
    server = NbdServer(VolumeExport(volume.name, path, workers), watcher=clients)
    async with _listening(server, listen, volume.name) as uris:
        commands = _Commands(opened, server, gate, trail, background, uris[0])
        async with control_interface(state.control(volume.name), commands, state.require_manager):
            await in_worker(_claim, state, opened)
            await server.accept()
            async with background.running():
                on_ready(uris)
                await stop.wait()
                log.info("stopping")
                await server.drain()
    await in_worker(_retire, state, opened)


@dataclass(frozen=True)
class _Commands:
    """What the control interface may ask."""

    opened: _OpenVolume
    server: NbdServer
    gate: VolumeGate
    trail: Trail
    background: Background
    uri: str

    def describe(self) -> dict[str, Any]:
        """Return the volume as `status --json` prints it."""
        clients = [status.of_client(user, self.gate.verdict(user)) for user in self.server.clients()]
        mirrors = [status.of_link(session.link) for session in self.opened.mirrors]
        for mirror in mirrors:
            mirror["error"] = mirror["error"] or self.trail.error
        uri = self.uri if self.server.accepting else None
        return status.of_volume(self.opened.record, mirrors, uri=uri, clients=clients)

    async def sync(self, actor: Actor, *, include_held: bool) -> None:
        """Have what differs copied. Raises MayNotRelease."""
        await self.background.sync(actor, include_held=include_held)


@contextlib.asynccontextmanager
async def _listening(server: NbdServer, listen: Listen, name: str) -> AsyncIterator[list[str]]:
    """Claim the sockets; nobody is let in before the server accepts."""
    _clear_stale_socket(listen.socket)
    uris = [f"nbd+unix:///{name}?socket={quote(listen.socket)}"]
    try:
        await server.listen_unix(listen.socket, listen.group)
    except OSError as error:
        raise SocketUnusable(path=listen.socket, reason=error.strerror or str(error)) from error
    try:
        if listen.group is not None:
            _warn_of_closed_directories(listen.socket, listen.group)
        if listen.tcp is not None:
            uris.append(f"{await _listen_tcp(server, listen.tcp, listen.tls)}/{name}")
        yield uris
    finally:
        await server.drain()  # also where it never came to serving
        with contextlib.suppress(FileNotFoundError):
            os.unlink(listen.socket)


async def _listen_tcp(server: NbdServer, address: tuple[str, int], tls: Terms | None) -> str:
    """Claim the address; return the beginning of its URI."""
    host, port = address
    try:
        bound, port = await server.listen_tcp(host, port, tls.context if tls else None)
    except OSError as error:
        raise AddressUnusable(address=f"{host}:{port}", reason=error.strerror or str(error)) from error
    if tls is None:
        host = bound  # with TLS, the name that was given is the one that the certificate has
    return f"{'nbds' if tls else 'nbd'}://{f'[{host}]' if ':' in host else host}:{port}"


def _warn_of_closed_directories(path: str, group: int) -> None:
    """The socket's mode lets the group in; so must every directory above it. What has an ACL is not judged."""
    for directory in Path(path).parents:
        found = os.stat(directory)
        open_to_group = found.st_gid == group and found.st_mode & stat.S_IXGRP
        if open_to_group or found.st_mode & stat.S_IXOTH or "system.posix_acl_access" in os.listxattr(directory):
            continue
        log.warning("the group that may connect to %s cannot reach it: %s is closed to the group", path, directory)


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
