"""The handshake without a socket: every option's answer, byte for byte, as the specification lays it out."""

import itertools
import struct
import time
from collections.abc import Sequence

import pytest
from fuzz.bodies import EXPORTS, converse
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.nbd.negotiation import MAX_OPTION_BYTES, MAX_OPTIONS, Negotiation, Security, State
from tests import nbd_client as nbd
from tests.nbd_client import IHAVEOPT, NBDMAGIC, pack_info, pack_option, pack_queries, pack_string

SIZE = 0x1_2345_6789
FLAGS = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA
FIXED = struct.pack(">I", nbd.C_FIXED_NEWSTYLE)
NO_ZEROES = struct.pack(">I", nbd.C_FIXED_NEWSTYLE | nbd.C_NO_ZEROES)
ACK = nbd.REP_ACK
CONTEXT_OF_VOL = pack_queries(b"vol", b"base:allocation")


def negotiation(default: str = "vol") -> Negotiation:
    return Negotiation(EXPORTS, default)


def haggling(flags: bytes = NO_ZEROES) -> Negotiation:
    """One that waits for options."""
    made = negotiation()
    assert made.receive(flags) == (4, b"")
    assert made.state is State.OPTIONS
    return made


def ask(made: Negotiation, option: int, data: bytes = b"") -> bytes:
    """Send one whole option; return the answer, after checking that all of it was taken."""
    message = pack_option(option, data)
    taken, answer = made.receive(message)
    assert taken == len(message)
    return answer


def says(option: int, kind: int, data: bytes = b"") -> bytes:
    """One option reply, as "Fixed newstyle negotiation" draws it."""
    return bytes.fromhex("0003e889045565a9") + struct.pack(">III", option, kind, len(data)) + data


def refuses(option: int, kind: int, answer: bytes) -> bool:
    """Whether the answer is this one error; its text is free, but must be text."""
    head = struct.pack(">QIII", 0x3E889045565A9, option, kind, len(answer) - 20)
    return answer[:20] == head and answer[20:].decode().isprintable()


def offers(option: int, *, df: bool = False) -> bytes:
    """What INFO and GO say of `vol` unasked: its size and flags, and the block sizes."""
    flags = FLAGS | (nbd.SEND_DF if df else 0)
    return says(option, nbd.REP_INFO, struct.pack(">HQH", 0, SIZE, flags)) + says(
        option, nbd.REP_INFO, struct.pack(">HIII", 3, 1, 4096, 2**25)
    )


# --- greeting and client flags ---


def test_the_greeting() -> None:
    assert Negotiation.greeting() == NBDMAGIC + IHAVEOPT + b"\0\3"


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_known_client_flags_lead_to_the_options(flags: int) -> None:
    haggling(struct.pack(">I", flags))


@pytest.mark.parametrize("flags", [4, 0x80000000, 0xFFFFFFFF, 7])
def test_an_unknown_client_flag_ends_the_connection(flags: int) -> None:
    made = negotiation()
    assert made.receive(struct.pack(">I", flags))[1] == b""
    assert made.state is State.ENDED
    assert made.ended_because


# --- EXPORT_NAME ---


def test_export_name_without_zeroes() -> None:
    made = haggling()
    assert ask(made, nbd.OPT_EXPORT_NAME, b"vol") == struct.pack(">QH", SIZE, FLAGS)
    assert made.state is State.AGREED
    assert made.agreement is not None
    assert (made.agreement.export, made.agreement.structured, made.agreement.allocation) == ("vol", False, False)


@pytest.mark.parametrize("flags", [0, nbd.C_FIXED_NEWSTYLE])
def test_export_name_with_zeroes(flags: int) -> None:
    made = haggling(struct.pack(">I", flags))
    assert ask(made, nbd.OPT_EXPORT_NAME, b"vol") == struct.pack(">QH", SIZE, FLAGS) + bytes(124)


def test_export_name_of_the_default_export() -> None:
    made = haggling()
    assert ask(made, nbd.OPT_EXPORT_NAME) == struct.pack(">QH", SIZE, FLAGS)
    assert made.agreement is not None
    assert made.agreement.export == "vol"


@pytest.mark.parametrize("name", [b"other", b"vol\0", b"VOL", b"\xff\xfe", b"v" * 5000])
def test_export_name_of_an_unknown_export_ends_the_connection(name: bytes) -> None:
    made = haggling()
    assert ask(made, nbd.OPT_EXPORT_NAME, name) == b""
    assert made.state is State.ENDED
    assert made.ended_because


