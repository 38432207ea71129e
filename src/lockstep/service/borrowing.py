"""A mirror that a command has for itself, while its volume goes on being served from the target.

    alone       nobody else borrows the mirror, and whoever wants to open it for writing waits
    ask         the server, if there is one, lets the mirror go between two updates: it is the disk as it was then
    give back   the server takes the mirror back, and copies what was written meanwhile

A command that dies gives the mirror back as well: the lock ends with it, and the server looks again by itself.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Final

from lockstep.errors import LockstepError, MirrorBorrowed, NotServed
from lockstep.registry.store import MirrorRecord
from lockstep.service import control_client
from lockstep.service.state import State

DRILL: Final = "drill"
REKEY: Final = "rekey"
"""What a mirror is borrowed for."""

OPENERS_PATIENCE_S: Final = 60.0  # whoever is just opening the mirror has it in seconds
RETURN_PATIENCE_S: Final = 60.0
POLL_S: Final = 0.1


@contextlib.contextmanager
def alone(state: State, mirror: MirrorRecord, patience_s: float = OPENERS_PATIENCE_S) -> Iterator[int]:
    """Be the only one who borrows this mirror, and have nobody open it anew; yields the descriptor of the lock.

    Raises MirrorBorrowed.
    """
    deadline_s = time.monotonic() + patience_s
    with contextlib.ExitStack() as stack:
        while (lock := stack.enter_context(state.borrowing_lock(mirror.luks_uuid))) is None:
            if time.monotonic() >= deadline_s:
                raise MirrorBorrowed(path=mirror.path)
            time.sleep(POLL_S)
        yield lock


@contextlib.contextmanager
def nobodys(state: State, mirrors: Iterable[MirrorRecord]) -> Iterator[None]:
    """Have mirrors that nobody borrows, and nobody begins to meanwhile. Raises MirrorBorrowed."""
    with contextlib.ExitStack() as stack:
        for mirror in mirrors:
            stack.enter_context(alone(state, mirror, patience_s=0.0))
        yield


def ask(state: State, volume: str, mirror: MirrorRecord, purpose: str) -> bool:
    """Have the server let the mirror go; False if there is none.

    Raises ServerSilent, DiskBusy, TargetUnfinished, NotManager, and for a drill MirrorNotDrilled.
    """
    try:
        body = {"mirror": mirror.luks_uuid, "for": purpose}
        control_client.ask_patiently(state.control(volume), volume, "POST", "/v1/aside", **body)
    except NotServed:
        return False
    return True


def give_back(state: State, volume: str, mirror: MirrorRecord) -> str | None:
    """Have the server take the mirror back, and return why it has not; the caller has closed everything.

    Raises NotServed: the next start takes the mirror.
    """
    control = state.control(volume)
    deadline_s = time.monotonic() + RETURN_PATIENCE_S
    try:
        control_client.ask(control, volume, "POST", "/v1/mirrors")
        while True:
            described = control_client.ask_status(control, volume)["mirrors"]
            found = [each for each in described if each["uuid"] == mirror.luks_uuid]
            if not found or found[0]["state"] != "degraded":
                return None
            if time.monotonic() > deadline_s:
                return str(found[0]["error"])
            time.sleep(POLL_S)
    except NotServed:
        raise
    except LockstepError as error:
        return str(error)
