"""key add, remove, change, list: what opens a mirror afterwards, as cryptsetup sees it, and what is refused."""

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep.crypto import keyslots, luks
from lockstep.errors import KeySlotsFull, LastKeySlot, NoKeySlots, NotManager, WrongPassphrase
from lockstep.nbd.identity import account
from lockstep.registry.audit import Actor
from lockstep.service import headers, keys
from lockstep.service.state import State
from tests.forks import ForkLab
from tests.keys import NEW, Keys, opens
from tests.lab import MIB, PASSPHRASE, Lab, needs, run

ME = account(os.geteuid())


def trail(lab: Lab) -> list[str]:
    """What the audit trail says of keys, without the mirror's path."""
    rows = map(json.loads, lab.lockstep("audit", "vol", "--json").ok().splitlines())
    return [row["reason"].rpartition(" ")[0] for row in rows if row["event"].startswith("key-")]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = ForkLab(tmp_path)
    monkeypatch.setenv("PATH", lab.quick_format()["PATH"])
    return lab


@pytest.mark.parametrize("header", [False, True], ids=["inline", "detached"])
def test_passphrases_come_change_and_go(lab: Lab, header: bool) -> None:
    key = Keys(lab, header=header)
    added = json.loads(key("add", "--key-file", "-", "--new-key-file", key.new, "--json", stdin=PASSPHRASE).ok())
    assert added["slot"] == 1
    assert opens(key.header, NEW)
    assert opens(key.header, PASSPHRASE)

    changed = json.loads(key("change", "--key-file", key.new, "--new-key-file", "-", "--json", stdin=b"3rd").ok())
    assert (changed["old_slot"], changed["slot"]) == (1, 2)
    assert [opens(key.header, each) for each in (PASSPHRASE, NEW, b"3rd")] == [True, False, True]

    key("remove", "--key-file", key.new).failed(1, "No key slot", "removed or changed")
    assert "Removed key slot 0" in key("remove", "--key-file", lab.key).ok()
    assert not opens(key.header, PASSPHRASE)
    before = key.header.read_bytes()
    key("remove", "--key-file", "-", stdin=b"3rd").failed(1, "The last key slot", "lockstep key add")
    assert key.header.read_bytes() == before
    slot = {"slot": 2, "kind": "passphrase", "tokens": [], "kdf": "argon2id"}
    assert key.slots() == [slot | {"cost": {"iterations": 4, "memory_kib": 32, "threads": 1}}]
    assert key.events() == [("key-added", 1), ("key-changed", 2), ("key-removed", 0)]
    registry = (lab.state / "registry.db").read_bytes()
    assert not any(secret in registry for secret in (PASSPHRASE, NEW, b"3rd"))


def test_a_slot_is_removed_with_the_passphrase_of_another(lab: Lab) -> None:
    key = Keys(lab)
    slot = keyslots.add(str(key.header), PASSPHRASE, NEW, iter_time_ms=1)
    before = key.header.read_bytes()
    key("remove", "--slot", 0, "--key-file", lab.key).failed(1, "Key slot 0", "the passphrase opens no other slot")
    key("remove", "--slot", slot, "--key-file", "-", stdin=b"wrong").failed(1, "opens no other slot")
    key("remove", "--slot", 7, "--key-file", lab.key).failed(1, "has no key slot 7", "lockstep key list")
    assert key.header.read_bytes() == before
    key("remove", "--slot", slot, "--key-file", lab.key).ok()
    assert not opens(key.header, NEW)


def test_a_passphrase_in_two_slots_is_told_of(lab: Lab) -> None:
    key = Keys(lab)
    keyslots.add(str(key.header), PASSPHRASE, PASSPHRASE, iter_time_ms=1)
    keyslots.add(str(key.header), PASSPHRASE, NEW, iter_time_ms=1)
    assert "opens another key slot too" in key("remove", "--key-file", lab.key).ok()
    assert opens(key.header, PASSPHRASE)


def test_a_passphrase_in_two_slots_that_is_changed_is_told_of(lab: Lab) -> None:
    """As somebody has one who added it again, not knowing whether that was done when it was killed."""
    key = Keys(lab)
    change = functools.partial(key, "change", "--key-file", key.new, "--new-key-file", "-", "--json")
    for _ in range(2):
        keyslots.add(str(key.header), PASSPHRASE, NEW, iter_time_ms=1)
    assert json.loads(change(stdin=b"3rd").ok())["still_opens"]
    assert opens(key.header, NEW)
    assert not json.loads(change(stdin=b"4th").ok())["still_opens"]
    assert not opens(key.header, NEW)
    keyslots.add(str(key.header), PASSPHRASE, PASSPHRASE, iter_time_ms=1)
    said = key("change", "--key-file", lab.key, "--new-key-file", key.new).ok()
    assert "The old one opens another key slot too" in said


