"""The state directory: where everything that is not on the disks themselves is kept.

registry.db, registry.url, id    volumes and their mirrors, or where they are (registry_place.py)
intent/LUKS-UUID.intent          for each mirror, where it may differ from its target
held/LUKS-UUID.held, .writers    for each mirror, what it must not be given by itself, and whose it is
filling/VOLUME-ID.missing        for a volume whose target was replaced, what the new one does not have yet
run/NAME.lock                    held by the server of the volume NAME for as long as it runs
run/LUKS-UUID.keys               held by a command that changes the header of a mirror
run/LUKS-UUID.borrowed           held by who re-keys or drills a mirror, and shared by who is just opening it
run/NAME.sock                    the NBD server
run/NAME.control                 the control interface
run/NAME.attached, NAME.fuse/    the block device of an attached volume
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import platformdirs

from lockstep.errors import NotManager, OutputInState, StateDirUnusable
from lockstep.nbd.identity import account
from lockstep.registry.store import Registry
from lockstep.service.registry_place import RegistryPlace, told

ENVIRONMENT: Final = "LOCKSTEP_STATE_DIR"
SYSTEM_DIRECTORY: Final = "/var/lib/lockstep"
CONTROL: Final = ".control"


@dataclass(frozen=True)
class State:
    """A state directory, given as an absolute path."""

    path: str

    @classmethod
    def locate(cls, given: str | None) -> "State":
        """Return the directory to use: `given`, else $LOCKSTEP_STATE_DIR, else the system's or the user's own."""
        chosen = given or os.environ.get(ENVIRONMENT)
        if not chosen:
            chosen = SYSTEM_DIRECTORY if os.geteuid() == 0 else platformdirs.user_state_dir("lockstep")
        return cls(os.path.abspath(chosen))

    def registry(self) -> Registry:
        """Open the registry, and make it in a new directory. Raises what `prepare` raises, and registry errors."""
        self.prepare()
        try:
            return self.registry_place.open()
        finally:
            self.hand_over()

    def told(self) -> contextlib.AbstractContextManager[None]:
        """Have what fails in the directory, an OSError, told as StateDirUnusable."""
        return told(self.path)

    @property
    def registry_place(self) -> RegistryPlace:
        """Where the registry is."""
        return RegistryPlace(self.path)

    def prepare(self) -> None:
        """Make what is missing of the directory, for its owner alone. Raises StateDirUnusable, and NotManager."""
        try:
            for directory in (self.path, self.run_dir, self._intent_dir, self._held_dir, self._filling_dir):
                os.makedirs(directory, mode=0o700, exist_ok=True)
        except OSError as error:
            if isinstance(error, PermissionError) and os.path.exists(self.path):
                self.require_manager(os.geteuid(), "use this state directory")
            raise StateDirUnusable(path=self.path, reason=error.strerror) from error

    def require_manager(self, uid: int, action: str) -> None:
        """Let root pass, and the directory's owner. Raises NotManager, and StateDirUnusable."""
        try:
            owner = os.stat(self.path).st_uid
        except OSError as error:
            raise StateDirUnusable(path=self.path, reason=error.strerror) from error
        if uid not in (0, owner):
            raise NotManager(user=account(uid), action=action, path=self.path)

    def refuse_output(self, path: str) -> None:
        """Refuse what would take the place of something in here, by its own name or a link's. Raises OutputInState."""
        own = os.path.realpath(self.path)
        named = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
        if any(os.path.commonpath((own, each)) == own for each in (named, os.path.realpath(path))):
            raise OutputInState(path=path, state=self.path)

    @property
    def run_dir(self) -> str:
        """Where sockets and locks are."""
        return f"{self.path}/run"

    @property
    def _intent_dir(self) -> str:
        return f"{self.path}/intent"

    @property
    def _held_dir(self) -> str:
        return f"{self.path}/held"

    def socket(self, name: str) -> str:
        """The default NBD socket of a volume."""
        return f"{self.run_dir}/{name}.sock"

    def control(self, name: str) -> str:
        """The control socket of a volume."""
        return f"{self.run_dir}/{name}{CONTROL}"

    def intent(self, luks_uuid: str) -> str:
        """The intent bitmap of a mirror."""
        return f"{self._intent_dir}/{luks_uuid}.intent"

    @property
    def _filling_dir(self) -> str:
        return f"{self.path}/filling"

    def missing(self, volume_id: str) -> str:
        """The record of what a new target lacks."""
        return f"{self._filling_dir}/{volume_id}.missing"

    def overwritten(self, volume_id: str) -> str:
        """The record that a command overwrites a target, or was interrupted."""
        return f"{self._filling_dir}/{volume_id}.overwritten"

    def held(self, luks_uuid: str) -> str:
        """The record of what is held from a mirror, without the suffixes of its files."""
        return f"{self._held_dir}/{luks_uuid}"

    def records(self, luks_uuid: str) -> tuple[str, ...]:
        """All files that are kept about a mirror."""
        held = self.held(luks_uuid)
        return self.intent(luks_uuid), f"{held}.held", f"{held}.writers"

    @contextlib.contextmanager
    def key_lock(self, luks_uuid: str) -> Iterator[None]:
        """Wait until no other command changes the header of a mirror. A server does not ask for this lock."""
        with self._flock(f"{self.run_dir}/{luks_uuid}.keys", fcntl.LOCK_EX):
            yield

    @contextlib.contextmanager
    def borrowing_lock(self, luks_uuid: str, *, shared: bool = False) -> Iterator[int | None]:
        """Try to be the one who borrows a mirror; or with `shared`, to open one that nobody borrows meanwhile.

        Yields None if that cannot be, or the descriptor that has the lock: a child that inherits it has the lock too.
        """
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        with self._flock(f"{self.run_dir}/{luks_uuid}.borrowed", kind | fcntl.LOCK_NB) as fd:
            yield fd

    @contextlib.contextmanager
    def volume_lock(self, name: str) -> Iterator[bool]:
        """Try to be the only one who serves or removes a volume; yields whether that is so.

        The kernel gives the lock up when its holder dies, so there is no stale lock to recognise.
        """
        with self._flock(f"{self.run_dir}/{name}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as fd:
            yield fd is not None

    @contextlib.contextmanager
    def _flock(self, path: str, how: int) -> Iterator[int | None]:
        """Take a lock, and yield its descriptor; or None where others have it, unless `how` waits for them."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateDirUnusable(path=self.path, reason=error.strerror) from error
        try:
            try:
                fcntl.flock(fd, how)
            except BlockingIOError:
                yield None
            else:
                yield fd
        finally:
            os.close(fd)
            self.hand_over()

    def hand_over(self) -> None:
        """Have what root has made belong to the directory's owner, who could not serve or manage any more.

        That owner may have put links to others' files here: only what has no other name is handed over.
        """
        if os.geteuid() != 0:
            return
        with contextlib.suppress(OSError):  # of what is gone meanwhile
            owner = os.stat(self.path)
            if owner.st_uid == 0:
                return
            for directory in (self.path, self.run_dir, self._intent_dir, self._held_dir, self._filling_dir):
                for name in os.listdir(directory):
                    _give(f"{directory}/{name}", owner)


def _give(path: str, owner: os.stat_result) -> None:
    """Hand over a file, a directory that is still empty, or a control socket, if it is root's.

    It is not really opened: to close a descriptor of the registry would drop the locks that SQLite has on it.
    """
    with contextlib.suppress(OSError):  # of what is gone meanwhile
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found, itself = os.fstat(fd), f"/proc/self/fd/{fd}"
            control = stat.S_ISSOCK(found.st_mode) and path.endswith(CONTROL)
            only_here = (stat.S_ISREG(found.st_mode) or control) and found.st_nlink == 1
            fresh = stat.S_ISDIR(found.st_mode) and not os.listdir(itself)
            if found.st_uid == 0 and (only_here or fresh):
                os.chown(itself, owner.st_uid, owner.st_gid)
        finally:
            os.close(fd)
