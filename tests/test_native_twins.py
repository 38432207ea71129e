"""The native inner loops do what their Python twins do: same counts, same replies, same bytes on the disk."""

import errno
import os
import resource
import select
import signal
import tempfile
import threading
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep import work
from lockstep.crypto import cipher
from lockstep.crypto.cipher import FallbackXts
from lockstep.crypto.luks import CIPHER, Segment
from lockstep.disk import runs
from lockstep.disk.encrypted import EncryptedDisk
from lockstep.nbd import frames, transmission, wire
from tests.lab import wait_until

native_runs = pytest.importorskip("lockstep.disk._runs", reason="the native loops were not built")
native_frames = pytest.importorskip("lockstep.nbd._frames", reason="the native loops were not built")
native_xts = pytest.importorskip("lockstep.crypto._xts", reason="the native loops were not built")

REGION_SHIFT, GROUP_SHIFT = 12, 2
SIZE = 1 << 16
KEY = bytes(range(64))


def request(command: int, flags: int, cookie: int, offset: int, length: int, magic: int = wire.REQUEST_MAGIC) -> bytes:
    return wire.REQUEST.pack(magic, flags, command, cookie, offset, length)


WRITES = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, SIZE + 10), st.integers(0, 600)).map(
    lambda w: request(wire.CMD_WRITE, 0, *w) + b"d" * w[2]
)
OTHERS = st.one_of(
    st.binary(max_size=40),
    st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)).map(
        lambda r: request(*r, 5)
    ),
    st.just(request(wire.CMD_WRITE, 0, 1, 0, 5, magic=7) + b"12345"),
    st.just(request(wire.CMD_WRITE, 0, 1, 0, 2**32 - 1)),
)


@given(parts=st.lists(st.one_of(WRITES, WRITES, WRITES, OTHERS), max_size=80), cut=st.integers(0, 3000), data=st.data())
def test_runs_are_found_and_answered_alike(parts: list[bytes], cut: int, data: st.DataObject) -> None:
    buffer = b"".join(parts)
    end = max(0, len(buffer) - cut % 700)
    start = data.draw(st.integers(0, min(end, 30))) if cut % 3 == 0 else 0
    one, other = frames.new_run(), frames.new_run()
    arguments = (buffer, start, end, 1 + cut * 8, SIZE)
    count = frames._find_writes(*arguments, one)
    assert native_frames.find_writes(*arguments, other) == count
    assert one[: 4 * count] == other[: 4 * count]
    assert frames._pack_replies(one, count) == native_frames.pack_replies(other, count)
    for at in range(count):
        offset, length, position = one[4 * at : 4 * at + 3]
        head = wire.REQUEST.unpack_from(buffer, position - wire.REQUEST_BYTES)
        assert head[1:] == (0, wire.CMD_WRITE, frames.cookie_of(one, at), offset, length)


PAIRS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=12)