def test_a_wrong_passphrase_changes_nothing(lab: Lab) -> None:
    key = Keys(lab)
    before = key.header.read_bytes()
    wrong = ("--key-file", "-")
    key("add", *wrong, "--new-key-file", key.new, stdin=b"wrong").failed(1, "No key slot", "lockstep key list")
    key("change", *wrong, "--new-key-file", key.new, stdin=b"wrong").failed(1, "No key slot")
    key("add", *wrong, "--recovery", stdin=b"").failed(1, "The passphrase is empty")
    key("add", "--key-file", lab.key, "--new-key-file", "-", stdin=b"").failed(1, "The passphrase is empty")
    key("add", *wrong, "--new-key-file", "-", stdin=b"x").failed(2, "cannot be given together")
    key("add", *wrong, "--new-key-file", key.new, "--recovery", stdin=b"x").failed(2, "--recovery and --new-key-file")
    assert key.header.read_bytes() == before
    assert key.events() == []
    assert trail(lab)[:2] == [f"{ME} began to add a key to the mirror", f"{ME} did not change a key of the mirror"]


def test_one_of_several_mirrors_must_be_named(lab: Lab) -> None:
    key = Keys(lab)
    other = lab.home / "other.mirror"
    with State(str(lab.state)).registry() as registry:
        registry.add_mirror("vol", path=str(other), luks_uuid="other", actor=Actor("root", "test"))
    key("add", "--key-file", lab.key, "--recovery").failed(2, "several mirrors", str(other), "--mirror PATH")
    key("list", "--mirror", lab.home / "none").failed(1, "No mirror")
    key("add", "--mirror", key.volume.mirror, "--key-file", lab.key, "--recovery").ok()


def test_a_volume_without_a_mirror_has_no_keys(lab: Lab) -> None:
    lab.lockstep("create", "bare", "--target", lab.disk("target", MIB)).ok()
    for command in (["key", "list", "bare"], ["header", "backup", "bare", lab.home / "out"]):
        lab.lockstep(*command).failed(1, "The volume bare has no mirror")


def test_another_disk_in_the_mirrors_place_keeps_its_keys(lab: Lab) -> None:
    key = Keys(lab)
    other = lab.volume("other", MIB)
    other.mirror.replace(key.volume.mirror)
    before = key.header.read_bytes()
    key("add", "--key-file", lab.key, "--new-key-file", key.new).failed(1, "is not the mirror of vol")
    assert key.header.read_bytes() == before


@needs(root=True)
def test_only_managers_may() -> None:
    with tempfile.TemporaryDirectory(prefix="lockstep-keys-") as home:
        os.chmod(home, 0o755)  # pytest's own directories let nobody else in
        state = State(home)
        commands: list[Callable[[], object]] = [
            lambda: keys.list_keys(state, "vol", None),
            lambda: keys.add_key(state, "vol", None, never, never, None),
            lambda: keys.add_recovery_key(state, "vol", None, never, None, tell=lambda _: None),
            lambda: keys.remove_key(state, "vol", None, never, None),
            lambda: keys.change_key(state, "vol", None, never, never, None),
            lambda: headers.back_up_header(state, "vol", None, "output", force=False),
            lambda: headers.restore_header(state, "vol", None, "backup", force=False),
            state.registry,
        ]
        pid = os.fork()
        if not pid:
            refused = 0
            with contextlib.suppress(BaseException):
                os.setuid(65534)
                for command in commands:
                    with pytest.raises(NotManager):
                        command()
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == len(commands)


def never() -> bytes:
    raise AssertionError("whoever may not manage the volume was asked for a passphrase")


# --- the slots themselves ---------------------------------------------------------------------------------


@pytest.fixture
def mirror(lab: Lab) -> Path:
    return lab.volume(size_bytes=MIB).mirror


def test_full_and_empty_headers(mirror: Path) -> None:
    path = str(mirror)
    for number in range(1, 32):
        assert keyslots.add(path, PASSPHRASE, b"%d" % number, iter_time_ms=1) == number
    before = mirror.read_bytes()
    with pytest.raises(KeySlotsFull, match="32"):
        keyslots.add(path, PASSPHRASE, NEW, iter_time_ms=1)
    with pytest.raises(KeySlotsFull):
        keyslots.change(path, PASSPHRASE, NEW, iter_time_ms=1)
    assert mirror.read_bytes() == before
    run("cryptsetup", "erase", "--batch-mode", path)
    with pytest.raises(NoKeySlots):
        keyslots.add(path, PASSPHRASE, NEW, iter_time_ms=1)
    with pytest.raises(NoKeySlots):
        keyslots.remove(path, PASSPHRASE)


