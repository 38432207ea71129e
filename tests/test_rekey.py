"""key rekey: a new volume key, while clients write, killed at any moment, and readable throughout.

Referees: stock cryptsetup opens and finishes what was begun, dissect.fve reads the result.
"""

import contextlib
import errno
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from lockstep.crypto import cryptsetup, luks, recovery_key, reencryption
from lockstep.disk.mirror import claim_for_rekeying
from lockstep.service import rekey as rekeying
from lockstep.service.state import State
from tests.forks import ForkLab, become_lockstep
from tests.keys import NEW, opens
from tests.lab import MIB, PASSPHRASE, Lab, Volume, forget_volume_keys, needs, run, wait_until, write

SIZE_BYTES = 20 * MIB  # more than one zone of a journal
KILLS = int(os.environ.get("REKEY_KILLS", "4"))

# Stands in cryptsetup's place while the data is re-encrypted: it waits for a file, having done nothing.
_PATIENT_CRYPTSETUP = """#!/bin/sh
case "$*" in *--resume-only*) touch "{began}"; while [ ! -e "{go}" ]; do sleep 0.02; done;; esac
exec "{real}" "$@"
"""


# With KILL it is killed as soon as it writes a zone. Without, to restore that takes it longer than a header may.
_SLOW_CRYPTSETUP = """#!/bin/sh
case "$KILL $*" in
*1*--resume-only*)
    exec 3<&0
    "{real}" "$@" <&3 &
    until [ ! -e /proc/$!/exe ] || head -c 32768 "{header}" | grep -q in-reencryption; do :; done
    kill -9 $!
    exit 1;;
*" repair "*) sleep 2.5;;
esac
exec "{real}" "$@"
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = ForkLab(tmp_path)
    monkeypatch.setenv("PATH", lab.quick_format()["PATH"])
    (tmp_path / "new").write_bytes(NEW)
    return lab


class Rekey:
    """A `lockstep key rekey` that runs, a fork of this process, with a process group of its own."""

    def __init__(self, volume: Volume, *options: object, environment: dict[str, str] | None = None) -> None:
        lab = volume.lab
        self.said = [lab.home / "rekey.out", lab.home / "rekey.err"]
        with warnings.catch_warnings(), contextlib.ExitStack() as files:
            warnings.simplefilter("ignore", DeprecationWarning)  # as in ForkLab
            streams: list[IO[bytes]] = [files.enter_context(Path(os.devnull).open("rb"))]
            streams += [files.enter_context(path.open("wb")) for path in self.said]
            self.pid = os.fork()
            if not self.pid:
                os.setsid()
                os.environ.update(environment or {})
                command = ["key", "rekey", volume.name, "--key-file", lab.key, *options]
                become_lockstep(["--state-dir", str(lab.state), *map(str, command)], streams)
        self.status: int | None = None

    def at_work(self) -> bool:
        """Whether cryptsetup is re-encrypting, or the command has ended."""
        if self._ended(os.WNOHANG):
            return True
        for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"--resume-only" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return True
        return False

    def _ended(self, flags: int) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, flags)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def kill(self) -> bool:
        """SIGKILL, also to cryptsetup; False if it had succeeded before."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._ended(0)
        assert self.status in (0, -signal.SIGKILL), self.said[1].read_text()
        return self.status != 0

    def interrupt(self) -> None:
        """Ctrl-C, and the end of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGINT)
        self._ended(0)

    def ok(self) -> str:
        """Its output; it must have succeeded."""
        self._ended(0)
        assert self.status == 0, self.said[1].read_text()
        return self.said[0].read_text()


@contextlib.contextmanager
def interrupted(lab: Lab) -> Iterator[tuple[dict[str, str], Path, Path]]:
    """An environment in which a re-keying rests when the data's turn has come: until `go` is there."""
    began, go, program = lab.home / "began", lab.home / "go", lab.home / "patient" / "cryptsetup"
    program.parent.mkdir()
    program.write_text(_PATIENT_CRYPTSETUP.format(began=began, go=go, real=shutil.which("cryptsetup")))
    program.chmod(0o755)
    try:
        yield {"PATH": f"{program.parent}:{os.environ['PATH']}"}, began, go
    finally:
        go.touch()


