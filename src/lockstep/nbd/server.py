"""The server of one export: it listens, admits, watches over and drains connections."""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Coroutine
from typing import Any, Final

from lockstep.nbd.connection import CONTENDED_STALL_S, Connection, Export
from lockstep.nbd.payload import SMALL_BLOCK_BYTES, SMALL_LIMIT_BYTES, SMALL_SHARE_BYTES, PayloadPool

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 1024
BACKLOG: Final = 1024
HANDSHAKE_S: Final = 30.0
PATROL_S: Final = 1.0


class NbdServer:
    """Listens, admits, watches over and drains the connections to one export."""

    def __init__(self, export: Export, pool: PayloadPool | None = None, max_connections: int = MAX_CONNECTIONS) -> None:
        self.export = export
        self._large = pool or PayloadPool()
        self._small = PayloadPool(SMALL_LIMIT_BYTES, SMALL_SHARE_BYTES)
        self.pools: tuple[PayloadPool, ...] = (self._small, self._large)
        self.loop = asyncio.get_running_loop()
        self.now_s = time.monotonic()
        self._max_connections = max_connections
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: list[asyncio.Server] = []
        self._draining = False
        self.accepting = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._patrol = self.loop.create_task(self._watch())

    async def listen_unix(self, path: str) -> None:
        """Claim a unix socket at `path`, which must not exist; only its owner may connect, once `accept` is called."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        previous = os.umask(0o177)
        try:
            listener.bind(path)
            listener.listen(BACKLOG)  # from here on nobody takes it for the socket of a server that died
        finally:
            os.umask(previous)
        self._listeners.append(
            await self.loop.create_unix_server(self._new, sock=listener, backlog=BACKLOG, start_serving=False)
        )

    async def listen_tcp(self, host: str, port: int) -> int:
        """Claim a TCP address; return the port, which the system chooses when `port` is 0."""
        listener = await self.loop.create_server(self._new, host, port, backlog=BACKLOG, start_serving=False)
        self._listeners.append(listener)
        return int(listener.sockets[0].getsockname()[1])

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
        """The pool that blocks of this length come from and go back to."""
        return self._small if length <= SMALL_BLOCK_BYTES else self._large

    def admit(self, connection: Connection) -> bool:
        """Count a new connection in, unless there are too many."""
        if self._draining or len(self._connections) >= self._max_connections:
            log.warning("refusing a connection: %d are open, the limit", len(self._connections))
            return False
        self._connections.add(connection)
        self._empty.clear()
        return True

    def dismiss(self, connection: Connection) -> None:
        """Count a closed connection out."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def entered(self, connection: Connection) -> None:
        """Note that a connection has finished its handshake."""
        log.info("%s connected", connection.user)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task that `drain` waits for."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _new(self) -> Connection:
        return Connection(self)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(PATROL_S)
            self.now_s = time.monotonic()
            for connection in list(self._connections):
                if connection.negotiating and self.now_s - connection.since_s > HANDSHAKE_S:
                    connection.abort("the handshake took too long")
                elif any(pool.contended for pool in self.pools) and connection.overdue(self.now_s):
                    connection.abort("it stalled while holding memory for which others wait")
