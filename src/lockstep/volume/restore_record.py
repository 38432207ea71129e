"""What is known, durably, of a restore that has not ended: so that it can go on where it was interrupted.

A small file beside the output. Rules:

1. It is there before the output is changed, and until the output is complete, durable, and compared if that was asked.
2. It says that a byte was restored only after the byte was flushed.
3. It is replaced as a whole: a new file, with a name that nothing has, is written, synced and renamed, and the
   directory is synced. The other name is never read.
4. It names the mirror by UUID, generation and size. A mirror that was served since has another generation, and the
   two halves would be of different moments.
5. It does not prove that the output is the one that was written. Whoever resumes compares samples of the output with
   the mirror, the witness among them: the last piece written that was not all zeroes, which no blank output has.

JSON, one object; docs/formats.md has its members.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Final, Self

from lockstep.errors import RestoreRecordInvalid
from lockstep.volume.files import made, rename, sync_directory

TYPE: Final = "lockstep-restore"
VERSION: Final = 1
SUFFIX: Final = ".restoring"
_LIMIT_BYTES: Final = 1 << 16


@dataclass(frozen=True)
class RestoreRecord:
    """A restore of `length` bytes from `offset` of the mirror; the first `done_bytes` of the output are durable."""

    luks_uuid: str
    generation: int
    target_size_bytes: int
    offset: int
    length: int
    done_bytes: int = 0
    witness: int | None = None

    @classmethod
    def load(cls, path: str) -> Self | None:
        """Read the record; None where there is none. Raises RestoreRecordInvalid for a file that is something else."""
        try:
            with open(path, "rb") as file:
                content = json.loads(file.read(_LIMIT_BYTES))
            if content.pop("type") != TYPE or content.pop("version") != VERSION:
                raise RestoreRecordInvalid(path=path, reason="it is not one, or one of a later version")
            known = {field.name: content[field.name] for field in dataclasses.fields(cls)}
            return cls(**known)._checked()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RestoreRecordInvalid(path=path, reason=error.strerror or str(error)) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RestoreRecordInvalid(path=path, reason="its content makes no sense") from error

    def _checked(self) -> Self:
        numbers = (self.generation, self.target_size_bytes, self.offset, self.length, self.done_bytes)
        witness = -1 if self.witness is None else self.witness  # below any done_bytes
        fits = all(type(each) is int for each in (*numbers, witness)) and isinstance(self.luks_uuid, str)
        if not fits or min(numbers) < 0 or not witness < self.done_bytes <= self.length:
            raise ValueError("out of range")
        return self

    def save(self, path: str) -> None:
        """Write the record, durably, in place of the one that is there. Raises OSError, and leaves nothing then."""
        content = {"type": TYPE, "version": VERSION, **dataclasses.asdict(self)}
        with made(path, json.dumps(content) + "\n") as temporary:
            rename(temporary, path)


def records_beside(path: str) -> list[str]:
    """The records of unfinished restores to a disk, whose name may be a link: by either name."""
    names = dict.fromkeys(name + SUFFIX for name in (path, os.path.realpath(path)))
    return [name for name in names if os.path.lexists(name)]


def remove_record(path: str) -> None:
    """Take the record away, durably."""
    os.unlink(path)
    sync_directory(path)
