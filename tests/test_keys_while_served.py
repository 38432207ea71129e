"""Passphrases that change while a server writes its token into the same header: neither stops the other."""

import itertools
import threading
from pathlib import Path

import pytest

from lockstep.crypto import keyslots, luks
from lockstep.errors import LuksError
from tests.forks import ForkLab
from tests.keys import NEW, Keys, opens
from tests.lab import MIB, PASSPHRASE, Lab, run


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = ForkLab(tmp_path)
    monkeypatch.setenv("PATH", lab.quick_format()["PATH"])
    return lab


def test_a_server_goes_on_and_so_do_its_clients(lab: Lab) -> None:
    keys = Keys(lab)
    with keys.volume.served() as served:
        keys("add", "--key-file", lab.key, "--new-key-file", keys.new).ok()
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", "-c", "flush", served.uri)
        keys("remove", "--key-file", lab.key).ok()
        run("qemu-io", "-f", "raw", "-c", "write -P 8 64k 64k", "-c", "flush", served.uri)
        assert served.mirror_state() == "in-sync"
    assert luks.read_header(str(keys.header)).token.state == "in-sync"  # type: ignore[union-attr]
    assert (opens(keys.header, PASSPHRASE), opens(keys.header, NEW)) == (False, True)
    lab.lockstep("serve", "vol", "--key-file", lab.key).failed(1, "No key slot", "removed or changed")
    lab.lockstep("restore", keys.volume.mirror, lab.home / "output", "--key-file", keys.new).ok()
    assert (lab.home / "output").read_bytes() == keys.volume.target.read_bytes()


def test_writing_tokens_and_changing_keys_do_not_fail_each_other(lab: Lab) -> None:
    """Without another attempt, one of two that meet gives up: cryptsetup computes key slots without its lock."""
    mirror = str(lab.volume(size_bytes=MIB).mirror)
    header = luks.read_header(mirror)
    token = header.token
    assert token is not None
    written: list[int] = []
    failed: list[LuksError] = []
    done = threading.Event()

    def write_tokens() -> None:
        try:
            while not done.wait(0.15):
                generation = 2 + len(written)
                state = luks.Token(token.volume_id, token.volume_name, token.target_size_bytes, generation, "in-sync")
                luks.write_token(mirror, state, token_id=header.token_id)
                written.append(generation)
        except LuksError as error:
            failed.append(error)

    writer = threading.Thread(target=write_tokens)
    writer.start()
    try:
        passphrases = [PASSPHRASE, *(b"passphrase %d" % number for number in range(6))]
        for old, new in itertools.pairwise(passphrases):
            keyslots.change(mirror, old, new, iter_time_ms=1)
    finally:
        done.set()
        writer.join()
    assert not failed
    assert written
    after = luks.read_header(mirror)
    assert after.token is not None
    assert after.token.generation == written[-1]
    assert len(after.keyslots) == 1
    assert opens(Path(mirror), passphrases[-1])
