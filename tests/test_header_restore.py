"""Copies of a mirror's header: what they bring back, what is refused, and that no old header makes a mirror in sync."""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.crypto import keyslots, luks
from lockstep.errors import BackupKeyFormer, BackupOfAnother, MirrorIncomplete
from tests.forks import ForkLab
from tests.keys import NEW, Keys, opens
from tests.lab import MIB, PASSPHRASE, Lab, Storage, Volume, needs, run
from tests.test_service_refusals import assert_error


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = ForkLab(tmp_path)
    monkeypatch.setenv("PATH", lab.quick_format()["PATH"])
    return lab


def header_of(volume: Volume) -> Path:
    return volume.header or volume.mirror


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def damage_first(path: Path) -> None:
    overwrite(path, 512, b"\xa5" * 512)


def damage_both(path: Path) -> None:
    overwrite(path, 512, b"\xa5" * 512)
    overwrite(path, 16384 + 512, b"\xa5" * 512)


def wipe(path: Path) -> None:
    overwrite(path, 0, bytes(MIB))


def state_of(volume: Volume) -> tuple[int, str]:
    token = luks.read_header(str(header_of(volume))).token
    assert token is not None
    return token.generation, token.state


# --- the header's two copies, and the copy elsewhere -------------------------------------------------------


def test_a_damaged_first_copy_is_mended_from_the_second(lab: Lab) -> None:
    volume = lab.volume(size_bytes=MIB)
    damage_first(volume.mirror)
    keys = Keys.of(volume)
    keys("add", "--key-file", lab.key, "--new-key-file", keys.new).ok()
    with volume.served():
        pass
    volume.assert_equal_disks()


@pytest.mark.parametrize("damage", [damage_both, wipe], ids=["damaged", "wiped"])
@pytest.mark.parametrize("header", [False, True], ids=["inline", "detached"])
def test_a_lost_header_comes_back_and_everything_is_copied(
    lab: Lab, header: bool, damage: Callable[[Path], None]
) -> None:
    volume = lab.volume(size_bytes=2 * MIB, content=b"before".ljust(512) * 512, header=header)
    with volume.served() as served:
        lab.lockstep("header", "backup", "vol", lab.home / "copy").ok()
        run("qemu-io", "-f", "raw", "-c", "write -P 9 0 1M", served.uri)
    data_at = 0 if header else 16 * MIB
    good = volume.mirror.read_bytes()[data_at:]
    overwrite(volume.mirror, data_at + MIB, b"\xee" * 65536)  # what no bitmap knows of: only a full copy repairs it
    damage(header_of(volume))

    lab.lockstep("serve", "vol", "--key-file", lab.key).failed(1, "lockstep header restore NAME BACKUP")
    restored = json.loads(lab.lockstep("header", "restore", "vol", lab.home / "copy", "--json").ok())
    assert (restored["compared"], restored["state"]) == (False, "syncing")
    (mirror,) = json.loads(lab.lockstep("status", "vol", "--json").ok())["volumes"][0]["mirrors"]
    assert (mirror["state"], mirror["dirty_bytes"]) == ("behind", 2 * MIB)
    volume.restore(lab.home / "output").failed(1, "syncing")
    with volume.served():
        pass
    assert volume.mirror.read_bytes()[data_at:] == good
    volume.assert_equal_disks()


def test_a_header_file_that_is_gone_is_made_again(lab: Lab) -> None:
    volume = lab.volume(size_bytes=MIB, header=True)
    assert volume.header is not None
    lab.lockstep("header", "backup", "vol", lab.home / "copy").ok()
    volume.header.unlink()
    lab.lockstep("key", "list", "vol").failed(1, "cannot be read", "lockstep header restore NAME BACKUP")
    lab.lockstep("header", "restore", "vol", lab.home / "copy").ok()
    assert opens(volume.header, PASSPHRASE)
    assert volume.header.stat().st_mode & 0o777 == 0o600


