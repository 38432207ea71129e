"""A resync ends, and writes little more than what differs, however busy the clients are."""

import random
import re
from collections.abc import Iterator
from typing import Final

import pytest

from tests.lab import MIB, Clients, Lab, Storage, Volume, needs, wait_until

pytestmark = needs("nbdkit", "nbdfuse", "fusermount3", "/dev/fuse", root=True)

SIZE_BYTES: Final = 32 * MIB
OVERWRITTEN_BYTES: Final = 8 * MIB
DATA_OFFSET_BYTES: Final = 16 * MIB


@pytest.fixture
def storage(lab: Lab) -> Iterator[Storage]:
    storage = Storage(lab.home / "storage", SIZE_BYTES + DATA_OFFSET_BYTES, write_delay_ms=10)
    yield storage
    storage.close()


@pytest.fixture
def volume(lab: Lab, storage: Storage) -> Volume:
    target = lab.disk("target", SIZE_BYTES, random.Random(3).randbytes(SIZE_BYTES))
    disks = ["--target", target, "--mirror", storage.path, "--key-file", lab.key]
    lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
    return Volume(lab, "vol", target, storage.path, None)


def data_written(storage: Storage) -> int:
    """How many bytes of data, not of header, the mirror has been given."""
    writes = re.findall(r" Write id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)", storage.log())
    return sum(int(count, 16) for offset, count in writes if int(offset, 16) >= DATA_OFFSET_BYTES)


def test_each_region_is_copied_once_though_clients_overwrite_it(volume: Volume, storage: Storage) -> None:
    """32 MiB differ, and 8 MiB are overwritten meanwhile: at most 60 MiB are written."""
    before = data_written(storage)
    with volume.served(in_sync=False) as served:
        clients = Clients(served.uri, 1)
        chance = random.Random(4)
        for _ in range(OVERWRITTEN_BYTES // (64 << 10)):
            clients.write(0, chance.randrange(SIZE_BYTES >> 16) << 16, chance.randbytes(64 << 10))
            if clients.under_way >= 8:
                clients.move()
        assert served.mirror_state() == "syncing", "the copy was over before the clients had written"
        clients.finish()
        sync = served.mirror()["sync"]
        assert sync is None or sync["done_bytes"] <= sync["total_bytes"]
        wait_until(lambda: served.mirror_state() == "in-sync", "the copy to end")
        clients.close()
    written = data_written(storage) - before
    assert SIZE_BYTES <= written <= 60 * MIB, written
    volume.assert_equal_disks()


def test_a_comparison_first_writes_only_what_really_differs(volume: Volume, storage: Storage) -> None:
    """The bitmap is lost, so everything counts as different; three places do."""
    with volume.served():
        pass
    (bitmap,) = (volume.lab.state / "intent").glob("*.intent")
    bitmap.unlink()
    with volume.target.open("rb+") as target:
        for offset in (0, 5 * MIB + 77, SIZE_BYTES - 1):
            target.seek(offset)
            target.write(b"?")
    before = data_written(storage)
    volume.lab.lockstep("revoke", "vol", "root").ok()
    with volume.served(in_sync=False) as served:
        assert served.mirror()["dirty_bytes"] == SIZE_BYTES
        volume.lab.lockstep("sync", "vol", "--checksum").ok()
        volume.grant("root")
        wait_until(lambda: served.mirror_state() == "in-sync", "the copy to end")
    assert 0 < data_written(storage) - before <= 3 * MIB, "a piece for each of the three places, and no more"
    volume.assert_equal_disks()