def test_export_name_announces_df_after_structured_replies() -> None:
    made = haggling()
    ask(made, nbd.OPT_STRUCTURED_REPLY)
    assert ask(made, nbd.OPT_EXPORT_NAME, b"vol") == struct.pack(">QH", SIZE, FLAGS | nbd.SEND_DF)


# --- ABORT ---


@pytest.mark.parametrize("data", [b"", b"whatever: it SHOULD be ignored"])
def test_abort_is_acknowledged_and_ends_without_blame(data: bytes) -> None:
    made = haggling()
    assert ask(made, nbd.OPT_ABORT, data) == says(nbd.OPT_ABORT, ACK)
    assert made.state is State.ENDED
    assert made.ended_because is None


# --- LIST ---


def test_list() -> None:
    assert ask(haggling(), nbd.OPT_LIST) == b"".join(
        (
            says(nbd.OPT_LIST, nbd.REP_SERVER, b"\0\0\0\3vol"),
            says(nbd.OPT_LIST, nbd.REP_SERVER, b"\0\0\0\7gr\xc3\xb6\xc3\x9fe"),
            says(nbd.OPT_LIST, ACK),
        )
    )


def test_list_with_data_is_invalid() -> None:
    assert refuses(nbd.OPT_LIST, nbd.REP_ERR_INVALID, ask(haggling(), nbd.OPT_LIST, b"x"))


# --- options that the server does not have ---


@pytest.mark.parametrize("option", [0, nbd.OPT_PEEK_EXPORT, nbd.OPT_EXTENDED_HEADERS, 2**32 - 1])
@pytest.mark.parametrize("data", [b"", b"some data"])
def test_an_option_that_is_not_there_is_unsupported_and_the_talk_goes_on(option: int, data: bytes) -> None:
    made = haggling()
    assert refuses(option, nbd.REP_ERR_UNSUP, ask(made, option, data))
    assert ask(made, nbd.OPT_STRUCTURED_REPLY) == says(nbd.OPT_STRUCTURED_REPLY, ACK)


# --- INFO and GO ---

BOTH = pytest.mark.parametrize("option", [nbd.OPT_INFO, nbd.OPT_GO])


def after_info(option: int, made: Negotiation) -> None:
    """GO enters transmission, INFO does not."""
    assert made.state is (State.AGREED if option == nbd.OPT_GO else State.OPTIONS)


@BOTH
@pytest.mark.parametrize("name", [b"vol", b""])
def test_info_tells_size_flags_and_block_sizes(option: int, name: bytes) -> None:
    made = haggling()
    assert ask(made, option, pack_info(name)) == offers(option) + says(option, ACK)
    after_info(option, made)
    if option == nbd.OPT_GO:
        assert made.agreement is not None
        assert made.agreement.export == "vol"


@BOTH
def test_info_tells_name_and_description_when_asked(option: int) -> None:
    # 0xBEEF: "The server MUST ignore any information requests it does not understand."
    asked = pack_info(b"", nbd.INFO_DESCRIPTION, 0xBEEF, nbd.INFO_NAME, nbd.INFO_EXPORT, nbd.INFO_BLOCK_SIZE)
    assert ask(haggling(), option, asked) == (
        offers(option)
        + says(option, nbd.REP_INFO, b"\0\1vol")
        + says(option, nbd.REP_INFO, b"\0\2a line for humans")
        + says(option, ACK)
    )


@BOTH
def test_info_needs_no_zeroes_even_for_a_client_that_did_not_decline_them(option: int) -> None:
    assert ask(haggling(FIXED), option, pack_info(b"vol")) == offers(option) + says(option, ACK)


@BOTH
def test_info_announces_df_after_structured_replies(option: int) -> None:
    made = haggling()
    ask(made, nbd.OPT_STRUCTURED_REPLY)
    assert ask(made, option, pack_info(b"vol")) == offers(option, df=True) + says(option, ACK)


@BOTH
def test_info_of_an_unknown_export_is_refused_and_the_talk_goes_on(option: int) -> None:
    made = haggling()
    for name in (b"other", b"\xff", b"vol\0"):
        assert refuses(option, nbd.REP_ERR_UNKNOWN, ask(made, option, pack_info(name)))
    assert made.state is State.OPTIONS