def test_a_copy_serves_as_the_header_of_a_restore(lab: Lab) -> None:
    """Without a registry, on another machine, and for an inline header as well."""
    volume = lab.volume(size_bytes=MIB, content=b"content".ljust(512) * 64)
    with volume.served():
        pass
    lab.lockstep("header", "backup", "vol", lab.home / "copy").ok()
    wipe(volume.mirror)
    output = ("restore", volume.mirror, lab.home / "output", "--key-file", lab.key)
    lab.lockstep(*output).failed(1, "no LUKS2 header")
    lab.lockstep(*output, "--header", lab.home / "copy").ok()
    assert (lab.home / "output").read_bytes() == volume.target.read_bytes()


def test_a_copy_is_believed_no_state_where_the_mirror_tells_its_own(lab: Lab) -> None:
    """The copy is from a day on which it was in sync; since then it misses something."""
    volume = lab.volume(size_bytes=MIB)
    with volume.served():
        pass
    copy, home = lab.home / "copy", lab.home
    lab.lockstep("header", "backup", "vol", copy).ok()
    header = luks.read_header(str(volume.mirror))
    assert header.token is not None
    luks.write_token(str(volume.mirror), replace(header.token, state="syncing"), token_id=header.token_id)
    before = sorted(home.iterdir())
    overlay = home / "overlay"
    overlay.touch()
    for command in (("restore", volume.mirror), ("open", volume.mirror), ("commit", volume.mirror, overlay)):
        outputs = [] if command[0] == "open" else [home / "output"]
        refused = lab.lockstep(*command, *outputs, "--header", copy, "--key-file", lab.key)
        assert_error(refused, MirrorIncomplete(path=volume.mirror, state="syncing"))
    overlay.unlink()
    assert sorted(home.iterdir()) == before
    volume.restore(home / "output", "--header", copy, "--incomplete").ok()
    wipe(volume.mirror)
    done = volume.restore(home / "later", "--header", copy)
    assert done.ok()
    assert "the day on which it was made" in done.err


def test_a_header_of_another_mirror_gives_no_noise(lab: Lab) -> None:
    volume, other = lab.volume("vol", MIB), lab.volume("other", MIB)
    detached = lab.volume("detached", MIB, header=True)
    for each in (volume, other, detached):
        each.copy_by_hand()
    copy, before = lab.home / "copy", volume.mirror.read_bytes()
    lab.lockstep("header", "backup", "other", copy).ok()
    uuids = [luks.read_uuid(str(header_of(each))) for each in (volume, other, detached)]
    for header, uuid in ((copy, uuids[1]), (detached.header, uuids[2])):
        reason = f"it has the LUKS UUID {uuid}, not {uuids[0]}"
        expected = BackupOfAnother(backup=header, path=volume.mirror, reason=reason)
        assert_error(volume.restore(lab.home / "output", "--header", header), expected)
    lab.lockstep("header", "backup", "vol", lab.home / "old").ok()
    lab.lockstep("key", "rekey", "vol", "--key-file", lab.key).ok()
    expected = BackupOfAnother(backup=lab.home / "old", path=volume.mirror, reason="it holds another volume key")
    assert_error(volume.restore(lab.home / "output", "--header", lab.home / "old"), expected)
    assert not (lab.home / "output").exists()
    volume.mirror.write_bytes(before)
    volume.restore(lab.home / "output", "--header", lab.home / "old").ok()
    assert (lab.home / "output").read_bytes() == volume.target.read_bytes()


# --- an older header over a sound one ---------------------------------------------------------------------


def test_other_passphrases_take_force_and_the_state_stays_true(lab: Lab) -> None:
    volume = lab.volume(size_bytes=MIB)
    lab.lockstep("header", "backup", "vol", lab.home / "copy").ok()
    with volume.served():
        pass
    keyslots.change(str(volume.mirror), PASSPHRASE, NEW, iter_time_ms=1)
    before, (generation, state) = volume.mirror.read_bytes(), state_of(volume)
    restore = ("header", "restore", "vol", lab.home / "copy")
    lab.lockstep(*restore).failed(1, "key slot 0 would come back, key slot 1 would be lost", "--force")
    assert volume.mirror.read_bytes() == before
    assert "Key slots that came back with it: 0" in lab.lockstep(*restore, "--force").ok()
    assert (opens(volume.mirror, PASSPHRASE), opens(volume.mirror, NEW)) == (True, False)
    assert state == "in-sync"
    assert state_of(volume)[0] > generation
    assert state_of(volume)[1] == state, "the data is what it was, so a restore gives it back"
    volume.restore(lab.home / "output").ok()
    assert (lab.home / "output").read_bytes() == volume.target.read_bytes()
    (mirror,) = json.loads(lab.lockstep("status", "vol", "--json").ok())["volumes"][0]["mirrors"]
    assert (mirror["state"], mirror["dirty_bytes"]) == ("behind", MIB)


