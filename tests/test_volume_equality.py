"""Whatever clients write, of any alignment and in any order, both disks are equal afterwards (P8).

Through the real server, against a model: hypothesis makes the requests, libnbd sends them over up to four
connections, and the mirror is read by an outside reader. The same server serves all examples of a shape, so each
begins with a whole-disk write that heals what an earlier failure left behind.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.forks import ForkLab
from tests.lab import MIB, Clients, Lab, Volume

CONNECTIONS: Final = 4


@dataclass(frozen=True)
class Shape:
    """A kind of volume."""

    size_bytes: int
    sector_bytes: int
    header: bool = False

    def __str__(self) -> str:
        return f"{self.size_bytes}-by-{self.sector_bytes}{'-detached' if self.header else ''}"


SHAPES: Final = (
    Shape(3_000_001, 512),
    Shape(2 * MIB + 5000, 4096),
    Shape(700_001, 512, header=True),
    Shape(3_000_001, 4096, header=True),
    Shape(1, 512),
    Shape(511, 4096),
    Shape(513, 512),
)


@dataclass
class Stage:
    """A served volume and its clients."""

    volume: Volume
    clients: Clients
    shape: Shape


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    shape: Shape = request.param
    lab = ForkLab(tmp_path_factory.mktemp("equality"))
    volume = lab.volume("vol", shape.size_bytes, "--sector-size", shape.sector_bytes, header=shape.header)
    with volume.served() as served:
        clients = Clients(served.uri, CONNECTIONS)
        yield Stage(volume, clients, shape)
        clients.close()


@dataclass(frozen=True)
class Request:
    """One request; `offset` and `length` are folded into the disk before use."""

    kind: str
    offset: int
    length: int
    who: int
    seed: int
    fua: bool

    def within(self, size_bytes: int) -> tuple[int, int]:
        """The range on a disk of this size: [start, end), never empty."""
        start = self.offset % size_bytes
        return start, min(size_bytes, start + self.length)


def _near(unit: int, furthest: int) -> st.SearchStrategy[int]:
    """Numbers at, just before and just after a multiple of a unit: where sectors and pages meet."""
    return st.builds(lambda n, by: max(0, n * unit + by), st.integers(0, furthest // unit), st.integers(-3, 3))


OFFSETS: Final = st.one_of(
    st.integers(0, 3 * MIB), _near(512, 3 * MIB), _near(4096, 3 * MIB), st.integers(0, 9000), _near(512, 9000)
)
LENGTHS: Final = st.one_of(
    st.integers(1, 1100),
    st.integers(1, 9000),
    _near(512, 16 << 10).map(lambda n: max(1, n)),
    st.sampled_from([512, 4096, 8192, 64 << 10, 128 << 10, (128 << 10) + 512]),
    st.integers(100_000, 2 * MIB),
)
REQUESTS: Final = st.builds(
    Request,
    kind=st.sampled_from(["write"] * 5 + ["zero", "zero", "allocate", "trim", "trim", "flush"]),
    offset=OFFSETS,
    length=LENGTHS,
    who=st.integers(0, CONNECTIONS - 1),
    seed=st.integers(0, 2**32),
    fua=st.sampled_from([False, False, False, True]),
)
SEQUENCES: Final = st.lists(REQUESTS, min_size=1, max_size=24)


class Model:
    """What the target must hold; None where a trim left it open."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.known = bytearray(b"\1") * len(content)

    def carry_out(self, request: Request) -> None:
        start, end = request.within(len(self.content))
        if request.kind == "flush":
            return
        self.content[start:end] = payload(request, end - start) if request.kind == "write" else bytes(end - start)
        self.known[start:end] = bytes([request.kind != "trim"]) * (end - start)

    def check(self, target: bytes) -> None:
        assert len(target) == len(self.content)
        if bytes(self.content) == target:
            return
        for at, known in enumerate(self.known):
            assert not known or self.content[at] == target[at], f"the target has not what was written at byte {at}"


