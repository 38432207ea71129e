"""The mirror as a LUKS2 volume: its header, its volume key, and the token that says whose mirror it is.

What is stored where
    A mirror is a LUKS2 volume that any Linux opens with `cryptsetup open` and a passphrase: one `crypt`
    segment, aes-xts-plain64 with a 512-bit volume key, argon2id key slots. With an inline header the data
    starts at 16 MiB; with a detached header at 0, and the header is a file of its own. The header has two
    copies, each with a sequence number and a checksum (LUKS2 On-Disk Format Specification, section 2).
    A function's `path` is whatever holds the header: the mirror, or the detached header's file.

The token
    LUKS2 keeps small JSON objects for other programs, called tokens. Ours makes a mirror self-describing:

        {"type": "lockstep", "keyslots": [], "version": 1,
         "volume_id": "...", "volume_name": "...", "target_size_bytes": "68719476736",
         "generation": "7", "state": "..."}

    Unsigned 64-bit numbers are decimal strings, as in the rest of LUKS2's JSON. Unknown members are ignored;
    a change that an older Lockstep must not ignore raises `version`. There is at most one such token.

What cryptsetup does for us
    Everything that writes a header or touches a passphrase: formatting, key slots, tokens, the order of
    the two copies on disk, and the repair of a damaged copy from the sound one (also when we only ask it to
    show the header, provided that it may write). It holds its own flock on the file or device meanwhile,
    which does not collide with the OFD locks by which Lockstep owns a mirror. Here only UUID and
    label are read by ourselves, from the binary part of a copy whose checksum is right; a damaged
    header is told from no header by its magic.

Secrets
    How a passphrase reaches cryptsetup is in `cryptsetup.py`. The volume key comes back through a pipe into one
    `bytearray`, which the caller wipes after use. Errors carry cryptsetup's messages, which name devices and options
    only. Limits: the caller's own passphrase object, memory pages that were swapped out, and the pipe's buffer in the
    kernel are beyond reach.

What somebody who has the mirror learns
    That it is a Lockstep mirror, and everything in the token, which is in the clear: volume id and name, the target's
    size, generation, state. The times and places of changes, by comparing copies taken at different times.
    Nothing of the data without a passphrase or the volume key. They can try passphrases at argon2id's price
    (only a strong passphrase helps), and can destroy data or put older sectors or a whole older header back: XTS and
    the token are not authenticated.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from lockstep.crypto import cryptsetup, recovery_key
from lockstep.errors import (
    CryptsetupFailed,
    EmptyPassphrase,
    HeaderDamaged,
    HeaderNotCreated,
    HeaderUnreadable,
    LuksError,
    NoKeySlots,
    NotLuks2,
    RekeyUnfinished,
    SegmentUnsupported,
    TokenMalformed,
    TokenTooNew,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Buffer

INLINE_DATA_OFFSET_BYTES: Final = 16 * 1024 * 1024
HEADER_FILE_BYTES: Final = 16 * 1024 * 1024  # cryptsetup's own choice: two copies and room for 32 key slots
CIPHER: Final = "aes-xts-plain64"
KEY_BITS: Final = 512
TOKEN_TYPE: Final = "lockstep"  # noqa: S105 - the name of a kind of LUKS2 token
TOKEN_VERSION: Final = 1

_DISAGREES: Final = b"is not a valid LUKS"  # cryptsetup says so, in its C locale
_SECTOR_BYTES: Final = (512, 1024, 2048, 4096)
_OFFSET_UNIT_BYTES: Final = 512  # what cryptsetup's --offset counts
_UINT64_LIMIT: Final = 2**64


@dataclass(frozen=True, slots=True)
class Segment:
    """Where the encrypted data lies, and how it is encrypted.

    `iv_offset` is added to every sector's position, in 512-byte units; `length_bytes` is None when the
    data reaches to the end of the device.
    """

    offset_bytes: int
    sector_bytes: int
    iv_offset: int
    cipher: str
    length_bytes: int | None


@dataclass(frozen=True, slots=True)
class Token:
    """Whose mirror this is, of how large a target, and in what state it was last left.

    ValueError for a number that does not fit in 64 bits and for text that is empty or not Unicode.
    """

    volume_id: str
    volume_name: str
    target_size_bytes: int
    generation: int
    state: str

    def __post_init__(self) -> None:
        for name in ("volume_id", "volume_name", "state"):
            # Encoding refuses lone surrogates, which a JSON reader in C would replace without a word.
            if not getattr(self, name).encode():
                raise ValueError(f"{name} is empty")
        for name in ("target_size_bytes", "generation"):
            if not 0 <= getattr(self, name) < _UINT64_LIMIT:
                raise ValueError(f"{name} is not an unsigned 64-bit number")

    def to_json(self) -> str:
        """The token as it is stored in the header."""
        fields = {name: str(value) for name, value in asdict(self).items()}
        return json.dumps({"type": TOKEN_TYPE, "keyslots": [], "version": TOKEN_VERSION, **fields})

    @classmethod
    def from_json(cls, text: str, *, path: str = "the mirror") -> Token:
        """Read a stored token; `path` names its place in errors. TokenTooNew, TokenMalformed."""
        try:
            return cls(**_token_fields(path, json.loads(text)))
        except (ValueError, RecursionError) as error:
            raise TokenMalformed(path=path, reason=str(error)) from None


@dataclass(frozen=True, slots=True)
class Header:
    """What a LUKS2 header says about a mirror. `token` and `token_id` are None when it has no token of ours."""

    uuid: str
    label: str
    segment: Segment
    token: Token | None
    token_id: int | None
    keyslots: tuple[int, ...]


def is_luks2(path: str) -> bool:
    """Whether there is a LUKS2 header, sound or damaged. Changes nothing. HeaderUnreadable."""
    return any(True for _ in _header_copies(path))


def read_header(path: str, *, fds: Sequence[int] = ()) -> Header:
    """Read the header, from its second copy if the first is damaged; `path` may be one of `fds`, below /dev/fd.

    HeaderUnreadable, NotLuks2, HeaderDamaged, RekeyUnfinished, SegmentUnsupported, TokenMalformed, TokenTooNew,
    CryptsetupMissing.
    """
    metadata = read_metadata(path, fds=fds)
    return _header(path, metadata, lambda: _segment(path, metadata))


def read_unfinished(path: str, segment: Segment, metadata: dict[str, Any]) -> Header:
    """The header of a mirror whose re-keying is not finished; `segment` is what it was and will be."""
    return _header(path, metadata, lambda: segment)


def _header(path: str, metadata: dict[str, Any], segment_in: Callable[[], Segment]) -> Header:
    copy = _sound_copy(path)
    try:
        segment = segment_in()
        tokens = {int(key): value for key, value in metadata["tokens"].items() if value["type"] == TOKEN_TYPE}
        keyslots = tuple(sorted(int(key) for key in metadata["keyslots"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HeaderDamaged(path=path, reason=f"its metadata makes no sense ({error!r})") from None
    if len(tokens) > 1:
        # Which of them tells the truth cannot be known, and a wrong guess could overwrite a good mirror.
        raise TokenMalformed(path=path, reason=f"there are {len(tokens)} of them")
    token_id = next(iter(tokens), None)
    token = None if token_id is None else Token.from_json(json.dumps(tokens[token_id]), path=path)
    return Header(copy.uuid, copy.label, segment, token, token_id, keyslots)


def read_metadata(path: str, *, fds: Sequence[int] = ()) -> dict[str, Any]:
    """The header's JSON (section 3 of the specification), which cryptsetup has validated against its schema.

    `path` may be one of `fds`, below /dev/fd. HeaderUnreadable, NotLuks2, HeaderDamaged, CryptsetupMissing,
    CryptsetupFailed, CryptsetupHung.
    """
    _sound_copy(path)
    action = "read the header of"
    dump = cryptsetup.run(action, path, "luksDump", "--dump-json-metadata", fds=fds)
    if dump.returncode == cryptsetup.INVALID_EXIT and _DISAGREES in dump.stderr:
        # The checksum is right, so cryptsetup disagrees with the JSON that it protects.
        raise HeaderDamaged(path=path, reason=cryptsetup.message(dump))
    if dump.returncode != 0:  # it was killed, or may not lock the device, or is too old for this
        raise cryptsetup.failure(action, path, dump)
    try:
        return dict(json.loads(dump.stdout))
    except (TypeError, ValueError) as error:
        raise HeaderDamaged(path=path, reason=f"its metadata makes no sense ({error!r})") from None


def header_bytes(path: str, metadata: dict[str, Any]) -> bytes:
    """Both copies of the header and the key slots, which is everything but the data. HeaderUnreadable."""
    config = metadata["config"]
    length = 2 * (_BINARY_BYTES + int(config["json_size"])) + int(config["keyslots_size"])
    try:
        with open(path, "rb") as file:
            return file.read(length)
    except OSError as error:
        raise HeaderUnreadable(path=path, reason=os.strerror(error.errno or 0)) from error


def read_uuid(path: str) -> str:
    """The LUKS UUID, as the newest sound copy of the header has it. HeaderUnreadable, NotLuks2, HeaderDamaged."""
    return _sound_copy(path).uuid


def format_mirror(
    device: str,
    *,
    header: str | None,
    passphrase: Buffer,
    sector_bytes: int,
    iter_time_ms: int | None,
    label: str,
    uuid: str | None = None,
) -> None:
    """Make `device` a new, empty LUKS2 volume. Whatever it held, and whatever `header` held, is lost.

    Without `header` the header is inline and the data starts at 16 MiB. With it the data starts at 0; the
    file is made (mode 0600, 16 MiB) when it is missing, and removed again if that was in vain.
    `iter_time_ms` is what one try of a passphrase shall cost on this machine (None: cryptsetup's choice);
    `uuid` is the volume's (None: a random one).
    EmptyPassphrase, HeaderNotCreated, CryptsetupMissing, CryptsetupFailed, CryptsetupHung.
    """
    if sector_bytes not in _SECTOR_BYTES:
        raise ValueError("sector_bytes must be 512, 1024, 2048 or 4096")
    refuse_empty(passphrase)
    data_offset_bytes = INLINE_DATA_OFFSET_BYTES if header is None else 0
    options = [
        "--type=luks2",
        f"--cipher={CIPHER}",
        f"--key-size={KEY_BITS}",
        f"--sector-size={sector_bytes}",
        f"--offset={data_offset_bytes // _OFFSET_UNIT_BYTES}",
        "--pbkdf=argon2id",
        "--key-file=-",
    ]
    if label:
        options.append(f"--label={label}")
    if uuid is not None:
        options.append(f"--uuid={uuid}")
    if iter_time_ms is not None:
        options.append(f"--iter-time={iter_time_ms}")
    if header is not None:
        options.append(f"--header={os.path.abspath(header)}")
    created = header is not None and create_header_file(header)
    try:
        cryptsetup.checked("format", device, "luksFormat", *options, stdin=passphrase)
    except BaseException:
        if header is not None and created:
            os.unlink(header)
        raise


def volume_key(path: str, passphrase: Buffer, *, copy: int | None = None) -> bytearray:
    """The volume key, which any passphrase of the mirror unlocks. The caller wipes it after use.

    `copy` is the descriptor of a copy of the header that is opened in its place. EmptyPassphrase, WrongPassphrase,
    RecoveryKeyMistyped, RecoveryKeyUnknown, NoKeySlots, HeaderUnreadable, NotLuks2, HeaderDamaged, SegmentUnsupported,
    CryptsetupMissing, CryptsetupFailed, CryptsetupHung.
    """
    refuse_empty(passphrase)
    action = "read the volume key of"
    place, fds = (path, ()) if copy is None else (f"/dev/fd/{copy}", (copy,))
    output = bytearray(4096)
    try:
        result, length = cryptsetup.run_into(
            output, action, place, "luksDump", "--dump-volume-key", "--key-file=-", stdin=passphrase, fds=fds
        )
        if result.returncode == 0:
            key = _parse_key_dump(output, length)
            if key is None:
                raise CryptsetupFailed(action=action, path=path, exit_code=0, reason="its answer was not understood")
            return key
    finally:
        wipe(output)
    raise _refused(action, path, result, passphrase, read_header(place, fds=fds))


def refused(action: str, path: str, result: cryptsetup.Completed, passphrase: Buffer) -> LuksError:
    """Why cryptsetup did not do what `passphrase` should have allowed. Raises what `read_header` raises."""
    return _refused(action, path, result, passphrase, read_header(path))


def _refused(action: str, path: str, result: cryptsetup.Completed, passphrase: Buffer, header: Header) -> LuksError:
    if not header.keyslots:
        return NoKeySlots(path=path)
    if cryptsetup.rejected(result):
        return recovery_key.wrong_passphrase(path, passphrase)
    return cryptsetup.failure(action, path, result)


def write_token(path: str, token: Token, *, token_id: int | None, fds: Sequence[int] = ()) -> None:
    """Store the token: in place of token `token_id` in one header update, or as the first one (None).

    `path` may be one of `fds`, below /dev/fd. HeaderUnreadable, NotLuks2, HeaderDamaged, CryptsetupMissing,
    CryptsetupFailed, CryptsetupHung.
    """
    where = [] if token_id is None else [f"--token-id={token_id}", "--token-replace"]
    arguments = ("token", "import", "--json-file=-", *where)
    _sound_copy(path)
    cryptsetup.checked("write the token of", path, *arguments, stdin=token.to_json().encode(), fds=fds)


def wipe(secret: bytearray) -> None:
    """Overwrite a key in place. Copies that somebody else made of it are not reached."""
    secret[:] = bytes(len(secret))


# -- the binary header: LUKS2 On-Disk Format Specification, section 2.1 --------------------------------

_PRIMARY_MAGIC: Final = b"LUKS\xba\xbe"
_SECONDARY_MAGIC: Final = b"SKUL\xba\xbe"
_SECONDARY_OFFSETS: Final = tuple(0x4000 << shift for shift in range(9))  # 16 KiB to 4 MiB
_AREA_MAX_BYTES: Final = 4 * 1024 * 1024
# magic, version, hdr_size, seqid, label, csum_alg, salt, uuid, subsystem, hdr_offset, padding, csum
_BINARY: Final = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
_CHECKSUM_AT: Final = 448
_BINARY_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class _HeaderCopy:
    sequence: int
    uuid: str
    label: str
    sound: bool


def _header_copies(path: str) -> Iterator[_HeaderCopy]:
    """The copies of the header that can be recognised at all."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for offset in (0, *_SECONDARY_OFFSETS):
                head = os.pread(fd, _BINARY_BYTES, offset)
                if offset == 0 and head[:6] == _PRIMARY_MAGIC and head[6:8] != b"\x00\x02":
                    return  # LUKS1; what follows is then a leftover from before it
                copy = _header_copy(fd, head, offset)
                if copy is not None:
                    yield copy
        finally:
            os.close(fd)
    except OSError as error:
        raise HeaderUnreadable(path=path, reason=os.strerror(error.errno or 0)) from error


def _header_copy(fd: int, head: bytes, offset: int) -> _HeaderCopy | None:
    if len(head) < _BINARY_BYTES:
        return None
    magic, version, size, sequence, label, algorithm, _, uuid, _, own_offset, _, checksum = _BINARY.unpack_from(head)
    expected_magic = _PRIMARY_MAGIC if offset == 0 else _SECONDARY_MAGIC
    # A copy names its own place: the same bytes elsewhere are data that happens to contain a header.
    if (magic, version, own_offset) != (expected_magic, 2, offset):
        return None
    sound = False
    if _BINARY_BYTES <= size <= _AREA_MAX_BYTES:
        area = bytearray(os.pread(fd, size, offset))
        area[_CHECKSUM_AT : _CHECKSUM_AT + len(checksum)] = bytes(len(checksum))
        try:
            digest = hashlib.new(_c_string(algorithm), area).digest()
        except ValueError:
            digest = b""  # an unknown algorithm's name is damage as well
        sound = bool(digest) and len(area) == size and checksum.startswith(digest)
    return _HeaderCopy(sequence, _c_string(uuid), _c_string(label), sound)


def _sound_copy(path: str) -> _HeaderCopy:
    """The newest copy with the right checksum. HeaderUnreadable, NotLuks2, HeaderDamaged."""
    copies = list(_header_copies(path))
    if not copies:
        raise NotLuks2(path=path)
    sound = [copy for copy in copies if copy.sound]
    if not sound:
        raise HeaderDamaged(path=path, reason="no copy of it has the right checksum")
    return max(sound, key=lambda copy: copy.sequence)


def _c_string(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="replace")


# -- the JSON metadata: section 3 -----------------------------------------------------------------------


def segment_of(path: str, stored: dict[str, Any]) -> Segment:
    """A segment as the metadata has it; SegmentUnsupported if it is not stored as a mirror is."""
    if stored["type"] != "crypt":
        raise SegmentUnsupported(path=path, reason=f"its segment has the type {stored['type']}")
    if "integrity" in stored:
        raise SegmentUnsupported(path=path, reason="it stores integrity tags")
    if stored["encryption"] != CIPHER:
        raise SegmentUnsupported(path=path, reason=f"its cipher is {stored['encryption']}, not {CIPHER}")
    if stored["sector_size"] not in _SECTOR_BYTES:
        raise SegmentUnsupported(path=path, reason=f"its sector size is {stored['sector_size']}")
    return Segment(
        offset_bytes=_uint64(stored, "offset"),
        sector_bytes=stored["sector_size"],
        iv_offset=_uint64(stored, "iv_tweak"),
        cipher=stored["encryption"],
        length_bytes=None if stored["size"] == "dynamic" else _uint64(stored, "size"),
    )


def _segment(path: str, metadata: dict[str, Any]) -> Segment:
    """The one segment of a mirror; RekeyUnfinished, SegmentUnsupported if there is anything else."""
    requirements = metadata["config"].get("requirements", {}).get("mandatory", [])
    if requirements:
        what = ", ".join(map(str, requirements))
        if "reencrypt" in what:
            raise RekeyUnfinished(path=path)
        raise SegmentUnsupported(path=path, reason=f"it requires {what}")
    segments = metadata["segments"]
    if len(segments) != 1:
        raise SegmentUnsupported(path=path, reason=f"it has {len(segments)} segments instead of one")
    (stored,) = segments.values()
    return segment_of(path, stored)


def _token_fields(path: str, stored: Any) -> dict[str, Any]:
    """What a stored token says, under the names of `Token`'s fields. ValueError, TokenTooNew."""
    if not isinstance(stored, dict) or stored.get("type") != TOKEN_TYPE:
        raise ValueError(f"it is not an object of type {TOKEN_TYPE}")
    version = stored.get("version")
    if type(version) is not int or version < 1:
        raise ValueError("version is not a positive number")
    if version > TOKEN_VERSION:
        raise TokenTooNew(path=path, version=version, known=TOKEN_VERSION)
    return {
        "volume_id": _text(stored, "volume_id"),
        "volume_name": _text(stored, "volume_name"),
        "target_size_bytes": _uint64(stored, "target_size_bytes"),
        "generation": _uint64(stored, "generation"),
        "state": _text(stored, "state"),
    }


def _text(stored: dict[str, Any], name: str) -> str:
    value = stored.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is not a string")  # noqa: TRY004 - one kind of error for malformed input
    return value


def _uint64(stored: dict[str, Any], name: str) -> int:
    value = _text(stored, name)
    # int() alone would take signs, blanks, underscores and other scripts' digits.
    if not re.fullmatch(r"0|[1-9][0-9]{0,19}", value) or int(value) >= _UINT64_LIMIT:
        raise ValueError(f"{name} is not an unsigned 64-bit number in decimal")
    return int(value)


# -- helpers --------------------------------------------------------------------------------------------


def refuse_empty(passphrase: Buffer) -> None:
    """Raise EmptyPassphrase."""
    if not memoryview(passphrase).nbytes:
        raise EmptyPassphrase


def _parse_key_dump(output: bytearray, length: int) -> bytearray | None:
    """The key from `luksDump --dump-volume-key`: pairs of hex digits after the last colon, over several lines.

    Digit by digit into a bytearray, because every shorter way leaves the key behind in an immutable object.
    """
    digits = bytearray(2 * KEY_BITS // 8)
    count = 0
    try:
        for byte in memoryview(output)[output.rfind(b":", 0, length) + 1 : length]:
            if byte in b" \t\n":
                continue
            digit = b"0123456789abcdef".find(byte)
            if digit < 0 or count == len(digits):
                return None
            digits[count] = digit
            count += 1
        if count not in (len(digits) // 2, len(digits)):
            return None
        return bytearray(16 * digits[at] + digits[at + 1] for at in range(0, count, 2))
    finally:
        wipe(digits)


def create_header_file(path: str) -> bool:
    """Make the file for a detached header; False when it is there already. HeaderNotCreated."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return False
    except OSError as error:
        raise HeaderNotCreated(path=path, reason=os.strerror(error.errno or 0)) from error
    try:
        os.posix_fallocate(fd, 0, HEADER_FILE_BYTES)
        # The name must survive a power cut as well: without this file the mirror is noise.
        directory_fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory_fd)
        finally:
            os.close(directory_fd)
    except OSError as error:
        os.unlink(path)
        raise HeaderNotCreated(path=path, reason=os.strerror(error.errno or 0)) from error
    finally:
        os.close(fd)
    return True
