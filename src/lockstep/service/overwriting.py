"""A target that a command overwrites, of a volume that nobody serves: what it leaves half done is not served.

    begin   on record, durably, before the first byte, if it is a device: what is beside that lies in /dev, which a
            power cut empties; a file has a record beside it, or another name
    end     the target is durable; its mirrors are to be compared with it, for nothing tells where they differ; then the
            record is removed

A registry that is absent or broken keeps nobody from restoring: the log says so.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from lockstep.errors import LockstepError, TargetTaken
from lockstep.registry.store import VolumeRecord
from lockstep.service import mirrors
from lockstep.service.mirror_set import forget_marks
from lockstep.service.state import State
from lockstep.volume.files import made, rename
from lockstep.volume.restore_record import records_beside, remove_record

log = logging.getLogger(__name__)


@contextlib.contextmanager
def overwriting(state: State, path: str, *, like: str | None = None) -> Iterator[None]:
    """Have the volume whose target is at `path` not be served before the block has ended well.

    All of its mirrors are compared then, but the one with the LUKS UUID `like`, to which the target was made equal.
    Raises StateDirUnusable.
    """
    volumes = _volumes_at(state, path)
    with state.told():
        for volume in volumes if Path(path).is_block_device() else ():
            with made(state.overwritten(volume.id), path) as place:
                rename(place, state.overwritten(volume.id))
    yield
    for volume in volumes:
        forget_marks(state, volume, but=like)
        with state.told(), contextlib.suppress(FileNotFoundError):
            remove_record(state.overwritten(volume.id))


def unfinished(state: State, volume: VolumeRecord) -> list[str]:
    """The records of what was not finished on a volume's target: by a restore, or a commit."""
    record = state.overwritten(volume.id)
    return records_beside(volume.target_path) + ([record] if os.path.lexists(record) else [])


def _volumes_at(state: State, path: str) -> list[VolumeRecord]:
    if not state.registry_place.used():
        return []
    try:
        with state.registry() as registry:
            return [volume for _, _, volume in mirrors.roles_of(registry.volumes(), path, (TargetTaken,))]
    except LockstepError as error:
        log.warning("it is not known whether %s is a target, from which mirrors differ now: %s", path, error)
        return []