@BOTH
def test_a_name_that_is_not_ascii(option: int) -> None:
    answer = ask(haggling(), option, pack_info("größe".encode()))
    assert answer.startswith(says(option, nbd.REP_INFO, struct.pack(">HQH", 0, 1, nbd.HAS_FLAGS | nbd.READ_ONLY)))


MALFORMED_INFO: Sequence[bytes] = [
    b"",
    b"\0\0\0",
    pack_string(b"vol"),  # no number of requests
    pack_string(b"vol") + b"\0",
    pack_string(b"vol") + b"\0\1",  # one request announced, none there
    pack_string(b"vol") + b"\0\0\0\3",  # none announced, one there
    pack_string(b"vol") + b"\0\1\0",
    b"\0\0\0\4vol" + b"\0\0",  # the name reaches into the number
    b"\xff\xff\xff\xffvol\0\0",
]


@BOTH
@pytest.mark.parametrize("data", MALFORMED_INFO)
def test_malformed_info_is_invalid_and_the_talk_goes_on(option: int, data: bytes) -> None:
    made = haggling()
    assert refuses(option, nbd.REP_ERR_INVALID, ask(made, option, data))
    assert made.state is State.OPTIONS


def test_what_follows_go_is_left_for_the_transmission_phase() -> None:
    made = haggling()
    go = pack_option(nbd.OPT_GO, pack_info(b"vol"))
    taken, _ = made.receive(go + b"\x25\x60\x95\x13")
    assert taken == len(go)


# --- STRUCTURED_REPLY ---


def test_structured_replies() -> None:
    made = haggling()
    assert ask(made, nbd.OPT_STRUCTURED_REPLY) == says(nbd.OPT_STRUCTURED_REPLY, ACK)
    ask(made, nbd.OPT_GO, pack_info(b"vol"))
    assert made.agreement is not None
    assert made.agreement.structured


def test_structured_replies_with_data_are_invalid_and_not_negotiated() -> None:
    made = haggling()
    answer = ask(made, nbd.OPT_STRUCTURED_REPLY, b"x")
    assert refuses(nbd.OPT_STRUCTURED_REPLY, nbd.REP_ERR_INVALID, answer)
    ask(made, nbd.OPT_GO, pack_info(b"vol"))
    assert made.agreement is not None
    assert not made.agreement.structured


# --- metadata contexts ---


def structured() -> Negotiation:
    made = haggling()
    ask(made, nbd.OPT_STRUCTURED_REPLY)
    return made


def selects_after(made: Negotiation, name: bytes = b"vol") -> bool:
    """Go, and return whether block status may be asked then."""
    ask(made, nbd.OPT_GO, pack_info(name))
    assert made.agreement is not None
    return made.agreement.allocation


LISTED = says(nbd.OPT_LIST_META_CONTEXT, nbd.REP_META_CONTEXT, b"\0\0\0\0base:allocation")
SELECTED = says(nbd.OPT_SET_META_CONTEXT, nbd.REP_META_CONTEXT, b"\0\0\0\1base:allocation")


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ([], True),
        ([b"base:"], True),
        ([b"base:allocation"], True),
        ([b"x-other:thing", b"base:allocation", b"base:"], True),
        ([b"base:allocation", b"base:allocation"], True),
        ([b"base:nothing"], False),
        ([b"x-other:"], False),
        ([b"base"], False),
        ([b""], False),
    ],
)
@pytest.mark.parametrize("name", [b"vol", b""])
def test_list_meta_context(name: bytes, queries: list[bytes], found: bool) -> None:
    made = structured()
    answer = ask(made, nbd.OPT_LIST_META_CONTEXT, pack_queries(name, *queries))
    assert answer == (LISTED if found else b"") + says(nbd.OPT_LIST_META_CONTEXT, ACK)
    assert not selects_after(made), "listing selects nothing"


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ([], False),
        ([b"base:"], False),  # "the server MUST ignore this form during NBD_OPT_SET_META_CONTEXT"
        ([b"base:allocation"], True),
        ([b"qemu:allocation-depth", b"base:allocation"], True),
        ([b"base:allocation", b"base:allocation"], True),
        ([b"base:allocation "], False),
        ([b"BASE:ALLOCATION"], False),
    ],
)
@pytest.mark.parametrize("name", [b"vol", b""])
def test_set_meta_context(name: bytes, queries: list[bytes], found: bool) -> None:
    made = structured()
    answer = ask(made, nbd.OPT_SET_META_CONTEXT, pack_queries(name, *queries))
    assert answer == (SELECTED if found else b"") + says(nbd.OPT_SET_META_CONTEXT, ACK)
    assert selects_after(made) is found


