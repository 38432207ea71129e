"""The clients that people use: qemu-io, qemu-img, nbdcopy and fio read back what they wrote, and both disks agree.

One server for all of them; every test ends with the comparison of the disks.
"""

import hashlib
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.forks import ForkLab
from tests.lab import MIB, Served, Volume, needs, run

SIZE_BYTES: Final = 16 * MIB + 512


@dataclass
class Stage:
    """A served volume, and a directory for files."""

    volume: Volume
    served: Served
    home: Path

    @property
    def uri(self) -> str:
        return self.served.uri


@pytest.fixture(scope="module", params=[512, 4096])
def shared_stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    lab = ForkLab(tmp_path_factory.mktemp("clients"))
    volume = lab.volume("vol", SIZE_BYTES, "--sector-size", request.param)
    with volume.served() as served:
        yield Stage(volume, served, lab.home)


@pytest.fixture
def stage(shared_stage: Stage) -> Iterator[Stage]:
    yield shared_stage
    shared_stage.volume.assert_equal_disks()
    assert shared_stage.served.mirror_state() == "in-sync"


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def qemu_io(uri: str, *commands: str) -> str:
    said = run("qemu-io", "-f", "raw", "-t", "none", *(word for each in commands for word in ("-c", each)), uri)
    assert "verification failed" not in said, said
    return said


@needs("qemu-io")
def test_qemu_io_reads_back_patterns_at_odd_places(stage: Stage) -> None:
    qemu_io(
        stage.uri,
        "write -P 0x11 0 1M",
        "write -P 0x22 511 2",
        "write -P 0x33 4095 4099",
        "write -P 0x44 65535 1",
        "write -P 0x55 100001 300007",
        "read -P 0x11 0 511",
        "read -P 0x22 511 2",
        "read -P 0x11 513 3582",
        "read -P 0x33 4095 4099",
        "read -P 0x44 65535 1",
        "read -P 0x11 65536 34465",
        "read -P 0x55 100001 300007",
        "read -P 0x11 400008 1000",
    )
    target = stage.volume.target.read_bytes()
    assert target[4095 : 4095 + 4099] == b"\x33" * 4099
    assert target[65535:65537] == b"\x44\x11"


@needs("qemu-io")
def test_qemu_io_zeroes_and_discards(stage: Stage) -> None:
    qemu_io(
        stage.uri,
        "write -P 0xaa 2M 4M",
        f"write -z {2 * MIB + 3} 70001",
        f"write -z -u {3 * MIB - 100} 200",
        f"discard {4 * MIB + 511} 300000",
        "flush",
        f"read -P 0xaa {2 * MIB} 3",
        f"read -P 0 {2 * MIB + 3} 70001",
        f"read -P 0xaa {2 * MIB + 70004} 1000",
        f"read -P 0 {3 * MIB - 100} 200",
        f"read -P 0xaa {3 * MIB + 100} 1000",
        f"read -P 0xaa {5 * MIB} 1M",
    )
    assert stage.volume.target.read_bytes()[3 * MIB - 100 : 3 * MIB + 100] == bytes(200)


@needs("qemu-io")
def test_qemu_io_has_many_writes_in_flight(stage: Stage) -> None:
    writes = [f"aio_write -P {1 + n % 250} {8 * MIB + n * 1777} 1777" for n in range(120)]
    durable = [f"aio_write -f -P 251 {9 * MIB + n * 4096} 4096" for n in range(20)]
    qemu_io(stage.uri, *writes, *durable, "aio_flush", f"read -P 251 {9 * MIB} {20 * 4096}")
    target = stage.volume.target.read_bytes()
    for n in range(120):
        at = 8 * MIB + n * 1777
        assert target[at : at + 1777] == bytes([1 + n % 250]) * 1777


@needs("nbdcopy")
def test_nbdcopy_there_and_back(stage: Stage) -> None:
    content = random.Random(5).randbytes(5 * MIB) + bytes(4 * MIB) + random.Random(6).randbytes(7 * MIB + 512)
    there, back = stage.home / "there", stage.home / "back"
    there.write_bytes(content)
    run("nbdcopy", "--flush", "--connections=4", "--requests=32", str(there), stage.uri)
    assert checksum(stage.volume.target.read_bytes()) == checksum(content)
    run("nbdcopy", "--connections=4", stage.uri, str(back))
    assert checksum(back.read_bytes()) == checksum(content)


@needs("qemu-img")
def test_qemu_img_convert_replaces_what_was_there_by_zeroes_too(stage: Stage) -> None:
    run("qemu-io", "-f", "raw", "-c", f"write -P 0xee 0 {SIZE_BYTES}", stage.uri)
    content = bytes(MIB) + random.Random(7).randbytes(3 * MIB) + bytes(9 * MIB) + random.Random(8).randbytes(3 * MIB)
    content += bytes(512)
    source = stage.home / "source"
    with source.open("wb") as file:  # with real holes
        for at in range(0, len(content), MIB):
            if any(piece := content[at : at + MIB]):
                file.seek(at)
                file.write(piece)
        file.truncate(len(content))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", str(source), stage.uri)
    assert checksum(stage.volume.target.read_bytes()) == checksum(content)
    assert "Images are identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), stage.uri)


def fio(stage: Stage, name: str, *options: str) -> None:
    common = ["--ioengine=nbd", f"--uri={stage.uri}", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1"]
    command = ["fio", f"--name={name}", *common, "--output-format=terse", "--group_reporting", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=stage.home)
    assert done.returncode == 0, done.stdout + done.stderr


@needs("fio")
def test_fio_verifies_four_jobs_with_blocks_of_all_sizes(stage: Stage) -> None:
    fio(
        stage,
        "mixed",
        "--rw=randwrite",
        "--bsrange=512-1M",
        "--iodepth=16",
        "--numjobs=4",
        "--size=4M",
        "--offset_increment=4M",
        "--fsync=50",
    )


@needs("fio")
@pytest.mark.parametrize("block_bytes", [1111, 70_001])
def test_fio_verifies_blocks_at_odd_offsets(stage: Stage, block_bytes: int) -> None:
    """Of one size, so that fio knows of every byte what it must be."""
    fio(
        stage,
        "odd",
        "--rw=randwrite",
        f"--bs={block_bytes}",
        "--offset=333",
        "--iodepth=8",
        "--numjobs=4",
        f"--size={2_000_000 // block_bytes * block_bytes}",
        "--offset_increment=4000001",
    )


@needs("fio")
def test_fio_verifies_blocks_that_it_trimmed_before(stage: Stage) -> None:
    """One request at a time: of a trim and a write under way together, either may come last."""
    fio(
        stage,
        "trim",
        "--rw=randtrimwrite",
        "--bs=3k",
        "--iodepth=1",
        "--numjobs=2",
        "--size=2M",
        "--offset_increment=8M",
    )
