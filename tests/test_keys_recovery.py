"""Recovery keys: what is printed opens the mirror with stock cryptsetup, and a typo is told from a wrong key."""

import contextlib
import json
import os
import pty
import re
import sqlite3
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.crypto import keyslots, recovery_key
from lockstep.errors import RecoveryKeyMistyped, RecoveryKeyUnknown, WrongPassphrase
from tests.forks import ForkLab
from tests.keys import Keys, opens
from tests.lab import PASSPHRASE, Lab, run, wait_until

GROUPS = r"([bcdefghjknprstvx]{6}-){7}[bcdefghjknprstvx]{6}"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = ForkLab(tmp_path)
    monkeypatch.setenv("PATH", lab.quick_format()["PATH"])
    return lab


def typed(mirror: Path, text: str) -> int:
    """Type a passphrase on a terminal, where stock cryptsetup asks for it; its exit code."""
    pid, terminal = pty.fork()
    if not pid:
        os.execvp("cryptsetup", ["cryptsetup", "open", "--test-passphrase", "--tries=1", str(mirror)])
    said = b""
    while b"Enter passphrase" not in said:
        said += os.read(terminal, 1000)
    # It throws away what was typed before it has switched the echo off.
    wait_until(lambda: not termios.tcgetattr(terminal)[3] & termios.ECHO, "cryptsetup to switch the echo off")
    os.write(terminal, text.encode() + b"\n")
    with contextlib.suppress(OSError):  # EIO at its end; it waits until what it said is read
        while os.read(terminal, 1000):
            pass
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    return code


def test_what_is_printed_opens_the_mirror_and_is_kept_nowhere(lab: Lab) -> None:
    keys = Keys(lab)
    printed = keys("add", "--key-file", lab.key, "--recovery").ok()
    (line,) = [line.strip() for line in printed.splitlines() if re.fullmatch(rf"\s*{GROUPS}\s*", line)]
    assert typed(keys.header, line) == 0
    assert typed(keys.header, line[:-1]) == 2
    assert [(slot["slot"], slot["kind"]) for slot in keys.slots()] == [(0, "passphrase"), (1, "recovery-key")]
    assert "recovery-key" in keys("list").ok()
    again = json.loads(keys("add", "--key-file", "-", "--recovery", "--json", stdin=line.encode()).ok())
    assert re.fullmatch(GROUPS, again["recovery_key"])
    assert opens(keys.header, again["recovery_key"].encode())
    for path in (path for path in lab.home.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert line.encode() not in content, path
        assert again["recovery_key"].encode() not in content, path


def test_a_typo_is_told_from_a_wrong_key(lab: Lab) -> None:
    keys = Keys(lab)
    right, other = recovery_key.new(), recovery_key.new()
    keyslots.add(str(keys.header), PASSPHRASE, right.encode(), iter_time_ms=1, recovery=True)
    typo = ("c" if right[0] != "c" else "d") + right[1:]
    for wrong, fragments in {
        typo: ("looks like a recovery key", "its checksum is wrong", "as it was printed"),
        right + "\n": ("looks like a recovery key", "a new line"),
        right.upper(): ("looks like a recovery key", "a letter that is in none"),
        other: ("typed right, but opens no key slot", "another mirror"),
    }.items():
        keys("change", "--key-file", "-", "--new-key-file", keys.new, stdin=wrong.encode()).failed(1, *fragments)
    assert keyslots.remove(str(keys.header), right.encode(), 0) == 0
    assert opens(keys.header, right.encode())


def test_a_removed_recovery_key_leaves_no_mark(lab: Lab) -> None:
    keys = Keys(lab)
    key = recovery_key.new().encode()
    keyslots.add(str(keys.header), PASSPHRASE, key, iter_time_ms=1, recovery=True)
    assert keyslots.remove(str(keys.header), key) == 1
    metadata = json.loads(run("cryptsetup", "luksDump", "--dump-json-metadata", str(keys.header)))
    assert [token["type"] for token in metadata["tokens"].values()] == ["lockstep"]


def test_a_recovery_key_is_removed_by_what_was_printed(lab: Lab) -> None:
    Keys(lab)
    added = json.loads(lab.lockstep("key", "add", "vol", "--key-file", lab.key, "--recovery", "--json").ok())
    key = added["recovery_key"].encode()
    removed = json.loads(lab.lockstep("key", "remove", "vol", "--key-file", "-", "--json", stdin=key).ok())
    assert (removed["slot"], removed["still_opens"]) == (added["slot"], False)
    lab.lockstep("key", "remove", "vol", "--key-file", "-", stdin=key).failed(1, "is not removed")
    second = lab.lockstep("mirror", "add", "vol", lab.home / "second", "--key-file", "-", stdin=key)
    second.failed(1, "does not open", "another mirror of vol")


def test_a_recovery_key_that_cannot_be_put_into_the_audit_trail_opens_nothing(lab: Lab) -> None:
    keys = Keys(lab)
    with contextlib.closing(sqlite3.connect(lab.state / "registry.db")) as registry:
        when = "BEFORE INSERT ON audit WHEN NEW.event = 'key-added'"
        registry.execute(f"CREATE TRIGGER full {when} BEGIN SELECT RAISE(ABORT, 'no room'); END")
        registry.commit()
    keys("add", "--key-file", lab.key, "--recovery").failed(1, "registry")
    assert [slot["slot"] for slot in keys.slots()] == [0]


def test_a_recovery_key_that_nobody_could_be_told_opens_nothing(lab: Lab) -> None:
    """It would count as one that somebody has, and let the last one be removed that somebody really has."""
    keys = Keys(lab)
    command = [sys.executable, "-m", "lockstep", "--state-dir", str(lab.state), "key", "add", "vol", "--recovery"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*command, "--key-file", str(lab.key)], stdout=full, stderr=subprocess.PIPE, check=False)
    assert b"Standard output cannot be written" in done.stderr
    assert [slot["slot"] for slot in keys.slots()] == [0]
    assert keys.events() == [("key-added", 1), ("key-removed", 1)]


