"""What a volume costs does not grow with its size: a terabyte of holes starts and catches up as a megabyte does."""

import json
import os
import time
from pathlib import Path
from typing import Final

from benchmarks.sparse import UNCHECKED, write_records

from lockstep.crypto import luks
from lockstep.service.state import State
from tests.lab import MIB, Lab, Volume, run, wait_until

SIZE_BYTES: Final = 1 << 40
REGION_BYTES: Final = MIB  # of a terabyte
DIRTY_REGIONS: Final = 1024
MOST_RESIDENT_BYTES: Final = 120 * MIB


def prepared(lab: Lab) -> Volume:
    """A terabyte of holes, and its mirror, which is told that it is equal: nobody waits for a terabyte to be copied."""
    target = lab.disk("target", SIZE_BYTES)
    disks = ["--target", target, "--mirror", lab.home / "mirror", "--key-file", lab.key]
    lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
    volume = Volume(lab, "vol", target, lab.home / "mirror", None)
    call_equal(volume, range(0))
    return volume


def call_equal(volume: Volume, but: range) -> None:
    """Have the records say that only these regions differ, and nothing is held."""
    marked = bytes(region in but for region in range(SIZE_BYTES // REGION_BYTES))
    write_records(State(str(volume.lab.state)), luks.read_header(str(volume.mirror)), marked)


def data_bytes(path: Path) -> int:
    return os.stat(path).st_blocks * 512


def test_a_terabyte_starts_at_once_in_little_memory_and_copies_what_differs(lab: Lab) -> None:
    volume = prepared(lab)
    began_s = time.monotonic()
    with volume.served(program=UNCHECKED) as served:
        started_s = time.monotonic() - began_s
        (bitmap,) = (lab.state / "intent").glob("*.intent")
        assert bitmap.stat().st_size < MIB
        run("qemu-io", "-f", "raw", "-c", f"write -P 7 {SIZE_BYTES - 4096} 4k", "-c", "read -P 0 1M 4k", served.uri)
        resident_bytes = served.resident_bytes()
        assert resident_bytes < MOST_RESIDENT_BYTES
        assert len(json.dumps(served.status())) < 4096
    assert started_s < 10, "without marks there is nothing to do"
    before_bytes = data_bytes(volume.mirror)
    scattered = range(5, SIZE_BYTES // REGION_BYTES, SIZE_BYTES // REGION_BYTES // DIRTY_REGIONS)
    call_equal(volume, scattered)
    began_s = time.monotonic()
    with volume.served(in_sync=False, program=UNCHECKED) as served:
        wait_until(lambda: served.mirror_state() == "in-sync", "what differs to be copied")
        assert f"copying {DIRTY_REGIONS * REGION_BYTES} bytes" in served.log.read_text()
        copied_s = time.monotonic() - began_s
        assert served.resident_bytes() < MOST_RESIDENT_BYTES
    written = data_bytes(volume.mirror) - before_bytes
    assert DIRTY_REGIONS * REGION_BYTES <= written <= DIRTY_REGIONS * REGION_BYTES * 1.1
    print(f"start {started_s:.2f} s, {resident_bytes >> 20} MiB; {written >> 20} MiB copied in {copied_s:.1f} s")
