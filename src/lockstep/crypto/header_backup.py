"""Copies of a LUKS2 header: the header and the key slots, as `cryptsetup luksHeaderBackup` writes them.

A copy is a whole header, which `--header` takes as well. It opens with the passphrases of its time, for ever.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lockstep.crypto import cryptsetup, luks
from lockstep.errors import BackupNotWritten, HeaderDamaged, HeaderUnreadable, NotLuks2

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def written(path: str, output: str) -> Iterator[None]:
    """Copy the header at `path` to the file `output`, durably, in place of what has that name.

    The copy is complete when the block begins, and gets its name when that ends. BackupNotWritten, and what
    `luks.read_header` raises; then, or if the block fails, `output` is as it was.
    """
    luks.read_header(path)
    output = os.path.abspath(output)
    directory = os.path.dirname(output)
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".lockstep-") as aside:
            made = f"{aside}/header"
            cryptsetup.checked("back up the header of", path, "luksHeaderBackup", f"--header-backup-file={made}")
            luks.read_header(made)
            _sync(made)
            yield
            os.replace(made, output)
        _sync(directory)
    except OSError as error:
        raise BackupNotWritten(path=output, reason=os.strerror(error.errno or 0)) from error


def copied(path: str) -> str | None:
    """The LUKS UUID of the header of which a file is a copy and nothing else: sound, with no byte of data behind it.

    A detached header looks the same. Raises HeaderUnreadable, CryptsetupMissing, CryptsetupHung.
    """
    try:
        metadata = luks.read_metadata(path)
        is_whole = os.path.getsize(path) == len(luks.header_bytes(path, metadata))
        return luks.read_uuid(path) if is_whole else None
    except (NotLuks2, HeaderDamaged):
        return None
    except OSError as error:
        raise HeaderUnreadable(path=path, reason=os.strerror(error.errno or 0)) from error


def put_back(path: str, backup: str, *, fds: Sequence[int] = ()) -> None:
    """Write the copy `backup`, which may be one of `fds`, over the header at `path`, whatever is there.

    A missing file is made.

    HeaderNotCreated, CryptsetupMissing, CryptsetupFailed, CryptsetupHung.
    """
    created = not os.path.lexists(path) and luks.create_header_file(path)
    try:
        arguments = ("luksHeaderRestore", f"--header-backup-file={backup}")
        cryptsetup.checked("restore the header of", path, *arguments, fds=fds)
    except BaseException:
        if created:
            os.unlink(path)
        raise


@dataclass(frozen=True, slots=True)
class Content:
    """What two headers are compared by: their key slots, what proves a volume key, and which data has it."""

    keyslots: dict[int, Any]
    digests: tuple[tuple[str, str], ...]
    segments: dict[str, Any]

    @classmethod
    def of(cls, path: str) -> Content:
        """Raises what `luks.read_metadata` raises."""
        metadata = luks.read_metadata(path)
        slots = {int(number): stored for number, stored in metadata["keyslots"].items()}
        of_data = [each for each in metadata["digests"].values() if each["segments"]]  # others are of unbound slots
        digests = sorted((each["salt"], each["digest"]) for each in of_data)
        return cls(slots, tuple(digests), metadata["segments"])

    def slots_not_in(self, other: Content) -> tuple[int, ...]:
        """The key slots that the other header does not have, or has with another passphrase."""
        return tuple(sorted(n for n, stored in self.keyslots.items() if other.keyslots.get(n) != stored))


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