@given(requests=PAIRS, others=PAIRS)
def test_what_meets_is_found_alike(requests: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    run = array("Q", [word for offset, length in requests for word in (offset, length, 0, 0)])
    bounds = array("Q", [word for start, length in others for word in (start, start + length)])
    count = runs._apart(run, len(requests), bounds)
    assert native_runs.apart(run, len(requests), bounds) == count
    meet = [
        start < offset + length and offset < start + other for offset, length in requests for start, other in others
    ]
    assert (count < len(requests)) == any(meet)


@given(
    parts=st.lists(
        st.one_of(
            OTHERS,
            st.tuples(st.integers(0, 2**64 - 1), st.integers(0, SIZE + 9)).map(
                lambda r: request(wire.CMD_READ, 0, *r, 1 + r[0] % 700)
            ),
        ),
        max_size=80,
    ),
    cut=st.integers(0, 60),
    enough=st.integers(1, 40_000),
    structured=st.booleans(),
)
def test_reads_are_found_and_answered_alike(parts: list[bytes], cut: int, enough: int, structured: bool) -> None:
    buffer = b"".join(parts)
    header = wire.OFFSET_DATA if structured else wire.SIMPLE_REPLY
    one, other = frames.new_run(), frames.new_run()
    arguments = (buffer, 0, max(0, len(buffer) - cut), enough, 512, SIZE, header.size)
    count = frames._find_reads(*arguments, one)
    assert native_frames.find_reads(*arguments, other) == count
    assert one[: 4 * count] == other[: 4 * count]
    replies = [bytearray(frames.end_of(one, count)) for _ in range(2)] if count else [bytearray(), bytearray()]
    frames._pack_data_headers(replies[0], one, count, structured)
    native_frames.pack_data_headers(replies[1], other, count, structured)
    assert replies[0] == replies[1]
    for at in range(count):
        offset, length, position = one[4 * at : 4 * at + 3]
        head = transmission.data_header(frames.cookie_of(one, at), offset, length, structured=structured)
        assert replies[0][position - header.size : position] == head


EXTENTS = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 9000)), max_size=12).map(
    lambda extents: [(offset, min(length, SIZE - offset)) for offset, length in extents]
)


def as_run(extents: list[tuple[int, int]]) -> "array[int]":
    numbers: list[int] = []
    for position, (offset, length) in enumerate(extents):
        numbers += [offset, length, position, 0]
    return array("Q", numbers)


@given(extents=EXTENTS, mask=st.sampled_from([0, 511, 4095]), marks=st.binary(min_size=16, max_size=16))
def test_runs_are_judged_alike(extents: list[tuple[int, int]], mask: int, marks: bytes) -> None:
    run, count = as_run(extents), len(extents)
    assert native_runs.aligned(run, count, mask) == runs._aligned(run, count, mask)
    states = bytearray(byte & 1 for byte in marks)
    one, other = bytearray(4), bytearray(4)
    found = runs._covered(run, count, states, one, REGION_SHIFT, GROUP_SHIFT)
    assert native_runs.covered(run, count, states, other, REGION_SHIFT, GROUP_SHIFT) == found
    assert one == other