def test_a_key_slot_of_no_data_does_not_make_a_copy_one_of_another_key(lab: Lab) -> None:
    """As a re-keying leaves one that was killed when it had just begun, in the header or in a copy."""
    volume = lab.volume(size_bytes=MIB)
    with volume.served():
        pass
    clean, other = lab.home / "clean", lab.home / "other"
    lab.lockstep("header", "backup", "vol", clean).ok()
    options = ("--unbound", "--key-size=512", "--batch-mode", f"--key-file={lab.key}")
    run("cryptsetup", "luksAddKey", *options, str(volume.mirror), str(lab.key))
    lab.lockstep("header", "backup", "vol", other).ok()
    for copy in (clean, other):
        lab.lockstep(
            "restore", volume.mirror, lab.home / f"{copy.name}-data", "--header", copy, "--key-file", lab.key
        ).ok()
    lab.lockstep("header", "restore", "vol", clean).failed(1, "key slot 1 would be lost", "--force")
    lab.lockstep("header", "restore", "vol", clean, "--force").ok()
    lab.lockstep("header", "restore", "vol", other, "--force").ok()
    assert len(luks.read_header(str(volume.mirror)).keyslots) == 2


CRYPTSETUP_THAT_FAILS = """#!/bin/sh
case "$*" in *--dump-json-metadata*{path}) {fails};; esac
exec {real} "$@"
"""


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        ("kill -9 $$", "its exit code was -9"),
        ("echo 'Failed to acquire read lock; it is not a valid LUKS device.' >&2; exit 5", "acquire read lock"),
        ("echo '--dump-json-metadata: unknown option' >&2; exit 1", "unknown option"),
    ],
    ids=["killed", "no lock", "too old"],
)
def test_a_cryptsetup_that_fails_is_no_damaged_header(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, fails: str, says: str
) -> None:
    """Least of all one that a copy with other passphrases may take the place of."""
    volume = lab.volume(size_bytes=MIB)
    with volume.served():
        pass
    lab.lockstep("header", "backup", "vol", lab.home / "copy").ok()
    keyslots.change(str(volume.mirror), PASSPHRASE, NEW, iter_time_ms=1)
    before = volume.mirror.read_bytes()
    program = lab.home / "failing" / "cryptsetup"
    program.parent.mkdir()
    real = shutil.which("cryptsetup")
    program.write_text(CRYPTSETUP_THAT_FAILS.format(path=volume.mirror, fails=fails, real=real))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for done in (lab.lockstep("header", "restore", "vol", lab.home / "copy"), volume.restore(lab.home / "output")):
        assert "is damaged" not in done.failed(1, "cryptsetup could not read the header of", says)
    assert volume.mirror.read_bytes() == before


