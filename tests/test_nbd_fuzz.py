"""What the fuzzers look for, looked for a little in every run of the tests; the invariants stand in `fuzz.bodies`."""

import random

from fuzz import bodies
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.nbd_client import OPT_GO, OPT_STARTTLS, pack_info, pack_option

WORDS = [
    b"\0\0\0\3",
    pack_option(OPT_GO, pack_info(b"vol")),
    pack_option(OPT_GO, pack_info(b"vol@alice")),
    pack_option(OPT_STARTTLS),
    pack_option(3),
]
PIECES = st.sampled_from(WORDS) | st.binary(max_size=30)


@given(st.builds(bytes.__add__, st.binary(min_size=1, max_size=1), st.lists(PIECES, max_size=6).map(b"".join)))
def test_the_handshake_survives_anything(data: bytes) -> None:
    bodies.negotiate(data)


@given(st.binary(max_size=600))
@settings(max_examples=150, deadline=None)
def test_a_connection_survives_anything(data: bytes) -> None:
    bodies.connect(data)


def test_long_conversations() -> None:
    """Hypothesis likes short ones; what waits for memory, or is paused half-way, needs some traffic first."""
    for seed in range(60):
        bodies.connect(random.Random(seed).randbytes(4000))
