"""The program cryptsetup: how it is called, how secrets reach it, and what its failures are.

Secrets
    A passphrase goes to its standard input, exactly as given. Where two are needed, the second one is in a file in
    memory that has no name (`memory_file`), of which it is told the descriptor. Nothing secret is an argument or in
    the environment.

Two at once
    cryptsetup locks a header while it writes it, but not while it computes a key slot, which takes seconds. Who comes
    to write and finds that somebody else wrote meanwhile gives up and has changed nothing; it is then run again.
    So a server that writes its token, and an administrator who adds a passphrase, with Lockstep or without, do
    not meet.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Final

from lockstep.errors import CryptsetupFailed, CryptsetupHung, CryptsetupMissing, CryptsetupNotStarted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Buffer

TIMEOUT_S: Final = 120  # argon2id aims at 2 s, and takes many times that on a small or busy machine
INVALID_EXIT: Final = 1  # cryptsetup(8), RETURN CODES: also what it has no other for
ATTEMPTS: Final = 10  # a server writes its token when its state changes, and at most every half a minute otherwise

_MOST_COMPLAINTS_BYTES: Final = 64 << 10
_OVERTAKEN: Final = b"concurrent LUKS2 metadata update"
_REJECTED_EXIT: Final = 2
_NONE_USABLE: Final = b"No usable keyslot"  # in place of that, where some slot is unbound; and where there is none

Completed = subprocess.CompletedProcess[bytes]


def run(
    action: str,
    path: str,
    command: str,
    *arguments: str,
    stdin: Buffer = b"",
    stdout: int = subprocess.PIPE,
    after: Sequence[str] = (),
    fds: Sequence[int] = (),
) -> Completed:
    """Run `cryptsetup COMMAND ARGUMENTS PATH AFTER` to its end; the exit code is the caller's to judge.

    It inherits the descriptors `fds`, and gets no Ctrl-C of ours: a server goes on to close its mirrors after that, and
    who is interrupted kills it. CryptsetupMissing, CryptsetupNotStarted, CryptsetupHung. A process that even
    SIGKILL cannot end (a disk that never answers) keeps the caller waiting for the kernel.
    """
    # Absolute, so that no path can be taken for an option.
    argv = [*_program(), command, *arguments, "--batch-mode", os.path.abspath(path), *after]
    for attempt in range(ATTEMPTS):
        try:
            result = subprocess.run(
                argv,
                input=stdin,
                stdout=stdout,
                stderr=subprocess.PIPE,
                env=_environment(),
                timeout=TIMEOUT_S,
                pass_fds=fds,
                process_group=0,
                check=False,
            )
        except subprocess.TimeoutExpired:
            # "from None": the cause holds what the child had printed so far.
            raise CryptsetupHung(action=action, path=path, timeout_s=TIMEOUT_S) from None
        except OSError as error:
            raise CryptsetupNotStarted(action=action, path=path, reason=error.strerror or str(error)) from error
        if not result.returncode or _OVERTAKEN not in result.stderr or attempt == ATTEMPTS - 1:
            break
    return result


def follow(
    action: str,
    path: str,
    command: str,
    *arguments: str,
    stdin: Buffer,
    told: Callable[[bytes], None],
    fds: Sequence[int] = (),
) -> Completed:
    """Like `run`, for what takes hours; `told` is given each line of its output.

    When we end early, it ends after the step that it is at; when we are killed, as soon as it has something to say.
    """
    argv = [*_program(), command, *arguments, "--batch-mode", os.path.abspath(path)]
    with contextlib.ExitStack() as stack:
        complaints = stack.enter_context(memory_file(b""))
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                env=_environment(),
                pass_fds=fds,
            )
        except OSError as error:
            raise CryptsetupNotStarted(action=action, path=path, reason=error.strerror or str(error)) from error
        stack.enter_context(child)
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(stdin)
                child.stdin.close()
            for line in child.stdout:
                told(line)
            child.wait()
        finally:
            child.terminate()
            child.wait()
        said = os.pread(complaints, _MOST_COMPLAINTS_BYTES, 0)
    return Completed(argv, child.returncode, b"", said)


def _program() -> list[str]:
    # An account without root's PATH can use it just as well: on plain files it needs no privilege.
    search = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    program = shutil.which("cryptsetup", path=search)
    if program is None:
        raise CryptsetupMissing
    return [program]


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def run_into(
    output: bytearray,
    action: str,
    path: str,
    command: str,
    *arguments: str,
    stdin: Buffer,
    fds: Sequence[int] = (),
) -> tuple[Completed, int]:
    """Like `run`, with the standard output in `output` only, and its length.

    Reading after the child's end is enough: the kernel's pipe buffer holds more than a key's dump.
    """
    read_fd, write_fd = os.pipe()
    try:
        try:
            result = run(action, path, command, *arguments, stdin=stdin, stdout=write_fd, fds=fds)
        finally:
            os.close(write_fd)
        return result, os.readv(read_fd, [output])
    finally:
        os.close(read_fd)


def checked(
    action: str,
    path: str,
    command: str,
    *arguments: str,
    stdin: Buffer = b"",
    after: Sequence[str] = (),
    fds: Sequence[int] = (),
) -> Completed:
    """Like `run`, and CryptsetupFailed unless it succeeded."""
    result = run(action, path, command, *arguments, stdin=stdin, after=after, fds=fds)
    if result.returncode != 0:
        raise failure(action, path, result)
    return result


def rejected(result: Completed) -> bool:
    """Whether no key slot was opened by the passphrase that it was given; there may be none at all."""
    none_usable = result.returncode == INVALID_EXIT and _NONE_USABLE in result.stderr
    return result.returncode == _REJECTED_EXIT or none_usable


def failure(action: str, path: str, result: Completed) -> CryptsetupFailed:
    """What a failed run is, if there is no better name for it."""
    return CryptsetupFailed(action=action, path=path, exit_code=result.returncode, reason=message(result))


def message(result: Completed) -> str:
    """Its complaints in one line, without the last full stop: our sentences have their own."""
    text = " ".join(result.stderr.decode(errors="replace").split())
    return text.removesuffix(".") or "it gave no reason"


@contextlib.contextmanager
def memory_file(content: Buffer) -> Iterator[int]:
    """A file that is on no disk and has no name, as a descriptor; a child sees it as `/dev/fd/N`."""
    fd = os.memfd_create("lockstep", os.MFD_CLOEXEC)
    try:
        left = memoryview(content).cast("B")
        while left:
            left = left[os.write(fd, left) :]
        yield fd
    finally:
        os.close(fd)
