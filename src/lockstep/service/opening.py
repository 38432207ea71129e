"""A mirror in use without its target: decrypted, as an NBD export, as it is or with an overlay over it.

Needs the mirror, its header and what unlocks it; no registry. The mirror is locked against whoever would write it, and
shared with others who only read. It is never written. What is written lands in the overlay (volume/overlay.py), and
`commit` makes a disk of the two.

The server runs on a thread of its own, so that the main thread can wait for signals, attach, and run programs.

Where the socket is, and nbdfuse's directory: RUNTIME/lockstep-open/NAME-N, where RUNTIME is $XDG_RUNTIME_DIR or for
root /run, and N is the first number that nobody holds. So what a killed process left behind is found and replaced by
the next one. Other accounts without $XDG_RUNTIME_DIR get a temporary directory; they attach nothing.
"""

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import re
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import uvloop

from lockstep.crypto import luks
from lockstep.crypto.cipher import self_test
from lockstep.crypto.unlock import Unlock
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.disk.mirror import open_mirror
from lockstep.disk.runs import requests
from lockstep.errors import DiskFailed, SocketUnusable, StateDirUnusable
from lockstep.nbd import wire
from lockstep.nbd.negotiation import ExportInfo
from lockstep.nbd.server import NbdServer
from lockstep.service import mirrors
from lockstep.service.memory import protect_memory
from lockstep.service.sockets import clear_stale_socket
from lockstep.volume.link import STILL
from lockstep.volume.overlay import Base, Overlay, OverlayFile, read_any
from lockstep.volume.ranges import Ranges
from lockstep.volume.rounds import Rounds
from lockstep.volume.workers import Workers

log = logging.getLogger(__name__)

WORKERS: Final = 16
STOP_PATIENCE_S: Final = 10.0

_READ: Final = wire.HAS_FLAGS | wire.SEND_FLUSH | wire.CAN_MULTI_CONN
_READ_ONLY: Final = _READ | wire.READ_ONLY
_WRITABLE: Final = _READ | wire.SEND_FUA | wire.SEND_TRIM | wire.SEND_WRITE_ZEROES | wire.SEND_FAST_ZERO


@dataclass(frozen=True)
class Opened:
    """An unlocked mirror, with its overlay if there is one."""

    path: str
    name: str
    """The volume's name, according to the token: of the export, and fit to be a file's."""
    size_bytes: int
    frozen: bool
    luks_uuid: str
    mirror: EncryptedDisk
    overlay: Overlay | None
    overlay_path: str | None

    @property
    def disk(self) -> EncryptedDisk | Overlay:
        """What one sees."""
        return self.overlay or self.mirror

    @property
    def sector_bytes(self) -> int:
        """The logical sector of a device for it: the token does not tell the target's, a partition table does.

        4096 where the mirror's sector is and the partition table lies where a disk of such sectors has it; else 512,
        with which every file system mounts.
        """
        signature = memoryview(bytearray(8))
        if self.mirror.sector_bytes == 4096 and self.size_bytes >= 8192:
            read_any(self.disk, 4096, signature)
        return 4096 if bytes(signature) == b"EFI PART" else 512


@contextlib.contextmanager
def opened(
    mirror_path: str,
    unlock: Unlock,
    *,
    header_path: str | None = None,
    overlay_path: Callable[[str], str] | None = None,
    make_overlay: bool = True,
    incomplete: bool = False,
) -> Iterator[Opened]:
    """Unlock a mirror for reading, and with `overlay_path` for writing to that file.

    `overlay_path` is given the volume's name. Raises MirrorIncomplete unless `incomplete`, NoToken, BackupOfAnother,
    what opening the mirror and claiming the overlay raise, and at the end DiskFailed where the overlay could not be
    flushed.
    """
    protect_memory()
    self_test()
    with contextlib.ExitStack() as stack:
        header = luks.read_header(header_path or mirror_path)
        token = mirrors.described(mirror_path, header_path, header, incomplete=incomplete)
        name, size_bytes = _file_name(token.volume_name), token.target_size_bytes
        base = Base(header.uuid, token.generation, size_bytes)
        files: list[OverlayFile] = []

        def claim_overlay(volume_key: bytearray) -> None:
            """Not before the mirror is unlocked, and found to be as large as it says."""
            if overlay_path is not None:
                files.append(_overlay_file(os.path.abspath(overlay_path(name)), base, make=make_overlay))
                files[0].unlock(volume_key)

        unlock.prepare()
        mirror = open_mirror(
            mirror_path, header_path, header, unlock, size_bytes, writable=False, with_key=claim_overlay
        )
        stack.callback(mirror.close)
        overlay, overlay_file = None, None
        for file in files:
            overlay, overlay_file = Overlay(mirror, file), file.path
            stack.callback(_close_overlay, overlay, file.path)
        frozen = token.state in STILL
        yield Opened(mirror_path, name, size_bytes, frozen, header.uuid, mirror, overlay, overlay_file)


