"""P3: after a kill -9 the next start copies the marked regions, no more, and the disks are equal again."""

import random
import shutil
import subprocess

from tests.kill_loop import assert_recovers, kill_under_file_system, kill_under_fio, marks
from tests.lab import MIB, Lab, needs, wait_until

SIZE_BYTES = 32 * MIB


def test_kill_9_under_load_copies_only_what_was_being_written(lab: Lab) -> None:
    """`make torture` does so for an hour."""
    volume = lab.volume("vol", SIZE_BYTES, content=random.Random(1).randbytes(4 * MIB))
    chance = random.Random(2)
    for _ in range(3):
        assert kill_under_fio(volume, chance, 8 * MIB) > 0


@needs("nbdfuse", "fusermount3", "losetup", "mount", "mkfs.ext4", "e2fsck", "/dev/fuse", root=True)
def test_kill_9_under_a_file_system_loses_no_synced_file(lab: Lab) -> None:
    volume = lab.volume("vol", SIZE_BYTES)
    assert kill_under_file_system(volume, random.Random(3)) > 0


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
