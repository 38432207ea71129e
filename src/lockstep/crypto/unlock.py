"""How a mirror is unlocked: by a passphrase, or by a token that was enrolled in its header for this machine.

A LUKS2 token ties a key slot to something that the machine has: its TPM2, a FIDO2 key, a Tang server, the kernel's
keyring. cryptsetup and its plugins know how to ask it; who enrolled it (systemd-cryptenroll) is not our business. But
cryptsetup 2.6 does not hand the volume key out for a token. It does add a key slot for one. So the header alone is
copied to memory, the token adds a random passphrase to the copy, and that opens the copy. The header on the disk is
only read, and the copy is gone with its descriptor.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lockstep.crypto import cryptsetup, luks
from lockstep.errors import NoTokenUnlocks

if TYPE_CHECKING:
    from typing_extensions import Buffer

# The cheapest that cryptsetup takes, for 256 random bits in a header that lives for a moment.
_CHEAP: Final = ("--pbkdf=argon2id", "--pbkdf-force-iterations=4", "--pbkdf-memory=32", "--pbkdf-parallel=1")
_REFUSED_EXITS: Final = (1, 2)  # no token that can be asked; none that gives a key


@dataclass(frozen=True)
class Unlock:
    """How to come to the volume key of any mirror of a volume, now or later.

    `passphrase` gets it, and remembers it, so that it can be asked again; None means tokens.
    """

    passphrase: Callable[[], Buffer] | None

    def prepare(self) -> None:
        """Ask for the passphrase now, if that was not done: before anything is locked, and while somebody is there."""
        if self.passphrase is not None:
            self.passphrase()

    def volume_key(self, path: str) -> bytearray:
        """The volume key of the header at `path`. The caller wipes it after use.

        NoTokenUnlocks, and what `luks.volume_key` raises.
        """
        if self.passphrase is not None:
            return luks.volume_key(path, self.passphrase())
        return _volume_key_by_token(path)


BY_TOKEN: Final = Unlock(None)


def _volume_key_by_token(path: str) -> bytearray:
    luks.read_header(path)  # so that what is wrong with the header is said as such
    passphrase = secrets.token_hex(32).encode()
    action = "ask the tokens of"
    metadata = luks.read_metadata(path)
    header = luks.header_bytes(path, metadata)
    with cryptsetup.memory_file(header) as copy, cryptsetup.memory_file(passphrase) as added:
        fds = (copy, added)
        place = f"/dev/fd/{copy}"
        _make_room(place, metadata, fds)
        arguments = ("--token-only", *_CHEAP)
        result = cryptsetup.run(action, place, "luksAddKey", *arguments, after=[f"/dev/fd/{added}"], fds=fds)
        if result.returncode in _REFUSED_EXITS:
            raise NoTokenUnlocks(path=path, reason=_enrolled(path))
        if result.returncode != 0:
            raise cryptsetup.failure(action, path, result)
        return luks.volume_key(path, passphrase, copy=copy)


def _make_room(place: str, metadata: dict[str, Any], fds: Sequence[int]) -> None:
    """Take a key slot that no token opens out of the copy: in the header all may be in use. It need not succeed."""
    slots = set(metadata["keyslots"]).difference(*(token["keyslots"] for token in metadata["tokens"].values()))
    if slots:
        cryptsetup.run("make room in a copy of", place, "luksKillSlot", after=[min(slots)], fds=fds)


def _enrolled(path: str) -> str:
    tokens = luks.read_metadata(path)["tokens"].values()
    kinds = sorted(
        {str(token["type"]) for token in tokens if token["keyslots"] and token["type"] != "lockstep-recovery"}
    )
    return f"it has {', '.join(kinds)}, and none of them gave a key" if kinds else "none is enrolled in its header"
