"""Where the registry of a state directory is: in the directory, or on a PostgreSQL server.

registry.db     the registry, where there is no registry.url
registry.url    the URL of the database that is the registry instead
id              which state directory this is, for the database, which belongs to one of them

Whoever makes records, locks and sockets has opened the registry before. So where one of them is and the registry is
not, or is empty, it was lost, and must not be made anew: all volumes, grants and the audit trail would seem never to
have been, while servers go on with what they know of them.

A registry moves in an order in which a crash leaves one that is complete: all is durable in the new place, then the
names here change, and the old one takes nothing any more (`Registry.move`). registry.url counts before registry.db.
"""

import contextlib
import glob
import os
import socket
import uuid
from collections.abc import Iterator
from typing import Final

from lockstep.errors import (
    RegistryLost,
    RegistryNotMoved,
    RegistryUnreadable,
    RegistryUrlInvalid,
    StateDirUnusable,
)
from lockstep.registry.audit import Actor
from lockstep.registry.store import Registry
from lockstep.volume.files import made, rename, sync_directory

_OTHERS: Final = ("intent/*.intent", "held/*.held", "filling/*.missing", "run/*.lock", "run/*.keys", "run/*.borrowed")


class RegistryPlace:
    """Where the registry of the state directory at an absolute path is."""

    def __init__(self, state: str) -> None:
        self._state = state
        self.path = f"{state}/registry.db"
        self._url_path = f"{state}/registry.url"

    def used(self) -> bool:
        """Whether there is a registry, or was one."""
        return os.path.exists(self._url_path) or os.path.exists(self.path)

    def url(self) -> str | None:
        """The URL of the database that is the registry; None where the registry is in the state directory."""
        try:
            with open(self._url_path, encoding="utf-8") as file:
                return file.read().strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise RegistryUnreadable(registry=self._url_path, reason=reason) from error

    def open(self) -> Registry:
        """Open the registry, and make it in a new state directory. Raises registry errors, StateDirUnusable."""
        url = self.url()
        if url is not None:
            return self._database(url, refuse_new=True)
        found = None if self._has_file() else self._made_later()
        if found and not self._has_file():  # else somebody has just made it, and what was found
            raise RegistryLost(registry=self.path, path=self._state, found=found)
        return Registry.open(f"sqlite:///{self.path}")

    def move_to_database(self, registry: Registry, url: str, *, actor: Actor) -> str:
        """Move the registry, which is `registry`, to the database; return what that is called in messages.

        The file is registry.db.moved afterwards. Raises registry errors, RegistryNotEmpty, StateDirUnusable.
        """
        with self._database(url) as database, told(self._state), made(self._url_path, f"{url}\n") as place:

            def settle() -> None:
                rename(place, self._url_path)
                if os.path.exists(self.path):
                    rename(self.path, f"{self.path}.moved")

            registry.move(database, database.label, settle, actor=actor)
            return database.label

    def move_to_file(self, registry: Registry, *, actor: Actor) -> str:
        """Move the registry, which is `registry`, into the state directory; return its path. Raises as the other."""
        place = f"{self.path}.new"

        def settle() -> None:
            rename(place, self.path)
            os.unlink(self._url_path)
            sync_directory(self.path)

        with told(self._state):
            for left in (place, f"{place}-journal"):  # by a move that was killed
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(left)
            with Registry.open(f"sqlite:///{place}") as file:
                registry.move(file, self.path, settle, actor=actor)
        return self.path

    def _database(self, url: str, *, refuse_new: bool = False) -> Registry:
        """Open a database as this state directory's own; with `refuse_new` only one that is to be expected here."""
        if url.startswith("sqlite:"):
            raise RegistryUrlInvalid(reason="a registry in a file has its place in the state directory")
        registry = Registry.open(url)
        try:
            if refuse_new and not registry.owned():
                self._refuse_new(registry.label)
            registry.belong_to(self._id(), f"{self._state} on {socket.gethostname()}")
        except BaseException:
            registry.close()
            raise
        return registry

    def _refuse_new(self, label: str) -> None:
        if self._has_file():
            raise RegistryNotMoved(registry=label, path=self._state, url_path=self._url_path)
        if found := self._made_later():
            raise RegistryLost(registry=label, path=self._state, found=found)

    def _made_later(self) -> str | None:
        return min((name for pattern in _OTHERS for name in glob.glob(pattern, root_dir=self._state)), default=None)

    def _has_file(self) -> bool:
        try:
            return os.path.getsize(self.path) > 0
        except FileNotFoundError:
            return False
        except OSError:
            return True  # and it cannot be used: who opens it says why

    def _id(self) -> str:
        path = f"{self._state}/id"
        with told(self._state):
            if not os.path.exists(path):
                with contextlib.suppress(FileExistsError), made(path, f"{uuid.uuid4()}\n") as place:
                    os.link(place, path)
                    os.unlink(place)
                sync_directory(path)
            with open(path, encoding="ascii") as file:
                return file.read().strip()


@contextlib.contextmanager
def told(state: str) -> Iterator[None]:
    """Have what the state directory at this path fails told as StateDirUnusable."""
    try:
        yield
    except OSError as error:
        raise StateDirUnusable(path=state, reason=error.strerror or str(error)) from error
