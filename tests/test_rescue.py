"""A mirror is readable without Lockstep: an independent LUKS2 reader finds the partition table and the file system.

For both kinds of header and both sector sizes. docs/rescue.md has the commands for people; `make rescue-test` runs them
in a virtual machine. Here it is checked that the page has them.
"""

import json
import subprocess
from pathlib import Path

import pytest

from lockstep.disk.probe import inspect, signatures
from tests import rescue
from tests.lab import MIB, Lab, run

START_BYTES = MIB
PARTITION_BYTES = 6 * MIB
SIZE_BYTES = 8 * MIB
SEEN = b"seen through the encryption\n"


def partitioned(lab: Lab) -> Path:
    """A disk with a GPT, whose one partition has an ext4 with a file on it, made without a block device."""
    disk = lab.disk("disk", SIZE_BYTES)
    table = f"label: gpt\nstart={START_BYTES // 512}, size={PARTITION_BYTES // 512}\n"
    run("sfdisk", "--quiet", str(disk), stdin=table.encode())
    partition = lab.disk("partition", PARTITION_BYTES)
    run("mkfs.ext4", "-q", "-b", "1024", str(partition))
    (lab.home / "seen").write_bytes(SEEN)
    run("debugfs", "-w", "-R", f"write {lab.home}/seen seen", str(partition))
    with disk.open("rb+") as file:
        file.seek(START_BYTES)
        file.write(partition.read_bytes())
    return disk


@pytest.mark.parametrize("sector_bytes", [512, 4096])
@pytest.mark.parametrize("header", [False, True], ids=["inline", "detached"])
def test_an_independent_reader_finds_partition_and_file_system(lab: Lab, header: bool, sector_bytes: int) -> None:
    disk = partitioned(lab)
    volume = lab.volume("vol", SIZE_BYTES, "--sector-size", sector_bytes, content=disk.read_bytes(), header=header)
    with volume.served():
        pass
    found = lab.home / "found"
    found.write_bytes(volume.decrypted())
    assert signatures(inspect(str(volume.mirror))) == (() if header else ("crypto_LUKS",))
    (partition,) = json.loads(run("sfdisk", "--json", str(found)))["partitiontable"]["partitions"]
    assert (partition["start"] * 512, partition["size"] * 512) == (START_BYTES, PARTITION_BYTES)
    inside = lab.disk("inside", PARTITION_BYTES, found.read_bytes()[START_BYTES : START_BYTES + PARTITION_BYTES])
    assert signatures(inspect(str(inside))) == ("ext4 file system",)
    run("fsck.ext4", "-f", "-n", str(inside))
    seen = subprocess.run(["debugfs", "-R", "cat seen", str(inside)], capture_output=True, check=True).stdout
    assert seen == SEEN


def test_the_page_has_a_script_for_every_kind_of_mirror(tmp_path: Path) -> None:
    """Its blocks are complete, are shell, and name the disk, the header and the key only by the page's variables."""
    for case in rescue.CASES:
        text = rescue.script(case, "/dev/vda", "0" * 64, "1" * 64)
        path = tmp_path / case.name
        path.write_text(text)
        run("sh", "-n", str(path))
        assert ("--header" in text) == case.detached
        assert ("kpartx" in text) == case.partitioned
        for command in ("cryptsetup open", "--readonly", "losetup", "mount -o ro", "dd if=", "cryptsetup close"):
            assert command in text, (case.name, command)
        assert "/media" not in text
