"""Asking about disks that may never answer, as on a network file system whose server is gone.

Each question is put by a process of its own. A thread will not do: one that hangs within the kernel cannot be ended,
and keeps its whole process, and whoever reads what that prints, until the disk answers. So the process that asks has
nothing open that others wait for, and is left behind if it hangs. Its question is not put again as long as it is there.
"""

import contextlib
import itertools
import os
import pickle
import selectors
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NoReturn, TypeVar

from lockstep.errors import DiskSilent

Answer = TypeVar("Answer")

PATIENCE_S: Final = 5.0
AT_ONCE: Final = 64  # each takes a process and a descriptor
_PIECE_BYTES: Final = 64 << 10

_left_behind: dict[str, int] = {}  # question -> the process that has not answered it


def ask(questions: Mapping[str, Callable[[], Answer]], patience_s: float = PATIENCE_S) -> dict[str, Answer]:
    """Put the questions, AT_ONCE of them, and return the answers; what one raises is raised.

    Those that hang, or whose process is killed, have none. Patience ends when none has been answered for so long: many
    of them on a slow machine are no silence. For programs with one thread.
    """
    answers: dict[str, Answer] = {}
    unasked = ((name, question) for name, question in questions.items() if not _still_asked(name))
    with selectors.DefaultSelector() as waiting:
        try:
            while _ask_more(waiting, unasked):
                ready = waiting.select(patience_s)
                for each in (key for key, _ in ready):
                    name, pid, said = each.data
                    said += (piece := os.read(each.fd, _PIECE_BYTES))
                    if not piece:
                        _close(waiting, each.fd)
                        os.waitpid(pid, 0)
                        if said:  # else somebody has killed it, for its memory perhaps
                            answers[name] = _understood(said)
                if not ready:
                    _leave_behind(waiting)
        finally:
            _leave_behind(waiting)
    return answers


def silent(*paths: str | None) -> DiskSilent:
    """What to say of a disk, on one of these paths, that does not answer."""
    return DiskSilent(path=" or ".join(filter(None, paths)), patience_s=f"{PATIENCE_S:g}")


def _still_asked(name: str) -> bool:
    pid = _left_behind.pop(name, None)
    if pid is not None and os.waitpid(pid, os.WNOHANG) == (0, 0):
        _left_behind[name] = pid
    return name in _left_behind


def _ask_more(waiting: selectors.BaseSelector, unasked: Iterator[tuple[str, Callable[[], object]]]) -> bool:
    """Have as many questions under way as may be; False when there is none, and none left."""
    for name, question in itertools.islice(unasked, AT_ONCE - len(waiting.get_map())):
        pid, fd = _begin(question)
        waiting.register(fd, selectors.EVENT_READ, (name, pid, bytearray()))
    return bool(waiting.get_map())


def _leave_behind(waiting: selectors.BaseSelector) -> None:
    """Wait no longer for those that are under way."""
    for each in list(waiting.get_map().values()):
        name, pid, _ = each.data
        _close(waiting, each.fd)
        os.killpg(pid, signal.SIGKILL)
        _left_behind[name] = pid


def _begin(question: Callable[[], object]) -> tuple[int, int]:
    """The process that asks, in a group of its own with those that it starts, and where its answer comes from."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if not pid:
        _answer(question, write_fd)
    os.close(write_fd)
    with contextlib.suppress(PermissionError, ProcessLookupError):  # it has done so itself
        os.setpgid(pid, pid)
    return pid, read_fd


def _answer(question: Callable[[], object], fd: int) -> NoReturn:
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        os.closerange(3, fd)
        os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
        os.set_inheritable(fd, False)
        with open(fd, "wb") as answer:
            try:
                pickle.dump(question(), answer)
            except Exception as failure:  # noqa: BLE001 (it is for who asked)
                pickle.dump(failure, answer)
    finally:
        os._exit(0)


def _understood(said: bytearray) -> Any:
    found = pickle.loads(said)  # noqa: S301 (our own process wrote it)
    if isinstance(found, Exception):
        raise found
    return found


def _close(waiting: selectors.BaseSelector, fd: int) -> None:
    waiting.unregister(fd)
    os.close(fd)
