"""Requests are judged, and replies laid out, as the specification says; the referee is `tests.nbd_client`."""

import errno

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lockstep.nbd import transmission, wire
from lockstep.nbd.negotiation import Agreement, ExportInfo
from tests import nbd_client as nbd
from tests.nbd_client import Reply, ReplyParser, Request

SIZE = (40 << 20) + 333
EDGES = [0, 1, 511, 512, 2**25 - 1, 2**25, 2**25 + 1, SIZE - 1, SIZE, SIZE + 1, 2**32 - 1]
OFFSETS = st.sampled_from([*EDGES, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 512]) | st.integers(0, 2**64 - 1)
LENGTHS = st.sampled_from(EDGES) | st.integers(0, 2**32 - 1)
COMMANDS = st.integers(0, 9) | st.integers(0, 0xFFFF)
# Each flag alone as well: a request with many wrong flags hides which of them was noticed.
FLAGS = st.sampled_from([0, *(1 << bit for bit in range(16))]) | st.integers(0, 31) | st.integers(0, 0xFFFF)
SIZES = st.sampled_from([0, 1, SIZE, 2**32, 2**62])


@given(COMMANDS, FLAGS, OFFSETS, LENGTHS, SIZES, st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=1000)
@example(nbd.READ, 0, 2**64 - 1, 2**32 - 1, SIZE, False, True, True)
@example(nbd.READ, 0, 2**64 - 512, 512, SIZE, False, True, True)  # the sum is 2^64
@example(nbd.WRITE, 0, SIZE, 0, SIZE, False, True, True)
@example(nbd.DISC, 0xFFFF, 2**64 - 1, 2**32 - 1, SIZE, True, False, False)
def test_refusal_agrees_with_the_specification(
    command: int,
    flags: int,
    offset: int,
    length: int,
    size: int,
    read_only: bool,
    structured: bool,
    allocation: bool,
) -> None:
    export = ExportInfo("vol", size, nbd.HAS_FLAGS | (nbd.READ_ONLY if read_only else 0))
    agreement = Agreement("vol", structured=structured, allocation=structured and allocation)
    permitted = nbd.permitted_errors(
        command,
        flags,
        offset,
        length,
        size=size,
        read_only=read_only,
        structured=structured,
        allocation=allocation,
    )
    error = transmission.refusal(command, flags, offset, length, export, agreement)
    assert error in permitted


# "Error values": each sentence that names an error for a case, on its own.
SPECIFIED = [
    ("a write beyond the end", nbd.WRITE, 0, SIZE, 1, nbd.ENOSPC),
    ("a write across the end", nbd.WRITE, 0, SIZE - 1, 2, nbd.ENOSPC),
    ("zeroes beyond the end", nbd.WRITE_ZEROES, 0, SIZE, 1, nbd.ENOSPC),
    ("a read beyond the end", nbd.READ, 0, SIZE, 1, nbd.EINVAL),
    ("a trim beyond the end", nbd.TRIM, 0, SIZE - 1, 2, nbd.EINVAL),
    ("a status query beyond the end", nbd.BLOCK_STATUS, 0, SIZE, 1, nbd.EINVAL),
    ("a status query of no bytes", nbd.BLOCK_STATUS, 0, 0, 0, nbd.EINVAL),
    ("an unknown command", 8, 0, 0, 0, nbd.EINVAL),
    ("an unknown flag", nbd.READ, 1 << 15, 0, 1, nbd.EINVAL),
    ("a flag of another command", nbd.WRITE, nbd.NO_HOLE, 0, 1, nbd.EINVAL),
    ("a flush with an offset", nbd.FLUSH, 0, 1, 0, nbd.EINVAL),
    ("a flush with a length", nbd.FLUSH, 0, 0, 1, nbd.EINVAL),
    ("a read longer than the maximum", nbd.READ, 0, 0, 2**25 + 1, nbd.EOVERFLOW),
    ("a write longer than the maximum", nbd.WRITE, 0, 0, 2**25 + 1, nbd.EINVAL),
    ("a read of the maximum", nbd.READ, 0, 0, 2**25, 0),
    ("a write of the maximum", nbd.WRITE, 0, 0, 2**25, 0),
    ("zeroes everywhere", nbd.WRITE_ZEROES, nbd.NO_HOLE | nbd.FUA, 0, SIZE, 0),
    ("fast zeroes", nbd.WRITE_ZEROES, nbd.FAST_ZERO, 0, SIZE, nbd.ENOTSUP),
    ("a trim of everything", nbd.TRIM, nbd.FUA, 0, SIZE, 0),
    ("no bytes at the very end", nbd.READ, 0, SIZE, 0, 0),
]


@pytest.mark.parametrize(
    ("command", "flags", "offset", "length", "error"), [row[1:] for row in SPECIFIED], ids=[row[0] for row in SPECIFIED]
)
def test_each_case_that_the_specification_names(command: int, flags: int, offset: int, length: int, error: int) -> None:
    export = ExportInfo("vol", SIZE, nbd.HAS_FLAGS)
    agreement = Agreement("vol", structured=True, allocation=True)
    assert transmission.refusal(command, flags, offset, length, export, agreement) == error


@pytest.mark.parametrize("command", range(8))
def test_fua_is_valid_on_every_command(command: int) -> None:
    export = ExportInfo("vol", SIZE, nbd.HAS_FLAGS)
    agreement = Agreement("vol", structured=True, allocation=True)
    length = 0 if command == nbd.FLUSH else 1
    assert transmission.refusal(command, nbd.FUA, 0, length, export, agreement) == 0