@given(extents=EXTENTS, sector=st.sampled_from([512, 4096]), short=st.booleans())
def test_runs_are_written_alike(extents: list[tuple[int, int]], sector: int, short: bool) -> None:
    data = os.urandom(9100)
    whole = [(offset // sector * sector, max(1, length // sector) * sector) for offset, length in extents]
    results = []
    for write_run, xts in (
        (runs._write_run, FallbackXts(KEY, sector)),
        (native_runs.write_run, native_xts.Xts(KEY, sector)),
        (native_runs.write_together, native_xts.Xts(KEY, sector)),
    ):
        with tempfile.TemporaryFile(dir="/dev/shm") as plain, tempfile.TemporaryFile(dir="/dev/shm") as cipher:
            flags = 1 << 30 if short else 0  # which no kernel knows: every write fails
            encrypt: Any = xts.encrypt_run
            done = write_run(plain.fileno(), flags, data, as_run(extents), len(extents))
            encrypted = encrypt(cipher.fileno(), 512, 7, data, as_run(whole), len(whole), flags)
            results.append((done, encrypted, plain.read(), cipher.read()))
    assert results[0] == results[1] == results[2]
    assert results[0][:2] == ((0, 0) if short else (len(extents), len(extents)))


@given(extents=EXTENTS)
def test_runs_are_read_alike(extents: list[tuple[int, int]]) -> None:
    content = os.urandom(SIZE // 2)  # so some reads lie past its end
    results = []
    for read in (
        lambda fd, *rest: runs._read_run(fd, 0, *rest),
        lambda fd, *rest: native_runs.read_run(fd, 0, *rest),
        runs._read_together,
        native_runs.read_together,
    ):
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            file.write(content)
            file.flush()
            into = bytearray(9100)
            results.append((read(file.fileno(), into, as_run(extents), len(extents)), into))
    assert {done for done, _ in results} == {results[0][0]}
    whole = [offset + length <= len(content) for offset, length in extents]
    assert results[0][0] == (whole.index(False) if False in whole else len(extents))
    if extents and False not in whole:
        offset, length = extents[-1]
        assert results[1][1][len(extents) - 1 :][:length] == content[offset : offset + length]


@given(extents=EXTENTS, kept=st.integers(0, SIZE), refused=st.booleans())
def test_jobs_are_carried_out_alike(extents: list[tuple[int, int]], kept: int, refused: bool) -> None:
    data, flags = os.urandom(9100), 1 << 30 if refused else 0
    results: list[list[Any]] = []
    for write_job, fetch_job in ((runs._write_job, runs._fetch_job), (native_runs.write_job, native_runs.fetch_job)):
        with tempfile.TemporaryFile(dir="/dev/shm") as plain:
            left: list[int] = []
            into = bytearray(9100)
            said = [outcome(write_job(plain.fileno(), flags, data, as_run(extents), len(extents), left.append, False))]
            plain.truncate(kept)  # so some reads lie past the end
            said.append(outcome(fetch_job(plain.fileno(), into, as_run(extents), len(extents), left.append)))
            results.append([said, left, plain.read(), into])
    assert results[0] == results[1]
    if refused and extents:
        assert results[0][0][0] == errno.EOPNOTSUPP


@pytest.fixture(params=["native", "python"])
def encrypts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cipher, "_Implementation", native_xts.Xts if request.param == "native" else FallbackXts)


def mirror_of(file: Any, sector: int, size_bytes: int) -> EncryptedDisk:
    fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR)
    return EncryptedDisk(fd, Segment(512, sector, 7, CIPHER, None), cipher.XtsCipher(KEY, sector), size_bytes)


@given(extents=EXTENTS, sector=st.sampled_from([512, 4096]), full=st.booleans())
def test_runs_are_encrypted_by_jobs_alike(extents: list[tuple[int, int]], sector: int, full: bool) -> None:
    data, results = memoryview(os.urandom(9100)), list[Any]()
    whole = [(offset // sector * sector, max(1, length // sector) * sector) for offset, length in extents]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for implementation in (native_xts.Xts, FallbackXts):
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile(dir="/dev/shm") as file:
            patch.setattr(cipher, "_Implementation", implementation)
            disk = mirror_of(file, sector, SIZE)
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2 if full else limits[0], limits[1]))
                said = outcome(disk.write_job(data, as_run(whole), len(whole)))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                disk.close()
            results.append((said, file.read()))
    signal.signal(signal.SIGXFSZ, ignored)
    assert results[0] == results[1]
    assert results[0][0] in ((0, errno.EFBIG, errno.ENOSPC) if full else (0,))


@pytest.mark.usefixtures("encrypts")
def test_a_mirror_that_is_given_up_is_written_no_further_than_the_piece_it_is_at() -> None:
    queue, count = work.Queue(), 1000
    data = memoryview(bytearray(1 << 20))
    run = array("Q", [word for at in range(count) for word in (at << 20, 1 << 20, 0, 0)])
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        disk = mirror_of(file, 4096, count << 20)
        job = disk.write_job(data, run, count)
        job = job if isinstance(job, work.Job) else work.Call(job)
        job.future = "run"
        threading.Thread(target=queue.serve, daemon=True).start()
        queue.put(job)
        wait_until(lambda: os.fstat(file.fileno()).st_size > 0, "the run to begin")
        disk.stop()
        assert queue.give_up() == 0
        queue.close()
        assert select.select([queue.fd], [], [], 60)[0]
        ((_future, _value, failure),) = queue.done()
        assert isinstance(failure, OSError)
        assert failure.errno == errno.ECANCELED
        assert os.fstat(file.fileno()).st_size < 512 + (count << 20)
        disk.close()


@pytest.mark.usefixtures("encrypts")
def test_a_mirror_that_is_given_up_is_written_nothing_of_what_its_memory_is_used_for_next() -> None:
    """The write is answered when the mirror is given up, and its memory lent to another; this is a race, many times."""
    for _ in range(20):
        assert not any(written_of_zeroes(1 << 20, 100))


def written_of_zeroes(piece: int, count: int) -> memoryview:
    """What a mirror was given of so many writes of zeroes, until it was given up and their memory written over."""
    queue, data = work.Queue(), memoryview(bytearray(piece))
    run = array("Q", [word for at in range(count) for word in (at * piece, piece, 0, 0)])
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        disk = mirror_of(file, 512, count * piece)
        job = disk.write_job(data, run, count)
        job = job if isinstance(job, work.Job) else work.Call(job)
        threading.Thread(target=queue.serve, daemon=True).start()
        queue.put(job)
        wait_until(lambda: os.fstat(file.fileno()).st_size > 0, "the run to begin")
        disk.stop()
        queue.give_up()
        data[:] = b"\xba" * piece
        queue.close()
        assert select.select([queue.fd], [], [], 60)[0]
        queue.done()
        written = memoryview(bytearray((os.fstat(file.fileno()).st_size - 512) // 512 * 512))
        disk.read(0, written)
        disk.close()
        return written


@given(kept=st.integers(0, SIZE), length=st.integers(1, 20), from_medium=st.booleans(), refused=st.booleans())
def test_sectors_are_fetched_alike(kept: int, length: int, from_medium: bool, refused: bool) -> None:
    content, results = os.urandom(kept), list[Any]()
    for xts in (FallbackXts(KEY, 512), native_xts.Xts(KEY, 512)):
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            file.write(content)
            file.flush()
            fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_WRONLY if refused else os.O_RDONLY)
            left, into = list[bool](), bytearray(512 * length)
            said = outcome(xts.decrypt_job(fd, 1024, 7, into, from_medium, partial(left.append, True)))
            os.close(fd)
            results.append((said, left, into if not left else None))
    assert results[0] == results[1]
    assert refused == (results[0][0] == errno.EBADF)


def outcome(job: Callable[[], None]) -> int:
    """Carry out a job, and return its error, or 0."""
    try:
        job()
    except OSError as failure:
        return failure.errno or -1
    return 0


@given(one=st.binary(max_size=40), other=st.binary(max_size=40))
def test_buffers_are_compared_alike(one: bytes, other: bytes) -> None:
    for left, right in ((one, other), (one, bytearray(one)), (memoryview(other), other)):
        assert runs._same(left, right) == native_runs.same(left, right) == (bytes(left) == bytes(right))


@pytest.mark.parametrize("loops", [runs._covered, native_runs.covered], ids=["python", "native"])
def test_a_write_outside_of_the_disk_is_refused(loops: Any) -> None:
    with pytest.raises(ValueError, match="outside"):
        loops(as_run([(SIZE, 1)]), 1, bytearray(16), bytearray(4), REGION_SHIFT, GROUP_SHIFT)


def test_a_count_beyond_the_run_is_refused() -> None:
    run = as_run([(0, 1)])
    calls: tuple[Callable[[], Any], ...] = (
        lambda: native_runs.aligned(run, 2, 0),
        lambda: native_runs.write_run(1, 0, b"", run, 2),
        lambda: native_runs.write_together(1, 0, b"", run, 2),
        lambda: native_runs.read_together(1, bytearray(), run, 2),
        lambda: native_runs.write_job(1, 0, b"", run, 2, None, False),
        lambda: native_runs.fetch_job(1, bytearray(), run, 2, None),
        lambda: native_frames.pack_replies(run, 2),
        lambda: native_xts.Xts(KEY, 512).encrypt_run(1, 0, 0, b"", run, 2, 0),
    )
    for call in calls:
        with pytest.raises(ValueError, match="shorter"):
            call()
