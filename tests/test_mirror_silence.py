"""P5: a mirror that does not answer holds a client up once, for as long as was configured, and then nobody.

The mirror lies on nbdkit, shown as a file by nbdfuse: stopped (SIGSTOP), it answers nothing, and its requests hang in
the kernel as those of a dead disk do; with the error filter, it fails requests at a rate.
"""

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from lockstep.disk.patience import PATIENCE_S
from tests.lab import MIB, Clients, Lab, Served, Storage, Volume, needs, run, wait_until

pytestmark = needs("nbdkit", "nbdfuse", "fusermount3", "/dev/fuse", root=True)

SIZE_BYTES: Final = 16 * MIB
TIMEOUT_S: Final = 1.0
SLACK_S: Final = 5.0  # what a busy machine may add; without the time-out, nothing would come at all


@pytest.fixture
def storage(lab: Lab) -> Iterator[Storage]:
    storage = Storage(lab.home / "storage", SIZE_BYTES + 16 * MIB)
    yield storage
    storage.close()


@pytest.fixture
def volume(lab: Lab, storage: Storage) -> Volume:
    target = lab.disk("target", SIZE_BYTES)
    disks = ["--target", target, "--mirror", storage.path, "--key-file", lab.key]
    lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
    return Volume(lab, "vol", target, storage.path, None)


def latencies(clients: Clients, offsets: range, fill: bytes) -> list[float]:
    """Write 4 KiB at each offset, one after the other; how long each took, in s."""
    took = []
    for offset in offsets:
        began_s = time.monotonic()
        clients.write(0, offset, fill * 4096)
        clients.finish()
        took.append(time.monotonic() - began_s)
    return took


def test_a_silent_mirror_holds_clients_up_once_and_comes_back(
    volume: Volume, storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    with volume.served("--mirror-timeout", TIMEOUT_S) as served:
        clients = Clients(served.uri, 2)
        before = latencies(clients, range(0, MIB, 64 << 10), b"a")
        with storage.stopped():
            first, *others = latencies(clients, range(0, MIB, 64 << 10), b"b")
            others += latencies(clients, range(4 * MIB, 5 * MIB, 64 << 10), b"c")  # not marked before
            began_s = time.monotonic()
            clients.flush(1)
            clients.finish()
            others.append(time.monotonic() - began_s)
            mirror = served.mirror()
            assert mirror["state"] == "degraded"
            assert "it did not answer for 1 s" in mirror["error"]
            assert 2 * MIB <= mirror["dirty_bytes"] <= 4 * MIB
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be back")
        clients.close()
    figures = statistics.median(before), first, statistics.median(others), max(others)
    with capsys.disabled():
        said = "{:.1f}; {:.0f} for the first that hangs; then {:.1f}, at most {:.0f}"
        print("\nwrite latency in ms:", said.format(*(1e3 * each for each in figures)))
    assert first < TIMEOUT_S + SLACK_S
    assert max(others) < max(SLACK_S, TIMEOUT_S)
    assert "copying" in served.log.read_text().split("is back")[1], "what was missed is copied"
    volume.assert_equal_disks()


def test_what_a_silent_mirror_completes_later_changes_nothing(volume: Volume, storage: Storage) -> None:
    """Its old write ends after the client has written there again; the mirror is not taken back before."""
    with volume.served("--mirror-timeout", TIMEOUT_S) as served:
        clients = Clients(served.uri, 8)
        with storage.stopped():
            for who in range(8):
                clients.write(who, who * 4096, b"o" * 4096)  # each hangs on its way to the mirror
            clients.finish()
            for who in range(8):
                clients.write(who, who * 4096, b"n" * 4096)
            clients.finish()
            assert served.mirror_state() == "degraded"
        wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be back")
        clients.close()
    volume.assert_equal_disks()
    assert volume.target.read_bytes()[: 8 * 4096] == b"n" * (8 * 4096)


def test_a_stop_does_not_wait_for_a_silent_mirror(lab: Lab, volume: Volume, storage: Storage) -> None:
    """All is in order and let go; the kernel alone keeps the process until the disk has answered."""
    with volume.served("--mirror-timeout", TIMEOUT_S) as served:
        clients = Clients(served.uri, 1)
        with storage.stopped():
            latencies(clients, range(0, 8192, 4096), b"x")
            served.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not Path(served.socket).exists(), "the socket to be gone")
            wait_until(lambda: is_over(served), "the server to have ended but for the kernel's sake")
            run("flock", "--nonblock", str(lab.state / "run" / "vol.lock"), "true")
        assert served.process.wait(60) == 0
    with volume.served() as served:
        assert "copying 1048576 bytes" in served.log.read_text(), "what was missed, and no more"
    volume.assert_equal_disks()


