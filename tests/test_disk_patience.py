"""Asking about many disks, of which some never answer: by a program of its own, since it forks."""

import subprocess
import sys

_MOST_FILES = 128

_ASK = f"""
import functools, resource, time
from lockstep.disk import patience
resource.setrlimit(resource.RLIMIT_NOFILE, ({_MOST_FILES}, {_MOST_FILES}))
"""


def ask(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", _ASK + program], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_more_disks_than_a_process_may_have_open() -> None:
    ask("""
answers = patience.ask({str(each): functools.partial(int, each) for each in range(200)})
assert answers == {str(each): each for each in range(200)}
""")


def test_those_that_hang_keep_none_from_being_asked() -> None:
    ask("""
hanging = {f"silent {each}": functools.partial(time.sleep, 600) for each in range(200)}
assert patience.ask(hanging | {"sound": int}, 0.2) == {"sound": 0}
began_s = time.monotonic()
assert patience.ask({"one more": int}, 60) == {"one more": 0}  # nothing that hung was left under way
assert time.monotonic() - began_s < 30
""")


def test_one_whose_process_is_killed_has_no_answer_and_ends_nothing() -> None:
    ask("""
import os, signal
assert patience.ask({"killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "sound": int}) == {"sound": 0}
""")
