"""Who may update a mirror, and when: every case with every policy over every transport, through the real server.

The wall clock is stepped under the server; windows, grants, certificates and clients are the real ones. After each case
the bytes on both disks, the status and the audit trail are exactly what they have to be.
"""

import contextlib
import errno
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lockstep.registry.access import Grant
from lockstep.registry.audit import Actor, AuditRecord
from lockstep.registry.store import Registry
from lockstep.registry.windows import Window, parse
from lockstep.service import certificates
from tests.lab import MIB, Clock, Lab, Served, is_root, libnbd, wait_until

pytestmark = pytest.mark.skipif(not is_root(), reason="root acts on behalf of users here")

SIZE = 2 * MIB
BLOCK = 4096
REGION = 64 << 10
NIGHT = datetime(2027, 3, 2, 23, tzinfo=UTC)  # a Tuesday
NOON = datetime(2027, 3, 2, 12, tzinfo=UTC)
WINDOW = (parse("mon-fri 22:00-06:00"),)
TAKES_EFFECT_S = 1.0  # within this time a changed grant counts


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates for a server and for alice."""
    directory = tmp_path_factory.mktemp("tls") / "tls"
    certificates.make_authority(str(directory))
    certificates.make_client(str(directory), "alice")
    return directory


class Stage:
    """A served volume that is in sync, with a client of alice's, and what the two disks have to hold."""

    def __init__(self, lab: Lab, served: Served, uri: str, policy: str, clock: Clock) -> None:
        self.lab, self.served, self.policy, self.clock = lab, served, policy, clock
        self.volume = served.volume
        self.target = bytearray(self.volume.target.read_bytes())
        self.mirror = bytearray(self.target)
        self.nbd = libnbd()
        self.client = self.nbd.NBD()
        self.client.set_uri_allow_local_file(True)  # certificates
        self.client.connect_uri(uri)

    def write(self, block: int, fill: str) -> bool:
        """Have alice write a block, durably; False when she gets EPERM. Anything else fails the test."""
        try:
            self.client.pwrite(fill.encode() * BLOCK, block * BLOCK, flags=self.nbd.CMD_FLAG_FUA)
        except self.nbd.Error as error:
            if error.errnum != errno.EPERM:
                raise
            return False
        return True

    def expect(self, block: int, fill: str, *, target: bool, mirror: bool) -> None:
        """Note which of the disks has taken a write."""
        for disk, takes in ((self.target, target), (self.mirror, mirror)):
            if takes:
                disk[block * BLOCK : (block + 1) * BLOCK] = fill.encode() * BLOCK

    def writes_both(self, block: int, fill: str) -> None:
        """A write by alice that must reach both disks."""
        assert self.write(block, fill)
        self.expect(block, fill, target=True, mirror=True)
        self.assert_disks()

    def is_denied(self, block: int, fill: str, kind: str) -> None:
        """A write by alice that must be denied, as the policy has it."""
        assert self.write(block, fill) is (self.policy == "hold")
        self.expect(block, fill, target=self.policy == "hold", mirror=False)
        self.assert_disks()
        mirror = self.served.mirror()
        assert mirror["consistent"]
        if self.policy == "refuse":
            assert (mirror["state"], mirror["held_bytes"], mirror["held"]) == ("in-sync", 0, [])
            return
        assert (mirror["state"], mirror["dirty_bytes"]) == ("behind", 0)
        assert mirror["held_bytes"] >= REGION
        assert [(each["user"], each["kind"]) for each in mirror["held"]] == [("alice", kind)]
        assert mirror["frozen_since"] == mirror["held"][0]["since"]

    def assert_disks(self) -> None:
        assert self.volume.target.read_bytes() == self.target
        assert self.volume.decrypted() == self.mirror

    def await_effect(self, allowed: bool) -> None:
        """Wait until the server says so of alice."""
        wanted = [("alice", "allowed" if allowed else "denied")]
        wait_until(
            lambda: [(client["user"], client["verdict"]) for client in self.served.now()["clients"]] == wanted,
            f"the server to say {wanted}",
            TAKES_EFFECT_S + 4,  # for a busy machine
        )

    def rows(self) -> tuple[AuditRecord, ...]:
        with Registry.open(f"sqlite:///{self.lab.state}/registry.db") as registry:
            return registry.audit_rows()

    def leave(self, *expected: str) -> None:
        """Disconnect; alice's rows in the trail, from her connection on, must be these."""
        self.client.shutdown()
        wait_until(lambda: any(row.event == "disconnect" for row in self.rows()), "the disconnect to be written down")
        events = [row.event for row in self.rows() if row.user == "alice"]
        assert events == ["connect", *expected, "disconnect"]
        with Registry.open(f"sqlite:///{self.lab.state}/registry.db") as registry:
            assert registry.check_audit().reason is None

    def verdicts(self) -> list[str]:
        return [row.details["verdict"] for row in self.rows() if row.event == "verdict"]