def payload(request: Request, length: int) -> bytes:
    return random.Random(request.seed).randbytes(length)


def begin(stage: Stage, request: Request) -> None:
    clients, nbd = stage.clients, stage.clients.nbd
    start, end = request.within(stage.shape.size_bytes)
    flags = nbd.CMD_FLAG_FUA if request.fua else 0
    if request.kind == "write":
        clients.write(request.who, start, payload(request, end - start), flags)
    elif request.kind == "zero":
        clients.zero(request.who, start, end - start, flags)
    elif request.kind == "allocate":
        clients.zero(request.who, start, end - start, flags | nbd.CMD_FLAG_NO_HOLE)
    elif request.kind == "trim":
        clients.trim(request.who, start, end - start, flags)
    else:
        clients.flush(request.who)


def prepare(stage: Stage, *, blank: bool) -> bytes:
    """Bring both disks to a known state, whatever the last example did: full of data, or one hole."""
    size_bytes = stage.shape.size_bytes
    content = random.Random(size_bytes).randbytes(size_bytes)
    stage.clients.write(0, 0, content)
    stage.clients.finish()
    if blank:
        content = bytes(size_bytes)
        stage.clients.zero(0, 0, size_bytes)
        stage.clients.finish()
    return content


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


@given(sequence=SEQUENCES, blank=st.booleans())
@examples(14)
def test_what_does_not_overlap_in_flight_is_on_both_disks_as_the_model_says(
    stage: Stage, sequence: list[Request], blank: bool
) -> None:
    model = Model(prepare(stage, blank=blank))
    in_flight: list[tuple[int, int]] = []
    for request in sequence:
        start, end = request.within(stage.shape.size_bytes)
        # Neighbours within one sector do not overlap, and must not disturb each other.
        if any(start < other_end and other_start < end for other_start, other_end in in_flight):
            stage.clients.finish()
            in_flight.clear()
        begin(stage, request)
        model.carry_out(request)
        if request.kind != "flush":
            in_flight.append((start, end))
    stage.clients.finish()
    model.check(stage.volume.target.read_bytes())
    stage.volume.assert_equal_disks()


@given(sequence=SEQUENCES, blank=st.booleans())
@examples(8)
def test_what_overlaps_in_flight_leaves_both_disks_equal(stage: Stage, sequence: list[Request], blank: bool) -> None:
    prepare(stage, blank=blank)
    for request in sequence:
        begin(stage, request)
    stage.clients.finish()
    stage.volume.assert_equal_disks()


def test_the_largest_requests_there_are(lab: Lab) -> None:
    size_bytes, largest = 40 * MIB + 777, 32 * MIB
    volume = lab.volume("vol", size_bytes)
    with volume.served() as served:
        clients = Clients(served.uri, CONNECTIONS)
        content = random.Random(1).randbytes(largest)
        for who, offset in enumerate((0, 1, 8 * MIB + 777, 4097)):
            clients.write(who, offset, content, clients.nbd.CMD_FLAG_FUA if who % 2 else 0)
        clients.write(0, 3 * MIB + 5, content[:100])
        clients.zero(1, 12345, largest)
        clients.trim(2, 7 * MIB + 1, largest)
        clients.finish()
        volume.assert_equal_disks()
        clients.write(0, 8 * MIB + 777, content)
        clients.zero(1, 0, 8 * MIB + 777)
        clients.finish()
        assert volume.target.read_bytes() == bytes(8 * MIB + 777) + content
        volume.assert_equal_disks()
        clients.close()


def test_a_fast_zero_is_refused_rather_than_slow_and_changes_nothing(stage: Stage) -> None:
    content = prepare(stage, blank=False)
    stage.clients.zero(0, 0, stage.shape.size_bytes, stage.clients.nbd.CMD_FLAG_FAST_ZERO)
    with pytest.raises(stage.clients.nbd.Error) as failure:
        stage.clients.finish()
    assert failure.value.errno == "ENOTSUP"
    assert stage.volume.target.read_bytes() == content
    stage.volume.assert_equal_disks()
