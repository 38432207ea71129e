"""P10: plaintext, volume key and passphrases reach no mirror, log, argument list, core dump or registry.

One story is told with a recognisable passphrase and recognisable data: create, serve (verbosely), write, attach, fail
in several ways, stop, restore. Every program that it runs is recorded, arguments and environment, by a wrapper that
comes first on PATH. The volume key is asked of cryptsetup. Then everything that was left anywhere is searched.
"""

import base64
import contextlib
import errno
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import ForkLab
from tests.lab import MIB, Lab, run, wait_until

PASSPHRASE = b"Recognisable-Passphrase-7c1f"
WRONG = b"Recognisable-Wrong-Passphrase-55aa"
SECOND = b"Recognisable-Second-Passphrase-90cc"
PLAINTEXT = b"recognisable plaintext of the disk, 0123456789abcdef"
PROGRAMS = ("cryptsetup", "nbdfuse", "losetup", "wipefs", "fusermount3", "dd", "sync", "modprobe", "nbd-client")

# Only builtins, so that it does not record itself.
WRAPPER = """#!/bin/bash
{{ printf '%s\\n' "== {name}" "$@"; export -p; }} >> "{record}"
exec "{real}" "$@"
"""

can_attach = os.geteuid() == 0 and os.path.exists("/dev/fuse") and shutil.which("nbdfuse") is not None
NO_DUMP = ["1", "1"]  # with 0, the kernel does not keep those of children from a program that takes dumps (core(5))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="reading other processes' limits needs root")