def test_what_is_not_a_copy_of_this_header_is_refused(lab: Lab) -> None:
    volume = lab.volume("vol", MIB)
    lab.volume("other", MIB)
    home = lab.home
    lab.lockstep("header", "backup", "other", home / "others").ok()
    lab.lockstep("header", "backup", "vol", home / "damaged").ok()
    (home / "damaged").chmod(0o600)
    damage_both(home / "damaged")
    run("cryptsetup", "luksHeaderBackup", str(volume.mirror), "--header-backup-file", str(home / "rekeyed"))
    (home / "rekeyed").chmod(0o600)
    uuid = run("cryptsetup", "luksUUID", str(volume.mirror)).strip()
    token = run("cryptsetup", "token", "export", "--token-id=0", str(volume.mirror))
    options = ["--batch-mode", f"--uuid={uuid}", "--key-file", str(lab.key), "--sector-size=512"]
    run("cryptsetup", "luksFormat", *options, str(home / "rekeyed"))
    run("cryptsetup", "token", "import", "--json-file=-", str(home / "rekeyed"), stdin=token.encode())
    before = volume.mirror.read_bytes()
    for backup, fragments in {
        "others": ("is not a backup of the header", "it has the LUKS UUID"),
        "damaged": ("There is no header backup in", "is damaged"),
        "nothing": ("There is no header backup in", "No such file"),
        "rekeyed": ("is not a backup of the header", "another volume key"),
    }.items():
        lab.lockstep("header", "restore", "vol", home / backup, "--force").failed(1, *fragments)
    assert volume.mirror.read_bytes() == before


def test_another_disk_in_the_mirrors_place_keeps_its_header(lab: Lab) -> None:
    volume, other = lab.volume("vol", MIB), lab.volume("other", MIB)
    lab.lockstep("header", "backup", "vol", lab.home / "copy").ok()
    other.mirror.replace(volume.mirror)
    before = volume.mirror.read_bytes()
    lab.lockstep("header", "restore", "vol", lab.home / "copy", "--force").failed(1, "is not the mirror of vol")
    assert volume.mirror.read_bytes() == before
    volume.mirror.write_bytes(bytes(17 * MIB))
    run("mkfs.ext4", "-q", str(volume.mirror))
    before = volume.mirror.read_bytes()
    lab.lockstep("header", "restore", "vol", lab.home / "copy").failed(1, "ext4 file system", "--force")
    assert volume.mirror.read_bytes() == before
    lab.lockstep("header", "restore", "vol", lab.home / "copy", "--force").ok()


@pytest.mark.parametrize("kind", ["luks1", "the data of a mirror with a detached header"])
def test_another_disk_whose_content_is_no_file_system_is_kept_as_well(lab: Lab, kind: str) -> None:
    volume = lab.volume("vol", MIB)
    lab.lockstep("header", "backup", "vol", lab.home / "copy").ok()
    volume.mirror.write_bytes(random.Random(1).randbytes(17 * MIB))
    if kind == "luks1":
        overwrite(volume.mirror, 0, b"LUKS\xba\xbe\x00\x01aes".ljust(592, b"\0"))
    before = volume.mirror.read_bytes()
    said = "crypto_LUKS" if kind == "luks1" else "data of an unknown kind"
    lab.lockstep("header", "restore", "vol", lab.home / "copy").failed(1, said, "--force")
    assert volume.mirror.read_bytes() == before
    lab.lockstep("header", "restore", "vol", lab.home / "copy", "--force").ok()


def test_a_copy_from_before_a_rekeying_takes_force_where_nothing_tells_how_far_that_came(lab: Lab) -> None:
    """The header may only be unreadable for the moment, and it alone has the new key."""
    volume = lab.volume(size_bytes=MIB, content=os.urandom(MIB), header=True)
    assert volume.header is not None
    with volume.served():
        pass
    old, new = lab.home / "old", lab.home / "renewed"
    lab.lockstep("header", "backup", "vol", old).ok()
    lab.lockstep("key", "rekey", "vol", "--key-file", lab.key).ok()
    lab.lockstep("header", "backup", "vol", new).ok()
    for damage in (damage_both, wipe):
        damage(volume.header)
        before = volume.header.read_bytes()
        expected = BackupKeyFormer(backup=old, path=volume.mirror)
        assert_error(lab.lockstep("header", "restore", "vol", old), expected)
        assert volume.header.read_bytes() == before
        lab.lockstep("header", "restore", "vol", new).ok()
    volume.restore(lab.home / "output", "--incomplete").ok()
    assert (lab.home / "output").read_bytes() == volume.target.read_bytes()
    damage_both(volume.header)
    lab.lockstep("header", "restore", "vol", old, "--force").ok()
    with volume.served():
        pass
    volume.assert_equal_disks()


