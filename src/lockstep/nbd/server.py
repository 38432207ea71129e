"""The server of one export: it listens, admits, watches over and drains connections."""

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import socket
import ssl
import time
from collections.abc import Coroutine
from typing import Any, Final, Protocol

from lockstep.nbd.busy_poll import BusyPoll
from lockstep.nbd.connection import CONTENDED_STALL_S, Connection
from lockstep.nbd.export import Export
from lockstep.nbd.payload import SMALL_BLOCK_BYTES, SMALL_LIMIT_BYTES, SMALL_SHARE_BYTES, PayloadPool

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 1024
BACKLOG: Final = 1024
HANDSHAKE_S: Final = 30.0
PATROL_S: Final = 1.0


class Watcher(Protocol):
    """Who wants to know of clients that come and go; called on the loop's thread."""

    def connected(self, connection_id: int, user: str, origin: str) -> None:
        """A connection has finished its handshake; the id is never used again by this server."""

    def disconnected(self, connection_id: int) -> None:
        """That connection has ended."""


class NbdServer:
    """Listens, admits, watches over and drains the connections to one export."""

    def __init__(
        self,
        export: Export,
        pool: PayloadPool | None = None,
        max_connections: int = MAX_CONNECTIONS,
        *,
        watcher: Watcher | None = None,
    ) -> None:
        self.export = export
        self._watcher = watcher
        self._ids = itertools.count(1)
        self._entered: dict[Connection, int] = {}
        self._large = pool or PayloadPool()
        self._small = PayloadPool(SMALL_LIMIT_BYTES, SMALL_SHARE_BYTES)
        self.arrived = PayloadPool(SMALL_LIMIT_BYTES, SMALL_SHARE_BYTES)
        self.receiving = PayloadPool(SMALL_LIMIT_BYTES)
        self.loop = asyncio.get_running_loop()
        self._max_connections = max_connections
        self._connections: set[Connection] = set()
        self._parted: set[Connection] = set()  # closed, and still at work on the disks
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: list[asyncio.Server] = []
        self._busy_poll = BusyPoll()
        self._draining = False
        self.accepting = False
        self._stood_still_s = 0.0
        self._empty = asyncio.Event()
        self._empty.set()
        self._patrol = self.loop.create_task(self._watch())

    async def listen_unix(self, path: str, group: int | None = None) -> None:
        """Claim a unix socket at `path`, which must not exist, for its owner and, if given, the group of this id.

        They may connect once `accept` is called. Raises OSError.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            _bind_private(listener, path)
            listener.listen(BACKLOG)  # from here on nobody takes it for the socket of a server that died
            if group is not None:
                _open_to(group, path)
        except BaseException:
            listener.close()
            raise
        new = functools.partial(Connection, self)
        self._listeners.append(
            await self.loop.create_unix_server(new, sock=listener, backlog=BACKLOG, start_serving=False)
        )

    async def listen_tcp(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> tuple[str, int]:
        """Claim one TCP address of `host`; return it, with the port, which the system chooses when it is 0.

        With `tls`, nobody gets past the handshake without it. Raises OSError.
        """
        found = await self.loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # IPv4 first: `localhost` often has ::1 on machines without IPv6.
        address = min(found, key=lambda each: each[0] != socket.AF_INET)[4]
        new = functools.partial(Connection, self, tls)
        listener = await self.loop.create_server(new, *address[:2], backlog=BACKLOG, start_serving=False)
        self._listeners.append(listener)
        bound = listener.sockets[0].getsockname()
        return str(bound[0]), int(bound[1])

    async def accept(self) -> None:
        """Let clients connect."""
        for listener in self._listeners:
            await listener.start_serving()
        self.accepting = True

    async def drain(self) -> None:
        """Accept no more clients and no more requests, answer those under way, and close every connection.

        Clients that do not take their replies within CONTENDED_STALL_S are cut off.
        """
        self._draining, self.accepting = True, False
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections):
            connection.drain()
        while self._tasks:
            await asyncio.wait(self._tasks)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), CONTENDED_STALL_S)
        for connection in list(self._connections):
            connection.abort("it did not take its replies while the server was stopping")
        self._patrol.cancel()

    def clients(self) -> list[str]:
        """Return the user of each connection that has finished its handshake."""
        return sorted(c.user for c in self._connections if not c.negotiating)

    # --- what connections ask ---

    def pool_for(self, length: int) -> PayloadPool:
        """The pool for what waits for a client: to send this much, or to take it."""
        return self._small if length <= SMALL_BLOCK_BYTES else self._large

    def admit(self, connection: Connection) -> bool:
        """Count a new connection in, unless there are too many."""
        count = len(self._connections) + len(self._parted)
        if self._draining or (count >= self._max_connections and not self._make_room()):
            log.warning("refusing a connection: %d are open, or at work still, the limit", count)
            return False
        self._connections.add(connection)
        self._empty.clear()
        return True

    def _make_room(self) -> bool:
        """Close who has been in its handshake for longest: who has not shown yet who it is keeps nobody out."""
        negotiating = [each for each in self._connections if each.negotiating]
        if not negotiating:
            return False
        oldest = min(negotiating, key=lambda each: each.since_s)
        oldest.abort("the limit of open connections is reached, and it has been in its handshake for longest")
        self.dismiss(oldest)  # now, and not when the loop gets to it: others come before
        return True

    def dismiss(self, connection: Connection) -> None:
        """Count a closed connection out, and its place once nothing that it asked is under way; then it calls again.

        Else who comes and goes could have any number of requests under way.
        """
        self._connections.discard(connection)
        if connection.busy:
            self._parted.add(connection)
        else:
            self._parted.discard(connection)
        entered = self._entered.pop(connection, None)
        if entered is not None:
            self._busy_poll.forget(connection.fd)
            if self._watcher is not None:
                self._watcher.disconnected(entered)
        if not self._connections:
            self._empty.set()

    def entered(self, connection: Connection) -> None:
        """Note that a connection has finished its handshake."""
        log.info("%s connected (%s)", connection.user, connection.origin)
        self._entered[connection] = next(self._ids)
        self._busy_poll.watch(connection.fd)
        if self._watcher is not None:
            self._watcher.connected(self._entered[connection], connection.user, connection.origin)

    def clock_s(self) -> float:
        """The clock by which clients stall: while this process stands still (SIGSTOP, say), it hears none of them."""
        return time.monotonic() - self._stood_still_s

    def idle(self) -> None:
        """A connection has nothing more to do now; if none has, the loop is about to sleep."""
        if not self._tasks:
            self._busy_poll.wait()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task that `drain` waits for."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self) -> None:
        while True:
            due_s = time.monotonic() + PATROL_S
            await asyncio.sleep(PATROL_S)
            late_s = time.monotonic() - due_s
            if late_s > PATROL_S:
                self._stood_still_s += late_s
            now_s = self.clock_s()
            for connection in list(self._connections):
                if connection.negotiating and now_s - connection.since_s > HANDSHAKE_S:
                    connection.abort("the handshake took too long")
                elif connection.overdue(now_s):
                    connection.abort("it stalled while holding memory for which others wait")


def _bind_private(listener: socket.socket, path: str) -> None:
    previous = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(previous)


def _open_to(group: int, path: str) -> None:
    """Let the members of a group connect to a socket that is its owner's alone; or remove it, and raise OSError."""
    try:
        os.chown(path, -1, group)  # before the mode lets anybody in
        os.chmod(path, 0o660)
    except OSError:
        os.unlink(path)
        raise