def _overlay_file(path: str, base: Base, *, make: bool) -> OverlayFile:
    if make and not os.path.lexists(path):
        OverlayFile.make(path, base)
    return OverlayFile.claim(path, base)


def _file_name(volume_name: str) -> str:
    """The token is not authenticated: what it says does not lead elsewhere."""
    return re.sub(r"^\.|[^\w.-]", "_", volume_name)[:64]


def _close_overlay(overlay: Overlay, path: str) -> None:
    try:
        overlay.close()
    except OSError as error:
        raise DiskFailed(path=path, doing="Flushing", reason=error.strerror or str(error)) from error


# --- the export ---------------------------------------------------------------------------------------------


class OpenedExport:
    """Joins an opened mirror to the NBD server. Requests to an overlay take turns where they overlap."""

    def __init__(self, view: Opened, workers: Workers) -> None:
        flags = _READ_ONLY if view.overlay is None else _WRITABLE
        self.info = ExportInfo(view.name, view.size_bytes, flags, f"Lockstep mirror of {view.name}")
        self._disk = view.disk
        self._overlay = view.overlay
        self._ranges = Ranges()
        self._in_worker = workers.run
        self._flushes = Rounds(self._flush)

    def read_run(self, into: bytearray, run: "array[int]", count: int) -> int:
        """Read what is in the page cache; return how many reads, from the front."""
        view = memoryview(into)
        for at, (offset, length, position) in enumerate(requests(run, 0, count)):
            if not self._read_cached(offset, view[position : position + length]):
                return at
        return count

    def _read_cached(self, offset: int, into: memoryview) -> bool:
        try:
            if self._overlay is None:
                return self._disk.read_cached(offset, into)
            return self._ranges.free(*self._clusters(offset, len(into))) and self._overlay.read_cached(offset, into)
        except OSError:
            return False  # `read` meets it again

    def write_run(self, user: str, data: memoryview, run: "array[int]", count: int) -> int:  # noqa: ARG002
        """Nothing is written on the loop: it may have to fill up a cluster from the mirror."""
        return 0

    def half_done(self) -> bool:
        """What is written goes to one place."""
        return False

    async def read(self, into: memoryview, run: "array[int]", count: int) -> None:
        """Carry out a run, each read by itself.

        If one fails, the others are waited for all the same: who asked has other uses for the memory afterwards.
        """
        reads = (self._read(offset, into[at : at + length]) for offset, length, at in requests(run, 0, count))
        for failure in filter(None, await asyncio.gather(*reads, return_exceptions=True)):
            raise failure

    async def _read(self, offset: int, into: memoryview) -> None:
        if self._overlay is None:
            await self._in_worker(read_any, self._disk, offset, into)
            return
        async with self._ranges.hold([self._clusters(offset, len(into))]):
            await self._in_worker(read_any, self._disk, offset, into)

    async def write(
        self,
        user: str,  # noqa: ARG002
        data: memoryview,
        run: "array[int]",
        count: int,
        *,
        durable: bool,
    ) -> None:
        """Write to the overlay."""
        writes = list(requests(run, 0, count))
        async with self._ranges.hold([self._clusters(offset, length) for offset, length, _ in writes]):
            await self._in_worker(self._write, data, writes)
        await self._flush_if(durable)

    def _write(self, data: memoryview, writes: list[tuple[int, int, int]]) -> None:
        assert self._overlay is not None
        for offset, length, position in writes:
            self._overlay.write(offset, data[position : position + length])

    async def zero(
        self,
        user: str,  # noqa: ARG002
        offset: int,
        length: int,
        *,
        durable: bool,
        allocate: bool,
    ) -> None:
        """Zero in the overlay."""
        assert self._overlay is not None
        async with self._ranges.hold([self._clusters(offset, length)]):
            await self._in_worker(lambda overlay: overlay.zero(offset, length, allocate=allocate), self._overlay)
        await self._flush_if(durable)

    async def trim(self, user: str, offset: int, length: int, *, durable: bool) -> None:  # noqa: ARG002
        """Give up whole clusters."""
        assert self._overlay is not None
        async with self._ranges.hold([self._clusters(offset, length)]):
            await self._in_worker(self._overlay.trim, offset, length)
        await self._flush_if(durable)

    async def flush(self) -> None:
        """Make the overlay durable; whoever asks meanwhile shares the next round."""
        if self._overlay is not None:
            await self._flushes.join()

    async def cache(self, offset: int, length: int) -> None:
        """Not offered."""

    async def allocation(self, offset: int, length: int, limit: int) -> Sequence[tuple[int, int]]:
        """What was zeroed in the overlay is a hole; the mirror does not tell."""
        if self._overlay is None:
            return [(length, 0)]
        runs = itertools.islice(self._overlay.zeroes(offset, length), limit)
        return [(count, wire.STATE_HOLE | wire.STATE_ZERO if zeroes else 0) for count, zeroes in runs]

    def _clusters(self, offset: int, length: int) -> tuple[int, int]:
        assert self._overlay is not None
        cluster = self._overlay.cluster_bytes
        return offset - offset % cluster, -(-(offset + length) // cluster) * cluster

    async def _flush_if(self, durable: bool) -> None:
        if durable:
            await self.flush()

    async def _flush(self) -> None:
        assert self._overlay is not None
        await self._in_worker(self._overlay.flush)


# --- serving it ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exported(view: Opened, socket: str) -> Iterator[str]:
    """Serve it on a unix socket, on a thread of its own; yields the URI. Raises SocketUnusable."""
    clear_stale_socket(socket)
    ready: Future[Callable[[], object]] = Future()
    with ThreadPoolExecutor(1, "lockstep-server") as thread:
        done = thread.submit(uvloop.run, _serve(view, socket, ready))
        futures: tuple[Future[Any], ...] = (ready, done)
        wait(futures, return_when=FIRST_COMPLETED)
        if done.done():
            done.result()
        stop = ready.result()
        try:
            yield f"nbd+unix:///{view.name}?socket={quote(os.fsencode(socket))}"
        finally:
            stop()
            done.result()


async def _serve(view: Opened, socket: str, ready: Future[Callable[[], object]]) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    with contextlib.closing(Workers("lockstep-worker", WORKERS)) as workers:
        server = NbdServer(OpenedExport(view, workers))
        try:
            await server.listen_unix(socket)
        except OSError as error:
            await server.drain()
            raise SocketUnusable(path=socket, reason=error.strerror or str(error)) from error
        try:
            await server.accept()
            ready.set_result(lambda: loop.call_soon_threadsafe(stop.set))
            await stop.wait()
        finally:
            await _drain(server)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(socket)


async def _drain(server: NbdServer) -> None:
    """Answer what is under way, unless the mirror hangs: then those who wait get no answer."""
    try:
        await asyncio.wait_for(server.drain(), STOP_PATIENCE_S)
    except TimeoutError:
        log.warning("the mirror, or the overlay, did not answer for %g s: clients are left alone", STOP_PATIENCE_S)


@contextlib.contextmanager
def place(name: str) -> Iterator[str]:
    """Hold a directory for the socket and for what attaching needs. Raises StateDirUnusable."""
    runtime = os.environ.get("XDG_RUNTIME_DIR") or ("/run" if os.geteuid() == 0 else None)
    if runtime is None:
        with tempfile.TemporaryDirectory(prefix="lockstep-open-") as directory:
            yield directory
        return
    home = os.path.join(runtime, "lockstep-open")
    try:
        os.makedirs(home, mode=0o700, exist_ok=True)
        fd, directory = _first_free(os.path.join(home, name))
    except OSError as error:
        raise StateDirUnusable(path=home, reason=error.strerror or str(error)) from error
    try:
        yield directory
    finally:
        with contextlib.suppress(OSError):  # a device that is still there keeps it
            os.unlink(os.path.join(directory, ".attach.lock"))
        with contextlib.suppress(OSError):
            os.rmdir(directory)
        os.close(fd)


def _first_free(prefix: str) -> tuple[int, str]:
    """Make or take the first PREFIX-N that nobody holds; the lock is the descriptor's."""
    for number in itertools.count(1):
        directory = f"{prefix}-{number}"
        os.makedirs(directory, mode=0o700, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(directory)):  # not removed by who held it before
                return fd, directory
        os.close(fd)
    raise AssertionError