@needs(root=True)
def test_a_header_that_cannot_be_read_at_the_moment_is_not_replaced_without_force(lab: Lab, tmp_path: Path) -> None:
    """It may be sound, and have had passphrases removed since."""
    volume, fails = lab.volume(size_bytes=MIB, header=True), tmp_path / "fails"
    assert volume.header is not None
    copy, size_bytes = lab.home / "copy", volume.header.stat().st_size
    lab.lockstep("header", "backup", "vol", copy).ok()
    place = tmp_path / "storage"
    failing = ("error-pread-rate=100%", f"error-pread-file={fails}")
    with contextlib.closing(
        Storage(place, size_bytes, plugin=("--filter=error", "file", str(place / "image"), *failing))
    ) as storage:
        shutil.copyfile(volume.header, storage.image)
        volume.header.unlink()
        volume.header.symlink_to(storage.path)
        fails.touch()
        before = storage.image.read_bytes()
        lab.lockstep("header", "restore", "vol", copy).failed(1, "cannot be read: Input/output error.\n", "--force")
        assert storage.image.read_bytes() == before
        fails.unlink()
        lab.lockstep("header", "restore", "vol", copy).ok()


@needs(root=True)
def test_without_room_for_the_audit_trail_no_header_is_copied_or_put_back(lab: Lab) -> None:
    lab.state.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(lab.state))
    try:
        volume = lab.volume(size_bytes=MIB, header=True)
        assert volume.header is not None
        copy, junk = lab.home / "copy", lab.state / "junk"
        lab.lockstep("header", "backup", "vol", copy).ok()
        damage_both(volume.header)
        before = volume.header.read_bytes()
        with contextlib.suppress(OSError), junk.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        lab.lockstep("header", "restore", "vol", copy).failed(1, "registry", "full")
        assert volume.header.read_bytes() == before
        shutil.copyfile(copy, volume.header)
        lab.lockstep("header", "backup", "vol", lab.home / "second").failed(1, "registry", "full")
        assert not [each for each in lab.home.iterdir() if each.name.startswith((".lockstep-", "second"))]
        junk.unlink()
        shutil.copyfile(copy, volume.header)
        lab.lockstep("header", "restore", "vol", copy).ok()
    finally:
        run("umount", "-l", str(lab.state))


def test_a_served_mirror_keeps_its_header(lab: Lab) -> None:
    volume = lab.volume(size_bytes=MIB)
    with volume.served():
        lab.lockstep("header", "backup", "vol", lab.home / "copy").ok()
        before = state_of(volume)
        lab.lockstep("header", "restore", "vol", lab.home / "copy").failed(1, "is being served", "Stop it first")
        assert state_of(volume) == before


# --- making copies, and missing them ----------------------------------------------------------------------


def test_a_copy_overwrites_nothing(lab: Lab) -> None:
    volume = lab.volume(size_bytes=MIB, header=True)
    assert volume.header is not None
    copy = lab.home / "copy"
    lab.lockstep("header", "backup", "vol", copy).ok()
    before = {path: path.read_bytes() for path in (copy, volume.header, volume.mirror, volume.target)}
    lab.lockstep("header", "backup", "vol", copy).failed(1, "exists already", "--force")
    for path, taken in ((volume.header, "the header"), (volume.mirror, "a mirror"), (volume.target, "the target")):
        lab.lockstep("header", "backup", "vol", path, "--force").failed(1, f"already is {taken}")
    lab.lockstep("header", "backup", "vol", "/dev/null", "--force").failed(1, "is not a file")
    lab.lockstep("header", "backup", "vol", lab.home / "no" / "copy").failed(1, "No such file")
    assert {path: path.read_bytes() for path in before} == before
    link = lab.home / "link"
    link.symlink_to(copy)
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    lab.lockstep("header", "backup", "vol", link, "--force").ok()
    assert link.is_symlink()
    assert copy.stat().st_mode & 0o077 == 0
    assert copy.read_bytes() == volume.header.read_bytes()
    assert not [name for name in os.listdir(lab.home) if name.startswith(".lockstep-")]