class Story:
    """What was left behind, and what to look for in it."""

    def __init__(self, home: Path) -> None:
        self.lab = ForkLab(home)
        self.lab.key.write_bytes(PASSPHRASE)
        self.record = home / "record"
        self.said = b""
        self.log = home / "serve.log"
        self.target = self.lab.disk("target", 2 * MIB, PLAINTEXT.ljust(512) * 64)
        self.mirror = home / "mirror"
        self.environment = {**os.environ, "PATH": f"{self._wrappers()}:{os.environ['PATH']}"}
        self._tell()
        self.key = self._volume_key()

    def _wrappers(self) -> Path:
        directory = self.lab.home / "wrappers"
        directory.mkdir()
        for name in PROGRAMS:
            real = shutil.which(name, path=self.lab.quick_format()["PATH"])
            if real is not None:
                wrapper = directory / name
                wrapper.write_text(WRAPPER.format(name=name, record=self.record, real=real))
                wrapper.chmod(0o755)
        return directory

    def lockstep(self, *arguments: object, stdin: bytes = b"") -> int:
        done = self.lab.lockstep("-v", *arguments, stdin=stdin, environment=self.environment)
        self.said += (done.out + done.err).encode()
        return done.code

    def _tell(self) -> None:
        key, home = self.lab.key, self.lab.home
        wrong = home / "wrong"
        wrong.write_bytes(WRONG)
        made = ["--mirror", self.mirror, "--iter-time", "1"]
        assert self.lockstep("create", "vol", "--target", self.target, *made, "--key-file", key) == 0
        assert self.lockstep("create", "vol", "--target", self.target, *made, "--key-file", key) == 1
        assert self.lockstep("serve", "vol", "--key-file", wrong) == 1
        assert self.lockstep("serve", "vol", "--key-file", "-", stdin=WRONG) == 1
        command = [sys.executable, "-m", "lockstep", "-v", "--state-dir", str(self.lab.state), "serve", "vol"]
        with (
            self.log.open("wb") as log,
            subprocess.Popen(
                [*command, "--key-file", "-"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment,
            ) as server,
        ):
            try:
                assert server.stdin is not None
                assert server.stdout is not None
                server.stdin.write(PASSPHRASE)
                server.stdin.close()
                uri = server.stdout.readline().decode().removeprefix("ready ").strip()
                pattern = home / "pattern"
                pattern.write_bytes(PLAINTEXT.ljust(512) * 128)
                run("qemu-io", "-f", "raw", "-c", f"write -s {pattern} 1M 64k", "-c", "flush", uri)
                run("qemu-io", "-f", "raw", "-c", f"write -s {pattern} 100 1000", uri)
                self.processes = b"".join(_seen(server.pid))
                if can_attach:
                    assert self.lockstep("attach", "vol") == 0
                    assert self.lockstep("detach", "vol") == 0
                assert self.lockstep("restore", self.mirror, home / "output", "--key-file", key) == 1  # it is served
                assert self.lockstep("status", "vol") == 0
            finally:
                server.terminate()
            self.said += server.stdout.read()
            assert server.wait(60) == 0
        assert self.lockstep("restore", self.mirror, home / "output", "--key-file", wrong) == 1
        assert self.lockstep("restore", self.mirror, home / "output", "--key-file", key) == 0
        assert self.lockstep("list") == 0
        second = home / "second"
        second.write_bytes(SECOND)
        assert self.lockstep("key", "add", "vol", "--key-file", key, "--new-key-file", "-", stdin=SECOND) == 0
        assert self.lockstep("key", "remove", "vol", "--key-file", wrong) == 1
        assert self.lockstep("key", "change", "vol", "--key-file", second, "--new-key-file", wrong) == 0
        assert self.lockstep("key", "remove", "vol", "--key-file", wrong) == 0
        assert self.lockstep("header", "backup", "vol", home / "copy") == 0

    def _volume_key(self) -> bytes:
        dump = run(
            "cryptsetup",
            "luksDump",
            "--batch-mode",
            "--dump-volume-key",
            f"--key-file={self.lab.key}",
            str(self.mirror),
        )
        key = bytes.fromhex(re.sub(r"[^0-9a-f]", "", dump.rpartition(":")[2]))
        assert len(key) == 64
        return key


def _seen(pid: int) -> Iterator[bytes]:
    """Arguments and environment of a process, as everybody on the machine may see them."""
    for name in ("cmdline", "environ"):
        with contextlib.suppress(PermissionError):
            yield Path(f"/proc/{pid}/{name}").read_bytes()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return Story(tmp_path_factory.mktemp("secrets"))


def disguises(secret: bytes) -> dict[str, bytes]:
    """The shapes in which a secret would be written by accident."""
    digits = secret.hex()
    return {
        "raw": secret,
        "hex": digits.encode(),
        "HEX": digits.upper().encode(),
        "spaced hex": " ".join(re.findall("..", digits[:64])).encode(),
        "repr": repr(secret)[2:-1].encode(),
        "base64": base64.b64encode(secret)[:40],
    }


def needles(story: Story) -> dict[str, bytes]:
    first, second = story.key[:32], story.key[32:]  # XTS has two keys, which code handles apart
    found: dict[str, bytes] = {}
    secrets = {"passphrase": PASSPHRASE, "wrong passphrase": WRONG, "second": SECOND, "volume key": story.key}
    for name, secret in {**secrets, "first half key": first, "second half key": second}.items():
        found |= {f"{name}, {shape}": needle for shape, needle in disguises(secret).items()}
    found["plaintext"] = PLAINTEXT
    return found


def places(story: Story) -> dict[str, bytes]:
    state = {str(path): path.read_bytes() for path in story.lab.state.rglob("*") if path.is_file()}
    assert any(path.endswith("registry.db") for path in state)
    return {
        "the mirror": story.mirror.read_bytes(),
        "the log": story.log.read_bytes(),
        "what the commands said": story.said,
        "the programs that were run": story.record.read_bytes(),
        "the server's arguments and environment": story.processes,
        **state,
    }


def test_the_search_finds_what_is_there(story: Story) -> None:
    """Without this, a search in the wrong places, or for the wrong bytes, would pass for success."""
    assert PLAINTEXT in story.target.read_bytes()
    assert PLAINTEXT in (story.lab.home / "output").read_bytes()
    assert PASSPHRASE in story.lab.key.read_bytes()
    record = story.record.read_text()
    for program in (
        "cryptsetup\nluksFormat",
        "cryptsetup\nluksAddKey",
        "cryptsetup\nluksDump\n--dump-volume-key",
        "cryptsetup\ntoken\nimport",
    ):
        assert f"== {program}\n" in record
    if can_attach:
        assert "== losetup\n" in record
    assert "declare -x PATH=" in record
    assert b"DEBUG" in story.log.read_bytes() or b"INFO" in story.log.read_bytes()
    assert b"Likely cause" in story.said
    assert b"lockstep" in story.processes


def test_no_secret_is_left_anywhere(story: Story) -> None:
    found = [
        f"{what} in {where}"
        for where, content in places(story).items()
        for what, needle in needles(story).items()
        if needle in content
    ]
    assert not found


def test_no_secret_is_left_in_temporary_files(story: Story) -> None:
    """The lab's own files apart: key files, target, restored output, and the pattern that was written."""
    ours = {
        story.lab.key,
        story.lab.home / "wrong",
        story.lab.home / "second",
        story.target,
        story.lab.home / "output",
        story.lab.home / "pattern",
    }
    others = [path for path in story.lab.home.rglob("*") if path.is_file() and path not in ours]
    assert story.mirror in others
    secrets = needles(story).items()
    for path in others:
        content = path.read_bytes()
        assert not [what for what, needle in secrets if needle in content], path


def test_what_is_made_is_private(story: Story) -> None:
    """Nobody else may read the registry, connect to a socket, or open the mirror that was made."""
    for path in (story.lab.state, *story.lab.state.rglob("*"), story.mirror, story.lab.home / "output"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


# --- core dumps and other processes -----------------------------------------------------------------------


@contextlib.contextmanager
def waiting_for_its_passphrase(lab: Lab, *arguments: object) -> Iterator["subprocess.Popen[bytes]"]:
    """A command that has opened its key file, a pipe, and reads; core dumps were allowed before."""
    pipe = lab.home / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "lockstep", "--state-dir", str(lab.state), *map(str, arguments)]
    with subprocess.Popen(
        ["sh", "-c", 'ulimit -c unlimited && exec "$@"', "sh", *command, "--key-file", str(pipe)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        opened: list[int] = []

        def reads() -> bool:
            try:
                opened.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            except OSError as error:
                if error.errno != errno.ENXIO:  # nobody reads
                    raise
                assert process.poll() is None, "it ended without reading its passphrase"
            return bool(opened)

        try:
            wait_until(reads, "the command to read its passphrase")
            yield process
        finally:
            process.kill()
            for fd in opened:
                os.close(fd)
            pipe.unlink()


def core_limits(pid: int) -> list[str]:
    (line,) = [line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "core file" in line]
    return line.split()[4:6]


@needs_root
@pytest.mark.parametrize("command", ["serve", "create", "restore"])
def test_whoever_knows_the_passphrase_dumps_no_core(tmp_path: Path, command: str) -> None:
    lab = Lab(tmp_path)
    arguments: dict[str, list[object]] = {
        "serve": ["serve", "vol"],
        "restore": ["restore", tmp_path / "vol.mirror", tmp_path / "output", "--incomplete"],
        "create": ["create", "vol", "--target", lab.disk("target", MIB), "--mirror", tmp_path / "mirror"],
    }
    if command != "create":
        lab.volume("vol", MIB)
    with waiting_for_its_passphrase(lab, *arguments[command]) as process:
        assert core_limits(process.pid) == NO_DUMP


@needs_root
def test_another_process_of_the_same_account_cannot_look_into_the_server(tmp_path: Path) -> None:
    """Neither by /proc nor by ptrace: only CAP_SYS_PTRACE can. So both run without capabilities here."""
    plain = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]

    def readable(pid: int) -> bool:
        return subprocess.run([*plain, "cat", f"/proc/{pid}/environ"], capture_output=True, check=False).returncode == 0

    lab = Lab(tmp_path)
    lab.volume("vol", MIB)
    command = [sys.executable, "-m", "lockstep", "--state-dir", str(lab.state), "serve", "vol", "--key-file"]
    with (
        subprocess.Popen(
            ["prlimit", "--core=unlimited", *plain, *command, str(lab.key)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as server,
        subprocess.Popen([*plain, "sleep", "60"]) as bystander,
    ):
        try:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("ready ")
            assert readable(bystander.pid), "nothing is readable here, so the test proves nothing"
            assert not readable(server.pid)
            assert core_limits(server.pid) == NO_DUMP
        finally:
            bystander.kill()
            server.terminate()
        assert server.wait(60) == 0
