"""What was done to a mirror that needs no registry, in the audit trail of one that knows the mirror."""

import logging
import os
from typing import Any

from lockstep.errors import LockstepError
from lockstep.service.managing import commander
from lockstep.service.state import State

log = logging.getLogger(__name__)


def note_if_known(
    state: State, event: str, did: str, mirror_path: str, luks_uuid: str, details: dict[str, Any]
) -> None:
    """Put a row into the audit trail: who runs this command, and `did` what.

    It is done already: a registry that is absent or broken is no reason to fail. The log says so.
    """
    if not state.registry_place.used():
        return
    try:
        with state.registry() as registry:
            known = {mirror.luks_uuid: volume.name for volume in registry.volumes() for mirror in volume.mirrors}
            if luks_uuid in known:
                actor = commander()
                told = {"mirror": os.path.abspath(mirror_path), **details}
                registry.audit(event, actor=actor, volume=known[luks_uuid], reason=f"{actor.user} {did}", details=told)
    except LockstepError as error:
        log.warning("the %s is not in the audit trail: %s", event, error)
