"""Unlocking without anybody there: systemd credentials, and tokens that are enrolled in the header."""

import ctypes
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.crypto import keyslots, luks, unlock
from lockstep.errors import NoTokenUnlocks
from tests.forks import ForkLab
from tests.keys import NEW, opens
from tests.lab import MIB, PASSPHRASE, Lab, Volume, run, wait_until

ADD_KEY, KEYCTL = 248, 250  # system calls of x86-64
PROCESS_KEYRING, SESSION_KEYRING = -2, -3
REVOKE, JOIN_SESSION = 3, 1


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = ForkLab(tmp_path)
    monkeypatch.setenv("PATH", lab.quick_format()["PATH"])
    return lab


class Keyring:
    """A key in this session's keyring of the kernel, where cryptsetup looks for a luks2-keyring token's passphrase."""

    def __init__(self) -> None:
        self.description = f"lockstep-test:{secrets.token_hex(8)}"
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self.put(PASSPHRASE)

    def put(self, passphrase: bytes) -> None:
        serial = self._call(ADD_KEY, b"user", self.description.encode(), passphrase, len(passphrase), SESSION_KEYRING)
        if serial < 0:
            pytest.skip(f"the kernel keeps no key here: {os.strerror(ctypes.get_errno())}")
        self._serial = serial

    def forget(self) -> None:
        self._call(KEYCTL, REVOKE, self._serial)


@pytest.fixture
def keyring() -> Iterator[Keyring]:
    made = Keyring()
    yield made
    made.forget()


def enrolled(volume: Volume, keyring: Keyring) -> str:
    header = str(volume.header or volume.mirror)
    run("cryptsetup", "token", "add", "--key-description", keyring.description, "--key-slot=0", header)
    return header


@pytest.mark.parametrize("header", [False, True], ids=["inline", "detached"])
def test_a_token_serves_and_restores(lab: Lab, keyring: Keyring, header: bool) -> None:
    volume = lab.volume(size_bytes=MIB, content=b"the content".ljust(512) * 64, header=header)
    path = enrolled(volume, keyring)
    before = Path(path).read_bytes()
    lab.key.unlink()
    with volume.served(unlocked_by=["--token-only"]) as served:
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be in sync")
    metadata = json.loads(run("cryptsetup", "luksDump", "--dump-json-metadata", path))
    assert list(metadata["keyslots"]) == ["0"], "a token's passphrase was left on the disk"
    assert Path(path).read_bytes()[32768 : 16 * MIB] == before[32768 : 16 * MIB]
    detached = ["--header", path] if header else []
    lab.lockstep("restore", volume.mirror, lab.home / "output", "--token-only", *detached).ok()
    assert (lab.home / "output").read_bytes() == volume.target.read_bytes()


def test_a_token_that_gives_no_key_says_so_and_changes_nothing(lab: Lab, keyring: Keyring) -> None:
    volume = lab.volume(size_bytes=MIB)
    lab.lockstep("serve", "vol", "--token-only").failed(1, "none is enrolled in its header", "--key-file")
    path = enrolled(volume, keyring)
    before = volume.mirror.read_bytes()
    keyring.put(b"not the passphrase")
    lab.lockstep("serve", "vol", "--token-only").failed(1, "it has luks2-keyring, and none of them gave a key")
    keyring.forget()
    with pytest.raises(NoTokenUnlocks):
        unlock.BY_TOKEN.volume_key(path)
    assert volume.mirror.read_bytes() == before


def test_a_token_gives_the_same_key_as_the_passphrase(lab: Lab, keyring: Keyring) -> None:
    path = enrolled(lab.volume(size_bytes=MIB), keyring)
    assert unlock.BY_TOKEN.volume_key(path) == luks.volume_key(path, PASSPHRASE)


def test_a_token_unlocks_a_header_whose_key_slots_are_all_in_use(lab: Lab, keyring: Keyring) -> None:
    path = enrolled(lab.volume(size_bytes=MIB), keyring)
    expected = luks.volume_key(path, PASSPHRASE)
    for number in range(1, keyslots.MAX_SLOTS):
        keyslots.add(path, PASSPHRASE, b"%d" % number, iter_time_ms=1)
    before = Path(path).read_bytes()
    assert unlock.BY_TOKEN.volume_key(path) == expected
    assert Path(path).read_bytes() == before


def test_a_token_does_not_stand_in_for_a_wrong_passphrase(lab: Lab, keyring: Keyring) -> None:
    """cryptsetup itself prefers a token to the passphrase that it is given: a check of the latter would always pass."""
    enrolled(lab.volume(size_bytes=MIB), keyring)
    options = ("--key-file", "-", "--new-key-file", lab.key)
    lab.lockstep("key", "add", "vol", *options, stdin=b"wrong").failed(1, "No key slot")
    lab.lockstep("serve", "vol", "--key-file", "-", stdin=b"wrong").failed(1, "No key slot")


def test_a_token_does_not_stand_in_for_the_slot_that_a_passphrase_opens(lab: Lab, keyring: Keyring) -> None:
    volume = lab.volume(size_bytes=MIB)
    path = enrolled(volume, keyring)
    lab.lockstep("key", "rekey", "vol", "--key-file", "-", stdin=b"wrong").failed(1, "No key slot")
    add = ("key", "add", "vol", "--key-file", lab.key, "--new-key-file", "-")
    lab.lockstep(*add, stdin=NEW).ok()
    removed = lab.lockstep("key", "remove", "vol", "--key-file", "-", stdin=NEW).ok()
    assert "another key slot" not in removed, "it is the token that opens that one"
    lab.lockstep(*add, stdin=NEW).ok()
    lab.lockstep("key", "rekey", "vol", "--key-file", "-", "--drop-other-keys", stdin=NEW).ok()
    assert [opens(Path(path), each) for each in (PASSPHRASE, NEW)] == [False, True]


def test_a_systemd_credential(lab: Lab) -> None:
    volume = lab.volume(size_bytes=MIB)
    directory = lab.home / "credentials"
    directory.mkdir()
    lab.key.rename(directory / "vol")
    lab.environment = {"CREDENTIALS_DIRECTORY": str(directory)}
    with volume.served(unlocked_by=["--credential", "vol"]):
        pass
    lab.environment = {}
    restore = ("restore", volume.mirror, lab.home / "output", "--credential")
    given = {"CREDENTIALS_DIRECTORY": str(directory)}
    lab.lockstep(*restore, "none", environment=given).failed(
        2, "The credential none", "LoadCredentialEncrypted=none:PATH"
    )
    lab.lockstep(*restore, "../key", environment=given).failed(2, "The credential ../key cannot be read")
    lab.lockstep(*restore, "vol").failed(2, "$CREDENTIALS_DIRECTORY is not set")
    lab.lockstep(*restore, "vol", environment=given).ok()
    assert (lab.home / "output").read_bytes() == volume.target.read_bytes()


def test_only_one_way_to_unlock_can_be_given(lab: Lab) -> None:
    lab.lockstep("serve", "vol", "--token-only", "--key-file", lab.key).failed(2, "--key-file and --token-only")
    lab.lockstep("restore", "m", "o", "--credential", "x", "--key-file", "-").failed(2, "--key-file and --credential")