def leave_unfinished(volume: Volume, *options: object) -> None:
    """Begin to re-key the mirror, and be killed when the data's turn has come."""
    with interrupted(volume.lab) as (slow, began, _go):
        rekey = Rekey(volume, *options, environment=slow)
        wait_until(began.exists, "the data's turn")
        rekey.kill()


def events(lab: Lab) -> list[str]:
    rows = [json.loads(line) for line in lab.lockstep("audit", "vol", "--json").ok().splitlines()]
    return [row["event"] for row in rows if row["event"].startswith(("rekey", "key"))]


def test_clients_go_on_and_the_mirror_gets_what_it_misses(lab: Lab) -> None:
    volume = lab.volume(size_bytes=SIZE_BYTES, content=os.urandom(SIZE_BYTES))
    with volume.served() as served, interrupted(lab) as (slow, began, go):
        run("qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", "-c", "flush", served.uri)
        before = volume.target.read_bytes()
        rekey = Rekey(volume, "--new-key-file", lab.home / "new", environment=slow)
        wait_until(began.exists, "the data's turn")
        run("qemu-io", "-f", "raw", "-c", "write -P 2 4M 64k", "-c", "flush", "-c", "read -P 2 4M 64k", served.uri)
        mirror = served.mirror()
        assert mirror["state"] == "degraded"
        assert "lockstep key rekey vol" in mirror["error"]
        volume.restore(lab.home / "meanwhile").failed(1, "is locked")
        rekey.kill()
        volume.restore(lab.home / "meanwhile").ok()
        assert (lab.home / "meanwhile").read_bytes() == before, "the disk as it was when the mirror was let go"
        lab.lockstep("key", "add", "vol", "--key-file", lab.key, "--new-key-file", lab.key).failed(1, "not finished")
        lab.lockstep("header", "backup", "vol", lab.home / "copy").failed(1, "re-keying", "not finished")
        lab.lockstep("verify", "vol").failed(1, "lockstep key rekey vol")
        served.kill()
        with volume.served(in_sync=False) as again:
            assert again.mirror_state() == "degraded"
            run("qemu-io", "-f", "raw", "-c", "write -P 3 8M 64k", "-c", "flush", again.uri)
            go.touch()
            said = Rekey(volume, "--new-key-file", lab.home / "new", environment=slow).ok()
            assert "Headers from before open nothing" in said
            assert "That was begun before" in said, "whoever wants yet another key does not have it"
            wait_until(lambda: again.mirror_state() == "in-sync", "the mirror to be back")
            copied = again.log.read_text().rpartition("is back; ")[2].split()[0]
            assert 0 < int(copied) < 4 * MIB, "what was written meanwhile, and no more"
    assert (opens(volume.mirror, PASSPHRASE), opens(volume.mirror, NEW)) == (False, True)
    lab.key.write_bytes(NEW)
    volume.restore(lab.home / "after").ok()
    assert (lab.home / "after").read_bytes() == volume.target.read_bytes()
    assert events(lab) == ["rekey-begun", "rekeyed"]