META = pytest.mark.parametrize("option", [nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT])

MALFORMED_QUERIES: Sequence[bytes] = [
    b"",
    b"\0\0\0\4vol",
    pack_string(b"vol"),
    pack_string(b"vol") + b"\0\0\0",
    pack_string(b"vol") + b"\0\0\0\1",  # one query announced, none there
    pack_string(b"vol") + b"\0\0\0\1" + b"\0\0\0\5base",
    pack_string(b"vol") + b"\0\0\0\0x",
    pack_string(b"vol") + b"\xff\xff\xff\xff" + pack_string(b"base:"),
    CONTEXT_OF_VOL + b"\0",
]


@META
@pytest.mark.parametrize("data", MALFORMED_QUERIES)
def test_malformed_queries_are_invalid_and_the_talk_goes_on(option: int, data: bytes) -> None:
    made = structured()
    assert refuses(option, nbd.REP_ERR_INVALID, ask(made, option, data))
    assert made.state is State.OPTIONS


@META
def test_contexts_need_structured_replies(option: int) -> None:
    made = haggling()
    assert refuses(option, nbd.REP_ERR_INVALID, ask(made, option, CONTEXT_OF_VOL))
    assert not selects_after(made)


@META
def test_contexts_of_an_unknown_export(option: int) -> None:
    made = structured()
    answer = ask(made, option, pack_queries(b"other", b"base:allocation"))
    assert refuses(option, nbd.REP_ERR_UNKNOWN, answer)


@pytest.mark.parametrize("failing", [*MALFORMED_QUERIES, pack_queries(b"other", b"base:allocation")])
def test_a_set_that_fails_clears_what_was_set_before(failing: bytes) -> None:
    made = structured()
    ask(made, nbd.OPT_SET_META_CONTEXT, CONTEXT_OF_VOL)
    ask(made, nbd.OPT_SET_META_CONTEXT, failing)
    assert not selects_after(made)


def test_a_list_that_fails_clears_nothing() -> None:
    made = structured()
    ask(made, nbd.OPT_SET_META_CONTEXT, CONTEXT_OF_VOL)
    ask(made, nbd.OPT_LIST_META_CONTEXT, b"")
    assert selects_after(made)


def test_the_last_set_counts() -> None:
    made = structured()
    ask(made, nbd.OPT_SET_META_CONTEXT, CONTEXT_OF_VOL)
    ask(made, nbd.OPT_SET_META_CONTEXT, pack_queries(b"vol"))
    assert not selects_after(made)
    made = structured()
    ask(made, nbd.OPT_SET_META_CONTEXT, pack_queries(b"vol"))
    ask(made, nbd.OPT_SET_META_CONTEXT, CONTEXT_OF_VOL)
    assert selects_after(made)


def test_a_context_of_another_export_does_not_count() -> None:
    made = structured()
    ask(made, nbd.OPT_SET_META_CONTEXT, pack_queries("größe".encode(), b"base:allocation"))
    assert not selects_after(made, b"vol")


def test_the_options_of_an_unwilling_go_stay_negotiated() -> None:
    made = structured()
    ask(made, nbd.OPT_SET_META_CONTEXT, CONTEXT_OF_VOL)
    ask(made, nbd.OPT_GO, pack_info(b"other"))
    assert selects_after(made)


# --- STARTTLS ---


def before_tls() -> Negotiation:
    made = Negotiation(EXPORTS, "vol", Security.AWAITED)
    assert made.receive(NO_ZEROES) == (4, b"")
    return made


def test_without_tls_here_starttls_is_refused_and_the_talk_goes_on() -> None:
    made = haggling()
    assert refuses(nbd.OPT_STARTTLS, nbd.REP_ERR_POLICY, ask(made, nbd.OPT_STARTTLS))
    assert ask(made, nbd.OPT_STRUCTURED_REPLY) == says(nbd.OPT_STRUCTURED_REPLY, ACK)


@pytest.mark.parametrize("option", [0, 3, 4, 6, 7, 8, 9, 10, 11, 2**32 - 1])
@pytest.mark.parametrize("data", [b"", pack_info(b"vol"), CONTEXT_OF_VOL])
def test_before_tls_nothing_is_answered(option: int, data: bytes) -> None:
    made = before_tls()
    assert refuses(option, nbd.REP_ERR_TLS_REQD, ask(made, option, data))
    assert made.state is State.OPTIONS


