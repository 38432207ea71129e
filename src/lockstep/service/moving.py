"""The registry is moved to a PostgreSQL database, or back into the state directory.

Nothing is served meanwhile: a server that went on would find that the audit trail takes no row, and leave the mirrors
alone from then on.
"""

import contextlib
from dataclasses import dataclass

from lockstep.errors import StillServed
from lockstep.service.managing import manager
from lockstep.service.state import State


@dataclass(frozen=True)
class Moved:
    """What the registry is called now, in messages; and whether it was moved to there, or had been there before."""

    registry: str
    moved: bool


def move_registry(state: State, url: str | None) -> Moved:
    """Move the registry to the PostgreSQL database with this URL, or with None into the state directory.

    Raises NotManager, StillServed, registry errors, StateDirUnusable. After an error it is where it was.
    """
    actor = manager(state, "move the registry")
    place = state.registry_place
    with contextlib.ExitStack() as stack:
        stack.callback(state.hand_over)
        registry = stack.enter_context(state.registry())
        if place.url() == url:
            return Moved(registry.label, moved=False)
        for volume in registry.volumes():
            if not stack.enter_context(state.volume_lock(volume.name)):
                raise StillServed(volume=volume.name, action="taken along to another registry")
        if url is None:
            return Moved(place.move_to_file(registry, actor=actor), moved=True)
        return Moved(place.move_to_database(registry, url, actor=actor), moved=True)
