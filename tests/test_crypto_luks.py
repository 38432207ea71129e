"""Mirrors as LUKS2 volumes: real cryptsetup on plain files, and an independent reader of what we encrypt."""

import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dissect.fve.luks import LUKS
from hypothesis import given
from hypothesis import strategies as st

from lockstep.crypto import cryptsetup as cryptsetup_program
from lockstep.crypto import luks
from lockstep.crypto.cipher import XtsCipher
from lockstep.crypto.luks import Header, Segment, Token, format_mirror, is_luks2, read_header, volume_key, write_token
from lockstep.errors import (
    CryptsetupFailed,
    CryptsetupHung,
    CryptsetupMissing,
    EmptyPassphrase,
    HeaderDamaged,
    HeaderNotCreated,
    HeaderUnreadable,
    LuksError,
    NoKeySlots,
    NotLuks2,
    RekeyUnfinished,
    SegmentUnsupported,
    TokenMalformed,
    TokenTooNew,
    WrongPassphrase,
)
from tests.lab import Lab

# Every byte counts: a zero, a newline in the middle and one at the end, and bytes that are not UTF-8.
PASSPHRASE = b"correct\x00horse\nbattery \xff\xfe staple\n"
MIB = 1024 * 1024
TOKEN = Token("0b6c62b4-2f6e-4e1f-8a54-8f9d5a3f2b11", "datenbank-größe", 2**64 - 1, 7, "in-sync")
CHEAP = ("--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000")  # else cryptsetup measures the machine for seconds
SECONDARY_OFFSET = 0x4000  # cryptsetup's default header size