@pytest.fixture
def stage(request: pytest.FixtureRequest, lab: Lab, authority: Path) -> Iterator[Callable[..., Stage]]:
    """Make a stage: `stage(time, windows of alice)`; without windows she is granted nothing."""
    policy, transport = request.param
    with contextlib.ExitStack() as exits:

        def make(shows: datetime, *granted: tuple[Window, ...]) -> Stage:
            clock = Clock(lab, shows)
            volume = lab.volume("vol", SIZE, "--on-denied", policy, content=random.Random(1).randbytes(SIZE))
            with Registry.open(f"sqlite:///{lab.state}/registry.db") as registry:
                for windows in granted:
                    registry.grant("vol", Grant("alice", windows, "UTC"), actor=Actor("root", "a test"))
            tls = lab.home / "tls"
            shutil.copytree(authority, tls)
            options = ["--tcp", "localhost:0", "--tls-dir", tls] if transport == "tls" else []
            served = exits.enter_context(volume.served(*options))
            uri = served.uri.replace("///vol", "///vol%40alice")
            if transport == "tls":
                uri = served.next_uri() + f"?tls-certificates={tls}/clients/alice"
            return Stage(lab, served, uri, policy, clock)

        yield make


everywhere = pytest.mark.parametrize(
    "stage",
    [(policy, transport) for policy in ("hold", "refuse") for transport in ("unix", "tls")],
    ids=lambda pair: "-".join(pair),
    indirect=True,
)
Make = Callable[..., Stage]


@everywhere
def test_granted(stage: Make) -> None:
    alice = stage(NOON, ())
    alice.writes_both(3, "a")
    assert alice.served.mirror_state() == "in-sync"
    alice.leave("verdict")
    assert alice.verdicts() == ["allowed"]


@everywhere
def test_not_granted(stage: Make) -> None:
    alice = stage(NOON)
    alice.is_denied(3, "a", "no-right")
    alice.is_denied(4, "b", "no-right")
    alice.leave("verdict", "denied", "denied-total")
    assert alice.verdicts() == ["no-right"]
    (total,) = [row for row in alice.rows() if row.event == "denied-total"]
    assert (total.details["updates"], total.details["bytes"]) == (2, 2 * BLOCK)
    alice.assert_disks()


@everywhere
def test_revoked_while_connected(stage: Make) -> None:
    alice = stage(NOON, ())
    alice.writes_both(3, "a")
    alice.lab.lockstep("revoke", "vol", "alice").ok()
    alice.await_effect(allowed=False)
    alice.is_denied(3, "b", "no-right")
    alice.leave("verdict", "verdict", "denied", "denied-total")
    assert alice.verdicts() == ["allowed", "no-right"]


@everywhere
def test_in_the_window(stage: Make) -> None:
    alice = stage(NIGHT, WINDOW)
    alice.writes_both(3, "a")
    alice.leave("verdict")


@everywhere
def test_outside_the_window(stage: Make) -> None:
    alice = stage(NOON, WINDOW)
    alice.is_denied(3, "a", "outside-window")
    alice.leave("verdict", "denied", "denied-total")
    assert alice.verdicts() == ["outside-window"]


