"""Key slots: the places in a header that hold the volume key, each locked by a passphrase of its own.

Rules:

1. The last slot that people can open (a passphrase, a key file, a recovery key) is never taken away. A slot that only a
   token opens does not count: it is worth nothing without the machine that it was enrolled for. Nor does one that is
   unbound: it holds another key than the data has, as a re-keying leaves one that was killed when it had just begun.
2. A passphrase is changed by adding the new one and then taking the old one away, each in one update of the header. So
   at every moment one of them opens the mirror, or both. There must be a free slot.
3. Which slots are recovery keys is said by tokens of our own:

        {"type": "lockstep-recovery", "keyslots": ["2"], "version": 1}

   cryptsetup takes a slot that is wiped out of every token's list. A token whose list is empty means nothing.

What is not handled: somebody who takes slots away with cryptsetup itself at the same moment, past rule 1.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from lockstep.crypto import cryptsetup, luks, recovery_key
from lockstep.errors import (
    CryptsetupFailed,
    KeySlotNotRemoved,
    KeySlotsFull,
    KeySlotUnknown,
    LastKeySlot,
    NoKeySlots,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

RECOVERY_TOKEN_TYPE: Final = "lockstep-recovery"  # noqa: S105 - the name of a kind
RECOVERY_TOKEN_VERSION: Final = 1

PASSPHRASE: Final = "passphrase"  # noqa: S105 - the name of a kind
RECOVERY_KEY: Final = "recovery-key"
TOKEN: Final = "token"  # noqa: S105 - the name of a kind
UNBOUND: Final = "unbound"

MAX_SLOTS: Final = 32  # LUKS2_KEYSLOTS_MAX
_SLOT_BYTES: Final = 258048  # of a 512-bit volume key, as cryptsetup lays slots out

_REENCRYPTION: Final = "reencrypt"  # the type of a slot that holds no key: how far a re-keying is
_RECOVERY_TOKENS: Final = (RECOVERY_TOKEN_TYPE, "systemd-recovery")
# `open` asks the machine's tokens first, whatever passphrase it is given; those of this type open nothing.
_NO_TOKEN: Final = f"--token-type={luks.TOKEN_TYPE}"
# Says where a passphrase may be found, which somebody knows.
_KEYRING_TOKEN: Final = "luks2-keyring"  # noqa: S105 - the name of a kind
_COSTS: Final = {"time": "iterations", "iterations": "iterations", "memory": "memory_kib", "cpus": "threads"}


@dataclass(frozen=True, slots=True)
class KeySlot:
    """A slot: what opens it, which tokens name it, and what one guess costs."""

    number: int
    kind: str
    tokens: tuple[str, ...]
    kdf: str
    cost: dict[str, int] = field(hash=False)


def read(path: str) -> tuple[KeySlot, ...]:
    """The key slots, by number. HeaderUnreadable, NotLuks2, HeaderDamaged, CryptsetupMissing, CryptsetupHung."""
    metadata = luks.read_metadata(path)
    tokens = [(each["type"], set(each["keyslots"])) for each in metadata["tokens"].values()]
    bound = {number for each in metadata["digests"].values() if each["segments"] for number in each["keyslots"]}
    stored = {number: each for number, each in metadata["keyslots"].items() if each["type"] != _REENCRYPTION}
    slots = [_slot(number, each, tokens, is_bound=number in bound) for number, each in stored.items()]
    return tuple(sorted(slots, key=lambda slot: slot.number))


def add(path: str, passphrase: Buffer, new: Buffer, *, iter_time_ms: int | None, recovery: bool = False) -> int:
    """Have `new` open the mirror as well, which `passphrase` does; returns the slot.

    EmptyPassphrase, NoKeySlots, KeySlotsFull, and what `luks.volume_key` raises.
    """
    _, slot = _add(path, passphrase, new, iter_time_ms)
    if recovery:
        try:
            _mark_recovery(path, slot)
        except BaseException:
            _kill(path, slot, passphrase)
            raise
    return slot


def remove(path: str, passphrase: Buffer, slot: int | None = None) -> int:
    """Take away the slot that `passphrase` opens; or `slot`, if `passphrase` opens another one. Returns the slot.

    EmptyPassphrase, NoKeySlots, KeySlotUnknown, LastKeySlot, KeySlotNotRemoved, and what `luks.volume_key` raises.
    """
    luks.refuse_empty(passphrase)
    _require_another(path, slot)
    if slot is not None:
        _kill(path, slot, passphrase)
    else:
        action = "remove a passphrase from"
        done = cryptsetup.run(action, path, "luksRemoveKey", "--verbose", "--key-file=-", stdin=passphrase)
        if done.returncode != 0:
            raise luks.refused(action, path, done, passphrase)
        slot = _said(action, path, done, "is selected for deletion")
    _forget_empty_marks(path)
    return slot


def opened_by(path: str, passphrase: Buffer) -> int | None:
    """The slot that `passphrase` opens; None if it opens none. EmptyPassphrase, NoKeySlots, CryptsetupFailed."""
    luks.refuse_empty(passphrase)
    action = "try a passphrase of"
    arguments = ("--test-passphrase", "--verbose", "--key-file=-", _NO_TOKEN)
    done = cryptsetup.run(action, path, "open", *arguments, stdin=passphrase)
    if cryptsetup.rejected(done) and luks.read_header(path).keyslots:
        return None
    if done.returncode != 0:
        raise luks.refused(action, path, done, passphrase)
    return _said(action, path, done, "unlocked")


def require_opened_by(path: str, passphrase: Buffer) -> int:
    """The slot that `passphrase` opens. What `opened_by` raises, and WrongPassphrase or its like."""
    slot = opened_by(path, passphrase)
    if slot is None:
        raise recovery_key.wrong_passphrase(path, passphrase)
    return slot


def change(path: str, passphrase: Buffer, new: Buffer, *, iter_time_ms: int | None) -> tuple[int, int]:
    """Put `new` in the place of `passphrase`; returns the slot that was and the one that is.

    EmptyPassphrase, NoKeySlots, KeySlotsFull, and what `luks.volume_key` raises.
    """
    old, added = _add(path, passphrase, new, iter_time_ms)
    _kill(path, old, new)
    _forget_empty_marks(path)
    return old, added


# -- the slots ------------------------------------------------------------------------------------------


def _add(path: str, passphrase: Buffer, new: Buffer, iter_time_ms: int | None) -> tuple[int, int]:
    """The slot that `passphrase` opened, and the one that `new` opens now."""
    luks.refuse_empty(passphrase)
    luks.refuse_empty(new)
    _require_room(path)
    action = "add a passphrase to"
    cost = () if iter_time_ms is None else (f"--iter-time={iter_time_ms}",)
    arguments = ("--verbose", "--key-file=-", "--pbkdf=argon2id", *cost)
    with cryptsetup.memory_file(new) as fd:
        done = cryptsetup.run(
            action, path, "luksAddKey", *arguments, stdin=passphrase, after=[f"/dev/fd/{fd}"], fds=[fd]
        )
    if done.returncode != 0:
        raise luks.refused(action, path, done, passphrase)
    return _said(action, path, done, "unlocked"), _said(action, path, done, "created")


def _kill(path: str, slot: int, passphrase: Buffer) -> None:
    """Take `slot` away; cryptsetup wants a passphrase that opens another one."""
    action = "remove a key slot from"
    done = cryptsetup.run(action, path, "luksKillSlot", "--key-file=-", stdin=passphrase, after=[str(slot)])
    if cryptsetup.rejected(done):
        raise KeySlotNotRemoved(path=path, slot=slot)
    if done.returncode != 0:
        raise cryptsetup.failure(action, path, done)


def _said(action: str, path: str, done: cryptsetup.Completed, what: str) -> int:
    """The slot of which cryptsetup said so, in its C locale."""
    found = re.search(rf"Key ?slot (\d+) {what}", done.stdout.decode(errors="replace"))
    if found is None:
        raise CryptsetupFailed(action=action, path=path, exit_code=0, reason="its answer was not understood")
    return int(found[1])


def _require_room(path: str) -> None:
    slots = read(path)
    if not slots:
        raise NoKeySlots(path=path)
    room_bytes = int(luks.read_metadata(path)["config"]["keyslots_size"])
    limit = min(MAX_SLOTS, room_bytes // _SLOT_BYTES)
    if len(slots) >= limit:
        raise KeySlotsFull(path=path, count=len(slots))


def _require_another(path: str, slot: int | None) -> None:
    """Refuse to take away the last slot that people can open; `slot` is None for any of them."""
    slots = read(path)
    if not slots:
        raise NoKeySlots(path=path)
    if slot is not None and slot not in {each.number for each in slots}:
        raise KeySlotUnknown(path=path, slot=slot)
    if not [each for each in slots if each.kind not in (TOKEN, UNBOUND) and each.number != slot][slot is None :]:
        raise LastKeySlot(path=path)


def _slot(number: str, stored: dict[str, Any], tokens: list[tuple[str, set[str]]], *, is_bound: bool) -> KeySlot:
    naming = tuple(sorted(kind for kind, slots in tokens if number in slots))
    kind = PASSPHRASE
    if not is_bound:
        kind = UNBOUND
    elif any(each in _RECOVERY_TOKENS for each in naming):
        kind = RECOVERY_KEY
    elif any(each != _KEYRING_TOKEN for each in naming):
        kind = TOKEN
    kdf = stored["kdf"]
    cost = {_COSTS[name]: int(kdf[name]) for name in _COSTS if name in kdf}
    return KeySlot(int(number), kind, naming, str(kdf["type"]), cost)


# -- the marks of recovery keys -------------------------------------------------------------------------


def _mark_recovery(path: str, slot: int) -> None:
    token = {"type": RECOVERY_TOKEN_TYPE, "keyslots": [str(slot)], "version": RECOVERY_TOKEN_VERSION}
    cryptsetup.checked(
        "mark a recovery key of", path, "token", "import", "--json-file=-", stdin=json.dumps(token).encode()
    )


def _forget_empty_marks(path: str) -> None:
    for number, token in luks.read_metadata(path)["tokens"].items():
        if token["type"] == RECOVERY_TOKEN_TYPE and not token["keyslots"]:
            cryptsetup.checked("remove an empty token from", path, "token", "remove", f"--token-id={number}")
