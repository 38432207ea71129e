"""The passphrases of a mirror: looked at, added, removed, changed. A running server does not notice.

Each mirror has its own. One command at a time changes those of a mirror: so each of two that remove a passphrase sees
what the other one has left.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lockstep.crypto import keyslots, luks, recovery_key
from lockstep.crypto.keyslots import KeySlot
from lockstep.errors import LockstepError, NoMirror
from lockstep.registry.store import MirrorRecord
from lockstep.service import mirrors
from lockstep.service.managing import MirrorWork, manager, working_on
from lockstep.service.state import State

ADDED, REMOVED, CHANGED = "key-added", "key-removed", "key-changed"
BEGUN, UNCHANGED = "key-begun", "key-unchanged"
"""Events of the audit trail. Each change has two: begun comes before anything is changed, and so is never missing."""

Ask = Callable[[], bytes]


@dataclass(frozen=True)
class Done:
    """What was done to which slot of which mirror."""

    mirror: MirrorRecord
    slot: int
    old_slot: int | None = None  # of a passphrase that was changed
    recovery_key: str = ""
    still_opens: bool = False  # a passphrase that was removed, or changed, opens another slot


def list_keys(state: State, name: str, mirror_path: str | None) -> list[tuple[MirrorRecord, tuple[KeySlot, ...]]]:
    """Return the key slots of a mirror, or of all. Raises NotManager, NoMirror and what reading a header raises."""
    manager(state, f"list the keys of {name}")
    with state.registry() as registry:
        volume = registry.volume(name)
    if not volume.mirrors:
        raise NoMirror(volume=name)
    wanted = [mirrors.chosen(volume, mirror_path)] if mirror_path else volume.mirrors
    found = []
    for mirror in wanted:
        header = mirrors.header_path(mirror)
        mirrors.require_same_disk(volume, mirror, luks.read_uuid(header))
        found.append((mirror, keyslots.read(header)))
    return found


def add_key(
    state: State, name: str, mirror_path: str | None, passphrase: Ask, new: Ask, iter_time_ms: int | None
) -> Done:
    """Add a passphrase, authorised by one that is there."""
    with _changing(state, name, mirror_path, "add a key to", passphrase, new) as work:
        slot = keyslots.add(work.header, passphrase(), new(), iter_time_ms=iter_time_ms)
        with _undone(work, passphrase, slot):
            work.note(ADDED, f"added a passphrase (key slot {slot}) of", slot=slot, kind=keyslots.PASSPHRASE)
    return Done(work.mirror, slot)


def add_recovery_key(
    state: State,
    name: str,
    mirror_path: str | None,
    passphrase: Ask,
    iter_time_ms: int | None,
    *,
    tell: Callable[[Done], None],
) -> None:
    """Add a recovery key, which `tell` is given, and nobody ever again; if that fails, it is taken away."""
    with _changing(state, name, mirror_path, "add a recovery key to", passphrase) as work:
        made = recovery_key.new()
        slot = keyslots.add(work.header, passphrase(), made.encode(), iter_time_ms=iter_time_ms, recovery=True)
        with _undone(work, passphrase, slot):
            work.note(ADDED, f"added a recovery key (key slot {slot}) of", slot=slot, kind=keyslots.RECOVERY_KEY)
            tell(Done(work.mirror, slot, recovery_key=made))


def remove_key(state: State, name: str, mirror_path: str | None, passphrase: Ask, slot: int | None) -> Done:
    """Remove the slot that the passphrase opens; or `slot`, authorised by the passphrase of another one."""
    with _changing(state, name, mirror_path, "remove a key from", passphrase) as work:
        removed = keyslots.remove(work.header, passphrase(), slot)
        work.note(REMOVED, f"removed key slot {removed} of", slot=removed)
        still_opens = slot is None and keyslots.opened_by(work.header, passphrase()) is not None
    return Done(work.mirror, removed, still_opens=still_opens)


def change_key(
    state: State, name: str, mirror_path: str | None, passphrase: Ask, new: Ask, iter_time_ms: int | None
) -> Done:
    """Put a new passphrase in the place of one; there is no moment at which neither opens the mirror."""
    with _changing(state, name, mirror_path, "change a key of", passphrase, new) as work:
        old, slot = keyslots.change(work.header, passphrase(), new(), iter_time_ms=iter_time_ms)
        work.note(CHANGED, f"changed a passphrase (key slot {old}, now {slot}) of", slot=slot, old_slot=old)
        still_opens = keyslots.opened_by(work.header, passphrase()) is not None
    return Done(work.mirror, slot, old_slot=old, still_opens=still_opens)


@contextlib.contextmanager
def _changing(state: State, name: str, mirror_path: str | None, action: str, *asked: Ask) -> Iterator[MirrorWork]:
    """Alone with a mirror's key slots. Raises NotManager, registry errors, MirrorOfAnotherVolume and header errors."""
    with working_on(state, name, mirror_path, action) as begun:
        for ask in asked:
            ask()  # they remember: nobody else has to wait while somebody types
        with state.key_lock(begun.mirror.luks_uuid):
            work = begun.renewed()
            luks.read_header(work.header)  # refuses one that is being re-keyed
            before = keyslots.read(work.header)
            work.note(BEGUN, f"began to {action}")
            try:
                yield work
            except BaseException:
                with contextlib.suppress(LockstepError):
                    if keyslots.read(work.header) == before:
                        work.note(UNCHANGED, "did not change a key of")
                raise


@contextlib.contextmanager
def _undone(work: MirrorWork, passphrase: Ask, slot: int) -> Iterator[None]:
    """Take a new key away again if what follows fails: none opens the mirror that is not in the audit trail."""
    try:
        yield
    except BaseException:
        keyslots.remove(work.header, passphrase(), slot)
        with contextlib.suppress(LockstepError):
            work.note(REMOVED, f"removed key slot {slot} of", slot=slot)
        raise