def test_a_slot_that_only_a_token_opens_is_not_the_last_one(mirror: Path) -> None:
    path = str(mirror)
    slot = keyslots.add(path, PASSPHRASE, b"what a Tang server tells", iter_time_ms=1)
    token = json.dumps({"type": "clevis", "keyslots": [str(slot)]})
    run("cryptsetup", "token", "import", "--json-file=-", path, stdin=token.encode())
    assert [each.kind for each in keyslots.read(path)] == ["passphrase", "token"]
    with pytest.raises(LastKeySlot):
        keyslots.remove(path, PASSPHRASE)
    assert keyslots.remove(path, PASSPHRASE, slot) == slot


def test_a_slot_with_another_key_than_the_datas_is_not_the_last_one(lab: Lab, mirror: Path) -> None:
    """As a re-keying leaves one, under the same passphrase, that was killed when it had just begun."""
    path = str(mirror)
    options = ("--unbound", "--key-size=512", "--batch-mode", f"--key-file={lab.key}")
    run("cryptsetup", "luksAddKey", *options, path, str(lab.key))
    assert [each.kind for each in keyslots.read(path)] == ["passphrase", "unbound"]
    for slot in (None, 0):
        with pytest.raises(LastKeySlot):
            keyslots.remove(path, PASSPHRASE, slot)
    assert opens(mirror, PASSPHRASE)
    lab.lockstep("key", "remove", "vol", "--key-file", "-", stdin=b"wrong").failed(1, "is not removed")
    with pytest.raises(WrongPassphrase):
        keyslots.require_opened_by(path, b"wrong")
    with pytest.raises(WrongPassphrase):
        luks.volume_key(path, b"wrong")
    assert keyslots.remove(path, PASSPHRASE, 1) == 1


KILLED = """#!/bin/sh
if [ "$1" = {command} ] && [ {when} = before ]; then kill -9 $PPID; exit 1; fi
"{quick}" "$@"
code=$?
if [ "$1" = {command} ]; then kill -9 $PPID; fi
exit $code
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("command", ["luksAddKey", "luksKillSlot"])
def test_whenever_a_change_is_killed_a_passphrase_opens(lab: Lab, mirror: Path, command: str, when: str) -> None:
    program = lab.home / "killing" / "cryptsetup"
    program.parent.mkdir()
    program.write_text(KILLED.format(command=command, when=when, quick=lab.home / "bin" / "cryptsetup"))
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:{lab.quick_format()['PATH']}"}
    options = ("--key-file", lab.key, "--new-key-file", "-")
    assert lab.lockstep("key", "change", "vol", *options, stdin=NEW, environment=environment).code == -9
    added, removed = (command, when) != ("luksAddKey", "before"), (command, when) == ("luksKillSlot", "after")
    assert (opens(mirror, PASSPHRASE), opens(mirror, NEW)) == (not removed, added)
    assert trail(lab) == [f"{ME} began to change a key of the mirror"]


@pytest.mark.parametrize("slot", [(), ("--slot", 1)], ids=["its-own", "a-slot"])
def test_a_key_that_was_taken_away_is_on_record_whatever_happens(lab: Lab, slot: tuple[object, ...]) -> None:
    key, backup = Keys(lab, header=True), lab.home / "backup"
    key("add", "--key-file", lab.key, "--new-key-file", key.new).ok()
    lab.lockstep("header", "backup", "vol", backup).ok()
    status = functools.partial(lab.lockstep, "status", "vol")
    assert "older than its keys" not in status().ok()
    key("remove", "--key-file", "-", *slot, stdin=b"wrong").failed(1)
    assert "older than its keys" not in status().ok()
    program = lab.home / "killing" / "cryptsetup"
    program.parent.mkdir()
    command = "luksKillSlot" if slot else "luksRemoveKey"
    program.write_text(KILLED.format(command=command, when="after", quick=lab.home / "bin" / "cryptsetup"))
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:{lab.quick_format()['PATH']}"}
    passphrase = lab.key if slot else key.new
    assert lab.lockstep("key", "remove", "vol", "--key-file", passphrase, *slot, environment=environment).code == -9
    assert not opens(key.header, NEW)
    assert trail(lab)[-1] == f"{ME} began to remove a key from the mirror"
    assert "older than its keys" in status().ok()