def test_before_tls_an_export_name_ends_the_connection_and_abort_is_acknowledged() -> None:
    made = before_tls()
    assert ask(made, nbd.OPT_EXPORT_NAME, b"vol") == b""
    assert made.ended_because
    made = before_tls()
    assert ask(made, nbd.OPT_ABORT) == says(nbd.OPT_ABORT, ACK)
    assert made.ended_because is None


def test_starttls_with_data_is_invalid() -> None:
    made = before_tls()
    assert refuses(nbd.OPT_STARTTLS, nbd.REP_ERR_INVALID, ask(made, nbd.OPT_STARTTLS, b"x"))
    assert made.state is State.OPTIONS


def test_what_follows_starttls_is_not_taken() -> None:
    made = before_tls()
    starttls = pack_option(nbd.OPT_STARTTLS)
    taken, answer = made.receive(starttls + pack_option(nbd.OPT_GO, pack_info(b"vol")))
    assert (taken, answer) == (len(starttls), says(nbd.OPT_STARTTLS, ACK))
    assert made.state is State.STARTTLS


def test_inside_tls_everything_is_as_it_was_without_but_starttls() -> None:
    made = before_tls()
    ask(made, nbd.OPT_STARTTLS)
    inside = made.inside_tls()
    assert refuses(nbd.OPT_STARTTLS, nbd.REP_ERR_INVALID, ask(inside, nbd.OPT_STARTTLS))
    # The client flags of before count: no zeroes.
    assert ask(inside, nbd.OPT_EXPORT_NAME, b"vol") == struct.pack(">QH", SIZE, FLAGS)
    assert inside.state is State.AGREED


# --- NAME@USER ---

TALK_OF_ALICE = "größe@alice@example.org".encode()


def root() -> Negotiation:
    made = Negotiation(EXPORTS, "vol", for_others=True)
    made.receive(NO_ZEROES)
    return made


@pytest.mark.parametrize("name", [b"vol@alice", b"@alice"])
def test_root_acts_on_behalf_of_a_user(name: bytes) -> None:
    made = root()
    assert ask(made, nbd.OPT_INFO, pack_info(name)) == offers(nbd.OPT_INFO) + says(nbd.OPT_INFO, ACK)
    assert ask(made, nbd.OPT_GO, pack_info(name)) == offers(nbd.OPT_GO) + says(nbd.OPT_GO, ACK)
    assert made.agreement is not None
    assert (made.agreement.export, made.agreement.on_behalf_of) == ("vol", "alice")
    made = root()
    assert ask(made, nbd.OPT_EXPORT_NAME, name) == struct.pack(">QH", SIZE, FLAGS)
    assert made.agreement is not None
    assert made.agreement.on_behalf_of == "alice"


def test_a_user_may_have_an_at_sign() -> None:
    made = root()
    ask(made, nbd.OPT_GO, pack_info(TALK_OF_ALICE))
    assert made.agreement is not None
    assert (made.agreement.export, made.agreement.on_behalf_of) == ("größe", "alice@example.org")


def test_root_as_itself_acts_for_nobody() -> None:
    made = root()
    ask(made, nbd.OPT_GO, pack_info(b"vol"))
    assert made.agreement is not None
    assert made.agreement.on_behalf_of is None


@pytest.mark.parametrize("name", [b"vol@alice", b"@alice", b"other@alice", b"vol@"])
def test_nobody_else_does(name: bytes) -> None:
    made = structured()
    for option in (nbd.OPT_INFO, nbd.OPT_GO):
        assert refuses(option, nbd.REP_ERR_POLICY, ask(made, option, pack_info(name)))
    for option in (nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT):
        assert refuses(option, nbd.REP_ERR_POLICY, ask(made, option, pack_queries(name, b"base:allocation")))
    assert ask(made, nbd.OPT_EXPORT_NAME, name) == b""
    assert made.ended_because


@pytest.mark.parametrize("name", [b"vol@", b"vol@*", b"vol@ alice", b"vol@a\nb", b"vol@" + b"a" * 65])
def test_what_cannot_be_a_user_is_invalid(name: bytes) -> None:
    made = root()
    assert refuses(nbd.OPT_GO, nbd.REP_ERR_INVALID, ask(made, nbd.OPT_GO, pack_info(name)))
    assert made.state is State.OPTIONS


def test_a_user_of_an_unknown_export_is_unknown() -> None:
    assert refuses(nbd.OPT_GO, nbd.REP_ERR_UNKNOWN, ask(root(), nbd.OPT_GO, pack_info(b"other@alice")))