@pytest.mark.parametrize("kind", ["inline", "detached", pytest.param("device", marks=needs("losetup", root=True))])
def test_killed_at_random_it_is_readable_and_goes_on(lab: Lab, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = os.urandom(SIZE_BYTES)
    with contextlib.ExitStack() as stack:
        volume = stack.enter_context(volume_on(lab, kind, content))
        with volume.served():
            pass
        header = str(volume.header or volume.mirror)
        seen = {"zone": 0, "between": 0, "not begun": 0, "over": 0}
        killed = 0
        while killed < KILLS:
            rekey = Rekey(volume)
            wait_until(rekey.at_work, "cryptsetup to work")
            time.sleep(random.uniform(0, 0.35))
            if not rekey.kill():
                continue
            killed += 1
            seen[state_of(header)] += 1
            output = lab.home / f"output{killed}"
            volume.restore(output).ok()
            assert output.read_bytes() == content, f"after kill {killed}: {seen}"
            output.unlink()
        Rekey(volume).ok()
        forget_volume_keys()
        volume.assert_equal_disks()
        with volume.served() as served:
            assert "copying" not in served.log.read_text().split("stopping")[-1], "there was nothing to copy"
        volume.assert_equal_disks()
    with capsys.disabled():
        print(f"\nre-keying {kind}: killed {killed} times, then found: {seen}")


@contextlib.contextmanager
def volume_on(lab: Lab, kind: str, content: bytes) -> Iterator[Volume]:
    if kind != "device":
        yield lab.volume(size_bytes=len(content), content=content, header=kind == "detached")
        return
    image = lab.disk("image", 16 * MIB + -(-len(content) // 512) * 512)  # not a byte more than it takes
    device = run("losetup", "--find", "--show", str(image)).strip()
    try:
        target = lab.disk("vol.target", len(content), content)
        lab.lockstep("create", "vol", "--target", target, "--mirror", device, "--key-file", lab.key).ok()
        yield Volume(lab, "vol", target, Path(device), None)
    finally:
        run("losetup", "--detach", device)


def state_of(header: str) -> str:
    if reencryption.under_way(header):
        return "zone" if reencryption.read(header).zone else "between"
    return "not begun" if opens(Path(header), PASSPHRASE) else "over"


def test_a_zone_is_restored_however_long_that_takes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have a GiB, behind a slow line; what is killed for being slow would never get any further."""
    volume = lab.volume(size_bytes=SIZE_BYTES, content=os.urandom(SIZE_BYTES))
    volume.copy_by_hand()
    program = lab.home / "slow" / "cryptsetup"
    program.parent.mkdir()
    program.write_text(_SLOW_CRYPTSETUP.format(real=shutil.which("cryptsetup"), header=volume.mirror))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    rekey = functools.partial(lab.lockstep, "key", "rekey", "vol", "--key-file", lab.key, environment={"KILL": "1"})
    wait_until(lambda: bool(rekey()) and state_of(str(volume.mirror)) == "zone", "a kill that does not come too late")
    monkeypatch.setattr(cryptsetup, "TIMEOUT_S", 2)
    found = reencryption.Volume(str(volume.mirror), str(volume.mirror), SIZE_BYTES, reencryption.JOURNAL)
    reencryption.go_on(found, PASSPHRASE, on_progress=lambda _done, _all: None, fds=())
    forget_volume_keys()
    volume.assert_equal_disks()


def test_without_room_for_a_process_it_says_so_and_goes_on_later(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = lab.volume(size_bytes=MIB, content=os.urandom(MIB))
    volume.copy_by_hand()

    def started(argv: list[str], start: Any = subprocess.Popen, **options: Any) -> Any:
        if "--resume-only" in argv:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return start(argv, **options)

    with monkeypatch.context() as memory_is_short:
        memory_is_short.setattr(subprocess, "Popen", started)
        lab.lockstep("key", "rekey", "vol", "--key-file", lab.key).failed(1, "could not be started", "Cannot allocate")
    lab.lockstep("key", "rekey", "vol", "--key-file", lab.key).ok()
    forget_volume_keys()
    volume.assert_equal_disks()


def test_what_stock_cryptsetup_finishes_is_taken(lab: Lab) -> None:
    """The state directory may be lost: then the sentence of the error is all that there is."""
    volume = lab.volume(size_bytes=SIZE_BYTES, content=os.urandom(SIZE_BYTES))
    with volume.served():
        pass
    leave_unfinished(volume)
    options = ["--resume-only", "--force-offline-reencrypt", "--batch-mode", f"--key-file={lab.key}"]
    run("cryptsetup", "reencrypt", *options, str(volume.mirror))
    forget_volume_keys()
    volume.assert_equal_disks()
    done = json.loads(lab.lockstep("key", "rekey", "vol", "--key-file", lab.key, "--json").ok().splitlines()[-1])
    assert done["resumed"]
    assert events(lab) == ["rekey-begun", "rekeyed"]
    with volume.served() as served:
        assert served.mirror_state() == "in-sync"
    volume.assert_equal_disks()


def test_an_old_header_opens_nothing_and_is_never_taken_for_the_mirror(lab: Lab) -> None:
    volume = lab.volume(size_bytes=SIZE_BYTES, content=os.urandom(SIZE_BYTES))
    old = lab.home / "old-header"
    with volume.served():
        pass
    lab.lockstep("header", "backup", "vol", old).ok()
    former = volume.mirror.read_bytes()[16 * MIB :]
    lab.lockstep("key", "rekey", "vol", "--key-file", lab.key).ok()
    renewed = volume.mirror.read_bytes()[16 * MIB :][: len(former)]
    sectors = range(0, SIZE_BYTES, 4096)
    assert not any(former[at : at + 16] == renewed[at : at + 16] for at in sectors), "every place was written anew"
    lab.lockstep("header", "restore", "vol", old).failed(1, "another volume key")
    slots = volume.mirror.read_bytes()[: 16 * MIB]
    run("cryptsetup", "luksHeaderRestore", "--batch-mode", f"--header-backup-file={old}", str(volume.mirror))
    assert opens(volume.mirror, PASSPHRASE)
    with volume.served(in_sync=False) as served:
        wait_until(lambda: "another disk" in (served.mirror()["error"] or ""), "the mirror to be looked at")
        lab.lockstep("sync", "vol", "--all", "--wait").ok()
        assert f"copying {SIZE_BYTES} bytes" in served.log.read_text().split("stopping")[-1]
    forget_volume_keys()
    volume.assert_equal_disks()
    assert slots != volume.mirror.read_bytes()[: 16 * MIB]


@pytest.mark.parametrize("is_served", [False, True], ids=["at rest", "served"])
def test_an_old_header_is_not_taken_for_the_mirrors_own_while_it_is_not_finished(lab: Lab, is_served: bool) -> None:
    """A copy from just before fits in everything else, and the passphrase opens it."""
    volume = lab.volume(size_bytes=MIB, content=os.urandom(MIB), header=True)
    assert volume.header is not None
    old = lab.home / "old-header"
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(volume.served())
        if not is_served:
            served.stop()
        lab.lockstep("header", "backup", "vol", old).ok()
        leave_unfinished(volume)
        options = ["--resume-only", "--force-offline-reencrypt", "--batch-mode", f"--key-file={lab.key}"]
        run("cryptsetup", "reencrypt", *options, f"--header={volume.header}", str(volume.mirror))
        shutil.copyfile(old, volume.header)
        if is_served:
            lab.lockstep("sync", "vol").ok()
        else:
            served = stack.enter_context(volume.served(in_sync=False))
        wait_until(lambda: "another disk" in (served.mirror()["error"] or ""), "the mirror to be looked at")
        lab.lockstep("sync", "vol", "--all", "--wait").ok()
        assert served.mirror_state() == "in-sync"
    forget_volume_keys()
    volume.assert_equal_disks()


def test_one_whose_other_keys_have_tokens_is_readable_and_goes_on(lab: Lab) -> None:
    """As recovery keys do; they are gone in the end, and so is what else names their slots."""
    content = os.urandom(MIB)
    volume = lab.volume(size_bytes=MIB, content=content)
    volume.copy_by_hand()
    lab.lockstep("key", "add", "vol", "--key-file", lab.key, "--recovery").ok()
    token = json.dumps({"type": "luks2-keyring", "keyslots": ["0"], "key_description": "nowhere"})
    run("cryptsetup", "token", "import", "--json-file=-", str(volume.mirror), stdin=token.encode())
    leave_unfinished(volume, "--drop-other-keys")
    volume.restore(lab.home / "output").ok()
    assert (lab.home / "output").read_bytes() == content
    lab.lockstep("key", "rekey", "vol", "--key-file", "-", stdin=b"wrong").failed(1, f"No key slot of {volume.mirror}")
    lab.lockstep("key", "rekey", "vol", "--key-file", lab.key).ok()
    forget_volume_keys()
    volume.assert_equal_disks()


@pytest.mark.parametrize(
    ("kind", "tail_bytes"),
    [("inline", 1), ("detached", 512), pytest.param("device", 513, marks=needs("losetup", root=True))],
)
def test_a_size_that_is_no_multiple_of_anything(lab: Lab, kind: str, tail_bytes: int) -> None:
    """cryptsetup wants whole blocks of the disk."""
    content = os.urandom(MIB + tail_bytes)
    with volume_on(lab, kind, content) as volume:
        volume.copy_by_hand()
        lab.lockstep("key", "rekey", "vol", "--key-file", lab.key).ok()
        forget_volume_keys()
        volume.assert_equal_disks()
        with volume.served() as served:
            write(served, f"write -P 5 {MIB - 512} {512 + tail_bytes}")
        volume.assert_equal_disks()


def test_one_that_was_begun_with_a_size_with_which_it_cannot_go_on_goes_on(lab: Lab) -> None:
    """As versions before this one left them."""
    volume = lab.volume(size_bytes=MIB + 512, content=os.urandom(MIB + 512))
    volume.copy_by_hand()
    options = ("--init-only", f"--device-size={MIB + 512}", "--resilience=journal", "--key-slot=0", "--batch-mode")
    run(
        "cryptsetup", "reencrypt", "--force-offline-reencrypt", *options, "--key-file", str(lab.key), str(volume.mirror)
    )
    volume.restore(lab.home / "meanwhile").ok()
    assert (lab.home / "meanwhile").read_bytes() == volume.target.read_bytes()
    lab.lockstep("key", "rekey", "vol", "--key-file", lab.key).ok()
    forget_volume_keys()
    volume.assert_equal_disks()


def test_one_that_is_not_finished_is_listed_and_tells_a_wrong_passphrase_from_a_failure(lab: Lab) -> None:
    volume = lab.volume(size_bytes=MIB)
    volume.copy_by_hand()
    options = ("--init-only", f"--device-size={MIB}", "--resilience=journal", "--key-slot=0", "--batch-mode")
    run(
        "cryptsetup", "reencrypt", "--force-offline-reencrypt", *options, "--key-file", str(lab.key), str(volume.mirror)
    )
    (mirror,) = json.loads(lab.lockstep("key", "list", "vol", "--json").ok())["mirrors"]
    assert [slot["kind"] for slot in mirror["slots"]] == ["passphrase", "passphrase"], "one for each volume key"
    before = volume.mirror.read_bytes()
    for stdin, said in ((b"wrong", "No key slot of"), (recovery_key.new().encode(), "opens no key slot of")):
        refusal = f"{said} {volume.mirror}"
        lab.lockstep("restore", volume.mirror, lab.home / "out", "--key-file", "-", stdin=stdin).failed(1, refusal)
        lab.lockstep("key", "rekey", "vol", "--key-file", "-", stdin=stdin).failed(1, refusal)
    assert volume.mirror.read_bytes() == before


@needs("losetup", root=True)
def test_either_copy_of_the_header_is_enough_for_an_unfinished_one(lab: Lab) -> None:
    """Also where cryptsetup cannot mend the other one, since nothing is to be written."""
    volume = lab.volume(size_bytes=MIB, content=os.urandom(MIB))
    volume.copy_by_hand()
    leave_unfinished(volume)
    for number, damaged_at in enumerate((0, 4096, 16384, 16384 + 4096)):
        copy, output = lab.home / f"copy{number}", lab.home / f"output{number}"
        shutil.copyfile(volume.mirror, copy)
        with copy.open("r+b") as file:
            file.seek(damaged_at)
            file.write(b"\xa5" * 512)
        device = run("losetup", "--find", "--show", "--read-only", str(copy)).strip()
        try:
            lab.lockstep("restore", device, output, "--key-file", lab.key).ok()
        finally:
            run("losetup", "--detach", device)
        assert output.read_bytes() == volume.target.read_bytes()


@needs("losetup", root=True)
def test_an_unfinished_one_that_somebody_else_may_be_writing_is_not_restored(lab: Lab) -> None:
    """Stock cryptsetup goes on with it as well, and there is no lock that tells."""
    volume = lab.volume(size_bytes=MIB, content=os.urandom(MIB))
    volume.copy_by_hand()
    leave_unfinished(volume)
    device = run("losetup", "--find", "--show", str(volume.mirror)).strip()
    try:
        volume.restore(lab.home / "output").failed(1, "in use", device)
    finally:
        run("losetup", "--detach", device)
    volume.restore(lab.home / "output").ok()


def test_what_is_refused_changes_nothing(lab: Lab) -> None:
    volume = lab.volume(size_bytes=MIB)
    new = lab.home / "new"
    lab.lockstep("key", "add", "vol", "--key-file", lab.key, "--new-key-file", new).ok()
    before = volume.mirror.read_bytes()

    def refused(code: int, *fragments: str, options: tuple[Any, ...] = (), stdin: bytes | None = None) -> None:
        lab.lockstep("key", "rekey", "vol", *options, stdin=stdin).failed(code, *fragments)
        assert volume.mirror.read_bytes() == before
        assert "rekey-begun" not in events(lab)

    refused(1, "would take key slot 1 away", "--drop-other-keys", options=("--key-file", lab.key))
    refused(1, "No key slot", options=("--key-file", "-"), stdin=b"wrong")
    refused(2, "--key-file - and --new-key-file -", options=("--key-file", "-", "--new-key-file", "-"))
    os.truncate(volume.mirror, len(before) - 1)
    before = before[:-1]
    refused(1, "is truncated", options=("--key-file", lab.key, "--drop-other-keys"))
    os.truncate(volume.mirror, len(before) + 1)
    lab.lockstep("key", "rekey", "vol", "--key-file", new, "--drop-other-keys").ok()
    assert [opens(volume.mirror, each) for each in (PASSPHRASE, NEW)] == [False, True]
    token = luks.read_header(str(volume.mirror)).token
    assert token is not None
    assert token.volume_name == "vol"


def test_a_passphrase_that_is_added_at_the_last_moment_is_not_lost(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = lab.volume(size_bytes=MIB)

    def after_another_command(path: str, segment: luks.Segment, size_bytes: int) -> int:
        Lab.lockstep(lab, "key", "add", "vol", "--key-file", lab.key, "--new-key-file", lab.home / "new").ok()
        return claim_for_rekeying(path, segment, size_bytes)

    monkeypatch.setattr(rekeying, "claim_for_rekeying", after_another_command)
    lab.lockstep("key", "rekey", "vol", "--key-file", lab.key).failed(1, "key slot 1", "--drop-other-keys")
    assert [opens(volume.mirror, each) for each in (PASSPHRASE, NEW)] == [True, True]
    assert events(lab) == ["key-begun", "key-added"]


def test_what_is_being_rekeyed_is_not_forgotten(lab: Lab) -> None:
    volume = lab.volume(size_bytes=SIZE_BYTES)
    with interrupted(lab) as (slow, began, go):
        rekey = Rekey(volume, environment=slow)
        wait_until(began.exists, "the data's turn")
        for command in (("remove", "vol"), ("mirror", "remove", "vol", volume.mirror)):
            lab.lockstep(*command).failed(1, "is being re-keyed")
        go.touch()
        rekey.ok()
    lab.lockstep("remove", "vol").ok()


def test_no_target_is_filled_from_what_is_being_rekeyed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = lab.volume(size_bytes=MIB)
    with volume.served():
        pass

    def after_another_command(path: str, segment: luks.Segment, size_bytes: int) -> int:
        replace = ("replace-target", "vol", lab.home / "disk", "--key-file", lab.key)
        Lab.lockstep(lab, *replace).failed(1, "is being re-keyed")
        return claim_for_rekeying(path, segment, size_bytes)

    monkeypatch.setattr(rekeying, "claim_for_rekeying", after_another_command)
    lab.lockstep("key", "rekey", "vol", "--key-file", lab.key, environment=lab.quick_format()).ok()


def test_another_mirror_is_filled_from_meanwhile_and_the_rekeyed_one_stays_borrowed(lab: Lab) -> None:
    volume = lab.volume(size_bytes=SIZE_BYTES)
    other = lab.home / "other"
    lab.lockstep("mirror", "add", "vol", other, "--key-file", lab.key, environment=lab.quick_format()).ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: all(each["state"] == "in-sync" for each in served.now()["mirrors"]), "both mirrors")
    with interrupted(lab) as (slow, began, go):
        rekey = Rekey(volume, "--mirror", volume.mirror, environment=slow)
        wait_until(began.exists, "the data's turn")
        options = ("--mirror", other, "--key-file", lab.key)
        lab.lockstep("replace-target", "vol", lab.home / "disk", *options).ok()
        with State(str(lab.state)).borrowing_lock(luks.read_uuid(str(volume.mirror))) as mine:
            assert mine is None
        go.touch()
        rekey.ok()
    with volume.served(in_sync=False) as served:
        wait_until(lambda: all(each["state"] == "in-sync" for each in served.now()["mirrors"]), "both mirrors")