def test_a_copy_takes_the_place_of_nothing_but_a_copy(lab: Lab) -> None:
    lab.volume(size_bytes=MIB)
    other = lab.volume("other", MIB, content=os.urandom(MIB), header=True)
    assert other.header is not None
    linked, plain, unregistered = lab.home / "linked", lab.disk("plain", MIB), lab.volume("third", MIB).mirror
    linked.symlink_to(other.target)
    lab.lockstep("remove", "third").ok()
    lab.lockstep("grants", "vol").ok()
    registered, registry = (other.target, other.mirror, other.header), lab.state / "registry.db"
    before = {path: path.read_bytes() for path in (*registered, plain, unregistered, registry)}

    def refused(output: Path, fragment: str) -> None:
        lab.lockstep("header", "backup", "vol", output, "--force").failed(1, fragment)

    with other.served():
        for path in (*registered, linked):
            refused(path, "of the volume other" if path != other.header else "of a mirror of the volume other")
    other.mirror.unlink()
    refused(other.mirror, "already is a mirror of the volume other")
    assert not other.mirror.exists()
    del before[other.mirror], before[other.header]  # its server wrote to both
    for path in (plain, unregistered):
        refused(path, "is no header backup")
    for path in (registry, lab.state / "new", lab.state / "run" / "vol.lock"):
        refused(path, "lies in the state directory")
    del before[registry]
    assert {path: path.read_bytes() for path in before} == before
    lab.lockstep("list").ok()
    assert linked.is_symlink()
    assert not (lab.state / "new").exists()


def test_a_header_that_nobody_knows_is_not_taken_for_an_earlier_copy(lab: Lab) -> None:
    volume, forgotten = lab.volume(size_bytes=MIB), lab.volume("forgotten", MIB, header=True)
    assert forgotten.header is not None
    lab.lockstep("remove", "forgotten").ok()
    theirs, before = luks.read_uuid(str(forgotten.header)), forgotten.header.read_bytes()
    said = lab.lockstep("header", "backup", "vol", forgotten.header, "--force").failed(1, theirs, "another LUKS volume")
    assert luks.read_uuid(str(volume.mirror)) in said
    assert forgotten.header.read_bytes() == before


def test_a_detached_header_without_a_copy_is_spoken_of(lab: Lab) -> None:
    reminder = "HAS NO SECOND COPY"
    target, mirror = lab.disk("target", MIB), lab.home / "mirror"
    made = ("create", "vol", "--target", target, "--mirror", mirror, "--header", lab.home / "header")
    assert reminder in lab.lockstep(*made, "--key-file", lab.key, "--iter-time", 1).ok()
    volume = Volume(lab, "vol", target, mirror, lab.home / "header")

    def told() -> tuple[str, bool]:
        (shown,) = json.loads(lab.lockstep("status", "--json").ok())["volumes"]
        assert shown["mirrors"][0]["header"] == str(volume.header)
        return shown["mirrors"][0]["header_backup"], "lockstep header backup vol" in lab.lockstep("status").ok()

    assert told() == ("missing", True)
    with volume.served() as served:
        assert reminder in served.log.read_text()
        lab.lockstep("header", "backup", "vol", lab.home / "copy").ok()
        assert told() == ("current", False)
    key = Keys.of(volume)
    key("add", "--key-file", lab.key, "--new-key-file", key.new).ok()
    assert told() == ("outdated", True)
    lab.lockstep("header", "backup", "vol", lab.home / "copy", "--force").ok()
    assert told() == ("current", False)
    with volume.served() as served:
        assert served.log.read_text().count(reminder) == 1
    rows = [json.loads(line) for line in lab.lockstep("audit", "vol", "--json").ok().splitlines()]
    copies = [row["details"]["output"] for row in rows if row["event"] == "header-backup"]
    assert copies == [str(lab.home / "copy")] * 2


def test_an_inline_header_is_hinted_at_once(lab: Lab) -> None:
    made = ("create", "vol", "--target", lab.disk("target", MIB), "--mirror", lab.home / "mirror")
    assert "lockstep header backup vol" in lab.lockstep(*made, "--key-file", lab.key, "--iter-time", 1).ok()
    assert "header backup" not in lab.lockstep("status").ok()