@everywhere
def test_the_window_closes_in_a_burst_of_writes(stage: Make) -> None:
    """What was answered before is on both disks, what comes after on neither mirror; there is one moment between."""
    alice = stage(NIGHT + timedelta(hours=6, minutes=59), WINDOW)
    blocks = SIZE // BLOCK
    outcomes: list[bool] = []
    closing = threading.Timer(0.05, alice.clock.set, [NIGHT + timedelta(hours=7)])
    closing.start()
    for block in range(blocks):
        outcomes.append(alice.write(block, "w"))
        if alice.policy == "refuse" and not outcomes[-1]:
            break
    closing.join()
    alice.await_effect(allowed=False)
    alice.write(blocks - 1, "w")

    mirrored = alice.volume.decrypted()
    taken = next((n for n in range(blocks) if mirrored[n * BLOCK : (n + 1) * BLOCK] != b"w" * BLOCK), blocks)
    for block in range(blocks):
        mirror = block < taken
        alice.expect(block, "w", target=mirror or alice.policy == "hold", mirror=mirror)
    alice.assert_disks()
    if alice.policy == "hold":
        assert all(outcomes)
        mirror_status = alice.served.mirror()
        assert mirror_status["consistent"]
        assert mirror_status["frozen_since"] >= (NIGHT + timedelta(hours=7)).timestamp()
    else:
        assert outcomes == [True] * taken + [False]
    alice.leave("verdict", "verdict", "denied", "denied-total")


@everywhere
def test_the_window_opens_with_bytes_behind(stage: Make) -> None:
    alice = stage(NOON, WINDOW)
    alice.is_denied(3, "a", "outside-window")
    alice.clock.set(NIGHT)
    alice.await_effect(allowed=True)
    if alice.policy == "hold":
        wait_until(lambda: alice.served.mirror_state() == "in-sync", "the mirror to be caught up by itself")
        alice.expect(3, "a", target=True, mirror=True)
        mirror = alice.served.mirror()
        assert (mirror["held_bytes"], mirror["held"], mirror["frozen_since"]) == (0, [], None)
    alice.writes_both(3, "b")
    alice.leave("verdict", "denied", "denied-total", "verdict")
    assert alice.verdicts() == ["outside-window", "allowed"]


@everywhere
def test_a_clock_that_is_stepped_leaves_no_stale_permission(stage: Make) -> None:
    alice = stage(NIGHT, WINDOW)
    for step in range(4):
        alice.clock.set(NOON if step % 2 == 0 else NIGHT - timedelta(weeks=step))
        allowed = step % 2 == 1
        assert alice.write(step, "s") is (allowed or alice.policy == "hold")  # at once, not within a second
        alice.expect(step, "s", target=allowed or alice.policy == "hold", mirror=allowed)
        if allowed:
            wait_until(lambda: alice.served.mirror_state() == "in-sync", "the mirror to be caught up by itself")
            alice.mirror[:] = alice.target
    alice.assert_disks()


@pytest.mark.parametrize("stage", [("hold", "unix")], indirect=True)
def test_the_policy_changes_while_the_volume_is_served(stage: Make) -> None:
    alice = stage(NOON)
    alice.is_denied(3, "a", "no-right")
    alice.lab.lockstep("set", "vol", "on-denied=refuse").ok()
    wait_until(lambda: not alice.write(100, "r"), "the policy to take effect", TAKES_EFFECT_S + 4)
    alice.lab.lockstep("set", "vol", "on-denied=hold").ok()
    wait_until(lambda: alice.write(100, "r"), "the policy to take effect", TAKES_EFFECT_S + 4)
    assert [row.details for row in alice.rows() if row.event == "on-denied"] == [
        {"on_denied": "refuse"},
        {"on_denied": "hold"},
    ]


@pytest.mark.parametrize("stage", [("hold", "unix")], indirect=True)
def test_what_is_held_for_want_of_a_right_is_released_by_who_has_it(stage: Make) -> None:
    alice = stage(NOON)
    alice.is_denied(3, "a", "no-right")
    alice.lab.lockstep("grant", "vol", "alice").ok()
    alice.await_effect(allowed=True)
    alice.assert_disks()  # a grant alone carries nothing over
    alice.lab.lockstep("sync", "vol", "--wait").failed(3, "is behind")
    alice.assert_disks()
    alice.lab.lockstep("revoke", "vol", "root").ok()
    alice.lab.lockstep("sync", "vol", "--include-held").failed(4, "root has no right")
    alice.assert_disks()
    alice.lab.lockstep("grant", "vol", "root").ok()
    alice.lab.lockstep("sync", "vol", "--include-held", "--wait").ok()
    alice.expect(3, "a", target=True, mirror=True)
    alice.assert_disks()
    assert alice.served.mirror_state() == "in-sync"
    (row,) = [row for row in alice.rows() if row.event == "sync" and row.details["released_bytes"]]
    assert row.user == "root"
