"""Numbers and layouts of the NBD protocol, as tables; nothing here acts.

Source: "The NBD protocol", doc/proto.md of the reference implementation, sections "Values" and
"Message format". All integers on the wire are big-endian. Names follow the specification without its
NBD_ prefix, so that each can be searched for there.
"""

from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple

# --- handshake phase ---------------------------------------------------------------------------

NBDMAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
IHAVEOPT: Final = 0x49484156454F5054  # "IHAVEOPT"
REPLY_MAGIC: Final = 0x0003E889045565A9

GREETING: Final = Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">QII")  # IHAVEOPT, option, data length
OPTION_REPLY: Final = Struct(">QIII")  # REPLY_MAGIC, option, reply type, data length
EXPORT_NAME_REPLY: Final = Struct(">QH")  # export size, transmission flags; then 124 zeros unless NO_ZEROES

FLAG_FIXED_NEWSTYLE: Final = 1
FLAG_NO_ZEROES: Final = 2

U16: Final = Struct(">H")
U32: Final = Struct(">I")


class Option(IntEnum):
    """What a client may ask for while it negotiates."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Rep(IntEnum):
    """Types of option replies; bit 31 marks an error."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_TOO_BIG = 0x80000009


class Info(IntEnum):
    """Kinds of information about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


INFO_EXPORT: Final = Struct(">HQH")  # Info.EXPORT, size in bytes, transmission flags
INFO_BLOCK_SIZE: Final = Struct(">HIII")  # Info.BLOCK_SIZE, minimum, preferred, maximum payload in bytes

MIN_BLOCK_BYTES: Final = 1
PREFERRED_BLOCK_BYTES: Final = 4096
MAX_PAYLOAD_BYTES: Final = 32 << 20  # "any payload not exceeding 2^25 bytes SHOULD NOT be considered" an attack
MAX_STRING_BYTES: Final = 4096  # "Strings": names longer than this may be refused

BASE_ALLOCATION: Final = b"base:allocation"
BASE_ALLOCATION_ID: Final = 1

# --- transmission phase ------------------------------------------------------------------------

# Transmission flags, sent with the export.
HAS_FLAGS: Final = 1 << 0
READ_ONLY: Final = 1 << 1
SEND_FLUSH: Final = 1 << 2
SEND_FUA: Final = 1 << 3
SEND_TRIM: Final = 1 << 5
SEND_WRITE_ZEROES: Final = 1 << 6
SEND_DF: Final = 1 << 7
CAN_MULTI_CONN: Final = 1 << 8
SEND_CACHE: Final = 1 << 10
SEND_FAST_ZERO: Final = 1 << 11

REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

REQUEST: Final = Struct(">IHHQQI")  # magic, command flags, type, cookie, offset, length
REQUEST_BYTES: Final = REQUEST.size
SIMPLE_REPLY: Final = Struct(">IIQ")  # magic, error, cookie; then the data of a read
CHUNK: Final = Struct(">IHHQI")  # magic, chunk flags, type, cookie, length
OFFSET_DATA: Final = Struct(">IHHQIQ")  # a chunk header, then the offset; then the data
ERROR_CHUNK: Final = Struct(">IHHQIIH")  # a chunk header, then error and message length (no message)
STATUS_CHUNK: Final = Struct(">IHHQII")  # a chunk header, then the context's id; then the extents
STATUS_EXTENT: Final = Struct(">II")  # length in bytes, status flags

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

FLAG_FUA: Final = 1 << 0
FLAG_NO_HOLE: Final = 1 << 1
FLAG_DF: Final = 1 << 2
FLAG_REQ_ONE: Final = 1 << 3
FLAG_FAST_ZERO: Final = 1 << 4

CHUNK_DONE: Final = 1
CHUNK_NONE: Final = 0
CHUNK_OFFSET_DATA: Final = 1
CHUNK_BLOCK_STATUS: Final = 5
CHUNK_ERROR: Final = (1 << 15) + 1

STATE_HOLE: Final = 1
STATE_ZERO: Final = 2

# Errors on the wire have the numbers of Linux's errno ("Error values"); others are not allowed there.
EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108
WIRE_ERRORS: Final = frozenset({EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN})


class Command(NamedTuple):
    """What the specification says of one request type, so that one function can check them all."""

    name: str
    flags: int  # command flags that it knows; FUA is allowed on all ("Command flags")
    writes: bool = False  # refused on a read-only export
    reserved_range: bool = False  # offset and length must be zero
    limit_bytes: int = 0xFFFFFFFF  # longest effect that is served
    beyond_end: int = EINVAL  # error for a range that leaves the export


COMMANDS: Final[dict[int, Command]] = {
    CMD_READ: Command("read", FLAG_FUA | FLAG_DF, limit_bytes=MAX_PAYLOAD_BYTES),
    CMD_WRITE: Command("write", FLAG_FUA, writes=True, limit_bytes=MAX_PAYLOAD_BYTES, beyond_end=ENOSPC),
    CMD_DISC: Command("disc", FLAG_FUA),
    CMD_FLUSH: Command("flush", FLAG_FUA, reserved_range=True),
    CMD_TRIM: Command("trim", FLAG_FUA, writes=True),
    CMD_CACHE: Command("cache", FLAG_FUA),
    CMD_WRITE_ZEROES: Command("write-zeroes", FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO, writes=True, beyond_end=ENOSPC),
    CMD_BLOCK_STATUS: Command("block-status", FLAG_FUA | FLAG_REQ_ONE),
}
