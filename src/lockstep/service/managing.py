"""The right to manage, which is another than the right to update: root has it, and the state directory's owner.

`working_on` is how a command uses it on one mirror, whose passphrases it is given.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from lockstep.crypto import luks
from lockstep.errors import MirrorUnknown
from lockstep.nbd.identity import account
from lockstep.registry.audit import Actor
from lockstep.registry.store import MirrorRecord, Registry, VolumeRecord
from lockstep.service import mirrors
from lockstep.service.memory import protect_memory
from lockstep.service.state import State


@dataclass(frozen=True)
class MirrorWork:
    """What a manager is doing to one mirror."""

    state: State
    registry: Registry
    actor: Actor
    volume: VolumeRecord
    mirror: MirrorRecord

    def renewed(self) -> Self:
        """The same work, as the volume is now: for whoever has just got a lock, or an answer from somebody who types.

        Raises MirrorUnknown where it is no mirror of the volume any more, and what `working_on` raises.
        """
        volume = self.registry.volume(self.volume.name)
        mirror = next((each for each in volume.mirrors if each.id == self.mirror.id), None)
        if mirror is None:
            raise MirrorUnknown(mirror=self.mirror.path, where=f" with the volume {volume.name}")
        mirrors.require_same_disk(volume, mirror, luks.read_uuid(mirrors.header_path(mirror)))
        return replace(self, volume=volume, mirror=mirror)

    @property
    def header(self) -> str:
        """Where the mirror's LUKS2 header is."""
        return mirrors.header_path(self.mirror)

    def note(self, event: str, what: str, **details: object) -> None:
        """Put it into the audit trail: `what` is what was done (to) the mirror. Raises registry errors."""
        reason = f"{self.actor.user} {what} the mirror {self.mirror.path}"
        details |= {"mirror": self.mirror.path, "luks_uuid": self.mirror.luks_uuid}
        self.registry.audit(event, actor=self.actor, volume=self.volume.name, reason=reason, details=details)


@contextlib.contextmanager
def working_on(state: State, name: str, mirror_path: str | None, action: str) -> Iterator[MirrorWork]:
    """Work on a mirror of the volume `name`; `action` says what for, up to the volume's name.

    Raises NotManager, registry errors, NoMirror and its like, MirrorOfAnotherVolume and header errors.
    """
    protect_memory()
    actor = manager(state, f"{action} {name}")
    with state.registry() as registry:
        volume = registry.volume(name)
        mirror = mirrors.chosen(volume, mirror_path)
        mirrors.require_same_disk(volume, mirror, luks.read_uuid(mirrors.header_path(mirror)))
        yield MirrorWork(state, registry, actor, volume, mirror)


@contextlib.contextmanager
def unserved(state: State, registry: Registry, name: str) -> Iterator[VolumeRecord | None]:
    """Have a volume that nobody else serves or changes, or None where somebody does.

    It is read when its lock is there: who had that before may have changed it. Raises registry errors.
    """
    registry.volume(name)  # what is no volume gets no lock
    with state.volume_lock(name) as mine:
        yield registry.volume(name) if mine else None


def manager(state: State, action: str) -> Actor:
    """Return who runs this command, for the audit trail. Raises NotManager, StateDirUnusable."""
    if not os.path.exists(state.path):
        state.prepare()
    uid = os.geteuid()
    state.require_manager(uid, action)
    return commander()


def commander() -> Actor:
    """Return who runs this command, whatever their rights."""
    sudo = f", sudo by {os.environ['SUDO_USER']}" if os.environ.get("SUDO_USER") else ""
    return Actor(account(os.geteuid()), f"command line, pid {os.getpid()}{sudo}")
