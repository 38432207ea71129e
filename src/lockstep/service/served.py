"""What the control interface may ask of a served volume."""

from dataclasses import dataclass
from typing import Any

from lockstep.nbd.server import NbdServer
from lockstep.registry.audit import Actor
from lockstep.service import status
from lockstep.service.background import Background
from lockstep.service.gate import VolumeGate
from lockstep.service.trail import Trail
from lockstep.service.verification import Verification
from lockstep.service.volume_session import VolumeSession


@dataclass(frozen=True)
class ServedVolume:
    """A volume, its server, and what goes on beside it."""

    session: VolumeSession
    server: NbdServer
    gate: VolumeGate
    trail: Trail
    background: Background
    verification: Verification
    uri: str

    def describe(self) -> dict[str, Any]:
        """Return the volume as `status --json` prints it."""
        clients = [status.of_client(user, self.gate.verdict(user)) for user in self.server.clients()]
        mirrors = [status.of_link(each.link) | {"sought": self.background.seeks(each)} for each in self.session.mirrors]
        for mirror in mirrors:
            mirror["error"] = mirror["error"] or self.trail.error
        uri = self.uri if self.server.accepting else None
        record, filling = self.session.record, self.session.filling
        restore = status.of_filling(filling, record.size_bytes) if filling else None
        described = status.of_volume(record, mirrors, uri=uri, clients=clients, restore=restore)
        described["target"]["direct"] = self.session.writes.target.direct
        errors = (self.session.writes.error, self.session.target_error, self.session.reads.error)
        described["target"]["error"] = next(filter(None, errors), None)
        return described

    async def sync(self, actor: Actor, *, include_held: bool, compare: bool, everything: bool) -> None:
        """Have what differs copied, or with `everything` all.

        Raises MayNotRelease, StateDirUnusable, DiskBusy, TargetUnfinished.
        """
        await self.background.sync(actor, include_held=include_held, compare=compare, everything=everything)

    def look_for_mirrors(self, actor: Actor) -> None:
        """Look at once for mirrors that are away."""
        self.background.look_for_mirrors(actor)

    async def let_go(self, luks_uuid: str, purpose: str) -> None:
        """Stop following a mirror, in order, for another command. Raises DiskBusy, MirrorNotDrilled."""
        for session in self.session.mirrors:
            if session.mirror.luks_uuid == luks_uuid:
                await session.step_aside(self.session.writes, purpose)

    def verify(self, actor: Actor, *, repair: bool) -> None:
        """Begin to compare. Raises AlreadyVerifying."""
        self.verification.begin(actor, repair=repair)

    async def stop_verifying(self) -> None:
        """End a comparison early."""
        await self.verification.stop()

    async def verified(self, patience_s: float) -> dict[str, Any]:
        """Return what the last comparison found; one that is under way, when it ends, or else how far it is by then."""
        await self.verification.wait(patience_s)
        return self.verification.describe()
