"""The shortest path through everything: create, serve, write with qemu-io, stop, compare, restore."""

from tests.lab import Lab, run


def test_a_write_is_on_both_disks_and_comes_back(lab: Lab) -> None:
    volume = lab.volume()
    with volume.served() as served:
        run(
            "qemu-io", "-f", "raw", "-c", "write -P 0xab 4096 64k", "-c", "write -P 0xcd 5 3", "-c", "flush", served.uri
        )
        run("qemu-io", "-f", "raw", "-c", "read -P 0xab 4096 64k", served.uri)
    volume.assert_equal_disks()
    assert volume.target.read_bytes()[4096 : 4096 + 65536] == b"\xab" * 65536
    restored = lab.home / "restored"
    volume.restore(restored).ok()
    assert restored.read_bytes() == volume.target.read_bytes()


def test_with_a_detached_header_too(lab: Lab) -> None:
    volume = lab.volume("vol", 3_000_001, header=True)
    with volume.served() as served:
        run("qemu-io", "-f", "raw", "-c", "write -P 0xab 2999999 2", "-c", "flush", served.uri, check=False)
    volume.assert_equal_disks()
