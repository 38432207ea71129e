"""P3: after a kill -9 the next start copies the marked regions, no more, and the disks are equal again."""

import random
import shutil
import subprocess
import time

from tests.lab import MIB, Lab, Served, Volume, wait_until

SIZE_BYTES = 32 * MIB
REGION_BYTES = 64 << 10


def start_writer(served: Served, seed: int, span_bytes: int) -> "subprocess.Popen[bytes]":
    """Write at random within the first `span_bytes`, many at a time, until killed."""
    options = {
        "name": "writer",
        "ioengine": "nbd",
        "uri": served.uri,
        "rw": "randwrite",
        "bsrange": "512-128k",
        "bs_unaligned": 1,
        "iodepth": 16,
        "size": span_bytes,
        "norandommap": 1,
        "randseed": seed,
        "time_based": 1,
        "runtime": 60,
        "thread": 1,
        "fdatasync": 50,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return subprocess.Popen(
        ["fio", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=served.volume.lab.home
    )


def copied_bytes(served: Served) -> int:
    """What this server's log says that it copied at its start."""
    lines = [line for line in served.log.read_text().splitlines() if " bytes to mirror " in line]
    return int(lines[-1].split("copying ")[1].split()[0]) if lines else 0


def assert_recovers(volume: Volume, most_bytes: int) -> int:
    """Start again after a crash: copies at most so much, and the disks end equal. Returns what was copied."""
    log = volume.lab.home / f"{volume.name}.log"
    log.write_text("")
    with volume.served() as served:
        copied = copied_bytes(served)
        assert copied <= most_bytes, f"{copied} bytes were copied, {most_bytes} could differ"
    volume.assert_equal_disks()
    return copied


def test_kill_9_under_load_copies_only_what_was_being_written(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES, content=random.Random(1).randbytes(4 * MIB))
    span_bytes = 8 * MIB
    chance = random.Random(2)
    for seed in range(3):
        with volume.served() as served:
            before = volume.target.read_bytes()
            writer = start_writer(served, seed, span_bytes)
            wait_until(lambda: volume.target.read_bytes() != before, "the writer to have written")  # noqa: B023
            time.sleep(chance.random() / 2)  # the moment of death is what varies
            served.kill()
            writer.kill()
            writer.wait()
        assert assert_recovers(volume, span_bytes + REGION_BYTES) > 0


def marks(lab: Lab) -> bytes:
    """The bits of the only bitmap: a disk of this size has one page of them."""
    bitmap = next((lab.state / "intent").glob("*.intent"))
    return bitmap.read_bytes()[512 + 4 : 1024]


def test_marks_of_regions_at_rest_are_cleared(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    with volume.served() as served:
        wait_until(lambda: not any(marks(lab)), "the marks of the initial copy to be cleared")
        served.kill()
    assert assert_recovers(volume, 0) == 0


def test_a_copy_of_the_mirror_from_before_is_not_taken_for_it(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    older = lab.home / "older"
    with volume.served(in_sync=False) as served:
        shutil.copyfile(volume.mirror, older)
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be in sync")
        wait_until(lambda: not any(marks(lab)), "the marks of the initial copy to be cleared")
        served.kill()
    shutil.copyfile(older, volume.mirror)
    assert assert_recovers(volume, SIZE_BYTES) == SIZE_BYTES


def test_a_target_that_others_wrote_while_it_was_not_served_is_copied(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    with volume.served():
        pass
    with volume.target.open("r+b") as target:
        target.write(b"by others")
    assert assert_recovers(volume, SIZE_BYTES) == SIZE_BYTES


def test_a_clean_stop_leaves_nothing_to_copy(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    with volume.served() as served:
        subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", served.uri], check=True, stdout=subprocess.DEVNULL
        )
    assert assert_recovers(volume, 0) == 0


def test_a_bitmap_that_is_damaged_or_missing_copies_everything_and_says_so(lab: Lab) -> None:
    volume = lab.volume("vol", everything := 4 * MIB)
    with volume.served():
        pass
    bitmap = next((lab.state / "intent").glob("*.intent"))
    sound = bitmap.read_bytes()
    for content in (b"", sound[:100], b"\0" * len(sound), sound[:10] + b"\xff" + sound[11:]):
        bitmap.write_bytes(content)
        assert assert_recovers(volume, everything) == everything
    bitmap.unlink()
    assert assert_recovers(volume, everything) == everything
