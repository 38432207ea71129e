r"""What is held: regions of the target that a mirror must not be given by itself, on disk, whatever happens.

A write by a user who may not update the mirror goes to the target alone; the mirror keeps what it had. Rules:

1. The record is durable before the target is written: who wrote without permission, since when, and where.
2. A region is held until the user's window opens (`outside-window`), or until a permitted user releases it
   (`no-right`); one that is both waits for the release.
3. A held region is not copied, whatever else is known of it. Its bits are cleared only after it was released, copied
   and flushed: a crash on the way leaves it held.
4. The record is about the target and its users. So it holds whichever generation the mirror has.
5. In doubt, a region waits for the release: if a page is damaged, its regions do; if the record is gone though the
   mirror's token tells of one, or though there is an intent bitmap that fits (which no mirror has without this record),
   or does not fit, all do. Never an error, and never silent.

The mirror is *frozen* if it was equal to the target when the first of these writes came, and has not been written
since: then it is the disk as it was at that moment.

On disk: `UUID.held`, a header and then bits as `pages.py` has them: the bits of `outside-window`, one for each region,
filled up to a whole page, and then those of `no-right`. The header, little-endian:

    offset  bytes
    0       4      CRC-32 of the rest of the page
    4       4      version, 1
    8       16     magic "LOCKSTEP-HELD\0\0\0"
    24      16     volume id (UUID)
    40      16     LUKS UUID of the mirror
    56      8      size of the target in bytes
    64      8      region size in bytes
    72      440    zeroes

`UUID.writers`, JSON: {"frozen_since": seconds since 1970 or null, "writers": [{"user", "kind", "since"}]}. It is
replaced as a whole, and not there while nothing is held.
"""

import contextlib
import json
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable
from struct import Struct
from typing import Any, Final

from lockstep.volume import pages
from lockstep.volume.files import sync_directory
from lockstep.volume.intent import Identity
from lockstep.volume.pages import PAGE_BITS, PAGE_BYTES, PagedBits
from lockstep.volume.regions import region_bytes_for
from lockstep.volume.rounds import Rounds

log = logging.getLogger(__name__)

OUTSIDE_WINDOW: Final = "outside-window"
NO_RIGHT: Final = "no-right"
KINDS: Final = (OUTSIDE_WINDOW, NO_RIGHT)
UNKNOWN_USER: Final = "?"
VERSION: Final = 1

_MAGIC: Final = b"LOCKSTEP-HELD\0\0\0"
_HEADER: Final = Struct("<I16s16s16sQQ")