# --- the key itself ---------------------------------------------------------------------------------------


@given(place=st.integers(0, 54), letter=st.sampled_from(recovery_key.ALPHABET))
def test_every_mistyped_letter_is_noticed(place: int, letter: str) -> None:
    key = recovery_key.new()
    assert re.fullmatch(GROUPS, key)
    wrong = key[:place] + letter + key[place + 1 :]
    found = recovery_key.wrong_passphrase("/mirror", wrong.encode())
    assert isinstance(found, RecoveryKeyUnknown if wrong == key else RecoveryKeyMistyped)


@given(st.data())
def test_letters_and_groups_left_out_or_swapped_are_noticed(data: st.DataObject) -> None:
    groups = recovery_key.new().split("-")
    first, second = data.draw(st.lists(st.integers(0, 7), min_size=2, max_size=2, unique=True))
    groups[first], groups[second] = groups[second], groups[first]
    assert isinstance(recovery_key.wrong_passphrase("/mirror", "-".join(groups).encode()), RecoveryKeyMistyped)
    text = recovery_key.new()
    place = data.draw(st.integers(0, len(text) - 1))
    assert isinstance(
        recovery_key.wrong_passphrase("/mirror", (text[:place] + text[place + 1 :]).encode()), RecoveryKeyMistyped
    )


@given(st.binary(max_size=200))
def test_other_passphrases_are_simply_wrong(passphrase: bytes) -> None:
    assert type(recovery_key.wrong_passphrase("/mirror", passphrase)) is WrongPassphrase


def test_recovery_keys_are_random() -> None:
    assert len({recovery_key.new() for _ in range(100)}) == 100


def test_the_documented_example_is_one() -> None:
    (example,) = re.findall(rf"^    ([{recovery_key.ALPHABET}-]{{55}})$", recovery_key.__doc__ or "", re.MULTILINE)
    assert isinstance(recovery_key.wrong_passphrase("/mirror", example.encode()), RecoveryKeyUnknown)
