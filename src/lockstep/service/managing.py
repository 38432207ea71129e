"""The right to manage, which is another than the right to update: root has it, and the state directory's owner."""

import os

from lockstep.nbd.identity import account
from lockstep.registry.audit import Actor
from lockstep.service.state import State


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