@pytest.mark.parametrize(("asked", "selected"), [(b"vol@alice", True), (b"vol", False), (b"vol@bob", False)])
def test_a_context_is_selected_for_one_user(asked: bytes, selected: bool) -> None:
    made = root()
    ask(made, nbd.OPT_STRUCTURED_REPLY)
    assert ask(made, nbd.OPT_LIST_META_CONTEXT, pack_queries(b"vol@alice")).startswith(LISTED)
    assert ask(made, nbd.OPT_SET_META_CONTEXT, pack_queries(b"vol@alice", b"base:allocation")).startswith(SELECTED)
    assert selects_after(made, asked) is selected


def test_users_are_not_listed() -> None:
    assert b"@" not in ask(root(), nbd.OPT_LIST)


# --- framing ---


def test_a_bad_option_magic_ends_the_connection() -> None:
    made = haggling()
    made.receive(pack_option(nbd.OPT_LIST, magic=b"IHAVENOT"))
    assert made.state is State.ENDED
    assert made.ended_because


def test_data_longer_than_any_option_ends_the_connection_before_it_is_awaited() -> None:
    made = haggling()
    made.receive(IHAVEOPT + struct.pack(">II", nbd.OPT_INFO, MAX_OPTION_BYTES + 1))
    assert made.state is State.ENDED
    assert made.ended_because


def test_the_longest_option_is_still_answered() -> None:
    made = haggling()
    assert refuses(77, nbd.REP_ERR_UNSUP, ask(made, 77, bytes(MAX_OPTION_BYTES)))


@pytest.mark.parametrize("last", [nbd.OPT_LIST, nbd.OPT_GO, nbd.OPT_EXPORT_NAME])
def test_who_asks_without_end_is_not_answered_for_ever(last: int) -> None:
    """While it is answered, nobody else is served."""
    made = haggling()
    for _ in range(MAX_OPTIONS):
        assert refuses(77, nbd.REP_ERR_UNSUP, ask(made, 77))
    assert made.receive(pack_option(last)) == (16, b"")
    assert made.state is State.ENDED
    assert made.ended_because


# --- anything at all ---

NAMES = st.sampled_from([b"vol", b"", b"other", "größe".encode(), b"\xff"]) | st.binary(max_size=8)
QUERIES = st.lists(st.sampled_from([b"base:", b"base:allocation", b"x-y:z"]) | st.binary(max_size=8), max_size=4)
DATA = (
    st.just(b"")
    | st.binary(max_size=40)
    | st.builds(lambda name, asked: pack_info(name, *asked), NAMES, st.lists(st.integers(0, 5), max_size=4))
    | st.builds(lambda name, queries: pack_queries(name, *queries), NAMES, QUERIES)
    | NAMES
)
OPTIONS = st.builds(pack_option, st.integers(0, 12) | st.integers(0, 2**32 - 1), DATA)
TALKS = st.builds(
    lambda flags, options, tail: flags + b"".join(options) + tail,
    st.sampled_from([FIXED, NO_ZEROES, b"\0\0\0\0", b"\0\0\0\4"]),
    st.lists(OPTIONS, max_size=8),
    st.binary(max_size=40),
)


@given(TALKS | st.binary(max_size=100))
def test_whole_and_byte_by_byte_are_the_same_talk(talk: bytes) -> None:
    assert converse([talk]) == converse([bytes([byte]) for byte in talk] or [b""])


@given(TALKS, st.lists(st.integers(0, 400), max_size=10))
@settings(max_examples=200)
def test_pieces_of_any_size_are_the_same_talk(talk: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(talk)) for cut in cuts), len(talk)]
    pieces = [talk[start:end] for start, end in itertools.pairwise(edges)]
    assert converse(pieces) == converse([talk])


def test_the_time_that_many_queries_take_grows_with_their_number_alone() -> None:
    """While they are looked at, nobody else is served."""

    def quickest_s(count: int) -> float:
        data, took_s = pack_queries(b"vol", *[b""] * count), []
        for _ in range(7):
            made = haggling()
            ask(made, nbd.OPT_STRUCTURED_REPLY)
            began_s = time.thread_time()
            ask(made, nbd.OPT_SET_META_CONTEXT, data)
            took_s.append(time.thread_time() - began_s)
        return min(took_s)

    most = MAX_OPTION_BYTES // 4 - 3
    assert quickest_s(most) < 16 * quickest_s(most // 8)
