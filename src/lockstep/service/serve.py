"""The life of one served volume: open everything, serve until told to stop, close in order.

open      volume lock, target, mirrors (volume_session.py); whether they still belong together
claim     sockets first: nobody is let in before the mirrors are claimed
serve     NBD and control sockets; mirrors that are behind are brought in sync meanwhile
stop      no new requests; those under way are answered; background work ends after the piece it is at
retire    both disks are flushed and closed in order
"""

import asyncio
import contextlib
import grp
import ipaddress
import logging
import os
import resource
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import uvloop

from lockstep import signals
from lockstep.crypto.cipher import self_test
from lockstep.crypto.unlock import Unlock
from lockstep.errors import (
    AddressInvalid,
    AddressUnusable,
    AlreadyServed,
    GroupUnknown,
    SocketUnusable,
    TlsRequired,
)
from lockstep.nbd.server import MAX_CONNECTIONS, NbdServer
from lockstep.registry.store import Registry
from lockstep.service import headers
from lockstep.service.background import Background
from lockstep.service.clients import Clients
from lockstep.service.control import control_interface
from lockstep.service.export import VolumeExport
from lockstep.service.gate import VolumeGate
from lockstep.service.managing import unserved
from lockstep.service.memory import keep_small, lock_memory, protect_memory
from lockstep.service.served import ServedVolume
from lockstep.service.sockets import clear_stale_socket
from lockstep.service.state import State
from lockstep.service.trail import Trail
from lockstep.service.verification import Verification
from lockstep.service.volume_session import PATIENCE_S, VolumeSession, open_volume
from lockstep.volume.workers import Workers

if TYPE_CHECKING:  # X.509 takes a while to import, and few servers need it
    from lockstep.service.certificates import Terms

log = logging.getLogger(__name__)

WORKERS: Final = 16
OWN_DESCRIPTORS: Final = 128  # for disks, registry, cryptsetup and commands, whatever clients do
CLERKS: Final = 2  # for the registry: one reads the grants while the other waits to write to the audit trail


@dataclass(frozen=True)
class Listen:
    """Where clients connect: a unix socket, and if wanted a TCP address; without TLS terms a loopback one."""

    socket: str
    tcp: tuple[str, int] | None = None
    tls: "Terms | None" = None
    group: int | None = None  # whose members may connect to the unix socket too


@dataclass(frozen=True)
class Options:
    """How to serve."""

    mirror_patience_s: float = PATIENCE_S  # how long a mirror may take to answer before it is dropped
    lock_memory: bool = False  # for a volume that lies below this machine's own page cache
    direct: bool = False  # leave the page cache out


def serve(
    state: State,
    name: str,
    unlock: Unlock,
    listen: Listen,
    on_ready: Callable[[list[str]], None],
    options: Options,
) -> None:
    """Serve a volume until SIGTERM, SIGINT, or SIGHUP when its terminal is closed.

    `unlock` is asked if there is a mirror; `on_ready` is given the URIs when clients may connect.
    Raises whatever keeps it from starting, or from stopping in order.
    """
    protect_memory()
    keep_small()
    _raise_limits()
    if options.lock_memory:
        lock_memory()
    self_test()
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(state.registry())
        volume = stack.enter_context(unserved(state, registry, name))
        if volume is None:
            raise AlreadyServed(volume=name)
        for sentence in headers.reminders(registry, volume):
            log.warning("%s", sentence)
        gate = VolumeGate(volume.name, volume.on_denied, registry.grants(volume.name))
        workers, clerks = Workers("lockstep-worker", WORKERS), Workers("lockstep-clerk", CLERKS)
        stack.callback(workers.close)
        stack.callback(clerks.close)
        session = stack.enter_context(
            open_volume(
                state, volume, unlock, gate, workers, patience_s=options.mirror_patience_s, direct=options.direct
            )
        )
        session.check()
        uvloop.run(_serve(state, registry, session, gate, clerks, listen, on_ready))


def parse_tcp(address: str, *, tls: bool = False) -> tuple[str, int]:
    """Split HOST:PORT. Raises AddressInvalid; and TlsRequired where the host is no loopback address, without TLS."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal():
        raise AddressInvalid(address=address, reason="it is not HOST:PORT")
    if len(port) > 5 or int(port) > 65535:
        raise AddressInvalid(address=address, reason="a port is at most 65535")
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


def _raise_limits() -> None:
    """Have descriptors for every connection, as far as the system allows."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _connections() -> int:
    """How many there may be at once: without descriptors of its own, the server knows nothing new of its grants."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, soft - OWN_DESCRIPTORS))


async def _serve(
    state: State,
    registry: Registry,
    session: VolumeSession,
    gate: VolumeGate,
    clerks: Workers,
    listen: Listen,
    on_ready: Callable[[list[str]], None],
) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    name = session.record.name
    trail = Trail(registry, name, gate, clerks.run)
    clients = Clients(gate, trail)
    verification = Verification(session, trail)
    warnings = listen.tls.warnings if listen.tls else tuple
    background = Background(session, gate, clients, trail, verification, registry, clerks.run, warnings)
    server = NbdServer(VolumeExport(session), max_connections=_connections(), watcher=clients)
    clear_stale_socket(listen.socket, ours=listen.socket == state.socket(name))
    async with _listening(server, listen, name) as uris:
        commands = ServedVolume(session, server, gate, trail, background, verification, uris[0])
        # In this order: what the control interface is still carrying out at the end goes on record too.
        async with trail.written(), control_interface(state.control(name), commands, state.require_manager):
            state.hand_over()  # the control socket is the owner's as well
            await session.claim()
            # Only now: until then it ends at once, like any command, also where a mirror hangs.
            signals.on_each(lambda: loop.is_closed() or loop.call_soon_threadsafe(stop.set))
            await server.accept()
            async with background.running():
                on_ready(uris)
                await stop.wait()
                signals.ignore()
                log.info("stopping")
                await server.drain()
    await session.retire()


@contextlib.asynccontextmanager
async def _listening(server: NbdServer, listen: Listen, name: str) -> AsyncIterator[list[str]]:
    """Claim the sockets; nobody is let in before the server accepts."""
    uris = [f"nbd+unix:///{name}?socket={quote(os.fsencode(listen.socket))}"]
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


async def _listen_tcp(server: NbdServer, address: tuple[str, int], tls: "Terms | None") -> str:
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