class HeldRecord:
    """What is held from one mirror. Calls come from the loop's thread, but for those of its life, which block."""

    def __init__(
        self, path: str, identity: Identity, in_worker: Callable[..., Awaitable[None]], *, expected: bool
    ) -> None:
        """Read the record at `path` (without the suffixes); `expected` says that there has to be one.

        `in_worker` runs a blocking function with its arguments.
        """
        self.writers: dict[tuple[str, str], float] = {}  # (user, kind) -> since when, in s since 1970
        self.frozen_since_s: float | None = None  # s since 1970
        self._thawing = 0  # how many want it on record that the mirror is frozen no more
        self._outdated = False  # the files may tell of what is held no more
        self._path = path
        self._identity = identity
        self._in_worker = in_worker
        region_bytes = region_bytes_for(identity.size_bytes)
        self._shift = region_bytes.bit_length() - 1
        self._count = -(-identity.size_bytes // region_bytes)
        self._second = -(-self._count // PAGE_BITS) * PAGE_BITS  # where the bits of `no-right` begin
        self._pages = PagedBits(f"{path}.held", self._second + self._count, in_worker)
        self._saves = Rounds(self._save_writers)
        self._known: set[tuple[str, str]] = set()  # writers who are on record durably
        self._load(expected=expected)

    # --- life ---

    def claim(self) -> None:
        """Write the record anew, durably, as it was read. Raises OSError."""
        self._pages.create(_header(self._identity), self._pages.durable)
        self._write_writers(self._content())
        self._known = set(self.writers)

    def clear(self) -> None:
        """Have nothing held from here on, in place of what was read, and claim that. Raises OSError."""
        self._pages.durable[:] = bytes(len(self._pages.durable))
        self.writers, self.frozen_since_s = {}, None
        self.claim()

    def close(self) -> None:
        """Close the file."""
        self._pages.close()

    # --- what is held ---

    def regions(self, kind: str | None = None) -> bytes:
        """Which regions are held, or are about to be, a byte each; of one kind or of any."""
        marked = self._pages.marked()
        window, right = marked[: self._count], marked[self._second :]
        if kind is not None:
            return window if kind == OUTSIDE_WINDOW else right
        return pages.union(window, right)

    def only_outside_window(self) -> bytes:
        """Which regions are held for want of an open window, and for no other reason, a byte each; empty if none is.

        Once the record is claimed. It is asked twice a second while windows are open, of a million regions maybe.
        """
        window, right = (int.from_bytes(part, "little") for part in self._pages.halves(self._second))
        free = window & ~right
        return pages.spread(free.to_bytes(self._second // 8, "little"))[: self._count] if free else b""

    def users(self, kind: str) -> list[str]:
        """Who holds regions back in this way."""
        return [user for user, of_kind in self.writers if of_kind == kind]

    async def hold(self, start: int, end: int, user: str, kind: str, *, equal: bool) -> None:
        """Return when it is on record that `user` writes to [start, end), not empty, without updating the mirror.

        `equal`: up to now the mirror was equal to the target, and is on its medium. Raises OSError; then nothing may be
        written, and nothing is held for it.
        """
        key = user, kind
        offset = self._second if kind == NO_RIGHT else 0
        first, after = offset + (start >> self._shift), offset + ((end - 1) >> self._shift) + 1
        try:
            now_s = time.time()
            if equal and key not in self._known:
                self.frozen_since_s = now_s
            while key not in self._known or 0 in self._pages.durable[first:after]:
                if key in self._known:
                    await self._pages.mark(range(first, after))
                    continue
                self.writers.setdefault(key, now_s)
                await self._saves.join()
                if key in self.writers:  # else it was taken back by another who could not be put on record
                    self._known.add(key)
        except OSError:
            self._pages.unmark(range(first, after))
            recorded = key in self._known
            if not recorded:
                self.writers.pop(key, None)
            self._forget_writers()
            if equal and recorded:  # it is on record that the mirror is frozen, and has to be ended there
                with contextlib.suppress(OSError):  # else the next update does so, or is not made
                    await self.thaw()
            elif equal:
                self.frozen_since_s = None
            raise

    async def thaw(self) -> None:
        """Note, durably, that the mirror is about to be written, and so no more frozen. Raises OSError."""
        if self.frozen_since_s is not None:
            self._thawing += 1
            try:
                await self._saves.join()
            finally:
                self._thawing -= 1
            self.frozen_since_s = None  # not before: until then, nobody may write the mirror

    async def forget(self, regions: bytes) -> None:
        """Clear regions, a byte each, that were released, copied and flushed. Raises OSError; `settle` tries again."""
        self._outdated = True
        await self._pages.clear_all(regions.ljust(self._second, b"\0") + regions)
        self._forget_writers()
        await self._saves.join()
        self._outdated = False

    def _forget_writers(self) -> None:
        """Forget who holds nothing; but whoever is not on record yet is about to be, and holds something then."""
        for key in [key for key in self._known if 1 not in self.regions(key[1])]:
            del self.writers[key]
            self._known.discard(key)

    async def settle(self) -> None:
        """Have the files forget what they could not before. Raises OSError."""
        if self._outdated:
            await self.forget(bytes(self._count))

    # --- files ---

    def _load(self, *, expected: bool) -> None:
        bits, in_doubt = self._read_bits()
        intelligible = self._read_writers()
        if bits is None and (in_doubt or expected or not intelligible or self.writers):
            log.warning("what is held from the mirror is not on record any more: all of the disk waits for a release")
            bits, in_doubt = bytearray(b"\1" * len(self._pages.durable)), True
        if bits is None or not any(bits):
            self.writers, self.frozen_since_s = {}, None
            return
        self._pages.durable[:] = bits
        ownerless = any(1 in self.regions(kind) and not self.users(kind) for kind in (OUTSIDE_WINDOW, NO_RIGHT))
        if in_doubt or ownerless:  # rule 5
            self._pages.durable[self._second :] = self.regions()
            self.writers[UNKNOWN_USER, NO_RIGHT] = time.time()
            self.frozen_since_s = None

    def _read_bits(self) -> tuple[bytearray | None, bool]:
        """The bits of the file, and whether some of them had to be guessed; None when there is no file that fits."""
        try:
            with open(f"{self._path}.held", "rb") as file:
                content = file.read()
        except FileNotFoundError:
            return None, False
        except OSError as failure:
            log.warning("the record %s.held cannot be read: %s", self._path, failure)
            return None, True
        if content[:PAGE_BYTES] != _header(self._identity):
            log.warning("the record %s.held is damaged, or not of this mirror", self._path)
            return None, True
        bits, damaged = pages.unpack(content, self._second + self._count)
        for number in damaged:
            log.warning("page %d of the record %s.held is damaged: its regions count as held", number, self._path)
        return bits, bool(damaged)

    def _read_writers(self) -> bool:
        """Take over the content of the other file, and return whether it made sense."""
        try:
            with open(f"{self._path}.writers", "rb") as file:
                content = json.load(file)
            writers = {(each["user"], each["kind"]): float(each["since"]) for each in content["writers"]}
            frozen = content["frozen_since"]
            self.frozen_since_s = None if frozen is None else float(frozen)
        except FileNotFoundError:
            return True
        except (OSError, ValueError, TypeError, KeyError) as failure:
            log.warning("the record %s.writers cannot be read: %r", self._path, failure)
            return False
        self.writers = writers
        return True

    def _content(self) -> dict[str, Any]:
        writers = [{"user": user, "kind": kind, "since": since} for (user, kind), since in self.writers.items()]
        return {"frozen_since": None if self._thawing else self.frozen_since_s, "writers": writers}

    async def _save_writers(self) -> None:
        """One round: whoever asked meanwhile is in the next."""
        await self._in_worker(self._write_writers, self._content())

    def _write_writers(self, content: dict[str, Any]) -> None:
        path = f"{self._path}.writers"
        if not content["writers"]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        else:
            with open(f"{path}.new", "w", encoding="utf-8", opener=_private) as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.new", path)
        sync_directory(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _header(identity: Identity) -> bytes:
    return pages.sealed(
        _HEADER.pack(
            VERSION,
            _MAGIC,
            uuid.UUID(identity.volume_id).bytes,
            uuid.UUID(identity.luks_uuid).bytes,
            identity.size_bytes,
            region_bytes_for(identity.size_bytes),
        )
    )