uint64 = st.integers(0, 2**64 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
tokens = st.builds(Token, text, text, uint64, uint64, text)


class Mirror(NamedTuple):
    device: str
    path: str  # what holds the header
    sector_bytes: int


def make_mirror(directory: Path, *, sector_bytes: int = 512, detached: bool = False) -> Mirror:
    device = directory / "mirror.img"
    header = directory / "mirror.header" if detached else None
    with device.open("wb") as file:
        file.truncate((0 if detached else 16 * MIB) + MIB)
    format_mirror(
        str(device),
        header=str(header) if header else None,
        passphrase=PASSPHRASE,
        sector_bytes=sector_bytes,
        iter_time_ms=10,
        label="lockstep-test",
    )
    return Mirror(str(device), str(header or device), sector_bytes)


class Originals:
    """One formatted mirror of each kind; tests get copies, because formatting takes seconds."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: dict[tuple[int, bool], Mirror] = {}

    def copy_to(self, directory: Path, sector_bytes: int, detached: bool) -> Mirror:
        kind = (sector_bytes, detached)
        if kind not in self._made:
            own = self._directory / f"{sector_bytes}-{detached}"
            own.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PATH", Lab(own).quick_format()["PATH"])
                self._made[kind] = make_mirror(own, sector_bytes=sector_bytes, detached=detached)
        original = self._made[kind]
        copies = [str(shutil.copy2(path, directory)) for path in (original.device, original.path)]
        return Mirror(copies[0], copies[1], sector_bytes)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    return Originals(tmp_path_factory.mktemp("originals"))


@pytest.fixture(
    params=[(512, False), (512, True), (4096, False), (4096, True)],
    ids=lambda kind: f"{kind[0]}-{'detached' if kind[1] else 'inline'}",
)
def mirror(request: pytest.FixtureRequest, originals: Originals, tmp_path: Path) -> Mirror:
    return originals.copy_to(tmp_path, *request.param)


@pytest.fixture
def inline(originals: Originals, tmp_path: Path) -> Mirror:
    return originals.copy_to(tmp_path, 512, detached=False)


def cryptsetup(*arguments: str, stdin: bytes = PASSPHRASE) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["cryptsetup", *arguments], input=stdin, capture_output=True, check=False)


def damage(path: str, offset: int, data: bytes = b"\xa5") -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def fake_cryptsetup(directory: Path, body: str) -> Path:
    """A directory to put first on PATH, with a `cryptsetup` that runs `body` in sh."""
    directory.mkdir()
    program = directory / "cryptsetup"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return directory


# -- formatting and reading -----------------------------------------------------------------------------


def test_a_new_mirror_is_what_the_design_says(mirror: Mirror) -> None:
    detached = mirror.path != mirror.device
    header = read_header(mirror.path)
    uuid = cryptsetup("luksUUID", mirror.path).stdout.decode().strip()
    segment = Segment(0 if detached else 16 * MIB, mirror.sector_bytes, 0, "aes-xts-plain64", None)
    assert header == Header(uuid, "lockstep-test", segment, None, None, (0,))
    assert is_luks2(mirror.path)
    metadata = json.loads(cryptsetup("luksDump", "--dump-json-metadata", mirror.path).stdout)
    assert metadata["keyslots"]["0"]["kdf"]["type"] == "argon2id"
    assert metadata["keyslots"]["0"]["key_size"] == 64
    if detached:
        assert stat.S_IMODE(os.stat(mirror.path).st_mode) == 0o600
        assert os.path.getsize(mirror.path) == 16 * MIB
        assert not is_luks2(mirror.device)


def test_cryptsetup_accepts_the_passphrase_exactly_as_given(mirror: Mirror) -> None:
    arguments = ("open", "--test-passphrase", "--key-file=-", mirror.path)
    assert cryptsetup(*arguments).returncode == 0
    assert cryptsetup(*arguments, stdin=PASSPHRASE.rstrip(b"\n")).returncode == 2


def test_an_independent_reader_decrypts_what_we_encrypted(mirror: Mirror) -> None:
    header = read_header(mirror.path)
    key = volume_key(mirror.path, PASSPHRASE)
    cipher = XtsCipher(key, header.segment.sector_bytes)
    luks.wipe(key)
    assert key == bytes(64)
    plain = os.urandom(64 * 1024)
    position_bytes = 12 * 4096
    encrypted = bytearray(len(plain))
    cipher.encrypt_into(header.segment.iv_offset + position_bytes // 512, plain, encrypted)
    damage(mirror.device, header.segment.offset_bytes + position_bytes, bytes(encrypted))

    with open(mirror.path, "rb") as header_file, open(mirror.device, "rb") as device:
        reader = LUKS(header_file)
        reader.unlock_with_passphrase(PASSPHRASE)
        reader.fh = device  # how this reader takes a detached header: keys from one file, data from another
        stream = reader.open()
        stream.seek(position_bytes)
        assert stream.read(len(plain)) == plain


def test_the_volume_key_is_the_one_that_cryptsetup_stores_in_a_file(inline: Mirror, tmp_path: Path) -> None:
    file = tmp_path / "key"
    arguments = ("luksDump", "--dump-volume-key", "--batch-mode", "--key-file=-", f"--volume-key-file={file}")
    assert cryptsetup(*arguments, inline.path).returncode == 0
    assert volume_key(inline.path, bytearray(PASSPHRASE)) == file.read_bytes()


def test_formatting_again_replaces_the_keys(inline: Mirror, tmp_path: Path) -> None:
    before = (read_header(inline.path).uuid, volume_key(inline.path, PASSPHRASE))
    make_mirror(tmp_path)
    after = (read_header(inline.path).uuid, volume_key(inline.path, PASSPHRASE))
    assert before[0] != after[0]
    assert before[1] != after[1]


# -- the token ------------------------------------------------------------------------------------------


def test_the_token_is_stored_replaced_and_read(mirror: Mirror) -> None:
    write_token(mirror.path, TOKEN, token_id=None)
    header = read_header(mirror.path)
    assert (header.token, header.token_id) == (TOKEN, 0)
    changed = replace(TOKEN, generation=8, state='behind "\\ \u0001')
    write_token(mirror.path, changed, token_id=header.token_id)
    header = read_header(mirror.path)
    assert (header.token, header.token_id) == (changed, 0)
    assert volume_key(mirror.path, PASSPHRASE)


def test_the_layout_of_the_token() -> None:
    assert json.loads(TOKEN.to_json()) == {
        "type": "lockstep",
        "keyslots": [],
        "version": 1,
        "volume_id": "0b6c62b4-2f6e-4e1f-8a54-8f9d5a3f2b11",
        "volume_name": "datenbank-größe",
        "target_size_bytes": "18446744073709551615",
        "generation": "7",
        "state": "in-sync",
    }


@given(tokens)
def test_every_token_survives_json(token: Token) -> None:
    assert Token.from_json(token.to_json()) == token


@given(st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_any_other_text_is_a_clear_error(stored: str) -> None:
    with pytest.raises(TokenMalformed):
        Token.from_json(stored)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"type": "luks2-keyring"}, "type"),
        ({"version": 0}, "version"),
        ({"version": "1"}, "version"),
        ({"version": True}, "version"),
        ({"version": None}, "version"),
        ({"volume_id": ""}, "volume_id is empty"),
        ({"volume_id": 5}, "volume_id is not a string"),
        ({"volume_name": None}, "volume_name"),
        ({"state": ["in-sync"]}, "state"),
        ({"state": "\ud800"}, "surrogates"),
        ({"target_size_bytes": 4096}, "target_size_bytes"),
        ({"target_size_bytes": "-1"}, "target_size_bytes"),
        ({"target_size_bytes": "1_000"}, "target_size_bytes"),
        ({"target_size_bytes": " 1"}, "target_size_bytes"),
        ({"target_size_bytes": "01"}, "target_size_bytes"),
        ({"target_size_bytes": "٣"}, "target_size_bytes"),
        ({"generation": "18446744073709551616"}, "generation"),
        ({"generation": "9" * 10_000}, "generation"),
        ({"generation": ""}, "generation"),
    ],
)
def test_malformed_tokens(changed: dict[str, object], reason: str) -> None:
    with pytest.raises(TokenMalformed, match=reason) as caught:
        Token.from_json(json.dumps(json.loads(TOKEN.to_json()) | changed), path="/dev/mirror")
    assert "/dev/mirror" in str(caught.value)


@pytest.mark.parametrize("missing", ["version", "volume_id", "volume_name", "target_size_bytes", "generation", "state"])
def test_tokens_without_a_member(missing: str) -> None:
    stored = json.loads(TOKEN.to_json())
    del stored[missing]
    with pytest.raises(TokenMalformed, match=missing):
        Token.from_json(json.dumps(stored))


def test_deeply_nested_json_is_malformed() -> None:
    with pytest.raises(TokenMalformed):
        Token.from_json("[" * 200_000)


def test_unknown_members_are_ignored() -> None:
    assert Token.from_json(json.dumps(json.loads(TOKEN.to_json()) | {"colour": "blue"})) == TOKEN


def test_a_newer_token_says_so() -> None:
    with pytest.raises(TokenTooNew) as caught:
        Token.from_json(json.dumps({"type": "lockstep", "version": 2}))
    assert "version 2; this Lockstep knows up to 1" in str(caught.value)


@pytest.mark.parametrize("changed", [{"generation": -1}, {"target_size_bytes": 2**64}, {"volume_id": ""}])
def test_a_token_that_could_not_be_read_back_cannot_be_made(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changed))):
        replace(TOKEN, **changed)


def test_two_tokens_are_refused_and_foreign_ones_ignored(inline: Mirror) -> None:
    foreign = b'{"type": "somebody-else", "keyslots": [], "generation": "99"}'
    assert cryptsetup("token", "import", inline.path, stdin=foreign).returncode == 0
    assert read_header(inline.path).token is None
    write_token(inline.path, TOKEN, token_id=None)
    assert read_header(inline.path).token_id == 1
    write_token(inline.path, TOKEN, token_id=None)
    with pytest.raises(TokenMalformed, match="2 of them"):
        read_header(inline.path)


# -- what can be wrong ----------------------------------------------------------------------------------


def test_a_wrong_passphrase(inline: Mirror) -> None:
    with pytest.raises(WrongPassphrase) as caught:
        volume_key(inline.path, b"guess")
    assert inline.path in str(caught.value)
    assert "guess" not in repr(caught.value) + str(caught.value.__context__)


def test_an_empty_passphrase(tmp_path: Path) -> None:
    with pytest.raises(EmptyPassphrase):
        volume_key(str(tmp_path / "any"), b"")
    header = tmp_path / "header"
    with pytest.raises(EmptyPassphrase):
        format_mirror(
            str(tmp_path / "any"), header=str(header), passphrase=b"", sector_bytes=512, iter_time_ms=10, label=""
        )
    assert not header.exists()


@pytest.mark.parametrize("copy", [0, SECONDARY_OFFSET], ids=["primary", "secondary"])
@pytest.mark.parametrize("where", [0, 168, 4096 + 100], ids=["magic", "uuid", "json"])
def test_one_damaged_copy_of_the_header_is_survived(inline: Mirror, copy: int, where: int) -> None:
    write_token(inline.path, TOKEN, token_id=None)
    before = read_header(inline.path)
    damage(inline.path, copy + where)
    assert is_luks2(inline.path)
    assert read_header(inline.path) == before
    damage(inline.path, copy + where)
    assert volume_key(inline.path, PASSPHRASE)


def test_both_copies_damaged(inline: Mirror) -> None:
    for copy in (0, SECONDARY_OFFSET):
        damage(inline.path, copy + 4096 + 100)
    assert is_luks2(inline.path)
    for attempt in (
        lambda: read_header(inline.path),
        lambda: volume_key(inline.path, PASSPHRASE),
        lambda: write_token(inline.path, TOKEN, token_id=None),
    ):
        with pytest.raises(HeaderDamaged):
            attempt()


def test_erased_key_slots(inline: Mirror) -> None:
    assert cryptsetup("erase", "--batch-mode", inline.path).returncode == 0
    assert read_header(inline.path).keyslots == ()
    with pytest.raises(NoKeySlots):
        volume_key(inline.path, PASSPHRASE)


@pytest.mark.parametrize("content", [b"", b"LUKS", bytes(8 * MIB), b"\xa5" * MIB], ids=["empty", "short", "0", "a5"])
def test_no_luks2_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "disk"
    path.write_bytes(content)
    assert not is_luks2(str(path))
    for attempt in (
        lambda: read_header(str(path)),
        lambda: volume_key(str(path), PASSPHRASE),
        lambda: write_token(str(path), TOKEN, token_id=None),
    ):
        with pytest.raises(NotLuks2):
            attempt()
    assert path.read_bytes() == content


def test_luks1_is_not_luks2_even_over_an_old_luks2_header(inline: Mirror) -> None:
    secondary = Path(inline.path).read_bytes()[SECONDARY_OFFSET : 2 * SECONDARY_OFFSET]
    arguments = ("luksFormat", "--type=luks1", "--batch-mode", *CHEAP, "--key-file=-")
    assert cryptsetup(*arguments, inline.path).returncode == 0
    damage(inline.path, SECONDARY_OFFSET, secondary)
    assert not is_luks2(inline.path)
    with pytest.raises(NotLuks2):
        read_header(inline.path)


def test_a_header_inside_the_data_is_no_header(inline: Mirror, tmp_path: Path) -> None:
    """A copy names its own place, so an image stored a little further on is only data."""
    shifted = tmp_path / "shifted"
    shifted.write_bytes(bytes(SECONDARY_OFFSET) + Path(inline.path).read_bytes()[: 2 * SECONDARY_OFFSET])
    assert not is_luks2(str(shifted))


def test_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    for attempt in (is_luks2, read_header):
        with pytest.raises(HeaderUnreadable, match="No such file or directory"):
            attempt(str(tmp_path / "nowhere"))


def test_a_started_reencryption_is_refused(inline: Mirror) -> None:
    with open(inline.path, "r+b") as file:
        file.truncate(18 * MIB)
    arguments = ("reencrypt", "--init-only", "--batch-mode", *CHEAP, "--key-file=-")
    result = cryptsetup(*arguments, inline.path)
    assert result.returncode == 0, result.stderr
    with pytest.raises(RekeyUnfinished, match="is not finished"):
        read_header(inline.path)


def test_another_cipher_is_refused(inline: Mirror) -> None:
    arguments = ("luksFormat", "--cipher=aes-cbc-essiv:sha256", "--batch-mode", *CHEAP, "--key-file=-")
    assert cryptsetup(*arguments, "--key-size=256", inline.path).returncode == 0
    with pytest.raises(SegmentUnsupported, match="aes-cbc-essiv:sha256"):
        read_header(inline.path)


SEGMENT = {
    "type": "crypt",
    "offset": "0",
    "size": "512",
    "iv_tweak": "8",
    "encryption": "aes-xts-plain64",
    "sector_size": 512,
}


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"segments": {}}, "0 segments"),
        ({"segments": {"0": SEGMENT, "1": SEGMENT}}, "2 segments"),
        ({"segments": {"0": SEGMENT | {"type": "linear"}}}, "linear"),
        ({"segments": {"0": SEGMENT | {"integrity": {"type": "hmac(sha256)"}}}}, "integrity"),
        ({"segments": {"0": SEGMENT | {"sector_size": 65536}}}, "65536"),
        ({"segments": {"0": SEGMENT}, "config": {"requirements": {"mandatory": ["inline-hw-opal"]}}}, "inline-hw-opal"),
    ],
)
def test_segments_that_cannot_be_served(
    inline: Mirror, metadata: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = tmp_path / "dump"
    dump.write_text(json.dumps({"config": {}, "tokens": {}, "keyslots": {}} | metadata))
    monkeypatch.setenv("PATH", f"{fake_cryptsetup(tmp_path / 'bin', f'cat {dump}')}:{os.environ['PATH']}")
    with pytest.raises(SegmentUnsupported, match=reason):
        read_header(inline.path)
    dump.write_text(json.dumps({"config": {}, "tokens": {}, "keyslots": {}, "segments": {"0": SEGMENT}}))
    assert read_header(inline.path).segment == Segment(0, 512, 8, "aes-xts-plain64", 512)
    for nonsense in ("", "[]", "{}", '{"config": {}, "segments": {"0": 5}}'):
        dump.write_text(nonsense)
        with pytest.raises(HeaderDamaged, match="makes no sense"):
            read_header(inline.path)


def test_a_failed_format_leaves_no_header_file(tmp_path: Path) -> None:
    header = tmp_path / "header"
    with pytest.raises(CryptsetupFailed, match="nowhere"):
        format_mirror(
            str(tmp_path / "nowhere"),
            header=str(header),
            passphrase=PASSPHRASE,
            sector_bytes=512,
            iter_time_ms=10,
            label="",
        )
    assert not header.exists()
    with pytest.raises(HeaderNotCreated, match="No such file"):
        format_mirror(
            str(tmp_path / "nowhere"),
            header=str(tmp_path / "no" / "header"),
            passphrase=PASSPHRASE,
            sector_bytes=512,
            iter_time_ms=10,
            label="",
        )


# -- the program ----------------------------------------------------------------------------------------


def test_no_cryptsetup_says_what_to_install(inline: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(CryptsetupMissing) as caught:
        read_header(inline.path)
    assert "apt install cryptsetup-bin" in caught.value.advice
    assert "dnf install cryptsetup" in caught.value.advice


def test_a_program_that_hangs_is_ended(inline: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cryptsetup_program, "TIMEOUT_S", 0.2)
    monkeypatch.setenv("PATH", f"{fake_cryptsetup(tmp_path / 'bin', 'exec sleep 60')}:{os.environ['PATH']}")
    with pytest.raises(CryptsetupHung):
        volume_key(inline.path, PASSPHRASE)


@pytest.mark.parametrize(
    "output",
    ["", "nothing", "MK dump: 00 11", "MK dump: " + "zz " * 64, "MK dump: " + "00 " * 65, "MK dump: " + "0" * 4087],
)
def test_a_key_dump_that_is_not_understood(
    inline: Mirror, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"cat >/dev/null; printf '%s' '{output}'"
    monkeypatch.setenv("PATH", f"{fake_cryptsetup(tmp_path / 'bin', body)}:{os.environ['PATH']}")
    with pytest.raises(CryptsetupFailed, match="not understood") as caught:
        volume_key(inline.path, PASSPHRASE)
    assert "00" not in str(caught.value.data["reason"])


def test_secrets_are_in_no_argument_and_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run(["which", "cryptsetup"], capture_output=True, text=True, check=True).stdout.strip()
    record = tmp_path / "record"
    recorder = tmp_path / "recorder.py"
    recorder.write_text(
        "import os, sys\n"
        f"with open({str(record)!r}, 'ab') as file:\n"
        "    file.write(repr(sys.argv[1:]).encode() + b'\\n' + repr(dict(os.environ)).encode() + b'\\n')\n"
        f"os.execv({real!r}, ['cryptsetup', *sys.argv[1:]])\n"
    )
    directory = fake_cryptsetup(tmp_path / "bin", f'exec {sys.executable} -S {recorder} "$@"')
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    passphrase = b"a-very-recognisable-passphrase"
    device, header = tmp_path / "disk", str(tmp_path / "header")
    device.write_bytes(bytes(MIB))
    format_mirror(str(device), header=header, passphrase=passphrase, sector_bytes=512, iter_time_ms=10, label="x")
    write_token(header, TOKEN, token_id=None)
    key = volume_key(header, passphrase)
    with pytest.raises(LuksError):
        volume_key(header, b"another-" + passphrase)
    seen = record.read_bytes()
    assert seen.count(b"luksDump") >= 3
    assert b"luksFormat" in seen
    assert b"'LC_ALL': 'C'" in seen
    assert b"recognisable" not in seen
    assert key.hex().encode() not in seen.replace(b" ", b"")
    assert repr(bytes(key)).encode() not in seen
