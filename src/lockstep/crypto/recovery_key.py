"""Recovery keys: passphrases that a program chose, for paper.

    bcdfgh-jknprs-tvxbcd-efghjk-nprstv-xbcdef-ghjknp-vchdet

Eight groups of six letters, joined by hyphens. The first seven groups are random: 42 letters of 4 bits, 168 bits. The
last one is a checksum: the first 24 bits of the SHA-256 of the text before it, without the last hyphen. A letter
stands for 4 bits by its place in ALPHABET, the higher half of a byte first.

The alphabet has no two letters that look alike on paper, and only letters that are on the same key of American, German
and French keyboards, which matters on a rescue system. The text itself, with its hyphens and nothing after it, is the
passphrase: who types it needs no program of ours.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import TYPE_CHECKING, Final

from lockstep.errors import LuksError, RecoveryKeyMistyped, RecoveryKeyUnknown, WrongPassphrase

if TYPE_CHECKING:
    from typing_extensions import Buffer

ALPHABET: Final = "bcdefghjknprstvx"
GROUPS: Final = 8  # the last one is the checksum
GROUP_LETTERS: Final = 6

WRONG: Final = (WrongPassphrase, RecoveryKeyMistyped, RecoveryKeyUnknown)
"""What `wrong_passphrase` may return."""

_EXACT: Final = re.compile(rf"[{ALPHABET}]{{{GROUP_LETTERS}}}(-[{ALPHABET}]{{{GROUP_LETTERS}}}){{{GROUPS - 1}}}")
_LETTERS: Final = GROUPS * GROUP_LETTERS
_SLACK: Final = 4  # how many letters may be missing or too many in what is still taken for one


def new() -> str:
    """A new recovery key."""
    body = _grouped(secrets.token_bytes((GROUPS - 1) * GROUP_LETTERS // 2))
    return f"{body}-{_checksum(body)}"


def wrong_passphrase(path: str, passphrase: Buffer) -> LuksError:
    """The error for a passphrase that opens nothing: a recovery key that was mistyped is told from a wrong one."""
    text = bytes(passphrase).decode(errors="replace")
    groups = text.strip().split("-")
    letters = sum(map(len, groups))
    if len(groups) < GROUPS - 1 or abs(letters - _LETTERS) > _SLACK:
        return WrongPassphrase(path=path)
    if text != text.strip():
        return RecoveryKeyMistyped(path=path, reason="there is a blank or a new line before or after it")
    if not _EXACT.fullmatch(text):
        return RecoveryKeyMistyped(path=path, reason="it has another number of letters, or a letter that is in none")
    body, _, checksum = text.rpartition("-")
    if checksum != _checksum(body):
        return RecoveryKeyMistyped(path=path, reason="its checksum is wrong")
    return RecoveryKeyUnknown(path=path)


def _checksum(body: str) -> str:
    return _grouped(hashlib.sha256(body.encode()).digest()[: GROUP_LETTERS // 2])


def _grouped(data: bytes) -> str:
    letters = "".join(ALPHABET[byte >> 4] + ALPHABET[byte & 15] for byte in data)
    return "-".join(letters[at : at + GROUP_LETTERS] for at in range(0, len(letters), GROUP_LETTERS))