@pytest.mark.parametrize("command", [nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES])
def test_a_read_only_export_is_not_written(command: int) -> None:
    export = ExportInfo("vol", SIZE, nbd.HAS_FLAGS | nbd.READ_ONLY)
    agreement = Agreement("vol", structured=True, allocation=True)
    assert transmission.refusal(command, 0, 0, 1, export, agreement) == nbd.EPERM


# --- errors ---


@pytest.mark.parametrize(
    ("number", "sent"),
    [
        *((error, error) for error in sorted(nbd.ERRORS)),
        (errno.EDQUOT, nbd.ENOSPC),  # "It also SHOULD map the EDQUOT and EFBIG errors to NBD_ENOSPC."
        (errno.EFBIG, nbd.ENOSPC),
        (errno.EACCES, nbd.EPERM),
        (errno.EROFS, nbd.EPERM),
        (errno.ETIMEDOUT, nbd.EIO),
        (errno.ENODEV, nbd.EIO),
        (None, nbd.EIO),
        (0, nbd.EIO),  # never success: the request failed
    ],
)
def test_wire_error(number: int | None, sent: int) -> None:
    assert transmission.wire_error(number) == sent


@given(st.integers(-1, 200) | st.none())
def test_every_failure_has_an_error_of_the_protocol(number: int | None) -> None:
    assert transmission.wire_error(number) in nbd.ERRORS


# --- replies, parsed by the referee ---

COOKIES = st.integers(0, 2**64 - 1)


def parse(request: Request, reply: bytes, *, structured: bool) -> Reply:
    """The one reply that these bytes are: fed whole, and byte by byte."""
    outcomes = []
    for pieces in ([reply], [bytes([byte]) for byte in reply]):
        parser = ReplyParser(structured=structured, contexts=[wire.BASE_ALLOCATION_ID])
        parser.expect(request)
        replies = [done for piece in pieces for done in parser.feed(piece)]
        parser.assert_between_replies()
        outcomes.append(replies)
    assert outcomes[0] == outcomes[1]
    (only,) = outcomes[0]
    return only


@given(st.integers(1, 7), COOKIES, st.sampled_from(sorted({0, *nbd.ERRORS} - {nbd.ENOTSUP, nbd.EOVERFLOW})))
def test_simple_replies(command: int, cookie: int, error: int) -> None:
    if command in (nbd.DISC, nbd.BLOCK_STATUS):
        command = nbd.FLUSH
    for structured in (False, True):
        reply = parse(Request(command, cookie), transmission.simple_reply(cookie, error), structured=structured)
        assert (reply.error, reply.chunks) == (error, 0)


@given(COOKIES, st.integers(0, 2**40), st.binary(min_size=1, max_size=64), st.booleans())
def test_read_replies(cookie: int, offset: int, data: bytes, structured: bool) -> None:
    request = Request(nbd.READ, cookie, offset, len(data), nbd.DF if structured else 0)
    header = transmission.data_header(cookie, offset, len(data), structured=structured)
    reply = parse(request, header + data, structured=structured)
    assert (reply.error, reply.data, reply.chunks) == (0, data, 1 if structured else 0)


@pytest.mark.parametrize("structured", [False, True])
def test_the_reply_to_a_read_of_no_bytes(structured: bool) -> None:
    reply = parse(Request(nbd.READ, 7), transmission.empty_read(7, structured=structured), structured=structured)
    assert (reply.error, reply.data) == (0, b"")


@given(st.integers(0, 7), COOKIES, st.sampled_from([nbd.EPERM, nbd.EIO, nbd.EINVAL, nbd.ENOSPC]), st.booleans())
def test_error_replies(command: int, cookie: int, error: int, structured: bool) -> None:
    if command == nbd.DISC:
        command = 99  # an unknown command gets an error too, a DISC never
    answer = transmission.error_reply(command, cookie, error, structured=structured)
    reply = parse(Request(command, cookie, 0, 512), answer, structured=structured)
    assert reply.error == error


@given(COOKIES, st.lists(st.tuples(st.integers(1, 2**32 - 1), st.integers(0, 3)), min_size=1, max_size=20))
def test_status_replies(cookie: int, extents: list[tuple[int, int]]) -> None:
    request = Request(nbd.BLOCK_STATUS, cookie, 0, sum(length for length, _ in extents))
    reply = parse(request, transmission.status_reply(cookie, extents), structured=True)
    assert reply.extents == extents


def test_replies_byte_for_byte() -> None:
    """The layouts once more, as hexadecimal that can be compared with the specification by eye."""
    cookie = 0x0102030405060708
    assert transmission.simple_reply(cookie, 28).hex(" ", 4) == "67446698 0000001c 01020304 05060708"
    assert transmission.data_header(cookie, 0x1000, 4, structured=True).hex(" ", 4) == (
        "668e33ef 00010001 01020304 05060708 0000000c 00000000 00001000"
    )
    assert transmission.empty_read(cookie, structured=True).hex(" ", 4) == (
        "668e33ef 00010000 01020304 05060708 00000000"
    )
    assert transmission.error_reply(nbd.READ, cookie, 5, structured=True).hex() == (
        "668e33ef00018001010203040506070800000006000000050000"
    )
    assert transmission.status_reply(cookie, [(512, 3)]).hex(" ", 4) == (
        "668e33ef 00010005 01020304 05060708 0000000c 00000001 00000200 00000003"
    )