def is_over(served: Served) -> bool:
    """Whether its main thread has ended: a zombie, which cannot be reaped while another one hangs in the kernel."""
    try:
        return Path(f"/proc/{served.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_mirror_that_fails_at_a_rate_never_fails_a_client_and_is_equal_in_the_end(lab: Lab) -> None:
    home = lab.home / "faulty"
    home.mkdir()
    image, socket, point, switch = home / "image", home / "socket", home / "mnt", home / "errors"
    image.write_bytes(b"")
    with image.open("wb") as file:
        file.truncate(SIZE_BYTES + 16 * MIB)
    point.mkdir()
    error = ["--filter=error", f"error-file={switch}", "error-pwrite=EIO", "error-pwrite-rate=0.02"]
    nbdkit = subprocess.Popen(["nbdkit", "-f", "-U", socket, error[0], "file", image, *error[1:]])
    wait_until(socket.exists, "nbdkit to listen")
    fuse = subprocess.Popen(["nbdfuse", point / "disk", "--unix", socket])
    try:
        wait_until((point / "disk").exists, "nbdfuse to show the disk")
        target = lab.disk("target", SIZE_BYTES)
        disks = ["--target", target, "--mirror", point / "disk", "--key-file", lab.key]
        lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
        volume = Volume(lab, "vol", target, point / "disk", None)
        with volume.served() as served:
            clients = Clients(served.uri, 2)
            switch.touch()
            for number in range(400):
                clients.write(number % 2, number * 8192, bytes([number % 251]) * 8192)
                clients.finish()
            assert served.mirror_state() in ("degraded", "syncing", "in-sync")
            switch.unlink()
            wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to be in sync")
            clients.close()
        assert "Input/output error" in served.log.read_text()
        volume.assert_equal_disks()
    finally:
        subprocess.run(["fusermount3", "-u", "-z", point], capture_output=True, check=False)
        fuse.wait()
        nbdkit.terminate()
        nbdkit.wait()


def test_a_mirror_that_hangs_from_the_start_does_not_keep_the_volume_from_being_served(
    volume: Volume, storage: Storage
) -> None:
    with volume.served():
        pass
    with storage.stopped():
        served = Served(volume, ["--mirror-timeout", TIMEOUT_S])
        try:
            served.await_ready()
            clients = Clients(served.uri, 1)
            latencies(clients, range(0, 8192, 4096), b"x")
            assert "it did not answer for 1 s" in served.mirror()["error"]
        except BaseException:
            served.kill()
            raise
    wait_until(lambda: served.mirror_state() == "in-sync", "the mirror to come")
    clients.close()
    served.stop()
    served.kill()
    volume.assert_equal_disks()


def test_the_status_at_rest_says_which_disk_does_not_answer(lab: Lab, volume: Volume, storage: Storage) -> None:
    """Whoever reads it from a pipe is done then, too: what hangs in the kernel has nothing open."""
    with volume.served():
        pass
    with storage.stopped():
        began_s = time.monotonic()
        (described,) = json.loads(Lab.lockstep(lab, "status", "--json").ok())["volumes"]
        assert time.monotonic() - began_s < PATIENCE_S + SLACK_S
        assert described["target"]["error"] is None
        (mirror,) = described["mirrors"]
        assert (mirror["state"], mirror["dirty_bytes"], mirror["consistent"]) == ("behind", SIZE_BYTES, False)
        assert f"{storage.path} does not answer" in mirror["error"]
        assert f"{storage.path} does not answer" in Lab.lockstep(lab, "status", "vol").ok()
        assert "behind" in Lab.lockstep(lab, "mirror", "list", "vol").ok()
    (mirror,) = json.loads(lab.lockstep("status", "--json").ok())["volumes"][0]["mirrors"]
    assert (mirror["state"], mirror["error"]) == ("in-sync", None)


def test_who_watches_a_disk_that_does_not_answer_waits_for_it_once(lab: Lab, volume: Volume, storage: Storage) -> None:
    command = [sys.executable, "-m", "lockstep", "--state-dir", str(lab.state), "status", "--watch", "--json"]
    with storage.stopped(), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        for _ in range(3):
            (described,) = json.loads(watching.stdout.readline())["volumes"]
            assert "does not answer" in described["mirrors"][0]["error"]
        left = Path(f"/proc/{watching.pid}/task/{watching.pid}/children").read_text().split()
        watching.terminate()
        assert watching.wait(60) == 130
    assert len(left) == 1


def test_a_target_that_does_not_answer_leaves_the_mirror_what_it_is(lab: Lab, storage: Storage) -> None:
    """An nbdfuse that is stopped itself: then not even a look at the name of its file is answered."""
    target = storage.path
    disks = ["--target", target, "--mirror", lab.home / "mirror", "--key-file", lab.key]
    lab.lockstep("create", "vol", *disks, environment=lab.quick_format()).ok()
    with Volume(lab, "vol", target, lab.home / "mirror", None).served():
        pass
    with storage.hidden():

        def is_missed() -> bool:
            return f"{target} does not answer" in Lab.lockstep(lab, "status").ok()

        wait_until(is_missed, "what the kernel remembers of the name to expire")
        (described,) = json.loads(Lab.lockstep(lab, "status", "--json").ok())["volumes"]
        assert f"{target} does not answer" in described["target"]["error"]
        assert described["mirrors"][0]["state"] == "in-sync"


def test_a_disk_that_does_not_answer_keeps_nobody_from_restoring_another(
    lab: Lab, volume: Volume, storage: Storage
) -> None:
    other = lab.volume("other", MIB, content=b"o" * MIB)
    with other.served():
        pass
    before = other.mirror.read_bytes()
    with storage.hidden():

        def is_missed() -> bool:
            return "does not answer" in Lab.lockstep(lab, "status").ok()

        wait_until(is_missed, "what the kernel remembers of the name to expire")
        said = other.restore(other.mirror, "--force")
        assert said.code != 0, "no mirror is taken for an output"
        other.restore(lab.home / "output").ok()
        lab.lockstep("header", "backup", "other", lab.home / "backup").ok()
        create = ("create", "third", "--target", lab.disk("third", MIB))
        assert f"{storage.path} does not answer" in lab.lockstep(*create).failed(1, "dmesg")
    assert (lab.home / "output").read_bytes() == b"o" * MIB
    assert other.mirror.read_bytes() == before
    lab.lockstep(*create).ok()
